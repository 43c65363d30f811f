"""BundleEntropyArgmin: its answers against scipy, its gradients against three witnesses, and all its ways of use."""

import copy
import pickle
from itertools import product

import numpy as np
import pytest
import references
import torch
from amounts import ALL
from scipy.optimize import minimize
from torch import Tensor, nn

from icnnrt.mathematics import reference
from icnnrt.mathematics.domains import UNIT_BOX
from icnnrt_models import FICNN, PICNN, ArgminResult, BundleEntropyArgmin
from icnnrt_models.layers.bundle_entropy import (
    bundle_entropy_solve,
    implicit_adjoint,
    kkt_adjoint,
)
from icnnrt_models.layers.namespace import TORCH

F64 = torch.float64

# What each comparison is held to, with its reason.
CONVERGED = 1e-8  # an energy within rounding of the optimal one tells y to the square root of rounding only
FLOAT32_ANSWER = 2e-5  # the energy is float32, the solver float64: rounding of ∇f moves y that much
FINITE_DIFFERENCES = 1e-6  # central, h = 1e-5: h² of truncation, rounding of y (1e-13) over h
CRITERION = 1e-8  # duality gap of an inner solve relative to max(1, |dual|), slopes up to 1e2
IMPLICIT = 1e-4  # the implicit function theorem holds at y*; K steps leave a distance to it

each_activation = pytest.mark.parametrize("activation", ["relu", "softplus"])
each_kind = pytest.mark.parametrize("kind", [FICNN, PICNN])


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def build(kind, activation="softplus", seed=0, x_dim=4, y_dim=3, hidden=(7, 5), gain=2.0, dtype=F64, **options):
    """A network whose skip weights are `gain` times their initial values: bent enough that cuts matter."""
    energy = kind(x_dim, y_dim, hidden, activation=activation, generator=seeded(seed), dtype=dtype, **options)
    with torch.no_grad():
        for name, p in energy.named_parameters():
            if name.endswith("W_y"):
                p.mul_(gain)
    return energy


def contexts(energy, batch: int, seed: int = 1) -> Tensor:
    dtype = next(energy.parameters()).dtype
    return torch.randn(batch, energy.x_dim, generator=seeded(seed), dtype=F64).to(dtype)


def numpy_value_and_gradient(energy, x):
    def value_and_gradient(y):
        y = torch.from_numpy(y).requires_grad_()
        f = energy(x, y)
        (g,) = torch.autograd.grad(f.sum(), y)
        return f.detach().numpy(), g.numpy()

    return value_and_gradient


def reference_argmin(energy, x, iterations: int) -> reference.Trajectory:
    y_init = np.full((x.shape[0], energy.y_dim), 0.5)
    return reference.bundle_entropy_argmin(numpy_value_and_gradient(energy, x), y_init, iterations)


def loss_weights(batch: int, n: int, seed: int = 2) -> Tensor:
    """A fixed ȳ: the loss is Σ weights·y, so gradients are those of y itself."""
    return torch.randn(batch, n, generator=seeded(seed), dtype=F64)


def gradients(argmin: BundleEntropyArgmin, x: Tensor, y_bar: Tensor) -> dict[str, Tensor]:
    """Of Σ ȳ·y with respect to x and every parameter of the energy."""
    x = x.clone().requires_grad_()
    inputs = {"x": x, **dict(argmin.energy.named_parameters())}
    found = torch.autograd.grad((argmin(x) * y_bar).sum(), list(inputs.values()))
    return dict(zip(inputs, found, strict=True))


def worst_against_finite_differences(argmin, x, y_bar, found: dict[str, Tensor], h: float = 1e-5) -> float:
    """The largest relative error of the directional derivative along one random direction for each tensor."""
    worst = 0.0
    # Relative to the tensor's own gradient, or to a hundredth of the largest one: tiny ones drown in the noise of y.
    floor = 1e-2 * max(gradient.norm().item() for gradient in found.values())
    for i, (name, gradient) in enumerate(found.items()):
        direction = torch.randn(gradient.shape, generator=seeded(100 + i), dtype=F64)
        direction /= direction.norm()
        errors = []
        for step in (h, 4 * h, h / 4):  # a wrong gradient is wrong at each; noise, bends and truncation are not
            values = []
            for sign in (1, -1):
                moved = copy.deepcopy(argmin)
                point = x.clone()
                target = point if name == "x" else dict(moved.energy.named_parameters())[name]
                with torch.no_grad():
                    target += sign * step * direction
                values.append((moved.solve(point).y * y_bar).sum().item())
            expected = (values[0] - values[1]) / (2 * step)
            errors.append(abs((gradient * direction).sum().item() - expected))
            if errors[-1] <= 0.5 * FINITE_DIFFERENCES * max(gradient.norm().item(), floor):
                break  # right as it is
        worst = max(worst, min(errors) / max(gradient.norm().item(), floor))
    return worst


