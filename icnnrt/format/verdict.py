"""The record of a verdict on convexity, as a manifest keeps it; `icnnrt.convexity` comes to it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

from icnnrt.format.fields import (
    exactly,
    fields_of,
    integer,
    listing,
    maybe,
    positive,
    real,
    record,
    surrogate,
    text,
    wrong,
)
from icnnrt.printable import cropped, named, show

MAX_BLAME: Final = 1 << 16
MAX_WITNESS: Final = 1 << 13  # some 300 kB of JSON
MAX_REASON: Final = 2000  # characters of it in a sentence
MAX_NAMED: Final = 64  # weights in a sentence
MAX_X: Final = 16  # samples of x that are tried


# --- Checks of single values ---------------------------------------------------------------------


def _sentence(value: object, place: str) -> str:
    """Of any length that a manifest has room for; it may name many weights."""
    if not isinstance(value, str) or surrogate(value):
        wrong(place, "text", value)
    return value


def _pair(value: object, place: str) -> list[object]:
    if not isinstance(value, list | tuple) or len(value) != 2:
        wrong(place, "a list of two", value)
    return list(value)


def _node(value: object, place: str) -> tuple[str, str]:
    operator, output = _pair(value, place)
    return text(operator, place), _sentence(output, place)


def box_of(value: object, place: str) -> tuple[float, float]:
    """Two numbers, the first below the second; raises `PackageError`."""
    low, high = _pair(value, place)
    box = real(low, f"{place}[0]"), real(high, f"{place}[1]")
    if not box[0] < box[1]:
        wrong(place, "a low number and a higher one", value)
    return box


def _weight(value: object, place: str) -> tuple[str, float]:
    names, least = _pair(value, place)
    return _sentence(names, place), real(least, place)


def _numbers(value: object, place: str, depth: int = 8) -> tuple[Any, ...]:
    """Lists of numbers, nested as deeply as a shape may be long, as tuples."""
    if not isinstance(value, list) or not depth:
        wrong(place, "a list of numbers", value)
    return tuple(_numbers(v, place, depth - 1) if isinstance(v, list) else real(v, place) for v in value)


# --- Records -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Witness:
    """f(x, (y_a + y_b) / 2) − (f(x, y_a) + f(x, y_b)) / 2 = excess > rounding.

    Points of more than `MAX_WITNESS` numbers together are left out, (), as a manifest has no room for them.
    """

    x: Annotated[tuple[Any, ...], _numbers]  # nested, in the shape of one sample
    y_a: Annotated[tuple[Any, ...], _numbers]
    y_b: Annotated[tuple[Any, ...], _numbers]
    excess: Annotated[float, positive]
    rounding: Annotated[float, positive]


@dataclass(frozen=True)
class Evidence:
    """What sampling saw where nothing was proven, and where it looked.

    Attributes:
        segments: how many were tried.
        excess: the worst, relative to max(1, |f|).
        box: all segments lie in [box[0], box[1]]^n; what f does elsewhere was not asked.
        contexts: for how many samples of x.
    """

    segments: Annotated[int, integer(0, 1 << 62)]
    excess: Annotated[float, real]
    box: Annotated[tuple[float, float], box_of]
    contexts: Annotated[int, integer(1, MAX_X)]

    def region(self) -> str:
        """Where the segments lie, in words."""
        x = "x" if self.contexts == 1 else f"{self.contexts} samples of x"
        return f"y in [{self.box[0]:g}, {self.box[1]:g}]^n and {x}"


@dataclass(frozen=True)
class Convexity:
    """The verdict on one energy with one set of weights.

    Attributes:
        verdict: "proven", "violated" or "unknown".
        reason: why not proven; empty if it is.
        node: (operator, name of what it makes) where the rules stopped.
        blame: names of the weights whose sign broke a rule.
        witness: of a violation.
        min_weight: (names, number): the smallest entry, as the graph uses it, of all that had to be >= 0.
        strong_convexity: mu > 0 such that f − (mu/2)‖y‖² is convex for every x, where quadratic terms give one.
        lipschitz: a bound on |f(x, y) − f(x, y')| / ‖y − y'‖₂ that holds for every x, where weights alone give one.
        evidence: of sampling, where nothing was proven.
        rests_on: names of the weights whose very values the proof needs; of the others it needs no more than the signs
            that the manifest gives them, so it holds for all weights with these signs. None where nobody has looked.
    """

    verdict: Annotated[Literal["proven", "violated", "unknown"], exactly("proven", "violated", "unknown")]
    reason: Annotated[str, _sentence] = ""
    node: Annotated[tuple[str, str] | None, maybe(_node)] = None
    blame: Annotated[tuple[str, ...], listing(text, MAX_BLAME)] = ()
    witness: Annotated[Witness | None, maybe(record(Witness))] = None
    min_weight: Annotated[tuple[str, float] | None, maybe(_weight)] = None
    strong_convexity: Annotated[float | None, maybe(positive)] = None
    lipschitz: Annotated[float | None, maybe(real)] = None
    evidence: Annotated[Evidence | None, maybe(record(Evidence))] = None
    rests_on: Annotated[tuple[str, ...] | None, maybe(listing(text, MAX_BLAME))] = None

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists, texts and numbers."""
        return fields_of(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Convexity":
        """What `to_json` gave, checked key by key; raises `PackageError`."""
        return recorded(dict(value) if isinstance(value, Mapping) else value, "convexity")

    def sentence(self) -> str:
        """The verdict in one sentence."""
        place = f" at {named(self.node[0])} {show(self.node[1])}" if self.node else ""
        more = f" and {len(self.blame) - MAX_NAMED} more" if len(self.blame) > MAX_NAMED else ""
        names = ", ".join(map(named, self.blame[:MAX_NAMED])) + more
        blame = f"; weights to look at: {names}" if self.blame else ""
        if self.verdict == "proven":
            least = (
                f"; the smallest weight that must be >= 0 is {self.min_weight[1] + 0.0:.3g}" if self.min_weight else ""
            )
            return f"f is proven convex in y{least}."
        if self.verdict == "violated":
            assert self.witness is not None
            where = f" (tried: {self.evidence.region()})" if self.evidence else ""
            return (
                f"f is not convex in y: between two points it lies {self.witness.excess:.3g} above its chord, "
                f"where rounding allows {self.witness.rounding:.1g}{where}{blame}."
            )
        seen = ""
        if self.evidence:
            tried = f"{self.evidence.segments} segments with {self.evidence.region()}"
            seen = f", though none of {tried} showed that it is not"
        # What icnnrt writes there is one line; what anybody wrote into a manifest may look like several.
        one_line = self.reason.isprintable() and "  " not in self.reason
        reason = cropped(self.reason, MAX_REASON) if one_line else show(self.reason)
        return f"f is not proven convex in y{place}: {reason}{seen}{blame}."


def _consistent(found: Convexity, place: str) -> None:
    if (found.verdict == "violated") != (found.witness is not None):
        wrong(f"{place}.witness", "one of a violation, and else null", found.witness and fields_of(found.witness))


recorded: Final = record(Convexity, _consistent)
