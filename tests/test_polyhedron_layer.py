"""The argmin over a polyhedron as a torch layer: against its statement in numpy, and differences of every gradient."""

import copy
import re
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from test_argmin_layer import numpy_value_and_gradient  # noqa: E402

from icnnrt.mathematics.bundle_qp import bundle_qp_adjoint, bundle_qp_argmin, bundle_qp_implicit  # noqa: E402
from icnnrt.mathematics.polyhedron_programs import Polyhedron  # noqa: E402
from icnnrt.mathematics.status import Status  # noqa: E402
from icnnrt_models import FICNN, PICNN, PolyhedronArgmin, QPLayer  # noqa: E402
from icnnrt_models.layers import pieces  # noqa: E402
from icnnrt_models.layers import qp_operators as home  # noqa: E402

T = torch.float64
B, N, X, UNITS, MU = 4, 5, 3, 12, 0.2
# Central, h = 1e-6, of an algorithm whose programs are solved to 1e-12, relative to the size of the gradient.
DIFFERENCES = 1e-5


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class Units(torch.nn.Module):
    """f = Σ v g(Wy + Ux + c): many cuts, and kinks where y* is."""

    def __init__(self, activation, seed=0, dtype=T):
        super().__init__()
        g = generator(seed)
        self.W, self.U, self.c, v = (
            torch.nn.Parameter(torch.randn(*shape, generator=g, dtype=dtype))
            for shape in ((UNITS, N), (UNITS, X), (UNITS,), (UNITS,))
        )
        self.register_buffer("v", v.detach().abs())
        self.activation = activation

    def forward(self, x, y):
        return self.activation(y @ self.W.T + x @ self.U.T + self.c) @ self.v


def network(activation, dtype=T, cls=PICNN):
    return cls(X, N, hidden=(12, 9), activation=activation, dtype=dtype, generator=generator())


relu, softplus = torch.nn.functional.relu, torch.nn.functional.softplus


def contexts(samples=B):
    return torch.randn(samples, X, generator=generator(1), dtype=T)


def constraints(seed=1, samples=B):
    """Rows, one of them twice, an equality and a box, some of each active; half of the upper bounds are none."""
    rng = np.random.default_rng(seed)
    y = 0.3 * rng.standard_normal((samples, N))
    G, A = rng.standard_normal((samples, 3, N)), rng.standard_normal((samples, 1, N))
    h = np.einsum("bmn,bn->bm", G, y) + 0.1 * rng.random((samples, 3))
    upper = np.where(rng.random((samples, N)) < 0.5, np.inf, y + 0.5 * rng.random((samples, N)))
    given = {"G": G, "h": h, "A": A, "b": np.einsum("bmn,bn->bm", A, y), "lower": y - rng.random((samples, N))}
    return {name: torch.from_numpy(a) for name, a in {**given, "upper": upper}.items()}


def twice(given):
    """The first row of G once more."""
    G, h = given["G"], given["h"]
    return {**given, "G": torch.cat([G, G[:, :1]], 1), "h": torch.cat([h, h[:, :1]], 1)}


def polyhedron(given):
    return Polyhedron(*(given[name].detach().numpy() for name in Polyhedron._fields))


@torch.enable_grad()
def curvature(energy, x, y):
    """∇f [B, n] and ∇²f [B, n, n]."""
    y = y.detach().requires_grad_()
    (g,) = torch.autograd.grad(energy(x, y).sum(), y, create_graph=True)
    rows = [torch.autograd.grad(g[:, j].sum(), y, retain_graph=True, materialize_grads=True)[0] for j in range(N)]
    return g.detach(), torch.stack(rows, 1)


