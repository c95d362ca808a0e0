"""The training plan: which weights a Trainer will train, in how many steps, and the estimated memory."""

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import Trainer

from hf_ft_ext.adapters.layers import fold_layer_numbers
from hf_ft_ext.per_example.saved import saved_bytes
from hf_ft_ext.training.method_trainer import loss_of_batch
from hf_ft_ext.training.weights.precision import training_precision
from hf_ft_ext.training.weights.sharding import entries, whole_shape

_MIB = 2**20


@dataclass(frozen=True)
class TrainedWeight:
    """One weight that training changes.

    Attributes:
        name: dotted name in the model.
        shape: shape of the weight.
        trained: entries that training changes.
        gradient_bytes: size of its gradient.
        state_bytes: size of its optimizer state.
    """

    name: str
    shape: tuple[int, ...]
    trained: int
    gradient_bytes: int
    state_bytes: int

    @classmethod
    def dense(cls, name: str, weight: nn.Parameter) -> "TrainedWeight":
        """A weight that AdamW trains in full: two moments of the weight's size."""
        shape = whole_shape(weight)
        size = shape.numel() * weight.element_size()
        return cls(name, tuple(shape), shape.numel(), size, 2 * size)


@dataclass(frozen=True)
class TrainingPlan:
    """The weights that would train, the number of steps, and the memory they would take in bytes."""

    weights: list[TrainedWeight]
    total_parameters: int
    weight_bytes: int
    activation_bytes: int | None
    steps: int | None
    batch_size: int

    @property
    def trainable(self) -> int:
        """Entries that training changes."""
        return sum(weight.trained for weight in self.weights)

    @property
    def memory(self) -> dict[str, int]:
        """Bytes by part; activations are those saved for the backward pass of one micro-batch."""
        return {
            "weights": self.weight_bytes,
            "gradients": sum(weight.gradient_bytes for weight in self.weights),
            "optimizer state": sum(weight.state_bytes for weight in self.weights),
            "activations": self.activation_bytes or 0,
        }

    def table(self) -> str:
        """The plan as text: one line per group of weights (layer numbers folded), then the totals."""
        groups: dict[tuple[str, tuple[int, ...]], list[TrainedWeight]] = {}
        for weight in self.weights:
            groups.setdefault((fold_layer_numbers(weight.name), weight.shape), []).append(weight)
        rows = [("what trains", "shape", "count", "entries trained", "of")]
        for (name, shape), members in groups.items():
            entries = sum(weight.trained for weight in members)
            full = len(members) * torch.Size(shape).numel()
            rows.append((name, "x".join(map(str, shape)), str(len(members)), f"{entries:,}", f"{full:,}"))
        share = 100 * self.trainable / max(self.total_parameters, 1)
        lines = [
            *align(rows),
            "",
            f"trainable: {self.trainable:,} of {self.total_parameters:,} parameters ({share:.2f} %)",
            "memory estimate: "
            + ", ".join(f"{name} {size / _MIB:,.1f} MiB" for name, size in self.memory.items())
            + f"; sum {sum(self.memory.values()) / _MIB:,.1f} MiB",
        ]
        if self.steps is not None:
            lines.append(f"steps: {self.steps:,} of {self.batch_size} examples")
        return "\n".join(lines)


def align(rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Lines of a table: the first column left-aligned, the others right-aligned."""
    rows = list(rows)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def trained_weights(trainer: Trainer) -> list[TrainedWeight]:
    """The weights that `trainer` changes.

    A trainer that trains only some entries of a weight defines a method `trained_weights()`, which is called. For all
    others it is every parameter with `requires_grad`.
    """
    if hasattr(trainer, "trained_weights"):
        return trainer.trained_weights()
    return [TrainedWeight.dense(name, p) for name, p in trainer.model.named_parameters() if p.requires_grad]


def model_weights(trainer: Trainer) -> list[torch.Tensor]:
    """All weights of the model.

    A trainer whose parameters are some entries of a weight, beside that weight, defines a method `model_weights()`,
    which is called. For all others it is every parameter.
    """
    if hasattr(trainer, "model_weights"):
        return trainer.model_weights()
    return list(trainer.model.parameters())


def total_parameters(trainer: Trainer) -> int:
    """Number of entries of all weights of the model."""
    return sum(entries(weight) for weight in model_weights(trainer))


def training_plan(trainer: Trainer, measure_activations: bool = True) -> TrainingPlan:
    """Compute the plan of `trainer.train()` without training; model and torch's random state stay unchanged.

    A trainer whose model depends on the data defines a method `prepare()`, which is called first.

    Args:
        measure_activations: run the first micro-batch forward and count what autograd saves.
    """
    getattr(trainer, "prepare", lambda: None)()
    model, args = trainer.model, trainer.args
    activation_bytes = steps = None
    if trainer.train_dataset is not None:
        dataloader = trainer.get_train_dataloader()
        steps = trainer.set_initial_training_values(args, dataloader)[-1]
        if measure_activations:
            with torch.random.fork_rng():
                batch = next(iter(dataloader))
                activation_bytes = saved_activation_bytes(trainer, batch)
    held = {id(weight): weight for weight in (*model.parameters(), *model_weights(trainer))}
    return TrainingPlan(
        weights=trained_weights(trainer),
        total_parameters=total_parameters(trainer),
        weight_bytes=sum(entries(weight) * weight.element_size() for weight in held.values()),
        activation_bytes=activation_bytes,
        steps=steps,
        batch_size=trainer.get_total_train_batch_size(args),
    )


def saved_activation_bytes(trainer: Trainer, batch: dict) -> int:
    """Bytes that autograd saves between the forward and the backward pass of `batch`, weights excluded.

    A trainer that prepares its model only during training defines a context manager `planning()`, which is entered.
    """
    modes = [(module, module.training) for module in trainer.model.modules()]
    trainer.model.train()
    try:
        with (
            getattr(trainer, "planning", contextlib.nullcontext)(),
            saved_bytes(trainer.model) as saved,
            training_precision(trainer, gradients=False),
        ):
            loss_of_batch(trainer, trainer.model, trainer._prepare_inputs(batch))
    finally:
        for module, training in modes:
            module.training = training
    return sum(saved.values())
