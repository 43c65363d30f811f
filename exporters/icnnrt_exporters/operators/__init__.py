"""The portable bodies of the operators of domain ai.icnnrt, in standard ONNX operators."""
