"""Random directions of a search, made anew from seeds wherever they are needed: dense, masked, in blocks, or low-rank.

A direction has one part for each searched tensor. A dense part is made chunk by chunk, each chunk from a seed of its
own, so that no part of a large tensor has to exist as a whole. A low-rank part of a matrix is a pair of factors.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from hf_ft_ext.errors import InputError

KINDS = GAUSSIAN, RADEMACHER, LOZO, SUBZERO, OUTER = ("gaussian", "rademacher", "lozo", "subzero", "rademacher-outer")
LOW_RANK = (LOZO, SUBZERO, OUTER)
DEFAULT_RANK, DEFAULT_RENEW = {LOZO: 2, SUBZERO: 32, OUTER: 1}, {LOZO: 50, SUBZERO: 1000}
# Entries made or changed at a time. The update of 16-bit weights needs about 30 bytes per entry: 8 MB, and 30 MB on an
# accelerator, where small chunks cost more calls than memory is worth.
CHUNK, CHUNK_ON_ACCELERATORS = 2**18, 2**20


@dataclass(frozen=True)
class Draw:
    """What a direction is made from.

    Attributes:
        seed: of what is new in every step.
        basis: seed of what stays for some steps: LOZO's `V`, SubZero's `U` and `V`.
    """

    seed: int
    basis: int


class Directions:
    """How directions are drawn.

    | kind | part of a matrix `[out, in]` | source |
    | --- | --- | --- |
    | `gaussian` | standard normal entries | MeZO, arXiv 2305.17333 |
    | `rademacher` | entries +1 and -1 | FZOO, arXiv 2506.09034 |
    | `lozo` | `U V^T`, both normal; `U` new each step, `V` every `renew` steps | LOZO, arXiv 2410.07698 |
    | `subzero` | `sqrt(out in) / rank U S V^T`; `S` normal, new; `U`, `V` orthonormal | SubZero, arXiv 2410.08989 |
    | `rademacher-outer` | `u v^T` with entries +1 and -1: its entries are +1 and -1 as well | |

    Entries have mean 0, and variance 1 but for `lozo` (its rank), so `eps` and the learning rate mean the same for all
    kinds; for `subzero` the factor in front sees to it, as in its authors' code (zimingyy/SubZero).

    Tensors that are no matrices, and matrices smaller than the rank, get a dense part of a low-rank direction too:
    normal, for `rademacher-outer` of signs.

    Args:
        kind: one of `KINDS`.
        block: consecutive entries of a tensor that get the same number; dense kinds only.
        rank: of the low-rank kinds, 1 or more; `None` = 2 (lozo), 32 (subzero), always 1 (rademacher-outer).
        renew: steps after which what stays is drawn anew, 1 or more; `None` = 50 (lozo), 1,000 (subzero).
        masks: for each tensor which entries may move: bool, of its shape; `None` = all. Dense kinds only.
        small: share of each tensor's entries that may move, in (0, 1]: those whose magnitude is at most the threshold
            that this share of the entries is below at the start (Sparse-MeZO, arXiv 2402.15751, which fixes the
            threshold too, and looks at the present values in each step). Dense kinds only.
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
                raise InputError(f"{name}={value} must be 1 or more")
            if value is not None and kind not in (LOZO, SUBZERO):
                raise InputError(f"{name}={value} is about direction=lozo or subzero, not {kind}; leave it out")
        if small is not None and not 0 < small <= 1:
            raise InputError(f"small={small} must be in (0, 1]: the share of each tensor's entries that may move")
        if kind in LOW_RANK and (block > 1 or masks is not None or small is not None):
            what = "blocks of entries" if block > 1 else "masks"
            raise InputError(f"direction={kind} makes whole matrices, which {what} would tear apart; use gaussian")
        if block > 1 and (masks is not None or small is not None):
            raise InputError(f"block={block} ties neighbours, and a mask tears them apart; leave one of them out")
        if masks is not None and small is not None:
            raise InputError("masks and small both say which entries may move; pass one of them")
        self.kind, self.block, self.masks, self.small = kind, block, masks, small
        self.low_rank = kind in LOW_RANK
        self.rank, self.renew = rank or DEFAULT_RANK.get(kind), renew or DEFAULT_RENEW.get(kind)
        self.thresholds: list[float] | None = None

    def prepare(self, parameters: Sequence[torch.Tensor]) -> None:
        """Look at the searched tensors at the start: thresholds of `small`, shapes of `masks`.

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
                    "masks must be boolean tensors of the searched tensors' shapes, one for each, in their order; got "
                    f"{len(shapes)} for {len(wanted)} tensors"
                )
            self.masks = [
                mask.to(parameter.device).contiguous() for mask, parameter in zip(self.masks, parameters, strict=True)
            ]

    @property
    def moving_mask(self) -> bool:
        """Whether which entries may move depends on the present weights."""
        return self.small is not None

    def has_factors(self, shape: Sequence[int]) -> bool:
        """Whether the part of a tensor of this shape is a pair of factors."""
        return self.low_rank and len(shape) == 2 and min(shape) >= self.rank

    def scale(self, shape: Sequence[int]) -> float:
        """What slope times direction is multiplied with in the estimate of the gradient of such a tensor.

        `E[<G, U V^T> U V^T] = rank G` for normal factors (LOZO, Eq. 4); 1 otherwise.
        """
        return 1 / self.rank if self.kind == LOZO and self.has_factors(shape) else 1.0

    def factors(
        self, shape: Sequence[int], number: int, draw: Draw, dtype: torch.dtype, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Left `[out, rank]` and right `[in, rank]` factor of the part of matrix `number`: `left @ right.T`."""
        rows, columns = shape
        new, kept = _generator(device, draw.seed, number), _generator(device, draw.basis, number)
        if self.kind == OUTER:
            return _signs(rows, new, dtype).view(-1, 1), _signs(columns, new, dtype).view(-1, 1)
        if self.kind == LOZO:
            return _normal_matrix(rows, self.rank, new, dtype), _normal_matrix(columns, self.rank, kept, dtype)
        # U and V: orthonormal factors of normal matrices. Z = sqrt(out in) / rank U S V^T.
        u = torch.linalg.qr(_normal_matrix(rows, self.rank, kept, dtype)).Q
        v = torch.linalg.qr(_normal_matrix(columns, self.rank, kept, dtype)).Q
        s = _normal_matrix(self.rank, self.rank, new, dtype).mul_((rows * columns) ** 0.5 / self.rank)
        return u @ s, v

    def right_stays(self) -> bool:
        """Whether all directions of a step share the right factor."""
        return self.kind in (LOZO, SUBZERO)

    def dense(self, values: torch.Tensor, number: int, draw: Draw, part: slice) -> torch.Tensor:
        """A chunk of the dense part of tensor `number`.

        Args:
            values: the tensor's present entries in this chunk, flat, in its own type.
            part: where the chunk lies in the flat tensor; one of `chunks`.

        Returns:
            Flat, in `compute_type`.
        """
        dtype, size = compute_type(values.dtype), part.stop - part.start
        generator = _generator(values.device, draw.seed, number, part.start)
        draws = _signs if self.kind in (RADEMACHER, OUTER) else _normal
        movable = self._movable(values, number, part)
        if movable is not None:  # numbers are drawn for those entries alone
            return torch.zeros(size, dtype=dtype, device=values.device).masked_scatter_(
                movable, draws(int(movable.sum()), generator, dtype)
            )
        z = draws(size // self.block, generator, dtype)
        return z if self.block == 1 else z.repeat_interleave(self.block)

    def _movable(self, values: torch.Tensor, number: int, part: slice) -> torch.Tensor | None:
        """Which entries of a chunk may move; `None` = all."""
        if self.masks is not None:
            return self.masks[number].view(-1)[part]
        return None if self.thresholds is None else values.abs() <= self.thresholds[number]

    def chunks(self, parameter: torch.Tensor) -> Iterator[slice]:
        """The flat tensor in parts that are made and changed one after the other: of a matrix whole rows."""
        size = parameter.numel()
        by_rows = parameter.ndim == 2 and self.block == 1
        unit = parameter.shape[1] if by_rows else self.block
        most = CHUNK if parameter.device.type == "cpu" else CHUNK_ON_ACCELERATORS
        step = max(unit, most // unit * unit)
        for start in range(0, size, step):
            yield slice(start, min(size, start + step))

    def settings(self) -> dict:
        """What the constructor takes, without masks."""
        kept = self.kind in (LOZO, SUBZERO)
        return {
            "kind": self.kind,
            "block": self.block,
            "rank": self.rank if kept else None,
            "renew": self.renew if kept else None,
            "small": self.small,
        }


def compute_type(dtype: torch.dtype) -> torch.dtype:
    """The type that tensors of `dtype` are changed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def threshold(parameter: torch.Tensor, share: float) -> float:
    """The magnitude that `share` of the entries do not exceed."""
    flat = parameter.detach().abs().flatten()
    return float(flat.float().kthvalue(max(1, round(share * flat.numel()))).values)


def mixed(seed: int, number: int, start: int = 0) -> int:
    """A seed of its own for each tensor and chunk."""
    return (seed + number * 0x9E3779B97F4A7C15 + start * 0xD1B54A32D192ED03) % 2**62


def _generator(device: torch.device, seed: int, number: int, start: int = 0) -> torch.Generator:
    return torch.Generator(device).manual_seed(mixed(seed, number, start))


def _normal(size: int, generator: torch.Generator, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(size, generator=generator, dtype=dtype, device=generator.device)


def _normal_matrix(rows: int, columns: int, generator: torch.Generator, dtype: torch.dtype) -> torch.Tensor:
    return _normal(rows * columns, generator, dtype).view(rows, columns)


def _signs(size: int, generator: torch.Generator, dtype: torch.dtype) -> torch.Tensor:
    """Entries +1 and -1, one for each random bit: a drawn number is good for 64 of them."""
    words = torch.empty(-(-size // 64), dtype=torch.int64, device=generator.device)
    words.random_(-(2**63), None, generator=generator)
    table = _signs_of_bytes(dtype, generator.device)
    return table.index_select(0, words.view(torch.uint8).int()).view(-1)[:size]


@functools.cache
def _signs_of_bytes(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """`[256, 8]`: for each byte, +1 and -1 for its bits."""
    bits = torch.arange(256)[:, None] >> torch.arange(8) & 1
    return (2 * bits - 1).to(device, dtype)
