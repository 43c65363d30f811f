"""Domains other than the unit box: reference, portable bodies, certificate and torch layer.

Answers are told by certificate and by scipy, gradients by central differences of the K-step algorithm in float64.
"""

import copy
import functools

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from scipy.optimize import minimize

from icnnrt.mathematics import certificate, reference
from icnnrt.mathematics.domains import MODELS, NAMES, SIMPLEX, SPACE, UNIT_BOX, box_coordinates, space_coordinates
from icnnrt.mathematics.namespace import NUMPY
from icnnrt_exporters.operators.bodies import IR_VERSION, OP_DOMAIN, OP_VERSION, OPSET, functions
from icnnrt_models import FICNN, BundleEntropyArgmin

each_model = pytest.mark.parametrize("domain", [UNIT_BOX, SIMPLEX, SPACE], ids=lambda d: d.name)
each_new_model = pytest.mark.parametrize("domain", [SIMPLEX, SPACE], ids=lambda d: d.name)

CRITERION = 1e-8  # duality gap of a model relative to max(1, |dual|)
FINITE_DIFFERENCES = 1e-6  # h = 1e-5: h⁴ of truncation, rounding of y (1e-13) over h


def random_cuts(seed, B, k, n, scale=1.0):
    """Cuts that compete: v differs from cut to cut by about as much as y can change it."""
    rng = np.random.default_rng(seed)
    G = scale * rng.standard_normal((B, k, n)) / np.sqrt(n) * 3
    return G, 0.3 * scale * rng.standard_normal((B, k))


def hard_cuts(kind, scale):
    if kind == "duplicates":
        G, e = random_cuts(1, 5, 4, 10, scale)
        return np.concatenate([G, G, G[:, :1]], axis=1), np.concatenate([e, e, e[:, :1]], axis=1)
    if kind == "equal":
        G, e = random_cuts(2, 5, 1, 10, scale)
        return np.repeat(G, 4, axis=1), np.repeat(e, 4, axis=1)
    if kind == "nearly parallel":
        rng = np.random.default_rng(3)
        G, e = random_cuts(3, 5, 1, 10, scale)
        return G + 1e-3 * scale * rng.standard_normal((5, 6, 10)), e + 1e-3 * scale * rng.standard_normal((5, 6))
    if kind == "saturated":
        G, e = random_cuts(4, 5, 5, 30, 1.0)
        return 2 * scale * np.abs(G) + scale / 2, e
    if kind == "a large common slope":
        G, e = random_cuts(5, 5, 5, 10, min(scale, 10.0))
        return G + scale * np.random.default_rng(5).standard_normal((5, 1, 10)), e
    k, n = {"one cut": (1, 10), "one variable": (5, 1), "more cuts than variables": (30, 3), "many": (10, 159)}[kind]
    return random_cuts(k, 5, k, n, scale)


HARD = (
    "duplicates",
    "equal",
    "nearly parallel",
    "saturated",
    "a large common slope",
    "one cut",
    "one variable",
    "more cuts than variables",
    "many",
)


def network(kind, n, seed):
    """Value, gradient and Hessian of a two-layer network convex in y: f = Σ a(Z a(Wy + b) + Vy) with Z >= 0."""
    rng = np.random.default_rng(seed)
    W, b = rng.standard_normal((20, n)), rng.standard_normal(20)
    Z, V = np.abs(rng.standard_normal((12, 20))) / 8, rng.standard_normal((12, n))
    bend = (lambda z: np.maximum(z, 0.0)) if kind == "relu" else reference.softplus
    slope = (lambda z: (z > 0) * 1.0) if kind == "relu" else reference.sigmoid
    curve = (lambda z: 0.0 * z) if kind == "relu" else (lambda z: reference.sigmoid(z) * reference.sigmoid(-z))

    def value_and_gradient(y):
        first = y @ W.T + b
        second = bend(first) @ Z.T + y @ V.T
        out = slope(second)
        return bend(second).sum(1), out @ V + ((out @ Z) * slope(first)) @ W

    def hessian(y):
        first = y @ W.T + b
        second = bend(first) @ Z.T + y @ V.T
        J = V + (Z * slope(first)[:, None, :]) @ W
        inner = (slope(second) @ Z) * curve(first)
        return J.swapaxes(1, 2) @ (curve(second)[:, :, None] * J) + W.T @ (inner[:, :, None] * W)

    return value_and_gradient, hessian


def point_of(domain, B, n, seed=0):
    rng = np.random.default_rng(seed)
    return domain.point(NUMPY, rng.standard_normal((B, n)))


# ---------------------------------------------------------------- the domains' own formulas


def test_every_name_has_a_model():
    assert tuple(MODELS) == NAMES
    assert {domain.name for domain in MODELS.values()} == {"unit_box", "simplex", "space"}


