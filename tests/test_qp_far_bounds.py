"""Bounds that are far beyond z, as "my infinity is 1e10" makes them: every way to solve quadratic programs.

A program with such bounds has the answer of that without them; but where nothing else holds z, it has the one at them.
"""

import numpy as np
import pytest
from qp_backends import BACKENDS, BODIES
from quadratic_programs import solvable

import icnnrt
from icnnrt.mathematics.qp_advice import far_bound
from icnnrt.mathematics.qp_reference import QP, kkt_residual
from icnnrt.mathematics.status import Status

each = pytest.mark.parametrize("way", BACKENDS)
FAR = [1e6, 1e9, 1e12, 1e15, 9e19]


def with_far_bounds(seed, far, kind, all_of_them=True, sizes=(12, 8, 3), B=4):
    """Sides that no multiplier pushes from are as good as none; the answer stays."""
    known = solvable(seed, B, *sizes, kind=kind, two_sided=True, box=True)
    rng = np.random.default_rng(seed)
    Q, p, G, h_lower, h, A, b, lower, upper = known.qp

    def opened(low, high, multiplier):
        chosen = np.ones(low.shape, bool) if all_of_them else rng.random(low.shape) < 0.4
        return np.where(chosen & (multiplier >= 0), -far, low), np.where(chosen & (multiplier <= 0), far, high)

    (h_lower, h), (lower, upper) = opened(h_lower, h, known.lam), opened(lower, upper, known.mu)
    return QP(Q, p, G, h_lower, h, A, b, lower, upper), known


