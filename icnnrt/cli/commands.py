"""The whole command line: `app` with every command of icnnrt's own, in the order in which help lists them."""

from icnnrt.cli import doctor, epigraph, inspect, qp, repair, run, tune, verify  # noqa: F401
from icnnrt.cli.app import app

__all__ = ["app"]
