"""The model of k cuts, solved by an interior point method.

Problem (Amos, Xu, Kolter, *Input Convex Neural Networks*, ICML 2017, section 4, for the unit box)::

    primal   min over y, t of  t + R(y)   s.t.  v = e + G(y − c) <= t·1
    dual     max over λ in the simplex of  e'λ − C(s),   s = −G'λ
    link     y = y(s),   D = ∂y/∂s

R, c, C, y(s) and D are a domain's, see `icnnrt.mathematics.domains`. Offsets are centred, e_i = f(y_i) + g_i'(c − y_i),
which keeps the rounding of v small where n is large. Strong duality makes max(v) − λ'v the exact gap between primal and
dual at y = y(−G'λ).

Method: predictor-corrector (Mehrotra) on (λ, w, t), w = t − v the slack, with logits u of their own in the place of s.
Eliminating y entirely, or keeping y in place of u, both fail on badly scaled or saturated problems. Three things are
said in relative terms, to the same effect and with little work:

- η = dλ/λ and −ζ = dw/w, and complementarity in units of c = λ∘w. Then λ∘dw + w∘dλ = r_c reads −ζ + η = r_c/c, and the
  step to the boundary is 1 / max(−η, ζ).
- The height t is eliminated: dλ = P r with P = A⁻¹ − A⁻¹1 1'A⁻¹ / 1'A⁻¹1, A = G D G' + diag(w/λ). P does not see a
  constant in r.
- G'dλ is what s loses, so du = −(u + G'λ) − G'dλ needs no product of its own.

Vectors are rows, over cuts [B, 1, k] and over y [B, 1, n], the trials of a step [B, 3, k] and [B, 3, n]. All is
float64, stated over `icnnrt.mathematics.namespace`.
"""

from typing import Any, Final, NamedTuple

from icnnrt.mathematics.domains import Domain
from icnnrt.mathematics.namespace import EPS, Array, Namespace

LAM_FLOOR: Final = EPS**2
SLACK_FLOOR: Final = 1e-3 * EPS
TO_BOUNDARY: Final = 0.99  # how much of the way to the boundary of λ and w a step may go
STEPS: Final = 60  # bound on interior-point steps: 9 are usual, slopes of 1e3 want up to 60; solved samples stop early
# Plain predictor-corrector can cycle between two nearly parallel cuts, because v is not linear in the logits.
# So three step lengths are tried, and a shorter one is taken when it leaves less than half the gap.
BACKTRACK: Final = (1.0, 0.5, 0.25)
RELUCTANCE: Final = (1.0, 2.0, 2.0)
# How far out the first logits may be: those of a cold start, and of one with multipliers to go on from.
COLD_LOGIT: Final = 2.0
WARM_LOGIT: Final = 4.0


class Cuts(NamedTuple):
    """Cuts with the same λ that are easier to compute with, and what rounding may do to them."""

    G: Array  # [B, k, n]
    N: Array  # −G', [B, n, k]
    e: Array  # [B, 1, k]
    eye: Array  # [k, k]
    enough: Array  # [B, 1, 1] a gap that small is zero: the rounding of v for any y that may be


class Iterate(NamedTuple):
    """Where the method stands."""

    lam: Array  # λ, on the simplex
    u: Array  # logits
    w: Array  # slack
    s: Array  # −G'λ
    best_lam: Array  # the λ of the smallest gap so far
    best_gap: Array  # [B, 1, 1]


class Model(NamedTuple):
    """Solution of the k-cut model; NaN, but for λ, in a sample with NaN or infinite cuts."""

    y: Array  # y(−G'λ)
    lam: Array  # the best of all iterates, >= 0
    lower_bound: Array  # [B, 1, 1] dual value: a lower bound of min f + R
    feasibility: Array  # [B, 1, 1] |1'λ − 1|
    gap: Array  # [B, 1, 1] max v − λ'v


class InnerSolution(NamedTuple):
    """A `Model` without axes of one entry, of B samples."""

    y: Array  # [B, n] primal point, y(−G'λ)
    lam: Array  # [B, k] multipliers of the cuts, on the simplex
    lower_bound: Array  # [B] dual value: a lower bound of min f + R
    residual: Array  # [B, 3] stationarity, feasibility, complementarity (= duality gap of the model)


def inner_solution(xp: Namespace, model: Model) -> InnerSolution:
    """That of a model; y is not rounded yet, so its stationarity is 0."""
    residual = xp.concat([0.0 * model.gap, model.feasibility, model.gap])
    return InnerSolution(model.y[:, 0], model.lam[:, 0], model.lower_bound[:, 0, 0], residual[:, 0])


def solved(
    xp: Namespace, at: Domain, G: Array, e: Array, lam_start: Array | None = None, steps: int = STEPS
) -> InnerSolution:
    """`solve` for offsets e [B, k], from multipliers [B, k_prev] or a cold start."""
    before = e[:, :0] if lam_start is None else lam_start
    return inner_solution(xp, solve(xp, at, G, e[:, None], before[:, None], steps))


def solve(xp: Namespace, at: Domain, G: Array, e: Array, lam_start: Array, steps: Any) -> Model:
    """Solve the model of slopes G [B, k, n] and offsets e [B, 1, k] over the domain `at`.

    lam_start [B, 1, k_prev]: multipliers of the first k_prev <= k cuts to go on from, none for a cold start. A sample
    stops changing once its gap is at rounding level, so its answer does not depend on its neighbours. Convergence is
    told by `gap`, never assumed.
    """
    cuts = prepared(xp, at, G, e)

    def unfinished_at(*state: Array) -> Array:
        return unfinished(xp, cuts, Iterate(*state))

    def next_of(*state: Array) -> Iterate:
        return step(xp, at, cuts, Iterate(*state))

    last = Iterate(*xp.loop(unfinished_at, next_of, first(xp, at, cuts, lam_start), steps))
    return certified(xp, at, G, e, last.best_lam)


