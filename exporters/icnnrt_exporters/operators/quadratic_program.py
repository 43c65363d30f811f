"""The bodies of QuadraticProgram, QPAdjoint and QPSensitivity: `icnnrt.mathematics.quadratic_program` and `qp_adjoint`,
traced; of QPSolve, which is the first with its settings fixed; and of the two for sparse data, which do the same.

What stands here beside the statements is how the operators take their data: shared by all samples or not, bounds that
are absent, no equalities at all, and of two types.
"""

from collections.abc import Sequence

import numpy as np
import onnx

from icnnrt.format.manifest import OP_DOMAIN
from icnnrt.mathematics import quadratic_program
from icnnrt.mathematics.interior_point import Problem
from icnnrt.mathematics.qp_adjoint import WEAK, qp_adjoint
from icnnrt.mathematics.qp_names import ADJOINT_INPUTS, SENSITIVITY, SETTINGS, SOLUTION, SOLVE_INPUTS
from icnnrt.mathematics.qp_reference import precision_of
from icnnrt.mathematics.qp_status import QPStatus
from icnnrt_exporters.operators.functions import attribute, double, flat, function
from icnnrt_exporters.operators.traced import BOOL, DOUBLE, INT64, Symbol, Traced

INFINITY, NAN = float("inf"), float("nan")
NEARLY_ONE = 1.0 + 2.0**-40  # which float32 rounds to 1


def program_body() -> list[onnx.FunctionProto]:
    """Solve min over z of ½ z'Qz + p'z s.t. h_lower <= Gz <= h, Az = b, lower <= z <= upper; B samples.

    Inputs Q [B, n, n], whose symmetric part is used, p [B, n], G [B, m, n], h_lower and h [B, m], A [B, q, n],
    b [B, q], lower and upper [B, n], start [B, n + m + q + n] = (z, λ, ν, μ) of a problem nearby, NaN in the rows of
    samples that start cold: all float or all double. m and q may be 0. Each has a leading axis of B or, shared by all
    samples, of 1. h_lower, lower, upper and start may have no columns: none. Bounds of 1e20 and beyond are none.
    One number each: tolerance (double), the relative KKT residual that counts as solved, that of the type unless it is
    positive and finite; most_steps (int64), of the interior point method; seconds (double), after which native kernels
    end where they stand, unless it is positive: this body knows no time.

    Outputs z [B, n], lam [B, m], nu [B, q], mu [B, n], slack [B, m], box_slack [B, n] of the inputs' type, residual
    [B, 3] double, before z and multipliers are rounded to that type, status [B] int32, a `QPStatus`, ray
    [B, n + m + q + n] of the inputs' type, steps [B] int32: those that were taken, of certificates aside.
    """

    def traced(xp: Traced, *inputs: Symbol) -> Sequence[Symbol]:
        *given, tolerance, most_steps, _ = inputs
        Q, p, G, h_lower, h, A, b, lower, upper, start = given
        B = xp.node("Max", *(xp.size(a, -3 if any(a is M for M in (Q, G, A)) else -2) for a in given))
        n, m, q = xp.size(G, -1), xp.size(G, -2), xp.size(A, -2)
        at_least_one = xp.node("Max", q, xp.constant([1]))  # without equalities, one of zeros
        eq = _equalities(xp, B, A, at_least_one, n), _row(xp, B, b, at_least_one, 0.0)
        z, lam, nu, mu = xp.nodes(
            "Split",
            _row(xp, B, start, n + m + q + n, NAN),
            xp.node("Concat", n, m, q, n, axis=0),
            results=[DOUBLE] * 4,
            axis=2,
        )
        warm = xp.concat([z, lam, _wide(xp, nu, at_least_one, 0.0), mu])
        problem = Problem(
            _matrix(xp, B, Q, n, n),
            _row(xp, B, p, n, 0.0),
            _matrix(xp, B, G, m, n),
            *eq,
            xp.concat([_row(xp, B, h_lower, m, -INFINITY), _row(xp, B, lower, n, -INFINITY)]),
            xp.concat([_row(xp, B, h, m, INFINITY), _row(xp, B, upper, n, INFINITY)]),
        )
        one = xp.constant([1])
        tolerance = xp.node("Reshape", double(xp, tolerance), one)
        precision = _precision(xp, Q, tolerance)
        found = quadratic_program.solve(xp, problem, warm, precision, xp.node("Reshape", most_steps, one, result=INT64))
        sizes = xp.node("Concat", m, n, axis=0)
        lam, mu = xp.nodes("Split", found.lam, sizes, results=[DOUBLE] * 2, axis=2)
        slack, box_slack = xp.nodes("Split", found.slack, sizes, results=[DOUBLE] * 2, axis=2)
        d, ray_lam, ray_mu, ray_nu = xp.nodes(
            "Split", found.ray, xp.node("Concat", n, m, n, at_least_one, axis=0), results=[DOUBLE] * 4, axis=2
        )
        ray = xp.concat([d, ray_lam, _first(xp, ray_nu, q), ray_mu])
        rows = [found.z, lam, _first(xp, found.nu, q), mu, slack, box_slack]
        status, steps = (
            xp.node("Cast", xp.node("Squeeze", a, xp.constant([1, 2])), to=onnx.TensorProto.INT32)
            for a in (found.status, found.steps)
        )
        return [
            *(xp.node("CastLike", flat(xp, a), Q) for a in rows),
            flat(xp, found.residual),
            status,
            xp.node("CastLike", flat(xp, ray), Q),
            steps,
        ]

    return function("QuadraticProgram", traced, [*SOLVE_INPUTS, *SETTINGS], SOLUTION, program_body.__doc__)


