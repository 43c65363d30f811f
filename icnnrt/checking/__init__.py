"""Checks of packages: verify, golden data, recommendations, repair."""
