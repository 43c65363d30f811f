"""How the cost of one step of the inner solver grows with the number of cuts k, the dimension n and the batch B.

One thread, float64, cold random cuts; the native kernel, or the portable body where there is none. Seconds of a whole
solve, less those of an empty graph, over the steps that it takes. What a step is differs between solvers, so their
number is not taken from the reference: it is the least value of the attribute `steps`, which bounds them, that gives
the answer to the last bit. The kernel ends each sample by itself, so its steps are added up; the portable body goes on
with all samples until the last one is solved.

Nothing else is held fixed. How many of the k cuts matter at the solution is up to the problem; a solver that looks at
those alone grows more slowly than k².
"""

import math
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from benchmarks import graphs, targets
from benchmarks.cuts import DISTINCT, Cuts, random_cuts
from benchmarks.interleaved import Contender, Missing, first_line, race
from benchmarks.report import Target
from benchmarks.settings import Settings
from benchmarks.threads import threads
from icnnrt.mathematics import reference

SAMPLES: Final = DISTINCT  # where the batch is not what grows: enough that their steps average out

SERIES: Final[dict[str, tuple[int, ...]]] = {
    "k": (2, 3, 4, 6, 8, 10, 14, 20, 28, 40),
    "n": (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096),
    "batch": (1, 2, 4, 8, 16, 32, 64, 128, 256, 512),
}
FIXED: Final = {
    "k": {"n": 159, "batch": SAMPLES},
    "n": {"k": 10, "batch": SAMPLES},
    "batch": {"n": 159, "k": 10},
}


def scaling(settings: Settings) -> dict[str, Any]:
    """Points and fitted exponents of each series, and the targets for them."""
    library = graphs.native_library()
    found: dict[str, Any] = {
        "contender": "portable body" if isinstance(library, Missing) else "native",
        "missing": {"native": library.reason} if isinstance(library, Missing) else {},
        "series": {},
    }
    judged: list[Target] = []
    for name, sizes in SERIES.items():
        points = []
        for size in sizes[:: 4 if settings.quick else 1]:
            where = {**FIXED[name], name: size}
            settings.progress("scaling " + ", ".join(f"{key} {value}" for key, value in where.items()))
            points.append({"size": size, **_point(settings, where, None if isinstance(library, Missing) else library)})
        fitted = fit([p["size"] for p in points], [p["seconds_per_step"] for p in points])
        found["series"][name] = {"fixed": FIXED[name], "points": points, **fitted}
        exponent = fitted["exponent_upper_half"]
        why = "portable body: the target is the native kernel's" if isinstance(library, Missing) else ""
        judged.append(
            Target(
                f"exponent of {name}",
                targets.EXPONENTS[name] + targets.EXPONENT_TOLERANCE,
                False,
                None if why or exponent is None else exponent,
                why or ("too few points" if exponent is None else ""),
            )
        )
    return {**found, "targets": [target.as_dict() for target in judged]}


def _point(settings: Settings, where: dict[str, int], library: str | None) -> dict[str, Any]:
    """Seconds that one step takes for the whole batch."""
    k, n, B = where["k"], where["n"], where["batch"]
    distinct = random_cuts(k + n, min(B, DISTINCT), k, n)
    sample = np.arange(B) % DISTINCT
    made = Cuts(*(np.ascontiguousarray(a[sample]) for a in distinct))
    with threads(1):
        try:
            taken = _steps_taken(distinct, library)
            contenders: dict[str, Contender | Missing] = {
                "solve": Contender(_solver(made, reference.STEPS, library)),
                "empty graph": Contender(graphs.empty("float64", 1)),
            }
        except Exception as error:
            return {"seconds_per_step": None, "missing": first_line(error)}
        outcome = race(contenders, settings.budget / 3)
    for timing in outcome.values():
        if isinstance(timing, Missing):
            return {"seconds_per_step": None, "missing": timing.reason}
    solve, empty = outcome["solve"], outcome["empty graph"]
    mean = float(np.mean(taken[sample])) if library is not None else float(taken.max())
    return {
        "seconds_per_step": max(solve.seconds - empty.seconds, 0.0) / mean,
        "seconds": solve.seconds,
        "steps": mean,
        "rounds": len(solve.samples),
    }


def _solver(made: Cuts, steps: int, library: str | None) -> graphs.Bound:
    model = graphs.one_node("BundleEntropySolve", "float64", steps=steps)
    return graphs.Bound(model, made._asdict(), threads=1, library=library)


def _steps_taken(made: Cuts, library: str | None) -> NDArray[np.int64]:
    """[B]: the least bound on the steps that leaves each sample's multipliers as they are with the usual bound."""
    final = _solver(made, reference.STEPS, library).outputs["lam"]
    taken = np.full(len(final), reference.STEPS)
    for steps in range(1, reference.STEPS):
        same = (_solver(made, steps, library).outputs["lam"] == final).all(1)
        taken = np.where(same & (taken == reference.STEPS), steps, taken)
        if same.all():
            break
    return taken


def fit(sizes: list[int], seconds: list[float | None]) -> dict[str, float | None]:
    """Exponents p of seconds ~ size^p, by least squares of the logarithms: over all points, and over the larger half
    of them, where what a step costs at any size weighs less."""
    pairs = [(math.log(size), math.log(s)) for size, s in zip(sizes, seconds, strict=True) if s is not None and s > 0]

    def slope(part: list[tuple[float, float]]) -> float | None:
        return float(np.polyfit(*zip(*part, strict=True), 1)[0]) if len(part) > 1 else None

    return {"exponent": slope(pairs), "exponent_upper_half": slope(pairs[len(pairs) // 2 :])}
