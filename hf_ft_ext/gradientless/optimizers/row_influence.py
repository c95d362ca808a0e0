"""Find out which outputs of a model affect the loss of their own row only, and whether padding affects losses."""

import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations, count, islice

import torch
from torch import nn

from hf_ft_ext.gradientless.optimizers.exchange import SingleProcess
from hf_ft_ext.gradientless.optimizers.output_noise import OutputNoise
from hf_ft_ext.gradientless.optimizers.perturbation.watch import watched_reads

logger = logging.getLogger(__name__)

RowLosses = Callable[[], torch.Tensor]
_SEED = 0  # not drawn: the checks do not change the directions of the steps
_MOST_SPLITS = 32
_TOLERANCE = 1e-6  # relative, between losses of rows without noise: rounding only


@dataclass
class _Plain:
    """A forward pass without noise.

    Attributes:
        losses: of the rows.
        sizes: numbers of rows of each module's outputs.
        hides: whether the `attention_mask` hides positions.
        elsewhere: numbers of the parameters that code outside of their module reads.
        counted: see `OutputNoise`.
    """

    losses: torch.Tensor
    sizes: dict[int, set[int]]
    hides: bool
    elsewhere: set[int]
    counted: bool


class RowInfluence:
    """Sets `by_rows`, `row_modules`, `counted` and `masked` of `noise`, from micro-batches of a first step.

    `by_rows` and `masked` are `None` until a batch can tell, and are not asked again afterwards:

    | attribute | needs | until then | becomes |
    | --- | --- | --- | --- |
    | `by_rows` | a micro-batch of several rows | each slope is that of the only row | `True` or `False` |
    | `masked` | a micro-batch with hidden positions | all positions get noise | a set of modules, maybe empty |

    All processes call `examine` together, as they have to agree: what one process refutes holds for none.

    Args:
        module: the model.
        noise: the noise on its outputs.
        searched: the searched tensors, by number.
        exchange: between the processes.
    """

    def __init__(
        self, module: nn.Module, noise: OutputNoise, searched: Sequence[torch.Tensor], exchange: SingleProcess
    ):
        self.module, self.noise, self.searched, self.exchange = module, noise, searched, exchange
        self.evaluations = 0

    def examine(self, passes: Iterable[RowLosses], first: bool) -> None:
        """Examine micro-batches of this process (none is allowed).

        Args:
            passes: functions that return the losses of a micro-batch's rows.
            first: nothing is known yet.
        """
        plain = [(losses_of, self._plain(losses_of)) for losses_of in passes]
        if first:
            self._warn_of_reads({number for _, one in plain for number in one.elsewhere})
        if self.noise.by_rows is None:
            self._find_rows(max(plain, key=lambda pair: len(pair[1].losses), default=None))
        if self.noise.masked is None:
            self._find_padding(next((pair for pair in plain if pair[1].hides), None))

    def _plain(self, losses_of: RowLosses) -> _Plain:
        noise, numbers = self.noise, {id(parameter): i for i, parameter in enumerate(self.searched)}
        users = {id(module): module for module, _ in noise.holders}
        with noise.observed() as sizes, watched_reads(self.module, users, numbers) as reads:
            losses = losses_of().double()
            counted = noise.rows == len(losses)
        self.evaluations += 1
        return _Plain(losses, sizes, noise.hides, reads.inside | reads.outside, counted)

    def _warn_of_reads(self, elsewhere: set[int]) -> None:
        if elsewhere := self.exchange.union(elsewhere, len(self.searched)):
            logger.warning(
                "%d searched tensors (the first of shape %s) are also read by other code than their module's forward; "
                "the search ignores this part of their gradient",
                len(elsewhere),
                tuple(self.searched[min(elsewhere)].shape),
            )

    # --- rows ----------------------------------------------------------------------------------------

    def _find_rows(self, one: tuple[RowLosses, _Plain] | None) -> None:
        """Find the modules whose outputs affect the loss of their own row only.

        With one row in each process this is found out later; until then, every slope is that of the only row.
        """
        noise, exchange, n = self.noise, self.exchange, len(self.noise.holders)
        rows = 0 if one is None else len(one[1].losses)
        several = bool(exchange.union({0} if rows > 1 else set(), 1))
        plain = one[1] if one is not None and (rows > 1 or not several) else None
        noise.counted = not exchange.union({0} if plain is not None and not plain.counted else set(), 1)
        found: set[int] = set()
        refuted: set[int] = set()
        mixing: set[int] = set()
        if plain is not None:
            for position, sizes in plain.sizes.items():
                one_for_each = all(size == rows or (size and size % rows == 0 and noise.counted) for size in sizes)
                (found if one_for_each else refuted).add(position)
        found = exchange.union(found, n) - exchange.union(refuted, n)
        noise.row_modules = found
        if not several:
            return
        if one is not None and rows > 1:
            mixing = self._mixing(*one)
        mixing = exchange.union(mixing, n)
        noise.row_modules = found - mixing
        noise.by_rows = bool(noise.row_modules) or not mixing
        if not noise.by_rows:
            logger.warning(
                "the loss of a row depends on the other rows of the batch, so all rows share one slope; the estimates "
                "have more variance"
            )
        elif mixing:
            logger.warning(
                "the outputs of %d of %d searched modules affect the losses of several rows, so all rows share one "
                "slope there; these estimates have more variance",
                len(mixing),
                n,
            )

    def _mixing(self, losses_of: RowLosses, plain: _Plain) -> set[int]:
        """Modules whose outputs for a row affect the loss of another row, among `row_modules`.

        Noise of size 1 on some rows has to leave the losses of the other rows as they are, for each of `sets_of_rows`.
        If it does not, the modules are split until those that mix rows are found, or `_MOST_SPLITS` forward passes are
        used up.
        """
        rest, mixing, splits = set(self.noise.row_modules), set(), 0
        for rows in sets_of_rows(len(plain.losses)):
            others = [row for row in range(len(plain.losses)) if row not in rows]
            groups = deque([sorted(rest)] if rest else [])
            while groups:
                group = groups.popleft()
                if len(group) < len(rest):
                    splits += 1
                if splits <= _MOST_SPLITS:
                    with self.noise.added_to_rows(_SEED, rows, group):
                        change = (losses_of().double() - plain.losses).abs()
                    self.evaluations += 1
                    if bool((change <= _TOLERANCE * plain.losses.abs())[others].all()):
                        continue
                    if len(group) > 1:
                        groups.extend((group[: len(group) // 2], group[len(group) // 2 :]))
                        continue
                mixing.update(group)
            rest -= mixing
        return mixing

    # --- padding -------------------------------------------------------------------------------------

    def _find_padding(self, one: tuple[RowLosses, _Plain] | None) -> None:
        """Find the modules whose hidden positions get no noise: all of them, if they do not affect the losses."""
        if not self.exchange.union(set() if one is None else {0}, 1):
            return
        hidden: set[int] = set()
        harmless = True
        if one is not None:
            with self.noise.added_to_hidden(_SEED) as hidden:
                harmless = torch.equal(one[0]().double(), one[1].losses)
            self.evaluations += 1
        affected = self.exchange.union(set() if harmless else {0}, 1)
        hidden = self.exchange.union(hidden, len(self.noise.holders))
        self.noise.masked = set() if affected else hidden


def sets_of_rows(rows: int) -> list[list[int]]:
    """Sets of row numbers such that for any two rows, some set has the first one and not the second one.

    About `log2(rows)` sets. Each row is in another selection of half of the sets, so none contains another (Sperner).
    """
    n = next(n for n in count(1) if math.comb(n, n // 2) >= rows)
    chosen = list(islice(combinations(range(n), n // 2), rows))
    return [[row for row, sets in enumerate(chosen) if i in sets] for i in range(n)]
