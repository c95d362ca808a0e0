"""Names of searches and of what they search, as arguments say them."""

METHODS = GLD, SPSA_METHOD, NODE, ADAM_BASELINE = ("gld", "spsa", "node", "adam")
FISHER_FORMS = DIVERGENCE, GRADIENT = ("divergence", "gradient")
HEAD, ALL, TRAINABLE, ADAPTER = "head", "all", "trainable", "adapter"