@each_model
@pytest.mark.parametrize("n", [1, 2, 7])
def test_point_conjugate_and_curvature_fit_together(domain, n):
    """C(s) = s'(y − c) − R(y) at y = y(s), ∇C = y − c, D = ∂y/∂s = F F', and y(logits(y)) = y."""
    rng = np.random.default_rng(n)
    s, a = 3 * rng.standard_normal((4, n)), rng.standard_normal((4, n))
    y, h = domain.point(NUMPY, s), 1e-6
    c = domain.centre(n)
    np.testing.assert_allclose(
        domain.conjugate(NUMPY, s)[:, 0], (s * (y - c)).sum(1) - domain.regulariser(NUMPY, y)[:, 0], atol=1e-13
    )
    along = (domain.conjugate(NUMPY, s + h * a) - domain.conjugate(NUMPY, s - h * a))[:, 0] / (2 * h)
    np.testing.assert_allclose(along, ((y - c) * a).sum(1), atol=1e-8)
    difference = (domain.point(NUMPY, s + h * a) - domain.point(NUMPY, s - h * a)) / (2 * h)
    np.testing.assert_allclose(domain.curvature(NUMPY, s, a), difference, atol=1e-8)
    np.testing.assert_allclose(
        domain.root(NUMPY, s, domain.root_transposed(NUMPY, s, a)), domain.curvature(NUMPY, s, a), atol=1e-14
    )
    np.testing.assert_allclose(domain.point(NUMPY, domain.logits(NUMPY, y)), y, atol=1e-14)


@each_model
def test_far_logits_stay_finite(domain):
    s = np.array([[800.0, -800.0, 0.0], [-1e4, 1e4, 1e4]])
    for value in (domain.point(NUMPY, s), domain.conjugate(NUMPY, s), domain.curvature(NUMPY, s, np.ones_like(s))):
        assert np.isfinite(value).all()


# ---------------------------------------------------------------- the model of k cuts


@each_model
@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0, 1e3])
@pytest.mark.parametrize("kind", HARD)
def test_the_reference_solves_hard_cuts_by_its_own_certificate(domain, kind, scale):
    G, e = hard_cuts(kind, scale)
    solution = reference.bundle_entropy_solve(G, e, domain=domain)
    size = np.maximum(1.0, np.abs(solution.lower_bound))
    recomputed = certificate.kkt_residuals(G, e, solution.lam, solution.y, domain)
    assert (recomputed[:, 2] / size).max() <= CRITERION
    assert recomputed[:, 1].max() <= 1e-14
    assert (recomputed[:, 0] / (1 + np.abs(solution.y).max(1))).max() <= 1e-12
    primal = (e + np.einsum("bkn,bn->bk", G, solution.y - domain.centre(G.shape[2]))).max(1)
    gap = primal + domain.regulariser(NUMPY, solution.y)[:, 0] - solution.lower_bound
    assert (np.abs(gap) / size).max() <= 2 * CRITERION


@each_new_model
def test_scipy_finds_no_lower_model(domain):
    """SLSQP on the epigraph form, min t + R(y) s.t. v(y) <= t."""
    B, k, n = 6, 4, 5
    G, e = random_cuts(11, B, k, n, 2.0)
    solution = reference.bundle_entropy_solve(G, e, domain=domain)
    c = domain.centre(n)
    for b in range(B):
        conditions = [{"type": "ineq", "fun": lambda z, b=b: z[-1] - e[b] - G[b] @ (z[:n] - c)}]
        if domain is SIMPLEX:
            conditions.append({"type": "eq", "fun": lambda z: z[:n].sum() - 1.0})
        bounds = [(1e-12, 1.0)] * n + [(None, None)] if domain is SIMPLEX else None
        start = np.append(np.full(n, c), e[b].max() + 1.0)
        found = minimize(
            lambda z: z[-1] + domain.regulariser(NUMPY, z[:n])[0],
            start,
            bounds=bounds,
            constraints=conditions,
            tol=1e-12,
        )
        assert abs(found.fun - solution.lower_bound[b]) <= 1e-6
        np.testing.assert_allclose(found.x[:n], solution.y[b], atol=1e-4)


@each_model
def test_warm_starts_and_bad_samples(domain):
    G, e = random_cuts(4, 7, 5, 10, 3.0)
    cold = reference.bundle_entropy_solve(G, e, domain=domain)
    warm = reference.bundle_entropy_solve(G, e, cold.lam[:, :3] / cold.lam[:, :3].sum(1, keepdims=True), domain=domain)
    np.testing.assert_allclose(warm.y, cold.y, atol=1e-10)
    for bad, place in ((np.nan, (2, 1, 3)), (np.inf, (2, 1, 3)), (-np.inf, (2, 1, 3))):
        spoilt = G.copy()
        spoilt[place] = bad
        got = reference.bundle_entropy_solve(spoilt, e, domain=domain)
        assert np.isnan(got.y[2]).all()
        assert np.isnan(got.lower_bound[2])
        others = np.arange(7) != 2
        np.testing.assert_array_equal(got.y[others], cold.y[others])


@each_model
@pytest.mark.parametrize(("n", "k", "scale"), [(1, 1, 1.0), (10, 1, 1.0), (10, 5, 3.0), (3, 5, 2.0), (40, 10, 5.0)])
def test_the_kkt_adjoint_is_the_derivative_of_the_solve(domain, n, k, scale):
    """∂(ȳ'y)/∂e = c_λ and ∂(ȳ'y)/∂G = λ c_y' + c_λ (y − c)', by central differences along random directions."""
    B, step = 7, 1e-5
    G, e = random_cuts(n + k, B, k, n, scale)
    rng = np.random.default_rng(n)
    y_bar, G_dot, e_dot = rng.standard_normal((B, n)), rng.standard_normal(G.shape), rng.standard_normal(e.shape)
    at = reference.bundle_entropy_solve(G, e, domain=domain)
    c_y, c_lam = reference.kkt_adjoint(G, e, at.lam, y_bar, domain)
    G_bar = at.lam[:, :, None] * c_y[:, None, :] + c_lam[:, :, None] * (at.y - domain.centre(n))[:, None, :]
    derivative = (G_bar * G_dot).sum((1, 2)) + (c_lam * e_dot).sum(1)
    ahead, behind = (
        reference.bundle_entropy_solve(G + h * G_dot, e + h * e_dot, domain=domain).y for h in (step, -step)
    )
    difference = (y_bar * (ahead - behind)).sum(1) / (2 * step)
    np.testing.assert_allclose(derivative, difference, rtol=1e-6, atol=1e-7)


