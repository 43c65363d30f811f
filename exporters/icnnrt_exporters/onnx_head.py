"""From a traced head to an ONNX graph: standard operators at one opset, weights as plain inputs."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes

from icnnrt.errors import ExportError
from icnnrt_exporters.heads import Head
from icnnrt_exporters.scalars import lift_float64_scalars
from icnnrt_exporters.versions import OPSET


def to_onnx(head: Head) -> ir.Model:
    """An ir.Model with the head's input and output names; weights are inputs, so none is folded into a constant.

    Raises ExportError naming the operator, and where in the model it stands, when ONNX has no translation for it.
    """
    if any(argument.example.dtype == torch.float64 for argument in head.inputs):
        lift_float64_scalars(head.graph)
    dim = torch.export.Dim("batch")
    shapes = tuple(None if argument.batch_dim is None else {argument.batch_dim: dim} for argument in head.inputs)
    try:
        with quiet():
            program = torch.onnx.export(
                head.graph,
                # Clones: two inputs that are one tensor would become one input.
                tuple(argument.example.clone() for argument in head.inputs),
                dynamo=True,
                dynamic_shapes=(shapes,) if _takes_varargs(head.graph) else shapes,
                opset_version=OPSET,
                optimize=True,
                verbose=False,
            )
    except Exception as error:
        raise ExportError(f"energy: {_reason(error)}") from error
    assert program is not None
    model = program.model
    graph = model.graph
    if len(graph.inputs) != len(head.inputs) or len(graph.outputs) != len(head.outputs):
        raise ExportError("energy: torch.onnx changed the head's signature; please report this with the model")
    passes.InlinePass()(model)
    passes.RemoveUnusedNodesPass()(model)
    _demand_ranks(model)
    rename(graph, head)
    return model


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


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the progress and the deprecations of torch's exporters: the user can act on none of them."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "torch.export", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _takes_varargs(module: torch.nn.Module) -> bool:
    return module.forward.__code__.co_flags & 0x04 != 0


def _demand_ranks(model: ir.Model) -> None:
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.name and value.shape is None:
            raise ExportError(f"energy: the exported value {value.name} has no known rank")


def _reason(error: BaseException) -> str:
    chain: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        chain.append(str(cause))
        cause = cause.__cause__ or cause.__context__
    for text in chain:
        for line in text.splitlines():
            if "No ONNX function found" in line or "No decompositions" in line:
                return f"ONNX has no translation for one of its operators ({line.strip()[:240]}); rewrite that part"
    first = next((line.strip() for line in chain[-1].splitlines() if line.strip()), type(error).__name__)
    return f"torch.onnx cannot convert it ({first[:240]})"
