"""Where the gradient of a quadratic program does not exist: what is told of it, and what is handed out."""

import numpy as np
import pytest
import torch
from qp_backends import KERNELS, laid, torch_alone
from quadratic_programs import KINDS, SIZES, determined, solvable

import icnnrt
from icnnrt.errors import CertificateError, InputError
from icnnrt.mathematics.namespace import NUMPY
from icnnrt.mathematics.qp_adjoint import held
from icnnrt.mathematics.qp_reference import QP, QPReference, QPSensitivity, qp_sensitivity, qp_solve
from icnnrt.mathematics.qp_reliability import DEPENDENT
from icnnrt.serving.operators import operator_session
from icnnrt_models import QPLayer
from icnnrt_models.layers import qp_operators

WAYS = ("statement", "bodies", "torch", *["kernels"] * KERNELS)
INFINITY = np.inf


def problem(Q, p, G=None, h=None, A=None, b=None, lower=-INFINITY, upper=INFINITY, h_lower=-INFINITY):
    """One, of all data."""
    n = len(p)
    G, A = (np.zeros((0, n)) if M is None else M for M in (G, A))
    h, b = (np.zeros(0) if a is None else a for a in (h, b))
    low, bounds = np.full(len(h), h_lower), (np.full(n, lower), np.full(n, upper))
    return QP(*(np.asarray(a, np.float64)[None] for a in (Q, p, G, low, h, A, b, *bounds)))


def not_unique(seed):
    """Name -> a problem whose argmin or multipliers are not unique, and whether rows are degenerate there."""
    rng = np.random.default_rng(seed)
    n = 6
    F, z, c = rng.standard_normal((n, 3)), rng.standard_normal(n), rng.standard_normal(n)
    Q, zero, G = F @ F.T, np.zeros((n, n)), rng.standard_normal((2, n))
    lam, A = rng.random(2) + 0.5, rng.standard_normal((2, n))
    A = np.concatenate([A, A.sum(0, keepdims=True)])
    U = np.linalg.qr(rng.standard_normal((n, n)))[0]
    flat = (U * [1.0, 1e-2, 1e-4, 1e-5, 0.0, 0.0]) @ U.T
    flat = 0.5 * (flat + flat.T)
    twice = np.concatenate([G, G])
    return {
        "low rank": problem(Q, -Q @ z, G, G @ z + 1.0),
        "low rank and rows": problem(Q, -Q @ z - G.T @ lam, G, G @ z),
        "ill-conditioned": problem(flat, -flat @ z, G, G @ z + 1.0),
        "no objective": problem(zero, 0 * c, np.eye(n), np.ones(n), lower=-1.0),
        "free directions": problem(zero, np.where(np.arange(n) < 2, 0.0, c), lower=-1.0, upper=1.0),
        "dependent equalities": problem(Q, -Q @ z, G, G @ z + 1.0, A, A @ z),
        "duplicate rows": problem(Q + np.eye(n), -Q @ z - z - G.T @ lam, twice, twice @ z),
    }


def system(qp, s, z_bar, lam_bar):
    """K, r, which rows are in it, and the units: the system of the adjoint."""
    n = qp.Q.shape[1]
    A = qp.A if qp.A.shape[1] else np.zeros((1, 1, n))
    rows = (np.concatenate(pair, 1)[:, None] for pair in ((s.lam, s.mu), (s.slack, s.box_slack)))
    bars = np.concatenate([lam_bar, np.zeros((1, n))], 1)[:, None]
    at = held(NUMPY, qp.Q, qp.G, A, *rows, z_bar[:, None], bars, np.zeros((1, 1, A.shape[1])))
    active = at.active[0, 0] > 0
    C = np.concatenate([at.of.C[0][active], at.of.A[0]])
    K = np.block([[at.of.Q[0], C.T], [C, np.zeros((len(C), len(C)))]])
    r = np.concatenate([at.r_z[0, 0], at.r[0, 0][active], np.zeros(len(at.of.A[0]))])
    return K, r, active, at


