"""`icnnrt tune`: what it writes, when it stops, and one sentence for every bad input."""

import inspect
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("onnxruntime")

from test_cli import FACTORY, icnnrt, sentence

import icnnrt as library
from icnnrt.cli import following, tune
from icnnrt.format import checkpoints, replacement
from icnnrt.tuning import finetune


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """40 samples that a network can learn: targets are smooth in x."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((40, 3))
    y = 1 / (1 + np.exp(-x @ rng.standard_normal((3, 4))))
    np.savez(tmp_path / "data.npz", x=x, target=y)
    return tmp_path / "data.npz"


def arrays(path: Path) -> tuple[Any, Any]:
    with np.load(path) as archive:
        return archive["x"], archive["target"]


def loss(package: Path, path: Path) -> float:
    with library.load(package) as session:
        return library.FineTuner(session).loss(*arrays(path))


def weights(package: Path) -> dict[str, Any]:
    return dict(library.Package.open(package).weights)


def test_tune_writes_a_package_that_is_better_and_shows_how(train_package: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "tuned.icnn"
    before = weights(train_package)
    result = icnnrt("tune", train_package, data, "--out", out, "--epochs", 15, "--lr", 0.01, "--batch-size", 16)
    assert result.exit_code == 0, result.output
    for text in ("epoch", "largest gap", "refused", "samples   40", "steps     45 accepted, 0 refused", "written"):
        assert text in result.stdout
    assert loss(out, data) < 0.7 * loss(train_package, data)
    assert library.Package.open(out).manifest.metadata["tuned_steps"] == 45
    assert "parity (of the export; the weights have been tuned since, 45 steps)" in icnnrt("inspect", out).stdout
    assert "tuned since" not in icnnrt("inspect", train_package).stdout
    for name, array in weights(train_package).items():
        np.testing.assert_array_equal(array, before[name])
    assert icnnrt("inspect", out).exit_code == 0


def test_it_does_what_fit_does(train_package: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "tuned.icnn"
    options = ["--epochs", 3, "--lr", 0.01, "--batch-size", 7, "--seed", 5]
    assert icnnrt("tune", train_package, data, "--out", out, *options).exit_code == 0
    with library.load(train_package) as session:
        tuner = library.FineTuner(session)
        tuner.fit(*arrays(data), epochs=3, learning_rate=0.01, batch_size=7, seed=5)
        for name, array in weights(out).items():
            np.testing.assert_array_equal(array, session.weights[name])


def test_the_defaults_are_those_of_the_library() -> None:
    defaults = {name: p.default for name, p in inspect.signature(tune.tune).parameters.items()}
    assert (defaults["learning_rate"], defaults["batch_size"]) == (finetune.LEARNING_RATE, finetune.BATCH_SIZE)
    assert checkpoints.KEEP == 5  # as the help says


def test_json_is_one_object_and_nothing_else(train_package: Path, data: Path, tmp_path: Path) -> None:
    options = ["--epochs", 4, "--val", 0.25, "--json"]
    result = icnnrt("tune", train_package, data, "--out", tmp_path / "out.icnn", *options)
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    assert (content["samples"], content["validation_samples"]) == (30, 10)
    assert [epoch["epoch"] for epoch in content["epochs"]] == [1, 2, 3, 4]
    assert all(epoch["gap_max"] < 1e-2 for epoch in content["epochs"])
    assert content["validation"] <= content["validation_before"]
    assert content["validation"] == min(e["validation"] for e in content["epochs"])
    assert (content["accepted"], content["refused"], content["refusal"]) == (4, 0, None)
    assert content["interrupted"] is False


def test_validation_from_a_file_keeps_the_best_and_patience_stops(
    train_package: Path, data: Path, tmp_path: Path
) -> None:
    with library.load(train_package) as session:
        x = np.random.default_rng(1).standard_normal((10, 3))
        np.savez(tmp_path / "val.npz", x=x, y=session.argmin(x).y)  # nothing can be better than the weights from before
    out = tmp_path / "out.icnn"
    options = ["--epochs", 50, "--lr", 0.05, "--val", tmp_path / "val.npz", "--patience", 3]
    result = icnnrt("tune", train_package, data, "--out", out, *options)
    assert result.exit_code == 0, result.output
    assert "no epoch was better than the weights from before" in result.stdout
    assert "stopped   validation has not improved for 3 epochs" in result.stdout
    for name, array in weights(train_package).items():
        np.testing.assert_array_equal(array, weights(out)[name])


def test_rows_with_nan_are_skipped_and_counted_or_refused(train_package: Path, data: Path, tmp_path: Path) -> None:
    x, target = arrays(data)
    x[3, 0], target[7, 1] = np.nan, np.inf
    np.savez(data, x=x, target=target)
    out = tmp_path / "out.icnn"
    told = sentence(icnnrt("tune", train_package, data, "--out", out, "--strict"))
    assert "NaN or infinity in sample 3" in told
    assert not out.exists()
    result = icnnrt("tune", train_package, data, "--out", out, "--epochs", 1)
    assert result.exit_code == 0, result.output
    assert "2 skipped for NaN or infinity" in result.stdout


def test_overwrite_tunes_in_place(train_package: Path, data: Path, tmp_path: Path) -> None:
    here = library.Package.open(train_package).save(tmp_path / "here.icnn").path
    before = loss(here, data)
    assert "is there already; pass --overwrite" in sentence(icnnrt("tune", here, data, "--out", here))
    assert icnnrt("tune", here, data, "--out", here, "--overwrite", "--lr", 0.01).exit_code == 0
    assert loss(here, data) < before


# --- History, interruptions, trouble -------------------------------------------------------------


def test_history_and_resume(train_package: Path, data: Path, tmp_path: Path) -> None:
    out, history = tmp_path / "out.icnn", tmp_path / "history"
    command = ["tune", train_package, data, "--out", out, "--history", history, "--overwrite", "--json"]
    first = json.loads(icnnrt(*command, "--epochs", 7).stdout)
    assert first["steps"] == 14
    assert len(list(history.glob("step-*.safetensors"))) == checkpoints.KEEP
    assert "has checkpoints already, up to step 14; pass --resume" in sentence(icnnrt(*command))
    again = json.loads(icnnrt(*command, "--epochs", 2, "--resume").stdout)
    assert (again["resumed_from"], again["accepted"], again["steps"]) == (14, 4, 18)
    assert again["epochs"][-1]["loss"] < first["epochs"][0]["loss"]


@pytest.fixture
def press_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Press Ctrl-C while a later step runs."""

    def arrange(steps: int) -> None:
        done = finetune.FineTuner._step

        def step(self: Any, *arguments: Any) -> Any:
            if self.steps == steps:
                signal.raise_signal(signal.SIGINT)
            return done(self, *arguments)

        monkeypatch.setattr(finetune.FineTuner, "_step", step)

    return arrange


