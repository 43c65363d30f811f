"""The package in models/digits_completion is what its card says."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import icnnrt
from icnnrt.verify import verify
from icnnrt_models import digits

HERE = Path(__file__).parents[1] / "models" / "digits_completion"
PACKAGE = HERE / "digits_completion.icnn"


@pytest.fixture(scope="module")
def split() -> digits.Split:
    return digits.load()


def test_it_completes_digits_better_than_ridge_regression(split: digits.Split) -> None:
    metrics = json.loads((HERE / "metrics.json").read_text())
    solution = icnnrt.load(PACKAGE).argmin(split.test.x)
    error = digits.mse(solution.y, split.test.y)
    baselines = digits.baselines(split)
    assert error < baselines["ridge regression"] < baselines["mean image"]
    assert error == pytest.approx(metrics["test_mse"], rel=1e-3)
    assert baselines == pytest.approx(metrics["baselines"], rel=1e-3)
    assert solution.ok.all()
    assert solution.gap.max() == pytest.approx(metrics["gap_max"], rel=0.2)


@pytest.mark.parametrize("seed", [0, 1])
def test_it_passes_its_own_verification(seed: int) -> None:
    report = verify(PACKAGE, seed=seed)
    assert report.passed, report


def test_the_card_states_the_measured_figures() -> None:
    metrics = json.loads((HERE / "metrics.json").read_text())
    card = (HERE / "README.md").read_text()
    for figure in (metrics["test_mse"], *metrics["baselines"].values()):
        assert f"{figure:.4f}" in card


def test_it_runs_without_torch(split: digits.Split, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", split.test.x[:7])
    program = (
        "import sys, numpy, icnnrt\n"
        "session = icnnrt.load(sys.argv[1])\n"
        "solution = session.argmin(numpy.load(sys.argv[2]))\n"
        "session.vjp(solution, numpy.ones_like(solution.y))\n"
        "assert solution.ok.all() and solution.y.shape == (7, 32)\n"
        "assert not {'torch', 'onnx', 'icnnrt_models', 'icnnrt_exporters'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(PACKAGE), str(tmp_path / "x.npy")], check=True)


def test_the_exact_adjoint_points_downhill(split: digits.Split) -> None:
    """One gradient step on the weights, taken without torch, lowers the loss it was made for."""
    x, true = split.test.x[:64], split.test.y[:64]
    with icnnrt.load(PACKAGE) as session:
        solution = session.argmin(x)
        before = digits.mse(solution.y, true)
        cotangents = session.vjp(solution, 2 * (solution.y - true) / true.size)
        trained = {name: w for name, w in session.weights.items() if name in cotangents.weights}
        norm = np.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in cotangents.weights.values()))
        step = {name: (w - 1e-2 / norm * cotangents.weights[name]).astype(w.dtype) for name, w in trained.items()}
        session._update_weights(step)
        after = digits.mse(session.argmin(x).y, true)
        predicted = 1e-2 * norm
    assert after < before
    assert before - after == pytest.approx(predicted, rel=0.3)
