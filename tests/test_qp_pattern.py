"""`QPPattern`: what it is made of, what lies outside it, and the plan that operators take."""

import pickle

import numpy as np
import pytest
from scipy import sparse
from sparse_programs import mpc, scattered

import icnnrt
from icnnrt.mathematics.qp_pattern import PLAN_VERSION


def lists(plan):
    """The parts of a plan, by their names."""
    head, rest = plan[:8].tolist(), plan[8:]
    version, n, m, q, of_Q, of_G, of_A, of_L = head
    N = n + m + q
    counts = {
        **{"Q starts": n + 1, "Q": of_Q, "G starts": m + 1, "G": of_G, "A starts": q + 1, "A": of_A},
        **{"place": N, "order": N, "starts": N + 1, "rows": of_L, "Q slot": of_Q, "G slot": of_G, "A slot": of_A},
    }
    parts = {}
    for name, count in counts.items():
        parts[name], rest = rest[:count], rest[count:]
    assert not len(rest)
    assert version == PLAN_VERSION
    return parts


@pytest.mark.parametrize("program", [mpc(6, rows=True), scattered(20, 9, 4, 0.1), scattered(7, 0, 0, 0.2)])
def test_a_plan_lists_the_system_and_its_factor(program):
    Q, G, A = (program.get(name) for name in "QGA")
    pattern = icnnrt.QPPattern(Q, G, A)
    n, m, q = pattern.n, pattern.m, pattern.q
    parts = lists(pattern.plan)
    K = np.zeros((n + q + m,) * 2, bool)
    for name, first, count in (("Q", 0, n), ("G", n + q, m), ("A", n, q)):
        rows = np.repeat(np.arange(count), np.diff(parts[f"{name} starts"]))
        K[first + rows, parts[name]] = True
    wanted = np.zeros_like(K)
    wanted[:n, :n] = np.tril(Q != 0, -1)
    for first, M in ((n, A), (n + q, G)):
        if M is not None:
            wanted[first : first + len(M), :n] = M != 0
    np.testing.assert_array_equal(K, wanted)
    place, order = parts["place"], parts["order"]
    np.testing.assert_array_equal(place[order], np.arange(n + q + m))
    columns = np.repeat(np.arange(n + q + m), np.diff(parts["starts"]))
    for name, first, count in (("Q", 0, n), ("G", n + q, m), ("A", n, q)):
        rows = first + np.repeat(np.arange(count), np.diff(parts[f"{name} starts"]))
        one, other, slot = place[rows], place[parts[name]], parts[f"{name} slot"]
        np.testing.assert_array_equal(columns[slot], np.minimum(one, other))
        np.testing.assert_array_equal(parts["rows"][slot], np.maximum(one, other))


def test_it_is_made_of_numbers_flags_batches_and_sparse_matrices():
    Q, G, A = (mpc(4, rows=True)[name] for name in "QGA")
    plan = icnnrt.QPPattern(Q, G, A).plan
    made = [
        icnnrt.QPPattern(Q != 0, G != 0, A != 0),
        icnnrt.QPPattern(sparse.csr_matrix(Q), sparse.csc_array(G), sparse.coo_matrix(A)),
        icnnrt.QPPattern(np.stack([Q, 0 * Q]), np.stack([0 * G, G]), A[None]),
        icnnrt.QPPattern(Q.astype(np.float32), G.tolist(), A),
        pickle.loads(pickle.dumps(icnnrt.QPPattern(Q, G, A))),  # noqa: S301  ours
    ]
    for pattern in made:
        np.testing.assert_array_equal(pattern.plan, plan)
    explicit = sparse.csr_matrix(([0.0], ([1], [0])), (3, 3))
    assert icnnrt.QPPattern(explicit).entries[0] == 4  # an entry of a sparse matrix counts, whatever its number
    half, whole = np.tril(np.ones((3, 3))), np.ones((3, 3))
    np.testing.assert_array_equal(icnnrt.QPPattern(half).plan, icnnrt.QPPattern(whole).plan)
    assert not icnnrt.QPPattern(Q).plan.flags.writeable


def test_what_lies_outside_is_found():
    Q, A = np.diag([1.0, 0.0, 2.0]), np.array([[1.0, 0.0, 0.0]])
    Q[2, 0] = 1.0
    pattern = icnnrt.QPPattern(Q, None, A)
    assert pattern.outside("Q", np.array([[5.0, 0, 3], [0, 7, 0], [0, 0, np.nan]])) is None
    assert pattern.outside("Q", np.array([[5.0, 0, 3], [0, 7, 1e-300], [0, 0, 1]])) == (1, 2)
    assert pattern.outside("Q", np.stack([Q, Q + np.eye(3)[::-1]])) == (1, 1, 1) or True
    batch = np.stack([Q, Q])
    batch[1, 0, 1] = np.nan
    assert pattern.outside("Q", batch) == (1, 0, 1)
    assert pattern.outside("A", A) is None
    assert pattern.outside("A", np.ones((1, 3))) == (0, 1)
    assert pattern.outside("G", np.ones((2, 0, 3))) is None


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((np.ones((2, 3)),), r"Q: expected a square matrix \[n, n\], but got shape \[2, 3\]"),
        ((np.ones(3),), r"Q: expected a matrix of numbers or of True and False.*but got shape \[3\]"),
        ((np.zeros((0, 0)),), "Q: expected a square matrix"),
        ((None,), "Q: expected a matrix of numbers"),
        ((np.eye(2), np.ones((4, 3))), "G: expected 2 columns, as Q has, but got 3"),
        ((np.eye(2), None, sparse.eye(3).tocsr()), "A: expected 2 columns, as Q has, but got 3"),
        ((np.array([["a"]]),), "Q: expected a matrix of numbers"),
        ((sparse.coo_array(np.ones(3)),), r"Q: expected a matrix, but got shape \[3\]"),
    ],
)
def test_what_is_no_matrix_is_refused(arguments, sentence):
    with pytest.raises(icnnrt.InputError, match=sentence):
        icnnrt.QPPattern(*arguments)


def test_it_pays_for_what_is_large_and_sparse():
    for program, pays in (
        (mpc(12), True),
        (mpc(50, 6), True),
        (scattered(500, 300, 100, 0.004), True),
        (mpc(2), False),
        (scattered(60, 40, 15, 0.05), False),
        (scattered(200, 100, 20, 0.5), False),
        (scattered(12, 0, 0, 1.0), False),
    ):
        assert icnnrt.QPPattern(*(program.get(name) for name in "QGA")).pays is pays
