"""Evaluate the candidates of one step: by the head on its features if only the head is searched, else by the model."""

import logging
from collections.abc import Callable, Sequence

import torch
from torch import nn

from hf_ft_ext.errors import InputError
from hf_ft_ext.features import HeadReader
from hf_ft_ext.gradientless.optimizers.activity import RowPass
from hf_ft_ext.gradientless.optimizers.candidates import Candidates, IndexView, read_views, write_views
from hf_ft_ext.gradientless.optimizers.direct_search import Sequential
from hf_ft_ext.gradientless.scoring.batched_heads import BatchedHead, HeadCannotBatch, chunks
from hf_ft_ext.gradientless.scoring.full_models import FullObjective
from hf_ft_ext.gradientless.scoring.importance import divergence_scores, gradient_scores
from hf_ft_ext.gradientless.scoring.objectives import Objective

logger = logging.getLogger(__name__)

_TOLERANCE = 1e-3  # tolerance between logits of the batched and the plain head, relative to the largest logit


class HeadEvaluation:
    """`closure` and `evaluate` of a search, on the features of one step's micro-batches.

    All candidates are evaluated at once (see `BatchedHead`). The first batched logits of each tensor are compared
    with those of the plain head; if they differ, the candidates of this tensor are evaluated one by one from then on.

    Args:
        reader: runs the head.
        names: name of each searched parameter of the head, by `id`.
        objective: of the logits of all micro-batches together.
        fisher: `"divergence"` or `"gradient"`: what `importance` measures.
        of_rows: objective of each row, `[..., rows, classes]` -> `[..., rows]`, with mean `objective`; `None` if the
            objective is not a mean over rows. For `node_losses`.
    """

    def __init__(
        self,
        reader: HeadReader,
        names: dict[int, str],
        objective: Objective,
        fisher: str = "divergence",
        of_rows: Objective | None = None,
    ):
        self.reader, self.names, self.objective, self.fisher = reader, names, objective, fisher
        self.of_rows = of_rows
        self.heads: list[BatchedHead] = []
        self.checked: set[tuple[int, ...]] = set()
        self.sequential: set[tuple[int, ...]] = set()
        self.micro_batches: list[tuple[torch.Tensor, torch.Tensor]] = []

    def load(self, micro_batches: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Set the features and labels of the next step."""
        self.micro_batches = list(micro_batches)
        self.labels = torch.cat([labels for _, labels in micro_batches])
        while len(self.heads) < len(micro_batches):
            self.heads.append(BatchedHead(self.reader, self.names))
        self.stale = True
        self._rows: Sequence[int] = ()

    def plain_logits(self) -> torch.Tensor:
        """Logits of the whole step at the current weights: `[rows, classes]`."""
        return torch.cat([self.reader.logits(features) for features, _ in self.micro_batches])

    def closure(self) -> float:
        """The objective at the current weights."""
        try:
            logits = self._begin()
        except HeadCannotBatch:
            logits = self.plain_logits()
        return float(self.objective(logits, self.labels))

    def differentiable(self) -> torch.Tensor:
        """The objective at the current weights as a differentiable tensor."""
        return self.objective(self.plain_logits(), self.labels)

    def _begin(self) -> torch.Tensor:
        logits = [h.begin(f) for h, (f, _) in zip(self.heads, self.micro_batches, strict=False)]
        self.stale = False
        return torch.cat(logits)

    def __call__(self, views: list[IndexView], candidates: Candidates, rows: Sequence[int]) -> torch.Tensor:
        key = tuple(id(view.parameter) for view in views)
        if key not in self.sequential:
            try:
                return self._batched(key, views, candidates, rows)
            except HeadCannotBatch as error:
                logger.info("candidates are evaluated one by one: %s", error)
                self.sequential.add(key)
        self.stale = True
        return Sequential(lambda: self.objective(self.plain_logits(), self.labels))(views, candidates, rows)

    def _batched(self, key, views: list[IndexView], candidates: Candidates, rows: Sequence[int]) -> torch.Tensor:
        if self.stale:
            self._begin()
        widest = max(call.out.numel() // len(call.out) for call in self.heads[0].calls.values())
        parts = chunks(rows, max(len(f) for f, _ in self.micro_batches), widest)
        losses = []
        for part in parts:
            logits = [
                head.logits(views, candidates, part) for head, _ in zip(self.heads, self.micro_batches, strict=False)
            ]
            logits = logits[0] if len(logits) == 1 else torch.cat(logits, 1)
            if key not in self.checked:
                self._check(key, views, candidates, part, logits)
            losses.append(self.objective(logits, self.labels))
        self._rows = rows if len(parts) == 1 else ()
        return losses[0] if len(losses) == 1 else torch.cat(losses)

    def _check(self, key, views, candidates, rows, logits) -> None:
        saved = read_views(views)
        try:
            write_views(views, candidates.row(rows[-1]))
            expected = self.plain_logits()
        finally:
            write_views(views, saved)
        size = max(1.0, float(expected.abs().max()))
        if not torch.allclose(logits[-1].float(), expected.float(), rtol=0, atol=_TOLERANCE * size, equal_nan=True):
            names = ", ".join(self.names[i] for i in key)
            raise HeadCannotBatch(f"batched logits of {names} differ from those of the plain head: it mixes rows")
        self.checked.add(key)

    def nodes(self) -> list[tuple[nn.Linear, torch.Tensor, torch.Tensor]]:
        """The head's linear layers in execution order: module, inputs `[rows, in]` and outputs `[rows, out]`."""
        if self.stale:
            try:
                self._begin()
            except HeadCannotBatch as error:
                raise InputError(
                    f"node perturbation does not support this head: {error}; use search_method=spsa"
                ) from None
        result = []
        heads = self.heads[: len(self.micro_batches)]
        for module in heads[0].modules.values():
            if type(module) is nn.Linear and id(module) in heads[0].calls:
                calls = [head.calls[id(module)] for head in heads]
                x, out = (torch.cat([t.reshape(len(call.out), -1) for call, t in pairs]) for pairs in (
                    [(call, call.x) for call in calls], [(call, call.out) for call in calls]
                ))  # fmt: skip
                result.append((heads[0].calls[id(module)].position, module, x, out))
        return [(module, x, out) for _, module, x, out in sorted(result, key=lambda node: node[0])]

    def node_losses(self, module: nn.Linear, outputs: torch.Tensor) -> torch.Tensor:
        """Losses `[n, rows]` if `module` returns `outputs` (`[n, rows, out]`)."""
        if self.of_rows is None:
            raise InputError(
                "node perturbation needs the loss of each row, and this objective is defined for whole batches only; "
                "use search_method=spsa or gld"
            )
        sizes = [len(features) for features, _ in self.micro_batches]
        logits = []
        for head, part in zip(self.heads, outputs.split(sizes, 1), strict=False):
            shape = head.calls[id(module)].out.shape[1:]
            logits.append(head.logits_from(module, part.reshape(-1, *shape), len(outputs)))
        return self.of_rows(torch.cat(logits, 1), self.labels)

    def accepted(self, row: int | None) -> None:
        """Note that the tensor now equals candidate `row` of the last evaluation (`None`: none of them)."""
        if self.stale or row is None or row not in self._rows:
            self.stale = True
            return
        position = list(self._rows).index(row)
        for head, _ in zip(self.heads, self.micro_batches, strict=False):
            head.accept(position)

    def importance(self, parameter: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Importance of each entry of `parameter` on this step's rows: float32, `[numel]`."""
        if self.fisher == "gradient":
            problem = self.reader.model.config.problem_type
            return gradient_scores(self.reader.logits, self.micro_batches, problem, parameter)
        if self.stale:
            self._begin()
        heads = self.heads[: len(self.micro_batches)]
        scores = divergence_scores(heads, self.plain_logits(), parameter, generator)
        self.stale = True  # the recorded calls are those of perturbed entries
        return scores


class StepEvaluation:
    """`closure` and `evaluate` if the encoder runs in every step; features are computed when first needed.

    Args:
        head: evaluates the searched head parameters; `None` = every candidate runs the whole model.
        full: the objective of the step by forward passes of the whole model.
        features: computes features and labels of the step's micro-batches.
        all_in_head: only the head is searched, so `closure` runs on the features too.
    """

    def __init__(
        self,
        head: HeadEvaluation | None,
        full: FullObjective,
        features: Callable[[], Sequence[tuple[torch.Tensor, torch.Tensor]]] | None,
        all_in_head: bool,
    ):
        self.head, self.full, self.features = head, full, features
        self.all_in_head = head is not None and all_in_head
        self.fresh = self.in_head = False
        if head is not None:
            self.importance = self._importance

    def closure(self) -> float:
        """The objective at the current weights."""
        if not self.all_in_head:
            return float(self.full.value())
        return self._loaded().closure()

    def differentiable(self) -> torch.Tensor:
        """The objective at the current weights as a differentiable tensor."""
        if not self.all_in_head:
            return self.full.value()
        return self._loaded().differentiable()

    def nodes(self) -> list[tuple[nn.Linear, torch.Tensor, torch.Tensor]]:
        """See `HeadEvaluation.nodes`."""
        if not self.all_in_head:
            raise InputError(
                "node perturbation needs a search of head tensors only, with a head that reads one vector per row; "
                "use search_method=spsa or gld"
            )
        return self._loaded().nodes()

    def node_losses(self, module: nn.Linear, outputs: torch.Tensor) -> torch.Tensor:
        """See `HeadEvaluation.node_losses`."""
        return self._loaded().node_losses(module, outputs)

    def repeated(self, n: int) -> torch.Tensor | None:
        """Objectives `[n]` of the batch repeated `n` times in one forward pass; `None` if that is not supported.

        A search of the head alone does not use it: `closure` runs the head, not the whole model.
        """
        return None if self.full.repeated is None or self.all_in_head else self.full.repeated(n)

    def row_passes(self) -> Sequence[RowPass]:
        """See `FullObjective.row_passes`."""
        if self.full.row_passes is None:
            raise InputError(
                "search_method=activity needs the loss of each row, and this loss is known for whole batches only (an "
                "overridden compute_loss, or a model's own loss); use search_method=spsa"
            )
        return self.full.row_passes

    def __call__(self, views: list[IndexView], candidates: Candidates, rows: Sequence[int]) -> torch.Tensor:
        head = self.head
        self.in_head = head is not None and all(id(view.parameter) in head.names for view in views)
        if not self.in_head:
            return Sequential(self.full.value)(views, candidates, rows)
        return self._loaded()(views, candidates, rows)

    def _loaded(self) -> HeadEvaluation:
        """The evaluation of the head, on the features of this step."""
        assert self.head is not None and self.features is not None  # callers have checked `all_in_head` or `in_head`
        if not self.fresh:
            self.head.load(self.features())
            self.fresh = True
        return self.head

    def accepted(self, row: int | None) -> None:
        """Note that the tensor now equals candidate `row` of the last evaluation (`None`: none of them)."""
        if self.in_head:
            self._loaded().accepted(row)
        else:
            self.fresh = False

    def _importance(self, parameter: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return self._loaded().importance(parameter, generator)