def least_norm(qp, s, z_bar, lam_bar):
    """d_z, d_λ and d_μ, and the share, by the pseudoinverse."""
    K, r, active, at = system(qp, s, z_bar, lam_bar)
    n = qp.Q.shape[1]
    x = np.linalg.pinv(K, rcond=1e-9, hermitian=True) @ r
    d = np.zeros(len(active))
    d[active] = x[n : n + active.sum()]
    return x[:n] * at.D[0, 0] * at.c[0, 0], d * at.F[0, 0], np.linalg.norm(r - K @ x) / np.linalg.norm(r)


def sensitivity(way, qp, s, *bars, dtype=np.float64):
    if way == "statement":
        return qp_sensitivity(qp.Q, qp.G, qp.A, s, *bars, precision=dtype)
    rows = (qp.Q, qp.G, qp.A, s.lam, s.mu, s.slack, s.box_slack, s.status, *bars)
    arrays = [a if a.dtype == np.int32 else a.astype(dtype) for a in (*rows, *[np.zeros((1, 0))] * (12 - len(rows)))]
    if way == "torch":
        with torch_alone():
            found = torch.ops.icnnrt.qp_sensitivity(*map(torch.from_numpy, arrays))
        return QPSensitivity(*(a.numpy() for a in found))
    session, native = operator_session("qp_sensitivity", np.dtype(dtype).name, way == "kernels")
    assert native == (way == "kernels")
    names = [node.name for node in session.get_inputs()]
    return QPSensitivity(*session.run(None, dict(zip(names, arrays, strict=True))))


def posed(qp, **options):
    given = qp._asdict()
    return icnnrt.qp(*(given[name] for name in "QpGhAb"), **{n: given[n] for n in ("h_lower", "lower", "upper")})


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", list(not_unique(0)))
@pytest.mark.parametrize("with_lam", [False, True])
def test_the_least_norm_of_the_part_that_has_a_gradient(name, way, with_lam):
    for seed in range(5):
        qp = not_unique(seed)[name]
        s = qp_solve(qp)
        assert s.status.tolist() == [0]
        rng = np.random.default_rng(seed)
        bars = rng.standard_normal((1, 6)), rng.standard_normal(s.lam.shape) * with_lam
        d_z, d, share = least_norm(qp, s, *bars)
        found = sensitivity(way, qp, s, *bars)
        rows = np.concatenate([found.d_lam[0], found.d_mu[0]])
        size = abs(d_z).max() + abs(d).max(initial=0.0) + 1e-9 * abs(bars[0]).max()
        np.testing.assert_allclose(found.d_z[0], d_z, atol=1e-6 * size, rtol=0)
        np.testing.assert_allclose(rows, d, atol=1e-6 * size, rtol=0)
        assert abs(found.share[0] - share) <= 1e-6
        assert found.weak.dtype == np.int32


