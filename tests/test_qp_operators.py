"""What the operators ai.icnnrt::QPSolve and ::QPAdjoint are beside right, which test_qp_properties.py tells: the shapes
they take and refuse, odd numbers, threads; and what their portable bodies are made of."""

import functools
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto
from onnx_functions import all_nodes, check_portable
from qp_backends import BODIES, KERNELS, NATIVE, node_alone, opened
from quadratic_programs import mixed, solvable

import icnnrt
from icnnrt.mathematics.qp_reference import QP, kkt_residual
from icnnrt.mathematics.qp_status import QPStatus
from icnnrt_exporters.operators.bodies import functions_qp
from icnnrt_exporters.operators.operator_graphs import operator_graphs

TYPES = (np.float64, np.float32)
KKT = {np.float64: 1e-9, np.float32: 1e-6}  # relative, what SOLVED promises
# Nodes in the bodies of the Loops, constants aside: one sweep of the scaling, one step, a factorisation counted as one;
# one pivot; two proximal steps of the adjoint, and the separation of what has no gradient.
SWEEP_NODES, STEP_NODES, PIVOT_NODES, PROXIMAL_NODES = 87, 380, 13, 231

needs_kernels = pytest.mark.skipif(not KERNELS, reason="there is no native library")
each = pytest.mark.parametrize("way", ["bodies", pytest.param("kernels", marks=needs_kernels)])
each_dtype = pytest.mark.parametrize("dtype", TYPES)
WAYS = {"bodies": BODIES, "kernels": NATIVE}
functions = functools.cache(functions_qp)


@each
@each_dtype
@pytest.mark.parametrize("shared", [("Q", "G", "A"), ("p", "h", "b"), ("h_lower", "lower", "upper"), QP._fields[:-1]])
def test_what_all_samples_share_is_given_once(way, shared, dtype):
    qp = solvable(5, 4, 6, 5, 2, two_sided=True, box=True).qp
    first = qp._replace(**{name: getattr(qp, name)[:1] for name in shared})
    # Far enough apart that mixing the bounds of one sample with the rows of another leaves z.
    wide = {"h": 20.0, "h_lower": -20.0, "lower": -20.0, "upper": 20.0}
    first = first._replace(**{name: getattr(first, name) + by for name, by in wide.items()})
    all_of_it = QP(*(np.broadcast_to(a, (4, *a.shape[1:])) for a in first))
    operators = WAYS[way]
    expected, got = operators.run(all_of_it, dtype), operators.run(first, dtype)
    assert (got.status == QPStatus.SOLVED).all()
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a, b)
    if {"Q", "G", "A"} & set(shared):
        bars = [np.ones_like(a) for a in expected[:4]]
        once, repeated = (operators.adjoint(qp, got, *bars, dtype=dtype) for qp in (first, all_of_it))
        for a, b in zip(once, repeated, strict=True):
            np.testing.assert_array_equal(a, b)


@each
@each_dtype
def test_columns_that_are_not_there(way, dtype):
    qp = solvable(6, 4, 6, 5, 2).qp
    nothing = np.zeros((1, 0))
    got = WAYS[way].run(qp._replace(h_lower=nothing, lower=nothing, upper=nothing), dtype)
    for a, b in zip(got, WAYS[way].run(qp, dtype), strict=True):
        np.testing.assert_array_equal(a, b)


@needs_kernels
def test_threads_change_no_bit():
    qp, _ = mixed(7)
    one, two = (NATIVE.run(qp, threads=threads) for threads in (1, 2))
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a, b)
    for i in range(len(qp.p)):
        for a, b in zip(NATIVE.run(QP(*(a[i : i + 1] for a in qp))), one, strict=True):
            np.testing.assert_array_equal(a[0], b[i])


@needs_kernels
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30, -1e30, 1e200, 1e308, 1e-308])
@each_dtype
def test_odd_numbers_end(value, dtype):
    """No loop, no crash, and never an answer that does not hold."""
    qp = solvable(6, 1, 5, 4, 2, two_sided=True, box=True).qp
    for name in qp._fields:
        array = getattr(qp, name).copy()
        array.reshape(-1)[1] = value  # of Q that is half an entry and its mirror
        spoilt = qp._replace(**{name: array})
        with np.errstate(all="ignore"):
            solution = NATIVE.run(spoilt, dtype)
            if not np.isfinite(array.astype(dtype)).all() and name in ("Q", "p", "G", "A", "b"):
                assert solution.status == QPStatus.NOT_FINITE_INPUT
            elif dtype == np.float64 and solution.status == QPStatus.SOLVED:
                symmetric = spoilt._replace(Q=(spoilt.Q + spoilt.Q.swapaxes(1, 2)) / 2)
                assert kkt_residual(symmetric, *solution[:4]).max() <= KKT[dtype]


