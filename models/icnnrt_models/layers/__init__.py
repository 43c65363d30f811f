"""Layers that solve: argmin of an energy, argmin over a polyhedron, quadratic programs."""