def test_ctrl_c_ends_between_steps_and_writes_the_last_weights(
    train_package: Path, data: Path, tmp_path: Path, press_after: Callable[[int], None]
) -> None:
    out, history = tmp_path / "out.icnn", tmp_path / "history"
    press_after(4)
    handler = signal.getsignal(signal.SIGINT)
    command = ["tune", train_package, data, "--out", out, "--batch-size", 10, "--history", history]
    result = icnnrt(*command, "--epochs", 100)
    assert signal.getsignal(signal.SIGINT) is handler
    assert result.exit_code == 130
    assert "stopped   interrupted" in result.stdout
    assert f"interrupted after 5 steps; the last weights are in {out}" in result.stderr
    assert f"Continue with --resume --history {history}" in result.stderr
    with library.load(train_package) as session:
        tuner = library.FineTuner(session)
        saved = tuner.resume(history)
        assert (saved.step, tuner.steps) == (5, 5)
        for name, array in weights(out).items():
            np.testing.assert_array_equal(array, session.weights[name])


def test_ctrl_c_with_validation_writes_the_best_weights(
    train_package: Path, data: Path, tmp_path: Path, press_after: Callable[[int], None]
) -> None:
    press_after(10)
    out = tmp_path / "out.icnn"
    options = ["--batch-size", 10, "--val", 0.25, "--epochs", 100, "--json"]
    result = icnnrt("tune", train_package, data, "--out", out, *options)
    assert result.exit_code == 130
    content = json.loads(result.stdout)
    assert content["interrupted"] is True
    assert content["validation"] == min(e["validation"] for e in content["epochs"])
    assert "the best weights are in" in result.stderr


