"""Whole argmins, K cuts and K solves, against their floor: the K evaluations of f and ∇f alone.

Two floors, in the same session settings: `loop` has the K evaluations in one graph, `K calls` runs the package's
value.onnx K times, each with what a call costs. Ratios refer to `loop`; targets are judged by both, since either may
be the lower one: onnxruntime fuses more outside loops. `without solver` is no floor but argmin.onnx with its solver
taken out: cuts, bookkeeping and certificate. native and portable are argmin.onnx by io-binding; `session` is
session.argmin in Python, with the statuses it works out.
"""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime

import icnnrt
from benchmarks import floors, graphs, targets
from benchmarks.interleaved import Contender, Missing, first_line, race
from benchmarks.networks import DIGITS, NETWORKS, package
from benchmarks.report import Row, entries
from benchmarks.settings import Settings
from benchmarks.threads import cores, threads
from icnnrt.format.package import Package

FLOOR: Final = "loop"
CALLS: Final = "K calls"


def argmin(settings: Settings) -> list[Row]:
    """A row for each network, dtype, batch and number of threads."""
    if settings.quick:
        found = [("digits, n 32, K 8", DIGITS, "float32")]
    else:
        found = [
            (network.name, package(network, dtype, settings.progress), dtype)
            for network in NETWORKS
            for dtype in network.dtypes
            if dtype in settings.dtypes
        ]
    return [
        row(settings, name, path, dtype, batch, count)
        for count in settings.threads
        for name, path, dtype in found
        for batch in settings.batches
    ]


def row(settings: Settings, name: str, path: Path, dtype: str, B: int, count: int) -> Row:
    opened = Package.open(path)
    K, (n,) = opened.manifest.solver.iterations, opened.manifest.y_shape
    setting = {"network": name, "n": n, "K": K, "batch": B, "dtype": dtype, "threads": count}
    settings.progress("argmin " + ", ".join(f"{key} {value}" for key, value in setting.items()))
    x = np.random.default_rng(2).standard_normal((B, *opened.manifest.x_shape)).astype(dtype)
    facts: dict[str, Any] = {}
    with threads(count):
        contenders = _contenders(opened, x, n, K, count, facts)
        outcome = race(contenders, settings.budget, settle=count != 1)
    found = entries(contenders, outcome, FLOOR)
    limit = targets.ARGMIN.get((n, B)) if count == 1 and not settings.quick else None
    met = tuple(
        target
        for floor in (FLOOR, CALLS)
        for target in targets.judged(f"native / {floor}", limit, found, "native", floor, at_least=False)
    )
    return Row(setting, FLOOR, found, facts, met)


def _contenders(
    opened: Package, x: Any, n: int, K: int, count: int, facts: dict[str, Any]
) -> dict[str, Contender | Missing]:
    weights = {name: onnxruntime.OrtValue.ortvalue_from_numpy(np.array(a)) for name, a in opened.weights.items()}
    feeds = {"x": x, "y_init": np.full((len(x), n), 0.5, x.dtype)}
    library = graphs.native_library()

    def bound(graph: bytes, fed: dict[str, Any], path: str | None = None) -> graphs.Bound:
        return graphs.Bound(graph, fed, threads=count, library=path, weights=weights)

    contenders: dict[str, Contender | Missing] = {}

    def add(name: str, make: Callable[[], Callable[[], Any]]) -> None:
        try:
            contenders[name] = Contender(make())
        except Exception as error:
            contenders[name] = Missing(first_line(error))

    def evaluations() -> Callable[[], Any]:
        once = bound(opened.graphs["value"], {"x": x, "y": feeds["y_init"]})

        def call() -> None:
            for _ in range(K):
                once()

        return call

    graph = opened.graphs["argmin"]
    add(FLOOR, lambda: bound(floors.loop_floor(graph), feeds))
    add(CALLS, evaluations)
    add("without solver", lambda: bound(floors.unsolved(graph), feeds))
    for kind, native in (("native", True), ("portable", False)):
        if native and isinstance(library, Missing):
            contenders["native"] = contenders["session native"] = library
            continue
        path = library if native and isinstance(library, str) else None
        add(kind, lambda path=path: bound(graph, feeds, path))
        add(f"session {kind}", lambda native=native: _in_python(opened, x, count, native, facts))
    return contenders


def _in_python(opened: Package, x: Any, count: int, native: bool, facts: dict[str, Any]) -> Callable[[], Any]:
    keywords: dict[str, Any] = {"threads": count or cores()}
    if "native" in inspect.signature(icnnrt.load).parameters:
        keywords["native"] = native
    elif native:
        raise TypeError("icnnrt.load of this version takes no native=")
    session = icnnrt.load(opened, **keywords)
    solution = session.argmin(x)
    kind = "native" if native else "portable"
    facts[f"largest_gap_{kind}"] = float(solution.gap.max())
    facts[f"solved_{kind}"] = int(solution.ok.sum())
    return lambda: session.argmin(x)
