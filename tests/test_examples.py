"""The examples run to their end and reach what they say."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxscript")

EXAMPLES = Path(__file__).parents[1] / "examples"


def figures(name: str) -> Any:
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_quadratic_program_learns_sudoku() -> None:
    found = figures("sudoku")
    assert found["unsolved"] == 0
    assert found["largest_residual"] <= 1e-9
    assert found["solved_right"] >= 0.95


def test_a_controller_is_trained_and_tuned_through_its_program() -> None:
    cost = figures("model_predictive_control")["mean_cost"]
    assert cost["3 steps and V"] <= 1.1 * cost["30 steps"] < cost["3 steps, blind"]
    assert cost["weak plant: tuned on the device"] < cost["weak plant: 3 steps and V"]
