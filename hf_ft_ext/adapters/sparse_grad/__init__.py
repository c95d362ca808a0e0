"""Structured SparseGrad as a PEFT method: a trained block of each weight in a basis chosen from gradients."""
