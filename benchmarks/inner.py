"""One inner solve, BundleEntropySolve: the model of k cuts in n dimensions, B samples at once.

Native kernel and portable body run the same one-node graph. numpy and torch compute in float64 whatever the cuts are
in, and their conversion of float32 cuts is timed with them, as the operators' own is.
"""

import functools
from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from benchmarks import graphs, peers, targets
from benchmarks.conic import ConicModel, Optimum, available
from benchmarks.cuts import Cuts, Start, cuts, start_of, steps_taken
from benchmarks.interleaved import Contender, Missing, first_line, race
from benchmarks.report import Row, base_of, entries
from benchmarks.settings import Settings
from benchmarks.threads import threads
from icnnrt.mathematics import cut_model, reference
from icnnrt.mathematics.cut_model import InnerSolution
from icnnrt.mathematics.domains import UNIT_BOX

SHAPES: Final = ((10, 5), (10, 30), (159, 10), (159, 30), (2048, 10), (2048, 30))  # (n, k)
QUICK_SHAPES: Final = ((10, 5), (159, 10))
STARTS: Final[tuple[Start, ...]] = ("cold", "warm")
FEW: Final = 3  # samples of a batch that the conic solver is given

Answer = Callable[[], NDArray[Any]]


def inner(settings: Settings) -> list[Row]:
    """A row for each shape, batch, dtype, start and number of threads."""
    return [
        row(settings, n, k, batch, dtype, start, count)
        for count in settings.threads
        for dtype in settings.dtypes
        for n, k in (QUICK_SHAPES if settings.quick else SHAPES)
        for batch in settings.batches
        for start in STARTS
    ]


def row(settings: Settings, n: int, k: int, B: int, dtype: str, start: Start, count: int) -> Row:
    setting = {"n": n, "k": k, "batch": B, "dtype": dtype, "start": start, "threads": count}
    settings.progress("inner " + ", ".join(f"{key} {value}" for key, value in setting.items()))
    made = cuts(start, k, n, B, dtype)
    with threads(count):
        contenders, answers, conic = _contenders(settings, made, dtype, start, count)
        outcome = race(contenders, settings.budget, settle=count != 1)
    G, e, _ = (a.astype(np.float64) for a in made)
    expected = reference.bundle_entropy_solve(G, e, start_of(made))
    differences = {
        name: float(np.abs(np.asarray(answer()) - expected.y).max())
        for name, answer in answers.items()
        if not isinstance(outcome[name], Missing)
    }
    facts: dict[str, Any] = {"steps": steps_taken(made)}
    if conic:
        facts["conic"] = _conic_facts(conic, expected, contenders, B)
        differences["cvxpy + Clarabel"] = facts["conic"]["y_difference"]
    base = base_of(contenders, "native", "portable body")
    found = entries(contenders, outcome, base, differences)
    limit = targets.INNER.get((n, k, B)) if count == 1 else None
    met = targets.judged("numpy / native", limit, found, "native", "numpy reference", at_least=True)
    return Row(setting, base, found, facts, met)


def _contenders(
    settings: Settings, made: Cuts, dtype: str, start: Start, count: int
) -> tuple[dict[str, Contender | Missing], dict[str, Answer], list[ConicModel]]:
    """What races, how to see the answers of it, and the conic solver's samples if it is among them."""
    contenders: dict[str, Contender | Missing] = {}
    answers: dict[str, Answer] = {}
    model = graphs.one_node("BundleEntropySolve", dtype, steps=reference.STEPS)
    library = graphs.native_library()
    for name, path in (("native", library), ("portable body", None)):
        if isinstance(path, Missing):
            contenders[name] = path
            continue
        try:
            bound = graphs.Bound(model, made._asdict(), threads=count, library=path)
        except Exception as error:
            contenders[name] = Missing(first_line(error))
            continue
        contenders[name] = Contender(bound)
        answers[name] = lambda bound=bound: bound.outputs["y"]

    def by_numpy() -> InnerSolution:
        G, e, lam = (a.astype(np.float64, copy=False) for a in made)
        return reference.bundle_entropy_solve(G, e, lam if lam.shape[1] else None)

    contenders["numpy reference"] = Contender(by_numpy)
    _add_torch(contenders, answers, settings, made, dtype, count)
    models: list[ConicModel] = []
    contenders["cvxpy + Clarabel"] = conic = _conic(made, dtype, start, count, models)
    contenders["empty graph"] = Contender(graphs.empty(dtype, count))
    return contenders, answers, models if isinstance(conic, Contender) else []


