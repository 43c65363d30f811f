"""The bundle method over a polyhedron: against Newton's method and epigraphs, its certificate, finite differences."""

import numpy as np
import pytest
from references import sigmoid, softplus

from icnnrt.mathematics.bundle_qp import bundle_qp_adjoint, bundle_qp_argmin, bundle_qp_implicit
from icnnrt.mathematics.polyhedron_programs import Polyhedron
from icnnrt.mathematics.qp_reference import QP, qp_solve
from icnnrt.mathematics.status import Status

B, N, UNITS, MU = 4, 5, 12, 0.2
# Central with h = 1e-5 of an algorithm whose programs are solved to 1e-12, relative to the size of the gradient.
DIFFERENCES = 1e-5
# Of a y that is known to √(2 gap/μ).
GAP = 1e-9


def apply(M, a):
    return (M @ a[..., None])[..., 0]


class Energy:
    """f = Σ v g(Wy + c) with g softplus or ReLU: value, gradient, curvature, and θ̄'(dW, dc), θ = (W, c)."""

    def __init__(self, smooth, seed=0):
        rng = np.random.default_rng(seed)
        self.smooth = smooth
        self.W, self.c = rng.standard_normal((B, UNITS, N)), rng.standard_normal((B, UNITS))
        self.v = rng.random((B, UNITS))

    def moved(self, dW, dc):
        other = Energy(self.smooth)
        other.W, other.c, other.v = self.W + dW, self.c + dc, self.v
        return other

    def slope(self, s):
        return sigmoid(s) if self.smooth else (s > 0) * 1.0

    def __call__(self, y):
        s = apply(self.W, y) + self.c
        f = (self.v * (softplus(s) if self.smooth else np.maximum(s, 0.0))).sum(1)
        return f, apply(self.W.swapaxes(1, 2), self.v * self.slope(s))

    def hessian(self, y):
        s = apply(self.W, y) + self.c
        return self.W.swapaxes(1, 2) @ ((self.v * sigmoid(s) * sigmoid(-s))[..., None] * self.W) * self.smooth

    def hvp(self, y, d):
        return apply(self.hessian(y), d)

    def along(self, cotangents, dW, dc, slopes):
        """θ̄'(dW, dc), on the faces of f that the cuts are of."""
        total = 0.0
        for i in range(cotangents.points.shape[1]):
            y = cotangents.points[:, i]
            s, ds = apply(self.W, y) + self.c, apply(dW, y) + dc
            on = self.slope(s)
            if not self.smooth:  # at a kink, to rounding, the slope of the cut tells the face
                near = np.abs(s) < 1e-9
                for b in np.flatnonzero(near.any(1)):
                    at = np.flatnonzero(near[b])
                    trials = np.array(np.meshgrid(*[[0.0, 1.0]] * len(at))).reshape(len(at), -1).T
                    off = []
                    for trial in trials:
                        face = on[b].copy()
                        face[at] = trial
                        off.append(np.abs(self.W[b].T @ (self.v[b] * face) - slopes[b, i]).max())
                    on[b, at] = trials[np.argmin(off)]
            df = (self.v * on * ds).sum(1)
            dg = apply(dW.swapaxes(1, 2), self.v * on)
            if self.smooth:
                dg = dg + apply(self.W.swapaxes(1, 2), self.v * on * (1 - on) * ds)
            total = total + cotangents.cuts.offset_bar[:, i] * df + (cotangents.cuts.seed[:, i] * dg).sum(1)
        return total


def polyhedron(seed=1, rows=3, equalities=1):
    rng = np.random.default_rng(seed)
    y = 0.3 * rng.standard_normal((B, N))
    G, A = rng.standard_normal((B, rows, N)), rng.standard_normal((B, equalities, N))
    upper = np.where(rng.random((B, N)) < 0.5, np.inf, y + 0.5 * rng.random((B, N)))
    return Polyhedron(G, apply(G, y) + 0.3 * rng.random((B, rows)), A, apply(A, y), y - rng.random((B, N)), upper)


def violation(P, y):
    parts = (apply(P.G, y) - P.h, np.abs(apply(P.A, y) - P.b), P.lower - y, y - P.upper)
    return max(a.max(initial=0.0) for a in parts)


