"""What the ranks of a run do together. Without ranks there is one, the first.

All but `is_first_rank` are collective: every rank must call them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.distributed as dist


def is_first_rank() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def of_all_ranks[T](own: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """What every rank has, which can be pickled, in the order of the ranks."""
    found = [own]
    if dist.is_initialized():
        found *= dist.get_world_size(group)
        dist.all_gather_object(found, own, group)
    return found


@contextmanager
def together(group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """What a block raises on one rank ends all of them, where the others would wait for it forever."""
    failed: Exception | None = None
    try:
        yield
    except Exception as error:
        failed = error
    messages = of_all_ranks(None if failed is None else str(failed) or type(failed).__name__, group)
    if failed is not None:
        raise failed
    for other in filter(None, messages):
        raise ValueError(other)


def by_first_rank[T](find: Callable[[], T]) -> T:
    """What the first rank finds, on all of them, and what it raises, as a ValueError on the others."""
    found: list[T] = []
    with together():
        if is_first_rank():
            found = [find()]
    return of_all_ranks(found)[0][0]
