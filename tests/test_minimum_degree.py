"""The order of minimum degree, and the pattern of the factor that goes with it."""

import itertools

import numpy as np
import pytest
from scipy import sparse
from scipy.sparse.linalg import splu
from sparse_programs import mpc, scattered, sizes

from icnnrt.mathematics.minimum_degree import minimum_degree
from icnnrt.mathematics.qp_pattern import QPPattern


def graph_of(pattern):
    return [sum(1 << int(j) for j in np.flatnonzero(row) if j != i) for i, row in enumerate(pattern)]


def dense(symbolic):
    order, starts, rows = symbolic
    L = np.eye(len(order), dtype=bool)
    for j in range(len(order)):
        L[rows[starts[j] : starts[j + 1]], j] = True
    return L


def symmetric(N, density, seed):
    rng = np.random.default_rng(seed)
    pattern = np.triu(rng.random((N, N)) < density, 1)
    return pattern | pattern.T | np.eye(N, dtype=bool)


@pytest.mark.parametrize("N", [1, 2, 3, 8, 40])
@pytest.mark.parametrize("density", [0.0, 0.05, 0.3, 1.0])
def test_the_symbolic_factor_is_the_pattern_of_the_numeric_one(N, density):
    for seed in range(5):
        pattern = symmetric(N, density, seed)
        found = minimum_degree(graph_of(pattern))
        assert sorted(found.order) == list(range(N))
        rng = np.random.default_rng(seed)
        M = np.tril(pattern * rng.uniform(0.5, 1.0, (N, N)), -1)
        M = M + M.T + np.diag(np.full(N, 2.0 * N))
        numeric = np.abs(np.linalg.cholesky(M[np.ix_(found.order, found.order)])) > 1e-300
        # Generic numbers cancel nowhere: no entry of the factor is missing, and none is listed that is not there.
        np.testing.assert_array_equal(dense(found), numeric)


def test_no_order_of_a_small_graph_is_much_better():
    for seed in range(30):
        pattern = symmetric(6, 0.4, seed)
        found = len(minimum_degree(graph_of(pattern)).rows)
        least = min(_fill(pattern, order) for order in itertools.permutations(range(6)))
        assert least <= found <= least + 1


def _fill(pattern, order):
    graph = pattern[np.ix_(order, order)].copy()
    for k in range(len(graph)):
        after = np.flatnonzero(graph[k, k + 1 :]) + k + 1
        graph[np.ix_(after, after)] = True
    return int(np.tril(graph, -1).sum())


@pytest.mark.parametrize(
    "program",
    [
        mpc(30),
        mpc(10, rows=True),
        scattered(60, 40, 15, 0.05),
        scattered(200, 100, 50, 0.01),
        scattered(80, 0, 20, 0.1),
    ],
    ids=["mpc", "mpc with rows", "scattered", "large", "no G"],
)
def test_the_factor_is_about_as_sparse_as_that_of_superlu(program):
    n, m, q = sizes(program)
    pattern = QPPattern(program["Q"], program.get("G"), program.get("A"))
    assert (pattern.n, pattern.m, pattern.q) == (n, m, q)
    C = np.concatenate([program[name] for name in "AG" if name in program])
    K = np.block([[program["Q"] + 10.0 * np.eye(n), C.T], [C, -np.eye(len(C))]])
    theirs = splu(
        sparse.csc_matrix(K), permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options={"SymmetricMode": True}
    )
    of_K, of_L = pattern.entries
    assert of_K == np.count_nonzero(np.tril(K))
    assert of_K <= of_L <= 1.5 * theirs.L.nnz


def test_what_is_used_together_lies_together():
    found = minimum_degree(graph_of(symmetric(60, 0.06, 3)))
    # Post-order: the columns of every subtree of eliminations are one range that ends with its root.
    first = np.arange(60)
    parent = [found.rows[a] if a < b else 60 for a, b in itertools.pairwise(found.starts)]
    size = np.ones(60, int)
    for j, above in enumerate(parent):
        if above < 60:
            size[above] += size[j]
            first[above] = min(first[above], first[j])
    np.testing.assert_array_equal(first, np.arange(60) - size + 1)


def test_a_row_that_is_connected_to_all_comes_last():
    pattern = np.eye(50, dtype=bool)
    pattern[7] = pattern[:, 7] = True
    found = minimum_degree(graph_of(pattern))
    assert len(found.rows) == 49
    assert 7 in found.order[-2:]
