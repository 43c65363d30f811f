"""One adjoint, BundleEntropyAdjoint: the small KKT solve of Proposition 3, from ȳ to c_y and c_λ, B samples at once."""

import functools
from typing import Any

import numpy as np

from benchmarks import graphs, peers
from benchmarks.cuts import Start, cuts, start_of
from benchmarks.inner import QUICK_SHAPES, SHAPES, STARTS, compiled_elsewhere
from benchmarks.interleaved import Contender, Missing, first_line, race
from benchmarks.report import Row, base_of, entries
from benchmarks.settings import Settings
from benchmarks.threads import threads
from icnnrt.mathematics import kkt_adjoint, reference
from icnnrt.mathematics.domains import UNIT_BOX


def adjoint(settings: Settings) -> list[Row]:
    """A row for each shape, batch, dtype, kind of cuts and number of threads."""
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
    settings.progress("adjoint " + ", ".join(f"{key} {value}" for key, value in setting.items()))
    made = cuts(start, k, n, B, dtype)
    G, e, _ = (a.astype(np.float64) for a in made)
    lam = reference.bundle_entropy_solve(G, e, start_of(made)).lam
    feeds: dict[str, Any] = {
        "slopes": made.slopes,
        "offsets": made.offsets,
        "lam": lam.astype(dtype),
        "y_bar": np.random.default_rng(1).standard_normal((B, n)).astype(dtype),
    }
    with threads(count):
        contenders, answers = _contenders(settings, feeds, dtype, count)
        outcome = race(contenders, settings.budget, settle=count != 1)
    expected = reference.kkt_adjoint(*(a.astype(np.float64) for a in feeds.values()))[0]
    differences = {
        name: float(np.abs(np.asarray(answer()) - expected).max())
        for name, answer in answers.items()
        if not isinstance(outcome[name], Missing)
    }
    base = base_of(contenders, "native", "portable body")
    return Row(setting, base, entries(contenders, outcome, base, differences))


def _contenders(
    settings: Settings, feeds: dict[str, Any], dtype: str, count: int
) -> tuple[dict[str, Contender | Missing], dict[str, Any]]:
    """What races, and how to see c_y of it."""
    contenders: dict[str, Contender | Missing] = {}
    answers: dict[str, Any] = {}
    model = graphs.one_node("BundleEntropyAdjoint", dtype)
    for name, path in (("native", graphs.native_library()), ("portable body", None)):
        if isinstance(path, Missing):
            contenders[name] = path
            continue
        try:
            bound = graphs.Bound(model, feeds, threads=count, library=path)
        except Exception as error:
            contenders[name] = Missing(first_line(error))
            continue
        contenders[name] = Contender(bound)
        answers[name] = lambda bound=bound: bound.outputs["c_y"]

    def by_numpy() -> Any:
        return reference.kkt_adjoint(*(a.astype(np.float64, copy=False) for a in feeds.values()))

    contenders["numpy reference"] = Contender(by_numpy)
    _add_torch(contenders, answers, settings, feeds, dtype, count)
    contenders["empty graph"] = Contender(graphs.empty(dtype, count))
    return contenders, answers


def _add_torch(
    contenders: dict[str, Contender | Missing],
    answers: dict[str, Any],
    settings: Settings,
    feeds: dict[str, Any],
    dtype: str,
    count: int,
) -> None:
    try:
        import torch

        from icnnrt_models.layers.namespace import TORCH
    except ImportError as error:
        contenders["torch eager"] = contenders["torch.compile"] = Missing(first_line(error))
        return
    tensors = [torch.from_numpy(a) for a in feeds.values()]
    kkt_adjoint_in_torch = functools.partial(kkt_adjoint.adjoint, TORCH, UNIT_BOX)

    def add(name: str, function: Any) -> None:
        contenders[name] = Contender(lambda: function(*(t.double() for t in tensors)))
        answers[name] = lambda: function(*(t.double() for t in tensors))[0].numpy()

    add("torch eager", kkt_adjoint_in_torch)
    fast = compiled_elsewhere(settings, dtype, count) or peers.compiled(
        kkt_adjoint_in_torch, *(t.double() for t in tensors)
    )
    if isinstance(fast, Missing):
        contenders["torch.compile"] = fast
    else:
        add("torch.compile", fast)
