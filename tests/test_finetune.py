"""FineTuner: steps that help are taken, steps that would harm are not, and what is saved comes back to the bit."""

import dataclasses
import errno
import hashlib
import json
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors import numpy as safetensors_numpy

import icnnrt
from icnnrt.checking.verify import verify
from icnnrt.errors import IcnnrtError, InputError, PackageError
from icnnrt.format import files
from icnnrt.format.checkpoints import HISTORY_FILE, MAX_BYTES, History
from icnnrt.tuning.finetune import FineTuner
from icnnrt.tuning.reports import EpochReport, FitReport, StepReport

pytest.importorskip("onnxruntime")

X_DIM, N = 3, 4
Arrays = dict[str, NDArray[Any]]


@pytest.fixture(scope="session")
def classes_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """float32, x [3] to y [4], a FICNN of softplus units, tuned by SGD with momentum; targets are classes."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("onnxscript")
    from exports import export

    from icnnrt_exporters import SGD, TrainSpec
    from icnnrt_models import FICNN, BundleEntropyArgmin

    def right_class(y: Any, target: Any) -> Any:
        return torch.nn.functional.cross_entropy(4 * y, target)

    generator = torch.Generator().manual_seed(0)
    energy = FICNN(X_DIM, N, hidden=(6, 6), generator=generator)
    x, y = torch.randn(4, X_DIM, generator=generator), torch.rand(4, N, generator=generator)
    path = tmp_path_factory.mktemp("packages") / "classes.icnn"
    spec = TrainSpec(right_class, SGD(momentum=0.9), target_example=torch.arange(4))
    export(energy, BundleEntropyArgmin(energy, iterations=6), x, y, path, train=spec)
    return path


class Samples:
    """Data that a small network can learn: y is a smooth function of x."""

    def __init__(self, count: int = 48, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.x = rng.standard_normal((count, X_DIM))
        self.y = 1 / (1 + np.exp(-self.x @ np.random.default_rng(9).standard_normal((X_DIM, N))))
        self.classes = self.y.argmax(1)


@pytest.fixture
def samples() -> Samples:
    return Samples()


@pytest.fixture
def session(train_package: Path) -> Iterator[icnnrt.Session]:
    with icnnrt.load(train_package) as opened:
        yield opened


@pytest.fixture
def tuner(session: icnnrt.Session) -> FineTuner:
    return FineTuner(session, learning_rate=0.01)


def all_of(tuner: FineTuner) -> Arrays:
    return {**tuner.session.weights, **tuner.state}


def same(a: Mapping[str, NDArray[Any]], b: Mapping[str, NDArray[Any]]) -> bool:
    """To the bit."""
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and a[name].shape == b[name].shape and a[name].tobytes() == b[name].tobytes()
        for name in a
    )


def one_sentence(error: BaseException) -> None:
    text = str(error)
    assert "\n" not in text
    assert text.endswith(".")
    assert ". " not in text


def check_convex(session: icnnrt.Session, seed: int = 0, segments: int = 200) -> None:
    """Exactly on the weights, and along random segments of the box: f of the middle is below the mean of the ends."""
    for name, spec in session.manifest.weights.tensors.items():
        if spec.nonnegative:
            assert (session.weights[name] >= 0).all(), name
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((segments, *session.manifest.x_shape))
    a, b = rng.random((2, segments, session.manifest.y_shape[0]))
    t = rng.random((segments, 1))
    f_a, f_b, f_t = (session.value_and_gradient(x, y)[0].astype(float) for y in (a, b, (1 - t) * a + t * b))
    above = f_t - ((1 - t[:, 0]) * f_a + t[:, 0] * f_b)
    assert (above <= 64 * np.finfo(session.dtype).eps * np.maximum(1, np.abs(f_t))).all()


# --- Steps -----------------------------------------------------------------------------------------


def test_a_step_moves_the_weights_that_the_session_uses(tuner: FineTuner, samples: Samples) -> None:
    before, graphs = tuner.session.weights, dict(tuner.session.runner._graphs._made)
    weights_id, y = tuner.session.weights_id, tuner.session.argmin(samples.x).y
    report = tuner.step(samples.x, samples.y)
    assert isinstance(report, StepReport)
    assert (report.step, report.accepted, report.reason) == (1, True, "")
    assert (report.samples, report.skipped, report.unsafe) == (len(samples.x), 0, 0)
    assert report.loss == pytest.approx(float(np.square(y - samples.y).mean()), rel=1e-9)
    assert 0 < report.gradient_norm < np.inf
    assert 0 <= report.gap_median <= report.gap_max or report.gap_max > -1e-12
    json.dumps(report.as_dict())
    assert tuner.session.weights_id != weights_id
    assert not np.array_equal(tuner.session.argmin(samples.x).y, y)
    assert all(tuner.session.runner._graphs.find(role) is graph for role, graph in graphs.items())  # no session anew
    assert tuner.steps == 1
    assert tuner.loss(samples.x, samples.y) < report.loss
    assert any((tuner.session.weights[name] != array).any() for name, array in before.items())  # before is of before
    assert "PICNN" not in repr(tuner)
    assert "1 steps" in repr(tuner)


def test_loss_goes_down_and_the_energy_stays_convex(tuner: FineTuner, samples: Samples) -> None:
    losses = [tuner.step(samples.x, samples.y).loss for _ in range(150)]
    assert losses[-1] < 0.3 * losses[0]
    check_convex(tuner.session)
    touched = [n for n, s in tuner.session.manifest.weights.tensors.items() if s.nonnegative]
    assert touched


def test_what_everybody_knows_of_the_session_still_works(tuner: FineTuner, samples: Samples, tmp_path: Path) -> None:
    for _ in range(5):
        tuner.step(samples.x, samples.y)
    solution = tuner.session.argmin(samples.x)
    assert solution.ok.all()
    assert solution.weights_id == tuner.session.weights_id
    assert solution.info["native"] == tuner.session.native
    assert tuner.session.vjp(solution, np.ones_like(solution.y)).weights.keys() <= dict(tuner.session.weights).keys()
    old = solution
    tuner.step(samples.x, samples.y)
    with pytest.raises(InputError, match="from before an update of the weights; call argmin again"):
        tuner.session.vjp(old, np.ones_like(old.y))
    again = tuner.session.argmin(samples.x, warm=old)
    assert again.ok.all()
    written = tuner.write_package(tmp_path / "tuned.icnn")
    assert verify(written.path, samples=8).passed
    fresh = icnnrt.load(written)
    assert same(dict(fresh.weights), dict(tuner.session.weights))
    np.testing.assert_array_equal(fresh.argmin(samples.x).y, tuner.session.argmin(samples.x).y)
    assert written.manifest.metadata["tuned_steps"] == 6
    assert written.manifest.train == tuner.session.manifest.train
    # It can be tuned further.
    assert FineTuner(fresh).step(samples.x, samples.y).accepted


def test_classes_for_targets(classes_package: Path, samples: Samples) -> None:
    tuner = FineTuner(icnnrt.load(classes_package), learning_rate=0.3)
    before = tuner.loss(samples.x, samples.classes)
    for _ in range(60):
        assert tuner.step(samples.x, samples.classes).accepted
    assert tuner.loss(samples.x, samples.classes) < 0.9 * before
    assert tuner.loss(samples.x, samples.classes.astype(float)) == tuner.loss(samples.x, samples.classes)
    check_convex(tuner.session)
    with pytest.raises(InputError, match="target: expected integers, as the package's loss takes") as error:
        tuner.step(samples.x, samples.classes + 0.5)
    one_sentence(error.value)
    lost = samples.classes.astype(float)
    lost[[1, 4]] = np.nan
    assert tuner.step(samples.x, lost).skipped == 2
    with pytest.raises(InputError, match="target: expected integers"):
        tuner.step(samples.x, np.full(len(samples.x), 2.0**60))


def test_a_class_that_is_none_is_refused_and_harms_nothing(classes_package: Path, samples: Samples) -> None:
    """What a loss does with a target it has no meaning for is onnxruntime's: an error, and the tuner goes on."""
    tuner = FineTuner(icnnrt.load(classes_package))
    before = all_of(tuner)
    with pytest.raises(IcnnrtError, match="onnxruntime failed"):
        tuner.step(samples.x, samples.classes + N)
    assert same(all_of(tuner), before)
    assert tuner.step(samples.x, samples.classes).accepted


