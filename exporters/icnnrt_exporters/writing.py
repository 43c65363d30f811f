"""What a package is made of, and its writing: each graph with its weights as the bytes of one ONNX file."""

import importlib.metadata
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes
from torch import Tensor, nn

from icnnrt.format import package
from icnnrt.format.signs import Sign
from icnnrt.format.verdict import Convexity
from icnnrt_exporters.assembly.argmin_graph import UNIT_BOX
from icnnrt_exporters.operators.bodies import QP_BODIES, functions, functions_qp
from icnnrt_exporters.surgery import dismantle, dtype_of, numbered, transposed_products
from icnnrt_exporters.versions import IR_VERSION, OP_VERSION, OPSET

# Inputs of heads that are data; what else a head takes are weights.
DATA: Final = ("x", "y", "y_dot", "f_bar", "gradient_bar")

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Contents:
    """What a package is made of, but for what is found out about it when it runs. `format.package` says more."""

    kind: str
    dtype: str
    x_shape: tuple[int, ...]
    y_shape: tuple[int, ...]
    graphs: Mapping[str, bytes]
    weights: Mapping[str, np.ndarray]
    trainable: tuple[str, ...]
    nonnegative: tuple[str, ...] = ()
    signs: Mapping[str, Sign] = field(default_factory=dict)
    name: str = "package"
    solver: package.SolverSpec | None = None
    domain: package.Domain | None = None
    train: package.TrainingSpec | None = None
    polyhedron: package.PolyhedronSpec | None = None
    convexity: Convexity | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def write(self, path: Path, **found: Any) -> package.Package:
        """Write the package, with what was found out about it: parity, golden data."""
        found |= {**vars(self), "opset": OPSET, "ir_version": IR_VERSION, "producer": producer()}
        return package.write(path, **found)


def dtype_name(tensor: Tensor) -> str:
    """numpy's name of a tensor's dtype."""
    return str(tensor.dtype).removeprefix("torch.")


def stored(module: nn.Module, read: Collection[str]) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """The weights of a package, and which of them can be trained: the state_dict, less the second names of shared
    tensors, since a shared weight is stored under the name graphs read."""
    state = module.state_dict()
    places = {state[name].data_ptr(): name for name in read if name in state}
    kept = {name: t for name, t in state.items() if name in read or t.data_ptr() not in places}
    # All names of a shared parameter: the graph reads it under any one of them.
    learnable = {name for name, p in module.named_parameters(remove_duplicate=False) if p.requires_grad}
    weights = {name: tensor.detach().cpu().contiguous().numpy() for name, tensor in kept.items()}
    return weights, tuple(name for name in read if name in learnable)


def plain_graph(head: ir.Model, name: str) -> ir.Graph:
    """A head as a graph of its own, with its data inputs first."""
    data = [v for v in head.graph.inputs if v.name in DATA]
    inputs, outputs, nodes, constants = dismantle(head.graph, "energy")
    weights = [v for v in inputs if v not in data]
    return ir.Graph([*data, *weights], outputs, nodes=nodes, initializers=numbered(constants), name=name)


def serialise(
    graph: ir.Graph,
    weights: Mapping[str, np.ndarray],
    layout: Mapping[str, tuple[int, int]],
    constants: Mapping[str, Tensor],
    domain: package.Domain = UNIT_BOX,
) -> bytes:
    """One self-contained ONNX file: op bodies included, weights overridable and stored once, beside it."""
    for v in list(graph.inputs):
        assert v.name is not None
        if v.name in constants:
            v.const_value = ir.tensor(constants[v.name].cpu().numpy(), name=v.name)
            graph.inputs.remove(v)
            graph.register_initializer(v)
        elif v.name in weights:
            offset, length = layout[v.name]
            v.const_value = ir.ExternalTensor(
                package.WEIGHTS_FILE,
                offset,
                length,
                dtype_of(v),
                shape=ir.Shape(weights[v.name].shape),
                name=v.name,
            )
            graph.register_initializer(v)
    graph.opset_imports[""] = OPSET
    model = ir.Model(graph, ir_version=IR_VERSION, producer_name="icnnrt")
    used = {node.op_identifier() for node in graph.all_nodes()}
    if any(of_domain == package.OP_DOMAIN for of_domain, _, _ in used):
        programs = [name for name in QP_BODIES if (package.OP_DOMAIN, name, "") in used]
        protos = [*functions(domain.kind), *(functions_qp(*programs) if programs else ())]
        bodies = {f.identifier(): f for f in map(ir.serde.deserialize_function, protos)}
        graph.opset_imports[package.OP_DOMAIN] = OP_VERSION
        model.functions.update(bodies)
        passes.RemoveUnusedFunctionsPass()(model)
    passes.RemoveUnusedNodesPass()(model)
    transposed_products(graph)
    passes.RemoveUnusedNodesPass()(model)
    passes.ClearMetadataAndDocStringPass()(model)
    passes.NameFixPass()(model)
    proto = ir.to_proto(model)
    return proto.SerializeToString(deterministic=True)


def producer() -> dict[str, str]:
    return {
        "icnnrt": importlib.metadata.version("icnnrt"),
        "torch": str(torch.__version__),
        "onnx": onnx.__version__,
    }
