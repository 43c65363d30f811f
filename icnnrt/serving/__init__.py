"""Sessions: a package opened with onnxruntime, its answers, and quadratic programs."""
