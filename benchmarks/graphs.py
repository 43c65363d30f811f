"""ONNX graphs bound to their inputs and outputs, and the library of native kernels."""

import functools
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper

import icnnrt
from benchmarks.interleaved import Missing, first_line
from icnnrt_exporters.operators.bodies import IR_VERSION, OP_DOMAIN, OP_VERSION, OPSET, functions

TYPES: Final = {"float32": TensorProto.FLOAT, "float64": TensorProto.DOUBLE}
ALWAYS_DOUBLE: Final = ("lower_bound", "residual")
SIGNATURES: Final = {
    "BundleEntropySolve": (
        {"slopes": ["B", "k", "n"], "offsets": ["B", "k"], "lam_start": ["B", "k_prev"]},
        {"y": ["B", "n"], "lam": ["B", "k"], "lower_bound": ["B"], "residual": ["B", 3]},
    ),
    "BundleEntropyAdjoint": (
        {"slopes": ["B", "k", "n"], "offsets": ["B", "k"], "lam": ["B", "k"], "y_bar": ["B", "n"]},
        {"c_y": ["B", "n"], "c_lam": ["B", "k"]},
    ),
}


class Bound:
    """A session with everything bound; calling it runs the graph, with nothing left for Python to do."""

    def __init__(
        self,
        model: bytes,
        feeds: Mapping[str, NDArray[Any]],
        *,
        threads: int,
        library: str | None = None,
        weights: Mapping[str, Any] | None = None,
    ) -> None:
        """`weights` are the OrtValues of a package, injected and bound as `icnnrt.load` does it."""
        weights = weights or {}
        options = session_options(threads, library)
        external = [t.name for t in onnx.load_from_string(model).graph.initializer if t.name in weights]
        options.add_external_initializers(external, [weights[name] for name in external])
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        binding = session.io_binding()
        for name in {node.name for node in session.get_overridable_initializers()} & weights.keys():
            binding.bind_ortvalue_input(name, weights[name])
        self._feeds = {name: np.ascontiguousarray(array) for name, array in feeds.items()}  # bound, so kept alive
        for name, array in self._feeds.items():
            binding.bind_cpu_input(name, array)
        self._names = [node.name for node in session.get_outputs()]
        for name in self._names:
            binding.bind_output(name, "cpu")
        session.run_with_iobinding(binding)
        # From now on into the same memory, which is numpy's.
        self._outputs = [np.array(a) for a in binding.copy_outputs_to_cpu()]
        self._values = [onnxruntime.OrtValue.ortvalue_from_numpy(a) for a in self._outputs]
        for name, value in zip(self._names, self._values, strict=True):
            binding.bind_ortvalue_output(name, value)
        session.run_with_iobinding(binding)
        self._session, self._binding = session, binding

    def __call__(self) -> None:
        self._session.run_with_iobinding(self._binding)

    @property
    def outputs(self) -> dict[str, NDArray[Any]]:
        """Those of the latest call; the next one writes over them."""
        return dict(zip(self._names, self._outputs, strict=True))


def session_options(threads: int, library: str | None = None) -> onnxruntime.SessionOptions:
    """The settings of `icnnrt.load`, with `threads` (0: onnxruntime's own choice) and maybe native kernels."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    if library is not None:
        options.register_custom_ops_library(library)
    return options


def one_node(op: str, dtype: str, **attributes: int) -> bytes:
    """A graph of one operator of ai.icnnrt, with the bodies that make it portable."""
    inputs, outputs = SIGNATURES[op]

    def described(names: Mapping[str, list[Any]]) -> list[onnx.ValueInfoProto]:
        types = {name: TensorProto.DOUBLE if name in ALWAYS_DOUBLE else TYPES[dtype] for name in names}
        return [helper.make_tensor_value_info(name, types[name], shape) for name, shape in names.items()]

    node = helper.make_node(op, list(inputs), list(outputs), domain=OP_DOMAIN, **attributes)
    return _serialised(helper.make_graph([node], op, described(inputs), described(outputs)))


def empty(dtype: str, threads: int) -> Bound:
    """A graph that copies one number: what a call costs."""
    tensors = [helper.make_tensor_value_info(name, TYPES[dtype], ["B"]) for name in ("a", "b")]
    graph = helper.make_graph([helper.make_node("Identity", ["a"], ["b"])], "empty", tensors[:1], tensors[1:])
    return Bound(_serialised(graph), {"a": np.zeros(1, dtype)}, threads=threads)


def _serialised(graph: onnx.GraphProto) -> bytes:
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(OP_DOMAIN, OP_VERSION)]
    model = helper.make_model(graph, functions=_bodies(), opset_imports=opsets, ir_version=IR_VERSION)
    return bytes(model.SerializeToString())


@functools.cache
def _bodies() -> list[onnx.FunctionProto]:
    return functions()


@functools.cache
def native_library() -> str | Missing:
    """The path of the native kernels, once onnxruntime was seen to use them; else why there are none."""
    find = getattr(icnnrt, "ops_library", None)
    if find is None:
        return Missing("this icnnrt has no native kernels (icnnrt.ops_library is not there)")
    try:
        path = str(find())
        for op in SIGNATURES:
            for dtype in TYPES:
                if not _uses_kernel(one_node(op, dtype, **({"steps": 1} if op == "BundleEntropySolve" else {})), path):
                    return Missing(f"onnxruntime registers {Path(path).name}, but runs the portable body of {op}")
    except Exception as error:
        return Missing(first_line(error))
    return path


def _uses_kernel(model: bytes, library: str) -> bool:
    """Whether the operator is still one node once onnxruntime has prepared the graph: bodies are inlined by then."""
    with tempfile.TemporaryDirectory() as folder:
        options = session_options(1, library)
        options.optimized_model_filepath = str(Path(folder) / "prepared.onnx")
        onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        prepared = onnx.load(options.optimized_model_filepath)
    return any(node.domain == OP_DOMAIN for node in nodes(prepared.graph))


def nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Every node, those of subgraphs too."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            yield from nodes(attribute.g)
