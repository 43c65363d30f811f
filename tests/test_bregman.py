"""Bregman proximal gradient: reference, torch layer and packages, on every domain."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exports import export

import icnnrt
from icnnrt import Status
from icnnrt.checking.recommend import recommend
from icnnrt.checking.verify import verify
from icnnrt.errors import ExportError, InputError
from icnnrt.mathematics import bregman, certificate, reference
from icnnrt.mathematics.domains import MODELS, Coordinates, box_coordinates, space_coordinates
from icnnrt_exporters import TrainSpec
from icnnrt_exporters.checks.solver_choice import choose_solver
from icnnrt_models import FICNN, BregmanProximalGradient, BundleEntropyArgmin

X_DIM, N, MU, H = 2, 3, 2.5, 1e-5
KINDS = ("unit_box", "box", "simplex", "space")


def energy_of(dtype: torch.dtype = torch.float64) -> FICNN:
    return FICNN(X_DIM, N, (6, 5), "softplus", generator=torch.Generator().manual_seed(0), dtype=dtype)


def layer_of(kind: str, iterations: int = 5, dtype: torch.dtype = torch.float64) -> BregmanProximalGradient:
    return BregmanProximalGradient(energy_of(dtype), iterations, 0.8, 1.0, domain=kind, mu=MU)


def inputs(kind: str, B: int, seed: int = 0) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((B, X_DIM))
    if kind != "box":
        return x, {}
    lower = rng.uniform(-2.0, 1.0, (B, N))
    return x, {"lower": lower, "upper": lower + rng.uniform(0.1, 2.0, (B, N))}


def coordinates(kind: str, bounds: dict[str, np.ndarray]) -> Coordinates:
    if kind == "box":
        return box_coordinates(bounds["lower"], bounds["upper"])
    return space_coordinates(MU) if kind == "space" else Coordinates(0.0, 1.0)


def on_torch(arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(a) for name, a in arrays.items()}


def true(layer: BregmanProximalGradient, x: np.ndarray, bounds: dict[str, np.ndarray]) -> reference.Trajectory:
    """The reference in p, on torch's gradients."""

    def f(y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        leaf = torch.from_numpy(y).requires_grad_()
        value = layer.energy(torch.from_numpy(x), leaf)
        return value.detach().numpy(), torch.autograd.grad(value.sum(), leaf)[0].numpy()

    model = MODELS[layer.domain]
    start = np.full((len(x), N), model.centre(N))
    of_p = reference.in_coordinates(f, coordinates(layer.domain, bounds))
    return bregman.bregman_argmin(of_p, start, layer.iterations, layer.step_size, model)


@pytest.mark.parametrize("kind", KINDS)
def test_it_converges_to_the_argmin(kind: str) -> None:
    """Told by its own certificate and by the bundle method."""
    layer = layer_of(kind, 60)
    x, bounds = inputs(kind, 9)
    found = true(layer, x, bounds)
    assert (found.gap < 1e-9).all()
    assert (found.gap > -1e-12).all()
    at, model = coordinates(kind, bounds), MODELS[kind]

    def f(y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        leaf = torch.from_numpy(y).requires_grad_()
        value = layer.energy(torch.from_numpy(x), leaf)
        return value.detach().numpy(), torch.autograd.grad(value.sum(), leaf)[0].numpy()

    start = np.full((9, N), model.centre(N))
    bundle = reference.bundle_entropy_argmin(reference.in_coordinates(f, at), start, 12, domain=model)
    np.testing.assert_allclose(found.energy, bundle.energy, rtol=0, atol=1e-8)
    np.testing.assert_allclose(found.y, bundle.y, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_layer_is_the_reference(kind: str) -> None:
    layer = layer_of(kind)
    x, bounds = inputs(kind, 9)
    found, result = true(layer, x, bounds), layer.solve(torch.from_numpy(x), **on_torch(bounds))
    np.testing.assert_allclose(result.y.numpy(), coordinates(kind, bounds).y(found.y), rtol=0, atol=1e-12)
    for field in ("energy", "lower_bound", "gap"):
        np.testing.assert_allclose(getattr(result, field).numpy(), getattr(found, field), rtol=0, atol=1e-12)
    assert torch.equal(layer(torch.from_numpy(x), **on_torch(bounds)), result.y)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_three_ways(kind: str) -> None:
    """Unrolled autograd, differences, and the adjoint of the reference."""
    layer = layer_of(kind)
    x, bounds = inputs(kind, 4)
    leaves = {name: t.requires_grad_() for name, t in on_torch({"x": x, **bounds}).items()}
    y_bar = np.random.default_rng(1).standard_normal((4, N))
    layer(**leaves).backward(torch.from_numpy(y_bar))
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        for column in range(leaf.shape[1]):
            step = H * torch.eye(leaf.shape[1], dtype=torch.float64)[column]
            with torch.no_grad():
                ahead, behind = (layer(**{**leaves, name: leaf + t * step}) for t in (1, -1))
            difference = (y_bar * (ahead - behind).numpy()).sum(1) / (2 * H)
            np.testing.assert_allclose(leaf.grad[:, column].numpy(), difference, rtol=0, atol=1e-8, err_msg=name)

    at, model = coordinates(kind, bounds), MODELS[kind]
    found = true(layer, x, bounds)
    X = torch.from_numpy(x)

    def hvp(p: np.ndarray, s: np.ndarray) -> np.ndarray:
        leaf = torch.from_numpy(at.y(p)).requires_grad_()
        (g,) = torch.autograd.grad(layer.energy(X, leaf).sum(), leaf, create_graph=True)
        (h,) = torch.autograd.grad(g, leaf, torch.from_numpy(at.scale * s))
        return np.asarray(at.scale * h.numpy())

    cuts = bregman.bregman_adjoint(found, np.broadcast_to(at.scale, y_bar.shape) * y_bar, hvp, layer.step_size, model)
    x_leaf = torch.from_numpy(x).requires_grad_()
    pushed = torch.zeros((), dtype=torch.float64)
    for k in range(layer.iterations):
        leaf = torch.from_numpy(at.y(found.cut_points[:, k])).requires_grad_()
        (g,) = torch.autograd.grad(layer.energy(x_leaf, leaf).sum(), leaf, create_graph=True)
        pushed = pushed + (torch.from_numpy(at.scale * cuts.seed[:, k]) * g).sum()
    parameter = layer.energy.get_parameter("layers.0.W_y")
    x_bar, theta_bar = torch.autograd.grad(pushed, [x_leaf, parameter])
    assert leaves["x"].grad is not None
    np.testing.assert_allclose(x_bar.numpy(), leaves["x"].grad.numpy(), rtol=0, atol=1e-12)
    assert parameter.grad is not None
    np.testing.assert_allclose(theta_bar.numpy(), parameter.grad.numpy(), rtol=0, atol=1e-12)


def test_wrong_arguments() -> None:
    for argument, bad in (("step_size", 0.0), ("mu", -1.0), ("domain", "ball"), ("iterations", 0)):
        with pytest.raises(ValueError, match=argument):
            BregmanProximalGradient(energy_of(), **{argument: bad})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"lower: expected the bounds of y, as the domain is a box, but got none"):
        layer_of("box")(torch.zeros(2, X_DIM, dtype=torch.float64))


# --- Packages --------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["box", "simplex"])
def package(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, icnnrt.Session]:
    layer = layer_of(request.param)
    path: Path = tmp_path_factory.mktemp("bregman") / f"{request.param}.icnn"
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, X_DIM, generator=generator, dtype=torch.float64)
    y = torch.rand(4, N, generator=generator, dtype=torch.float64)
    with pytest.raises(ExportError, match="'prop3' belongs to the bundle method"):
        export(layer.energy, layer, x, y, path, train=TrainSpec(adjoint="prop3"))
    export(layer.energy, layer, x, y, path, train=TrainSpec())
    return layer, icnnrt.load(path, native=False)


def test_package_is_the_layer(package: tuple[Any, icnnrt.Session]) -> None:
    layer, session = package
    assert session.manifest.solver is not None
    assert (session.manifest.solver.name, session.manifest.solver.step_size) == ("BregmanProximalGradient", 0.8)
    assert not session.manifest.ops["ai.icnnrt"].names
    for B in (1, 50):
        x, bounds = inputs(layer.domain, B)
        solution, found = session.argmin(x, **bounds), true(layer, x, bounds)
        at = coordinates(layer.domain, bounds)
        np.testing.assert_allclose(solution.y, at.y(found.y), rtol=0, atol=1e-12)
        for field in ("lam", "slopes", "offsets", "cut_points", "energy", "lower_bound", "gap", "residual"):
            np.testing.assert_allclose(getattr(solution, field), getattr(found, field), rtol=0, atol=1e-12)
        assert (solution.status <= Status.GAP).all()

        leaves = {name: t.requires_grad_() for name, t in on_torch({"x": x, **bounds}).items()}
        layer.energy.zero_grad()
        y_bar = np.cos(np.arange(solution.y.size)).reshape(solution.y.shape)
        layer(**leaves).backward(torch.from_numpy(y_bar))
        cotangents = session.vjp(solution, y_bar)
        for name, leaf in leaves.items():
            assert leaf.grad is not None
            np.testing.assert_allclose(getattr(cotangents, name), leaf.grad.numpy(), rtol=0, atol=1e-10, err_msg=name)
        for name, bar in cotangents.weights.items():
            grad = layer.energy.get_parameter(name).grad
            expected = 0.0 if grad is None else grad.numpy()  # y* does not depend on the last bias
            np.testing.assert_allclose(bar, expected, rtol=0, atol=1e-10, err_msg=name)
    with pytest.raises(InputError, match="Bregman proximal gradient has no model of cuts"):
        session.vjp(solution, y_bar, adjoint="prop3")


def test_verify_and_tuning(package: tuple[Any, icnnrt.Session]) -> None:
    layer, session = package
    report = verify(session.path, samples=6, native=False)
    assert report.passed, [check for check in report.checks if check.verdict == "fail"]
    with icnnrt.load(session.path, native=False) as fresh:
        x, bounds = inputs(layer.domain, 8)
        target = coordinates(layer.domain, bounds).y(np.full((8, N), 1 / N))
        tuner = icnnrt.FineTuner(fresh, learning_rate=1e-2)
        before = tuner.loss(x, target, **bounds)
        assert all(tuner.step(x, target, **bounds).accepted for _ in range(5))
        assert tuner.loss(x, target, **bounds) < before


# --- How many iterations ---------------------------------------------------------------------------


def test_recommended_iterations_reach_the_gap(package: tuple[Any, icnnrt.Session]) -> None:
    layer, session = package
    x, bounds = inputs(layer.domain, 20)
    found = recommend(session, x, 1e-4, **bounds)
    assert found.samples == 20
    assert set(found.iterations) == {90, 99, 100}
    for percent, K in found.iterations.items():
        assert K is not None
        shares = []
        for iterations in (K, K - 1):
            layer.iterations = iterations
            ran = true(layer, x, bounds)
            shares.append((ran.gap <= 1e-4 * certificate.unit(ran.lower_bound)).mean())
        layer.iterations = 5
        assert shares[0] >= percent / 100 > shares[1]
    assert found.as_dict()["iterations"]["90"] == found.iterations[90]
    with pytest.raises(InputError, match="gap: expected a positive number"):
        recommend(session, x, 0.0, **bounds)


@pytest.mark.parametrize("activation", ["softplus", "relu"])
def test_the_better_solver_is_chosen(activation: str) -> None:
    """Of a ReLU energy whose optima lie on strong kinks only the bundle method reaches the gap."""

    def on_kinks(energy: Any) -> int:
        """How many optima several pieces of the energy hold, none of them all but alone."""
        found, count = BundleEntropyArgmin(energy, 12).solve(x), 0
        for slopes, lam in zip(found.slopes, found.lam, strict=True):
            pieces, which = torch.unique((1e9 * slopes).round(), dim=0, return_inverse=True)
            share = torch.zeros(len(pieces), dtype=lam.dtype).index_add(0, which, lam)
            count += bool(share.max() <= 0.95)
        return count

    x = torch.randn(5, X_DIM, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        energy = FICNN(X_DIM, N, (6, 5), activation, generator=generator, dtype=torch.float64)
        if activation == "softplus":
            break
        with torch.no_grad():
            for name, p in energy.named_parameters():
                if name.endswith("W_y"):
                    p.mul_(8.0)
        if on_kinks(energy) >= 4:
            break
    assert activation == "softplus" or on_kinks(energy) >= 4
    asked = []

    def seconds(solver: Any) -> float:
        """Bregman proximal gradient is as fast as can be."""
        asked.append(solver)
        return 1.0 if not isinstance(solver, BregmanProximalGradient) else 0.1

    solver, why = choose_solver(energy, energy, x, N, seconds)
    assert len(asked) == 2
    assert "on 5 examples" in why
    assert "BundleEntropy" in why
    assert "BregmanProximalGradient of step size" in why
    assert isinstance(solver, BregmanProximalGradient) == (activation == "softplus"), why
    result = solver.solve(x)
    assert (result.gap <= 1e-3 * result.lower_bound.abs().clamp(min=1.0) + 1e-9).all(), why


def test_export_with_the_solver_left_open(tmp_path: Path) -> None:
    energy = energy_of()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, X_DIM, generator=generator, dtype=torch.float64)
    y = torch.rand(4, N, generator=generator, dtype=torch.float64)
    with pytest.raises(ExportError, match="solver: expected a layer, 'auto' or None"):
        export(energy, "best", x, y, tmp_path / "auto.icnn")  # type: ignore[arg-type]
    stages: list[str] = []
    written = export(energy, "auto", x, y, tmp_path / "auto.icnn", progress=stages.append)
    assert stages.index("convexity") < stages.index("choosing the solver") < stages.index("adjoint")
    assert written.manifest.solver is not None
    assert str(written.manifest.metadata["solver_choice"]).startswith("on 4 examples")
    assert written.manifest.solver.name in str(written.manifest.metadata["solver_choice"]).partition(";")[0]
    assert (icnnrt.load(written, native=False).argmin(x.numpy()).status == Status.CONVERGED).all()
