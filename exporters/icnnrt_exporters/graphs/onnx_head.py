"""From a traced head to an ONNX graph: standard operators at one opset, weights as plain inputs."""

import re
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes

from icnnrt.errors import ExportError
from icnnrt_exporters.graphs.exported import exported
from icnnrt_exporters.graphs.quadratic_program import qp_translation_table
from icnnrt_exporters.graphs.scalars import lift_float64_scalars
from icnnrt_exporters.graphs.torch_onnx import sped_up
from icnnrt_exporters.surgery import spread_scalars
from icnnrt_exporters.tracing.heads import Head
from icnnrt_exporters.tracing.place import first_line
from icnnrt_exporters.tracing.quiet import quiet
from icnnrt_exporters.versions import OPSET

# Operators for which ONNX Runtime's CPU provider has a float32 kernel and no float64 kernel (found by loading each one,
# 1.31). What the decompositions leave of them in a float64 graph would fail when the package is loaded.
FLOAT32_ONLY = frozenset(
    (
        *("Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "Cosh", "Erf", "Sinh", "Tan"),
        *("Celu", "Elu", "Gelu", "HardSigmoid", "HardSwish", "Hardmax", "LeakyRelu", "Mish", "PRelu", "Selu"),
        *("Softplus", "Softsign", "ThresholdedRelu"),
        *("InstanceNormalization", "LRN", "MeanVarianceNormalization"),
        *("AveragePool", "GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool", "LpPool", "MaxUnpool"),
        *("Col2Im", "Conv", "ConvTranspose", "Resize"),
        *("Det", "Mean", "NonZero", "OneHot", "RNN"),
    )
)


def to_onnx(head: Head) -> ir.Model:
    """An ir.Model with the head's input and output names; weights are inputs, so none is folded into a constant.

    Raises ExportError naming the operator, and where in the model it stands, when ONNX has no translation for it.
    """
    if any(argument.example.dtype == torch.float64 for argument in head.inputs):
        lift_float64_scalars(head.graph)
    try:
        with quiet():
            prepared = _prepared(head)
        with quiet(), sped_up(prepared.graph):
            program = torch.onnx.export(
                prepared,
                dynamo=True,
                opset_version=OPSET,
                optimize=True,
                verbose=False,
                custom_translation_table=qp_translation_table(),
            )
    except Exception as error:
        raise ExportError(f"energy: {_reason(error, head)}") from error
    assert program is not None
    model = program.model
    graph = model.graph
    if len(graph.inputs) != len(head.inputs) or len(graph.outputs) != len(head.outputs):
        raise ExportError("energy: torch.onnx changed the head's signature; please report this with the model")
    passes.InlinePass()(model)
    passes.RemoveUnusedNodesPass()(model)
    _demand_ranks(model)
    _demand_kernels(model, head)
    spread_scalars(graph)
    rename(graph, head)
    return model


def _prepared(head: Head) -> torch.export.ExportedProgram:
    """The head's program, which torch.onnx decomposes again only where that finds something to do.

    `make_fx` has decomposed it already. What is left is what ONNX lacks, or what works in place, as recurrent cells do:
    that torch.export has to trace once more.
    """
    operators = _operators(head.graph.graph)
    if any(op._schema.is_mutable for op in operators):
        return _traced_again(head)
    program = exported(head)

    def run_decompositions(table: Any = None) -> torch.export.ExportedProgram:
        if table is None or any(op in table for op in _operators(program.graph)):
            return _traced_again(head).run_decompositions(table)
        return program

    program.run_decompositions = run_decompositions
    return program


def _operators(graph: torch.fx.Graph) -> set[torch._ops.OpOverload]:
    targets = [node.target for node in graph.nodes if node.op == "call_function"]
    return {target for target in targets if isinstance(target, torch._ops.OpOverload)}


def _traced_again(head: Head) -> torch.export.ExportedProgram:
    # Clones: two inputs that are one tensor would become one input.
    examples = tuple(argument.example.clone() for argument in head.inputs)
    dim = torch.export.Dim("batch")
    shapes = tuple(None if argument.batch_dim is None else {argument.batch_dim: dim} for argument in head.inputs)
    varargs = head.graph.forward.__code__.co_flags & 0x04 != 0
    return torch.export.export(head.graph, examples, dynamic_shapes=(shapes,) if varargs else shapes, strict=False)


def rename(graph: ir.Graph, head: Head) -> None:
    """Give the graph's inputs and outputs the head's names."""
    # Outputs that are inputs or share one value need a node of their own to carry a name.
    seen: set[int] = set()
    for i, value in enumerate(graph.outputs):
        if value.producer() is None or id(value) in seen:
            copy = ir.node("Identity", [value])
            copy.outputs[0].type, copy.outputs[0].shape = value.type, value.shape
            graph.append(copy)
            graph.outputs[i] = copy.outputs[0]
        seen.add(id(graph.outputs[i]))
    for value, argument in zip(graph.inputs, head.inputs, strict=True):
        value.name = argument.name
    for value, name in zip(graph.outputs, head.outputs, strict=True):
        value.name = name


def _demand_ranks(model: ir.Model) -> None:
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.name and value.shape is None:
            raise ExportError(f"energy: the exported value {value.name} has no known rank")


def _demand_kernels(model: ir.Model, head: Head) -> None:
    """Every float64 node is one that ONNX Runtime has."""
    for node in model.graph.all_nodes():
        values = [v for v in (*node.inputs, *node.outputs) if v is not None]
        if node.op_type in FLOAT32_ONLY and any(v.dtype == ir.DataType.DOUBLE for v in values):
            where = head.energy.place_of(node.op_type) if head.energy else ""
            raise ExportError(
                f"energy: {node.op_type} {where + ' ' if where else ''}has no float64 kernel in ONNX Runtime; convert "
                "the model and the examples to float32, or write it with other operators"
            )


def _reason(error: Exception, head: Head) -> str:
    last: BaseException = error
    cause: BaseException | None = error
    while cause is not None:
        last, cause = cause, cause.__cause__ or cause.__context__
        for line in str(last).splitlines():
            if "No ONNX function found" in line or "No decompositions" in line:
                found = re.search(r"(?:aten|prims)[.:]+\w+", line)
                where = " " + head.energy.place_of(found.group()) if found and head.energy else ""
                name = re.split(r"[.:]+", found.group())[1] if found else line.strip()[:240]
                return f"ONNX has no translation for {name}{where.rstrip()}; write it with other operators"
    return f"torch.onnx cannot convert it ({first_line(last)})"
