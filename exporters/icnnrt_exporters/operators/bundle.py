"""The bodies of the bundle operators: `icnnrt.mathematics.cut_model` and `kkt_adjoint`, traced for a domain."""

from collections.abc import Callable, Sequence

import onnx
import onnx_ir as ir

from icnnrt.format.package import OP_DOMAIN
from icnnrt.mathematics import cut_model
from icnnrt.mathematics.domains import Domain
from icnnrt.mathematics.kkt_adjoint import kkt_adjoint
from icnnrt_exporters.operators.traced import DOUBLE, INT64, Symbol, Traced
from icnnrt_exporters.surgery import needed
from icnnrt_exporters.versions import OP_VERSION, OPSET


def solve_body(at: Domain) -> onnx.FunctionProto:
    """`Domain.operators` + "Solve": the solution of the model of k cuts.

    Inputs slopes G [B, k, n], centred offsets e [B, k], lam_start [B, k_prev] with 0 <= k_prev <= k, multipliers of the
    first cuts (k_prev = 0: cold start): all float or all double. Attribute steps: the most steps taken.

    Outputs y [B, n] and lam [B, k] of the inputs' type, lower_bound [B] and residual [B, 3] double. lam is the best
    iterate and y = y(−G'lam). residual is what rounding took from y on the way out, |1'λ − 1|, and the duality gap
    max v − λ'v of the model. A sample with NaN or infinite cuts has y, lower_bound and residual NaN, alone.
    """

    def traced(xp: Traced, slopes: Symbol, offsets: Symbol, lam_start: Symbol) -> Sequence[Symbol]:
        G, e, before = _double(xp, slopes), _row(xp, offsets), _row(xp, lam_start)
        steps = xp.node("Constant", result=INT64, value_int=ir.RefAttr("value_int", "steps", ir.AttributeType.INT))
        found = cut_model.solve(xp, at, G, e, before, steps)
        y = xp.node("CastLike", found.y, slopes)
        rounding = xp.max(abs(_double(xp, y) - found.y)) + 0.0 * found.gap
        return [
            _flat(xp, y),
            xp.node("CastLike", _flat(xp, found.lam), slopes),
            xp.node("Squeeze", found.lower_bound, xp.constant([1, 2])),
            _flat(xp, xp.concat([rounding, found.feasibility, found.gap])),
        ]

    inputs, outputs = ["slopes", "offsets", "lam_start"], ["y", "lam", "lower_bound", "residual"]
    return _function(at.operators + "Solve", traced, inputs, outputs, ["steps"], solve_body.__doc__)


def adjoint_body(at: Domain) -> onnx.FunctionProto:
    """`Domain.operators` + "Adjoint": c_y [B, n] and c_λ [B, k] for a loss with ∂ℓ/∂y = ȳ at the solution λ.

    Inputs slopes G [B, k, n], offsets e [B, k], lam [B, k], y_bar [B, n]: all float or all double, and so are the
    outputs; computed in double.
    """

    def traced(xp: Traced, slopes: Symbol, *rows: Symbol) -> Sequence[Symbol]:
        found = kkt_adjoint(xp, at, _double(xp, slopes), *(_row(xp, row) for row in rows))
        return [xp.node("CastLike", _flat(xp, c), slopes) for c in found]

    inputs, outputs = ["slopes", "offsets", "lam", "y_bar"], ["c_y", "c_lam"]
    return _function(at.operators + "Adjoint", traced, inputs, outputs, [], adjoint_body.__doc__)


def _double(xp: Traced, a: Symbol) -> Symbol:
    return xp.node("Cast", a, result=DOUBLE, to=DOUBLE)


def _row(xp: Traced, a: Symbol) -> Symbol:
    """[B, m] -> [B, 1, m], double."""
    return xp.node("Unsqueeze", _double(xp, a), xp.constant([1]))


def _flat(xp: Traced, row: Symbol) -> Symbol:
    return xp.node("Squeeze", row, xp.constant([1]))


def _function(
    name: str,
    trace: Callable[..., Sequence[Symbol]],
    inputs: Sequence[str],
    outputs: Sequence[str],
    attributes: Sequence[str],
    doc: str | None,
) -> onnx.FunctionProto:
    """A statement as an ONNX function: constants in front, then what its outputs need."""
    xp = Traced("", taken=[*inputs, *outputs])
    given = [ir.Value(name=input) for input in inputs]
    # Two types have the inputs: what is computed is double by a Cast.
    results = [v.value for v in trace(xp, *(xp.of(v) for v in given))]
    for v, output in zip(results, outputs, strict=True):
        v.name = output
    constants = []
    for i, v in enumerate(xp.op.constants):
        node = ir.node("Constant", [], attributes={"value": v.const_value}, num_outputs=1)
        node.outputs[0].name = f"constant_{i}"
        ir.convenience.replace_all_uses_with(v, node.outputs[0])
        constants.append(node)
    graph = ir.Graph(
        given,
        results,
        nodes=[*constants, *needed(xp.op.nodes, results)],
        opset_imports={"": OPSET, OP_DOMAIN: OP_VERSION},
        name=name,
        doc_string=doc,
    )
    function = ir.Function(
        OP_DOMAIN, name, graph=graph, attributes=[ir.Attr(a, ir.AttributeType.INT, None) for a in attributes]
    )
    return ir.to_proto(function)
