"""Copied and pickled optimizers go on, bit for bit, as the one that they were made from would have."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from hf_ft_ext import SPSA, ActivityPerturbation, DirectSearch, InputError, SignGD, SparseAdamW
from hf_ft_ext.gradientless.optimizers.exchange import SharedData
from hf_ft_ext.sparse.basis import Basis
from hf_ft_ext.sparse.fixed import FixedSupport
from hf_ft_ext.sparse.layer import SparseGradLinear
from hf_ft_ext.training.head_adam import HeadAdam

N = 6


def net() -> nn.Sequential:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(N, N), nn.Tanh(), nn.Linear(N, 1)).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    return model


def sparse_net(fixed: bool = False) -> nn.Sequential:
    model, generator = net(), torch.Generator().manual_seed(1)
    factors = [torch.linalg.qr(torch.randn(N, N, dtype=torch.float64, generator=generator)).Q for _ in range(2)]
    model[0] = SparseGradLinear.from_linear(model[0], Basis(*factors), 9, "kind")
    if fixed:
        model[0].expect_fixed_support(block=False)
        model[0].set_support(FixedSupport.of_entries(model[0].basis, torch.arange(0, 36, 4), N))
    return model


def sparse(fixed: bool = False, **options):
    model = sparse_net(fixed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    return model, SparseAdamW(parameters, layers=[model[0]], lr=1e-2, weight_decay=0.1, **options)


def of(kind, **options):
    model = net()
    rest = (model,) if kind in (SPSA, ActivityPerturbation) else ()
    return model, kind(model.parameters(), *rest, **options)


MAKERS = {
    "direct-search": lambda: of(DirectSearch, lr=0.1, sampling_size=5, seed=3),
    "options": lambda: of(DirectSearch, lr=0.1, sampling_size=5, sampling_steps=2, options="3x2", seed=3),
    "pool": lambda: of(DirectSearch, lr=0.1, sampling_size=7, options="2x1", pool=True, antithetic=True, seed=3),
    "spsa": lambda: of(SPSA, lr=1e-2, num_directions=2, update="adam", seed=3),
    "spsa-momentum": lambda: of(SPSA, lr=1e-2, update="momentum", seed=3),
    "activity": lambda: of(ActivityPerturbation, lr=1e-2, seed=3),
    "head-adam": lambda: of(HeadAdam, lr=1e-2),
    "signgd": lambda: of(SignGD, lr=1e-2, weight_decay=0.1),
    "sparse": sparse,
    "sparse-refreshed": lambda: sparse(refresh_steps=2, refresh_gradients=2),
    "sparse-dense-moments": lambda: sparse(dense_moments=True),
    "sparse-fixed": lambda: sparse(fixed=True),
}


def train(model, optimizer, steps, scheduler=None):
    for step in range(*steps):
        x = torch.randn(16, N, generator=torch.Generator().manual_seed(step), dtype=torch.float64)

        def closure(x=x):
            losses = (model(x).squeeze(-1) - x.sin().sum(-1)).square()
            return losses if isinstance(optimizer, ActivityPerturbation) else losses.mean()

        if hasattr(optimizer, "step_ahead"):
            optimizer.step(closure)
        else:
            optimizer.zero_grad()
            closure().backward()
            optimizer.step()
        if scheduler is not None:
            scheduler.step()


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "file"])
def test_a_copy_goes_on_as_the_original(name, way):
    model, optimizer = MAKERS[name]()
    start = [parameter.detach().clone() for parameter in model.parameters()]
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=8)  # it replaces `step` in the optimizer
    train(model, optimizer, (0, 3), scheduler)
    if way == "deepcopy":
        copied_model, copied = copy.deepcopy((model, optimizer))
    elif way == "pickle":
        copied_model, copied = pickle.loads(pickle.dumps((model, optimizer)))
    else:
        file = io.BytesIO()
        torch.save((model, optimizer), file)
        file.seek(0)
        copied_model, copied = torch.load(file, weights_only=False)
    assert type(copied) is type(optimizer)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    train(copied_model, copied, (3, 7))
    assert all(map(torch.equal, model.parameters(), before)), "the copy trained the original"
    train(model, optimizer, (3, 7))
    assert not all(map(torch.equal, model.parameters(), start))
    for ours, theirs in zip(copied_model.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    ours, theirs = copied.state_dict(), optimizer.state_dict()
    for group in (*ours["param_groups"], *theirs["param_groups"]):
        group.pop("initial_lr", None)
    assert str(ours) == str(theirs)


def test_work_shared_between_processes_is_copied_and_not_pickled():
    model, optimizer = MAKERS["spsa"]()
    optimizer.exchange = SharedData(lambda values: 2 * values)
    assert copy.deepcopy((model, optimizer))[1].exchange is optimizer.exchange
    with pytest.raises(InputError, match=r"cannot be pickled; save optimizer.state_dict"):
        pickle.dumps((model, optimizer))
