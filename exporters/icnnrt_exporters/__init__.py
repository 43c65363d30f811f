"""From torch to packages that icnnrt runs: derivative graphs, ONNX assembly, parity checks.

export(energy, solver, x_example, y_example, "model.icnn")     torch module -> package
pack("model.icnn", "argmin.onnx")                              package -> one self-contained ONNX file
siblings("model.icnn", "folder")                               package -> f.onnx and adj_f.onnx, pairs for reverse mode
export_torchscript(energy, solver, x, y, "model.pt")           torch module -> one file for libtorch alone
export_program(energy, solver, x, y, "model.pt2")              torch module -> a torch.export program
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from icnnrt_exporters.derivative_siblings import siblings
    from icnnrt_exporters.exporter import export
    from icnnrt_exporters.optimizers import SGD, Adam, AdamW
    from icnnrt_exporters.packer import pack
    from icnnrt_exporters.program import export_program
    from icnnrt_exporters.torchscript import check_torchscript, export_torchscript
    from icnnrt_exporters.train_spec import TrainSpec

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "TrainSpec",
    "check_torchscript",
    "export",
    "export_program",
    "export_torchscript",
    "pack",
    "siblings",
]

# Imported when first used: torch takes seconds, and the command line lists these commands without it.
_HOME = {
    "SGD": "optimizers",
    "Adam": "optimizers",
    "AdamW": "optimizers",
    "TrainSpec": "train_spec",
    "check_torchscript": "torchscript",
    "export": "exporter",
    "export_program": "program",
    "export_torchscript": "torchscript",
    "pack": "packer",
    "siblings": "derivative_siblings",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'icnnrt_exporters' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"icnnrt_exporters.{_HOME[name]}"), name)
    globals()[name] = value
    return value
