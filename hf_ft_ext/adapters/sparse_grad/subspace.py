"""Leading eigenvectors of `sum_i G_i G_i^T` without forming it: a randomized sketch."""

import hashlib

import torch

OVERSAMPLING = 10


class Sketch:
    """`Y = S Omega` of a positive semidefinite `S = sum_i G_i G_i^T`, shape (n, n), and its leading eigenvectors.

    `S` is given by products only: `add` takes `G_i (G_i^T Omega)`. The sketch has `k + 10` columns. If `n` is not
    larger than that, `Omega` is the identity and the result is exact.

    Args:
        omega: the test matrix of `random_test_matrix`, shape (n, columns). Sketches of equal size may share it.
        k: number of leading eigenvectors, 1 to n.

    Source: the single-pass sketch of Tropp, Yurtsever, Udell and Cevher 2017 (arXiv 1706.05736), algorithm 3.
    """

    def __init__(self, omega: torch.Tensor, k: int):
        self.omega, self.k = omega, k
        self.sum = torch.zeros_like(omega)
        self._noise = torch.finfo(omega.dtype).eps  # of the sum, as a share of its norm

    def add(self, product: torch.Tensor, dtype: torch.dtype | None = None) -> None:
        """Add `G (G^T Omega)`, shape (n, columns), computed in `dtype` (default: its own)."""
        self.sum += product
        if (dtype or product.dtype) == torch.bfloat16:
            # The errors of n x columns entries, 0.4 % each, add up to some 1e-5 of the largest direction.
            self._noise = max(self._noise, torch.finfo(torch.bfloat16).eps / 1000)

    def leading(self, seed: int) -> torch.Tensor:
        """The `k` leading eigenvectors of `S`, shape (n, k), by decreasing eigenvalue, in the dtype of the sketch.

        If `S` has a lower rank, random orthonormal columns are added.
        """
        y, omega = self.sum.double(), self.omega.double()
        scale = float(y.norm())
        if scale == 0:
            return random_columns(len(y), self.k, seed, self.sum.dtype).to(self.sum.device)
        # A small shift nu makes Omega^T (S + nu I) Omega positive definite; S + nu I has the eigenvectors of S.
        nu = scale * self._noise
        y = y + nu * omega
        inner = omega.T @ y
        # Nystroem: S ~ Y (Omega^T Y)^-1 Y^T = E E^T with E = Y C^-T, where C C^T = Omega^T Y.
        factor, failed = torch.linalg.cholesky_ex((inner + inner.T) / 2)
        if int(failed):  # not definite, by rounding: use eigenvalues, without those at the level of rounding
            values, vectors = torch.linalg.eigh((inner + inner.T) / 2)
            kept = values > max(nu, values[-1] * len(y) * torch.finfo(self.sum.dtype).eps)
            root = y @ (vectors[:, kept] / values[kept].sqrt())
        else:
            root = torch.linalg.solve_triangular(factor, y.T, upper=False).T
        if self.sum.dtype == torch.float64:
            vectors = torch.linalg.svd(root, full_matrices=False).U
        else:  # half the time; the eigenvalues of E^T E are above nu, so float64 holds them
            values, right = torch.linalg.eigh(root.T @ root)
            vectors = root @ (right / values.clamp(min=values[-1] * 1e-15).sqrt()).flip(1)
        vectors = vectors[:, : self.k]
        if vectors.shape[1] < self.k:
            vectors = complete_columns(vectors, self.k, seed)
        return vectors.to(self.sum.dtype)


def random_test_matrix(n: int, k: int, seed: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """`Omega` for `k` leading eigenvectors, shape (n, min(n, k + 10)), at least float32.

    Orthonormal columns, rounded so that products in bfloat16 take them as they are.
    """
    dtype, columns = torch.promote_types(dtype, torch.float32), min(n, k + OVERSAMPLING)
    if columns == n:
        return torch.eye(n, dtype=dtype, device=device)
    return random_columns(n, columns, seed, torch.bfloat16).to(dtype).to(device)


def complete_columns(vectors: torch.Tensor, k: int, seed: int) -> torch.Tensor:
    """Extend orthonormal columns to `k`, with random ones that are orthogonal to them."""
    n, found = vectors.shape
    more = random_matrix(n, k - found, seed + 1, vectors.dtype).to(vectors.device)
    for _ in range(2):  # Gram-Schmidt, twice against rounding
        more -= vectors @ (vectors.T @ more)
    return torch.cat([vectors, torch.linalg.qr(more).Q], 1)


def random_columns(n: int, k: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    """`k` random orthonormal columns of length `n`, on the CPU."""
    return torch.linalg.qr(random_matrix(n, k, seed, torch.float64)).Q.to(dtype)


def random_matrix(n: int, k: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    """A Gaussian matrix from a private generator, on the CPU."""
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def seed_of(*parts: object) -> int:
    """A seed derived from `parts`, the same in every process."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:7], "big")
