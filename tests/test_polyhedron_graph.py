"""The graphs of the argmin over a polyhedron: against the numpy method, in plain onnxruntime, on hard samples."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exports import export
from test_polyhedron import without_graphs
from typer.testing import CliRunner

import icnnrt
from icnnrt.checking.verify import verify
from icnnrt.cli.commands import app
from icnnrt.errors import ExportError
from icnnrt.format.manifest import Manifest, PolyhedronSpec
from icnnrt.mathematics.status import Status

onnx = pytest.importorskip("onnx")
torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

from onnx_functions import transposed_products  # noqa: E402

from icnnrt_exporters import pack  # noqa: E402
from icnnrt_exporters.checks.preconditions import of_layer  # noqa: E402
from icnnrt_models import FICNN, PolyhedronArgmin  # noqa: E402

N = 4
MU = 0.5
FIELDS = ("energy", "lower_bound", "gap", "lam", "nu", "bound_multipliers")


@pytest.fixture(scope="module", params=["native", "portable"])
def pair(request: pytest.FixtureRequest, polyhedron_packages: dict[str, Path]) -> list[icnnrt.Session]:
    """pieces by its graphs, and by the method in Python; both on kernels or both on portable bodies."""
    package = icnnrt.Package.open(polyhedron_packages["pieces"])
    native = False if request.param == "portable" else None
    return [icnnrt.load(each, native=native) for each in (package, without_graphs(package))]


@pytest.fixture(scope="module")
def smooth(polyhedron_packages: dict[str, Path]) -> list[icnnrt.Session]:
    package = icnnrt.Package.open(polyhedron_packages["smooth"])
    return [icnnrt.load(each) for each in (package, without_graphs(package))]


def test_no_product_reads_a_transpose(polyhedron_packages: dict[str, Path]) -> None:
    for package in polyhedron_packages.values():
        graphs = sorted(package.glob("*.onnx"))
        assert "adjoint_polyhedron.onnx" in [path.name for path in graphs]
        for path in graphs:
            assert not transposed_products(onnx.load(path, load_external_data=False).graph), path


def test_an_iteration_takes_few_nodes(polyhedron_packages: dict[str, Path]) -> None:
    """Besides what the energy is: each costs half a microsecond in every iteration."""
    folder = polyhedron_packages["pieces"]
    graph = onnx.load(folder / "argmin_polyhedron.onnx", load_external_data=False).graph
    energy = len(onnx.load(folder / "value.onnx", load_external_data=False).graph.node)
    (choice,) = (node for node in graph.node if node.op_type == "If")
    for branch, most in (("then_branch", 90), ("else_branch", 190)):
        (inside,) = (attribute.g for attribute in choice.attribute if attribute.name == branch)
        (loop,) = (node for node in inside.node if node.op_type == "Loop")
        (body,) = (attribute.g for attribute in loop.attribute if attribute.name == "body")
        assert len(body.node) - energy <= most


def contexts(B: int) -> np.ndarray:
    return np.random.default_rng(B).standard_normal((B, 3))


def constraints(kind: str, B: int) -> dict[str, Any]:
    rng = np.random.default_rng(B)
    if kind == "none":
        return {}
    if kind == "shared":
        return {"G": rng.standard_normal((2, N)), "h": [1.0, np.inf], "A": np.ones((1, N)), "b": [1.0], "lower": 0.0}
    y = 0.2 * rng.standard_normal((B, N))
    G, A = rng.standard_normal((B, 3, N)), rng.standard_normal((B, 1, N))
    G[:, 2] = G[:, 0]  # the same row twice
    return {
        "G": G,
        "h": np.einsum("bmn,bn->bm", G, y) + 0.05,
        "A": A,
        "b": np.einsum("bmn,bn->bm", A, y),
        "lower": y - 0.4,
        "upper": y + np.where(rng.random((B, N)) < 0.5, 0.2, np.inf),
    }


def close(found: Any, true: Any, fields: tuple[str, ...], atol: float) -> None:
    for field in fields:
        np.testing.assert_allclose(getattr(found, field), getattr(true, field), atol=atol, rtol=atol, err_msg=field)


@pytest.mark.parametrize(("kind", "B"), [("own", 1), ("own", 3), ("own", 128), ("none", 3), ("shared", 3)])
def test_the_graph_does_what_the_numpy_method_does(pair: list[icnnrt.Session], kind: str, B: int) -> None:
    given = constraints(kind, B)
    found, true = (session.argmin_polyhedron(contexts(B), **given, mu=MU) for session in pair)
    assert found.ok.mean() > 0.95
    np.testing.assert_array_equal(found.status, true.status)
    same = found.cuts == true.cuts  # a gap beside the tolerance may go either way
    assert same.mean() > 0.95
    # A gap tells multipliers, too, by its root, and it ends anywhere below its tolerance.
    tight = same & (np.maximum(found.gap, true.gap) <= 1e-12)
    assert tight.mean() > 0.9 or B < 10
    for name in FIELDS:
        if kind == "own" and name == "lam":  # what two equal rows share between them is anyone's
            continue
        told, atol = (tight, 1e-6) if name in ("lam", "nu", "bound_multipliers") else (same, 1e-8)
        np.testing.assert_allclose(getattr(found, name)[told], getattr(true, name)[told], atol=atol, err_msg=name)
    # The objective is μ-convex: a gap, known to rounding, tells y by its root.
    apart = np.linalg.norm(found.y - true.y, axis=1)[same]
    assert (apart <= sum(np.sqrt(2 * np.maximum(a.gap, 1e-13) / MU) for a in (found, true))[same] + 1e-8).all()
    if kind == "own":
        np.testing.assert_allclose(found.lam[tight].sum(1), true.lam[tight].sum(1), atol=1e-6)
    y_bar = np.cos(np.arange(B * N)).reshape(B, N)
    bars, expected = (
        session.vjp_polyhedron(answer, y_bar, on_unsafe="skip")
        for session, answer in zip(pair, (found, true), strict=True)
    )
    np.testing.assert_array_equal(bars.skipped, expected.skipped)
    if kind != "own":
        close(bars, expected, ("G", "h", "A", "b", "lower", "upper", "mu", "x"), 1e-6)
        assert bars.weights is not None
        assert expected.weights is not None
        for name, array in bars.weights.items():
            np.testing.assert_allclose(array, expected.weights[name], atol=1e-6, err_msg=name)


@pytest.mark.parametrize(("kind", "B"), [("own", 1), ("own", 128), ("shared", 3), ("none", 3)])
def test_a_smooth_energy(smooth: list[icnnrt.Session], kind: str, B: int) -> None:
    given = constraints(kind, B)
    # A few cuts first: near the optimum they are nearly the same, and any of many multipliers does.
    found, true = (s.argmin_polyhedron(contexts(B), **given, mu=MU, iterations=3, tolerance=0.0) for s in smooth)
    close(found, true, ("y", "energy", "lower_bound", "gap"), 1e-8)
    np.testing.assert_array_equal(found.trajectory.best, true.trajectory.best)
    found, true = (session.argmin_polyhedron(contexts(B), **given, mu=MU) for session in smooth)
    np.testing.assert_array_equal(found.status, true.status)
    assert found.ok.all()
    apart = np.linalg.norm(found.y - true.y, axis=1)
    assert (apart <= sum(np.sqrt(2 * np.maximum(a.gap, 0) / MU) for a in (found, true)) + 1e-8).all()
    y_bar = np.sin(np.arange(B * N)).reshape(B, N)
    bars, told = (
        smooth[0].vjp_polyhedron(found, y_bar),
        smooth[1].vjp_polyhedron(replace_answer(found, smooth[1]), y_bar),
    )
    close(bars, told, ("b", "lower", "upper", "mu", "x"), 1e-7)
    np.testing.assert_allclose(bars.G.sum(1), told.G.sum(1), atol=1e-6)
    assert bars.weights is not None
    assert told.weights is not None
    for name, array in bars.weights.items():
        np.testing.assert_allclose(array, told.weights[name], atol=1e-6, err_msg=name)


def replace_answer(found: Any, session: icnnrt.Session) -> Any:
    """The same answer as one of another session's."""
    return replace(found, weights_id=session.weights_id)


