"""The native operators fed with tensors of every rank, shape, type and content: an answer or a sentence, never a crash.

Hypothesis chooses; what it finds it makes small, and remembers. native/tests/fuzz_kernels.cpp does the same to the
kernels alone, where there is no onnxruntime in between.
"""

import functools
import re
from typing import Any

import numpy as np
import onnxruntime
import pytest
import references
from amounts import amount
from cut_models import SIGNATURES as ROLES
from cut_models import model
from hypothesis import example, given, settings
from hypothesis import strategies as st

import icnnrt
from icnnrt import native_library

if native_library.build().library is None:
    pytest.skip(f"there is no native library: {native_library.build().reason}", allow_module_level=True)

# Every type numpy and onnxruntime share; the kernels are there for the last two.
TYPES = [np.bool_, np.int8, np.uint16, np.int32, np.int64, np.uint64, np.float16, np.float32, np.float64]
STEPS = [0, 1, 7, 60]
SIGNATURES = {f"BundleEntropy{role}": signature for role, signature in ROLES.items()}

# Sizes near each other, so that shapes often fit; one that overflows what is not careful, where another is 0.
sizes = st.integers(0, 5)
huge = st.sampled_from([2**31 - 1, 2**31, 2**32])


@functools.cache
def session(op: str, dtype: type, steps: int) -> onnxruntime.InferenceSession:
    """One node that the kernel alone can run, in a graph that declares no shapes: nothing is checked before it is."""
    role = op.removeprefix("BundleEntropy")
    proto = model(role, dtype, bodies=False, **({"steps": steps} if role == "Solve" else {}))
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.ClearField("shape")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    options.log_severity_level = 4
    options.register_custom_ops_library(icnnrt.ops_library())
    return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


@st.composite
def calls(draw: Any) -> tuple[str, type, int, dict[str, np.ndarray]]:
    """An operator and what to feed it: shapes that fit, most often, and then some change."""
    op = draw(st.sampled_from(sorted(SIGNATURES)))
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    names = SIGNATURES[op][0]
    axes = {"B": draw(sizes), "k": draw(sizes), "n": draw(st.integers(0, 20)), "k_prev": draw(sizes)}
    axes["k_prev"] = min(axes["k_prev"], axes["k"])
    shapes = {name: [axes[letter] for letter in letters] for name, letters in names.items()}
    types = dict.fromkeys(names, dtype)
    for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):
        name = draw(st.sampled_from(sorted(names)))
        change = draw(st.sampled_from(["axis", "axis", "rank", "type"]))
        if change == "type":
            types[name] = draw(st.sampled_from(TYPES))
        elif change == "rank":
            shapes[name] = draw(st.lists(sizes, max_size=6))
        elif change == "axis" and shapes[name]:
            shapes[name][draw(st.integers(0, len(shapes[name]) - 1))] = draw(sizes)
    if draw(st.integers(0, 9)) == 0:  # without an entry, so that only its size is large
        name = draw(st.sampled_from(sorted(names)))
        shapes[name] = [0, draw(huge), draw(sizes)][: len(names[name])]
    seed = draw(st.integers(0, 2**32 - 1))
    contents = {name: draw(st.sampled_from(["numbers", "numbers", "any bits", "few values"])) for name in names}
    scale = 10.0 ** draw(st.integers(-6, 6))
    rng = np.random.default_rng(seed)
    feeds = {}
    for name, shape in shapes.items():
        array = filled(rng, tuple(shape), np.dtype(types[name]), contents[name], scale)
        feeds[name] = np.asfortranarray(array) if draw(st.booleans()) and array.size else array
    return op, dtype, draw(st.sampled_from(STEPS)), feeds


def filled(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype, content: str, scale: float) -> np.ndarray:
    if 0 in shape:
        return np.empty(shape, dtype)
    count = int(np.prod(shape))
    if content == "any bits" and dtype != np.bool_:
        return np.frombuffer(rng.bytes(count * dtype.itemsize), dtype).reshape(shape)
    with np.errstate(all="ignore"):
        if content == "few values":  # equal cuts, zeros, ends of the range
            special = np.array([0.0, -0.0, 1.0, -1.0, 1e-310, 3e38, -1e300, np.inf, -np.inf, np.nan])
            weights = np.array([4, 1, 8, 4, 1, 0.2, 0.2, 0.2, 0.2, 0.2])
            return np.asarray(rng.choice(special, shape, p=weights / weights.sum())).astype(dtype)
        return np.asarray(scale * rng.standard_normal(shape)).astype(dtype)


