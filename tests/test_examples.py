"""The examples run to their end and reach what they say."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.slow  # each trains for half a minute or more

EXAMPLES = Path(__file__).parents[1] / "examples"


def figures(name: str) -> Any:
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_quadratic_program_learns_sudoku() -> None:
    """Of 12 seeds, the worst solved 0.998 of the test puzzles."""
    found = figures("sudoku")
    assert found["unsolved"] == 0
    assert found["largest_residual"] <= 1e-9
    assert found["solved_right"] >= 0.95


def test_a_controller_is_trained_and_tuned_through_its_program() -> None:
    """Of 30 seeds, V costs 1.04 times the slow controller in the mean, 1.25 at most. Of what the changed plant costs
    beyond that, tuning leaves a third at most for any seed: chance does not bring the mean of five to half."""
    times = figures("model_predictive_control")["times_the_slow_one"]
    seen = {name: np.array(of_seeds) for name, of_seeds in times.items()}
    untuned, tuned = (seen[f"weak plant: {name}"] - 1.0 for name in ("3 steps and V", "tuned on the device"))
    assert len(untuned) >= 5
    assert seen["3 steps and V"].mean() <= 1.25
    assert seen["3 steps, blind"].min() >= 10.0
    assert tuned.mean() <= 0.5 * untuned.mean()
