"""Empirical neural tangent kernels in place of fine-tuning."""