@pytest.mark.parametrize("way", WAYS)
def test_no_sample_knows_of_its_neighbours(way):
    singular, regular = not_unique(1)["low rank"], problem(np.eye(6), np.ones(6), np.eye(6)[:2], np.ones(2))
    both = QP(*(np.concatenate(pair) for pair in zip(singular, regular, strict=True)))
    s, z_bar = qp_solve(both), np.ones((2, 6))
    s.status[0] = 0
    together = sensitivity(way, both, s, z_bar)
    for i, qp in enumerate((singular, regular)):
        alone = sensitivity(way, qp, QPReference(*(a[i : i + 1] for a in s)), z_bar[:1])
        np.testing.assert_allclose(together.d_z[i], alone.d_z[0], rtol=1e-9, atol=1e-9)
        assert abs(together.share[i] - alone.share[0]) <= 1e-9
    unsolved = sensitivity(way, both, s._replace(status=np.full(2, 4, np.int32)), z_bar)
    assert np.isnan(unsolved.d_z).all()
    assert np.isnan(unsolved.share).all()
    assert not unsolved.weak.any()


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_what_is_told_and_what_on_unsafe_makes_of_it(dtype):
    Q = np.array([np.diag([1.0, 0.0]), np.eye(2)], dtype)  # the first leaves z_1 free
    G, h = np.eye(2, dtype=dtype), np.full(2, 5.0, dtype)
    solution = icnnrt.qp(Q, np.zeros((2, 2), dtype), G, h, lower=-5.0)
    assert solution.ok.all()
    z_bar = np.ones((2, 2), dtype)
    used = solution.vjp(z_bar, on_unsafe="use")
    assert used.reliable.tolist() == [False, True]
    np.testing.assert_allclose(used.p, [[-1.0, 0.0], [-1.0, -1.0]], atol=1e-6)
    assert used.advice(0).startswith(
        "sample 0: NO_GRADIENT (0.71 of the loss in equilibrated units): a part of the loss"
    )
    assert used.advice(1).startswith("sample 1: reliable, ")
    nan = solution.vjp(z_bar)
    assert np.isnan(nan.p[0]).all()
    assert np.isfinite(nan.p[1]).all()
    assert np.isnan(nan.G).all()  # a sum over both
    assert nan.reliable.tolist() == [False, True]
    skip = solution.vjp(z_bar, on_unsafe="skip")
    assert skip.skipped.tolist() == [True, False]
    np.testing.assert_allclose(skip.G, used._matrix("G", (solution.lam, used.p)) * 0.0, atol=1e-9)
    with pytest.raises(CertificateError, match=r"1 of 2 samples: sample 0: NO_GRADIENT .*Pass on_unsafe='use' to take"):
        solution.vjp(z_bar, on_unsafe="raise")
    solution.vjp(z_bar * np.array([1.0, 0.0], dtype), on_unsafe="raise")  # that loss has one
    tangents = solution.jvp(p_dot=np.ones((2, 2), dtype))
    assert np.isnan(tangents.z[0]).all()
    assert np.isfinite(tangents.z[1]).all()
    with pytest.raises(CertificateError, match=r"NO_GRADIENT .*Pass on_unsafe='use'"):
        solution.jvp(p_dot=np.ones((2, 2), dtype), on_unsafe="raise")

    solver = icnnrt.QPSolver(2, 2, batch=2, dtype=np.dtype(dtype).name, box=True)
    assert not solver.reliable.any()
    solver.solve(Q, np.zeros(2, dtype), G, h, lower=np.full(2, -5.0, dtype), upper=np.full(2, 9.0, dtype))
    gradients = solver.vjp(z_bar)
    assert solver.reliable.tolist() == [False, True]
    np.testing.assert_allclose(gradients.p, used.p, atol=1e-6)


def test_what_is_not_solved_is_not_reliable():
    solution = icnnrt.qp(np.eye(2), np.array([[0.0, np.nan], [0.0, 1.0]]))
    for on_unsafe in ("nan", "skip", "use"):
        gradients = solution.vjp(np.ones((2, 2)), on_unsafe=on_unsafe)
        assert gradients.reliable.tolist() == [False, True]
        assert "NaN" in gradients.advice(0)


def weakly_active(seed, n=4):
    rng = np.random.default_rng(seed)
    M, G, z = rng.standard_normal((n, n)), rng.standard_normal((2, n)), rng.standard_normal(n)
    Q = M @ M.T / n + 0.3 * np.eye(n)
    return Q, -Q @ z, G, G @ z + np.array([0.0, 1.0])


