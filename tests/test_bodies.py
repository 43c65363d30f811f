"""The portable ONNX bodies of ai.icnnrt's operators, run by ONNX Runtime, against the float64 reference.

λ is not unique where cuts are duplicates, so it is compared through what it implies: G'λ, the gap, the lower bound.
"""

import functools
import hashlib
import os
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnx_functions import all_nodes, check_portable

from icnnrt.mathematics import reference
from icnnrt_exporters.operators.bodies import IR_VERSION, OP_DOMAIN, OP_VERSION, OPSET, functions

TYPES = {np.float64: TensorProto.DOUBLE, np.float32: TensorProto.FLOAT}
SIGNATURES = {
    "BundleEntropySolve": (
        {"slopes": ["B", "k", "n"], "offsets": ["B", "k"], "lam_start": ["B", "k_prev"]},
        {"y": ["B", "n"], "lam": ["B", "k"], "lower_bound": ["B"], "residual": ["B", 3]},
    ),
    "BundleEntropyAdjoint": (
        {"slopes": ["B", "k", "n"], "offsets": ["B", "k"], "lam": ["B", "k"], "y_bar": ["B", "n"]},
        {"c_y": ["B", "n"], "c_lam": ["B", "k"]},
    ),
}
ALWAYS_DOUBLE = ("lower_bound", "residual")

# Both sides solve until the gap is rounding. That bounds y by its root only, which is 1e-8; this close it is where no
# two cuts are nearly parallel. float32 rounds y and λ once each.
Y_TOLERANCE = {np.float64: 1e-10, np.float32: 2e-5}
# What the multipliers handed out leave as gap, relative to the dual value: float32 loses 6e-8 of λ.
GAP_TOLERANCE = {np.float64: 1e-8, np.float32: 3e-5}
ADJOINT_TOLERANCE = {np.float64: 1e-9, np.float32: 1e-5}

# Nodes in each Loop's body, constants aside.
STEP_NODES, SWEEP_NODES, ELIMINATION_NODES = 112, 11, 11

each_dtype = pytest.mark.parametrize("dtype", TYPES)


def model(op: str, dtype: type, **attributes: int) -> onnx.ModelProto:
    """One node, and the bodies that make it portable."""
    inputs, outputs = SIGNATURES[op]
    T = TYPES[dtype]
    node = helper.make_node(op, list(inputs), list(outputs), domain=OP_DOMAIN, **attributes)
    graph = helper.make_graph(
        [node],
        op,
        [helper.make_tensor_value_info(name, T, shape) for name, shape in inputs.items()],
        [
            helper.make_tensor_value_info(name, TensorProto.DOUBLE if name in ALWAYS_DOUBLE else T, shape)
            for name, shape in outputs.items()
        ],
    )
    return helper.make_model(
        graph,
        functions=functions(),
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(OP_DOMAIN, OP_VERSION)],
        ir_version=IR_VERSION,
    )


