"""`DirectSearch`: gradientless descent (GLD), plain or with options."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.optim.optimizer import ParamsT

from hf_ft_ext.errors import InputError
from hf_ft_ext.gradientless.optimizers.base import Closure, GradientFreeOptimizer, loss_of, report_accepted
from hf_ft_ext.gradientless.optimizers.blocks import ParameterBlock
from hf_ft_ext.gradientless.optimizers.candidates import Candidates, IndexView, read_views, write_views
from hf_ft_ext.gradientless.optimizers.groups import check_group, evaluations, warn_of_sampling_size
from hf_ft_ext.gradientless.optimizers.options import OptionTree
from hf_ft_ext.gradientless.optimizers.selection import RANDOM

Evaluate = Callable[[list[IndexView], Candidates, range], torch.Tensor]
DEFAULT_BUDGET = 10_000


class DirectSearch(GradientFreeOptimizer):
    """Gradientless descent (GLD): each tensor in turn takes the best of several random changes to some of its entries.

    In a step, for each tensor theta:

    1. Select `sampling_size` entries (again every `sampling_steps` steps).
    2. Draw candidates `theta + R / 2^k * z_k`, `k = 0 .. K-1`, with `z_k` standard normal on these entries.
    3. Evaluate `objective = loss + weight_decay * ||theta||_2` for each candidate.
    4. `options=None`: theta becomes the best of {theta, candidates}.

    With `options=(m, l)`, a change found on one batch is accepted only if it, or a change built on it, helps on a
    later batch. Changes are kept as a tree of `l` levels with `m` options below each node. Step 3 evaluates each leaf
    and `K` candidates around it. Theta moves to the first-level option whose subtree has the lowest objective, if this
    is lower than that of theta itself. The option's subtree becomes the tree, with the `m` best candidates of each
    leaf as its new last level. Otherwise theta stays, the `m` best of the changes just drawn become its options, and
    their children are drawn again.

    A candidate is written into the selected entries and evaluated, then the saved entries are restored: rejected
    candidates leave the weights bit-identical in any floating-point type.

    Args:
        params: parameters or groups. All of the following can be set per group.
        lr: R, the largest radius, 0 or more; a scheduler may change it.
        num_candidates: K, 1 or more.
        options: `None`, `(m, l)` or text such as `"3x2"`.
        selection: `"all"`, `"random"`, `"magnitude"` (largest |theta|) or `"fisher"` (needs an `evaluate` with
            `importance(parameter, generator)`).
        sampling_size: number of entries per tensor; `None` = all. Smaller tensors are searched in full; a warning is
            logged if all tensors are smaller.
        sampling_steps: number of steps after which entries are selected again.
        weight_decay: weight of the norm in the objective, 0 or more.
        antithetic: draw candidates in pairs `+R/2^k z_k`, `-R/2^k z_k`, `k = 0 .. K/2 - 1`; with an odd K the last
            one has no opposite.
        pool: search all tensors of the group together, as one flat vector, instead of one after the other.
        block: number of consecutive entries of a tensor that get the same noise. This reduces the number of searched
            parameters, for example to one per attention head. Needs `selection="all"`, and has to divide the size of
            every tensor.
        seed: of the private generator.
        max_evaluations: largest number of evaluations that one step may need.

    Raises:
        InputError: a value out of range; a step that needs more than `max_evaluations`; in `step`: the loss at the
            current weights is not finite.

    Source: gradientless descent (Golovin et al., arXiv 1911.06317) as changed by the thesis "Gradientless finetuning"
    (coslu/gradientless-finetuning), whose code keeps all K + 1 changes as options after a step without a move.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 5e-3,
        num_candidates: int = 5,
        options: tuple[int, int] | str | None = None,
        selection: str = RANDOM,
        sampling_size: int | None = None,
        sampling_steps: int = 1,
        weight_decay: float = 0.0,
        antithetic: bool = False,
        pool: bool = False,
        block: int = 1,
        seed: int = 0,
        max_evaluations: int = DEFAULT_BUDGET,
    ):
        defaults = {
            "lr": lr,
            "num_candidates": num_candidates,
            "options": options,
            "selection": selection,
            "sampling_size": sampling_size,
            "sampling_steps": sampling_steps,
            "weight_decay": weight_decay,
            "antithetic": antithetic,
            "pool": pool,
            "block": block,
        }
        super().__init__(params, defaults, seed)
        self.blocks: list[ParameterBlock] = []
        for group in self.param_groups:
            check_group(group)
            members = [group["params"]] if group["pool"] else [[p] for p in group["params"]]
            self.blocks += [ParameterBlock(parameters, group) for parameters in members]
            warn_of_sampling_size(group, max(block.total for block in self.blocks[-len(members) :]))
        if (needed := self.evaluations_per_step()) > max_evaluations:
            raise InputError(
                f"a step would need {needed:,} evaluations, more than max_evaluations_per_step={max_evaluations:,}; "
                "use fewer options, candidates or tensors, or raise max_evaluations_per_step"
            )

    def evaluations_per_step(self) -> int:
        """Largest number of losses that one step evaluates, over all tensors."""
        return 1 + sum(evaluations(block.group) for block in self.blocks)

    @torch.no_grad()
    def step(self, closure: Closure | None = None, evaluate: Evaluate | None = None) -> float | None:
        """Search every tensor once; return the loss before the step.

        Args:
            closure: returns the loss of the batch at the current weights.
            evaluate: `evaluate(views, candidates, rows)` -> losses `[len(rows)]` of these candidates; it leaves the
                weights unchanged. `None` = one call of `closure` per candidate. If it has a method `accepted(row)`,
                this is called after each change of a tensor, with the index of the accepted candidate, or `None` if
                the new value is not among the candidates.
        """
        if not self._takes_step(closure):
            return None
        self.steps += 1
        before = self._current_loss(closure)
        loss: float | None = before
        evaluate = Sequential(closure) if evaluate is None else evaluate
        for block in self.blocks:
            loss = self._search(block, loss, evaluate)
        return before

    def _search(self, block: ParameterBlock, loss: float | None, evaluate: Evaluate) -> float | None:
        """Search one block.

        Args:
            loss: at the current weights; `None` if unknown.

        Returns:
            The loss after the search of this block; `None` if unknown.
        """
        block.renew(self.steps - 1, self.generator, getattr(evaluate, "importance", None))
        block.ensure_tree(sum(view.size for view in block.views))
        candidates = block.candidates(self._draw_seed(), with_current=loss is None)
        losses = self._evaluate(evaluate, block, candidates)
        objective, penalty = losses.clone(), 0.0
        if weight := float(block.group["weight_decay"]):  # objective = loss + weight_decay * ||theta||_2
            norms, norm = block.norms(candidates)
            objective += weight * norms.cpu()
            penalty = weight * norm
        bad = ~objective.isfinite()
        if bad.any():
            self.rejected += int(bad.sum())
            objective[bad] = math.inf
        shift = 0
        if loss is None:
            loss, shift = self._checked_current(losses[0]), 1
        objective = objective[shift:]
        if block.tree is not None and len(block.tree.levels) == 1:
            # The tensor moves to the option, its leaf: none of its candidates counts if its own loss is not finite.
            by_leaf = objective.view(block.tree.n_leaves, -1)
            by_leaf[by_leaf[:, 0].isinf()] = math.inf
        present = loss + penalty  # the objective at the current weights
        if block.tree is not None:
            found = EvaluatedTree(block.tree, candidates, losses, objective, shift, present)
            return self._use_options(block, found, loss, evaluate)
        best = int(objective.argmin())
        if float(objective[best]) < present:
            block.write_entries(candidates.row(best + shift))
            report_accepted(evaluate, best + shift)
            loss = float(losses[best + shift])
        return loss

    def _evaluate(self, evaluate: Evaluate, block: ParameterBlock, candidates: Candidates) -> torch.Tensor:
        n, rows = len(candidates), self.exchange.mine(len(candidates))
        losses = torch.zeros(n, dtype=torch.float64)
        if len(rows):
            losses[rows.start : rows.stop : rows.step] = evaluate(block.views, candidates, rows).double().cpu()
        self.evaluations += n
        return self.exchange.combine(losses)

    def _use_options(
        self, block: ParameterBlock, found: "EvaluatedTree", loss: float, evaluate: Evaluate
    ) -> float | None:
        """Move the tensor to the best first-level option, or restart the tree; return the loss, `None` if unknown."""
        tree, changes = found.tree, found.changes(block.compute)
        keep = min(tree.per_level, found.per_leaf)
        first = self._best_option(block, found, evaluate)
        if first is None:  # the m best of the changes just drawn are the new first level
            order = found.objective.argsort(stable=True)[:keep]
            tree.restart(changes.flatten(0, 1)[order])
            return loss
        share = tree.n_leaves // tree.widths[0]  # leaves below each first-level option
        below = slice(first * share, (first + 1) * share)
        order = found.objective.view(tree.n_leaves, -1)[below].argsort(dim=1, stable=True)[:, :keep]
        children = changes[below].gather(1, order[..., None].expand(-1, -1, changes.shape[-1]).to(changes.device))
        option = tree.levels[0][first]
        is_leaf, moves = len(tree.levels) == 1, bool((option != 0).any())
        # With one level, the option is a leaf, and the first candidate of its group is the leaf itself.
        row = found.shift + first * found.per_leaf if is_leaf else None
        if moves:
            block.write_entries(read_views(block.views).to(block.compute) + option)
        tree.advance(first, children)
        if moves:
            report_accepted(evaluate, row)
            return None if row is None else float(found.losses[row])
        return loss

    def _best_option(self, block: ParameterBlock, found: "EvaluatedTree", evaluate: Evaluate) -> int | None:
        """The first-level option whose subtree has the lowest objective; `None` if the tensor's own is as low.

        With several levels, the option itself is not among the candidates. It is evaluated here: if its loss is not
        finite, the candidates of its subtree do not count.
        """
        tree = found.tree
        by_option = found.objective.view(tree.widths[0], -1)
        while float(by_option.min()) < found.present:
            first = int(by_option.argmin()) // by_option.shape[1]
            option = tree.levels[0][first]
            if len(tree.levels) == 1 or not (option != 0).any():
                return first
            values = read_views(block.views).to(block.compute) + option
            alone = Candidates(values[None], [0], [0.0], [0], block.positions, 0, block.dtype, block.group["block"])
            if self._evaluate(evaluate, block, alone).isfinite():
                return first
            self.rejected += 1
            by_option[first] = math.inf
        return None

    def _own_state(self) -> dict:
        return {**super()._own_state(), "blocks": [block.state() for block in self.blocks]}

    def _load_own_state(self, state: dict) -> None:
        saved_blocks = state["blocks"] if "blocks" in state else state["sites"]  # "sites" in older checkpoints
        if len(saved_blocks) != len(self.blocks):
            raise ValueError(
                f"the state has {len(saved_blocks)} parameter blocks, this optimizer has {len(self.blocks)}; load the "
                "state of the same model and search settings"
            )
        super()._load_own_state(state)
        for block, group in zip(self.blocks, self._groups_of_blocks(), strict=True):
            block.group = group
        for block, saved in zip(self.blocks, saved_blocks, strict=True):
            block.load(saved)

    def _groups_of_blocks(self) -> list[dict]:
        # torch replaces the group dictionaries when it loads a state, so the blocks need the new ones
        return [group for group in self.param_groups for _ in (range(1) if group["pool"] else group["params"])]