@pytest.mark.parametrize("native", [None, False])
def test_a_weakly_active_row_is_a_kink_with_the_derivative_of_one_side(native):
    for seed in range(20):
        Q, p, G, h = weakly_active(seed)
        solution = icnnrt.qp(Q, p, G, h, native=native)
        z_bar = np.random.default_rng(seed).standard_normal(4)
        found = solution.vjp(z_bar)
        assert not found.reliable.any()
        assert found.advice().startswith("sample 0: KINK (G[0]): multiplier and slack")
        free = -np.linalg.solve(Q, z_bar)
        g = G[:1]
        K = np.block([[Q, g.T], [g, np.zeros((1, 1))]])
        *held_z, d_lam = np.linalg.solve(K, np.append(-z_bar, 0.0))
        active = abs(found.p - held_z).max() < abs(found.p - free).max()
        np.testing.assert_allclose(found.p, held_z if active else free, rtol=1e-7, atol=1e-7)
        np.testing.assert_allclose(found.h, [-d_lam if active else 0.0, 0.0], rtol=1e-7, atol=1e-7)
        with pytest.raises(CertificateError, match=r"KINK \(G\[0\]\)"):
            solution.vjp(z_bar, on_unsafe="raise")
        assert solution.vjp(z_bar, on_unsafe="skip").skipped.tolist() == [False]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_every_way_tells_multiplier_and_slack_apart_alike(way, dtype):
    """As far as λ s = 1e-12 leaves open which of both is 0, where a solve ends."""
    qp, nothing = problem(np.eye(2), np.zeros(2), np.array([[1.0, 0.0]]), np.ones(1)), np.zeros((1, 2))

    def weak(lam, slack):
        row = [np.array([[a]]) for a in (lam, 0.0, slack)]
        solution = QPReference(
            *(nothing, row[0], np.zeros((1, 0)), nothing, row[2], nothing + 1.0),
            *(np.zeros((1, 3)), np.zeros(1, np.int32), np.zeros((1, 5))),
        )
        return int(sensitivity(way, qp, solution, np.ones((1, 2)), dtype=dtype).weak[0])

    for ratio in (1.5e-3, 1e-2, 0.1, 1.0):
        for lam in (np.sqrt(1e-12 / ratio), np.sqrt(1e-12 * ratio)):
            assert weak(lam, 1e-12 / lam) == 1
    for large, small in ((2e-3, 1e-9), (2e-3, 1e-15), (1.0, 1e-12), (1.0, 1e-20)):
        assert weak(large, small) == weak(small, large) == 0
    for large, small in ((5e-7, 1e-20), (1e-20, 1e-19)):
        assert weak(large, small) == weak(small, large) == 1
    if dtype == np.float64:
        assert weak(1e-4, 1e-8) == weak(1e-8, 1e-4) == weak(1e-5, 1e-20) == 0


@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("native", [None, False])
def test_so_is_a_weakly_active_bound_where_no_bound_pushes(native, n):
    """And a variable in units of 1e-7, without bounds, is not near any."""
    solution = icnnrt.qp(np.eye(n), -np.ones(n), upper=1.0, native=native)  # z = 1 with and without its bounds
    found = solution.vjp(np.ones(n))
    assert not found.reliable.any()
    assert found.advice().startswith("sample 0: KINK (z[0]")
    unit = 1e-7
    z, G = np.full(n, 0.2 / unit), np.full((1, n), unit)
    large = icnnrt.qp(unit**2 * np.eye(n), -(unit**2) * z - G[0], G, G @ z, native=native)
    assert large.vjp(np.ones(n)).reliable.all()


