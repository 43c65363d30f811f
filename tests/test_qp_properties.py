"""Quadratic programs, every way to solve them and every kind of them: told by certificate and by differences.

Problems are built backwards from an answer, or from why there is none. What a way gives is judged by `kkt_residual`,
which shares no code with the solvers, its rays by their definition, its gradients by central differences of its own
answers; no way is the judge of another. What belongs to one of them alone stands in the file of its name.
"""

import numpy as np
import pytest
from qp_backends import BACKENDS, rounded
from quadratic_programs import (
    KINDS,
    SIZES,
    UNSOLVABLE,
    bundle_models,
    determined,
    mixed,
    most_unsolved,
    receding_horizon,
    solvable,
    unsolvable,
)

from icnnrt.mathematics.qp_reference import QP, kkt_residual
from icnnrt.mathematics.qp_status import STATUSES, QPStatus, advise, statuses
from icnnrt.mathematics.status import Status

TYPES = (np.float64, np.float32)
each = pytest.mark.parametrize("way", BACKENDS)
each_dtype = pytest.mark.parametrize("dtype", TYPES)

KKT = {np.float64: 1e-9, np.float32: 1e-6}  # relative, what CONVERGED promises
# z where the problem determines it: a duality gap of 1e-12 moves z by its square root times 1/√(curvature), and less
# where constraints hold it. float32 rounds the answer.
UNIQUE = {np.float64: 1e-6, np.float32: 2e-5}
# Central, h = 1e-5: 1e-12 of the solver over h, and h² of truncation. Where Q is ill-conditioned z is known to 1e-10.
DIFFERENCES = {
    "random": 1e-6, "scaled rows": 3e-6, "ill-conditioned": 1e-4, "low rank": 1e-5, "duplicate rows": 1e-5,
}  # fmt: skip
GRADIENTS = ((12, 30, 0), (4, 0, 0), (5, 0, 2), (1, 1, 0), (13, 0, 3), (7, 9, 0))
UNSURE = (Status.CONVERGED, Status.INACCURATE, Status.SOLVER)


def some(qp, which):
    return QP(*(a[which] for a in qp))


def objective(qp, z):
    return 0.5 * np.einsum("bi,bij,bj->b", z, qp.Q, z) + (qp.p * z).sum(1)


def check(qp, found, dtype=np.float64):
    """Every figure handed out with an answer that counts as solved, and that the others have none."""
    B, n = qp.p.shape
    shapes = (B, n), qp.h.shape, qp.b.shape, (B, n), (B, 3), (B,)
    for a, shape in zip(found[:6], shapes, strict=True):
        assert a.shape == shape
    assert all(a.dtype == dtype for a in found[:4])
    assert found.residual.dtype == np.float64
    good = found.status == Status.CONVERGED
    assert found.residual[good].max(initial=0.0) <= KKT[dtype]
    none = ~np.isin(found.status, (Status.CONVERGED, Status.INACCURATE))
    assert all(np.isnan(a[none]).all() for a in found[:4])
    if dtype == np.float64:  # float32 rounds z, which then holds less than was found
        residual = kkt_residual(some(qp, good), *(a[good] for a in found[:4]))
        assert residual.max(initial=0.0) <= KKT[dtype]
        # The larger one of two units; either is a sum that may cancel a hundredfold, rounded in an order of its own.
        assert (found.residual[good] >= 0.999 * residual - 1e-13).all()
    sides = ("slack", qp.h_lower, qp.h), ("box_slack", qp.lower, qp.upper)
    for name, low, high in sides:  # 0 of bounds that leave no room, and of nothing else
        slack = getattr(found.handed, name, None)
        if slack is not None:
            no_room = high - low <= 1e-8 * (1 + np.abs(high))
            assert ((slack > 0) | ((slack == 0) & no_room))[good].all()
    return good


