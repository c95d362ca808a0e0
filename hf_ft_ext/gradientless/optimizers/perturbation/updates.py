"""What a step does with the estimate of the gradient, chunk by chunk, and how 16-bit weights take small changes."""

import math
from collections.abc import Sequence

import torch

from hf_ft_ext.errors import InputError

RULES = SGD, SIGN, MOMENTUM, ADAM, RMS, CONSERVATIVE = ("sgd", "sign", "momentum", "adam", "rms", "conservative")
MOMENTS = REPLAY, BUFFER = ("replay", "buffer")
REPLAY_TOLERANCE = 1e-3
MOST_REPLAYED = 1000


class Update:
    """The rule of a step, `G` being the estimate of the gradient: a tensor of the weights' shape.

    | rule | step | state |
    | --- | --- | --- |
    | `sgd` | `theta -= lr G` | none |
    | `sign` | `theta -= lr sign(G)` | none |
    | `momentum` | `m = momentum m + G; theta -= lr m` | pairs of seed and slope, factors, or a buffer |
    | `adam` | Adam on `G`, with bias correction | two buffers of the weights' size |
    | `rms` | `theta -= lr G / (sqrt(s) + adam_eps)`, `s` the running mean of the squared slopes | one number |
    | `conservative` | the best of `theta - lr G`, `theta`, `theta + lr G` on this batch: 3 losses more | none |

    Momentum is one of directions, as in ZO-Bench (arXiv 2402.11592): `m` is the sum of old directions, each with its
    own slope. `moments="replay"` makes the last `replayed` directions anew in each step and keeps their seeds and
    slopes: what is left out has at most `REPLAY_TOLERANCE` of the weight of all. `moments="buffer"` keeps `m`, as
    large as the weights, and is faster. One-dimensional tensors always have a buffer. Of low-rank directions with a
    lasting right factor, `m` is a left factor: exact while the right one stays, and projected onto the next one by
    least squares (LOZO-M, arXiv 2410.07698, which averages with `1 - momentum` before the new slope).

    Args:
        rule: one of `RULES`.
        momentum, betas, adam_eps: factors in [0, 1); `adam_eps` above 0.
        moments: `"replay"` or `"buffer"`; `None` = replay for momentum; Adam has a buffer.

    Raises:
        InputError: a value out of range; `adam` with `replay`, whose second moments reach back thousands of steps.
    """

    def __init__(
        self,
        rule: str = SGD,
        momentum: float = 0.9,
        betas: tuple[float, float] = (0.9, 0.999),
        adam_eps: float = 1e-8,
        moments: str | None = None,
    ):
        if rule not in RULES:
            raise InputError(f"update={rule!r} is unknown; choose from: {', '.join(RULES)}")
        for name, value in (("momentum", momentum), ("betas[0]", betas[0]), ("betas[1]", betas[1])):
            if not 0 <= value < 1:
                raise InputError(f"{name}={value} must be in [0, 1); pass 0.9, say")
        if not adam_eps > 0:
            raise InputError(f"adam_eps={adam_eps} cannot keep a division finite; pass a number above 0")
        if moments is not None and moments not in MOMENTS:
            raise InputError(f"moments={moments!r} is unknown; choose from: {', '.join(MOMENTS)}")
        if moments is not None and rule not in (MOMENTUM, ADAM):
            raise InputError(f"moments={moments} is about update=momentum or adam, not {rule}; leave it out")
        if moments == REPLAY and rule == ADAM:
            raise InputError(
                f"moments=replay cannot keep adam's second moments: with beta2={betas[1]} they reach back thousands "
                "of steps; pass moments=buffer, or update=rms"
            )
        self.rule, self.momentum, self.betas, self.adam_eps = rule, momentum, tuple(betas), adam_eps
        self.moments = moments or (REPLAY if rule == MOMENTUM else BUFFER)
        if self.replays and self.replayed > MOST_REPLAYED:
            raise InputError(
                f"momentum={momentum} would make {self.replayed} directions anew in each step; pass moments=buffer, "
                "or a smaller factor"
            )

    @property
    def replays(self) -> bool:
        return self.rule == MOMENTUM and self.moments == REPLAY

    @property
    def replayed(self) -> int:
        """Steps whose directions `replay` makes anew: the least `h` with `momentum^h <= REPLAY_TOLERANCE`."""
        if self.momentum <= REPLAY_TOLERANCE:
            return 1
        return math.ceil(math.log(REPLAY_TOLERANCE) / math.log(self.momentum))

    def buffers(self) -> tuple[str, ...]:
        """Names of the buffers of a tensor that has some."""
        return {MOMENTUM: ("momentum",), ADAM: ("first", "second")}.get(self.rule, ())

    def apply(
        self, exact: torch.Tensor, gradient: torch.Tensor, lr: float, step: int, state: Sequence[torch.Tensor]
    ) -> None:
        """Change a chunk of weights in place.

        Args:
            exact: the weights, in the type of the computation.
            gradient: the estimate for them; may be overwritten. For a replayed momentum: `m` itself.
            lr: of `rms` already divided by the root.
            step: steps taken, this one included.
            state: the chunk of each of `buffers()`, changed in place; empty if there are none.
        """
        if self.rule == SIGN:
            exact.add_(gradient.sign_(), alpha=-lr)
        elif self.rule == ADAM:
            (beta1, beta2), (first, second) = self.betas, state
            first.mul_(beta1).add_(gradient, alpha=1 - beta1)
            second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            # Adam: theta -= lr m_hat / (sqrt(v_hat) + eps)
            root = (second / (1 - beta2**step)).sqrt_().add_(self.adam_eps)
            exact.addcdiv_(first, root, value=-lr / (1 - beta1**step))
        elif self.rule == MOMENTUM and state:
            exact.add_(state[0].mul_(self.momentum).add_(gradient), alpha=-lr)
        else:
            exact.add_(gradient, alpha=-lr)