# ---------------------------------------------------------------- the K-step method


@each_model
@pytest.mark.parametrize("kind", ["relu", "softplus"])
def test_the_argmin_is_certified_and_scipy_agrees(domain, kind):
    B, n = 4, 5
    value_and_gradient, _ = network(kind, n, seed=1)
    path = reference.bundle_entropy_argmin(value_and_gradient, point_of(domain, B, n), 40, domain=domain)
    assert path.gap.max() <= 1e-5
    assert path.gap.min() >= -1e-12
    assert certificate.duality_gap(path.energy, path.slopes, path.offsets, path.lam, domain) == pytest.approx(
        path.gap, abs=1e-11
    )
    assert certificate.convexity_violation(path.slopes, path.offsets, path.cut_points, domain).max() <= 1e-12

    def objective(z):
        y = domain.point(NUMPY, z)
        return value_and_gradient(y[None])[0][0] + domain.regulariser(NUMPY, y)[0]

    found = minimize(objective, np.zeros(n), method="Nelder-Mead", options={"maxiter": 5000, "fatol": 1e-12}).fun
    assert path.lower_bound[0] - 1e-9 <= found
    assert path.energy[0] <= found + 1e-5


def directional(function, point, direction, h=1e-5):
    """Central differences by h and 2h, extrapolated: what truncation leaves falls with h⁴, also where K steps end on a
    sharp turn and h² is too much."""

    def central(h):
        return (function(point + h * direction) - function(point - h * direction)) / (2 * h)

    return (4 * central(h) - central(2 * h)) / 3


def differentiable(smooth, faces, paths):
    """[B]: whether y of K steps has a derivative that differences can see, told by the paths they are taken of.

    Of pieces it has one where every path cuts the same faces with the same cuts active, and where all have converged: a
    cut whose point lies on a kink before is of the face that the last bit decides. Of a smooth energy that has all but
    converged, cuts repeat, and rounding decides which of them carries λ.
    """
    gap, active = np.stack([path.gap for path in paths]), np.stack([path.lam_history > 1e-6 for path in paths])
    same = (active == active[0]).all((0, 2, 3))
    if smooth:
        return same & (gap.min(0) >= 1e-7)
    return (same & (np.ptp(np.stack(faces), axis=0).max((1, 2)) <= 1e-9)) | (gap.max(0) <= 1e-12)


@each_model
@pytest.mark.parametrize("kind", ["relu", "softplus"])
@pytest.mark.parametrize("K", [1, 3, 8])
def test_the_argmin_adjoint_is_exact(domain, kind, K):
    """Of a tilt d'y of the energy: ∂/∂d = Σ_i ē_i y_i + seed_i."""
    B, n = 24, 4
    value_and_gradient, hessian = network(kind, n, seed=2)
    y_init, y_bar = point_of(domain, B, n), np.random.default_rng(5).standard_normal((B, n))
    direction = np.random.default_rng(6).standard_normal(n)
    faces, paths = [], []

    def answer(d):
        def tilted(y):
            f, g = value_and_gradient(y)
            return f + y @ d, g + d

        paths.append(reference.bundle_entropy_argmin(tilted, y_init, K, domain=domain))
        faces.append(paths[-1].slopes - d)
        return paths[-1]

    path = answer(np.zeros(n))
    hvp = lambda y, s: np.einsum("bij,bj->bi", hessian(y), s)  # noqa: E731
    cuts = reference.argmin_adjoint(path, y_bar, hvp, domain=domain)
    found = ((cuts.offset_bar[:, :, None] * path.cut_points + cuts.seed).sum(1)) @ direction
    errors = []
    for h in (1e-5, 4e-5, 2.5e-6):  # a wrong derivative is wrong at each; noise and truncation are not
        expected = directional(lambda d: (answer(d).y * y_bar).sum(1), np.zeros(n), direction, h)
        errors.append(np.abs(found - expected))
    some = differentiable(kind == "softplus", faces, paths)
    assert some.sum() >= 3
    assert np.min(errors, axis=0)[some].max() <= FINITE_DIFFERENCES * np.abs(found[some]).max() + 1e-8


def newton(domain, gradient, hessian, y):
    """The argmin of a smooth f to rounding: damped Newton steps on the logits, s + ∇f(y(s)) = 0 (on the simplex up to
    a constant), from y [B, n]."""
    free = lambda a: domain.plain(NUMPY, a)  # noqa: E731
    root = lambda s: free(s + gradient(domain.point(NUMPY, s)))  # noqa: E731
    s = free(domain.logits(NUMPY, y))
    for _ in range(50):
        H, eye = hessian(domain.point(NUMPY, s)), np.eye(y.shape[1])
        HD = domain.curvature(NUMPY, s[:, None], H)  # D applied to every row of ∇²f, which is symmetric
        ds = -np.linalg.solve(eye + free(HD.swapaxes(1, 2)).swapaxes(1, 2), root(s)[:, :, None])[:, :, 0]
        trials = [s + a * ds for a in (1.0, 0.5, 0.25, 0.1)]
        sizes = np.stack([np.abs(root(trial)).max(1) for trial in trials])
        s = np.stack(trials)[sizes.argmin(0), np.arange(len(s))]
    assert np.abs(root(s)).max() <= 1e-12 * (1 + np.abs(s).max())
    return domain.point(NUMPY, s)


