"""The command line. Commands of other packages come in by the entry-point group `icnnrt.commands`, checks of `verify`
that need torch by `icnnrt.checks`.

An entry point names a function that typer can make a command of. It is loaded for `--help` and when it is called, so
its module must be quick to import: what is heavy (torch) belongs into the function.

Exit codes: 0 done; 1 an error, told in one sentence on stderr; 2 wrong usage; 3 `run`: some sample did not converge,
`tune`: it stopped since no step was accepted any more; 4 `verify`: a check failed; 130 interrupted. `tune` writes what
was learnt when it is interrupted, by SIGTERM (143) and SIGHUP (129) too; of those the other commands die, as they are.
"""

import importlib.metadata
import json
import math
import os
import platform
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.console import Console, ConsoleOptions, RenderableType
from rich.markup import escape
from rich.segment import Segment
from rich.table import Table
from rich.text import Text
from rich.tree import Tree
from typer.core import TyperGroup

from icnnrt._fields import named
from icnnrt._printable import cropped, printable
from icnnrt.errors import IcnnrtError, InputError, MissingDependencyError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from icnnrt.package import Package
    from icnnrt.recommend import Recommendation
    from icnnrt.verify import Check

ENTRY_POINTS: Final = "icnnrt.commands"
CHECKS: Final = "icnnrt.checks"
ERROR, NOT_CONVERGED, CHECK_FAILED = 1, 3, 4
OF_SIGNALS: Final = 128  # and their number, as shells have it
INTERRUPTED: Final = OF_SIGNALS + 2  # SIGINT
ROWS_SHOWN: Final = 8
ENTRIES_SHOWN: Final = 4
MOST_SHOWN: Final = 400  # characters of a text from a file; --json has all of them
BATCH: Final = 1024  # samples in one run: larger ones are no faster, and their cuts take memory
WIDE: Final = 120  # columns of what goes to a file or a pipe


# --- What every command uses ---------------------------------------------------------------------


class _Screen(Console):
    """A console that sends a terminal what rich itself writes to it, and of everything else what is printable.

    Text may come from anybody's package. It is cleaned as it comes in, where a newline would still be seen as one of
    its own, and, for what comes as anything but text, as it goes out.
    """

    def render_str(self, text: str, **keywords: Any) -> Text:
        return super().render_str(printable(text), **keywords)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            if segment.control or segment.text.isprintable():
                yield segment
            else:
                yield segment._replace(text="\n".join(map(printable, segment.text.split("\n"))))

    def on_broken_pipe(self) -> None:
        """Say that nobody reads any more: rich would end the process there, whatever was still to be done."""
        raise  # the BrokenPipeError that is being handled


def console(*, err: bool = False) -> Console:
    """Where tables (stdout) and progress (stderr) go. Made anew for each use, since stdout may be redirected."""
    stream = sys.stderr if err else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else WIDE
    return _Screen(stderr=err, width=width, highlight=False, soft_wrap=False, emoji=False)


def tell(sentence: str) -> None:
    """One line on stderr, safe to print whatever is in it."""
    typer.echo(printable(f"icnnrt: {sentence}"), err=True)


def one_line(text: str) -> Text:
    """A text from a file, which has no markup and takes one line, so that no part of it looks like another one."""
    return Text(printable(text), no_wrap=True, overflow="ellipsis")


def print_json(content: Mapping[str, Any]) -> None:
    """One JSON object on stdout; NaN and infinity, which JSON lacks, become null."""
    from icnnrt._fields import strict

    typer.echo(json.dumps(strict(content), allow_nan=False))


def number(value: float | None, digits: int = 3) -> str:
    """A figure for a table."""
    if value is None:
        return "–"
    return f"{value:.{digits}g}" if 1e-3 <= abs(value) < 1e5 or not value else f"{value:.{digits - 1}e}"


def as_command(function: Any, name: str) -> Any:
    """The command of one function, as typer makes it."""
    single = typer.Typer(add_completion=False, rich_markup_mode="rich", context_settings=_SETTINGS)
    single.command(name)(function)
    return typer.main.get_command(single)