@dataclass(frozen=True)
class EvaluatedTree:
    """The tree of options of one block, and its evaluated candidates: for each leaf, itself and K around it.

    Attributes:
        candidates, losses: all candidates with their losses, `[n]`.
        objective: objectives of the leaves' candidates, `[leaves * (K + 1)]`; infinite where not finite.
        shift: number of candidates before those of the first leaf: 1 if the current tensor is evaluated too, else 0.
        present: the objective at the current weights.
    """

    tree: OptionTree
    candidates: Candidates
    losses: torch.Tensor
    objective: torch.Tensor
    shift: int
    present: float

    @property
    def per_leaf(self) -> int:
        """Number of candidates of each leaf, itself included."""
        return len(self.objective) // self.tree.n_leaves

    def changes(self, dtype: torch.dtype) -> torch.Tensor:
        """Changes of the candidates relative to their leaf, `[leaves, K + 1, u]`."""
        n_leaves = self.tree.n_leaves
        values = self.candidates.block()[self.shift :].to(dtype)
        starts = self.candidates.starts
        leaves = starts[starts.shape[0] - n_leaves :]
        return values.view(n_leaves, self.per_leaf, -1) - leaves[:, None]


class Sequential:
    """Evaluate candidates one after the other: write, call `closure`, restore the entries bit for bit."""

    def __init__(self, closure: Closure):
        self.closure = closure

    def __call__(self, views: list[IndexView], candidates: Candidates, rows: Sequence[int]) -> torch.Tensor:
        saved = read_views(views)
        losses = []
        try:
            for row in rows:
                write_views(views, candidates.row(row))
                losses.append(loss_of(self.closure))
        finally:
            write_views(views, saved)
        return torch.tensor(losses, dtype=torch.float64)