def test_ctrl_c_before_the_first_step_was_accepted_writes_nothing(
    train_package: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def press(self: Any, *arguments: Any, **more: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(finetune.FineTuner, "fit", press)
    out = tmp_path / "out.icnn"
    result = icnnrt("tune", train_package, data, "--out", out)
    assert "interrupted before anything was learnt; nothing is written" in sentence(result, 130)
    assert not out.exists()


@pytest.mark.parametrize("rate", [1, 100])
def test_a_rate_that_ruins_the_network_writes_nothing_that_is_worse(tmp_path: Path, rate: int) -> None:
    found = pytest.importorskip("sklearn.datasets").load_digits()
    x, y = (half.reshape(-1, 32)[:100] for half in np.split((found.images / 16).astype(np.float32), 2, axis=2))
    np.savez(tmp_path / "digits.npz", x=x, target=y)
    source, out = (
        Path(__file__).parent.parent / "models/digits_completion/digits_completion.icnn",
        tmp_path / "out.icnn",
    )
    result = icnnrt("tune", source, tmp_path / "digits.npz", "--out", out, "--lr", rate, "--epochs", 3)
    assert result.exit_code == 1
    assert "the step before did harm, so it is undone: " in result.stderr
    assert "lower the learning rate; nothing is written" in result.stderr
    assert not out.exists()
    # What was learnt before at a better rate stays, and that is written.
    history = ["--history", tmp_path / "history"]
    command = ["tune", source, tmp_path / "digits.npz", "--out", out, "--overwrite", *history, "--json"]
    assert icnnrt(*command, "--epochs", 1).exit_code == 0
    before = weights(out)
    result = icnnrt(*command, "--epochs", 3, "--lr", rate, "--resume")
    assert result.exit_code == 3
    content = json.loads(result.stdout)
    assert (content["accepted"], content["steps"]) == (0, 4)
    assert content["refused"] == len(content["epochs"]) * 4
    assert "lower the learning rate" in content["refusal"]
    for name, array in weights(out).items():
        np.testing.assert_array_equal(array, before[name])
    with library.load(out) as session:
        assert session.argmin(x).ok.all()


def test_ctrl_c_after_a_step_that_ruins_the_network_writes_nothing(
    train_package: Path, data: Path, tmp_path: Path, press_after: Callable[[int], None]
) -> None:
    press_after(0)
    out = tmp_path / "out.icnn"
    # Products of weights overflow: a lower rate leaves some small networks as easy to solve as they were.
    result = icnnrt("tune", train_package, data, "--out", out, "--lr", 1e200, "--history", tmp_path / "history")
    assert result.exit_code == 130
    assert "interrupted before anything was learnt; nothing is written" in result.stderr
    assert not out.exists()


def tuning(
    train_package: Path, data: Path, tmp_path: Path, *before: object, **streams: Any
) -> "subprocess.Popen[bytes]":
    """A process that tunes for ever, once it has saved something; `before` starts it."""
    history, out = tmp_path / "history", tmp_path / "out.icnn"
    command = [*before, sys.executable, "-m", "icnnrt", "tune", train_package, data, "--out", out, "--history", history]
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
    process = subprocess.Popen([*map(str, command), "--epochs", "1000000"], **streams)
    while not (history / "history.json").exists() and process.poll() is None:
        time.sleep(0.01)
    return process


def test_no_history_is_kept_in_a_package(train_package: Path, data: Path, tmp_path: Path) -> None:
    source, out = shutil.copytree(train_package, tmp_path / "model.icnn"), tmp_path / "out.icnn"
    before = {file.name: file.read_bytes() for file in source.iterdir()}
    (tmp_path / "link").symlink_to(source, target_is_directory=True)
    for place in (source, source / "history", tmp_path / "link", out, out / "history", tmp_path / "OUT.icnn"):
        options = ["--out", out, "--history", place]
        told = sentence(icnnrt("tune", source, data, *options, "--epochs", 1), 1)
        assert "history: " in told
        assert "; choose " in told
    picture = ["--out", out, "--picture", source / "loss.png"]
    assert "picture: " in sentence(icnnrt("tune", source, data, *picture), 1)
    assert {file.name: file.read_bytes() for file in source.iterdir()} == before
    assert not out.exists()


unix = pytest.mark.skipif(os.name == "nt", reason="no signals to another process on Windows")


@unix
@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (("SIGINT",), 130),
        (("SIGTERM",), 143),
        (("SIGHUP",), 129),
        (("SIGINT", "SIGINT", "SIGINT"), 130),
        (("SIGTERM", "SIGINT", "SIGHUP", "SIGTERM"), 143),
        (("SIGHUP", "SIGTERM", "SIGINT"), 129),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else None,
)
def test_a_process_that_is_told_to_stop_saves_and_says_by_what(
    train_package: Path, data: Path, tmp_path: Path, sent: tuple[str, ...], code: int
) -> None:
    with tuning(train_package, data, tmp_path) as process:
        told = b""
        for name in sent:
            process.send_signal(getattr(signal, name))
            while following.STOPPING.encode() not in told:  # the others come while it writes
                assert process.stderr is not None
                line = process.stderr.readline()
                assert line
                told += line
        told += process.communicate()[1]
    assert process.returncode == code, told
    assert told.count(following.STOPPING.encode()) == 1
    assert b"interrupted after" in told
    assert f"weights are in {tmp_path / 'out.icnn'}".encode() in told
    assert b"Traceback" not in told
    saved, written = (
        checkpoints.History(tmp_path / "history", library.Package.open(train_package).manifest),
        weights(tmp_path / "out.icnn"),
    )
    tensors = saved.load(saved.checkpoints[-1])
    for name, array in written.items():
        np.testing.assert_array_equal(array, tensors[checkpoints.WEIGHT + name])


@unix
@pytest.mark.parametrize("reader", ["a terminal", "a pipe"])
def test_whoever_closes_the_terminal_keeps_what_was_learnt(
    train_package: Path, data: Path, tmp_path: Path, reader: str
) -> None:
    """Every write to a terminal that hung up fails, and so does one to a pipe that nobody reads any more."""
    out = tmp_path / "out.icnn"
    if reader == "a pipe":
        ours, theirs = os.pipe()
        started = tuning(train_package, data, tmp_path, stdout=theirs, stderr=theirs)
    else:
        import pty

        ours, theirs = pty.openpty()
        # The first process of a session of its own, whose terminal this is, so that the kernel tells it of the end.
        lead = (
            "import fcntl, os, sys, termios\n"
            "fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
            "os.execv(sys.argv[1], sys.argv[1:])\n"
        )
        streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs, "start_new_session": True}
        started = tuning(train_package, data, tmp_path, sys.executable, "-c", lead, **streams)
    with started as process:
        os.close(theirs)
        os.close(ours)
        if reader == "a pipe":
            process.send_signal(signal.SIGTERM)
        process.wait()
    assert process.returncode == (143 if reader == "a pipe" else 129)
    assert library.Package.open(out).manifest.metadata["tuned_steps"] >= 1