@pytest.mark.parametrize("native", [None, False])
def test_rows_that_depend_on_each_other_are_told(native):
    Q, p, z_bar = np.eye(2), np.array([-2.0, -3.0]), np.array([0.0, 1.0])
    corner = icnnrt.qp(Q, p, np.ones((1, 2)), np.array([2.0]), upper=np.ones(2), native=native)
    repeated = icnnrt.qp(Q, p, np.array([[1.0, 0.0], [2e-7, 0.0]]), np.array([1.0, 2e-7]), native=native)
    equal = icnnrt.qp(Q, p, A=np.array([[1.0, 1.0], [2.0, 2.0]]), b=np.array([1.0, 2.0]), native=native)
    for solution in (corner, repeated, equal):
        found = solution.vjp(z_bar)
        assert not found.reliable.any()
        assert np.isfinite(found.p).all()
        assert found.advice().startswith("sample 0: KINK: rows that hold z depend on each other")
        with pytest.raises(CertificateError, match="rows that hold z depend"):
            solution.vjp(z_bar, on_unsafe="raise")
        with pytest.raises(CertificateError, match="rows that hold z depend"):
            solution.jvp(p_dot=z_bar, on_unsafe="raise")
        assert np.isfinite(solution.jvp(p_dot=z_bar).z).all()
        assert solution.vjp(z_bar, smoothing=1e-3).reliable.all()
    apart = icnnrt.qp(Q, p, np.array([[1.0, 0.0], [1.0, 1.0]]), np.array([1.0, 2.0]), native=native)
    assert apart.vjp(z_bar, on_unsafe="raise").reliable.all()


def dependent_rows():
    """Name -> data by their names in `icnnrt.qp`, and whether rows that hold z depend on each other."""
    Q, p, one = np.eye(2), np.array([-2.0, -3.0]), np.ones((1, 2))
    return {
        "a corner": ({"Q": Q, "p": p, "G": one, "h": np.array([2.0]), "upper": np.ones(2)}, True),
        "duplicates": ({"Q": Q, "p": p, "G": np.array([[1.0, 0.0], [2e-7, 0.0]]), "h": np.array([1.0, 2e-7])}, True),
        "equalities": ({"Q": Q, "p": p, "A": np.array([[1.0, 1.0], [2.0, 2.0]]), "b": np.array([1.0, 2.0])}, True),
        "none": ({"Q": Q, "p": p, "G": np.array([[1.0, 0.0], [1.0, 1.0]]), "h": np.array([1.0, 2.0])}, False),
        "no rows": ({"Q": Q, "p": p}, False),
    }


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("with_pattern", [False, True])
@pytest.mark.parametrize("native", [None, False])
@pytest.mark.parametrize("name", dependent_rows())
def test_a_solver_knows_of_rows_that_depend_on_each_other_too(name, native, with_pattern, dtype):
    given, depend = dependent_rows()[name]
    data = {key: a.astype(dtype) for key, a in given.items()}
    rows = (len(data[M]) if M in data else 0 for M in "GA")
    pattern = icnnrt.QPPattern(data["Q"], data.get("G"), data.get("A")) if with_pattern else None
    for batch in (1, 2):
        solver = icnnrt.QPSolver(
            2, *rows, batch=batch, dtype=dtype, box="upper" in data, native=native, pattern=pattern
        )
        rows = (solver.lam.shape[1], solver.nu.shape[1])
        solver.solve(**data)
        assert not solver.reliable.any()
        p_bar = solver.vjp(np.ones((batch, 2), dtype)).p.copy()
        for _ in range(2):
            assert (solver.reliable != depend).all()
        np.testing.assert_array_equal(solver.gradients.p, p_bar)  # which to ask for it leaves alone
        assert icnnrt.qp(**data, native=native).vjp(np.ones(2)).reliable[0] != depend
        # A call of other data is told anew.
        if "h" in data and name == "duplicates":
            solver.solve(h=data["h"] + np.array([0.0, 1.0], dtype))
            solver.vjp(np.ones((batch, 2), dtype))
            assert solver.reliable.all()


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("name", dependent_rows())
def test_a_layer_that_raises_knows_of_them_where_their_gradients_are_asked_for(name, kernels, monkeypatch):
    if not kernels:
        monkeypatch.setattr(qp_operators, "kernels", lambda *_: None)
    given, depend = dependent_rows()[name]
    for asked in given:
        data = {key: torch.from_numpy(a).requires_grad_(key == asked) for key, a in given.items()}
        z = QPLayer(on_unsafe="raise")(**data)
        if depend and asked not in "Qp":
            with pytest.raises(InputError, match="sample 0 has KINK: rows that hold z depend on each other"):
                z.sum().backward()
        else:
            z.sum().backward()
    if "G" in given:
        data = {key: torch.from_numpy(a) for key, a in given.items()}
        h = data.pop("h")
        loss = torch.func.vmap(torch.func.grad(lambda h: QPLayer(on_unsafe="raise")(h=h, **data).sum()))
        if depend:
            with pytest.raises(InputError, match="rows that hold z depend on each other"):
                loss(torch.stack([h, h]))
        else:
            loss(torch.stack([h, h]))


