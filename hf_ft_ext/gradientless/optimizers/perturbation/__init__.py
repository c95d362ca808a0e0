"""The parts of `SPSA`: random directions, forward passes with perturbed weights, slopes, and updates."""
