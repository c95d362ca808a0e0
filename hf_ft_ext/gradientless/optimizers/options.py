"""Options of GLD: changes found on earlier batches, kept as a tree until a later batch confirms one."""

import re

import torch

from hf_ft_ext.errors import InputError

NONE = "none"


def parse_options(text: str | tuple[int, int] | None) -> tuple[int, int] | None:
    """Parse options: `"3x2"` -> (3 options per level, 2 levels); `"none"` or `None` -> `None` (accept at once).

    Raises:
        InputError: another format, or a number below 1.
    """
    if text is None or text == NONE:
        return None
    if not isinstance(text, str):
        text = "x".join(map(str, text if isinstance(text, tuple | list) else [text]))
    match = re.fullmatch("([1-9][0-9]*)x([1-9][0-9]*)", text)
    if match is None:
        raise InputError(f"options must be 'none' or options per level x levels, such as '3x2', got {text!r}")
    return int(match[1]), int(match[2])


class OptionTree:
    """Tree of options of one block: `levels[j]` holds the changes of level `j + 1`, each relative to its parent.

    Level `j + 1` has `product(widths[: j + 1])` rows; the children of row `i` start at row `i * widths[j + 1]` of the
    next level. All rows hold changes of the same `u` entries. A new tree holds one zero change on each level.

    Args:
        per_level: largest number of options below a node (m).
        depth: number of levels (l).
        size: number of entries (u).
    """

    def __init__(self, per_level: int, depth: int, size: int, dtype: torch.dtype, device: torch.device):
        self.per_level = per_level
        self.widths = [1] * depth
        self.levels = [torch.zeros(1, size, dtype=dtype, device=device) for _ in range(depth)]

    def leaves(self) -> torch.Tensor:
        """Change of each leaf relative to the current tensor, the sum over its path from the root: `[leaves, u]`."""
        sums = self.levels[0]
        for width, level in zip(self.widths[1:], self.levels[1:], strict=True):
            sums = sums.repeat_interleave(width, 0) + level if width > 1 else sums + level
        return sums

    @property
    def n_leaves(self) -> int:
        """Number of leaves: rows of the last level."""
        return self.levels[-1].shape[0]

    def first_of(self, leaf: int) -> int:
        """Index of the first-level option above `leaf`."""
        return leaf * self.widths[0] // self.n_leaves

    def advance(self, first: int, children: torch.Tensor) -> None:
        """Replace the tree by the subtree of option `first`, which the tensor has moved to.

        Args:
            children: the new last level: the best candidates of each leaf below `first`, `[leaves, m, u]`.
        """
        levels = []
        for level in self.levels[1:]:
            share = level.shape[0] // self.widths[0]
            levels.append(level[first * share : (first + 1) * share])
        self.levels = [*levels, children.flatten(0, 1)]
        self.widths = [*self.widths[1:], children.shape[1]]

    def restart(self, options: torch.Tensor) -> None:
        """Start again with `options` (`[m, u]`) as first level; below each one, a single zero change per level."""
        depth = len(self.levels)
        self.levels = [options] + [torch.zeros_like(options) for _ in range(depth - 1)]
        self.widths = [options.shape[0]] + [1] * (depth - 1)

    def used(self) -> torch.Tensor:
        """Whether any option changes an entry: bool, `[u]`."""
        return torch.stack([(level != 0).any(0) for level in self.levels]).any(0)

    def remap_entries(self, size: int, positions: torch.Tensor, kept: torch.Tensor) -> None:
        """Change to another set of `size` entries: column `kept[i]` becomes column `positions[i]`."""
        for j, level in enumerate(self.levels):
            wider = level.new_zeros(level.shape[0], size)
            wider[:, positions] = level[:, kept]
            self.levels[j] = wider

    def state(self) -> dict:
        """A copy of the widths and the changes of all levels."""
        return {"widths": list(self.widths), "levels": [level.clone() for level in self.levels]}

    def load(self, state: dict, device: torch.device) -> None:
        """Load what `state` returned, onto `device`."""
        self.widths, self.levels = list(state["widths"]), [level.to(device) for level in state["levels"]]
