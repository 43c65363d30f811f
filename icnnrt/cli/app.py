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
import os
import signal
import sys
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console, ConsoleOptions, RenderableType
from rich.markup import escape
from rich.segment import Segment
from rich.text import Text
from typer.core import TyperGroup

from icnnrt.errors import IcnnrtError, InputError, MissingDependencyError
from icnnrt.printable import printable

ENTRY_POINTS: Final = "icnnrt.commands"
ERROR, NOT_CONVERGED, CHECK_FAILED = 1, 3, 4
SIGNAL_EXIT: Final = 128  # and their number, as shells have it
INTERRUPTED: Final = SIGNAL_EXIT + 2  # SIGINT
ROWS_SHOWN: Final = 8
WIDE: Final = 120  # columns of what goes to a file or a pipe


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
    from icnnrt.format.fields import strict

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
