"""The plan of a sparsity pattern as text: what the operators of torch take, for which it is a constant like a number.

A tensor would be data of the graph instead: a batch of it under vmap, a weight of what is exported.
"""

import base64
import functools
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from icnnrt.mathematics.qp_pattern import QPPattern

__all__ = ["plan_of", "text_of"]


def text_of(pattern: QPPattern | None) -> str:
    """Some kilobytes; nothing of no pattern."""
    return "" if pattern is None else base64.b85encode(zlib.compress(pattern.plan.tobytes())).decode()


@functools.lru_cache(maxsize=64)
def plan_of(text: str) -> NDArray[Any]:
    """The integers of what `text_of` made."""
    return np.frombuffer(zlib.decompress(base64.b85decode(text)), np.int32)
