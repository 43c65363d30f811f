"""The data of quadratic programs and polyhedra: their shapes, which of them come together, and what samples share.

Each has the shape that `SHAPES` says, or an axis in front of that, of B or of 1: without one, or with one of 1, it is
shared by all B samples, and its gradient is the sum over them. Bounds and right-hand sides may be one number.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from icnnrt.arguments import refused

__all__ = ["MEANING", "NUMBERS", "SHAPES", "Sizes", "check_shapes"]

# Of n variables, m rows of G and q equalities; the batch axis aside.
SHAPES: Final = {
    "Q": "nn",
    "p": "n",
    "G": "mn",
    "h_lower": "m",
    "h": "m",
    "A": "qn",
    "b": "q",
    "lower": "n",
    "upper": "n",
}
NUMBERS: Final = frozenset(("h_lower", "h", "b", "lower", "upper"))  # which may be one number
# Why they have it.
MEANING: Final = {
    "Q": "a row and a column for each variable",
    **dict.fromkeys(("p", "lower", "upper"), "an entry for each variable"),
    "G": "a row for each bound and a column for each variable",
    "A": "a row for each equality and a column for each variable",
    **dict.fromkeys(("h", "h_lower"), "an entry for each row of G"),
    "b": "an entry for each row of A",
}

Shape = Sequence[Any]  # of integers, or of what a trace has in their place


class Sizes(NamedTuple):
    n: Any  # variables
    m: Any  # rows of G
    q: Any  # equalities
    B: Any  # samples, 1 where all is shared


def check_shapes(given: Mapping[str, Shape | None], n: Any = None, B: Any = None) -> Sizes:
    """The sizes of a problem whose data have these shapes, None where one is absent, or the `InputError`.

    `given` names the data that the problem may have. n and B where they are known otherwise; else Q tells the one, and
    the first datum that is not shared the other.
    """
    if n is None:
        n = _order(given["Q"])
    sizes = {"n": n, "m": 0, "q": 0}
    for left, letter, sides in (("G", "m", ("h", "h_lower")), ("A", "q", ("b",))):
        rights = [side for side in sides if side in given]
        _both_or_neither(given, left, rights)
        if (rows := given[left]) is not None:
            sizes[letter] = rows[-2] if len(rows) > 1 else -1
    first, length = ("", "B") if B is None else ("x", str(B))
    for name, came in given.items():
        if came is None:
            continue
        rank = len(SHAPES[name])
        batched = len(came) == rank + 1
        wanted = tuple(sizes[letter] for letter in SHAPES[name])
        if tuple(came[1:] if batched else came) != wanted and (came or name not in NUMBERS):
            # A matrix other than Q says how many rows there are.
            each = ", ".join(map(str, (SHAPES[name][0] if name in ("G", "A") else wanted[0], *wanted[1:])))
            expected = f"shape [{each}] or, for a batch, [{length}, {each}]"
            raise refused(name, expected, list(came), f"{name} has {MEANING[name]}")
        if not batched or (isinstance(came[0], int) and came[0] == 1):
            continue
        if B is None:
            B, first = came[0], name
        elif came[0] != B:
            expected = f"{B} samples, as {first} has, or 1 for all"
            raise refused(name, expected, came[0], "data share one batch")
    return Sizes(n, sizes["m"], sizes["q"], 1 if B is None else B)


def _order(Q: Shape | None) -> Any:
    if Q is None or len(Q) not in (2, 3) or Q[-1] != Q[-2] or Q[-1] == 0:
        came = "none" if Q is None else f"shape {list(Q)}"
        square = "a square matrix [n, n] or a batch of them [B, n, n]"
        raise refused("Q", square, came, "the objective is ½ z'Qz + p'z")
    return Q[-1]


def _both_or_neither(given: Mapping[str, Shape | None], left: str, rights: Sequence[str]) -> None:
    held = [name for name in rights if given[name] is not None]
    if (given[left] is None) == (not held):
        return
    missing, other = ([left], held[0]) if held else (rights, left)
    remedy = f"pass {' or '.join(missing)} with it, or leave {other} out"
    raise refused(missing[0], f"{MEANING[missing[0]]}, as {other} was given", "none", remedy)
