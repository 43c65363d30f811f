"""What rounding may do to a certificate: how far energies may lie below their cuts, and how far a gap may be off.

Told from handed-out numbers alone: what energy, cuts and y are summed from, in units of rounding of their dtype, eps.
`icnnrt.mathematics.certificate` judges by it, and the graphs that leave samples out by themselves.

Over a polyhedron sizes are told by the points themselves, `sizes_at`.

Slopes G [B, K, n] are float64 here, where squares of float32 do not overflow; offsets e and multipliers are rows
[B, 1, K], points [B, K, n], what counts a sample is [B, 1, 1].
"""

from typing import Final

from icnnrt.mathematics.domains import Domain
from icnnrt.mathematics.namespace import Array, Namespace

# How many units of rounding, eps times the scale of the cuts, an energy may lie below its cuts before it counts as not
# convex. Convex float32 PICNNs of 32 to 600 units, slopes from 0.2 to 2e9, stayed below 1.6 of them (measured), in
# boxes of any place and width below 10.
ROUNDING: Final = 64.0
# How many units of rounding, eps times what the bound rests on, gap and lower bound count as uncertain by. Of sums of
# maxima, softplus and squares with entries from 1e-7 to 1e16, over all domains, no y was worse than its gap by more
# than 1.2 of them, and no bound too high by more than 2.1 (measured against extended precision, where that was more
# than 1e-4).
UNCERTAIN: Final = 2.0
# Where more than this part of the energy is uncertain, y is as well, and no gradient of it is worth having.
DIGITS: Final = 1e-3


def magnification(xp: Namespace, lower: Array, upper: Array, eps: float) -> Array:
    """max(|l|, |u|) / (u − l): p = (y − l)/(u − l) is known to that many units of rounding, as y is to one.

    At most 1/eps, from where on no digit of p is left; 0 where u = l, which fixes y and p. Rows [B, 1, n].
    """
    far, width = xp.maximum(abs(lower), abs(upper)), upper - lower
    wide = width > 0.0
    return xp.where(wide, xp.minimum(far / xp.where(wide, width, 1.0), 1.0 / eps), 0.0)


def sizes(xp: Namespace, at: Domain, G: Array, e: Array, points: Array | None, magnified: Array | None) -> Array:
    """About the largest number that each cut is summed from, [B, 1, K]: |e_i| and what G(y − c) can be.

    In R^n the cut points count too. In a box with `magnified`, what `magnification` gives, |g_i|'magnified is added: f
    is not evaluated at y = l + (u − l)∘p, but at the number next to it.
    """
    reach = at.reach(xp, G, points)
    if magnified is not None:
        reach = reach + xp.sum(abs(G) * magnified)
    return abs(e) + xp.mT(reach)


def rounding(xp: Namespace, energy: Array, size: Array, eps: float) -> Array:
    """What rounding may add to a comparison of energies and cuts: 64 eps max(1, |energy|, max_i size_i)."""
    return (ROUNDING * eps) * xp.maximum(xp.maximum(abs(energy), 1.0), xp.max(size))


def uncertainty(
    xp: Namespace,
    at: Domain,
    energy: Array,
    gap: Array,
    G: Array,
    size: Array,
    lam: Array | None,
    magnified: Array | None,
    eps: float,
) -> Array:
    """By how much rounding may have moved gap and lower bound::

        max( 2 eps max(1, |energy|, Σ_i λ_i size_i + Σ_j max_i |g_ij| |y_j|),  −gap )

    Every cut counts as the bound rests on it, as one that has no part in it may be as wrong as it likes. The last sum
    stands for what f adds up at y, where slopes of one sign have met those of the other. A gap below zero is off by as
    much at least. Without multipliers, None, the largest size counts twice. In a box −H of the handed-out y may differ
    from that of p, and is uncertain by as much more: |H(p + δ) − H(p)| <= min(H(δ), δ (|s| + 1)), s the logit of p.
    """
    if lam is None:
        held = 2.0 * xp.max(size)
    else:
        s = -(lam @ G)
        steepest = xp.mT(xp.max(xp.mT(abs(G))))
        held = xp.sum(lam * size) + xp.sum(steepest * abs(at.point(xp, s)))
    total = _held_up(xp, energy, gap, held, eps)
    if magnified is None:
        return total
    delta = xp.minimum(eps * magnified, 0.5)
    entropy = -(xp.x_log_x(delta) + xp.x_log_x(1.0 - delta))
    return total + xp.sum(entropy if lam is None else xp.minimum(entropy, delta * (abs(s) + 1.0)))


