"""From aten graphs to ONNX, and moves on ONNX graphs: splitting, splicing, inlining, freezing, packing."""
