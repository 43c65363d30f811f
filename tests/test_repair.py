"""Networks that lost their convexity are repaired by clipping, and the report tells the truth about what it did."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import seeds
from typer.testing import CliRunner

import icnnrt
from icnnrt.checking.repair import project
from icnnrt.cli.commands import app


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200", "NO_COLOR": "1"})


def test_clipping_makes_it_convex_and_says_how_far_it_moves(nonconvex_package: Path, tmp_path: Path) -> None:
    out = tmp_path / "repaired.icnn"
    report = project(nonconvex_package, out, seed=seeds.SHIFT)
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
    # The figures, measured once more by two sessions at the points of that seed.
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


def test_fine_tuning_keeps_what_was_clipped_nonnegative(tmp_path: Path) -> None:
    """Though train.onnx, made when nothing was known to need it, does not project."""
    torch = pytest.importorskip("torch")
    from exports import export

    from icnnrt_exporters import TrainSpec
    from icnnrt_models import FICNN, BundleEntropyArgmin

    generator = torch.Generator().manual_seed(0)
    energy = FICNN(2, 2, hidden=(4, 4), activation="softplus", dtype=torch.float64, generator=generator)
    with torch.no_grad():
        # Units that are nearly linear in what is concave: wherever f is looked at it is not convex.
        energy.get_parameter("layers.1.b").fill_(20.0)
        energy.get_parameter("layers.1.W_z.weight").fill_(0.01)[:, :2] = -3.0
    layer = BundleEntropyArgmin(energy, iterations=4, gap_tolerance=1.0)
    x, y = torch.rand(2, 4, 2, dtype=torch.float64, generator=generator)
    with pytest.warns(UserWarning, match="not convex in y"):
        export(energy, layer, x, y, tmp_path / "bad.icnn", nonnegative=(), train=TrainSpec(), allow_not_convex=True)
    report = project(tmp_path / "bad.icnn", tmp_path / "good.icnn")
    assert report.clipped
    rng = np.random.default_rng(0)
    x, away = rng.standard_normal((16, 2)), rng.uniform(-0.5, 0.5, (16, 2))
    least, most = [], []
    for sign in (1, -1):  # of the first two steps, which are opposite, one would make negative what is zero
        with icnnrt.load(tmp_path / "good.icnn") as session:
            answer = session.argmin(x).y
            target = answer + sign * away * np.minimum(answer, 1 - answer)
            tuner = icnnrt.FineTuner(session, learning_rate=1e-2)
            for _ in range(5):
                told = tuner.step(x, target)
                assert told.accepted, told.reason
                held = np.concatenate([session.weights[name].ravel() for name in report.clipped])
                least.append(held.min())
                most.append(held.max())
            tuner.write_package(tmp_path / "tuned.icnn", overwrite=True)
    assert min(least) == 0.0
    assert max(most) > 0.01
    found = icnnrt.Package.open(tmp_path / "tuned.icnn").manifest.convexity
    assert found is not None
    assert found.verdict == "proven"


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
    assert "is there already; pass --overwrite to replace it" in again.output
    assert "convexity: proven" in invoke("inspect", out).output
