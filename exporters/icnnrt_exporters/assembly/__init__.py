"""The graphs of a package put together: argmin, adjoint, polyhedron, train."""
