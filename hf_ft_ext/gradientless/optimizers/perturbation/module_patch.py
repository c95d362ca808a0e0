"""How the forward of one module is made to see its perturbed parameters: by copies, by chunks, or by its output."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from hf_ft_ext.errors import InputError
from hf_ft_ext.gradientless.optimizers.perturbation.weights import Combination, PerturbedWeights
from hf_ft_ext.offload import is_offloaded


class PerturbationsCannotBatch(Exception):
    """These perturbations cannot run as one forward pass of the model, and have to run one after the other."""


class ModulePatch:
    """Patches the forward of one module, so that it uses perturbed values of the searched parameters it holds.

    | parameter | how it is perturbed |
    | --- | --- |
    | weight of a linear layer or embedding, low-rank direction | the change is added to the output |
    | weight of a linear layer or embedding, dense direction | computed and applied chunk by chunk |
    | all others | replaced by a copy while the forward runs |

    Args:
        forward: computes the perturbed values.
        user: the module whose forward reads the parameters.
        holder: the module that holds the parameters (a parameter container, or `user` itself).
        names: number of each searched parameter, by its name in `holder`.
        by_weight: whether the weight of a linear layer or embedding may take the first two ways.
    """

    def __init__(
        self,
        forward: PerturbedWeights,
        user: nn.Module,
        holder: nn.Module,
        names: dict[str, int],
        by_weight: bool = True,
    ):
        self.forward, self.user, self.holder, self.names = forward, user, holder, names
        self.stored: dict[str, torch.Tensor] = {}
        self.original: Callable | None = None
        self.kind = _plain_kind(holder) if by_weight else None

    def install(self, handles: list, split: bool) -> None:
        """Install hooks and forwards for the next forward passes.

        Args:
            handles: gets the handles of the hooks, which the caller removes.
            split: whether several candidates run as one forward pass over the repeated batch.
        """
        if not self.names:
            return
        # accelerate's forward loads the weights of an offloaded module, calls `_old_forward`, and drops them
        self.name = "_old_forward" if is_offloaded(self.user) else "forward"
        forward = getattr(self.user, self.name)
        chunked = self._choose_ways(forward)
        if self.name == "forward":
            self._install_hooks(handles)
        replaced = self._replaced_forward(forward, chunked, split)
        if replaced is not forward:
            self.original = forward
            self.had_own = self.name in self.user.__dict__
            self.user.__dict__[self.name] = replaced

    def _choose_ways(self, forward: Callable) -> bool:
        """Choose the way of each parameter, as in the class's table; return whether the weight goes by chunks now."""
        kind = self.kind if "weight" in self.names else None
        low_rank = kind is not None and self.forward.directions.has_factors(self.holder._parameters["weight"].shape)
        self.on_output = low_rank
        dense = kind in (nn.Linear, nn.Embedding) and not low_rank and self.forward.directions.block == 1
        # a forward set on the instance (such as accelerate's, which moves inputs between devices) is kept
        own = getattr(forward, "__func__", None) is type(self.user).forward
        chunked = dense and not self.forward.tangent and own
        self.copied = {
            name: i for name, i in self.names.items() if not ((self.on_output or chunked) and name == "weight")
        }
        return chunked

    def _install_hooks(self, handles: list) -> None:
        """Hooks that exchange the copied parameters around the forward, then add the low-rank change to its output."""
        if self.copied:
            handles.append(self.user.register_forward_pre_hook(self._enter))
            handles.append(self.user.register_forward_hook(self._leave, always_call=True))
        if self.on_output:
            handles.append(self.user.register_forward_hook(self._add_to_output, with_kwargs=True))

    def _replaced_forward(self, forward: Callable, chunked: bool, split: bool) -> Callable:
        """The forward to set: from the inside, by chunks, for each candidate, and as hooks of an offloaded module."""
        if chunked:
            by_chunks = self._embedding_by_chunks if isinstance(self.holder, nn.Embedding) else self._linear_by_chunks
            forward = functools.partial(by_chunks, forward)
        if split and (self.copied or chunked):
            forward = functools.partial(self._one_by_one, forward)
        if self.name != "forward":
            forward = functools.partial(self._perturbed, forward)
        return forward

    def restore(self) -> None:
        """Restore the module's parameters and its forward."""
        self._leave()
        if self.original is not None:
            if self.had_own:
                self.user.__dict__[self.name] = self.original
            else:
                del self.user.__dict__[self.name]
            self.original = None

    def _perturbed(self, original: Callable, *args: Any, **kwargs: Any) -> Any:
        """The forward of an offloaded module, once its weights are loaded: what the hooks do for other modules."""
        self._enter()
        try:
            output = original(*args, **kwargs)
        finally:
            self._leave()
        return self._add_to_output(self.user, args, kwargs, output) if self.on_output else output

    # --- weights perturbed chunk by chunk ------------------------------------------------------------

    def _linear_by_chunks(self, original: Callable, input: torch.Tensor) -> torch.Tensor:
        """`x (W + change)^T + bias`, some rows of `W` at a time (`input` is the layer's own argument name)."""
        weight, number, combination = self._weight()
        if not combination:
            return original(input)
        bias, out = self.holder.bias, None
        for part in self.forward.directions.chunks(weight):
            rows = _rows(part, weight)
            perturbed = self.forward.perturbed_chunk(weight, number, combination, part).view(-1, weight.shape[1])
            y = functional.linear(input, perturbed, None if bias is None else bias[rows])
            if len(perturbed) == len(weight):
                return y
            out = y.new_empty(*y.shape[:-1], len(weight)) if out is None else out
            out[..., rows] = y
        return out

    def _embedding_by_chunks(self, original: Callable, input: torch.Tensor) -> torch.Tensor:
        """Rows `input` of the perturbed weight; chunks without any of these rows are not computed."""
        weight, number, combination = self._weight()
        out = original(input)
        if not combination:
            return out
        flat, found = input.reshape(-1), out.view(-1, weight.shape[1])
        for part in self.forward.directions.chunks(weight):
            rows = _rows(part, weight)
            here = ((flat >= rows.start) & (flat < rows.stop)).nonzero()[:, 0]
            if len(here):
                change = self.forward.dense(weight.view(-1)[part], number, combination, part)
                change = change.view(-1, weight.shape[1])[flat[here] - rows.start]
                found[here] = change.add_(found[here]).to(found.dtype)
        return out

    def _weight(self) -> tuple[torch.Tensor, int, Combination]:
        """The stored weight, its number, and the combination of the one active candidate."""
        (candidate,) = self.forward.active
        self.forward.unread.discard(self.names["weight"])
        return self.holder._parameters["weight"].detach(), self.names["weight"], self.forward.combinations[candidate]

    # --- parameters replaced by copies ---------------------------------------------------------------

    def _enter(self, *_: Any) -> None:
        # skip a recursive call, and a forward over several candidates (`_one_by_one` enters for each)
        if self.stored or len(self.forward.active) != 1:
            return
        self.stored = {name: self.holder._parameters[name] for name in self.copied}
        if any(value.is_meta for value in self.stored.values()):
            self.stored = {}
            raise InputError(
                f"{', '.join(self.copied)} of {type(self.holder).__name__} is offloaded and read by other code than "
                "its module's forward, so it cannot be perturbed; keep this module loaded (device_map)"
            )
        for name, number in self.copied.items():
            self.holder._parameters[name] = self.forward.perturbed(self.stored[name], number)
        self.forward.unread.difference_update(self.copied.values())

    def _leave(self, *_: Any) -> None:
        self.holder._parameters.update(self.stored)
        self.stored = {}

    def _one_by_one(self, original: Callable, *args: Any, **kwargs: Any) -> Any:
        """Run the module's forward separately on the rows of each active candidate."""
        active = self.forward.active
        if len(active) == 1:
            return original(*args, **kwargs)
        total = len(active) * self.forward.rows
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor) and value.ndim]
        by_rows = bool(tensors) and len(tensors[0]) == total
        if not by_rows and not (tensors and len(tensors[0]) == 1):
            raise PerturbationsCannotBatch(f"the inputs of {type(self.user).__name__} have no dimension of rows")
        results = []
        for position, candidate in enumerate(active):
            rows = slice(position * self.forward.rows, (position + 1) * self.forward.rows)

            def part(value: Any, rows: slice = rows) -> Any:
                whole = isinstance(value, torch.Tensor) and value.ndim and len(value) == total
                return value[rows] if whole and by_rows else value

            with self.forward.only(candidate):
                self._enter()
                try:
                    results.append(original(*map(part, args), **{key: part(value) for key, value in kwargs.items()}))
                finally:
                    self._leave()
        return _joined(results, 1 if by_rows else self.forward.rows)

    # --- changes added to the output -----------------------------------------------------------------

    def _add_to_output(self, module: nn.Module, args: tuple, kwargs: dict, output: torch.Tensor) -> torch.Tensor:
        """`y + (x R) L^T` for the low-rank change `L R^T` of each active candidate, on its rows."""
        number, weight, active = self.names["weight"], self.holder._parameters["weight"], self.forward.active
        self.forward.unread.discard(number)
        combinations = [self.forward.combinations[candidate] for candidate in active]
        if not any(combinations):
            return output
        found = [self.forward.factors(weight, number, c) if c else None for c in combinations]
        first = next(pair for pair in found if pair is not None)
        pairs = [(torch.zeros_like(first[0]), first[1]) if pair is None else pair for pair in found]
        left, right = (_stacked([pair[side] for pair in pairs]).to(output.dtype) for side in (0, 1))
        n, x = len(active), args[0] if args else next(iter(kwargs.values()))
        if self.forward.tangent:
            x = forward_ad.unpack_dual(x).primal
        if n > 1 and len(x) != n * self.forward.rows:
            if len(x) != 1:
                raise PerturbationsCannotBatch(f"the inputs of {type(module).__name__} have no dimension of rows")
            change = self._change(x.expand(n, *x.shape[1:]), left, right)
            return (output + change).repeat_interleave(self.forward.rows, 0)
        if self.forward.tangent:
            change = self._change(x, left, right).view(output.shape)
            return output + forward_ad.make_dual(torch.zeros_like(change), change)
        before, after = self._factored(x, left, right)
        if output.requires_grad or not output.is_contiguous():
            output = output.clone(memory_format=torch.contiguous_format)
        output.view(n, -1, output.shape[-1]).baddbmm_(before, after)  # one pass over the output
        return output

    def _change(self, x: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """`(x R) L^T` for each of the `n` candidates: `x` `[n * rows, ...]` -> `[n * rows, ..., out]`."""
        change = torch.bmm(*self._factored(x, left, right))
        shape = x.shape if isinstance(self.holder, nn.Embedding) else x.shape[:-1]
        return change.view(*shape, -1)

    def _factored(self, x: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`x R` and `L^T`: `[n, tokens, rank]` and `[n, rank, out]`."""
        n = len(left)
        if isinstance(self.holder, nn.Embedding):  # weight [tokens, width]: a one-hot x selects rows of L, times R^T
            words = x.reshape(n, -1)
            rows = torch.stack([one[ids] for one, ids in zip(left, words, strict=True)])
            return rows, right.transpose(1, 2)
        if isinstance(self.holder, Conv1D):  # weight stored as [in, out]: the factors change places
            left, right = right, left
        return torch.bmm(x.to(left.dtype).reshape(n, -1, x.shape[-1]), right), left.transpose(1, 2)


def _plain_kind(module: nn.Module) -> type | None:
    """`nn.Linear`, `nn.Embedding` or `Conv1D` if the module runs this class's own forward; else `None`."""
    for kind in (nn.Linear, nn.Embedding, Conv1D):
        if isinstance(module, kind) and type(module).forward is kind.forward:
            return None if getattr(module, "max_norm", None) is not None else kind
    return None


def _rows(part: slice, weight: torch.Tensor) -> slice:
    """The rows of a matrix in a chunk of the flat matrix."""
    return slice(part.start // weight.shape[1], part.stop // weight.shape[1])


def _stacked(factors: list[torch.Tensor]) -> torch.Tensor:
    """Stack factors of unequal rank as one tensor, padded with zero columns."""
    rank = max(factor.shape[1] for factor in factors)
    return torch.stack([nn.functional.pad(factor, [0, rank - factor.shape[1]]) for factor in factors])


def _joined(results: list[Any], repeat: int) -> Any:
    """Concatenate the outputs of the candidates along the rows; an output for all rows at once is repeated per row."""
    first = results[0]
    if first is None:
        return None
    if isinstance(first, torch.Tensor):
        if repeat > 1 and len(first) != 1:
            raise PerturbationsCannotBatch("an output of a module has no dimension of rows")
        return torch.cat([result.repeat_interleave(repeat, 0) if repeat > 1 else result for result in results])
    if type(first) in (tuple, list):
        return type(first)(_joined(list(parts), repeat) for parts in zip(*results, strict=True))
    raise PerturbationsCannotBatch(f"a module returns a {type(first).__name__}")
