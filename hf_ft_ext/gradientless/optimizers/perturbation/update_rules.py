"""Update rules of `SPSA`, applied chunk by chunk, and rounding of 16-bit weights."""

import math
from collections.abc import Sequence

import torch

from hf_ft_ext.errors import InputError

RULES = SGD, SIGN, MOMENTUM, ADAM, RMS, CONSERVATIVE = ("sgd", "sign", "momentum", "adam", "rms", "conservative")
MOMENTS = REPLAY, BUFFER = ("replay", "buffer")
REPLAY_TOLERANCE = 1e-3
MOST_REPLAYED = 1000


class UpdateRule:
    """Update rule of a step, for the gradient estimate `G`.

    | rule | step | state |
    | --- | --- | --- |
    | `sgd` | `theta -= lr G` | none |
    | `sign` | `theta -= lr sign(G)` | none |
    | `momentum` | `m = momentum m + G; theta -= lr m` | pairs of seed and slope, low-rank factors, or a buffer |
    | `adam` | Adam on `G`, with bias correction | two buffers of the weights' size |
    | `rms` | `theta -= lr G / (sqrt(s) + adam_eps)`, `s` the running mean of the squared slopes | one scalar |
    | `conservative` | the best of `theta - lr G`, `theta`, `theta + lr G` on this batch | none |

    `conservative` evaluates the loss at `theta` (with `one-sided` the estimate's) and after the step, and after the
    opposite step only if the step does not lower the loss; ZO-Bench always evaluates all three.

    Momentum sums directions, each with its own slope, as in ZO-Bench (arXiv 2402.11592). Three ways to store it:

    - `moments="replay"` keeps seeds and slopes and recomputes the last `replayed` directions in each step. The omitted
      older ones have at most `REPLAY_TOLERANCE` of the total weight.
    - `moments="buffer"` keeps `m`, of the size of the weights; this is faster. One-dimensional tensors always do.
    - Low-rank directions whose right factor is kept for several steps store `m` as a left factor. When a new right
      factor is drawn, `m` is projected onto it by least squares (LOZO-M, arXiv 2410.07698, which multiplies the new
      slope by `1 - momentum`).

    Args:
        rule: one of `RULES`.
        momentum, betas: in [0, 1).
        adam_eps: above 0.
        moments: `"replay"` or `"buffer"`; `None` = replay for momentum; Adam always uses buffers.

    Raises:
        InputError: a value out of range; `adam` with `replay`, as second moments reach back thousands of steps.
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
                raise InputError(f"{name} must be in [0, 1), got {value}")
        if not adam_eps > 0:
            raise InputError(f"adam_eps must be above 0, got {adam_eps}")
        if moments is not None and moments not in MOMENTS:
            raise InputError(f"moments={moments!r} is unknown; choose from: {', '.join(MOMENTS)}")
        if moments is not None and rule not in (MOMENTUM, ADAM):
            raise InputError(f"moments={moments} applies to update=momentum or adam, not to {rule}; leave it out")
        if moments == REPLAY and rule == ADAM:
            raise InputError(
                f"moments=replay does not support update=adam: with beta2={betas[1]}, second moments reach back "
                "thousands of steps; pass moments=buffer, or update=rms"
            )
        self.rule, self.momentum, self.betas, self.adam_eps = rule, momentum, tuple(betas), adam_eps
        self.moments = moments or (REPLAY if rule == MOMENTUM else BUFFER)
        if self.replays and self.replayed > MOST_REPLAYED:
            raise InputError(
                f"momentum={momentum} would recompute the directions of {self.replayed} steps in each step; pass "
                "moments=buffer, or a smaller momentum"
            )

    @property
    def replays(self) -> bool:
        """Whether momentum is recomputed from stored seeds and slopes."""
        return self.rule == MOMENTUM and self.moments == REPLAY

    @property
    def replayed(self) -> int:
        """Number of steps whose directions `replay` uses: the least `h` with `momentum^h <= REPLAY_TOLERANCE`."""
        if self.momentum <= REPLAY_TOLERANCE:
            return 1
        return math.ceil(math.log(REPLAY_TOLERANCE) / math.log(self.momentum))

    def buffers(self) -> tuple[str, ...]:
        """Names of the moment buffers that the rule needs for each tensor."""
        return {MOMENTUM: ("momentum",), ADAM: ("first", "second")}.get(self.rule, ())

    def apply(
        self, exact: torch.Tensor, gradient: torch.Tensor, lr: float, step: int, state: Sequence[torch.Tensor]
    ) -> None:
        """Update a chunk of weights in place.

        Args:
            exact: the weights, in the type of the computation.
            gradient: the estimate `G` for them; may be overwritten. With replayed momentum: `m` itself.
            lr: learning rate; for `rms` already divided by the root.
            step: number of this step, from 1.
            state: the chunk of each of `buffers()`, updated in place; empty if there are none.
        """
        if self.rule == SIGN:  # theta -= lr sign(G)
            exact.add_(gradient.sign_(), alpha=-lr)
        elif self.rule == ADAM:
            (beta1, beta2), (first, second) = self.betas, state
            # m = beta1 m + (1 - beta1) G; v = beta2 v + (1 - beta2) G^2
            first.mul_(beta1).add_(gradient, alpha=1 - beta1)
            second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            # theta -= lr m_hat / (sqrt(v_hat) + eps), m_hat = m / (1 - beta1^t), v_hat = v / (1 - beta2^t)
            root = (second / (1 - beta2**step)).sqrt_().add_(self.adam_eps)
            exact.addcdiv_(first, root, value=-lr / (1 - beta1**step))
        elif self.rule == MOMENTUM and state:  # m = momentum m + G; theta -= lr m
            exact.add_(state[0].mul_(self.momentum).add_(gradient), alpha=-lr)
        else:  # theta -= lr G
            exact.add_(gradient, alpha=-lr)


class Rounding:
    """Rounding of 16-bit weights after small updates; rounding to nearest would lose updates below half a ulp.

    Without `carry`, entries are rounded stochastically: up or down at random, so that the mean is exact. At small
    learning rates, the noise over many steps can exceed the sum of the updates. With `carry`, the rounding error is
    kept and added in the next step. It has 16 bits too and is rounded stochastically: its last digit is about 1/256
    (bfloat16) of the weight's, and smaller updates would be lost by rounding to nearest. One-dimensional tensors
    always keep it, in float32. Weights of 32 and 64 bits are updated directly.
    """

    def __init__(self, carry: bool):
        self.carry = carry
        self.kept: dict[int, torch.Tensor] = {}

    def keeps(self, parameter: torch.Tensor) -> bool:
        """Whether the rounding error of this tensor is kept for the next step."""
        return parameter.element_size() == 2 and (self.carry or parameter.ndim < 2)

    def exact(self, parameter: torch.Tensor, number: int, part: slice) -> torch.Tensor:
        """A 16-bit chunk as float32, plus its kept rounding error; a view of the chunk for wider types."""
        chunk = parameter.detach().view(-1)[part]
        if parameter.element_size() != 2:
            return chunk
        exact = chunk.float()
        if number in self.kept:
            exact += self.kept[number][part]
        return exact

    def store(self, parameter: torch.Tensor, number: int, part: slice, exact: torch.Tensor, seed: int) -> None:
        """Round and store a 16-bit chunk; wider types were updated in place."""
        if parameter.element_size() != 2:
            return
        chunk = parameter.detach().view(-1)[part]
        generator = torch.Generator(chunk.device).manual_seed(seed)
        if not self.keeps(parameter):
            chunk.copy_(rounded_stochastically(exact, parameter.dtype, generator))
            return
        if number not in self.kept:
            kind = torch.float32 if parameter.ndim < 2 else parameter.dtype
            self.kept[number] = torch.zeros(parameter.numel(), dtype=kind, device=parameter.device)
        chunk.copy_(exact)
        error, kept = exact - chunk.float(), self.kept[number]
        kept[part] = error if kept.dtype == torch.float32 else rounded_stochastically(error, kept.dtype, generator)


def rounded_stochastically(exact: torch.Tensor, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Stochastic rounding of `exact` (float32) to a 16-bit type: up or down at random, so that the mean is `exact`.

    `floor(exact / unit + u) unit`, where `unit` is the distance between neighbours of the 16-bit type at `exact`, and
    `u` is uniform in [0, 1), a multiple of 2^-16. Dividing by `unit`, a power of two, has no rounding error.
    """
    info = torch.finfo(dtype)
    exponent_bits = 0x7F800000
    power = (exact.view(torch.int32) & exponent_bits).view(torch.float32)  # 2^e with 2^e <= |exact| < 2^(e + 1)
    largest = 2.0 ** math.floor(math.log2(info.max))  # infinity has the unit of the largest numbers
    unit = power.clamp_(info.smallest_normal, largest).mul_(info.eps)  # subnormal numbers share one unit
    return (exact / unit).add_(_uniform(exact, generator)).floor_().mul_(unit).to(dtype)


def _uniform(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Uniform multiples of 2^-16 in [0, 1): four from each random 64-bit integer, of the shape of `like`."""
    words = torch.empty(-(-like.numel() // 4), dtype=torch.int64, device=like.device)
    words.random_(-(2**63), None, generator=generator)
    return words.view(torch.int16)[: like.numel()].view(like.shape).float().mul_(2**-16).add_(0.5)
