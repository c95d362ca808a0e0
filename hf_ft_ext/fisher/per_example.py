"""Gradients per example of chosen parameters, by hooks on the modules that hold them, summed as they come.

A hook keeps a module's input and meets its output's gradient in the backward pass; from the two, the package's rule
for that kind of module gives the gradient of each example, handed on at once: nothing is kept for a whole model.
The parameters themselves need no gradient, so that the backward pass only goes through activations, from the loss down
to the lowest of these modules.
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
from hf_ft_ext.per_example.forms import Dense, Form, Outer, joined
from hf_ft_ext.per_example.rules import find_rule

# Of these exactly; a class of the same kind may compute something else. They go by calling the module again.
_RULED = (nn.Linear, Conv1D, nn.Embedding, nn.LayerNorm)

# receives the name of a parameter and the forms whose sum are its gradients, of the examples from `start` on
Receiver = Callable[[str, list[Form], int], None]
Call = tuple[tuple, dict, torch.Tensor]  # positional inputs, named inputs, gradient of the output


@dataclass
class Site:
    """A module whose parameters are wanted.

    Attributes:
        module: what is called in the forward pass.
        names: own name of each wanted parameter within `module` -> its name in the model.
        rule: `rule(site, calls, receive)` makes the per-example gradients.
        unfit: the rule cannot give gradients of single examples here: the module's first axis is not the batch, or
            what it reads and gives is of another kind than the rule expects.
    """

    module: nn.Module
    names: dict[str, str]
    rule: Callable
    calls: list[list] = field(default_factory=list)
    untried: bool = False  # its rule was not compared with autograd: the trial's examples do not reach the module
    unfit: bool = False


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
        if type(module) is Table:
            return _table
        if type(module) in _RULED and find_rule(module):
            return _by_rule
    return _alone


class Capture:
    """While active, every backward pass hands the per-example gradients of `sites` to `receive`.

    Args:
        sites: of `find_sites`.
        receive: called as `receive(name, gradients, start)`.
        trial: a rule that raises makes its site `unfit` instead of ending the run.
    """

    def __init__(self, sites: list[Site], receive: Receiver, trial: bool = False):
        self.sites, self.receive, self.trial = sites, receive, trial
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
            if isinstance(output, tuple) and output:
                output, *rest = output
            if site.untried or not self._one_row_per_example(module, inputs, named, output):
                site.unfit = True
            if site.unfit:
                return None
            if output.shape[0] == 1 and self.batch > 1:  # one for all, such as position embeddings
                output = output.expand(self.batch, *output.shape[1:])
            # A tensor of this call's own to hang the hook on; where no parameter below trains, the graph begins here.
            lowest = not output.requires_grad
            output = output.detach().requires_grad_() if lowest else output.view_as(output)
            record = [_detached(inputs), {k: _detached(v) for k, v in named.items()}, None]
            site.calls.append(record)
            output.register_hook(lambda gradient: self._arrived(site, record, gradient))
            if lowest:
                output = output.clone()  # the model may change it in place, which autograd forbids for leaves
            return output if rest is None else (output, *rest)

        return hook

    def _arrived(self, site: Site, record: list, gradient: torch.Tensor) -> None:
        record[2] = gradient.detach()
        if site.unfit:
            return
        if all(call[2] is not None for call in site.calls):  # the last of the module's calls
            try:
                with torch.no_grad():
                    site.rule(site, site.calls, self.receive, self.batch)
            except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
                if not self.trial:
                    raise
                site.unfit = True
            for call in site.calls:
                call[2] = None

    def _one_row_per_example(self, module: nn.Module, inputs: tuple, named: dict, output) -> bool:
        """Whether the first axis of what a module reads and gives counts the examples.

        An embedding may run on one row for all: position embeddings do.
        """
        first = inputs[0] if inputs else next(iter(named.values()), None)
        tensors = [output] if first is None else [first, output]  # a table of rows reads a number
        tensors = [output if isinstance(t, int) else t for t in tensors]
        sizes = (1, self.batch) if isinstance(module, nn.Embedding) else (self.batch,)
        return all(isinstance(t, torch.Tensor) and t.dim() and len(t) in sizes for t in tensors)


def _detached(value):
    if isinstance(value, torch.Tensor):
        return value.detach()
    return tuple(_detached(v) for v in value) if isinstance(value, tuple) else value


def _wide(x: torch.Tensor) -> torch.Tensor:
    """In single precision at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32)) if x.is_floating_point() else x


def _by_rule(site: Site, calls: list[Call], receive: Receiver, batch: int) -> None:
    """By the rule for the kind of module; the forms of several calls are handed on together."""
    rule = find_rule(site.module)
    found: dict[str, list[Form]] = defaultdict(list)
    for inputs, named, gradient in calls:
        x, g = _wide(inputs[0] if inputs else named["input"]), _wide(gradient)
        x = x.expand(batch, *x.shape[1:]) if x.shape[0] == 1 else x
        for own, form in rule(site.module, x.to(g.dtype) if x.is_floating_point() else x, g).items():
            found[own].append(form)
    for own, name in site.names.items():
        forms = found[own]
        receive(name, [_shared(joined(forms))] if isinstance(forms[0], Outer) else forms, 0)


def _shared(form: Outer) -> Outer:
    """The inputs once if all examples have the same, such as those of a prefix's network."""
    if form.inputs.shape[1] ** 2 > 16 * len(form):  # beyond that nothing is won by knowing
        return form
    one = form.inputs[:1]
    return Outer(one, form.grads, form.transposed) if bool((form.inputs == one).all()) else form


def _table(site: Site, calls: list[Call], receive: Receiver, batch: int) -> None:
    receive(site.names["weight"], [Dense(_wide(call[2])) for call in calls], 0)


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
                receive(name, [Dense(sum_[None])], n)
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
