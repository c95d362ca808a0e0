"""Gradients per example of chosen parameters, by hooks on the modules that hold them, summed as they come.

A hook keeps a module's input and meets its output's gradient in the backward pass; from the two, a rule per kind of
module makes the gradient of each example. The parameters themselves need no gradient, so that the backward pass only
goes through activations, from the loss down to the lowest of these modules.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_ft_ext.adapters.bottleneck.layer import BottleneckLayer
from hf_ft_ext.adapters.layer_prefix.layer import PrefixLayer, Table

_CHUNK = 2**20  # numbers of per-example gradients made at a time: they should not leave the processor's cache by far

# receives the name of a parameter and gradients [examples, *shape] of the examples from `start` on
Receiver = Callable[[str, torch.Tensor, int], None]
Call = tuple[tuple, dict, torch.Tensor]  # positional inputs, named inputs, gradient of the output


@dataclass
class Site:
    """A module whose parameters are wanted.

    Attributes:
        module: what is called in the forward pass.
        names: own name of each wanted parameter within `module` -> its name in the model.
        rule: `rule(site, calls, receive)` makes the per-example gradients.
    """

    module: nn.Module
    names: dict[str, str]
    rule: Callable
    calls: list[list] = field(default_factory=list)


def find_sites(model: nn.Module, wanted: Iterable[str]) -> list[Site]:
    """One `Site` per module that holds parameters called `wanted`, or whose forward uses those of its parts.

    Raises:
        KeyError: the model has no parameter of that name.
    """
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters())
    groups: dict[str, dict[str, str]] = defaultdict(dict)
    for name in wanted:
        parameters[name]
        owner = _caller(modules, name.rpartition(".")[0])
        groups[owner][name.removeprefix(f"{owner}.")] = name
    return [Site(modules[owner], names, _rule(modules[owner], names)) for owner, names in groups.items()]


def _caller(modules: dict[str, nn.Module], owner: str) -> str:
    """Name of the module whose call the parameters of `owner` work in."""
    found = owner
    path = owner
    while True:
        module = modules[path]
        if isinstance(module, BaseTunerLayer) and not _calls_its_parts(module):
            found = path  # it may use its parts' weights without calling them
        if not path:
            break
        path = path.rpartition(".")[0]
    while isinstance(modules[found], nn.ModuleDict | nn.ParameterDict | nn.ModuleList | nn.ParameterList):
        found = found.rpartition(".")[0]
    return found


def _calls_its_parts(layer: BaseTunerLayer) -> bool:
    if isinstance(layer, BottleneckLayer | PrefixLayer):
        return True
    return type(layer) is LoraLinear and not getattr(layer, "lora_variant", None)


def _rule(module: nn.Module, names: dict[str, str]) -> Callable:
    if all("." not in name for name in names):
        for kinds, rule in ((nn.Linear, _linear), (Conv1D, _conv1d), (Table, _table), (nn.Embedding, _embedding),
                            (nn.LayerNorm, _layer_norm)):  # fmt: skip
            if type(module) is kinds and not (rule is _embedding and (module.max_norm or module.scale_grad_by_freq)):
                return rule
    return _alone


class Capture:
    """While active, every backward pass hands the per-example gradients of `sites` to `receive`.

    Args:
        sites: of `find_sites`.
        receive: called as `receive(name, gradients, start)`.
    """

    def __init__(self, sites: list[Site], receive: Receiver):
        self.sites, self.receive = sites, receive
        self.batch = 0
        self.handles: list = []

    def __enter__(self) -> "Capture":
        for site in self.sites:
            self.handles.append(site.module.register_forward_hook(self._hook(site), with_kwargs=True))
            if isinstance(site.module, Table):
                site.module.per_example = True
        return self

    def __exit__(self, *_) -> None:
        for handle in self.handles:
            handle.remove()
        for site in self.sites:
            site.calls.clear()
            if isinstance(site.module, Table):
                del site.module.per_example

    def begin(self, batch: int) -> None:
        """Forget the last forward pass; the next one has `batch` examples."""
        self.batch = batch
        for site in self.sites:
            site.calls.clear()

    def _hook(self, site: Site) -> Callable:
        def hook(module: nn.Module, inputs: tuple, named: dict, output):
            if not torch.is_grad_enabled():
                return None
            rest = None
            if isinstance(output, tuple):
                output, *rest = output
            if output.shape[0] == 1 and self.batch > 1:  # one for all, such as position embeddings
                output = output.expand(self.batch, *output.shape[1:])
            # A tensor of this call's own to hang the hook on; where no parameter below trains, the graph begins here.
            output = output.view_as(output) if output.requires_grad else output.detach().requires_grad_()
            record = [_detached(inputs), {k: _detached(v) for k, v in named.items()}, None]
            site.calls.append(record)
            output.register_hook(lambda gradient: self._arrived(site, record, gradient))
            return output if rest is None else (output, *rest)

        return hook

    def _arrived(self, site: Site, record: list, gradient: torch.Tensor) -> None:
        record[2] = gradient.detach()
        if all(call[2] is not None for call in site.calls):  # the last of the module's calls
            with torch.no_grad():
                site.rule(site, site.calls, self.receive, self.batch)
            for call in site.calls:
                call[2] = None


def _detached(value):
    if isinstance(value, torch.Tensor):
        return value.detach()
    return tuple(_detached(v) for v in value) if isinstance(value, tuple) else value


def _rows(x: torch.Tensor, batch: int) -> torch.Tensor:
    """`[batch, positions, features]`, in at least single precision."""
    x = x.expand(batch, *x.shape[1:]) if x.shape[0] == 1 else x
    x = x.reshape(batch, -1, x.shape[-1])
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _linear(site: Site, calls: list[Call], receive: Receiver, batch: int) -> None:
    _matrix(site, calls, receive, batch, transposed=False)


def _conv1d(site: Site, calls: list[Call], receive: Receiver, batch: int) -> None:
    _matrix(site, calls, receive, batch, transposed=True)


def _matrix(site: Site, calls: list[Call], receive: Receiver, batch: int, transposed: bool) -> None:
    gradients = [_rows(call[2], batch) for call in calls]
    g = gradients[0] if len(gradients) == 1 else torch.cat(gradients, 1)
    if "weight" in site.names:
        inputs = [_rows(call[0][0] if call[0] else call[1]["input"], batch) for call in calls]
        x = inputs[0] if len(inputs) == 1 else torch.cat(inputs, 1)
        left, right = (x, g) if transposed else (g, x)
        step = max(1, _CHUNK // (left.shape[2] * right.shape[2]))
        for start in range(0, batch, step):
            part = slice(start, start + step)
            receive(site.names["weight"], torch.bmm(left[part].transpose(1, 2), right[part].to(left.dtype)), start)
    if "bias" in site.names:
        receive(site.names["bias"], g.sum(1), 0)


def _table(site: Site, calls: list[Call], receive: Receiver, batch: int) -> None:
    receive(site.names["weight"], sum(call[2].to(torch.promote_types(call[2].dtype, torch.float32)) for call in calls),
            0)  # fmt: skip


def _embedding(site: Site, calls: list[Call], receive: Receiver, batch: int) -> None:
    module, name = site.module, site.names["weight"]
    rows, width = module.weight.shape
    for n in range(batch):
        total = torch.zeros(rows, width, dtype=torch.promote_types(calls[0][2].dtype, torch.float32),
                            device=module.weight.device)  # fmt: skip
        for inputs, named, g in calls:
            ids = inputs[0] if inputs else named["input"]
            ids = ids.expand(batch, *ids.shape[1:]) if ids.shape[0] == 1 else ids
            total.index_add_(0, ids[n].reshape(-1), g[n].reshape(-1, width).to(total.dtype))
        if module.padding_idx is not None:
            total[module.padding_idx] = 0
        receive(name, total[None], n)


def _layer_norm(site: Site, calls: list[Call], receive: Receiver, batch: int) -> None:
    module, axes = site.module, len(site.module.normalized_shape)
    weight = bias = 0
    for inputs, named, gradient in calls:
        x = inputs[0] if inputs else named["input"]
        g = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        x = (x.expand(batch, *x.shape[1:]) if x.shape[0] == 1 else x).to(g.dtype)
        normal = nn.functional.layer_norm(x, module.normalized_shape, eps=module.eps)
        between = tuple(range(1, g.dim() - axes))
        weight = weight + ((g * normal).sum(between) if between else g * normal)
        bias = bias + (g.sum(between) if between else g)
    if "weight" in site.names:
        receive(site.names["weight"], weight, 0)
    if "bias" in site.names:
        receive(site.names["bias"], bias, 0)


def _alone(site: Site, calls: list[Call], receive: Receiver, batch: int) -> None:
    """Any module: its call repeated for each example alone, with gradients of its own parameters."""
    own = dict(site.module.named_parameters())
    parameters = [own[name] for name in site.names]
    trains = [p.requires_grad for p in parameters]
    try:
        for p in parameters:
            p.requires_grad_(True)
        for n in range(batch):
            total = [torch.zeros_like(p) for p in parameters]
            for inputs, named, g in calls:
                with torch.enable_grad():
                    output = site.module.forward(*_one(inputs, n, batch), **_one(named, n, batch))
                    output = output[0] if isinstance(output, tuple) else output
                    found = torch.autograd.grad(output, parameters, g[n : n + 1].to(output.dtype), allow_unused=True)
                for sum_, part in zip(total, found, strict=True):
                    if part is not None:
                        sum_ += part
            for name, sum_ in zip(site.names.values(), total, strict=True):
                receive(name, sum_[None], n)
    finally:
        for p, trained in zip(parameters, trains, strict=True):
            p.requires_grad_(trained)


def _one(value, n: int, batch: int):
    """Inputs of example `n` alone; what is no tensor, or one for all, stays."""
    if isinstance(value, torch.Tensor):
        return value[n : n + 1] if value.dim() and value.shape[0] == batch else value
    if isinstance(value, dict):
        return {key: _one(item, n, batch) for key, item in value.items()}
    return tuple(_one(item, n, batch) for item in value) if isinstance(value, tuple) else value
