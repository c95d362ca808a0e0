"""The basis against a stacked SVD, and the rotations against the written-out products."""

import pytest
import torch

from hf_ft_ext.sparse.basis import ACTIVATIONS, GRADIENT, Basis, GramSums, cheaper_rotation


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def orthonormal(n, seed):
    return torch.linalg.qr(random(n, n, seed=seed)).Q


def tucker_stack(n=20, n_out=12, n_in=8):
    """Gradients whose energy falls along fixed directions: what the method assumes of a network."""
    core = random(n, n_out, n_in, seed=3)
    core = core * (0.5 ** torch.arange(n_out))[:, None].double() * (0.6 ** torch.arange(n_in)).double()
    return orthonormal(n_out, 1) @ core @ orthonormal(n_in, 2).T


def test_factors_span_the_subspaces_of_the_stacked_svd():
    stack = tucker_stack()
    sums = GramSums(12, 8, torch.float64, torch.device("cpu"))
    for gradient in stack:
        sums.add(gradient)
    left = torch.linalg.svd(torch.cat(list(stack), dim=1)).U  # out x (n in)
    right = torch.linalg.svd(torch.cat([g.T for g in stack], dim=1)).U  # in x (n out)
    for factor, expected in zip(sums.factors(), (left, right), strict=True):
        assert factor.T.is_contiguous()  # what the sparse product in `add_rotated_back` is fast with
        torch.testing.assert_close(factor.T @ factor, torch.eye(len(factor), dtype=torch.float64))
        for rank in (1, 3, 6):
            cosines = torch.linalg.svdvals(factor[:, :rank].T @ expected[:, :rank])
            assert torch.acos(cosines.clamp(max=1)).max() < 1e-3  # principal angles


def test_the_basis_makes_a_tucker_sparse_stack_sparse_again():
    """The published orientation (`U^T` where the factor is `U`) would leave it dense."""
    core = torch.zeros(30, 12, 8, dtype=torch.float64)
    core[:, :3, :2] = random(30, 3, 2)
    stack = orthonormal(12, 1) @ core @ orthonormal(8, 2).T
    sums = GramSums(12, 8, torch.float64, torch.device("cpu"))
    for gradient in stack:
        sums.add(gradient)
    rotated = Basis(*sums.factors()).rotate(stack[0])
    assert (rotated.abs() > 1e-9).sum() <= 6


@pytest.mark.parametrize("n_out, n_in", [(9, 4), (4, 9), (6, 6)])
def test_rotations(n_out, n_in):
    basis = Basis(orthonormal(n_out, 1), orthonormal(n_in, 2))
    weight, gradient = random(n_out, n_in, seed=4), random(n_out, n_in, seed=5)
    torch.testing.assert_close(basis.rotate(gradient), basis.out_factor.T @ gradient @ basis.in_factor)
    indices = torch.tensor([0, 5, 7, n_out * n_in - 1], dtype=torch.int32)
    values = random(4, seed=6)
    entries = torch.zeros(n_out * n_in, dtype=torch.float64)
    entries[indices.long()] = values
    expected = weight + basis.out_factor @ entries.view(n_out, n_in) @ basis.in_factor.T
    basis.add_rotated_back(weight, indices, values)
    torch.testing.assert_close(weight, expected)


@pytest.mark.parametrize("tokens, expected", [(256, ACTIVATIONS), (2048, GRADIENT)])
def test_short_batches_rotate_activations_long_ones_the_gradient(tokens, expected):
    assert cheaper_rotation(3072, 768, tokens) == expected
    assert cheaper_rotation(768, 3072, tokens) == expected


def test_few_gradients_of_a_wide_layer_have_the_same_leading_directions():
    gradients = [random(200, 3, seed=i) for i in range(5)]
    sums = GramSums(200, 3, torch.float64, torch.device("cpu"), gradients=len(gradients))
    for gradient in gradients:
        sums.add(gradient)
    factor = sums.factors()[0]
    values, vectors = torch.linalg.eigh(sums.out)
    torch.testing.assert_close(factor.T @ factor, torch.eye(200, dtype=torch.float64))
    found = (factor.T @ sums.out @ factor).diagonal()
    torch.testing.assert_close(found, values.flip(0), atol=1e-9, rtol=1e-9)
    cosines = (factor[:, :15] * vectors.flip(1)[:, :15]).sum(0).abs()
    torch.testing.assert_close(cosines, torch.ones(15, dtype=torch.float64))