@each_model
def test_the_implicit_adjoint_holds_at_convergence(domain):
    """At an argmin that Newton's method finds: y of K cuts is known by its gap only, to √(2 gap), R being 1-convex."""
    B, n = 3, 4
    value_and_gradient, hessian = network("softplus", n, seed=2)
    y_init, y_bar = point_of(domain, B, n), np.random.default_rng(5).standard_normal((B, n))
    direction = np.random.default_rng(6).standard_normal(n)
    path = reference.bundle_entropy_argmin(value_and_gradient, y_init, 60 if domain is SPACE else 25, domain=domain)

    def answer(d):
        return newton(domain, lambda y: value_and_gradient(y)[1] + d, hessian, path.y)

    y = answer(np.zeros(n))
    assert (np.linalg.norm(y - path.y, axis=1) <= np.sqrt(2 * np.maximum(path.gap, 0.0) + 1e-12)).all()
    c_y = reference.implicit_adjoint(hessian(y), y, y_bar, domain)
    expected = directional(lambda d: (answer(d) * y_bar).sum(1), np.zeros(n), direction, h=1e-4)
    np.testing.assert_allclose(c_y @ direction, expected, rtol=1e-8, atol=1e-8)


# ---------------------------------------------------------------- boxes, and μ


def box(B, n, seed=7):
    rng = np.random.default_rng(seed)
    lower = 2 * rng.standard_normal((B, n))
    return lower, lower + rng.uniform(0.2, 3.0, (B, n))


def test_a_box_is_solved_inside_its_bounds_and_scipy_agrees():
    B, n = 4, 5
    value_and_gradient, _ = network("softplus", n, seed=1)
    lower, upper = box(B, n)
    coordinates = box_coordinates(lower, upper)
    of_p = reference.in_coordinates(value_and_gradient, coordinates)
    path = reference.bundle_entropy_argmin(of_p, np.full((B, n), 0.5), 30)
    y = coordinates.y(path.y)
    assert ((y >= lower) & (y <= upper)).all()
    assert path.gap.max() <= 1e-8
    for b in range(B):

        def objective(y, b=b):
            p = (y - lower[b]) / (upper[b] - lower[b])
            return value_and_gradient(y[None])[0][0] + reference.negative_entropy(p)

        inside = list(zip(lower[b] + 1e-9, upper[b] - 1e-9, strict=True))
        found = minimize(objective, (lower[b] + upper[b]) / 2, bounds=inside, tol=1e-14)
        assert path.lower_bound[b] - 1e-9 <= found.fun <= path.energy[b] + 1e-5


@pytest.mark.parametrize("kind", ["relu", "softplus"])
@pytest.mark.parametrize("K", [1, 3])
def test_the_gradient_of_bounds_is_exact(kind, K):
    B, n = 3, 4
    value_and_gradient, hessian = network(kind, n, seed=2)
    lower, upper = box(B, n)
    rng = np.random.default_rng(9)
    y_bar, l_dot, u_dot, p_init = (rng.standard_normal((B, n)) for _ in range(4))
    p_init = reference.sigmoid(p_init)

    def answer(t):
        coordinates = box_coordinates(lower + t * l_dot, upper + t * u_dot)
        path = reference.bundle_entropy_argmin(reference.in_coordinates(value_and_gradient, coordinates), p_init, K)
        return coordinates, path

    coordinates, path = answer(0.0)
    r = coordinates.scale
    H = lambda p: hessian(coordinates.y(p))  # noqa: E731
    hvp = lambda p, s: r * np.einsum("bij,bj->bi", H(p), r * s)  # noqa: E731
    cuts = reference.argmin_adjoint(path, r * y_bar, hvp)
    gradients = path.slopes / r[:, None]
    products = np.stack(
        [np.einsum("bij,bj->bi", H(path.cut_points[:, i]), r * cuts.seed[:, i]) for i in range(K)], axis=1
    )
    bars = reference.coordinates_adjoint(path.cut_points, gradients, cuts, path.y, y_bar, products)
    found = ((bars.shift - bars.scale) * l_dot + bars.scale * u_dot).sum(1)

    def loss(t):
        coordinates, path = answer(t)
        return (coordinates.y(path.y) * y_bar).sum(1)

    expected = directional(loss, 0.0, 1.0)
    np.testing.assert_allclose(found, expected, atol=FINITE_DIFFERENCES * (1 + np.abs(found).max()))


def test_equal_bounds_fix_a_variable_and_crossed_bounds_spoil_their_sample_alone():
    B, n = 3, 4
    value_and_gradient, _ = network("softplus", n, seed=2)
    lower, upper = box(B, n)
    upper[0, 1] = lower[0, 1]

    def answer(lower, upper):
        coordinates = box_coordinates(lower, upper)
        of_p = reference.in_coordinates(value_and_gradient, coordinates)
        path = reference.bundle_entropy_argmin(of_p, np.full((B, n), 0.5), 20)
        return path, coordinates.y(path.y)

    path, y = answer(lower, upper)
    assert y[0, 1] == lower[0, 1]
    assert path.gap.max() <= 1e-6
    crossed = upper.copy()
    crossed[1, 2] = lower[1, 2] - 1e-3
    _, spoilt = answer(lower, crossed)
    assert np.isnan(spoilt[1]).all()
    np.testing.assert_array_equal(spoilt[[0, 2]], y[[0, 2]])


