"""`icnnrt verify`: every check of a package, as a table."""

import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.markup import escape
from rich.table import Table

from icnnrt.cli.app import (
    CHECK_FAILED,
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
    with_limits,
)
from icnnrt.errors import MissingDependencyError
from icnnrt.printable import cropped

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from icnnrt.checking.recommend import Recommendation
    from icnnrt.checking.report import Check
    from icnnrt.format.package import Package

CHECKS: Final = "icnnrt.checks"


@app.command()
def verify(
    context: typer.Context,
    package: PackageArgument,
    data: Annotated[
        Path | None,
        typer.Option(metavar="INPUT", help="x as for run; without it x is random (standard normal)."),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="How many samples; drawn from INPUT if that holds more.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Of all random numbers.")] = 0,
    gap: Annotated[
        float | None,
        typer.Option(
            "--recommend", metavar="GAP", help="Say how many iterations reach this duality gap; INPUT makes it telling."
        ),
    ] = None,
    torchscript: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A TorchScript file that should compute what the package does. Needs torch, which runs what the file "
            "holds: give it none that you do not trust.",
        ),
    ] = None,
    program: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE", help="A torch.export program (.pt2) likewise; several may be given. The same caution holds."
        ),
    ] = None,
    native: NativeFlag = None,
    follow_links: FollowFlag = False,
    untrusted: UntrustedFlag = False,
    seconds: SecondsOption = None,
    mebibytes: MebibytesOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Check a package by what it does: gradient, convexity, argmin, certificates and adjoint, each told two ways.

    Exit codes:
    0 no check failed
    1 an error, a damaged package among them
    2 wrong usage
    4 a check failed
    """
    from dataclasses import replace

    from icnnrt.checking.verify import verify as check
    from icnnrt.cli import tabular
    from icnnrt.format.package import Package

    with_limits(context, untrusted, seconds, mebibytes)
    compare = _torch_files() if torchscript or program else None
    screen = console(err=True)
    with screen.status("verifying") as status:
        status.update("hashes and structure")
        opened = Package.open(package, follow_links=follow_links)
        x = None if data is None else tabular.read_array(data, "x", opened.manifest.x_shape)
        report = check(
            opened, x, samples=samples, seed=seed, native=native, progress=lambda stage: status.update(stage)
        )
        if compare is not None:
            status.update("files of torch")
            told = compare(opened, torchscript, program or [], x, samples=samples, seed=seed, native=native)
            report = replace(report, checks=(*report.checks, *told))
    advice = None if gap is None else _recommend(opened, x, gap, samples, seed)
    if as_json:
        print_json({**report.as_dict(), **({} if advice is None else {"recommend": advice.as_dict()})})
    else:
        colours = {"pass": "green", "fail": "bold red", "skipped": "yellow"}
        source = "samples of the data" if report.source == "data" else "random samples (standard normal)"
        title = f"{cropped(report.name, 80)} ({report.dtype}): {report.samples} {source}, seed {report.seed}"
        table = Table("check", "verdict", "figure", "bound", "what", title=escape(title), title_justify="left")
        for found in report.checks:
            table.add_row(
                found.name,
                f"[{colours[found.verdict]}]{found.verdict}[/]",
                number(found.figure),
                number(found.bound),
                escape(found.detail),
            )
        screen = console()
        screen.print(table)
        failed = ", ".join(report.failed)
        screen.print(f"[bold red]failed: {failed}[/]" if failed else "[green]no check failed[/]")
        if advice is not None:
            enough = ", ".join(f"{p} %: {K or f'more than {advice.tried}'}" for p, K in advice.iterations.items())
            screen.print(
                f"iterations for a gap of {number(advice.gap)} on {advice.samples} samples: {enough}; "
                f"the package has {advice.exported}"
            )
    if not report.passed:
        raise typer.Exit(CHECK_FAILED)


def _torch_files() -> "Callable[..., list[Check]]":
    """The check of files of torch, from whoever has torch."""
    for point in importlib.metadata.entry_points(group=CHECKS, name="torch_files"):
        try:
            found: Callable[..., list[Check]] = point.load()
        except Exception as error:
            reason = f"cannot be loaded from {point.value} ({type(error).__name__}: {error})"
            raise MissingDependencyError(f"verify: the check {reason}; pip install 'icnnrt[export]'.") from error
        return found
    raise MissingDependencyError("verify: no check of files of torch is installed; pip install 'icnnrt[export]'.")


def _recommend(package: "Package", x: "NDArray[Any] | None", gap: float, samples: int, seed: int) -> "Recommendation":
    """Of at most so many samples of x; without x of random ones, and within random bounds where y lies in a box."""
    import numpy as np

    from icnnrt.checking.recommend import recommend
    from icnnrt.checking.trial import random_bounds
    from icnnrt.serving.load import load

    rng = np.random.default_rng(seed)
    with load(package) as session:
        m = session.manifest
        X = rng.standard_normal((samples, *m.x_shape)) if x is None else x[:samples]
        bounds = random_bounds(m, len(X), rng)
        return recommend(session, X, gap, lower=bounds.get("lower"), upper=bounds.get("upper"))
