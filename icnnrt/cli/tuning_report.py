"""What a tuning came to: a table and a few lines on the terminal, and a picture of the loss."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from rich.markup import escape
from rich.table import Table

from icnnrt.cli.app import console, number
from icnnrt.cli.following import Followed

EPOCHS_SHOWN: Final = 12


def show_tuning(summary: Mapping[str, Any], judged: bool) -> None:
    screen = console()
    reports: Sequence[Mapping[str, Any]] = summary["epochs"]
    best = summary["best_epoch"]
    if reports:
        headings = ["epoch", "loss", *(["validation"] if judged else []), "largest gap", "steps", "refused", "seconds"]
        table = Table(*headings)
        if judged and summary["validation_before"] is not None:
            row = ["before", "–", number(summary["validation_before"], 4), "–", "–", "–", "–"]
            table.add_row(*([f"[bold green]{cell}[/]" for cell in row] if best == 0 else row))
        last = None
        for i in _chosen(len(reports), best):
            if last is not None and i > last + 1:
                table.add_row(*["…"] * len(headings))
            last, report = i, reports[i]
            row = [str(report["epoch"]), number(report["loss"], 4)]
            if judged:
                row.append(number(report["validation"], 4) + (" rolled back" if report["rolled_back"] else ""))
            row += [number(report["gap_max"]), str(report["accepted"]), str(report["refused"])]
            row.append(f"{report['seconds']:.1f}")
            table.add_row(*([f"[bold green]{cell}[/]" for cell in row] if best == report["epoch"] else row))
        screen.print(table)
    if best == 0:
        screen.print("[yellow]no epoch was better than the weights from before[/], so these are written")
    if summary["stopped"]:
        screen.print(f"stopped   {escape(summary['stopped'])}")
    held = f", {summary['validation_samples']} to judge by" if judged else ""
    skipped = f", {summary['skipped']} skipped for NaN or infinity" if summary["skipped"] else ""
    screen.print(f"samples   {summary['samples']}{held}{skipped}")
    resumed = "" if summary["resumed_from"] is None else f", continued from step {summary['resumed_from']}"
    screen.print(f"steps     {summary['accepted']} accepted, {summary['refused']} refused{resumed}")
    if summary["refusal"]:
        screen.print(f"[yellow]refused[/]   last because {escape(summary['refusal'])}")
    for key in ("history", "picture"):
        if summary[key]:
            screen.print(f"{key:<9} {escape(summary[key])}")
    screen.print(f"written   {escape(summary['out'])} after {summary['seconds']:.1f} s")


def _chosen(count: int, best: int | None) -> list[int]:
    """Rows of a table that would be too long: the first, the best, the last ones."""
    if count <= EPOCHS_SHOWN:
        return list(range(count))
    rows = {0, *range(count - EPOCHS_SHOWN + 2, count)}
    return sorted(rows | ({best - 1} if best else set()))


def draw(target: Path, followed: Followed) -> None:
    """Loss of every step, of every epoch, and validation."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axis = figure.subplots()
    finite = [(i, s.loss) for i, s in enumerate(followed.steps, 1) if math.isfinite(s.loss)]
    if finite:
        axis.plot(*zip(*finite, strict=True), color="0.75", linewidth=0.8, label="loss of a step")
    # An epoch is drawn where it ended.
    ends, end = [], 0
    for report in followed.epochs:
        end += report.accepted + report.refused
        ends.append(end)
    marker = "o" if len(ends) <= EPOCHS_SHOWN else ""
    axis.plot(ends, [r.loss for r in followed.epochs], color="C0", marker=marker, markersize=3, label="of an epoch")
    judged = [(at, r.validation) for at, r in zip(ends, followed.epochs, strict=True) if r.validation is not None]
    if judged:
        axis.plot(*zip(*judged, strict=True), color="C1", marker=marker, markersize=3, label="validation")
    if all(loss > 0 for _, loss in finite):
        axis.set_yscale("log")
    axis.set_xlabel("step")
    axis.set_ylabel("loss")
    axis.legend(frameon=False)
    figure.savefig(target, dpi=120)
