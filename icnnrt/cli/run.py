"""`icnnrt run`: answers for the rows of a file."""

import math
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.markup import escape
from rich.table import Table

from icnnrt.cli.app import (
    NOT_CONVERGED,
    ROWS_SHOWN,
    FollowFlag,
    JsonFlag,
    MebibytesOption,
    NativeFlag,
    PackageArgument,
    SecondsOption,
    UntrustedFlag,
    app,
    console,
    number,
    print_json,
    tell,
    with_limits,
)
from icnnrt.errors import InputError
from icnnrt.printable import named

ENTRIES_SHOWN: Final = 4
BATCH: Final = 1024  # samples in one run: larger ones are no faster, and their cuts take memory


@app.command()
def run(
    context: typer.Context,
    package: PackageArgument,
    source: Annotated[
        Path,
        typer.Argument(
            metavar="INPUT",
            help="x: an .npz (array x, or the only one), an .npy, or a .csv with one sample a line, x flattened, and "
            "at most one line of names.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="Where to write: .npz for every field of the answer, .npy or .csv for y (or z) alone."),
    ] = None,
    y_init: Annotated[
        Path | None,
        typer.Option(help="Where the solver starts, one row a sample in 0..1: .npz (y_init), .npy or .csv."),
    ] = None,
    lower: Annotated[
        str | None,
        typer.Option(
            metavar="NUMBER|FILE", help="Lower bounds of y, of a package whose domain is a box: one number, or a file."
        ),
    ] = None,
    upper: Annotated[str | None, typer.Option(metavar="NUMBER|FILE", help="Upper bounds of y, likewise.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Write nothing unless every sample converged.")] = False,
    provider: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Execution provider of onnxruntime; give several in order of preference."),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads within one operator; 1 by default.")] = None,
    native: NativeFlag = None,
    follow_links: FollowFlag = False,
    untrusted: UntrustedFlag = False,
    seconds: SecondsOption = None,
    mebibytes: MebibytesOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Solve y* = argmin of energy and regulariser over the package's domain for every sample of INPUT.

    Of a network of quadratic programs that is its answer z, for which there are neither bounds nor a start.

    Exit codes:
    0 every sample converged, or is solved
    1 an error, told in one sentence on stderr
    2 wrong usage
    3 some sample did not, or is not; the result is written all the same, except with --strict
    """
    import numpy as np

    from icnnrt.arguments import check_shape, refused
    from icnnrt.cli import tabular
    from icnnrt.format.package import Package
    from icnnrt.mathematics.status import Status
    from icnnrt.serving.load import load

    with_limits(context, untrusted, seconds, mebibytes)
    suffix = tabular.check_result(out, source=source) if out else ""
    opened = Package.open(package, follow_links=follow_links)
    manifest = opened.manifest
    qp = manifest.kind == "qp"
    if qp:
        for name, option in (("y_init", y_init), ("lower", lower), ("upper", upper)):
            if option is not None:
                expected = f"none, as {named(manifest.name)} is a network of quadratic programs"
                raise refused(name, expected, option, "leave it out")
    elif manifest.solver is None:
        raise InputError(
            f"package: {named(manifest.name)} was exported without a solver, so there is no argmin to run; use its "
            "heads from Python, or export it again with a solver."
        )
    x = tabular.read_array(source, "x", manifest.x_shape)
    check_shape(x.shape, "x", manifest.x_shape, where=str(source))
    start = tabular.read_array(y_init, "y_init", manifest.y_shape) if y_init else None
    if start is not None:
        check_shape(start.shape, "y_init", manifest.y_shape, length=len(x), where=str(y_init))
    bounds = {
        name: tabular.bound(given, name, manifest.y_shape, len(x))
        for name, given in (("lower", lower), ("upper", upper))
        if given is not None
    }
    cuts = manifest.solver.iterations if manifest.solver else 0
    tabular.check_size(len(x), cuts, manifest.y_shape[0], np.dtype(manifest.dtype), suffix)

    began = time.perf_counter()
    with load(opened, providers=provider, threads=threads, native=native) as session:

        def answered(rows: Any, y_init: Any = None) -> Any:
            return session.solve_qp(x[rows]) if qp else session.argmin(x[rows], y_init=y_init, **_rows(bounds, rows))

        # The first run makes the session, which is no time per sample.
        answered(np.flatnonzero(np.isfinite(x.reshape(len(x), math.prod(x.shape[1:]))).all(1))[:1])
        ready, began = time.perf_counter() - began, time.perf_counter()
        parts = []
        for first in range(0, max(len(x), 1), BATCH):
            rows = slice(first, first + BATCH)
            parts.append(answered(rows, None if start is None else start[rows]))
        took = time.perf_counter() - began

    def column(name: str) -> Any:
        return np.concatenate([getattr(part, name) for part in parts])

    y, status = column("y"), column("status")
    # What the answer is, and the figures of each sample that tell how good it is.
    figures = {"residual": column("residual")} if qp else {"energy": column("energy"), "gap": column("gap")}
    failed = np.flatnonzero(status != 0)
    advice = ""
    if failed.size:
        part, at = parts[failed[0] // BATCH], int(failed[0] % BATCH)
        advice = part.advice(at).replace(f"sample {at}:", f"sample {failed[0]}:", 1)
    if strict and failed.size:
        verb = "are not solved" if qp else "did not converge"
        tell(f"{failed.size} of {len(y)} samples {verb}, nothing is written: {advice}.")
        raise typer.Exit(NOT_CONVERGED)
    info = {**parts[0].info, "seconds": took, "package": str(opened.path), "input": str(source)}
    if out:
        tabular.write_answers(out, y, parts, info)

    name, told = ("residual", figures["residual"].max(1)) if qp else ("gap", figures["gap"])
    finite = told[np.isfinite(told)]
    names = [Status(code).name for code in status]
    summary = {
        "package": str(opened.path),
        "samples": len(y),
        "status": {Status(code).name: count for code, count in sorted(Counter(status.tolist()).items())},
        f"{name}_median": float(np.median(finite)) if finite.size else None,
        f"{name}_max": float(finite.max()) if finite.size else None,
        "milliseconds_per_sample": 1e3 * took / len(y) if len(y) else None,
        "ready_seconds": ready,
        "providers": list(session.providers),
        "native": session.native,
        "advice": advice or None,
        "out": str(out) if out else None,
    }
    if as_json:
        answers = {"z" if qp else "y": y, **figures, "sample_status": names}
        print_json(summary if out else {**summary, **answers})
    else:
        _show_answers(summary, "z" if qp else "y", y, {**figures, name: told}, names)
    if failed.size:
        raise typer.Exit(NOT_CONVERGED)


def _rows(bounds: Mapping[str, Any], rows: Any) -> dict[str, Any]:
    return {name: bound if isinstance(bound, float) else bound[rows] for name, bound in bounds.items()}


def _show_answers(
    summary: Mapping[str, Any], letter: str, y: Any, figures: Mapping[str, Any], status: list[str]
) -> None:
    """`figures` name -> [B]; the last of them is the one that the summary tells of."""
    screen = console()
    if summary["out"] is None and len(y):
        table = Table("sample", "status", *figures, letter)
        for i, row in enumerate(y[:ROWS_SHOWN]):
            entries = " ".join(f"{value:.4f}" for value in row[:ENTRIES_SHOWN])
            more = f" … {len(row)} entries" if len(row) > ENTRIES_SHOWN else ""
            good = "green" if status[i] in ("CONVERGED", "SOLVED") else "yellow"
            told = (number(figure[i], 6 if name == "energy" else 3) for name, figure in figures.items())
            table.add_row(str(i), f"[{good}]{status[i]}[/]", *told, escape(entries + more))
        screen.print(table)
        if len(y) > ROWS_SHOWN:
            screen.print(f"… and {len(y) - ROWS_SHOWN} more; --out FILE writes them all")
    counts = ", ".join(f"{count} {name}" for name, count in summary["status"].items())
    if summary["samples"]:
        *_, name = figures
        screen.print(f"samples   {summary['samples']}: {counts}")
        screen.print(f"{name:<9} median {number(summary[f'{name}_median'])}, max {number(summary[f'{name}_max'])}")
        screen.print(
            f"time      {number(summary['milliseconds_per_sample'])} ms a sample on {summary['providers'][0]}"
            f"{', native operators' if summary['native'] else ', portable operators'}, "
            f"ready after {summary['ready_seconds']:.2f} s"
        )
    else:
        screen.print("no samples")
    if summary["advice"]:
        screen.print(f"[yellow]advice[/]    {escape(summary['advice'])}")
    if summary["out"]:
        screen.print(f"written   {escape(summary['out'])}")
