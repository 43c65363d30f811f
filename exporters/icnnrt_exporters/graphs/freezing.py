"""Weights as constants, and what is computed from weights alone computed beforehand.

A weight that a caller may replace must be transposed, made positive and laid out for its products in every call. As
constants ONNX Runtime does the layout once, when the session is made; the rest is done here, once for all runtimes.
"""

from collections.abc import Mapping
from typing import Final

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from icnnrt.errors import ExportError
from icnnrt.printable import harmless
from icnnrt_exporters.graphs.inlining import subgraphs

# These give another result at every call.
RANDOM: Final = frozenset(
    {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
)
# A result much larger than what it is made of (an Expand) is memory to read in every call, not work saved.
SLACK: Final = 1 << 16

Constants = Mapping[str, onnx.TensorProto]


def frozen(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same model with every initialiser constant, nodes of constants folded, and what is unused left out.

    Folded values are computed by onnxruntime with the nodes as they are, so to the bit as in the unfrozen model run
    without optimisation. Nodes within Loop and If are folded too, unless they hang on the loop's state. Raises
    `ExportError` where onnxruntime cannot compute them.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    given = {tensor.name for tensor in result.graph.initializer}
    inputs = [v for v in result.graph.input if v.name not in given]
    del result.graph.input[:]
    result.graph.input.extend(inputs)
    _fold(result.graph, {}, result)
    _drop_unused(result.graph)
    return result


def _fold(graph: onnx.GraphProto, outside: Constants, model: onnx.ModelProto) -> None:
    """Fold in one graph, then in those inside it, which see its constants."""
    own = {v.name for v in graph.input} | {name for node in graph.node for name in node.output}
    constants = {name: tensor for name, tensor in outside.items() if name not in own}
    constants |= {tensor.name: tensor for tensor in graph.initializer}

    known = set(constants)
    constant_nodes = []
    for node in graph.node:
        computes = not node.domain and node.op_type not in RANDOM and not any(subgraphs(node))
        if computes and all(name in known for name in node.input if name):
            constant_nodes.append(node)
            known.update(name for name in node.output if name)
    folded = _evaluate(constant_nodes, constants, model)

    def small(node: onnx.NodeProto) -> bool:
        made_of = {name: folded.get(name, constants.get(name)) for name in node.input if name}
        size = sum(tensor.ByteSize() for tensor in made_of.values() if tensor is not None)
        return all(folded[name].ByteSize() <= size + SLACK for name in node.output if name)

    # What a graph hands out stays computed in it: not every runtime takes an initialiser for the output of a body.
    handed_out = {v.name for v in graph.output}
    foldable = {id(node) for node in constant_nodes}
    wanted = {name for node in graph.node if id(node) not in foldable for name in _reads(node)}
    fresh: dict[str, onnx.TensorProto] = {}
    for node in reversed(constant_nodes):
        outputs = {name for name in node.output if name}
        if outputs & handed_out or (outputs & wanted and not small(node)):
            foldable.discard(id(node))
            wanted |= _reads(node)
        else:
            fresh |= {name: folded[name] for name in outputs & wanted}
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in graph.node if id(node) not in foldable]
    del graph.node[:]
    graph.node.extend(kept)
    graph.initializer.extend(fresh[name] for name in folded if name in fresh)
    for node in graph.node:
        for inner in subgraphs(node):
            _fold(inner, constants | fresh, model)


def _evaluate(nodes: list[onnx.NodeProto], constants: Constants, model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """What these nodes compute, by name."""
    names = [name for node in nodes for name in node.output if name]
    if not names:
        return {}
    read = dict.fromkeys(name for node in nodes for name in node.input if name in constants)
    graph = onnx.helper.make_graph(
        nodes,
        "constants",
        [],
        [onnx.ValueInfoProto(name=name) for name in names],
        [constants[name] for name in read],
    )
    standard = [entry for entry in model.opset_import if not entry.domain]
    part = onnx.helper.make_model(graph, opset_imports=standard, ir_version=model.ir_version)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors are raised, and printed with names as they are
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = onnxruntime.InferenceSession(part.SerializeToString(), options, providers=["CPUExecutionProvider"])
        values: list[NDArray[np.generic]] = session.run(names, {})
    except Exception as error:  # onnxruntime's own classes share no public parent
        raise ExportError(
            f"freeze: onnxruntime cannot compute what hangs on the weights alone ({error}); pack without freeze"
        ) from harmless(error)
    return {name: onnx.numpy_helper.from_array(v, name) for name, v in zip(names, values, strict=True)}


def _reads(node: onnx.NodeProto) -> set[str]:
    """The names that a node refers to, in the graphs inside it too."""
    names = {name for name in node.input if name}
    for inner in subgraphs(node):
        names.update(v.name for v in inner.output)
        for each in inner.node:
            names |= _reads(each)
    return names


def _drop_unused(graph: onnx.GraphProto) -> None:
    """Leave out initialisers that nothing reads, here and in the graphs inside."""
    read = {v.name for v in graph.output}
    for node in graph.node:
        read |= _reads(node)
        for inner in subgraphs(node):
            _drop_unused(inner)
    kept = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.initializer[:]
    graph.initializer.extend(kept)
