"""Options: changes that were found on earlier batches, kept as a tree until a later batch confirms one."""

import re

import torch

from hf_ft_ext.errors import InputError

NONE = "none"


def parse_options(text: str | tuple[int, int] | None) -> tuple[int, int] | None:
    """`"3x2"` -> (3 options per level, 2 levels); `"none"` or `None`: candidates move the tensor at once.

    Raises:
        InputError: another form, or a number below 1.
    """
    if text is None or text == NONE:
        return None
    if not isinstance(text, str):
        text = "x".join(map(str, text))
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None or "0" in match.groups():
        raise InputError(f"options {text!r} are not of the form 'none', '1x1' or '3x2' (options per level x levels)")
    return int(match[1]), int(match[2])


class OptionTree:
    """Options of one block: `levels[j]` holds the changes of level `j + 1`, each relative to its parent.

    Level `j + 1` has `product(widths[: j + 1])` rows; the children of row `i` are rows `i * width` and on. All rows
    are on the same entries (`u` of them). A new tree holds one option on each level that changes nothing.

    Args:
        per_level: most options that a node keeps (m).
        depth: levels (l).
        size: entries (u).
    """

    def __init__(self, per_level: int, depth: int, size: int, dtype: torch.dtype, device: torch.device):
        self.per_level = per_level
        self.widths = [1] * depth
        self.levels = [torch.zeros(1, size, dtype=dtype, device=device) for _ in range(depth)]

    def leaves(self) -> torch.Tensor:
        """What each leaf adds to the unmoved tensor, its ancestors' changes included: `[leaves, u]`."""
        sums = self.levels[0]
        for width, level in zip(self.widths[1:], self.levels[1:], strict=True):
            sums = sums.repeat_interleave(width, 0) + level if width > 1 else sums + level
        return sums

    @property
    def n_leaves(self) -> int:
        return self.levels[-1].shape[0]

    def first_of(self, leaf: int) -> int:
        """The first-level option that `leaf` descends from."""
        return leaf * self.widths[0] // self.n_leaves

    def advance(self, first: int, children: torch.Tensor) -> None:
        """The tensor has moved to option `first`: its subtree is the tree now, with `children` as last level.

        Args:
            children: for each leaf below `first`, its best candidates: `[leaves, m, u]`.
        """
        levels = []
        for level in self.levels[1:]:
            share = level.shape[0] // self.widths[0]
            levels.append(level[first * share : (first + 1) * share])
        self.levels = [*levels, children.flatten(0, 1)]
        self.widths = [*self.widths[1:], children.shape[1]]

    def restart(self, options: torch.Tensor) -> None:
        """The tensor has not moved: `options` (`[m, u]`) are its first level, their children are drawn anew."""
        depth = len(self.levels)
        self.levels = [options] + [torch.zeros_like(options) for _ in range(depth - 1)]
        self.widths = [options.shape[0]] + [1] * (depth - 1)

    def used(self) -> torch.Tensor:
        """Which of the entries some option changes: bool, `[u]`."""
        return torch.stack([(level != 0).any(0) for level in self.levels]).any(0)

    def place_in(self, size: int, positions: torch.Tensor, kept: torch.Tensor) -> None:
        """Go over to other entries: column `kept[i]` becomes column `positions[i]` of `size`."""
        for j, level in enumerate(self.levels):
            wider = level.new_zeros(level.shape[0], size)
            wider[:, positions] = level[:, kept]
            self.levels[j] = wider

    def state(self) -> dict:
        return {"widths": list(self.widths), "levels": [level.clone() for level in self.levels]}

    def load(self, state: dict, device: torch.device) -> None:
        self.widths, self.levels = list(state["widths"]), [level.to(device) for level in state["levels"]]
