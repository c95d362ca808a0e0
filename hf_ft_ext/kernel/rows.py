"""`ExampleRows`: the examples of one side of a kernel, which can be batched with little padding."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch.nn import functional

from hf_ft_ext.errors import InputError
from hf_ft_ext.per_example.state import Batch, batch_size

_LABELS = ("labels", "label")
_DECODER = "decoder_"


class ExampleRows:
    """Examples as single rows, in their order.

    Args:
        batches: one batch, or an iterable of batches (mappings from names to tensors whose first axis is the example).
            Labels are stored separately. In a batch with longer rows, shorter ones are padded at the right:
            `input_ids` with `pad_token_id`, other inputs with 0. Rows may have several contexts,
            `input_ids` of shape `[rows, contexts, tokens]`. Inputs named `decoder_...` have a length of their own.
        pad_token_id: see above.

    Attributes:
        labels: labels of all rows, or `None`.
        lengths: tokens of each row, up to the last token that is not padding; of all its contexts.

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
        self._ends = [_end(row) for row in self._rows]
        contexts = [torch.Size((_tokens(row) or (1,))[:-1]).numel() for row in self._rows]
        self.lengths = [end * count for end, count in zip(self._ends, contexts, strict=True)]

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, indices: Sequence[int], device: torch.device | None = None) -> dict[str, torch.Tensor]:
        """Return the rows `indices` as one batch, padded to the longest of them."""
        rows = [self._rows[i] for i in indices]
        keep = max(self._ends[i] for i in indices)
        return {key: self._stacked(key, rows, keep).to(device) for key in rows[0]}

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

    def _stacked(self, key: str, rows: list[dict[str, torch.Tensor]], keep: int) -> torch.Tensor:
        """One input of these rows; those with a value for each token have the first `keep` tokens."""
        values = [row[key] for row in rows]
        # a decoder's inputs may be as long as the encoder's by chance
        tokens = [None if key.startswith(_DECODER) else _tokens(row) for row in rows]
        if all(t is not None and v.shape[: len(t)] == t for v, t in zip(values, tokens, strict=True)):
            axis = len(tokens[0] or ()) - 1
            values = [value.narrow(axis, 0, min(keep, value.shape[axis])) for value in values]
            values = _padded(values, axis, keep, self._pad.get(key, 0))
        elif key.startswith(_DECODER) and values[0].ndim:
            pad = self._pad["input_ids"] if key.endswith("_ids") else 0
            values = _padded(values, 0, max(map(len, values)), pad)
        return torch.stack(values)


def _tokens(row: dict[str, torch.Tensor]) -> torch.Size | None:
    """The shape of a row's tokens including padding: `[tokens]`, or `[contexts, tokens]`; `None` if it has none."""
    mask, ids = row.get("attention_mask"), row.get("input_ids")
    tokens = ids if mask is None else mask
    if tokens is None or tokens.ndim not in (1, 2):
        return None
    if tokens.ndim == 2 and (ids is None or ids.shape != tokens.shape):
        return None  # a mask [tokens, tokens] of ids [tokens]
    return tokens.shape


def _end(row: dict[str, torch.Tensor]) -> int:
    """Number of tokens up to the last one that is not padding, in any context."""
    shape, mask = _tokens(row), row.get("attention_mask")
    if shape is None:
        return 1
    return max(1, shape[-1]) if mask is None or not mask.any() else int(mask.nonzero()[:, -1].max()) + 1


def _padded(values: list[torch.Tensor], axis: int, length: int, pad: int) -> list[torch.Tensor]:
    """Pad `axis` of all values at its end to the same length."""
    if len({value.shape[axis] for value in values}) == 1:
        return values
    return [
        functional.pad(value, [0, 0] * (value.ndim - 1 - axis) + [0, length - value.shape[axis]], value=pad)
        for value in values
    ]
