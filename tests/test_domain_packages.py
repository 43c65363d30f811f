"""Packages over boxes, the simplex and R^n: answers, certificates, gradients and tuning by plain onnxruntime.

Answers are told by the float64 reference with torch's gradients, by closed forms and by feasible points; gradients by
central differences of `Session.argmin`.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from exports import export
from onnx_functions import transposed_products
from test_argmin_layer import numpy_value_and_gradient
from torch import Tensor, nn

import icnnrt
from icnnrt import Status
from icnnrt.checking import energy as checks
from icnnrt.checking.trial import Trial
from icnnrt.checking.verify import verify
from icnnrt.errors import InputError
from icnnrt.mathematics import reference
from icnnrt.mathematics.domains import MODELS, Coordinates, box_coordinates, space_coordinates
from icnnrt.tuning.finetune import FineTuner
from icnnrt_exporters import TrainSpec, siblings
from icnnrt_exporters.assembly.optimizers import SGD
from icnnrt_models import FICNN, BundleEntropyArgmin

X_DIM, N, MU = 2, 3, 2.5
KINDS = ("box", "simplex", "space")
H = 1e-5

Load = Callable[[str], icnnrt.Session]


class Quadratic(nn.Module):
    """½ y'Ay − x'y: no weight is trainable, and in R^n the argmin is (A + μ I)⁻¹ x."""

    y_dim = 2

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("A", torch.tensor([[2.0, 0.5], [0.5, 1.0]]))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return 0.5 * ((y @ self.A) * y).sum(-1) - (x * y).sum(-1)


def steep(seed: int) -> FICNN:
    energy = FICNN(X_DIM, N, (6, 5), "softplus", generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for name, p in energy.named_parameters():
            if name.endswith("W_y"):
                p.mul_(3.0)
    return energy


def on_its_way(energy: FICNN, kind: str) -> bool:
    """Whether three cuts leave answers that are far from converged."""
    double = copy.deepcopy(energy).double()
    found = (stated(numpy_value_and_gradient(double, torch.from_numpy(contexts(B))), kind, B) for B in (1, 50))
    return all((one.gap > 2e-6).any() for one in found)


def make(kind: str, dtype: torch.dtype, path: Path, energy: nn.Module | None = None, K: int = 3, **more: Any) -> None:
    if energy is None:
        energy = next(energy for energy in map(steep, range(20)) if on_its_way(energy, kind))
    layer = BundleEntropyArgmin(energy.to(dtype), iterations=K, gap_tolerance=1.0)
    layer.domain, layer.mu = kind, MU  # type: ignore[assignment]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, X_DIM, generator=generator, dtype=dtype)
    y = torch.rand(4, layer.y_dim, generator=generator, dtype=dtype)
    export(energy, layer, x, y, path, **more)


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """kind, kind-32 or quadratic -> a session on portable bodies; each package is written once."""
    folder, made = tmp_path_factory.mktemp("domains"), {}

    def get(name: str) -> icnnrt.Session:
        if name not in made:
            kind, _, single = name.partition("-")
            path = folder / f"{name}.icnn"
            if kind == "quadratic":
                make("space", torch.float64, path, Quadratic(), 12)
            else:
                train = TrainSpec(optimizer=SGD(momentum=0.0)) if name == "box" else None
                make(kind, torch.float32 if single else torch.float64, path, train=train)
            made[name] = icnnrt.load(path, native=False)
        return made[name]

    return get


def contexts(B: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((B, X_DIM))


def bounds_of(kind: str, B: int, seed: int = 3) -> dict[str, np.ndarray]:
    if kind != "box":
        return {}
    rng = np.random.default_rng(seed)
    lower = rng.uniform(-2.0, 1.0, (B, N))
    return {"lower": lower, "upper": lower + rng.uniform(0.1, 2.0, (B, N))}


def coordinates(kind: str, bounds: dict[str, np.ndarray]) -> Coordinates:
    if kind == "box":
        return box_coordinates(bounds["lower"], bounds["upper"])
    return space_coordinates(MU) if kind == "space" else Coordinates(0.0, 1.0)


def stated(value_and_gradient: Callable[[np.ndarray], Any], kind: str, B: int) -> reference.Trajectory:
    """What the float64 reference makes of three cuts, in coordinates of the domain."""
    at, model = coordinates(kind, bounds_of(kind, B)), MODELS[kind]
    centre = np.full((B, N), model.centre(N))
    return reference.bundle_entropy_argmin(reference.in_coordinates(value_and_gradient, at), centre, 3, domain=model)


def somewhere(kind: str, B: int, seed: int = 4) -> np.ndarray:
    """Points p of the domain."""
    rng = np.random.default_rng(seed)
    if kind == "simplex":
        return rng.dirichlet(np.ones(N), B)
    return rng.standard_normal((B, N)) if kind == "space" else rng.random((B, N))


# --- Answers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_no_product_reads_a_transpose(load: Load, kind: str) -> None:
    graphs = sorted(load(kind).path.glob("*.onnx"))
    assert len(graphs) >= 3
    for path in graphs:
        assert not transposed_products(onnx.load(path, load_external_data=False).graph), path.name


@pytest.mark.parametrize("kind", KINDS)
def test_start_is_in_y(load: Load, kind: str) -> None:
    session, x, bounds = load(kind), contexts(5), bounds_of(kind, 5)
    start = coordinates(kind, bounds).y(somewhere(kind, 5))
    solution = session.argmin(x, y_init=start, **bounds)
    np.testing.assert_allclose(coordinates(kind, bounds).y(solution.cut_points[:, 0]), start, rtol=0, atol=1e-12)
    warm = session.argmin(x, warm=solution, **bounds)
    np.testing.assert_allclose(coordinates(kind, bounds).y(warm.cut_points[:, 0]), solution.y, rtol=0, atol=1e-9)
    assert warm.gap.max() <= solution.gap.max()


def test_answer_in_closed_form(load: Load) -> None:
    session, x = load("quadratic"), contexts(7)
    A = np.array([[2.0, 0.5], [0.5, 1.0]]) + MU * np.eye(2)
    solution = session.argmin(x)
    np.testing.assert_allclose(solution.y, np.linalg.solve(A, x.T).T, rtol=0, atol=1e-5)
    np.testing.assert_allclose(solution.energy, -0.5 * (x * np.linalg.solve(A, x.T).T).sum(1), rtol=0, atol=1e-9)
    y_bar = np.random.default_rng(0).standard_normal((7, 2))
    cotangents = session.vjp(solution, y_bar)
    assert not cotangents.weights
    for sample in range(7):
        differences = np.empty(2)
        for i in range(2):
            step = H * np.eye(2)[i]
            ahead, behind = (session.argmin(x[sample : sample + 1] + s).y for s in (step, -step))
            differences[i] = (y_bar[sample] * (ahead - behind)[0]).sum() / (2 * H)
        np.testing.assert_allclose(cotangents.x[sample], differences, rtol=0, atol=1e-4)


def test_boxes_without_width_and_without_points(load: Load) -> None:
    session, x, bounds = load("box"), contexts(6), bounds_of("box", 6)
    clean = session.argmin(x, **bounds)
    lower, upper = bounds["lower"].copy(), bounds["upper"].copy()
    upper[1, 0] = lower[1, 0]  # y fixed in one entry
    upper[2] = lower[2]  # and in all
    upper[3, 1] = lower[3, 1] - 1e-3  # no y at all
    lower[4, 2] = np.nan
    solution = session.argmin(x, lower=lower, upper=upper)
    assert solution.y[1, 0] == lower[1, 0]
    assert (solution.y[2] == lower[2]).all()
    assert solution.gap[2] == pytest.approx(0.0, abs=1e-12)
    assert solution.status[3] == Status.INFEASIBLE
    assert solution.status[4] == Status.NOT_FINITE_INPUT
    assert np.isnan(solution.y[[3, 4]]).all()
    assert (solution.status[[0, 1, 2, 5]] <= Status.GAP).all()
    np.testing.assert_allclose(solution.y[[0, 5]], clean.y[[0, 5]], rtol=0, atol=1e-10)
    cotangents = session.vjp(solution, np.ones((6, N)), on_unsafe="skip")
    of_clean = session.vjp(clean, np.ones((6, N)))
    assert cotangents.skipped.tolist() == [False, False, False, True, True, False]
    for field in ("x", "lower", "upper"):
        bar = getattr(cotangents, field)
        assert np.isnan(bar[[3, 4]]).all(), field
        assert np.isfinite(bar[[0, 1, 2, 5]]).all(), field
        np.testing.assert_allclose(bar[[0, 5]], getattr(of_clean, field)[[0, 5]], rtol=0, atol=1e-8, err_msg=field)
    # Where nothing can move but with both bounds, y = lower = upper.
    np.testing.assert_allclose((cotangents.lower + cotangents.upper)[2], 1.0, rtol=0, atol=1e-12)


def test_graph_alone_answers_nan_for_an_empty_box(load: Load) -> None:
    session, x, bounds = load("box"), contexts(3), bounds_of("box", 3)
    feeds = {"x": x, "y_init": (bounds["lower"] + bounds["upper"]) / 2, **bounds}
    clean, _ = session.runner.run("argmin", feeds)
    out, _ = session.runner.run("argmin", {**feeds, "upper": bounds["upper"] - [[0.0], [5.0], [0.0]]})
    assert np.isnan(out["y"][1]).all()
    assert np.isnan(out["lower_bound"][1])
    np.testing.assert_allclose(out["y"][[0, 2]], clean["y"][[0, 2]], rtol=0, atol=1e-10)


def test_float32(load: Load) -> None:
    x, bounds = contexts(20).astype(np.float32), {k: b.astype(np.float32) for k, b in bounds_of("box", 20).items()}
    single, double = load("box-32").argmin(x, **bounds), load("box").argmin(x, **bounds)
    np.testing.assert_allclose(single.y, double.y, rtol=0, atol=1e-3)
    assert (single.y <= bounds["upper"]).all()
    assert (single.status <= Status.GAP).all()
    y_bar = np.ones((20, N), np.float32)
    bars = load("box-32").vjp(single, y_bar), load("box").vjp(double, y_bar)
    for field in ("x", "lower", "upper"):
        np.testing.assert_allclose(getattr(bars[0], field), getattr(bars[1], field), rtol=1e-2, atol=1e-2)


# --- Gradients -------------------------------------------------------------------------------------


def test_prop3_misses_what_moves_the_cuts(load: Load) -> None:
    session, at = load("box"), {"x": contexts(10, 5), **bounds_of("box", 10, 6)}
    solution, y_bar = session.argmin(**at), np.ones((10, N))
    exact, prop3 = (session.vjp(solution, y_bar, adjoint=adjoint) for adjoint in ("exact", "prop3"))
    for name in ("x", "lower", "upper"):
        assert np.abs(getattr(exact, name) - getattr(prop3, name)).max() > 1e-3, name


# --- Around them -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_verify_passes(load: Load, kind: str) -> None:
    report = verify(load(kind).path, samples=6, native=False)
    assert report.passed, [check for check in report.checks if check.verdict == "fail"]
    names = [check.name for check in report.checks]
    assert ("adjoint: bounds" in names) == (kind == "box")


@pytest.mark.parametrize("kind", KINDS)
def test_verify_looks_at_the_energy_where_y_lies(load: Load, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not elsewhere, where it need not be convex or even finite; and wherever that is, beyond [0, 1]^n too."""
    session = load(kind)
    trial = Trial(icnnrt.Package.open(session.path), session, contexts(5), np.random.default_rng(0))
    seen: list[np.ndarray] = []
    plain = icnnrt.EnergySession.value_and_gradient

    def noted(self: icnnrt.Session, x: Any, y: Any) -> Any:
        seen.append(np.asarray(y))
        return plain(self, x, y)

    monkeypatch.setattr(icnnrt.EnergySession, "value_and_gradient", noted)
    monkeypatch.setattr(icnnrt.EnergySession, "hvp", lambda self, x, y, v: plain(self, x, y + 1e-5 * v)[1])
    for check in (checks.gradient, checks.convexity, checks.hvp):
        list(check(trial))
    Y = np.array(seen)
    if kind == "simplex":
        assert Y.min() >= -1e-12
        np.testing.assert_allclose(Y.sum(-1), 1.0, rtol=0, atol=1e-12)
    elif kind == "box":
        assert (trial.bounds["lower"] - 1e-12 <= Y).all()
        assert (trial.bounds["upper"] + 1e-12 >= Y).all()
        assert Y.min() < -0.5
        assert Y.max() > 1.5
    else:
        assert Y.std() > 0.5 / np.sqrt(MU)
        assert np.abs(Y.mean()) < 0.2

    def concave(self: icnnrt.Session, x: Any, y: Any) -> Any:
        """Down where entries of y are large: above 0.8, or beyond 1, which only a box or R^n reaches."""
        f, g = plain(self, x, y)
        beyond = np.maximum(np.asarray(y) - (0.8 if kind == "simplex" else 1.0), 0.0)
        return f - 50 * (beyond**2).sum(1), g - 100 * beyond

    monkeypatch.setattr(icnnrt.EnergySession, "value_and_gradient", concave)
    assert next(checks.convexity(trial)).verdict == "fail"
    assert next(checks.gradient(trial)).verdict == "pass"


