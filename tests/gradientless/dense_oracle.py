"""A search written out plainly, in float64, every direction a tensor of the weights' size: the oracle of `SPSA`.

It shares one thing with the package: the random numbers, taken from `Directions` as whole tensors or whole factors.
All else, the perturbation of the stored weights, the slopes and the rules, is written here from the papers' formulas.
"""

import math

import torch


class DenseSearch:
    """`params`: a list of float64 tensors, changed in place by `step(loss_of)`.

    `lr` and `weight_decay` are numbers, or one number for each tensor; `lr` may be changed between steps.
    """

    def __init__(self, params, directions, seed, lr, eps, n=1, rule="sgd", estimate="two-sided", **options):
        self.params, self.directions, self.lr, self.eps, self.n = params, directions, lr, eps, n
        self.rule, self.estimate, self.options = rule, estimate, options
        self.generator = torch.Generator().manual_seed(seed)
        self.t, self.basis, self.evaluations = 0, 0, 0
        self.m = [torch.zeros_like(p) for p in params]
        self.v = [torch.zeros_like(p) for p in params]
        self.s = 0.0
        self.start = [p.clone() for p in params]

    def _seed(self):
        return int(torch.randint(2**62, (), generator=self.generator))

    def directions_of_the_step(self):
        from hf_ft_ext.gradientless.optimizers.perturbation.directions import Draw

        if self.directions.renew and (self.t - 1) % self.directions.renew == 0:
            self.basis = self._seed()
        result = []
        for _ in range(self.n):
            draw, z = Draw(self._seed(), self.basis), []
            for i, p in enumerate(self.params):
                if self.directions.has_factors(p.shape):
                    left, right = self.directions.factors(p.shape, i, draw, p.dtype, p.device)
                    z.append(left @ right.T)
                else:
                    whole = slice(0, p.numel())
                    z.append(self.directions.dense(p.reshape(-1), i, draw, whole).view(p.shape))
            result.append(z)
        return result

    def moved_loss(self, loss_of, change):
        """The loss with `change` (one tensor for each parameter) added to the stored weights, which are put back."""
        saved = [p.clone() for p in self.params]
        for p, c in zip(self.params, change, strict=True):
            p.add_(c)
        loss = float(loss_of())
        for p, s in zip(self.params, saved, strict=True):
            p.copy_(s)
        self.evaluations += 1
        return loss

    def slopes(self, loss_of, zs):
        at = [self.moved_loss(loss_of, [self.eps * part for part in z]) for z in zs]
        if self.estimate == "two-sided":
            below = [self.moved_loss(loss_of, [-self.eps * part for part in z]) for z in zs]
            return [(a - b) / (2 * self.eps) for a, b in zip(at, below, strict=True)]
        mean = sum(at) / len(at)
        squares = sum((a - mean) ** 2 for a in at)
        if self.estimate == "one-sided":
            self.here = here = self.moved_loss(loss_of, [0 * part for part in zs[0]])
            return [(a - here) / math.sqrt(squares / (len(at) - 1)) for a in at]
        return [(a - mean) / math.sqrt(squares / len(at)) for a in at]

    @torch.no_grad()
    def step(self, loss_of):
        self.t += 1
        zs = self.directions_of_the_step()
        slopes = self.slopes(loss_of, zs)
        estimate = []
        for i, p in enumerate(self.params):
            low_rank = self.directions.kind == "lozo" and p.ndim == 2 and min(p.shape) >= self.directions.rank
            factor = 1 / self.directions.rank if low_rank else 1.0
            estimate.append(sum(g * z[i] for g, z in zip(slopes, zs, strict=True)) * factor / self.n)
        rates, decays = self._each(self.lr), self._each(self.options.get("weight_decay", 0.0))
        shrunk = self._shrunk()  # by the weights before the step
        kept = [1 - lr * decay * part for lr, decay, part in zip(rates, decays, shrunk, strict=True)]
        if self.rule == "conservative":
            moves = {
                sign: [-sign * lr * g for lr, g in zip(rates, estimate, strict=True)] for sign in (0.0, 1.0, -1.0)
            }
            known = {0.0: self.here} if self.estimate == "one-sided" else {}
            losses = known | {s: self.moved_loss(loss_of, move) for s, move in moves.items() if s not in known}
            sign = min(losses, key=losses.get)
            if losses[1.0] < losses[0.0]:
                self.evaluations -= 1  # the opposite step need not be evaluated, see `SPSA._best_sign`
            for p, factor, move in zip(self.params, kept, moves[sign], strict=True):
                p.mul_(factor).add_(move)
            return
        if self.rule == "rms":
            self.s = 0.999 * self.s + 0.001 * sum(g * g for g in slopes) / len(slopes)
            root = math.sqrt(self.s / (1 - 0.999**self.t)) + 1e-8
        for i, (p, g) in enumerate(zip(self.params, estimate, strict=True)):
            if self.rule == "sgd":
                change = g
            elif self.rule == "sign":
                change = g.sign()
            elif self.rule == "rms":
                change = g / root
            elif self.rule == "momentum":
                self.m[i] = 0.9 * self.m[i] + g
                change = self.m[i]
            else:
                self.m[i] = 0.9 * self.m[i] + 0.1 * g
                self.v[i] = 0.999 * self.v[i] + 0.001 * g * g
                change = self.m[i] / (1 - 0.9**self.t) / ((self.v[i] / (1 - 0.999**self.t)).sqrt() + 1e-8)
            p.mul_(kept[i]).sub_(rates[i] * change * shrunk[i])

    def _shrunk(self):
        """1 for the entries that a step changes, 0 for others: with `small`, those up to the threshold at first."""
        if (share := self.directions.small) is None:
            return self._each(1.0)
        sorted_starts = [start.abs().flatten().sort().values for start in self.start]
        limits = [values[max(1, round(share * len(values))) - 1] for values in sorted_starts]
        return [(p.abs() <= limit).to(p.dtype) for p, limit in zip(self.params, limits, strict=True)]

    def _each(self, value):
        return list(value) if isinstance(value, list | tuple) else [value] * len(self.params)
