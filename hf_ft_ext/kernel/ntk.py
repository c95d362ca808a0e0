"""`empirical_ntk` and `projected_gradients`: the empirical neural tangent kernel of any transformers model."""

import functools
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from hf_ft_ext.errors import InputError
from hf_ft_ext.kernel.engines.jacobian import JacobianEngine
from hf_ft_ext.kernel.engines.projected import Chunks, MemoryChunks, ProjectedEngine, divide_rows
from hf_ft_ext.kernel.engines.structured import StructuredEngine
from hf_ft_ext.kernel.formulas import Formula
from hf_ft_ext.kernel.options import DIMENSION, Engine, KernelOptions, as_engine, as_formula, kernel_parameters
from hf_ft_ext.kernel.rows import ExampleRows
from hf_ft_ext.kernel.schedule import (
    BlockSchedule,
    Bounds,
    Edges,
    MemoryNeeds,
    batch_overhead,
    make_schedule,
    measure,
    memory_bound,
)
from hf_ft_ext.per_example.capture import Function
from hf_ft_ext.per_example.outputs import logits
from hf_ft_ext.per_example.state import Batch, batch_in, computing_in, evaluating, supports_float64

logger = logging.getLogger(__name__)


class Blocks(Protocol):
    """Storage for finished blocks (see `store`)."""

    def schedule(self, make: Callable[[Edges | None], BlockSchedule]) -> BlockSchedule:
        """The schedule that `make` gives for the stored row ranges, or for `None` if there are none."""
        ...

    def get(self, i: int, j: int) -> torch.Tensor | None:
        """Block (i, j), `[kernels, n, C, n', C]`, or `None` if it is not finished."""
        ...

    def put(self, i: int, j: int, block: torch.Tensor) -> None:
        """Store the finished block (i, j)."""
        ...


def empirical_ntk(
    model: nn.Module,
    batches1: Batch | Iterable[Batch],
    batches2: Batch | Iterable[Batch] | None = None,
    formula: str | Formula = Formula.SGD,
    engine: str | Engine = Engine.AUTO,
    *,
    function: Function | None = None,
    disable_tqdm: bool = True,
    **options,
) -> torch.Tensor:
    """Compute the kernel `[N1, C, N2, C]` between the examples of `batches1` and `batches2`, in float64 on the CPU.

    `K[i, a, j, b]` is the inner product of the gradients of scalar a of example i and scalar b of example j over the
    chosen parameters; see `Formula` for the variants with signs. The kernel is computed in blocks: the second side
    runs again for each block of the first, and at no time are all gradients in memory.

    Signs are those of the gradient in float64 (widening narrower weights is exact). An entry smaller than 1e-14 times
    the Euclidean norm of its gradient row over the chosen parameters counts as zero. So a sign kernel does not depend
    on batch size, padding or engine.

    Args:
        model: any transformers model, or a module that takes the batches; dropout is off.
        batches1: mappings from input names to tensors, or one such mapping; labels are ignored.
        batches2: the second side; `None` = the kernel of `batches1` with itself, which computes each pair once.
        function: maps model and batch to scalars `[n]` or `[n, C]`; default: the logits.
        options: the other fields of `KernelOptions`; `dimension` and `seed` only with `engine="projected"`.

    Returns:
        `[N1, C, N2, C]`, or `[N1, C, N2]` with `class_diagonal`. For `asymmetric_signgd` `[2, N1, ...]`: the kernel
        and its flip.

    Raises:
        InputError: options that do not work together, a model whose per-example gradients are not defined, too little
            memory, or a kernel with NaN.

    Source: Malladi et al., ICML 2023, arXiv 2210.05643; the kernel itself: Jacot et al. 2018, arXiv 1806.07572.
    """
    computation = KernelComputation(model, KernelOptions(as_formula(formula), as_engine(engine), **options), function)
    rows1 = ExampleRows(batches1, _pad_token(model))
    rows2 = None if batches2 is None else ExampleRows(batches2, _pad_token(model))
    kernel = computation.run(rows1, rows2, disable_tqdm=disable_tqdm)
    return kernel if computation.options.formula.kernels == 2 else kernel[0]


