"""Keeping an energy convex while its weights change: what its package was proven with holds of every later set.

Signs are kept by projection, which costs next to nothing. Where the proof rests on more than signs, a positive
semidefinite product or a slope below 1, it is repeated for new values of the weights in question, and they are refused
if it fails. Of an energy that was never proven convex there is nothing to keep but the signs that somebody asked for.
"""

from collections.abc import Collection, Mapping
from typing import Any

from numpy.typing import NDArray

from icnnrt.format.manifest import Manifest
from icnnrt.format.signs import Sign
from icnnrt.printable import named

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
