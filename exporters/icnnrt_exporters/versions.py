"""The versions that every exported graph states, in every function too.

onnx's own defaults (IR 14, opset 28) load in no released ONNX Runtime. Opset 21 and IR 10 load in every one from
1.18 on, and hold all that the graphs need.
"""

from typing import Final

OPSET: Final = 21
IR_VERSION: Final = 10
OP_VERSION: Final = 1
