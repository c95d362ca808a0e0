"""Zeroth-order steps as their papers write them, on the stored weights, for comparison only.

MeZO (Malladi et al., arXiv 2305.17333, Algorithm 1): one generator, `+eps z`, `-2 eps z`, `+eps z`, then the update,
each drawing `z` anew, whole tensors at a time. LOZO (arXiv 2410.07698, Algorithm 1): the same with `U V^T`. FZOO
(arXiv 2506.09034): `n` one-sided losses, `+eps u`, `-eps u` each, with entries +1 and -1.
"""

from collections.abc import Callable

import torch


class MeZO:
    """`step(loss_of)` on the parameters of a model."""

    def __init__(self, model: torch.nn.Module, lr: float = 1e-6, eps: float = 1e-3):
        self.parameters = list(model.parameters())
        self.lr, self.eps, self.steps = lr, eps, 0

    def _directions(self, seed: int):
        generator = torch.Generator(self.parameters[0].device).manual_seed(seed)
        for i, p in enumerate(self.parameters):
            yield p, self._direction(i, p, generator)

    def _direction(self, i: int, p: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return torch.randn(p.shape, generator=generator, dtype=p.dtype, device=p.device)

    def _perturb(self, seed: int, factor: float) -> None:
        for p, z in self._directions(seed):
            p.data = p.data + factor * self.eps * z

    @torch.no_grad()
    def step(self, loss_of: Callable[[], float]) -> float:
        self.steps += 1
        seed = self.steps
        self._perturb(seed, 1)
        above = float(loss_of())
        self._perturb(seed, -2)
        below = float(loss_of())
        self._perturb(seed, 1)
        slope = (above - below) / (2 * self.eps)
        for p, z in self._directions(seed):
            p.data = p.data - self.lr * (slope * z)
        return above


class LOZO(MeZO):
    """The same with low-rank directions, `V` kept for `renew` steps."""

    def __init__(self, model: torch.nn.Module, lr: float = 1e-6, eps: float = 1e-3, rank: int = 2, renew: int = 50):
        super().__init__(model, lr, eps)
        self.rank, self.renew, self.v = rank, renew, {}

    def _direction(self, i: int, p: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        if p.ndim < 2:
            return super()._direction(i, p, generator)
        if (self.steps - 1) % self.renew == 0 and self.v.get(i, (0,))[0] != self.steps:
            self.v[i] = (self.steps, torch.randn(p.shape[1], self.rank, dtype=p.dtype, device=p.device))
        u = torch.randn(p.shape[0], self.rank, generator=generator, dtype=p.dtype, device=p.device)
        return u @ self.v[i][1].T


class FZOO(MeZO):
    """`n` one-sided losses one after the other, the step divided by their standard deviation."""

    def __init__(self, model: torch.nn.Module, lr: float = 1e-6, eps: float = 1e-3, n: int = 8):
        super().__init__(model, lr, eps)
        self.n = n

    def _direction(self, i: int, p: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        bits = torch.randint(0, 2, p.shape, generator=generator, device=p.device, dtype=torch.int8)
        return bits.to(p.dtype) * 2 - 1

    @torch.no_grad()
    def step(self, loss_of: Callable[[], float]) -> float:
        self.steps += 1
        here, losses = float(loss_of()), []
        for i in range(self.n):
            self._perturb(self.steps * self.n + i, 1)
            losses.append(float(loss_of()))
            self._perturb(self.steps * self.n + i, -1)
        deviation = float(torch.tensor(losses).std()) or 1.0
        for i, loss in enumerate(losses):
            for p, z in self._directions(self.steps * self.n + i):
                p.data = p.data - self.lr * (loss - here) / (self.n * deviation) * z
        return here
