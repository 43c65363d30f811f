"""One self-contained ONNX file out of a package, for users of plain ONNX Runtime."""

import os
import tempfile
from pathlib import Path

import onnx
import onnx.external_data_helper

from icnnrt import package
from icnnrt.errors import ExportError

# protobuf, and so ONNX, cannot hold a message of 2 GiB.
LARGEST = 2**31 - 1


def pack(source: str | Path, target: str | Path, role: str = "argmin", *, overwrite: bool = False) -> Path:
    """Write one graph of a package with its weights embedded.

    Args:
        source: the package folder; opened with all its checks.
        target: the `.onnx` file to write, atomically.
        role: "value", "argmin", "adjoint", or another graph that the package has.
        overwrite: replace a file that is there.

    Returns:
        The target. The file runs in any ONNX Runtime from 1.18 on without icnnrt: solver operators carry their bodies.
        Weights keep their names and stay overridable initialisers.

    Raises:
        PackageError: the package is not sound. ExportError: no such graph, the target exists, the file would be too
        large for ONNX.
    """
    source, target = Path(source), Path(target)
    opened = package.Package.open(source)
    if role not in opened.graphs:
        raise ExportError(f"graph: the package has no graph {role!r}; it has {', '.join(sorted(opened.graphs))}")
    if target.is_dir():
        raise ExportError(f"target: {target} is a folder; give the name of a file, such as {target / 'model.onnx'}")
    if target.exists() and not overwrite:
        raise ExportError(f"target: {target} is there already; pass overwrite=True to replace it, or choose another")
    model = onnx.load_model_from_string(opened.graphs[role])
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            # From the checked arrays, not from the disk: what was verified is what is written.
            tensor.CopyFrom(onnx.numpy_helper.from_array(opened.weights[tensor.name], tensor.name))
    size = model.ByteSize()
    if size > LARGEST:
        raise ExportError(f"target: one file would hold {size} bytes, more than ONNX allows; use the package as it is")
    onnx.checker.check_model(model, full_check=False)
    _write_atomically(target, model.SerializeToString(deterministic=True))
    return target


def _write_atomically(target: Path, data: bytes) -> None:
    descriptor, scratch = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files private; a model is as readable as any other file of the user's.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(scratch, 0o666 & ~umask)
        os.replace(scratch, target)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise
