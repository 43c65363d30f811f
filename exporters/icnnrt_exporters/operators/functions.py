"""A statement as an ONNX function of domain ai.icnnrt: inputs of either type cast to double, one axis for every row."""

from collections.abc import Callable, Sequence

import onnx
import onnx_ir as ir

from icnnrt_exporters.operators.traced import DOUBLE, Symbol, Traced


def function(
    name: str,
    trace: Callable[..., Sequence[Symbol]],
    inputs: Sequence[str],
    outputs: Sequence[str],
    doc: str | None,
    attributes: Sequence[str] = (),
) -> list[onnx.FunctionProto]:
    """What `trace(xp, *inputs)` traces, and before it the pieces that it calls. attributes are whole numbers."""
    xp = Traced("", taken=[*inputs, *outputs])
    given = [ir.Value(name=input) for input in inputs]
    results = trace(xp, *(xp.of(v) for v in given))
    for v, output in zip(results, outputs, strict=True):
        v.value.name = output
    whole = {a: ir.Attr(a, ir.AttributeType.INT, None) for a in attributes}
    pieces = [piece for piece, _ in xp.pieces.values()]
    return [ir.to_proto(f) for f in (*pieces, xp.function(name, given, results, doc, **whole))]


def attribute(xp: Traced, name: str) -> Symbol:
    """A whole number that a node of the function gives."""
    return xp.node("Constant", result=ir.DataType.INT64, value_int=ir.RefAttr("value_int", name, ir.AttributeType.INT))


def double(xp: Traced, a: Symbol) -> Symbol:
    return xp.node("Cast", a, result=DOUBLE, to=DOUBLE)


def row(xp: Traced, a: Symbol) -> Symbol:
    """[B, m] -> [B, 1, m], double."""
    return xp.node("Unsqueeze", double(xp, a), xp.constant([1]))


def flat(xp: Traced, row: Symbol) -> Symbol:
    """[B, 1, m] -> [B, m]."""
    return xp.node("Squeeze", row, xp.constant([1]))
