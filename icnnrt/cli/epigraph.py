"""`icnnrt epigraph`: inference of a piecewise-linear network as a linear or quadratic program, for any solver."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from icnnrt.cli.app import FollowFlag, JsonFlag, PackageArgument, app, console, number, print_json


@app.command()
def epigraph(
    package: PackageArgument,
    source: Annotated[
        Path,
        typer.Argument(metavar="INPUT", help="x as for run: .npz, .npy or .csv."),
    ],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="The file to write: .lp (CPLEX' LP format) or .mps (free MPS).")
    ],
    sample: Annotated[int, typer.Option(min=0, metavar="I", help="Which sample of INPUT.")] = 0,
    mu: Annotated[float, typer.Option(min=0.0, help="Of (μ/2) ‖y‖² in the objective; 0 makes it linear.")] = 0.0,
    lower: Annotated[
        str | None, typer.Option(metavar="NUMBER|FILE", help="Lower bounds of y: one number, or a file with a row.")
    ] = None,
    upper: Annotated[str | None, typer.Option(metavar="NUMBER|FILE", help="Upper bounds of y, likewise.")] = None,
    solve: Annotated[bool, typer.Option("--solve", help="Solve it too, and print the optimum.")] = False,
    follow_links: FollowFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Write min over y of f(x, y) + (μ/2) ‖y‖² as a program that HiGHS, Gurobi, CPLEX or SCIP reads; exact.

    The network has to be piecewise linear in y: ReLU, leaky ReLU, abs, max. In the file y is y0, y1, ...

    Exit codes:
    0 written
    1 an error; nothing is written
    2 wrong usage
    """
    from icnnrt.arguments import check_shape, refused
    from icnnrt.cli import tabular
    from icnnrt.epigraph import epigraph as problems
    from icnnrt.format.package import Package
    from icnnrt.programs.writing import SUFFIXES

    if out.suffix.lower() not in SUFFIXES:
        expected = f"a file name ending in {' or '.join(SUFFIXES)}"
        raise refused(str(out), expected, repr(out.suffix), "the ending tells the format")
    opened = Package.open(package, follow_links=follow_links)
    manifest = opened.manifest
    x = tabular.read_array(source, "x", manifest.x_shape)
    check_shape(x.shape, "x", manifest.x_shape, where=str(source))
    if sample >= len(x):
        raise refused("sample", f"one of the {len(x)} samples of {source}", sample, "count from 0")
    bounds = {
        name: array if isinstance(array, float) else array[sample : sample + 1]
        for name, given in (("lower", lower), ("upper", upper))
        if given is not None
        for array in [tabular.bound(given, name, manifest.y_shape, len(x))]
    }
    (problem,) = problems(opened, x[sample : sample + 1], mu=mu, **bounds)
    problem.write(out, manifest.name)
    found = problem.solve() if solve else None
    summary = {
        "package": str(opened.path),
        "sample": sample,
        "variables": len(problem.variables),
        "hidden": len(problem.variables) - problem.n,
        "rows": len(problem.h) + len(problem.b),
        "entries": len(problem.G.values) + len(problem.A.values),
        "quadratic": mu > 0,
        "status": found.status.name if found else None,
        "optimum": found.value if found else None,
        "y": found.y if found else None,
        "out": str(out),
    }
    if as_json:
        print_json(summary)
        return
    screen = console()
    screen.print(
        f"program   {problem.n} variables y, {summary['hidden']} of units that bend, {summary['rows']} rows, "
        f"{summary['entries']} entries, {'quadratic' if mu > 0 else 'linear'}"
    )
    if found:
        screen.print(f"optimum   {number(found.value, 9)}, {found.status.name}")
        if not found.ok:
            screen.print(f"[yellow]advice[/]    {escape(found.advice())}")
    screen.print(f"written   {escape(str(out))}")
