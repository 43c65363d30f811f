"""`icnnrt repair`: make a package convex in y, and say what that changed."""

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from icnnrt.cli.app import FollowFlag, JsonFlag, PackageArgument, app, console, number, print_json
from icnnrt.errors import InputError


@app.command()
def repair(
    package: PackageArgument,
    out: Annotated[Path, typer.Option(help="The package folder to write.")],
    project: Annotated[
        bool, typer.Option("--project", help="Clip the weights to blame to non-negative numbers; the one way there is.")
    ] = False,
    data: Annotated[
        Path | None,
        typer.Option(metavar="INPUT", help="x as for run, to measure the changes at; without it x is random."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of all random numbers.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a package that is there.")] = False,
    follow_links: FollowFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Clip the weights that cost a network its convexity in y, and report how far f and y* move.

    Exit codes:
    0 written, and proven convex
    1 an error; nothing is written
    2 wrong usage
    """
    from icnnrt.checking.repair import project as clip
    from icnnrt.cli import tabular
    from icnnrt.format.package import Package

    if not project:
        raise InputError("project: expected to be told how to repair; pass --project to clip the weights to blame.")
    if os.path.lexists(out) and not overwrite:
        raise InputError(f"out: {out} is there already; pass --overwrite to replace it, or choose another.")
    opened = Package.open(package, follow_links=follow_links)
    x = None if data is None else tabular.read_array(data, "x", opened.manifest.x_shape)
    report = clip(opened, out, x, seed=seed, overwrite=overwrite)
    if as_json:
        print_json({"package": str(package), "out": str(out), **report.as_dict()})
        return
    screen = console()
    screen.print(f"before    {escape(report.before.sentence())}")
    screen.print(f"after     {escape(report.after.sentence())}")
    if report.clipped:
        table = Table("weight", "entries clipped to 0", box=None)
        for name, entries in report.clipped.items():
            table.add_row(escape(name), f"{entries:,}")
        screen.print(table)
    else:
        screen.print("nothing   had to be clipped")
    screen.print(f"f moves   by up to {number(report.value_moved)} of max(1, |f|)")
    if report.y_moved is not None:
        screen.print(f"y* moves  by up to {number(report.y_moved)}")
    screen.print(f"written   {escape(str(out))}")
