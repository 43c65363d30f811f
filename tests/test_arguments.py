"""Numbers that users hand over: Python's, numpy's and arrays without axes are the same, and what is none is refused."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import icnnrt
from icnnrt.arguments import integer, number
from icnnrt.checking.recommend import recommend
from icnnrt.checking.repair import project
from icnnrt.checking.verify import verify
from icnnrt.errors import InputError
from icnnrt.format.fields import strict
from icnnrt.serving.quadratic_program import qp
from icnnrt.tuning.finetune import FineTuner
from icnnrt.tuning.reports import EpochReport, FitReport, StepReport

X, TARGET = np.linspace(-1, 1, 24).reshape(8, 3), np.full((8, 4), 0.4)


class Foreign:
    """A scalar of another library, as torch and jax have them."""

    def __init__(self, value: float) -> None:
        self.value = value

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return np.array(self.value, dtype)

    def __repr__(self) -> str:  # names tests, so the same in every process
        return f"Foreign({self.value})"


INTEGERS: list[Callable[[Any], object]] = [np.int64, np.uint8, np.array, lambda v: np.array(v, np.int16), Foreign]
NUMBERS: list[Callable[[Any], object]] = [*INTEGERS, np.float32, np.longdouble, lambda v: np.array(v, np.float16)]
NONE: list[Any] = [True, np.True_, "7", b"7", None, [7], np.array([7]), 7j, np.complex64(7), {}, math.nan, np.ma.masked]
# name -> what a call with it gives. Each is an argument of the public interface.
INTEGER_CALLS: dict[str, Callable[[Path, Path, Any], object]] = {
    "threads": lambda package, tmp, v: icnnrt.load(package, threads=v).argmin(X).y,
    "threads of qp": lambda package, tmp, v: qp(np.eye(2), np.ones(2), threads=v).z,
    "epochs": lambda package, tmp, v: len(FineTuner(icnnrt.load(package)).fit(X, TARGET, epochs=v).epochs),
    "batch_size": lambda package, tmp, v: loss(FineTuner(icnnrt.load(package)).fit(X, TARGET, epochs=1, batch_size=v)),
    "patience": lambda package, tmp, v: loss(
        FineTuner(icnnrt.load(package)).fit(X, TARGET, epochs=1, validation=(X, TARGET), patience=v)
    ),
    "seed": lambda package, tmp, v: loss(
        FineTuner(icnnrt.load(package)).fit(X, TARGET, epochs=1, batch_size=2, seed=v)
    ),
    "keep of fit": lambda package, tmp, v: kept(
        tmp, lambda: FineTuner(icnnrt.load(package)).fit(X, TARGET, epochs=3, history=tmp / "h", keep=v)
    ),
    "keep": lambda package, tmp, v: kept(tmp, lambda: FineTuner(icnnrt.load(package)).save(tmp / "h", keep=v)),
    "step": lambda package, tmp, v: resumed(package, tmp, v),
    "seed of prove_convexity": lambda package, tmp, v: icnnrt.load(package).prove_convexity(seed=v),
    "iterations": lambda package, tmp, v: icnnrt.load(package).argmin_polyhedron(X, iterations=v).y,
    "max_iterations": lambda package, tmp, v: recommend(icnnrt.load(package), X, 1e-2, max_iterations=v),
    "n": lambda package, tmp, v: icnnrt.QPSolver(v, v, v, batch=v).data.G.shape,
    "samples": lambda package, tmp, v: verify(package, samples=v).samples,
    "seed of verify": lambda package, tmp, v: verify(package, samples=2, seed=v).as_dict()["checks"][2],
    "seed of repair": lambda package, tmp, v: project(package, tmp / "r.icnn", seed=v, overwrite=True).as_dict(),
}
NUMBER_CALLS: dict[str, Callable[[Path, Path, Any], object]] = {
    "learning_rate": lambda package, tmp, v: FineTuner(icnnrt.load(package), learning_rate=v).learning_rate,
    "learning_rate of step": lambda package, tmp, v: stepped(package, v),
    "worse": lambda package, tmp, v: loss(
        FineTuner(icnnrt.load(package)).fit(X, TARGET, epochs=1, validation=(X, TARGET), worse=v)
    ),
    "mu": lambda package, tmp, v: icnnrt.load(package).argmin_polyhedron(X, mu=v).y,
    "tolerance": lambda package, tmp, v: icnnrt.load(package).argmin_polyhedron(X, tolerance=v).y,
    "gap": lambda package, tmp, v: recommend(icnnrt.load(package), X, v).iterations,
    "lower of qp": lambda package, tmp, v: qp(np.eye(2), -np.ones(2), upper=v).z,
    "lower of argmin_polyhedron": lambda package, tmp, v: icnnrt.load(package).argmin_polyhedron(X, lower=v).y,
}


def loss(report: FitReport) -> list[float]:
    return [epoch.loss for epoch in report.epochs]


def stepped(package: Path, rate: Any) -> float:
    tuner = FineTuner(icnnrt.load(package))
    tuner.step(X, TARGET, learning_rate=rate)
    return tuner.loss(X, TARGET)


def kept(tmp: Path, save: Callable[[], object]) -> int:
    save()
    count = len(list((tmp / "h").glob("step-*")))
    for file in (tmp / "h").iterdir():
        file.unlink()
    return count


def resumed(package: Path, tmp: Path, step: Any) -> int:
    tuner = FineTuner(icnnrt.load(package))
    tuner.step(X, TARGET)
    tuner.save(tmp / "h")
    return tuner.resume(tmp / "h", step=step).step


@pytest.mark.parametrize("call", INTEGER_CALLS)
def test_integers_of_numpy_and_without_axes_are_integers(call: str, train_package: Path, tmp_path: Path) -> None:
    def result(value: object) -> object:
        return INTEGER_CALLS[call](train_package, tmp_path, value)

    expected = result(1)
    for one in (np.int64(1), np.array(1)):
        np.testing.assert_equal(result(one), expected)
    for wrong in (True, 1.5, np.float64(1), "1", np.array([1])):
        with pytest.raises(InputError, match="expected"):
            result(wrong)


@pytest.mark.parametrize("call", NUMBER_CALLS)
def test_numbers_of_numpy_and_without_axes_are_numbers(call: str, train_package: Path, tmp_path: Path) -> None:
    def result(value: object) -> object:
        return NUMBER_CALLS[call](train_package, tmp_path, value)

    value = 0.25  # every float holds it
    expected = result(value)
    for one in (np.float32(value), np.array(value), np.array(value, np.float32)):
        np.testing.assert_equal(result(one), expected)
    for wrong in ("0.25", [[[0.25]]], 1j):
        with pytest.raises(InputError, match="expected"):
            result(wrong)


def test_a_sample_is_chosen_by_any_integer(train_package: Path) -> None:
    solution = icnnrt.load(train_package).argmin(X)
    for one in (3, np.int8(3), np.array(3)):
        np.testing.assert_array_equal(solution[one].y, solution.y[3:4])


@pytest.mark.parametrize("kind", INTEGERS)
def test_an_integer(kind: Callable[[Any], object]) -> None:
    found = integer(kind(7), "k", 1, 9)
    assert type(found) is int
    assert found == 7
    for low, high in ((8, None), (1, 6)):
        with pytest.raises(InputError, match=r"^k: expected an integer .*, but got "):
            integer(kind(7), "k", low, high)


@pytest.mark.parametrize("wrong", [*NONE, 7.0, np.float32(7), Foreign(7.0)], ids=str)
def test_no_integer(wrong: object) -> None:
    with pytest.raises(InputError, match=r"^k: expected an integer from 1 to 9, but got "):
        integer(wrong, "k", 1, 9)


@pytest.mark.parametrize("kind", NUMBERS)
def test_a_number(kind: Callable[[Any], object]) -> None:
    found = number(kind(3), "k", least=0)
    assert type(found) is float
    assert found == 3
    assert number(kind(0), "k", least=0) == 0
    for bound in ({"least": 4}, {"above": 3}):
        with pytest.raises(InputError, match=r"^k: expected a finite number (of at least 4|above 3), but got "):
            number(kind(3), "k", **bound)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [*NONE, math.inf, np.float32(np.nan), 10**400, Foreign(-1.0)], ids=str)
def test_no_number(wrong: object) -> None:
    with pytest.raises(InputError, match=r"^k: expected a finite number of at least 0, but got ") as caught:
        number(wrong, "k", least=0)
    assert len(str(caught.value)) < 160


def test_infinity_where_it_is_allowed_and_integers_of_any_length() -> None:
    assert number(math.inf, "k", above=0, finite=False) == math.inf
    assert number(-(10**400), "k", finite=False) == -math.inf
    with pytest.raises(InputError, match="expected an integer from 1 to 9, but got an int"):
        integer(10**9999, "k", 1, 9)


def test_reports_are_strict_json() -> None:
    step = StepReport(np.int64(1), np.True_, "", np.float32("nan"), math.inf, 4, 0, 0, np.float64(1), -math.inf, 0.5)  # type: ignore[arg-type]
    epoch = EpochReport(1, math.nan, None, 1, 0, np.array(0), 0, False, np.longdouble(2))  # type: ignore[arg-type]
    fit = FitReport([epoch], math.inf, None, "")
    for report in (step, epoch, fit):
        assert json.loads(json.dumps(report.as_dict(), allow_nan=False)) == report.as_dict()
    assert step.as_dict()["loss"] is step.as_dict()["gradient_norm"] is None
    assert step.as_dict()["accepted"] is True
    assert fit.as_dict()["epochs"][0] == epoch.as_dict()
    assert epoch.as_dict()["seconds"] == 2.0


def test_a_fit_that_meets_nan_is_strict_json(train_package: Path) -> None:
    tuner = FineTuner(icnnrt.load(train_package))
    fitted = tuner.fit(X, TARGET, epochs=1, learning_rate=1e300, validation=(X, TARGET))
    assert not fitted.epochs[0].accepted
    json.dumps(fitted.as_dict(), allow_nan=False)
    json.dumps(tuner.step(np.full_like(X, 1e200), TARGET).as_dict(), allow_nan=False)


def test_strict() -> None:
    found = strict({1: (np.arange(2), np.float32(0.5), np.nan), "p": Path("a")})
    assert found == {"1": [[0, 1], 0.5, None], "p": "a"}