class _Commands(TyperGroup):
    """This file's commands and those of the entry points; their errors become one sentence and an exit code."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [*self.commands, *sorted(_entry_points().keys() - self.commands.keys())]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in self.commands and cmd_name in (found := _entry_points()):
            self.commands[cmd_name] = _load(found[cmd_name])
        return super().get_command(ctx, cmd_name)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except IcnnrtError as error:
            tell(str(error))
        except BrokenPipeError:
            raise  # the reader of a pipe has had enough
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            tell(f"{where}{error.strerror or error}")
        except MemoryError:
            tell("memory ran out; split the input.")
        except KeyboardInterrupt:
            tell("interrupted.")
            raise typer.Exit(INTERRUPTED) from None
        raise typer.Exit(ERROR)


def _entry_points() -> dict[str, importlib.metadata.EntryPoint]:
    return {point.name: point for point in importlib.metadata.entry_points(group=ENTRY_POINTS)}


def _load(point: importlib.metadata.EntryPoint) -> Any:
    try:
        return as_command(point.load(), point.name)
    except Exception as error:
        # A package that is broken must not take the whole command line with it.
        reason = f"{point.name}: the command cannot be loaded from {point.value} ({type(error).__name__}: {error})"

        def broken() -> None:
            raise MissingDependencyError(f"{reason}; pip install 'icnnrt[export]'.")

        broken.__doc__ = f"(not available: {escape(str(error))})"
        command = as_command(broken, point.name)
        command.allow_extra_args = command.ignore_unknown_options = True
        return command


_SETTINGS: Final = {"help_option_names": ["-h", "--help"]}
app = typer.Typer(
    cls=_Commands, no_args_is_help=True, add_completion=False, rich_markup_mode="rich", context_settings=_SETTINGS
)

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]
NativeFlag = Annotated[
    bool | None,
    typer.Option(
        "--native/--portable",
        help="Demand compiled kernels for the solver's operators, or do without; by default they run if installed.",
        show_default=False,
    ),
]
# What --untrusted allows unless more is said: minutes, since verify computes everything two or three ways.
UNTRUSTED_SECONDS: Final = 300
UNTRUSTED_MEBIBYTES: Final = 1024
FollowFlag = Annotated[
    bool,
    typer.Option(
        "--follow-links",
        help="Take symbolic links in the package for the files they lead to, as in the caches of model hubs.",
    ),
]
UntrustedFlag = Annotated[
    bool,
    typer.Option(
        "--untrusted",
        help="Bound time and memory, and run graphs in a process of their own: for packages of strangers.",
    ),
]
SecondsOption = Annotated[
    float | None,
    typer.Option("--seconds", help=f"With --untrusted: for the whole command; {UNTRUSTED_SECONDS} by default."),
]
MebibytesOption = Annotated[
    int | None,
    typer.Option(
        "--mebibytes",
        min=1,
        help=f"With --untrusted: what graphs may have of memory; {UNTRUSTED_MEBIBYTES} by default.",
    ),
]
PackageArgument = Annotated[Path, typer.Argument(metavar="PACKAGE", help="A package folder, such as model.icnn.")]


def with_limits(context: typer.Context, untrusted: bool, seconds: float | None, mebibytes: int | None) -> None:
    """Have the rest of this command within limits, if it is to be."""
    from icnnrt.limits import Limits, within

    if not untrusted:
        for name, value in (("seconds", seconds), ("mebibytes", mebibytes)):
            if value is not None:
                raise InputError(f"--{name}: expected --untrusted beside it, but there is none; give both, or neither.")
        return
    seconds = UNTRUSTED_SECONDS if seconds is None else seconds
    mebibytes = UNTRUSTED_MEBIBYTES if mebibytes is None else mebibytes
    context.with_resource(within(Limits(seconds, mebibytes << 20, process=True)))


def _version(wanted: bool) -> None:
    if wanted:
        import icnnrt

        typer.echo(icnnrt.__version__)
        raise typer.Exit


@app.callback()
def icnnrt_command(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Serve, tune, inspect and check input-convex networks with onnxruntime; export them with torch.

    Exit codes:
    0 done
    1 an error, told in one sentence on stderr
    2 wrong usage
    3 run: some sample did not converge; tune: it stopped since no step was accepted any more
    4 verify: a check failed
    130 interrupted; tune: what was learnt is written, as when SIGTERM (143) or SIGHUP (129) ends it
    """
    pressed.clear()
    main = threading.current_thread() is threading.main_thread()
    if main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _press)


pressed: Final[list[int]] = []
"""Whether Ctrl-C has come since the command began: what is imported meanwhile may swallow its exception."""


def _press(number: int, frame: object) -> None:
    pressed.append(number)
    raise KeyboardInterrupt


