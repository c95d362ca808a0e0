"""Per-example gradients: for each example, the gradient of its own scalar. Used by the kernel and Fisher methods."""
