"""Where the data of quadratic programs may be other than 0, the same for every solve, and what follows from it once.

With x = [z; ν; λ] each step of the solver factors a quasi-definite matrix, always of the same pattern,

    K = [Q + ρ   A'    G' ]
        [A      −δ        ],   PKP' = LDL',   D diagonal
        [G           −1/w ]

which has such a factor in every order P of its rows (Vanderbei, *Symmetric quasi-definite matrices*, SIAM J. Optim.
1995); the order decides how many entries L has. `minimum_degree` finds one.
"""

import functools
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from icnnrt.arguments import converted, refused, shown
from icnnrt.mathematics.minimum_degree import Symbolic, minimum_degree

__all__ = ["PLAN_VERSION", "QPPattern"]

Ints = NDArray[np.int64]
Entries = tuple[Ints, Ints]  # rows and columns, row by row, ascending

PLAN_VERSION: Final = 1  # native/core/qp_plan.h has the same
# What is dense; and multiply-adds of a sparse factor, and of a solve with it, as many of a dense factor.
FULL, SPARSE, SOLVES = 0.3, 10.0, 30.0
MOST: Final = 1 << 30  # numbers of a plan, which are of 32 bits


class QPPattern:
    """Where Q, G and A of quadratic programs may be other than 0.

        pattern = icnnrt.QPPattern(Q, G, A)
        solver = icnnrt.QPSolver(n, m, q, box=True, pattern=pattern)

    It is made once and serves any number of programs whose data stay within it; which bounds there are is no part of
    it. Native kernels then factor what is there, and no zeros. What that takes is found when it is first needed, in
    milliseconds for hundreds of rows and in seconds for thousands.
    """

    def __init__(self, Q: Any, G: Any = None, A: Any = None) -> None:
        """
        Q:  [n, n], an array of numbers or of True and False, or a sparse matrix of scipy. What is not 0 or False, and
            what a sparse matrix has an entry for, may be other than 0; so may what lies across the diagonal from there,
            and the diagonal. Of a batch [B, n, n] what is so in any sample
        G:  [m, n] in the same manner; None: no rows
        A:  [q, n] in the same manner; None: no rows

        Raises `InputError` for what is no matrix of such a shape.
        """
        rows, columns, (height, n) = _entries(Q, "Q")
        if height != n or n == 0:
            raise refused("Q", "a square matrix [n, n]", f"shape {[height, n]}", "the objective is ½ z'Qz + p'z")
        low, high = np.minimum(rows, columns), np.maximum(rows, columns)
        below = low < high
        self.n: int = n
        self._Q = _sorted(high[below], low[below], n)
        self._G, self.m = _rectangle(G, "G", n)
        self._A, self.q = _rectangle(A, "A", n)

    @functools.cached_property
    def symbolic(self) -> Symbolic:
        """The order of the rows of K, which are those of [z; ν; λ], and the pattern of L."""
        N = self.n + self.q + self.m
        graph = [0] * N
        for first, (rows, columns) in ((0, self._Q), (self.n, self._A), (self.n + self.q, self._G)):
            for row, column in zip((first + rows).tolist(), columns.tolist(), strict=True):
                graph[row] |= 1 << column
                graph[column] |= 1 << row
        return minimum_degree(graph)

    @property
    def entries(self) -> tuple[int, int]:
        """How many entries K and L have on and below their diagonals."""
        N = self.n + self.q + self.m
        return N + sum(len(rows) for rows, _ in (self._Q, self._A, self._G)), N + len(self.symbolic.rows)

    @functools.cached_property
    def pays(self) -> bool:
        """Whether native kernels are likely to be faster by it than without: told by their multiply-adds.

        One of a sparse factor takes as long as ten of a dense one, which are done four or eight at a time, and one of a
        triangular solve counts three times, as there are many of them. Measured: predictive control of 72 variables
        takes 0.6 of the time by it, of 400 a fiftieth.
        """
        rows = self.m + self.q
        dense = 0.5 * self.n * self.n * rows + self.n**3 / 6
        of_K = sum(len(entries[0]) for entries in (self._Q, self._A, self._G))
        if of_K > FULL * self.n * (0.5 * self.n + rows):  # then its order need not be found
            return False
        below = np.diff(self.symbolic.starts)
        return bool(SPARSE * (below * (below + 3)).sum() / 2 + SOLVES * below.sum() < dense)

    @functools.cached_property
    def plan(self) -> NDArray[np.int32]:
        """What the operators SparseQuadraticProgram and SparseQPSensitivity take of it: integers, one after the other.

        version, n, m, q, |Q|, |G|, |A|, |L|        numbers of entries, of Q and L of those below the diagonal
        starts [n + 1] of the rows of Q, and the columns [|Q|]; so of G, [m + 1] and [|G|]; of A, [q + 1] and [|A|]
        place [n + q + m] in the order, of each row of K; and the row [n + q + m] at each place
        starts [n + q + m + 1] of the columns of L, and the rows [|L|], ascending in each
        slot [|Q| + |G| + |A|], where among the entries of L each of those is
        """
        order, starts, of_L = self.symbolic
        N = len(order)
        parts = ((self._Q, self.n, 0), (self._G, self.m, self.n + self.q), (self._A, self.q, self.n))
        numbers = [PLAN_VERSION, self.n, self.m, self.q, *(len(entries[0]) for entries, _, _ in parts), len(of_L)]
        if 2 * sum(numbers) + 4 * N > MOST:
            came, remedy = f"{len(of_L)} entries of its factor", "leave the pattern out"
            raise refused("pattern", f"a plan of at most {MOST} numbers", came, remedy)
        place = np.empty(N, np.int64)
        place[order] = np.arange(N)
        keys = np.repeat(np.arange(N), np.diff(starts)) * N + of_L  # ascending
        lists: list[Ints] = []
        slots: list[Ints] = []
        for (rows, columns), count, first in parts:
            lists += [np.searchsorted(rows, np.arange(count + 1)), columns]
            one, other = place[first + rows], place[columns]
            slots.append(np.searchsorted(keys, np.minimum(one, other) * N + np.maximum(one, other)))
        plan = np.concatenate([numbers, *lists, place, order, starts, of_L, *slots]).astype(np.int32)
        plan.setflags(write=False)
        return plan

    def check_sizes(self, n: int, m: int, q: int) -> None:
        """Raises `InputError` for a program of other sizes."""
        if (self.n, self.m, self.q) != (n, m, q):
            expected, came = f"one of n, m, q = {n}, {m}, {q}", f"{self.n}, {self.m}, {self.q}"
            raise refused("pattern", expected, came, "make it of matrices of these sizes")

    def outside(self, name: str, data: NDArray[Any]) -> tuple[int, ...] | None:
        """The first index at which Q, G or A [..., rows, columns] is other than 0 though it may not be, or None."""
        rows, columns = self._within[name]
        if np.count_nonzero(data) == np.count_nonzero(data[..., rows, columns]):
            return None
        stray = data != 0
        stray[..., rows, columns] = False
        return tuple(int(i) for i in np.argwhere(stray)[0])

    @functools.cached_property
    def _within(self) -> dict[str, Entries]:
        (rows, columns), diagonal = self._Q, np.arange(self.n)
        whole = np.concatenate([rows, columns, diagonal]), np.concatenate([columns, rows, diagonal])
        return {"Q": whole, "G": self._G, "A": self._A}

    def __repr__(self) -> str:
        return f"<QPPattern of n {self.n}, m {self.m}, q {self.q}>"


