"""The Tucker basis of a kind of layer: HOSVD factors from accumulated Gram matrices.

Stack the gradients `G_1 ... G_n` (out x in) of one kind of layer into a tensor. Its HOSVD factors are the left
singular vectors of its unfoldings, that is, the eigenvectors of `sum G G^T` (out x out) and `sum G^T G` (in x in).
Only these two sums are kept, so the stack is never stored and no tall matrix is decomposed.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

ACTIVATIONS = "activations"  # rotate inputs and output gradients in the backward pass
GRADIENT = "gradient"  # rotate the accumulated weight gradient once, at the optimizer step


@dataclass
class Basis:
    """Orthonormal factors shared by all layers of one kind; empty until `factor` or a checkpoint fills them.

    Attributes:
        out_factor: `V`, shape (out, out), columns by decreasing energy. It is stored in column-major order, so that
            a sparse matrix times `V^T` reads contiguous memory (ten times as fast).
        in_factor: `U`, shape (in, in), likewise.
        rotates: `"activations"` or `"gradient"`: what is rotated into the basis (see `cheaper_rotation`).
        identity: no rotation at all (MeProp); the factors stay empty.
        in_transposed: `in_factor` is the transposed HOSVD factor, as in the authors' code.
    """

    out_factor: torch.Tensor | None = None
    in_factor: torch.Tensor | None = None
    rotates: str = GRADIENT
    identity: bool = False
    in_transposed: bool = False

    @property
    def ready(self) -> bool:
        """Whether weights can be rotated: the factors are filled, or there is no rotation."""
        return self.identity or self.out_factor is not None

    @property
    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`(V, U)`.

        Raises:
            ValueError: the basis is empty.
        """
        if self.out_factor is None or self.in_factor is None:
            raise ValueError("this basis has no factors; run `prepare_layers` or load a state first")
        return self.out_factor, self.in_factor

    def apply(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace each factor by the result of `function`, in column-major order as before."""
        if self.out_factor is not None:
            self.out_factor, self.in_factor = (function(factor.T).T for factor in self.factors)

    def rotate(self, gradient: torch.Tensor) -> torch.Tensor:
        """Return `V^T G U` of a weight gradient `G`, shape (out, in)."""
        if self.identity:
            return gradient
        out_factor, in_factor = self.factors
        return out_factor.T @ gradient.to(out_factor.dtype) @ in_factor

    def add_rotated_back(self, weight: torch.Tensor, indices: torch.Tensor, values: torch.Tensor) -> None:
        """`weight += V S U^T` in place, where `S` (out x in) holds `values` at the flat `indices`, else zero.

        `S` is multiplied first by the factor of the longer side, which is a sparse product. The dense product that
        follows then has the smaller factor, of the shorter side.
        """
        if self.identity:
            weight.view(-1)[indices.long()] += values.to(weight.dtype)
            return
        n_out, n_in = weight.shape
        rows, columns = indices.long() // n_in, indices.long() % n_in
        out_factor, in_factor = self.factors
        if n_out >= n_in:
            entries = torch.sparse_coo_tensor(
                torch.stack([columns, rows]), values, (n_in, n_out), check_invariants=False
            )
            change = (entries @ out_factor.T).T @ in_factor.T  # (S^T V^T)^T U^T = V S U^T
        else:
            entries = torch.sparse_coo_tensor(
                torch.stack([rows, columns]), values, (n_out, n_in), check_invariants=False
            )
            change = out_factor @ (entries @ in_factor.T)  # V (S U^T)
        weight.add_(change.to(weight.dtype))


class GramSums:
    """Running sums `sum G G^T` and `sum G^T G` over the gradients of one kind of layer."""

    def __init__(self, n_out: int, n_in: int, dtype: torch.dtype, device: torch.device, gradients: int | None = None):
        """`gradients`: number of gradients to add, over all processes, if known; it bounds the rank of the sums."""
        self.out = torch.zeros(n_out, n_out, dtype=dtype, device=device)
        self.inp = torch.zeros(n_in, n_in, dtype=dtype, device=device)
        self.rank = None if gradients is None else gradients * min(n_out, n_in)

    def add(self, gradient: torch.Tensor) -> None:
        """Add one gradient, shape (out, in)."""
        gradient = gradient.to(self.out.dtype)
        self.out.addmm_(gradient, gradient.T)  # sum G G^T
        self.inp.addmm_(gradient.T, gradient)  # sum G^T G

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `(V, U)`: eigenvectors by decreasing eigenvalue, in the dtype of the sums, column-major."""
        return _eigenvectors(self.out, self.rank), _eigenvectors(self.inp, self.rank)


def by_columns(matrix: torch.Tensor) -> torch.Tensor:
    """Return the same matrix in column-major order."""
    return matrix.T.contiguous().T


def cheaper_rotation(n_out: int, n_in: int, tokens_per_step: float) -> str:
    """Return what to rotate: the choice with fewer multiplications per optimizer step of one process.

    Rotating the inputs and output gradients of `t` tokens takes `t (out^2 + in^2)` multiplications. Rotating the
    accumulated gradient takes `out in (out + in)`, once per step. Short batches (GLUE with dynamic padding) favour
    the first, long batches and gradient accumulation the second.
    """
    activations = tokens_per_step * (n_out**2 + n_in**2)
    gradient = n_out * n_in * (n_out + n_in)
    return ACTIVATIONS if activations < gradient else GRADIENT


def _eigenvectors(gram: torch.Tensor, rank: int | None = None) -> torch.Tensor:
    """Return all eigenvectors of a Gram matrix of rank at most `rank`, by decreasing eigenvalue."""
    n = len(gram)
    if rank is None or 4 * rank > n:
        vectors = torch.linalg.eigh(gram.double()).eigenvectors.flip(1)
        return by_columns(vectors.to(gram.dtype))
    # Few gradients of a wide layer: the range of the Gram matrix S is small. Find an orthonormal basis Q of it from
    # random probes Omega, take the eigenvectors of Q^T S Q, and complete them by any orthonormal complement
    # (randomized range finder: Halko, Martinsson and Tropp 2011, algorithms 4.1 and 5.3).
    generator = torch.Generator().manual_seed(0)
    probes = torch.randn(n, rank + 8, generator=generator, dtype=torch.float64).to(gram.device)
    spanned = torch.linalg.qr((gram @ probes.to(gram.dtype)).double()).Q  # Q: range of S Omega
    inner = spanned.T @ (gram @ spanned.to(gram.dtype)).double()  # Q^T S Q
    # eigenvectors of S: Q times those of Q^T S Q (symmetrized; the factor 2 does not change them)
    leading = (spanned @ torch.linalg.eigh(inner + inner.T).eigenvectors.flip(1)).to(gram.dtype)
    vectors = torch.linalg.qr(leading, mode="complete").Q
    vectors[:, : leading.shape[1]] = leading  # undo the sign flips of the Householder QR
    return by_columns(vectors)