@each
@each_dtype
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_solvable_is_solved(way, dtype, kind):
    # Rounding to float32 may make others of these: Q with slightly negative eigenvalues, equalities that contradict.
    others = dtype == np.float32 and kind in ("low rank", "dependent equalities", "linear")
    for size in SIZES:
        for box in (False, True):
            known = solvable(0, 6, *size, kind, two_sided=box, box=box)
            qp = rounded(known.qp, dtype)
            found = BACKENDS[way].solve(known.qp, dtype)
            good = check(qp, found, dtype)
            if kind == "linear" and not box:  # may fall without end on the way to no bound; what is told must be true
                assert set(found.status) <= {Status.CONVERGED, Status.UNBOUNDED} or others
            elif not others:
                assert (~good).sum() <= most_unsolved(kind), (size, box, found.residual)
                assert np.isin(found.status, UNSURE).all(), (size, box)
            if dtype == np.float64:
                # The optimum is no worse than the point the problem was built from.
                values, built = objective(qp, found.z)[good], objective(qp, known.z)[good]
                assert (values <= built + 1e-8 * (1 + np.abs(built))).all(), (size, box)
            if kind == "random" and size[0] > 1:  # of one variable, a row and the box may hold the same side
                for got, wanted in zip(found[:4], known[1:], strict=True):
                    assert np.abs(got - wanted)[good].max(initial=0.0) <= UNIQUE[dtype], (size, box)


@each
@pytest.mark.parametrize("why", UNSOLVABLE)
def test_what_is_not_solvable_says_why(way, why):
    for size in ((10, 10, 3), (8, 4, 2), (50, 50, 10)):
        qp, wanted = unsolvable(1, 4, *size, why)
        found = BACKENDS[way].solve(qp)
        assert (found.status == STATUSES[wanted]).all(), (size, found.status)
        check(qp, found)
        check_rays(qp, found)


def check_rays(qp, found):
    """Farkas' multipliers of what is infeasible, a direction of endless fall of what is unbounded."""
    if found.ray is None:
        return
    n, m, q = qp.p.shape[1], qp.h.shape[1], qp.b.shape[1]
    crossed = (qp.h_lower > qp.h).any(1) | (qp.lower > qp.upper).any(1)
    for i in np.flatnonzero((found.status == Status.INFEASIBLE) & ~crossed):
        d, lam, nu, mu = np.split(found.ray[i], np.cumsum([n, m, q]))
        assert np.abs(d).max() == 0
        assert np.abs(qp.G[i].T @ lam + qp.A[i].T @ nu + mu).max() <= 1e-6
        bound = sum(
            a @ np.where(a > 0, hi, np.where(a < 0, lo, 0))
            for a, lo, hi in ((lam, qp.h_lower[i], qp.h[i]), (mu, qp.lower[i], qp.upper[i]))
        )
        assert bound + nu @ qp.b[i] == pytest.approx(-1.0)
    for i in np.flatnonzero(found.status == Status.UNBOUNDED):
        d, rest = found.ray[i, :n], found.ray[i, n:]
        assert np.abs(rest).max() == 0
        assert qp.p[i] @ d == pytest.approx(-1.0)
        assert np.abs(np.concatenate([qp.Q[i] @ d, qp.A[i] @ d])).max() <= 1e-6
        assert (qp.G[i] @ d)[np.isfinite(qp.h[i])].max(initial=0.0) <= 1e-6


@each
def test_neighbours_do_not_matter(way):
    """Every kind of unsolvable problem among solvable ones: statuses, answers and gradients are those of each alone."""
    backend, (qp, wanted) = BACKENDS[way], mixed(7)
    together = backend.solve(qp)
    np.testing.assert_array_equal(together.status, statuses(wanted))
    check(qp, together)
    check_rays(qp, together)
    for i in range(len(wanted)):
        one = some(qp, slice(i, i + 1))
        alone = backend.solve(one)
        assert alone.status[0] == together.status[i]
        check_rays(one, alone)  # one of many, as are the multipliers where there is no solution
        for a, b in zip(alone[:4], together[:4], strict=True):
            if wanted[i] == QPStatus.SOLVED:
                np.testing.assert_allclose(a[0], b[i], rtol=1e-6, atol=1e-9)
    gradients = backend.pull(qp, together, [np.ones_like(a) for a in together[:4]])
    unsolved = wanted != QPStatus.SOLVED
    assert np.isnan(gradients.p[unsolved]).all()
    for a in gradients:
        assert np.isfinite(a[~unsolved]).all()