# ---------------------------------------------------------------- answers


@each_kind
@each_activation
def test_float32_energies(kind, activation):
    for n, K in product((1, 10, 159), (1, 5, 10)):
        energy = build(kind, activation, y_dim=n, hidden=(16, 16), gain=1.0)
        x = contexts(energy, 4)
        expected = reference_argmin(energy, x, K)
        result = BundleEntropyArgmin(energy.to(torch.float32), K).solve(x.float())
        assert result.y.dtype == result.lam.dtype == result.cut_points.dtype == torch.float32
        for field in ("energy", "lower_bound", "gap", "residual", "slopes", "offsets", "lam_history"):
            assert getattr(result, field).dtype == F64
        # One cut tells y as well as its slope is known. Where several meet, their values count: two models that differ
        # by ε and curve by 4 or more, as entropy does, are least within √(ε/2) of each other.
        f = expected.energy - references.negative_entropy(expected.y)
        allowed = FLOAT32_ANSWER if K == 1 else np.sqrt(2.0**-22 * np.maximum(1.0, np.abs(f)) / 2)[:, None]
        assert (np.abs(result.y.numpy() - expected.y) <= allowed).all(), (n, K)
        assert (result.residual[:, 0] <= 2**-25).all()  # half a unit in the last place of a number below 1
        assert (result.gap >= -1e-6 * (1 + result.energy.abs())).all()


@each_activation
def test_certificates_enclose_what_scipy_finds(activation):
    B, n = 16, 6
    energy = build(PICNN, activation, y_dim=n, hidden=(12, 12), gain=4.0)
    x = contexts(energy, B)
    result = BundleEntropyArgmin(energy, 40).solve(x)
    assert (result.residual[:, 2] <= CRITERION * result.lower_bound.abs().clamp(min=1)).all()
    assert (result.gap >= -1e-12).all()
    for b in range(B):
        value_and_gradient = numpy_value_and_gradient(energy, x[b : b + 1])

        def objective(y, value_and_gradient=value_and_gradient):
            f, g = value_and_gradient(y[None])
            return f[0] + references.negative_entropy(y), g[0] + np.log(y / (1 - y))

        found = minimize(objective, np.full(n, 0.5), jac=True, bounds=[(1e-12, 1 - 1e-12)] * n, tol=1e-14).fun
        assert result.lower_bound[b] <= found + 1e-9
        if activation == "softplus":  # L-BFGS-B stalls at the kinks of a ReLU network
            assert found <= result.energy[b] + 1e-9


def random_cuts(B: int, k: int, n: int, slope: float, seed: int) -> tuple[Tensor, Tensor]:
    """Tangents of nothing in particular: slopes up to `slope`, offsets spread so that several cuts compete."""
    generator = seeded(seed)
    G = slope * (2 * torch.rand(B, k, n, generator=generator, dtype=F64) - 1)
    e = slope * torch.randn(B, k, generator=generator, dtype=F64)
    return G, e


@each_activation
def test_criterion_holds_for_every_solve_of_a_trajectory(activation):
    for n, gain in product((1, 10, 159), (1.0, 10.0)):
        energy = build(PICNN, activation, y_dim=n, hidden=(16, 16), gain=gain)
        result = BundleEntropyArgmin(energy, 30).solve(contexts(energy, 7))
        assert (result.complementarity_history <= CRITERION * result.lower_bound.abs().clamp(min=1)[:, None]).all()


def test_duplicate_cuts_change_nothing():
    G, e = random_cuts(5, 4, 6, 3.0, seed=0)
    once = bundle_entropy_solve(G, e)
    twice = bundle_entropy_solve(torch.cat([G, G], dim=1), torch.cat([e, e], dim=1))
    assert (once.y - twice.y).abs().max() <= 1e-12
    y_bar = torch.ones_like(once.y)
    c_y, c_λ = kkt_adjoint(G, e, once.lam, y_bar)
    c_y2, c_λ2 = kkt_adjoint(torch.cat([G, G], dim=1), torch.cat([e, e], dim=1), twice.lam, y_bar)
    assert (c_y - c_y2).abs().max() <= 1e-8
    assert (c_λ - (c_λ2[:, :4] + c_λ2[:, 4:])).abs().max() <= 1e-8


class Linear(nn.Module):
    """f = (slope∘(1 + x))'y: one cut says all, every further one repeats it."""

    def __init__(self, slope: list[float]) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(slope, dtype=F64))
        self.y_dim = len(slope)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (self.slope * (1 + x) * y).sum(1)


def test_saturated_answers():
    energy = Linear([-1000.0, -50.0, 0.0, 50.0, 1000.0])
    x = torch.zeros(2, 5, dtype=F64)
    for adjoint in ("exact", "prop3", "implicit"):
        argmin = BundleEntropyArgmin(energy, 6, adjoint=adjoint)
        result = argmin.solve(x)
        assert torch.allclose(result.y, torch.sigmoid(-energy.slope.detach()).expand(2, -1), rtol=1e-12, atol=1e-300)
        assert result.gap.abs().max() <= 1e-12 * 1000
        found = gradients(argmin, x, torch.ones(2, 5, dtype=F64))
        y = result.y
        assert torch.allclose(found["slope"], -(y * (1 - y)).sum(0), atol=1e-14)
        assert torch.allclose(found["x"], -y * (1 - y) * energy.slope, atol=1e-14)


# ---------------------------------------------------------------- gradients

# A softplus problem is differentiated while its gap is still well above rounding: once cut points repeat to the last
# bits, rounding decides which of two equal cuts carries λ, y is good to CONVERGED only, and differences see that.
# A ReLU problem converges exactly, after 3 to 7 cuts here, and may be differentiated there too.
DIFFERENTIATED = [("relu", 3), ("relu", 7), ("softplus", 3), ("softplus", 5)]


def differentiable_problem(kind, activation, K, least=1e-7):
    """Smooth energies are so far from converged that rounding is not amplified: of the first draw with three such."""
    for seed in range(20):
        energy = build(kind, activation, seed, y_dim=12, hidden=(16, 16), gain=8.0)
        x = contexts(energy, 30)
        if activation == "softplus":
            x = x[BundleEntropyArgmin(energy, K).solve(x).gap >= least]
        if len(x) >= 3:
            return energy, x[:3], loss_weights(3, 12)
    raise AssertionError("every draw has converged")


@each_kind
@pytest.mark.parametrize(("activation", "K"), DIFFERENTIATED)
def test_exact_is_the_derivative_of_the_algorithm(kind, activation, K):
    energy, x, y_bar = differentiable_problem(kind, activation, K)
    argmin = BundleEntropyArgmin(energy, K)
    assert worst_against_finite_differences(argmin, x, y_bar, gradients(argmin, x, y_bar)) <= FINITE_DIFFERENCES


@each_kind
def test_prop3_is_exact_for_relu_and_only_there(kind):
    for activation, right in (("relu", True), ("softplus", False)):
        energy, x, y_bar = differentiable_problem(kind, activation, 4)
        argmin = BundleEntropyArgmin(energy, 4, adjoint="prop3")
        error = worst_against_finite_differences(argmin, x, y_bar, gradients(argmin, x, y_bar))
        assert (error <= FINITE_DIFFERENCES) == right


@each_kind
@each_activation
def test_prop3_is_that_of_the_reference(kind, activation):
    """Which is no derivative, so that differences do not tell it."""
    K = 4
    energy, x, y_bar = differentiable_problem(kind, activation, K)

    def hvp(y, s):
        y = torch.from_numpy(y).requires_grad_()
        (g,) = torch.autograd.grad(energy(x, y).sum(), y, create_graph=True)
        return torch.autograd.grad(g, y, torch.from_numpy(s), materialize_grads=True)[0].numpy()

    trajectory = reference_argmin(energy, x, K)
    offset_bar, seed = reference.argmin_adjoint(trajectory, y_bar.numpy(), hvp, 1)

    x_leaf = x.clone().requires_grad_()
    total = torch.zeros((), dtype=F64)
    for i in range(K):
        y = torch.from_numpy(trajectory.cut_points[:, i].copy()).requires_grad_()
        f = energy(x_leaf, y)
        (g,) = torch.autograd.grad(f.sum(), y, create_graph=True)
        total = total + (torch.from_numpy(offset_bar[:, i]) * f).sum() + (torch.from_numpy(seed[:, i]) * g).sum()
    inputs = {"x": x_leaf, **dict(energy.named_parameters())}
    expected = dict(zip(inputs, torch.autograd.grad(total, list(inputs.values())), strict=True))

    found = gradients(BundleEntropyArgmin(energy, K, adjoint="prop3"), x, y_bar)
    for name, gradient in expected.items():
        # 1e-8: λ agrees to 1e-13, and c_λ amplifies by the condition of the active cuts' KKT system
        assert (found[name] - gradient).abs().max() <= 1e-8 * (1 + gradient.abs().max()), name


def firm_kinks(result: ArgminResult) -> Tensor:
    """[B]: whether y lies where two pieces or more of f meet, each with λ >= 0.05, and none nearly parallel."""
    firm = []
    for y, slopes, lam in zip(result.y, result.slopes, result.lam, strict=True):
        pieces, which = torch.unique((1e9 * slopes).round(), dim=0, return_inverse=True)  # cuts of one piece repeat it
        share = torch.zeros(len(pieces), dtype=F64).index_add(0, which, lam)
        met = pieces[share > 1e-9] / 1e9
        apart = torch.linalg.svdvals((met[1:] - met[0]) * (y * (1 - y)).sqrt())
        firm.append(1 < len(met) <= len(y) + 1 and min(share[share > 1e-9].min(), apart.min()) >= 0.05)
    return torch.tensor(firm)


@pytest.mark.parametrize("adjoint", ["exact", "prop3"])
def test_cuts_beyond_convergence_leave_the_gradient(adjoint):
    """From the 6th cut on every cut point of these samples lies on a kink of their ReLU network, to the last bit.

    There only the very pieces the cuts were made of will do: see `_Argmin`.
    """
    for seed in range(20):  # until three samples of a network are as they should be after 5 cuts
        energy = build(PICNN, "relu", seed, gain=4.0)
        x = contexts(energy, 200)
        early = BundleEntropyArgmin(energy, 5).solve(x)
        x = x[(early.gap.abs() <= 1e-14) & firm_kinks(early)][:3]
        if len(x) == 3:
            break
    assert len(x) == 3
    y_bar = loss_weights(3, 3)
    expected = gradients(BundleEntropyArgmin(energy, 5, adjoint=adjoint), x, y_bar)
    for K in (7, 12, 20):
        argmin = BundleEntropyArgmin(energy, K, adjoint=adjoint)
        assert argmin.solve(x).gap.abs().max() <= 1e-14
        for name, gradient in gradients(argmin, x, y_bar).items():
            # The inner solves leave λw = 1e-15 or so; over (0.05)² of λ and (0.05)² of pieces apart that is 2e-10.
            assert (gradient - expected[name]).abs().max() <= 1e-9, (K, name)


class KKTSolve(torch.autograd.Function):
    """(G, e) -> y, λ-free, differentiated by the dense KKT system of the paper on the active cuts: the third witness.

    M = [[D⁻¹, G', 0], [G, 0, −1], [0, −1', 0]], c = −M⁻¹ [ȳ; 0; 0], ∂ℓ/∂e = c_λ, ∂ℓ/∂G = λ c_y' + c_λ (y − ½)'.
    """

    @staticmethod
    def forward(ctx, G, e):
        solution = reference.bundle_entropy_solve(G.detach().numpy(), e.detach().numpy())
        ctx.cuts = G.detach().numpy(), solution
        return torch.from_numpy(solution.y)

    @staticmethod
    def backward(ctx, y_bar):
        G, solution = ctx.cuts
        B, k, n = G.shape
        G_bar, e_bar = np.zeros((B, k, n)), np.zeros((B, k))
        for b in range(B):
            active = np.flatnonzero(solution.lam[b] > 1e-9)
            y, m = solution.y[b], len(active)
            M = np.zeros((n + m + 1, n + m + 1))
            M[:n, :n] = np.diag(1 / (y * (1 - y)))
            M[n : n + m, :n] = G[b, active]
            M[:n, n : n + m] = G[b, active].T
            M[n : n + m, -1] = M[-1, n : n + m] = -1
            # Least squares: cuts repeat once the solver has converged, and any split among equals will do.
            c = -np.linalg.lstsq(M, np.concatenate([y_bar[b].numpy(), np.zeros(m + 1)]), rcond=1e-11)[0]
            e_bar[b, active] = c[n : n + m]
            G_bar[b, active] = np.outer(solution.lam[b, active], c[:n]) + np.outer(c[n : n + m], y - 0.5)
        return torch.from_numpy(G_bar), torch.from_numpy(e_bar)


