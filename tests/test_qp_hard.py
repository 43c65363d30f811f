"""Quadratic programs that solvers give up on, and gradients that rounding spoils: every way to solve them.

Each problem is one that has an answer, or a certificate, by how it is made. Certificates and gradients are told by
arithmetic on fractions, which knows no rounding.
"""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qp_backends import BACKENDS
from quadratic_programs import Known, solvable

import icnnrt
from icnnrt.mathematics.qp_reference import QP, kkt_residual
from icnnrt.mathematics.status import Status

each = pytest.mark.parametrize("way", BACKENDS)
FAST = [way for way in BACKENDS if way in ("reference", "kernels")]  # milliseconds a problem


def programs(Q, p, G=None, h=None, A=None, b=None, h_lower=None, lower=None, upper=None):
    """B programs; what is not given is absent."""
    p = np.asarray(p, float)
    B, n = p.shape
    G = np.zeros((B, 0, n)) if G is None else np.broadcast_to(G, (B, *np.shape(G)[-2:]))
    A = np.zeros((B, 0, n)) if A is None else np.broadcast_to(A, (B, *np.shape(A)[-2:]))

    def row(a, count, none):
        return np.array(np.broadcast_to(none if a is None else a, (B, count)), float)

    m, q = G.shape[1], A.shape[1]
    Q = np.array(np.broadcast_to(Q, (B, n, n)), float)
    inf = np.inf
    return QP(
        Q, p, np.array(G, float), row(h_lower, m, -inf), row(h, m, inf), np.array(A, float), row(b, q, 0.0),
        row(lower, n, -inf), row(upper, n, inf),
    )  # fmt: skip


# --- Problems that have an answer ----------------------------------------------------------------


def soft_control(seed, B, price, steps=8):
    """An unstable system whose states should stay within ±1, or pay price/2 · t²: feasible from everywhere."""
    rng = np.random.default_rng(seed)
    M, N = np.array([[1.0, 0.3], [0.1, 1.1]]), np.array([0.05, 0.3])
    states, slack = 2 * steps, 2 * steps
    n = steps + states + slack  # inputs, states, slacks
    Q = np.diag(np.r_[np.full(steps, 0.1), np.ones(states), np.full(slack, price)])
    A, b = np.zeros((states, n)), np.zeros((B, states))
    for k in range(steps):
        of, x = slice(2 * k, 2 * k + 2), steps + 2 * k
        A[of, x : x + 2], A[of, k] = np.eye(2), -N
        if k:
            A[of, x - 2 : x] = -M
    b[:, :2] = (rng.standard_normal((B, 2)) * 10 ** rng.uniform(-1, 1.5, (B, 1))) @ M.T
    eye, none = np.eye(states), np.zeros((states, steps))
    G = np.r_[np.c_[none, eye, -eye], np.c_[none, -eye, -eye]]
    lower = np.r_[-np.ones(steps), np.full(states, -np.inf), np.zeros(slack)]
    upper = np.r_[np.ones(steps), np.full(states + slack, np.inf)]
    return programs(Q, np.zeros((B, n)), G, 1.0, A, b, lower=lower, upper=upper)


def unlike_costs(seed, B):
    """A quadratic and a linear cost that differ by up to 1e7 in size; 0 is within all rows."""
    rng = np.random.default_rng(seed)
    M = rng.standard_normal((B, 12, 12))
    Q = M @ M.swapaxes(1, 2) * 10 ** rng.uniform(-4, 2, (B, 1, 1)) + 1e-6 * np.eye(12)
    p = rng.standard_normal((B, 12)) * 10 ** rng.uniform(-3, 3, (B, 1))
    return programs(Q, p, rng.standard_normal((B, 20, 12)), rng.random((B, 20)))


def two_variables(seed, B):
    """A minimum next to 0 that no row comes near."""
    rng = np.random.default_rng(seed)
    M = rng.standard_normal((B, 2, 2))
    Q = np.round(100 * M @ M.swapaxes(1, 2)) + np.eye(2)
    p = np.round(rng.standard_normal((B, 2)), 1) * 1e-3
    return programs(Q, p, np.round(rng.standard_normal((B, 3, 2)), 1), np.round(rng.random((B, 3)), 1) + 0.1)