def projected_gradients(
    model: nn.Module,
    batches: Batch | Iterable[Batch],
    dimension: int = DIMENSION,
    seed: int = 0,
    *,
    function: Function | None = None,
    disable_tqdm: bool = True,
    **options,
) -> torch.Tensor:
    """Compute random projections of the gradients of each example's scalars: `[N, C, dimension]` on the CPU.

    `<P g, P g'>` is an unbiased estimate of `<g, g'>` with a standard deviation of about
    `sqrt(2 / dimension) |g| |g'|` or less, and of at most twice that. Projections from different calls can be combined
    if parameters, dimension and seed are the same: the projection does not depend on batches, order, dtype, device or
    process. `hf_ft_ext.kernel.engines.projection` defines it.

    Args:
        model, function: as for `empirical_ntk`.
        batches: as `batches1` of `empirical_ntk`.
        dimension: k, the dimension of the projection.
        seed: seed of the projection.
        options: `parameters`, `exclude_embeddings`, `exclude_head`, `only_biases`, `binary_classification`,
            `memory_gb` and `batch_size` of `KernelOptions`.

    Returns:
        float64 for a model in float64, otherwise float32.

    Raises:
        InputError: as `empirical_ntk`.

    Source: TensorSketch (Pham and Pagh, KDD 2013), over all parameters together.
    """
    kernel_options = KernelOptions(engine=Engine.PROJECTED, dimension=dimension, seed=seed, **options)
    computation = KernelComputation(model, kernel_options, function)
    rows = ExampleRows(batches, _pad_token(model))
    chunks = MemoryChunks(divide_rows(len(rows)))
    computation.project(rows, chunks, disable_tqdm=disable_tqdm)
    return torch.cat([chunks.get(i) for i in range(len(chunks.edges))])