def newton(energy, P, y):
    """The argmin of a smooth energy, by sequential quadratic programs."""
    n = np.full(P.h.shape, -np.inf)
    for _ in range(20):
        (_, g), H = energy(y), energy.hessian(y)
        y = qp_solve(QP(H + MU * np.eye(N), g - apply(H, y), P.G, n, *P[1:])).z
    return y


def test_a_smooth_optimum_is_newtons():
    energy, P = Energy(True), polyhedron()
    found = bundle_qp_argmin(energy, P, 60, MU, tolerance=GAP)
    assert (found.status == Status.CONVERGED).all()
    assert (found.cuts < 60).all()
    y = newton(energy, P, found.y)
    optimum = energy(y)[0] + 0.5 * MU * (y * y).sum(1)
    assert (np.abs(found.energy - optimum) <= 2 * GAP).all()
    assert (found.lower_bound <= optimum + 1e-11).all()
    assert np.abs(found.y - y).max() <= np.sqrt(2 * 2 * GAP / MU)
    assert violation(P, found.y) <= 1e-8


def test_an_energy_of_pieces_is_solved_exactly():
    """Against its epigraph as one program."""
    energy, P = Energy(False), polyhedron()
    found = bundle_qp_argmin(energy, P, 60, MU)
    assert (found.status == Status.CONVERGED).all()
    # z = (y, t): min v't + (μ/2) ‖y‖², Wy + c <= t, t >= 0
    Q = np.zeros((B, N + UNITS, N + UNITS))
    Q[:, range(N), range(N)] = MU
    p = np.concatenate([np.zeros((B, N)), energy.v], 1)
    none = np.zeros((B, UNITS, UNITS))
    G = np.concatenate(
        [
            np.concatenate([energy.W, none - np.eye(UNITS)], 2),
            np.concatenate([P.G, np.zeros((B, 3, UNITS))], 2),
        ],
        1,
    )
    h = np.concatenate([-energy.c, P.h], 1)
    A = np.concatenate([P.A, np.zeros((B, 1, UNITS))], 2)
    lower = np.concatenate([P.lower, np.zeros((B, UNITS))], 1)
    upper = np.concatenate([P.upper, np.full((B, UNITS), np.inf)], 1)
    z = qp_solve(QP(Q, p, G, np.full(h.shape, -np.inf), h, A, P.b, lower, upper)).z
    optimum = (p * z).sum(1) + 0.5 * MU * (z[:, :N] ** 2).sum(1)
    np.testing.assert_allclose(found.energy, optimum, atol=1e-8)
    assert (found.lower_bound <= optimum + 1e-9).all()


@pytest.mark.parametrize("smooth", [True, False], ids=["softplus", "ReLU"])
def test_the_certificate_holds_after_every_cut(smooth):
    energy, P = Energy(smooth), polyhedron()
    best = bundle_qp_argmin(energy, P, 80, MU)
    for K in (1, 2, 5, 9):
        found = bundle_qp_argmin(energy, P, K, MU)
        assert (found.lower_bound <= best.energy + 1e-9).all()
        assert (found.energy >= best.lower_bound - 1e-9).all()
        assert (found.gap >= -1e-9).all()
        assert violation(P, found.y) <= 1e-8
        f, _ = energy(found.y)
        np.testing.assert_allclose(found.energy, f + 0.5 * MU * (found.y**2).sum(1))
        assert set(found.status) <= {Status.GAP, Status.CONVERGED}


def test_without_curvature_in_a_box():
    energy = Energy(False)
    none = np.zeros((B, 0, N)), np.zeros((B, 0))
    P = Polyhedron(*none, *none, np.full((B, N), -1.0), np.full((B, N), 2.0))
    found = bundle_qp_argmin(energy, P, 100, 0.0)
    assert (found.status == Status.CONVERGED).all(), found.gap
    rng = np.random.default_rng(2)
    for _ in range(50):
        assert (energy(rng.uniform(-1, 2, (B, N)))[0] >= found.lower_bound - 1e-9).all()
    # No bound, no answer: one cut falls without end where its slope is positive in an entry that has no lower bound.
    found = bundle_qp_argmin(energy, P._replace(lower=np.full((B, N), -np.inf)), 1, 0.0)
    lost = (found.slopes[:, 0] > 0).any(1)
    assert lost.any()
    np.testing.assert_array_equal(found.status == Status.SOLVER, lost)
    assert np.isnan(found.y[lost]).all()
    assert np.isnan(found.lower_bound[lost]).all()
    assert np.isfinite(found.y[~lost]).all()
    # And what itself falls without end has a feasible point, but no optimum: every slope of the first two is positive.
    lower, steepest = P.lower.copy(), 1.0 + (energy.v[:, :, None] * np.abs(energy.W)).sum(1)
    lower[:2], steepest[2:] = -np.inf, 0.0

    def tilted(y):
        f, g = energy(y)
        return f + (steepest * y).sum(1), g + steepest

    found = bundle_qp_argmin(tilted, P._replace(lower=lower), 3, 0.0)
    assert (found.status[:2] == Status.UNBOUNDED).all()
    assert np.isnan(found.y[:2]).all()
    assert np.isnan(found.lower_bound[:2]).all()
    assert np.isfinite(found.y[2:]).all()


