"""The package format: what is written reads back, and every bad file fails with its own sentence."""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attacks
import numpy as np
import onnx
import pytest
from amounts import amount
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import AttributeProto, TensorProto, helper
from safetensors import numpy as safetensors_numpy

from icnnrt.errors import InputError, PackageError
from icnnrt.format import package as package_format
from icnnrt.format import replacement
from icnnrt.format.contents import weight_layout
from icnnrt.format.manifest import Domain, GraphFile, Manifest, SolverSpec, TrainingSpec
from icnnrt.format.package import Package, write


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return attacks.good(tmp_path / "tiny.icnn")


def refused(path: Path, sentence: str) -> str:
    """Assert that the package is refused with exactly one sentence that matches."""
    with pytest.raises(PackageError, match=sentence) as caught:
        Package.open(path)
    message = str(caught.value)
    assert message.startswith(f"{os.path.abspath(path)}: ")
    assert message.endswith(".")
    assert "\n" not in message
    return message


# --- Good packages -------------------------------------------------------------------------------


def test_a_package_reads_back_as_written(good: Path) -> None:
    opened = Package.open(good)
    assert opened.path == good
    assert set(opened.graphs) == set(attacks.ROLES)
    assert opened.graphs["value"] == (good / "value.onnx").read_bytes()
    assert set(opened.weights) == set(attacks.weights())
    for name, array in attacks.weights().items():
        np.testing.assert_array_equal(opened.weights[name], array, strict=True)
        assert not opened.weights[name].flags.writeable
        assert opened.weights[name].flags.aligned
    manifest = opened.manifest
    assert manifest.solver == SolverSpec(10, 12, 1e-4, 1e-3)
    assert manifest.domain == Domain("unit_box")
    assert (manifest.x_shape, manifest.y_shape, manifest.opset, manifest.ir_version) == ((4,), (3,), 21, 10)
    assert manifest.ops["ai.icnnrt"].names == ("BundleEntropySolve",)
    assert isinstance(manifest.graphs["adjoint"], GraphFile)
    spec = manifest.weights.tensors["z_layers.0.weight"]
    assert (spec.shape, spec.dtype, spec.nonnegative, spec.trainable) == ((2, 3), "float32", True, True)
    assert manifest.weights.tensors["bn.num_batches_tracked"].shape == ()
    assert manifest.metadata == {"dataset": "digits", "epochs": 3, "note": None, "clamped": True}
    assert manifest.parity["argmin"] == {"max": 2e-6, "mean": 1e-7}


def test_write_returns_what_open_returns(tmp_path: Path) -> None:
    written = write(tmp_path / "p.icnn", **attacks.fields())
    opened = Package.open(tmp_path / "p.icnn")
    assert written.manifest == opened.manifest
    assert written.graphs == opened.graphs
    assert sorted(os.listdir(tmp_path)) == ["p.icnn"]


def test_the_manifest_is_deterministic_and_survives_json(good: Path) -> None:
    data = (good / "manifest.json").read_bytes()
    assert Manifest.from_json(data).to_json() == data


def test_write_takes_numpy_scalars_and_further_roles(tmp_path: Path) -> None:
    graphs = dict.fromkeys((*attacks.ROLES, "train_2"), attacks.model())
    path = attacks.good(tmp_path / "p", graphs=graphs, parity={"value": np.float32(0.5)}, x_shape=(np.int64(4),))
    assert Package.open(path).manifest.parity == {"value": 0.5}
    assert (path / "train_2.onnx").is_file()


def test_a_package_may_hold_no_weights(tmp_path: Path) -> None:
    def no_weights(model: onnx.ModelProto) -> None:
        del model.graph.initializer[:]

    graphs = dict.fromkeys(attacks.ROLES, attacks.model(no_weights))
    path = attacks.good(tmp_path / "p", graphs=graphs, weights={}, nonnegative=[], trainable=[])
    assert Package.open(path).weights == {}


def test_onnxruntime_reads_the_weights_of_a_written_package(good: Path) -> None:
    ort = pytest.importorskip("onnxruntime")
    session = ort.InferenceSession(good / "argmin.onnx", providers=["CPUExecutionProvider"])
    y = np.ones(3, np.float32)
    np.testing.assert_array_equal(session.run(None, {"y": y})[0], y + attacks.weights()["y_layers.0.bias"])


def test_the_layout_is_where_safetensors_puts_the_bytes() -> None:
    weights = attacks.weights()
    data, layout = weight_layout(weights)
    for name, (offset, length) in layout.items():
        assert data[offset : offset + length] == weights[name].tobytes()
    for name, array in safetensors_numpy.load(data).items():
        np.testing.assert_array_equal(array, weights[name], strict=True)


def test_the_layout_depends_on_names_shapes_and_dtypes_alone() -> None:
    weights = attacks.weights()
    other = {name: np.asfortranarray(weights[name] * 0).astype(weights[name].dtype) for name in reversed(weights)}
    assert weight_layout(other)[1] == weight_layout(weights)[1]
    swapped = {name: array.astype(array.dtype.newbyteorder(">")) for name, array in weights.items()}
    assert weight_layout(swapped)[0] == weight_layout(weights)[0]


def test_save_changes_the_weights_and_keeps_the_graphs(good: Path, tmp_path: Path) -> None:
    opened = Package.open(good)
    new = {**opened.weights, "y_layers.0.bias": np.array([4, 5, 6], np.float32)}
    opened.save(good, weights=new, metadata={"epochs": 4}, overwrite=True)
    again = Package.open(good)
    np.testing.assert_array_equal(again.weights["y_layers.0.bias"], [4, 5, 6])
    assert again.graphs == opened.graphs
    assert again.manifest.metadata == {"epochs": 4}
    assert again.manifest.parity == opened.manifest.parity
    opened.save(tmp_path / "copy")
    assert (tmp_path / "copy" / "manifest.json").read_bytes() == opened.manifest.to_json()


def test_a_link_to_a_package_opens(good: Path, tmp_path: Path) -> None:
    link = tmp_path / "latest"
    link.symlink_to(good, target_is_directory=True)
    assert Package.open(str(link)).manifest.name == "tiny"


# --- The folder ----------------------------------------------------------------------------------


def test_a_file_is_no_package(tmp_path: Path) -> None:
    (tmp_path / "packed.onnx").write_bytes(attacks.model())
    refused(tmp_path / "packed.onnx", "is a file; a packed .onnx runs as it is in onnxruntime")


def test_nothing_is_no_package(tmp_path: Path) -> None:
    refused(tmp_path / "absent", "there is nothing; check the path")
    with pytest.raises(PackageError, match="check the path"):
        Package.open("nul\0l")


def test_an_interrupted_replacement_opens_as_the_old_package(good: Path, tmp_path: Path) -> None:
    good.rename(tmp_path / ".tiny.icnn.old-0123")
    opened = Package.open(good)
    assert opened.path == good
    assert opened.manifest.name == "tiny"
    assert os.listdir(tmp_path) == [".tiny.icnn.old-0123"]  # reading renames nothing


