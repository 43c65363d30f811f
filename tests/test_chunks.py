"""Large batches are run in chunks, which changes no answer; all chunks of a call have the same weights."""

import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime")

import icnnrt
from icnnrt import Session
from icnnrt.errors import InputError
from icnnrt.format.package import Package
from icnnrt.format.signatures import BATCH, TRAIN_ROLE, Tensor, expected
from icnnrt.mathematics.status import Status
from icnnrt.serving.chunks import MEMORY, Footprint, Gathered
from icnnrt.serving.weight_sets import WeightSet

FOLDER = Path(__file__).parent / "fixtures" / "version1"
HEADS = FOLDER / "bregman.icnn"  # float64 with every head
B = 23
WHOLE = 1 << 50  # bytes, so one chunk
GRAPHS = [(path.stem, role) for path in sorted(FOLDER.glob("*.icnn")) for role in Package.open(path).graphs]


def points(session: Session, samples: int = B) -> tuple[np.ndarray, np.ndarray]:
    """x with NaN in two samples, and y."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((samples, *session.manifest.x_shape)).astype(session.dtype)
    y = rng.random((samples, *session.manifest.y_shape)).astype(session.dtype)
    x[[3, samples - 1]] = np.nan
    return x, y / y.sum(1, keepdims=True)


# --- The answers -------------------------------------------------------------------------------------------------


def heads(session: Session, _: Session) -> dict[str, Any]:
    x, y = points(session)
    y[5] = np.inf
    f_bar, gradient_bar = np.cos(np.arange(B)), np.sin(np.arange(3 * B)).reshape(B, 3)
    pulled = session.pullback(x, y, f_bar, gradient_bar)
    return {
        "value": session.value(x, y),
        "gradient": session.gradient(x, y),
        "value_and_gradient": session.value_and_gradient(x, y),
        "hvp": session.hvp(x, y, y[::-1]),
        "hessian": session.hessian(x, y),
        "value_gradient_hessian": session.value_gradient_hessian(x, y),
        "gradient_x": session.gradient_x(x, y),
        "pullback": (pulled.y, pulled.x),
        "weights": pulled.weights,
    }


def energies_of_y_alone(session: Session, _: Session) -> dict[str, Any]:
    _, y = points(session)
    y[7] = np.nan
    found = {"gradient": session.gradient(None, y)}
    if session.manifest.kind == "energy":
        found |= {"value": session.value(None, y), "tangent": session.value_gradient_hessian(None, y)}
    return found


def bounds(session: Session) -> dict[str, Any]:
    """[B, 3] of a box, nothing for other domains."""
    if session.manifest.domain is None or session.manifest.domain.kind != "box":
        return {}
    lower = -np.linspace(0, 1, 3 * B).reshape(B, 3)
    return {"lower": lower, "upper": lower + 1.5}


def solved(session: Session, whole: Session) -> dict[str, Any]:
    """With bounds where they may be given: one sample has none that fit."""
    x, _ = points(session)
    given = bounds(session)
    if given:
        given["upper"][6] = -9
    found: dict[str, Any] = {}
    for which, solution in (("y", session.argmin(x, **given)), ("again", whole.argmin(x, **given))):
        found[which] = (solution.y, solution.energy, solution.lower_bound, np.isnan(solution.gap))
        found[f"{which}.refused"] = solution.status * (solution.status >= Status.NOT_FINITE_INPUT)
    y_bar = np.cos(np.arange(3 * B)).reshape(B, 3)
    for adjoint in ("exact", "prop3"):
        back = session.vjp(solution, y_bar, adjoint=adjoint, on_unsafe="skip")
        of_bounds = () if back.lower is None else (back.lower, back.upper)
        found[adjoint] = (back.x, back.skipped, *of_bounds)
        found[f"{adjoint}.weights"] = back.weights
    return found


def programs(session: Session, _: Session) -> dict[str, Any]:
    x, _ = points(session)
    answer = session.solve_qp(x)
    back = session.vjp(answer, np.cos(np.arange(3 * B)).reshape(B, 3), on_unsafe="skip")
    return {
        **{"z": answer.z, "status": answer.status, "residual": answer.residual},
        **{"x": back.x, "skipped": back.skipped, "weights": back.weights},
    }


def polyhedra(session: Session, _: Session) -> dict[str, Any]:
    """Samples need different numbers of cuts; h has a row for each, and the rest is shared."""
    x, y = points(session)
    h = np.linspace(0.1, 3, B)[:, None]
    given = {"G": np.ones((1, 3)), "h": h, "lower": np.zeros(3), "upper": 2.0, "mu": 0.5, "iterations": 7}
    solution = session.argmin_polyhedron(x, **given, tolerance=1e-3)
    assert len(set(solution.cuts[solution.ok].tolist())) > 1
    back = session.vjp_polyhedron(solution, y, on_unsafe="skip")
    names = ("y", "energy", "gap", "status", "cuts", "lam", "nu", "bound_multipliers")
    return {
        **{name: getattr(solution, name) for name in names},
        **{name: getattr(solution.trajectory, name) for name in ("slopes", "offsets", "cut_points", "lam", "best")},
        "back": (back.G, back.h, back.lower, back.upper, back.mu, back.x, back.skipped),
        "weights": back.weights,
    }


CALLS: dict[str, Callable[[Session, Session], dict[str, Any]]] = {
    "bregman": heads,
    "no_context": energies_of_y_alone,
    "gradient": energies_of_y_alone,
    **dict.fromkeys(("unit_box", "box", "simplex", "not_convex"), solved),
    "qp": programs,
    "space": polyhedra,
}


def chunked(name: str, at_once: int, monkeypatch: pytest.MonkeyPatch, native: bool | None = None) -> Session:
    """A session that runs so many samples at once."""
    monkeypatch.setattr(Footprint, "of_a_sample", lambda self, sizes: 100)
    return icnnrt.load(FOLDER / f"{name}.icnn", memory=100 * at_once + 99, native=native)


@pytest.mark.parametrize(
    ("name", "at_once", "native"),
    [*((name, at_once, None) for name in CALLS for at_once in (1, 4)), ("box", 4, False), ("simplex", 4, False)],
)
def test_chunks_change_no_answer(name: str, at_once: int, native: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the rounding that any other batch size brings."""
    whole = icnnrt.load(FOLDER / f"{name}.icnn", memory=WHOLE, native=native)
    parts = chunked(name, at_once, monkeypatch, native)
    runs: list[int] = []
    run = parts.runner._run

    def counted(graph: Any, role: str, feeds: dict[str, Any], *rest: Any) -> Any:
        runs.append(len(feeds["x"]))
        return run(graph, role, feeds, *rest)

    parts.runner._run = counted  # type: ignore[method-assign]
    expected, found = CALLS[name](whole, whole), CALLS[name](parts, whole)
    assert max(runs) == at_once
    assert len(runs) >= (B - 2) // at_once
    rtol = 1e-3 if whole.dtype == np.float32 else 1e-9

    def same(got: Any, true: Any, what: str) -> None:
        if isinstance(true, tuple):
            for i, pair in enumerate(zip(got, true, strict=True)):
                same(*pair, f"{what}[{i}]")
        elif isinstance(true, Mapping):
            assert list(got) == list(true)
            for key in true:
                same(got[key], true[key], f"{what}.{key}")
        else:
            assert (got.dtype, got.shape) == (true.dtype, true.shape), what
            np.testing.assert_allclose(got, true, rtol=rtol, atol=rtol, err_msg=what)

    for what in expected:
        same(found[what], expected[what], what)