@pytest.fixture(params=["kernel", "torch"])
def backend(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(home, "kernels", lambda dtype: None)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(("activation", "K"), [(relu, 60), (softplus, 4), (softplus, 60)])
def test_answers_are_those_stated(activation, K):
    energy, x, given = Units(activation), contexts(8), twice(constraints(samples=8))
    given["lower"][1], given["upper"][1] = 1.0, 0.0
    given["G"][2, 1], given["h"][2, 1] = -given["G"][2, 0], -given["h"][2, 0] - 1.0
    given["b"][3] = np.nan
    stated = bundle_qp_argmin(numpy_value_and_gradient(energy, x), polyhedron(given), K, MU)
    layer = PolyhedronArgmin(energy, K, MU, y_dim=N)
    found = layer.solve(x, **given)
    wanted = [Status.INFEASIBLE, Status.INFEASIBLE, Status.NOT_FINITE_INPUT]
    assert stated.status[1:4].tolist() == wanted
    assert (found.status.numpy() == stated.status).all()
    # Of a smooth energy many cuts are near duplicates, and y is known to √(2 gap/μ).
    near = np.sqrt(2 * 1e-9 * np.abs(stated.lower_bound).max(initial=1, where=stated.status < 2) / MU)
    close = near if (activation, K) == (softplus, 60) else 1e-8
    np.testing.assert_allclose(found.y, stated.y, atol=close)
    for name in ("energy", "lower_bound", "gap"):
        np.testing.assert_allclose(getattr(found, name), getattr(stated, name), rtol=1e-8, atol=1e-8, err_msg=name)
    run = stated.status <= Status.GAP
    assert run.sum() == 5
    assert (layer(x, **given)[run] == found.y[run]).all()
    # Multipliers: of a model that is solved, stationary up to the slopes of its cuts; 0 where nothing is held.
    assert (found.lam[run] >= -1e-9).all()
    held = (given["G"] @ found.y[:, :, None])[:, :, 0] - given["h"]
    assert ((found.lam * held)[run].abs() < 1e-7).all()
    assert held[run].max() < 1e-9


def test_a_y_init_and_the_certificate():
    energy, x, given = Units(softplus), contexts(), constraints()
    start = torch.randn(B, N, generator=generator(5), dtype=T)
    stated = bundle_qp_argmin(numpy_value_and_gradient(energy, x), polyhedron(given), 3, MU, start.numpy())
    found = PolyhedronArgmin(energy, 3, MU, y_dim=N).solve(x, **given, y_init=start)
    np.testing.assert_allclose(found.y, stated.y, atol=1e-8)
    np.testing.assert_allclose(found.gap, stated.gap, atol=1e-8)
    assert "give more iterations" in found.advice(int((found.status == Status.GAP).nonzero()[0]))
    best = PolyhedronArgmin(energy, 100, MU, y_dim=N).solve(x, **given)
    assert (found.lower_bound <= best.energy + 1e-9).all()
    assert (found.gap >= best.energy - found.lower_bound - 1e-9).all()


def names(layer, given):
    return ["x", *given, *dict(layer.energy.named_parameters())]


@torch.enable_grad()
def gradients(layer, x, given, w):
    """y, and the gradient of w'y by x, every constraint, and every weight."""
    leaves = [a.detach().clone().requires_grad_() for a in (x, *given.values())]
    y = layer(leaves[0], **dict(zip(given, leaves[1:], strict=True)))
    found = torch.autograd.grad((y * w).sum(), [*leaves, *layer.energy.parameters()])
    return y.detach(), dict(zip(names(layer, given), found, strict=True))


@torch.no_grad()
def check_differences(run, layer, x, given, w, tolerance, e):
    """Along a direction of each datum; `run` is what is differentiated."""
    _, found = gradients(layer, x, given, w)
    weights = dict(layer.energy.named_parameters())
    g = generator(7)
    for name, gradient in found.items():
        value = x if name == "x" else given[name] if name in given else weights[name]
        d = torch.randn(value.shape, generator=g, dtype=T) * value.isfinite()
        kept, moved = value.clone(), []
        for sign in (1.0, -1.0):
            if name in weights:
                value.copy_(kept + sign * e * d)
                moved.append(run(x, **given))
                value.copy_(kept)
            else:
                data = {"x": x, **given} | {name: value + sign * e * d}
                moved.append(run(data.pop("x"), **data))
        numeric, exact = ((moved[0] - moved[1]) * w).sum() / (2 * e), (gradient * d).sum()
        assert (numeric - exact).abs() <= tolerance * (1 + exact.abs()), name


# Adjoint, activation, how many cuts: at convergence, before it, and of the projection alone.
DIFFERENTIABLE = [
    ("auto", relu, 60),
    ("prop3", relu, 3),
    ("exact", relu, 60),
    ("exact", softplus, 4),
    ("exact", softplus, 1),
]


@pytest.mark.parametrize(("adjoint", "activation", "K"), DIFFERENTIABLE)
def test_gradients_are_those_of_the_algorithm(adjoint, activation, K):
    layer = PolyhedronArgmin(Units(activation, 1), K, MU, adjoint, y_dim=N)
    w = torch.randn(B, N, generator=generator(3), dtype=T)
    check_differences(layer, layer, contexts(), constraints(), w, DIFFERENCES, 1e-6)
    assert layer.last.cuts.max() > 1 or K == 1


def firm(layer, x, given, margin=1e-2):
    """x and constraints of B samples that converge where each constraint either pushes or is away, by more than the
    margin: differences leave alone which of them hold y."""
    found = layer.solve(x, **given)
    rows = given["h"] - (given["G"] @ found.y[:, :, None])[:, :, 0]
    box = torch.minimum(found.y - given["lower"], given["upper"] - found.y)
    apart = torch.cat([torch.maximum(found.lam, rows), torch.maximum(found.bound_multipliers.abs(), box)], 1)
    kept = ((found.status == 0) & (apart > margin).all(1)).nonzero()[:B, 0]
    assert len(kept) == B
    return x[kept], {name: a[kept] for name, a in given.items()}


def test_gradients_of_a_smooth_energy_are_those_of_its_argmin():
    """Of Newton's method: sequential quadratic programs."""
    energy = Units(softplus, 1)
    # A gap below the usual 1e-9 tells y to 1e-6 or so. Not all reach it: models of cuts nearly alike are solved worse.
    layer = PolyhedronArgmin(energy, 200, MU, tolerance=1e-10, on_unsafe="raise", y_dim=N)
    x, given = firm(layer, contexts(24), constraints(samples=24))
    y_star = layer(x, **given).detach()

    def newton(x, G, h, A, b, lower, upper):
        y = y_star
        for _ in range(8):
            g, H = curvature(energy, x, y)
            p = g - (H @ y[:, :, None])[:, :, 0]
            y = QPLayer()(H + MU * torch.eye(N, dtype=T), p, G, h, A, b, lower=lower, upper=upper).detach()
        return y

    w = torch.randn(B, N, generator=generator(3), dtype=T)
    check_differences(newton, layer, x, given, w, 1e-4, 1e-5)


def strictly_held(energy, K, x, given):
    """x and constraints of B samples of which no model leaves a multiplier between none and little: a gradient divides
    by it, and so does what rounding does to that; and of which no cut is at a kink, where rounding chooses its face."""
    stated = bundle_qp_argmin(numpy_value_and_gradient(energy, x), polyhedron(given), K, MU)
    kept = np.ones(len(x), bool)
    for samples, solution in (stated.projection, *stated.models):
        size = np.abs(np.concatenate([solution.lam, solution.mu], 1))
        kept[samples] &= ~((size > 1e-7) & (size < 2e-2)).any(1)
    W, U, c = (a.detach().numpy() for a in (energy.W, energy.U, energy.c))
    kept &= (np.abs(stated.cut_points @ W.T + (x.numpy() @ U.T + c)[:, None]) > 1e-9).all((1, 2))
    kept = np.flatnonzero(kept)[:B]
    assert len(kept) == B
    return x[kept], {name: a[kept] for name, a in given.items()}


@pytest.mark.parametrize("adjoint", ["prop3", "exact", "implicit"])
def test_gradients_are_those_stated(adjoint):
    energy, x, given = Units(relu if adjoint == "prop3" else softplus), contexts(), twice(constraints())
    K = 100 if adjoint == "implicit" else 4
    if K == 4:
        x, given = strictly_held(energy, K, contexts(200), twice(constraints(samples=200)))
    w = torch.randn(B, N, generator=generator(3), dtype=T)
    layer = PolyhedronArgmin(energy, K, MU, adjoint, y_dim=N)
    y, found = gradients(layer, x, given, w)
    stated = bundle_qp_argmin(numpy_value_and_gradient(energy, x), polyhedron(given), K, MU)
    if adjoint == "implicit":
        stated = stated._replace(y=y.numpy())
        bars = bundle_qp_implicit(stated, w.numpy(), *(a.numpy() for a in curvature(energy, x, y)))
    else:

        def hvp(_, y, s):
            return (curvature(energy, x, torch.from_numpy(y))[1] @ torch.from_numpy(s)[:, :, None])[:, :, 0].numpy()

        bars = bundle_qp_adjoint(stated, w.numpy(), hvp if adjoint == "exact" else None)
    for name in given:
        np.testing.assert_allclose(found[name], getattr(bars.polyhedron, name), rtol=1e-5, atol=1e-7, err_msg=name)
    # θ̄ and x̄ = ∇ Σ_i [ offset_bar_i f(y_i) + seed_i'∇f(y_i) ]
    leaf, total = x.clone().requires_grad_(), 0.0
    for i in range(bars.points.shape[1]):
        y_i = torch.from_numpy(bars.points[:, i]).requires_grad_()
        f = energy(leaf, y_i)
        (g,) = torch.autograd.grad(f.sum(), y_i, create_graph=True)
        offset_bar, seed = (torch.from_numpy(a[:, i].copy()) for a in bars.cuts)
        total = total + (offset_bar * f).sum() + (seed * g).sum()
    wanted = torch.autograd.grad(total, [leaf, *energy.parameters()])
    for name, a in zip(["x", "W", "U", "c"], wanted, strict=True):
        torch.testing.assert_close(found[name], a, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("activation", [relu, softplus])
def test_samples_that_fail_leave_the_others_alone(activation):
    energy, x, given = Units(activation), contexts(), constraints()
    w = torch.ones(B, N, dtype=T)
    alone, truth = gradients(PolyhedronArgmin(energy, 100, MU, y_dim=N), x, given, w)
    _, first = gradients(
        PolyhedronArgmin(energy, 100, MU, y_dim=N), x[:1], {name: a[:1] for name, a in given.items()}, w[:1]
    )
    bad = {name: a.clone() for name, a in given.items()}
    bad["lower"][1], bad["upper"][1] = 1.0, 0.0
    bad["b"][2] = np.nan
    bad_x = x.clone()
    bad_x[3] = np.inf
    sentence = "on_unsafe: sample 1 and 2 more ended with INFEASIBLE: no y meets the constraints"
    with pytest.raises(ValueError, match=sentence):
        PolyhedronArgmin(energy, 100, MU, on_unsafe="raise", y_dim=N)(bad_x, **bad)
    for on_unsafe in ("nan", "skip"):
        layer = PolyhedronArgmin(energy, 100, MU, on_unsafe=on_unsafe, y_dim=N)
        y, found = gradients(layer, bad_x, bad, w)
        wanted = [Status.CONVERGED, Status.INFEASIBLE, Status.NOT_FINITE_INPUT, Status.NOT_FINITE_INPUT]
        assert layer.last.status.tolist() == wanted
        assert y[1:].isnan().all()
        torch.testing.assert_close(y[0], alone[0], rtol=1e-9, atol=1e-5)
        for name, a in found.items():
            whole = name in dict(energy.named_parameters())
            if on_unsafe == "nan":
                assert a.isnan().all() if whole else a[1:].isnan().all(), name
            elif not whole:
                assert (a[1:] == 0).all(), name
            if whole and on_unsafe == "skip":
                torch.testing.assert_close(a, first[name], rtol=1e-4, atol=1e-4, msg=name)
            elif not whole:
                torch.testing.assert_close(a[0], truth[name][0], rtol=1e-4, atol=1e-4, msg=name)


def test_a_sample_without_an_end_is_none():
    """μ = 0: where y has no bounds the energy falls without end; the sum of units alone does not, though models do."""

    class Tilted(Units):
        def forward(self, x, y):
            return super().forward(x, y) - 30.0 * y[:, 1]

    x = contexts(2)
    energy = Tilted(relu)
    lower = torch.full((2, N), -2.0, dtype=T)
    lower[1] = -np.inf
    upper = -lower
    upper[1, 0] = 1.0
    layer = PolyhedronArgmin(energy, 200, 0.0, on_unsafe="skip", y_dim=N)
    y = layer(x, lower=lower, upper=upper)
    assert layer.last.status.tolist() == [Status.CONVERGED, Status.UNBOUNDED]
    assert y[0].isfinite().all()
    assert y[1].isnan().all()
    assert layer.last.ray[0].eq(0).all()
    assert layer.last.ray[1, 1] > 0
    assert layer.last.ray[1, 0] <= 0
    units = PolyhedronArgmin(Units(relu), 200, 0.0, y_dim=N).solve(x, lower=lower, upper=upper)
    assert units.ray.eq(0).all()
    assert units.status.tolist() == [Status.CONVERGED, Status.CONVERGED]
    assert units.lower_bound[1] <= Units(relu)(x, torch.zeros(2, N, dtype=T))[1]
    none = torch.zeros(2, 0, N, dtype=T)
    P = polyhedron({"G": none, "h": none[:, :, 0], "A": none, "b": none[:, :, 0], "lower": lower, "upper": upper})
    stated = bundle_qp_argmin(numpy_value_and_gradient(energy, x), P, 200, 0.0)
    assert (layer.last.status.numpy() == stated.status).all()
    np.testing.assert_allclose(layer.last.energy, stated.energy, atol=1e-8)
    assert layer.last.energy[1].isnan()
    assert layer.last.lower_bound[1].isnan()
    assert "falls along `ray`" in layer.last.advice(1)
    y.sum().backward()
    assert energy.W.grad.isfinite().all()


def test_an_energy_that_is_not_convex_or_not_finite_is_found_out():
    class Bad(torch.nn.Module):
        y_dim = N

        def forward(self, x, y):
            concave = -2.0 * (y * y).sum(1)
            return torch.where(x[:, 0] > 0, concave, torch.where(x[:, 0] < 0, y.abs().sum(1), torch.nan))

    x = torch.tensor([[1.0], [-1.0], [0.0]], dtype=T)
    start = 0.1 * torch.randn(3, N, generator=generator(), dtype=T)
    layer = PolyhedronArgmin(Bad(), 30, MU, "prop3")
    y = layer(x, lower=-1.0, upper=1.0, y_init=start)
    assert layer.last.status.tolist() == [Status.NOT_CONVEX, Status.CONVERGED, Status.NOT_FINITE]
    assert y.isnan().all(1).tolist() == [False, False, True]
    torch.testing.assert_close(y[1], torch.zeros(N, dtype=T), rtol=0, atol=1e-9)


@pytest.mark.parametrize("activation", [relu, softplus])
def test_shared_constraints_get_the_sum(activation):
    layer = PolyhedronArgmin(Units(activation), 100, MU, y_dim=N)
    x, w = contexts(), torch.randn(B, N, generator=generator(3), dtype=T)
    one = {name: a[0] for name, a in constraints().items()}
    y, shared = gradients(layer, x, one, w)
    each_y, each = gradients(layer, x, {name: a.expand(B, *a.shape).contiguous() for name, a in one.items()}, w)
    assert (y == each_y).all()
    for name in one:
        torch.testing.assert_close(shared[name], each[name].sum(0), rtol=1e-9, atol=1e-10, msg=name)
    _, kept = gradients(layer, x, {name: a[None] for name, a in one.items()}, w)
    assert all((kept[name][0] == shared[name]).all() for name in one)
    level = torch.tensor(0.1, dtype=T, requires_grad=True)
    layer(x, lower=level, upper=level).sum().backward()
    assert level.grad is None or level.grad.isfinite()


@pytest.mark.parametrize("samples", [0, 1, 7])
def test_without_constraints_and_for_any_batch(samples):
    energy = network("relu")
    layer = PolyhedronArgmin(energy, 100, 1.0)
    x = contexts(samples).requires_grad_()
    y = layer(x)
    assert y.shape == (samples, N)
    assert (layer.last.status == 0).all()
    y.sum().backward()
    assert x.grad.shape == x.shape
    # Stationary: 0 ∈ ∂f + μ y, so no step makes the energy less.
    best = energy(x, y) + 0.5 * (y * y).sum(1)
    for e in (1e-3, 1e-1):
        near = y + e * torch.randn(y.shape, generator=generator(), dtype=T)
        assert (energy(x, near) + 0.5 * (near * near).sum(1) >= best - 1e-9).all()


@pytest.mark.parametrize("activation", ["relu", "softplus"])
def test_training_in_float32_lowers_a_loss(activation):
    energy = network(activation, torch.float32)
    layer = PolyhedronArgmin(energy, 60, 0.5, on_unsafe="raise", tolerance=1e-4)
    x = contexts(16).float()
    target = torch.softmax(2 * x @ torch.randn(X, N, generator=generator(4)), 1)
    budget = {"A": torch.ones(1, N), "b": torch.ones(1), "lower": 0.0}
    optimiser = torch.optim.Adam(energy.parameters(), 0.05)
    losses = []
    for _ in range(12):
        y = layer(x, **budget)
        assert y.dtype == torch.float32
        assert (y.sum(1) - 1).abs().max() < 1e-6
        loss = ((y - target) ** 2).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        energy.project_()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert layer.last.y.dtype == torch.float64


@pytest.mark.parametrize("activation", [relu, softplus])
def test_float32_is_near_float64(activation):
    w = torch.randn(B, N, generator=generator(3), dtype=T)
    wide, narrow = Units(activation).double(), Units(activation).float()
    wide.load_state_dict(narrow.state_dict())
    x, given = contexts().float(), constraints()
    _, truth = gradients(PolyhedronArgmin(wide, 200, MU, y_dim=N), x.double(), given, w)
    layer = PolyhedronArgmin(narrow, 200, MU, y_dim=N)
    # Constraints of either precision.
    y, found = gradients(layer, x, {name: a.float() if name == "G" else a for name, a in given.items()}, w.float())
    assert y.dtype == torch.float32
    assert layer.last.status.tolist() == [0] * B
    for name, a in found.items():
        assert a.dtype == (torch.float64 if name in given and name != "G" else torch.float32)
        # Relative to a hundredth of the largest at least: of bounds that hold no y it is zero.
        size = max(truth[name].norm(), 1e-2 * max(t.norm() for t in truth.values()))
        assert (a.double() - truth[name]).norm() <= (1e-3 if activation is relu else 5e-2) * size, name


def test_weights_that_are_given_to_the_call():
    """`torch.func.functional_call`, with weights that depend on others."""
    layer = PolyhedronArgmin(Units(relu), 60, MU, y_dim=N)
    w = torch.randn(B, N, generator=generator(3), dtype=T)
    _, truth = gradients(layer, contexts(), constraints(), w)
    factor = torch.ones((), dtype=T, requires_grad=True)
    weights = {f"energy.{name}": factor * p for name, p in layer.energy.named_parameters()}
    (torch.func.functional_call(layer, weights, (contexts(),), constraints()) * w).sum().backward()
    wanted = sum((truth[name] * p).sum() for name, p in layer.energy.named_parameters())
    torch.testing.assert_close(factor.grad, wanted.detach(), rtol=1e-9, atol=1e-9)


def test_a_context_that_holds_nan():
    layer = PolyhedronArgmin(network("softplus"), 100, MU)
    x = contexts()
    x[1, 0] = torch.nan
    for on_unsafe in ("nan", "skip"):
        layer.on_unsafe = on_unsafe
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        layer(leaf, **constraints()).nan_to_num().sum().backward()
        assert leaf.grad[[0, 2, 3]].isfinite().all()
        assert leaf.grad[1].isnan().all() if on_unsafe == "nan" else (leaf.grad[1] == 0).all()
        assert all(p.grad.isnan().all() == (on_unsafe == "nan") for p in layer.parameters())


class Written(torch.nn.Module):
    """An energy of one formula."""

    y_dim = N

    def __init__(self, formula):
        super().__init__()
        self.formula = formula
        self.scale = torch.nn.Parameter(torch.ones(N, dtype=T))

    def forward(self, x, y):
        return self.formula(y * self.scale, x)


class Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, g):
        return g


def in_place(y):
    z = y.clone()
    z[:, 0].exp_()
    return z


FORMULAS = [
    (True, lambda y, x: y.abs().sum(1) + torch.maximum(y[:, 0], y[:, 1])),
    (True, lambda y, x: torch.cat([y, -y], 1).amax(1) * x[:, 0].exp() + y.clamp(min=0.1).mean(1)),
    (True, lambda y, x: torch.where(y > 0, y, 0.1 * y).sum(1) / (1 + x[:, 0] ** 2)),
    (True, lambda y, x: torch.einsum("bn,bn->b", torch.nn.functional.leaky_relu(y), x[:, :1].expand(-1, N) ** 2)),
    (False, lambda y, x: torch.logsumexp(y, 1)),
    (False, lambda y, x: (y * y).sum(1)),
    (False, lambda y, x: y.abs().sum(1) + torch.bmm(y[:, None], y[:, :, None]).flatten()),
    (False, lambda y, x: torch.nn.functional.softplus(y).sum(1) + y.relu().sum(1)),
    ("OwnBackward", lambda y, x: Own.apply(y).sum(1)),
    ("CopySlices", lambda y, x: in_place(y).sum(1)),
]


@pytest.mark.parametrize(("wanted", "formula"), FORMULAS)
def test_auto_knows_pieces_from_smooth_energies_or_asks(wanted, formula):
    energy, x = Written(formula), contexts()
    y = torch.randn(B, N, generator=generator(), dtype=T).requires_grad_()
    assert pieces.is_piecewise_linear(energy(x, y), y) == wanted
    layer = PolyhedronArgmin(energy, 50)
    if isinstance(wanted, str):
        with pytest.raises(
            ValueError, match=f"adjoint: expected one by name for this energy, but got 'auto', and its {wanted} does"
        ):
            layer(x)
        assert layer.solve(x, lower=-1.0).y.isfinite().all()
        return
    layer(x, lower=-1.0).sum().backward()
    automatic = energy.scale.grad.clone()
    energy.zero_grad()
    PolyhedronArgmin(energy, 50, adjoint="prop3" if wanted else "implicit")(x, lower=-1.0).sum().backward()
    assert (energy.scale.grad == automatic).all()


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "softplus", "celu"])
@pytest.mark.parametrize("cls", [FICNN, PICNN])
def test_auto_knows_our_networks(cls, activation):
    energy, x = network(activation, cls=cls), contexts()
    y = torch.zeros(B, N, dtype=T, requires_grad=True)
    assert pieces.is_piecewise_linear(energy(x, y), y) == ("relu" in activation)