@unix
def test_a_pipe_that_nobody_reads_costs_nothing_that_was_learnt(
    train_package: Path, data: Path, tmp_path: Path
) -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    command = [sys.executable, "-m", "icnnrt", "tune", train_package, data, "--out", tmp_path / "out.icnn"]
    done = subprocess.run([*map(str, command), "--epochs", "2"], stdout=theirs, stderr=theirs, check=False)
    os.close(theirs)
    assert done.returncode == 1
    assert library.Package.open(tmp_path / "out.icnn").manifest.metadata["tuned_steps"] == 4


@unix
def test_nohup_goes_on(train_package: Path, data: Path, tmp_path: Path) -> None:
    ignore = "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); os.execv(sys.argv[1], sys.argv[1:])"
    with tuning(train_package, data, tmp_path, sys.executable, "-c", ignore) as process:
        process.send_signal(signal.SIGHUP)
        time.sleep(0.1)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate()
    assert process.returncode == 143, told


INTERRUPTED_AT_IMPORT = """
import runpy, signal, sys

class Press:
    def find_spec(name, path=None, target=None):
        if name == sys.argv[0]:
            signal.raise_signal(signal.SIGINT)

sys.meta_path.insert(0, Press)
module = sys.argv.pop(1)
sys.argv[0] = module
import icnnrt.__main__
icnnrt.__main__.main()
"""