@each_kind
@pytest.mark.parametrize(("activation", "K"), DIFFERENTIATED)
def test_exact_equals_autograd_through_the_unrolled_solver(kind, activation, K):
    energy, x, y_bar = differentiable_problem(kind, activation, K)
    x_leaf = x.clone().requires_grad_()
    y = torch.full((3, 12), 0.5, dtype=F64).requires_grad_()
    slopes, offsets = [], []
    for _ in range(K):
        f = energy(x_leaf, y)
        (g,) = torch.autograd.grad(f.sum(), y, create_graph=True)
        slopes.append(g)
        offsets.append(f + (g * (0.5 - y)).sum(1))
        y = KKTSolve.apply(torch.stack(slopes, 1), torch.stack(offsets, 1))
    inputs = {"x": x_leaf, **dict(energy.named_parameters())}
    expected = torch.autograd.grad((y * y_bar).sum(), list(inputs.values()))
    found = gradients(BundleEntropyArgmin(energy, K), x, y_bar)
    for name, gradient in zip(inputs, expected, strict=True):
        assert (found[name] - gradient).abs().max() <= 1e-7 * (1 + gradient.abs().max()), name


@each_kind
def test_implicit_is_right_for_converged_smooth_energies(kind):
    energy = build(kind, "softplus")
    x, y_bar = contexts(energy, 3), loss_weights(3, 3)
    argmin = BundleEntropyArgmin(energy, 20, adjoint="implicit")
    assert (argmin.solve(x).gap <= 1e-10).all()
    # A longer step: the converged y is only good to CONVERGED.
    assert worst_against_finite_differences(argmin, x, y_bar, gradients(argmin, x, y_bar), h=1e-3) <= IMPLICIT


def test_implicit_equals_the_dense_solve():
    energy = build(PICNN, "softplus", y_dim=6, gain=6.0)
    x, y_bar = contexts(energy, 5), loss_weights(5, 6)
    result = BundleEntropyArgmin(energy, 8).solve(x)
    rows = [
        torch.autograd.functional.hessian(lambda y, b=b: energy(x[b : b + 1], y[None])[0], result.y[b])
        for b in range(5)
    ]
    hessian = torch.stack(rows).detach()
    expected = references.implicit_adjoint(hessian.numpy(), result.y.numpy(), y_bar.numpy())

    def hvp(s: Tensor) -> Tensor:
        return (hessian @ s[:, :, None])[:, :, 0]

    found = implicit_adjoint(result, y_bar, hvp, 1e-12)
    assert np.abs(found.numpy() - expected).max() <= 1e-11
    # Each sample stops by itself: alone or in a batch, the same up to rounding, far from the end though it is.
    early = implicit_adjoint(result, y_bar, hvp, 1e-2)
    assert (early - found).abs().max() > 1e-6
    for b in range(5):
        one = slice(b, b + 1)
        alone = ArgminResult(*(t[one] for t in result))
        found = implicit_adjoint(alone, y_bar[one], lambda s, one=one: (hessian[one] @ s[:, :, None])[:, :, 0], 1e-2)
        assert (early[one] - found).abs().max() <= 1e-12


