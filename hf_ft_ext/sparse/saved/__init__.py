"""Save the changes of a SparseGrad run, as a delta file or as a standard LoRA adapter."""