# --- Bad input -------------------------------------------------------------------------------------


def rows(array: NDArray[Any], *bad: int, value: float = np.nan) -> NDArray[Any]:
    array = array.copy()
    for row in bad:
        array[row, -1] = value
    return array


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_bad_rows_are_left_out_and_counted(train_package: Path, samples: Samples, value: float) -> None:
    one, other = (FineTuner(icnnrt.load(train_package)) for _ in range(2))
    report = one.step(rows(samples.x, 3, 5, value=value), rows(samples.y, 5, 7, value=value))
    kept = np.delete(np.arange(len(samples.x)), [3, 5, 7])
    expected = other.step(samples.x[kept], samples.y[kept])
    assert (report.samples, report.skipped) == (len(kept), 3)
    assert report.loss == expected.loss
    assert same(all_of(one), all_of(other))


def test_bad_rows_are_refused_if_strict(session: icnnrt.Session, samples: Samples) -> None:
    tuner = FineTuner(session, strict=True)
    before = all_of(tuner)
    for x, y in ((rows(samples.x, 3), samples.y), (samples.x, rows(samples.y, 3))):
        told = "x, target: expected finite numbers, but got NaN or infinity in sample 3"
        with pytest.raises(InputError, match=told) as error:
            tuner.step(x, y)
        one_sentence(error.value)
    assert same(all_of(tuner), before)
    assert tuner.step(samples.x, samples.y).accepted


S = Samples(6)


@pytest.mark.parametrize(
    ("x", "y", "sentence"),
    [
        (S.x, S.y + 1.0, r"target: expected numbers in \[0, 1\], where y lies, but got .* in finite sample 0"),
        (S.x, rows(S.y, 2, value=-0.1), r"but got -0.1 to .* in finite sample 2"),
        (S.x[:, :2], S.y, r"x: expected shape \[B, 3\], but got \[6, 2\]"),
        (S.x, S.y[:, :2], r"target: expected shape \[6, 4\], but got \[6, 2\]"),
        (S.x, S.y[:5], r"target: expected shape \[6, 4\], but got \[5, 4\]"),
        (S.x[0], S.y[0], r"x: expected shape \[B, 3\], but got \[3\]; a single sample needs a batch dimension"),
        (S.x[:0], S.y[:0], "x: expected at least one sample, but got none"),
        (rows(S.x, *range(6)), S.y, "x, target: expected finite numbers, but got NaN or infinity in every sample"),
        ("text", S.y, "x: expected real numbers, but got dtype"),
        (S.x, S.y + 0j, "target: expected real numbers, but got dtype complex128"),
        (S.x, None, "target: expected real numbers"),
    ],
)
def test_wrong_data_is_refused(tuner: FineTuner, x: Any, y: Any, sentence: str) -> None:
    before = all_of(tuner)
    for call in (tuner.step, tuner.loss, lambda x, y: tuner.fit(x, y, epochs=1)):
        with pytest.raises(InputError, match=sentence) as error:
            call(x, y)
        one_sentence(error.value)
    with pytest.raises(InputError, match=r"^validation "):
        tuner.fit(S.x, S.y, epochs=1, validation=(x, y))
    assert same(all_of(tuner), before)