@pytest.mark.parametrize("mu", [0.3, 1.0, 30.0])
def test_mu_scales_the_quadratic(mu):
    B, n = 3, 4
    value_and_gradient, _ = network("softplus", n, seed=2)
    coordinates = space_coordinates(mu)
    of_p = reference.in_coordinates(value_and_gradient, coordinates)
    path = reference.bundle_entropy_argmin(of_p, np.zeros((B, n)), 40, domain=SPACE)
    y = coordinates.y(path.y)
    found = minimize(
        lambda y: value_and_gradient(y[None])[0][0] + mu / 2 * (y * y).sum(),
        np.zeros(n),
        jac=lambda y: value_and_gradient(y[None])[1][0] + mu * y,
        tol=1e-12,
    )
    assert (path.lower_bound <= found.fun + 1e-9).all()
    # The energy is strongly convex: (μ/2) ‖y − y*‖² <= gap.
    assert (mu / 2 * ((y - found.x) ** 2).sum(1) <= path.gap + 1e-9).all()
    assert path.gap.max() <= 1e-2
    np.testing.assert_allclose(coordinates.p(y), path.y, rtol=1e-14)


# ---------------------------------------------------------------- the portable bodies
# Both sides solve until the gap is rounding. float32 rounds y and λ once each. On the scale of y, or of slopes.
TYPES = {np.float64: TensorProto.DOUBLE, np.float32: TensorProto.FLOAT}
Y_TOLERANCE = {np.float64: 1e-10, np.float32: 2e-5}
ADJOINT_TOLERANCE = {np.float64: 1e-9, np.float32: 2e-5}
SOLVE_IO = (
    {"slopes": ["B", "k", "n"], "offsets": ["B", "k"], "lam_start": ["B", "k_prev"]},
    {"y": ["B", "n"], "lam": ["B", "k"], "lower_bound": ["B"], "residual": ["B", 3]},
)
ADJOINT_IO = (
    {"slopes": ["B", "k", "n"], "offsets": ["B", "k"], "lam": ["B", "k"], "y_bar": ["B", "n"]},
    {"c_y": ["B", "n"], "c_lam": ["B", "k"]},
)
each_dtype = pytest.mark.parametrize("dtype", TYPES)


def body_model(domain, suffix, dtype, **attributes):
    inputs, outputs = SOLVE_IO if suffix == "Solve" else ADJOINT_IO
    types = dict.fromkeys(("lower_bound", "residual"), TYPES[np.float64])
    infos = [
        [helper.make_tensor_value_info(name, types.get(name, TYPES[dtype]), shape) for name, shape in io.items()]
        for io in (inputs, outputs)
    ]
    node = helper.make_node(domain.operators + suffix, list(inputs), list(outputs), domain=OP_DOMAIN, **attributes)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(OP_DOMAIN, OP_VERSION)]
    graph = helper.make_graph([node], suffix, *infos)
    return helper.make_model(graph, functions=functions(domain.name), opset_imports=opsets, ir_version=IR_VERSION)


@functools.cache
def session(domain, suffix, dtype, **attributes):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    serialised = body_model(domain, suffix, dtype, **attributes).SerializeToString()
    return onnxruntime.InferenceSession(serialised, options, providers=["CPUExecutionProvider"])


def run_solve(domain, G, e, lam_start=None, dtype=np.float64, steps=reference.STEPS):
    lam_start = np.empty((len(G), 0)) if lam_start is None else lam_start
    feeds = {"slopes": G.astype(dtype), "offsets": e.astype(dtype), "lam_start": lam_start.astype(dtype)}
    return reference.InnerSolution(*session(domain, "Solve", dtype, steps=steps).run(None, feeds))


def run_adjoint(domain, G, e, lam, y_bar, dtype=np.float64):
    feeds = {"slopes": G, "offsets": e, "lam": lam, "y_bar": y_bar}
    return session(domain, "Adjoint", dtype).run(None, {name: a.astype(dtype) for name, a in feeds.items()})


def rounded(dtype, *arrays):
    return tuple(a.astype(dtype).astype(np.float64) for a in arrays)


def check_body(domain, G, e, lam_start=None, dtype=np.float64, y_tolerance=None):
    G, e = rounded(dtype, G, e)
    expected = reference.bundle_entropy_solve(G, e, lam_start, domain=domain)
    y, lam, lower_bound, residual = got = run_solve(domain, G, e, lam_start, dtype)
    assert (y.dtype, lam.dtype, lower_bound.dtype, residual.dtype) == (dtype, dtype, np.float64, np.float64)
    assert [a.shape for a in got] == [a.shape for a in expected]
    size = np.maximum(1.0, np.abs(expected.lower_bound))
    y_size = 1.0 + np.abs(expected.y).max(1, keepdims=True)
    assert (np.abs(y - expected.y) / y_size).max() <= (y_tolerance or Y_TOLERANCE[dtype])
    assert (np.abs(lower_bound - expected.lower_bound) / size).max() <= 1e-8
    assert (residual[:, 2] / size).max() <= CRITERION
    assert residual[:, 1].max() <= 1e-14
    assert (residual[:, 0] / y_size[:, 0]).max() <= np.finfo(dtype).eps
    assert lam.min() >= 0.0
    assert np.abs(lam.astype(np.float64).sum(1) - 1.0).max() <= 4 * np.finfo(dtype).eps * lam.shape[1]


