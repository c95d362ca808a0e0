"""Leading eigenvectors of a sum of squares that is never formed: a randomized range finder with a small sketch."""

import hashlib

import torch

OVERSAMPLING = 10


class Sketch:
    """`Y = S Omega` of a positive semidefinite `S = sum_i G_i G_i^T`, shape (n, n), and its leading eigenvectors.

    `S` is given by products alone: `add` takes `G_i (G_i^T Omega)`. The sketch has `k + 10` columns; where that is
    all there are, `Omega` is the identity and the result is exact.

    Args:
        n: rows of `S`.
        k: how many leading eigenvectors are wanted, 1 to n.
        seed: of the private generator that draws `Omega`.
        dtype, device: of the sketch; at least float32.

    Source: the single-view sketch of Tropp, Yurtsever, Udell and Cevher 2017 (arXiv 1706.05736), algorithm 3.
    """

    def __init__(self, n: int, k: int, seed: int, dtype: torch.dtype, device: torch.device):
        self.n, self.k, self.seed = n, k, seed
        self.columns = min(n, k + OVERSAMPLING)
        self.sum = torch.zeros(n, self.columns, dtype=torch.promote_types(dtype, torch.float32), device=device)

    def test_matrix(self) -> torch.Tensor:
        """`Omega`, shape (n, columns), orthonormal; drawn anew at each call, so that nobody has to keep it."""
        if self.columns == self.n:
            return torch.eye(self.n, dtype=self.sum.dtype, device=self.sum.device)
        gaussian = random_matrix(self.n, self.columns, self.seed, self.sum.dtype)
        return torch.linalg.qr(gaussian.to(self.sum.device)).Q

    def add(self, product: torch.Tensor) -> None:
        """Add `G (G^T Omega)`, shape (n, columns)."""
        self.sum += product

    def leading(self) -> torch.Tensor:
        """The `k` leading eigenvectors of `S`, shape (n, k), by falling eigenvalue, in the dtype of the sketch.

        Directions in which `S` is zero are filled up with any orthonormal ones.
        """
        y, omega = self.sum.double(), self.test_matrix().double()
        # A small shift keeps the Cholesky factor below from breaking down: S + nu I has the same eigenvectors.
        nu = max(float(y.norm()) * torch.finfo(self.sum.dtype).eps, torch.finfo(torch.float64).tiny ** 0.5)
        y = y + nu * omega
        inner = omega.T @ y
        # Nystroem: S ~ Y (Omega^T Y)^-1 Y^T = E E^T with E = Y C^-T, C C^T = Omega^T Y.
        factor, failed = torch.linalg.cholesky_ex((inner + inner.T) / 2)
        if int(failed):  # not definite to rounding: the same by eigenvalues, the negative ones left out
            values, vectors = torch.linalg.eigh((inner + inner.T) / 2)
            kept = values > values[-1] * self.n * torch.finfo(self.sum.dtype).eps
            root = y @ (vectors[:, kept] / values[kept].sqrt())
        else:
            root = torch.linalg.solve_triangular(factor, y.T, upper=False).T
        vectors = torch.linalg.svd(root, full_matrices=False).U[:, : self.k]
        if vectors.shape[1] < self.k:
            vectors = completed(vectors, self.k, self.seed)
        return vectors.to(self.sum.dtype)


def completed(vectors: torch.Tensor, k: int, seed: int) -> torch.Tensor:
    """Orthonormal columns filled up to `k` with random ones that are orthogonal to them."""
    n, found = vectors.shape
    more = random_matrix(n, k - found, seed + 1, vectors.dtype).to(vectors.device)
    for _ in range(2):  # once more against rounding
        more -= vectors @ (vectors.T @ more)
    return torch.cat([vectors, torch.linalg.qr(more).Q], 1)


def random_columns(n: int, k: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    """`k` random orthonormal columns of length `n`, on the CPU."""
    return torch.linalg.qr(random_matrix(n, k, seed, torch.float64)).Q.to(dtype)


def random_matrix(n: int, k: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    """A Gaussian matrix from a generator of its own, on the CPU."""
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def seed_of(*parts: object) -> int:
    """A seed that is the same in every process for the same parts."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:7], "big")
