"""What the values of one evaluation may take of memory, and `Unsupported`, which is what a value beyond it raises.

A graph of a few bytes can ask for any amount of memory. In a call by `call_bounded`, all values that are kept share
one bound, and a value that would take more than a part of what is left is refused before it is made.
"""

import contextvars
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final, ParamSpec, TypeVar

from numpy.typing import NDArray

from icnnrt.format.onnx_graph import MAX_ELEMENTS

# Bytes that the values of one evaluation may take together: as many for any graph, and so many times what its own
# tensors and weights take, which somebody had to store.
MEMORY: Final = 1 << 30
SHARE: Final = 16
# Of what is left, the part that one value may take: what an operator makes on its way is a few times its result.
PART: Final = 4

# Bytes that are left; None where there is no bound.
_left: ContextVar[int | None] = ContextVar("left", default=None)

P = ParamSpec("P")
R = TypeVar("R")


class Unsupported(Exception):
    """An operator, or a use of one, that is not covered, or that takes too much; the text says which."""


def call_bounded(given: Iterable[NDArray[Any]], function: Callable[P, R], *args: P.args, **keywords: P.kwargs) -> R:
    """Call a function with a bound on the values that it makes; `given` are the tensors that there are."""
    context = contextvars.copy_context()  # which nothing has to undo, whatever interrupts the call
    context.run(_left.set, MEMORY + SHARE * sum(array.nbytes for array in given))
    return context.run(function, *args, **keywords)


@contextmanager
def again() -> Iterator[None]:
    """What the block keeps is given back at its end."""
    before = _left.get()
    try:
        yield
    finally:
        _left.set(before)


def take(size: int) -> None:
    """Count bytes that will be kept; `Unsupported` where they are too many."""
    left = _left.get()
    if left is not None:
        _left.set(left - size)
        if size > left:
            raise Unsupported("all values up to here take more memory than is given to them")


def check_size(shape: Iterable[int]) -> tuple[int, ...]:
    """Refuse a shape before it is allocated."""
    sizes = tuple(int(s) for s in shape)
    numbers = math.prod(max(s, 1) for s in sizes)
    if any(s < 0 for s in sizes) or numbers > MAX_ELEMENTS:
        raise Unsupported(f"the shape {str(sizes)[:80]} is impossible")
    check_numbers(numbers)
    return sizes


def check_numbers(numbers: int) -> None:
    """Refuse a value of so many numbers before it is made."""
    left = _left.get()
    if numbers > MAX_ELEMENTS or (left is not None and numbers > left // (8 * PART)):
        raise Unsupported(f"a value of {numbers} numbers takes more memory than is given to it")
