"""Products with frozen weights: the same numbers by either library, and outputs that may be changed in place."""

import pytest
import torch

from hf_ft_ext.products import linear, onednn_is_faster


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", ["rows", "sequences", "turned sequences"])
def test_linear(layout, bias):
    torch.manual_seed(0)
    x = {"rows": torch.randn(256, 512), "sequences": torch.randn(8, 32, 512)}.get(layout)
    x = torch.randn(32, 8, 512).transpose(0, 1) if x is None else x
    weight, b = torch.randn(640, 512), torch.randn(640) if bias else None
    expected = torch.einsum("...i,oi->...o", x.double(), weight.double()) + (0 if b is None else b.double())
    for w in (weight, weight.T.contiguous().T):  # the backward pass hands a turned weight
        found = linear(x, w, b)
        assert found.is_contiguous() and not found._is_view()
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(
    "rows, features, dtype, faster",
    [
        (256, 512, torch.float32, True),
        (2, 512, torch.float32, False),
        (256, 384, torch.float32, False),  # memory for each number of rows, and little gain
        (256, 512, torch.float64, False),
    ],
)
def test_large_products_in_single_precision_alone(rows, features, dtype, faster):
    x, weight = torch.zeros(rows, features, dtype=dtype), torch.zeros(640, features, dtype=dtype)
    assert onednn_is_faster(x, weight) == (faster and torch.backends.mkldnn.is_available())
    with torch.backends.mkldnn.flags(enabled=False):
        assert not onednn_is_faster(x, weight)
        assert linear(x, weight).shape == (rows, 640)
