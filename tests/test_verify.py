"""Good packages pass every check of `icnnrt.checking.verify`; each kind of damage is told by the check that is there
for it."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import icnnrt
from icnnrt import native_library
from icnnrt.checking import golden
from icnnrt.checking.answers import adjoint_by_weights
from icnnrt.checking.report import Check, VerifyReport, worst
from icnnrt.checking.trial import Trial
from icnnrt.checking.verify import verify
from icnnrt.errors import InputError, PackageError
from icnnrt.serving.energy_session import EnergySession

pytest.importorskip("onnxruntime")

NAMES = [
    "package",
    "signs",
    "gradient",
    "convexity proof",
    "convexity",
    "golden: value.f",
    "golden: value.gradient",
    "golden: argmin.y",
    "golden: argmin.energy",
    "golden: argmin.gap",
    "golden: argmin.x_bar",
    "argmin: y",
    "argmin: energy",
    "certificate",
    "lower bound",
    "kernels",
    "adjoint: x",
    "adjoint: weights",
    "status",
]


def found(report: VerifyReport) -> dict[str, Check]:
    return {check.name: check for check in report.checks}


def failed(report: VerifyReport) -> set[str]:
    return {check.name for check in report.checks if check.verdict == "fail"}


@pytest.mark.parametrize("fixture", ["digits_like_package", "relu_package"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_good_packages_pass_every_check(fixture: str, seed: int, request: pytest.FixtureRequest) -> None:
    report = verify(request.getfixturevalue(fixture), seed=seed, samples=32)
    assert report.passed
    assert [check.name for check in report.checks] == NAMES
    verdicts = {check.name: check.verdict for check in report.checks}
    assert verdicts.pop("kernels") == ("skipped" if native_library.build().library is None else "pass")
    assert set(verdicts.values()) == {"pass"}
    assert report.status == {"CONVERGED": 32}
    assert report.source == "random"


def test_figures_are_small_not_only_within_their_bounds(relu_package: Path) -> None:
    checks_of = found(verify(relu_package, samples=32))
    for name, small in {"argmin: y": 1e-9, "certificate": 1e-13, "adjoint: x": 1e-7, "adjoint: weights": 1e-6}.items():
        figure = checks_of[name].figure
        assert figure is not None
        assert figure < small


def test_a_negative_weight_between_hidden_layers_is_found(nonconvex_package: Path) -> None:
    report = verify(nonconvex_package)
    assert not report.passed
    assert {"convexity", "status"} <= failed(report)
    # Its gradient is right all the same, and so are the adjoints of the samples that have one.
    assert not failed(report) & {"gradient", "adjoint: x", "adjoint: weights", "certificate"}
    assert "NOT_CONVEX" in found(report)["status"].detail
    assert found(report)["signs"].verdict == "skipped"


def test_data_is_used_and_its_bad_rows_left_out(digits_like_package: Path) -> None:
    x = np.random.default_rng(0).standard_normal((20, 4))
    x[3] = np.nan
    report = verify(digits_like_package, x, samples=64)
    assert (report.samples, report.source, report.passed) == (19, "data", True)
    assert verify(digits_like_package, x, samples=5).samples == 5


def test_one_sample_is_enough(digits_like_package: Path) -> None:
    assert verify(digits_like_package, samples=1).passed


def test_equal_seeds_give_equal_figures_and_json(relu_package: Path) -> None:
    first, second = verify(relu_package, seed=3, samples=8), verify(relu_package, seed=3, samples=8)
    assert first == second
    assert json.loads(json.dumps(first.as_dict(), allow_nan=False))["passed"] is True


def test_stages_are_reported(relu_package: Path) -> None:
    stages: list[str] = []
    verify(relu_package, samples=2, progress=stages.append)
    assert stages[0] == "hashes and structure"
    assert "convexity" in stages


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"samples": 0}, "samples: expected an integer from 1"),
        ({"samples": True}, "samples: expected"),
        ({"seed": -1}, "seed: expected"),
        ({"x": np.zeros((3, 7))}, r"x: expected shape \[B, 4\]"),
        ({"x": np.full((3, 4), np.nan)}, "x: expected at least one sample"),
    ],
)
def test_bad_arguments(digits_like_package: Path, keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        verify(digits_like_package, **keywords)


def test_a_tampered_package_is_an_error(tmp_path: Path, relu_package: Path) -> None:
    copy = tmp_path / "copy.icnn"
    copy.mkdir()
    for file in relu_package.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (copy / "value.onnx").write_bytes((copy / "value.onnx").read_bytes()[::-1])
    with pytest.raises(PackageError, match=r"value\.onnx: its SHA-256"):
        verify(copy)


# --- Every check finds the fault it is there for --------------------------------------------------


def tamper_value(monkeypatch: pytest.MonkeyPatch, change: Callable[..., Any]) -> None:
    plain = EnergySession.value_and_gradient
    monkeypatch.setattr(EnergySession, "value_and_gradient", lambda self, x, y: change(y, *plain(self, x, y)))


def tamper_argmin(monkeypatch: pytest.MonkeyPatch, change: Callable[..., Any]) -> None:
    plain = EnergySession.argmin
    monkeypatch.setattr(EnergySession, "argmin", lambda self, x, **keywords: change(plain(self, x, **keywords)))


@pytest.mark.parametrize("fixture", ["digits_like_package", "relu_package"])
def test_a_wrong_gradient_is_found(
    fixture: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = request.getfixturevalue(fixture)
    tamper_value(monkeypatch, lambda y, f, g: (f, (g * 1.2).astype(g.dtype)))
    assert "gradient" in failed(verify(package, samples=16))


def test_a_concave_energy_is_found_though_its_gradient_is_right(
    digits_like_package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def concave(y: Any, f: Any, g: Any) -> Any:
        return f - ((y - 0.5) ** 2).sum(1), g - 2 * (y - 0.5)

    tamper_value(monkeypatch, concave)
    report = verify(digits_like_package, samples=16)
    assert "convexity" in failed(report)
    assert "gradient" not in failed(report)


def test_one_direction_of_negative_curvature_among_many_of_positive_is_found(
    relu_package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    v = np.array([1.0, -1.0, 1.0, -1.0]) / 2

    def saddle(y: Any, f: Any, g: Any) -> Any:
        c = y - 0.5
        along = c @ v
        return f + (c**2).sum(1) - 1.05 * along**2, g + 2 * c - 2.1 * along[:, None] * v

    tamper_value(monkeypatch, saddle)
    assert "convexity" in failed(verify(relu_package, samples=8))


def test_an_energy_of_nan_is_not_passed(relu_package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tamper_value(monkeypatch, lambda y, f, g: (np.full_like(f, np.nan), g))
    assert {"gradient", "convexity", "certificate"} <= failed(verify(relu_package, samples=4))


def test_a_package_without_any_finite_answer_fails_by_its_status(
    relu_package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(s: icnnrt.Solution) -> icnnrt.Solution:
        return dataclasses.replace(s, energy=np.full(len(s), np.nan), status=np.full(len(s), 5, np.int8))

    tamper_argmin(monkeypatch, nothing)
    report = verify(relu_package, samples=4)
    assert failed(report) == {"status", "golden: argmin.energy", "golden: argmin.x_bar"}
    assert {check.verdict for check in report.checks[11:18]} == {"skipped"}


def test_a_wrong_answer_is_found(digits_like_package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tamper_argmin(monkeypatch, lambda s: dataclasses.replace(s, y=1 - s.y))
    assert {"argmin: y", "certificate"} <= failed(verify(digits_like_package, samples=8))


def test_an_embellished_certificate_is_found(digits_like_package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tamper_argmin(monkeypatch, lambda s: dataclasses.replace(s, gap=s.gap - 0.01))
    # And samples whose gap rounding cannot explain have no gradient, where the export had one.
    assert failed(verify(digits_like_package, samples=8)) == {"certificate", "golden: argmin.x_bar"}


def test_a_lower_bound_above_energies_is_found(digits_like_package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tamper_argmin(monkeypatch, lambda s: dataclasses.replace(s, lower_bound=s.lower_bound + 0.1))
    assert "lower bound" in failed(verify(digits_like_package, samples=8))


@pytest.mark.parametrize("fixture", ["digits_like_package", "relu_package"])
def test_wrong_adjoints_are_found(
    fixture: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = request.getfixturevalue(fixture)
    plain = EnergySession.vjp

    def half(self: EnergySession, *arguments: Any, **keywords: Any) -> Any:
        c = plain(self, *arguments, **keywords)
        return dataclasses.replace(c, x=c.x / 2, weights={name: -a for name, a in c.weights.items()})

    monkeypatch.setattr(EnergySession, "vjp", half)
    # In float32 two machines' cotangents may differ by more than would tell a half from the whole.
    assert failed(verify(package, samples=32)) - {"golden: argmin.x_bar"} == {"adjoint: x", "adjoint: weights"}


def test_an_adjoint_of_zeros_is_found(digits_like_package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = EnergySession.vjp

    def nothing(self: EnergySession, *arguments: Any, **keywords: Any) -> Any:
        c = plain(self, *arguments, **keywords)
        return dataclasses.replace(c, x=np.zeros_like(c.x), weights={k: np.zeros_like(a) for k, a in c.weights.items()})

    monkeypatch.setattr(EnergySession, "vjp", nothing)
    assert failed(verify(digits_like_package, samples=32)) == {"adjoint: x", "adjoint: weights"}


def test_weights_that_cannot_be_changed_are_skipped_with_the_reason(
    relu_package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: EnergySession, new: Any) -> None:
        raise InputError("weights: 'b' was exported as a constant; export it as an overridable weight.")

    monkeypatch.setattr(EnergySession, "update_weights", refuse)
    check = found(verify(relu_package, samples=4))["adjoint: weights"]
    assert check.verdict == "skipped"
    assert "exported as a constant" in check.detail


def test_so_are_those_of_a_package_with_a_pullback(
    polyhedron_packages: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: EnergySession, new: Any) -> None:
        raise InputError("weights: 'b' was exported as a constant; export it as an overridable weight.")

    monkeypatch.setattr(EnergySession, "update_weights", refuse)
    check = found(verify(polyhedron_packages["pieces"], samples=2))["pullback: weights"]
    assert check.verdict == "skipped"
    assert "exported as a constant" in check.detail


@pytest.mark.parametrize("fault", [None, RuntimeError("while solving")])
def test_the_weights_are_put_back(relu_package: Path, monkeypatch: pytest.MonkeyPatch, fault: Exception | None) -> None:
    with icnnrt.load(relu_package) as session:
        x = np.random.default_rng(0).standard_normal((4, 3))
        before = {name: session.weights[name] for name in session.weights}
        trial = Trial(icnnrt.Package.open(relu_package), session, x, np.random.default_rng(0))
        solution = trial.problem.answer
        if fault is None:
            assert [check.verdict for check in adjoint_by_weights(trial)] == ["pass"]
        else:

            def fail(self: EnergySession, x: Any, **bounds: Any) -> Any:
                raise fault

            with monkeypatch.context() as patch:
                patch.setattr(EnergySession, "argmin", fail)
                with pytest.raises(RuntimeError, match="while solving"):
                    next(adjoint_by_weights(trial))
        for name, array in before.items():
            np.testing.assert_array_equal(session.weights[name], array)
        np.testing.assert_array_equal(session.argmin(x).y, solution.y)


def test_the_worst_sample_is_judged_by_its_own_bound() -> None:
    judged = worst("a", np.array([1.0, 5.0]), np.array([0.5, 100.0]), "")
    assert (judged.figure, judged.bound, judged.verdict) == (1.0, 0.5, "fail")
    assert worst("a", np.array([0.0, np.nan]), np.ones(2), "").verdict == "fail"
    assert worst("a", np.zeros(2), np.zeros(2), "").verdict == "pass"
    assert worst("a", np.zeros(0), np.zeros(0), "").verdict == "skipped"


def test_golden_data_that_lacks_something_or_is_infinite_is_told(digits_like_package: Path) -> None:
    opened = icnnrt.Package.open(digits_like_package)
    good = dict(opened.golden)
    with icnnrt.load(opened) as session:
        assert all(difference <= bound for _, difference, bound in golden.replay(session, good))
        with pytest.raises(icnnrt.InputError, match=r"'argmin\.gap', but got none of that name"):
            golden.replay(session, {name: a for name, a in good.items() if name != "argmin.gap"})
        with pytest.raises(icnnrt.InputError, match=r"as many samples of 'argmin\.gap' as of 'x'"):
            golden.replay(session, {**good, "argmin.gap": good["argmin.gap"][:1]})
        bent = {**good, "value.f": np.full_like(good["value.f"], np.inf)}
        assert [found.output for found in golden.replay(session, bent) if not found.difference <= found.bound] == [
            "value.f"
        ]


def test_a_package_without_golden_data_and_verdict_loads_and_verifies(
    digits_like_package: Path, tmp_path: Path
) -> None:
    opened = icnnrt.Package.open(digits_like_package)
    weights = {name: a.copy() for name, a in opened.weights.items()}
    bare = opened.save(tmp_path / "bare.icnn", weights=weights)
    assert (bare.manifest.golden, bare.manifest.convexity) == (None, None)
    report = verify(bare.path, samples=4)
    assert report.passed
    assert not [check.name for check in report.checks if check.name.startswith("golden")]
