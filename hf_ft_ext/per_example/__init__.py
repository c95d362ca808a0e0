"""Gradients of each example by itself, for a scalar of each example: shared by the methods that need them."""