@each_new_model
@each_dtype
@pytest.mark.parametrize("scale", [1e-3, 1.0, 10.0, 100.0])
@pytest.mark.parametrize(("n", "k", "B"), [(1, 1, 1), (1, 2, 7), (10, 1, 7), (10, 5, 7), (10, 30, 3), (159, 10, 3)])
def test_bodies_solve_random_cuts(domain, n, k, B, scale, dtype):
    check_body(domain, *random_cuts(k, B, k, n, scale), dtype=dtype)


@each_new_model
@each_dtype
@pytest.mark.parametrize("scale", [1e-2, 1.0, 100.0])
@pytest.mark.parametrize("kind", HARD)
def test_bodies_solve_hard_cuts(domain, kind, scale, dtype):
    # A gap at rounding bounds y by its root, where nearly parallel cuts make λ ill-determined.
    check_body(domain, *hard_cuts(kind, scale), dtype=dtype, y_tolerance=1e-7 if dtype == np.float64 else 2e-5)


@each_new_model
@each_dtype
def test_bodies_start_warm_and_take_empty_batches(domain, dtype):
    G, e = random_cuts(0, 7, 6, 10, 3.0)
    lam = reference.bundle_entropy_solve(G, e, domain=domain).lam
    for k_prev in (1, 3, 6):
        check_body(domain, G, e, lam[:, :k_prev], dtype)
    empty = run_solve(domain, np.empty((0, 3, 5)), np.empty((0, 3)), np.empty((0, 2)), dtype)
    assert [a.shape for a in empty] == [(0, 5), (0, 3), (0,), (0, 3)]
    none = np.empty((0, 3))
    assert [a.shape for a in run_adjoint(domain, np.empty((0, 3, 5)), none, none, np.empty((0, 5)), dtype)] == [
        (0, 5),
        (0, 3),
    ]


@each_new_model
@each_dtype
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", ["slope", "offset"])
def test_a_bad_sample_poisons_itself_alone_in_bodies(domain, bad, place, dtype):
    G, e = random_cuts(4, 7, 5, 10, 3.0)
    clean = run_solve(domain, G, e, dtype=dtype)
    if place == "slope":
        G[2, 1, 3] = bad
    else:
        e[2, 1] = bad
    y, _, lower_bound, residual = got = run_solve(domain, G, e, dtype=dtype)
    others = np.arange(7) != 2
    assert np.isnan(y[2]).all()
    assert np.isnan(lower_bound[2])
    assert not np.isfinite(residual[2, [0, 2]]).any()
    for a, b in zip(got, clean, strict=True):
        np.testing.assert_array_equal(a[others], b[others])


@each_new_model
@each_dtype
@pytest.mark.parametrize("scale", [1e-2, 1.0, 10.0, 100.0])
@pytest.mark.parametrize(("n", "k", "B"), [(1, 1, 7), (1, 5, 7), (3, 5, 20), (10, 30, 7), (159, 10, 5)])
def test_adjoint_bodies_are_the_references(domain, n, k, B, scale, dtype):
    G, e = rounded(dtype, *random_cuts(k, B, k, n, scale))
    (lam,) = rounded(dtype, reference.bundle_entropy_solve(G, e, domain=domain).lam)
    (y_bar,) = rounded(dtype, np.random.default_rng(n).standard_normal((B, n)))
    c_y, c_lam = run_adjoint(domain, G, e, lam, y_bar, dtype)
    assert c_y.dtype == c_lam.dtype == dtype
    expected_y, expected_lam = reference.kkt_adjoint(G, e, lam, y_bar, domain)
    size = np.abs(y_bar).max(1, keepdims=True) / np.abs(G).max((1, 2))[:, None]
    np.testing.assert_allclose(c_y, expected_y, atol=ADJOINT_TOLERANCE[dtype])
    assert (np.abs(c_lam - expected_lam) / size).max() <= ADJOINT_TOLERANCE[dtype]


@each_new_model
@each_dtype
@pytest.mark.parametrize(("suffix", "attributes"), [("Solve", {"steps": 5}), ("Adjoint", {})])
def test_the_models_of_bodies_pass_onnx_checker(domain, suffix, attributes, dtype):
    onnx.checker.check_model(body_model(domain, suffix, dtype, **attributes), full_check=True)


@pytest.mark.parametrize("name", NAMES)
def test_bodies_come_with_all_they_call(name):
    bodies = functions(name)
    known = {body.name for body in bodies}
    assert {MODELS[name].operators + suffix for suffix in ("Solve", "Adjoint")} <= known

    def nodes(found):
        for node in found:
            yield node
            for attribute in node.attribute:
                yield from nodes(attribute.g.node)

    for body in bodies:
        for node in nodes(body.node):
            assert node.domain == "" or node.op_type in known
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                assert onnx.numpy_helper.to_array(node.attribute[0].t).dtype in (np.float64, np.int64, np.bool_)


# ---------------------------------------------------------------- the torch layer

