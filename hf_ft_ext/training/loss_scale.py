"""Keeping the loss scale independent of gradient accumulation and process count."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from hf_ft_ext.per_example.outputs import loss_of
from hf_ft_ext.per_example.state import evaluating
from hf_ft_ext.training.generators import generators_kept

_MEAN_LOSS = "ForSequenceClassification"


def declare_mean_loss(model: nn.Module) -> None:
    """Tell `Trainer` that a sequence-classification head averages its loss over the micro-batch it gets.

    transformers 5 assumes that any forward with `**kwargs` divides by the label count of the whole step.
    Classification heads ignore that count. Without this switch their loss and gradients grow with the number of
    micro-batches and of processes (transformers issue #47688). `accepts_loss_kwargs` is transformers' own switch, read
    from the model inside peft's wrapper. `MethodTrainer` finds out about other heads by `ignores_count`.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if type(inner).__name__.endswith(_MEAN_LOSS):
        inner.accepts_loss_kwargs = False


def ignores_count(model: nn.Module, inputs: Mapping[str, Any], count: torch.Tensor | int) -> bool | None:
    """Whether the model's loss ignores `num_items_in_batch`, the label count that it is divided by.

    Heads of images and sounds, and many others, take `**kwargs` and average over the batch. The loss is computed
    twice, without dropout, for `count` and for twice as many.

    Returns:
        `None` if the loss does not tell: there is none, it is 0, or not finite.
    """
    return is_unscaled(lambda n: loss_of(model(**inputs, num_items_in_batch=n)), model, count)


def is_unscaled(
    loss: Callable[[torch.Tensor | int], torch.Tensor | None], model: nn.Module, count: torch.Tensor | int
) -> bool | None:
    """Whether `loss(count)` equals `loss(2 * count)`, without dropout and with the same random numbers.

    Returns:
        `None` if the loss does not tell: there is none, it is 0, or not finite.
    """
    found = []
    with torch.no_grad(), evaluating(model):
        for n in (count, 2 * count):
            with generators_kept():  # a user's loss may mix rows by numpy's numbers
                found.append(loss(n))
    once, twice = found
    if once is None or twice is None or not once.isfinite().all() or not once.any():
        return None
    return torch.equal(once, twice)


def one_answer(accelerator: Accelerator, mine: bool | None) -> bool | None:
    """Return one answer for all processes, which see different batches; all have to call it.

    Args:
        mine: this process's answer; `None` if its batch does not tell.

    Returns:
        `True` if one process says so, else `False` if one does; `None` if no process can tell.
    """
    if accelerator.num_processes == 1:
        return mine
    answer = torch.tensor([-1 if mine is None else int(mine)], device=accelerator.device)
    found = int(accelerator.gather(answer).max())
    return None if found < 0 else bool(found)
