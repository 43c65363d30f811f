"""The order in which rows of a sparse symmetric matrix are eliminated, and the pattern of its factor in that order.

To eliminate a row connects all rows that are connected to it to each other: they are its column of L. The order of
minimum degree takes the row next that is connected to the fewest (George and Liu, *The evolution of the minimum degree
ordering algorithm*, SIAM Review 1989). A set of rows is one integer of Python here, a bit for each row, so that the
graph itself is kept, and every degree is exact: each entry of L costs one `or` of two such integers and one count.
"""

import heapq
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Symbolic", "minimum_degree"]

Ints = NDArray[np.int64]


class Symbolic(NamedTuple):
    """The pattern of L in PKP' = LDL', N rows."""

    order: Ints  # [N] the row of K that is eliminated first, and so on
    starts: Ints  # [N + 1] where the columns of L begin
    rows: Ints  # below its diagonal, column by column, ascending: places in the order


def minimum_degree(graph: Sequence[int]) -> Symbolic:
    """The symbolic factor of a matrix [N, N] in the order of minimum degree.

    graph: of each row the others that it is connected to, as a sum of 2^row; symmetric, without the row itself
    """
    adjacent = list(graph)
    N = len(adjacent)
    queue = [(row.bit_count(), at) for at, row in enumerate(adjacent)]
    heapq.heapify(queue)
    degrees: list[int] = [row.bit_count() for row in adjacent]
    columns: list[int] = [0] * N
    order: list[int] = []
    while queue:
        degree, pivot = heapq.heappop(queue)
        if degree != degrees[pivot]:
            continue  # it has changed since
        degrees[pivot] = -1
        order.append(pivot)
        columns[pivot] = clique = adjacent[pivot]
        gone = ~(1 << pivot)
        for row in _bits(clique):
            adjacent[row] = joined = (adjacent[row] | clique) & gone & ~(1 << row)
            found = joined.bit_count()
            if found != degrees[row]:
                degrees[row] = found
                heapq.heappush(queue, (found, row))
    return _listed(*_postordered(order, columns))


def _postordered(order: list[int], columns: list[int]) -> tuple[list[int], list[list[int]]]:
    """The same factor with every subtree of eliminations in one piece: what is used together lies together.

    order, columns: the rows, and the column of each as a set
    Returns the new order and the columns, as lists of rows.
    """
    place = {row: at for at, row in enumerate(order)}
    listed = {row: list(_bits(columns[row])) for row in order}
    children: dict[int, list[int]] = {row: [] for row in order}
    roots = []
    for row in order:  # the parent is the first of the column
        if listed[row]:
            children[min(listed[row], key=place.__getitem__)].append(row)
        else:
            roots.append(row)
    found: list[int] = []
    stack = [(row, False) for row in reversed(roots)]
    while stack:
        row, entered = stack.pop()
        if entered:
            found.append(row)
            continue
        stack.append((row, True))
        stack.extend((child, False) for child in reversed(children[row]))
    return found, [listed[row] for row in found]


def _listed(order: list[int], columns: list[list[int]]) -> Symbolic:
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    rows = [np.sort(place[column]) for column in columns]
    starts = np.concatenate([[0], np.cumsum([len(row) for row in rows], dtype=np.int64)])
    return Symbolic(np.array(order, np.int64), starts.astype(np.int64), np.concatenate([np.empty(0, np.int64), *rows]))


def _bits(row: int) -> Iterator[int]:
    while row:
        low = row & -row
        yield low.bit_length() - 1
        row ^= low
