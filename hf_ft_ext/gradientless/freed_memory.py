"""Memory that a step frees is kept for the next one."""

import torch

_FREED_ONCE = 2**25 - 2**16  # bytes, just below the largest block that glibc's allocator learns from


def keep_freed_memory() -> None:
    """Let glibc keep freed blocks of up to 32 MiB for the next step instead of giving them back to the system.

    Its threshold for giving memory back is twice the largest block that it has seen freed. Without this, each step of
    a head on cached features gets its few MiB anew, page by page: a quarter of its time (`benchmarks/gradientless.py`,
    variant `none`); and so does each chunk of weights that `SPSA` makes. The block is never written to, so it costs
    no memory. Other allocators do not notice.
    """
    torch.empty(_FREED_ONCE, dtype=torch.uint8)
