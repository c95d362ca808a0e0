"""Structured SparseGrad as a PEFT method: a trained block of each weight, in a basis computed from gradients."""

import peft  # noqa: F401 (first: as in the folders of the other adapters)
