"""What was asked for on the command line, in the form that every part takes it."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """budget: seconds for the contenders of one row; progress: told which row is under way."""

    quick: bool
    budget: float
    batches: tuple[int, ...]
    dtypes: tuple[str, ...]
    threads: tuple[int, ...]
    progress: Callable[[str], None]
