"""`icnnrt` and `python -m icnnrt`."""

import io
import signal
import sys


def main() -> None:
    """Run the command line, or say how to install what it needs."""
    try:
        _run()
    except KeyboardInterrupt:  # while it is being imported; later ones are for the commands
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        print("icnnrt: interrupted.", file=sys.stderr)
        raise SystemExit(130) from None  # 128 + SIGINT, as shells have it


def _run() -> None:
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ImportError as error:
        print(f"icnnrt: the command line needs typer and rich ({error}): pip install 'icnnrt[cli]'", file=sys.stderr)
        raise SystemExit(2) from None
    from icnnrt.cli.commands import app

    for stream in (sys.stdout, sys.stderr):
        # Tables hold characters that an old Windows code page lacks; a question mark is better than a traceback.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    app(prog_name="icnnrt")


if __name__ == "__main__":
    main()
