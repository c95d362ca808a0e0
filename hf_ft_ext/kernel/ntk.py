"""`empirical_ntk`: the empirical neural tangent kernel of any transformers model."""

import enum
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn
from tqdm.auto import tqdm

from hf_ft_ext.errors import InputError
from hf_ft_ext.kernel.engines.jacobian import JacobianEngine
from hf_ft_ext.kernel.engines.structured import StructuredEngine
from hf_ft_ext.kernel.formulas import Formula
from hf_ft_ext.kernel.parameters import kernel_parameters
from hf_ft_ext.kernel.rows import ExampleRows
from hf_ft_ext.kernel.schedule import Plan, make_plan, measure
from hf_ft_ext.per_example.capture import Function
from hf_ft_ext.per_example.gradients import logits
from hf_ft_ext.per_example.state import Batch, computing_in, evaluating, supports_float64

logger = logging.getLogger(__name__)

# What a batch costs beside its tokens, in tokens: as measured with the demo encoder; a GPU waits for many launches.
_CPU_BATCH, _OTHER_BATCH = 64, 4096


class Engine(enum.StrEnum):
    """How a kernel is computed; all give the same.

    AUTO: `structured`, and autograd example by example for parameters that no rule covers. Use this.
    STRUCTURED: per-layer contraction only; refuses a model with a parameter that no rule covers, so that nobody
        waits for the slow way without knowing.
    JACOBIAN: Jacobians in full by `torch.func`, one matrix product. For comparison, and for small models of any kind.
    """

    AUTO = "auto"
    STRUCTURED = "structured"
    JACOBIAN = "jacobian"


class Blocks(Protocol):
    """Where finished blocks are kept (see `store`)."""

    def plan(self, make) -> Plan: ...
    def get(self, i: int, j: int) -> torch.Tensor | None: ...
    def put(self, i: int, j: int, block: torch.Tensor) -> None: ...


@dataclass(frozen=True)
class KernelOptions:
    """What a kernel is taken of, and how much may be used for it.

    Attributes:
        formula: see `Formula`.
        engine: see `Engine`.
        binary_classification: one scalar `f_1 - f_0` in place of two logits.
        class_diagonal: only products of a scalar with the same one (`diagonal_axes` of neural-tangents).
        parameters, exclude_embeddings, exclude_head, only_biases: see `kernel_parameters`.
        memory_gb: bound of memory above the loaded model, in 10^9 bytes.
        batch_size: examples in a forward pass, at most.
        block_rows: examples of the second side that are computed and stored together; `None` = up to 128.
    """

    formula: Formula = Formula.SGD
    engine: Engine = Engine.AUTO
    binary_classification: bool = False
    class_diagonal: bool = False
    parameters: str | None = None
    exclude_embeddings: bool = False
    exclude_head: bool = False
    only_biases: bool = False
    memory_gb: float = 4.0
    batch_size: int = 16
    block_rows: int | None = None

    def __post_init__(self):
        for name, kind in (("formula", Formula), ("engine", Engine)):
            value = getattr(self, name)
            try:
                object.__setattr__(self, name, kind(value))
            except ValueError:
                raise InputError(f"{name}={value!r}; choose from: {', '.join(k.value for k in kind)}") from None
        for name in ("memory_gb", "batch_size", "block_rows"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"{name}={value} must be above 0")


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
    """The kernel `[N1, C, N2, C]` between the examples of `batches1` and `batches2`, in float64 on the CPU.

    `K[i, a, j, b]` is the product of the gradients of scalar a of example i and scalar b of example j over the chosen
    parameters; see `Formula`. Only the second side is run again for each block, and neither side's gradients are
    ever held in full.

    Signs are those of the gradient in float64 (weights of a narrower type are widened, which is exact); an entry
    smaller than 1e-14 times the Euclidean norm of its gradient row over the chosen parameters counts as zero. So a
    sign kernel does not depend on batch size, padding or engine.

    Args:
        model: any transformers model, or module that takes the batches; dropout is off.
        batches1: mappings from input names to tensors, or one such mapping; labels are ignored.
        batches2: the other side; `None` = the kernel of `batches1` with itself, computed once per pair.
        function: from model and batch to scalars `[n]` or `[n, C]`; default: the logits.
        options: the other fields of `KernelOptions`.

    Returns:
        `[N1, C, N2, C]`, with `class_diagonal` `[N1, C, N2]`; for `asymmetric_signgd` `[2, N1, ...]`, the second being
        the flip.

    Raises:
        InputError: an option that cannot work, a model whose gradients per example are not defined, too little
            memory, or a kernel that holds NaN.
    """
    computation = KernelComputation(model, KernelOptions(formula, engine, **options), function)
    pad = getattr(getattr(model, "config", None), "pad_token_id", 0)
    rows1 = ExampleRows(batches1, pad)
    rows2 = None if batches2 is None else ExampleRows(batches2, pad)
    kernel = computation.run(rows1, rows2, disable_tqdm=disable_tqdm)
    return kernel if computation.options.formula.kernels == 2 else kernel[0]