@pytest.mark.parametrize("kind", KINDS)
def test_sibling_files_are_the_argmin_and_its_adjoint(load: Load, kind: str, tmp_path: Path) -> None:
    """adj_argmin.onnx of plain onnxruntime against `vjp`, samples without an answer or a domain among them."""
    session = load(kind)
    argmin, adj_argmin, *_ = siblings(session.path, tmp_path)
    B = 6
    x, bounds = contexts(B), bounds_of(kind, B)
    x[1, 0] = np.nan
    if bounds:
        bounds["lower"][2, 1] = bounds["upper"][2, 1] + 1.0
        bounds["lower"][3, 0] = bounds["upper"][3, 0]
    y_bar = np.random.default_rng(5).standard_normal((B, N))
    solution = session.argmin(x, **bounds)
    expected = session.vjp(solution, y_bar, on_unsafe="skip")
    assert expected.skipped.tolist() == [False, True, bool(bounds), False, False, False]
    start = (bounds["lower"] + bounds["upper"]) / 2 if bounds else np.full((B, N), MODELS[kind].centre(N))
    feeds = {"x": x, "y_init": start, **bounds}

    def run(path: Path, **more: np.ndarray) -> dict[str, np.ndarray]:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        model = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return dict(zip([v.name for v in model.get_outputs()], model.run(None, {**feeds, **more}), strict=True))

    safe = ~expected.skipped
    np.testing.assert_allclose(run(argmin)["y"][safe], solution.y[safe], rtol=0, atol=1e-12)
    came = run(adj_argmin, adj_y=y_bar)
    true = {f"adj_{name}": bar for name, bar in expected.weights.items()} | {"adj_x": expected.x}
    if bounds:
        assert expected.lower is not None
        assert expected.upper is not None
        true |= {"adj_lower": expected.lower, "adj_upper": expected.upper}
    assert came.keys() == true.keys()
    for name, bar in true.items():
        np.testing.assert_allclose(came[name], bar, rtol=1e-9, atol=1e-9, err_msg=name)