def cut_model(rng, n=4, k=3, m=6):
    """min over (y, t) of t + ½ μ ‖y‖² over k cuts that are nearly parallel, two of which and two rows hold y."""
    slopes = 0.3 * rng.standard_normal(n) + 0.02 * rng.standard_normal((k, n))
    G = np.concatenate([np.c_[rng.standard_normal((m, n)), np.zeros(m)], np.c_[slopes, -np.ones(k)]])
    z, lam, part = rng.standard_normal(n + 1), np.zeros(m + k), rng.uniform(0.2, 0.8)
    lam[[0, 3]], lam[m : m + 2] = rng.uniform(0.2, 1.2, 2), (part, 1.0 - part)
    h = G @ z + np.where(lam > 0.0, 0.0, rng.uniform(0.05, 1.0, m + k))
    Q, A = np.diag([*[0.1] * n, 0.0]), np.array([[1.0] * n + [0.0]])
    return Q, -Q @ z - G.T @ lam - A[0] * rng.standard_normal(), G, h, A, A @ z


@pytest.mark.parametrize("native", [None, False])
def test_gradients_do_not_depend_on_the_units_of_rows(native):
    units, unit, compared = 10.0 ** np.array([-7, 4, 0, -3, 6, -10, 0, 0, 0]), 1e-7, 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        Q, p, G, h, A, b = cut_model(rng)
        z_bar = np.append(rng.standard_normal(4), 0.0)
        plain = icnnrt.qp(Q, p, G, h, A, b, native=native).vjp(z_bar)
        if not plain.reliable.all():
            continue
        scaled = icnnrt.qp(Q, p, units[:, None] * G, units * h, unit * A, unit * b, native=native).vjp(z_bar)
        assert scaled.reliable.all()
        pairs = (scaled.G * units[:, None], plain.G), (scaled.h * units, plain.h), (scaled.A * unit, plain.A)
        for got, wanted in (*pairs, (scaled.b * unit, plain.b)):
            np.testing.assert_allclose(got, wanted, rtol=1e-8, atol=1e-9 * np.abs(wanted).max())
        compared += 1
    assert compared >= 15


def test_a_degenerate_vertex_is_a_kink():
    # three rows through the point where two would do
    G = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    solution = icnnrt.qp(np.eye(2), np.array([-2.0, -2.0]), G, np.array([1.0, 1.0, 3.0]))
    assert solution.vjp(np.ones(2)).reliable.all()
    gone = icnnrt.qp(np.eye(2), np.array([-1.0, -2.0]), G, np.array([1.0, 1.0, 3.0]))  # z_0 = 1 without its bound
    assert gone.vjp(np.ones(2)).advice().startswith("sample 0: KINK (G[0])")


