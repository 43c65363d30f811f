"""Weights and moments of an optimiser that are denormal, which processors are slow at, are zero while they are used."""

import threading
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnxruntime")

import icnnrt
from icnnrt.format.checkpoints import History
from icnnrt.format.package import Package
from icnnrt.serving.weight_sets import without_denormals
from icnnrt.tuning.finetune import FineTuner

PACKAGE = Path(__file__).parent / "fixtures" / "version1" / "unit_box.icnn"
X, Y = np.linspace(-1, 1, 16).reshape(8, 2), np.full((8, 3), 0.4)


def denormal(array: np.ndarray) -> np.ndarray:
    return (array * 1e-39).astype(array.dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_what_is_denormal_becomes_zero_of_its_sign(dtype: type) -> None:
    least = np.finfo(dtype).smallest_normal
    below, tiny = np.nextafter(least, dtype(0)), np.finfo(dtype).smallest_subnormal
    given = np.array([0, -0.0, tiny, -tiny, below, -below, least, -least, 1, np.inf, -np.inf, np.nan], dtype)
    found = without_denormals(given)
    np.testing.assert_array_equal(found, [0, 0, 0, 0, 0, 0, least, -least, 1, np.inf, -np.inf, np.nan])
    np.testing.assert_array_equal(np.signbit(found[:6]), [False, True, False, True, False, True])
    assert found.dtype == dtype
    for kept in (given[[0, 1, 6, 8, 11]], np.zeros((0, 3), dtype), np.array(1, dtype), np.arange(3)):
        assert without_denormals(kept) is kept
    assert without_denormals(np.array(tiny)) == 0


def test_float16_is_kept_as_graphs_widen_it() -> None:
    half = np.array([6e-8, 1], np.float16)
    assert without_denormals(half) is half


def test_the_package_keeps_them_and_the_session_shows_zeros(tmp_path: Path) -> None:
    opened = Package.open(PACKAGE)
    weights = {name: denormal(a) if a.ndim == 2 else a for name, a in opened.weights.items()}
    assert any((a != 0).any() for name, a in weights.items() if a.ndim == 2)
    written = opened.save(tmp_path / "small.icnn", weights=weights)
    zeros = {name: np.copysign(0, a).astype(a.dtype) if a.ndim == 2 else a for name, a in weights.items()}
    session, updated = icnnrt.load(written), icnnrt.load(PACKAGE)
    updated.update_weights(weights)
    for one in (session, updated):
        for name, array in one.weights.items():
            np.testing.assert_array_equal(array, zeros[name])
            np.testing.assert_array_equal(np.signbit(array), np.signbit(weights[name]))
    for name, array in Package.open(tmp_path / "small.icnn").weights.items():
        np.testing.assert_array_equal(array, weights[name])
    plain = icnnrt.load(PACKAGE)
    plain.update_weights(zeros)
    np.testing.assert_array_equal(session.value(X, Y), plain.value(X, Y))
    np.testing.assert_array_equal(session.argmin(X).y, plain.argmin(X).y)


def test_threads_older_than_the_session_have_them_so_too_and_keep_their_arithmetic() -> None:
    """A setting of the processor would hold for the thread alone that makes the session, and for all that it does."""
    small = {name: denormal(a) if a.ndim == 2 else a for name, a in Package.open(PACKAGE).weights.items()}
    made, sessions, found = threading.Event(), [], {}

    def work(who: str) -> None:
        made.wait()
        kept = np.float32(1e-39) * np.ones(64, np.float32)
        found[who] = [(s.value(X, Y), s.argmin(X).y) for s in sessions], float(kept.min()), float(kept[0] + kept[1])

    older = threading.Thread(target=work, args=("older",), daemon=True)
    older.start()
    for weights in (small, {name: without_denormals(a) for name, a in small.items()}):
        sessions.append(icnnrt.load(PACKAGE))
        sessions[-1].update_weights(weights)
    made.set()
    older.join()
    work("its own")
    for who, ((denormals, zeros), *arithmetic) in found.items():
        for got, true in zip(denormals, zeros, strict=True):
            np.testing.assert_array_equal(got, true, err_msg=who)
        assert min(arithmetic) > 0, who
    assert len(found) == 2


def test_moments_that_have_decayed_are_zero(tmp_path: Path) -> None:
    tuner = FineTuner(icnnrt.load(PACKAGE))
    tuner.step(X, Y)
    state = {name: denormal(a) if name != "state.step" else a for name, a in tuner.state.items()}
    assert any(((a != 0) & (np.abs(a) < np.finfo(a.dtype).smallest_normal)).any() for a in state.values() if a.ndim)
    history = History(tmp_path / "h", tuner.session.manifest)
    history.save(1, tuner.session.weights, state, {})
    tuner.resume(tmp_path / "h")
    for name, array in tuner.state.items():
        assert name == "state.step" or not array.any()


def test_moments_of_weights_without_a_gradient_end_at_zero(tmp_path: Path) -> None:
    """They decay by 0.9 a step, and where nothing makes them 0 stick at the smallest denormal number for ever."""
    tuner = FineTuner(icnnrt.load(PACKAGE))
    moments = {name: np.full_like(a, 2e-38) if name != "state.step" else a for name, a in tuner.state.items()}
    History(tmp_path / "h", tuner.session.manifest).save(0, tuner.session.weights, moments, {})
    tuner.resume(tmp_path / "h")
    for _ in range(10):
        assert tuner.step(np.zeros_like(X), Y).accepted  # weights that x is multiplied by have no gradient
    moment = tuner.state["state.exp_avg"]
    assert not ((moment != 0) & (np.abs(moment) < np.finfo(np.float32).smallest_normal)).any()
    assert (moment == 0).any()