def transport(seed, B, curvature, short=1.0):
    """What three places have to five that want it, at least cost: one equality depends on the others."""
    rng = np.random.default_rng(seed)
    places, wants = 3, 5
    has = rng.integers(5, 20, (B, places)).astype(float)
    wanted = rng.random((B, wants))
    wanted *= short * has.sum(1, keepdims=True) / wanted.sum(1, keepdims=True)
    n = places * wants
    A = np.r_[np.kron(np.eye(places), np.ones(wants)), np.kron(np.ones(places), np.eye(wants))]
    return programs(curvature * np.eye(n), 10 * rng.random((B, n)), A=A, b=np.c_[has, wanted], lower=0.0)


def degenerate_vertex(seed, B, curvature=1.0):
    """Twelve rows through one point of five variables, a few of which push; Q of any rank."""
    rng = np.random.default_rng(seed)
    M = rng.standard_normal((B, 5, 5)) * (np.arange(5) < rng.integers(0, 6, (B, 1, 1)))
    Q = curvature * M @ M.swapaxes(1, 2)
    z, G = np.round(rng.standard_normal((B, 5))), np.round(2 * rng.standard_normal((B, 12, 5)))
    lam = rng.random((B, 12)) * (rng.random((B, 12)) < 0.4)
    p = -(Q @ z[..., None])[..., 0] - (lam[:, None] @ G)[:, 0]
    return programs(Q, p, G, (G @ z[..., None])[..., 0])


HARD = {
    **{f"soft control, price 1e{e}": lambda B, e=e: soft_control(e, B, 10.0**e) for e in (3, 4, 5, 6, 8)},
    "soft control, far ahead": lambda B: soft_control(1, B, 1e4, 20),
    "unlike costs": lambda B: unlike_costs(0, 4 * B),
    "two variables": lambda B: two_variables(0, 4 * B),
    **{f"transport, curvature {c}": lambda B, c=c: transport(3, B, c) for c in (0.0, 1e-6, 1e-3, 0.1)},
    "degenerate vertices": lambda B: degenerate_vertex(5, 4 * B),
    "degenerate vertices, nearly linear": lambda B: degenerate_vertex(6, 4 * B, 1e-6),
}


@each
@pytest.mark.parametrize("kind", HARD)
def test_what_has_an_answer_is_solved(way, kind):
    qp = HARD[kind](10 if way in ("reference", "kernels") else 3)
    found = BACKENDS[way].solve(qp)
    assert (found.status == Status.CONVERGED).all(), found.residual[found.status != Status.CONVERGED]
    assert kkt_residual(qp, *found[:4]).max() <= 1e-9


# --- Units ---------------------------------------------------------------------------------------


def in_units(qp, cost, rows, columns):
    """The same programs with the cost × `cost`, rows × `rows` and variables z / `columns`."""
    m = qp.h.shape[1]
    g, a, s = rows[:m], rows[m:], columns
    return QP(
        cost * qp.Q * s * s[:, None], cost * qp.p * s, qp.G * g[:, None] * s, qp.h_lower * g, qp.h * g,
        qp.A * a[:, None] * s, qp.b * a, qp.lower / s, qp.upper / s,
    )  # fmt: skip


SCALES = {"cost": 12, "rows": 6, "columns": 4, "z": 8}  # powers of 10; of z in another unit as a whole