def directions(P, rng):
    return Polyhedron(*(rng.standard_normal(a.shape) for a in P))


# How many cuts, tolerance: before convergence, and for pieces at it as well.
EXACT = [
    *((True, 1, 0.0), (True, 4, 0.0), (False, 60, GAP)),
    *(pytest.param(*one, marks=pytest.mark.slow) for one in ((True, 6, 0.0), (False, 6, GAP))),
]


@pytest.mark.parametrize(("smooth", "K", "tolerance"), EXACT)
def test_the_exact_adjoint_is_the_derivative_of_the_algorithm(smooth, K, tolerance):
    rng = np.random.default_rng(3)
    energy, P = Energy(smooth), polyhedron()
    y_bar = rng.standard_normal((B, N))

    def run(energy, P, mu=MU):
        return bundle_qp_argmin(energy, P, K, mu, tolerance=tolerance)

    found = run(energy, P)
    bars = bundle_qp_adjoint(found, y_bar, (lambda _, y, s: energy.hvp(y, s)) if smooth else None)
    d, (dW, dc) = directions(P, rng), (rng.standard_normal(a.shape) for a in (energy.W, energy.c))
    check_differences(run, found, bars, energy, P, d, dW, dc, y_bar, DIFFERENCES)


def check_differences(run, found, bars, energy, P, d, dW, dc, y_bar, tolerance):
    """By the best of three steps: a wrong derivative is wrong at each. A program is solved to 1e-12 and tells its y to
    the root of that where little curvature holds it, which is now and then too much for a short step."""

    def check(name, moved, exact):
        errors = []
        for e in (1e-4, 1e-5, 1e-6):
            plus, minus = (moved(sign * e) for sign in (1, -1))
            same = (plus.best == found.best) & (minus.best == found.best)  # else another answer is the best one
            error = np.abs(((plus.y - minus.y) * y_bar).sum(1) / (2 * e) - exact)
            errors.append(np.where(same | (not energy.smooth), error, np.inf))
        assert (np.min(errors, axis=0) <= tolerance * (1 + np.abs(exact))).all(), (name, errors)

    for name in P._fields:
        value, along = getattr(P, name), getattr(d, name)
        exact = (getattr(bars.polyhedron, name) * along).reshape(B, -1).sum(1)
        check(name, lambda e, n=name, v=value, a=along: run(energy, P._replace(**{n: v + e * a})), exact)
    check("mu", lambda e: run(energy, P, MU + e), bars.mu)
    check("weights", lambda e: run(energy.moved(e * dW, e * dc), P), energy.along(bars, dW, dc, found.slopes))


def test_the_implicit_adjoint_is_the_derivative_of_a_smooth_argmin():
    """Against differences of Newton's method; y itself is known to 1e-5, and its derivative to as much."""
    rng = np.random.default_rng(4)
    energy, P = Energy(True), polyhedron()
    y_bar = rng.standard_normal((B, N))
    found = bundle_qp_argmin(energy, P, 100, MU, tolerance=1e-11)
    bars = bundle_qp_implicit(found, y_bar, energy(found.y)[1], energy.hessian(found.y))
    d, (dW, dc) = directions(P, rng), (rng.standard_normal(a.shape) for a in (energy.W, energy.c))
    e = 1e-5
    for name in P._fields:
        value, step = getattr(P, name), e * getattr(d, name)
        plus, minus = (newton(energy, P._replace(**{name: value + sign * step}), found.y) for sign in (1, -1))
        exact = (getattr(bars.polyhedron, name) * getattr(d, name)).reshape(B, -1).sum(1)
        numeric = ((plus - minus) * y_bar).sum(1) / (2 * e)
        assert (np.abs(numeric - exact) <= 1e-4 * (1 + np.abs(exact))).all(), name
    plus, minus = (newton(energy.moved(sign * e * dW, sign * e * dc), P, found.y) for sign in (1, -1))
    exact = energy.along(bars, dW, dc, found.slopes)
    np.testing.assert_allclose(((plus - minus) * y_bar).sum(1) / (2 * e), exact, rtol=1e-4, atol=1e-4)