def prepared(xp: Namespace, at: Domain, G: Array, e: Array) -> Cuts:
    """The cuts that the method works on."""
    G, e = at.scaled(xp, at.plain(xp, G), e)
    N, eye = -xp.mT(G), xp.eye(e)
    enough = 2 * EPS * (1.0 + xp.max(abs(e) + xp.mT(at.reach(xp, G))))
    return Cuts(G, N, e, eye, enough)


def first(xp: Namespace, at: Domain, cuts: Cuts, lam_start: Array) -> Iterate:
    """The iterate to begin with: λ = 1/k, warm 0.9 [λ_start; 0] + 0.1/k."""
    G, N, e, _, _ = cuts
    before = xp.extended(lam_start, e)
    mixed = 0.9 * before + 0.1 / xp.count(e)
    lam = mixed / xp.sum(mixed)
    s = -(lam @ G)
    v = e - at.centred(xp, s) @ N
    gap = xp.max(v) - xp.sum(lam * v)
    u = at.first_logits(xp, s, COLD_LOGIT + (WARM_LOGIT - COLD_LOGIT) * xp.sum(before))
    v = e - at.centred(xp, u) @ N
    M = xp.max(v)
    w = M - v
    w = w + (xp.sum(lam * w) + 10 * EPS * (1.0 + abs(M)))
    return Iterate(lam, u, w, s, lam, gap)


def unfinished(xp: Namespace, cuts: Cuts, iterate: Iterate) -> Array:
    """Whether a sample has a gap left; a NaN sample holds up nobody."""
    return xp.any(iterate.best_gap > cuts.enough)


def step(xp: Namespace, at: Domain, cuts: Cuts, iterate: Iterate) -> Iterate:
    """One predictor-corrector step. The best iterate of a sample whose gap is small enough stays."""
    G, N, e, eye, enough = cuts
    lam, u, w, s, best_lam, best_gap = iterate

    A = eye * (w / lam) - at.curvature(xp, u, G) @ N  # D = D(u)
    solved = xp.inverse_spd(A, eye)
    solved_1 = solved(xp.ones_like(lam))
    total = xp.sum(solved_1)

    def P(r: Array) -> Array:
        x = solved(r)
        return x - solved_1 * (xp.sum(x) / total)

    # r = v + w − t − G D r_u less w and a constant
    r_u = u - s  # u + G'λ
    r = e + (at.curvature(xp, u, r_u) - at.centred(xp, u)) @ N
    r = r - xp.max(r)
    c = lam * w
    mu = xp.mean(c)

    # predictor, r_c = −c:  dλ = P r,  ζ = 1 + η,  a = min(1, 1 / max(−η, ζ))
    eta = P(r) / lam
    a = 1.0 / xp.max(xp.maximum(xp.maximum(-eta, 1.0 + eta), 1.0))
    # (λ + a dλ)(w + a dw) = c∘((1 − a) − h) and a² dλ dw = −c∘h with h = aη(a + aη)
    a_eta = a * eta
    h = a_eta * (a + a_eta)
    kept = xp.clip(1.0 - a - xp.mean(c * h) / mu, 0.0, 1.0)
    centring = kept * kept * kept

    # corrector, r_c = c∘(m − 1):  dλ = P(r + w∘m),  ζ = 1 + η − m,  α = min(1, 0.99 / max(−η, ζ))
    m = centring * mu / c + h
    d_lam = P(r + w * m)
    eta = d_lam / lam
    zeta = 1.0 + eta - m
    alpha = TO_BOUNDARY / xp.max(xp.maximum(xp.maximum(-eta, zeta), TO_BOUNDARY))

    # three step lengths; the shorter two have to leave less than half the gap
    lengths = alpha * xp.rows(BACKTRACK, alpha)
    moved = xp.maximum(lam + lengths * d_lam, LAM_FLOOR)  # off zero, where w/λ would overflow
    trial = moved / xp.sum(moved)
    trial_s = -(trial @ G)
    trial_v = e - at.centred(xp, trial_s) @ N
    trial_gap = xp.max(trial_v) - xp.sum(trial * trial_v)  # λ'v sums every v: NaN in any cut makes it NaN
    chosen = xp.argmin1(trial_gap * xp.rows(RELUCTANCE, alpha))
    alpha, gap, lam, next_s = (xp.pick1(t, chosen) for t in (lengths, trial_gap, trial, trial_s))

    u = at.next_logits(xp, u, next_s - s - alpha * r_u)  # α du = −α r_u − α G'dλ
    w = xp.maximum(w * (1.0 - alpha * zeta), SLACK_FLOOR)
    better = (gap < best_gap) & (best_gap > enough)
    return Iterate(lam, u, w, next_s, xp.where(better, lam, best_lam), xp.where(better, gap, best_gap))


def certified(xp: Namespace, at: Domain, G: Array, e: Array, lam: Array) -> Model:
    """The point of multipliers λ with its bound and gap."""
    G = at.plain(xp, G)
    s = -(lam @ G)
    v = e - at.centred(xp, s) @ -xp.mT(G)
    gap = xp.max(v) - xp.sum(lam * v)
    poison = 0.0 * gap  # NaN where any cut is NaN or infinite, else 0
    dual = xp.sum(lam * e) - at.conjugate(xp, s)
    return Model(at.point(xp, s) + poison, lam, dual + poison, abs(xp.sum(lam) - 1.0), gap)