@each_kind
@pytest.mark.parametrize("adjoint", ["exact", "prop3", "implicit"])
def test_float32_gradients(kind, adjoint):
    # Rounding of float32 slopes over how far cuts are apart, which is the root of the gap or so.
    energy, x, y_bar = differentiable_problem(kind, "softplus", 4, least=1e-3)
    expected = gradients(BundleEntropyArgmin(energy, 4, adjoint=adjoint), x, y_bar)
    low = copy.deepcopy(energy).to(torch.float32)
    found = gradients(BundleEntropyArgmin(low, 4, adjoint=adjoint), x.float(), y_bar.float())
    for name, gradient in expected.items():
        assert found[name].dtype == torch.float32
        assert (found[name] - gradient).abs().max() <= 1e-3 * (1 + gradient.abs().max()), name


@pytest.mark.parametrize("adjoint", ["exact", "prop3"])
def test_gradcheck_through_functional_call(adjoint):
    """The weights that forward saw are the ones differentiated, even when they are not the module's own."""
    energy = build(PICNN, "relu", x_dim=2, y_dim=2, hidden=(3,), gain=4.0)
    argmin = BundleEntropyArgmin(energy, 3, adjoint=adjoint)
    names = [name for name, _ in argmin.named_parameters()]

    def y(x: Tensor, *weights: Tensor) -> Tensor:
        scaled = {name: 1.5 * w for name, w in zip(names, weights, strict=True)}  # not even leaves
        return torch.func.functional_call(argmin, scaled, (x,))

    inputs = (contexts(energy, 2), *(p.detach().clone() for p in argmin.parameters()))
    torch.autograd.gradcheck(y, tuple(t.requires_grad_() for t in inputs), eps=1e-5, atol=1e-6, rtol=1e-5)


# ---------------------------------------------------------------- one batch, many samples


@each_activation
@pytest.mark.parametrize("adjoint", ["exact", "prop3", "implicit"])
def test_a_nan_sample_poisons_only_itself(activation, adjoint):
    energy = build(PICNN, activation)
    argmin = BundleEntropyArgmin(energy, 5, adjoint=adjoint)
    x = contexts(energy, 4)
    bad = x.clone()
    bad[1, 0] = torch.nan
    good = [0, 2, 3]
    clean, poisoned = argmin.solve(x), argmin.solve(bad)
    for field in ArgminResult._fields:
        assert torch.equal(getattr(clean, field)[good], getattr(poisoned, field)[good]), field
    for field in ("y", "energy", "lower_bound", "gap"):
        assert getattr(poisoned, field)[1].isnan().all(), field
    y_bar = loss_weights(4, 3)
    expected, found = gradients(argmin, x, y_bar), gradients(argmin, bad, y_bar)
    assert (expected["x"][good] - found["x"][good]).abs().max() <= 1e-12
    assert found["layers.0.W_y"].isnan().any()  # never silently the gradient of fewer samples


def test_samples_are_independent():
    B = 128 if ALL else 24
    for activation, K in (("relu", 5), ("softplus", 5)):
        energy = build(PICNN, activation, y_dim=10, hidden=(16, 16))
        argmin = BundleEntropyArgmin(energy, K)
        x, y_bar = contexts(energy, B), loss_weights(B, 10)
        together = gradients(argmin, x, y_bar)
        y = argmin(x)
        shared = {name: torch.zeros_like(g) for name, g in together.items() if name != "x"}
        for b in range(B):
            row = slice(b, b + 1)
            alone = gradients(argmin, x[row], y_bar[row])
            assert (argmin.solve(x[row]).y - y[row]).abs().max() <= 1e-12
            # y moves by 1e-15; a cut that is all but inactive multiplies that
            assert (alone.pop("x") - together["x"][row]).abs().max() <= 1e-7
            for name, g in alone.items():
                shared[name] += g
        for name, g in shared.items():
            assert (g - together[name]).abs().max() <= 1e-6, name


def test_edge_sizes():
    for n, K, B in product((1, 3), (1, 2), (0, 1)):
        energy = build(PICNN, "softplus", y_dim=n)
        for adjoint in ("exact", "prop3", "implicit"):
            argmin = BundleEntropyArgmin(energy, K, adjoint=adjoint)
            found = gradients(argmin, contexts(energy, B), loss_weights(B, n))
            assert all(g.isfinite().all() for g in found.values())
            result = argmin.solve(contexts(energy, B))
            assert result.y.shape == (B, n)
            assert result.lam_history.shape == (B, K, K)
            assert result.residual.shape == (B, 3)


# ---------------------------------------------------------------- being a torch module