@pytest.mark.parametrize("way", FAST)
@pytest.mark.parametrize("what", SCALES)
@given(seed=st.integers(0, 10**6), data=st.data())
@settings(max_examples=60, deadline=None)
def test_units_change_nothing(way, what, seed, data):
    """Same status; where z is unique the same z, to 1e-9 times the condition number of Q."""
    known = solvable(seed, 1, 6, 5, 2, two_sided=seed % 2 == 0, box=seed % 3 == 0)
    infeasible = known.qp._replace(h=known.qp.h - 1e3 * (np.arange(5) == 0))
    infeasible = infeasible._replace(G=np.where(np.arange(5)[:, None] == 1, -infeasible.G[:, :1], infeasible.G))
    infeasible = infeasible._replace(h_lower=np.full_like(infeasible.h, -np.inf))
    power = st.floats(-SCALES[what], SCALES[what])
    m, n = 7, 6

    def drawn(name, count):
        drawn_powers = st.lists(power, min_size=count, max_size=count)
        return 10.0 ** np.array(data.draw(drawn_powers)) if what == name else np.ones(count)

    cost, rows, columns = drawn("cost", 1)[0], drawn("rows", m), drawn("columns", n) * drawn("z", 1)
    for qp in (known.qp, infeasible):
        as_given, scaled = (BACKENDS[way].solve(a) for a in (qp, in_units(qp, cost, rows, columns)))
        assert scaled.status == as_given.status == (Status.CONVERGED if qp is known.qp else Status.INFEASIBLE)
        if as_given.status == Status.CONVERGED:
            away = np.abs(scaled.z * columns - as_given.z).max()
            assert away <= 1e-9 * np.linalg.cond(qp.Q[0]) * (1 + np.abs(as_given.z).max())


# --- Programs without a feasible point -----------------------------------------------------------


def zero_row(seed, B, equality):
    """0'z = b or 0'z <= b with a b that 0 is not."""
    rng = np.random.default_rng(seed)
    M, b = rng.standard_normal((B, 3, 6)), rng.standard_normal((B, 3))
    M[:, 1], b[:, 1] = 0.0, -np.abs(b[:, 1]) - 1e-3
    p = rng.standard_normal((B, 6))
    return programs(np.eye(6), p, A=M, b=b) if equality else programs(np.eye(6), p, M, b)


def doubling_chain(seed, B, n=10, curvature=1.0):
    """2 z_i <= z_{i+1}, z_1 >= 1 and z_n <= half of the 2^(n-1) that follows: multipliers that double as well."""
    G, h = np.zeros((n + 1, n)), np.zeros(n + 1)
    for i in range(n - 1):
        G[i, i], G[i, i + 1] = 2.0, -1.0
    G[n - 1, 0], h[n - 1] = -1.0, -1.0
    G[n, n - 1], h[n] = 1.0, 2.0 ** (n - 2)
    return programs(curvature * np.eye(n), np.random.default_rng(seed).standard_normal((B, n)), G, h)


def parallel(seed, B, off=4e-7):
    """a'z = b and a'z <= b − off."""
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((B, 1, 5)), rng.standard_normal((B, 1))
    return programs(np.eye(5), rng.standard_normal((B, 5)), a, b - off, a, b)


INFEASIBLE = {
    "zero equality": lambda: zero_row(0, 4, True),
    "zero inequality": lambda: zero_row(1, 4, False),
    "doubling chain": lambda: doubling_chain(2, 4),
    "doubling chain, linear": lambda: doubling_chain(3, 4, curvature=0.0),
    "longer doubling chain": lambda: doubling_chain(4, 2, 16),
    "supply and demand": lambda: transport(5, 4, 1e-3, short=1.01),
    "parallel": lambda: parallel(6, 4),
}


def proven(qp, i, ray, within=1e6):
    """Whether multipliers prove, in fractions, that no |z|_∞ <= `within` is feasible in sample i."""
    n, m, q = qp.p.shape[1], qp.h.shape[1], qp.b.shape[1]
    _, lam, nu, mu = (list(map(Fraction, part)) for part in np.split(ray.astype(float), np.cumsum([n, m, q])))
    total = Fraction(0)  # the most that λ'Gz + ν'Az + μ'z may be where the bounds hold
    for multipliers, low, high in ((lam, qp.h_lower, qp.h), (nu, qp.b, qp.b), (mu, qp.lower, qp.upper)):
        for multiplier, lower, upper in zip(multipliers, low[i], high[i], strict=True):
            bound = upper if multiplier > 0 else lower
            if multiplier and not np.isfinite(bound):
                return False
            total += multiplier * Fraction(float(bound)) if multiplier else 0
    off = Fraction(0)  # and how far it is from 0, which it should be, for any such z
    for j in range(n):
        column = [*zip(lam, qp.G[i, :, j], strict=True), *zip(nu, qp.A[i, :, j], strict=True)]
        off += abs(sum((a * Fraction(float(c)) for a, c in column), mu[j]))
    return total + off * Fraction(within) < 0


