"""Is f convex in y? Asked of value.onnx and the weights themselves, answered before anything is solved.

    proven      the rules of `rules`, applied to the graph operator by operator, show that f(x, ·) is convex on all
                of R^n, for every x, with these weights; in real arithmetic, and at joints of pieces up to the rounding
                of the graph's own dtype (see `univariate`)
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
from types import MappingProxyType
from typing import Any, Final, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from icnnrt import arguments
from icnnrt.convexity.bounds import lipschitz, strong_convexity
from icnnrt.convexity.memory import Unsupported, again, call_bounded
from icnnrt.convexity.rests_on import Grounds, RepeatedProof
from icnnrt.convexity.rests_on import grounds as find_grounds
from icnnrt.convexity.samples import Stop
from icnnrt.convexity.segments import Value, search
from icnnrt.convexity.walk import Walk
from icnnrt.errors import PackageError
from icnnrt.format.onnx_graph import Graph, read_graph
from icnnrt.format.signs import Sign
from icnnrt.format.verdict import Convexity, box_of
from icnnrt.printable import show

Array: TypeAlias = NDArray[Any]

OPSETS: Final = (18, 26)  # older ones keep bounds and axes elsewhere


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
    arguments.instance(graph_bytes, "graph_bytes", bytes, "the bytes of an ONNX file")
    if not isinstance(weights, Mapping) or not all(isinstance(array, np.ndarray) for array in weights.values()):
        expected = "numpy arrays by name, as Package.weights has them"
        raise arguments.refused("weights", expected, arguments.shown(weights))
    seed = arguments.integer(seed, "seed", 0)
    try:
        box = box_of(list(box), "box")
    except Exception as error:
        raise arguments.refused("box", "a low number and a higher one", show(box)) from error
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
    witness, evidence = search(graph, weights, value, x_samples, np.random.default_rng(seed), box)
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
            blame = set().union(*(names for names, *_ in walk.broken.values()))
            raise Stop(culprit, walk.why(culprit, name) if culprit else "f is not made by any operator", blame)
        least = (", ".join(sorted(walk.least[1])), walk.least[0]) if walk.least else None
        strong, bound = (_or_none(figure, walk) for figure in (strong_convexity, lipschitz))
        return Convexity("proven", min_weight=least, strong_convexity=strong, lipschitz=bound)


def _or_none(figure: Callable[[Walk], float | None], walk: Walk) -> float | None:
    """A figure that a proof can do without; one that is infinite, as slopes of y/x are, says nothing."""
    try:
        found = figure(walk)
    except Exception:
        return None
    return found if found is not None and math.isfinite(found) else None
