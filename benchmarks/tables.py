"""Results for people."""

import statistics
from collections.abc import Iterable, Mapping
from typing import Any, Final

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.report import Row
from benchmarks.threads import shown
from icnnrt.cli.app import number

OVERHEAD: Final = "empty graph"


def show_environment(facts: Mapping[str, Any], screen: Console) -> None:
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    load = "" if facts["load"] is None else f", load {facts['load']:.1f}"
    native = facts["native"]
    kernels = (
        native.get("missing") or f"{native['bytes']:,} bytes, {native['instruction_set'] or 'instruction set unknown'}"
    )
    screen.print(
        escape(
            f"{facts['cpu']}, {facts['cores']} of {facts['cores_of_machine']} cores{load}, "
            f"{' '.join(facts['extensions'])}, OMP_NUM_THREADS {facts['OMP_NUM_THREADS'] or 'not set'}, "
            f"{facts['system']}; {versions}; {facts['date']}, commit {facts['commit'] or 'unknown'}; native: {kernels}"
        )
    )


def show_rows(title: str, rows: list[Row], screen: Console) -> None:
    """A table for each number of threads and dtype: the base's column holds its time, the others multiples of it."""
    groups: dict[tuple[int, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.setting["threads"], row.setting["dtype"]), []).append(row)
    for (threads, dtype), group in groups.items():
        screen.print(_table(f"{title}, {dtype}, threads: {shown(threads)}", group))
    _say_missing(rows, screen)
    _say_agreement(rows, screen)
    overhead = [entry.seconds for row in rows if (entry := row.entries.get(OVERHEAD)) and entry.seconds]
    if overhead:
        screen.print(
            f"  included in every call of a graph: {_time(statistics.median(overhead))}, what an empty one takes"
        )


def _table(title: str, rows: list[Row]) -> Table:
    told = {"threads", "dtype"} | ({"n", "K"} if "network" in rows[0].setting else set())  # by title and name
    keys = [key for key in rows[0].setting if key not in told]
    names = [name for name in rows[0].entries if name != OVERHEAD]
    names = [name for name in names if any(row.entries[name].seconds is not None for row in rows)]
    steps, judged = any("steps" in row.facts for row in rows), any(row.targets for row in rows)
    bases = " or ".join(sorted({row.base for row in rows}))
    caption = f"Time of {bases}; × are multiples of it, more than 1 is slower."
    table = Table(*keys, title=title, title_justify="left", caption=caption, caption_justify="left")
    for name in names:
        table.add_column(escape(name), justify="right")
    if steps:
        table.add_column("reference's steps", justify="right")
    if judged:
        table.add_column("target", no_wrap=True)
    for row in rows:
        cells = [escape(str(row.setting[key])) for key in keys] + [_cell(row, name) for name in names]
        if steps:
            taken = row.facts["steps"]
            cells.append(str(taken[0]) if min(taken) == max(taken) else f"{min(taken)}–{max(taken)}")
        if judged:
            cells.append("\n".join(_target(target.as_dict()) for target in row.targets))
        table.add_row(*cells)
    return table


def show_scaling(found: Mapping[str, Any], screen: Console) -> None:
    table = Table(
        "grows", "fixed", "µs a step", "exponent", "larger half", "target",
        title=f"scaling of one step, {found['contender']}, one thread, float64", title_justify="left",
    )  # fmt: skip
    for (name, series), target in zip(found["series"].items(), found["targets"], strict=True):
        points = ", ".join(
            f"{p['size']}: {'–' if p['seconds_per_step'] is None else number(1e6 * p['seconds_per_step'])}"
            for p in series["points"]
        )
        fixed = ", ".join(f"{key} {value}" for key, value in series["fixed"].items())
        exponents = [number(series[key]) for key in ("exponent", "exponent_upper_half")]
        table.add_row(name, fixed, points, *exponents, _target(target))
    screen.print(table)
    reasons = {p["missing"] for series in found["series"].values() for p in series["points"] if "missing" in p}
    for reason in [*found["missing"].values(), *sorted(reasons)]:
        screen.print(f"  – {escape(reason)}")


def show_programs(found: Mapping[str, Any], screen: Console) -> None:
    """How many each solver solves, then what it leaves."""
    count, solvers = len(found["programs"]), found["solvers"]
    tolerances = list(next(iter(solvers.values()))["solved"])
    table = Table(
        "solver", *(f"to {t}" for t in tolerances), "mean time", title=f"{count} programs", title_justify="left"
    )
    for name, summed in solvers.items():
        table.add_row(name, *(str(summed["solved"][t]) for t in tolerances), _time(summed["mean_seconds"]))
    screen.print(table)
    for name in solvers:
        told = found["programs"].items()
        left = [program for program, by in told if not by[name].get("residual", 1.0) <= float(tolerances[-1])]
        if left:
            screen.print(f"  not solved by {escape(name)}: {escape(', '.join(left))}")


def _cell(row: Row, name: str) -> str:
    entry = row.entries[name]
    if entry.seconds is None:
        return "–"
    if name == row.base or entry.ratio is None:
        return f"[bold]{_time(entry.seconds)}[/]"
    return f"{entry.ratio:.{2 if entry.ratio < 10 else 1 if entry.ratio < 100 else 0}f}×"


def _time(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{number(seconds / size)} {unit}"
    return f"{number(seconds * 1e6)} µs"


def _target(target: Mapping[str, Any]) -> str:
    limit = f"{'≥' if target['at_least'] else '≤'} {number(target['limit'])}"
    what = target["what"]
    where = f" ({what.split(' / ')[1]})" if what.startswith("native / ") else ""
    if target["met"] is None:
        return f"{limit}: not measured{where}"
    colour, word = ("green", "met") if target["met"] else ("red", "missed")
    return f"[{colour}]{limit}: {number(target['value'])} {word}[/]{where}"


def _say_missing(rows: Iterable[Row], screen: Console) -> None:
    reasons: dict[tuple[str, str], int] = {}
    notes: set[tuple[str, str]] = set()
    for row in rows:
        for name, entry in row.entries.items():
            if entry.missing is not None:
                reasons[name, entry.missing] = reasons.get((name, entry.missing), 0) + 1
            elif entry.note:
                notes.add((name, entry.note))
    for (name, reason), count in reasons.items():
        screen.print(f"  – {escape(name)}, {count} rows: {escape(reason)}")
    for name, note in sorted(notes):
        screen.print(f"  {escape(name)}: {escape(note)}")


def _say_agreement(rows: list[Row], screen: Console) -> None:
    """That all contenders did the same work."""
    largest: dict[tuple[str, str], float] = {}
    for row in rows:
        for name, entry in row.entries.items():
            if entry.difference is not None:
                key = (name, str(row.setting["dtype"]))
                largest[key] = max(largest.get(key, 0.0), entry.difference)
    if largest:
        told = ", ".join(f"{name} {dtype} {number(value)}" for (name, dtype), value in largest.items())
        screen.print(f"  largest difference from the reference's answer: {escape(told)}")
    conic = [row.facts["conic"] for row in rows if "conic" in row.facts]
    if conic:
        value = max(facts["value_difference"] for facts in conic)
        statuses = sorted({status for facts in conic for status in facts["statuses"]})
        screen.print(
            f"  cvxpy + Clarabel: its optimal value differs from the lower bound by at most {number(value)}, relative "
            f"to max(1, |bound|); statuses {', '.join(statuses)}"
        )