@functools.cache
def session(op: str, dtype: type, **attributes: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    serialised = model(op, dtype, **attributes).SerializeToString()
    return onnxruntime.InferenceSession(serialised, options, providers=["CPUExecutionProvider"])


def solve(G, e, lam_start=None, dtype=np.float64, steps=reference.STEPS):
    lam_start = np.empty((len(G), 0)) if lam_start is None else lam_start
    feeds = {"slopes": G.astype(dtype), "offsets": e.astype(dtype), "lam_start": lam_start.astype(dtype)}
    return reference.InnerSolution(*session("BundleEntropySolve", dtype, steps=steps).run(None, feeds))


def adjoint(G, e, lam, y_bar, dtype=np.float64):
    arrays = {"slopes": G, "offsets": e, "lam": lam, "y_bar": y_bar}
    feeds = {name: array.astype(dtype) for name, array in arrays.items()}
    return session("BundleEntropyAdjoint", dtype).run(None, feeds)


def random_cuts(seed, B, k, n, scale=1.0):
    """Cuts that compete: v differs from cut to cut by about as much as y can change it."""
    rng = np.random.default_rng(seed)
    G = scale * rng.standard_normal((B, k, n)) / np.sqrt(n) * 3
    return G, 0.3 * scale * rng.standard_normal((B, k))


def network(kind, n, seed):
    """Value and gradient of a two-layer network, convex in y: f = Σ a(Z a(Wy + b) + Vy) with Z >= 0."""
    rng = np.random.default_rng(seed)
    W, b = rng.standard_normal((20, n)), rng.standard_normal(20)
    Z, V = np.abs(rng.standard_normal((12, 20))) / 8, rng.standard_normal((12, n))
    bend = (lambda z: np.maximum(z, 0.0)) if kind == "relu" else reference.softplus
    slope = (lambda z: (z > 0) * 1.0) if kind == "relu" else reference.sigmoid

    def value_and_gradient(y):
        first = y @ W.T + b
        second = bend(first) @ Z.T + y @ V.T
        out = slope(second)
        return bend(second).sum(1), out @ V + ((out @ Z) * slope(first)) @ W

    return value_and_gradient


def check_solution(G, e, lam_start=None, dtype=np.float64, y_tolerance=None):
    """Against the reference on the same, already rounded numbers; and by certificate."""
    G, e = G.astype(dtype).astype(np.float64), e.astype(dtype).astype(np.float64)
    lam_start = lam_start if lam_start is None else lam_start.astype(dtype).astype(np.float64)
    expected = reference.bundle_entropy_solve(G, e, lam_start)
    y, lam, lower_bound, residual = got = solve(G, e, lam_start, dtype)
    assert (y.dtype, lam.dtype, lower_bound.dtype, residual.dtype) == (dtype, dtype, np.float64, np.float64)
    assert [a.shape for a in got] == [a.shape for a in expected]
    if len(G) == 0:
        return
    size = np.maximum(1.0, np.abs(expected.lower_bound))
    assert np.abs(y - expected.y).max() <= (y_tolerance or Y_TOLERANCE[dtype])
    assert (np.abs(lower_bound - expected.lower_bound) / size).max() <= 1e-12
    assert (residual[:, 2] / size).max() <= 1e-8
    assert residual[:, 1].max() <= 1e-14
    assert residual[:, 0].max() <= np.finfo(dtype).eps
    assert lam.min() >= 0.0
    # What the caller can compute from λ as handed out.
    lam = lam.astype(np.float64)
    implied = reference.evaluate(G, e, lam)
    eps = np.finfo(dtype).eps
    slope_size = 1.0 + np.abs(G).max((1, 2))
    assert (np.abs(lam.sum(1) - 1.0)).max() <= 4 * eps
    # How far G'λ may be off is told by the links: dy = D d(G'λ), and y is known.
    assert np.abs(implied.y - expected.y).max() <= (y_tolerance or Y_TOLERANCE[dtype]) + 4 * eps * slope_size.max()
    assert (implied.complementarity / np.maximum(size, slope_size)).max() <= GAP_TOLERANCE[dtype]


@each_dtype
@pytest.mark.parametrize("scale", [1e-3, 1.0, 10.0, 100.0])
@pytest.mark.parametrize(
    ("n", "k", "B"),
    [(1, 1, 1), (1, 2, 7), (10, 1, 128), (10, 5, 7), (10, 30, 7), (159, 2, 1), (159, 10, 7), (2048, 5, 1)],
)
def test_random_cuts(n, k, B, scale, dtype):
    check_solution(*random_cuts(k, B, k, n, scale), dtype=dtype)


@pytest.mark.parametrize(("n", "k", "B"), [(159, 10, 128), (2048, 30, 1), (10, 5, 1000), (1, 10, 128), (1, 30, 7)])
def test_random_cuts_of_larger_shapes(n, k, B):
    check_solution(*random_cuts(k, B, k, n, 3.0))


@each_dtype
@pytest.mark.parametrize("k_prev", [0, 2])
def test_an_empty_batch(dtype, k_prev):
    check_solution(np.empty((0, 3, 5)), np.empty((0, 3)), np.empty((0, k_prev)), dtype)
    c_y, c_lam = adjoint(np.empty((0, 3, 5)), np.empty((0, 3)), np.empty((0, 3)), np.empty((0, 5)), dtype)
    assert (c_y.shape, c_lam.shape) == ((0, 5), (0, 3))


@each_dtype
@pytest.mark.parametrize("kind", ["relu", "softplus"])
@pytest.mark.parametrize(("n", "K"), [(1, 6), (10, 12), (40, 10)])
def test_the_cuts_of_a_network_with_warm_starts(kind, n, K, dtype):
    """Near convergence cuts are all but parallel, and a gap tells y by its root: 2 ‖y − y*‖² <= gap, as R is 4-convex.

    Solves end at a gap of rounding.
    """
    y_init = np.random.default_rng(n).random((5, n))
    path = reference.bundle_entropy_argmin(network(kind, n, seed=K), y_init, K)
    for k in range(1, K + 1):
        G, e = path.slopes[:, :k], path.offsets[:, :k]
        lam_prev = path.lam_history[:, k - 2, : k - 1] if k > 1 else None
        gap = 2 * reference.EPS * (1.0 + (np.abs(e) + 0.5 * np.abs(G).sum(2)).max())
        check_solution(G, e, lam_prev, dtype, max(Y_TOLERANCE[dtype], 2 * np.sqrt(gap / 2)))


@each_dtype
def test_warm_start_with_all_or_few_cuts(dtype):
    G, e = random_cuts(0, 7, 6, 10, 3.0)
    lam = reference.bundle_entropy_solve(G, e).lam
    for k_prev in (1, 3, 6):
        check_solution(G, e, lam[:, :k_prev] / lam[:, :k_prev].sum(1, keepdims=True), dtype)


@each_dtype
@pytest.mark.parametrize("n", [1, 10, 159])
def test_duplicate_cuts(n, dtype):
    G, e = random_cuts(n, 7, 4, n, 5.0)
    G, e = np.concatenate([G, G, G[:, :1]], axis=1), np.concatenate([e, e, e[:, :1]], axis=1)
    check_solution(G, e, dtype=dtype)


@each_dtype
def test_all_cuts_equal(dtype):
    G, e = random_cuts(1, 7, 1, 10)
    check_solution(np.repeat(G, 5, axis=1), np.repeat(e, 5, axis=1), dtype=dtype)


@each_dtype
def test_saturation(dtype):
    """Slopes of one sign and far beyond what moves σ: y is 0 or 1 in almost every entry."""
    G, e = random_cuts(2, 7, 5, 30, 1.0)
    check_solution(np.abs(G) * 200.0 + 50.0, e, dtype=dtype)
    check_solution(-np.abs(G) * 200.0 - 50.0, e, dtype=dtype)


@pytest.mark.parametrize("steps", [1, 3])
def test_few_steps_return_the_best_iterate_and_say_so(steps):
    G, e = random_cuts(3, 7, 5, 10, 20.0)
    y, lam, _, residual = solve(G, e, steps=steps)
    expected = reference.bundle_entropy_solve(G, e, steps=steps)
    np.testing.assert_allclose(y, expected.y, atol=1e-8)
    np.testing.assert_allclose(lam, expected.lam, atol=1e-8)
    np.testing.assert_allclose(residual[:, 2], expected.residual[:, 2], rtol=1e-6)
    assert residual[:, 2].max() > 1e-6


@each_dtype
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", ["slope", "offset"])
def test_a_bad_sample_poisons_itself_alone(bad, place, dtype):
    G, e = random_cuts(4, 7, 5, 10, 3.0)
    clean = solve(G, e, dtype=dtype)
    if place == "slope":
        G[2, 1, 3] = bad
    else:
        e[2, 1] = bad
    y, _, lower_bound, residual = got = solve(G, e, dtype=dtype)
    others = np.arange(7) != 2
    assert np.isnan(y[2]).all()
    assert np.isnan(lower_bound[2])
    assert not np.isfinite(residual[2, [0, 2]]).any()
    for a, b in zip(got, clean, strict=True):
        np.testing.assert_array_equal(a[others], b[others])


def test_a_sample_does_not_depend_on_its_neighbours():
    """To rounding: matrix products of other batch sizes may block differently."""
    G, e = random_cuts(5, 9, 6, 20, 10.0)
    together = solve(G, e)
    for i in range(len(G)):
        alone = solve(G[i : i + 1], e[i : i + 1])
        np.testing.assert_allclose(alone.y[0], together.y[i], atol=1e-12)
        np.testing.assert_allclose(alone.lower_bound[0], together.lower_bound[i], rtol=1e-13)


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    B=st.integers(0, 4),
    k=st.integers(1, 12),
    n=st.integers(1, 12),
    exponent=st.floats(-4, 4),
    offset_exponent=st.floats(-4, 4),
    repeats=st.integers(1, 3),
    dtype=st.sampled_from(list(TYPES)),
)
@example(seed=0, B=2, k=5, n=1, exponent=4.0, offset_exponent=4.0, repeats=3, dtype=np.float32)
def test_finite_cuts_give_finite_answers(seed, B, k, n, exponent, offset_exponent, repeats, dtype):
    G, e = random_cuts(seed, B, k, n)
    G = np.repeat(G * 10.0**exponent, repeats, axis=1)
    e = np.repeat(e * 10.0**offset_exponent, repeats, axis=1)
    got = solve(G, e, dtype=dtype)
    assert all(np.isfinite(a).all() for a in got)
    y, lam, _, residual = got
    # No silent failure: the complementarity reported is that of the answer handed out.
    rounded = (a.astype(dtype).astype(np.float64) for a in (G, e, lam))
    size = np.abs(e).max(initial=0.0) + np.abs(G).max(initial=0.0) * n
    apart = np.abs(residual[:, 2] - reference.evaluate(*rounded).complementarity)
    assert (apart <= (1e-10 if dtype == np.float64 else 1e-3) * (1 + size)).all()
    assert ((y >= 0) & (y <= 1)).all()
    assert (lam >= 0).all()
    assert (np.abs(lam.sum(1) - 1) <= 1e-5).all()
    c = adjoint(G, e, lam, np.ones_like(y), dtype)
    assert all(np.isfinite(a).all() for a in c)


