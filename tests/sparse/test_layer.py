"""The layer and its autograd function against the plain `nn.Linear` and the written-out formula."""

import pytest
import torch
from torch import nn

from hf_ft_ext.sparse.basis import ACTIVATIONS, GRADIENT, Basis
from hf_ft_ext.sparse.layer import SparseGradLinear, SparseLinearFunction

N_OUT, N_IN, K = 7, 5, 6


def make(rotates: str, bias: bool = True, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(N_IN, N_OUT, bias).to(dtype)
    for parameter in linear.parameters():
        nn.init.normal_(parameter, generator=generator)
    factor = [torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator)).Q for n in (N_OUT, N_IN)]
    layer = SparseGradLinear.from_linear(linear, Basis(*factor, rotates), K, "kind")
    return linear, layer


@pytest.mark.parametrize("rotates", [ACTIVATIONS, GRADIENT])
@pytest.mark.parametrize("shape", [(4, N_IN), (2, 3, N_IN)])
def test_output_and_gradients_equal_those_of_linear(rotates, shape):
    linear, layer = make(rotates)
    plain = nn.Linear(N_IN, N_OUT).double()
    plain.load_state_dict(linear.state_dict())
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    y1, y2 = plain(x1), layer(x2)
    assert torch.equal(y1, y2)
    weights = torch.randn(y1.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    (y1 * weights).sum().backward()
    (y2 * weights).sum().backward()
    torch.testing.assert_close(x2.grad, x1.grad, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(layer.bias.grad, plain.bias.grad, rtol=1e-13, atol=1e-13)
    expected = layer.basis.out_factor.T @ plain.weight.grad @ layer.basis.in_factor
    support = torch.tensor([0, 3, 11, 34], dtype=torch.int32)
    torch.testing.assert_close(layer.value_gradient(), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        layer.value_gradient(support), expected.flatten()[support.long()], rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck_of_inputs_and_bias(bias):
    _, layer = make(ACTIVATIONS, bias)
    x = torch.randn(3, N_IN, dtype=torch.float64, requires_grad=True)
    factors = (layer.basis.out_factor, layer.basis.in_factor)

    def function(x, bias):
        return SparseLinearFunction.apply(x, layer.weight.detach(), bias, *factors)

    assert torch.autograd.gradcheck(function, (x, layer.bias if bias else None))


def test_gradcheck_of_the_weight_before_the_basis_is_known():
    _, layer = make(GRADIENT)
    x = torch.randn(3, N_IN, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda w: SparseLinearFunction.apply(x, w, layer.bias, None, None), (layer.weight,)
    )


def test_accumulated_micro_batches_equal_one_batch():
    x = torch.randn(6, N_IN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    rotated = []
    for parts in (1, 3):
        for rotates in (ACTIVATIONS, GRADIENT):
            _, layer = make(rotates)
            for part in x.chunk(parts):
                layer(part).square().sum().backward()
            rotated.append(layer.value_gradient())
    for other in rotated[1:]:
        torch.testing.assert_close(other, rotated[0], rtol=1e-12, atol=1e-12)


def test_only_the_input_is_saved_for_backward():
    _, layer = make(GRADIENT)
    x = torch.randn(4, N_IN, dtype=torch.float64, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x).sum()
    own = [t for t in saved if t.data_ptr() != layer.weight.data_ptr()]
    assert sum(t.numel() for t in own) == x.numel()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_kept_in_float32_and_handed_back(dtype):
    linear, layer = make(GRADIENT, dtype=dtype)
    assert layer.weight.dtype == torch.float32 and layer.bias.dtype == dtype
    x = torch.randn(4, N_IN).to(dtype)
    assert torch.equal(layer(x), linear(x))
    assert torch.equal(layer.to_linear().weight, linear.weight)


def test_autocast_computes_in_its_dtype():
    _, layer = make(ACTIVATIONS, dtype=torch.float32)
    layer.basis.out_factor, layer.basis.in_factor = layer.basis.out_factor.float(), layer.basis.in_factor.float()
    x = torch.randn(4, N_IN, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad.dtype == layer.weight.grad.dtype == torch.float32
