"""What a proof of convexity needs of the weights: of some a sign, of others their very values, of most nothing at all.

The proof is repeated with each trainable weight not as the number it is, but as any number of a half-line or of the
whole line. Where that succeeds, the proof holds for every weight in these half-lines: whoever keeps to them, by
projection, keeps f convex. Where it does not, some weights stay the numbers they are, and the proof is to be repeated
when they change: a positive semidefinite product, a difference, a slope below 1.

    S <- {}                                       no weight has to have a sign
    repeat  walk with weights in S                (rules of `walk`, intervals instead of numbers)
            a factor of unknown sign that scales what bends: its sign is demanded, and traced back to the weights that
            it is made of;  S <- S and what is demanded, if the weights of now have that sign
    until   proven, or nothing new is demanded

Weights must not make an operator infinite for every x, as a divisor of 0 does. A half-line holds its end, so an operand
that is where its operator is finite with the numbers of now has to stay there with all others; and where x alone may
lead it outside, it has to be inside with 0 in the place of the weights. So those that a divisor is made of mostly stay
numbers.

Which sign, tells the walk with the numbers, in which every value was convex, concave or affine. Nothing depends on the
tracing being right: what it found is believed only if the walk with it succeeds.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from icnnrt.convexity import rules
from icnnrt.convexity.onnx_numpy import run
from icnnrt.convexity.quadratic import MOVERS
from icnnrt.convexity.rules import AFFINE, CONCAVE, CONVEX, FREE, Fact
from icnnrt.convexity.samples import Stop
from icnnrt.convexity.walk import Pole, Walk
from icnnrt.convexity.weighing import WEIGHED
from icnnrt.format.onnx_graph import Graph, Node
from icnnrt.format.signs import NONNEGATIVE, NONPOSITIVE, Sign

Bits = NDArray[np.uint8]
Array = NDArray[Any]

ROUNDS: Final = 64  # far more than a network has layers that demand something new
PROBES: Final = ((2, 3), (3, 2))  # sizes of the batches that a proof is walked with
BOTH: Final = NONNEGATIVE | NONPOSITIVE
# Functions of one number that have its sign.
ODD_FUNCTIONS: Final = frozenset(("Identity", "Cast", "Tanh", "Erf", "Sign", "Sinh", "Asinh", "Atan"))


@dataclass(frozen=True)
class Grounds:
    """What a proof needs of the trainable weights, by their names."""

    signs: Mapping[str, Sign]
    values: tuple[str, ...]
    """Weights that have to be what they are; the proof is to be repeated when one of them changes."""


def grounds(
    graph: Graph, weights: Mapping[str, Array], trainable: Collection[str], given: Mapping[str, Sign]
) -> Grounds | None:
    """What the proof that f is convex needs of the trainable weights; None where there is no proof.

    `given` are signs that the weights have anyway, whether or not the proof needs them.
    """
    free = [name for name in trainable if name in graph.initializers and graph.initializers[name].dtype.kind == "f"]
    proof = _Proof.of(graph, weights or graph.initializers)
    if proof is None:
        return None
    bits = {name: np.zeros(graph.initializers[name].shape, np.uint8) for name in free}
    for name, sign in given.items():
        if name in bits:
            bits[name] |= sign.bits(bits[name].shape)
    values: set[str] = set()
    while True:
        blocking = _demanded(proof, bits, values)
        if blocking is None:
            break
        # Where it is not known what blocks the way, every weight stays as it is.
        values |= blocking if blocking - values else set(free)
    for name in sorted(values):  # what stood beside what really blocks the way need not stay as it is
        for sign_of_now in (np.uint8(0), _sign_of(graph.initializers[name])):
            tried = {**bits, name: bits[name] | sign_of_now}
            if proof.holds(_loose(tried, values - {name})):
                bits = tried
                values.remove(name)
                break
    signs = {name: sign for name, sign in given.items() if name in bits}
    for name in free:
        if name not in values:
            try:
                found = Sign.of(bits[name])
            except ValueError:  # a pattern that a manifest has no room for
                values.add(name)
            else:
                signs |= {} if found is None else {name: found}
    return Grounds(signs, tuple(name for name in free if name in values))


class _Proof:
    """The proof with the numbers of now, and with other weights in their place."""

    def __init__(self, graph: Graph, names: Collection[str], exact: Sequence[Walk]) -> None:
        self.graph = graph
        self.names = names
        self.exact = exact[0]
        self._apart = [walk.finite for walk in exact]

    @classmethod
    def of(cls, graph: Graph, names: Collection[str]) -> "_Proof | None":
        exact = [Walk(graph, names, *probe) for probe in PROBES]
        return cls(graph, names, exact) if all(map(_succeeds, exact)) else None

    def holds(self, loose: Mapping[str, Fact]) -> bool:
        return self.pole(loose) is None and all(
            _succeeds(Walk(self.graph, self.names, *probe, loose, apart))
            for probe, apart in zip(PROBES, self._apart, strict=True)
        )

    def pole(self, loose: Collection[str]) -> Pole | None:
        """Where an operator is not finite with 0 in the place of these weights."""
        return _pole(self.exact, {name: np.zeros_like(self.graph.initializers[name]) for name in loose})


def _pole(walk: Walk, changed: Mapping[str, Array]) -> Pole | None:
    """Where an operator is not finite with these numbers, of a walk that has been run; whether f is convex is not
    asked."""
    try:
        walk.copied().again(changed)
    except Pole as pole:
        return pole
    except Stop:
        pass
    return None


def _succeeds(walk: Walk) -> bool:
    try:
        f = walk.run()
    except Stop:
        return False
    return f.shape == (walk.batch,) and bool(f.has(CONVEX).all())


def _demanded(proof: _Proof, bits: dict[str, Bits], values: set[str]) -> set[str] | None:
    """Add to `bits` what the proof demands with the weights in `values` as they are; None once it succeeds, else
    weights that stand in its way."""
    for _ in range(ROUNDS):
        loose = _loose(bits, values)
        if (pole := proof.pole(loose)) is not None:
            return set(pole.blame) & loose.keys()
        walk = _Demands(proof, loose)
        try:
            f = walk.run()
        except Stop as stop:
            return _blocking(walk, stop.node, loose)
        if f.has(CONVEX).all() and proof.holds(loose):
            return None
        if not _add(bits, walk.demands, proof.graph.initializers):
            break
    # What bends and has no sign may be more than a factor: the sign of a square's argument, say.
    node, _ = walk.culprit()
    near = _blocking(walk, node, loose)
    before = {one: bits[one].copy() for one in near}
    for one in near:
        bits[one] |= _sign_of(proof.graph.initializers[one])
    if proof.holds(_loose(bits, values)):
        for one in near:  # those that are not needed after all
            kept, bits[one] = bits[one], before[one]
            if not proof.holds(_loose(bits, values)):
                bits[one] = kept
        return None
    bits.update(before)
    return near


def _blocking(walk: Walk, node: Node | None, loose: Mapping[str, Fact]) -> set[str]:
    """The loose weights that what a node reads is made of; all that f is made of, where that is none."""
    read = [name for name in node.inputs if name] if node else []
    found = set().union(*(walk.origins.get(name, frozenset()) for name in read)) & loose.keys()
    return found or {name for name in loose if any(name in one for one in walk.origins.values())}


def _loose(bits: Mapping[str, Bits], values: Collection[str]) -> dict[str, Fact]:
    return {
        name: rules.fact(
            np.where(b & NONNEGATIVE, 0.0, -np.inf), np.where(b & NONPOSITIVE, 0.0, np.inf), np.full(b.shape, FREE)
        )
        for name, b in bits.items()
        if name not in values
    }


def _sign_of(array: Array) -> np.uint8:
    """The sign that all entries have."""
    return np.uint8(NONNEGATIVE if (array >= 0).all() else NONPOSITIVE if (array <= 0).all() else 0)


def _add(bits: dict[str, Bits], demands: Mapping[str, Bits], now: Mapping[str, Array]) -> bool:
    """Add demands that the weights of now meet; whether any was new."""
    new = False
    for name, demanded in demands.items():
        array = now[name]
        met = np.where((demanded & NONNEGATIVE != 0) & (array >= 0), NONNEGATIVE, 0) | np.where(
            (demanded & NONPOSITIVE != 0) & (array <= 0), NONPOSITIVE, 0
        )
        fresh = met.astype(np.uint8) & ~bits[name]
        if fresh.any():
            bits[name] |= fresh
            new = True
    return new


class _Demands(Walk):
    """A walk with weights in intervals, which notes the signs that would have to be known: `demands`, by weight."""

    def __init__(self, proof: _Proof, loose: Mapping[str, Fact]) -> None:
        super().__init__(proof.graph, proof.names, *PROBES[0], loose, proof.exact.finite)
        self.exact = proof.exact
        self.loose = loose
        self.demands: dict[str, Bits] = {}

    def weigh(self, node: Node) -> None:
        """Of a factor that is free of y, entries of unknown sign that scale what is not affine."""
        output = node.outputs[0]
        wanted = self.exact.fact(output).code
        for here, there in ((0, 1), (1, 0)):
            factor, other = node.inputs[here], node.inputs[there]
            if not self.origins.get(factor, frozenset()) & self.loose.keys() or factor in self.known:
                continue
            if not self.fact(factor).free.all() or self.fact(other).free.all():
                continue
            bends = self.bends(other)
            ids = np.arange(self.values[factor].size).reshape(self.values[factor].shape)
            demanded = np.zeros(ids.size, np.uint8)
            for way, mark in ((CONVEX, NONNEGATIVE), (CONCAVE, NONPOSITIVE)):
                for result, flip in ((CONVEX, False), (CONCAVE, True)):
                    met = WEIGHED[node.op_type](node, ids, bends == way, (wanted & AFFINE) == result, here)
                    demanded[met] |= BOTH ^ mark if flip else mark
                # What is affine with the numbers of now is neither, and may become what its neighbours are: convex.
                met = WEIGHED[node.op_type](node, ids, bends == way, (wanted & AFFINE) == AFFINE, here)
                demanded[met] |= mark
            self.trace(factor, demanded.reshape(ids.shape))

    def bends(self, name: str) -> NDArray[Any]:
        """CONVEX or CONCAVE, where an entry is that and no more; 0 where it is affine.

        What the walk has lost is what it is with the numbers of now: affine there, it becomes convex.
        """
        found = self.fact(name).code & AFFINE
        told = self.exact.fact(name).code & AFFINE
        lost = np.where(told == AFFINE, CONVEX, told)
        return np.where(found == AFFINE, 0, np.where(found == 0, lost, found))

    def trace(self, name: str, demanded: Bits) -> None:
        """Demand signs of a value that is made of weights: of the weights, where that is the same."""
        waiting = [(name, demanded)]
        while waiting:
            name, demanded = waiting.pop()
            f = self.fact(name)
            demanded = np.where(f.lo >= 0, demanded & ~np.uint8(NONNEGATIVE), demanded)
            demanded = np.where(f.hi <= 0, demanded & ~np.uint8(NONPOSITIVE), demanded).astype(np.uint8)
            if not demanded.any():
                continue
            if name in self.loose:
                self.demands[name] = self.demands.get(name, np.zeros(demanded.shape, np.uint8)) | demanded
            elif name in self.makers:
                waiting += self.through(self.makers[name], name, demanded)

    def through(self, node: Node, output: str, demanded: Bits) -> Iterator[tuple[str, Bits]]:
        """What the inputs of a node have to be for its output to have these signs."""
        op, inputs = node.op_type, node.inputs
        if op in ODD_FUNCTIONS:
            yield inputs[0], demanded
        elif op == "Neg":
            yield inputs[0], rules.swapped(demanded)
        elif op in MOVERS or op == "Concat":
            yield from self.moved(node, output, demanded)
        elif op in ("Mul", "Div"):
            for one, other in ((inputs[0], inputs[1]), (inputs[1], inputs[0])):
                sign = self.fact(other)
                for known, bits in ((sign.lo >= 0, demanded), (sign.hi <= 0, rules.swapped(demanded))):
                    yield one, self.gathered(np.where(known, bits, 0), one)
        elif op in ("Add", "Sum", "Sub"):
            for i, one in enumerate(inputs):
                bits = rules.swapped(demanded) if op == "Sub" and i else demanded
                yield one, self.gathered(bits, one)
        elif op in ("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin"):
            shape = self.values[inputs[0]].shape
            ones = [self.values[one] if one else None for one in inputs]
            kept = run(node, [np.ones(shape), *ones[1:]])[0].shape
            if len(kept) == len(shape):
                yield inputs[0], np.broadcast_to(demanded.reshape(kept), shape)

    def gathered(self, bits: Array, name: str) -> Bits:
        return rules.gathered(np.bitwise_or, np.asarray(bits, np.uint8), self.values[name].shape)

    def moved(self, node: Node, output: str, demanded: Bits) -> Iterator[tuple[str, Bits]]:
        """Entries go to other places and stay the same: numbered, they tell where they came from."""
        at = list(node.outputs).index(output)
        movable = range(len(node.inputs)) if node.op_type == "Concat" else range(1)
        for i in movable:
            sizes = self.values[node.inputs[i]].size
            numbered = [
                np.arange(sizes).reshape(self.values[one].shape)
                if k == i
                else np.full(self.values[one].shape, -1)
                if k in movable
                else self.values[one]
                for k, one in enumerate(node.inputs)
                if one
            ]
            places = run(node, numbered)[at].reshape(-1)
            bits = np.zeros(sizes, np.uint8)
            mine = places >= 0
            np.bitwise_or.at(bits, places[mine], demanded.reshape(-1)[mine])
            yield node.inputs[i], bits.reshape(self.values[node.inputs[i]].shape)


class RepeatedProof:
    """The proof again for other values of the weights that it needs; of the rest it needs no more than their signs.

    Only what depends on those weights is walked through again.
    """

    def __init__(self, graph: Graph, weights: Mapping[str, Array], found: Grounds, trainable: Collection[str]) -> None:
        free = {name for name in trainable if name in graph.initializers and name not in found.values}
        bits = {
            name: found.signs[name].bits(graph.initializers[name].shape)
            if name in found.signs
            else np.zeros(graph.initializers[name].shape, np.uint8)
            for name in free
            if graph.initializers[name].dtype.kind == "f"
        }
        self.values = found.values
        self._walks = [Walk(graph, weights or graph.initializers, *probe, _loose(bits, ())) for probe in PROBES]
        self._never = ""
        for walk in self._walks:
            try:
                walk.run()
                walk.apart = dict(walk.finite)  # and so they stay
            except Stop as stop:
                self._never = stop.why
        self._ends: Walk | None = None
        self._zeros = {name: np.zeros_like(graph.initializers[name]) for name in bits}
        first = self._walks[0]
        if any(first.origins[name] and not inside.all() for name, inside in first.finite.items()):
            self._ends = Walk(graph, weights or graph.initializers, *PROBES[0])
            try:
                self._ends.run()
            except Stop as stop:
                self._never = stop.why

    def failure(self, weights: Mapping[str, Array]) -> str:
        """Why f is not proven convex with these values of all weights that the proof needs the values of; empty if it
        is."""
        if self._never:
            return self._never
        new = {name: weights[name] for name in self.values}
        if self._ends is not None and (pole := _pole(self._ends, {**self._zeros, **new})) is not None:
            return pole.why
        for first in self._walks:
            walk = first.copied()  # so that nothing is left of weights that are refused, and threads do not meet
            try:
                f = walk.again(new)
            except Stop as stop:
                return stop.why
            if not f.has(CONVEX).all():
                node, name = walk.culprit()
                return walk.why(node, name) if node else "f is not made by any operator"
        return ""