SHAPES = {"Q": (3, 4, 4), "p": (3, 4), "G": (1, 5, 4), "h_lower": (1, 0), "h": (3, 5), "A": (1, 2, 4), "b": (3, 2)}
SHAPES |= {"lower": (1, 4), "upper": (1, 0), "start": (1, 0)}
MALFORMED = [
    ("Q", (3, 4, 5), "expected square matrices [B, n, n] or [1, n, n] with n >= 1, but got [3, 4, 5]"),
    ("Q", (4, 4), "expected square matrices"),
    ("Q", (3, 0, 0), "expected square matrices"),
    ("G", (1, 5, 3), "expected [B, m, n] or [1, m, n] with n = 4 as Q has, but got [1, 5, 3]; pass a column"),
    ("A", (2, 4), "expected [B, q, n] or [1, q, n] with n = 4 as Q has"),
    ("h", (3, 4), "expected [B, m] with n = 4, m = 5, q = 2 as Q, G and A have, but got [3, 4]"),
    ("h_lower", (3, 4), "expected [B, m] or [1, 0] with n = 4, m = 5, q = 2"),
    ("p", (2, 4), "expected a leading axis of B = 3 as other inputs have, or of 1, but got [2, 4]"),
    ("b", (3, 1), "expected [B, q]"),
    ("lower", (3, 5), "expected [B, n] or [1, 0]"),
    ("start", (3, 14), "expected [B, n + m + q + n] or [1, 0]"),
    ("upper", (4,), "expected"),
]


@needs_kernels
@each_dtype
@pytest.mark.parametrize(("name", "shape", "sentence"), MALFORMED)
def test_a_malformed_input_is_told(name, shape, sentence, dtype):
    quiet = onnxruntime.RunOptions()
    quiet.log_severity_level = 4
    feeds = {key: np.zeros(shape if key == name else size, dtype) for key, size in SHAPES.items()}
    loose = opened(node_alone("QPSolve", dtype, any_rank=True, steps=50), kernels=True)
    with pytest.raises(Exception, match=r"ai\.icnnrt::QPSolve") as caught:
        loose.run(None, feeds, quiet)
    assert f"ai.icnnrt::QPSolve: {name}: {sentence}" in str(caught.value)


@each_dtype
@pytest.mark.parametrize(("op", "attributes"), [("QuadraticProgram", {}), ("QPSolve", {"steps": 5}), ("QPAdjoint", {})])
def test_the_models_pass_onnx_checker(op, attributes, dtype):
    onnx.checker.check_model(BODIES.model(op, dtype, **attributes), full_check=True)


def test_the_graphs_of_the_package_are_made_of_these_bodies():
    """If not: python -m icnnrt_exporters.operators.operator_graphs."""
    folder = Path(icnnrt.__file__).parent / "graphs"
    made = operator_graphs()
    assert {file.name for file in folder.iterdir()} == set(made)
    for name, data in made.items():
        assert (folder / name).read_bytes() == data, name


def test_functions_are_portable():
    assert [f.name for f in functions()][-3:] == ["QuadraticProgram", "QPSolve", "QPAdjoint"]
    check_portable(functions(), banned=("Softplus", "Mean", "NonZero", "OneHot"))  # no float64 kernel for CPUs
    for function in functions():
        for node in all_nodes(function.node):
            if node.op_type == "Constant":
                (attribute,) = node.attribute
                assert attribute.name in ("value", "value_int", "value_ints")
                if attribute.name == "value":  # a Python float would have become float32
                    assert attribute.t.data_type in (TensorProto.DOUBLE, TensorProto.INT64, TensorProto.BOOL)


def test_loops_stay_small():
    """About half a microsecond a node, for every step of every solve: growth should be noticed."""
    by_name = {f.name: f for f in functions()}
    for name, most in (
        ("QPInteriorPoint", [SWEEP_NODES, STEP_NODES]),
        ("QPAdjoint", [SWEEP_NODES, PROXIMAL_NODES]),
        ("InverseCholesky", [PIVOT_NODES]),
        ("PositiveDefinite", [PIVOT_NODES]),
    ):
        loops = (node for node in all_nodes(by_name[name].node) if node.op_type == "Loop")
        bodies = [a.g for loop in loops for a in loop.attribute if a.name == "body"]
        counts = [sum(node.op_type != "Constant" for node in body.node) for body in bodies]
        assert len(counts) == len(most)
        assert all(count <= bound for count, bound in zip(counts, most, strict=True)), counts
