"""Forward passes with perturbed weights: the stored weights are never touched, and no second model exists.

While a module's forward runs, each searched parameter that it owns is replaced by a perturbed copy, dropped right
after. The weights of linear layers and embeddings, where most of a model is, are never copied as a whole (see
`owners`): dense changes are made and used chunk by chunk; a low-rank one, `x (W + L R^T)^T = x W^T + (x R) L^T`, is
added to the layer's output. Several perturbations can run as one forward pass over the batch repeated that many times.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_ft_ext.gradientless.optimizers.perturbation.directions import Directions, Draw
from hf_ft_ext.gradientless.optimizers.perturbation.owners import CannotBatch, Owner
from hf_ft_ext.gradientless.optimizers.perturbation.weights import Combination, PerturbedWeights


class PerturbedForward(PerturbedWeights):
    """Lets a module's forward see perturbed weights.

    A parameter that several modules share is perturbed alike in all of them.

    Args:
        module: the model.
        parameters: those to perturb; the number of a parameter in this list goes to the directions.
        directions: how directions are drawn.

    Attributes:
        missing: numbers of the parameters that no module holds.
        elsewhere: numbers of those that another module than their own reads.
    """

    def __init__(self, module: nn.Module, parameters: Sequence[torch.Tensor], directions: Directions):
        super().__init__(directions, len(parameters))
        self.module = module
        number = {id(parameter): i for i, parameter in enumerate(parameters)}
        self.owners: list[Owner] = []
        for name, holder in module.named_modules():
            names = {key: number[id(p)] for key, p in holder._parameters.items() if id(p) in number}
            if names:
                # containers have no forward: their parameters are read in that of the module around them
                inside = isinstance(holder, nn.ParameterDict | nn.ParameterList)
                user = module.get_submodule(name.rpartition(".")[0]) if inside else holder
                self.owners.append(Owner(self, user, holder, names))
        found = {i for owner in self.owners for i in owner.names.values()}
        self.missing = sorted(set(number.values()) - found)
        self.elsewhere: set[int] = set()

    def read_elsewhere(self, number: int) -> None:
        """Perturb this parameter while the whole model runs: another module than its own reads it.

        DeBERTa's encoder, for one, takes the weight of an embedding that is never called.
        """
        self.elsewhere.add(number)
        self.unseen.discard(number)
        for owner in list(self.owners):
            if number in owner.names.values() and owner.user is not self.module:
                own = {name: i for name, i in owner.names.items() if i == number}
                owner.names = {name: i for name, i in owner.names.items() if i != number}
                self.owners.append(Owner(self, self.module, owner.holder, own, by_weight=False))

    @contextlib.contextmanager
    def __call__(self, *combinations: Combination) -> Iterator[None]:
        """Within, forwards see the weights plus the combination.

        With several, the forward of the model has to run over the batch repeated so many times, along the first
        dimension of all inputs, repetition by repetition.

        Raises:
            CannotBatch: in the forward: a module does not treat the repeated rows one by one.
        """
        self.combinations, self.active, self.rows = combinations, range(len(combinations)), None
        handles: list[Any] = []
        try:
            if len(combinations) > 1:
                handles.append(self.module.register_forward_pre_hook(self._count_rows, with_kwargs=True))
            for owner in self.owners:
                owner.install(handles, split=len(combinations) > 1)
            yield
        finally:
            for handle in handles:
                handle.remove()
            for owner in self.owners:
                owner.restore()
            self.combinations = self.active = ()

    @contextlib.contextmanager
    def along(self, draw: Draw) -> Iterator[None]:
        """Within, weights are dual numbers whose tangent is the direction: forward-mode differentiation.

        `forward_ad.unpack_dual(loss).tangent` is then the loss's derivative along it. Fused attention kernels have no
        forward derivative, so attention is computed by the plain formula.
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
            raise CannotBatch(f"{total} rows are no {len(self.combinations)} repetitions of a batch")
        self.rows = total // len(self.combinations)
