"""Where the native kernel solves by an active set: its answers are those of the interior point method.

The statement over `xp` knows no active set: the reference and the portable bodies are two witnesses of what it finds.
"""

import numpy as np
import pytest
from qp_backends import BODIES, KERNELS, NATIVE, Reference
from quadratic_programs import UNSOLVABLE, solvable, unsolvable

import icnnrt
from icnnrt.mathematics.qp_reference import QP, kkt_residual
from icnnrt.mathematics.status import Status

pytestmark = pytest.mark.skipif(not KERNELS, reason="the native library is not built")

SIZES = ((1, 1, 0), (4, 6, 0), (10, 5, 0), (10, 10, 3), (12, 40, 2))
each_size = pytest.mark.parametrize("size", SIZES, ids=str)
REFERENCE = Reference()


def by_active_set(answer):
    return answer.handed.steps == 1


def independent(known):
    """[B]: whether the constraints that hold z are, which makes multipliers the only ones."""
    rows = (
        np.concatenate([A, G[lam != 0], np.eye(len(mu))[mu != 0]])
        for G, A, lam, mu in zip(known.qp.G, known.qp.A, known.lam, known.mu, strict=True)
    )
    return np.array([np.linalg.matrix_rank(held) == len(held) for held in rows])


def close(a, b):
    for x, y in zip(a[:4], b[:4], strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7)


@each_size
@pytest.mark.parametrize("box", [False, True])
@pytest.mark.parametrize("two_sided", [False, True])
def test_the_only_answer_is_found(size, two_sided, box):
    known = solvable(11, 20, *size, two_sided=two_sided, box=box)
    only = independent(known)
    assert only.any()
    qp = QP(*(a[only] for a in known.qp))
    found = NATIVE.solve(qp)
    # Where very many constraints are in the way, the interior point method is left to it.
    assert by_active_set(found).mean() >= (1.0 if sum(size) < 30 else 0.5)
    assert (found.status == Status.CONVERGED).all()
    assert (kkt_residual(qp, *found.handed[:4]) <= 1e-11).all()
    close(found, REFERENCE.solve(qp))
    np.testing.assert_allclose(found.z, known.z[only], atol=1e-7)
    # What pushes has next to no slack, and what does not has its distance.
    for multiplier, slack in ((found.lam, found.handed.slack), (found.mu, found.handed.box_slack)):
        assert (slack > 0).all()
        assert ((slack < 1e-9) == (multiplier != 0)).all()
    # Others are solved as ever.
    rest = NATIVE.solve(QP(*(a[~only] for a in known.qp))) if not only.all() else None
    assert rest is None or not by_active_set(rest).any()


@pytest.mark.parametrize("kind", ["duplicate rows", "dependent equalities", "degenerate"])
def test_where_it_is_not_the_only_one_nothing_changes(kind):
    known = solvable(12, 40, 8, 6, 3, kind=kind, two_sided=True, box=True)
    found, body = NATIVE.solve(known.qp), BODIES.solve(known.qp)
    np.testing.assert_array_equal(found.status == Status.CONVERGED, body.status == Status.CONVERGED)
    both = (found.status == Status.CONVERGED) & (body.status == Status.CONVERGED)
    np.testing.assert_allclose(found.z[both], body.z[both], rtol=1e-5, atol=1e-6)
    if kind == "dependent equalities":
        assert not by_active_set(found).any()
    if kind == "duplicate rows":
        pushed = (known.lam[:, 0] > 0) & both  # from above, where the two rows are the same
        assert pushed.any()
        assert not by_active_set(found)[pushed].any()
        np.testing.assert_allclose(found.lam[pushed, 0], found.lam[pushed, 1], rtol=1e-6)


def test_bounds_that_are_equal_hold_and_say_so():
    known = solvable(13, 30, 9, 6, 1, two_sided=True, box=True)
    rows, fixed = known.qp.h_lower.copy(), known.qp.lower.copy()
    h, upper = known.qp.h.copy(), known.qp.upper.copy()
    rows[:, 0] = h[:, 0] = (known.qp.G[:, 0] * known.z).sum(1)
    fixed[:, 4] = upper[:, 4] = known.z[:, 4]
    qp = known.qp._replace(h_lower=rows, h=h, lower=fixed, upper=upper, p=known.qp.p + 0.1)
    found = NATIVE.solve(qp)
    assert (found.status == Status.CONVERGED).all()
    assert by_active_set(found).mean() > 0.8
    assert (found.handed.slack[:, 0] == 0).all()
    assert (found.handed.box_slack[:, 4] == 0).all()
    np.testing.assert_allclose(found.z[:, 4], known.z[:, 4], rtol=0, atol=1e-12)
    close(found, REFERENCE.solve(qp))


