"""The adjoint of a quadratic program by one KKT system on the active set.

For a loss ℓ with z̄ = ∂ℓ/∂z, λ̄, ν̄, μ̄ at a solution (Amos, Kolter, *OptNet*, ICML 2017; Amos, Xu, Kolter, *Input Convex
Neural Networks*, ICML 2017, Proposition 3), with G_a and I_a the rows that hold z::

    [Q    G_a'  A'  I_a'] [d_z]     [−z̄]         ∂ℓ/∂p = d_z        ∂ℓ/∂Q = ½ (d_z z' + z d_z')
    [G_a                ] [d_λ]  =  [−λ̄]         ∂ℓ/∂G = λ d_z' + d_λ z'
    [A                  ] [d_ν]     [−ν̄]         ∂ℓ/∂A = ν d_z' + d_ν z'        ∂ℓ/∂b = −d_ν
    [I_a                ] [d_μ]     [−μ̄]         ∂ℓ/∂h = −d_λ where λ >= 0,  ∂ℓ/∂h_lower = −d_λ where λ < 0

and the same of μ for the box; d_λ and d_μ are 0 elsewhere. A row holds z where its slack is 0, as it is of an equality,
and where its multiplier is larger than its slack, both in units of the equilibrated problem. Where both are 0 (no
strict complementarity) the solution has a kink, and this is the derivative of one side.

The system may be singular: where the solution is not unique, or rows depend on each other. It is solved by the proximal
point method from 0, x <- x + (K + reg)⁻¹ (r − K x) with K the matrix above, which tends to the solution of least norm
(Rockafellar, *Monotone operators and the proximal point algorithm*, 1976). Where r has a part that K does not reach, a
part of the loss has no gradient: x runs away along the null space of K, and r − K x tends to that part (Bruck, Reich,
*Nonexpansive projections and resolvents of accretive operators*, 1977), whose size against that of r is the `share`. It
is taken off r, and the rest is solved from 0, with a reg so large that rounding of x spoils neither.
"""

from collections.abc import Callable
from typing import Final, NamedTuple

from icnnrt.mathematics.condensed_kkt import Matrices, Step, matrices, solver
from icnnrt.mathematics.interior_point import units
from icnnrt.mathematics.namespace import Array, Namespace

RHO: Final = 1e-12
DELTA: Final = 1e-8
FACTORS: Final = 5  # and for each so many steps of the proximal point method; 1 is usual
STEPS: Final = 2
ENOUGH: Final = 1e-14  # relative residual at which a sample stops
RUNAWAY: Final = 1e-13  # after as many steps for two factors, r − K x against x from where on x runs away
SINGULAR: Final = 1e-7, 1e-4  # ρ and δ from then on
SEPARATED: Final = 4  # so many factors separate the two parts of r
PARTED: Final = 3  # and so often, as each leaves of the second what rounding of x hides; the last is the answer
MOST: Final = FACTORS + PARTED * SEPARATED  # factors in all
DECIDED: Final = 1e-3  # the lesser of multiplier and slack against the larger from where on that one decides
UNLIKELY: Final = 100.0  # and so much further is then the kink
# Nearness of a row that may as well not hold z, by the type of data: where l∘s = 1e-12 is all that a solve knows, and
# multiplier and slack are not told apart, the larger is at most 3e-5.
WEAK: Final = {"float32": 1e-3, "float64": 1e-4}


class Held(NamedTuple):
    """The equilibrated system on the active set, and its units."""

    of: Matrices
    active: Array  # [B, 1, m + n] 1 or 0
    nearness: Array  # [B, 1, m + n] of each row to a kink; 1 of an equality
    r_z: Array
    r: Array
    r_nu: Array
    size: Array
    D: Array
    F: Array
    E: Array
    c: Array


class Adjoint(NamedTuple):
    """The solution in the units of the data, and what is known of it."""

    dz: Array  # [B, 1, n]
    dlam: Array  # [B, 1, m + n]
    dnu: Array  # [B, 1, q]
    share: Array  # [B, 1, 1] of the loss that has no gradient
    nearness: Array  # [B, 1, m + n] of each row to a kink: the larger of multiplier and slack, equilibrated


def qp_adjoint(xp: Namespace, *given: Array) -> Adjoint:
    """d_z, d_λ and d_μ in one row, d_ν, of what `held` takes."""
    at = held(xp, *given)

    def unfinished(*state: Array) -> Array:
        return xp.any(state[-1])

    def proximal(*state: Array) -> tuple[Array, ...]:
        return step(xp, at, *state)

    return finished(xp, at, *xp.loop(unfinished, proximal, begin(at), MOST))


def held(
    xp: Namespace,
    Q: Array,
    G: Array,
    A: Array,
    multiplier: Array,
    slack: Array,
    z_bar: Array,
    bars: Array,
    nu_bar: Array,
) -> Held:
    """Q [B, n, n] symmetric, G [B, m, n], A [B, q, n] with q >= 1; (λ, μ), their slacks, (λ̄, μ̄) in rows
    [B, 1, m + n]. A multiplier that is NaN counts as 0.
    """
    Q, _, G, A, D, F, E, c = units(xp, Q, 0.0 * z_bar, G, A)
    force, room = abs(multiplier) * c / F, slack * F
    active = xp.indicator((slack <= 0.0) | (force > room))
    near = xp.maximum(force, room)
    near = xp.where(force + room > (1.0 + DECIDED) * near, near, UNLIKELY * near)
    nearness = xp.where(slack > 0.0, near, 1.0)
    r_z, r, r_nu = -z_bar * D, active * (-bars * F / c), -nu_bar * E / c
    size = xp.largest(xp.concat([r_z, r, r_nu]))
    return Held(matrices(xp, Q, G, A), active, nearness, r_z, r, r_nu, size, D, F, E, c)


