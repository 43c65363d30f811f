"""Packages whose files are sound and say the wrong thing: `verify` names the check that tells each fault.

Here the files themselves are changed, and sizes and hashes made to agree, as an exporter with a bug would write them.
"""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attacks
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from icnnrt.checking.verify import CHECKS, verify
from icnnrt.errors import PackageError

onnx = pytest.importorskip("onnx")
pytest.importorskip("torch")


def bent(path: Path, role: str, output: str, by: float, row: int | None = None) -> None:
    """Multiply an output of a graph by a number; with `row` the entry of that index in the last dimension alone."""
    file = path / f"{role}.onnx"
    model = onnx.load(file, load_external_data=False)
    (node,) = [node for node in model.graph.node if output in node.output]
    node.output[list(node.output).index(output)] = "as_it_was"
    (shape,) = [o.type.tensor_type for o in model.graph.output if o.name == output]
    factor = np.array(by)
    if row is not None:
        factor = np.ones(shape.shape.dim[-1].dim_value)
        factor[row] = by
    dtype = onnx.helper.tensor_dtype_to_np_dtype(shape.elem_type)
    constant = onnx.numpy_helper.from_array(factor.astype(dtype), "factor_of_the_fault")
    model.graph.initializer.append(constant)
    model.graph.node.append(onnx.helper.make_node("Mul", ["as_it_was", constant.name], [output]))
    onnx.save(model, file)


def changed(path: Path, file: str, change: Callable[[dict[str, Any]], None]) -> None:
    arrays = load_file(path / file)
    change(arrays)
    save_file(arrays, path / file)


def sealed(path: Path) -> None:
    """Make the manifest agree with the files, golden data too."""
    attacks.reseal(path)
    data = (path / "golden.safetensors").read_bytes()
    told = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    attacks.edit_manifest(path, lambda content: content["golden"].update(told))


def weight(path: Path, name: str, value: float) -> None:
    """Set the first entry of a weight."""

    def change(arrays: dict[str, Any]) -> None:
        arrays[name] = arrays[name].copy()
        arrays[name].flat[0] = value

    changed(path, "weights.safetensors", change)


def claimed(path: Path) -> None:
    """The manifest says proven of an energy that is not convex."""

    def change(content: dict[str, Any]) -> None:
        nothing = dict.fromkeys(("node", "witness", "evidence", "min_weight", "strong_convexity", "lipschitz"))
        content["convexity"] = {**content["convexity"], **nothing, "verdict": "proven", "reason": "", "blame": []}

    attacks.edit_manifest(path, change)


def golden_off(path: Path) -> None:
    changed(path, "golden.safetensors", lambda arrays: arrays.update({"value.f": arrays["value.f"] + 1e-4}))


FAULTS = {
    "another weight than at the export": (
        "relu_package",
        lambda path: weight(path, "layers.0.W_y", 9.0),
        {"golden: value.f", "golden: argmin.y"},
    ),
    "golden data off by 1e-4": ("relu_package", golden_off, {"golden: value.f"}),
    "an argmin that is off": (
        "relu_package",
        lambda path: bent(path, "argmin", "y", 0.99),
        {"certificate"},
    ),
    "an energy that is not that of y": (
        "relu_package",
        lambda path: bent(path, "argmin", "energy", 1.0001),
        {"certificate", "golden: argmin.energy"},
    ),
    "theta_bar of one weight left out": (
        "relu_package",
        lambda path: bent(path, "adjoint", "theta_bar.layers.1.W_y", 0.0),
        {"adjoint: weights"},
    ),
    "x_bar too large by a tenth": ("relu_package", lambda path: bent(path, "adjoint", "x_bar", 1.1), {"adjoint: x"}),
    "a gradient off in one entry": (
        "relu_package",
        lambda path: bent(path, "value", "gradient", 1.01, 0),
        {"gradient", "golden: value.gradient"},
    ),
    "a proof that is none": ("nonconvex_package", claimed, {"convexity", "convexity proof"}),
    "a Hessian with one wrong column": ("smooth", lambda path: bent(path, "hessian", "hessian", 1.01, 0), {"hessian"}),
    "a head off by 1e-4": (
        "smooth",
        lambda path: bent(path, "hessian", "hessian", 1.0001),
        {"golden: hessian.hessian"},
    ),
    "ȳ of the pullback turned round": ("smooth", lambda path: bent(path, "pullback", "y_bar", -1.0), {"pullback: y"}),
    "x̄ of the pullback without an entry": (
        "smooth",
        lambda path: bent(path, "pullback", "x_bar", 0.0, 1),
        {"pullback: x"},
    ),
    "the adjoint over a polyhedron too large by a tenth": (
        "pieces",
        lambda path: bent(path, "adjoint_polyhedron", "b_bar", 1.1),
        {"polyhedron: adjoint"},
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_files_is_told(fault: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    fixture, make, told = FAULTS[fault]
    made = request.getfixturevalue("polyhedron_packages" if fixture in ("smooth", "pieces") else fixture)
    path = tmp_path / "faulty.icnn"
    shutil.copytree(made[fixture] if isinstance(made, dict) else made, path)
    make(path)
    sealed(path)
    report = verify(path, samples=24 if fixture == "relu_package" else 8)
    assert told <= set(report.failed), report.failed
    assert not report.passed


def test_what_the_hash_does_not_know_is_no_package(relu_package: Path, tmp_path: Path) -> None:
    path = tmp_path / "faulty.icnn"
    shutil.copytree(relu_package, path)
    weight(path, "layers.0.W_y", 9.0)
    with pytest.raises(PackageError, match=r"weights\.safetensors: its SHA-256"):
        verify(path)


def test_every_row_of_the_table_is_reached(
    digits_like_package: Path, polyhedron_packages: dict[str, Path], tmp_path: Path
) -> None:
    """A word that no package has would leave a check out, and nobody would know."""
    stages = [row.stage for row in CHECKS]
    assert len(set(stages)) == len(stages)
    words = {word for row in CHECKS for word in row.needs}
    roles = {"hvp", "hessian", "gradient_x", "pullback", "argmin", "argmin_polyhedron", "solve"}
    assert words == roles | {"files", "energy", "gradient", "golden", "bounds"}
    for path, least in ((digits_like_package, "status"), (polyhedron_packages["smooth"], "argmin over a polyhedron")):
        told: list[str] = []
        verify(path, samples=2, progress=told.append)
        assert told == ["hashes and structure", *(stage for stage in stages if stage in told)]
        assert least in told
