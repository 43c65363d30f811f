"""The graph x -> y_star: a solver of `icnnrt.mathematics`, traced around an energy."""

from collections.abc import Sequence

import onnx_ir as ir

from icnnrt.format.manifest import OP_DOMAIN, Domain
from icnnrt.mathematics import bregman, bundle
from icnnrt_exporters.assembly.coordinates import Coordinates
from icnnrt_exporters.operators.spliced import Spliced
from icnnrt_exporters.operators.traced import DOUBLE, Symbol, Traced
from icnnrt_exporters.surgery import dismantle, dtype_of, static, value

UNIT_BOX = Domain()


def argmin_graph(
    head: ir.Model, K: int, steps: int, domain: Domain = UNIT_BOX, step_size: float | None = None
) -> ir.Graph:
    """From value and gradient (θ, x, y -> f, gradient) to the whole solver: `icnnrt.mathematics.bundle.argmin`, whose
    models an operator solves in at most `steps` steps, or with a step size that of `icnnrt.mathematics.bregman`.

    Inputs: x, y_init, of a box lower and upper, then the head's weights; outputs: the fields of the trajectory. All but
    x, f and y is in p, y = shift + scale∘p: cuts are those of f(shift + scale∘p). What does not depend on y stands
    before the loop.
    """
    (*weights, x, y), results, nodes, constants = dismantle(head.graph, "energy")
    T, n = dtype_of(y), static(y, 1)
    xp = Traced("argmin")
    y_init = xp.of(value("y_init", T, ["batch", n]))
    energy = Spliced(xp, nodes, {y: y_init.value}, results)
    at = Coordinates(xp, domain, y_init)
    p_init = at.p(y_init)
    p_init.value.shape = y_init.value.shape

    def value_and_gradient(p: Symbol) -> tuple[Symbol, Symbol]:
        f, gradient = energy(at.y(p))
        return xp.column(f), at.scaled(gradient)

    def solve(*cuts_and_start: Symbol) -> Sequence[Symbol]:
        operator, results = at.model.operators + "Solve", [T, T, DOUBLE, DOUBLE]
        return xp.nodes(operator, *cuts_and_start, results=results, ranks=[2, 2, 1, 2], domain=OP_DOMAIN, steps=steps)

    if step_size is None:
        found = bundle.argmin(xp, at.model, value_and_gradient, p_init, K, solve)
    else:
        edge = bregman.EDGE if T == DOUBLE else bregman.EDGE_FLOAT32
        found = bregman.argmin(xp, at.model, value_and_gradient, p_init, K, step_size, edge)
    sizes: dict[str, list[int]] = {
        **{"y": [n], "lam": [K], "slopes": [K, n], "offsets": [K], "cut_points": [K, n], "lam_history": [K, K]},
        **{"energy": [], "lower_bound": [], "gap": [], "residual": [3], "complementarity_history": [K]},
    }
    outputs = [
        xp.output(v, name, ["batch", *sizes[name]]) for name, v in found._replace(y=at.y(found.y))._asdict().items()
    ]
    return xp.graph([x, y_init.value, *at.inputs, *weights], outputs, constants, "argmin")