class Rounding:
    """Changing weights of 16 bits by less than half a unit in the last place.

    Without `carry`, a chunk is rounded up or down at random with the right mean; the noise of many steps is larger
    than their sum at small rates. With it, what rounding leaves out is kept for the next step, 2 bytes an entry.
    One-dimensional tensors always keep it, in float32. Weights of 32 and 64 bits need none of this.
    """

    def __init__(self, carry: bool):
        self.carry = carry
        self.kept: dict[int, torch.Tensor] = {}

    def keeps(self, parameter: torch.Tensor) -> bool:
        return parameter.element_size() == 2 and (self.carry or parameter.ndim < 2)

    def exact(self, parameter: torch.Tensor, number: int, part: slice) -> torch.Tensor:
        """The chunk as float32, with what is kept; of wider tensors the chunk itself."""
        chunk = parameter.detach().view(-1)[part]
        if parameter.element_size() != 2:
            return chunk
        exact = chunk.float()
        if number in self.kept:
            exact += self.kept[number][part]
        return exact

    def store(self, parameter: torch.Tensor, number: int, part: slice, exact: torch.Tensor, seed: int) -> None:
        """Write a chunk back. Nothing to do for wider tensors, which `exact` gave as they are."""
        if parameter.element_size() != 2:
            return
        chunk = parameter.detach().view(-1)[part]
        if not self.keeps(parameter):
            chunk.copy_(rounded_at_random(exact, parameter.dtype, torch.Generator(chunk.device).manual_seed(seed)))
            return
        if number not in self.kept:
            kind = torch.float32 if parameter.ndim < 2 else parameter.dtype
            self.kept[number] = torch.zeros(parameter.numel(), dtype=kind, device=parameter.device)
        chunk.copy_(exact)
        self.kept[number][part] = (exact - chunk.float()).to(self.kept[number].dtype)


def rounded_at_random(exact: torch.Tensor, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """`exact` (float32) as a 16-bit type: up or down at random, so that the mean is `exact`."""
    nearest = exact.to(dtype)
    error = exact - nearest.float()
    # Neighbours of a float are its bits plus or minus one; away from zero is plus.
    away = (error > 0) == (nearest > 0)
    bits = nearest.view(torch.int16)
    other = torch.where(away, bits + 1, bits - 1).view(dtype)
    gap = (other.float() - nearest.float()).abs()
    chance = torch.where((nearest == 0) | (error == 0) | ~gap.isfinite(), torch.zeros_like(error), error.abs() / gap)
    draw = torch.rand(exact.shape, generator=generator, device=exact.device)
    return torch.where(draw < chance, other, nearest)