def _add_torch(
    contenders: dict[str, Contender | Missing],
    answers: dict[str, Answer],
    settings: Settings,
    made: Cuts,
    dtype: str,
    count: int,
) -> None:
    try:
        import torch

        from icnnrt_models.layers.namespace import TORCH
    except ImportError as error:
        contenders["torch eager"] = contenders["torch.compile"] = Missing(first_line(error))
        return
    tensors = [torch.from_numpy(a) for a in made]
    solve_in_torch = functools.partial(cut_model.solved, TORCH, UNIT_BOX)

    def arguments() -> list[Any]:
        G, e, lam = (t.double() for t in tensors)
        return [G, e, lam if lam.shape[1] else None]

    def add(name: str, function: Callable[..., Any]) -> None:
        contenders[name] = Contender(lambda: function(*arguments()))
        answers[name] = lambda: function(*arguments()).y.numpy()

    add("torch eager", solve_in_torch)
    if (reason := compiled_elsewhere(settings, dtype, count)) is not None:
        contenders["torch.compile"] = reason
        return
    fast = peers.compiled(solve_in_torch, *arguments())
    if isinstance(fast, Missing):
        contenders["torch.compile"] = fast
    else:
        add("torch.compile", fast)


def compiled_elsewhere(settings: Settings, dtype: str, count: int) -> Missing | None:
    """Compiling takes seconds for each row, so it is done where it tells something new."""
    if settings.quick:
        return Missing("left out by --quick, since compiling takes half a minute")
    if dtype != "float64" or count != 1:
        return Missing("measured in float64 with one thread: it computes in float64 always")
    return None


def _conic(made: Cuts, dtype: str, start: Start, count: int, models: list[ConicModel]) -> Contender | Missing:
    if (reason := available()) is not None:
        return reason
    if dtype != "float64" or start != "cold" or count != 1:
        return Missing("measured in float64, cold, with one thread: it knows no other")
    B, few = len(made.slopes), min(FEW, len(made.slopes))
    try:
        models += [ConicModel(made.slopes[i], made.offsets[i]) for i in range(few)]
    except Exception as error:
        return Missing(first_line(error))
    note = "solved again without cvxpy's compilation"
    if few < B:
        note += f"; {few} samples, times {B}/{few}"
    return Contender(lambda: [model() for model in models], scale=B / few, note=note)


def _conic_facts(
    models: list[ConicModel], expected: InnerSolution, contenders: dict[str, Contender | Missing], B: int
) -> dict[str, Any]:
    """That both solve the same problem: the optimal values agree as far as the conic solver's tolerance goes."""
    optima: list[Optimum] = [model() for model in models]
    pairs = list(zip(optima, expected.lower_bound, expected.y, strict=False))
    contender = contenders["cvxpy + Clarabel"]
    assert isinstance(contender, Contender)
    return {
        "value_difference": max(abs(o.value - bound) / max(1.0, abs(bound)) for o, bound, _ in pairs),
        "y_difference": max(float(np.abs(o.y - y).max()) for o, _, y in pairs),
        "statuses": sorted({o.status for o in optima}),
        "clarabel_seconds": sum(o.clarabel_seconds for o in optima) * contender.scale,
        "samples": len(optima),
        "batch": B,
    }
