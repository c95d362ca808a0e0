"""What a SparseGrad run leaves: its changes as a file of their own, or as a standard LoRA adapter."""
