"""Random directions, losses of perturbed weights, and what a step makes of them: the parts of `SPSA`."""
