"""Samples without an answer that a gradient can be taken of, and what a layer does with them."""

from collections.abc import Sequence
from typing import Any, Literal, get_args

from icnnrt.arguments import choice
from icnnrt.errors import InputError
from icnnrt.mathematics.status import Status

OnUnsafe = Literal["nan", "skip", "raise"]


def chosen(value: object, answer: str, *more: str) -> Any:
    """One of the three, or of what such a layer has `more`, for one whose `answer` is NaN then."""
    remedy = f"choose 'skip' if your loss leaves out samples whose {answer} is NaN"
    nan, *others = get_args(OnUnsafe)
    return choice(value, "on_unsafe", (nan, *more, *others), remedy)


def unsafe(samples: Sequence[Any], status: Status, why: str) -> InputError:
    """What "raise" raises: the first of these samples ended with that status."""
    more = f" and {len(samples) - 1} more" if len(samples) > 1 else ""
    return InputError(f"on_unsafe: sample {samples[0]}{more} ended with {status.name}: {why}.")
