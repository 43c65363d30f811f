"""One convex quadratic program with sparse data, as files of solvers hold it.

    min over z of  ½ z'Qz + p'z + constant   s.t.  h_lower <= Gz <= h,   Az = b,   lower <= z <= upper

Matrices are told by their entries, as files hold them.
"""

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from icnnrt.arguments import refused

Array = NDArray[np.float64]

DENSE_MAX: Final = 1 << 30  # bytes of all data with their zeros


class Coo(NamedTuple):
    """A sparse matrix by its entries, for `scipy.sparse.coo_array((values, (rows, columns)), shape)`."""

    rows: NDArray[np.int64]
    columns: NDArray[np.int64]
    values: Array
    shape: tuple[int, int]

    def dense(self) -> Array:
        """The same with its zeros."""
        matrix = np.zeros(self.shape)
        np.add.at(matrix, (self.rows, self.columns), self.values)
        return matrix


class Program(NamedTuple):
    """One quadratic program; Q symmetric, with both triangles. Infinite bounds are none."""

    Q: Coo  # [n, n]
    p: Array  # [n]
    G: Coo  # [m, n]
    h: Array  # [m]
    A: Coo  # [q, n]
    b: Array  # [q]
    lower: Array  # [n]
    upper: Array  # [n]
    constant: float
    variables: Sequence[str]  # to write: of letters, digits and underscores, a letter first, none "e" with digits
    h_lower: Array | None = None  # [m]

    def objective(self, z: Array) -> float:
        """½ z'Qz + p'z + constant."""
        curved = 0.5 * (self.Q.values * z[self.Q.rows] * z[self.Q.columns]).sum()
        return float(curved + self.p @ z + self.constant)

    def dense(self, most: float = DENSE_MAX) -> dict[str, Any]:
        """The data with their zeros, by the names that `icnnrt.qp` has for them; the constant is left out.

        Raises `InputError` where they would take more than `most` bytes, 1 GiB by default: a small file may ask for it.
        """
        shapes = self.Q.shape, self.G.shape, self.A.shape
        if (size := 8 * sum(rows * columns for rows, columns in shapes)) > most:
            expected = f"at most {most / 2**20:.0f} MiB of matrices with their zeros"
            raise refused("program", expected, f"{size >> 20} MiB", "take a solver of sparse programs")
        h_lower = np.full(len(self.h), -np.inf) if self.h_lower is None else self.h_lower
        return {
            "Q": self.Q.dense(),
            "p": self.p,
            "G": self.G.dense(),
            "h_lower": h_lower,
            "h": self.h,
            "A": self.A.dense(),
            "b": self.b,
            "lower": self.lower,
            "upper": self.upper,
        }