def test_samples_that_fail_leave_the_others_alone():
    energy, P = Energy(True), polyhedron()
    alone = bundle_qp_argmin(energy, P, 30, MU, tolerance=1e-8)
    h, b = P.h.copy(), P.b.copy()
    lower, upper = P.lower.copy(), P.upper.copy()
    lower[1], upper[1] = 1.0, 0.0
    b[2] = np.nan
    broken = P._replace(h=h, b=b, lower=lower, upper=upper)

    def not_finite(y):
        f, g = energy(y)
        f[3] = np.nan
        return f, g

    found = bundle_qp_argmin(not_finite, broken, 30, MU, tolerance=1e-8)
    wanted = [Status.CONVERGED, Status.INFEASIBLE, Status.NOT_FINITE_INPUT, Status.NOT_FINITE]
    assert found.status.tolist() == wanted
    np.testing.assert_allclose(found.y[0], alone.y[0], atol=1e-6)
    assert np.isnan(found.y[1:]).all()
    assert np.isnan(found.gap[1:]).all()
    for hvp in (None, lambda _, y, s: energy.hvp(y, s)):
        bars = bundle_qp_adjoint(found, np.ones((B, N)), hvp)
        for a in (*bars.cuts, *bars.polyhedron, bars.mu):
            assert np.isfinite(a[0]).all()
            assert np.isnan(a[1:]).all()
    implicit = bundle_qp_implicit(found, np.ones((B, N)), energy(found.y)[1], energy.hessian(found.y))
    assert np.isfinite(implicit.cuts.seed[0]).all()
    assert np.isnan(implicit.cuts.seed[1:]).all()


def test_rows_without_a_solution_are_an_empty_domain():
    P = polyhedron(rows=3)
    G, h = P.G.copy(), P.h.copy()
    G[:, 1], h[:, 1] = -G[:, 0], -h[:, 0] - 1.0
    found = bundle_qp_argmin(Energy(True), P._replace(G=G, h=h), 3, MU)
    assert (found.status == Status.INFEASIBLE).all()


def test_a_concave_energy_is_found_out():
    def concave(y):
        return -2.0 * (y * y).sum(1), -4.0 * y

    rng = np.random.default_rng(0)
    none = np.zeros((B, 0, N)), np.zeros((B, 0))
    P = Polyhedron(*none, *none, np.full((B, N), -1.0), np.full((B, N), 1.0))
    found = bundle_qp_argmin(concave, P, 5, MU, y_init=0.1 * rng.standard_normal((B, N)))
    assert (found.status == Status.NOT_CONVEX).all()


def test_the_start_is_brought_into_the_polyhedron():
    energy, P = Energy(True), polyhedron()
    found = bundle_qp_argmin(energy, P, 1, MU, y_init=np.full((B, N), 10.0))
    assert violation(P, found.cut_points[:, 0]) <= 1e-8
    np.testing.assert_allclose(found.slopes[:, 0], energy(found.cut_points[:, 0])[1])


def test_equal_bounds_that_do_not_push_have_a_gradient() -> None:
    """y_1 is held at 0 by both, f and μ leave it there: it moves with them all the same."""

    def f(y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.abs(y[:, 0] - 0.2), np.stack([np.sign(y[:, 0] - 0.2), 0.0 * y[:, 0]], 1)

    none, held = np.zeros((1, 0)), np.zeros((1, 0, 2))
    P = Polyhedron(held, none, held, none, np.array([[-1.0, 0.0]]), np.array([[1.0, 0.0]]))
    T = bundle_qp_argmin(f, P, 20, 0.5)
    found = bundle_qp_adjoint(T, np.array([[0.0, 1.0]]), None).polyhedron
    np.testing.assert_allclose(T.y, [[0.2, 0.0]], atol=1e-9)
    np.testing.assert_allclose(found.lower + found.upper, [[0.0, 1.0]], atol=1e-9)