@pytest.mark.parametrize("moved", [1e-9, 1e-3, 0.3, 3.0])
def test_a_start_from_another_active_set(moved):
    known = solvable(14, 30, 10, 12, 2, two_sided=True, box=True)
    start = NATIVE.solve(known.qp)[:4]
    qp = known.qp._replace(p=known.qp.p + moved * np.random.default_rng(0).standard_normal(known.qp.p.shape))
    found, cold = NATIVE.solve(qp, start=start), NATIVE.solve(qp)
    assert (found.status == Status.CONVERGED).all()
    close(found, cold)
    close(found, REFERENCE.solve(qp))


@pytest.mark.parametrize("kind", UNSOLVABLE)
def test_what_has_no_answer_is_told_as_before(kind):
    qp, status = unsolvable(15, 6, 6, 5, 2, kind)
    found, body = NATIVE.solve(qp), BODIES.solve(qp)
    np.testing.assert_array_equal(found.status, body.status)
    assert (found.handed.status == status).all()


@each_size
def test_gradients_are_those_of_the_answer(size):
    known = solvable(16, 9, *size, two_sided=True, box=True)
    qp = QP(*(a[np.flatnonzero(independent(known))[0]] for a in known.qp))
    rng = np.random.default_rng(1)

    def solve(qp):
        bounds = {name: getattr(qp, name) for name in ("h_lower", "lower", "upper")}
        return icnnrt.qp(*(getattr(qp, name) for name in "QpGhAb"), **bounds, native=True)

    solution = solve(qp)
    assert solution.steps == 1
    bars = [rng.standard_normal(a.shape) for a in (solution.z, solution.lam, solution.nu, solution.bound_multipliers)]
    gradients = solution.vjp(*bars)
    assert gradients.reliable

    def loss(qp):
        found = solve(qp)
        assert found.steps == 1
        answer = found.z, found.lam, found.nu, found.bound_multipliers
        return sum(float((bar * a).sum()) for bar, a in zip(bars, answer, strict=True))

    for name in QP._fields:
        data = getattr(qp, name)
        finite = np.where(np.isfinite(data), data, 0.0)
        direction = np.where(np.isfinite(data), rng.standard_normal(data.shape), 0.0)
        if name == "Q":
            direction = direction + direction.T
        step = 1e-6
        ahead, back = (
            loss(qp._replace(**{name: np.where(np.isfinite(data), finite + sign * step * direction, data)}))
            for sign in (1, -1)
        )
        wanted = (np.where(np.isfinite(data), getattr(gradients, name), 0.0) * direction).sum()
        assert (ahead - back) / (2 * step) == pytest.approx(wanted, rel=1e-5, abs=1e-5)


# --- One program, without onnxruntime ------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("settings", [{}, {"tolerance": 1e-3, "steps": 4}, {"seconds": 1e3}], ids=str)
def test_one_program_has_the_bits_of_one_of_many(dtype, warm, settings):
    known = solvable(17, 2, 7, 6, 2, two_sided=True, box=True)
    qp = QP(*(a.astype(dtype) for a in known.qp))
    made = {"dtype": dtype, "box": True, "two_sided": True, "warm": warm, **settings}
    many, one = icnnrt.QPSolver(7, 6, 2, batch=2, **made), icnnrt.QPSolver(7, 6, 2, **made)
    names = ("z", "lam", "nu", "bound_multipliers", "slack", "box_slack", "residual", "status", "ray", "steps")
    for moved in (0.0, 0.01, 1.0):
        data = qp._replace(p=(qp.p + moved).astype(dtype))
        rest = {name: getattr(data, name) for name in ("lower", "upper", "h_lower")}
        many.solve(*(getattr(data, name) for name in "QpGhAb"), **rest)
        one.solve(*(getattr(data, name)[0] for name in "QpGhAb"), **{name: a[0] for name, a in rest.items()})
        for name in names:
            np.testing.assert_array_equal(getattr(one, name)[0], getattr(many, name)[0])
        bar = np.ones((2, 7), dtype)
        for a, b in zip(one.vjp(bar[:1]), many.vjp(bar), strict=True):
            np.testing.assert_array_equal(a[0], b[0])
        assert one.reliable[0] == many.reliable[0]
        assert one.advice() == many.advice(0)


def test_an_unsound_program_alone_is_told():
    solver = icnnrt.QPSolver(2, 1)
    solver.solve(np.eye(2), np.array([1.0, np.nan]), np.ones((1, 2)), np.ones(1))
    assert np.isnan(solver.z).all()
    assert solver.status[0] == Status.NOT_FINITE_INPUT
    solver.solve(p=np.ones(2))
    assert solver.ok
    np.testing.assert_allclose(solver.z, -np.ones((1, 2)))