@each_dtype
@pytest.mark.parametrize("scale", [1e-2, 1.0, 10.0, 100.0])
@pytest.mark.parametrize(("n", "k", "B"), [(1, 1, 7), (1, 5, 7), (3, 5, 20), (10, 30, 7), (159, 10, 128), (2048, 5, 1)])
def test_the_adjoint_is_the_references(n, k, B, scale, dtype):
    G, e = (a.astype(dtype).astype(np.float64) for a in random_cuts(k, B, k, n, scale))
    lam = reference.bundle_entropy_solve(G, e).lam.astype(dtype).astype(np.float64)
    y_bar = np.random.default_rng(n).standard_normal((B, n)).astype(dtype).astype(np.float64)
    c_y, c_lam = adjoint(G, e, lam, y_bar, dtype)
    assert c_y.dtype == c_lam.dtype == dtype
    expected_y, expected_lam = reference.kkt_adjoint(G, e, lam, y_bar)
    # c_λ has the units of ȳ / G.
    size = np.abs(y_bar).max(1, keepdims=True) / np.abs(G).max((1, 2))[:, None]
    np.testing.assert_allclose(c_y, expected_y, atol=ADJOINT_TOLERANCE[dtype])
    assert (np.abs(c_lam - expected_lam) / size).max() <= ADJOINT_TOLERANCE[dtype]


