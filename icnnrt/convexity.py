"""Is f convex in y? Asked of value.onnx and the weights themselves, answered before anything is solved.

    proven      the rules of `_curvature`, applied to the graph operator by operator, show that f(x, ·) is convex on all
                of R^n, for every x, with these weights; in real arithmetic, and at joints of pieces up to the rounding
                of the graph's own dtype (see `_univariate`)
    violated    an x and two points y_a, y_b are shown where f at their midpoint exceeds the mean of f at the two by
                more than rounding, in the graph's own arithmetic and in float64: by far, or about as much wherever the
                segment is moved a little, as rounding, which large numbers that cancel can make of any size, changes
                sign there
    unknown     neither: the rules stop at a node that is named, and no violation was found among the segments tried,
                which lie where the evidence says, [0, 1]^n by default

Nothing is ever proven by sampling. onnxruntime may fuse operators; that changes rounding, not the function.
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any, Final, Literal, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from icnnrt import _arguments
from icnnrt._arguments import batch
from icnnrt._convexity_bounds import lipschitz, strong_convexity
from icnnrt._convexity_grounds import Grounds, RepeatedProof
from icnnrt._convexity_grounds import grounds as find_grounds
from icnnrt._convexity_rules import Stop, Walk
from icnnrt._fields import JsonObject, exactly, integer, listing, named, positive, real, show, surrogate, text, wrong
from icnnrt._onnx_graph import Graph, ancestors, read_graph
from icnnrt._onnx_numpy import Unsupported, again, call_bounded, evaluate
from icnnrt._printable import cropped
from icnnrt.certificate import ROUNDING
from icnnrt.errors import InputError, PackageError
from icnnrt.signs import Sign

Array: TypeAlias = NDArray[Any]
Value: TypeAlias = Callable[[Array, Array], Array]  # (x [B, ...], y [B, n]) -> f [B]

OPSETS: Final = (18, 26)  # older ones keep bounds and axes elsewhere
POINTS: Final = 16  # parts of a chord
CHORDS: Final = 192  # in one round, unless they hold more than so many numbers
LEAST_CHORDS: Final = 8
MAX_NUMBERS: Final = 1 << 27
ROUNDS: Final = 6
MAX_BLAME: Final = 1 << 16
MAX_WITNESS: Final = 1 << 13  # some 300 kB of JSON
MAX_REASON: Final = 2000  # characters of it in a sentence
MAX_NAMED: Final = 64  # weights in a sentence
MAX_X: Final = 16  # samples of x that are tried
MOVED: Final = 256  # times that a segment is moved before it is believed
GRID: Final = 64.0  # ends of chords are multiples of 1/64, so that midpoints are exact in float32


@dataclass(frozen=True)
class Witness:
    """f(x, (y_a + y_b) / 2) − (f(x, y_a) + f(x, y_b)) / 2 = excess > rounding.

    Points of more than `MAX_WITNESS` numbers together are left out, (), as a manifest has no room for them.
    """

    x: tuple[Any, ...]  # nested, in the shape of one sample
    y_a: tuple[Any, ...]
    y_b: tuple[Any, ...]
    excess: float
    rounding: float


@dataclass(frozen=True)
class Evidence:
    """What sampling saw where nothing was proven, and where it looked.

    Attributes:
        segments: how many were tried.
        excess: the worst, relative to max(1, |f|).
        box: all segments lie in [box[0], box[1]]^n; what f does elsewhere was not asked.
        contexts: for how many samples of x.
    """

    segments: int
    excess: float
    box: tuple[float, float]
    contexts: int

    def region(self) -> str:
        """Where the segments lie, in words."""
        x = "x" if self.contexts == 1 else f"{self.contexts} samples of x"
        return f"y in [{self.box[0]:g}, {self.box[1]:g}]^n and {x}"


@dataclass(frozen=True)
class Convexity:
    """The verdict on one energy with one set of weights.

    Attributes:
        verdict: "proven", "violated" or "unknown".
        reason: why not proven; empty if it is.
        node: (operator, name of what it makes) where the rules stopped.
        blame: names of the weights whose sign broke a rule.
        witness: of a violation.
        min_weight: (names, number): the smallest entry, as the graph uses it, of all that had to be >= 0.
        strong_convexity: mu > 0 such that f − (mu/2)‖y‖² is convex for every x, where quadratic terms give one.
        lipschitz: a bound on |f(x, y) − f(x, y')| / ‖y − y'‖₂ that holds for every x, where weights alone give one.
        evidence: of sampling, where nothing was proven.
        rests_on: names of the weights whose very values the proof needs; of the others it needs no more than the signs
            that the manifest gives them, so it holds for all weights with these signs. None where nobody has looked.
    """

    verdict: Literal["proven", "violated", "unknown"]
    reason: str = ""
    node: tuple[str, str] | None = None
    blame: tuple[str, ...] = ()
    witness: Witness | None = None
    min_weight: tuple[str, float] | None = None
    strong_convexity: float | None = None
    lipschitz: float | None = None
    evidence: Evidence | None = None
    rests_on: tuple[str, ...] | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists, texts and numbers."""
        plain: dict[str, Any] = _plain(asdict(self))
        return plain

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Convexity":
        """What `to_json` gave, checked key by key; raises `PackageError`."""
        fields = JsonObject(dict(value) if isinstance(value, Mapping) else value, "convexity.")
        result = cls(
            verdict=fields.take("verdict", exactly("proven", "violated", "unknown")),
            reason=fields.take("reason", _sentence),
            node=fields.take("node", _optional(_node)),
            blame=fields.take("blame", listing(text, MAX_BLAME)),
            witness=fields.take("witness", _optional(_witness)),
            min_weight=fields.take("min_weight", _optional(_weight)),
            strong_convexity=fields.take("strong_convexity", _optional(positive)),
            lipschitz=fields.take("lipschitz", _optional(real)),
            evidence=fields.take("evidence", _optional(_evidence)),
            rests_on=fields.take("rests_on", _optional(listing(text, MAX_BLAME))),
        )
        fields.close()
        if (result.verdict == "violated") != (result.witness is not None):
            wrong("convexity.witness", "one of a violation, and else null", value["witness"])
        return result

    def sentence(self) -> str:
        """The verdict in one sentence."""
        place = f" at {named(self.node[0])} {show(self.node[1])}" if self.node else ""
        more = f" and {len(self.blame) - MAX_NAMED} more" if len(self.blame) > MAX_NAMED else ""
        names = ", ".join(map(named, self.blame[:MAX_NAMED])) + more
        blame = f"; weights to look at: {names}" if self.blame else ""
        if self.verdict == "proven":
            least = (
                f"; the smallest weight that must be >= 0 is {self.min_weight[1] + 0.0:.3g}" if self.min_weight else ""
            )
            return f"f is proven convex in y{least}."
        if self.verdict == "violated":
            assert self.witness is not None
            where = f" (tried: {self.evidence.region()})" if self.evidence else ""
            return (
                f"f is not convex in y: between two points it lies {self.witness.excess:.3g} above its chord, "
                f"where rounding allows {self.witness.rounding:.1g}{where}{blame}."
            )
        seen = ""
        if self.evidence:
            tried = f"{self.evidence.segments} segments with {self.evidence.region()}"
            seen = f", though none of {tried} showed that it is not"
        # What icnnrt writes there is one line; what anybody wrote into a manifest may look like several.
        one_line = self.reason.isprintable() and "  " not in self.reason
        reason = cropped(self.reason, MAX_REASON) if one_line else show(self.reason)
        return f"f is not proven convex in y{place}: {reason}{seen}{blame}."


class Repeated:
    """The proof again and again while weights change: of those that `found` needs the values of, for each new ones; of
    the others it needs no more than their signs, which are not looked at.

    Only what depends on the former is walked through again. Raises `PackageError` as `prove` does.
    """

    def __init__(
        self, graph_bytes: bytes, weights: Mapping[str, Array], found: Grounds, trainable: Collection[str]
    ) -> None:
        graph = read_graph(graph_bytes, weights)
        self._given = (*graph.initializers.values(), *weights.values())
        self._proof = call_bounded(self._given, RepeatedProof, graph, weights, found, trainable)

    def failure(self, weights: Mapping[str, Array]) -> str:
        """Why f is not proven convex with these values of the weights that the proof needs the values of, all of them;
        empty if it is."""
        return call_bounded(self._given, self._proof.failure, weights)


def grounds(
    graph_bytes: bytes,
    weights: Mapping[str, Array],
    trainable: Collection[str],
    given: Mapping[str, Sign] = MappingProxyType({}),
) -> Grounds | None:
    """What a proof that f is convex needs of the trainable weights: signs of some, of others their very values.

    The proof holds for every network whose weights have these signs and agree in the weights of which it needs the
    values. `given` are signs that weights have anyway; they are among those returned. None where there is no proof.
    Raises `PackageError` as `prove` does.
    """
    graph = read_graph(graph_bytes, weights)
    if _foreign(graph):
        return None
    held = (*graph.initializers.values(), *weights.values())
    return call_bounded(held, find_grounds, graph, weights, trainable, given)


def prove(
    graph_bytes: bytes,
    weights: Mapping[str, Array],
    *,
    value: Value | None = None,
    x_samples: object = None,
    seed: int = 0,
    box: tuple[float, float] = (0.0, 1.0),
) -> Convexity:
    """The verdict on f(x, ·) of a value graph: inputs x and y, an output f [B], initialisers by the names of `weights`.

    Args:
        graph_bytes, weights: `Package.graphs["value"]` and `Package.weights`.
        value: f as onnxruntime computes it, asked for segments where the rules do not reach; by default numpy's f.
        x_samples: [B, ...], contexts to try; random normal ones by default.
        seed: of the segments tried.
        box: where y is tried; a proof holds on all of R^n.

    Raises:
        PackageError: the bytes are not a well-formed graph, or do not fit the weights. InputError: other arguments.
    """
    if not isinstance(graph_bytes, bytes):
        raise InputError(f"graph_bytes: expected the bytes of an ONNX file, but got {type(graph_bytes).__name__}.")
    if not isinstance(weights, Mapping) or not all(isinstance(array, np.ndarray) for array in weights.values()):
        raise InputError("weights: expected numpy arrays by name, as Package.weights has them, but got something else.")
    seed = _arguments.integer(seed, "seed", 0)
    try:
        box = _box(list(box), "box")
    except Exception as error:
        raise InputError(f"box: expected a low number and a higher one, but got {show(box)}.") from error
    graph = read_graph(graph_bytes, weights)
    if "f" not in graph.outputs:
        raise PackageError(
            f"value.onnx: expected an output f, but the outputs are {show(list(graph.outputs))}; export it again."
        )
    held = (*graph.initializers.values(), *weights.values())
    return call_bounded(held, _prove, graph, weights, value, x_samples, seed, box)


def _foreign(graph: Graph) -> str:
    """Why nothing can be proven of a graph, whatever its nodes are; empty if that is not so."""
    if graph.functions:
        return "the model brings functions of its own"
    if not OPSETS[0] <= graph.opset <= OPSETS[1]:
        return f"opset {graph.opset} is none of {OPSETS[0]} to {OPSETS[1]}, whose operators are known here"
    return ""


def _prove(
    graph: Graph,
    weights: Mapping[str, Array],
    value: Value | None,
    x_samples: object,
    seed: int,
    box: tuple[float, float],
) -> Convexity:
    node: tuple[str, str] | None = None
    blame: tuple[str, ...] = ()
    least: tuple[str, float] | None = None
    found = Convexity("unknown")
    try:
        if foreign := _foreign(graph):
            raise Stop(None, foreign)
        for samples, other in ((2, 3), (3, 2)):
            found = _walked(graph, weights, samples, other)
            least = found.min_weight or least
        return found
    except Stop as stop:
        blame = stop.blame
        if stop.node is not None:
            node = (stop.node.op_type[:80], (stop.node.outputs or ("",))[0][:200])
        reason = stop.why
    except Unsupported as error:
        reason = str(error)
    witness, evidence = _search(graph, weights, value, x_samples, np.random.default_rng(seed), box)
    verdict: Literal["violated", "unknown"] = "unknown" if witness is None else "violated"
    return Convexity(verdict, reason, node, blame, witness, least, evidence=evidence)


def _walked(graph: Graph, weights: Mapping[str, Array], samples: int, other: int) -> Convexity:
    """The proof by one walk, or `Stop`; what the walk has kept goes with it."""
    with again():
        walk = Walk(graph, weights or graph.initializers, samples, other)
        f = walk.run()
        if f.shape != (samples,):
            raise Stop(None, f"f has the shape {list(f.shape)} for {samples} samples")
        if not f.has(1).all():
            culprit, name = walk.culprit()
            blame = tuple(sorted(set().union(*(names for names, *_ in walk.broken.values()))))
            raise Stop(culprit, walk.why(culprit, name) if culprit else "f is not made by any operator", blame)
        least = (", ".join(sorted(walk.least[1])), walk.least[0]) if walk.least else None
        strong, bound = (_or_none(figure, walk) for figure in (strong_convexity, lipschitz))
        return Convexity("proven", min_weight=least, strong_convexity=strong, lipschitz=bound)


def _or_none(figure: Callable[[Walk], float | None], walk: Walk) -> float | None:
    """A figure that a proof can do without."""
    try:
        return figure(walk)
    except Exception:
        return None


# --- Segments ------------------------------------------------------------------------------------


def _search(
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
    if y_input is None or y_input.dtype is None or y_input.dtype.kind != "f" or not y_input.shape:
        return None, None
    shape, dtype = tuple(s or 1 for s in y_input.shape[1:]), y_input.dtype
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

    x_shape = tuple(s or 1 for s in x_input.shape[1:]) if x_input and x_input.shape else (1,)
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


# --- From JSON -----------------------------------------------------------------------------------

_T = TypeVar("_T")


def _optional(check: Callable[[object, str], _T]) -> Callable[[object, str], _T | None]:
    return lambda value, place: None if value is None else check(value, place)


def _sentence(value: object, place: str) -> str:
    """Of any length that a manifest has room for; it may name many weights."""
    if not isinstance(value, str) or surrogate(value):
        wrong(place, "text", value)
    return value


def _pair(value: object, place: str) -> list[object]:
    if not isinstance(value, list | tuple) or len(value) != 2:
        wrong(place, "a list of two", value)
    return list(value)


def _node(value: object, place: str) -> tuple[str, str]:
    operator, output = _pair(value, place)
    return text(operator, place), _sentence(output, place)


def _box(value: object, place: str) -> tuple[float, float]:
    low, high = _pair(value, place)
    box = real(low, f"{place}[0]"), real(high, f"{place}[1]")
    if not box[0] < box[1]:
        wrong(place, "a low number and a higher one", value)
    return box


def _weight(value: object, place: str) -> tuple[str, float]:
    names, least = _pair(value, place)
    return _sentence(names, place), real(least, place)


def _numbers(value: object, place: str, depth: int = 8) -> tuple[Any, ...]:
    """Lists of numbers, nested as deeply as a shape may be long, as tuples."""
    if not isinstance(value, list) or not depth:
        wrong(place, "a list of numbers", value)
    return tuple(_numbers(v, place, depth - 1) if isinstance(v, list) else real(v, place) for v in value)


def _witness(value: object, place: str) -> Witness:
    fields = JsonObject(value, f"{place}.")
    x, y_a, y_b = (fields.take(name, _numbers) for name in ("x", "y_a", "y_b"))
    witness = Witness(x, y_a, y_b, fields.take("excess", positive), fields.take("rounding", positive))
    fields.close()
    return witness


def _evidence(value: object, place: str) -> Evidence:
    fields = JsonObject(value, f"{place}.")
    evidence = Evidence(
        fields.take("segments", integer(0, 1 << 62)),
        fields.take("excess", real),
        fields.take("box", _box),
        fields.take("contexts", integer(1, MAX_X)),
    )
    fields.close()
    return evidence


def _nested(value: Any) -> Any:
    return tuple(_nested(v) for v in value) if isinstance(value, list | tuple) else value


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value