@each
@pytest.mark.parametrize("kind", INFEASIBLE)
def test_what_is_infeasible_is_certified(way, kind):
    qp = INFEASIBLE[kind]()
    found = BACKENDS[way].solve(qp)
    assert (found.status == Status.INFEASIBLE).all(), found.status
    for i in range(len(qp.p) if found.ray is not None else 0):
        assert proven(qp, i, found.ray[i])


def test_a_certificate_that_proves_nothing_is_seen():
    qp = parallel(6, 1)
    ray = BACKENDS["reference"].solve(qp).ray[0]
    assert proven(qp, 0, ray)
    assert not proven(qp, 0, -ray)
    assert not proven(qp._replace(h=qp.h + 8e-7), 0, ray)
    ray[5] *= 1.001
    assert not proven(qp, 0, ray)


# --- Gradients -----------------------------------------------------------------------------------


def exactly(qp, held_rows, held, z_bar):
    """d_z of [Q C'; C 0] d = [−z̄; 0], solved in fractions; C are the rows that hold z and the held variables."""
    n = qp.p.shape[1]
    C = np.r_[qp.A[0], qp.G[0][held_rows], np.eye(n)[held]]
    size = n + len(C)
    K = [[Fraction(0)] * (size + 1) for _ in range(size)]
    for i in range(n):
        for j in range(n):
            K[i][j] = Fraction(float(qp.Q[0, i, j]))
        for k in range(len(C)):
            K[i][n + k] = K[n + k][i] = Fraction(float(C[k, i]))
        K[i][size] = -Fraction(float(z_bar[i]))
    for k in range(size):  # Gauss and Jordan
        pivot = max(range(k, size), key=lambda i: abs(K[i][k]))
        K[k], K[pivot] = K[pivot], K[k]
        for i in range(size):
            if i != k and K[i][k]:
                by = K[i][k] / K[k][k]
                K[i] = [a - by * b for a, b in zip(K[i], K[k], strict=True)]
    return np.array([float(K[i][size] / K[i][i]) for i in range(n)])


def badly_scaled(seed, rows=0.0, columns=0.0):
    """Q = SWS, G = RVS, A = RUS with units R = 10^rows and S of up to 10^±columns; strictly complementary."""
    known = solvable(seed, 1, 5, 6, 2)
    qp = known.qp
    S = 10 ** np.random.default_rng(seed).uniform(-columns, columns, 5)
    R = 10.0**rows
    return Known(in_units(qp, 1.0, np.full(8, R), S), known.z / S, known.lam / R, known.nu / R, known.mu), S


SCALED = {"rows × 1e-7": (-7, 0), "rows × 1e5": (5, 0), "columns × 10^±2": (0, 2), "columns × 10^±4": (0, 4)}


def by_p(way, qp, z_bar):
    """∂(z̄'z)/∂p."""
    found = BACKENDS[way].solve(qp)
    assert (found.status == Status.CONVERGED).all()
    zeros = [np.zeros_like(a) for a in found[1:4]]
    return BACKENDS[way].pull(qp, found, [z_bar[None], *zeros]).p[0], found


@each
@pytest.mark.parametrize("units", SCALED)
@pytest.mark.parametrize("seed", range(4))
def test_gradients_hold_in_any_units(way, units, seed):
    rows, columns = SCALED[units]
    known, S = badly_scaled(seed, rows, columns)
    z_bar = np.random.default_rng(seed).standard_normal(5) * S
    got, _ = by_p(way, known.qp, z_bar)
    truth = exactly(known.qp, known.lam[0] != 0, known.mu[0] != 0, z_bar)
    assert np.abs((got - truth) / S).max() <= 1e-8 * np.abs(truth / S).max()


