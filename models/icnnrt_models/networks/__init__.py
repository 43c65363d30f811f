"""Input-convex networks."""
