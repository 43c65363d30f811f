"""Where histories of fine-tuning may lie, and which packages they belong to."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime")

import icnnrt
from icnnrt.cli.tabular import check_result
from icnnrt.errors import InputError
from icnnrt.format.checkpoints import HISTORY_FILE, History, architecture, check_apart
from icnnrt.format.package import Package
from icnnrt.programs import Coo, Program, write_program
from icnnrt.tuning.finetune import FineTuner

FIXTURES = Path(__file__).parent / "fixtures" / "version1"
X, TARGET = np.linspace(-1, 1, 16).reshape(8, 2), np.full((8, 3), 0.4)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """float32, x [2] to y [3], with a training graph."""
    return Path(shutil.copytree(FIXTURES / "unit_box.icnn", tmp_path / "model.icnn"))


def tuner_of(path: Path) -> FineTuner:
    return FineTuner(icnnrt.load(path))


def listing(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# --- Where ---------------------------------------------------------------------------------------


def beside(package: Path) -> Path:
    return Path(shutil.copytree(package, package.with_name("other.icnn")))


def linked(package: Path) -> Path:
    link = package.with_name("link")
    link.symlink_to(package, target_is_directory=True)
    return link


def foreign(package: Path) -> Path:
    folder = package.with_name("site")
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")
    return folder


# name -> where the history is to lie
IN_PACKAGES: dict[str, Callable[[Path], Path]] = {
    "the package that is tuned": lambda package: package,
    "another package": beside,
    "a folder in a package": lambda package: package / "history",
    "deep in a package": lambda package: package / "a" / "b",
    "by a link": linked,
    "below a link": lambda package: linked(package) / "history",
    "by a detour": lambda package: package / ".." / package.name,
    "a folder with a manifest of anything": foreign,
}


@pytest.mark.parametrize("place", IN_PACKAGES)
def test_a_history_in_a_package_is_refused_before_anything_is_written(package: Path, place: str) -> None:
    folder = IN_PACKAGES[place](package)
    before = listing(package.parent)
    tuner = tuner_of(package)
    start = tuner.session.weights_id
    for call in (
        lambda: tuner.save(folder),
        lambda: tuner.fit(X, TARGET, epochs=1, history=folder),
        lambda: History.to_write(folder, tuner.session.manifest),
        lambda: History(folder, tuner.session.manifest).save(1, {}, {}, {}),
    ):
        with pytest.raises(InputError, match=r"^history: .*package.* which would not open with .*; choose .*\.$"):
            call()
    assert listing(package.parent) == before
    assert tuner.session.weights_id == start


def test_a_folder_below_the_manifest_of_something_else_is_no_package(package: Path) -> None:
    folder = foreign(package)
    assert tuner_of(package).save(folder / "history").step == 0


@pytest.mark.parametrize(
    ("history", "out"),
    [
        ("model.icnn", "model.icnn"),
        ("out.icnn", "out.icnn"),
        ("OUT.icnn", "out.icnn"),
        ("caf\u00e9", "cafe\u0301"),
        ("link/out.icnn", "out.icnn"),
        ("out.icnn/../out.icnn", "out.icnn"),
        ("out.icnn/history", "out.icnn"),
    ],
)
def test_a_history_and_the_package_that_is_written_lie_apart(package: Path, history: str, out: str) -> None:
    folder = package.parent
    (folder / "link").symlink_to(folder, target_is_directory=True)
    with pytest.raises(
        InputError, match=r"^history: expected a folder apart from the package .*; choose another folder"
    ):
        check_apart(folder / history, folder / out)
    check_apart(folder / "history", folder / out)
    check_apart(folder / "a", folder / "a" / "out.icnn")


def test_a_package_is_not_written_over_a_history_nor_into_a_package(package: Path, tmp_path: Path) -> None:
    tuner = tuner_of(package)
    tuner.step(X, TARGET)
    tuner.save(tmp_path / "history")
    before = listing(tmp_path)
    with pytest.raises(InputError, match="is not a package of plain files alone, so it is not replaced"):
        tuner.write_package(tmp_path / "history", overwrite=True)
    for place in (package / "inside.icnn", linked(package) / "inside.icnn"):
        with pytest.raises(InputError, match=r"path: .* lies in the package .*; choose a place outside"):
            tuner.write_package(place)
    (tmp_path / "link").unlink()
    assert listing(tmp_path) == before


def test_no_result_is_written_into_a_package(package: Path) -> None:
    with pytest.raises(InputError, match=r"out: .* lies in the package .*; choose a place outside"):
        check_result(package / "y.npz")
    none = Coo(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0), (0, 1))
    one = np.ones(1)
    program = Program(none, one, none, none.values, none, none.values, 0 * one, one, 0.0, ["y0"])
    with pytest.raises(InputError, match=r"path: .* lies in the package"):
        write_program(package / "p.lp", program)


# --- Whose ---------------------------------------------------------------------------------------


def again(package: Path, **changes: Any) -> Path:
    """The package written again: other bytes of every graph, which compute the same; then these changes of its
    manifest, or of its training spec."""
    opened = Package.open(package)
    graphs = {role: graph + b"\x32\x05again" for role, graph in opened.graphs.items()}  # doc_string
    manifest = opened.manifest
    if train := changes.pop("train", None):
        manifest = replace(manifest, train=replace(manifest.train, **train))
    swap: Mapping[str, tuple[bytes, bytes]] = changes.pop("graphs", {})
    for role, (old, new) in swap.items():
        assert old in graphs[role]
        graphs[role] = graphs[role].replace(old, new)
    manifest = replace(manifest, **changes)
    # The signature of train.onnx would not fit another set of weights; nothing here runs it.
    written = replace(opened, manifest=manifest, graphs=graphs).save(package.with_name("again.icnn"), overwrite=True)
    assert written.manifest.graphs["value"].sha256 != opened.manifest.graphs["value"].sha256
    return written.path


@pytest.fixture
def history(package: Path, tmp_path: Path) -> Path:
    """Two checkpoints, of steps 1 and 2."""
    tuner = tuner_of(package)
    for _ in range(2):
        tuner.step(X, TARGET)
        tuner.save(tmp_path / "history")
    return tmp_path / "history"


def test_a_package_that_was_exported_again_goes_on(package: Path, history: Path) -> None:
    tuner = tuner_of(again(package))
    assert tuner.resume(history).step == 2
    straight = tuner_of(package)
    for _ in range(2):
        straight.step(X, TARGET)
    for name, array in straight.session.weights.items():
        np.testing.assert_array_equal(tuner.session.weights[name], array)
    tuner.step(X, TARGET)
    assert tuner.save(history).step == 3
    assert tuner_of(package).resume(history).step == 3


def test_signs_and_other_weights_are_the_same_network(package: Path, history: Path) -> None:
    opened = Package.open(package)
    tensors = {name: replace(spec, sign=None) for name, spec in opened.manifest.weights.tensors.items()}
    other = again(package, weights=replace(opened.manifest.weights, tensors=tensors), name="another", metadata={"a": 1})
    assert tuner_of(other).resume(history).step == 2


DIFFERENT: dict[str, tuple[dict[str, Any], str]] = {
    "loss": ({"train": {"loss": "huber"}}, r'train\.loss is "squared_error" there, and "huber" here'),
    "optimiser": (
        {"train": {"settings": {"betas[0]": 0.8}}},
        r"settings\.betas\[0\] is 0\.9 there, and 0\.8 here",
    ),
    "settings": ({"train": {"settings": {"lr": 1.0}}}, r"train\.settings\.betas\[0\] is there, and not here"),
    "clip_norm": ({"train": {"clip_norm": 2.0}}, r"train\.clip_norm is null there, and 2\.0 here"),
    "adjoint": ({"train": {"adjoint": "prop3"}}, r'train\.adjoint is "exact" there, and "prop3" here'),
    "iterations": ({"solver": "iterations"}, r"solver\.iterations is 4 there, and 5 here"),
    "activation": (
        {"graphs": {"value": (b'"\x03Exp', b'"\x03Erf')}},
        r"the weights of step 2 it gave \S+ where this one gives",
    ),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_another_network_is_refused_by_what_differs(package: Path, history: Path, what: str) -> None:
    changes, sentence = DIFFERENT[what]
    if "solver" in changes:
        changes = {"solver": replace(Package.open(package).manifest.solver, iterations=5)}  # type: ignore[type-var]
    tuner = tuner_of(again(package, **changes))
    before, files = dict(tuner.session.weights), listing(history)
    for call in (
        lambda: tuner.resume(history),
        lambda: tuner.save(history),
        lambda: tuner.fit(X, TARGET, epochs=1, history=history),
    ):
        with pytest.raises(
            InputError, match=rf"^history: expected checkpoints of this package in .*{sentence}.*; give"
        ):
            call()
    assert listing(history) == files
    for name, array in before.items():
        np.testing.assert_array_equal(tuner.session.weights[name], array)


def test_another_set_of_trained_weights_is_refused(package: Path, history: Path) -> None:
    manifest = Package.open(package).manifest
    assert manifest.train is not None
    fewer = replace(manifest, train=replace(manifest.train, weights=manifest.train.weights[1:]))
    with pytest.raises(InputError, match=r"another training: train\.weights is \[.* there, and \[.* here"):
        History(history, fewer)
    renamed = {("w" if name == "layers.0.b" else name): spec for name, spec in manifest.weights.tensors.items()}
    other = replace(manifest, weights=replace(manifest.weights, tensors=renamed))
    with pytest.raises(InputError, match=r"weights\.layers\.0\.b is there, and not here"):
        History(history, other)
    order = replace(manifest, train=replace(manifest.train, weights=manifest.train.weights[::-1]))
    with pytest.raises(InputError, match=r'train\.weights\[0\] is "context_layers\.0\.W" there'):
        History(history, order)


def test_the_architecture_is_plain_json(package: Path) -> None:
    found = architecture(Package.open(package).manifest)
    assert json.loads(json.dumps(found)) == found
    assert found["weights"]["layers.0.W_y"] == "float32[4, 3]"


def test_a_damaged_last_checkpoint_does_not_keep_others_from_being_saved(package: Path, history: Path) -> None:
    newest = max(history.glob("step-*"))
    newest.write_bytes(newest.read_bytes()[:-1])
    tuner = tuner_of(package)
    tuner.resume(history, step=1)
    tuner.step(X, TARGET)
    tuner.step(X, TARGET)
    assert tuner.save(history).step == 3
    assert tuner_of(package).resume(history).step == 3


# --- Of version 1 --------------------------------------------------------------------------------


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A history that icnnrt 0.1.0 wrote, of steps 2 and 3."""
    return Path(shutil.copytree(FIXTURES / "unit_box.history", tmp_path / "old"))


def test_a_history_of_version_1_goes_on_in_its_own_version(package: Path, old: Path, tmp_path: Path) -> None:
    tuner = tuner_of(package)
    assert tuner.resume(old).step == 3
    assert tuner.resume(old, step=2).step == 2
    network = json.loads((old / HISTORY_FILE).read_text())["network"]
    tuner.resume(old)
    tuner.step(X, TARGET)
    assert tuner.save(old, figures={"loss": 1}).step == 4
    content = json.loads((old / HISTORY_FILE).read_text())
    assert (content["version"], content["network"]) == (1, network)
    assert all(set(c) == {"file", "sha256", "bytes", "step", "figures"} for c in content["checkpoints"])
    assert tuner_of(package).resume(old).step == 4
    # In a folder of its own it is of today's version, which a package that is exported again may go on with.
    tuner.save(tmp_path / "new")
    assert json.loads((tmp_path / "new" / HISTORY_FILE).read_text())["version"] == 2
    assert tuner_of(again(package)).resume(tmp_path / "new").step == 4


def test_a_history_of_version_1_knows_its_package_by_the_files_alone(package: Path, old: Path) -> None:
    with pytest.raises(InputError, match=r"the very files of its package count for a history of version 1"):
        tuner_of(again(package)).resume(old)
