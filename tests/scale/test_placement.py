"""Every method keeps its tensors on the model's device: a step on an accelerator that refuses to mix devices."""

import sys

import numpy as np
import pytest
import torch
from blocks import ROOT
from pretend import DEVICE, PretendTensor, pretend_accelerator

sys.path.insert(0, str(ROOT / "benchmarks"))
import method_steps
from method_steps import STEPS, Place

CPU = torch.device("cpu")


@pytest.mark.parametrize("method", STEPS)
def test_a_step_mixes_no_devices_and_is_that_of_the_cpu(method):
    with pretend_accelerator() as device:
        outcome = STEPS[method](Place(device))
    assert method_steps.error_of(outcome, STEPS[method](Place(CPU))) < 1e-4  # finite differences enlarge rounding


def test_the_pretended_device_refuses_what_cuda_refuses():
    with pretend_accelerator() as device:
        there, here = torch.ones(3, device=device), torch.ones(3)
        refused = {
            "two devices": lambda: there + here,
            "in place": lambda: here.add_(there),
            "indices of the device": lambda: here[torch.tensor([1], device=device)],
            "data": lambda: setattr(torch.nn.Parameter(there), "data", here),
            "generator of the CPU": lambda: torch.randn(3, device=device, generator=torch.Generator()),
            "generator of the device": lambda: torch.randn(3, generator=torch.Generator(device)),
        }
        for what, mix in refused.items():
            with pytest.raises(RuntimeError):
                pytest.fail(f"not refused: {what}, {mix()}")
        for to_numpy in (there.numpy, lambda: np.asarray(there)):
            with pytest.raises(TypeError, match="numpy"):
                to_numpy()


def test_the_pretended_device_accepts_what_cuda_accepts():
    with pretend_accelerator() as device:
        there = torch.arange(3.0, device=device)
        results = [there + torch.tensor(1.0), there[torch.tensor([2])], torch.tensor([1.0], device=device), there[1:]]
        assert all(isinstance(result, PretendTensor) and result.device == DEVICE for result in results)
        assert type(there.cpu()) is torch.Tensor and there.cpu().tolist() == there.tolist() == [0, 1, 2]
        there.copy_(torch.ones(3))
        there[0] = 5.0
        assert there.sum().item() == 7
        drawn = torch.randn(3, device=device, generator=torch.Generator(device).manual_seed(1))
        assert drawn.device == DEVICE
    assert torch.Generator().device == CPU  # nothing is left behind


def mix_in_the_optimizer(monkeypatch):
    from hf_ft_ext.sparse.basis import Basis

    def add(self, weight: torch.Tensor, indices: torch.Tensor, values: torch.Tensor) -> None:
        weight.add_(torch.zeros(weight.shape))

    monkeypatch.setattr(Basis, "add_rotated_back", add)


def mix_in_directions(monkeypatch):
    from hf_ft_ext.gradientless.optimizers.perturbation import directions

    monkeypatch.setattr(directions, "_generator", lambda device, *_: torch.Generator().manual_seed(1))


def leave_batches_behind(monkeypatch):
    monkeypatch.setattr(Place, "batch", lambda self, right=Place.batch: right(Place(CPU)))


@pytest.mark.parametrize(
    ("method", "inject"),
    [
        ("sparse dynamic", mix_in_the_optimizer),
        ("spsa gaussian", mix_in_directions),
        ("spsa lozo", mix_in_directions),
        ("entries", leave_batches_behind),
    ],
)
def test_an_injected_mixing_is_found(monkeypatch, method, inject):
    inject(monkeypatch)
    with pretend_accelerator() as device, pytest.raises(RuntimeError, match=r"same device|device type for generator"):
        STEPS[method](Place(device))