def solve_body() -> list[onnx.FunctionProto]:
    """As QuadraticProgram, by the tolerance of the type, with the attribute `steps`: the most of them."""

    def traced(xp: Traced, *given: Symbol) -> Sequence[Symbol]:
        none = xp.constant(np.float64(0.0), DOUBLE)
        settings = none, attribute(xp, "steps"), none
        types = [*[DOUBLE] * 7, INT64, DOUBLE, INT64]  # which nothing here depends on
        return xp.nodes("QuadraticProgram", *given, *settings, results=types, domain=OP_DOMAIN)[:-1]

    return function("QPSolve", traced, SOLVE_INPUTS, SOLUTION[:-1], solve_body.__doc__, ["steps"])


def sparse_program_body() -> list[onnx.FunctionProto]:
    """As QuadraticProgram, of Q, G and A that may be other than 0 only where the input `plan` says so: integers of 32
    bits, as `icnnrt.QPPattern(Q, G, A).plan` has them. Native kernels then factor nothing else, but for samples that do
    not keep to it; this body takes no notice of it.
    """

    def traced(xp: Traced, *inputs: Symbol) -> Sequence[Symbol]:
        types = [*[DOUBLE] * 7, INT64, DOUBLE, INT64]  # which nothing here depends on
        return xp.nodes("QuadraticProgram", *inputs[:-1], results=types, domain=OP_DOMAIN)

    inputs = [*SOLVE_INPUTS, *SETTINGS, "plan"]
    return function("SparseQuadraticProgram", traced, inputs, SOLUTION, sparse_program_body.__doc__)


def adjoint_body() -> list[onnx.FunctionProto]:
    """The adjoint d_z [B, n], d_lam [B, m], d_nu [B, q], d_mu [B, n] of a loss with ∂ℓ/∂z = z̄ and so on.

    Inputs Q [B, n, n], G [B, m, n], A [B, q, n], with a leading axis of B or, shared, of 1; lam and slack [B, m], mu
    and box_slack [B, n], status [B] int32 as QPSolve gave them; z_bar [B, n], lam_bar [B, m], nu_bar [B, q], mu_bar
    [B, n], where the last three may have no columns: zero. All are float or all double but status, and so are the
    outputs. A sample whose status is not SOLVED has NaN. Of a loss that has a part without a gradient it is that of the
    rest.
    """
    return _adjoint("QPAdjoint", SENSITIVITY[:4], adjoint_body.__doc__)


def sensitivity_body() -> list[onnx.FunctionProto]:
    """QPAdjoint, and what is known of the gradient: its inputs and outputs, and share [B] double, the part of the loss
    that has no gradient (NaN where the status is not SOLVED), and weak [B] int32, how many rows are weakly active.
    """
    return _adjoint("QPSensitivity", SENSITIVITY, sensitivity_body.__doc__, tells=True)


def sparse_sensitivity_body() -> list[onnx.FunctionProto]:
    """As QPSensitivity, with the input `plan` of SparseQuadraticProgram, of which this body takes no notice."""

    def traced(xp: Traced, *inputs: Symbol) -> Sequence[Symbol]:
        types = [*[DOUBLE] * 5, INT64]
        return xp.nodes("QPSensitivity", *inputs[:-1], results=types, domain=OP_DOMAIN)

    return function(
        "SparseQPSensitivity", traced, [*ADJOINT_INPUTS, "plan"], SENSITIVITY, sparse_sensitivity_body.__doc__
    )


