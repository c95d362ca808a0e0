"""Forward passes with perturbed weights, without changing the stored weights and without a second model.

While a module's forward runs, each searched parameter in it is replaced by a perturbed copy, which is dropped
afterwards. The weights of linear layers and embeddings, which are most of a model, are never copied in full (see
`module_patch`). Dense changes are computed and applied chunk by chunk. A low-rank change is added to the layer's
output: `x (W + L R^T)^T = x W^T + (x R) L^T`. Several perturbations can run as one forward pass over the repeated
batch. Where accelerate offloads a module, this happens after the weights are loaded, so each layer is in memory alone.

What is known about the searched tensors, each a set of their numbers:

| set | when it changes | what it is for |
| --- | --- | --- |
| `PerturbedForward.missing` | found at the start | no module holds them: `SPSA` refuses them |
| `PerturbedWeights.unread` | all at the start; a forward pass that perturbs a tensor removes it | not updated |
| `PerturbedForward.elsewhere` | found in the first step | another module reads them: perturbed throughout the model |
| `WeightUpdates.first_steps` | a later step removes a tensor from `unread` | their moments start in this step |

After each step, `SPSA` brings `unread` to the same state in all processes. A checkpoint holds the last three, with
`unread` under its former name `unseen`; a trajectory holds `unseen` and `first_steps`.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_ft_ext.errors import InputError
from hf_ft_ext.gradientless.optimizers.perturbation.directions import Directions, Draw
from hf_ft_ext.gradientless.optimizers.perturbation.module_patch import ModulePatch, PerturbationsCannotBatch
from hf_ft_ext.gradientless.optimizers.perturbation.watch import Reads, watched_reads
from hf_ft_ext.gradientless.optimizers.perturbation.weights import Combination, PerturbedWeights
from hf_ft_ext.offload import ReadableTensors, StoredTensor


class PerturbedForward(PerturbedWeights):
    """Context manager in which the forward of a model uses perturbed weights.

    A parameter that several modules share has the same perturbation in all of them.

    Args:
        module: the model.
        parameters: the parameters to perturb; a parameter's number is its position in this list.
        directions: how directions are drawn.
        offloaded: where accelerate keeps offloaded parameters, by `id` (see `hold_offloaded`).

    Attributes:
        tensors: the parameters; offloaded ones are read when they are needed.
        missing: numbers of the parameters that no module holds.
        elsewhere: numbers of the parameters that are read by a module other than their own.
    """

    def __init__(
        self,
        module: nn.Module,
        parameters: Sequence[torch.Tensor],
        directions: Directions,
        offloaded: Mapping[int, StoredTensor] | None = None,
    ):
        super().__init__(directions, len(parameters))
        self.module, places = module, offloaded or {}
        self.tensors = ReadableTensors(parameters, {i: places[id(p)] for i, p in enumerate(parameters) if p.is_meta})
        self._number_of = number = {id(parameter): i for i, parameter in enumerate(parameters)}
        self.patches: list[ModulePatch] = []
        for name, holder in module.named_modules():
            names = {key: number[id(p)] for key, p in holder._parameters.items() if id(p) in number}
            if names:
                # parameter containers have no forward: the module that contains them reads their parameters
                inside = isinstance(holder, nn.ParameterDict | nn.ParameterList)
                user = module.get_submodule(name.rpartition(".")[0]) if inside else holder
                self.patches.append(ModulePatch(self, user, holder, names))
        found = {i for patch in self.patches for i in patch.names.values()}
        self.missing = sorted(set(number.values()) - found)
        self.elsewhere: set[int] = set()

    def check_unread(self) -> None:
        """Refuse offloaded tensors that were loaded for other code than their module's forward (Mamba's `dt_proj`).

        Raises:
            InputError: there are such tensors, and they were not perturbed.
        """
        missed = [n for n in sorted(self.unread) if n in self.tensors.stored and self.tensors.stored[n].loaded]
        if missed:
            shape = tuple(self.tensors.parameters[missed[0]].shape)
            raise InputError(
                f"{len(missed)} searched tensors (the first of shape {shape}) are offloaded and read by other "
                "code than their module's forward, so they cannot be perturbed; keep their modules loaded "
                "(device_map), or leave them out"
            )

    def watched(self) -> contextlib.AbstractContextManager[Reads]:
        """Within this context, record which parameters are read by another module than their own."""
        users = {id(patch.holder): patch.user for patch in self.patches}
        return watched_reads(self.module, users, self._number_of)

    def read_elsewhere(self, number: int) -> None:
        """Perturb this parameter while the whole model runs, as a module other than its own reads it.

        Examples: DeBERTa's encoder uses the weight of an embedding module that is never called; MobileBERT's output
        layer reads that of the embedding.
        """
        self.elsewhere.add(number)
        for patch in list(self.patches):
            if number in patch.names.values() and patch.user is not self.module:
                own = {name: i for name, i in patch.names.items() if i == number}
                patch.names = {name: i for name, i in patch.names.items() if i != number}
                self.patches.append(ModulePatch(self, self.module, patch.holder, own, by_weight=False))

    @contextlib.contextmanager
    def __call__(self, *combinations: Combination) -> Iterator[None]:
        """Within this context, forward passes use the weights plus the combination.

        With `n` combinations, run the model on the batch repeated `n` times along the first dimension of all inputs
        (the whole batch, then the whole batch again).

        Raises:
            PerturbationsCannotBatch: in the forward pass: a module does not process the repeated rows independently.
        """
        self.combinations, self.active, self.rows = combinations, range(len(combinations)), 0
        handles: list[Any] = []
        try:
            if len(combinations) > 1:
                handles.append(self.module.register_forward_pre_hook(self._count_rows, with_kwargs=True))
            for patch in self.patches:
                patch.install(handles, split=len(combinations) > 1)
            yield
        finally:
            for handle in handles:
                handle.remove()
            for patch in self.patches:
                patch.restore()
            self.combinations = self.active = ()

    @contextlib.contextmanager
    def along(self, draw: Draw) -> Iterator[None]:
        """Within this context, weights are dual numbers with the direction as tangent (forward-mode differentiation).

        `forward_ad.unpack_dual(loss).tangent` is then the derivative of the loss along the direction. Attention uses
        torch's math kernel, as the fused kernels have no forward-mode derivative.
        """
        self.tangent = True
        try:
            with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH), self([(draw, 1.0)]):
                yield
        finally:
            self.tangent = False

    def _count_rows(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        values = [*args, *kwargs.values()]
        total = next((len(value) for value in values if isinstance(value, torch.Tensor) and value.ndim), 0)
        if total % len(self.combinations):
            raise PerturbationsCannotBatch(f"{total} rows are not a batch repeated {len(self.combinations)} times")
        self.rows = total // len(self.combinations)
