"""Domains other than the unit box: their formulas, K cuts in the reference, the torch layer.

Answers are told by certificate and by scipy, gradients by central differences of the K-step algorithm in float64.
"""

import copy
from typing import get_args

import numpy as np
import pytest
import references
import torch
from cut_models import network, random_cuts
from scipy.optimize import minimize

from icnnrt.errors import InputError
from icnnrt.mathematics import certificate, reference
from icnnrt.mathematics.domains import MODELS, NAMES, SIMPLEX, SPACE, UNIT_BOX, box_coordinates, space_coordinates
from icnnrt.mathematics.namespace import NUMPY
from icnnrt_exporters import commands
from icnnrt_models import FICNN, BundleEntropyArgmin
from icnnrt_models.layers.argmin import DomainName

each_model = pytest.mark.parametrize("domain", [UNIT_BOX, SIMPLEX, SPACE], ids=lambda d: d.name)
each_new_model = pytest.mark.parametrize("domain", [SIMPLEX, SPACE], ids=lambda d: d.name)

FINITE_DIFFERENCES = 1e-6  # h = 1e-5: h⁴ of truncation, rounding of y (1e-13) over h


def point_of(domain, B, n, seed=0):
    rng = np.random.default_rng(seed)
    return domain.point(NUMPY, rng.standard_normal((B, n)))


# ---------------------------------------------------------------- the domains' own formulas


def test_every_name_has_a_model():
    assert tuple(MODELS) == NAMES
    assert get_args(DomainName) == tuple(commands.DomainName) == NAMES
    assert all(domain.name == name for name, domain in MODELS.items())


@pytest.mark.parametrize("domain", MODELS.values(), ids=lambda d: d.name)
def test_points_of_a_domain_may_be_started_from(domain):
    rng = np.random.default_rng(1)
    bounds = dict(zip(domain.bounds, (np.zeros((5, 3)), np.ones((5, 3))), strict=False))
    for points in (domain.random(rng, 5, 3), domain.corners(rng, 5, 3), np.full((5, 3), domain.centre(3))):
        domain.check_start(points, bounds)
        points[2, 1] = np.nan
        with pytest.raises(InputError, match=r"y_init: expected .*, but got nan in sample 2; clip it"):
            domain.check_start(points, bounds)
    domain.check_start(np.zeros((0, 3)), {name: array[:0] for name, array in bounds.items()})


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
    c_y = references.implicit_adjoint(hessian(y), y, y_bar, domain)
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
            return value_and_gradient(y[None])[0][0] + references.negative_entropy(p)

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
    p_init = references.sigmoid(p_init)

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


# ---------------------------------------------------------------- the torch layer

F64 = torch.float64
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
    with pytest.raises(ValueError, match=r"y_init: expected .* in sample 0; clip it"):
        layer(**inputs, y_init=wrong)
    if layer.domain != "box":
        with pytest.raises(ValueError, match="lower: expected none, as the domain is"):
            layer(inputs["x"], lower=0.0)
    if layer.domain == "simplex":
        with pytest.raises(ValueError, match="y_init: expected rows of sum 1, but got 2"):
            layer(inputs["x"], y_init=torch.full((BATCH, N), 0.5, dtype=F64))
    if layer.domain != "unit_box":
        assert f"domain={layer.domain!r}" in repr(layer)


def test_refusals_of_boxes_and_names():
    layer, x = layer_of("box", 2), inputs_of("box")["x"]
    for lower, upper, match in (
        (None, 1.0, "lower: expected the bounds of y, as the domain is a box, but got none"),
        (0.0, None, "upper: expected the bounds of y, as the domain is a box, but got none"),
        (torch.zeros(N), 1.0, "lower: expected torch.float64, as the energy is, but got torch.float32"),
        (torch.zeros(N + 1, dtype=F64), 1.0, "lower: expected what broadcasts to shape"),
        (0.0, float("inf"), "upper: expected finite numbers"),
    ):
        with pytest.raises(ValueError, match=match):
            layer(x, lower=lower, upper=upper)
    energy = layer.energy
    with pytest.raises(ValueError, match="domain: expected 'unit_box', 'box', 'simplex' or 'space', but got 'ball'"):
        BundleEntropyArgmin(energy, 2, domain="ball")
    with pytest.raises(ValueError, match="mu: expected a finite number above 0, but got 0"):
        BundleEntropyArgmin(energy, 2, domain="space", mu=0.0)
    with pytest.raises(ValueError, match="mu: expected 1 in the domain 'simplex', but got 2"):
        BundleEntropyArgmin(energy, 2, domain="simplex", mu=2.0)