def test_the_newest_whole_folder_aside_is_read(good: Path, tmp_path: Path) -> None:
    for age, name in enumerate(("newest", "middle", "oldest")):
        aside = attacks.good(tmp_path / f".tiny.icnn.old-{name}", name=name)
        os.utime(aside, (1e9 - age, 1e9 - age))
    (tmp_path / ".tiny.icnn.old-newest" / "value.onnx").unlink()
    assert Package.open(good).manifest.name == "tiny"  # nothing aside is looked at while the path holds a package
    shutil.rmtree(good)
    assert Package.open(good).manifest.name == "middle"
    for name in ("middle", "oldest"):
        (tmp_path / f".tiny.icnn.old-{name}" / "weights.safetensors").write_bytes(b"")
    refused(good, r"there is nothing; .* the old one, in \.tiny\.icnn\.old-\w+, is damaged too")


def test_a_damaged_package_is_not_read_from_aside(good: Path, tmp_path: Path) -> None:
    attacks.good(tmp_path / ".tiny.icnn.old-0123")
    (good / "value.onnx").unlink()
    refused(good, r"value\.onnx is missing")


def test_a_link_aside_is_not_followed(good: Path, tmp_path: Path) -> None:
    good.rename(tmp_path / "elsewhere")
    (tmp_path / ".tiny.icnn.old-0123").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    refused(good, "there is nothing; check the path")