@each
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_a_bad_number_spoils_its_own_sample_alone(way, bad):
    """Wherever it stands; of bounds an infinity is none, or one that nothing holds."""
    backend, qp = BACKENDS[way], solvable(4, 3, 5, 4, 2, two_sided=True, box=True).qp
    clean = backend.solve(qp)
    none = {"h_lower": -np.inf, "lower": -np.inf, "h": np.inf, "upper": np.inf}
    for name in QP._fields:
        value = getattr(qp, name).copy()
        value[1].flat[0] = bad
        spoilt = qp._replace(**{name: value})
        got = backend.solve(spoilt)
        if none.get(name) == bad:
            assert got.status[1] == Status.CONVERGED, name
        elif name in none and not np.isnan(bad):
            assert got.status[1] in (Status.INFEASIBLE, Status.NOT_FINITE_INPUT), name
        else:
            assert got.status[1] == Status.NOT_FINITE_INPUT, name
        check(spoilt, got)
        for a, b in zip(got[:6], clean[:6], strict=True):
            np.testing.assert_allclose(a[[0, 2]], b[[0, 2]], rtol=1e-9, atol=1e-12)


@each
@pytest.mark.parametrize("kind", DIFFERENCES)
@pytest.mark.parametrize("box", [False, True], ids=["rows", "box"])
def test_gradients_match_central_differences(way, kind, box):
    check_gradients(way, kind, box, (8, 6, 2))


@each
@pytest.mark.parametrize("size", GRADIENTS, ids=str)
def test_gradients_of_any_size(way, size):
    check_gradients(way, "random", False, size)


def check_gradients(way, kind, box, size):
    """Of all that is handed out by every datum; of z alone where multipliers are not unique."""
    rng, backend = np.random.default_rng(5), BACKENDS[way]
    known = solvable(2, 5, *size, kind, two_sided=True, box=box)
    qp, solution = known.qp, backend.solve(known.qp)
    at = determined(known) & (solution.status == Status.CONVERGED)
    assert at.any()
    unique = kind in ("random", "scaled rows", "ill-conditioned")
    bars = [rng.standard_normal(a.shape) for a in solution[: 4 if unique else 1]]

    def loss(qp):
        answer = backend.solve(qp)
        return sum((bar * a).sum(1) for bar, a in zip(bars, answer, strict=False))

    gradients = backend.pull(qp, solution, bars)
    for name in qp._fields:
        value, gradient = getattr(qp, name), getattr(gradients, name)
        if not unique and name not in ("p", "b", "h", "h_lower", "lower", "upper"):
            continue  # moved apart, rows that repeat each other have no derivative, nor has Q where it is flat
        finite = np.where(np.isfinite(value), value, 0.0)
        v = rng.standard_normal(value.shape) * np.where(finite != 0, np.abs(finite), 0.0)
        if name == "Q":
            v = finite @ rng.standard_normal(value.shape) * 1e-1
            v = v @ v.swapaxes(1, 2)
        if kind == "duplicate rows" and name in ("h", "h_lower"):
            v[:, 1:3] = 0  # two of three are one
            v[:, 0] = np.where(np.abs(known.lam[:, 0]) > 0, 0.0, v[:, 0])
        h = 1e-6 if kind == "ill-conditioned" and name == "Q" else 1e-5
        forward, back = (loss(qp._replace(**{name: value + sign * h * v})) for sign in (1, -1))
        numeric = (forward - back) / (2 * h)
        product = np.where(v != 0, gradient * v, 0.0).reshape(len(v), -1)
        exact, scale = product.sum(1), 1 + 2 * np.abs(product).sum(1)
        assert (np.abs(numeric - exact) <= DIFFERENCES[kind] * scale)[at].all(), (name, numeric, exact)


