"""Small problems of the collections of Hock, Schittkowski, Maros and Meszaros, with their published optima."""

from typing import Any, NamedTuple

import numpy as np
import pytest

import icnnrt
from icnnrt.mathematics.qp_status import QPStatus

inf = np.inf


class Problem(NamedTuple):
    squares: Any  # rows a of (a'z − c)², summed; or a pair (Q, p)
    offsets: Any
    constant: float
    optimum: float
    data: dict[str, Any]


CHAIN = [[1, 3, 0, 0, 0], [0, 0, 1, 1, -2], [0, 1, 0, 0, -1]]
SUMS = [[0, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 1]]


def genhs28() -> Problem:
    n = 10
    A = np.zeros((n - 2, n))
    for i in range(n - 2):
        A[i, i : i + 3] = 1, 2, 3
    rows = np.eye(n)[:-1] + np.eye(n)[1:]
    return Problem(rows, np.zeros(n - 1), 0.0, 0.9271736937, {"A": A, "b": np.ones(n - 2)})


def quadratic(Q: Any, p: Any) -> tuple[Any, Any]:
    return np.array(Q, float), np.array(p, float)


KNOWN = {
    "HS21": Problem(
        quadratic([[0.02, 0], [0, 2]], [0, 0]), None, -100.0, -99.96,
        {"G": [[10, -1]], "h_lower": [10], "lower": [2, -50], "upper": [50, 50]},
    ),
    "HS35": Problem(
        quadratic([[4, 2, 2], [2, 4, 0], [2, 0, 2]], [-8, -6, -4]), None, 9.0, 1 / 9,
        {"G": [[1, 1, 2]], "h": [3], "lower": 0.0},
    ),
    "HS51": Problem([[1, -1, 0, 0, 0], *SUMS], [0, 2, 1, 1], 0.0, 0.0, {"A": CHAIN, "b": [4, 0, 0]}),
    "HS52": Problem([[4, -1, 0, 0, 0], *SUMS], [0, 2, 1, 1], 0.0, 1859 / 349, {"A": CHAIN, "b": [0, 0, 0]}),
    "HS53": Problem(
        [[1, -1, 0, 0, 0], *SUMS], [0, 2, 1, 1], 0.0, 176 / 43,
        {"A": CHAIN, "b": [0, 0, 0], "lower": -10.0, "upper": 10.0},
    ),
    "HS76": Problem(
        quadratic([[2, 0, -1, 0], [0, 1, 0, 0], [-1, 0, 2, 1], [0, 0, 1, 1]], [-1, -3, 1, -1]), None, 0.0,
        -4.681818182,
        {
            "G": [[1, 2, 1, 1], [3, 1, 2, -1], [0, 1, 4, 0]], "h": [5, 4, inf], "h_lower": [-inf, -inf, 1.5],
            "lower": 0.0,
        },
    ),
    "TAME": Problem([[1, -1]], [0], 0.0, 0.0, {"A": [[1, 1]], "b": [1], "lower": 0.0}),
    "GENHS28": genhs28(),
}  # fmt: skip


@pytest.mark.parametrize("native", [None, False], ids=["native if there", "portable"])
@pytest.mark.parametrize("name", KNOWN)
def test_the_published_optimum_is_found(name: str, native: bool | None) -> None:
    squares, offsets, constant, optimum, given = KNOWN[name]
    if offsets is None:
        Q, p = squares
    else:
        rows, c = np.array(squares, float), np.array(offsets, float)
        Q, p, constant = 2 * rows.T @ rows, -2 * rows.T @ c, constant + c @ c
    data = {key: value if isinstance(value, float) else np.array(value, float) for key, value in given.items()}
    solution = icnnrt.qp(Q, p, native=native, **data)
    assert solution.status == QPStatus.SOLVED
    assert solution.residual.max() <= 1e-9
    z = solution.z
    assert 0.5 * z @ Q @ z + p @ z + constant == pytest.approx(optimum, rel=1e-8, abs=1e-8)