@pytest.mark.parametrize("adjoint", ["prop3", "implicit", "exact"])
def test_every_adjoint_is_there(smooth: list[icnnrt.Session], adjoint: str) -> None:
    """Those that are no graph are put together in Python, from models solved once more."""
    given, y_bar = constraints("shared", 3), np.sin(np.arange(12)).reshape(3, N)
    settings: dict[str, Any] = {"mu": MU, "iterations": 4, "tolerance": 1.0 if adjoint == "implicit" else 0.0}
    bars = []
    for session in smooth:
        found = session.argmin_polyhedron(contexts(3), **given, **settings)
        bars.append(session.vjp_polyhedron(found, y_bar, adjoint=adjoint))
    close(bars[0], bars[1], ("b", "lower", "mu", "x"), 1e-5)


def test_the_projection_may_be_the_answer(pair: list[icnnrt.Session]) -> None:
    """One feasible point: y_0 is the best met, and its model is the projection."""
    b = np.linspace(-1, 1, 2 * N).reshape(2, N)
    found = pair[0].argmin_polyhedron(contexts(2), A=np.eye(N), b=b, mu=MU)
    assert found.ok.all()
    assert (found.trajectory.best == 0).all()
    np.testing.assert_allclose(found.y, b, atol=1e-9)
    y_bar = np.cos(np.arange(2 * N)).reshape(2, N)
    bars = pair[0].vjp_polyhedron(found, y_bar)
    np.testing.assert_allclose(bars.b, y_bar, atol=1e-6)
    np.testing.assert_allclose(bars.mu, 0.0, atol=1e-9)
    assert bars.x is not None
    np.testing.assert_allclose(bars.x, 0.0, atol=1e-9)