def test_a_replacement_that_ends_while_it_is_read(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path holds nothing when it is listed, and the folder aside is gone when that is read."""
    aside = tmp_path / ".tiny.icnn.old-0123"
    good.rename(aside)
    real = package_format.asides

    def meanwhile(target: Path, **keywords: bool) -> list[Path]:
        found = real(target, **keywords)
        if aside.exists() and sys._getframe(1).f_code.co_name == "open":
            aside.rename(good)
        return found

    monkeypatch.setattr(package_format, "asides", meanwhile)
    assert Package.open(good).manifest.name == "tiny"


def test_what_an_interruption_left_aside_is_replaced_only_if_asked(good: Path, tmp_path: Path) -> None:
    opened = Package.open(good)
    good.rename(tmp_path / ".tiny.icnn.old-0123")
    with pytest.raises(InputError, match=r"interrupted, in \.tiny\.icnn\.old-0123; pass overwrite=True"):
        opened.save(good)
    opened.save(good, metadata={"new": True}, overwrite=True)
    assert Package.open(good).manifest.metadata == {"new": True}
    assert os.listdir(tmp_path) == ["tiny.icnn"]


def test_a_write_removes_the_folders_aside_of_its_own_name(good: Path, tmp_path: Path) -> None:
    opened = Package.open(good)
    for name in (".tiny.icnn.old-0123", ".tiny.icnn.old-4567", ".tiny.old-0123", ".other.icnn.old-0123"):
        attacks.good(tmp_path / name)
    opened.save(good, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == [".other.icnn.old-0123", ".tiny.old-0123", "tiny.icnn"]


def test_an_empty_folder_is_no_package(tmp_path: Path) -> None:
    refused(tmp_path, r"the folder has no manifest\.json")


def test_a_folder_of_packages_is_no_package(good: Path) -> None:
    refused(good.parent, r"the folder has no manifest\.json; give the path of the package folder itself")


@pytest.mark.parametrize("name", ["value.onnx", "weights.safetensors"])
def test_a_missing_file(good: Path, name: str) -> None:
    (good / name).unlink()
    refused(good, f"{name} is missing, though manifest.json lists it")


@pytest.mark.parametrize(
    "name",
    [
        *("train.onnx", "more.safetensors", "more.json", "notes.txt", "weights.safetensors.bak"),
        *("readme.md", "README", "README.md.txt", "LICENSE.txt", "config.json", "a.git"),
    ],
)
def test_an_extra_file(good: Path, name: str) -> None:
    (good / name).write_bytes(b"")
    refused(good, f'"{re.escape(name)}" does not belong to the package')


# --- What lies beside the package ----------------------------------------------------------------

FILES_BESIDE = (
    ".DS_Store",
    ".gitattributes",
    ".hidden.onnx",
    ".weights.safetensors",
    "LICENSE",
    "README.md",
    "Thumbs.db",
)
FOLDERS_BESIDE = (".cache", ".git", "lost+found")


def test_what_people_keep_beside_a_package_is_ignored_and_named(good: Path, tmp_path: Path) -> None:
    plain = Package.open(good)
    assert plain.ignored == ()
    for name in FILES_BESIDE:
        (good / name).write_bytes(b"not to be read")
        (good / name).chmod(0)
    for name in FOLDERS_BESIDE:
        (good / name).mkdir()
        (good / name / "value.onnx").write_bytes(b"nor this")
    (good / "..data").symlink_to(tmp_path / "absent")
    if hasattr(os, "mkfifo"):
        os.mkfifo(good / ".pipe")
    opened = Package.open(good)
    there = {*FILES_BESIDE, *FOLDERS_BESIDE, "..data", *([".pipe"] if hasattr(os, "mkfifo") else [])}
    assert opened.ignored == tuple(sorted(there))
    assert (opened.manifest, opened.graphs) == (plain.manifest, plain.graphs)
    assert set(os.listdir(good)) == there | set(FILES) | {"value.onnx"}


def test_more_files_than_a_package_has_are_refused(good: Path) -> None:
    for i in range(4096):
        (good / f".{i}").touch()
    refused(good, "there are more than 4096 in the folder")


def test_a_replacement_takes_along_what_lies_beside(good: Path, tmp_path: Path) -> None:
    """It is the user's: nothing but the package's own files is ever deleted."""
    for name in FILES_BESIDE:
        (good / name).write_text(f"precious {name}")
        os.utime(good / name, (1e9, 1e9))
    (good / "..data").symlink_to("elsewhere")
    opened = Package.open(good)
    written = opened.save(good, metadata={"new": True}, overwrite=True)
    assert written.ignored == Package.open(good).ignored == opened.ignored
    assert Package.open(good).manifest.metadata == {"new": True}
    for name in FILES_BESIDE:
        assert (good / name).read_text() == f"precious {name}"
        assert (good / name).stat().st_mtime == 1e9
        assert (good / name).stat().st_nlink == 1
    assert os.readlink(good / "..data") == "elsewhere"
    assert os.listdir(tmp_path) == ["tiny.icnn"]


def test_a_replacement_copies_where_a_disk_has_no_links(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (good / "README.md").write_text("precious")

    def no_links(*args: Any, **keywords: Any) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", no_links)
    Package.open(good).save(good, overwrite=True)
    assert (good / "README.md").read_text() == "precious"


@pytest.mark.parametrize("name", FOLDERS_BESIDE)
def test_a_replacement_refuses_what_it_cannot_take_along(good: Path, name: str) -> None:
    (good / name).mkdir()
    (good / name / "precious").touch()
    before = sorted(os.listdir(good))
    with pytest.raises(InputError, match=f'also holds "{re.escape(name)}", which a replacement .* cannot take along'):
        Package.open(good).save(good, overwrite=True)
    assert (good / name / "precious").exists()
    assert sorted(os.listdir(good)) == before
    assert os.listdir(good.parent) == ["tiny.icnn"]


def test_what_lay_beside_an_interrupted_replacement_is_taken_along(good: Path, tmp_path: Path) -> None:
    (good / "README.md").write_text("precious")
    opened = Package.open(good)
    good.rename(tmp_path / ".tiny.icnn.old-0123")
    assert Package.open(good).ignored == ("README.md",)
    opened.save(good, metadata={"new": True}, overwrite=True)
    assert (good / "README.md").read_text() == "precious"
    assert os.listdir(tmp_path) == ["tiny.icnn"]


@pytest.mark.parametrize("folder", [False, True])
def test_a_file_that_came_meanwhile_is_not_deleted(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: bool
) -> None:
    """Between the look at the folder and its replacement: the folder aside stays, with that file alone in it."""
    real = replacement.replace_folder

    def meanwhile(*args: Any) -> None:
        (good / ".late").mkdir() if folder else (good / ".late").write_text("precious")
        real(*args)

    monkeypatch.setattr(replacement, "replace_folder", meanwhile)
    opened = Package.open(good)
    opened.save(good, metadata={"n": 1}, overwrite=True)
    (aside,) = (path for path in tmp_path.iterdir() if path != good)
    assert os.listdir(aside) == [".late"]
    monkeypatch.undo()
    opened.save(good, metadata={"n": 2}, overwrite=True)
    assert os.listdir(aside) == [".late"]
    assert Package.open(good).manifest.metadata == {"n": 2}


# --- Links ---------------------------------------------------------------------------------------


def linked(good: Path, tmp_path: Path) -> Path:
    """As the cache of a model hub has it: every file a link to a blob."""
    (tmp_path / "blobs").mkdir()
    for number, file in enumerate(sorted(good.iterdir())):
        file.rename(tmp_path / "blobs" / str(number))
        file.symlink_to(Path("..") / "blobs" / str(number))
    return good


def test_links_to_files_are_followed_where_asked(good: Path, tmp_path: Path) -> None:
    plain = Package.open(good)
    linked(good, tmp_path)
    refused(good, r"is a symbolic link; pass follow_links=True, or --follow-links on the command line")
    opened = Package.open(good, follow_links=True)
    assert (opened.manifest, opened.graphs) == (plain.manifest, plain.graphs)
    assert opened.ignored == ()


def test_a_mounted_volume_is_read_with_its_links(good: Path, tmp_path: Path) -> None:
    """As Kubernetes mounts a config map: file -> ..data/file, ..data -> a hidden folder with a date."""
    dated = good / "..2026_01_01"
    dated.mkdir()
    for file in [path for path in good.iterdir() if path != dated]:
        file.rename(dated / file.name)
        file.symlink_to(Path("..data") / file.name)
    (good / "..data").symlink_to(dated.name)
    opened = Package.open(good, follow_links=True)
    assert opened.ignored == ("..2026_01_01", "..data")
    assert opened.manifest.name == "tiny"


def test_what_a_link_leads_to_is_checked(good: Path, tmp_path: Path) -> None:
    linked(good, tmp_path)
    blob = (good / "value.onnx").resolve()
    blob.write_bytes(blob.read_bytes()[:-1] + b"\0")
    with pytest.raises(PackageError, match=r"value\.onnx: its SHA-256 should be"):
        Package.open(good, follow_links=True)
    blob.write_bytes(b"")
    with pytest.raises(PackageError, match=r"value\.onnx: expected \d+ bytes"):
        Package.open(good, follow_links=True)


def to_a_folder(link: Path, target: Path) -> None:
    target.mkdir()
    link.symlink_to(target)


def to_a_pipe(link: Path, target: Path) -> None:
    os.mkfifo(target)
    link.symlink_to(target)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
@pytest.mark.parametrize("name", ["value.onnx", "manifest.json", "more.onnx"])
@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (to_a_folder, "is a symbolic link to a folder; copy"),
        (lambda link, target: link.symlink_to(target), "is a symbolic link to what is not there; copy"),
        (lambda link, target: link.symlink_to(link.name), "is a symbolic link that leads in a circle; copy"),
        (to_a_pipe, "is a symbolic link to what is neither a file nor a folder, such as a device or a pipe; copy"),
        (
            lambda link, target: link.symlink_to("/dev/zero"),
            "is a symbolic link to what is neither a file nor a folder",
        ),
    ],
)
def test_links_to_anything_but_files_are_refused(
    good: Path, tmp_path: Path, name: str, make: Callable[[Path, Path], None], sentence: str
) -> None:
    (good / name).unlink(missing_ok=True)
    make(good / name, tmp_path / "target")
    with pytest.raises(PackageError, match=sentence) as caught:
        Package.open(good, follow_links=True)
    assert str(caught.value).count(". ") == 0
    assert str(caught.value).endswith(".")
    refused(good, "is a symbolic link; pass follow_links=True")


def test_a_link_to_a_file_that_is_not_listed_is_refused(good: Path, tmp_path: Path) -> None:
    (tmp_path / "more.onnx").write_bytes(b"")
    (good / "more.onnx").symlink_to(tmp_path / "more.onnx")
    with pytest.raises(PackageError, match=r'"more\.onnx" does not belong to the package'):
        Package.open(good, follow_links=True)


def test_a_package_of_links_is_not_replaced(good: Path, tmp_path: Path) -> None:
    opened = Package.open(linked(good, tmp_path), follow_links=True)
    with pytest.raises(InputError, match="is not a package of plain files alone"):
        opened.save(good, overwrite=True)
    assert all(path.is_symlink() for path in good.iterdir())


def test_a_folder_inside(good: Path) -> None:
    (good / "sub").mkdir()
    refused(good, 'plain files only, but "sub" is a folder')


@pytest.mark.parametrize("name", ["weights.safetensors", "manifest.json", "more.onnx"])
def test_a_symbolic_link(good: Path, tmp_path: Path, name: str) -> None:
    if (good / name).exists():
        (good / name).rename(tmp_path / name)
    (good / name).symlink_to(tmp_path / name)
    refused(good, f'plain files only, but "{name}" is a symbolic link; pass follow_links=True')


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_does_not_block(good: Path) -> None:
    (good / "value.onnx").unlink()
    os.mkfifo(good / "value.onnx")
    refused(good, "is neither a file nor a folder")


@pytest.mark.parametrize("name", ["value.onnx", "weights.safetensors"])
def test_a_truncated_file(good: Path, name: str) -> None:
    data = (good / name).read_bytes()
    (good / name).write_bytes(data[:-1])
    refused(good, f"{name}: expected {len(data)} bytes, .* has {len(data) - 1}; the file is truncated")


@pytest.mark.parametrize("name", ["adjoint.onnx", "weights.safetensors"])
def test_a_changed_file(good: Path, name: str) -> None:
    data = bytearray((good / name).read_bytes())
    data[-1] ^= 1
    (good / name).write_bytes(data)
    refused(good, f"{name}: its SHA-256 should be [0-9a-f]{{64}}, but is")


def test_a_huge_manifest_is_not_read(good: Path) -> None:
    with (good / "manifest.json").open("ab") as stream:
        stream.truncate(1 << 40)  # sparse: the bytes take no room
    refused(good, "manifest.json: expected at most 4194304 bytes, but it has 1099511627776")


# --- The manifest --------------------------------------------------------------------------------


def test_a_newer_version_says_to_upgrade(good: Path) -> None:
    attacks.edit_manifest(good, lambda m: m.update(format_version=3, novelty={}))
    refused(good, "format_version is 3, newer than the 2 that this icnnrt reads; upgrade icnnrt")


BAD_VALUES: list[tuple[str, object, str]] = [
    ("format", "gguf", 'format should be "icnnrt", but is "gguf"'),
    ("graphs.value.inputs", None, "graphs.value.inputs should be a JSON object"),
    ("graphs.value.inputs", {}, 'graphs.value.inputs lacks what the graph has: "y"'),
    ("graphs.value.outputs", {"f": {"dtype": "float32", "shape": []}}, "graphs.value.outputs the graph does not have"),
    ("graphs.value.inputs.y.dtype", "text", 'graphs.value.inputs.y.dtype should be "float64" or'),
    ("graphs.value.inputs.y.dtype", "float64", r"graphs.value.inputs.y is float64 \[3\], but value.onnx declares"),
    ("graphs.value.inputs.y.shape", [4], r"graphs.value.inputs.y is float32 \[4\], but value.onnx declares float32"),
    ("graphs.value.inputs.y.shape", ["a b"], r"shape\[0\] should be the name of an open size"),
    ("graphs.value.inputs.y.shape", [-1], r"shape\[0\] should be an integer from 0"),
    ("graphs.value.inputs.y.default", 1.0, "graphs.value.inputs.y.default should be null, as in the graph, but is 1.0"),
    ("graphs.value.inputs.y.colour", 1, "graphs.value.inputs.y.colour is not a key"),
    ("format_version", 0, "format_version should be an integer from 1"),
    ("format_version", True, "format_version should be an integer"),
    ("format_version", 1.0, "format_version should be an integer"),
    ("name", 3, "name should be text"),
    ("name", "", "name should be text"),
    ("name", "\ud800", "name should be text"),
    ("producer", {"torch": 2}, "producer.torch should be text"),
    ("producer", [], "producer should be a JSON object"),
    ("dtype", "bfloat16", 'dtype should be "float32" or "float64", but is "bfloat16"'),
    ("x_shape", 4, "x_shape should be a list"),
    ("x_shape", [-1], r"x_shape\[0\] should be an integer from 0"),
    ("x_shape", [True], r"x_shape\[0\] should be an integer"),
    ("x_shape", [2**16, 2**16], "x_shape should be a shape of at most 2147483648 elements"),
    ("x_shape", [1] * 9, "x_shape should be a list of at most 8"),
    ("y_shape", [3, 1], "y_shape should be a list of exactly one dimension"),
    ("y_shape", [], "y_shape should be a list of exactly one dimension"),
    ("y_shape", [2**31], r"iterations times y_shape\[0\] should be at most 268435456"),
    ("domain", "box", "domain should be a JSON object"),
    ("domain.kind", "ball", 'domain.kind should be "unit_box" or "box" or "simplex" or "space"'),
    ("domain.kind", "space", "domain.mu is missing"),
    ("domain", {"kind": "space", "mu": 0.0}, "domain.mu should be a number above 0"),
    ("domain", {"kind": "box", "mu": 1.0}, "domain.mu is not a key"),
    ("domain", None, "domain should be null without a solver, and there with one"),
    ("domain", {"kind": "space", "mu": 2.0}, 'regulariser should be "quadratic", as domain has it, but is "entropy"'),
    ("regulariser", "none", 'regulariser should be "entropy" or "quadratic"'),
    ("kind", "cost", 'kind should be "energy" or "gradient"'),
    ("kind", "gradient", "graphs.gradient is missing"),
    ("solver", None, "graphs.argmin does not belong to a package without a solver"),
    ("solver.name", "BregmanProximalGradient", "solver.step_size is missing"),
    ("convexity", "proven", "convexity should be a JSON object"),
    ("golden", {"file": "../g", "sha256": "0" * 64, "bytes": 9}, 'golden.file should be "golden.safetensors"'),
    ("solver.name", "Newton", 'solver.name should be "BundleEntropy"'),
    ("solver.iterations", 0, "solver.iterations should be an integer from 1 to 4096, but is 0"),
    ("solver.iterations", 4097, "solver.iterations should be an integer from 1 to 4096"),
    ("solver.iterations", False, "solver.iterations should be an integer"),
    ("solver.steps", 1001, "solver.steps should be an integer from 1 to 1000"),
    ("solver.steps", "10", 'solver.steps should be an integer from 1 to 1000, but is "10"'),
    ("solver.gap_tolerance", 0.0, "solver.gap_tolerance should be a number above 0"),
    ("solver.residual_tolerance", 10**400, "solver.residual_tolerance should be a finite number"),
    ("opset", 28, "opset should be an integer from 1 to 26"),
    ("ir_version", 14, "ir_version should be an integer from 8 to 13"),
    ("ops", {"com.evil": {"version": 1, "names": []}}, 'a key of manifest.json: ops should be "ai.icnnrt"'),
    ("ops", {"ai.icnnrt": {"version": 2, "names": []}}, "ops.ai.icnnrt.version should be the integer 1"),
    ("ops", {"ai.icnnrt": {"version": 1, "names": ["a b"]}}, r"names\[0\] should be the name of an operator"),
    ("graphs", {}, "graphs.value is missing"),
    ("graphs.../up", {}, "a key of manifest.json: graphs should be a role"),
    ("graphs.value.file", "../value.onnx", 'graphs.value.file should be "value.onnx"'),
    ("graphs.value.sha256", "0" * 63, "graphs.value.sha256 should be 64 lower-case hexadecimal digits"),
    ("graphs.value.bytes", 2**40, "graphs.value.bytes should be an integer from 1 to 268435456"),
    ("graphs.value.bytes", -1, "graphs.value.bytes should be an integer"),
    ("weights.file", "/etc/passwd", 'weights.file should be "weights.safetensors"'),
    ("weights.bytes", 2**60, "weights.bytes should be 44, the bytes of the tensors, and a header"),
    ("weights.tensors", [], "weights.tensors should be a JSON object"),
    ("weights.tensors", {"": {}}, "a key of manifest.json: weights.tensors should be text"),
    ("weights.tensors", {"__metadata__": {}}, "should be any name but __metadata__"),
    ("parity.value", "small", "parity.value should be a finite number"),
    ("parity.value", {"max": [1]}, "parity.value.max should be a finite number"),
    ("metadata", {"a": [1]}, "metadata.a should be text, a boolean, a number or null"),
    ("metadata", {"a": 2**63}, "metadata.a should be an integer of at most 64 bits"),
    ("colour", 1, "colour is not a key of this version of the format"),
    ("solver.colour", 1, "solver.colour is not a key"),
]


def put(content: dict[str, Any], place: str, value: object) -> None:
    """Set a key of the manifest: "a.b" is key b of object a; dots after the second key belong to it."""
    *outer, last = ["graphs", "../up"] if place == "graphs.../up" else place.split(".")
    for key in outer:
        content = content[key]
    content[last] = value


@pytest.mark.parametrize(("place", "value", "sentence"), BAD_VALUES, ids=lambda v: str(v)[:30])
def test_a_wrong_value_in_the_manifest(good: Path, place: str, value: object, sentence: str) -> None:
    attacks.edit_manifest(good, lambda m: put(m, place, value))
    refused(good, f"(manifest.json: |a key of ).*{sentence}" if not sentence.startswith("a key") else sentence)


WEIGHT_VALUES = [
    ("shape", [2**31, 2], "shape should be a shape of at most"),
    ("shape", [-1], r"shape\[0\] should be an integer"),
    ("shape", [2**31], "weights.tensors should have at most 2147483648 elements together"),
    ("dtype", "complex64", "dtype should be"),
    ("dtype", "int64", "dtype should be a float dtype, as the weight is trainable"),
    ("sign", 1, "sign should be a JSON object, but is 1"),
    ("sign", "positive", 'sign should be "nonnegative" or "nonpositive" or "zero"'),
    ("sign", {"axis": 2, "runs": [[0, 1, "zero"]]}, "sign.axis should be an integer from 0 to 1, but is 2"),
    ("sign", {"axis": 0, "runs": []}, "sign.runs should be runs in order that do not overlap, within 0 to 2"),
    ("sign", {"axis": 0, "runs": [[0, 3, "zero"]]}, "sign.runs should be runs in order"),
    ("sign", {"axis": None, "runs": [[2, 4, "zero"], [3, 5, "zero"]]}, "sign.runs should be runs in order"),
    ("sign", {"axis": 1, "runs": [[1, 1, "zero"]]}, "sign.runs should be runs in order"),
    ("sign", {"axis": 1, "runs": [[0, 1, "free"]]}, r'sign.runs\[0\] should be "nonnegative" or'),
    ("sign", {"axis": 1, "runs": [[0, 1]]}, r"sign.runs\[0\] should be \[start, stop"),
    ("sign", {"axis": 1, "runs": [[0, 1, "zero"]], "more": 1}, "sign.more is not a key"),
    ("nonnegative", True, "nonnegative is not a key of this version of the format"),
    ("trainable", "yes", "trainable should be true or false"),
]


@pytest.mark.parametrize(("key", "value", "sentence"), WEIGHT_VALUES)
def test_a_wrong_weight_in_the_manifest(good: Path, key: str, value: object, sentence: str) -> None:
    attacks.edit_manifest(good, lambda m: put(m["weights"]["tensors"]["z_layers.0.weight"], key, value))
    refused(good, sentence)


# What a package with train.onnx must say of it, and no other package.
TRAIN_VALUES = [
    ("train", None, "train should be a JSON object"),
    ("train.loss", "", "train.loss should be text"),
    ("train.optimizer", "Muon", 'train.optimizer should be "SGD" or "Adam" or "AdamW", but is "Muon"'),
    ("train.settings", {"momentum": "0.9"}, "train.settings.momentum should be a finite number"),
    ("train.slots", ["Exp Avg"], r"train.slots\[0\] should be a name of lower-case letters"),
    ("train.slots", ["a"] * 2, "train.slots should be names that occur once"),
    ("train.slots", ["a"] * 9, "train.slots should be a list of at most 8"),
    ("train.weights", [], "train.weights should be the names of one weight or more"),
    ("train.weights", ["nothing"], 'train.weights should be names of trainable weights of dtype float32, but is "noth'),
    ("train.weights", ["bn.num_batches_tracked"], "train.weights should be names of trainable weights"),
    ("train.weights", ["y_layers.0.bias"] * 2, "train.weights should be names that occur once"),
    ("train.weights", ["__metadata__"], r"train.weights\[0\] should be any name but __metadata__"),
    ("train.adjoint", "implicit", 'train.adjoint should be "exact" or "prop3", but is "implicit"'),
    ("train.clip_norm", 0.0, "train.clip_norm should be a number above 0"),
    ("train.clip_norm", "1", "train.clip_norm should be a finite number"),
    ("train.target_shape", [-1], r"train.target_shape\[0\] should be an integer from 0"),
    ("train.target_shape", [2**16, 2**16], "train.target_shape should be a shape of at most"),
    ("train.target_dtype", "int32", 'train.target_dtype should be "float64" or "float32" or "int64", but is "int32"'),
    ("train.colour", 1, "train.colour is not a key"),
]


@pytest.mark.parametrize(("place", "value", "sentence"), TRAIN_VALUES, ids=lambda v: str(v)[:30])
def test_a_wrong_value_of_training(tmp_path: Path, place: str, value: object, sentence: str) -> None:
    path = attacks.tunable(tmp_path / "tiny.icnn")
    attacks.edit_manifest(path, lambda m: put(m, place, value))
    refused(path, f"manifest.json: {sentence}")


@pytest.mark.parametrize("key", [f.name for f in dataclasses.fields(TrainingSpec)])
def test_a_missing_key_of_training(tmp_path: Path, key: str) -> None:
    path = attacks.tunable(tmp_path / "tiny.icnn")
    attacks.edit_manifest(path, lambda m: m["train"].pop(key))
    refused(path, f"manifest.json: train.{key} is missing")


def test_training_and_its_graph_come_together(good: Path, tmp_path: Path) -> None:
    path = attacks.tunable(tmp_path / "tunable.icnn")
    attacks.edit_manifest(path, lambda m: m.pop("train"))
    refused(path, "manifest.json: graphs.train is there but train is missing")
    path = attacks.tunable(path, overwrite=True)
    said = json.loads((path / "manifest.json").read_bytes())["train"]
    attacks.edit_manifest(good, lambda m: m.update(train=said))
    refused(good, "manifest.json: train is there but graphs.train is missing")


def test_a_weight_that_training_moves_must_be_trainable(tmp_path: Path) -> None:
    path = attacks.tunable(tmp_path / "tiny.icnn")
    attacks.edit_manifest(path, lambda m: m["weights"]["tensors"]["y_layers.0.bias"].update(trainable=False))
    refused(path, 'train.weights should be names of trainable weights of dtype float32, but is "y_layers.0.bias"')
    with pytest.raises(InputError, match=r"train\.weights should be names of trainable weights"):
        attacks.tunable(tmp_path / "other.icnn", trainable=["z_layers.0.weight"])


def test_a_package_that_can_be_tuned_reads_back_as_written(tmp_path: Path) -> None:
    path = attacks.tunable(tmp_path / "tiny.icnn")
    assert Package.open(path).manifest.train == attacks.training()
    data = (path / "manifest.json").read_bytes()
    assert Manifest.from_json(data).to_json() == data
    again = Package.open(path).save(tmp_path / "again.icnn")
    assert again.manifest == Package.open(path).manifest


@pytest.mark.parametrize(
    "key",
    [f.name for f in dataclasses.fields(Manifest) if f.name not in ("train", "polyhedron", "convexity", "golden")],
)
def test_a_missing_key_in_the_manifest(good: Path, key: str) -> None:
    attacks.edit_manifest(good, lambda m: m.pop(key))
    refused(good, f"manifest.json: {key} is missing")


@pytest.mark.parametrize(
    ("before", "after", "sentence"),
    [
        (b'"opset": 21', b'"opset": 21, "opset": 21', 'the key "opset" occurs twice'),
        (b'"steps": 12', b'"steps": 12, "steps": 13', 'the key "steps" occurs twice'),
        (b"0.0001", b"NaN", 'expected finite numbers, but one is "NaN"'),
        (b"0.0001", b"-Infinity", 'expected finite numbers, but one is "-Infinity"'),
        (b"0.0001", b"1e999", 'expected finite numbers, but one is "1e999"'),
        (b"0.0001", b"9" * 5000, "not valid UTF-8 JSON"),
        (b"tiny", b"\xff", "not valid UTF-8 JSON"),
        (b'"epochs": 3', b'"epochs": ' + b"[" * 100_000, "not valid UTF-8 JSON"),
        (b"{", b"", "not valid UTF-8 JSON"),
    ],
)
def test_json_that_is_not_strict(good: Path, before: bytes, after: bytes, sentence: str) -> None:
    file = good / "manifest.json"
    file.write_bytes(file.read_bytes().replace(before, after, 1))
    refused(good, f"manifest.json: {sentence}")


@pytest.mark.parametrize("text", [b"", b"[]", b"null", b"3"])
def test_a_manifest_that_is_no_object(good: Path, text: bytes) -> None:
    (good / "manifest.json").write_bytes(text)
    refused(good, "manifest.json")


# --- The weights ---------------------------------------------------------------------------------


def header_of(data: bytes) -> tuple[dict[str, Any], bytes]:
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


Edit = Callable[[dict[str, Any], bytes], bytes]


def same_offsets(header: dict[str, Any], data: bytes) -> bytes:
    # Both float weights start where the first one does.
    start = header["y_layers.0.bias"]["data_offsets"][0]
    header["z_layers.0.weight"]["data_offsets"] = [start, start + 24]
    return attacks.safetensors(header, data[:-12])


def shift_offsets(header: dict[str, Any], data: bytes) -> bytes:
    for name in ("y_layers.0.bias", "z_layers.0.weight"):
        header[name]["data_offsets"] = [o + 4 for o in header[name]["data_offsets"]]
    return attacks.safetensors(header, data[:8] + b"\0" * 4 + data[8:])


def change(name: str, key: str, value: object) -> Edit:
    def edit(header: dict[str, Any], data: bytes) -> bytes:
        header[name][key] = value
        return attacks.safetensors(header, data)

    return edit


BAD_HEADERS: list[tuple[str, Edit, str]] = [
    ("short file", lambda h, d: b"\0" * 7, "weights.bytes should be 44"),
    (
        "header past the end",
        lambda h, d: attacks.safetensors(h, d, claim=10**6),
        "at most .* bytes, but claims 1000000",
    ),
    ("header of 2^64", lambda h, d: attacks.safetensors(h, d, claim=2**64 - 1), "claims 18446744073709551615"),
    ("header not JSON", lambda h, d: attacks.safetensors(b"{" * 400, d), "header: not valid UTF-8 JSON"),
    ("header no object", lambda h, d: attacks.safetensors(b"[]", d), "header should be a JSON object"),
    (
        "name twice",
        lambda h, d: attacks.safetensors(b'{"z_layers.0.weight": 0, "z_layers.0.weight": 0}', d),
        'the key "z_layers.0.weight" occurs twice',
    ),
    (
        "weight missing",
        lambda h, d: attacks.safetensors({k: v for k, v in h.items() if k[0] != "y"}, d),
        'the weight "y_layers.0.bias" is in manifest.json but not in weights.safetensors',
    ),
    (
        "weight too many",
        lambda h, d: attacks.safetensors({**h, "extra": h["y_layers.0.bias"]}, d),
        'the weight "extra" is in weights.safetensors but not in manifest.json',
    ),
    ("other dtype", change("y_layers.0.bias", "dtype", "I32"), 'y_layers.0.bias.dtype should be "F32", but is "I32"'),
    ("other shape", change("y_layers.0.bias", "shape", [1, 3]), r"shape should be \[3\] as in manifest.json"),
    ("huge shape", change("y_layers.0.bias", "shape", [2**40] * 3), r"shape\[0\] should be an integer from 1"),
    ("huge offset", change("y_layers.0.bias", "data_offsets", [2**61, 2**61 + 12]), "should start at byte"),
    ("huge integer", change("y_layers.0.bias", "data_offsets", [2**80, 2**80 + 12]), "data_offsets.* should be"),
    ("negative offset", change("y_layers.0.bias", "data_offsets", [-12, 0]), "data_offsets.* should be an integer"),
    ("one offset", change("y_layers.0.bias", "data_offsets", [0]), "should be two offsets 12 bytes apart"),
    ("reversed offsets", change("y_layers.0.bias", "data_offsets", [12, 0]), "should be two offsets 12 bytes apart"),
    ("extra key", change("y_layers.0.bias", "strides", []), "strides is not a key"),
    ("overlap", same_offsets, "overlaps the weight before it"),
    ("gap", shift_offsets, "leaves a gap before it"),
    ("padding", lambda h, d: attacks.safetensors(h, d + b"\0"), "the file is truncated or padded"),
    ("truncated", lambda h, d: attacks.safetensors(h, d[:-4]), "the file is truncated or padded"),
]


@pytest.mark.parametrize(("edit", "sentence"), [pytest.param(e, s, id=name) for name, e, s in BAD_HEADERS])
def test_a_bad_weights_file(good: Path, edit: Edit, sentence: str) -> None:
    file = good / "weights.safetensors"
    attacks.plant(good, file.name, edit(*header_of(file.read_bytes())))
    refused(good, sentence)


def test_a_huge_safetensors_header(good: Path) -> None:
    header, data = header_of((good / "weights.safetensors").read_bytes())
    padded = json.dumps(header).encode() + b" " * (16 << 20)
    attacks.plant(good, "weights.safetensors", attacks.safetensors(padded, data))
    refused(good, "weights.bytes should be 44, the bytes of the tensors, and a header")


def test_misaligned_weights(good: Path) -> None:
    header, data = header_of((good / "weights.safetensors").read_bytes())
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8 + 1)
    attacks.plant(good, "weights.safetensors", len(text).to_bytes(8, "little") + text + data)
    refused(good, "should be aligned to . bytes in the file")


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("z_layers.0.weight", -1.0, '"z_layers.0.weight" should be nonnegative, but its smallest entry is -1'),
        ("z_layers.0.weight", np.nan, '"z_layers.0.weight" should be nonnegative'),
        ("y_layers.0.bias", np.inf, '"y_layers.0.bias" should be finite'),
    ],
)
def test_weights_that_break_their_promise(good: Path, name: str, value: float, sentence: str) -> None:
    weights = attacks.weights()
    weights[name].flat[1] = value
    with pytest.raises(InputError, match=sentence):
        Package.open(good).save(good, weights=weights, overwrite=True)
    attacks.plant(good, "weights.safetensors", weight_layout(weights)[0])
    refused(good, sentence)


# --- The graphs ----------------------------------------------------------------------------------


def evil_initializer(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(attacks.evil_tensor())


def absolute_path(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(attacks.evil_tensor("/etc/passwd"))


def memory_address(model: onnx.ModelProto) -> None:
    # onnxruntime's own mark for "the offset is an address in this process".
    model.graph.initializer.append(attacks.evil_tensor("*/_ORT_MEM_ADDR_/*"))


def dotted_path(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(attacks.evil_tensor("./weights.safetensors"))


def evil_sparse_values(model: onnx.ModelProto) -> None:
    model.graph.sparse_initializer.add().values.CopyFrom(attacks.evil_tensor())


def evil_sparse_indices(model: onnx.ModelProto) -> None:
    model.graph.sparse_initializer.add().indices.CopyFrom(attacks.evil_tensor())


def evil_attribute_tensor(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Constant", [], ["c"], value=attacks.evil_tensor()))


def evil_attribute_tensors(model: onnx.ModelProto) -> None:
    model.graph.node[0].attribute.add(name="t", type=AttributeProto.TENSORS).tensors.append(attacks.evil_tensor())


def evil_attribute_sparse(model: onnx.ModelProto) -> None:
    attribute = model.graph.node[0].attribute.add(name="t", type=AttributeProto.SPARSE_TENSOR)
    attribute.sparse_tensor.values.CopyFrom(attacks.evil_tensor())


def evil_attribute_sparses(model: onnx.ModelProto) -> None:
    attribute = model.graph.node[0].attribute.add(name="t", type=AttributeProto.SPARSE_TENSORS)
    attribute.sparse_tensors.add().indices.CopyFrom(attacks.evil_tensor())


def evil_branch(model: onnx.ModelProto) -> None:
    inner = helper.make_node("If", ["c"], ["z"], then_branch=attacks.evil_subgraph())
    outer = helper.make_graph([inner], "outer", [], [])
    model.graph.node.append(helper.make_node("Loop", ["m", "c"], ["z"], body=outer))


def evil_graphs(model: onnx.ModelProto) -> None:
    model.graph.node[0].attribute.add(name="g", type=AttributeProto.GRAPHS).graphs.append(attacks.evil_subgraph())


def evil_function_body(model: onnx.ModelProto) -> None:
    model.functions[0].node.append(helper.make_node("Constant", [], ["c"], value=attacks.evil_tensor()))


def evil_function_default(model: onnx.ModelProto) -> None:
    model.functions[0].attribute_proto.append(helper.make_attribute("a", attacks.evil_tensor()))


def evil_training(model: onnx.ModelProto) -> None:
    model.training_info.add().algorithm.CopyFrom(attacks.evil_subgraph())


EVIL = [
    evil_initializer,
    absolute_path,
    memory_address,
    dotted_path,
    evil_sparse_values,
    evil_sparse_indices,
    evil_attribute_tensor,
    evil_attribute_tensors,
    evil_attribute_sparse,
    evil_attribute_sparses,
    evil_branch,
    evil_graphs,
    evil_function_body,
    evil_function_default,
    evil_training,
]


@pytest.mark.parametrize("edit", EVIL, ids=lambda e: e.__name__)
def test_external_data_elsewhere(good: Path, edit: Callable[[onnx.ModelProto], None]) -> None:
    attacks.plant(good, "value.onnx", attacks.model(edit))
    refused(good, "value.onnx: tensor .* should keep its external data in weights.safetensors, but names")


@pytest.mark.parametrize(
    ("entries", "sentence"),
    [
        ({"offset": "0"}, "should be one whole weight"),
        ({"length": "4"}, "should be one whole weight"),
        ({"offset": "999999999"}, "should be one whole weight"),
        ({"offset": "9" * 18, "length": "9" * 18}, "should be one whole weight"),
        ({"offset": "-8"}, "needs external data of one location, one offset and one length"),
        ({"offset": "9" * 30}, "needs external data of one location"),
        ({"offset": "0x10"}, "needs external data of one location"),
        ({"length": " 24"}, "needs external data of one location"),
        ({"length": "²⁴"}, "needs external data of one location"),
        ({"prepacked_0": "key|0;8;abc"}, "needs external data of one location"),
    ],
)
def test_external_data_that_is_no_weight(good: Path, entries: dict[str, str], sentence: str) -> None:
    tensor = attacks.external_tensor(**entries)
    attacks.plant(good, "value.onnx", attacks.model(lambda m: m.graph.initializer.append(tensor)))
    refused(good, f"value.onnx: .*{sentence}")


def test_external_data_given_twice(good: Path) -> None:
    tensor = attacks.external_tensor()
    tensor.external_data.add(key="location", value="../secret")
    attacks.plant(good, "value.onnx", attacks.model(lambda m: m.graph.initializer.append(tensor)))
    refused(good, "gives external data twice")


def test_external_data_not_given(good: Path) -> None:
    tensor = TensorProto(name="t", data_location=TensorProto.EXTERNAL)
    attacks.plant(good, "value.onnx", attacks.model(lambda m: m.graph.initializer.append(tensor)))
    refused(good, "needs external data of one location")


def foreign_op(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Shell", ["y"], ["z"], domain="com.evil"))


def foreign_op_in_function(model: onnx.ModelProto) -> None:
    model.functions[0].node.append(helper.make_node("Shell", [model.functions[0].input[0]], ["z"], domain="com.evil"))


def microsoft_op(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("EPContext", ["y"], ["z"], domain="com.microsoft"))


def unnamed_op(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Novelty", ["y"], ["z"], domain="ai.icnnrt"))


def redefined_op(model: onnx.ModelProto) -> None:
    function = model.functions.add()
    function.CopyFrom(model.functions[0])
    function.domain, function.name = "", "Relu"


def other_ir(model: onnx.ModelProto) -> None:
    model.ir_version = 9


def other_opset(model: onnx.ModelProto) -> None:
    model.functions[0].opset_import[0].version = 20


def no_graph(model: onnx.ModelProto) -> None:
    model.ClearField("graph")


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (foreign_op, 'should come from ONNX itself or ai.icnnrt, but "Shell" comes from "com.evil"'),
        (foreign_op_in_function, 'but "Shell" comes from "com.evil"'),
        (microsoft_op, "EPContext runs precompiled code"),
        (unnamed_op, '"Novelty" is used and not in ops'),
        (redefined_op, 'functions should be defined in ai.icnnrt, but "Relu" is defined in ""'),
        (other_ir, r"ir_version should be 10 as in manifest.json, but is 9"),
        (other_opset, 'the imported opset of "" should be 21, but is 20'),
        (no_graph, "holds no graph"),
    ],
)
def test_a_graph_with_foreign_parts(good: Path, edit: Callable[[onnx.ModelProto], None], sentence: str) -> None:
    attacks.plant(good, "argmin.onnx", attacks.model(edit))
    refused(good, f"argmin.onnx: .*{sentence}")


# --- Writing -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"trainable": ["nothing"]}, 'trainable: expected names of weights, but got "nothing"'),
        ({"nonnegative": ["nothing"]}, 'nonnegative: expected names of weights, but got "nothing"'),
        ({"trainable": ["bn.num_batches_tracked"]}, "should be a float dtype"),
        ({"dtype": "float16"}, "dtype should be"),
        ({"y_shape": (3, 3)}, "y_shape should be a list of exactly one dimension"),
        ({"graphs": {"value": attacks.model()}}, "graphs.argmin is missing"),
        ({"graphs": {"../value": attacks.model()}}, "graphs should be a role"),
        ({"graphs": {"value": attacks.model()[:-1]}}, "graphs: value.onnx: not a well-formed ONNX model"),
        ({"graphs": {"value": "text"}}, "graphs: expected the bytes of an ONNX file"),
        ({"graphs": dict.fromkeys(attacks.ROLES, attacks.model(foreign_op))}, '"Shell" comes from "com.evil"'),
        ({"weights": {"a": [1.0]}}, r'weights: expected numpy arrays .* got list for "a"'),
        ({"weights": {"a": np.zeros(1, complex)}}, 'but got complex128 for "a"'),
        ({"weights": {"__metadata__": np.zeros(1)}}, "weights: expected names like those of a state dict"),
        ({"metadata": {"a": object()}}, "object is not JSON"),
        ({"metadata": {"a": float("nan")}}, "would not be a valid package"),
        ({"metadata": {"a": "b" * (1 << 22)}}, "expected at most 4194304 bytes"),
        ({"opset": 20}, 'the imported opset of "" should be 20, but is 21'),
    ],
)
def test_write_refuses_what_would_not_open(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        write(tmp_path / "p", **attacks.fields(**changes))
    assert os.listdir(tmp_path) == []


def test_save_refuses_other_shapes(good: Path) -> None:
    opened = Package.open(good)
    for wrong in ({}, {**opened.weights, "y_layers.0.bias": np.zeros(3)}):
        with pytest.raises(InputError, match=r"expected .* for .*; the graphs fix every name, shape and dtype"):
            opened.save(good, weights=wrong, overwrite=True)
    with pytest.raises(InputError, match=r'"more" is in weights\.safetensors but not in manifest\.json'):
        opened.save(good, weights={**opened.weights, "more": np.zeros(3)}, overwrite=True)


def test_write_replaces_nothing_unasked(good: Path) -> None:
    with pytest.raises(InputError, match="pass overwrite=True"):
        attacks.good(good)


def test_write_replaces_packages_only(tmp_path: Path, good: Path) -> None:
    (tmp_path / "file").write_text("precious")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(good)
    (good / "notes.txt").write_text("precious")
    for name in ("file", "folder", "link", "tiny.icnn"):
        with pytest.raises(InputError, match="is not a package of plain files alone, so it is not replaced"):
            attacks.good(tmp_path / name, overwrite=True)
    with pytest.raises(InputError, match="create it first"):
        attacks.good(tmp_path / "absent" / "p")


def test_a_damaged_package_can_be_replaced(good: Path) -> None:
    (good / "value.onnx").write_bytes(b"")
    attacks.good(good, overwrite=True)
    Package.open(good)


def test_written_files_follow_the_umask(good: Path) -> None:
    plain = good.parent / "plain"
    plain.mkdir()
    assert good.stat().st_mode == plain.stat().st_mode


CALLS = ("mkdir", "fsync", "rename")


@pytest.mark.parametrize("replacing", [False, True], ids=["new", "replacing"])
@pytest.mark.parametrize("dead", [False, True], ids=["error", "crash"])
def test_an_interrupted_write_leaves_no_half_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dead: bool, replacing: bool
) -> None:
    """Fail at every call to the disk in turn; after a crash no later call, nor any tidying, works."""
    path = tmp_path / "p.icnn"
    outcomes: set[str] = set()
    for number in range(1, 100):
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        if replacing:
            attacks.good(path, name="old")
            (path / "README.md").write_text("precious")
        calls = 0

        def fail_at(real: Callable[..., Any], number: int = number) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls == number or (dead and calls > number):
                    raise OSError("the disk is gone")
                return real(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for name in CALLS:
                patch.setattr(os, name, fail_at(getattr(os, name)))
            if dead:
                patch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
            try:
                attacks.good(path, name="new", overwrite=True)
                finished = True
            except OSError:
                finished = False
        state = Package.open(path).manifest.name if path.exists() else "absent"
        if replacing:  # wherever the package is, what lay beside it is there too
            place = path if path.exists() else next(p for p in tmp_path.iterdir() if ".old-" in p.name)
            assert (place / "README.md").read_text() == "precious"
        outcomes.add(state)
        if finished:
            assert state == "new"
            assert dead or os.listdir(tmp_path) == ["p.icnn"]
            break
        if state == "absent" and replacing:
            assert dead, "an error must put the old package back"
            aside = next(p for p in tmp_path.iterdir() if ".old-" in p.name)
            assert Package.open(aside).manifest.name == "old"
            assert Package.open(path).manifest.name == "old"
        if not dead and state != "new":
            assert os.listdir(tmp_path) == (["p.icnn"] if replacing else [])
    else:
        pytest.fail("the write never finished")
    assert number > len(attacks.ROLES) + 4
    assert outcomes == {"new"} | ({"old"} if replacing else {"absent"}) | ({"absent"} if dead else set())


# --- Any bytes at all ------------------------------------------------------------------------------

FILES = ("manifest.json", "weights.safetensors", "value.onnx", "argmin.onnx", "adjoint.onnx")


@st.composite
def mutations(draw: st.DrawFn) -> tuple[str, Callable[[bytes], bytes]]:
    """A file of the package, and a way to damage it."""
    edits = draw(st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=6), st.integers(0, 6)), max_size=4))
    cut = draw(st.none() | st.floats(0, 1))

    def damage(data: bytes) -> bytes:
        for place, insert, remove in edits:
            at = int(place * len(data))
            data = data[:at] + insert + data[at + remove :]
        return data if cut is None else data[: int(cut * len(data))]

    return draw(st.sampled_from(FILES)), damage


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return attacks.good(tmp_path_factory.mktemp("fuzz") / "tiny.icnn")


@settings(max_examples=amount(400), deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(mutation=mutations(), sealed=st.booleans())
def test_damage_opens_or_is_refused(
    pristine: Path, mutation: tuple[str, Callable[[bytes], bytes]], sealed: bool
) -> None:
    """Random damage, with or without a manifest that agrees with it, raises nothing but PackageError."""
    file, damage = mutation
    before = {name: (pristine / name).read_bytes() for name in FILES}
    try:
        (pristine / file).write_bytes(damage(before[file]))
        if sealed and file != "manifest.json":
            attacks.reseal(pristine)
        with contextlib.suppress(PackageError):
            Package.open(pristine)
    finally:
        for name, data in before.items():
            (pristine / name).write_bytes(data)


@settings(max_examples=amount(300), deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=6,
    ),
    st.data(),
)
def test_any_json_in_any_field_is_read_or_refused(pristine: Path, value: object, data: st.DataObject) -> None:
    content = json.loads((pristine / "manifest.json").read_bytes())
    target = content
    while True:
        key = data.draw(st.sampled_from(sorted(target)))
        if not isinstance(target[key], dict) or not target[key] or data.draw(st.booleans()):
            break
        target = target[key]
    target[key] = value
    with contextlib.suppress(PackageError):
        Manifest.from_json(json.dumps(content).encode())
