"""Segments along which f may lie above its chord: a search for witnesses that f is not convex."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from icnnrt.arguments import batch
from icnnrt.convexity.memory import Unsupported
from icnnrt.convexity.onnx_numpy import evaluate
from icnnrt.format.onnx_graph import Graph, ancestors
from icnnrt.format.verdict import MAX_WITNESS, MAX_X, Evidence, Witness
from icnnrt.mathematics.rounding import ROUNDING

Array: TypeAlias = NDArray[Any]
Value: TypeAlias = Callable[[Array, Array], Array]  # (x [B, ...], y [B, n]) -> f [B]

POINTS: Final = 16  # parts of a chord
CHORDS: Final = 192  # in one round, unless they hold more than so many numbers
LEAST_CHORDS: Final = 8
MAX_NUMBERS: Final = 1 << 27
ROUNDS: Final = 6
MOVED: Final = 256  # times that a segment is moved before it is believed
GRID: Final = 64.0  # ends of chords are multiples of 1/64, so that midpoints are exact in float32


def search(
    graph: Graph,
    weights: Mapping[str, Array],
    value: Value | None,
    x_samples: object,
    rng: np.random.Generator,
    box: tuple[float, float],
) -> tuple[Witness | None, Evidence | None]:
    """Chords of the box, second differences at four scales along each, then chords near the worst ones."""
    inputs = {i.name: i for i in graph.inputs}
    y_input = inputs.get("y")
    if y_input is None or y_input.dtype is None or y_input.dtype.kind != "f" or not y_input.sizes:
        return None, None
    shape, dtype = tuple(s or 1 for s in y_input.sizes[1:]), y_input.dtype
    x_input = inputs.get("x")
    nodes = tuple(ancestors(graph, "f"))

    def energy(x: Array, y: Array, float64: bool = False) -> Array:
        values = {**graph.initializers, "x": x, "y": y.reshape(len(y), *shape)}
        computed = evaluate(nodes, values, float64=float64, only="f")
        if "f" not in computed:
            raise Unsupported("f is an output that is not known here")
        return computed["f"]

    def magnitude(x: Array, y: Array) -> float:
        """The largest finite number that f is computed from."""
        values = evaluate(nodes, {**graph.initializers, "x": x, "y": y.reshape(len(y), *shape)}, float64=True)
        numbers = [np.abs(a[np.isfinite(a)]).max(initial=0.0) for a in values.values() if a.dtype.kind == "f"]
        return float(max(numbers, default=np.inf))

    x_shape = tuple(s or 1 for s in x_input.sizes[1:]) if x_input and x_input.sizes else (1,)
    x_type = x_input.dtype if x_input and x_input.dtype is not None else dtype
    n = math.prod(shape)
    count = min(CHORDS, MAX_NUMBERS // ((POINTS + 1) * (n + math.prod(x_shape))))
    if count < LEAST_CHORDS:
        return None, None
    if x_samples is None:
        X = rng.standard_normal((MAX_X, *x_shape)).astype(x_type)
    else:
        X = batch(x_samples, "x_samples", x_type if x_type.kind == "f" else dtype, x_shape)[:MAX_X]
        X = X.astype(x_type)
    if not len(X):
        return None, None
    towards = [w.reshape(-1, n) for w in weights.values() if w.ndim == 2 and w.shape[1] == n and w.dtype.kind == "f"]
    rows = np.concatenate(towards) if towards else np.zeros((0, n))
    rows = rows[np.isfinite(rows).all(1) & (np.abs(rows).max(1, initial=0) > 0)]
    best: list[tuple[float, Array, Array, int]] = []
    segments, worst = 0, -np.inf
    eps = float(np.finfo(dtype).eps)
    for turn in range(ROUNDS):
        a, b, which = _chords(rng, n, len(X), rows, best if turn > 1 else [], count)
        t = np.arange(POINTS + 1) / POINTS
        unit = a[:, None] + (b - a)[:, None] * t[:, None]  # [chords, points, n]
        y = (box[0] + (box[1] - box[0]) * unit).astype(dtype)
        x = np.repeat(X[which], POINTS + 1, 0)
        try:
            with np.errstate(all="ignore"):
                f = np.asarray((value or energy)(x, y.reshape(-1, *shape))).astype(np.float64)
        except Unsupported:
            return None, None
        if f.shape != (len(x),):
            return None, None  # not one energy a sample
        f = f.reshape(len(a), POINTS + 1)
        for d in (8, 4, 2, 1):
            middle = f[:, d : POINTS + 1 - d]
            left, right = f[:, : POINTS + 1 - 2 * d], f[:, 2 * d :]
            with np.errstate(all="ignore"):
                scale = np.maximum(1.0, np.maximum(np.abs(middle), np.maximum(np.abs(left), np.abs(right))))
                excess = (middle - (left + right) / 2) / scale
            excess = np.where(np.isfinite(excess), excess, -np.inf)
            segments += excess.size
            for chord in np.argsort(excess.max(1))[-4:]:
                i = int(excess[chord].argmax())
                e = float(excess[chord, i])
                best.append((e, unit[chord, i], unit[chord, i + 2 * d], int(which[chord])))
        best = sorted(best, key=lambda one: -one[0])[:16]
        worst = best[0][0]
        for e, p, q, k in best[:4]:
            if e > ROUNDING * eps:
                p, q = ((box[0] + (box[1] - box[0]) * end).astype(dtype) for end in (p, q))
                witness = _confirmed(energy, magnitude, value, X[k], p, q, shape, eps)
                if witness:
                    return witness, Evidence(segments, worst, box, len(X))
    return None, Evidence(segments, float(worst) if np.isfinite(worst) else 0.0, box, len(X))


def _chords(
    rng: np.random.Generator,
    n: int,
    contexts: int,
    rows: Array,
    best: list[tuple[float, Array, Array, int]],
    count: int,
) -> tuple[Array, Array, Array]:
    """Ends a, b in [0, 1]^n on the grid, and which x: random, along axes, along rows of weights, near the worst."""
    a, b = rng.random((count, n)), rng.random((count, n))
    which = rng.integers(0, contexts, count)
    kinds = rng.integers(0, 4, count)
    for c in range(count):
        if best and c % 2:
            _, p, q, k = best[(c // 2) % len(best)]
            # A little longer, a little turned.
            spread = 0.25 * float(np.abs(q - p).max()) + 1 / GRID
            a[c], b[c] = p + spread * (rng.random(n) - 0.5), q + spread * (rng.random(n) - 0.5)
            which[c] = k
        elif kinds[c] == 1:
            b[c] = a[c]
            axis = rng.integers(n)
            a[c, axis], b[c, axis] = 0.0, 1.0
        elif kinds[c] == 2 and len(rows):
            row = rows[rng.integers(len(rows))].astype(np.float64)
            a[c], b[c] = a[c] - row / np.abs(row).max() / 2, a[c] + row / np.abs(row).max() / 2
        elif kinds[c] == 3:
            a[c], b[c] = np.round(a[c]), np.round(b[c])
    return np.round(np.clip(a, 0, 1) * GRID) / GRID, np.round(np.clip(b, 0, 1) * GRID) / GRID, which


def _confirmed(
    energy: Callable[..., Array],
    magnitude: Callable[[Array, Array], float],
    value: Value | None,
    x: Array,
    p: Array,
    q: Array,
    shape: tuple[int, ...],
    eps: float,
) -> Witness | None:
    """The segment as a witness, if it violates in the graph's own arithmetic and in float64 alike.

    Large numbers that cancel within f leave more rounding than f's own size tells. But that is of either sign, so its
    mean over `MOVED` places nearby is near zero. An excess above the root of eps, relative to all that f is computed
    from, is believed at once: there it may be a jump, which a move can step over.
    """
    ends = np.stack([p, q, (p + q) / 2])
    # Up to 1/16 of the segment, in multiples of 2^-16: midpoints stay exact in float32.
    reach = float(np.abs(q - p).max()) / 16
    moves = np.round(np.random.default_rng(0).uniform(-reach, reach, (MOVED, 1, p.size)) * 2.0**16) / 2.0**16
    moves[0] = 0.0
    y = (ends + moves).astype(p.dtype).reshape(3 * MOVED, *shape)
    xs = np.repeat(x[None], 3 * MOVED, 0)
    with np.errstate(all="ignore"):
        own = np.asarray((value or energy)(xs, y)).astype(np.float64).reshape(MOVED, 3)
        try:
            exact = energy(xs, y, float64=True).astype(np.float64).reshape(MOVED, 3)
            largest = magnitude(xs[:3], y[:3])
        except Unsupported:
            exact, largest = own, np.inf
        scale = max(1.0, float(np.abs(own[0]).max()), float(np.abs(exact[0]).max()))
        excess = np.array([f[:, 2] - (f[:, 0] + f[:, 1]) / 2 for f in (own, exact)])  # [2, MOVED]
    seen, rounding = float(excess[:, 0].min()), ROUNDING * eps * scale
    if not np.isfinite(excess[:, 0]).all() or not seen > rounding:
        return None
    far = seen > math.sqrt(np.finfo(np.float64).eps) * max(scale, largest)
    if not far and not np.clip(excess[1], -seen, seen).mean() >= seen / 2:
        return None
    if x.size + 2 * p.size > MAX_WITNESS:
        return Witness((), (), (), seen, rounding)
    return Witness(_nested(x.tolist()), _nested(y[0].tolist()), _nested(y[1].tolist()), seen, rounding)


def _nested(value: Any) -> Any:
    return tuple(_nested(v) for v in value) if isinstance(value, list | tuple) else value
