"""`python -m benchmarks` runs to its end, and measures what it says it does. Times themselves are never judged."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import icnnrt
from icnnrt.format.package import Package
from icnnrt.programs import Coo, Program, write_program

pytest.importorskip("torch")
pytest.importorskip("onnxscript")
pytest.importorskip("typer")

ROOT = Path(__file__).parents[1]
DIGITS = ROOT / "models" / "digits_completion" / "digits_completion.icnn"
# Of the answers, which all contenders compute in float64; clarabel stops at 1e-8 of the objective.
ANSWER_TOLERANCE = 1e-9
CONIC_VALUE_TOLERANCE = 1e-6


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import a file of benchmarks/, which lies in no package that is installed."""
    monkeypatch.syspath_prepend(str(ROOT))

    def load(name: str) -> ModuleType:
        return importlib.import_module(f"benchmarks.{name}")

    return load


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def check_row(row: dict[str, Any]) -> None:
    for name, entry in row["contenders"].items():
        if entry["missing"] is not None:
            assert entry["missing"].strip(), name
            assert entry["seconds"] is entry["ratio"] is entry["rounds"] is None
        else:
            assert entry["seconds"] > 0, name
            assert entry["rounds"] >= 1, name
            assert entry["ratio"] > 0, name
    assert row["contenders"][row["base"]]["ratio"] == 1.0
    assert row["contenders"][row["base"]]["missing"] is None
    for target in row["targets"]:
        assert {"what", "limit", "at_least", "value", "met", "note"} == target.keys()
        assert (target["met"] is None) == (target["value"] is None)
        assert target["value"] is not None or target["note"]


@pytest.mark.slow
def test_a_quick_run_measures_every_part(tmp_path):
    pytest.importorskip("matplotlib")
    done = run("--quick", "--json", str(tmp_path / "found.json"), "--plot", str(tmp_path / "scaling.png"))
    assert done.returncode == 0, done.stderr
    assert "portable body" in done.stdout
    assert "torch.compile" in done.stdout  # missing, and why
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert found["format"] == 1
    assert {"cpu", "cores", "versions", "native", "date", "commit"} <= found["environment"].keys()
    for part in ("inner", "adjoint", "argmin"):
        assert found[part], part
        for row in found[part]:
            check_row(row)
    for row in (*found["inner"], *found["adjoint"]):
        assert row["dtype"] == "float64"
        for name in ("native", "portable body", "torch eager"):
            if row["contenders"][name]["missing"] is None:
                assert row["contenders"][name]["difference"] <= ANSWER_TOLERANCE
        assert row["contenders"]["numpy reference"]["missing"] is None
    assert {row["start"] for row in found["inner"]} == {"cold", "warm"}
    assert {row["batch"] for row in found["inner"]} == {1, 128}
    assert any(row["targets"] for row in found["inner"])
    for row in found["inner"]:
        assert row["contenders"]["cvxpy + Clarabel"]["missing"] is not None or (
            row["conic"]["value_difference"] <= CONIC_VALUE_TOLERANCE
        )
    for row in found["argmin"]:
        for name in ("loop", "K calls", "without solver", "portable", "session portable"):
            assert row["contenders"][name]["missing"] is None
        assert row["solved_portable"] <= row["batch"]
    assert [row["batch"] for row in found["tune"]] == [1, 32]
    for row in found["tune"]:
        check_row(row)
        for name in ("argmin", "step", "torch eager"):
            assert row["contenders"][name]["missing"] is None
        # All of them take the same step.
        assert row["first_loss_portable"] == pytest.approx(row["first_loss_torch"], rel=1e-3)
        assert row.get("first_loss_native", row["first_loss_torch"]) == pytest.approx(row["first_loss_torch"], rel=1e-3)
    assert [row["batch"] for row in found["heads"]] == [1, 128]
    for row in found["heads"]:
        check_row(row)
        for name in ("bound", "bound value", "gradient", "value", "torch eager"):
            assert row["contenders"][name]["missing"] is None
        assert row["difference"] <= 1e-5
    (row,) = found["polyhedron"]
    check_row(row)
    assert row["energy_session"] == pytest.approx(row["energy_python"], abs=1e-8)
    for name in ("session", "python", "vjp", "python vjp", "portable"):
        assert row["contenders"][name]["missing"] is None
    assert found["scaling"]["series"].keys() == {"k", "n", "batch"}
    for series in found["scaling"]["series"].values():
        assert all(point["seconds_per_step"] is not None for point in series["points"])
    assert len(found["scaling"]["targets"]) == 3
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")


def test_json_on_stdout_is_all_there_is():
    done = run("argmin", "--quick", "--batch", "1", "--json", "-")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found["argmin"]) == 1
    assert "inner" not in found


