"""Networks that lost their convexity are repaired by clipping, and the report tells the truth about what it did."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import icnnrt
from icnnrt import cli
from icnnrt.repair import project


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, [str(a) for a in arguments], env={"COLUMNS": "200", "NO_COLOR": "1"})


def test_clipping_makes_it_convex_and_says_how_far_it_moves(nonconvex_package: Path, tmp_path: Path) -> None:
    out = tmp_path / "repaired.icnn"
    report = project(nonconvex_package, out)
    assert report.before.verdict == "violated"
    assert report.after.verdict == "proven"
    assert report.clipped
    old, new = icnnrt.Package.open(nonconvex_package), icnnrt.Package.open(out)
    assert new.manifest.convexity == report.after
    for name, weight in old.weights.items():
        expected = np.maximum(weight, 0) if name in report.clipped else weight
        np.testing.assert_array_equal(new.weights[name], expected)
        assert report.clipped.get(name, 0) == (int((weight < 0).sum()) if name in report.clipped else 0)
        assert new.manifest.weights.tensors[name].nonnegative or name not in report.clipped
    # The figures, measured once more by two sessions.
    rng = np.random.default_rng(0)
    x = rng.standard_normal((64, *old.manifest.x_shape)).astype(np.float32)
    y = rng.random((64, *old.manifest.y_shape)).astype(np.float32)
    with icnnrt.load(old) as before, icnnrt.load(new) as after:
        f, g = before.value(x, y).astype(float), after.value(x, y).astype(float)
        assert report.value_moved == pytest.approx(float((np.abs(g - f) / np.maximum(1, np.abs(f))).max()), rel=1e-5)
        assert report.value_moved > 0
        moved = np.abs(after.argmin(x).y - before.argmin(x).y)
        assert report.y_moved == pytest.approx(float(np.nanmax(moved)), rel=1e-3)
        assert not (after.argmin(x).status == icnnrt.Status.NOT_CONVEX).any()


def test_a_convex_package_is_left_as_it_is(digits_like_package: Path, tmp_path: Path) -> None:
    report = project(digits_like_package, tmp_path / "same.icnn")
    assert (report.before.verdict, report.after.verdict) == ("proven", "proven")
    assert not report.clipped
    assert (report.value_moved, report.y_moved) == (0.0, 0.0)


def test_the_command(nonconvex_package: Path, tmp_path: Path) -> None:
    out = tmp_path / "repaired.icnn"
    refused = invoke("repair", nonconvex_package, "--out", out)
    assert refused.exit_code == 1
    assert "pass --project" in refused.output
    done = invoke("repair", nonconvex_package, "--out", out, "--project", "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["after"]["verdict"] == "proven"
    assert sum(told["clipped"].values()) > 0
    again = invoke("repair", nonconvex_package, "--out", out, "--project")
    assert again.exit_code == 1
    assert "exists" in again.output
    assert "convexity: proven" in invoke("inspect", out).output