def begin(at: Held) -> tuple[Array, ...]:
    """dz, dλ, dν; the three parts of r that are solved for; how many factors are left if negative, or since when x was
    seen to run away; and which samples are going."""
    turn = 0.0 * at.c - float(FACTORS)
    return 0.0 * at.r_z, 0.0 * at.r, 0.0 * at.r_nu, at.r_z, at.r, at.r_nu, turn, at.size > 0.0


def step(
    xp: Namespace,
    at: Held,
    dz: Array,
    dlam: Array,
    dnu: Array,
    r_z: Array,
    r: Array,
    r_nu: Array,
    turn: Array,
    going: Array,
) -> tuple[Array, ...]:
    """Some steps of the proximal point method, and then the parts of r are separated where it is time."""
    x, sides = (dz, dlam, dnu), (r_z, r, r_nu)
    singular = xp.indicator(turn > 0.0)
    rho, delta = (a + (b - a) * singular for a, b in zip((RHO, DELTA), SINGULAR, strict=True))
    solve = solver(xp, at.of, at.active / delta, rho, delta)
    for _ in range(STEPS):
        e_z, e, e_nu = _left(at, sides, x)
        x = tuple(xp.where(going, a + d, a) for a, d in zip(x, solve(e_z, -e, e_nu, 1), strict=True))
    left = _left(at, sides, x)
    off = xp.largest(xp.concat(list(left)))
    turn = turn + 1.0
    going = going & (off > ENOUGH * at.size)
    second = going & (turn > 1.5 - FACTORS)
    runaway = second & (turn < 0.5) & (off > RUNAWAY * xp.largest(xp.concat(list(x))))
    parted = second & (xp.equal(turn, 1.0 + SEPARATED) | xp.equal(turn, 1.0 + 2 * SEPARATED))
    sides = tuple(xp.where(parted, b - e, b) for b, e in zip(sides, left, strict=True))
    x = tuple(xp.where(parted | runaway, 0.0, a) for a in x)
    turn = xp.where(runaway, 1.0, turn)
    return *x, *sides, turn, going & (abs(turn) > 0.5) & (turn < 0.5 + PARTED * SEPARATED)


def _left(at: Held, sides: tuple[Array, ...], x: tuple[Array, ...]) -> Step:
    """r − K x."""
    (r_z, r, r_nu), (dz, dlam, dnu), of = sides, x, at.of
    return r_z - dz @ of.Q - dlam @ of.C - dnu @ of.A, at.active * (r - dz @ of.Ct), r_nu - dz @ of.At


def finished(xp: Namespace, at: Held, dz: Array, dlam: Array, dnu: Array, *_: Array) -> Adjoint:
    """The same in the units of the data."""
    sides = at.r_z, at.r, at.r_nu
    size = xp.where(at.size > 0.0, at.size, 1.0)
    left, whole = (xp.concat(list(row)) / size for row in (_left(at, sides, (dz, dlam, dnu)), sides))
    share = xp.sqrt(xp.sum(left * left) / xp.maximum(xp.sum(whole * whole), 1.0))
    return Adjoint(dz * at.D * at.c, dlam * at.F, dnu * at.E, share, at.nearness)


def gradients(
    xp: Namespace,
    z: Array,
    lam: Array,
    nu: Array,
    mu: Array,
    d_z: Array,
    d_lam: Array,
    d_nu: Array,
    d_mu: Array,
    upper: Array | None = None,
    box_upper: Array | None = None,
) -> dict[str, Callable[[], Array]]:
    """∂ℓ/∂ of every datum by its name, each sample's own, when it is asked for.

    Rows [B, n], [B, m], [B, q], [B, n] of the answer and of the adjoint's; [B, m] and [B, n] of the part that the upper
    bound of a row has in what it does, by default 1 where its multiplier is >= 0, else 0. Where the adjoint is NaN, so
    are the gradients.
    """

    def outer(a: Array, c: Array) -> Array:
        return xp.column(a) * xp.row(c)

    def side(d: Array, held: Array, part: Array | None) -> Array:
        return xp.where(held, -d, 0.0 * d) if part is None else -d * part

    return {
        "Q": lambda: 0.5 * (outer(d_z, z) + outer(z, d_z)),
        "p": lambda: d_z,
        "G": lambda: outer(lam, d_z) + outer(d_lam, z),
        "h_lower": lambda: side(d_lam, lam < 0.0, None if upper is None else 1.0 - upper),
        "h": lambda: side(d_lam, lam >= 0.0, upper),
        "A": lambda: outer(nu, d_z) + outer(d_nu, z),
        "b": lambda: -d_nu,
        "lower": lambda: side(d_mu, mu < 0.0, None if box_upper is None else 1.0 - box_upper),
        "upper": lambda: side(d_mu, mu >= 0.0, box_upper),
    }
