"""Packages of format 1, written by icnnrt 0.1.0 and kept as they are: served, tuned and written back for ever."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import icnnrt
from icnnrt.checking import golden
from icnnrt.checking.verify import verify
from icnnrt.errors import InputError, PackageError
from icnnrt.format import upgrade
from icnnrt.format.manifest import Manifest
from icnnrt.format.package import Package
from icnnrt.format.signatures import BATCH, expected
from icnnrt.format.signs import NONNEGATIVE, NONPOSITIVE, Sign
from icnnrt.tuning.finetune import FineTuner

FOLDER = Path(__file__).parent / "fixtures" / "version1"
PATHS = sorted(FOLDER.glob("*.icnn"))
TRAINED = [path for path in PATHS if (path / "train.onnx").exists()]
GRAPH_KEYS = {"file", "sha256", "bytes"}
WEIGHT_KEYS = {"shape", "dtype", "nonnegative", "trainable"}


def raw(path: Path) -> dict:
    return json.loads((path / "manifest.json").read_bytes())


def check_version_1(path: Path) -> None:
    """manifest.json holds what version 1 says, and nothing that it does not know."""
    content = raw(path)
    assert content["format_version"] == 1
    assert all(set(graph) == GRAPH_KEYS for graph in content["graphs"].values())
    assert all(set(tensor) == WEIGHT_KEYS for tensor in content["weights"]["tensors"].values())
    assert "rests_on" not in content.get("convexity", {})


def test_the_fixtures_cover_the_format() -> None:
    contents = [raw(path) for path in PATHS]
    assert {c["domain"] and c["domain"]["kind"] for c in contents} == {None, "unit_box", "box", "simplex", "space"}
    assert {c["solver"] and c["solver"]["name"] for c in contents} == {None, "BundleEntropy", "BregmanProximalGradient"}
    assert {c["kind"] for c in contents} == {"energy", "gradient", "qp"}
    assert {c["dtype"] for c in contents} == {"float32", "float64"}
    assert {role for c in contents for role in c["graphs"]} >= {
        *("value", "gradient", "argmin", "adjoint", "hvp", "hessian", "gradient_x", "pullback", "train"),
        *("solve", "solve_adjoint", "argmin_polyhedron", "adjoint_polyhedron"),
    }
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) < 2_000_000


@pytest.mark.parametrize("native", [None, False], ids=["native", "portable"])
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_they_compute_what_they_did(path: Path, native: bool | None) -> None:
    package = Package.open(path)
    assert package.manifest.format_version == 1
    with icnnrt.load(package, native=native) as session:
        replayed = golden.replay(session, package.golden)
    assert replayed
    for one in replayed:
        assert one.difference <= one.bound, one


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_their_graphs_tell_what_they_take_and_give(path: Path) -> None:
    manifest = Package.open(path).manifest
    for role, graph in manifest.graphs.items():
        wanted = expected(manifest, role)
        assert wanted is not None
        assert graph.signature is not None
        assert graph.signature.inputs == wanted.inputs, role
        assert graph.signature.outputs == wanted.outputs, role
    some = manifest.graphs[next(iter(manifest.graphs))].signature
    assert some is not None
    assert some.inputs["x"].shape[0] == BATCH


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_they_pass_verify(path: Path) -> None:
    report = verify(path, samples=8)
    failed = [check.name for check in report.checks if check.verdict == "fail"]
    assert not failed or path.stem == "not_convex", failed


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_they_are_written_back_as_they_came(path: Path, tmp_path: Path) -> None:
    opened = Package.open(path)
    opened.save(tmp_path / path.name)
    for file in path.iterdir():
        assert (tmp_path / path.name / file.name).read_bytes() == file.read_bytes(), file.name
    again = opened.save(tmp_path / path.name, weights=opened.weights, overwrite=True)  # without golden data and verdict
    check_version_1(tmp_path / path.name)
    assert again.manifest.format_version == 1


@pytest.mark.parametrize("path", TRAINED, ids=lambda path: path.stem)
def test_they_are_tuned_and_written_in_their_own_version(path: Path, tmp_path: Path) -> None:
    session = icnnrt.load(path)
    tuner = FineTuner(session, learning_rate=0.01)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((16, *session.manifest.x_shape))
    target = np.full((16, *session.manifest.y_shape), 1 / 3 if path.stem == "simplex" else 0.4)
    bounds = {"lower": -1.0, "upper": 1.0} if path.stem == "box" else {}
    before = tuner.loss(x, target, **bounds)
    for _ in range(20):
        assert tuner.step(x, target, **bounds).accepted
    assert tuner.loss(x, target, **bounds) < before
    tuner.save(tmp_path / "history")
    written = tuner.write_package(tmp_path / "tuned.icnn")
    check_version_1(written.path)
    with icnnrt.load(written.path) as again:
        assert FineTuner(again).resume(tmp_path / "history").step == 20
        one, other = (s.solve_qp(x).z if path.stem == "qp" else s.argmin(x, **bounds).y for s in (session, again))
        np.testing.assert_array_equal(one, other)


def test_what_version_1_cannot_say_is_refused(tmp_path: Path) -> None:
    opened = Package.open(FOLDER / "unit_box.icnn")
    name = "layers.0.b"
    for sign in (Sign(NONPOSITIVE), Sign.of(np.array([NONNEGATIVE, 0, 0, 0], np.uint8))):
        tensors = {**opened.manifest.weights.tensors, name: replace(opened.manifest.weights.tensors[name], sign=sign)}
        manifest = replace(opened.manifest, weights=replace(opened.manifest.weights, tensors=tensors))
        weights = {**opened.weights, name: np.zeros_like(opened.weights[name])}
        with pytest.raises(InputError, match=r"cannot be noted in a package of format_version 1, .* export the model"):
            replace(opened, manifest=manifest).save(tmp_path / "p.icnn", weights=weights)
    assert not (tmp_path / "p.icnn").exists()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda c: c["graphs"]["value"].update(inputs={}), "graphs.value.inputs is not a key of format_version 1"),
        (lambda c: c["convexity"].update(rests_on=[]), "convexity.rests_on is not a key of format_version 1"),
        (lambda c: c["weights"]["tensors"]["layers.0.b"].update(sign=None), "sign is not a key of format_version 1"),
        (lambda c: c["weights"]["tensors"]["layers.0.b"].pop("nonnegative"), "nonnegative should be true or false"),
        (lambda c: c["weights"]["tensors"].update(more=3), "more should be a JSON object"),
        (lambda c: c.update(graphs=[]), "graphs should be a JSON object"),
        (lambda c: c["graphs"].update(value=7), "graphs.value should be a JSON object"),
        (lambda c: c.update(weights=None), "weights should be a JSON object"),
        (lambda c: c.update(convexity=[]), "convexity should be a JSON object"),
    ],
)
def test_a_manifest_of_version_1_is_held_to_version_1(change: object, sentence: str) -> None:
    content = raw(FOLDER / "unit_box.icnn")
    change(content)  # type: ignore[operator]
    with pytest.raises(PackageError, match=sentence):
        Manifest.from_json(json.dumps(content).encode())


def test_nothing_else_asks_for_the_version() -> None:
    """Every other module sees manifests of the current version only."""
    package = Path(icnnrt.__file__).parent
    asks = {file for file in package.rglob("*.py") if "format_version" in file.read_text(encoding="utf-8")}
    # manifest hands the version through, package specifies it, inspect shows it.
    own = {"format/upgrade.py", "format/manifest.py", "format/package.py", "cli/inspect.py"}
    assert {file.relative_to(package).as_posix() for file in asks} == own
    assert upgrade.CURRENT == 2