@pytest.mark.parametrize(
    ("keywords", "sentence"),
    [
        ({"epochs": 0}, "epochs: expected an integer of at least 1, but got 0"),
        ({"epochs": 1.5}, "epochs: expected an integer of at least 1, but got 1.5"),
        ({"epochs": True}, "epochs: expected an integer"),
        ({"epochs": 1, "batch_size": 0}, "batch_size: expected an integer of at least 1"),
        ({"epochs": 1, "patience": 2}, "patience: expected validation data too"),
        ({"epochs": 1, "patience": 0, "validation": (S.x, S.y)}, "patience: expected an integer of at least 1"),
        ({"epochs": 1, "worse": 0.0}, "worse: expected a positive part of the best loss, but got 0.0"),
        ({"epochs": 1, "worse": "a"}, 'worse: expected a positive part of the best loss, but got "a"'),
        ({"epochs": 1, "learning_rate": -1.0}, "learning_rate: expected a finite number of at least 0, but got -1.0"),
        (
            {"epochs": 1, "learning_rate": float("nan")},
            "learning_rate: expected a finite number of at least 0, but got",
        ),
        ({"epochs": 1, "validation": S.x}, r"validation: expected a tuple \(x, target\)"),
        ({"epochs": 1, "history": "somewhere", "keep": 0}, "keep: expected how many checkpoints to keep, 1 to 1000"),
    ],
)
def test_wrong_arguments_of_fit(
    tuner: FineTuner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keywords: dict[str, Any], sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    before = all_of(tuner)
    with pytest.raises(InputError, match=sentence) as error:
        tuner.fit(S.x, S.y, **keywords)
    one_sentence(error.value)
    assert same(all_of(tuner), before)
    assert not any(tmp_path.iterdir())


def test_what_cannot_be_tuned_is_refused(relu_package: Path, session: icnnrt.Session) -> None:
    with pytest.raises(InputError, match=r"session: relu.icnn has no train.onnx, so it cannot be tuned") as error:
        FineTuner(icnnrt.load(relu_package))
    assert "train=TrainSpec(...)" in str(error.value)
    with pytest.raises(InputError, match=r"session: expected what icnnrt\.load returned"):
        FineTuner(relu_package)  # type: ignore[arg-type]
    tuner = FineTuner(session)
    for rate in (-1e-9, -1.0, np.float32(-1), np.nan, float("inf"), "fast", True, np.array(True), np.ones(1), None):
        with pytest.raises(InputError, match="learning_rate: expected a finite number of at least 0, but got"):
            FineTuner(session, learning_rate=rate)  # type: ignore[arg-type]
        with pytest.raises(InputError, match="learning_rate: expected a finite number of at least 0, but got"):
            tuner.learning_rate = rate  # type: ignore[assignment]
    for rate in (0, 0.0, np.float32(0.5), np.array(0.5), np.int64(1)):  # 0 is what a schedule may begin with
        tuner.learning_rate = rate  # type: ignore[assignment]
        assert type(tuner.learning_rate) is float


# --- Refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [1e308, 1.7e308])
def test_weights_that_would_overflow_are_refused(tuner: FineTuner, samples: Samples, rate: float) -> None:
    for _ in range(3):
        tuner.step(samples.x, samples.y)
    before, weights_id = all_of(tuner), tuner.session.weights_id
    report = tuner.step(samples.x, samples.y, learning_rate=rate)
    assert not report.accepted
    assert report.reason == "a new weight is not finite; lower the learning rate"
    assert report.step == 3
    assert same(all_of(tuner), before)
    assert tuner.session.weights_id == weights_id  # so solutions from before stay good
    assert tuner.step(samples.x, samples.y).accepted


def test_a_sample_whose_energy_overflows_refuses_its_step(tuner: FineTuner, samples: Samples) -> None:
    x, before = samples.x.copy(), all_of(tuner)
    x[4] = 1e308 * np.sign(x[4])
    report = tuner.step(x, samples.y)
    assert not report.accepted
    assert "(sample 4 is NOT_FINITE); leave the sample out" in report.reason
    assert same(all_of(tuner), before)


def test_a_step_on_an_energy_that_is_not_convex_is_refused(session: icnnrt.Session, samples: Samples) -> None:
    """However its weights came to be so."""
    bent = {n: -5 * np.abs(w) - 1 for n, w in session.weights.items() if n.endswith("1.W_z.weight")}
    session.update_weights(bent)
    tuner = FineTuner(session)
    before = all_of(tuner)
    report = tuner.step(4 * samples.x, samples.y)
    assert not report.accepted
    assert "the energy is not convex at sample" in report.reason
    assert same(all_of(tuner), before)


@pytest.mark.parametrize("bad", [-1e-9, np.nan])
def test_a_graph_that_does_not_project_is_helped(
    tuner: FineTuner, samples: Samples, monkeypatch: pytest.MonkeyPatch, bad: float
) -> None:
    """The tuner does not rely on the package's word."""
    held = next(n for n, s in tuner.session.manifest.weights.tensors.items() if s.nonnegative)
    real = tuner.session.runner.run

    def tampered(*args: Any, **keywords: Any) -> Any:
        out, weights_id = real(*args, **keywords)
        if f"new.{held}" in out:
            out[f"new.{held}"].flat[0] = bad
        return out, weights_id

    monkeypatch.setattr(tuner.session.runner, "run", tampered)
    before = all_of(tuner)
    report = tuner.step(samples.x, samples.y)
    if bad < 0:
        assert report.accepted, report.reason
        assert tuner.session.weights[held].flat[0] == 0.0
    else:
        assert not report.accepted
        assert f"{held} should be nonnegative, but its smallest entry is nan" in report.reason
        assert same(all_of(tuner), before)


def test_unsolved_samples_give_no_gradient(tuner: FineTuner, samples: Samples, monkeypatch: pytest.MonkeyPatch) -> None:
    real = tuner.session.runner.run

    def unsafe(*args: Any, **keywords: Any) -> Any:
        out, weights_id = real(*args, **keywords)
        out["safe"] = np.zeros_like(out["safe"])
        return out, weights_id

    monkeypatch.setattr(tuner.session.runner, "run", unsafe)
    report = tuner.step(samples.x, samples.y)
    assert not report.accepted
    assert report.unsafe == len(samples.x)
    assert "no sample was solved to the residual tolerance" in report.reason


def test_unsolved_samples_after_a_step_are_told_by_the_rate(
    tuner: FineTuner, samples: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the weights before the step solve no more of the batch, the step is not to blame, but the rates may be."""
    tuner.step(samples.x, samples.y)
    before, real = all_of(tuner), tuner.session.runner.run

    def unsafe(*args: Any, **keywords: Any) -> Any:
        out, weights_id = real(*args, **keywords)
        out["safe"] = np.zeros_like(out["safe"])
        return out, weights_id

    monkeypatch.setattr(tuner.session.runner, "run", unsafe)
    report = tuner.step(samples.x, samples.y)
    assert (report.accepted, report.undone) == (False, False)
    assert "no gradient to trust; lower the learning rate" in report.reason
    assert same(all_of(tuner), before)


# --- Steps that do harm ----------------------------------------------------------------------------

RUINOUS = 100.0  # of the digits network
OVERFLOWING = 1e200  # of every network: small ones may be solved however large their weights, but products overflow


@pytest.fixture(scope="session")
def images() -> tuple[NDArray[Any], NDArray[Any]]:
    """Left and right halves of 200 digits, what the package in models/ is for."""
    found = pytest.importorskip("sklearn.datasets").load_digits()
    x, y = np.split((found.images[:200] / 16).astype(np.float32), 2, axis=2)
    return x.reshape(-1, 32), y.reshape(-1, 32)


@pytest.mark.parametrize("rate", [1.0, RUINOUS])
def test_a_step_that_ruins_the_network_is_undone(
    images: tuple[NDArray[Any], NDArray[Any]], tmp_path: Path, rate: float
) -> None:
    """Alone, by `check`, by `fit` and by what is written: every answer is as before, to the bit."""
    x, y = images
    tuner = FineTuner(icnnrt.load(Path(__file__).parent.parent / "models/digits_completion/digits_completion.icnn"))
    session, before = tuner.session, all_of(tuner)
    answer = session.argmin(x)
    assert answer.ok.all()

    assert tuner.step(x[:32], y[:32], learning_rate=rate).accepted
    assert (session.argmin(x).status >= icnnrt.Status.SOLVER).sum() > 50
    report = tuner.step(x[32:64], y[32:64], learning_rate=rate)
    assert (report.accepted, report.undone, report.step) == (False, True, 0)
    assert report.reason.startswith("the step before did harm, so it is undone: ")
    assert report.reason.endswith("; lower the learning rate")
    assert same(all_of(tuner), before)

    tuner.step(x[:32], y[:32], learning_rate=rate)
    assert not tuner.check(x[32:64], y[32:64])
    assert same(all_of(tuner), before)
    assert tuner.check(x[32:64], y[32:64])

    fitted = tuner.fit(x, y, epochs=9, learning_rate=rate)
    assert "did harm, so it is undone" in fitted.stopped
    assert sum(epoch.accepted for epoch in fitted.epochs) <= 1  # told before the next epoch undid it
    assert sum(epoch.accepted + epoch.refused for epoch in fitted.epochs) == 7 * len(fitted.epochs)
    assert same(all_of(tuner), before)

    tuner.step(x[:32], y[:32], learning_rate=rate)
    written = icnnrt.load(tuner.write_package(tmp_path / "tuned.icnn"))
    np.testing.assert_array_equal(written.argmin(x).y, answer.y)
    np.testing.assert_array_equal(session.argmin(x).status, answer.status)


def test_after_a_step_is_undone_it_is_as_if_never_taken(train_package: Path, samples: Samples, tmp_path: Path) -> None:
    """Weights and optimiser state, to the bit, whoever found out."""
    ways: list[Callable[[FineTuner], object]] = [
        lambda tuner: tuner.step(samples.x, samples.y),
        lambda tuner: tuner.check(samples.x, samples.y),
        lambda tuner: tuner.save(tmp_path / "h"),
        lambda tuner: tuner.fit(samples.x, samples.y, epochs=1, learning_rate=OVERFLOWING),
        lambda tuner: (tuner.keep(), tuner.rollback(), tuner.check(samples.x, samples.y)),  # kept is not proven
    ]
    straight = FineTuner(icnnrt.load(train_package), learning_rate=0.01)
    for _ in range(3):
        straight.step(samples.x, samples.y)
    proven = all_of(straight)
    straight.step(samples.x, samples.y)
    for find in ways:
        tuner = FineTuner(icnnrt.load(train_package), learning_rate=0.01)
        for _ in range(3):
            tuner.step(samples.x, samples.y)
        tuner.step(samples.x, samples.y, learning_rate=OVERFLOWING)
        assert tuner.steps == 4
        find(tuner)
        assert tuner.steps == 3
        assert same(all_of(tuner), proven)
        assert tuner.step(samples.x, samples.y).accepted
        assert same(all_of(tuner), all_of(straight))
    assert [c.step for c in History(tmp_path / "h", straight.session.manifest).checkpoints] == [3]


def test_a_bad_batch_does_not_undo_a_good_step(tuner: FineTuner, samples: Samples) -> None:
    for _ in range(2):
        tuner.step(samples.x, samples.y)
    before, x = all_of(tuner), samples.x.copy()
    x[4] = 1e308 * np.sign(x[4])
    report = tuner.step(x, samples.y)
    assert (report.accepted, report.undone, report.step) == (False, False, 2)
    assert "leave the sample out" in report.reason
    assert not tuner.check(x, samples.y)
    assert same(all_of(tuner), before)
    # The step before is still on trial, and the first batch that tells finds it good.
    assert tuner.step(samples.x, samples.y).accepted


def test_rolling_back_or_resuming_ends_the_trial(tuner: FineTuner, samples: Samples, tmp_path: Path) -> None:
    """What was put back is not undone for the sake of what came before it in time."""
    tuner.step(samples.x, samples.y)
    tuner.save(tmp_path / "h")
    for back in (tuner.rollback, lambda: tuner.resume(tmp_path / "h")):
        tuner.step(samples.x, samples.y, learning_rate=OVERFLOWING)
        back()
        before = all_of(tuner)
        assert tuner.check(samples.x, samples.y)
        assert same(all_of(tuner), before)


def test_looking_at_every_step_costs_no_run(
    tuner: FineTuner, samples: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, real = 0, tuner.session.runner.run

    def counted(*args: Any, **keywords: Any) -> Any:
        nonlocal runs
        runs += 1
        return real(*args, **keywords)

    monkeypatch.setattr(tuner.session.runner, "run", counted)
    for _ in range(5):
        tuner.step(samples.x, samples.y)
    assert runs == 5
    tuner.fit(samples.x, samples.y, epochs=3, batch_size=12)
    assert runs == 5 + 3 * 4 + 1  # the last step is looked at once


def test_two_tuners_on_one_session(session: icnnrt.Session, samples: Samples, tmp_path: Path) -> None:
    one, other = FineTuner(session), FineTuner(session)
    assert one.step(samples.x, samples.y).accepted
    before = all_of(one)
    other_before = other.steps, repr(other)
    for call in (
        lambda: other.save(tmp_path / "h"),  # those weights with this state belong to nothing
        lambda: other.step(samples.x, samples.y),
        lambda: other.loss(samples.x, samples.y),
        other.rollback,
    ):
        with pytest.raises(InputError, match="session: expected the weights that this tuner left it with") as error:
            call()
        one_sentence(error.value)
    assert (other.steps, repr(other)) == other_before
    assert same(all_of(one), before)
    assert one.step(samples.x, samples.y).accepted


# --- Going back ------------------------------------------------------------------------------------


def test_rollback_returns_to_what_was_kept(tuner: FineTuner, samples: Samples) -> None:
    began = all_of(tuner)
    tuner.step(samples.x, samples.y)
    tuner.rollback()
    assert same(all_of(tuner), began)
    tuner.step(samples.x, samples.y)
    tuner.keep()
    kept = all_of(tuner)
    after = []
    for _ in range(2):
        for _ in range(3):
            tuner.step(samples.x, samples.y)
        after.append(all_of(tuner))
        tuner.rollback()
        assert same(all_of(tuner), kept)
        assert tuner.steps == 1
    assert same(*after)


def test_state_is_a_copy(tuner: FineTuner, samples: Samples) -> None:
    tuner.step(samples.x, samples.y)
    before = tuner.state
    for array in dict(tuner.state).values():
        array[...] = 7
    assert same(dict(tuner.state), dict(before))


# --- fit -------------------------------------------------------------------------------------------


def test_fit_learns_and_reports(tuner: FineTuner, samples: Samples) -> None:
    steps: list[StepReport] = []
    epochs: list[EpochReport] = []
    held = Samples(16, seed=1)
    report = tuner.fit(
        rows(samples.x, 2), samples.y, epochs=12, batch_size=10, validation=(held.x, held.y),
        on_step=steps.append, on_epoch=epochs.append,
    )  # fmt: skip
    assert report.epochs == epochs
    assert len(epochs) == 12
    assert len(steps) == 12 * 5  # 47 samples in batches as even as can be
    assert {s.samples for s in steps} == {9, 10}
    assert all((e.accepted, e.refused, e.skipped) == (5, 0, 1) for e in epochs)
    assert report.validation_before is not None
    best = min(e.validation for e in epochs if e.validation is not None)
    assert best < report.validation_before
    assert report.best_epoch == 1 + [e.validation for e in epochs].index(best)
    assert tuner.loss(held.x, held.y) == best
    assert report.stopped == ""
    json.dumps(report.as_dict())


def test_fit_depends_on_its_seed_alone(train_package: Path, samples: Samples) -> None:
    ends = []
    for seed in (0, 0, 1):
        tuner = FineTuner(icnnrt.load(train_package), learning_rate=0.01)
        tuner.fit(samples.x, samples.y, epochs=2, batch_size=7, seed=seed)
        ends.append(all_of(tuner))
    assert same(ends[0], ends[1])
    assert not same(ends[0], ends[2])


def losses_in_turn(tuner: FineTuner, monkeypatch: pytest.MonkeyPatch, *losses: float) -> None:
    """Let validation find these losses."""
    left = iter(losses)
    monkeypatch.setattr(tuner, "_loss", lambda data: next(left))


def test_the_best_weights_are_those_that_stay(
    tuner: FineTuner, samples: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses_in_turn(tuner, monkeypatch, 1.0, 0.9, 0.5, 0.6, 0.7)
    met: list[Arrays] = []
    report = tuner.fit(
        samples.x, samples.y, epochs=4, validation=(S.x, S.y), on_epoch=lambda epoch: met.append(all_of(tuner))
    )
    assert report.best_epoch == 2
    assert same(all_of(tuner), met[1])
    assert not any(e.rolled_back for e in report.epochs)


def test_none_better_than_before_leaves_what_was(
    tuner: FineTuner, samples: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = all_of(tuner)
    losses_in_turn(tuner, monkeypatch, 0.1, 0.11, 0.12)
    report = tuner.fit(samples.x, samples.y, epochs=2, validation=(S.x, S.y))
    assert report.best_epoch == 0
    assert same(all_of(tuner), before)


@pytest.mark.parametrize("bad", [0.76, float("nan"), float("inf")])
def test_much_worse_validation_rolls_back(
    tuner: FineTuner, samples: Samples, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bad: float
) -> None:
    """To the best so far, weights and state, and what is saved then is that, with its own figures."""
    losses_in_turn(tuner, monkeypatch, 1.0, 0.5, bad, 0.74, 0.4)
    met: list[Arrays] = []
    report = tuner.fit(
        samples.x, samples.y, epochs=4, validation=(S.x, S.y), worse=0.5, history=tmp_path / "h",
        on_epoch=lambda epoch: met.append(all_of(tuner)),
    )  # fmt: skip
    assert [e.rolled_back for e in report.epochs] == [False, True, False, False]
    assert same(met[1], met[0])
    assert not same(met[2], met[0])  # 0.74 is worse, but not much
    assert report.best_epoch == 4
    checkpoints = History(tmp_path / "h", tuner.session.manifest).checkpoints
    assert [c.step for c in checkpoints] == [2, 4, 6]  # 48 samples in batches of 32
    assert checkpoints[0].figures == {"validation": 0.5}
    assert checkpoints[1].figures["validation"] == 0.74
    tuner.resume(tmp_path / "h", step=2)
    assert same(all_of(tuner), met[0])


def test_patience(tuner: FineTuner, samples: Samples, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    losses_in_turn(tuner, monkeypatch, 1.0, 0.5, 0.6, 0.55, 0.52, 0.3)
    report = tuner.fit(samples.x, samples.y, epochs=9, validation=(S.x, S.y), patience=2, history=tmp_path / "h")
    assert len(report.epochs) == 3
    assert report.best_epoch == 1
    assert report.stopped == "validation has not improved for 2 epochs"
    # What is saved last is what the session has: the best.
    assert tuner.steps == 2
    assert History(tmp_path / "h", tuner.session.manifest).checkpoints[-1].step == 2


def test_an_epoch_without_a_step_ends_the_fit(tuner: FineTuner, samples: Samples) -> None:
    before = all_of(tuner)
    report = tuner.fit(samples.x, samples.y, epochs=5, learning_rate=1e308)
    assert [(e.accepted, e.refused) for e in report.epochs] == [(0, 2)]
    assert report.stopped == "no step of epoch 1 was accepted: a new weight is not finite; lower the learning rate"
    assert same(all_of(tuner), before)


# --- Interruptions ---------------------------------------------------------------------------------


def test_an_interruption_between_steps_leaves_the_last_step(
    train_package: Path, samples: Samples, tmp_path: Path
) -> None:
    """KeyboardInterrupt out of on_step: weights and state are those of the steps taken, and tuning goes on."""
    tuner, other = (FineTuner(icnnrt.load(train_package)) for _ in range(2))
    met: list[Arrays] = []

    def interrupt(report: StepReport) -> None:
        met.append(all_of(tuner))
        if report.step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tuner.fit(samples.x, samples.y, epochs=5, batch_size=8, on_step=interrupt)
    assert same(all_of(tuner), met[-1])
    assert tuner.steps == 4
    tuner.save(tmp_path / "h")
    other.resume(tmp_path / "h")
    assert tuner.step(samples.x, samples.y).accepted
    assert other.step(samples.x, samples.y).accepted
    assert same(all_of(tuner), all_of(other))
    tuner.rollback()
    assert tuner.steps == 0


@pytest.mark.parametrize(("moment", "steps"), [("before the run", 0), ("before the update", 0), ("after it", 1)])
def test_ctrl_c_within_a_step_leaves_all_of_it_or_nothing(
    tuner: FineTuner, samples: Samples, monkeypatch: pytest.MonkeyPatch, moment: str, steps: int
) -> None:
    runner = tuner.session.runner
    run, update = runner.run, runner.update_weights

    def interrupted(name: str) -> None:
        if name == moment:
            signal.raise_signal(signal.SIGINT)

    def running(*args: Any, **keywords: Any) -> Any:
        interrupted("before the run")
        return run(*args, **keywords)

    def updating(*args: Any, **keywords: Any) -> Any:
        interrupted("before the update")
        made = update(*args, **keywords)
        interrupted("after it")
        return made

    monkeypatch.setattr(runner, "run", running)
    monkeypatch.setattr(runner, "update_weights", updating)
    before = all_of(tuner)
    with pytest.raises(KeyboardInterrupt):
        tuner.step(samples.x, samples.y)
    monkeypatch.undo()
    assert tuner.steps == steps
    assert same(all_of(tuner), before) == (not steps)
    assert tuner.step(samples.x, samples.y).accepted  # its weights are those it knows
    assert tuner.steps == steps + 1
    tuner.rollback()
    assert same(all_of(tuner), before)


# --- Checkpoints -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_resuming_is_never_having_stopped(
    train_package: Path, classes_package: Path, samples: Samples, tmp_path: Path, kind: str
) -> None:
    """To the bit, in another session, whatever that one has done before."""
    path, target = (train_package, samples.y) if kind == "adam" else (classes_package, samples.classes)
    batches = [np.random.default_rng(i).choice(len(samples.x), 8, replace=False) for i in range(20)]
    straight = FineTuner(icnnrt.load(path), learning_rate=0.02)
    for batch in batches:
        straight.step(samples.x[batch], target[batch])
    stopped = FineTuner(icnnrt.load(path), learning_rate=0.02)
    for batch in batches[:11]:
        stopped.step(samples.x[batch], target[batch])
    saved = stopped.save(tmp_path / "h", figures={"loss": 0.5, "bad": float("nan")})
    assert (saved.step, saved.figures) == (11, {"loss": 0.5})
    again = FineTuner(icnnrt.load(path), learning_rate=0.02)
    again.step(samples.x, target)
    assert again.resume(tmp_path / "h") == saved
    assert same(all_of(again), all_of(stopped))
    for batch in batches[11:]:
        again.step(samples.x[batch], target[batch])
    assert again.steps == 20
    assert same(all_of(again), all_of(straight))
    again.rollback()
    assert same(all_of(again), all_of(stopped))  # resuming declares good


def test_the_history_is_bounded_and_any_of_it_comes_back(tuner: FineTuner, samples: Samples, tmp_path: Path) -> None:
    history, met = tmp_path / "h", {}
    for _ in range(6):
        tuner.step(samples.x, samples.y)
        met[tuner.steps] = all_of(tuner)
        tuner.save(history, keep=3)
    assert len(list(history.iterdir())) == 4
    for step in (5, 4, 6):
        assert tuner.resume(history, step=step).step == step
        assert same(all_of(tuner), met[step])
    for step in (1, 7):
        with pytest.raises(
            InputError, match=f"expected a checkpoint of step {step} in .*, but got those of steps 4, 5, 6"
        ) as e:
            tuner.resume(history, step=step)
        one_sentence(e.value)
    tuner.save(history, keep=1)
    assert len(list(history.iterdir())) == 2
    with pytest.raises(
        InputError, match=r"expected a folder of checkpoints, but got .*absent, which is not there; check"
    ) as e:
        tuner.resume(tmp_path / "absent")
    one_sentence(e.value)
    (tmp_path / "bare").mkdir()
    with pytest.raises(InputError, match=r"expected a checkpoint in .*bare, but got none; call save first"):
        tuner.resume(tmp_path / "bare")
    assert not (tmp_path / "absent").exists()


def test_a_callback_may_save_to_the_history_of_its_fit(tuner: FineTuner, samples: Samples, tmp_path: Path) -> None:
    history = tmp_path / "h"

    def save_some(report: StepReport) -> None:
        if report.step in (1, 3, 5, 7):
            tuner.save(history)

    tuner.fit(samples.x, samples.y, epochs=2, batch_size=12, history=history, on_step=save_some)
    assert [c.step for c in History(history, tuner.session.manifest).checkpoints] == [3, 4, 5, 7, 8]
    for step in (3, 4, 5, 7, 8):
        assert tuner.resume(history, step=step).step == step


def test_a_step_taken_again_takes_the_place_of_the_first(tuner: FineTuner, samples: Samples, tmp_path: Path) -> None:
    tuner.step(samples.x, samples.y)
    tuner.save(tmp_path / "h")
    tuner.rollback()
    tuner.step(samples.x, samples.y, learning_rate=0.3)
    tuner.save(tmp_path / "h")
    tuner.save(tmp_path / "h")  # and once more, the same
    second = all_of(tuner)
    assert [c.step for c in History(tmp_path / "h", tuner.session.manifest).checkpoints] == [1]
    assert len(list((tmp_path / "h").iterdir())) == 2
    tuner.rollback()
    tuner.resume(tmp_path / "h")
    assert same(all_of(tuner), second)


def test_a_checkpoint_of_another_network(
    tuner: FineTuner, classes_package: Path, samples: Samples, tmp_path: Path
) -> None:
    tuner.save(tmp_path / "h")
    other = FineTuner(icnnrt.load(classes_package))
    before = all_of(other)
    for call in (
        lambda: other.resume(tmp_path / "h"),
        lambda: other.save(tmp_path / "h"),
        lambda: other.fit(samples.x, samples.classes, epochs=1, history=tmp_path / "h"),
    ):
        with pytest.raises(InputError, match=r"history: expected checkpoints of this package .* another network") as e:
            call()
        one_sentence(e.value)
    assert same(all_of(other), before)


def test_the_same_network_with_other_weights_resumes(tuner: FineTuner, samples: Samples, tmp_path: Path) -> None:
    """A package written by a tuner is the same network: its history goes on."""
    for _ in range(3):
        tuner.step(samples.x, samples.y)
    tuner.save(tmp_path / "h")
    tuner.write_package(tmp_path / "tuned.icnn")
    tuner.step(samples.x, samples.y)
    other = FineTuner(icnnrt.load(tmp_path / "tuned.icnn"), learning_rate=0.01)
    other.resume(tmp_path / "h")
    other.step(samples.x, samples.y)
    assert same(all_of(other), all_of(tuner))


def seal(history: Path, change: Callable[[dict[str, Any]], None] = lambda content: None) -> None:
    """Make history.json agree with the files again, as an attacker would; `change` edits it."""
    content = json.loads((history / HISTORY_FILE).read_bytes())
    for entry in content["checkpoints"]:
        data = (history / entry["file"]).read_bytes()
        entry.update(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))
    change(content)
    (history / HISTORY_FILE).write_text(json.dumps(content))


def edit(history: Path, change: Callable[[Arrays], Any]) -> None:
    """Change the tensors of the last checkpoint, and seal."""
    file = history / json.loads((history / HISTORY_FILE).read_bytes())["checkpoints"][-1]["file"]
    tensors = safetensors_numpy.load(file.read_bytes())
    change(tensors)
    file.write_bytes(safetensors_numpy.save(tensors))
    seal(history)


def put(tensors: Arrays, name: str, value: Any) -> None:
    tensors[name] = value


def last(history: Path) -> Path:
    return history / json.loads((history / HISTORY_FILE).read_bytes())["checkpoints"][-1]["file"]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))


def swap(history: Path) -> None:
    (a, b) = sorted(history.glob("step-*"))
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)


def entry(content: dict[str, Any], **changes: Any) -> None:
    content["checkpoints"][-1].update(changes)


HELD = "layers.1.W_z.weight"
ATTACKS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "one bit": (lambda h: flip(last(h)), "file was changed or cut short; resume from another checkpoint"),
    "cut short": (lambda h: last(h).write_bytes(last(h).read_bytes()[:-9]), "file was changed or cut short"),
    "longer": (lambda h: last(h).write_bytes(last(h).read_bytes() + b"x"), "file was changed or cut short"),
    "empty": (lambda h: last(h).write_bytes(b""), "file was changed or cut short"),
    "missing": (lambda h: last(h).unlink(), "cannot be read .*; resume from another checkpoint"),
    "a folder": (lambda h: (last(h).unlink(), last(h).mkdir()), "cannot be read"),
    "swapped": (swap, "file was changed or cut short"),
    "swapped and sealed": (lambda h: (swap(h), seal(h)), "expected the state of step 2, as the history has it"),
    "no safetensors": (lambda h: (last(h).write_bytes(b"\xff" * 64), seal(h)), "not a safetensors file"),
    "NaN": (lambda h: edit(h, lambda t: t["weight.layers.0.b"].fill(np.nan)), "layers.0.b holds NaN or infinity"),
    "NaN in the state": (lambda h: edit(h, lambda t: t["state.exp_avg"].fill(np.inf)), "state.exp_avg holds NaN"),
    "below zero": (lambda h: edit(h, lambda t: t[f"weight.{HELD}"].fill(-1)), f"{HELD} should be nonnegative"),
    "a tensor more": (lambda h: edit(h, lambda t: put(t, "weight.more", np.zeros(3))), '"more" differ'),
    "a tensor of neither kind": (lambda h: edit(h, lambda t: put(t, "more", np.zeros(3))), "differ"),
    "a tensor less": (lambda h: edit(h, lambda t: t.pop("state.exp_avg_sq")), '"state.exp_avg_sq" differ'),
    "another shape": (lambda h: edit(h, lambda t: put(t, "weight.layers.0.b", np.zeros(7))), "shapes or dtypes differ"),
    "another dtype": (
        lambda h: edit(h, lambda t: put(t, "weight.layers.0.b", t["weight.layers.0.b"].astype(np.float32))),
        "shapes or dtypes differ",
    ),
    "another step": (lambda h: seal(h, lambda c: entry(c, step=77)), "expected the state of step 77"),
    "no JSON": (lambda h: (h / HISTORY_FILE).write_bytes(b"{"), "history.json: not valid UTF-8 JSON"),
    "empty history": (lambda h: (h / HISTORY_FILE).write_bytes(b""), "history.json: not valid UTF-8 JSON"),
    "a key twice": (
        lambda h: (h / HISTORY_FILE).write_bytes(b'{"format": "icnnrt-history", "format": "x"}'),
        'the key "format" occurs twice',
    ),
    "not an object": (lambda h: (h / HISTORY_FILE).write_bytes(b"[]"), "should be a JSON object"),
    "too long": (lambda h: (h / HISTORY_FILE).write_bytes(b" " * (MAX_BYTES + 1)), f"expected at most {MAX_BYTES} "),
    "a list of histories": (lambda h: ((h / HISTORY_FILE).unlink(), (h / HISTORY_FILE).mkdir()), "cannot be read"),
    "another format": (lambda h: seal(h, lambda c: c.update(format="gguf")), 'format should be "icnnrt-history"'),
    "a later version": (lambda h: seal(h, lambda c: c.update(version=3)), "version is 3, newer than the 2 that this"),
    "no version": (lambda h: seal(h, lambda c: c.pop("version")), "version should be an integer from 1"),
    "a network of text": (lambda h: seal(h, lambda c: c.update(network="0" * 64)), "network should be a JSON object"),
    "of version 1 with what that has not": (
        lambda h: seal(h, lambda c: c.update(version=1, network="0" * 64)), "fingerprint is not a key of"
    ),
    "a long fingerprint": (lambda h: seal(h, lambda c: entry(c, fingerprint=[0.0] * 5)), "a list of at most 4"),
    "a fingerprint of text": (lambda h: seal(h, lambda c: entry(c, fingerprint=["0"])), "should be a finite number"),
    "no network": (lambda h: seal(h, lambda c: c.pop("network")), "network is missing"),
    "another key": (lambda h: seal(h, lambda c: c.update(colour=1)), "colour is not a key"),
    "out of the folder": (
        lambda h: seal(h, lambda c: entry(c, file="../../etc/passwd")), "file should be the name of a checkpoint"
    ),
    "a size that no memory has": (lambda h: seal(h, lambda c: entry(c, bytes=1 << 40)), "changed or cut short"),
    "a size beyond": (lambda h: seal(h, lambda c: entry(c, bytes=1 << 50)), "bytes should be an integer from 1 to"),
    "a negative step": (lambda h: seal(h, lambda c: entry(c, step=-1)), "step should be an integer from 0"),
    "figures of text": (lambda h: seal(h, lambda c: entry(c, figures={"loss": "low"})), "figures.loss should be a fin"),
    "many": (lambda h: seal(h, lambda c: c.update(checkpoints=c["checkpoints"] * 600)), "a list of at most 1000"),
}  # fmt: skip


@pytest.fixture(scope="session")
def saved_history(train_package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints, of steps 1 and 2."""
    history = tmp_path_factory.mktemp("history") / "h"
    tuner = FineTuner(icnnrt.load(train_package))
    for _ in range(2):
        tuner.step(S.x, S.y)
        tuner.save(history)
    return history


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_damaged_history_is_told_and_changes_nothing(
    tuner: FineTuner, saved_history: Path, tmp_path: Path, attack: str
) -> None:
    history = tmp_path / "h"
    shutil.copytree(saved_history, history)
    act, sentence = ATTACKS[attack]
    act(history)
    before = all_of(tuner)
    with pytest.raises(PackageError, match=sentence) as error:
        tuner.resume(history)
    assert str(error.value).startswith(str(history))
    one_sentence(error.value)
    assert same(all_of(tuner), before)
    if last_is_at_fault(attack):
        assert tuner.resume(history, step=1).step == 1  # the one before is as good as ever


def last_is_at_fault(attack: str) -> bool:
    whole = ("swapped", "JSON", "history", "twice", "object", "long", "list", "format", "version", "network", "key",
             "folder", "beyond", "negative", "figures", "many", "of text")  # fmt: skip
    return not any(word in attack for word in whole)


@pytest.mark.parametrize("name", [HISTORY_FILE, "the checkpoint"])
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_pipes_and_links_in_a_history(tuner: FineTuner, saved_history: Path, tmp_path: Path, name: str) -> None:
    for plant in ("pipe", "link"):
        history = tmp_path / plant
        shutil.copytree(saved_history, history)
        target = history / HISTORY_FILE if name == HISTORY_FILE else last(history)
        moved = target.rename(tmp_path / f"{plant} elsewhere")
        if plant == "pipe":
            os.mkfifo(target)
        else:
            target.symlink_to(moved)
        with pytest.raises(PackageError, match="cannot be read"):
            tuner.resume(history)


def test_a_file_is_no_history(tuner: FineTuner, tmp_path: Path) -> None:
    (tmp_path / "h").write_text("")
    for call in (tuner.resume, tuner.save):
        with pytest.raises(InputError, match=r"history: expected a folder of checkpoints, but .* is a file") as error:
            call(tmp_path / "h")
        one_sentence(error.value)


def test_what_interruptions_leave_behind_means_nothing_and_is_deleted(
    tuner: FineTuner, saved_history: Path, tmp_path: Path
) -> None:
    history = tmp_path / "h"
    shutil.copytree(saved_history, history)
    stray = [
        "step-000000000009-0123456789abcdef.safetensors",
        ".history.json.0123456789abcdef.tmp",
        ".step-000000000009-0123456789abcdef.safetensors.0123456789abcdef.tmp",
    ]
    foreign = ["notes.txt", ".history.json.bak", "step-9.safetensors", ".tmp", ".a.b.tmp"]
    for name in (*stray, *foreign):
        (history / name).write_text("?")
    assert tuner.resume(history).step == 2
    tuner.save(history)
    left = {path.name for path in history.iterdir()}
    assert left.isdisjoint(stray)
    assert left >= set(foreign)


# --- The disk --------------------------------------------------------------------------------------


# A save flushes and renames two files, and flushes the folder after each.
@pytest.mark.parametrize(("call", "number"), [*(("fsync", i) for i in (1, 2, 3, 4)), ("replace", 1), ("replace", 2)])
def test_a_full_disk_leaves_everything_in_memory_and_the_history_as_it_was(
    tuner: FineTuner, samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    history = tmp_path / "h"
    tuner.step(samples.x, samples.y)
    tuner.save(history)
    first = all_of(tuner)
    tuner.step(samples.x, samples.y)
    before, listed = all_of(tuner), set(os.listdir(history))
    real, calls = getattr(os, call), 0

    def full(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(OSError, match="No space left on device") as error:
            tuner.save(history)
    (note,) = error.value.__notes__
    assert "Step 2 is not saved" in note
    assert "weights and state are still in memory, so make room or choose another folder and call save again" in note
    assert same(all_of(tuner), before)
    assert not [name for name in os.listdir(history) if name.endswith(".tmp")]
    other = FineTuner(icnnrt.load(tuner.session.path))
    found = other.resume(history)
    assert same(all_of(other), first if found.step == 1 else before)
    assert set(os.listdir(history)) >= listed - {name for name in listed if "step-000000000002" in name}
    tuner.save(history)
    other.resume(history)
    assert same(all_of(other), before)


def test_a_full_disk_in_the_middle_of_a_fit(
    tuner: FineTuner, samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    met: list[StepReport] = []

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left") as error:
            tuner.fit(samples.x, samples.y, epochs=3, history=tmp_path / "h", on_step=met.append)
        with pytest.raises(OSError, match="No space left") as unwritten:
            tuner.write_package(tmp_path / "p.icnn")
    assert error.value.__notes__
    assert "make room or choose another folder and call write_package again" in unwritten.value.__notes__[0]
    assert tuner.steps == len(met) == 2
    assert not (tmp_path / "p.icnn").exists()
    tuner.save(tmp_path / "h")
    assert History(tmp_path / "h", tuner.session.manifest).checkpoints[-1].step == 2
    tuner.write_package(tmp_path / "p.icnn")


def test_a_folder_that_cannot_be_written(tuner: FineTuner, samples: Samples, tmp_path: Path) -> None:
    tuner.step(samples.x, samples.y)
    before = all_of(tuner)
    with pytest.raises(InputError, match="absent is not there; create it first"):
        tuner.save(tmp_path / "absent" / "h")
    shut = tmp_path / "shut"
    shut.mkdir()
    shut.chmod(0o500)
    if not os.access(shut, os.W_OK):  # root may write everywhere
        with pytest.raises(OSError, match="ermission") as error:
            tuner.save(shut / "h")
        assert "call save again" in error.value.__notes__[0]
    shut.chmod(0o700)
    assert same(all_of(tuner), before)
    tuner.save(shut / "h")


def test_files_appear_whole_and_as_readable_as_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plain").write_bytes(b"1")
    files.write_atomically(tmp_path / "f", b"1")
    assert (tmp_path / "f").stat().st_mode == (tmp_path / "plain").stat().st_mode
    files.write_atomically(tmp_path / "f", b"22")
    assert (tmp_path / "f").read_bytes() == b"22"
    assert files.read_plain(tmp_path / "f", 2) == b"22"
    assert files.read_plain(tmp_path / "f", 1) is None
    assert sorted(os.listdir(tmp_path)) == ["f", "plain"]
    assert files.scratch_of(".f.0123.tmp") == "f"
    assert files.scratch_of("f.0123.tmp") is None
    assert files.scratch_of(".tmp") is None


# --- Many threads ----------------------------------------------------------------------------------


def test_eight_threads_meet_whole_versions_only(train_package: Path, samples: Samples) -> None:
    """Every result, bit for bit, is that of one committed version of the weights, and none goes back in time."""
    session = icnnrt.load(train_package)
    tuner = FineTuner(session, learning_rate=0.01)
    x = samples.x[:3]
    versions: dict[str, Arrays] = {session.weights_id: dict(session.weights)}
    found: list[list[icnnrt.Solution]] = [[] for _ in range(8)]
    over = threading.Event()

    def ask(results: list[icnnrt.Solution]) -> None:
        while not over.is_set():
            results.append(session.argmin(x))

    with ThreadPoolExecutor(8) as pool:
        asking = [pool.submit(ask, results) for results in found]
        try:
            for i in range(60):
                batch = np.random.default_rng(i).choice(len(samples.x), 8, replace=False)
                assert tuner.step(samples.x[batch], samples.y[batch]).accepted
                versions[session.weights_id] = dict(session.weights)
                if i == 40:
                    tuner.rollback()
                    versions[session.weights_id] = dict(session.weights)
        finally:
            over.set()
        for asked in asking:
            asked.result()
    assert len(versions) == 62
    judge = icnnrt.load(train_package)
    order, truth = list(versions), {}
    for weights_id, weights in versions.items():
        judge.update_weights(weights)
        truth[weights_id] = judge.argmin(x)
    met: set[str] = set()
    for results in found:
        assert results
        for result in results:
            true = truth[result.weights_id]
            for name in ("y", "lam", "slopes", "offsets", "cut_points", "energy", "lower_bound", "gap"):
                assert getattr(result, name).tobytes() == getattr(true, name).tobytes(), name
        places = [order.index(result.weights_id) for result in results]
        assert places == sorted(places)
        met |= {result.weights_id for result in results}
    assert len(met) > 10
    distinct = {solution.y.tobytes() for solution in truth.values()}
    assert len(distinct) == len(truth) - 1  # going back gave the first version once more


def test_steps_of_several_threads_exclude_each_other(tuner: FineTuner, samples: Samples) -> None:
    with ThreadPoolExecutor(4) as pool:
        reports = list(pool.map(lambda i: tuner.step(samples.x[i::4], samples.y[i::4]), range(4), timeout=120))
    assert sorted(r.step for r in reports) == [1, 2, 3, 4]
    assert all(r.accepted for r in reports)
    assert tuner.steps == 4


def test_a_closed_session_refuses(tuner: FineTuner, samples: Samples) -> None:
    tuner.session.close()
    with pytest.raises(IcnnrtError, match=r"the session is closed"):
        tuner.step(samples.x, samples.y)


def test_reports_are_records() -> None:
    for record in (StepReport, EpochReport, FitReport):
        assert dataclasses.is_dataclass(record)
        assert record.__dataclass_params__.frozen  # type: ignore[attr-defined]