def test_hard_samples_among_good_ones(pair: list[icnnrt.Session]) -> None:
    x, given = contexts(5), constraints("own", 5)
    given = {name: np.array(a) for name, a in given.items()}
    alone = pair[0].argmin_polyhedron(x, **given, mu=MU)
    given["lower"][0, 1], given["upper"][0, 1] = 1.0, 0.0  # crossed
    given["A"] = np.concatenate([given["A"], given["A"]], 1)  # twice the same equality
    given["b"] = np.concatenate([given["b"], given["b"]], 1)
    given["b"][1, 1] += 1.0  # and here a contradiction
    x[2, 0] = np.inf
    found = pair[0].argmin_polyhedron(x, **given, mu=MU)
    bad = [Status.INFEASIBLE, Status.INFEASIBLE, Status.NOT_FINITE_INPUT]
    assert found.status.tolist() == [*bad, Status.CONVERGED, Status.CONVERGED]
    for name in FIELDS:
        assert np.isnan(getattr(found, name)[:3]).all(), name
    np.testing.assert_allclose(found.y[3:], alone.y[3:], atol=1e-6)
    bars = pair[0].vjp_polyhedron(found, np.ones((5, N)), on_unsafe="skip")
    assert bars.skipped.tolist() == [True, True, True, False, False]
    for array in (bars.G, bars.h, bars.A, bars.lower, bars.mu, bars.x):
        assert array is not None
        assert np.isnan(array[:3]).all()
        assert np.isfinite(array[3:]).all()
    assert bars.weights is not None
    assert all(np.isfinite(a).all() for a in bars.weights.values())
    with pytest.raises(icnnrt.CertificateError, match="3 of 5 samples"):
        pair[0].vjp_polyhedron(found, np.ones((5, N)))


def test_without_curvature(pair: list[icnnrt.Session]) -> None:
    box: dict[str, Any] = {"lower": -1.0, "upper": 1.0}
    found, true = (session.argmin_polyhedron(contexts(3), **box, mu=0.0) for session in pair)
    assert found.ok.all()
    np.testing.assert_allclose(found.energy, true.energy, atol=1e-8)
    # y_0 of the first sample is bounded by nothing but one side: its model falls without end.
    lower = np.full((3, N), -1.0)
    upper = np.full((3, N), 1.0)
    lower[0], upper[0] = -np.inf, np.inf
    fallen = pair[0].argmin_polyhedron(contexts(3), lower=lower, upper=upper, mu=0.0)
    assert fallen.status.tolist() == [Status.UNBOUNDED, Status.CONVERGED, Status.CONVERGED]
    assert np.isnan(fallen.y[0]).all()
    assert np.abs(fallen.ray).max(1).tolist() == [1.0, 0.0, 0.0]
    np.testing.assert_allclose(fallen.energy[1:], found.energy[1:], atol=1e-8)


