"""`python -m benchmarks`; see the package's docstring for what and how it measures."""

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from benchmarks import tables
from benchmarks.settings import Settings
from icnnrt.cli.app import console
from icnnrt.errors import IcnnrtError

BUDGET, QUICK_BUDGET = 2.0, 0.12  # seconds for the contenders of one row
FORMAT = 1  # of the JSON


class Part(StrEnum):
    """What can be measured."""

    inner = "inner"
    adjoint = "adjoint"
    argmin = "argmin"
    scaling = "scaling"
    tune = "tune"
    heads = "heads"
    qp = "qp"
    solve = "solve"
    polyhedron = "polyhedron"


class Precision(StrEnum):
    """The dtypes that operators come in."""

    float32 = "float32"
    float64 = "float64"


app = typer.Typer(
    add_completion=False, rich_markup_mode="rich", context_settings={"help_option_names": ["-h", "--help"]}
)


@app.command()
def benchmarks(
    parts: Annotated[
        list[Part] | None, typer.Argument(metavar="[PART]...", help=f"{', '.join(Part)}; all by default.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Few settings and few rounds, in seconds: whether it works, not how fast.")
    ] = False,
    json_to: Annotated[
        str | None,
        typer.Option("--json", metavar="FILE|-", help="Write everything as JSON; - is stdout, and nothing else there."),
    ] = None,
    plot_to: Annotated[Path | None, typer.Option("--plot", metavar="FILE.png", help="Draw the scaling.")] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Batch sizes; 1 and 128 by default.")] = None,
    dtype: Annotated[list[Precision] | None, typer.Option(help="Both by default.")] = None,
    threads: Annotated[
        list[int] | None, typer.Option(min=0, help="1, or 0 for every library's own default; both by default.")
    ] = None,
    budget: Annotated[
        float | None, typer.Option(min=0.0, help=f"Seconds for the contenders of one row; {BUDGET} by default.")
    ] = None,
    programs: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            exists=True,
            file_okay=False,
            help="Solve every .mps and .qps in it as well, by all solvers of quadratic programs.",
        ),
    ] = None,
) -> None:
    """Measure icnnrt against its peers and against its floor: ratios, side by side in one run.

    Contenders that cannot run here are told with the reason. The whole takes about half an hour.

    Exit codes:
    0 measured; whether targets are met is in the tables
    1 an error, told in one sentence on stderr
    2 wrong usage
    """
    chosen = list(dict.fromkeys(parts or Part))
    if plot_to is not None and Part.scaling not in chosen:
        raise typer.BadParameter("--plot draws the part scaling; name it too, or leave the parts out.")
    for option, path in (("--json", json_to), ("--plot", plot_to)):
        if path not in (None, "-") and not Path(path).parent.is_dir():
            raise typer.BadParameter(f"{option}: the folder of {path} is not there.")
    began = time.perf_counter()
    to_stdout = json_to == "-"
    screen = console(err=True) if to_stdout else console()
    found: dict[str, Any] = {"format": FORMAT}
    with _progress() as tell:
        settings = Settings(
            quick=quick,
            budget=budget if budget is not None else QUICK_BUDGET if quick else BUDGET,
            batches=tuple(batch or (1, 128)),
            dtypes=tuple(dtype or (["float64"] if quick else Precision)),
            threads=tuple(threads if threads is not None else (1,) if quick else (1, 0)),
            progress=tell,
        )
        found["settings"] = {"quick": quick, "budget": settings.budget}
        for key, result, show in _measurements(chosen, settings, programs):
            found[key] = result
            found["seconds"] = time.perf_counter() - began
            if not to_stdout:
                show(screen)
                if json_to is not None:  # after every part, so that what is measured is not lost with the next
                    Path(json_to).write_text(_json(found) + "\n", encoding="utf-8")
    if plot_to is not None:
        from benchmarks.plot import plot

        plot(found["scaling"], plot_to)
    if to_stdout:
        typer.echo(_json(found))
    else:
        screen.print(f"{found['seconds']:.0f} s in all")


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """A function that shows on stderr what is under way: in place on a terminal, else a line each."""
    screen, began = console(err=True), time.perf_counter()
    if not screen.is_terminal:
        yield lambda text: typer.echo(f"{time.perf_counter() - began:6.0f} s  {text}", err=True)
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=screen, transient=True) as progress:
        task = progress.add_task("starting")
        yield lambda text: progress.update(task, description=escape(text))


def _measurements(
    chosen: list[Part], settings: Settings, programs: Path | None
) -> Iterator[tuple[str, Any, Callable[[Console], None]]]:
    """Of the environment and of each part: its name, the result for machines, and what prints it for people."""
    from benchmarks.adjoint import adjoint
    from benchmarks.argmin import argmin
    from benchmarks.environment import environment
    from benchmarks.heads import heads
    from benchmarks.inner import inner
    from benchmarks.mpc import mpc
    from benchmarks.polyhedron import polyhedron
    from benchmarks.qp import qp
    from benchmarks.scaling import scaling
    from benchmarks.solve import of_files, solve
    from benchmarks.tune import tune

    facts = environment()
    yield "environment", facts, partial(tables.show_environment, facts)
    for part, measure in ((Part.inner, inner), (Part.adjoint, adjoint), (Part.argmin, argmin)):
        if part in chosen:
            rows = measure(settings)
            yield part.value, [row.as_dict() for row in rows], partial(tables.show_rows, part.value, rows)
    if Part.scaling in chosen:
        growth = scaling(settings)
        yield Part.scaling.value, growth, partial(tables.show_scaling, growth)
    others = (
        *((Part.tune, "tune", tune), (Part.heads, "heads", heads), (Part.qp, "qp", qp), (Part.qp, "mpc", mpc)),
        *((Part.solve, "solve", solve), (Part.polyhedron, "polyhedron", polyhedron)),
    )
    for part, title, measure in others:
        if part in chosen:
            rows = measure(settings)
            yield title, [row.as_dict() for row in rows], partial(tables.show_rows, title, rows)
    if programs is not None:
        files = of_files(programs, settings)
        yield "programs", files, partial(tables.show_programs, files)


def _json(found: dict[str, Any]) -> str:
    return json.dumps(_plain(found), indent=1, allow_nan=False)


def _plain(value: Any) -> Any:
    """NaN and infinity, which JSON lacks, as null."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


if __name__ == "__main__":
    try:
        app(prog_name="python -m benchmarks")
    except (IcnnrtError, ImportError, OSError) as error:
        hint = "; pip install --group bench, with the extra export" if isinstance(error, ImportError) else ""
        print(f"benchmarks: {error}{hint}.", file=sys.stderr)
        raise SystemExit(1) from None