def _held_up(xp: Namespace, energy: Array, gap: Array, held: Array, eps: float) -> Array:
    """max( 2 eps max(1, |energy|, held), −gap )"""
    return xp.maximum((UNCERTAIN * eps) * xp.maximum(xp.maximum(abs(energy), 1.0), held), -gap)


def known(xp: Namespace, uncertain: Array, lower_bound: Array) -> Array:
    """Whether the energy is uncertain by no more than 1e-3 max(1, |lower bound|); false for NaN."""
    return uncertain <= DIGITS * xp.maximum(abs(lower_bound), 1.0)


# --- Over a polyhedron, e_i = f(y_i) − g_i'y_i -----------------------------------------------------------------------


def sizes_at(xp: Namespace, G: Array, e: Array, far: Array) -> Array:
    """|e_i| + |g_i|'far, [B, 1, K]; far [B, 1, n] or, of each cut its own, [B, K, n]."""
    return abs(e) + xp.mT(xp.sum(abs(G) * far))


def rounding_at(xp: Namespace, energy: Array, G: Array, e: Array, points: Array, y: Array, eps: float) -> Array:
    """`rounding` with far = max(|y|, max_j |y_j|); points y_j [B, K, n], y [B, 1, n]."""
    far = xp.maximum(xp.mT(xp.max(xp.mT(abs(points)))), abs(y))
    return rounding(xp, energy, sizes_at(xp, G, e, far), eps)


def uncertainty_at(
    xp: Namespace, energy: Array, gap: Array, G: Array, e: Array, points: Array, lam: Array, y: Array, eps: float
) -> Array:
    """`uncertainty` with far_i = max(|y_i|, |y|), and the y that is there."""
    steepest = xp.mT(xp.max(xp.mT(abs(G))))
    size = sizes_at(xp, G, e, xp.maximum(abs(points), abs(y)))
    held = xp.sum(xp.maximum(lam, 0.0) * size) + xp.sum(steepest * abs(y))
    return _held_up(xp, energy, gap, held, eps)


def violation(xp: Namespace, G: Array, e: Array, points: Array) -> Array:
    """The most by which one cut exceeds f at the point of another: max_ij [v_j(y_i) − f(y_i)], f(y_i) = v_i(y_i).

    points y_i, less the centre that offsets refer to; [B, 1, 1] >= 0, which is zero but for rounding if f is convex.
    """
    v = e - points @ -xp.mT(G)
    return xp.max(xp.mT(xp.max(v) - (xp.mT(e) + xp.sum(G * points))))


def excess(
    xp: Namespace,
    G: Array,
    h: Array,
    A: Array,
    b: Array,
    lower: Array,
    upper: Array,
    y: Array,
    lam: Array,
    nu: Array,
    bounds: Array,
) -> tuple[Array, Array]:
    """What it means that y leaves {Gy <= h, Ay = b, lower <= y <= upper}: by how much its energy may lie below the
    lower bound, and how far out it is.

    With v_G = max(Gy − h, 0), v_A = |Ay − b|, v = max(y − upper, lower − y, 0) and the multipliers of the last model::

        excess       λ_G'v_G + |ν|'v_A + |bounds|'v
        distance     max of them / (1 + max(|Ay|, |y|))

    A program's own residual counts the heights of the cuts to its size, which may be large.
    """
    Gy, Ay = -(y @ -xp.mT(G)), -(y @ -xp.mT(A))
    beyond = xp.maximum(xp.maximum(y - upper, lower - y), 0.0)
    out = xp.concat([xp.maximum(Gy - h, 0.0), abs(Ay - b), beyond])
    size = xp.max(abs(xp.concat([Ay, y])))
    return xp.sum(abs(xp.concat([lam, nu, bounds])) * out), xp.max(out) / (1.0 + size)