def test_solvers_of_quadratic_programs_and_a_folder_of_files(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("one", "two"):
        F, G = rng.standard_normal((2, 4, 4))
        square, rows = (Coo(*np.nonzero(M), M[np.nonzero(M)], M.shape) for M in (F @ F.T, G))
        none, bounds = Coo(*np.zeros((2, 0), np.int64), np.zeros(0), (0, 4)), np.ones(4)
        program = Program(
            square, rng.standard_normal(4), rows, bounds, none, np.zeros(0), -bounds, bounds, 0.0, list("abcd")
        )
        write_program(tmp_path / f"{name}.mps", program)
    done = run("solve", "--quick", "--json", str(tmp_path / "found.json"), "--programs", str(tmp_path))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    (row,) = found["solve"]
    check_row(row)
    assert max(row["differences"].values()) < 1e-6
    assert found["programs"]["programs"].keys() == {"one", "two"}
    ours = found["programs"]["solvers"]["icnnrt"]
    assert set(ours["solved"].values()) == {2}
    assert "2 programs" in done.stdout


@pytest.mark.parametrize(
    "arguments", [["inner", "--plot", "x.png"], ["nonsense"], ["inner", "--json", "no/such/folder/x.json"]]
)
def test_wrong_usage(arguments):
    done = run(*arguments)
    assert done.returncode == 2
    assert not done.stdout


def test_every_target_is_measured(module):
    """A target that no row has would never be missed."""
    targets, shapes = module("targets"), set(module("inner").SHAPES)
    batches, networks = (1, 128), module("networks").NETWORKS  # the default of --batch
    assert shapes == {(n, k) for n, ks in ((10, (5, 30)), (159, (10, 30)), (2048, (10, 30))) for k in ks}
    assert set(targets.INNER) <= {(n, k, batch) for n, k in shapes for batch in batches}
    assert set(targets.ARGMIN) <= {(network.n, batch) for network in networks for batch in batches}
    assert {network.n: (network.hidden, network.K) for network in networks} == {
        24: ((64, 64), 10), 159: ((600, 600), 10), 2048: ((200, 200), 30)
    }  # fmt: skip
    assert set(targets.STEP) | set(targets.STEP_OF_TORCH) <= set(module("tune").BATCHES)
    assert set(targets.GRADIENT_OF_TORCH) | set(targets.BOTH_OF_VALUE) <= set(module("heads").BATCHES)
    assert set(targets.EXPONENTS) == set(module("scaling").SERIES)


def test_the_loop_floor_makes_K_evaluations(module):
    package = Package.open(DIGITS)
    K = package.manifest.solver.iterations
    x, y = np.random.default_rng(0).random((2, 3, 32)).astype(np.float32)
    weights = ort_values(package)
    floor = module("graphs").Bound(
        module("floors").loop_floor(package.graphs["argmin"]), {"x": x, "y_init": y}, threads=1, weights=weights
    )
    floor()
    session, values = icnnrt.load(package), []
    for _ in range(K):
        f, gradient = session.value_and_gradient(x, y)
        values.append(f)
        y = np.clip(gradient, 0, 1)
    np.testing.assert_allclose(floor.outputs["floor/f"], values, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(floor.outputs["floor/y"], y, atol=1e-4)


def test_argmin_without_its_solver_keeps_its_shapes(module):
    package = Package.open(DIGITS)
    x, y = np.random.default_rng(0).random((2, 3, 32)).astype(np.float32)
    graph = module("floors").unsolved(package.graphs["argmin"])
    outputs = module("graphs").Bound(graph, {"x": x, "y_init": y}, threads=1, weights=ort_values(package)).outputs
    solution = icnnrt.load(package).argmin(x, y_init=y)
    for name in ("y", "lam", "slopes", "offsets", "cut_points", "lam_history", "energy", "gap", "residual"):
        assert outputs[name].shape == getattr(solution, name).shape
        assert outputs[name].dtype == getattr(solution, name).dtype
    np.testing.assert_array_equal(outputs["slopes"][:, 0], solution.slopes[:, 0])


def ort_values(package: Package) -> dict[str, Any]:
    import onnxruntime

    return {name: onnxruntime.OrtValue.ortvalue_from_numpy(np.array(a)) for name, a in package.weights.items()}


def test_contenders_take_turns(module):
    interleaved = module("interleaved")
    called: list[str] = []

    def broken() -> None:
        raise ValueError("no\nluck")

    outcome = interleaved.race(
        {
            "a": interleaved.Contender(lambda: called.append("a")),
            "b": interleaved.Contender(lambda: called.append("b"), scale=100.0),
            "c": interleaved.Contender(broken),
            "d": interleaved.Missing("why"),
        },
        budget=0.05,
        rounds=5,
    )
    assert outcome["c"] == interleaved.Missing("ValueError: no")
    assert outcome["d"] == interleaved.Missing("why")
    a, b = outcome["a"], outcome["b"]
    assert a.samples.keys() == b.samples.keys() == set(range(5))
    turns = "".join(name for i, name in enumerate(called) if i == 0 or called[i - 1] != name)
    assert turns.count("a") >= 3
    assert turns.count("b") >= 3


def test_ratios_compare_within_rounds(module):
    interleaved = module("interleaved")
    base = interleaved.Timing({0: 1.0, 1: 10.0, 2: 2.0, 3: 50.0})
    twice = interleaved.Timing({0: 2.0, 1: 20.0, 2: 4.0})
    assert interleaved.ratio(twice, base) == 2.0
    once = interleaved.Timing({-1: 12.0})
    assert interleaved.ratio(once, base) == 2.0


def test_the_fitted_exponent(module):
    sizes = [1, 2, 4, 8, 16, 32]
    fitted = module("scaling").fit(sizes, [3e-6 * size**1.5 for size in sizes])
    assert fitted["exponent"] == pytest.approx(1.5)
    assert fitted["exponent_upper_half"] == pytest.approx(1.5)
    assert module("scaling").fit([1, 2], [None, 1.0]) == {"exponent": None, "exponent_upper_half": None}


@pytest.mark.parametrize("start", ["cold", "warm"])
def test_the_cuts_have_the_sizes_asked_for(module, start):
    made = module("cuts").cuts(start, 5, 10, 20, "float32")
    assert made.slopes.shape == (20, 5, 10)
    assert made.offsets.shape == (20, 5)
    assert made.lam_start.shape == (20, 4 if start == "warm" else 0)
    assert {a.dtype for a in made} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(made.slopes[0], made.slopes[8])  # eight distinct samples, repeated
    assert min(module("cuts").steps_taken(made)) >= 1
