"""How much each entry of a head's tensor matters: by the logits' divergence when it is perturbed, or by gradients."""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from hf_ft_ext.gradientless.scoring.batched_heads import BatchedHead, Call, on_rows
from hf_ft_ext.gradientless.scoring.objectives import classification_loss

_NUMBERS = 2**17  # distances at a time: half a MiB, so that they stay in the processor's cache


def henze_penrose(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Divergence of two samples by the errors of a 1-nearest-neighbour classifier that tells them apart.

    `D = 1 - (M + N) / (2 M N) * errors` with `M = N = rows`: 1 if every point's neighbour is of its own sample, -1 if
    none is. A neighbour of the other sample counts only if it is strictly nearer than all of its own.

    Args:
        before: `[rows, classes]`.
        after: `[n, rows, classes]`: `n` second samples, each compared with `before`.

    Returns:
        `[n]`.
    """
    rows = len(before)
    own = _nearest_other(before[None])[0]
    result = []
    for part in after.split(max(1, _NUMBERS // rows**2)):
        across = _distances(before.expand_as(part), part)
        errors = (across.amin(2) < own).sum(1) + (across.amin(1) < _nearest_other(part)).sum(1)
        result.append(1 - errors.to(before.dtype) / rows)
    return torch.cat(result)


def _distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Squared distances `[n, rows, rows]`, by differences: the norms' formula would lose small ones."""
    result = None
    for x, y in zip(a.unbind(-1), b.unbind(-1), strict=True):
        difference = (x[:, :, None] - y[:, None]).square_()
        result = difference if result is None else result.add_(difference)
    return result


def _nearest_other(points: torch.Tensor) -> torch.Tensor:
    distances = _distances(points, points)
    distances.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    return distances.amin(2)


def divergence_scores(
    heads: Sequence[BatchedHead], before: torch.Tensor, parameter: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Divergence of the logits of this step's rows when entry `i` alone is moved by `N(0, max|theta|)`: `[numel]`.

    The thesis's "Fisher importance", for many entries at once.

    Args:
        heads: one for each micro-batch, after a pass at the present weights; each needs a new one afterwards.
        before: logits of all rows at the present weights, `[rows, classes]`.
    """
    parameter = parameter.detach()
    noise = torch.randn(parameter.numel(), generator=generator).to(parameter.device, parameter.dtype)
    noise *= parameter.abs().max()
    before = before.float()
    scores = torch.empty(parameter.numel(), device=parameter.device)
    movers = [_Moved(head, parameter, noise) for head in heads]
    for entries in movers[0].parts():
        after = torch.cat([mover.logits(entries) for mover in movers], 1).float()
        scores[entries] = henze_penrose(before, after)
    return scores


class _Moved:
    """Logits of one micro-batch when single entries of one parameter are moved."""

    def __init__(self, head: BatchedHead, parameter: torch.Tensor, noise: torch.Tensor):
        self.head, self.parameter, self.noise = head, parameter, noise
        self.module, self.name = next(o for key, o in head.owner.items() if self._is(o))
        self.call = head.calls[id(self.module)]
        self.order = sorted(head.calls.values(), key=lambda call: call.position)
        modules = {id(module): module for module in head.modules.values()}
        self.at = {call.position: modules[key] for key, call in head.calls.items()}
        self.last = self.at[len(self.order) - 1]
        linear = type(self.module) is nn.Linear and type(self.last) is nn.Linear
        self.is_last = linear and self.module is self.last
        self.is_before_last = linear and self.call.position == len(self.order) - 2 and self._columns_are_apart()

    def _is(self, owner: tuple[nn.Module, str]) -> bool:
        return owner[0]._parameters[owner[1]].data_ptr() == self.parameter.data_ptr()

    def parts(self):
        """The entries, in parts that one call of `logits` takes."""
        n, outputs = self.parameter.numel(), self.parameter.shape[0]
        every = torch.arange(n, device=self.parameter.device)
        if self.is_before_last:  # one entry of each output at a time
            grid = every.view(outputs, -1)
            return list(grid.t()) if self.name == "weight" else [every]
        return every.split(256 if self.is_last else 16)

    def logits(self, entries: torch.Tensor) -> torch.Tensor:
        """`[len(entries), rows, classes]`."""
        if self.is_last or self.is_before_last:
            out, steps = self._linear(entries)
            if self.is_last:
                base = _flat(self.call).expand(len(entries), -1, -1).clone()
                base[torch.arange(len(entries), device=base.device), :, out] += steps.t()
                return base
            return self._through_last(out, steps)
        return self._by_rows(entries)

    def _linear(self, entries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """For each entry the output that it changes, and by how much, row by row: `[rows, n]`."""
        rows = len(self.call.out)
        if self.name == "bias":
            return entries, self.noise[entries].expand(rows, -1)
        inputs = self.parameter.shape[1]
        return entries // inputs, self.call.x.reshape(rows, -1)[:, entries % inputs] * self.noise[entries]

    def _through_last(self, out: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        """All outputs moved at once: what lies between two linear layers works on each by itself."""
        last = self.head.calls[id(self.last)]
        flat = _flat(self.call).clone()
        flat[:, out] += steps
        moved = self._input_of_last(flat)
        change = moved[:, out] - last.x.reshape(len(moved), -1)[:, out]
        weight = self.last.weight.detach()[:, out]
        return _flat(last) + change.t()[:, :, None] * weight.t()[:, None]

    def _input_of_last(self, flat: torch.Tensor) -> torch.Tensor:
        self.head.logits_from(self.module, flat.view_as(self.call.out), 1)
        x, _ = self.head.latest[id(self.last)]
        return x.reshape(len(flat), -1)

    def _columns_are_apart(self) -> bool:
        """Whether output `j` of the module reaches only input `j` of the last layer."""
        flat, x = _flat(self.call), self.head.calls[id(self.last)].x
        if x.numel() != len(flat) * flat.shape[1]:
            return False
        moved = flat.clone()
        moved[:, ::2] += 0.5 * (1 + flat.abs().amax())
        found = self._input_of_last(moved)
        return torch.equal(found[:, 1::2], x.reshape(len(flat), -1)[:, 1::2])

    def _by_rows(self, entries: torch.Tensor) -> torch.Tensor:
        n = len(entries)
        values = self.parameter.view(1, -1).repeat(n, 1)
        values[torch.arange(n, device=values.device), entries] += self.noise[entries]
        changed = {self.name: values.view(n, *self.parameter.shape)}
        out = on_rows(self.module, self.call.x.expand(n, *self.call.x.shape), changed)
        return self.head.logits_from(self.module, out, n)


def _flat(call: Call) -> torch.Tensor:
    return call.out.reshape(len(call.out), -1)


def gradient_scores(
    logits_of: Callable[[torch.Tensor], torch.Tensor],
    micro_batches: Sequence[tuple[torch.Tensor, torch.Tensor]],
    problem_type: str | None,
    parameter: torch.Tensor,
) -> torch.Tensor:
    """Mean over this step's rows of the squared gradient of the row's loss: `[numel]`.

    The diagonal of the empirical Fisher information, by one backward pass through the head per row.

    Args:
        logits_of: the head: features `[rows, ...]` -> logits `[rows, classes]`.
        micro_batches: features and labels of this step's rows.
        problem_type: of the model's configuration.
    """
    total, rows, trains = torch.zeros(parameter.numel(), device=parameter.device), 0, parameter.requires_grad
    parameter.requires_grad_(True)
    try:
        with torch.enable_grad():
            for features, labels in micro_batches:
                for i in range(len(features)):
                    loss = classification_loss(logits_of(features[i : i + 1]), labels[i : i + 1], problem_type)
                    (gradient,) = torch.autograd.grad(loss, [parameter])
                    total += gradient.detach().float().flatten().square()
                    rows += 1
    finally:
        parameter.requires_grad_(trains)
    return total / rows