@each
@pytest.mark.parametrize("curvature", [1e-6, 1e-10, 1e-12, 1e-14])
def test_gradients_by_little_curvature(way, curvature):
    """z = −p / diag(1, ε)."""
    diagonal = np.array([1.0, curvature])
    qp = programs(np.diag(diagonal), np.array([[1.0, curvature]]))
    got, _ = by_p(way, qp, np.ones(2))
    np.testing.assert_allclose(got, -1.0 / diagonal, rtol=1e-8)


@each
@pytest.mark.parametrize("as_row", [False, True], ids=["box", "row"])
def test_equal_bounds_that_do_not_push_hold(way, as_row):
    """min ½‖z‖² − z_1 with z_1 = 1 given by two bounds: μ = 0, and z_1 follows them, not p."""
    fixed, inf = np.array([[1.0, np.inf]]), np.inf
    p = np.array([[-1.0, 0.5]])
    if as_row:
        qp = programs(np.eye(2), p, np.eye(2)[:1], 1.0, h_lower=1.0)
    else:
        qp = programs(np.eye(2), p, lower=np.where(fixed == inf, -inf, fixed), upper=fixed)
    found = BACKENDS[way].solve(qp)
    assert found.status == Status.CONVERGED
    np.testing.assert_allclose(found.z, [[1.0, -0.5]], atol=1e-9)
    zeros = [np.zeros_like(a) for a in found[1:4]]
    got = BACKENDS[way].pull(qp, found, [np.ones((1, 2)), *zeros])
    np.testing.assert_allclose(got.p, [[0.0, -1.0]], atol=1e-8)
    assert sum(np.abs(a).sum() for a in (got.lower, got.h_lower, got.upper, got.h)) <= 1.0 + 1e-8


@each
def test_rows_push_from_the_sides_they_have(way):
    """λ >= 0 of rows and bounds that have an upper side alone, also where they are touched and do not push."""
    for qp in (degenerate_vertex(7, 8), two_variables(8, 8), unlike_costs(9, 8), soft_control(10, 3, 1e5)):
        found = BACKENDS[way].solve(qp)
        assert (found.lam[~np.isfinite(qp.h_lower)] >= 0).all()
        assert (found.mu[~np.isfinite(qp.lower)] >= 0).all()
        assert (found.mu[~np.isfinite(qp.upper)] <= 0).all()


@each
def test_a_weakly_active_row_has_the_gradient_of_one_side(way):
    """A minimum that just touches a row: the gradients by p and by h are both of a row that holds, or both of none."""
    rng = np.random.default_rng(0)
    for _ in range(12):
        M, G, z, z_bar = (rng.standard_normal(size) for size in ((4, 4), (1, 4), 4, 4))
        Q = M @ M.T / 4 + 0.3 * np.eye(4)
        qp = programs(Q, -(Q @ z)[None], G, G @ z)
        got, found = by_p(way, qp, z_bar)
        assert found.lam[0, 0] >= 0
        by_h = BACKENDS[way].pull(qp, found, [z_bar[None], *(np.zeros_like(a) for a in found[1:4])]).h[0, 0]
        held = np.linalg.solve(np.block([[Q, G.T], [G, np.zeros((1, 1))]]), np.r_[-z_bar, 0.0])
        free = np.linalg.solve(Q, -z_bar)
        sides = [np.abs(np.r_[got - d, by_h - of_h]).max() for d, of_h in ((held[:4], -held[4]), (free, 0.0))]
        assert min(sides) <= 1e-6 * (1 + np.abs(held).max())