@pytest.mark.parametrize("native", [None, False])
def test_an_equal_pair_without_a_multiplier_is_an_equality(native):
    Q, z_bar = np.array([[2.0, 0.5], [0.5, 1.0]]), np.array([1.0, 2.0])
    z = np.array([0.25, -1.0])
    free = {"h_lower": -9.0, "lower": -9.0, "upper": 9.0}
    G = np.array([[1.0, 1.0]])
    for name in ("row", "box"):
        fixed = {"lower": np.array([0.25, -9.0]), "upper": np.array([0.25, 9.0]), "h_lower": -9.0}
        sides = fixed if name == "box" else {**free, "h_lower": G @ z}
        solution = icnnrt.qp(Q, -Q @ z, G, G @ z if name == "row" else np.array([9.0]), **sides, native=native)
        np.testing.assert_allclose(solution.z, z, atol=1e-9)
        found = solution.vjp(z_bar)
        assert found.reliable.all()
        a = G if name == "row" else np.array([[1.0, 0.0]])
        K = np.block([[Q, a.T], [a, np.zeros((1, 1))]])
        *d_z, d = np.linalg.solve(K, np.append(-z_bar, 0.0))
        np.testing.assert_allclose(found.p, d_z, rtol=1e-9, atol=1e-9)
        high, low = (found.h, found.h_lower) if name == "row" else (found.upper, found.lower)
        assert abs(np.sum(high) + np.sum(low) + d) <= 1e-9  # where both sides move
        moved = {"h_dot": np.ones(1), "h_lower_dot": 1.0} if name == "row" else {"upper_dot": 1.0, "lower_dot": 1.0}
        tangent = solution.jvp(**moved)
        assert abs(tangent.z @ z_bar - (np.sum(high) + np.sum(low))) <= 1e-9
        for key, value in moved.items():  # each side alone: the exact transpose
            alone = solution.jvp(**{key: value})
            assert abs(alone.z @ z_bar - np.sum(getattr(found, key.removesuffix("_dot")))) <= 1e-9


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "degenerate"])
def test_no_false_alarm(kind):
    """Of a thousand problems of each kind that have a gradient."""
    count = 0
    for size in SIZES:
        for both in (False, True):
            if size == (1, 1, 0) and both:  # a row and the box may hold the one variable at once
                continue
            known = solvable(17, 90, *size, kind, two_sided=both, box=both)
            solution = posed(known.qp)
            gradients = solution.vjp(np.random.default_rng(3).standard_normal(solution.z.shape), on_unsafe="use")
            alarms = solution.ok & determined(known) & ~gradients.reliable
            # Where rows depend on each other the one sentence says so, of gradients by what is theirs.
            told = {gradients.advice(int(i)).partition(": ")[2] for i in np.flatnonzero(alarms)}
            assert told <= ({f"KINK: {DEPENDENT}"} if kind in ("duplicate rows", "dependent equalities") else set())
            count += solution.ok.sum()
    assert count > 1000


@pytest.mark.parametrize("kind", ["random", "low rank", "scaled rows", "degenerate", "duplicate rows"])
def test_finite_differences_where_reliable(kind):
    t, checked = 1e-6, 0
    for size in ((10, 5, 0), (10, 10, 3), (5, 0, 2)):
        known = solvable(19, 60, *size, kind, two_sided=True, box=True)
        rng = np.random.default_rng(5)
        solution = posed(known.qp)
        z_bar, direction = rng.standard_normal((2, *solution.z.shape))
        gradients = solution.vjp(z_bar)
        ends = [posed(known.qp._replace(p=known.qp.p + sign * t * direction)) for sign in (1.0, -1.0)]
        known_there = solution.ok & gradients.reliable & determined(known) & ends[0].ok & ends[1].ok
        difference = ((ends[0].z - ends[1].z) * z_bar).sum(1) / (2 * t)
        stated = (gradients.p * direction).sum(1)
        off = abs(difference - stated)[known_there]
        assert (off <= 1e-5 * (1.0 + abs(stated[known_there]))).all()
        checked += known_there.sum()
    assert checked >= (15 if kind == "degenerate" else 60)