def test_the_adjoint_shares_out_duplicates():
    """How c_λ divides between duplicates is rounding; their sum and c_y are not."""
    G, e = random_cuts(6, 20, 4, 6, 5.0)
    G, e = np.concatenate([G, G], axis=1), np.concatenate([e, e], axis=1)
    lam = reference.bundle_entropy_solve(G, e).lam
    y_bar = np.random.default_rng(0).standard_normal((20, 6))
    c_y, c_lam = adjoint(G, e, lam, y_bar)
    expected_y, expected_lam = reference.kkt_adjoint(G, e, lam, y_bar)
    np.testing.assert_allclose(c_y, expected_y, atol=1e-9)
    np.testing.assert_allclose(c_lam[:, :4] + c_lam[:, 4:], expected_lam[:, :4] + expected_lam[:, 4:], atol=1e-9)


@pytest.mark.parametrize(("n", "k", "scale"), [(10, 1, 1.0), (10, 5, 3.0), (3, 5, 2.0), (40, 10, 5.0)])
def test_the_adjoint_is_the_derivative_of_the_solve(n, k, scale):
    """∂(ȳ'y)/∂e = c_λ and ∂(ȳ'y)/∂G = λ c_y' + c_λ (y − ½)', by central differences along random directions."""
    B, step = 7, 1e-5  # y is known to about 1e-12: all that a gap at rounding level tells
    G, e = random_cuts(n + k, B, k, n, scale)
    rng = np.random.default_rng(n)
    y_bar, G_dot, e_dot = rng.standard_normal((B, n)), rng.standard_normal(G.shape), rng.standard_normal(e.shape)
    at = solve(G, e)
    c_y, c_lam = adjoint(G, e, at.lam, y_bar)
    G_bar = at.lam[:, :, None] * c_y[:, None, :] + c_lam[:, :, None] * (at.y - 0.5)[:, None, :]
    derivative = (G_bar * G_dot).sum((1, 2)) + (c_lam * e_dot).sum(1)
    ahead, behind = (solve(G + h * G_dot, e + h * e_dot).y for h in (step, -step))
    difference = (y_bar * (ahead - behind)).sum(1) / (2 * step)
    np.testing.assert_allclose(derivative, difference, rtol=1e-6, atol=1e-7)


