"""Training of chosen entries of weights: only k values and their indices are stored in addition to the weights."""