F64 = torch.float64
SAME_ALGORITHM = 1e-9  # float64 against float64: the same steps, sums in another order
CASES = {"unit_box": {}, "box": {}, "simplex": {}, "space": {"mu": 1.0}, "space, mu = 3": {"mu": 3.0}}
each_case = pytest.mark.parametrize("case", CASES)
X_DIM, N, BATCH = 3, 4, 3


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def layer_of(case, iterations, activation="softplus", dtype=F64, **options):
    energy = FICNN(X_DIM, N, (7, 5), activation=activation, generator=seeded(0), dtype=dtype)
    with torch.no_grad():
        for name, p in energy.named_parameters():
            if name.endswith("W_y"):
                p.mul_(2.0)  # bent enough that cuts matter
    return BundleEntropyArgmin(energy, iterations, domain=case.partition(",")[0], **CASES[case], **options)


def inputs_of(case, dtype=F64):
    found = {"x": torch.randn(BATCH, X_DIM, generator=seeded(1), dtype=F64)}
    if case == "box":
        found["lower"] = torch.randn(BATCH, N, generator=seeded(2), dtype=F64)
        found["upper"] = found["lower"] + 0.2 + 2 * torch.rand(BATCH, N, generator=seeded(3), dtype=F64)
    return {name: tensor.to(dtype) for name, tensor in found.items()}


def place_of(case, inputs):
    if case == "box":
        return box_coordinates(inputs["lower"].numpy(), inputs["upper"].numpy())
    return space_coordinates(CASES[case].get("mu", 1.0))


def exact_argmin(layer, case, inputs):
    """y* [B, n] of a smooth energy, by `newton` from the layer's answer."""
    coordinates, x = place_of(case, inputs), inputs["x"]

    def gradient(p):
        y = torch.from_numpy(coordinates.y(p)).requires_grad_()
        return coordinates.scale * torch.autograd.grad(layer.energy(x, y).sum(), y)[0].numpy()

    def hessian(p):
        y = torch.from_numpy(coordinates.y(p))
        H = torch.autograd.functional.hessian(lambda y: layer.energy(x, y).sum(), y).numpy()
        r = np.broadcast_to(coordinates.scale, p.shape)
        return r[:, :, None] * H[range(BATCH), :, range(BATCH)] * r[:, None, :]

    p = newton(MODELS[layer.domain], gradient, hessian, coordinates.p(layer.solve(**inputs).y.numpy()))
    return torch.from_numpy(coordinates.y(p))


@each_case
@pytest.mark.parametrize("activation", ["relu", "softplus"])
@pytest.mark.usefixtures("without_kernels")  # of a point on a kink, rounded in another way, another cut comes
def test_the_layer_answers_as_the_reference(case, activation):
    for K in (1, 6):
        layer, inputs = layer_of(case, K, activation), inputs_of(case)
        domain, coordinates = MODELS[layer.domain], place_of(case, inputs)

        def value_and_gradient(y, layer=layer, inputs=inputs):
            y = torch.from_numpy(y).requires_grad_()
            f = layer.energy(inputs["x"], y)
            return f.detach().numpy(), torch.autograd.grad(f.sum(), y)[0].numpy()

        of_p = reference.in_coordinates(value_and_gradient, coordinates)
        p_init = np.full((BATCH, N), domain.centre(N))
        expected = reference.bundle_entropy_argmin(of_p, p_init, K, domain=domain)
        result = layer.solve(**inputs)
        # On a kink, where the cuts of a ReLU network soon lie, the last bit of y decides which slope f has. Once it is
        # solved that changes nothing; before, another answer with its own certificate comes.
        faces = np.abs(result.slopes.numpy() - expected.slopes).max((1, 2)) <= 1e-6
        settled = np.maximum(result.gap.abs().numpy(), np.abs(expected.gap)) <= 1e-12
        same = faces | settled | (activation == "softplus")
        assert same.any()
        y = coordinates.y(expected.y)
        np.testing.assert_allclose(result.y.numpy()[same], y[same], atol=SAME_ALGORITHM)
        cuts = ("slopes", "offsets", "cut_points") if activation == "softplus" else ()
        for field in ("energy", "lower_bound", "gap", *cuts):
            got, wanted = getattr(result, field).numpy()[same], getattr(expected, field)[same]
            np.testing.assert_allclose(got, wanted, atol=1e-8, err_msg=field)
        assert (result.lower_bound.numpy() <= expected.energy + 1e-8).all()
        assert (expected.lower_bound <= result.energy.numpy() + 1e-8).all()
        assert torch.equal(layer(**inputs), result.y)
        start = torch.from_numpy(coordinates.y(p_init))
        assert torch.allclose(layer(**inputs, y_init=start)[same], result.y[same], atol=1e-8)


@each_case
def test_float32_layers(case):
    expected = layer_of(case, 6).solve(**inputs_of(case))
    result = layer_of(case, 6).to(torch.float32).solve(**inputs_of(case, torch.float32))
    assert result.y.dtype == torch.float32
    assert (result.y - expected.y).abs().max() <= 1e-3
    assert (result.gap >= -1e-5 * (1 + result.energy.abs())).all()


