"""`icnnrt qp`: the answer of a quadratic program that a file holds."""

import csv
import io
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.markup import escape

from icnnrt.cli.app import NOT_CONVERGED, JsonFlag, NativeFlag, app, console, number, one_line, print_json

SUFFIXES: Final = (".npz", ".csv")
SHOWN: Final = 8  # variables


@app.command()
def qp(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A .mps, or a .qps, its quadratic kin; fixed or free format.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="Where to write: .npz for every field of the answer, .csv for a line a variable."),
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="The relative KKT residual that counts as solved.", show_default="1e-9")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="The most interior point steps.", show_default="60")] = None,
    seconds: Annotated[
        float | None, typer.Option(help="The most time to solve it in; what it is by then is judged as it stands.")
    ] = None,
    native: NativeFlag = None,
    as_json: JsonFlag = False,
) -> None:
    """Solve min over z of ½ z'Qz + p'z + constant s.t. h_lower <= Gz <= h, Az = b, lower <= z <= upper.

    It is solved as `icnnrt.qp` does, densely: for up to about a thousand variables.

    Exit codes:
    0 solved
    1 an error, told in one sentence on stderr
    2 wrong usage
    3 not solved; what became of it is told all the same
    """
    import icnnrt
    from icnnrt.cli import tabular
    from icnnrt.mathematics.status import Status
    from icnnrt.programs import read_program
    from icnnrt.serving.operators import operator_session

    if out is not None:
        tabular.check_result(out, source=file, allowed=SUFFIXES)
    began = time.perf_counter()
    found = read_program(file)
    program = found.program
    data = program.dense()
    read = time.perf_counter() - began
    operator_session("qp_solve", "float64", native)  # made once a process, which is no time of a solve
    solution = icnnrt.qp(**data, tolerance=tolerance, steps=steps, seconds=seconds, native=native)
    status = Status(int(solution.status))
    objective = program.objective(solution.z)
    stationarity, feasibility, gap = (float(r) for r in solution.residual)
    advice = "" if solution.ok else solution.advice(0).removeprefix("sample 0: ")
    summary = {
        "file": str(file),
        "name": found.name,
        "variables": len(program.p),
        "rows": len(program.h),
        "equalities": len(program.b),
        "entries": len(program.G.values) + len(program.A.values),
        "quadratic_entries": len(program.Q.values),
        "status": status.name,
        "objective": -objective if found.maximise else objective,
        "residual": {"stationarity": stationarity, "feasibility": feasibility, "gap": gap},
        "steps": solution.steps,
        "seconds": solution.info["seconds"],
        "read_seconds": read,
        "native": solution.native,
        "advice": advice or None,
        "out": str(out) if out else None,
    }
    answer = {
        "z": solution.z,
        "lam": solution.lam,
        "nu": solution.nu,
        "bound_multipliers": solution.bound_multipliers,
        "ray": solution.ray,
    }
    names = {"variable_names": program.variables, "row_names": found.rows, "equality_names": found.equalities}
    if out is not None:
        _write(out, names, answer)
    if as_json:
        print_json(summary if out else {**summary, **answer, **names})
    else:
        _show(summary, program.variables, solution.z)
    if not solution.ok:
        raise typer.Exit(NOT_CONVERGED)


def _write(out: Path, names: Mapping[str, Sequence[str]], answer: Mapping[str, Any]) -> None:
    """Every field, or a line for each variable; atomically."""
    import numpy as np

    from icnnrt.format.files import atomic_file
    from icnnrt.printable import printable

    with atomic_file(out) as file:
        if out.suffix.lower() == ".npz":
            told = {key: np.array([printable(name) for name in some], np.str_) for key, some in names.items()}
            np.savez(file, allow_pickle=False, **answer, **told)
            return
        text = io.TextIOWrapper(file, "utf-8", newline="")
        lines = csv.writer(text)
        lines.writerow(("variable", "z", "bound_multiplier"))
        z, multipliers = answer["z"].tolist(), answer["bound_multipliers"].tolist()
        lines.writerows(zip(map(printable, names["variable_names"]), z, multipliers, strict=True))
        text.flush()
        text.detach()


def _show(summary: Mapping[str, Any], variables: Sequence[str], z: Any) -> None:
    screen = console()
    screen.print("program   ", one_line(summary["name"] or summary["file"]), sep="")
    screen.print(
        f"          {summary['variables']} variables, {summary['rows']} rows, {summary['equalities']} equalities, "
        f"{summary['entries']} entries, {summary['quadratic_entries']} of Q"
    )
    good = "green" if summary["advice"] is None else "yellow"
    screen.print(f"status    [{good}]{summary['status']}[/]")
    if summary["advice"]:
        seen = "" if summary["out"] or "`ray`" not in summary["advice"] else "; --out FILE.npz writes it"
        screen.print(f"[yellow]advice[/]    {escape(summary['advice'])}{seen}")
    screen.print(f"objective {number(summary['objective'], 9)}")
    told = ", ".join(f"{name} {number(value)}" for name, value in summary["residual"].items())
    screen.print(f"residual  {told}")
    kernels = "native operators" if summary["native"] else "portable operators"
    screen.print(f"steps     {summary['steps']}")
    screen.print(f"time      {number(1e3 * summary['seconds'])} ms, {kernels}; read in {summary['read_seconds']:.2f} s")
    if summary["out"]:
        screen.print(f"written   {escape(summary['out'])}")
        return
    for name, value in zip(variables[:SHOWN], z.tolist(), strict=False):
        screen.print(one_line(f"  {name} = {value:.9g}"))
    if len(variables) > SHOWN:
        screen.print(f"  … and {len(variables) - SHOWN} more; --out FILE writes them all")
