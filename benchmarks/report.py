"""What a measurement hands back: rows of contenders, each as a ratio to the row's base."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.interleaved import Contender, Missing, Timing, ratio


@dataclass(frozen=True)
class Entry:
    """One contender. Either `missing` says why there are no figures, or all but `difference` are there."""

    seconds: float | None = None
    rounds: int | None = None
    ratio: float | None = None  # to the base of the row; > 1 is slower
    difference: float | None = None  # largest, from the reference's answer, where there is one
    note: str = ""
    missing: str | None = None


@dataclass(frozen=True)
class Target:
    """A ratio that was promised. `met` is None where it could not be measured, and `note` says why."""

    what: str
    limit: float
    at_least: bool
    value: float | None
    note: str = ""

    @property
    def met(self) -> bool | None:
        if self.value is None:
            return None
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "met": self.met}


@dataclass(frozen=True)
class Row:
    """One setting and everything that ran in turn there."""

    setting: Mapping[str, Any]
    base: str
    entries: Mapping[str, Entry]
    facts: Mapping[str, Any] = field(default_factory=dict)
    targets: tuple[Target, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        entries = {name: asdict(entry) for name, entry in self.entries.items()}
        targets = [target.as_dict() for target in self.targets]
        return {**self.setting, "base": self.base, "contenders": entries, **self.facts, "targets": targets}


def entries(
    contenders: Mapping[str, Contender | Missing],
    outcome: Mapping[str, Timing | Missing],
    base: str,
    differences: Mapping[str, float | None] | None = None,
) -> dict[str, Entry]:
    """The outcome of a race, in the order of the contenders."""
    zero, found = outcome[base], {}
    for name, contender in contenders.items():
        timing = outcome[name]
        if isinstance(timing, Missing):
            found[name] = Entry(missing=timing.reason)
            continue
        assert isinstance(contender, Contender)
        found[name] = Entry(
            seconds=timing.seconds,
            rounds=len(timing.samples),
            ratio=ratio(timing, zero) if isinstance(zero, Timing) else None,
            difference=(differences or {}).get(name),
            note=contender.note,
        )
    return found


def base_of(contenders: Mapping[str, Contender | Missing], preferred: str, otherwise: str) -> str:
    """What ratios refer to: the preferred contender, if it can run."""
    return otherwise if isinstance(contenders[preferred], Missing) else preferred
