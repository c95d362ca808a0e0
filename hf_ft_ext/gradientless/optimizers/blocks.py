"""A block: the entries that are searched together, usually some of one tensor, with their options."""

import math

import torch

from hf_ft_ext.gradientless.optimizers.candidates import Candidates, IndexView, read_views, write_views
from hf_ft_ext.gradientless.optimizers.options import OptionTree, parse_options
from hf_ft_ext.gradientless.optimizers.selection import select_indices


class ParameterBlock:
    """One unit of the search: a tensor, or all tensors of a group as one pool.

    Args:
        parameters: one tensor, or those of the pool.
        group: the parameter group; its values are read anew in every step, so schedulers work.

    Attributes:
        views: the entries that candidates may change (those that noise is added to and those of kept options).
        positions: which of them get noise now; `None` = all.
        tree: the options, `None` without options.
        age: steps that the block has seen.
    """

    def __init__(self, parameters: list[torch.Tensor], group: dict):
        self.parameters, self.group = parameters, group
        self.views = [IndexView(parameter, None) for parameter in parameters]
        self.positions: torch.Tensor | None = None
        self.tree: OptionTree | None = None
        self.age = 0
        first = parameters[0]
        self.dtype, self.device = first.dtype, first.device
        self.compute = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.total = sum(parameter.numel() for parameter in parameters)

    # --- entries -----------------------------------------------------------------------------------

    def renew(self, generator: torch.Generator, importance) -> None:
        """Choose the entries anew if it is time to; options keep those that they change."""
        if self.age % self.group["sampling_steps"] == 0:
            group = self.group
            chosen = select_indices(self.parameters, group["sampling_size"], group["selection"], generator, importance)
            if chosen is None:
                self.views, self.positions = [IndexView(p, None) for p in self.parameters], None
            elif self.tree is None:
                self.positions = None
                self._spread(chosen)
            else:
                self._join(chosen)
        self.age += 1

    def _spread(self, chosen: torch.Tensor) -> None:
        """Places from ascending positions in the concatenation of all tensors."""
        if len(self.parameters) == 1:
            self.views = [IndexView(self.parameters[0], chosen)]
            return
        self.views, start = [], 0
        for parameter in self.parameters:
            inside = (chosen >= start) & (chosen < start + parameter.numel())
            if inside.any():
                self.views.append(IndexView(parameter, chosen[inside] - start))
            start += parameter.numel()

    def _flat_positions(self) -> torch.Tensor:
        """The views' entries as ascending positions in the concatenation of all tensors."""
        starts, start = {}, 0
        for parameter in self.parameters:
            starts[id(parameter)] = start
            start += parameter.numel()
        parts = [
            starts[id(view.parameter)]
            + (torch.arange(view.size, device=self.device) if view.indices is None else view.indices)
            for view in self.views
        ]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _join(self, chosen: torch.Tensor) -> None:
        used = self.tree.used()
        kept = used.nonzero().flatten()
        earlier = self._flat_positions()[kept]
        union, inverse = torch.cat([earlier, chosen]).unique(return_inverse=True)
        self.tree.place_in(union.numel(), inverse[: kept.numel()], kept)
        self.positions = inverse[kept.numel() :] if union.numel() > chosen.numel() else None
        self._spread(union)

    # --- candidates --------------------------------------------------------------------------------

    def scales(self) -> tuple[list[float], list[int]]:
        """Factor and noise vector of each of the K candidates of one start: `R / 2^k`."""
        k, radius = self.group["num_candidates"], float(self.group["lr"])
        if not self.group["antithetic"]:
            return [radius * 2.0**-i for i in range(k)], list(range(k))
        return [(-radius if i % 2 else radius) * 2.0 ** -(i // 2) for i in range(k)], [i // 2 for i in range(k)]

    def ensure_tree(self, size: int) -> None:
        """Make the tree of the group's options, once the number of entries is known."""
        options = parse_options(self.group["options"])
        if options is not None and self.tree is None:
            self.tree = OptionTree(*options, size, self.compute, self.device)

    def candidates(self, seed: int, with_unmoved: bool) -> Candidates:
        """Candidates of this step; the first one is the unmoved tensor if `with_unmoved`.

        Without options: K candidates around the tensor. With options: for each leaf, the leaf itself and K
        candidates around it.
        """
        here = read_views(self.views).to(self.compute)[None]
        scales, vectors = self.scales()
        own: tuple[float, ...] = ()
        if self.tree is None:
            starts, leaves = here, 1
        else:
            starts, leaves, own = here + self.tree.leaves(), self.tree.n_leaves, (0.0,)
            if with_unmoved:
                starts = torch.cat([here, starts])
        first = 1 if with_unmoved and self.tree is not None else 0
        per_vector = max(vectors) + 1
        start, scale, noise = [], [], []
        if with_unmoved:
            start, scale, noise = [0], [0.0], [0]
        for leaf in range(leaves):
            start += [first + leaf] * (len(own) + len(scales))
            scale += [*own, *scales]
            noise += [0] * len(own) + [leaf * per_vector + vector for vector in vectors]
        return Candidates(starts, start, scale, noise, self.positions, seed, self.dtype, self.group["block"])

    def norms(self, candidates: Candidates) -> tuple[torch.Tensor, float]:
        """2-norm of the whole block with each candidate in place (float64, `[n]`), and as it is."""
        rest = math.fsum(float(torch.linalg.vector_norm(p.detach(), dtype=self.compute)) ** 2 for p in self.parameters)
        squares = candidates.squares(read_views(self.views))  # summed alike, so that no change makes no difference
        norms = (rest - squares[-1] + squares).clamp(min=0).sqrt()
        return norms[:-1], float(norms[-1])

    def move(self, values: torch.Tensor) -> None:
        write_views(self.views, values)

    # --- state -------------------------------------------------------------------------------------

    def state(self) -> dict:
        return {
            "age": self.age,
            "entries": None if all(view.indices is None for view in self.views) else self._flat_positions(),
            "positions": self.positions,
            "tree": None if self.tree is None else self.tree.state(),
        }

    def load(self, state: dict) -> None:
        self.age = state["age"]
        if state["entries"] is not None:
            self._spread(state["entries"].to(self.device))
        self.positions = None if state["positions"] is None else state["positions"].to(self.device)
        if state["tree"] is not None:
            self.ensure_tree(1)
            self.tree.load(state["tree"], self.device)
