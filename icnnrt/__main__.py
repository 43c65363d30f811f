"""`icnnrt` and `python -m icnnrt`."""

import sys


def main() -> None:
    """Run the command line, or say how to install what it needs."""
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ImportError as error:
        print(f"icnnrt: the command line needs typer and rich ({error}): pip install 'icnnrt[cli]'", file=sys.stderr)
        raise SystemExit(2) from None
    from icnnrt.cli import app

    app(prog_name="icnnrt")


if __name__ == "__main__":
    main()
