"""`DirectSearch`: gradientless descent (GLD), plain or with options."""

import math
from collections.abc import Callable, Sequence

import torch
from torch.optim.optimizer import ParamsT

from hf_ft_ext.errors import InputError
from hf_ft_ext.gradientless.optimizers.base import Closure, GradientFreeOptimizer
from hf_ft_ext.gradientless.optimizers.blocks import ParameterBlock
from hf_ft_ext.gradientless.optimizers.candidates import Candidates, IndexView, read_views, write_views
from hf_ft_ext.gradientless.optimizers.groups import check_group, evaluations, warn_of_sampling_size
from hf_ft_ext.gradientless.optimizers.selection import RANDOM

Evaluate = Callable[[list[IndexView], Candidates, range], torch.Tensor]
DEFAULT_BUDGET = 10_000


class DirectSearch(GradientFreeOptimizer):
    """Direct search: each tensor in turn keeps the best of some random changes to some of its entries.

    In a step, for each tensor theta: choose `sampling_size` entries (anew every `sampling_steps` steps); draw
    candidates `theta + R / 2^k * z_k`, `k = 0 .. K-1`, `z_k` standard normal on these entries; the objective is
    `loss + weight_decay * ||theta||_2`.

    `options=None`: theta becomes the best of {theta, candidates}. `options=(m, l)`: candidates become options, kept
    as a tree of `l` levels with `m` options below each node. On the next batch, the `K` candidates around each leaf,
    and the leaf itself, are scored; theta moves to the first-level option below which the lowest objective lies, if
    it is lower than that of the unmoved tensor, and the option's subtree, with the `m` best candidates of each leaf as
    its new last level, becomes the tree. Else theta stays, the `m` best of the changes that were just drawn become
    its options, and their children are drawn anew. So a change found on one batch moves the tensor only if it, or
    what it leads to, helps on a later one.

    A candidate is written into the chosen entries, evaluated, and the saved entries are put back: rejected
    candidates leave the weights bit-identical in any floating-point type.

    Args:
        params: parameters or groups. All of the following can be set per group.
        lr: R, the largest radius, 0 or more; a scheduler may change it.
        num_candidates: K, 1 or more.
        options: `None`, `(m, l)` or text such as `"3x2"`.
        selection: `"all"`, `"random"`, `"magnitude"` (largest |theta|) or `"fisher"` (needs an `evaluate` with
            `importance(parameter, generator)`).
        sampling_size: entries per tensor and step; `None` = all. Smaller tensors are searched
            whole; if all are smaller, a warning says so.
        sampling_steps: steps after which entries are chosen anew.
        weight_decay: weight of the norm in the objective, 0 or more.
        antithetic: candidates in pairs `+R/2^k z_k`, `-R/2^k z_k`, `k = 0 .. K/2 - 1`.
        pool: one pool of entries over all tensors of the group instead of tensor after tensor.
        block: consecutive entries of a tensor that get the same noise: a search in fewer numbers, such as one per
            attention head. Needs `selection="all"`, and has to divide the size of every tensor.
        seed: of the private generator.
        max_evaluations: most evaluations that one step may need.

    Raises:
        InputError: a value out of range; a step that needs more than `max_evaluations`; in `step`: the loss at the
            present weights is not finite.

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
                "take fewer options, candidates or tensors, or raise it"
            )

    def evaluations_per_step(self) -> int:
        """Losses that one step evaluates at most, over all tensors."""
        return 1 + sum(evaluations(block.group) for block in self.blocks)

    @torch.no_grad()
    def step(self, closure: Closure | None = None, evaluate: Evaluate | None = None) -> float | None:
        """Search every tensor once; return the loss before.

        Args:
            closure: returns the loss of the batch at the present weights.
            evaluate: `evaluate(views, candidates, rows)` -> losses `[len(rows)]` of these candidates of these
                views, weights left as they were; `None` = one call of `closure` per candidate. If it has a method
                `moved(row)`, that is called after each move, with the candidate that the tensor moved to or `None`
                if it is none of them.
        """
        if self._already_taken(closure):
            return None
        self.steps += 1
        before = loss = self._current_loss(closure)
        evaluate = Sequential(closure) if evaluate is None else evaluate
        for block in self.blocks:
            loss = self._search(block, loss, evaluate)
        return before

    def _search(self, block: ParameterBlock, loss: float | None, evaluate: Evaluate) -> float | None:
        """Search one block; `loss` is that of the present weights, `None` if unknown. Returns it as it is after."""
        block.renew(self.generator, getattr(evaluate, "importance", None))
        block.ensure_tree(sum(view.size for view in block.views))
        candidates = block.candidates(self._draw_seed(), with_unmoved=loss is None)
        losses = self._evaluate(evaluate, block, candidates)
        objective, penalty = losses.clone(), 0.0
        if weight := float(block.group["weight_decay"]):
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
        best = int(objective.argmin())
        improves = float(objective[best]) < loss + penalty
        if block.tree is None:
            if improves:
                block.move(candidates.row(best + shift))
                _accept(evaluate, best + shift)
                loss = float(losses[best + shift])
            return loss
        return self._use_options(block, candidates, losses, objective, shift, improves, loss, evaluate)

    def _evaluate(self, evaluate: Evaluate, block: ParameterBlock, candidates: Candidates) -> torch.Tensor:
        n, rows = len(candidates), self.exchange.mine(len(candidates))
        losses = torch.zeros(n, dtype=torch.float64)
        if len(rows):
            losses[rows.start : rows.stop : rows.step] = evaluate(block.views, candidates, rows).double().cpu()
        self.evaluations += n
        return self.exchange.combine(losses)

    @staticmethod
    def _use_options(block, candidates, losses, objective, shift, improves, loss, evaluate) -> float | None:
        tree, per_leaf = block.tree, len(objective) // block.tree.n_leaves
        by_leaf = objective.view(tree.n_leaves, per_leaf)
        first = tree.first_of(int(objective.argmin()) // per_leaf)
        values = candidates.block()[shift:].to(block.compute)
        leaves = candidates.starts[candidates.starts.shape[0] - tree.n_leaves :]
        changes = values.view(tree.n_leaves, per_leaf, -1) - leaves[:, None]
        keep = min(tree.per_level, per_leaf)
        if not improves:
            order = objective.argsort(stable=True)[:keep]
            tree.restart(changes.flatten(0, 1)[order])
            return loss
        share = tree.n_leaves // tree.widths[0]
        below = slice(first * share, (first + 1) * share)
        order = by_leaf[below].argsort(dim=1, stable=True)[:, :keep]
        children = changes[below].gather(1, order[..., None].expand(-1, -1, changes.shape[-1]).to(changes.device))
        option = tree.levels[0][first]
        is_leaf, moves = len(tree.levels) == 1, bool((option != 0).any())
        row = shift + first * per_leaf if is_leaf else None
        if moves:
            block.move(read_views(block.views).to(block.compute) + option)
        tree.advance(first, children)
        if moves:
            _accept(evaluate, row)
            loss = float(losses[row]) if is_leaf and math.isfinite(losses[row]) else None
        return loss

    def _own_state(self) -> dict:
        return {**super()._own_state(), "blocks": [block.state() for block in self.blocks]}

    def _load_own_state(self, state: dict) -> None:
        saved_blocks = state["blocks"] if "blocks" in state else state["sites"]  # checkpoints of earlier versions
        if len(saved_blocks) != len(self.blocks):
            raise ValueError(
                f"the state is of {len(saved_blocks)} searched blocks, this optimizer has {len(self.blocks)}; it is "
                "of another model or another search"
            )
        super()._load_own_state(state)
        for block, group in zip(self.blocks, self._groups_of_blocks(), strict=True):
            block.group = group
        for block, saved in zip(self.blocks, saved_blocks, strict=True):
            block.load(saved)

    def _groups_of_blocks(self) -> list[dict]:
        # torch replaces the group dictionaries when it loads a state
        return [group for group in self.param_groups for _ in (range(1) if group["pool"] else group["params"])]


class Sequential:
    """Candidates one after the other: written, evaluated by `closure`, put back bit for bit."""

    def __init__(self, closure: Closure):
        self.closure = closure

    def __call__(self, views: list[IndexView], candidates: Candidates, rows: Sequence[int]) -> torch.Tensor:
        saved = read_views(views)
        losses = []
        try:
            for row in rows:
                write_views(views, candidates.row(row))
                losses.append(float(self.closure()))
        finally:
            write_views(views, saved)
        return torch.tensor(losses, dtype=torch.float64)


def _accept(evaluate: Evaluate, row: int | None) -> None:
    if hasattr(evaluate, "moved"):
        evaluate.moved(row)
