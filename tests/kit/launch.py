"""A rank process as a launcher would have started it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist


@contextmanager
def torchrun_environment(**more: str) -> Iterator[None]:
    """torchrun's environment variables for this rank of the default group, and `more`; afterwards as it was before."""
    rank, size, before = str(dist.get_rank()), str(dist.get_world_size()), dict(os.environ)
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=size, LOCAL_WORLD_SIZE=size, **more)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
