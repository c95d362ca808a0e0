"""Training chosen entries of weights: k values and where they lie, nothing of a weight's size kept beside it."""
