"""`KernelTrainer` (`solving`), what it does once a kernel is solved (`solved`), where kernels come from (`source`)."""

from hf_ft_ext.kernel.trainer.solving import KernelTrainer

__all__ = ["KernelTrainer"]
