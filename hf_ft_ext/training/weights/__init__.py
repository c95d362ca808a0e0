"""Number formats of a model's weights, and their placement on devices and processes."""
