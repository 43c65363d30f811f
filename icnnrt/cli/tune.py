"""`icnnrt tune`: fine-tuning on the command line, with onnxruntime alone."""

import importlib.util
import os
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.markup import escape

from icnnrt.arguments import refused
from icnnrt.cli.app import ERROR, FollowFlag, JsonFlag, NativeFlag, PackageArgument, app, console, print_json, tell
from icnnrt.cli.following import Followed, between_steps, whoever_listens
from icnnrt.cli.tuning_report import draw, show_tuning
from icnnrt.errors import InputError

if TYPE_CHECKING:
    from icnnrt.format.manifest import Manifest
    from icnnrt.tuning.finetune import FineTuner
    from icnnrt.tuning.reports import FitReport

STOPPED: Final = 3
PICTURES: Final = (".png", ".svg", ".pdf")
TARGET: Final = {"target": "y"}  # the other name that targets may have in a file


@app.command()
def tune(
    package: PackageArgument,
    data: Annotated[Path, typer.Argument(metavar="DATA", help="An .npz with x and target (or y), one row a sample.")],
    out: Annotated[
        Path, typer.Option(help="The package to write; PACKAGE itself, with --overwrite, to tune it in place.")
    ],
    epochs: Annotated[
        int, typer.Option(min=1, help="Passes over the data; after --resume, so many more of them.")
    ] = 10,
    learning_rate: Annotated[float, typer.Option("--lr", help="Learning rate of the package's optimiser.")] = 1e-3,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples in one step.")] = 32,
    val: Annotated[
        str | None,
        typer.Option(
            metavar="FRACTION|FILE",
            help="Data to judge by after every epoch, so that the best weights are written and not the last: a part "
            "of DATA to hold out, such as 0.1, or another .npz.",
        ),
    ] = None,
    patience: Annotated[
        int | None, typer.Option(min=1, help="Stop after so many epochs without a better validation loss.")
    ] = None,
    history: Annotated[
        Path | None, typer.Option(help="Folder for a checkpoint after every epoch; the last five are kept.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the last checkpoint of --history, optimiser included.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the order of the samples, and of what is held out.")] = 0,
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse samples with NaN or infinity; otherwise they are skipped.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a package that is there.")] = False,
    picture: Annotated[Path | None, typer.Option(help="Draw the loss: .png, .svg or .pdf. Needs matplotlib.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads within one operator; 1 by default.")] = None,
    native: NativeFlag = None,
    follow_links: FollowFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Adapt the weights of a package to DATA by its training graph, and write a new package. Needs no torch.

    Steps that would harm are refused and counted, and one that did harm is undone and counted with them. Ctrl-C,
    SIGTERM and SIGHUP end between two steps and write what was learnt: the best weights if there is validation data,
    else the last ones.

    Exit codes:
    0 written
    1 an error, told in one sentence on stderr
    2 wrong usage
    3 stopped early, since every step of an epoch was refused or undone; what was learnt before is written
    130 interrupted by Ctrl-C, 143 by SIGTERM, 129 by SIGHUP; what was learnt is written
    """
    from icnnrt.format.checkpoints import History
    from icnnrt.format.package import Package
    from icnnrt.serving.load import load
    from icnnrt.tuning.finetune import FineTuner

    _check_usage(val, patience, history, resume)
    _check_places(out, overwrite, history, picture)
    opened = Package.open(package, follow_links=follow_links)
    began = time.perf_counter()
    with load(opened, threads=threads, native=native) as session:
        tuner = FineTuner(session, learning_rate=learning_rate, strict=strict)
        there = History.to_write(history, opened.manifest).checkpoints if history else []
        if resume and not there:
            raise InputError(f"resume: expected a checkpoint in {history}, but there is none; leave out --resume.")
        if there and not resume:
            raise InputError(
                f"history: {history} has checkpoints already, up to step {there[-1].step}; pass --resume to continue "
                "from there, or choose another folder."
            )
        samples, held = _samples(data, val, opened.manifest, seed)
        resumed_from = tuner.resume(history).step if resume and history else None
        # Whoever continues wants another order of the samples than that of the first epochs again.
        order = seed if resumed_from is None else seed + resumed_from
        screen = console(err=True)
        if picture and importlib.util.find_spec("matplotlib") is None:
            screen.print("[yellow]no picture:[/] matplotlib is not installed; pip install matplotlib.")
            picture = None

        followed = Followed(epochs, len(samples[0]), batch_size)
        fitted: FitReport | None = None
        failure: OSError | None = None
        with between_steps(followed):
            with followed.shown():
                try:
                    fitted = tuner.fit(
                        *samples,
                        epochs=epochs,
                        batch_size=batch_size,
                        validation=held,
                        patience=patience,
                        seed=order,
                        history=history,
                        on_step=followed.step,
                        on_epoch=followed.epoch,
                    )
                except KeyboardInterrupt:
                    pass
                except OSError as error:  # of the history: the weights are in memory still
                    failure = error
            interrupted = fitted is None and failure is None
            tuner.settle()  # what is written has been looked at
            accepted = sum(report.accepted for report in followed.steps) - tuner.undone
            if not accepted and resumed_from is None:
                if interrupted:
                    with whoever_listens(interrupted):
                        tell("interrupted before anything was learnt; nothing is written.")
                    raise typer.Exit(followed.code)
                if fitted:
                    why = fitted.stopped or tuner.why_undone
                    raise InputError(f"data: {why}; nothing is written.")
            if interrupted and history and followed.steps:
                try:
                    tuner.save(history, figures={"loss": followed.steps[-1].loss})
                except OSError as error:
                    failure = error
            if fitted is None and held is not None:
                tuner.rollback()  # to the best weights met
            judged = None if held is None else tuner.loss(*held)
            written, unwritten = _write(tuner, out, overwrite, history)
        if picture:
            try:
                draw(picture, followed)
            except OSError as error:
                screen.print(f"[yellow]no picture:[/] {escape(str(picture))}: {error.strerror or error}.")
                picture = None

    summary = {
        "package": str(opened.path),
        "data": str(data),
        "out": str(written),
        "samples": len(samples[0]),
        "validation_samples": 0 if held is None else len(held[0]),
        "resumed_from": resumed_from,
        "steps": tuner.steps,
        "accepted": accepted,
        "refused": len(followed.steps) - accepted,
        "refusal": next((s.reason for s in reversed(followed.steps) if not s.accepted), tuner.why_undone or None),
        "skipped": followed.epochs[-1].skipped if followed.epochs else None,
        "loss": followed.epochs[-1].loss if followed.epochs else None,
        "validation_before": fitted.validation_before if fitted else None,
        "validation": judged,
        "best_epoch": fitted.best_epoch if fitted else None,
        "stopped": fitted.stopped if fitted else "interrupted" if interrupted else "the history cannot be written",
        "interrupted": interrupted,
        "history": str(history) if history else None,
        "picture": str(picture) if picture else None,
        "native": session.native,
        "seconds": time.perf_counter() - began,
        "epochs": [r.as_dict() | {"gap_max": gap} for r, gap in zip(followed.epochs, followed.gaps, strict=True)],
    }
    told, code = [], 0
    if failure is not None:
        notes = " ".join(getattr(failure, "__notes__", []))
        where = f"{failure.filename}: " if failure.filename else ""
        told.append(f"{where}{failure.strerror or failure}, so tuning ended; what was learnt is in {written}. {notes}")
    if unwritten:
        told.append(unwritten)
    if told:
        code = ERROR
    elif interrupted:
        more = f" Continue with --resume --history {history}." if history else ""
        which = "the best" if held is not None else "the last"
        told, code = (
            [f"interrupted after {len(followed.steps)} steps; {which} weights are in {written}.{more}"],
            followed.code,
        )
    elif fitted and fitted.epochs and not fitted.epochs[-1].accepted:
        told.append(f"{fitted.stopped}; what was learnt before is in {written}.")
        code = STOPPED
    with whoever_listens(interrupted):
        if as_json:
            print_json(summary)
        else:
            show_tuning(summary, held is not None)
        for sentence in told:
            tell(sentence)
    if code:
        raise typer.Exit(code)


# --- Before the work -----------------------------------------------------------------------------


def _check_usage(val: str | None, patience: int | None, history: Path | None, resume: bool) -> None:
    if patience is not None and val is None:
        raise typer.BadParameter("--patience needs --val, which it waits for.")
    if resume and history is None:
        raise typer.BadParameter("--resume needs --history, the folder with the checkpoints.")


def _check_places(out: Path, overwrite: bool, history: Path | None, picture: Path | None) -> None:
    """What can be known of the places to write to is told now, not after hours of tuning."""
    from icnnrt.format.checkpoints import check_apart
    from icnnrt.format.folder import check_place
    from icnnrt.format.replacement import check_target

    if os.path.lexists(out) and not overwrite:
        raise InputError(f"out: {out} is there already; pass --overwrite to replace it, or choose another.")
    check_target(Path(os.path.abspath(out)), overwrite)
    if not os.access(out.absolute().parent, os.W_OK):
        raise InputError(f"out: its folder {out.absolute().parent} cannot be written to; choose another.")
    if history is not None:
        check_apart(history, out)
        check_place(history, "history")
    if picture is not None:
        if picture.suffix.lower() not in PICTURES:
            raise refused("picture", f"a file name ending in {', '.join(PICTURES)}", picture)
        check_place(picture, "picture")


def _samples(
    data: Path, val: str | None, manifest: "Manifest", seed: int
) -> tuple[tuple[Any, Any], tuple[Any, Any] | None]:
    """(x, target) to learn from, and those to judge by."""
    import numpy as np

    x, target = _read(data, manifest)
    if val is None:
        return (x, target), None
    try:
        fraction = float(val)
    except ValueError:
        return (x, target), _read(Path(val), manifest)
    if not 0 < fraction < 1:
        raise refused("val", "a part of the data between 0 and 1, or a file", val)
    count = max(1, round(fraction * len(x)))
    if count >= len(x):
        raise InputError(f"val: {val} of the {len(x)} samples in {data} leaves none to learn from; give more samples.")
    # A stream of its own: the order of the samples does not depend on what is held out.
    rows = np.random.default_rng([seed, 1]).permutation(len(x))
    learnt, judged = np.sort(rows[count:]), np.sort(rows[:count])
    return (x[learnt], target[learnt]), (x[judged], target[judged])


def _read(path: Path, manifest: "Manifest") -> tuple[Any, Any]:
    from icnnrt.arguments import check_shape
    from icnnrt.cli import tabular

    arrays = tabular.read_archive(path, ("x", "target"), also=TARGET)
    x, target = arrays["x"], arrays["target"]
    assert manifest.train is not None
    check_shape(x.shape, "x", manifest.x_shape, where=str(path))
    check_shape(target.shape, "target", manifest.train.target_shape, length=len(x), where=str(path))
    if not len(x):
        raise refused(str(path), "at least one sample", "none")
    return x, target


# --- After the work ------------------------------------------------------------------------------


def _write(tuner: "FineTuner", out: Path, overwrite: bool, history: Path | None) -> tuple[Path, str]:
    """Where the package is, and why it is not at `out`: hours of tuning are not lost to a disk that is full, nor to
    what has come to lie at `out` meanwhile."""
    try:
        tuner.write_package(out, overwrite=overwrite)
        return out, ""
    except InputError as error:
        why, remedy = str(error).removesuffix("."), ""
        fault: Exception = error
    except OSError as error:
        why, remedy = f"{out}: {error.strerror or error}", ", so make room and copy it from there"
        fault = error
    try:
        aside = Path(tempfile.mkdtemp(prefix="icnnrt-")) / (out.name or "tuned.icnn")
        return tuner.write_package(aside).path, f"{why}; what was learnt is in {aside}{remedy}."
    except OSError as error:
        kept = f"the last checkpoint is in {history}" if history and history.is_dir() else "nothing is kept"
        raise OSError(
            error.errno,
            f"{why}, nor is there room in {tempfile.gettempdir()}; {kept}, so make room first.",
            str(out),
        ) from fault