@each_case
@pytest.mark.parametrize(
    ("adjoint", "activation", "K", "tolerance"),
    # prop3 is exact for piecewise-linear energies, implicit at convergence of smooth ones
    [
        ("exact", "relu", 5, 1e-6),
        ("exact", "softplus", 3, 1e-6),
        ("prop3", "relu", 5, 1e-6),
        ("implicit", "softplus", 50, 1e-4),
    ],
)
def test_gradients_of_the_layer_against_finite_differences(case, adjoint, activation, K, tolerance):
    layer, inputs = layer_of(case, K, activation, adjoint=adjoint), inputs_of(case)
    if adjoint == "implicit":
        assert layer.solve(**inputs).gap.max() <= 1e-10  # y to √(2 gap): 1.4e-5 of what the curvature is taken at
    y_bar = torch.randn(BATCH, N, generator=seeded(4), dtype=F64)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    weights = dict(layer.energy.named_parameters())
    everything = [*leaves.values(), *weights.values()]
    gradients = torch.autograd.grad((layer(**leaves) * y_bar).sum(), everything)
    found = dict(zip([*leaves, *weights], gradients, strict=True))
    directions = {
        name: torch.randn(gradient.shape, generator=seeded(100 + i), dtype=F64)
        for i, (name, gradient) in enumerate(found.items())
    }
    h = 1e-4 if adjoint == "implicit" else 1e-5

    def answer(layer, inputs):
        # Of an argmin the K-step answer is known to the root of its gap, which a difference divides by h.
        return exact_argmin(layer, case, inputs) if adjoint == "implicit" else layer.solve(**inputs).y

    # Every input by itself, and all weights at once.
    for names in (*([name] for name in leaves), list(weights)):
        values = []
        for sign in (1, -1):
            moved = {name: tensor.clone() for name, tensor in inputs.items()}
            shifted = copy.deepcopy(layer)
            targets = {**moved, **dict(shifted.energy.named_parameters())}
            with torch.no_grad():
                for name in names:
                    targets[name] += sign * h * directions[name]
            values.append((answer(shifted, moved) * y_bar).sum().item())
        expected = (values[0] - values[1]) / (2 * h)
        got = sum((found[name] * directions[name]).sum().item() for name in names)
        # Relative to its own gradient, or to a hundredth of the largest: x moves no slope of a ReLU network here.
        size = max(sum(found[name].norm().item() for name in names), 1e-2 * max(g.norm().item() for g in gradients))
        assert abs(got - expected) <= 5 * tolerance * size, names


def test_bounds_broadcast_fix_variables_and_are_kept_to_the_last_bit():
    layer = layer_of("box", 8, dtype=torch.float32)
    x = inputs_of("box", torch.float32)["x"]
    lower = torch.tensor([-1.0, 0.3, 0.1, -100.0])
    upper = torch.tensor([1.0, 0.3, 0.7, 100.0], requires_grad=True)
    y = layer(x, lower=lower, upper=upper)
    assert ((y >= lower) & (y <= upper)).all()
    assert (y[:, 1] == 0.3).all()
    y.sum().backward()
    assert upper.grad is not None
    assert upper.grad.shape == (4,)
    assert torch.isfinite(upper.grad).all()
    same = layer(x, lower=-1.0, upper=1.0)
    assert torch.equal(same, layer(x, lower=torch.full((BATCH, N), -1.0), upper=torch.full((BATCH, N), 1.0)))


def test_crossed_bounds_spoil_their_sample_alone():
    layer, inputs = layer_of("box", 8), inputs_of("box")
    clean = layer.solve(**inputs)
    crossed = inputs["upper"].clone()
    crossed[1, 2] = inputs["lower"][1, 2] - 1e-3
    inputs["upper"] = crossed
    spoilt = layer.solve(**inputs)
    assert spoilt.y[1].isnan().all()
    assert spoilt.gap[1].isnan()
    assert torch.equal(spoilt.y[[0, 2]], clean.y[[0, 2]])
    inputs["x"].requires_grad_()
    layer(**inputs)[[0, 2]].sum().backward()
    assert torch.isfinite(inputs["x"].grad[[0, 2]]).all()


@each_case
def test_the_layer_of_every_domain_is_refused_what_it_cannot_do(case):
    layer, inputs = layer_of(case, 2), inputs_of(case)
    wrong = torch.full((BATCH, N), torch.inf if layer.domain == "space" else -200.0, dtype=F64)
    with pytest.raises(ValueError, match="y_init must"):
        layer(**inputs, y_init=wrong)
    if layer.domain != "box":
        with pytest.raises(ValueError, match="lower must be left out"):
            layer(inputs["x"], lower=0.0)
    if layer.domain == "simplex":
        with pytest.raises(ValueError, match="sum to 1"):
            layer(inputs["x"], y_init=torch.full((BATCH, N), 0.5, dtype=F64))
    if layer.domain != "unit_box":
        assert f"domain={layer.domain!r}" in repr(layer)


def test_refusals_of_boxes_and_names():
    layer, x = layer_of("box", 2), inputs_of("box")["x"]
    for lower, upper, match in (
        (None, 1.0, "lower must be given"),
        (0.0, None, "upper must be given"),
        (torch.zeros(N), 1.0, "lower must have the dtype"),
        (torch.zeros(N + 1, dtype=F64), 1.0, "lower must broadcast"),
        (0.0, float("inf"), "upper must be finite"),
    ):
        with pytest.raises(ValueError, match=match):
            layer(x, lower=lower, upper=upper)
    energy = layer.energy
    with pytest.raises(ValueError, match="domain must be one of"):
        BundleEntropyArgmin(energy, 2, domain="ball")
    with pytest.raises(ValueError, match="mu must be a finite number"):
        BundleEntropyArgmin(energy, 2, domain="space", mu=0.0)
    with pytest.raises(ValueError, match="mu must be left at 1"):
        BundleEntropyArgmin(energy, 2, domain="simplex", mu=2.0)
