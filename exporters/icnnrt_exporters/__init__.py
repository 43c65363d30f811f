"""From torch to packages that icnnrt runs: derivative graphs, ONNX assembly, parity checks.

export(energy, solver, x_example, y_example, "model.icnn")     torch module -> package
pack("model.icnn", "argmin.onnx")                              package -> one self-contained ONNX file
siblings("model.icnn", "folder")                               package -> f.onnx and adj_f.onnx, pairs for reverse mode
export_torchscript(energy, solver, x, y, "model.pt")           torch module -> one file for libtorch alone
export_program(energy, solver, x, y, "model.pt2")              torch module -> a torch.export program
qp_translation_table(), add_bodies(program)                    a module with QPLayer -> torch.onnx.export, anywhere
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from icnnrt_exporters.assembly.optimizers import SGD, Adam, AdamW
    from icnnrt_exporters.assembly.train_spec import TrainSpec
    from icnnrt_exporters.exporter import export
    from icnnrt_exporters.graphs.derivative_siblings import siblings
    from icnnrt_exporters.graphs.packer import pack
    from icnnrt_exporters.graphs.quadratic_program import add_bodies, qp_translation_table
    from icnnrt_exporters.torch_files.program import export_program
    from icnnrt_exporters.torch_files.torchscript import check_torchscript, export_torchscript
    from icnnrt_models.layers.quadratic_program import QPLayer

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "QPLayer",
    "TrainSpec",
    "add_bodies",
    "check_torchscript",
    "export",
    "export_program",
    "export_torchscript",
    "pack",
    "qp_translation_table",
    "siblings",
]

# Imported when first used: torch takes seconds, and the command line lists these commands without it.
_HOMES = {
    "icnnrt_exporters.assembly.optimizers": "SGD Adam AdamW",
    "icnnrt_exporters.assembly.train_spec": "TrainSpec",
    "icnnrt_exporters.exporter": "export",
    "icnnrt_exporters.graphs.derivative_siblings": "siblings",
    "icnnrt_exporters.graphs.packer": "pack",
    "icnnrt_exporters.graphs.quadratic_program": "add_bodies qp_translation_table",
    "icnnrt_exporters.torch_files.program": "export_program",
    "icnnrt_exporters.torch_files.torchscript": "check_torchscript export_torchscript",
    "icnnrt_models.layers.quadratic_program": "QPLayer",
}
_HOME = {name: module for module, names in _HOMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'icnnrt_exporters' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value
