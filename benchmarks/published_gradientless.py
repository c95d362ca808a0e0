"""The thesis's direct search as its code does it, written anew for comparison only.

The frozen encoder runs in every step; every candidate is a clone of the whole tensor, evaluated by itself; entries are
the head of a permutation of the whole tensor, drawn in every step; the list that becomes the options after a step
without a move is sorted but not cut, so it keeps all K + 1 changes. (Described in the thesis "Gradientless
finetuning" and its repository, coslu/gradientless-finetuning.)
"""

import torch

from hf_ft_ext.features import HeadReader


class Change:
    """A change of some entries of a tensor, the loss it led to, and the changes that may follow it."""

    def __init__(self, loss=0.0, entries=None, values=None):
        self.loss, self.entries, self.values, self.next = loss, entries, values, []

    def apply(self, tensor: torch.Tensor) -> None:
        if self.entries is not None:
            tensor.view(-1)[self.entries] += self.values


class PublishedSearch:
    """One step at a time; `sizes` are the entries per tensor, `None` for all."""

    def __init__(self, reader: HeadReader, sizes: dict[str, int | None], radius=5e-3, k=5, keep=1, levels=1):
        self.reader, self.radius, self.k, self.keep = reader, radius, k, keep
        parameters = reader.head_parameters()
        self.tensors = [(parameters[name], size) for name, size in sizes.items()]
        self.options = []
        for _ in self.tensors:
            root = option = Change()
            for _ in range(levels - 1):
                option.next = [Change()]
                option = option.next[0]
            self.options.append([root])
        self.evaluations = 0

    @torch.no_grad()
    def step(self, batch: dict[str, torch.Tensor], labels: torch.Tensor) -> float:
        features = self.reader.features(batch)

        def loss() -> float:
            self.evaluations += 1
            return float(torch.nn.functional.cross_entropy(self.reader.logits(features), labels))

        for position, (tensor, size) in enumerate(self.tensors):
            best = before = loss()
            entries = torch.randperm(tensor.numel())[:size] if size is not None else torch.arange(tensor.numel())
            options = self.options[position]
            following, moved = options[0].next, tensor.clone()
            for option in options:
                uncut: list[Change] = []
                found = self._explore(option, tensor, entries, loss, uncut)
                if option is options[0] and uncut:
                    following = uncut
                if found < best:
                    best, moved, following = found, tensor.clone(), option.next
                    option.apply(moved)
            tensor.data = moved.clone()
            self.options[position] = following
        return before

    def _explore(self, option: Change, tensor, entries, loss, uncut: list[Change]) -> float:
        original = tensor.clone()
        option.apply(tensor)
        if option.next:
            lowest = min(self._explore(child, tensor, entries, loss, []) for child in list(option.next))
        else:
            start = tensor.clone()
            changes = [Change(loss())]
            for k in range(self.k):
                values = self.radius / 2**k * torch.randn(len(entries))
                tensor.view(-1)[entries] += values
                changes.append(Change(loss(), entries, values))
                tensor.data = start.clone()
            changes.sort(key=lambda change: change.loss)
            uncut += changes
            option.next, lowest = changes[: self.keep], changes[0].loss
        tensor.data = original.clone()
        return lowest
