"""Adapters to libraries that icnnrt does not need; each module imports the library of its name."""
