"""Strict JSON, checked field by field: every key taken once, every value of the type and range that was expected.

A check is a function (value, place) -> value that raises `PackageError` with one sentence: the place, what was
expected, what came, the remedy. Checks compose: `table(listing(integer(0, 9), 4), 16)`.

A record is a dataclass whose fields carry their checks: `steps: Annotated[int, integer(1, 9)]`. `record` makes a check
of it, and `written` the JSON; fields without a check are seen to elsewhere.
"""

import functools
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, is_dataclass
from types import MappingProxyType
from typing import Annotated, Any, Final, NamedTuple, NoReturn, TypeAlias, TypeVar, get_origin, get_type_hints

import numpy as np

from icnnrt.errors import PackageError
from icnnrt.printable import show

AGAIN: Final = "export the package again"

T = TypeVar("T")


def plain(value: object) -> object:
    """Let json write numpy scalars, which measurements tend to be, and arrays of one number."""
    if isinstance(value, np.generic | np.ndarray) and value.ndim == 0:
        return value.item()
    raise TypeError(f"{type(value).__name__} is not JSON")


def strict(value: Any) -> Any:
    """The same as JSON can say it: scalars and arrays of numpy as Python's numbers and lists, NaN and infinity as null,
    keys and whatever else as text."""
    match value:
        case Mapping():
            return {str(key): strict(inner) for key, inner in value.items()}
        case list() | tuple():
            return [strict(inner) for inner in value]
        case None | bool() | str():
            return value
        case int():
            return int(value)  # of an enumeration too
        case float():
            return float(value) if math.isfinite(value) else None
        case np.generic() | np.ndarray():
            plainer = value.tolist()
            # Of a long double tolist leaves what it was.
            return strict(float(plainer) if isinstance(plainer, np.floating) else plainer)
        case _:
            return str(value)


class Report:
    """A frozen dataclass of plain values, which is told as JSON."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for strict JSON: NaN and infinity are None."""
        return dict(strict(asdict(self)))  # type: ignore[call-overload]


