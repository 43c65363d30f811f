"""What is known of f's convexity, and keeping it while weights change: what the package was proven with holds of
every later set.

Signs are kept by projection, which costs next to nothing. Where the proof rests on more than signs, a positive
semidefinite product or a slope below 1, it is repeated for new values of the weights in question, and they are refused
if it fails. Of an energy that was never proven convex there is nothing to keep but the signs that somebody asked for.
"""

import functools
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from icnnrt.format.manifest import Manifest
from icnnrt.format.signs import Sign
from icnnrt.format.verdict import Convexity
from icnnrt.limits import call
from icnnrt.mathematics.status import RESTS_ON_CONVEXITY, Status
from icnnrt.printable import named
from icnnrt.serving.runner import Runner
from icnnrt.serving.weight_sets import WeightSet

Weights = Mapping[str, NDArray[Any]]


class KeptConvex:
    """What new values of some weights, `moved`, have to be.

    The manifest says it of a package that was exported as proven; one of format 1 is looked at, which takes as long as
    the proof.
    """

    def __init__(self, manifest: Manifest, graphs: Mapping[str, bytes], weights: Weights, moved: Collection[str]):
        given, trainable = manifest.weights.signs, manifest.weights.trainable
        self.signs: Mapping[str, Sign] = {name: sign for name, sign in given.items() if name in moved}
        self.values: tuple[str, ...] = ()
        """Those of the weights whose very values the proof rests on."""
        self.proven = False
        """Whether f is proven convex with all weights that `fault` finds nothing wrong with."""
        self._proof: Any = None
        verdict = manifest.convexity
        if verdict is None or verdict.verdict != "proven":
            return
        if verdict.rests_on == ():
            self.proven = True
            return
        # The prover, which whoever does not change weights, or only within signs, does not need.
        from icnnrt.convexity import Grounds, Repeated, grounds

        if verdict.rests_on is None:
            found = grounds(graphs["value"], weights, trainable, given)
        else:
            found = Grounds(given, verdict.rests_on)
        if found is None:  # the weights of now are not those of the verdict
            return
        self.proven = True
        self.signs = {name: sign for name, sign in found.signs.items() if name in moved}
        self.values = tuple(name for name in found.values if name in moved)
        if found.values:
            self._proof = Repeated(graphs["value"], weights, found, trainable)
            self.proven = not self._proof.failure(weights)

    def project(self, weights: dict[str, NDArray[Any]]) -> None:
        """Put the nearest weights with the signs that they need in the place of those that lack them."""
        for name, sign in self.signs.items():
            if name in weights:
                weights[name] = sign.project(weights[name])

    def fault(self, new: Weights, present: Weights) -> str:
        """Why f would no longer be known to be convex with new weights in the place of some of the present ones;
        empty if it is as it was."""
        return self.sign_fault(new) or self.lost_proof(new, present)

    def sign_fault(self, new: Weights) -> str:
        """Which of the new weights has not the sign that it needs; empty if all have."""
        for name, sign in self.signs.items():
            if name in new and (fault := sign.fault(new[name])):
                return f"{named(name)} should be {fault}"
        return ""

    def lost_proof(self, new: Weights, present: Weights) -> str:
        """Why the proof fails with these values of the weights that it rests on; empty if it does not."""
        if not self.proven or self._proof is None:
            return ""
        lost: str = self._proof.failure({**present, **new})
        return lost


class KnownConvexity:
    """Of the energy that a runner runs."""

    def __init__(self, runner: Runner) -> None:
        found = runner.package.manifest.convexity
        self._runner = runner
        # What was last seen of the energy, and with which weights: by the export, or by `prove_convexity`.
        self._seen = (found.verdict if found else "unknown", runner.weights.id)

    @functools.cached_property
    def kept(self) -> KeptConvex:
        """What weights have to be that take the place of these, made by whoever changes them first."""
        package = self._runner.package
        manifest, train = package.manifest, package.manifest.train
        moved = train.weights if train else manifest.weights.trainable
        # Of the weights of the package: that is whose proof is kept.
        return call(self._runner.limits, KeptConvex, manifest, package.graphs, package.weights, moved)

    def fault(self, new: Weights, present: Weights) -> str:
        """What `KeptConvex.fault` says, within the limits of a call."""
        return call(self._runner.limits, self.kept.fault, new, present)

    def proven_with(self, weights_id: str) -> bool:
        """Whether f is proven convex with these weights: it was, and they are those of then, or have kept it so."""
        verdict, seen = self._seen
        return verdict == "proven" and (weights_id == seen or self.kept.proven)

    def doubted(self, status: NDArray[np.int8]) -> NDArray[np.int8]:
        """The statuses of answers: of an f that was seen not to be convex NOT_CONVEX, whether or not their cuts show
        it."""
        if self._seen[0] != "violated":
            return status
        return np.where(np.isin(status, RESTS_ON_CONVEXITY), np.int8(Status.NOT_CONVEX), status)

    def looked(self, found: Convexity, weights: WeightSet) -> None:
        """`found` is what a look at f with these weights gave."""
        if weights is self._runner.weights:
            self._seen = (found.verdict, weights.id)

    def forget(self) -> None:
        """Weights that nobody looks at will take the place of these: what was proven is not known any more."""
        if self._seen[0] == "proven":
            self._seen = ("unknown", "")