class KernelComputation:
    """One model's kernels under the same options.

    Args:
        model, options: what is computed.
        function: as for `empirical_ntk`; refused together with `binary_classification`.
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
            raise InputError(f"formula {options.formula.value} needs float64, which {first.device} lacks; use the CPU")
        dtype = torch.float64 if options.formula.signs or first.dtype == torch.float64 else torch.float32
        wider = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point() and t.dtype != dtype]
        self._wider_bytes = sum(t.numel() * dtype.itemsize for t in wider)
        kind = JacobianEngine if options.engine is Engine.JACOBIAN else StructuredEngine
        self.engine = kind(model, self.function, self.parameters, options.formula, dtype)
        self._ready = False

    def run(
        self,
        rows1: ExampleRows,
        rows2: ExampleRows | None = None,
        blocks: Blocks | None = None,
        process: int = 0,
        processes: int = 1,
        disable_tqdm: bool = True,
    ) -> torch.Tensor:
        """The kernel `[kernels, N1, C, N2, C]` (`class_diagonal`: without the last axis).

        With several processes this process's blocks, zero elsewhere.

        Args:
            blocks: finished blocks are taken from there and new ones left there.
            process, processes: this process and how many share the work.
        """
        with evaluating(self.model), computing_in(self.model, self.engine.dtype, only_weights=True):  # for all batches
            return self._run(rows1, rows2, blocks, process, processes, disable_tqdm)

    def _run(self, rows1, rows2, blocks, process: int, processes: int, disable_tqdm: bool) -> torch.Tensor:
        def make() -> Plan:
            return self._plan(rows1, rows2, processes)

        plan = blocks.plan(make) if blocks else make()
        self.engine.contraction.max_bytes = plan.scratch_bytes
        symmetric = rows2 is None
        pairs = [(i, j) for i in range(len(plan.first)) for j in range(len(plan.second)) if not symmetric or i <= j]
        mine = pairs[process::processes]
        total = None
        for i, j, block in self._blocks(mine, plan, rows1, rows2, blocks, disable_tqdm):
            if total is None:
                total = self._zeros(rows1, rows2, block.shape[2])
            (a, b), (p, q) = plan.first[i], plan.second[j]
            total[:, a:b, :, p:q] = block
            if symmetric and i != j:
                mirrored = block.permute(0, 3, 2, 1) if block.ndim == 4 else block.permute(0, 3, 4, 1, 2)
                total[:, p:q, :, a:b] = mirrored.flip(0) if len(mirrored) == 2 else mirrored
        if total is None:  # more processes than blocks
            total = self._zeros(rows1, rows2, self._scalars(rows1))
        return total

    def _zeros(self, rows1: ExampleRows, rows2: ExampleRows | None, c: int) -> torch.Tensor:
        shape = (self.options.formula.kernels, len(rows1), c, len(rows2 or rows1), c)
        return torch.zeros(shape[:-1] if self.options.class_diagonal else shape, dtype=torch.float64)

    def _plan(self, rows1: ExampleRows, rows2: ExampleRows | None, processes: int) -> Plan:
        self._prepare(rows1)
        longer = rows1 if rows2 is None or max(rows1.lengths) >= max(rows2.lengths) else rows2
        options = self.options
        needs = measure(self.engine, longer, self._wider_bytes, options.class_diagonal)
        lengths2 = None if rows2 is None else rows2.lengths
        sizes = options.memory_gb, options.batch_size, options.block_rows
        return make_plan(needs, rows1.lengths, lengths2, *sizes, processes)

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
        return self.engine.side(rows, [[0]]).scalars

    def _blocks(self, pairs, plan: Plan, rows1, rows2, blocks: Blocks | None, disable_tqdm: bool) -> Iterator[tuple]:
        held: tuple[int, object] | None = None
        for i, j in tqdm(pairs, desc="kernel blocks", disable=disable_tqdm):
            block = blocks.get(i, j) if blocks else None
            if block is None:
                self._prepare(rows1)
                if held is None or held[0] != i:
                    held = None  # before the next one is made
                    held = (i, self._side(rows1, plan.first[i], plan))
                same = rows2 is None and i == j
                block = self._block(held[1], None if same else rows2 or rows1, plan, i, j)
                if blocks:
                    blocks.put(i, j, block)
            yield i, j, block

    def _block(self, left, rows: ExampleRows | None, plan: Plan, i: int, j: int) -> torch.Tensor:
        """Between `left` and rows of the other side, or `left` itself; nothing of the other side outlives it."""
        right = left if rows is None else self._side(rows, plan.second[j], plan)
        return self._kernel(left, right, plan.first[i][0], plan.second[j][0])

    def _side(self, rows: ExampleRows, bounds: tuple[int, int], plan: Plan):
        overhead = _CPU_BATCH if self.engine.device.type == "cpu" else _OTHER_BATCH
        return self.engine.side(rows, rows.by_length(*bounds, plan.batch_size, overhead))

    def _kernel(self, left, right, first: int, second: int) -> torch.Tensor:
        found = self._diagonal(left, right) if self.options.class_diagonal else self.engine.kernels(left, right)
        if not found.isfinite().all():
            raise InputError(self._explained(left, right))
        block = torch.empty_like(found)
        rows = torch.tensor(left.order)[:, None] - first
        columns = torch.tensor(right.order) - second
        block[:, rows, :, columns] = found.permute(1, 3, 0, 2, *range(4, found.ndim))
        return block

    def _diagonal(self, left, right) -> torch.Tensor:
        """`[kernels, n, c, n']`: each scalar's kernel by itself."""
        parts = [self.engine.kernels(left.of_scalar(a), right.of_scalar(a)) for a in range(left.scalars)]
        return torch.stack([part[:, :, 0, :, 0] for part in parts], 2)

    def _explained(self, left, right) -> str:
        """Which example and which parameter made a kernel NaN or infinite."""
        for which, side in (("first", left), ("second", right)):
            for name in self.parameters:
                if name not in side.names():
                    continue
                bad = ~self.engine.of_parameter(side, side, name)[0].diagonal().isfinite()
                if bad.any():
                    row = int(bad.nonzero()[0, 0]) // side.scalars
                    return (
                        f"the kernel is not finite: the gradient of {name} for example {side.order[row]} (from 0) of "
                        f"the {which} side is NaN or infinite; look at this row and this layer's weights, or load the "
                        "model in float32"
                    )
        return "the kernel is not finite although every gradient is: its numbers overflow; scale the logits down"


def _difference(values: torch.Tensor) -> torch.Tensor:
    if values.ndim != 2 or values.shape[1] != 2:
        raise InputError(
            f"binary_classification takes the difference of two logits, but there are {tuple(values.shape)[1:] or 1}; "
            "leave it out, or use a model of two classes"
        )
    return values[:, 1] - values[:, 0]
