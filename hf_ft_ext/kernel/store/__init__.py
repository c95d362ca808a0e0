"""Kernels and projected gradients on disk: a run's blocks (`parts`), and files in the authors' format (`authors`)."""

from hf_ft_ext.kernel.store.authors import find_task, kernel_file, logits_file, read_kernel, read_logits, write_kernel
from hf_ft_ext.kernel.store.parts import DESCRIPTION, FeatureStore, KernelStore, model_hash, rows_hash

__all__ = [
    "DESCRIPTION",
    "FeatureStore",
    "KernelStore",
    "find_task",
    "kernel_file",
    "logits_file",
    "model_hash",
    "read_kernel",
    "read_logits",
    "rows_hash",
    "write_kernel",
]