@each
@pytest.mark.parametrize("size", [(8, 6, 2), *GRADIENTS], ids=str)
def test_gradients_in_float32_are_those_of_float64(way, size):
    """A way's own in float64, which differences have told, at the data that float32 holds."""
    rng, backend = np.random.default_rng(5), BACKENDS[way]
    qp = rounded(solvable(2, 5, *size, two_sided=True).qp, np.float32)
    narrow, exact = backend.solve(qp, np.float32), backend.solve(qp)
    bars = [rng.standard_normal(a.shape).astype(np.float32).astype(np.float64) for a in exact[:4]]
    assert (narrow.status == Status.CONVERGED).all()
    found, wanted = backend.pull(qp, narrow, bars, np.float32), backend.pull(qp, exact, bars)
    for name, a, b in zip(QP._fields, found, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3 * (1 + np.abs(b).max(initial=0.0)), err_msg=name)


# --- Problems that a method may stumble on ---------------------------------------------------------


@each
@pytest.mark.parametrize("by", [1e-8, 1e8])
def test_units_do_not_matter(way, by):
    backend, qp = BACKENDS[way], solvable(3, 4, 10, 10, 3, two_sided=True, box=True).qp
    z = backend.solve(qp).z
    for names, of_z in ((("p", "h_lower", "h", "b", "lower", "upper"), by), (("Q", "p"), 1.0)):
        scaled = backend.solve(qp._replace(**{name: by * getattr(qp, name) for name in names}))
        assert (scaled.status == Status.CONVERGED).all()
        np.testing.assert_allclose(scaled.z / of_z, z, rtol=1e-6, atol=1e-9)


@each
@each_dtype
def test_far_away_is_not_infeasible_and_steep_not_unbounded(way, dtype):
    rng, backend = np.random.default_rng(0), BACKENDS[way]
    G, z = rng.standard_normal((4, 8, 10)), 1e7 * rng.standard_normal((4, 10))
    free = solvable(0, 4, 10, 8, 0).qp._replace(G=G, h=np.full((4, 8), np.inf))
    r = np.einsum("bij,bj->bi", G, z)
    assert (backend.solve(free._replace(h_lower=r - 1, h=r + 1), dtype).status == Status.CONVERGED).all()
    Q = np.repeat(np.diag(np.linspace(0.1, 1, 10))[None], 4, 0)
    for by in (1e6, 1e9):
        assert (backend.solve(free._replace(Q=Q, p=by * free.p), dtype).status == Status.CONVERGED).all()


@each
def test_what_float32_cannot_hold_is_no_answer(way):
    qp = solvable(0, 1, 4, 0, 0).qp._replace(Q=1e-30 * np.eye(4)[None], p=np.full((1, 4), 1e15))
    assert BACKENDS[way].solve(qp).status == Status.CONVERGED
    assert BACKENDS[way].solve(qp, np.float32).status == Status.SOLVER


@each
@pytest.mark.parametrize("kind", ["linear", "scaled columns"])
def test_bounds_of_1e20_are_none(way, kind):
    qp = solvable(0, 4, 10, 10, 3, kind).qp
    none = {name: np.clip(getattr(qp, name), -1e20, 1e20) for name in ("h_lower", "lower", "upper")}
    for a, b in zip(BACKENDS[way].solve(qp._replace(**none))[:6], BACKENDS[way].solve(qp)[:6], strict=True):
        np.testing.assert_array_equal(a, b)


@each
def test_variables_may_be_fixed_by_their_bounds(way):
    """lower = upper is an equality: the others are where it would put them."""
    backend, qp = BACKENDS[way], solvable(6, 4, 8, 5, 1, two_sided=True, box=True).qp
    z = backend.solve(qp).z
    held = qp._replace(lower=np.where(np.arange(8) < 3, z, qp.lower), upper=np.where(np.arange(8) < 3, z, qp.upper))
    found = backend.solve(held)
    assert (found.status == Status.CONVERGED).all()
    check(held, found)
    np.testing.assert_allclose(found.z, z, atol=UNIQUE[np.float64])


