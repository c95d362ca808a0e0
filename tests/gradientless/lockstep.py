"""Several processes of one run as threads, one of which runs at a time until all wait for a sum over them."""

import threading
from collections.abc import Callable
from typing import Any

import torch

Total = Callable[[torch.Tensor], torch.Tensor]


def lockstep(*mains: Callable[[int, Total], Any]) -> list[Any]:
    """The results of `mains`, each called with its rank and an all-reduce over all of them."""
    turn, barrier = threading.Lock(), threading.Barrier(len(mains))
    values: list[Any] = [None] * len(mains)
    results: list[Any] = [None] * len(mains)
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        def total(mine: torch.Tensor) -> torch.Tensor:
            values[rank] = mine
            turn.release()
            try:
                barrier.wait(timeout=60)
                found = torch.stack(values).sum(0)  # fails if the processes sum different tensors
                barrier.wait(timeout=60)
            finally:
                turn.acquire()
            return found

        with turn:
            try:
                results[rank] = mains[rank](rank, total)
            except BaseException as error:
                errors.append(error)
                barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(mains))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
    return results