def _adjoint(name: str, outputs: Sequence[str], doc: str | None, tells: bool = False) -> list[onnx.FunctionProto]:
    def traced(xp: Traced, *given: Symbol) -> Sequence[Symbol]:
        Q, G, A, lam, mu, slack, box_slack, status, z_bar, lam_bar, nu_bar, mu_bar = given
        B, n, m, q = xp.size(z_bar, -2), xp.size(G, -1), xp.size(G, -2), xp.size(A, -2)
        at_least_one = xp.node("Max", q, xp.constant([1]))
        code = xp.node("Cast", status, result=INT64, to=INT64)
        solved = xp.node("Equal", code, xp.constant([int(QPStatus.SOLVED)]), result=BOOL)
        good = xp.node("Unsqueeze", solved, xp.constant([1, 2]))
        whole = _matrix(xp, B, Q, n, n)
        found = qp_adjoint(
            xp,
            xp.where(good, 0.5 * (whole + xp.mT(whole)), xp.eyes(whole)),
            _matrix(xp, B, G, m, n),
            _equalities(xp, B, A, at_least_one, n),
            xp.where(good, xp.concat([_row(xp, B, lam, m, 0.0), _row(xp, B, mu, n, 0.0)]), 0.0),
            xp.concat([_row(xp, B, slack, m, 1.0), _row(xp, B, box_slack, n, 1.0)]),
            _row(xp, B, z_bar, n, 0.0),
            xp.concat([_row(xp, B, lam_bar, m, 0.0), _row(xp, B, mu_bar, n, 0.0)]),
            _row(xp, B, nu_bar, at_least_one, 0.0),
        )
        d_z, d, d_nu, share = (xp.where(good, a, NAN) for a in found[:4])
        d_lam, d_mu = xp.nodes("Split", d, xp.node("Concat", m, n, axis=0), results=[DOUBLE] * 2, axis=2)
        rows = [xp.node("CastLike", flat(xp, a), Q) for a in (d_z, d_lam, _first(xp, d_nu, q), d_mu)]
        if not tells:
            return rows
        near = xp.where(_is_float(xp, Q), WEAK["float32"], WEAK["float64"])
        weak = xp.sum(xp.where(found.nearness < near, 1.0, 0.0))
        single = xp.constant([1, 2])
        counted = xp.node("Cast", xp.node("Squeeze", weak, single), to=onnx.TensorProto.INT32)
        return [*rows, xp.node("Squeeze", share, single), counted]

    return function(name, traced, ADJOINT_INPUTS, outputs, doc)


def _precision(xp: Traced, data: Symbol, tolerance: Symbol) -> quadratic_program.Precision:
    """What the type of the data decides, and the tolerance where that is one, told when the function runs."""
    is_float = _is_float(xp, data)
    both = zip(precision_of(np.float32), precision_of(np.float64), strict=True)
    usual = quadratic_program.Precision(*(xp.where(is_float, *numbers) for numbers in both))
    is_one = (tolerance > 0.0) & (tolerance < INFINITY)
    solved, ends = (xp.where(is_one, tolerance, a) for a in (usual.solved, usual.ends))
    return usual._replace(solved=solved, ends=ends)


def _is_float(xp: Traced, data: Symbol) -> Symbol:
    rounded = double(xp, xp.node("CastLike", xp.constant([NEARLY_ONE], DOUBLE), data))
    return xp.node("Equal", rounded, xp.constant([1.0], DOUBLE), result=BOOL)


# No node that reads an input may be what a graph around the function has too: where one call is inlined in a graph, and
# another in a loop inside it, ONNX Runtime 1.31 takes such a node for the function's own and hands its value, under a
# name that the inner call has as well, to the loop.


def _matrix(xp: Traced, B: Symbol, M: Symbol, rows: Symbol, columns: Symbol) -> Symbol:
    """A matrix for every sample, of one that may be shared."""
    return double(xp, xp.node("Expand", M, xp.node("Concat", B, rows, columns, axis=0)))


def _equalities(xp: Traced, B: Symbol, A: Symbol, rows: Symbol, n: Symbol) -> Symbol:
    missing = rows - xp.size(A, -2)
    zero = xp.constant([0])
    padded = xp.node("Pad", A, xp.node("Concat", xp.constant([0] * 4), missing, zero, axis=0))
    return _matrix(xp, B, padded, rows, n)


def _row(xp: Traced, B: Symbol, a: Symbol, columns: Symbol, number: float) -> Symbol:
    """A row [B, 1, columns] of what may be shared and have no columns: then it holds a number."""
    row = _wide(xp, double(xp, xp.node("Unsqueeze", a, xp.constant([1]))), columns, number)
    return xp.node("Expand", row, xp.node("Concat", B, xp.constant([1]), columns, axis=0))


def _wide(xp: Traced, row: Symbol, columns: Symbol, number: float) -> Symbol:
    missing = columns - xp.size(row, -1)
    ends = xp.node("Concat", xp.constant([0] * 5), missing, axis=0)
    return xp.node("Pad", row, ends, xp.constant(np.float64(number), DOUBLE))


def _first(xp: Traced, row: Symbol, columns: Symbol) -> Symbol:
    return xp.node("Slice", row, xp.constant([0]), columns, xp.constant([2]))
