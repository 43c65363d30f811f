"""From torch to packages that icnnrt runs: derivative graphs, ONNX assembly, parity checks."""
