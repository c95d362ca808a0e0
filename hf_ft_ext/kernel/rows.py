"""`ExampleRows`: the examples of one side of a kernel, which can be batched with little padding."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch.nn import functional

from hf_ft_ext.errors import InputError
from hf_ft_ext.per_example.state import Batch, batch_size

_LABELS = ("labels", "label")


class ExampleRows:
    """Examples as single rows, in their order.

    Args:
        batches: one batch, or an iterable of batches (mappings from names to tensors whose first axis is the example).
            Labels are stored separately. In a batch with longer rows, shorter ones are padded at the right:
            `input_ids` with `pad_token_id`, other inputs with 0.
        pad_token_id: see above.

    Attributes:
        labels: labels of all rows, or `None`.
        lengths: tokens of each row, up to the last token that is not padding.

    Raises:
        InputError: there are no rows, or batches have different inputs.
    """

    def __init__(self, batches: Batch | Iterable[Batch], pad_token_id: int | None = 0):
        self._pad = {"input_ids": pad_token_id or 0}
        self._rows: list[dict[str, torch.Tensor]] = []
        labels: list[torch.Tensor] = []
        for batch in [batches] if isinstance(batches, Mapping) else batches:
            labels += [batch[key] for key in _LABELS if key in batch]
            inputs = {key: value for key, value in batch.items() if key not in _LABELS}
            self._rows += [{key: value[i] for key, value in inputs.items()} for i in range(batch_size(inputs))]
        if not self._rows:
            raise InputError("there are no examples to compute a kernel for; pass at least one")
        if any(row.keys() != self._rows[0].keys() for row in self._rows):
            raise InputError(f"the batches hold different inputs; all need {', '.join(self._rows[0])}")
        self.labels = torch.cat(labels) if labels else None
        self.lengths = [self._length(row) for row in self._rows]

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, indices: Sequence[int], device: torch.device | None = None) -> dict[str, torch.Tensor]:
        """Return the rows `indices` as one batch, padded to the longest of them."""
        rows = [self._rows[i] for i in indices]
        keep = max(self.lengths[i] for i in indices)
        return {key: self._stacked(key, [row[key] for row in rows], rows, keep).to(device) for key in rows[0]}

    def by_length(self, first: int, last: int, size: int, overhead: int = 0) -> list[list[int]]:
        """Group the rows `first` to `last` (exclusive) into batches of up to `size` rows of similar lengths.

        The grouping minimizes the total cost: tokens with padding, plus `overhead` per batch. The longest rows come
        first, so that peak memory stays low: stored gradients grow while the passes get smaller.

        Args:
            overhead: fixed cost of a batch, in tokens.

        Returns:
            For each batch, the positions of its rows.
        """
        order = sorted(range(first, last), key=lambda i: (self.lengths[i], i))
        # best[k] = (cost, start of the last batch) of the cheapest grouping of the k shortest rows:
        # cost[k] = min over b of cost[b] + overhead + (k - b) * length[k - 1]
        best: list[tuple[int, int]] = [(0, 0)]
        for k in range(1, len(order) + 1):
            longest = self.lengths[order[k - 1]]
            begins = range(max(k - size, 0), k)
            best.append(min((best[begin][0] + overhead + (k - begin) * longest, begin) for begin in begins))
        groups, end = [], len(order)
        while end:
            begin = best[end][1]
            groups.append(order[begin:end])
            end = begin
        return groups

    def _stacked(self, key: str, values: list[torch.Tensor], rows: list[dict], keep: int) -> torch.Tensor:
        if all(value.ndim and len(value) == self._tokens(row) for value, row in zip(values, rows, strict=True)):
            values = [value[:keep] for value in values]
            if len({len(value) for value in values}) > 1:
                pad = self._pad.get(key, 0)
                values = [
                    functional.pad(value, [0, 0] * (value.ndim - 1) + [0, keep - len(value)], value=pad)
                    for value in values
                ]
        return torch.stack(values)

    @staticmethod
    def _tokens(row: dict[str, torch.Tensor]) -> int:
        """Tokens of a row including padding; -1 if the inputs have no token axis."""
        tokens = row.get("attention_mask", row.get("input_ids"))
        return len(tokens) if tokens is not None and tokens.ndim == 1 else -1

    def _length(self, row: dict[str, torch.Tensor]) -> int:
        mask = row.get("attention_mask")
        if mask is None or mask.ndim != 1 or not mask.any():
            return max(self._tokens(row), 1)
        return int(mask.nonzero().max()) + 1
