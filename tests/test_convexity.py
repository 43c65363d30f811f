"""Verdicts on convexity: right on networks whose answer is known, and never a wrong `proven`."""

import json
import re
import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from amounts import amount
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from icnnrt.convexity import Convexity, prove
from icnnrt.convexity.onnx_numpy import evaluate, operators
from icnnrt.errors import PackageError
from icnnrt.format.contents import weight_layout
from icnnrt.format.onnx_graph import ancestors, read_graph
from icnnrt.format.package import Package

DIGITS = Path(__file__).parent.parent / "models" / "digits_completion" / "digits_completion.icnn"

Arrays = dict[str, np.ndarray[Any, Any]]


def node(op_type: str, inputs: str, output: str, **attributes: Any) -> onnx.NodeProto:
    """`inputs` are names parted by spaces; `_` stands for one left out."""
    names = ["" if name == "_" else name for name in inputs.split()]
    return helper.make_node(op_type, names, [output], **attributes)


def model(nodes: list[onnx.NodeProto], numbers: Mapping[str, Any], n: int = 3, m: int = 2, dtype: int = 11) -> bytes:
    """A value graph x [B, m], y [B, n] -> f [B] with these initialisers; `one` is the axis 1."""
    arrays = {"one": np.array([1]), **numbers}
    floats = helper.tensor_dtype_to_np_dtype(dtype)
    graph = helper.make_graph(
        nodes,
        "value",
        [helper.make_tensor_value_info(k, dtype, ["batch", size]) for k, size in (("x", m), ("y", n))],
        [helper.make_tensor_value_info("f", dtype, ["batch"])],
        [
            numpy_helper.from_array(a.astype(floats) if a.dtype.kind == "f" else a, k)
            for k, a in ((k, np.asarray(v)) for k, v in arrays.items())
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10).SerializeToString()


def total(name: str) -> onnx.NodeProto:
    return node("ReduceSum", f"{name} one", "f", keepdims=0)


def softplus(z: str, out: str) -> list[onnx.NodeProto]:
    """As the exporter lowers it; needs `zero` and `unit`."""
    return [
        node("Max", f"{z} zero", f"{out}_max"),
        node("Abs", z, f"{out}_abs"),
        node("Neg", f"{out}_abs", f"{out}_neg"),
        node("Exp", f"{out}_neg", f"{out}_exp"),
        node("Add", f"{out}_exp unit", f"{out}_plus"),
        node("Log", f"{out}_plus", f"{out}_log"),
        node("Add", f"{out}_max {out}_log", out),
    ]


def random(seed: int, *shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal(shape)


W = random(0, 3, 4)
SCALARS = {"zero": 0.0, "unit": 1.0, "two": 2.0, "half": 0.5, "tenth": 0.1, "five": 5.0, "twenty": 20.0}
AFFINE = node("Gemm", "y W", "z")
EXPM1 = [  # as the exporter lowers it
    node("Mul", "z half", "h"),
    node("Tanh", "h", "t"),
    node("Mul", "t two", "top"),
    node("Sub", "unit t", "bottom"),
    node("Div", "top bottom", "e"),
]

PROVEN: dict[str, list[onnx.NodeProto]] = {
    "relu": [AFFINE, node("Relu", "z", "v"), total("v")],
    "softplus": [AFFINE, *softplus("z", "v"), total("v")],
    "softplus of softplus": [AFFINE, *softplus("z", "u"), *softplus("u", "v"), total("v")],
    "log of 1 + exp": [AFFINE, node("Exp", "z", "e"), node("Add", "e unit", "p"), node("Log", "p", "v"), total("v")],
    "leaky relu": [
        AFFINE,
        node("Mul", "z tenth", "s"),
        node("Greater", "z zero", "c"),
        node("Where", "c z s", "v"),
        total("v"),
    ],
    "leaky relu squared": [AFFINE, node("LeakyRelu", "z", "u", alpha=0.2), node("Mul", "u u", "v"), total("v")],
    "elu": [AFFINE, *EXPM1, node("Greater", "z zero", "c"), node("Where", "c z e", "v"), total("v")],
    "huber-like": [
        AFFINE,
        node("LessOrEqual", "z zero", "low"),
        node("GreaterOrEqual", "z unit", "high"),
        node("Sub", "z half", "line"),
        node("Pow", "z two", "s"),
        node("Mul", "s half", "bend"),
        node("Where", "high line bend", "u"),
        node("Where", "low zero u", "v"),
        total("v"),
    ],
    "norm": [AFFINE, node("Mul", "z z", "s"), node("ReduceSum", "s one", "r", keepdims=0), node("Sqrt", "r", "f")],
    "maximum": [AFFINE, node("ReduceMax", "z one", "f", keepdims=0)],
    "shifted log-sum-exp": [
        AFFINE,
        node("ReduceMax", "z one", "m", keepdims=1),
        node("Sub", "z m", "d"),
        node("Exp", "d", "e"),
        node("ReduceSum", "e one", "s", keepdims=0),
        node("Log", "s", "l"),
        node("Squeeze", "m one", "m0"),
        node("Add", "m0 l", "f"),
    ],
    "quadratic form": [node("MatMul", "y Q", "q"), node("Mul", "q y", "v"), total("v")],
    "gates": [
        AFFINE,
        node("Gemm", "x G", "g"),
        node("Sigmoid", "g", "s"),
        node("Relu", "z", "r"),
        node("Mul", "r s", "gated"),
        node("Mul", "z g", "free"),
        node("Add", "gated free", "v"),
        total("v"),
    ],
    "reparametrised weights": [
        AFFINE,
        *softplus("z", "a"),
        *softplus("V", "P"),
        node("MatMul", "a P", "b"),
        node("Relu", "b", "v"),
        total("v"),
    ],
    "clamped weights and a skip": [
        AFFINE,
        node("Relu", "z", "a"),
        node("Clip", "V zero _", "P"),
        node("Concat", "P W", "both", axis=0),
        node("Concat", "a y", "wide", axis=1),
        node("MatMul", "wide both", "b"),
        node("Relu", "b", "v"),
        total("v"),
    ],
    "a dead unit behind a negative weight": [
        AFFINE,
        node("Relu", "z", "a"),
        node("Gemm", "a mixed", "b"),
        node("Relu", "b", "c"),
        node("Gemm", "c ends", "d"),
        node("Squeeze", "d one", "f"),
    ],
    "minus the smallest": [AFFINE, node("ReduceMin", "z one", "m", keepdims=0), node("Neg", "m", "f")],
    "a maximum of two by a choice": [
        AFFINE,
        node("Relu", "z", "r"),
        node("Gemm", "y W", "w"),
        node("Mul", "w two", "v2"),
        node("LessOrEqual", "r v2", "c"),
        node("Where", "c v2 r", "v"),
        total("v"),
    ],
    "prelu, a slope a channel": [
        AFFINE,
        node("Mul", "slopes z", "s"),
        node("Greater", "z zero", "c"),
        node("Where", "c z s", "v"),
        total("v"),
    ],
    "prelu, the other way round": [
        AFFINE,
        node("Mul", "z slopes", "s"),
        node("LessOrEqual", "z zero", "c"),
        node("Where", "c s z", "v"),
        total("v"),
    ],
    "absolute value by its sign": [AFFINE, node("Sign", "z", "s"), node("Mul", "z s", "v"), total("v")],
    "log cosh": [AFFINE, node("Cosh", "z", "c"), node("Log", "c", "v"), total("v")],
    "clamped at infinity": [
        AFFINE,
        node("Clip", "z tenth infinity", "a"),
        node("Clip", "a minus_infinity _", "b"),
        node("Min", "b infinity", "v"),
        total("v"),
    ],
    "entries put into zeros": [
        AFFINE,
        node("Relu", "z", "r"),
        node("Transpose", "r", "rows", perm=[1, 0]),
        node("Mul", "rows zero", "zeros"),
        node("Slice", "rows nought two_axis nought", "first"),
        node("ScatterND", "zeros some_rows first", "put"),
        node("Transpose", "put", "p", perm=[1, 0]),
        node("MatMul", "p up", "v"),
        total("v"),
    ],
    "log-sum-exp as torch writes it": [
        AFFINE,
        node("ReduceMax", "z one", "m", keepdims=1),
        node("Abs", "m", "a"),
        node("Equal", "a infinity", "i"),
        node("Where", "i zero m", "w"),
        node("Sub", "z w", "d"),
        node("Exp", "d", "e"),
        node("ReduceSum", "e one", "s", keepdims=0),
        node("Log", "s", "l"),
        node("Squeeze", "w one", "m0"),
        node("Add", "l m0", "f"),
    ],
    "a context of many operators": [
        AFFINE,
        node("EyeLike", "W4", "eye"),
        node("MatMul", "z eye", "same"),
        node("Range", "number_0 number_4 number_1", "counted"),
        node("Unsqueeze", "counted one", "column"),
        node("GatherND", "V column", "rows"),
        node("TopK", "x one", "largest", axis=1),
        node("Atan", "largest", "angle"),
        node("Softsign", "angle", "soft"),
        node("Cosh", "soft", "scale"),
        node("Relu", "same", "r"),
        node("Mul", "r scale", "v"),
        node("ReduceSum", "v one", "g", keepdims=0),
        node("MatMul", "z rows", "moved"),
        node("ReduceMax", "moved one", "h", keepdims=0),
        node("Add", "g h", "f"),
    ],
    "samples counted beside y": [
        AFFINE,
        node("Shape", "x", "size", end=1),
        node("Squeeze", "size", "B"),
        node("Range", "number_0 B number_1", "counted"),
        node("Gather", "x counted", "again", axis=0),
        node("ReduceSum", "again one", "s", keepdims=1),
        node("Add", "z s", "moved"),
        node("Relu", "moved", "v"),
        total("v"),
    ],
}
NUMBERS: dict[str, Any] = {
    **SCALARS,
    "W": W,
    "V": random(1, 4, 4),
    "Q": np.eye(3) + np.ones((3, 3)),
    "G": random(2, 2, 4),
    "mixed": np.array([[1.0, -1.0]] * 4),  # unit 1 is concave, then neither ..
    "ends": np.array([[1.0], [0.0]]),  # .. and nothing reads it
    "slopes": np.array([0.1, 1.0, 0.5, 0.0]),
    "infinity": np.inf,
    "minus_infinity": -np.inf,
    "nought": np.array([0]),
    "two_axis": np.array([2]),
    "some_rows": np.array([[3], [1]]),
    "up": np.abs(random(3, 4, 2)),
    "W4": random(4, 4, 4),
    "number_0": np.array(0),
    "number_1": np.array(1),
    "number_4": np.array(4),
}


def with_rows(nodes: list[onnx.NodeProto]) -> Arrays:
    read = {name for one in nodes for name in one.input}
    return {k: v for k, v in NUMBERS.items() if k in read}


@pytest.mark.parametrize("dtype", [TensorProto.FLOAT, TensorProto.DOUBLE])
@pytest.mark.parametrize("name", PROVEN)
def test_convex_graphs_are_proven(name: str, dtype: int) -> None:
    data = model(PROVEN[name], with_rows(PROVEN[name]), dtype=dtype)
    verdict = prove(data, {})
    assert verdict.verdict == "proven", verdict.sentence()
    assert worst_excess(data, 3) < 1e3 * np.finfo(helper.tensor_dtype_to_np_dtype(dtype)).eps


def test_the_smallest_weight_that_must_be_nonnegative_is_named_and_dead_ones_do_not_count() -> None:
    nodes = PROVEN["a dead unit behind a negative weight"]
    verdict = prove(model(nodes, with_rows(nodes)), {})
    assert verdict.min_weight in (("mixed", 1.0), ("ends", 1.0))


UNPROVEN: dict[str, list[onnx.NodeProto]] = {
    "silu": [AFFINE, node("Mul", "z five", "u"), node("Sigmoid", "u", "s"), node("Mul", "u s", "v"), total("v")],
    "elu of alpha 2": [AFFINE, node("Elu", "z", "v", alpha=2.0), total("v")],
    "a gate of any sign": [
        AFFINE,
        node("Gemm", "x G", "g"),
        node("Relu", "z", "r"),
        node("Mul", "r g", "v"),
        total("v"),
    ],
    "negative weights": [
        AFFINE,
        node("Relu", "z", "a"),
        node("MatMul", "a V", "b"),
        node("Relu", "b", "v"),
        total("v"),
    ],
    "indefinite form": [node("MatMul", "y W3", "q"), node("Mul", "q y", "v"), total("v")],
    "a choice of the smaller": [
        AFFINE,
        node("Mul", "z two", "d"),
        node("Greater", "z d", "c"),
        node("Where", "c d z", "v"),
        total("v"),
    ],
    "prelu with a slope above 1": [
        AFFINE,
        node("Mul", "z steep", "s"),
        node("Greater", "z zero", "c"),
        node("Where", "c z s", "v"),
        total("v"),
    ],
    "prelu with its branches exchanged": [
        AFFINE,
        node("Mul", "z slopes", "s"),
        node("Greater", "z zero", "c"),
        node("Where", "c s z", "v"),
        total("v"),
    ],
    "the sign of something else": [
        node("Sub", "y half", "z"),
        node("Sub", "z tenth", "w"),
        node("Sign", "w", "s"),
        node("Mul", "z s", "v"),
        total("v"),
    ],
    "something concave put beside the rest": [
        AFFINE,
        node("Relu", "z", "r"),
        node("Neg", "r", "n"),
        node("Transpose", "r", "rows", perm=[1, 0]),
        node("Transpose", "n", "negative", perm=[1, 0]),
        node("Slice", "negative nought two_axis nought", "first"),
        node("ScatterND", "rows some_rows first", "put"),
        node("Transpose", "put", "v", perm=[1, 0]),
        total("v"),
    ],
    "a jump": [node("Greater", "y half", "c"), node("Where", "c zero y", "v"), total("v")],
    "a third branch at one point": [
        node("Greater", "y half", "more"),
        node("Less", "y half", "less"),
        node("Where", "less zero five", "u"),
        node("Where", "more zero u", "v"),
        total("v"),
    ],
}


# Every unit changes sign in the middle of the box, where segments are tried, and no two of them along nearly one plane:
# else what is concave may lie outside, or be made up for by a neighbour's convex kink.
ACROSS = np.array([[1.0, -1.0, 0.0, -2.0], [-1.0, 0.0, 1.0, 1.0], [0.0, 1.0, -1.0, 1.0]])
PLANTED: dict[str, Any] = {
    "W": ACROSS * np.random.default_rng(5).uniform(1, 2, 4),
    "V": np.abs(NUMBERS["V"]) * [[-1], [1], [1], [1]],  # unit 0 bends f down wherever another unit is positive
    "W3": np.diag([1.0, 1.0, -0.3]),
    "steep": np.array([0.1, 0.5, 1.5, 1.0]),
}


@pytest.mark.parametrize("name", UNPROVEN)
def test_planted_violations_are_found_with_a_witness(name: str) -> None:
    nodes = UNPROVEN[name]
    numbers = {**with_rows(nodes), **PLANTED}
    data = model(nodes, numbers)
    verdict = prove(data, {})
    assert verdict.verdict == "violated", verdict.sentence()
    w = verdict.witness
    assert w is not None
    y = np.array([w.y_a, w.y_b, (np.array(w.y_a) + np.array(w.y_b)) / 2])
    f = run(data, np.repeat(np.array([w.x]), 3, 0), y)
    np.testing.assert_allclose(f[2] - (f[0] + f[1]) / 2, w.excess, rtol=1e-9)
    assert w.excess > w.rounding
    assert verdict.blame == (("V",) if name == "negative weights" else ())


TRAPS: dict[str, tuple[list[onnx.NodeProto], dict[str, Any], str]] = {
    "softplus with torch's threshold, in float64": (
        [*softplus("y", "s"), node("Greater", "y twenty", "c"), node("Where", "c y s", "v"), total("v")],
        {},
        "condition on y",
    ),
    "a jump below rounding, made large": (
        [
            node("Greater", "y zero", "c"),
            node("Add", "y little", "u"),
            node("Where", "c y u", "v"),
            node("Mul", "v large", "w"),
            total("w"),
        ],
        {"little": 1e-9, "large": 1e9},
        "condition on y",
    ),
    "a bend that underflows": (
        [
            node("Mul", "y little", "a"),
            node("Mul", "a little", "b"),
            node("Abs", "b", "c"),
            node("Neg", "c", "v"),
            total("v"),
        ],
        {"little": 1e-200},
        "concave",
    ),
    "three factors in one Einsum": (
        [node("Einsum", "y y x", "f", equation="bi,bi,bj->b")],
        {},
        "both depend on y",
    ),
    "weights made of places in the batch": (
        [
            node("Shape", "y", "s", end=1),
            node("ConstantOfShape", "s", "ones", value=helper.make_tensor("one", 11, [1], [1.0])),
            node("CumSum", "ones nought", "places"),
            node("Sub", "five places", "w"),
            node("Unsqueeze", "w one_axis", "column"),
            node("Relu", "y", "r"),
            node("Mul", "r column", "v"),
            total("v"),
        ],
        {"nought": np.array([0]), "one_axis": np.array([1])},
        "CumSum",
    ),
    "weights that are not numbers": (
        [node("MatMul", "y bad", "z"), node("Relu", "z", "v"), total("v")],
        {"bad": np.full((3, 2), np.inf)},
        "not finite",
    ),
    "steps of half precision": (
        [node("Cast", "y", "h", to=10), node("Cast", "h", "v", to=11), total("v")],
        {},
        "Cast",
    ),
    "samples that meet": (
        [node("ReduceSum", "y nought", "s", keepdims=1), node("Sub", "y s", "d"), node("Mul", "d d", "v"), total("v")],
        {"nought": np.array([0])},
        "samples",
    ),
    "the size of the batch as a number": (
        [
            node("Shape", "y", "s", end=1),
            node("Cast", "s", "b", to=11),
            node("Sub", "b five", "w"),
            node("Relu", "y", "r"),
            node("Mul", "r w", "v"),
            total("v"),
        ],
        {},
        "size of the batch",
    ),
    "samples stirred by a reshape": (
        [
            node("Shape", "y", "s", end=1),
            node("Concat", "three s", "shape", axis=0),
            node("Reshape", "y shape", "r"),
            node("Transpose", "r", "v", perm=[1, 0]),
            total("v"),
        ],
        {"three": np.array([3])},
        "mixes",
    ),
    "a shape that x makes": (
        [
            node("Greater", "x five", "c"),
            node("Cast", "c", "i", to=7),
            node("ReduceMax", "i axes", "k", keepdims=0),
            node("Unsqueeze", "k nought", "end"),
            node("Slice", "below nought end nought", "more"),
            node("Concat", "more above", "w", axis=0),  # in some batches it begins with −1
            node("Slice", "w nought three nought", "weights"),
            node("Relu", "y", "r"),
            node("Mul", "r weights", "v"),
            total("v"),
        ],
        {
            "axes": np.array([0, 1]),
            "nought": np.array([0]),
            "three": np.array([3]),
            "below": -np.ones(2),
            "above": np.ones(4),
        },
        "depends on x or y",
    ),
    "entries that x picks": (
        [
            node("Slice", "x nought one_axis one_axis", "x0"),
            node("Greater", "x0 five", "c"),
            node("Cast", "c", "i", to=7),
            node("GatherND", "y i", "picked", batch_dims=1),  # y_0, or y_1 where x_0 > 5
            node("Slice", "y nought one_axis one_axis", "y0"),
            node("Squeeze", "y0 one_axis", "first"),
            node("Mul", "picked first", "f"),
        ],
        {"nought": np.array([0]), "one_axis": np.array([1])},
        "GatherND",
    ),
    "half the samples, rounded": (
        [
            node("Shape", "y", "s", end=1),
            node("Cast", "s", "b", to=11),
            node("Mul", "b half", "h"),
            node("Cast", "h", "whole", to=7),  # 1 of 2 and of 3
            node("Cast", "whole", "number", to=11),
            node("Sub", "two number", "w"),
            node("Relu", "y", "r"),
            node("Mul", "r w", "v"),
            total("v"),
        ],
        {},
        "real number of the size of the batch",
    ),
    "the samples lost in a large number": (
        [
            node("Shape", "y", "s", end=1),
            node("Cast", "s", "b", to=11),
            node("Add", "b huge", "lost"),  # 2^55 + 2 and 2^55 + 3 are 2^55
            node("Sub", "lost huge", "number"),
            node("Sub", "two number", "w"),
            node("Relu", "y", "r"),
            node("Mul", "r w", "v"),
            total("v"),
        ],
        {"huge": 2.0**55},
        "real number of the size of the batch",
    ),
    "samples counted": (
        [
            node("Shape", "y", "size", end=1),
            node("Squeeze", "size", "B"),
            node("Range", "n0 B n1", "places"),
            node("Cast", "places", "p", to=11),
            node("Sub", "five p", "w"),
            node("Unsqueeze", "w one_axis", "column"),
            node("Relu", "y", "r"),
            node("Mul", "r column", "v"),
            total("v"),
        ],
        {"n0": np.array(0), "n1": np.array(1), "one_axis": np.array([1])},
        "no known sign",
    ),
    "every third sample counted": (
        [
            node("Shape", "y", "size", end=1),
            node("Squeeze", "size", "B"),
            node("Range", "n0 B n3", "places"),  # one of 2 and of 3
            node("Cast", "places", "p", to=11),
            node("Add", "y p", "v"),
            total("v"),
        ],
        {"n0": np.array(0), "n3": np.array(3)},
        "Range counts",
    ),
    "what is left after three samples": (
        [
            node("Slice", "x three end nought", "rest"),  # nothing of 2 and of 3
            node("Slice", "rest nought one_axis one_axis", "column"),
            node("Concat", "column above", "w", axis=0),
            node("Slice", "w nought three nought", "weights"),
            node("Transpose", "weights", "row", perm=[1, 0]),
            node("Relu", "y", "r"),
            node("Mul", "r row", "v"),
            total("v"),
        ],
        {
            "nought": np.array([0]),
            "one_axis": np.array([1]),
            "three": np.array([3]),
            "end": np.array([2**31]),
            "above": np.ones((3, 1)),
        },
        "Slice",
    ),
    "a batch that is squeezed away": (
        [node("Slice", "y nought one_axis one_axis", "s"), node("Squeeze", "s", "f")],
        {"nought": np.array([0]), "one_axis": np.array([1])},
        "where it is 1",
    ),
    "a maximum with infinity": (
        [node("Max", "y infinity", "v"), total("v")],
        {},
        "not finite",
    ),
    "the first three samples": (
        [node("Slice", "y nought three nought", "v"), total("v")],
        {"nought": np.array([0]), "three": np.array([3])},
        "samples",
    ),
}


@pytest.mark.parametrize("name", TRAPS)
def test_traps_are_not_proven(name: str) -> None:
    nodes, numbers, told = TRAPS[name]
    verdict = prove(model(nodes, {**with_rows(nodes), **numbers}), {})
    assert verdict.verdict != "proven"
    assert told in verdict.sentence() or told in verdict.reason, verdict


def test_what_is_free_of_y_may_be_masked_and_mix_samples() -> None:
    nodes = [
        node("Add", "x mask", "a"),
        node("ReduceMax", "a nought", "b", keepdims=1),  # the largest of all samples
        node("Exp", "b", "c"),
        node("ReduceSum", "c one_axis", "d", keepdims=1),
        node("Relu", "y", "r"),
        node("Mul", "r d", "v"),
        total("v"),
    ]
    numbers = {"mask": np.array([0.0, -np.inf]), "nought": np.array([0]), "one_axis": np.array([1])}
    verdict = prove(model(nodes, numbers), {})
    assert verdict.verdict == "proven", verdict.sentence()
    nodes[4] = node("Add", "y infinite", "r")
    verdict = prove(model(nodes, {**numbers, "infinite": np.inf}), {})
    assert "not finite" in verdict.reason


@pytest.mark.parametrize("size", [1e4, 1e6, 1e8])
def test_rounding_of_large_numbers_that_cancel_is_no_violation(size: float) -> None:
    """0.1 y + size sin y − size sin y is affine, but computed with an error far above the rounding of f."""
    nodes = [
        node("Sin", "y", "s"),
        node("Mul", "s size", "a"),
        node("Mul", "y tenth", "b"),
        node("Add", "a b", "c"),
        node("Sub", "c a", "v"),
        total("v"),
    ]
    verdict = prove(model(nodes, {"size": size, "tenth": 0.1}), {})
    assert verdict.verdict == "unknown", verdict.sentence()
    assert verdict.evidence is not None
    assert verdict.evidence.excess > 64 * np.finfo(np.float64).eps  # what a single comparison would have taken for one


def test_strong_convexity_and_lipschitz_constant_are_what_linear_algebra_says() -> None:
    Q, A = NUMBERS["Q"], np.abs(random(3, 4, 1))
    form = [node("MatMul", "y Q", "q"), node("Mul", "q y", "v"), node("ReduceSum", "v one", "p", keepdims=0)]
    bent = [AFFINE, node("Relu", "z", "r"), node("MatMul", "r A", "s"), node("Squeeze", "s one", "t")]
    gate = [node("Gemm", "x G1", "g"), node("Exp", "g", "e"), node("Add", "e unit", "k"), node("Mul", "k v", "kv")]

    verdict = prove(model([*form, *bent, node("Add", "p t", "f")], {"Q": Q, "W": W, "A": A}), {})
    np.testing.assert_allclose(verdict.strong_convexity, 2 * np.linalg.eigvalsh(Q)[0], rtol=1e-9)
    assert verdict.lipschitz is None  # of a quadratic there is none

    # f = k(x)‖y‖², k > 1
    numbers = {"Q": np.eye(3), "G1": random(4, 2, 1), "unit": 1.0}
    squares = [node("Mul", "y y", "v"), *gate, total("kv")]
    verdict = prove(model(squares, {k: v for k, v in numbers.items() if k != "Q"}), {})
    np.testing.assert_allclose(verdict.strong_convexity, 2.0, rtol=1e-9)

    verdict = prove(model([*bent[:-1], node("Squeeze", "s one", "f")], {"W": W, "A": A}), {})
    np.testing.assert_allclose(verdict.lipschitz, np.linalg.norm(W, axis=0) @ A[:, 0], rtol=1e-9)
    assert verdict.strong_convexity is None


def test_the_digits_package_is_proven_and_a_negative_weight_is_found_and_named() -> None:
    package = Package.open(DIGITS)
    verdict = prove(package.graphs["value"], package.weights)
    assert verdict.verdict == "proven"
    assert verdict.min_weight is not None
    names = [k for k, spec in package.manifest.weights.tensors.items() if spec.nonnegative]
    least = min(float(package.weights[k].min()) for k in names)
    assert verdict.min_weight[1] == least

    changed = {**package.weights, "layers.1.W_z.weight": package.weights["layers.1.W_z.weight"].copy()}
    changed["layers.1.W_z.weight"][3, 5] = -3.0
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    names = [name for name in package.weights if name.encode() in package.graphs["value"]]
    options.add_external_initializers(names, [onnxruntime.OrtValue.ortvalue_from_numpy(changed[k]) for k in names])
    session = onnxruntime.InferenceSession(package.graphs["value"], options)

    def value(x: np.ndarray[Any, Any], y: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        f: np.ndarray[Any, Any] = session.run(["f"], {"x": x, "y": y})[0]
        return f

    verdict = prove(package.graphs["value"], changed, value=value)
    assert verdict.verdict == "violated"
    assert verdict.blame == ("layers.1.W_z.weight",)
    assert verdict.node is not None
    assert verdict.node[0] == "Gemm"
    assert "layers.1.W_z.weight" in verdict.sentence()


# --- Memory --------------------------------------------------------------------------------------

BIG = 1 << 21  # a value of so many float64 is more than one value is given below, and is never made
LARGE_VALUES: dict[str, tuple[list[onnx.NodeProto], Mapping[str, Any]]] = {
    "ConstantOfShape": ([node("ConstantOfShape", "shape", "big")], {"shape": np.array([BIG])}),
    "Expand": ([node("Expand", "a shape", "big")], {"a": [1.0], "shape": np.array([BIG])}),
    "Tile": ([node("Tile", "a shape", "big")], {"a": [1.0], "shape": np.array([BIG])}),
    "Range": ([node("Range", "from to by", "big")], {"from": 0.0, "to": float(BIG), "by": 1.0}),
    "Pad": ([node("Pad", "a pads", "big")], {"a": [1.0], "pads": np.array([0, BIG])}),
    "MatMul": ([node("MatMul", "a b", "big")], {"a": np.ones((BIG >> 10, 1)), "b": np.ones((1, 1 << 10))}),
    "Gemm": ([node("Gemm", "a b", "big", transA=1)], {"a": np.ones((1, BIG >> 10)), "b": np.ones((1, 1 << 10))}),
    "Einsum": ([node("Einsum", "a a a", "big", equation="i,j,k->ijk")], {"a": np.ones(1 << 7)}),
    "Gather": ([node("Gather", "a i", "big")], {"a": np.ones((1, 1 << 11)), "i": np.zeros(1 << 10, np.int64)}),
    "GatherND": ([node("GatherND", "a i", "big")], {"a": np.ones((1, 1 << 11)), "i": np.zeros((1 << 10, 1), np.int64)}),
    "Add": ([node("Add", "a b", "big")], {"a": np.ones((1 << 11, 1)), "b": np.ones((1, 1 << 11))}),
    "Max": ([node("Max", "a b", "big")], {"a": np.ones((1 << 11, 1)), "b": np.ones((1, 1 << 11))}),
    "Where": ([node("Where", "c a b", "big")], {"c": True, "a": np.ones((1 << 11, 1)), "b": np.ones((1, 1 << 11))}),
    "Clip": ([node("Clip", "a b", "big")], {"a": np.ones((1 << 11, 1)), "b": np.ones((1, 1 << 11))}),
    "Conv": ([node("Conv", "a b", "big", pads=[99] * 4)], {"a": np.ones((1, 1, 9, 9)), "b": np.ones((1, 1, 99, 99))}),
    "MaxPool": (
        [node("MaxPool", "a", "big", kernel_shape=[2, 2], pads=[1 << 10] * 4)],
        {"a": np.ones((1, 1, 9, 9))},
    ),
}


@pytest.fixture
def small_memory(monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes that the values of one proof may take, but for what the weights add."""
    monkeypatch.setattr("icnnrt.convexity.memory.MEMORY", 1 << 23)
    monkeypatch.setattr("icnnrt.convexity.segments.MAX_NUMBERS", 1 << 12)
    return 1 << 23


def peak(call: Callable[[], Any]) -> tuple[Any, int]:
    """What it returns, and the most bytes that numpy and Python held meanwhile, beyond those from before."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        result = call()
        return result, tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("op", LARGE_VALUES)
def test_a_value_that_would_take_too_much_memory_is_not_made(op: str, small_memory: int) -> None:
    nodes, numbers = LARGE_VALUES[op]
    data = model([*nodes, node("ReduceMax", "big", "m", keepdims=0), node("Add", "y m", "s"), total("s")], numbers)
    verdict, bytes_held = peak(lambda: prove(data, {}))
    assert verdict.verdict == "unknown"
    assert verdict.node is not None
    assert verdict.node[0] == nodes[-1].op_type
    assert re.search("numbers takes more memory than is given to it", verdict.reason)
    assert bytes_held < 4 * small_memory


@pytest.mark.parametrize("weights_alone", [True, False])
def test_all_values_together_are_bounded(weights_alone: bool, small_memory: int) -> None:
    """Each of them is small, and of weights alone or of y."""
    first = node("Expand", "a shape", "v0") if weights_alone else node("MatMul", "y wide", "v0")
    nodes = [first, *(node("Exp" if weights_alone else "Neg", f"v{i}", f"v{i + 1}") for i in range(2000))]
    numbers: dict[str, Any] = {"a": [0.0], "shape": np.array([1 << 12]), "wide": np.zeros((3, 1 << 11)), "none": [0]}
    nodes += [
        node("ReduceMax", "v2000 none", "m"),
        node("ReduceSum", "y one", "s"),
        node("Add", "s m", "t"),
        total("t"),
    ]
    verdict, bytes_held = peak(lambda: prove(model(nodes, numbers), {}))
    assert verdict.verdict == "unknown"
    assert re.search("takes? more memory than is given to", verdict.reason)
    assert verdict.node is not None
    assert verdict.node[1].startswith("v")
    assert bytes_held < 4 * small_memory


def test_names_of_weights_that_pile_up_are_bounded(small_memory: int) -> None:
    """Node i is made of i weights, which are kept by name: as many as the square of the nodes."""
    count = 1000
    nodes = [node("Add", f"s{i} w{i}", f"s{i + 1}") for i in range(count)]
    numbers = {f"w{i}": [0.0] for i in range(count)} | {"s0": [0.0]}
    nodes += [node("Add", f"y s{count}", "t"), total("t")]
    verdict, bytes_held = peak(lambda: prove(model(nodes, numbers), {}))
    assert "all values up to here take more memory" in verdict.reason
    assert bytes_held < 4 * small_memory


def test_memory_that_the_machine_does_not_have_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(z: Any) -> Any:
        raise MemoryError

    monkeypatch.setitem(operators, "Exp", no_room)
    verdict = prove(model([node("Exp", "y", "e"), total("e")], {}), {})
    assert verdict.verdict == "unknown"
    assert verdict.reason == "Exp takes more memory than there is"


def test_the_proof_of_a_wide_energy_makes_no_square_matrix() -> None:
    n = 1 << 14
    data = model([node("Mul", "y y", "s"), total("s")], {}, n=n)
    verdict, bytes_held = peak(lambda: prove(data, {}))
    assert verdict.verdict == "proven"
    assert bytes_held < n * n


def test_few_segments_are_tried_where_y_is_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    data = model([node("Sin", "y", "s"), total("s")], {}, n=1 << 10)
    monkeypatch.setattr("icnnrt.convexity.segments.MAX_NUMBERS", 1 << 18)
    verdict, bytes_held = peak(lambda: prove(data, {}))
    assert verdict.verdict == "violated"
    assert bytes_held < 32 << 20
    monkeypatch.setattr("icnnrt.convexity.segments.MAX_NUMBERS", 1 << 15)
    assert prove(data, {}).evidence is None


def test_an_attribute_of_an_unknown_type_proves_nothing() -> None:
    """Its value cannot be told, and a default would be another value than that."""
    data = onnx.ModelProto.FromString(model([node("ReduceSum", "y one", "f", keepdims=0)], {}))
    (attribute,) = data.graph.node[0].attribute
    attribute.type = onnx.AttributeProto.UNDEFINED
    verdict = prove(data.SerializeToString(), {})
    assert verdict.verdict == "unknown"
    assert verdict.reason == "ReduceSum has an attribute of a type that is not known here"


def test_a_use_that_an_operator_does_not_have_proves_nothing() -> None:
    """An attribute that nobody knows may mean anything; an input too many has nowhere to go."""
    verdict = prove(model([node("Neg", "y", "v", colour=1), total("v")], {}), {})
    assert (verdict.verdict, verdict.reason) == ("unknown", "Neg has an attribute that is not known here")
    verdict = prove(model([node("Neg", "y unit", "v"), total("v")], {"unit": 1.0}), {})
    assert (verdict.verdict, verdict.reason) == ("unknown", "Neg has an input too few or too many")


def test_weights_to_blame_come_in_one_order() -> None:
    """Whatever the hashes of their names: of a set they come in another order in every process."""
    names = [f"w{i}" for i in range(9)]
    nodes = [
        node("Min", f"x {' '.join(names)}", "s"),
        node("ReduceMax", "s one", "m", keepdims=1),
        node("Sqrt", "m", "r"),
        node("Mul", "y r", "v"),
        total("v"),
    ]
    data = model(nodes, dict.fromkeys(names, -1.0))
    weights = {name: np.array(-1.0) for name in names}
    assert prove(data, weights).blame == tuple(names)


def exported(energy: Any, x_dim: int, n: int) -> tuple[bytes, Arrays]:
    """The value alone of a torch energy, by the exporter's own stages."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("onnxscript")
    from icnnrt_exporters.graphs.onnx_head import quiet, to_onnx
    from icnnrt_exporters.tracing.energy_graph import trace_energy
    from icnnrt_exporters.tracing.heads import Input, trace
    from icnnrt_exporters.writing import plain_graph, serialise, stored

    energy.eval()
    dtype = next(energy.parameters()).dtype
    x, y = torch.zeros(11, x_dim, dtype=dtype), torch.zeros(11, n, dtype=dtype)
    with quiet():
        traced = trace_energy(energy, x, y)
        names = list(traced.theta)

        def head(*args: Any) -> Any:
            theta, (x, y) = dict(zip(names, args, strict=False)), args[len(names) :]
            return traced.value(theta, traced.prepare(theta, x), y)

        theta = [Input(name, tensor, None) for name, tensor in traced.theta.items()]
        onnx_head = to_onnx(trace(head, [*theta, Input("x", x, 0), Input("y", y, 0)], ["f"]))
    weights, _ = stored(energy, traced.theta)
    constants = {name: traced.theta[name] for name in traced.constants}
    layout = weight_layout(weights)[1]
    return serialise(plain_graph(onnx_head, "value"), weights, layout, constants), weights


def test_an_exported_network_is_proven_until_weights_of_two_layers_turn_negative() -> None:
    torch = pytest.importorskip("torch")
    from icnnrt_models import FICNN

    generator = torch.Generator().manual_seed(0)
    energy = FICNN(2, 3, hidden=(4, 4), activation="leaky_relu", dtype=torch.float64, generator=generator)
    data, weights = exported(energy, 2, 3)
    verdict = prove(data, weights)
    assert verdict.verdict == "proven", verdict.sentence()
    assert verdict.min_weight is not None
    names = energy.nonnegative_weights()
    assert verdict.min_weight[1] == min(float(weights[name].min()) for name in names)

    changed = {name: w.copy() for name, w in weights.items()}
    for name in names:
        changed[name][:, :2] = -2.0
    verdict = prove(data, changed)
    assert verdict.verdict == "violated"
    assert verdict.blame == names


def test_a_foreign_convolutional_network_is_proven_until_a_kernel_turns_negative() -> None:
    torch = pytest.importorskip("torch")
    nn, F = torch.nn, torch.nn.functional

    class Foreign(nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first = nn.Conv2d(1, 3, 3, padding=1)
            self.second = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 2, 3, stride=2))
            self.last = nn.Linear(2, 1)
            with torch.no_grad():
                self.second.parametrizations.weight.original1.abs_()
                self.last.weight.abs_()  # clamped at zero they would all be dead

        def forward(self, x: Any, y: Any) -> Any:
            z = F.relu(self.first(y.view(-1, 1, 6, 6) - x.view(-1, 1, 6, 6)))
            z = F.avg_pool2d(F.softplus(self.second(z)), 2)
            quadratic = F.linear(y[:, :4], self.last.weight.expand(4, 2).T).square().sum(1)
            return F.linear(z.flatten(1), self.last.weight.clamp(min=0)).squeeze(1) + quadratic + (y - x).norm(dim=1)

    data, weights = exported(Foreign(), 36, 36)
    verdict = prove(data, weights)
    assert verdict.verdict == "proven", verdict.sentence()

    name = "second.parametrizations.weight.original1"
    # Of both signs for each output: where all are negative, what the kernel makes is concave, and the rules go on.
    weights = {**weights, name: weights[name] - weights[name].mean((1, 2, 3), keepdims=True)}
    verdict = prove(data, weights)
    assert verdict.verdict != "proven"
    assert name in verdict.blame
    assert verdict.node is not None
    assert verdict.node[0] == "Conv"


# --- Never a wrong proof -------------------------------------------------------------------------


class RandomGraph:
    """A graph of operators at random, more often of convex ones, with weights of every mix of signs."""

    def __init__(self, choose: Callable[[int], int], seed: int) -> None:
        self.choose = choose
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.numbers: dict[str, Any] = {}

    def op(self, op_type: str, *inputs: str, **attributes: Any) -> str:
        out = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, list(inputs), [out], **attributes))
        return out

    def number(self, value: Any) -> str:
        name = f"w{len(self.numbers)}"
        self.numbers[name] = np.asarray(value)
        return name

    def one_of(self, *options: Any) -> Any:
        return options[self.choose(len(options))]

    def weight(self, rows: int, columns: int) -> str:
        A = self.rng.standard_normal((rows, columns))
        return self.number(self.one_of(np.abs(A), np.abs(A) * (A > 0), np.abs(A), -np.abs(A), A))

    def build(self, steps: int) -> bytes:
        values = [("y", 3)]
        for _ in range(steps):
            a, k = self.one_of(*values[-3:])
            values.append(self.step(a, k, values))
        f, k = values[-1]
        end = self.op("ReduceSum", f, "one") if self.choose(2) else self.op("Gemm", f, self.weight(k, 1))
        self.nodes.append(helper.make_node("Squeeze", [end, "one"], ["f"]))
        return model(self.nodes, self.numbers)

    def step(self, a: str, k: int, values: list[tuple[str, int]]) -> tuple[str, int]:
        op, number = self.op, self.number
        zero, unit = number(0.0), number(1.0)
        match self.choose(20):
            case 0 | 1 | 2:
                j = 1 + self.choose(4)
                return op("Gemm", a, self.weight(k, j), number(self.rng.standard_normal(j))), j
            case 3:
                tail = op("Log", op("Add", op("Exp", op("Neg", op("Abs", a))), unit))
                return op("Add", op("Max", a, zero), tail), k
            case 4:
                return op(
                    self.one_of("Relu", "Abs", "Neg", "Exp", "Sqrt", "Log", "Reciprocal", "Tanh", "Sigmoid"), a
                ), k
            case 5:
                return op("Pow", a, number(self.one_of(2.0, 3.0, 0.5, 1.5, -1.0))), k
            case 6:
                b, _ = self.one_of(*[v for v in values if v[1] in (1, k)], (a, k))
                return op(self.one_of("Add", "Sub", "Mul", "Max", "Min", "Div"), a, b), k
            case 7:
                gate = op(self.one_of("Relu", "Exp", "Tanh", "Abs"), op("Gemm", "x", self.weight(2, k)))
                return op("Mul", a, gate), k
            case 8:
                b, j = self.one_of(*values)
                return op("Concat", a, b, axis=1), k + j
            case 9:
                scaled = op("Mul", a, number(self.one_of(0.1, 0.5, 2.0, -1.0)))
                edge = number(self.one_of(0.0, 0.0, 0.5))
                condition = op(self.one_of("Greater", "LessOrEqual", "Less", "GreaterOrEqual"), a, edge)
                return op("Where", condition, a, scaled), k
            case 10:
                name = self.one_of("LeakyRelu", "Elu", "Celu")
                return op(name, a, alpha=self.one_of(0.1, 0.5, 1.0, 2.0)), k
            case 11:
                return op("Clip", a, zero, self.one_of("", number(1.0), number(6.0))), k
            case 12:
                name = self.one_of("ReduceMean", "ReduceMax", "ReduceMin", "ReduceL2", "ReduceL1", "ReduceLogSumExp")
                return op(name, a, "one", keepdims=1), 1
            case 13:
                bends = [
                    op("Add", op("Mul", op("Mul", a, a), number(p)), op("Mul", a, number(q)))
                    for p, q in ((self.one_of(0.0, 0.5, 1.0), self.one_of(0.0, 1.0)) for _ in range(2))
                ]
                return op("Where", op("LessOrEqual", a, zero), *bends), k
            case 14:
                A = self.rng.standard_normal((k, k))
                form = op("Mul", a, op("MatMul", a, number(self.one_of(A @ A.T, A))))
                return op("ReduceSum", form, "one", keepdims=1), 1
            case 15:
                slopes = number(self.rng.uniform(*self.one_of((0.0, 1.0), (-1.0, 1.0), (0.0, 2.0), (1.0, 2.0)), k))
                branches = self.one_of((a, op("Mul", a, slopes)), (op("Mul", slopes, a), a))
                test = self.one_of("Greater", "GreaterOrEqual", "Less", "LessOrEqual")
                return op("Where", op(test, *self.one_of((a, zero), (zero, a))), *branches), k
            case 16:
                b, _ = self.one_of(*[v for v in values if v[1] in (1, k)], (a, k))
                test = self.one_of("Greater", "GreaterOrEqual", "Less", "LessOrEqual")
                return op("Where", op(test, a, b), *self.one_of((a, b), (b, a))), k
            case 17:
                b, _ = self.one_of((a, k), *[v for v in values if v[1] == k])
                return op("Mul", *self.one_of((a, op("Sign", b)), (op("Sign", b), a))), k
            case 18:
                rows, places = op("Transpose", a, perm=[1, 0]), number(np.array([[k - 1]]))
                put = op("Slice", op("Transpose", self.one_of(a, op("Neg", a)), perm=[1, 0]), *map(number, ([0], [1])))
                return op("Transpose", op("ScatterND", rows, places, put), perm=[1, 0]), k
        t = op("Tanh", op("Mul", a, number(0.5)))
        expm1 = op("Div", op("Mul", t, number(2.0)), op("Sub", unit, t))
        return op("Where", op("Greater", a, zero), a, expm1), k


def all_values(data: bytes, x: np.ndarray[Any, Any], y: np.ndarray[Any, Any]) -> dict[str, np.ndarray[Any, Any]]:
    graph = read_graph(data, {})
    return evaluate(ancestors(graph, "f"), {**graph.initializers, "x": x, "y": y})


def run(data: bytes, x: np.ndarray[Any, Any], y: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return all_values(data, x, y)["f"]


def worst_excess(data: bytes, seed: int, mu: float = 0.0, bound: float = np.inf) -> float:
    """The most that f − (mu/2)‖y‖² at a midpoint exceeds the mean at the ends, or |f(a) − f(b)| exceeds bound·‖a − b‖,
    relative to max(1, |f|, mu‖y‖²), over many segments."""
    rng = np.random.default_rng(seed)
    inputs = {i.name: i for i in read_graph(data, {}).inputs}
    x_type, y_type = inputs["x"], inputs["y"]
    assert x_type.shape is not None
    assert y_type.shape is not None
    count = 600
    size = rng.choice([0.1, 1.0, 10.0], (count, 1))
    a = size * rng.standard_normal((count, y_type.shape[1]))
    b = a + size * rng.choice([0.01, 1.0], (count, 1)) * rng.standard_normal(a.shape)
    a[: count // 4] = -b[: count // 4] * rng.random((count // 4, 1))  # across 0, where kinks are
    x = rng.standard_normal((count, x_type.shape[1]))
    y = np.concatenate([a, b, (a + b) / 2]).astype(y_type.dtype)
    f = run(data, np.concatenate([x] * 3).astype(y_type.dtype), y).astype(np.float64).reshape(3, count)
    with np.errstate(all="ignore"):
        half = mu / 2 * np.square(y.astype(np.float64)).sum(1).reshape(3, count)
        g = f - half
        scale = np.maximum(1, np.maximum(np.abs(f), half).max(0))
        excess = (g[2] - (g[0] + g[1]) / 2) / scale
        climb = (np.abs(f[0] - f[1]) - bound * np.linalg.norm(a - b, axis=1)) / scale
        excess = np.fmax(excess, climb)
    return float(np.max(excess, initial=-np.inf, where=np.isfinite(excess)))


@settings(
    max_examples=amount(100), deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
)
@given(data=st.data(), seed=st.integers(0, 2**32 - 1), steps=st.integers(1, 7))
def test_whatever_is_proven_shows_no_excess(data: st.DataObject, seed: int, steps: int) -> None:
    draws = st.integers(0, 2**16)
    graph = RandomGraph(lambda n: data.draw(draws) % n, seed).build(steps)
    verdict = prove(graph, {}, value=lambda x, y: np.zeros(len(x)))  # no search: a flat f shows no violation
    if verdict.verdict == "proven":
        mu, bound = verdict.strong_convexity or 0.0, verdict.lipschitz
        assert worst_excess(graph, seed, mu, np.inf if bound is None else bound) < 1e-9


def test_numpy_computes_what_onnxruntime_computes() -> None:
    """On random graphs, wherever onnxruntime has the operators in float64, for samples without NaN on the way to f.

    No standard says whether the least of a row with NaN is NaN; in onnxruntime it depends on where in the row that is.
    """
    compared = 0
    for seed in range(30):
        rng = np.random.default_rng(seed)
        data = RandomGraph(lambda n, rng=rng: int(rng.integers(n)), seed).build(5)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        try:
            session = onnxruntime.InferenceSession(data, options)
        except Exception:  # no float64 kernel of some operator
            continue
        x, y = rng.standard_normal((5, 2)), rng.standard_normal((5, 3))
        f = session.run(["f"], {"x": x, "y": y})[0]
        with np.errstate(all="ignore"):
            found = [all_values(data, x[i : i + 1], y[i : i + 1]) for i in range(5)]
        clear = [i for i in range(5) if not any(np.isnan(value).any() for value in found[i].values())]
        for i in clear:
            np.testing.assert_allclose(found[i]["f"], f[i : i + 1], rtol=1e-9, atol=1e-12)
        compared += bool(clear)
    assert compared > 10


OPERATORS: list[tuple[str, dict[str, Any], list[Any]]] = [
    ("EyeLike", {"k": -1}, [np.zeros((3, 4))]),
    ("EyeLike", {"dtype": 7}, [np.zeros((4, 3))]),
    ("Range", {}, [np.array(2), np.array(11), np.array(3)]),
    ("Range", {}, [np.array(3.0), np.array(-1.0), np.array(-0.3)]),
    ("GatherND", {}, [random(0, 3, 4, 2), np.array([[0, 3], [-1, 1]])]),
    ("GatherND", {"batch_dims": 1}, [random(0, 3, 4, 2), np.array([[[0]], [[3]], [[-2]]])]),
    ("GatherND", {"batch_dims": 2}, [random(0, 2, 3, 4), np.array([[[0], [3], [1]], [[2], [-1], [1]]])]),
    ("ScatterND", {}, [random(0, 4, 3), np.array([[1], [-1]]), random(1, 2, 3)]),
    ("ScatterND", {}, [random(0, 4, 3), np.array([[[1, 2], [0, 0]]]), random(1, 1, 2)]),
    ("TopK", {"axis": 0}, [random(0, 4, 3), np.array([2])]),
    ("TopK", {"largest": 0}, [np.round(random(0, 4, 5)), np.array([3])]),
    ("Squeeze", {}, [random(0, 1, 3, 1)]),
    ("Xor", {}, [np.array([True, False]), np.array([True, True])]),
    *((name, {}, [random(0, 7).astype(np.float32)]) for name in ("Tan", "Atan", "Sinh", "Cosh", "Asinh", "Softsign")),
    *((name, {}, [np.linspace(-0.9, 0.9, 7, dtype=np.float32)]) for name in ("Asin", "Acos", "Atanh")),
    ("Acosh", {}, [np.linspace(1.0, 9.0, 7, dtype=np.float32)]),
    ("Round", {}, [np.array([-1.5, -0.5, 0.5, 1.5, 2.5, 0.7])]),
    *(
        ("IsInf", {f"detect_{side}": 0}, [np.array([-np.inf, 1, np.inf], np.float32)])
        for side in ("negative", "positive")
    ),
    ("Slice", {}, [random(0, 5), np.array([-9]), np.array([-99]), np.array([0]), np.array([-1])]),
    ("Slice", {}, [random(0, 5), np.array([9]), np.array([-4]), np.array([0]), np.array([-2])]),
]


@pytest.mark.parametrize(("op_type", "attributes", "inputs"), OPERATORS)
def test_an_operator_of_contexts_is_what_onnxruntime_has(
    op_type: str, attributes: dict[str, Any], inputs: list[np.ndarray[Any, Any]]
) -> None:
    names, outputs = [f"i{k}" for k in range(len(inputs))], ["o", "p"] if op_type == "TopK" else ["o"]
    kinds = [helper.np_dtype_to_tensor_dtype(a.dtype) for a in inputs]
    graph = helper.make_graph(
        [helper.make_node(op_type, names, outputs, **attributes)],
        "one",
        [helper.make_tensor_value_info(k, T, a.shape) for k, T, a in zip(names, kinds, inputs, strict=True)],
        [onnx.ValueInfoProto(name=name) for name in outputs],
    )
    data = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10).SerializeToString()
    true = onnxruntime.InferenceSession(data).run(None, dict(zip(names, inputs, strict=True)))
    values = evaluate(read_graph(data, {}).nodes, dict(zip(names, inputs, strict=True)))
    for name, expected in zip(outputs, true, strict=True):
        assert values[name].dtype == expected.dtype
        np.testing.assert_allclose(values[name], expected, rtol=1e-5, atol=1e-6)


# --- Bytes from strangers ------------------------------------------------------------------------


def test_damaged_bytes_are_refused_or_read_but_never_crash() -> None:
    nodes = PROVEN["softplus"]
    data = model(nodes, with_rows(nodes))
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(200):
        damaged = bytearray(data)
        for _ in range(int(rng.integers(1, 4))):
            damaged[int(rng.integers(len(damaged)))] = int(rng.integers(256))
        damaged = damaged[: int(rng.integers(1, len(damaged) + 1))] if rng.random() < 0.2 else damaged
        try:
            prove(bytes(damaged), {}, value=lambda x, y: np.zeros(len(x)))
        except PackageError:
            refused += 1
    assert refused > 30


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda m: m.graph.initializer[0].dims.append(2**40), "impossible shape"),
        (lambda m: m.graph.initializer[0].dims.__setitem__(0, 5), "bytes for"),
        (lambda m: m.graph.initializer.append(m.graph.initializer[0]), "taken"),
        (lambda m: m.graph.node[0].input.__setitem__(0, "nowhere"), "before anything makes it"),
        (lambda m: m.graph.node[-1].output.__setitem__(0, m.graph.node[0].output[0]), "made twice"),
        (lambda m: m.graph.output[0].__setattr__("name", "g"), "nothing makes"),
        (lambda m: m.graph.initializer[0].__setattr__("data_location", 1), "give the weights"),
        (lambda m: m.graph.initializer[0].__setattr__("data_type", 99), "does not know"),
    ],
)
def test_hostile_models_are_refused_in_a_sentence(change: Callable[[Any], None], told: str) -> None:
    nodes = PROVEN["relu"]
    hostile = onnx.load_from_string(model(nodes, with_rows(nodes)))
    change(hostile)
    with pytest.raises(PackageError, match=told):
        prove(hostile.SerializeToString(), {})


def test_what_the_reader_does_not_know_is_not_proven() -> None:
    nodes = PROVEN["relu"]
    foreign = onnx.load_from_string(model(nodes, with_rows(nodes)))
    foreign.graph.node[1].domain = "elsewhere"
    verdict = prove(foreign.SerializeToString(), {})
    assert verdict.verdict == "unknown"
    assert verdict.node is not None
    assert verdict.node[0] == "Relu"
    own = onnx.load_from_string(model(nodes, with_rows(nodes)))
    own.functions.append(helper.make_function("", "Relu", ["a"], ["b"], [node("Neg", "a", "b")], []))
    assert prove(own.SerializeToString(), {}).verdict == "unknown"


def test_where_was_looked_is_told() -> None:
    unknown = prove(model(UNPROVEN["silu"], with_rows(UNPROVEN["silu"])), {}, box=(-2.0, 3.0))
    violated = prove(model(UNPROVEN["negative weights"], with_rows(UNPROVEN["negative weights"])), {})
    for verdict, box, interval in ((unknown, (-2.0, 3.0), "y in [-2, 3]^n"), (violated, (0.0, 1.0), "y in [0, 1]^n")):
        assert verdict.evidence is not None
        assert (verdict.evidence.box, verdict.evidence.contexts) == (box, 16)
        assert f"{interval} and 16 samples of x" in verdict.sentence()


def test_verdicts_survive_json() -> None:
    for nodes in (PROVEN["relu"], UNPROVEN["silu"], UNPROVEN["negative weights"]):
        verdict = prove(model(nodes, with_rows(nodes)), {})
        assert Convexity.from_json(json.loads(json.dumps(verdict.to_json()))) == verdict
    with pytest.raises(PackageError, match="convexity"):
        Convexity.from_json({"verdict": "proven"})


DEEP: list[Any] = []
for _ in range(900):
    DEEP = [DEEP]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"witness": None}, "convexity.witness should be one of a violation"),
        ({"verdict": "surely"}, "convexity.verdict should be"),
        ({"reason": 7}, "convexity.reason should be text"),
        ({"lipschitz": "1"}, "convexity.lipschitz should be a finite number"),
        ({"min_weight": ["a"]}, "convexity.min_weight should be a list of two"),
        ({"blame": "abc"}, "convexity.blame should be a list"),
        ({"evidence": {"segments": -1, "excess": 0.0}}, "convexity.evidence.segments should be"),
        ({"evidence": {"segments": 1, "excess": 0.0}}, "convexity.evidence.box is missing"),
        ({"evidence": {"segments": 1, "excess": 0.0, "box": [0.0]}}, "convexity.evidence.box should be a list of two"),
        (
            {"evidence": {"segments": 1, "excess": 0.0, "box": [0.0, 1.0], "contexts": 0}},
            "convexity.evidence.contexts should be an integer from 1",
        ),
        ({"witness": {"x": DEEP, "y_a": [], "y_b": [], "excess": 1.0, "rounding": 0.1}}, "witness.x should be a list"),
        ({"witness": {"x": [], "y_a": [], "y_b": [], "excess": "a", "rounding": 0.1}}, "witness.excess should be"),
        ({"more": 1}, "more is not a key"),
    ],
)
def test_hostile_verdicts_are_refused_in_a_sentence(change: dict[str, Any], told: str) -> None:
    nodes = UNPROVEN["negative weights"]
    good = json.loads(json.dumps(prove(model(nodes, with_rows(nodes)), {}).to_json()))
    with pytest.raises(PackageError, match=told):
        Convexity.from_json({**good, **change})


def test_a_witness_that_no_manifest_has_room_for_is_told_without_its_points() -> None:
    nodes = [node("Mul", "y y", "s"), node("Neg", "s", "v"), total("v")]
    verdict = prove(model(nodes, {}, n=5000), {})
    assert verdict.witness is not None
    assert verdict.witness.x == verdict.witness.y_a == ()
    assert "above its chord" in verdict.sentence()