class Counting(nn.Module):
    """An energy that counts how often its x path runs; `unused` is never read."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.y_dim, self.calls = inner, inner.y_dim, 0
        self.unused = nn.Parameter(torch.ones(2, dtype=F64))

    def context(self, x):
        self.calls += 1
        return self.inner.context(x)

    def value(self, context, y):
        return self.inner.value(context, y)

    def forward(self, x, y):
        return self.value(self.context(x), y)


def test_the_context_is_computed_once():
    energy = Counting(build(PICNN, "softplus", batch_norm=True))
    argmin = BundleEntropyArgmin(energy, 5)
    norm = energy.inner.context_layers[0].norm
    found = gradients(argmin, contexts(energy.inner, 8), loss_weights(8, 3))
    assert energy.calls == 1
    assert norm.num_batches_tracked == 1
    assert torch.equal(found["unused"], torch.zeros(2, dtype=F64))
    assert all(g.isfinite().all() for g in found.values())


def test_batch_norm_in_training_mode_is_differentiated():
    energy = build(PICNN, "softplus", batch_norm=True, gain=4.0)
    argmin = BundleEntropyArgmin(energy, 4)
    x, y_bar = contexts(energy, 6), loss_weights(6, 3)
    for mode in (True, False):
        argmin.train(mode)
        assert worst_against_finite_differences(argmin, x, y_bar, gradients(argmin, x, y_bar)) <= FINITE_DIFFERENCES


def test_an_energy_without_a_context():
    class Plain(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x, y):
            return self.inner(x, y)

    energy = build(PICNN, "softplus")
    x, y_bar = contexts(energy, 4), loss_weights(4, 3)
    split, plain = BundleEntropyArgmin(energy, 4), BundleEntropyArgmin(Plain(energy), 4, y_dim=3)
    assert torch.equal(split(x), plain(x))
    expected, found = gradients(split, x, y_bar), gradients(plain, x, y_bar)
    for name, g in expected.items():
        assert (found["x" if name == "x" else f"inner.{name}"] - g).abs().max() <= 1e-9


def test_frozen_weights_stay_out():
    energy = build(PICNN, "relu")
    argmin = BundleEntropyArgmin(energy, 4)
    x = contexts(energy, 4)
    trained = "layers.0.W_y"
    for name, p in energy.named_parameters():
        p.requires_grad_(name == trained)
    argmin(x).sum().backward()
    assert {name for name, p in energy.named_parameters() if p.grad is not None} == {trained}
    energy.requires_grad_(False)
    assert not argmin(x).requires_grad
    # Only x wants a gradient, of an energy whose slopes do not move with y.
    leaf = x.clone().requires_grad_()
    argmin(leaf).sum().backward()
    assert leaf.grad.isfinite().all()
    assert leaf.grad.abs().max() > 0


def test_modes():
    energy = build(PICNN, "softplus")
    argmin = BundleEntropyArgmin(energy, 4)
    x = contexts(energy, 3)
    y = argmin(x)
    assert y.requires_grad
    assert not any(t.requires_grad for t in argmin.solve(x))
    with torch.no_grad():
        assert torch.equal(argmin(x), y)
        assert not argmin(x).requires_grad
    with torch.inference_mode():
        assert torch.equal(argmin(x.clone()), y)
    loaded = BundleEntropyArgmin(build(PICNN, "softplus", seed=9), 4)
    loaded.load_state_dict(argmin.state_dict())
    assert torch.equal(loaded(x), y)
    assert torch.equal(pickle.loads(pickle.dumps(argmin))(x), y)  # noqa: S301
    assert torch.equal(copy.deepcopy(argmin).double()(x), y)
    assert "iterations=4" in repr(argmin)


def test_backward_twice_and_stale_weights():
    energy = build(PICNN, "softplus")
    argmin = BundleEntropyArgmin(energy, 3)
    x = contexts(energy, 3)
    loss = argmin(x).sum()
    loss.backward(retain_graph=True)
    first = energy.layers[0].W_y.grad.clone()
    loss.backward()
    assert torch.allclose(energy.layers[0].W_y.grad, 2 * first, rtol=1e-14)
    loss = argmin(x).sum()
    with torch.no_grad():
        energy.layers[0].W_y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    leaf = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(argmin(leaf).sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="BundleEntropyArgmin can be differentiated once"):
        g.sum().backward()


def test_y_init():
    energy = build(PICNN, "softplus")
    argmin = BundleEntropyArgmin(energy, 25)
    x = contexts(energy, 3)
    start = torch.tensor([[0.0, 1.0, 0.3]] * 3, dtype=F64)
    result = argmin.solve(x, start)
    assert torch.equal(result.cut_points[:, 0], start)
    assert (result.y - argmin(x)).abs().max() <= 1e-6  # both within 1e-12 of the optimal value
    assert (argmin(x, start) - result.y).abs().max() == 0


@each_activation
def test_training_reduces_the_loss(activation):
    energy = PICNN(6, 4, (16, 16), activation=activation, batch_norm=True, generator=seeded(0))
    argmin = BundleEntropyArgmin(energy, 5)
    generator = seeded(3)
    x = torch.randn(64, 6, generator=generator)
    target = torch.sigmoid(3 * x @ torch.randn(6, 4, generator=generator))
    optimiser = torch.optim.Adam(energy.parameters(), lr=1e-2)
    losses = []
    for _ in range(25):
        loss = (argmin(x) - target).pow(2).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        energy.project_()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_the_regulariser_of_the_unit_box_is_the_negative_entropy():
    y = torch.tensor([[0.0, 1.0], [0.5, 0.25]], dtype=F64)
    assert np.allclose(
        UNIT_BOX.regulariser(TORCH, y)[..., 0].numpy(), references.negative_entropy(y.numpy()), atol=1e-15
    )


# ---------------------------------------------------------------- errors


class Returns(nn.Module):
    def __init__(self, energy) -> None:
        super().__init__()
        self.energy, self.y_dim = energy, 3

    def forward(self, x, y):
        return self.energy(x, y)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adjoint": "unrolled"}, r"adjoint: expected 'exact', 'prop3' or 'implicit', but got 'unrolled'; choose"),
        ({"iterations": 0}, r"iterations: expected an integer of at least 1, but got 0; give the number of cuts K\."),
        ({"iterations": 2.0}, r"iterations: expected an integer of at least 1, but got 2\.0; "),
        ({"steps": 0}, r"steps: expected an integer of at least 1, but got 0; "),
        ({"gap_tolerance": 0.0}, r"gap_tolerance: expected a finite number above 0, but got 0\.0"),
        ({"residual_tolerance": float("nan")}, r"residual_tolerance: expected a finite number above 0, but got nan"),
        ({"y_dim": 0}, r"y_dim: expected an integer of at least 1, but got 0; "),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        BundleEntropyArgmin(build(PICNN), **options)


def test_wrong_inputs():
    energy = build(PICNN)
    argmin = BundleEntropyArgmin(energy, 2)
    x = contexts(energy, 2)
    half = torch.full((2, 3), 0.5, dtype=F64)
    for y_init, message in (
        (half[:1], r"y_init: expected a tensor of shape \[2, 3\], but got shape \[1, 3\]; give one row for each"),
        (half.float(), r"y_init: expected torch\.float64, as the energy is, but got torch\.float32; convert"),
        (half + 0.6, r"y_init: expected numbers in \[0, 1\], but got 1\.1 in sample 0; clip it"),
        (half * torch.nan, r"y_init: expected numbers in \[0, 1\], but got nan in sample 0"),
    ):
        for call in (argmin, argmin.solve):
            with pytest.raises(ValueError, match=message):
                call(x, y_init)
    with pytest.raises(ValueError, match=r"x: expected a tensor of shape \[batch, 4\], but got shape \[4\]; "):
        argmin(x[0])
    with pytest.raises(ValueError, match=r"energy: expected one number per row, shape \[2\], but got \[2, 1\]; sum or"):
        BundleEntropyArgmin(Returns(lambda x, y: y.sum(1, keepdim=True)))(x)
    with pytest.raises(
        ValueError, match="energy: expected one differentiable in y, but got an output that autograd does not"
    ):
        BundleEntropyArgmin(Returns(lambda x, y: y.detach().sum(1)))(x)
    with pytest.raises(
        ValueError, match="y_dim: expected the number of columns of y, but got none, and Linear has no attribute y_dim"
    ):
        BundleEntropyArgmin(nn.Linear(2, 2))