def test_tuning_in_a_box(load: Load) -> None:
    with icnnrt.load(load("box").path, native=False) as session:
        x, bounds = contexts(16), bounds_of("box", 16)
        target = bounds["lower"] + 0.2 * (bounds["upper"] - bounds["lower"])
        solution = session.argmin(x, **bounds)
        y_bar = 2 * (solution.y - target) / target.size
        gradient = session.vjp(solution, y_bar).weights
        old = {name: session.weights[name] for name in gradient}
        tuner = FineTuner(session, learning_rate=1e-2)
        report = tuner.step(x, target, **bounds)
        assert report.accepted, report.reason
        assert report.loss == pytest.approx(((solution.y - target) ** 2).mean(), rel=1e-9)
        clamped = {name for name, spec in session.manifest.weights.tensors.items() if spec.nonnegative}
        for name in gradient:
            expected = old[name] - 1e-2 * gradient[name]
            expected = np.maximum(expected, 0.0) if name in clamped else expected
            np.testing.assert_allclose(session.weights[name], expected, rtol=0, atol=1e-12, err_msg=name)
        before = tuner.loss(x, target, **bounds)
        fitted = tuner.fit(x, target, epochs=2, **bounds, validation=(x, target, *bounds.values()))
        assert fitted.epochs[-1].validation is not None
        assert fitted.epochs[-1].validation < before
        bounds["upper"][3] = bounds["lower"][3] - 1.0
        assert tuner.step(x, target, **bounds).skipped == 1
        with pytest.raises(InputError, match=r"lower: expected the bounds of y"):
            tuner.step(x, target)
