"""The adjoint of the bundle method over a polyhedron: what one quadratic program on the way did to its answer.

Three differ in the programs that they go through, of `icnnrt.mathematics.polyhedron.Programs`:

    exact       from the model that gave y back to the projection, every cut point y_i taken as the variable it is:
                what the cuts at y_{k−1} did goes on to the model before, ȳ_{k−1} = ∇²f(y_{k−1}) s_{k−1}
    prop3       the model that gave y alone, the cut points held fixed: Proposition 3 of Amos, Xu, Kolter, *Input Convex
                Neural Networks*, ICML 2017, exact for piecewise-linear f
    implicit    Newton's program at y, for a smooth f solved to convergence: the solution map of min over P of f + (μ/2)
                ‖·‖² has at y* the derivative of that of this program. Blind to kinks: wrong for ReLU networks

With d the solution of the program's adjoint system for ȳ, `icnnrt.mathematics.qp_adjoint`, whose `gradients` are those
of the constraints, and c_y, c_λ its parts of y and of the cuts::

    μ̄ = c_y'y,   θ̄ = Σ_i ∇θ [ ē_i f(y_i) + s_i'∇f(y_i) ],   ē_i = c_λi,   s_i = ḡ_i − ē_i y_i = λ_i c_y + c_λi (y − y_i)

of "implicit" θ̄ = ∇θ [ c_y'∇f(y) ].
"""

from typing import NamedTuple

from icnnrt.mathematics.namespace import Array, Namespace
from icnnrt.mathematics.polyhedron_programs import Polyhedron, Programs
from icnnrt.mathematics.qp_adjoint import gradients
from icnnrt.mathematics.qp_reference import QPCotangents, QPReference


class ProgramCotangents(NamedTuple):
    """∂ℓ/∂ of what the answer of one program depends on."""

    polyhedron: Polyhedron  # of G, h, A, b, lower, upper
    mu: Array  # [B, 1]
    c_y: Array  # [B, n]
    offset_bar: Array  # [B, k] ē_i of its cuts
    seed: Array  # [B, k, n] s_i


def pulled_back(
    xp: Namespace, programs: Programs, solution: QPReference, d: QPCotangents, points: Array
) -> ProgramCotangents:
    """By a program's solution and that of its adjoint system; points [B, k, n] of its cuts, which may be none."""
    n, m = programs.n, programs.m

    y, bounds, c_y, c_bounds = (xp.upto(a, n) for a in (solution.z, solution.mu, d.d_z, d.d_mu))
    (lam, of_cuts), (c_lam, c_cuts) = ((xp.upto(a, m), xp.beyond(a, m)) for a in (solution.lam, d.d_lam))
    found = gradients(xp, y, lam, solution.nu, bounds, c_y, c_lam, d.d_nu, c_bounds)
    bars = Polyhedron(*(found[name]() for name in Polyhedron._fields))
    seed = xp.column(of_cuts) * xp.row(c_y) + xp.column(c_cuts) * (xp.row(y) - points)
    return ProgramCotangents(bars, xp.sum(c_y * y), c_y, c_cuts, seed)