def test_the_operators_that_are_told_apart_are_torchs():
    known = {re.sub(r"Backward\d+$", "", name) for name in dir(torch._C._functions)}
    assert known >= pieces._PIECES | pieces._SMOOTH | set(pieces._PRODUCTS) | pieces._NORMS
    assert not pieces._PIECES & pieces._SMOOTH


def test_a_context_is_computed_once_and_frozen_weights_have_no_gradient():
    energy = network("relu")
    calls = []
    context = energy.context
    energy.context = lambda x: (calls.append(1), context(x))[1]  # type: ignore[method-assign]
    layer = PolyhedronArgmin(energy, 50, MU)
    first = next(energy.parameters()).requires_grad_(False)
    layer(contexts(), **constraints()).sum().backward()
    assert len(calls) == 1
    assert first.grad is None
    with torch.inference_mode():
        y = layer(contexts(), **constraints())
        assert (layer.solve(contexts(), **constraints()).y == y).all()


def test_a_second_derivative_is_refused_and_the_graph_may_be_kept():
    layer = PolyhedronArgmin(Units(relu), 50, MU, y_dim=N)
    x = contexts().requires_grad_()
    y = layer(x, **constraints())
    (g,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="PolyhedronArgmin can be differentiated once"):
        g.sum().backward()
    (again,) = torch.autograd.grad(y.sum(), x)
    assert (again == g).all()