@each
@pytest.mark.parametrize("far", FAR)
@pytest.mark.parametrize("kind", ["low rank", "linear", "random"])
def test_far_bounds_change_no_answer(way, kind, far):
    for all_of_them in (True, False):
        qp, known = with_far_bounds(1, far, kind, all_of_them)
        found = BACKENDS[way].solve(qp)
        assert (found.status == Status.CONVERGED).all(), found.status
        assert kkt_residual(qp, *found[:4]).max() <= 1e-9
        objectives = [(0.5 * z * (qp.Q @ z[..., None])[..., 0] + qp.p * z).sum(1) for z in (found.z, known.z)]
        np.testing.assert_allclose(objectives[0], objectives[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("way", [way for way in BACKENDS if way != "torch"])
@pytest.mark.parametrize("far", [1e6, 1e10, 1e15])
def test_far_bounds_change_no_answer_in_float32(way, far):
    qp, _ = with_far_bounds(2, far, "low rank")
    assert (BACKENDS[way].solve(qp, dtype=np.float32).status == Status.CONVERGED).all()


@each
def test_slacks_of_far_bounds_are_what_they_are(way):
    """Of rows that are nearer to them, or have none but them; 1 is what a row without a bound has."""
    if way in ("torch", "session"):
        pytest.skip("hands out no slacks")
    qp, _ = with_far_bounds(3, 1e12, "linear")
    found = BACKENDS[way].solve(qp)
    slack, free = found.handed.box_slack, found.mu == 0
    assert free.any()
    assert (slack > 0).all()
    np.testing.assert_allclose(slack[free], 1e12, rtol=1e-3)


@each
@pytest.mark.parametrize("far", [1e6, 1e10])
def test_an_answer_at_a_far_bound_is_found(way, far):
    """Of a linear objective, in variables that nothing else holds; others are held near 1."""
    p = np.array([[1.0, -1.0, 0.0, 2.0], [0.0, -1.0, 3.0, 0.5]])
    G, box = np.array([[[0.0, 0.0, 1.0, 1.0]]] * 2), np.array([[far, 1.0, 1.0, 1.0], [1.0, far, 1.0, 1.0]])
    none = np.full((2, 1), -np.inf)
    qp = QP(np.zeros((2, 4, 4)), p, G, none, np.ones((2, 1)), np.zeros((2, 0, 4)), np.zeros((2, 0)), -box, box)
    found = BACKENDS[way].solve(qp)
    assert (found.status == Status.CONVERGED).all(), found.status
    np.testing.assert_allclose(found.z[[0, 1], [0, 1]], [-far, far], rtol=1e-6)


@each
def test_far_bounds_hide_no_contradiction(way):
    """To a z of 1e10, a row that is off by 1 is nothing; the rows still contradict each other."""
    G = np.array([[[1.0, -0.5, 0.25], [-1.0, 0.5, -0.25]]])
    h, box, none = -np.ones((1, 2)), np.full((1, 3), 1e10), np.full((1, 2), -np.inf)
    for Q in (np.zeros((1, 3, 3)), np.eye(3)[None]):
        qp = QP(Q, np.ones((1, 3)), G, none, h, np.zeros((1, 0, 3)), np.zeros((1, 0)), -box, box)
        assert (BACKENDS[way].solve(qp).status == Status.INFEASIBLE).all()


@each
def test_samples_with_far_bounds_leave_their_neighbours_alone(way):
    near, _ = with_far_bounds(5, 1.0e3, "low rank")
    far, _ = with_far_bounds(5, 1.0e12, "low rank")
    alone = BACKENDS[way].solve(QP(*(a[:1] for a in near)))
    beside = BACKENDS[way].solve(QP(*(np.concatenate([a[:1], b[1:]]) for a, b in zip(near, far, strict=True))))
    assert (beside.status == Status.CONVERGED).all()
    np.testing.assert_allclose(beside.z[:1], alone.z, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("huge", [1e20, 1e200])
def test_a_start_of_huge_numbers_is_begun_again_cold(huge):
    qp, _ = with_far_bounds(6, 1e3, "low rank")
    cold = BODIES.solve(qp)
    start = [np.full_like(a, huge) for a in cold[:4]]
    for way in BACKENDS:
        if way in ("bodies", "kernels", "reference"):
            found = BACKENDS[way].solve(qp, start=start)
            assert (found.status == Status.CONVERGED).all(), way
            np.testing.assert_allclose(found.z, cold.z, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("way", ["bodies", "kernels", "reference"])
def test_after_a_start_that_leads_nowhere_far_bounds_are_left_out_as_without_one(way):
    """The start is the answer of a program nearby, at the far bound of a variable that the objective leaves free."""
    far = 1e12
    known = np.array([[-1.5, -1.0, -3.0]])  # z[1] may be anything below -1
    qp = QP(
        *(np.zeros((1, 3, 3)), np.array([[1.0, 0.0, 2.0]]), np.array([[[0.0, 1.0, -1.0]]])),
        *(np.full((1, 1), -np.inf), np.full((1, 1), 2.0), np.array([[[-2.0, 0.0, 1.0]]]), np.zeros((1, 1))),
        *(np.array([[-3.0, -far, -3.0]]), np.array([[0.0, far, -1.0]])),
    )
    near = BACKENDS[way].solve(qp._replace(p=np.array([[1.0, 1.0, 2.0]])))
    start = [np.array([[-1.21, -far, -2.42]]), *(np.zeros_like(a) for a in near[1:4])]
    for begin in ([*near[:4]], start):
        found = BACKENDS[way].solve(qp, start=begin)
        assert (found.status == Status.CONVERGED).all(), found.status
        np.testing.assert_allclose(found.z[:, ::2], known[:, ::2], rtol=1e-6)


@pytest.mark.parametrize("native", [None, False])
def test_where_far_bounds_defeat_the_solver_the_advice_names_one(native):
    """Two variables at 1 and one at 1e15, in one objective: next to that, 1 is rounding."""
    Q, p = np.diag([1.0, 1.0, 0.0]), np.array([-3.0, 0.5, 1.0])
    found = icnnrt.qp(Q, p, lower=[-1.0, -1.0, -1e15], upper=[1.0, 1.0, np.inf], native=native)
    named = "lower[2] = -1e+15 is far beyond the other data: pass inf or -inf where there is no bound" in found.advice()
    assert found.ok != named


def test_advice_names_the_farthest_bound_where_there_is_no_answer():
    data = {"lower": np.array([0.0, -1e10]), "upper": np.array([1.0, np.inf]), "h": np.array([1e12, 1e20, 3.0])}
    told = far_bound(Status.SOLVER, data)
    assert "h[0] = 1e+12 and 1 more bounds are far" in told
    assert "row 0 of G" in told
    assert far_bound(Status.CONVERGED, data) == ""
    assert far_bound(Status.INACCURATE, {"lower": np.array([-1e8]), "h": np.zeros(0)}) == ""
    assert "lower[1] = -1e+10" in far_bound(Status.INACCURATE, {"lower": data["lower"]})
