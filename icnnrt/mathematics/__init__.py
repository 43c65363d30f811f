"""The statement of every algorithm, in float64 numpy, written to be read."""