@each_dtype
@pytest.mark.parametrize(("op", "attributes"), [("BundleEntropySolve", {"steps": 5}), ("BundleEntropyAdjoint", {})])
def test_the_models_pass_onnx_checker(op, attributes, dtype):
    proto = model(op, dtype, **attributes)
    onnx.checker.check_model(proto, full_check=True)


def loop_bodies(function):
    loops = (node for node in all_nodes(function.node) if node.op_type == "Loop")
    return [attribute.g for loop in loops for attribute in loop.attribute if attribute.name == "body"]


def test_functions_are_portable():
    assert {"BundleEntropySolve", "BundleEntropyAdjoint"} <= {f.name for f in functions()}
    # ONNX Runtime's float64 Sigmoid loses the lower tail; the others have no float64 kernel for CPUs.
    check_portable(functions(), banned=("Sigmoid", "Softplus", "Mean"))


def test_no_constant_was_rounded_to_float32():
    """Float constants are float64 tensors, and come from nowhere but the tables of the reference."""
    known = {0.0, 0.5, 1.0, 2.0, 4.0, 45.0, 0.25, 3.0, 0.1, 0.9, 0.99, 1e-13, 1e-30}
    known |= {m * reference.EPS for m in (2, 4, 10)} | {reference.LAM_FLOOR, reference.SLACK_FLOOR}
    for function in functions():
        for node in all_nodes(function.node):
            if node.op_type != "Constant":
                continue
            (attribute,) = node.attribute
            assert attribute.name in ("value", "value_int", "value_ints")
            if attribute.name == "value":
                array = onnx.numpy_helper.to_array(attribute.t)
                assert array.dtype in (np.float64, np.int64, np.bool_)
                if array.dtype == np.float64:
                    assert set(np.abs(array).ravel().tolist()) <= known


def test_loops_stay_small():
    """About half a microsecond a node, for every step of every solve: growth should be noticed."""

    def count(graph):
        return sum(node.op_type != "Constant" for node in graph.node)

    by_name = {f.name: f for f in functions()}
    assert count(loop_bodies(by_name["BundleEntropySolve"])[0]) <= STEP_NODES
    assert count(loop_bodies(by_name["InverseSPD"])[0]) <= SWEEP_NODES
    assert count(loop_bodies(by_name["SolveSPD"])[0]) <= ELIMINATION_NODES
    assert count(by_name["InverseSPD"]) <= 15
    assert not loop_bodies(by_name["BundleEntropyAdjoint"])


def test_functions_are_the_same_in_every_process():
    """Python's hash seed decides the order of sets, and translators iterate over sets."""
    program = (
        "import hashlib; from icnnrt_exporters.operators.bodies import functions;"
        "print(hashlib.sha256(b''.join(f.SerializeToString(deterministic=True) for f in functions())).hexdigest())"
    )
    here = hashlib.sha256(b"".join(f.SerializeToString(deterministic=True) for f in functions())).hexdigest()
    path = os.pathsep.join(p for p in sys.path if p)
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": path}
        there = subprocess.check_output([sys.executable, "-c", program], env=environment, text=True)
        assert there.strip() == here