@pytest.mark.parametrize("native", [None, False])
@pytest.mark.parametrize("unit", [1.0, 1e-3, 1e-6])
def test_a_row_that_an_equality_implies_moves_no_answer(unit, native):
    """Its multipliers have no size: they cancel those of the equality, and hid a z far from the optimum."""
    rng = np.random.default_rng(0)
    for k in range(60 if native is None else 12):
        n, m = rng.integers(2, 6), rng.integers(1, 5)
        M, G, a = (rng.integers(-2, 3, shape).astype(float) for shape in ((n, n), (m, n), (n,)))
        a[0] += not a.any()
        z, Q, p = rng.integers(-1, 2, n), (M @ M.T + np.eye(n)) * unit, rng.integers(-30, 31, n).astype(float)
        h, b = G @ z + rng.integers(0, 2, m), np.array([a @ z])
        plain = icnnrt.qp(Q, p, G, h, a[None], b, native=native)
        implied = icnnrt.qp(Q, p, np.r_[G, [-a]], np.r_[h, -b], a[None], b, native=native)
        if plain.ok:
            assert implied.ok, k
            assert not implied.vjp(np.ones(n)).reliable, k
            np.testing.assert_allclose(implied.z, plain.z, atol=1e-3 * (1.0 + np.abs(plain.z).max()), err_msg=str(k))


def degenerate(seed):
    """A program of low rank in units of its own, with rows doubled, opposite or weakly active; its value."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 13))
    m, q = int(rng.integers(0, 2 * n + 1)), int(rng.integers(0, n))
    rank = int(rng.integers(0, n + 1))
    root = rng.standard_normal((n, rank)) * 10.0 ** rng.uniform(-4, 0, (1, rank))
    Q, whole = root @ root.T, rng.random() < 0.3

    def entries(*shape):
        return np.round(2 * rng.standard_normal(shape)) if whole else rng.standard_normal(shape)

    G, A = entries(m, n), entries(q, n)
    z = entries(n) if whole else rng.standard_normal(n) * 10.0 ** rng.uniform(-3, 3)
    if rng.random() < 0.3 and m > 1:
        G[-1] = G[0] * (1 if rng.random() < 0.5 else -1)
    if rng.random() < 0.2 and q > 1:
        A[-1] = A[0] * 2
    lam = rng.random(m) * (rng.random(m) < 0.4) * 10.0 ** rng.uniform(-2, 2)
    slack = rng.random(m) * (rng.random(m) < 0.7) * (lam == 0) * 10.0 ** rng.uniform(-2, 2)
    nu, box = rng.standard_normal(q), rng.random() < 0.5
    mu = rng.standard_normal(n) * (rng.random(n) < 0.3) if box else np.zeros(n)
    free = np.full(n, np.inf)
    far = (lambda: z - rng.random(n)), (lambda: z + rng.random(n))
    lower = np.where(mu < 0, z, np.where(rng.random(n) < 0.2, -np.inf, far[0]())) if box else -free
    upper = np.where(mu > 0, z, far[1]()) if box else free
    p = -(Q @ z) - G.T @ lam - A.T @ nu - mu
    units = 10.0 ** (rng.random(m) * 6 - 3 if rng.random() < 0.3 else np.zeros(m))
    cost = 10.0 ** rng.uniform(-6, 6) if rng.random() < 0.3 else 1.0
    data = {"Q": cost * Q, "p": cost * p, "G": G * units[:, None], "h": (G @ z + slack) * units, "A": A, "b": A @ z}
    return data | {"lower": lower, "upper": upper}, cost * (0.5 * z @ Q @ z + p @ z)


@pytest.mark.parametrize("native", [None, False])
@pytest.mark.parametrize("seed", [83300, 132624, 269959, 383350, 400514])  # what one way of rounding gave up on
def test_another_way_is_tried_where_many_answers_are_nearly_as_good(seed, native):
    data, value = degenerate(seed)
    found = icnnrt.qp(**data, native=native)
    assert found.ok, found.advice(0)
    assert 0.5 * found.z @ data["Q"] @ found.z + data["p"] @ found.z == pytest.approx(value, rel=1e-6, abs=1e-6)
