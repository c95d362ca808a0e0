"""The FISH masks by name: what the arguments need to know of them, without the model code that makes them."""

from hf_ft_ext.fisher.losses import EXPECTED, TRUE

# name -> which labels, which power of the gradient
SCORED = {
    "label-square": (TRUE, 2),
    "label-absolute": (TRUE, 1),
    "expect-square": (EXPECTED, 2),
    "expect-absolute": (EXPECTED, 1),
}
RANDOM, BIAS = "random", "bias"
MASKS = (*SCORED, RANDOM, BIAS)
