"""The prover: whether an energy is convex in y, told from its graph and weights, and what the proof needs of them.

memory        what the values of one evaluation may take
onnx_numpy    ONNX operators in numpy
rules         what is known of a value, and what an operator makes of it
univariate    functions of one number that a graph spells out operator by operator
samples       two probes of a graph, and where samples of the batch would meet
quadratic     values of degree two in y, by their Hessians
weighing      which weights stand between what bends and what is to be convex
walk          all of these together, from the inputs of a graph to f
bounds        strong convexity and a Lipschitz constant, of a walk that is done
segments      the search for points that show that f is not convex
rests_on      which weights a proof needs the signs or the values of
prover        the verdict
piecewise     a piecewise-linear energy as inequalities, which prove it convex on the way
"""

from icnnrt.convexity.prover import Repeated, grounds, prove
from icnnrt.convexity.rests_on import Grounds
from icnnrt.format.verdict import Convexity, Evidence, Witness

__all__ = ["Convexity", "Evidence", "Grounds", "Repeated", "Witness", "grounds", "prove"]
