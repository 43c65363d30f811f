"""How many threads each library uses: one, or as many as it takes by itself."""

import contextlib
import os
from collections.abc import Iterator
from typing import Final

DEFAULT: Final = 0  # in a row's setting: the library's own choice


def cores() -> int:
    """What this process may use; the default of torch and of BLAS libraries."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def shown(threads: int) -> str:
    return f"{threads}" if threads else f"default ({cores()})"


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """numpy and torch with `count` threads, or with one a core for DEFAULT, whatever OMP_NUM_THREADS said at start.

    ONNX Runtime takes its number when a session is made.
    """
    count = count or cores()
    with contextlib.ExitStack() as stack:
        try:
            from threadpoolctl import threadpool_limits
        except ImportError:  # numpy then keeps the number it started with; the environment line says so
            pass
        else:
            stack.enter_context(threadpool_limits(count, user_api="blas"))
        try:
            import torch
        except ImportError:
            pass
        else:
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(count)
        yield
