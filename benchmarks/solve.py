"""Quadratic programs, the forward solve alone, one at a time, beside the solvers that people use; and of files.

`icnnrt` is `icnnrt.QPSolver`, given all data anew in every call; `from nearby` is one that starts from its last answer,
for a p that moves by 1e-3 and keeps the active set. Of a folder of .mps and .qps, `--programs FOLDER`, as the set of
Maros and Meszaros is one, each solver is told by how many it solves to a relative KKT residual of 1e-9 and of 1e-6,
measured alike for all, and by the shifted geometric mean of its times, 10 ms added, an unsolved one counting as 10 s.
"""

import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks import targets
from benchmarks.interleaved import Contender, Missing, first_line, race
from benchmarks.qp import QUICK_SIZES, SIZES, problems
from benchmarks.report import Entry, Row, Target, entries
from benchmarks.settings import Settings
from benchmarks.solvers import OTHERS, Call, NoAnswer, Program, from_nearby, ours, ours_prepared
from icnnrt.mathematics.qp_reference import QP, kkt_residual
from icnnrt.programs import read_program

BASE: Final = "icnnrt"
TOLERANCES: Final = (1e-9, 1e-6)
SHIFT, UNSOLVED, REPEATS = 0.01, 10.0, 3  # seconds, seconds, and how often a file is solved at most


def solve(settings: Settings) -> list[Row]:
    """A row for each size: float64, batch 1, one thread."""
    return [_row(settings, size) for size in (QUICK_SIZES if settings.quick else SIZES)]


def _row(settings: Settings, size: tuple[int, int, int]) -> Row:
    n, m, q = size
    setting = {"n": n, "m": m, "q": q, "batch": 1, "dtype": "float64", "threads": 1}
    settings.progress("solve " + ", ".join(f"{key} {value}" for key, value in setting.items()))
    data, z = problems(1, n, m, q)
    none = np.full(n, np.inf)
    program = {
        **{"Q": data.Q[0], "p": data.p[0], "G": data.G[0], "h_lower": np.full(m, -np.inf), "h": data.h[0]},
        **{"A": data.A[0], "b": data.b[0], "lower": -none, "upper": none},
    }
    makers: dict[str, Callable[[Program], Call]] = {
        BASE: ours_prepared,
        "from nearby": from_nearby,
        "icnnrt.qp": ours,
        **OTHERS,
    }
    contenders: dict[str, Contender | Missing] = {}
    differences: dict[str, float] = {}
    for name, make in makers.items():
        try:
            call = make(program)
            off = float(np.abs(call()[0] - z[0]).max())
        except Exception as error:  # a solver that is not installed, or cannot
            contenders[name] = Missing(first_line(error))
            continue
        contenders[name] = Contender(call)
        if make is not from_nearby:
            differences[name] = off
    found = entries(contenders, race(contenders, settings.budget), BASE)
    judged = () if settings.quick else tuple(_targets(found))
    return Row(setting, BASE, found, {"differences": differences}, judged)


def _targets(found: dict[str, Entry]) -> list[Target]:
    """Not slower than the faster of DAQP and PIQP, and from nearby in half of that."""
    ratios = {name: ratio for name in ("DAQP", "PIQP") if (ratio := found[name].ratio) is not None}
    if not ratios:
        return []
    fastest = min(ratios, key=lambda name: ratios[name])
    return [
        *targets.judged(f"icnnrt / {fastest}", 1.0, found, BASE, fastest, at_least=False),
        *targets.judged(f"from nearby / {fastest}", 0.5, found, "from nearby", fastest, at_least=False),
    ]


def of_files(folder: Path, settings: Settings) -> dict[str, Any]:
    """{"programs": {name: {solver: {"seconds", "residual" or "missing"}}}, "solvers": {solver: what they sum to}}."""
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".mps", ".qps"))
    solvers: dict[str, Callable[[Program], Call]] = {BASE: ours, **OTHERS}
    programs: dict[str, dict[str, Any]] = {}
    for path in paths:
        settings.progress(f"solve {path.name}")
        program = read_program(path).program.dense()
        programs[path.stem] = {name: _told(make, program) for name, make in solvers.items()}
    summary = {name: _summed([told[name] for told in programs.values()]) for name in solvers}
    return {"programs": programs, "solvers": summary}


def _told(make: Callable[[Program], Call], program: Program) -> dict[str, Any]:
    seconds = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call = make(program)
            for _ in range(REPEATS):
                began = time.perf_counter()
                found = call()
                seconds.append(time.perf_counter() - began)
                if seconds[-1] > 1.0:
                    break
    except NoAnswer as error:
        return {"missing": str(error)}
    except Exception as error:
        return {"missing": first_line(error)}
    qp = QP(**{name: array[None] for name, array in program.items()})
    residual = float(np.max(kkt_residual(qp, *(np.asarray(a, np.float64)[None] for a in found))))
    return {"seconds": min(seconds), "residual": residual}


def _summed(told: list[dict[str, Any]]) -> dict[str, Any]:
    solved = {t: [one for one in told if one.get("residual", math.inf) <= t] for t in TOLERANCES}
    loose = max(TOLERANCES)
    seconds = [one["seconds"] if one in solved[loose] else UNSOLVED for one in told]
    mean = math.exp(sum(math.log(s + SHIFT) for s in seconds) / len(seconds)) - SHIFT if seconds else math.nan
    return {"solved": {f"{t:g}": len(those) for t, those in solved.items()}, "mean_seconds": mean}