def test_what_was_answered_is_not_copied():
    layer = PolyhedronArgmin(Units(relu), 50, MU, y_dim=N)
    assert layer.last is None
    layer(contexts(), **constraints())
    assert layer.last is not None
    other = copy.deepcopy(layer)
    assert other.last is None
    assert layer.state_dict().keys() == other.state_dict().keys()
    assert "iterations=50, mu=0.2, adjoint='auto', on_unsafe='nan'" in repr(layer)


ONES: Any = torch.ones
MISTAKES = [
    (
        {"G": ONES(2, 4), "h": ONES(2)},
        "G: expected shape [m, 5] or, for a batch, [4, m, 5], but got [2, 4]; G has a row for each",
    ),
    (
        {"G": ONES(2, 5)},
        "h: expected an entry for each row of G, as G was given, but got none; pass h with it, or leave G out",
    ),
    (
        {"b": ONES(2)},
        "A: expected a row for each equality and a column for each variable, as b was given, but got none",
    ),
    (
        {"G": ONES(2, 5), "h": ONES(3)},
        "h: expected shape [2] or, for a batch, [4, 2], but got [3]; h has an entry for each row of G",
    ),
    (
        {"A": [[1.0] * 5], "b": ONES(1)},
        "A: expected a tensor, but got list; pass torch.as_tensor(A, dtype=torch.float64",
    ),
    (
        {"A": ONES(1, 5).int(), "b": ONES(1)},
        "A: expected floats on cpu, as x is, but got torch.int32 on cpu; pass torch.as_tensor",
    ),
    ({"lower": ONES(3, 5)}, "lower: expected 4 samples, as x has, or 1 for all, but got 3; data share one batch"),
    ({"upper": "high"}, "upper: expected a tensor, or one number, but got "),
    ({"y_init": ONES(5)}, "y_init: expected a tensor of shape [4, 5], but got shape [5]; give"),
]


