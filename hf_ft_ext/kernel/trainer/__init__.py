"""`KernelTrainer`: `solving` fits the task, `solved` predicts and saves, `source` computes or loads kernels."""

from hf_ft_ext.kernel.trainer.solving import KernelTrainer

__all__ = ["KernelTrainer"]
