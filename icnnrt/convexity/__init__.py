"""The prover: whether an energy is convex in y, told from its graph and weights, and what the proof needs of them."""

from icnnrt.convexity.prover import Repeated, grounds, prove
from icnnrt.convexity.rests_on import Grounds
from icnnrt.format.verdict import Convexity, Evidence, Witness

__all__ = ["Convexity", "Evidence", "Grounds", "Repeated", "Witness", "grounds", "prove"]
