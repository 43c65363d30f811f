"""The statement of quadratic programs: problems built backwards, certificates, central differences, HiGHS' optima."""

import numpy as np
import pytest
from quadratic_programs import (
    KINDS,
    SIZES,
    UNSOLVABLE,
    bundle_models,
    mixed,
    most_unsolved,
    receding_horizon,
    solvable,
    unsolvable,
)

from icnnrt.mathematics.qp_reference import QP, kkt_residual, qp_adjoint, qp_gradients, qp_solve
from icnnrt.mathematics.qp_status import STATUSES, QPStatus, advise
from icnnrt.mathematics.status import Status

each_size = pytest.mark.parametrize("size", SIZES, ids=str)
each_kind = pytest.mark.parametrize("kind", KINDS)

KKT = 1e-9  # relative, as the solver promises
# z where the problem determines it: a duality gap of 1e-12 moves z by its square root times 1/√(curvature), and less
# where constraints hold it.
UNIQUE = 1e-6
# Central, h = 1e-5: 1e-12 of the solver over h, and h² of truncation. Where Q is ill-conditioned z is known to 1e-10.
FINITE_DIFFERENCES = {"random": 1e-6, "scaled rows": 3e-6, "ill-conditioned": 1e-4}


@each_kind
@each_size
@pytest.mark.parametrize("box", [False, True], ids=["rows", "box"])
def test_what_is_solvable_is_solved(kind, size, box):
    known = solvable(0, 6, *size, kind, two_sided=box, box=box)
    solution = qp_solve(known.qp)
    feasible_linear = kind == "linear" and not box
    if feasible_linear:  # may fall without end on the way to no bound; what is told must be true
        assert set(solution.status) <= {QPStatus.SOLVED, QPStatus.DUAL_INFEASIBLE}
    else:
        unsolved = solution.status != QPStatus.SOLVED
        assert unsolved.sum() <= most_unsolved(kind), solution.residual
        assert np.isin(solution.status[unsolved], [QPStatus.INACCURATE, QPStatus.FAILED]).all()
    good = solution.status == QPStatus.SOLVED
    qp = QP(*(a[good] for a in known.qp))
    residual = kkt_residual(qp, *(a[good] for a in solution[:4]))
    assert residual.max(initial=0.0) <= KKT
    # The optimum is no worse than the point the problem was built from.
    objective = [
        0.5 * np.einsum("bi,bij,bj->b", z, qp.Q, z) + (qp.p * z).sum(1) for z in (solution.z[good], known.z[good])
    ]
    assert (objective[0] <= objective[1] + 1e-8 * (1 + np.abs(objective[1]))).all()
    if kind == "random" and size[0] > 1:  # of one variable, a row and the box may hold the same side
        for found, wanted in zip(solution[:4], known[1:], strict=True):
            assert np.abs(found - wanted).max(initial=0.0) <= UNIQUE


@pytest.mark.parametrize("seed", range(3))
def test_controllers_of_unstable_systems(seed):
    solution = qp_solve(receding_horizon(seed, 40))
    assert (solution.status == QPStatus.SOLVED).all()


@pytest.mark.parametrize("cuts", [1, 2])
def test_steps_that_cycle_are_taken_back_to_the_central_path(cuts):
    """Nine and six of these cycled for ever."""
    assert (qp_solve(bundle_models(1, 5000, cuts=cuts)).status == QPStatus.SOLVED).all()


@pytest.mark.parametrize("why", UNSOLVABLE)
@pytest.mark.parametrize("size", [(10, 10, 3), (8, 4, 2), (50, 50, 10)], ids=str)
def test_what_is_not_solvable_says_why(why, size):
    qp, wanted = unsolvable(1, 4, *size, why)
    solution = qp_solve(qp)
    assert (solution.status == wanted).all(), solution.status
    assert np.isnan(solution.z).all()
    check_rays(qp, solution)


def check_rays(qp, solution):
    n, m, q = qp.p.shape[1], qp.h.shape[1], qp.b.shape[1]
    crossed = (qp.h_lower > qp.h).any(1) | (qp.lower > qp.upper).any(1)
    for i in np.flatnonzero((solution.status == QPStatus.PRIMAL_INFEASIBLE) & ~crossed):
        d, lam, nu, mu = np.split(solution.ray[i], np.cumsum([n, m, q]))
        assert np.abs(d).max() == 0
        assert np.abs(qp.G[i].T @ lam + qp.A[i].T @ nu + mu).max() <= 1e-6
        bound = sum(
            a @ np.where(a > 0, hi, np.where(a < 0, lo, 0))
            for a, lo, hi in ((lam, qp.h_lower[i], qp.h[i]), (mu, qp.lower[i], qp.upper[i]))
        )
        assert bound + nu @ qp.b[i] == pytest.approx(-1.0)
    for i in np.flatnonzero(solution.status == QPStatus.DUAL_INFEASIBLE):
        d, rest = solution.ray[i, :n], solution.ray[i, n:]
        assert np.abs(rest).max() == 0
        assert qp.p[i] @ d == pytest.approx(-1.0)
        assert np.abs(np.concatenate([qp.Q[i] @ d, qp.A[i] @ d])).max() <= 1e-6
        assert (qp.G[i] @ d)[np.isfinite(qp.h[i])].max(initial=0.0) <= 1e-6


