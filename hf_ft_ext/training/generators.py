"""Random number generators of torch, numpy and Python: code that leaves their state as it was."""

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch


@contextlib.contextmanager
def generators_kept() -> Iterator[Any]:
    """A context that restores the state of all random number generators when it ends."""
    python, numpy = random.getstate(), np.random.get_state()
    found: dict[int, tuple[torch.Generator, torch.Tensor]] = {}

    def keep(loader: Any) -> None:
        batch_sampler = getattr(loader, "batch_sampler", None)
        parts = (loader, getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
        for part in parts:
            generator = getattr(part, "generator", None)
            if isinstance(generator, torch.Generator):
                found[id(generator)] = (generator, generator.get_state())

    # All devices, named: without a list torch warns where there are several.
    with torch.random.fork_rng(devices=_cuda_devices()):
        try:
            yield keep
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
            for generator, state in found.values():
                generator.set_state(state)


def with_same_draws(evaluate: Callable[[], torch.Tensor], seed: int) -> Callable[[], torch.Tensor]:
    """Return `evaluate` with all random numbers drawn from `seed` in every call; the generators' states are restored.

    Losses are compared by it: those with other dropout masks, noise or mixed rows differ by their draws too.
    """

    def evaluate_with_seed() -> torch.Tensor:
        with generators_kept():
            torch.default_generator.manual_seed(seed)
            if _cuda_devices():
                torch.cuda.manual_seed_all(seed)
            np.random.seed(seed % 2**32)
            random.seed(seed)
            return evaluate()

    return evaluate_with_seed


def _cuda_devices() -> list[int]:
    """The devices that may have drawn numbers; torch keeps the seed of others until their first use."""
    return list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
