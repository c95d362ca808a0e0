"""`SparseAdamW`: the support of its steps, its moments, and basis refreshes."""

from hf_ft_ext.sparse.optimizer.adamw import SparseAdamW, restore_supports

__all__ = ["SparseAdamW", "restore_supports"]