def test_neighbours_do_not_matter():
    qp, wanted = mixed(7)
    together = qp_solve(qp)
    assert (together.status == wanted).all(), (together.status, wanted)
    check_rays(qp, together)
    for i in range(len(wanted)):
        one = QP(*(a[i : i + 1] for a in qp))
        alone = qp_solve(one)
        assert alone.status[0] == wanted[i]
        check_rays(one, alone)  # one of many, as are the multipliers where there is no solution
        for a, b in zip(alone[:4], together[:4], strict=True):
            if wanted[i] == QPStatus.SOLVED:
                np.testing.assert_allclose(a[0], b[i], rtol=1e-6, atol=1e-9)
    bars = [np.ones_like(a) for a in together[:4]]
    d = qp_adjoint(np.nan_to_num(qp.Q), qp.G, qp.A, together, *bars)
    unsolved = wanted != QPStatus.SOLVED
    for a in d:
        assert np.isnan(a[unsolved]).all()
        assert np.isfinite(a[~unsolved]).all()


@pytest.mark.parametrize("kind", ["random", "scaled rows", "ill-conditioned"])
@pytest.mark.parametrize("box", [False, True], ids=["rows", "box"])
def test_gradients_match_central_differences(kind, box):
    rng = np.random.default_rng(5)
    qp = solvable(2, 5, 8, 6, 2, kind, two_sided=True, box=box).qp
    solution = qp_solve(qp)
    bars = [rng.standard_normal(a.shape) for a in solution[:4]]

    def loss(qp):
        return sum((bar * a).sum(1) for bar, a in zip(bars, qp_solve(qp)[:4], strict=True))

    gradients = qp_gradients(solution, qp_adjoint(qp.Q, qp.G, qp.A, solution, *bars))
    for name in qp._fields:
        value, gradient = getattr(qp, name), getattr(gradients, name)
        finite = np.where(np.isfinite(value), value, 0.0)
        v = rng.standard_normal(value.shape) * np.where(finite != 0, np.abs(finite), 0.0)
        if name == "Q":
            v = finite @ rng.standard_normal(value.shape) * 1e-1
            v = v @ v.swapaxes(1, 2)
        h = 1e-6 if kind == "ill-conditioned" and name == "Q" else 1e-5
        forward, back = (loss(qp._replace(**{name: value + sign * h * v})) for sign in (1, -1))
        numeric = (forward - back) / (2 * h)
        exact = (gradient * v).reshape(len(v), -1).sum(1)
        scale = 1 + np.abs(exact) + np.abs(gradient * v).reshape(len(v), -1).sum(1)
        assert (np.abs(numeric - exact) <= FINITE_DIFFERENCES[kind] * scale).all(), (name, numeric, exact)


def test_a_warm_start_leads_to_the_same_answer():
    qp = solvable(3, 6, 12, 9, 3, two_sided=True, box=True).qp
    cold = qp_solve(qp)
    near = qp._replace(p=qp.p + 1e-3)
    warm = qp_solve(near, (cold.z, cold.lam, cold.nu, cold.mu))
    again = qp_solve(near)
    assert (warm.status == QPStatus.SOLVED).all()
    np.testing.assert_allclose(warm.z, again.z, atol=UNIQUE)


def test_optima_agree_with_scipy():
    from scipy.optimize import LinearConstraint, minimize

    qp = solvable(4, 3, 6, 5, 2, two_sided=True, box=True).qp
    solution = qp_solve(qp)
    for i in range(3):
        Q, p = qp.Q[i], qp.p[i]
        found = minimize(
            lambda z, Q=Q, p=p: 0.5 * z @ Q @ z + p @ z,
            np.zeros(6),
            jac=lambda z, Q=Q, p=p: Q @ z + p,
            method="trust-constr",
            bounds=list(zip(qp.lower[i], qp.upper[i], strict=True)),
            constraints=[
                LinearConstraint(qp.G[i], qp.h_lower[i], qp.h[i]),
                LinearConstraint(qp.A[i], qp.b[i], qp.b[i]),
            ],
            options={"gtol": 1e-10, "xtol": 1e-12, "maxiter": 3000},
        )
        value = 0.5 * solution.z[i] @ Q @ solution.z[i] + p @ solution.z[i]
        assert value <= found.fun + 1e-7


def test_every_status_gives_advice():
    for status in (*STATUSES, Status.NOT_FINITE):
        text = advise(status, residual=(1e-3, 1e-3, 1e-3), steps=50)
        assert text
        assert not text.endswith(".")