def layer_data(grad=True):
    Q = torch.stack([torch.diag(torch.tensor([1.0, 0.0])), torch.eye(2)]).double()
    p, G, h = torch.zeros(2, 2).double(), torch.eye(2).double(), torch.full((2,), 5.0).double()
    return [a.requires_grad_(grad) for a in (Q, p, G, h)]


@pytest.mark.parametrize("kernels", [True, False])
def test_the_layer_acts_the_same(kernels, monkeypatch):
    if not kernels:
        monkeypatch.setattr(qp_operators, "kernels", lambda *_: None)

    def gradients(on_unsafe):
        data = layer_data()
        z = QPLayer(on_unsafe=on_unsafe)(*data, lower=-5.0)
        return torch.autograd.grad(z.sum(), data, allow_unused=True)

    nan, skip = gradients("nan"), gradients("skip")
    assert nan[1][0].isnan().all()
    assert nan[1][1].tolist() == pytest.approx([-1.0, -1.0])
    assert nan[2].isnan().all()
    assert skip[1].tolist() == [[0.0, 0.0], pytest.approx([-1.0, -1.0])]
    assert skip[2].isfinite().all()
    with pytest.raises(InputError, match="on_unsafe: sample 0 has NO_GRADIENT: a part of the loss has no gradient"):
        gradients("raise")
    Q, p, G, h = (torch.from_numpy(np.array(a)).requires_grad_() for a in weakly_active(0))
    with pytest.raises(InputError, match="sample 0 has KINK: multiplier and slack"):
        QPLayer(on_unsafe="raise")(Q, p, G, h).sum().backward()
    QPLayer()(Q, p, G, h).sum().backward()
    assert p.grad.isfinite().all()
    sound = [torch.from_numpy(a).requires_grad_() for a in solvable(3, 4, 6, 4, 2, two_sided=True, box=True).qp]
    laid(QPLayer(on_unsafe="raise"), *sound).sum().backward()


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # of torch's own
def test_the_layer_under_transforms():
    Q, p, G, h = layer_data(grad=False)

    def loss(on_unsafe):
        return lambda p: QPLayer(on_unsafe=on_unsafe)(Q, p, G, h, lower=-5.0).sum()

    assert torch.func.grad(loss("nan"))(p)[0].isnan().all()
    with pytest.raises(InputError, match="NO_GRADIENT"):
        torch.func.grad(loss("raise"))(p)
    with pytest.raises(InputError, match="NO_GRADIENT"):
        torch.func.vmap(torch.func.grad(loss("raise")))(torch.stack([p, p]))
    _, tangent = torch.func.jvp(lambda p: QPLayer()(Q, p, G, h, lower=-5.0), (p,), (torch.ones_like(p),))
    assert tangent[0].isnan().all()
    assert tangent[1].tolist() == pytest.approx([-1.0, -1.0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_trace_knows_an_equal_pair_without_a_multiplier():
    Q, z, G = torch.tensor([[2.0, 0.5], [0.5, 1.0]]).double(), torch.tensor([0.25, -1.0]).double(), torch.ones(1, 2)
    G, h = G.double(), (G.double() @ z).requires_grad_()

    class Fixed(torch.nn.Module):
        def forward(self, p, h):
            return QPLayer()(Q, p, G, h, h_lower=h.detach())

    p = (-Q @ z)[None].requires_grad_()
    expected = torch.autograd.grad((Fixed()(p, h) ** 2).sum(), [p, h])
    traced = torch.jit.trace(Fixed(), (p, h), check_trace=False)
    nearby = (p + 1e-3).detach().requires_grad_()  # the trace needs a Newton step that is not 0
    for at, wanted in ((p, expected), (nearby, torch.autograd.grad((Fixed()(nearby, h) ** 2).sum(), [nearby, h]))):
        for a, b in zip(torch.autograd.grad((traced(at, h) ** 2).sum(), [at, h]), wanted, strict=True):
            assert abs(a - b).max() <= 1e-6