# --- run -----------------------------------------------------------------------------------------


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

    from icnnrt import tabular
    from icnnrt._arguments import check_shape
    from icnnrt.package import Package
    from icnnrt.qp_status import QPStatus
    from icnnrt.session import load
    from icnnrt.status import Status

    with_limits(context, untrusted, seconds, mebibytes)
    suffix = tabular.check_target(out, source=source) if out else ""
    opened = Package.open(package, follow_links=follow_links)
    manifest = opened.manifest
    qp = manifest.kind == "qp"
    verdicts = QPStatus if qp else Status  # 0 is good in both
    if qp:
        for name, option in (("y_init", y_init), ("lower", lower), ("upper", upper)):
            if option is not None:
                raise InputError(
                    f"{name}: expected none, as {named(manifest.name)} is a network of quadratic programs, but got "
                    f"{option}; leave it out."
                )
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
        name: _bound(given, name, manifest.y_shape, len(x))
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
    names = [verdicts(code).name for code in status]
    summary = {
        "package": str(opened.path),
        "samples": len(y),
        "status": {verdicts(code).name: count for code, count in sorted(Counter(status.tolist()).items())},
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


def _bound(given: str, name: str, y_shape: tuple[int, ...], samples: int) -> Any:
    """One number, or the rows of a file."""
    from icnnrt import tabular
    from icnnrt._arguments import check_shape

    try:
        return float(given)
    except ValueError:
        array = tabular.read_array(Path(given), name, y_shape)
        check_shape(array.shape, name, y_shape, length=samples, where=given)
        return array


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


# --- inspect -------------------------------------------------------------------------------------


@app.command()
def inspect(
    context: typer.Context,
    package: PackageArgument,
    follow_links: FollowFlag = False,
    untrusted: UntrustedFlag = False,
    seconds: SecondsOption = None,
    mebibytes: MebibytesOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Say what a package holds, after checking every file of it; onnxruntime is not needed.

    Exit codes:
    0 the package is sound
    1 it is not, or another error
    2 wrong usage
    """
    from icnnrt.package import Package

    with_limits(context, untrusted, seconds, mebibytes)
    opened = Package.open(package, follow_links=follow_links)
    content = {**json.loads(json.dumps(opened.manifest.content())), "format_version": opened.manifest.format_version}
    for name, array in opened.weights.items():
        low, high = (float(array.min()), float(array.max())) if array.size else (None, None)
        content["weights"]["tensors"][name] |= {"min": low, "max": high}
    if as_json:
        print_json({"path": str(opened.path), "ignored": opened.ignored, **content})
    else:
        tree = _tree(str(opened.path), content)
        if opened.ignored:
            more = f" and {len(opened.ignored) - ROWS_SHOWN} more" if len(opened.ignored) > ROWS_SHOWN else ""
            names = ", ".join(map(named, opened.ignored[:ROWS_SHOWN]))
            tree.add(one_line(f"beside the package, and not read: {names}{more}"))
        console().print(tree)


# kind of domain -> how people write it, behind y
DOMAINS: Final = {
    "unit_box": " in [0, 1]",
    "box": " between bounds given at run time",
    "simplex": " in the simplex",
    "space": " in ℝⁿ",
}


def _tree(path: str, m: Mapping[str, Any]) -> Tree:
    from icnnrt.convexity import Convexity

    root = Tree(f"[bold]{escape(cropped(m['name'], 80))}[/]  {escape(path)}", guide_style="dim")
    solver, domain = m["solver"], m["domain"]
    root.add(f"format {m['format']} {m['format_version']}, {m['dtype']}, opset {m['opset']}, IR {m['ir_version']}")
    if m["kind"] == "gradient":
        root.add("the gradient of an energy alone, without its value")
    if m["kind"] == "qp":
        root.add("a network of quadratic programs: x → z")
    answer = "z" if m["kind"] == "qp" else "y"
    where = DOMAINS[domain["kind"]] if domain else ""
    root.add(escape(f"x {_shown(m['x_shape'])} → {answer} {_shown(m['y_shape'])}{where}"))
    if solver:
        mu = f", μ {number(domain['mu'])}" if "mu" in domain else ""
        root.add(
            f"{solver['name']}: {solver['iterations']} cuts, {solver['steps']} steps each, {m['regulariser']}{mu}, "
            f"tolerances: gap {number(solver['gap_tolerance'])}, residual {number(solver['residual_tolerance'])}"
        )
    elif m["kind"] != "qp":
        root.add("solver: none, so no argmin; export with one for that")
    if "polyhedron" in m:
        head = m["polyhedron"]
        root.add(
            f"over a polyhedron: at most {head['iterations']} cuts, μ {number(head['mu'])}, tolerance "
            f"{number(head['tolerance'])}, adjoint {head['adjoint']}"
        )
    if "convexity" in m:
        found = Convexity.from_json(m["convexity"])
        colour = {"proven": "green", "violated": "red"}.get(found.verdict, "yellow")
        branch = root.add(f"convexity: [{colour}]{found.verdict}[/]  {escape(found.sentence())}")
        for name, bound in (("strong convexity", found.strong_convexity), ("Lipschitz bound", found.lipschitz)):
            if bound is not None:
                branch.add(f"{name}  {number(bound)}")
        if found.rests_on is not None:
            signed = [name for name, t in m["weights"]["tensors"].items() if t["sign"]]
            for what, names in (("signs", signed), ("values", found.rests_on)):
                if names:
                    branch.add(one_line(f"it rests on the {what} of {', '.join(map(named, names))}"))
    elif m["kind"] != "qp":
        root.add("convexity: not examined")
    root.add("golden data: " + ("there, `verify` replays it" if "golden" in m else "none"))
    ops = ", ".join(f"{d}::{name}" for d, o in m["ops"].items() for name in o["names"]) or "none"
    graphs = Table("graph", "bytes", "sha256", title_justify="left", box=None)
    for role, graph in m["graphs"].items():
        graphs.add_row(escape(role), f"{graph['bytes']:,}", graph["sha256"][:12])
    branch = root.add("graphs")
    branch.add(graphs)
    branch.add(f"custom operators: {escape(ops)}")
    tensors = m["weights"]["tensors"]
    size = sum(math.prod(t["shape"]) for t in tensors.values())
    branch = root.add(
        f"weights: {len(tensors)} of {size:,} numbers, {m['weights']['bytes']:,} bytes, {m['weights']['sha256'][:12]}"
    )
    table = Table("name", "shape", "dtype", "trainable", "sign", "range", box=None)
    for name, t in tensors.items():
        table.add_row(
            one_line(named(name)),
            escape(_shown(t["shape"])),
            t["dtype"],
            "yes" if t["trainable"] else "no",
            _sign(t["sign"]),
            f"{number(t['min'])} … {number(t['max'])}",
        )
    branch.add(table)
    if "train" in m:
        _add_training(root, m["train"], tensors)
    else:
        root.add("training: none; export with a training graph to tune this package on a device")
    tuned = m["metadata"].get("tuned_steps")
    for title in ("parity", "producer", "metadata"):
        note = ""
        if title == "parity" and isinstance(tuned, int) and tuned > 0:
            note = f" (of the export; the weights have been tuned since, {tuned} step{'s' if tuned > 1 else ''})"
        branch = root.add(f"{title}{note}" if m[title] else f"{title}: none")
        for key, value in m[title].items():
            shown = number(value) if isinstance(value, float) else str(value)
            branch.add(one_line(f"{cropped(key, 80)}  {cropped(shown, MOST_SHOWN)}"))
    return root


def _sign(sign: Any) -> str:
    """That of all entries, or how many of which it is asked."""
    if not isinstance(sign, Mapping):
        return sign or "–"
    asked = Counter[str]()
    for start, stop, name in sign["runs"]:
        asked[name] += stop - start
    along = "entries" if sign["axis"] is None else f"along axis {sign['axis']}"
    return ", ".join(f"{name}: {count} {along}" for name, count in asked.items())


def _add_training(root: Tree, train: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
    settings = ", ".join(f"{named(key)} {number(value)}" for key, value in train["settings"].items())
    clipped = "" if train["clip_norm"] is None else f", gradients clipped to norm {number(train['clip_norm'])}"
    branch = root.add(
        f"training: {escape(named(train['loss']))} of y and target {escape(_shown(train['target_shape']))} "
        f"{train['target_dtype']}, {train['adjoint']} adjoint{clipped}"
    )
    branch.add(escape(f"{train['optimizer']}: {settings}"))
    moved = set(train["weights"])
    still = [name for name, t in tensors.items() if t["trainable"] and name not in moved]
    size = sum(math.prod(tensors[name]["shape"]) for name in moved)
    which = "all trainable weights" if not still else ", ".join(map(named, train["weights"]))
    branch.add(escape(f"moves {size:,} numbers: {which}"))
    if still:
        branch.add(escape(f"leaves {', '.join(map(named, still))}"))


def _shown(shape: list[int]) -> str:
    return f"[{', '.join(map(str, shape))}]"


# --- verify --------------------------------------------------------------------------------------


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

    from icnnrt import tabular
    from icnnrt.package import Package
    from icnnrt.verify import verify as check

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
        failed = [found.name for found in report.checks if found.verdict == "fail"]
        screen.print(f"[bold red]failed: {', '.join(failed)}[/]" if failed else "[green]no check failed[/]")
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

    from icnnrt.recommend import recommend
    from icnnrt.session import load

    rng = np.random.default_rng(seed)
    with load(package) as session:
        m = session.manifest
        X = rng.standard_normal((samples, *m.x_shape)) if x is None else x[:samples]
        lower = upper = None
        if m.domain and m.domain.kind == "box":
            lower = rng.uniform(-1.0, 0.5, (len(X), *m.y_shape))
            upper = lower + rng.uniform(0.2, 2.0, lower.shape)
        return recommend(session, X, gap, lower=lower, upper=upper)


# --- doctor --------------------------------------------------------------------------------------


@app.command()
def doctor(as_json: JsonFlag = False) -> None:
    """Say what is installed, what onnxruntime offers, and what stands in the way.

    Exit codes:
    0 packages can be served
    1 something is in the way
    2 wrong usage
    """
    from icnnrt import _native

    facts = _facts()
    if as_json:
        print_json(facts)
    else:
        screen = console()
        table = Table(box=None, show_header=False)
        versions = facts["versions"]
        for name, version in versions.items():
            # Two builds of one thing: that the other one is not there is how it should be.
            other = {"onnxruntime": "onnxruntime-gpu", "onnxruntime-gpu": "onnxruntime"}.get(name)
            if version or not (other and versions[other]):
                table.add_row(name, version or "[dim]not installed[/]")
        table.add_row("platform", one_line(facts["platform"]))
        table.add_row("threads", f"{facts['cores']} cores; a session uses {facts['threads']} unless told otherwise")
        table.add_row("providers", ", ".join(facts["providers"]) or "none")
        native = facts["native"]
        if native["instruction_set"]:
            limit = f" ({_native.LIMIT_VARIABLE}={native['limit']})" if native["limit"] else ""
            table.add_row("native operators", escape(f"on {native['instruction_set']}{limit}, {native['library']}"))
        else:
            # A limit that is none is refused by every session; without a library they run all the same.
            told = "none" if native["limit"] else "none, operators run on portable bodies"
            table.add_row("native operators", escape(f"{told}: {native['reason']}"))
        screen.print(table)
        for problem in facts["problems"]:
            screen.print(f"[bold red]problem[/]  {escape(problem)}")
        if not facts["problems"]:
            screen.print("[green]packages can be served[/]")
    if facts["problems"]:
        raise typer.Exit(ERROR)


def _facts() -> dict[str, Any]:
    from icnnrt import _native, ort

    versions = {"python": platform.python_version()}
    for name in ("icnnrt", "numpy", "safetensors", "onnxruntime", "onnxruntime-gpu", "torch", "onnx"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = ""
    problems = []
    if versions["onnxruntime"] and versions["onnxruntime-gpu"]:
        # Both own the import name onnxruntime; removing one also removes files of the other.
        problems.append(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other: "
            "pip uninstall onnxruntime onnxruntime-gpu, then pip install one of 'icnnrt[cpu]' and 'icnnrt[gpu]'."
        )
    providers: list[str] = []
    try:
        providers = ort.onnxruntime().get_available_providers()
    except MissingDependencyError as error:
        problems.append(str(error))
    built = _native.build()
    native: dict[str, Any] = {
        "library": str(built.library) if built.library else None,
        "compiler": built.compiler,
        "compiled_for": list(built.instruction_sets),
        "instruction_set": None,
        "limit": os.environ.get(_native.LIMIT_VARIABLE) or None,
        "reason": built.reason,
    }
    if built.library and providers:
        try:
            native["instruction_set"] = _native.kernels(ort.onnxruntime()).instruction_set
        except (InputError, MissingDependencyError) as error:
            native["reason"] = str(error)
            problems.append(str(error))
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "versions": versions,
        "platform": platform.platform(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "threads": ort.THREADS,
        "providers": providers,
        "native": native,
        "problems": problems,
    }


# These commands use what is above, and add themselves to `app`.
import icnnrt.cli_epigraph  # noqa: E402
import icnnrt.cli_repair  # noqa: E402
import icnnrt.cli_tune  # noqa: E402, F401