def load_json(data: bytes, place: str) -> object:
    """Parse JSON strictly: UTF-8, no key twice, every number finite."""

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        result = dict(pairs)
        if len(result) < len(pairs):
            double = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise PackageError(f"{place}: the key {show(double)} occurs twice; {AGAIN}.")
        return result

    def number(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            raise PackageError(f"{place}: expected finite numbers, but one is {show(text)}; {AGAIN}.")
        return value

    try:
        return json.loads(data.decode(), object_pairs_hook=unique, parse_float=number, parse_constant=number)
    except (ValueError, RecursionError) as error:
        # ValueError covers bad UTF-8, bad JSON, and integers too long for Python to convert.
        raise PackageError(f"{place}: not valid UTF-8 JSON ({error}); {AGAIN}.") from error


Check: TypeAlias = Callable[[object, str], T]


def wrong(place: str, expected: str, value: object) -> NoReturn:
    raise PackageError(f"{place} should be {expected}, but is {show(value)}; {AGAIN}.")


class LeftOut(NamedTuple):
    """In place of the check of a field: its key is there unless the field is None."""

    check: Check[Any]


class Depending(NamedTuple):
    """In place of the check of a field: made of the fields before it; None where there is to be no such key."""

    check_of: Callable[[Mapping[str, Any]], Check[Any] | None]


class JsonObject:
    """A JSON object whose every key is to be taken once; `close` refuses the keys left over."""

    def __init__(self, value: object, place: str) -> None:
        if not isinstance(value, dict):
            wrong(place.rstrip(".: "), "a JSON object", value)
        self.left: dict[str, Any] = dict(value)
        self.place = place

    def take(self, key: str, check: Check[T]) -> T:
        if key not in self.left:
            raise PackageError(f"{self.place}{key} is missing; {AGAIN}.")
        return check(self.left.pop(key), f"{self.place}{key}")

    def take_all(self, kind: type) -> dict[str, Any]:
        """The fields of a record that have a check."""
        found: dict[str, Any] = {}
        for name, how in _checks(kind).items():
            check = how.check_of(found) if isinstance(how, Depending) else how
            if isinstance(check, LeftOut):
                check = check.check if name in self.left else None
            found[name] = None if check is None else self.take(name, check)
        return found

    def close(self) -> None:
        for key in self.left:
            raise PackageError(
                f"{self.place}{show(key)[1:-1]} is not a key of this version of the format; remove it, or {AGAIN}."
            )


def text(value: object, place: str) -> str:
    # JSON escapes can spell lone surrogates, which no file can hold as UTF-8.
    if not isinstance(value, str) or not 1 <= len(value) <= 4096 or surrogate(value):
        wrong(place, "text of 1 to 4096 characters", value)
    return value


def surrogate(value: str) -> bool:
    return any("\ud800" <= c <= "\udfff" for c in value)


def boolean(value: object, place: str) -> bool:
    if not isinstance(value, bool):
        wrong(place, "true or false", value)
    return value


def integer(low: int, high: int) -> Check[int]:
    def check(value: object, place: str) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            wrong(place, f"an integer from {low} to {high}" if low < high else f"the integer {low}", value)
        return value

    return check


def real(value: object, place: str) -> float:
    # JSON integers may exceed what a float64 holds, 2^1024.
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 2**1023:
        wrong(place, "a finite number", value)
    return float(value)


def positive(value: object, place: str) -> float:
    if (number := real(value, place)) <= 0:
        wrong(place, "a number above 0", value)
    return number


def not_negative(value: object, place: str) -> float:
    if (number := real(value, place)) < 0:
        wrong(place, "a number of at least 0", value)
    return number


def exactly(*allowed: T) -> Check[T]:
    def check(value: object, place: str) -> T:
        for one in allowed:
            if type(value) is type(one) and value == one:
                return one
        wrong(place, " or ".join(show(one) for one in allowed), value)

    return check


def matching(pattern: re.Pattern[str], expected: str) -> Check[str]:
    def check(value: object, place: str) -> str:
        if not isinstance(value, str) or not pattern.fullmatch(value):
            wrong(place, expected, value)
        return value

    return check


SHA256: Final = matching(re.compile(r"[0-9a-f]{64}"), "64 lower-case hexadecimal digits")


def listing(each: Check[T], most: int) -> Check[tuple[T, ...]]:
    def check(value: object, place: str) -> tuple[T, ...]:
        if not isinstance(value, list) or len(value) > most:
            wrong(place, f"a list of at most {most}", value)
        return tuple(each(one, f"{place}[{index}]") for index, one in enumerate(value))

    return check


def table(each: Check[T], most: int, key: Check[str] = text) -> Check[Mapping[str, T]]:
    def check(value: object, place: str) -> Mapping[str, T]:
        if not isinstance(value, dict) or len(value) > most:
            wrong(place, f"a JSON object of at most {most} keys", value)
        return MappingProxyType(
            {key(k, f"a key of {place}"): each(one, f"{place}.{show(k)[1:-1]}") for k, one in value.items()}
        )

    return check


# --- Records -------------------------------------------------------------------------------------


@functools.cache
def _checks(kind: type) -> Mapping[str, Any]:
    hints = get_type_hints(kind, include_extras=True) if is_dataclass(kind) else {}
    return {name: hint.__metadata__[0] for name, hint in hints.items() if get_origin(hint) is Annotated}


def record(kind: type[T], then: Callable[[T, str], None] | None = None) -> Check[T]:
    """A JSON object with the fields of a record; `then` looks at the whole."""

    def check(value: object, place: str) -> T:
        fields = JsonObject(value, f"{place}.")
        made = kind(**fields.take_all(kind))
        fields.close()
        if then is not None:
            then(made, place)
        return made

    return check


def written(value: Any) -> Any:
    """What JSON has of a value: of a record its fields that have a check, of what has a `to_json` that."""
    if isinstance(value, Mapping):
        return {key: written(one) for key, one in value.items()}
    if hasattr(value, "to_json"):
        return value.to_json()
    if _checks(value.__class__):
        return fields_of(value)
    return [written(one) for one in value] if isinstance(value, list | tuple) else value


def fields_of(value: Any) -> dict[str, Any]:
    """The JSON object of a record."""
    known: dict[str, Any] = {}
    found: dict[str, Any] = {}
    for name, how in _checks(value.__class__).items():
        known[name] = getattr(value, name)
        left_out = isinstance(how, LeftOut) or (isinstance(how, Depending) and how.check_of(known) is None)
        if known[name] is not None or not left_out:
            found[name] = written(known[name])
    return found


def maybe(check: Check[T]) -> Check[T | None]:
    """The same, or null."""
    return lambda value, place: None if value is None else check(value, place)
