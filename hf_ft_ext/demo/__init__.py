"""The built-in demo: a made-up sentiment data set and a small pretrained encoder."""
