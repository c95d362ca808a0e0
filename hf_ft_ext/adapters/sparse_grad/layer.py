"""A linear layer with structured SparseGrad adapters."""

import warnings
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.autograd.forward_ad as forward_ad
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_ft_ext.adapters.sparse_grad.config import RANDOM, SparseGradConfig
from hf_ft_ext.adapters.sparse_grad.functions import (
    AddedChange,
    ChangedLinear,
    Observed,
    ObservedLinear,
    Observer,
    change_of_weight,
)
from hf_ft_ext.adapters.sparse_grad.subspace import OVERSAMPLING, random_columns, seed_of
from hf_ft_ext.adapters.sparse_grad.targets import quantization_of
from hf_ft_ext.errors import InputError

T = TypeVar("T")


class SparseGradColumns(nn.Module):
    """The orthonormal columns `V_r` (out, r) and `U_c` (in, c) of an adapter; layers may share one module.

    They are zero until they have been set.
    """

    out_columns: torch.Tensor
    in_columns: torch.Tensor

    def __init__(self, n_out: int, n_in: int, block: tuple[int, int], dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.register_buffer("out_columns", torch.zeros(n_out, block[0], dtype=dtype, device=device))
        self.register_buffer("in_columns", torch.zeros(n_in, block[1], dtype=dtype, device=device))
        self._ready = False

    @property
    def ready(self) -> bool:
        """Whether the columns have been set, by `fill` or by any loader of files."""
        if not self._ready and not self.out_columns.is_meta:  # loaders may assign tensors without a call to a hook
            self._ready = bool(self.out_columns.any())
        return self._ready

    @ready.setter
    def ready(self, value: bool) -> None:
        self._ready = value

    @torch.no_grad()
    def fill(self, out_columns: torch.Tensor, in_columns: torch.Tensor) -> None:
        """Set the columns, converted to the dtype and device of the buffers."""
        self.out_columns.copy_(out_columns)
        self.in_columns.copy_(in_columns)
        self.ready = True

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._ready = False  # a file that was written before the columns were set holds zeros


class SparseGradLayer(nn.Module, BaseTunerLayer):
    """`y = W x + V_r D U_c^T x` for a linear layer (`nn.Linear`, `Conv1D`, quantized, or with adapters)."""

    adapter_layer_names = ("sparse_grad_values",)
    other_param_names = ("sparse_grad_columns",)

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: SparseGradConfig,
        columns: SparseGradColumns,
    ):
        super().__init__()
        self.base_layer = base_layer
        base = self.get_base_layer()
        self.in_features, self.out_features = _get_in_out_features(base)
        self.sparse_grad_values = nn.ParameterDict()  # D, shape (r, c)
        self.sparse_grad_columns = nn.ModuleDict()
        self.quantization_backend = quantization_of(base)
        self.merged_adapters = []
        self._disable_adapters = False
        self._observers: dict[str, Observer] = {}
        self.update_layer(adapter_name, config, columns)
        self._active_adapter = adapter_name

    def update_layer(self, adapter_name: str, config: SparseGradConfig, columns: SparseGradColumns) -> None:
        """Add an adapter with these columns."""
        shape = (columns.out_columns.shape[1], columns.in_columns.shape[1])
        values = torch.zeros(shape, dtype=columns.out_columns.dtype, device=columns.out_columns.device)
        if config.init_std:
            nn.init.normal_(values, std=config.init_std)
        self.sparse_grad_values[adapter_name] = nn.Parameter(values)
        self.sparse_grad_columns[adapter_name] = columns
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    # --- forward ----------------------------------------------------------------------------------

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        names = [] if self.disable_adapters or self.merged else self._adapters_in_use()
        if not names:
            return self.base_layer(x, *args, **kwargs)
        for name in names:
            self._check_ready(name)
        if _is_transformed():
            return self._by_plain_operations(x, names, *args, **kwargs)
        if torch.is_autocast_enabled(x.device.type) and x.is_floating_point() and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(x.device.type))  # as autocast does for linear layers
        if len(names) == 1 and not args and not kwargs and self._is_plain(x):
            weight, bias = self.base_layer.weight, self.base_layer.bias
            weight = weight.T if isinstance(self.base_layer, Conv1D) else weight
            observer = self._observers.get(names[0])
            if observer is None:
                return ChangedLinear.apply(x, weight, bias, *self._parts(names[0]))
            if not self.sparse_grad_columns[names[0]].ready:  # the first pre-pass finds them zero
                return ObservedLinear.apply(x, weight, bias, self.sparse_grad_values[names[0]], observer)
        result = self.base_layer(x, *args, **kwargs)
        for name in names:
            values, out_columns, in_columns = self._parts(name)
            observer = self._observers.get(name)
            # in the first pre-pass, the columns are still zero
            if observer is None or self.sparse_grad_columns[name].ready:
                trained = values if observer is None else values.detach()
                result = AddedChange.apply(result, x, trained, out_columns, in_columns)
            if observer is not None:
                result = Observed.apply(result, x, values, observer)
        return result

    def _by_plain_operations(self, x: torch.Tensor, names: list[str], *args, **kwargs) -> torch.Tensor:
        """As `forward`, by operations of torch, which have forward-mode derivatives and rules for `torch.func`."""
        result = self.base_layer(x, *args, **kwargs)
        for name in names:
            d, v, u = (part.to(result.dtype) for part in self._parts(name))
            result = result + ((x.to(result.dtype) @ u) @ d.T) @ v.T  # x U D^T V^T
        return result

    def _adapters_in_use(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.sparse_grad_values]

    def _parts(self, name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`D`, `V_r` and `U_c` of an adapter, also where accelerate offloads them."""
        columns = self.sparse_grad_columns[name]
        values = _loaded(self.sparse_grad_values, lambda: self.sparse_grad_values[name])
        return values, *_loaded(columns, lambda: (columns.out_columns, columns.in_columns))

    def _check_ready(self, name: str) -> None:
        trains = torch.is_grad_enabled() and self.training and self.sparse_grad_values[name].requires_grad
        if trains and not self.sparse_grad_columns[name].ready and name not in self._observers:
            raise InputError(
                f"the SparseGrad adapter {name!r} has no columns yet, so nothing would train; call "
                "compute_bases(model, batches) before training, or choose init='random' or 'svd'"
            )

    def _is_plain(self, x: torch.Tensor) -> bool:
        """Whether the base layer is a frozen `x W^T + b` without hooks and with its own forward."""
        base = self.base_layer
        if type(base) not in (nn.Linear, Conv1D) or "forward" in vars(base):
            return False
        if base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks:
            return False
        weight, bias = base.weight, base.bias
        if type(weight) not in (nn.Parameter, torch.Tensor) or not weight.is_floating_point():
            return False
        trains = weight.requires_grad or (bias is not None and bias.requires_grad)
        return not trains and (weight.dtype == x.dtype or torch.is_autocast_enabled(x.device.type))

    # --- columns ----------------------------------------------------------------------------------

    def observe(self, adapter_name: str, observer: Observer | None) -> None:
        """Call `observer` with inputs (tokens, in) and output gradients (tokens, out) in each backward pass.

        Tokens whose output gradient is zero may be left out. With an observer, the adapter's values get no gradient.
        `None` removes the observer.
        """
        if observer is None:
            self._observers.pop(adapter_name, None)
        else:
            self._observers[adapter_name] = observer

    def oriented_weight(self) -> torch.Tensor:
        """The base weight, shape (out, in), dequantized if need be."""
        weight = self.get_base_weight().detach()
        if not weight.is_floating_point():
            raise InputError(
                f"the weight of a {type(self.get_base_layer()).__name__} cannot be read, as peft cannot dequantize "
                "it; choose init='gradient' or 'random'"
            )
        return weight.T if isinstance(self.get_base_layer(), Conv1D) else weight

    # --- merging ----------------------------------------------------------------------------------

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """`V_r D U_c^T`, shape (out, in), in float32 or wider."""
        parts = self._parts(adapter)
        dtype = torch.promote_types(parts[0].dtype, torch.float32)
        return change_of_weight(*(part.detach().to(dtype) for part in parts))

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters' changes to the base weight.

        Args:
            safe_merge: raise a `ValueError` and change nothing if the result would not be finite.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.sparse_grad_values:
                continue
            self._add_to_weight(self.get_delta_weight(name), safe_merge, name)
            self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Subtract merged changes from the base weight again (up to rounding)."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            if name in self.sparse_grad_values:
                self._add_to_weight(-self.get_delta_weight(name), False, name)

    def _add_to_weight(self, change: torch.Tensor, safe: bool, name: str) -> None:
        base = self.get_base_layer()
        change = change.T if isinstance(base, Conv1D) else change
        weight = base.weight.data
        result = (weight.to(change.dtype) + change).to(weight.dtype)
        if safe and not torch.isfinite(result).all():
            raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
        base.weight.data = result

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        reference = next(self.get_base_layer().parameters(), None)
        values = self.sparse_grad_values[adapter_name]
        if reference is None or values.is_meta or reference.is_meta:
            return
        device = reference.device if device is None else device
        values.data = values.data.to(device)
        self.sparse_grad_columns[adapter_name].to(device)

    def __repr__(self) -> str:
        return "sparse_grad." + super().__repr__()


def new_columns(base: nn.Module, name: str, config: SparseGradConfig) -> SparseGradColumns:
    """Create columns for a linear layer: random ones with `init="random"`, else zero until they are computed.

    Args:
        base: the layer, for its shape, device and number format.
        name: of the layer or its kind; random columns depend on it.
    """
    n_in, n_out = _get_in_out_features(base)
    block = config.block(n_out, n_in, name)
    reference = next(base.parameters(), None)
    device = torch.device("cpu") if reference is None else reference.device
    columns = SparseGradColumns(n_out, n_in, block, compute_dtype(base), device)
    if config.init == RANDOM and device.type != "meta":
        seeds = [seed_of(config.seed, name, side) for side in ("out", "in")]
        sides = zip((n_out, n_in), block, seeds, strict=True)
        columns.fill(*(random_columns(n, k, seed, torch.float64) for n, k, seed in sides))
    return columns


def singular_vectors(weights: list[torch.Tensor], block: tuple[int, int], seed: int) -> tuple[torch.Tensor, ...]:
    """Leading left and right singular vectors, (out, r) and (in, c), of several weights (out, in) stacked.

    For one weight they are the directions that PiSSA starts from (Meng et al. 2024, arXiv 2404.02948).
    """
    return tuple(
        _leading(sides, k, seed) for k, sides in zip(block, (weights, [weight.T for weight in weights]), strict=True)
    )


def compute_dtype(base: nn.Module) -> torch.dtype:
    """The floating-point type in which a linear layer computes."""
    declared = getattr(base, "compute_dtype", None)
    if isinstance(declared, torch.dtype):  # bitsandbytes, 4 bits
        return declared
    floating = (p.dtype for p in base.parameters() if p.is_floating_point() and p.dtype.itemsize > 1)
    return next(floating, torch.float32)


def _loaded(module: nn.Module, read: Callable[[], T]) -> T:
    """Return `read()` with the tensors of `module` loaded, if accelerate offloads them to memory or disk.

    Its hooks load them around a call of the module, and these modules are not called.
    """
    hook = getattr(module, "_hf_hook", None)
    if hook is None:
        return read()
    hook.pre_forward(module)
    try:
        return read()
    finally:
        hook.post_forward(module, None)


def _is_transformed() -> bool:
    """Whether a transform of `torch.func` or forward-mode differentiation is active."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


_POWER_STEPS = 4


def _leading(weights: list[torch.Tensor], k: int, seed: int) -> torch.Tensor:
    """The `k` leading eigenvectors of `sum W W^T` by subspace iteration, as the spectrum of weights decays slowly."""
    dtype = torch.promote_types(weights[0].dtype, torch.float32)
    weights = [weight.to(dtype) for weight in weights]
    n = weights[0].shape[0]
    span = random_columns(n, min(n, k + OVERSAMPLING), seed, dtype).to(weights[0].device)
    for _ in range(_POWER_STEPS):
        # Q <- orth(sum W (W^T Q))
        span = torch.linalg.qr(sum(weight @ (weight.T @ span) for weight in weights)).Q
    # Rayleigh-Ritz within the span: eigenvectors of Q^T (sum W W^T) Q.
    inner = sum((weight.T @ span).T @ (weight.T @ span) for weight in weights)
    vectors = torch.linalg.eigh(inner.double()).eigenvectors.flip(1)[:, :k]
    return span @ vectors.to(dtype)