def test_the_loop_ends_with_the_last_sample(pair: list[icnnrt.Session]) -> None:
    found = pair[0].argmin_polyhedron(contexts(3), **constraints("shared", 3), mu=MU, iterations=100)
    slots = found.trajectory.offsets.shape[1]
    assert slots == found.cuts.max() < 20
    short = pair[0].argmin_polyhedron(contexts(3), **constraints("shared", 3), mu=MU, iterations=1, tolerance=0.0)
    assert (short.cuts == 1).all()
    assert (short.gap >= found.gap - 1e-12).all()


def test_weights_that_were_updated_are_seen(pair: list[icnnrt.Session]) -> None:
    given = constraints("shared", 2)
    with icnnrt.load(pair[0].package) as session:
        before = session.argmin_polyhedron(contexts(2), **given, mu=MU)
        session.update_weights({name: 1.5 * a for name, a in session.weights.items()})
        after = session.argmin_polyhedron(contexts(2), **given, mu=MU)
        np.testing.assert_allclose(
            after.energy, session.value(contexts(2), after.y) + 0.5 * MU * (after.y**2).sum(1), rtol=1e-12
        )
        assert np.abs(after.energy - before.energy).min() > 1e-3
        with pytest.raises(icnnrt.InputError, match="other weights"):
            session.vjp_polyhedron(before, np.ones((2, N)))