class KernelComputation:
    """Computes kernels of one model under fixed options.

    Args:
        model, options: the model, and the options of its kernels.
        function: as for `empirical_ntk`. With `binary_classification` it must return two scalars, whose difference
            is used.
    """

    def __init__(self, model: nn.Module, options: KernelOptions, function: Function | None = None):
        self.model, self.options = model, options
        if options.binary_classification:
            inner = function or logits

            def function(model: nn.Module, batch: Batch) -> torch.Tensor:
                return _difference(inner(model, batch))

        self.function = function or logits
        self.parameters = kernel_parameters(
            model, options.parameters, options.exclude_embeddings, options.exclude_head, options.only_biases
        )
        first = next(iter(self.parameters.values()))
        if options.formula.signs and not supports_float64(first.device):
            raise InputError(
                f"formula {options.formula.value} needs float64, which {first.device} does not support; use the CPU"
            )
        dtype = torch.float64 if options.formula.signs or first.dtype == torch.float64 else torch.float32
        wider = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point() and t.dtype != dtype]
        self._wider_bytes = sum(t.numel() * dtype.itemsize for t in wider)
        self.dtype = dtype
        self.projected: ProjectedEngine | None = None  # used instead of `engine`
        if options.engine is Engine.PROJECTED:
            assert options.dimension is not None and options.seed is not None  # `KernelOptions` sets them
            budget = options.memory_gb, options.batch_size, self._wider_bytes
            self.projected = ProjectedEngine(
                model, self.function, self.parameters, options.dimension, options.seed, dtype, *budget
            )
        else:
            kind = JacobianEngine if options.engine is Engine.JACOBIAN else StructuredEngine
            self.engine = kind(model, self.function, self.parameters, options.formula, dtype)
        self._ready = False
        self._needs: dict[int, MemoryNeeds] = {}  # by the tokens of the longest row

    def project(
        self, rows: ExampleRows, chunks: Chunks, process: int = 0, processes: int = 1, disable_tqdm: bool = True
    ) -> None:
        """See `ProjectedEngine.project`.

        Raises:
            InputError: as there; or the options have another engine.
        """
        if self.projected is None:
            raise InputError(f"engine={self.options.engine.value} projects no gradients; pass engine=projected")
        self.projected.project(rows, chunks, process, processes, disable_tqdm)

    def run(
        self,
        rows1: ExampleRows,
        rows2: ExampleRows | None = None,
        blocks: Blocks | None = None,
        process: int = 0,
        processes: int = 1,
        disable_tqdm: bool = True,
        send: Callable[[torch.Tensor, int], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Compute the kernel `[kernels, N1, C, N2, C]` (`class_diagonal`: without the last axis).

        With several processes and no `send`, only this process's blocks are filled; the rest is zero.

        Args:
            blocks: storage to read finished blocks from and to write new ones to. Not used by engine `projected`,
                which stores features instead (see `ProjectedEngine.project`).
            process, processes: index of this process, and number of processes that share the work.
            send: `send(block, owner)` broadcasts a block from process `owner` and returns it on every process.
        """
        if self.projected is not None:
            return self.projected.kernel(rows1, rows2, self.options.class_diagonal, disable_tqdm)[None]
        make = functools.partial(self._schedule, rows1, rows2, processes)
        total, symmetric = None, rows2 is None
        with evaluating(self.model), computing_in(self.model, self.dtype, only_weights=True):  # once, for all batches
            schedule = blocks.schedule(make) if blocks else make()
            first, second = schedule.first, schedule.second
            pairs = [(i, j) for i in range(len(first)) for j in range(len(second)) if not symmetric or i <= j]
            mine = pairs[process::processes]
            for i, j, block in self._blocks(mine, schedule, rows1, rows2, blocks, disable_tqdm):
                if total is None:
                    total = self._zeros(rows1, rows2, block.shape[2])
                _insert(total, block, first[i], second[j], symmetric)
            if total is None:  # more processes than blocks
                total = self._zeros(rows1, rows2, self._scalars(rows1))
        if send is not None and processes > 1:  # block by block: the kernel may not fit into a device's memory
            for number, (i, j) in enumerate(pairs):
                (a, b), (p, q) = first[i], second[j]
                block = send(total[:, a:b, :, p:q].contiguous(), number % processes)
                _insert(total, block, first[i], second[j], symmetric)
        return total

    def _zeros(self, rows1: ExampleRows, rows2: ExampleRows | None, c: int) -> torch.Tensor:
        shape = (self.options.formula.kernels, len(rows1), c, len(rows2 or rows1), c)
        return torch.zeros(shape[:-1] if self.options.class_diagonal else shape, dtype=torch.float64)

    def _schedule(
        self, rows1: ExampleRows, rows2: ExampleRows | None, processes: int, edges: Edges | None = None
    ) -> BlockSchedule:
        self._prepare(rows1)
        longer = rows1 if rows2 is None or max(rows1.lengths) >= max(rows2.lengths) else rows2
        options = self.options
        needs = self._needs_of(max(longer.lengths), longer)
        lengths2 = None if rows2 is None else rows2.lengths
        sizes = memory_bound(options.memory_gb, self.engine.device, processes), options.batch_size, options.block_rows
        return make_schedule(needs, rows1.lengths, lengths2, *sizes, processes, edges)

    def _needs_of(self, length: int, rows: ExampleRows) -> MemoryNeeds:
        """The memory needs of rows whose longest has `length` tokens; measured once, not for each kernel anew."""
        if length not in self._needs:
            self._needs[length] = measure(self.engine, rows, self._wider_bytes, self.options.class_diagonal)
        return self._needs[length]

    def _prepare(self, rows: ExampleRows) -> None:
        if self._ready:
            return
        self.engine.prepare(rows)
        uncovered = self.engine.uncovered
        if uncovered and self.options.engine is Engine.STRUCTURED:
            raise InputError(
                f"engine=structured has no rule for {len(uncovered)} parameters ({', '.join(uncovered[:3])}, ...); "
                "pass engine=auto, which runs examples one by one for them"
            )
        self._ready = True

    def _scalars(self, rows: ExampleRows) -> int:
        return self.engine.gradient_rows(rows, [[0]]).scalars

    def _blocks(
        self, pairs, schedule: BlockSchedule, rows1, rows2, blocks: Blocks | None, disable_tqdm: bool
    ) -> Iterator[tuple]:
        held: tuple[Bounds, object] | None = None
        for i, j in tqdm(pairs, desc="kernel blocks", disable=disable_tqdm):
            block = blocks.get(i, j) if blocks else None
            if block is None:
                self._prepare(rows1)
                self.engine.contraction.max_bytes = schedule.scratch_bytes
                for part1, part2, same in schedule.parts(i, j, symmetric=rows2 is None):
                    if held is None or held[0] != part1:
                        held = None  # free it before the next one is computed
                        held = (part1, self._gradient_rows(rows1, part1, schedule))
                    left = held[1]
                    right = left if same else self._gradient_rows(rows2 or rows1, part2, schedule)
                    found = self._kernel(left, right, part1[0], part2[0])
                    del left, right  # freed before the next rows are computed
                    if (part1, part2) == (schedule.first[i], schedule.second[j]):
                        block = found
                        continue
                    if block is None:
                        block = _zeros_like(found, schedule.first[i], schedule.second[j])
                    _insert(block, found, *schedule.within(i, j, part1, part2), symmetric=rows2 is None and i == j)
                if blocks:
                    blocks.put(i, j, block)
            yield i, j, block

    def _gradient_rows(self, rows: ExampleRows, bounds: Bounds, schedule: BlockSchedule):
        return self.engine.gradient_rows(
            rows, rows.by_length(*bounds, schedule.batch_size, batch_overhead(self.engine.device))
        )

    def _kernel(self, left, right, first: int, second: int) -> torch.Tensor:
        found = self._diagonal(left, right) if self.options.class_diagonal else self.engine.kernels(left, right)
        if not found.isfinite().all():
            raise InputError(self._not_finite_message(left, right))
        # From the order of the batches back to the order of the examples.
        block = torch.empty_like(found)
        rows = torch.tensor(left.order)[:, None] - first
        columns = torch.tensor(right.order) - second
        block[:, rows, :, columns] = found.permute(1, 3, 0, 2, *range(4, found.ndim))
        return block

    def _diagonal(self, left, right) -> torch.Tensor:
        """The kernels `K[i, c, j, c]` of each scalar with itself: `[kernels, n, c, n']`."""
        parts = [self.engine.kernels(left.of_scalar(a), right.of_scalar(a)) for a in range(left.scalars)]
        return torch.stack([part[:, :, 0, :, 0] for part in parts], 2)

    def _not_finite_message(self, left, right) -> str:
        """An error message that names the example and the parameter that made the kernel NaN or infinite."""
        for which, side in (("first", left), ("second", right)):
            for name in self.parameters:
                if name not in side.names():
                    continue
                bad = ~self.engine.of_parameter(side, side, name)[0].diagonal().isfinite()
                if bad.any():
                    row = int(bad.nonzero()[0, 0]) // side.scalars
                    return (
                        f"the kernel is not finite: the gradient of {name} for example {side.order[row]} (from 0) of "
                        f"the {which} side is NaN or infinite; check this row and this layer's weights, or load the "
                        "model in float32"
                    )
        return "the kernel is not finite although every gradient is: its entries overflow; scale the logits down"


def outputs_at_start(computation: KernelComputation, rows: ExampleRows, batch_size: int) -> np.ndarray:
    """The kernel's scalars `[N, C]` at the model's current weights, computed in the kernel's dtype."""
    model, dtype, found = computation.model, computation.dtype, []
    device = next(iter(computation.parameters.values())).device
    with torch.no_grad(), evaluating(model), computing_in(model, dtype):
        for k in range(0, len(rows), batch_size):
            batch = batch_in(rows.batch(range(k, min(k + batch_size, len(rows))), device), dtype)
            scalars = computation.function(model, batch)
            found.append((scalars[:, None] if scalars.ndim == 1 else scalars).double().cpu())
    return torch.cat(found).numpy()


def pseudo_logit(classes: int, seed: int) -> Function:
    """The scalar of `Coupling.PSEUDO`: `sum_c e_c f_c / sqrt(C)`, with random signs `e` drawn from `seed`."""
    generator = torch.Generator().manual_seed(seed)
    signs = 2.0 * torch.randint(2, (classes,), generator=generator) - 1

    def function(model: nn.Module, batch: Batch) -> torch.Tensor:
        values = logits(model, batch)
        # sum_c e_c f_c / sqrt(C)
        return values @ signs.to(values) / classes**0.5

    return function


def _pad_token(model: nn.Module) -> int | None:
    return getattr(getattr(model, "config", None), "pad_token_id", 0)


def _insert(kernel: torch.Tensor, block: torch.Tensor, rows: Bounds, columns: Bounds, symmetric: bool) -> None:
    """Insert a block `[kernels, n, c, n', c]` or `[kernels, n, c, n']` into a kernel, mirrored too if `symmetric`."""
    (a, b), (p, q) = rows, columns
    kernel[:, a:b, :, p:q] = block
    if symmetric and rows != columns:
        mirrored = block.permute(0, 3, 2, 1) if block.ndim == 4 else block.permute(0, 3, 4, 1, 2)
        # K[j, b, i, a] = K[i, a, j, b]; mirroring an asymmetric kernel gives its flip, <sign J', J> = <J, sign J'>
        kernel[:, p:q, :, a:b] = mirrored.flip(0) if len(mirrored) == 2 else mirrored


def _zeros_like(part: torch.Tensor, rows: Bounds, columns: Bounds) -> torch.Tensor:
    """An empty block of these rows and columns, with the other axes of `part`."""
    shape = part.shape
    return part.new_zeros(shape[0], rows[1] - rows[0], shape[2], columns[1] - columns[0], *shape[4:])


def _difference(values: torch.Tensor) -> torch.Tensor:
    if values.ndim != 2 or values.shape[1] != 2:
        raise InputError(
            f"binary_classification takes the difference of two logits, but there are {tuple(values.shape)[1:] or 1}; "
            "leave it out, or use a model with two classes"
        )
    return values[:, 1] - values[:, 0]