@pytest.mark.parametrize("name", ["unit_box", "box", "simplex"])
def test_samples_keep_their_start_and_their_status(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What chunks give is what calls with their samples alone give."""
    whole, parts = icnnrt.load(FOLDER / f"{name}.icnn", memory=WHOLE), chunked(name, 4, monkeypatch)
    x, y = points(whole)
    x[[3, B - 1]], x[9], given = [[0.5], [-0.5]], np.nan, bounds(whole)
    start = np.clip(y, given["lower"], given["upper"]) if given else y
    first = parts.argmin(x, y_init=start, **given)
    begun = np.where(np.isnan(first.y), start, first.y)
    for found, begin in ((first, start), (parts.argmin(x, warm=first, **given), begun)):
        alone = [
            whole.argmin(x[rows], y_init=begin[rows], **{key: bound[rows] for key, bound in given.items()})
            for rows in (slice(i, i + 4) for i in range(0, B, 4))
        ]
        for field in ("status", "y", "energy", "gap", "cut_points"):
            true = np.concatenate([getattr(one, field) for one in alone])
            np.testing.assert_allclose(getattr(found, field), true, rtol=1e-5, atol=1e-6, err_msg=field)
        assert len(np.unique(found.cut_points[:, 0].round(5), axis=0)) == B
        assert np.flatnonzero(~found.ok).tolist() == [9]


@pytest.mark.parametrize("samples", [0, 1, 2, 5])
def test_few_samples_and_none(samples: int) -> None:
    session = icnnrt.load(HEADS, memory=1)
    x, y = (a[7 : 7 + samples] for a in points(session))
    f, gradient, hessian = session.value_gradient_hessian(x, y)
    assert (f.shape, gradient.shape, hessian.shape) == ((samples,), (samples, 3), (samples, 3, 3))
    assert np.isfinite(hessian).all()
    solution = session.argmin(x)
    assert len(solution) == samples
    assert solution.ok.all()
    nothing = session.pullback(x[:0], y[:0], np.zeros(0), y[:0])
    assert nothing.weights
    assert not any(bar.any() for bar in nothing.weights.values())


def test_sums_of_many_chunks_are_rounded_once() -> None:
    """In float32, 1 + 1e-8 is 1, so that added up one by one all but the first would be lost."""
    chunks = [1.0, *[1e-8] * 1000]
    rows = {"y": Tensor("float32", (BATCH,)), "θ": Tensor("float32", (2,))}
    gathered = Gathered(rows, np.ones(len(chunks), bool), {}, {}, {})
    for i, value in enumerate(chunks):
        gathered.add(slice(i, i + 1), {"y": np.float32([i]), "θ": np.full(2, value, np.float32)})
    found = gathered.result()
    np.testing.assert_array_equal(found["y"], np.arange(1001))
    assert found["θ"].dtype == np.float32
    np.testing.assert_allclose(found["θ"], 1 + 1e-5, rtol=1e-7)


# --- How large a chunk is ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "role"), [pair for pair in GRAPHS if pair[1] != TRAIN_ROLE])
def test_a_sample_counts_for_what_it_is_fed_and_gives_at_least(name: str, role: str) -> None:
    """And a chunk is many samples of these small graphs, none of which leaves sizes unsaid."""
    package = Package.open(FOLDER / f"{name}.icnn")
    signature = expected(package.manifest, role)
    assert signature is not None
    sizes = {"m": 2, "q": 1, "slots": 9}
    counted = Footprint(package.graphs[role], role, signature, ()).of_a_sample(sizes)
    given = sum(
        np.dtype(t.dtype).itemsize * int(np.prod([sizes[s] if isinstance(s, str) else s for s in t.shape[1:]]))
        for t in signature.outputs.values()
        if t.shape[:1] == (BATCH,)
    )
    assert given <= counted < MEMORY / 100


def test_memory_is_a_positive_number_of_bytes() -> None:
    for wrong in (0, -1, 1.5, "64 MiB"):
        with pytest.raises(InputError, match=r"^memory: expected an integer of at least 1"):
            icnnrt.load(HEADS, memory=wrong)  # type: ignore[arg-type]
    assert icnnrt.load(HEADS, memory=np.int64(5)).runner._memory == 5


# --- The weights -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["value", "argmin"])
def test_all_chunks_of_a_call_have_the_same_weights(call: str) -> None:
    """Another thread updates them meanwhile. All samples are one, so every set of weights has one answer."""
    session = icnnrt.load(FOLDER / "box.icnn", memory=1)
    first = {name: np.array(array) for name, array in session.weights.items()}
    sets = [first, {name: array * 0.5 for name, array in first.items()}]
    x, y = np.full((100, 2), 0.3), np.full((100, 3), 0.4)

    def answer() -> np.ndarray:
        if call == "value":
            return session.value(x, y)
        solution = session.argmin(x, lower=0.0, upper=1.0)
        ids.append(solution.weights_id)
        return solution.energy

    ids: list[str] = []
    of_sets = []
    for weights in sets:
        session.update_weights(weights)
        of_sets.append(float(answer()[0]))
    assert of_sets[0] != of_sets[1]
    stop, updates = threading.Event(), 0

    def update() -> None:
        nonlocal updates
        while not stop.is_set():
            session.update_weights(sets[updates % 2])
            updates += 1

    thread, interval = threading.Thread(target=update), sys.getswitchinterval()
    sys.setswitchinterval(1e-4)  # else a call is often over before the other thread has had two turns
    thread.start()
    try:
        crossed = 0
        while crossed < 5:  # calls during which both sets were there
            before = updates
            found = answer()
            crossed += updates > before + 2
            assert (found == found[0]).all()
            assert found[0] in of_sets
    finally:
        sys.setswitchinterval(interval)
        stop.set()
        thread.join()


def test_a_solution_bears_the_weights_of_its_chunks() -> None:
    session = icnnrt.load(FOLDER / "box.icnn", memory=1)
    used: list[str] = []
    run = session.runner._run

    def between(graph: Any, role: str, feeds: Any, weights: WeightSet, *rest: Any) -> Any:
        used.append(weights.id)
        session.update_weights({name: array * 0.9 for name, array in session.weights.items()})
        return run(graph, role, feeds, weights, *rest)

    session.runner._run = between  # type: ignore[method-assign]
    solution = session.argmin(np.zeros((5, 2)), lower=0.0, upper=1.0)
    assert used == [solution.weights_id] * 5
    with pytest.raises(InputError, match="before an update of the weights"):
        session.vjp(solution, solution.y)


# --- Where results are written -----------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", [1, WHOLE])
def test_results_are_written_where_the_caller_wants_them(memory: int) -> None:
    session = icnnrt.load(HEADS, memory=memory)
    x, y = points(session)
    shapes: dict[str, list[tuple[int, ...]]] = {
        "value": [(B,)],
        "gradient": [(B, 3)],
        "value_and_gradient": [(B,), (B, 3)],
        "hessian": [(B, 3, 3)],
        "value_gradient_hessian": [(B,), (B, 3), (B, 3, 3)],
        "gradient_x": [(B, 2)],
        "hvp": [(B, 3)],
    }
    for name, wanted in shapes.items():
        arguments = (x, y, y) if name == "hvp" else (x, y)
        out = tuple(np.full(shape, 7.0) for shape in wanted)
        true = getattr(session, name)(*arguments)
        found = getattr(session, name)(*arguments, out=out if len(out) > 1 else out[0])
        found, true = (a if isinstance(a, tuple) else (a,) for a in (found, true))
        for array, given, same in zip(found, out, true, strict=True):
            assert array is given
            np.testing.assert_array_equal(array, same)
    y_bar, x_bar = np.empty((B, 3)), np.empty((B, 2))
    pulled = session.pullback(x, y, np.ones(B), y, out=(y_bar, x_bar))
    true = session.pullback(x, y, np.ones(B), y)
    for view, given, same in ((pulled.y, y_bar, true.y), (pulled.x, x_bar, true.x)):
        assert np.shares_memory(view, given)
        assert given.flags.writeable
        np.testing.assert_array_equal(given, same)
    with pytest.raises(InputError, match=r"^out: expected a tuple of 2 arrays, for y_bar, x_bar, but got ndarray"):
        session.pullback(x, y, np.ones(B), y, out=y_bar)  # type: ignore[arg-type]


def read_only(*shape: int) -> np.ndarray:
    array = np.empty(shape)
    array.flags.writeable = False
    return array


LARGE = 200_000  # samples: y is read where it is
ONE = [
    ([0.0] * B, r"out: expected a numpy array to write to, but got list"),
    (np.ma.zeros(B), r"out: expected a numpy array to write to, but got MaskedArray"),
    (np.empty(B + 1), rf"out: expected an array of float64\[{B}\] to write to, but got float64\[{B + 1}\]; make one"),
    (np.empty((B, 1)), rf"expected an array of float64\[{B}\] .*, but got float64\[{B}, 1\]; .*numpy.empty"),
    (np.empty(B, np.float32), r"but got float32\["),
    (np.empty(B, ">f8"), r"but got >f8\["),
    (np.empty(2 * B)[::2], r"out: expected a C-contiguous array"),
    (read_only(B), r"out: expected a writeable array"),
]


@pytest.mark.parametrize(("out", "sentence"), ONE)
def test_what_cannot_be_written_to_is_refused(out: Any, sentence: str) -> None:
    session = icnnrt.load(HEADS)
    x, y = points(session)
    with pytest.raises(InputError, match=sentence):
        session.value(x, y, out=out)


def test_several_outputs_are_a_tuple_of_arrays_apart() -> None:
    session = icnnrt.load(HEADS)
    x, y = points(session)
    for out, came in ((np.empty(B), "but got ndarray"), ((np.empty(B),), "but got 1 of them"), ([], "but got 0")):
        with pytest.raises(InputError, match=rf"^out: expected a tuple of 2 arrays, for f, gradient, {came}"):
            session.value_and_gradient(x, y, out=out)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"^out\[1\]: expected an array of float64\[23, 3\] to write to"):
        session.value_and_gradient(x, y, out=(np.empty(B), np.empty(B)))
    memory = np.empty(4 * B)
    with pytest.raises(InputError, match=r"^out\[1\]: .*shares memory with an argument"):
        session.value_and_gradient(x, y, out=(memory[:B], memory[B - 1 : 4 * B - 1].reshape(B, 3)))


@pytest.mark.parametrize("samples", [B, LARGE])
def test_arguments_are_not_written_over(samples: int) -> None:
    session = icnnrt.load(HEADS)
    x, y = points(session, samples)
    kept = y.copy()
    with pytest.raises(InputError, match=r"^out: expected an array of its own, but got one that shares memory"):
        session.gradient(x, y, out=y)
    session.gradient(x, y)
    np.testing.assert_array_equal(y, kept)


def test_large_arrays_are_read_where_they_are_and_given_free() -> None:
    """Of the package's dtype they are not copied, and after the call nobody holds them."""
    session = icnnrt.load(HEADS)
    x, y = points(session, LARGE)
    held = sys.getrefcount(x), sys.getrefcount(y)
    session.value(x, y)
    session.value(x[:300], y[:300])
    assert (sys.getrefcount(x), sys.getrefcount(y)) == held
    np.testing.assert_array_equal(session.value(x.tolist()[:50], y[:50]), session.value(x[:50], y[:50]))