def test_plain_onnxruntime(polyhedron_packages: dict[str, Path], pair: list[icnnrt.Session], tmp_path: Path) -> None:
    """Two files that need nothing of icnnrt; what is left unsaid is as it was exported."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if pair[0].native:
        options.register_custom_ops_library(icnnrt.ops_library())
    x, budget = contexts(2), {"A": np.ones((1, 1, N)), "b": np.ones((1, 1)), "lower": np.zeros((1, N))}
    feeds = {
        **{"x": x, "y_init": np.zeros((2, N)), "G": np.zeros((1, 0, N)), "h": np.zeros((1, 0))},
        **{"upper": np.full((1, N), np.inf), **budget},
    }
    answers = []
    for role in ("argmin_polyhedron", "adjoint_polyhedron"):
        file = pack(polyhedron_packages["pieces"], tmp_path / f"{role}.onnx", role)
        session = onnxruntime.InferenceSession(str(file), options)
        if answers:
            names = [node.name for node in session.get_inputs()]
            feeds = {name: {**feeds, **answers[0], "y_bar": np.ones((2, N))}[name] for name in names}
        outputs = [node.name for node in session.get_outputs()]
        answers.append(dict(zip(outputs, session.run(None, feeds), strict=True)))
    found = pair[0].argmin_polyhedron(x, A=np.ones((1, N)), b=[1.0], lower=0.0)
    bars = pair[0].vjp_polyhedron(found, np.ones((2, N)))
    np.testing.assert_allclose(answers[0]["y"], found.y, atol=1e-8)
    np.testing.assert_array_equal(answers[0]["status"], found.status)
    np.testing.assert_allclose(answers[1]["b_bar"], bars.b, atol=1e-6)
    np.testing.assert_allclose(answers[1]["x_bar"], bars.x, atol=1e-6)


@pytest.mark.parametrize("mu", [0.5, 0.0])
def test_an_empty_batch(polyhedron_packages: dict[str, Path], tmp_path: Path, mu: float) -> None:
    file = pack(polyhedron_packages["pieces"], tmp_path / "empty.onnx", "argmin_polyhedron", portable=True)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    feeds = {"mu": np.array(mu)}
    for given in session.get_inputs():
        axes = [size if isinstance(size, int) else 0 for size in given.shape]
        dtype = {"tensor(double)": np.float64, "tensor(float)": np.float32}.get(given.type)
        if dtype is not None and axes:
            feeds[given.name] = np.zeros(axes, dtype)
    found = dict(zip([given.name for given in session.get_outputs()], session.run(None, feeds), strict=True))
    assert found["y"].shape == (0, N)
    assert found["status"].shape == found["energy"].shape == (0,)


def test_what_the_package_says(polyhedron_packages: dict[str, Path]) -> None:
    manifest = icnnrt.Package.open(polyhedron_packages["pieces"]).manifest
    assert manifest.polyhedron == PolyhedronSpec(100, 1.0, 1e-9, "prop3")
    assert icnnrt.Package.open(polyhedron_packages["smooth"]).manifest.polyhedron.adjoint == "implicit"  # type: ignore[union-attr]
    assert {"polyhedron", "polyhedron_adjoint"} <= set(manifest.parity)
    shown = CliRunner().invoke(app, ["inspect", str(polyhedron_packages["pieces"])], env={"COLUMNS": "200"})
    assert "over a polyhedron: at most 100 cuts" in shown.stdout
    assert "adjoint prop3" in shown.stdout
    report = verify(polyhedron_packages["pieces"], samples=4)
    verdicts = {check.name: check.verdict for check in report.checks}
    assert report.passed, report
    for name in ("polyhedron: y", "polyhedron: energy", "golden: argmin_polyhedron.energy"):
        assert verdicts[name] == "pass", name
    assert verdicts["polyhedron: adjoint"] in ("pass", "skipped")
    for wrong, message in (
        (replace(manifest, polyhedron=None), "graphs.argmin_polyhedron is there but polyhedron is missing"),
        (replace(manifest, polyhedron=PolyhedronSpec(0, 1.0, 1e-9, "prop3")), "polyhedron.iterations"),
        (replace(manifest, polyhedron=PolyhedronSpec(1, -1.0, 1e-9, "prop3")), "polyhedron.mu"),
        (replace(manifest, polyhedron=PolyhedronSpec(1, 1.0, 1e-9, "exact")), "polyhedron.adjoint"),
    ):
        with pytest.raises(icnnrt.PackageError, match=message):
            Manifest.from_json(wrong.to_json())


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    energy, x, y = FICNN(3, N, hidden=(4,), dtype=torch.float64), torch.zeros(2, 3).double(), torch.zeros(2, N).double()
    for arguments, message in (
        ({"polyhedron": {"mu": 1.0}}, "the settings belong to a head that was not asked for"),
        (
            {"heads": ["polyhedron"], "polyhedron": {"steps": 3}},
            ".*'tolerance' or 'adjoint', but got 'steps'",
        ),
        ({"heads": ["polyhedron"], "polyhedron": {"iterations": 0}}, "expected an integer from 1"),
        (
            {"heads": ["polyhedron"], "polyhedron": {"mu": -1.0}},
            r"\['mu'\]: expected a finite number of at least 0",
        ),
        (
            {"heads": ["polyhedron"], "polyhedron": {"adjoint": "exact"}},
            r"\['adjoint'\]: expected 'prop3' or",
        ),
        ({"heads": ["polyhedron"], "kind": "gradient"}, "a gradient alone has no value to minimise"),
    ):
        with pytest.raises(ExportError, match=message):
            export(energy, None, x, y, tmp_path / "a.icnn", **arguments)  # type: ignore[arg-type]
    assert of_layer(PolyhedronArgmin(energy, adjoint="implicit"), energy, y)["adjoint"] == "implicit"
    other = FICNN(3, N, hidden=(4,), dtype=torch.float64)
    for layer, message in (
        (PolyhedronArgmin(energy, adjoint="exact"), "adjoint: there is no graph for 'exact'"),
        (PolyhedronArgmin(other), "solver: PolyhedronArgmin was made around another energy"),
    ):
        with pytest.raises(ExportError, match=message):
            export(energy, layer, x, y, tmp_path / "a.icnn")
    energy.register_buffer("G", torch.zeros(1).double())
    with pytest.raises(ExportError, match="a weight is called 'G', as an input or output of the graphs is"):
        export(energy, None, x, y, tmp_path / "a.icnn", heads=["polyhedron"])