@pytest.mark.parametrize(("given", "sentence"), MISTAKES)
def test_errors_are_sentences(given, sentence):
    layer = PolyhedronArgmin(Units(relu), 5, y_dim=N)
    for call in (layer, layer.solve):
        with pytest.raises(ValueError, match=re.escape(sentence)):
            call(contexts(), **given)


def test_settings_are_checked():
    energy = Units(relu)
    for keywords, sentence in (
        ({"iterations": 0}, "iterations: expected an integer of at least 1, but got 0; give the most cuts K"),
        ({"mu": -1.0}, "mu: expected a finite number of at least 0, but got -1.0; it is"),
        ({"adjoint": "best"}, "adjoint: expected 'auto', 'prop3', 'implicit' or 'exact', but got 'best'; choose"),
        ({"tolerance": np.nan}, "tolerance: expected a finite number of at least 0, but got nan; leave"),
        ({"on_unsafe": "zero"}, "on_unsafe: expected 'nan', 'skip' or 'raise', but got 'zero'; choose"),
        ({"y_dim": None}, "y_dim: expected the number of columns of y, but got none, and Units has no attribute y_dim"),
    ):
        with pytest.raises(ValueError, match=re.escape(sentence)):
            PolyhedronArgmin(energy, **{"y_dim": N, **keywords})
    with pytest.raises(
        ValueError, match=r"energy: expected weights in float32 or float64, but got torch\.float16; convert"
    ):
        PolyhedronArgmin(energy.half(), y_dim=N)(contexts())