@each
@each_dtype
@pytest.mark.parametrize("B", [0, 1])
def test_batches_of_no_sample_and_of_one(way, dtype, B):
    known = solvable(0, 1, 4, 3, 2)
    qp = some(known.qp, slice(0, B))
    found = BACKENDS[way].solve(qp, dtype)
    assert check(rounded(qp, dtype), found, dtype).sum() == B
    np.testing.assert_allclose(found.z, known.z[:B], atol=UNIQUE[dtype])
    gradients = BACKENDS[way].pull(qp, found, [np.ones_like(a) for a in found[:4]], dtype)
    assert [a.shape for a in gradients] == [a.shape for a in qp]


@each
@pytest.mark.parametrize("seed", [0, 1, 2, 47, 93])
def test_controllers_of_unstable_systems(way, seed):
    for steps in (25, 8 + seed % 16):
        qp = receding_horizon(seed, 40, steps)
        found = BACKENDS[way].solve(qp)
        assert check(qp, found).all()


@each
@pytest.mark.parametrize("cuts", [1, 2])
def test_steps_that_cycle_are_taken_back_to_the_central_path(way, cuts):
    """Nine and six of these cycled for ever."""
    qp = bundle_models(1, 5000, cuts=cuts)
    if way not in ("reference", "kernels"):
        qp = some(qp, slice(0, 40))
    assert check(qp, BACKENDS[way].solve(qp)).all()


@pytest.mark.parametrize("way", [way for way in BACKENDS if way != "torch"])
@pytest.mark.parametrize("box", [False, True], ids=["rows", "box"])
def test_a_warm_start_leads_to_the_same_answer(way, box):
    backend, qp = BACKENDS[way], solvable(3, 6, 12, 9, 3, two_sided=True, box=box).qp
    cold = backend.solve(qp)
    near = qp._replace(p=qp.p + 1e-3)
    if way == "session":
        warm, again = backend.solve(near, start=cold.handed), backend.solve(near)
    else:
        start = [a.copy() for a in cold[:4]]
        start[0][2] = np.nan  # a sample that starts cold
        start[1][3] = -start[1][3]  # and one that is misled
        warm, again = backend.solve(near, start=start), backend.solve(near)
        np.testing.assert_array_equal(warm.z[2], again.z[2])
        for size in (1e8, 1e30, 1e300, np.inf):  # a start that is no good costs steps, not the answer
            with np.errstate(invalid="ignore", over="ignore"):
                misled = backend.solve(near, start=[size * a for a in cold[:4]])
            assert np.isin(misled.status, UNSURE).all()
    assert check(near, warm).all()
    for a, b in zip(warm[:4], again[:4], strict=True):
        np.testing.assert_allclose(a, b, atol=UNIQUE[np.float64])


@pytest.mark.parametrize("way", [way for way in BACKENDS if way not in ("torch", "session")])
@pytest.mark.parametrize("steps", [0, 1, 3, 6])
def test_few_steps_are_told(way, steps):
    qp = solvable(3, 6, 12, 9, 3, two_sided=True).qp
    found = BACKENDS[way].solve(qp, steps=steps)
    residual = kkt_residual(qp, *found[:4]).max(1)
    for status, worst in zip(found.status, residual, strict=True):
        assert status in UNSURE
        assert status == Status.SOLVER or worst <= (1e-9 if status == Status.CONVERGED else 1e-5)


@each
def test_optima_agree_with_scipy(way):
    from scipy.optimize import LinearConstraint, minimize

    qp = solvable(4, 3, 6, 5, 2, two_sided=True, box=True).qp
    values = objective(qp, BACKENDS[way].solve(qp).z)
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
        assert values[i] <= found.fun + 1e-7


def test_every_status_gives_advice():
    for status in (*STATUSES, Status.NOT_FINITE):
        text = advise(status, residual=(1e-3, 1e-3, 1e-3), steps=50)
        assert text
        assert not text.endswith(".")