def _entries(value: Any, name: str) -> tuple[Ints, Ints, tuple[int, int]]:
    """Rows and columns of what is not 0, and the shape."""
    if type(value).__module__.startswith("scipy.sparse"):
        found = value.tocoo()
        if len(found.shape) != 2:
            raise refused(name, "a matrix", f"shape {list(found.shape)}", "it says where the data may be other than 0")
        return found.row.astype(np.int64), found.col.astype(np.int64), found.shape
    array = converted(value, name)
    if array.ndim not in (2, 3) or array.dtype.kind not in "fiub":
        expected = "a matrix of numbers or of True and False, dense or of scipy.sparse"
        came = shown(value) if array.dtype.kind in "fiub" else f"dtype {array.dtype}"
        raise refused(name, expected, came, "it says where the data may be other than 0")
    flags = array != 0
    rows, columns = np.nonzero(flags.any(axis=0) if array.ndim == 3 else flags)
    return rows, columns, (array.shape[-2], array.shape[-1])


def _rectangle(value: Any, name: str, n: int) -> tuple[Entries, int]:
    if value is None:
        return (np.empty(0, np.int64), np.empty(0, np.int64)), 0
    rows, columns, (height, width) = _entries(value, name)
    if width != n:
        raise refused(name, f"{n} columns, as Q has", width, f"{name} has a column for each variable")
    return _sorted(rows, columns, n), height


def _sorted(rows: Ints, columns: Ints, width: int) -> Entries:
    """Row by row, each entry once."""
    rows, columns = np.divmod(np.unique(rows * width + columns), width)
    return rows, columns