@pytest.mark.parametrize(
    "module", ["rich", "typer", "icnnrt.cli.app", "numpy", "icnnrt.tuning.finetune", "onnxruntime"]
)
def test_ctrl_c_while_it_starts_is_one_line(train_package: Path, data: Path, tmp_path: Path, module: str) -> None:
    command = ["tune", train_package, data, "--out", tmp_path / "out.icnn"]
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED_AT_IMPORT, module, *map(str, command)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "icnnrt: interrupted.\n")


def test_when_every_step_is_refused_nothing_is_written(
    train_package: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finetune.FineTuner, "_refusal", lambda *arguments: "the loss is nan; leave the sample out")
    out = tmp_path / "out.icnn"
    result = icnnrt("tune", train_package, data, "--out", out)
    assert result.exit_code == 1
    assert "no step of epoch 1 was accepted: the loss is nan; leave the sample out; nothing is written" in result.stderr
    assert result.stdout == ""
    assert not out.exists()


def test_when_steps_are_refused_later_what_was_learnt_is_written_with_exit_code_3(
    train_package: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = finetune.FineTuner._refusal
    monkeypatch.setattr(
        finetune.FineTuner,
        "_refusal",
        lambda self, *arguments: "it is too late" if self.steps >= 4 else judge(self, *arguments),
    )
    out = tmp_path / "out.icnn"
    result = icnnrt("tune", train_package, data, "--out", out)
    assert result.exit_code == 3
    assert "last because it is too late" in result.stdout
    assert "steps     4 accepted, 2 refused" in result.stdout
    assert f"no step of epoch 3 was accepted: it is too late; what was learnt before is in {out}" in result.stderr
    assert library.Package.open(out).manifest.metadata["tuned_steps"] == 4


def test_a_history_that_cannot_be_written_loses_nothing(
    train_package: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Any, *arguments: Any) -> None:
        raise OSError(28, "No space left on device", str(self.folder))

    monkeypatch.setattr(checkpoints.History, "save", full)
    out = tmp_path / "out.icnn"
    result = icnnrt("tune", train_package, data, "--out", out, "--history", tmp_path / "history")
    assert result.exit_code == 1
    assert f"No space left on device, so tuning ended; what was learnt is in {out}" in result.stderr
    assert library.Package.open(out).manifest.metadata["tuned_steps"] == 2


def full(*arguments: Any, **more: Any) -> None:
    raise OSError(28, "No space left on device")


def test_an_out_that_cannot_be_written_loses_nothing(
    train_package: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was learnt is written elsewhere; if nothing can be written, that is told."""
    out, elsewhere = tmp_path / "out.icnn", tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(elsewhere))
    real = replacement.replace_folder
    monkeypatch.setattr(replacement, "replace_folder", lambda at, *more: full() if at == out else real(at, *more))
    result = icnnrt("tune", train_package, data, "--out", out, "--epochs", 1)
    assert result.exit_code == 1
    (written,) = elsewhere.glob("icnnrt-*/out.icnn")
    assert f"{out}: No space left on device; what was learnt is in {written}, so make room and copy" in result.stderr
    assert library.Package.open(written).manifest.metadata["tuned_steps"] == 2
    assert not out.exists()
    monkeypatch.setattr(replacement, "replace_folder", full)
    for options, kept in ([], "nothing is kept"), (["--history", tmp_path / "h"], "the last checkpoint is in"):
        result = icnnrt("tune", train_package, data, "--out", out, "--epochs", 1, *options)
        assert result.exit_code == 1
        assert f"{out}: No space left on device, nor is there room in {elsewhere}; {kept}" in result.stderr


def test_an_out_in_a_folder_that_is_shut_is_told_before_tuning(
    train_package: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)  # root may write everywhere
    told = sentence(icnnrt("tune", train_package, data, "--out", tmp_path / "out.icnn"))
    assert f"out: its folder {tmp_path} cannot be written to; choose another" in told


# --- The picture ---------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_the_picture(train_package: Path, data: Path, tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / f"loss{suffix}"
    options = ["--epochs", 2, "--val", 0.2, "--picture", picture]
    result = icnnrt("tune", train_package, data, "--out", tmp_path / "out.icnn", *options)
    assert result.exit_code == 0, result.output
    assert f"picture   {picture}" in result.stdout
    assert picture.stat().st_size > 1000


def test_a_picture_that_cannot_be_written_spoils_nothing(
    train_package: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figure = pytest.importorskip("matplotlib.figure")
    monkeypatch.setattr(figure.Figure, "savefig", full)
    picture, out = tmp_path / "loss.png", tmp_path / "out.icnn"
    result = icnnrt("tune", train_package, data, "--out", out, "--epochs", 1, "--picture", picture, "--json")
    assert result.exit_code == 0, result.output
    assert "No space left on device" in result.stderr
    assert json.loads(result.stdout)["picture"] is None
    assert out.exists()


def test_without_matplotlib_one_sentence_says_so_and_the_rest_is_done(
    train_package: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: None)
    picture, out = tmp_path / "loss.png", tmp_path / "out.icnn"
    result = icnnrt("tune", train_package, data, "--out", out, "--epochs", 1, "--picture", picture)
    assert result.exit_code == 0, result.output
    assert "no picture: matplotlib is not installed; pip install matplotlib" in result.stderr
    assert out.exists()
    assert not picture.exists()


# --- Bad input -----------------------------------------------------------------------------------


def test_wrong_usage_is_exit_code_2(train_package: Path, data: Path, tmp_path: Path) -> None:
    command = ["tune", train_package, data, "--out", tmp_path / "out.icnn"]
    for options in (["--patience", 2], ["--resume"], ["--epochs", 0], ["--batch-size", 0], ["--lr", "fast"]):
        assert icnnrt(*command, *options).exit_code == 2, options
    assert icnnrt("tune", train_package, data).exit_code == 2
    assert not (tmp_path / "out.icnn").exists()


def test_every_bad_input_is_one_sentence_and_writes_nothing(
    train_package: Path, relu_package: Path, data: Path, tmp_path: Path
) -> None:
    x, target = arrays(data)
    out = tmp_path / "out.icnn"

    def bad(*options: object, package: Path = train_package, source: Path = data) -> str:
        told = sentence(icnnrt("tune", package, source, "--out", out, *options))
        assert not out.exists()
        return told

    def save(**given: Any) -> Path:
        np.savez(tmp_path / "bad.npz", **given)
        return tmp_path / "bad.npz"

    told = bad(package=relu_package)
    assert "has no train.onnx, so it cannot be tuned" in told
    assert "icnnrt export --train squared_error" in told
    (tmp_path / "cut.npz").write_bytes(data.read_bytes()[:-40])
    assert "whose end is missing or damaged, so it is perhaps truncated; copy or save it" in bad(
        source=tmp_path / "cut.npz"
    )
    (tmp_path / "text.npz").write_text("x, y")
    assert "expected a .npz archive, but got something else" in bad(source=tmp_path / "text.npz")
    assert "expected a package folder" in bad(package=tmp_path / "missing.icnn")
    assert "cannot be read" in bad(source=tmp_path / "missing.npz")
    assert "ending in .npz" in bad(source=tmp_path / "data.csv")
    assert "expected an array named 'target'" in bad(source=save(x=x))
    assert "x: expected shape [B, 3], but got [40, 2]" in bad(source=save(x=x[:, :2], target=target))
    assert "target: expected shape [40, 4], but got [39, 4]" in bad(source=save(x=x, target=target[1:]))
    assert "expected at least one sample, but got none" in bad(source=save(x=x[:0], target=target[:0]))
    assert "expected numbers in [0, 1], where y lies" in bad(source=save(x=x, target=2 * target))
    assert "NaN or infinity in every sample" in bad(source=save(x=np.nan * x, target=target))
    assert "learning_rate: expected a finite number of at least 0" in bad("--lr", -1)
    for fraction in ("0", "1", "1.5", "nan"):
        assert "val: expected a part of the data between 0 and 1" in bad("--val", fraction)
    assert "leaves none to learn from" in bad("--val", 0.9, source=save(x=x[:1], target=target[:1]))
    assert "cannot be read" in bad("--val", tmp_path / "missing.npz")
    assert "resume: expected a checkpoint in" in bad("--resume", "--history", tmp_path / "nothing")
    assert "is not there; create it first" in bad("--history", tmp_path / "nowhere" / "history")
    assert "is not there; create it first" in bad("--picture", tmp_path / "nowhere" / "loss.png")
    assert "ending in .png, .svg, .pdf, but got" in bad("--picture", tmp_path / "loss.txt")
    told = sentence(icnnrt("tune", train_package, data, "--out", tmp_path / "nowhere" / "out.icnn"))
    assert "create it first" in told
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    told = sentence(icnnrt("tune", train_package, data, "--out", tmp_path / "taken", "--overwrite"))
    assert "is not a package of plain files alone, so it is not replaced" in told


def test_targets_may_be_called_y(train_package: Path, data: Path, tmp_path: Path) -> None:
    x, target = arrays(data)
    np.savez(tmp_path / "y.npz", x=x, y=target)
    np.savez(tmp_path / "both.npz", x=x, y=target[:, :1], target=target)
    found = []
    for name in ("data.npz", "y.npz", "both.npz"):
        out = tmp_path / f"{name}.icnn"
        assert icnnrt("tune", train_package, tmp_path / name, "--out", out, "--epochs", 1).exit_code == 0
        found.append(library.Package.open(out).manifest.weights.sha256)
    assert len(set(found)) == 1


# --- What the other commands do with a training graph --------------------------------------------


def test_inspect_shows_the_training_graph(train_package: Path, relu_package: Path) -> None:
    told = icnnrt("inspect", train_package).stdout
    for text in (
        "training: squared_error of y and target [4] float64, exact adjoint",
        "Adam: betas[0] 0.9, betas[1] 0.999",
        "numbers: all trainable weights",
    ):
        assert text in told
    assert json.loads(icnnrt("inspect", train_package, "--json").stdout)["train"]["optimizer"] == "Adam"
    assert "training: none" in icnnrt("inspect", relu_package).stdout


def test_export_with_a_training_graph_then_tune(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("onnxscript")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "cli_factory", raising=False)
    Path("cli_factory.py").write_text(FACTORY)
    export = ["export", "cli_factory:layer", "--out", "made.icnn"]
    for options in (["--optimizer", "sgd"], ["--train-weights", "last"], ["--clip-norm", 1]):
        assert icnnrt(*export, *options).exit_code == 2
    assert icnnrt(*export, "--train", "unknown").exit_code == 2
    assert "clip_norm: expected a positive number" in sentence(icnnrt(*export, "--train", "huber", "--clip-norm", -1))
    told = icnnrt(*export, "--train", "huber", "--train-weights", "nothing.*")
    assert told.exit_code == 1
    assert "the pattern 'nothing.*' fits none" in told.stderr
    chosen = ["--optimizer", "sgd", "--train-weights", "layers.1.*, layers.0.b", "--clip-norm", 0.5]
    made = icnnrt(*export, "--train", "huber", *chosen)
    assert made.exit_code == 0, made.output
    shown = icnnrt("inspect", "made.icnn").stdout
    for text in ("training: huber", "gradients clipped to norm 0.5", "SGD: momentum 0.9", "layers.1.W_y", "leaves"):
        assert text in shown
    rng = np.random.default_rng(0)
    np.savez("data.npz", x=rng.standard_normal((20, 2)), y=rng.random((20, 3)))
    assert icnnrt("tune", "made.icnn", "data.npz", "--out", "tuned.icnn").exit_code == 0
    before, after = weights(Path("made.icnn")), weights(Path("tuned.icnn"))
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    assert "layers.0.b" in moved
    assert "layers.0.W_y" not in moved