def is_a_sentence(error: Exception, op: str, dtype: type, feeds: dict[str, np.ndarray]) -> bool:
    """Ours, naming operator, input and what was expected; or onnxruntime's own about a type it had not declared."""
    text = str(error)
    if re.search(rf"ai\.icnnrt::{op}: \w+: expected .*, but got ", text):
        return True
    if re.search(rf"ai\.icnnrt::{op}: .*cannot be allocated|ai\.icnnrt::{op}: .*workspace", text):
        return True
    wrong_types = [name for name, array in feeds.items() if array.dtype != dtype]
    return bool(wrong_types) and "Unexpected input data type" in text


@settings(max_examples=amount(1000), deadline=None)
@given(calls())
@example(("BundleEntropySolve", np.float64, 60, {n: np.zeros(()) for n in SIGNATURES["BundleEntropySolve"][0]}))
@example(
    ("BundleEntropyAdjoint", np.float32, 0, {n: np.zeros((1,) * 9, "f") for n in SIGNATURES["BundleEntropyAdjoint"][0]})
)
def test_any_tensors_give_an_answer_or_a_sentence(call: tuple[str, type, int, dict[str, np.ndarray]]) -> None:
    op, dtype, steps, feeds = call
    try:
        outputs = session(op, dtype, steps).run(None, feeds)
    except Exception as error:  # onnxruntime's exceptions have no parent of their own
        if not is_a_sentence(error, op, dtype, feeds):
            raise
        return
    G = feeds["slopes"]
    B, k, n = G.shape
    letters = SIGNATURES[op][1].values()
    assert [list(o.shape) for o in outputs] == [[{"B": B, "k": k, "n": n}.get(x, x) for x in axes] for axes in letters]
    if G.size == 0:
        return
    for b in range(B):
        if op == "BundleEntropySolve":
            check_solution(*(feeds[name][b] for name in ("slopes", "offsets", "lam_start")), *(o[b] for o in outputs))
        elif not all(np.isfinite(array[b]).all() for array in feeds.values()):
            assert not np.isfinite(outputs[0][b]).all()


def check_solution(
    G: np.ndarray,
    e: np.ndarray,
    lam_start: np.ndarray,
    y: np.ndarray,
    lam: np.ndarray,
    lower_bound: np.ndarray,
    residual: np.ndarray,
) -> None:
    """One sample: NaN in all that could be taken for an answer, or an answer whose certificate is true."""
    poisoned = np.isnan(y).all() and np.isnan(lower_bound) and np.isnan(residual[[0, 2]]).all()
    if not (np.isfinite(G).all() and np.isfinite(e).all()):
        assert poisoned
        return
    with np.errstate(over="ignore"):
        G, e = G.astype(np.float64), e.astype(np.float64)
        size = 1.0 + (np.abs(e) + 0.5 * np.abs(G).sum(1)).max()
        a_start = np.isfinite(lam_start).all() and (lam_start >= 0).all() and lam_start.sum(dtype=np.float64) < 1e10
    if poisoned:
        assert not a_start or size > 1e100, "finite cuts, and multipliers to start from, must have an answer"
        return
    eps = np.finfo(y.dtype).eps
    assert ((y >= 0) & (y <= 1)).all()
    assert (lam >= 0).all()
    assert abs(lam.sum(dtype=np.float64) - 1) <= 2 * eps
    assert residual[0] <= eps
    assert residual[1] <= 1e-14
    if size > 1e12:  # v has no digits left to compare
        return
    at = references.evaluate(G[None], e[None], lam.astype(np.float64)[None])
    # λ rounded to its type moves s by so much, y by a quarter of that, and v by as much as the slopes say
    s_error = 2 * eps * (lam.astype(np.float64) @ np.abs(G)).max(initial=0.0)
    y_error = min(1.0, 0.25 * s_error * np.exp(min(s_error, 10.0))) + 2 * eps
    assert np.abs(y - at.y[0]).max() <= y_error
    gap_error = 2 * np.abs(G).sum(1).max() * y_error + 100 * eps * size
    assert abs(residual[2] - at.complementarity[0]) <= gap_error
    assert abs(lower_bound - at.dual[0]) <= s_error * len(y) + 100 * eps * size
