"""Piecewise-linear input-convex networks as linear and quadratic programs, exactly, and as .lp and .mps files."""

from icnnrt.epigraph.problem import EpigraphProblem, EpigraphSolution, epigraph

__all__ = ["EpigraphProblem", "EpigraphSolution", "epigraph"]
