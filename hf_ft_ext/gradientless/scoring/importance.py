"""Importance of each entry of a head's tensor: divergence of the logits when it is perturbed, or squared gradients."""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from hf_ft_ext.gradientless.scoring.batched_heads import BatchedHead, Call, on_rows
from hf_ft_ext.gradientless.scoring.objectives import classification_loss

_MAX_DISTANCES = 2**17  # computed at a time: half a MiB in float32, which fits the processor's cache


def henze_penrose(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Henze-Penrose divergence of two samples, from the errors of a 1-nearest-neighbour classifier between them.

    `D = 1 - (M + N) / (2 M N) * errors` with `M = N = rows`: 1 if the nearest neighbour of every point is in its own
    sample, -1 if that of none is. On a tie, the neighbour of the point's own sample counts.

    Args:
        before: `[rows, classes]`.
        after: `[n, rows, classes]`: `n` samples, each compared with `before`.

    Returns:
        `[n]`.
    """
    rows = len(before)
    own = _nearest_other(before[None])[0]
    result = []
    for part in after.split(max(1, _MAX_DISTANCES // rows**2)):
        across = _distances(before.expand_as(part), part)
        # errors: points whose nearest neighbour is in the other sample. D = 1 - errors / rows, as M = N = rows.
        errors = (across.amin(2) < own).sum(1) + (across.amin(1) < _nearest_other(part)).sum(1)
        result.append(1 - errors.to(before.dtype) / rows)
    return torch.cat(result)


def divergence_scores(
    heads: Sequence[BatchedHead], before: torch.Tensor, parameter: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Divergence of this step's logits when entry `i` alone is perturbed by `N(0, max|theta|^2)`: `[numel]`.

    The "Fisher importance" of the thesis "Gradientless finetuning" (Coslu), computed for many entries at once.

    Args:
        heads: one for each micro-batch, after `begin` at the current weights; each needs a new `begin` afterwards.
        before: logits of all rows at the current weights, `[rows, classes]`.
    """
    parameter = parameter.detach()
    noise = torch.randn(parameter.numel(), generator=generator).to(parameter.device, parameter.dtype)
    noise *= parameter.abs().max()
    before = before.float()
    scores = torch.empty(parameter.numel(), device=parameter.device)
    perturbed = [_PerturbedEntries(head, parameter, noise) for head in heads]
    for entries in perturbed[0].parts():
        after = torch.cat([one.logits(entries) for one in perturbed], 1).float()
        scores[entries] = henze_penrose(before, after)
    return scores


def gradient_scores(
    logits_of: Callable[[torch.Tensor], torch.Tensor],
    micro_batches: Sequence[tuple[torch.Tensor, torch.Tensor]],
    problem_type: str | None,
    parameter: torch.Tensor,
) -> torch.Tensor:
    """Diagonal of the empirical Fisher information: mean over the rows of the squared gradient of their loss.

    `[numel]`, by one backward pass through the head per row.

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
                    total += gradient.detach().float().flatten().square()  # F_i = mean of (d loss / d theta_i)^2
                    rows += 1
    finally:
        parameter.requires_grad_(trains)
    return total / rows


def _distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Squared distances `[n, rows, rows]`: sum over classes of `(x - y)^2`.

    `|x|^2 + |y|^2 - 2 x y` would lose small distances to rounding.
    """
    result = None
    for x, y in zip(a.unbind(-1), b.unbind(-1), strict=True):
        difference = (x[:, :, None] - y[:, None]).square_()
        result = difference if result is None else result.add_(difference)
    return result


def _nearest_other(points: torch.Tensor) -> torch.Tensor:
    distances = _distances(points, points)
    distances.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    return distances.amin(2)


class _PerturbedEntries:
    """Logits of one micro-batch with single entries of one parameter perturbed by `noise`.

    Three ways, from fast to general. A parameter of the last linear layer changes one logit. A parameter of the linear
    layer before the last changes one of its outputs; if that reaches only one input of the last layer (an activation
    or dropout in between), the logits follow from this input. For all others the head runs with each perturbed copy.
    """

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
        self.is_before_last = linear and self.call.position == len(self.order) - 2 and self._is_elementwise()

    def _is(self, owner: tuple[nn.Module, str]) -> bool:
        return owner[0]._parameters[owner[1]].data_ptr() == self.parameter.data_ptr()

    def parts(self):
        """Split the entries into the groups that `logits` evaluates at once."""
        n, outputs = self.parameter.numel(), self.parameter.shape[0]
        every = torch.arange(n, device=self.parameter.device)
        if self.is_before_last:  # one entry of each output at a time
            grid = every.view(outputs, -1)
            return list(grid.t()) if self.name == "weight" else [every]
        return every.split(256 if self.is_last else 16)

    def logits(self, entries: torch.Tensor) -> torch.Tensor:
        """Logits with each of `entries` perturbed by itself: `[len(entries), rows, classes]`."""
        if self.is_last or self.is_before_last:
            out, steps = self._linear(entries)
            if self.is_last:  # logits[:, out] += steps
                base = _flat(self.call).expand(len(entries), -1, -1).clone()
                base[torch.arange(len(entries), device=base.device), :, out] += steps.t()
                return base
            return self._through_last(out, steps)
        return self._by_rows(entries)

    def _linear(self, entries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """For each entry, the output that it changes (`[n]`), and its change in each row (`[rows, n]`).

        Weight entry `(o, i)` changes output `o` by `x_i * noise`; bias entry `o` changes it by `noise`.
        """
        rows = len(self.call.out)
        if self.name == "bias":
            return entries, self.noise[entries].expand(rows, -1)
        inputs = self.parameter.shape[1]
        return entries // inputs, self.call.x.reshape(rows, -1)[:, entries % inputs] * self.noise[entries]

    def _through_last(self, out: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        """Logits with each output `out` changed by itself, from one pass in which all of them change.

        `logits + (a'_o - a_o) W_last[:, o]^T`, where `a` is the input of the last layer. As `a` is an elementwise
        function of the outputs, changing all of them at once gives each `a'_o`.
        """
        last = self.head.calls[id(self.last)]
        flat = _flat(self.call).clone()
        flat[:, out] += steps
        inputs = self._input_of_last(flat)
        change = inputs[:, out] - last.x.reshape(len(inputs), -1)[:, out]
        weight = self.last.weight.detach()[:, out]
        return _flat(last) + change.t()[:, :, None] * weight.t()[:, None]

    def _input_of_last(self, flat: torch.Tensor) -> torch.Tensor:
        self.head.logits_from(self.module, flat.view_as(self.call.out), 1)
        x, _ = self.head.latest[id(self.last)]
        assert x is not None  # the last layer runs after the changed module, so its input was recorded
        return x.reshape(len(flat), -1)

    def _is_elementwise(self) -> bool:
        """Whether output `j` reaches only input `j` of the last layer, tested by changing every other output."""
        flat, x = _flat(self.call), self.head.calls[id(self.last)].x
        if x.numel() != len(flat) * flat.shape[1]:
            return False
        changed = flat.clone()
        changed[:, ::2] += 0.5 * (1 + flat.abs().amax())
        found = self._input_of_last(changed)
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
