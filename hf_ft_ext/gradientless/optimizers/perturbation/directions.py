"""Random directions of a search: dense, masked, in blocks, or low-rank. They are recomputed from seeds when needed.

A direction has one part for each searched tensor. A dense part is generated chunk by chunk, each chunk from its own
seed, so that a large tensor's part never has to be in memory as a whole. A low-rank part of a matrix is two factors.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from hf_ft_ext.errors import InputError

KINDS = GAUSSIAN, RADEMACHER, LOZO, SUBZERO, OUTER = ("gaussian", "rademacher", "lozo", "subzero", "rademacher-outer")
LOW_RANK = (LOZO, SUBZERO, OUTER)
DEFAULT_RANK, DEFAULT_RENEW = {LOZO: 2, SUBZERO: 32, OUTER: 1}, {LOZO: 50, SUBZERO: 1000}
# Entries generated or updated at a time. Updating 16-bit weights takes about 30 bytes per entry: 8 MB per chunk, and
# 30 MB on an accelerator, where the launches of many small chunks would take more time.
CHUNK, CHUNK_ON_ACCELERATORS = 2**18, 2**20


@dataclass(frozen=True)
class Draw:
    """The seeds of a direction.

    Attributes:
        seed: of the part that is drawn in every step.
        basis: of the part that is kept for several steps: LOZO's `V`, SubZero's `U` and `V`.
    """

    seed: int
    basis: int


class Directions:
    """Draws random directions.

    | kind | part of a matrix `[out, in]` | drawn every `renew` steps | source |
    | --- | --- | --- | --- |
    | `gaussian` | standard normal entries | | MeZO, arXiv 2305.17333 |
    | `rademacher` | entries +1 and -1 | | FZOO, arXiv 2506.09034 |
    | `lozo` | `U V^T`, both normal | `V` | LOZO, arXiv 2410.07698 |
    | `subzero` | `sqrt(out in) / rank U S V^T`; `S` normal; `U`, `V` orthonormal | `U`, `V` | SubZero, 2410.08989 |
    | `rademacher-outer` | `u v^T` with entries +1 and -1: its entries are +1 and -1 | | |

    All other factors and entries are drawn in each step.

    Entries have mean 0 and variance 1 (`lozo`: variance `rank`), so `eps` and the learning rate have the same meaning
    for all kinds. The factor of `subzero` is that of its authors' code (zimingyy/SubZero).

    With a low-rank kind, tensors that are not matrices and matrices smaller than the rank get a dense part: normal, or
    signs for `rademacher-outer`.

    Args:
        kind: one of `KINDS`.
        block: number of consecutive entries of a tensor that get the same value; dense kinds only.
        rank: of the low-rank kinds, 1 or more; `None` = 2 (lozo), 32 (subzero), always 1 (rademacher-outer).
        renew: draw `V` (lozo) or `U` and `V` (subzero) again every so many steps, 1 or more; `None` = 50 (lozo), 1,000
            (subzero).
        masks: for each tensor the entries that may change: bool, of its shape; `None` = all. Dense kinds only.
        small: fraction of each tensor's entries that may change, in (0, 1]. The threshold is the magnitude that this
            fraction of the entries does not exceed at the start; in each step, entries whose current magnitude is at
            most the threshold change (Sparse-MeZO, arXiv 2402.15751). Dense kinds only.
    """

    def __init__(
        self,
        kind: str = GAUSSIAN,
        block: int = 1,
        rank: int | None = None,
        renew: int | None = None,
        masks: Sequence[torch.Tensor] | None = None,
        small: float | None = None,
    ):
        if kind not in KINDS:
            raise InputError(f"direction={kind!r} is unknown; choose from: {', '.join(KINDS)}")
        for name, value in (("rank", rank), ("renew", renew)):
            if value is not None and value < 1:
                raise InputError(f"{name} must be 1 or more, got {value}")
            if value is not None and kind not in (LOZO, SUBZERO):
                raise InputError(f"{name}={value} applies to direction=lozo or subzero, not to {kind}; leave it out")
        if small is not None and not 0 < small <= 1:
            raise InputError(f"small must be in (0, 1] (a fraction of each tensor's entries), got {small}")
        if kind in LOW_RANK and (block > 1 or masks is not None or small is not None):
            what = "blocks of entries" if block > 1 else "masks"
            raise InputError(f"direction={kind} is low-rank and cannot be combined with {what}; use gaussian")
        if block > 1 and (masks is not None or small is not None):
            raise InputError(
                f"block={block} changes consecutive entries together, and a mask selects single ones; leave one of "
                "them out"
            )
        if masks is not None and small is not None:
            raise InputError("masks and small both select the entries that may change; pass one of them")
        self.kind, self.block, self.masks, self.small = kind, block, masks, small
        self.rank, self.renew = rank or DEFAULT_RANK.get(kind), renew or DEFAULT_RENEW.get(kind)
        self.thresholds: list[float] | None = None
        # SubZero's U and V by number of the matrix: they stay for `renew` steps, and a step needs them three times
        self._orthonormal: dict[int, tuple] = {}

    def prepare(self, parameters: Sequence[torch.Tensor]) -> None:
        """Compute the thresholds of `small` and check `masks`, once for the searched tensors.

        Raises:
            InputError: masks that do not fit the tensors.
        """
        if self.small is not None:
            self.thresholds = [threshold(parameter, self.small) for parameter in parameters]
        if self.masks is not None:
            shapes = [tuple(mask.shape) for mask in self.masks]
            wanted = [tuple(parameter.shape) for parameter in parameters]
            if shapes != wanted or any(mask.dtype != torch.bool for mask in self.masks):
                raise InputError(
                    "masks must be one boolean tensor for each searched tensor, in their order and of their shapes; "
                    f"got {len(shapes)} masks for {len(wanted)} tensors"
                )
            self.masks = [
                mask.to(parameter.device).contiguous() for mask, parameter in zip(self.masks, parameters, strict=True)
            ]

    @property
    def moving_mask(self) -> bool:
        """Whether the entries that may change depend on the current weights."""
        return self.small is not None

    def has_factors(self, shape: Sequence[int]) -> bool:
        """Whether the part of a tensor of this shape is low-rank, given by two factors."""
        return self.rank is not None and len(shape) == 2 and min(shape) >= self.rank

    def scale(self, shape: Sequence[int]) -> float:
        """Factor of `slope * direction` in the gradient estimate of a tensor of this shape.

        `1 / rank` for normal factors, as `E[<G, U V^T> U V^T] = rank G` (LOZO, Eq. 4); 1 otherwise.
        """
        return 1 / self.rank if self.rank is not None and self.kind == LOZO and self.has_factors(shape) else 1.0

    def factors(
        self, shape: Sequence[int], number: int, draw: Draw, dtype: torch.dtype, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Left `[out, rank]` and right `[in, rank]` factor of the part of matrix `number`: `Z = left @ right.T`."""
        assert self.rank is not None  # as `has_factors` says for this tensor
        rows, columns = shape
        new, kept = _generator(device, draw.seed, number), _generator(device, draw.basis, number)
        if self.kind == OUTER:  # Z = u v^T
            return _signs(rows, new, dtype).view(-1, 1), _signs(columns, new, dtype).view(-1, 1)
        if self.kind == LOZO:  # Z = U V^T
            return _normal_matrix(rows, self.rank, new, dtype), _normal_matrix(columns, self.rank, kept, dtype)
        # SubZero: Z = sqrt(out in) / rank U S V^T
        key = (draw.basis, rows, columns, dtype, device)
        if self._orthonormal.get(number, (None,))[0] != key:
            # U and V: the Q factors of normal matrices
            u = torch.linalg.qr(_normal_matrix(rows, self.rank, kept, dtype)).Q
            v = torch.linalg.qr(_normal_matrix(columns, self.rank, kept, dtype)).Q
            self._orthonormal[number] = (key, u, v)
        _, u, v = self._orthonormal[number]
        s = _normal_matrix(self.rank, self.rank, new, dtype).mul_((rows * columns) ** 0.5 / self.rank)
        with without_autocast(device):
            return u @ s, v

    def right_stays(self) -> bool:
        """Whether the right factor is kept for several steps, so that all directions of a step share it."""
        return self.kind in (LOZO, SUBZERO)

    def dense(self, values: torch.Tensor, number: int, draw: Draw, part: slice) -> torch.Tensor:
        """A chunk of the dense part of tensor `number`.

        Args:
            values: the tensor's current entries in this chunk, flat, in its own type.
            part: slice of the flat tensor; one of `chunks`.

        Returns:
            Flat, in `compute_type`.
        """
        dtype, size = compute_type(values.dtype), part.stop - part.start
        generator = _generator(values.device, draw.seed, number, part.start)
        draws = _signs if self.kind in (RADEMACHER, OUTER) else _normal
        movable = self.movable(values, number, part)
        if movable is not None:  # random numbers are drawn for these entries only
            return torch.zeros(size, dtype=dtype, device=values.device).masked_scatter_(
                movable, draws(int(movable.sum()), generator, dtype)
            )
        z = draws(size // self.block, generator, dtype)
        return z if self.block == 1 else z.repeat_interleave(self.block)

    def movable(self, values: torch.Tensor, number: int, part: slice) -> torch.Tensor | None:
        """The entries of a chunk that may change (bool); `None` = all."""
        if self.masks is not None:
            return self.masks[number].view(-1)[part]
        return None if self.thresholds is None else values.abs() <= self.thresholds[number]

    def chunks(self, parameter: torch.Tensor) -> Iterator[slice]:
        """Split the flat tensor into the parts that are generated and updated one by one (full rows of a matrix)."""
        size = parameter.numel()
        by_rows = parameter.ndim == 2 and self.block == 1
        unit = parameter.shape[1] if by_rows else self.block
        most = CHUNK if parameter.device.type == "cpu" else CHUNK_ON_ACCELERATORS
        step = max(unit, most // unit * unit)
        for start in range(0, size, step):
            yield slice(start, min(size, start + step))

    def settings(self) -> dict:
        """The constructor's arguments, without masks."""
        kept = self.kind in (LOZO, SUBZERO)
        return {
            "kind": self.kind,
            "block": self.block,
            "rank": self.rank if kept else None,
            "renew": self.renew if kept else None,
            "small": self.small,
        }


def compute_type(dtype: torch.dtype) -> torch.dtype:
    """The type in which updates of tensors of `dtype` are computed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """A context in which autocast does not round products to 16 bits, wherever the model's forward pass uses it."""
    known = torch.amp.is_autocast_available(device.type)  # not for every backend
    return torch.autocast(device.type, enabled=False) if known else contextlib.nullcontext()


def threshold(parameter: torch.Tensor, share: float) -> float:
    """The magnitude that a fraction `share` of the entries does not exceed."""
    flat = parameter.detach().abs().flatten().to(compute_type(parameter.dtype))
    return float(flat.kthvalue(max(1, round(share * flat.numel()))).values)


def derived_seed(seed: int, number: int, start: int = 0) -> int:
    """Derive the seed of a tensor's chunk from a seed, the tensor's number and the chunk's start."""
    return (seed + number * 0x9E3779B97F4A7C15 + start * 0xD1B54A32D192ED03) % 2**62


def _generator(device: torch.device, seed: int, number: int, start: int = 0) -> torch.Generator:
    return torch.Generator(device).manual_seed(derived_seed(seed, number, start))


def _normal(size: int, generator: torch.Generator, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(size, generator=generator, dtype=dtype, device=generator.device)


def _normal_matrix(rows: int, columns: int, generator: torch.Generator, dtype: torch.dtype) -> torch.Tensor:
    return _normal(rows * columns, generator, dtype).view(rows, columns)


def _signs(size: int, generator: torch.Generator, dtype: torch.dtype) -> torch.Tensor:
    """Random entries +1 and -1, from the bits of random 64-bit integers."""
    words = torch.empty(-(-size // 64), dtype=torch.int64, device=generator.device)
    words.random_(-(2**63), None, generator=generator)
    table = _signs_of_bytes(dtype, generator.device)
    return table.index_select(0, words.view(torch.uint8).int()).view(-1)[:size]


@functools.cache
def _signs_of_bytes(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Table `[256, 8]`: for each byte, +1 for its set bits and -1 for the others."""
    bits = torch.arange(256)[:, None] >> torch.arange(8) & 1
    return (2 * bits - 1).to(device, dtype)
