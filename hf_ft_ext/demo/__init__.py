"""The built-in demo: a synthetic sentiment data set and a small pretrained encoder."""
