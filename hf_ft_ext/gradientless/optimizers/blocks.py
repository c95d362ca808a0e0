"""`ParameterBlock`: entries that are searched together (usually of one tensor), with their options."""

import functools
import math

import torch

from hf_ft_ext.gradientless.optimizers.candidates import Candidates, IndexView, read_views, write_views
from hf_ft_ext.gradientless.optimizers.options import OptionTree, parse_options
from hf_ft_ext.gradientless.optimizers.selection import select_indices


class ParameterBlock:
    """One unit of the search: a tensor, or all tensors of a group together (`pool`).

    Args:
        parameters: one tensor, or all tensors of the group.
        group: the parameter group; its values are read in every step, so that schedulers work.

    Attributes:
        views: the entries that candidates may change: those that get noise, and those that kept options change.
        positions: the entries of `views` that get noise in this step; `None` = all.
        tree: the tree of options; `None` without options.
    """

    def __init__(self, parameters: list[torch.Tensor], group: dict):
        self.parameters, self.group = parameters, group
        self.views = [IndexView(parameter, None) for parameter in parameters]
        self.positions: torch.Tensor | None = None
        self.tree: OptionTree | None = None
        self.device = parameters[0].device
        # `write_views` rounds each tensor's part to its own type
        self.dtype = functools.reduce(torch.promote_types, (parameter.dtype for parameter in parameters))
        self.compute = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.total = sum(parameter.numel() for parameter in parameters)

    # --- entries -----------------------------------------------------------------------------------

    def renew(self, step: int, generator: torch.Generator, importance) -> None:
        """Select new entries every `sampling_steps` steps; entries that options change stay in `views`.

        Args:
            step: number of steps before this one.
        """
        if step % self.group["sampling_steps"] == 0:
            group = self.group
            chosen = select_indices(self.parameters, group["sampling_size"], group["selection"], generator, importance)
            if chosen is None:
                self.views, self.positions = [IndexView(p, None) for p in self.parameters], None
            elif self.tree is None:
                self.positions = None
                self._set_views(chosen)
            else:
                self._add_to_views(self.tree, chosen)

    def _set_views(self, chosen: torch.Tensor) -> None:
        """Set `views` from ascending positions in the concatenation of all tensors."""
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

    def _add_to_views(self, tree: OptionTree, chosen: torch.Tensor) -> None:
        """Set `views` to the union of the `chosen` positions and those that options change."""
        used = tree.used()
        kept = used.nonzero().flatten()
        earlier = self._flat_positions()[kept]
        union, inverse = torch.cat([earlier, chosen]).unique(return_inverse=True)
        tree.remap_entries(union.numel(), inverse[: kept.numel()], kept)
        self.positions = inverse[kept.numel() :] if union.numel() > chosen.numel() else None
        self._set_views(union)

    # --- candidates --------------------------------------------------------------------------------

    def scales(self) -> tuple[list[float], list[int]]:
        """Radius and index of the noise vector of each of the K candidates around one starting point.

        Candidate `k` is `theta + R / 2^k z_k`; antithetic: `theta +- R / 2^k z_k` for `k = 0 .. K/2 - 1`. If K is odd,
        the last vector has no opposite.
        """
        k, radius = self.group["num_candidates"], float(self.group["lr"])
        if not self.group["antithetic"]:
            return [radius * 2.0**-i for i in range(k)], list(range(k))
        return [(-radius if i % 2 else radius) * 2.0 ** -(i // 2) for i in range(k)], [i // 2 for i in range(k)]

    def ensure_tree(self, size: int) -> None:
        """Create the tree of options, if the group has options and there is no tree yet."""
        options = parse_options(self.group["options"])
        if options is not None and self.tree is None:
            self.tree = OptionTree(*options, size, self.compute, self.device)

    def candidates(self, seed: int, with_current: bool) -> Candidates:
        """Candidates of this step.

        Without options: K candidates around the current tensor. With options: for each leaf, the leaf itself and K
        candidates around it.

        Args:
            seed: of the noise.
            with_current: put the current tensor itself first.
        """
        here = read_views(self.views).to(self.compute)[None]
        scales, vectors = self.scales()
        own: tuple[float, ...] = ()
        if self.tree is None:
            starts, leaves = here, 1
        else:
            starts, leaves, own = here + self.tree.leaves(), self.tree.n_leaves, (0.0,)
            if with_current:
                starts = torch.cat([here, starts])
        first = 1 if with_current and self.tree is not None else 0
        per_vector = max(vectors) + 1
        start, scale, noise = [], [], []
        if with_current:
            start, scale, noise = [0], [0.0], [0]
        for leaf in range(leaves):
            start += [first + leaf] * (len(own) + len(scales))
            scale += [*own, *scales]
            noise += [0] * len(own) + [leaf * per_vector + vector for vector in vectors]
        return Candidates(starts, start, scale, noise, self.positions, seed, self.dtype, self.group["block"])

    def norms(self, candidates: Candidates) -> tuple[torch.Tensor, float]:
        """2-norm of the whole block with each candidate in place (float64, `[n]`), and at the current weights.

        `||theta'||^2 = ||theta||^2 - sum of theta_i^2 + sum of theta'_i^2` over the entries `i` of `views`.
        """
        total = math.fsum(
            float(torch.linalg.vector_norm(p.detach(), dtype=self.compute)) ** 2 for p in self.parameters
        )
        # The last row are the current entries, summed in the same way: an unchanged candidate has the same norm.
        squares = candidates.squares(read_views(self.views))
        norms = (total - squares[-1] + squares).clamp(min=0).sqrt()
        return norms[:-1], float(norms[-1])

    def write_entries(self, values: torch.Tensor) -> None:
        """Set the entries of `views`."""
        write_views(self.views, values)

    # --- state -------------------------------------------------------------------------------------

    def state(self) -> dict:
        """Everything that the next step depends on besides the number of steps: entries, and the tree of options."""
        return {
            "entries": None if all(view.indices is None for view in self.views) else self._flat_positions(),
            "positions": self.positions,
            "tree": None if self.tree is None else self.tree.state(),
        }

    def load(self, state: dict) -> None:
        """Load what `state` returned."""
        if state["entries"] is not None:
            self._set_views(state["entries"].to(self.device))
        self.positions = None if state["positions"] is None else state["positions"].to(self.device)
        if state["tree"] is not None:
            self.ensure_tree(1)
            assert self.tree is not None  # the loaded group has the options of the loaded tree
            self.tree.load(state["tree"], self.device)
