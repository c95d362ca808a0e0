"""Measure and plot the sparsity of gradients during training."""

from hf_ft_ext.sparse.sparsity.measure import FRACTIONS, FRESH, RAW, START, captured_energy, measure_sparsity

__all__ = ["FRACTIONS", "FRESH", "RAW", "START", "captured_energy", "measure_sparsity"]
