"""One self-contained ONNX file out of a package, for users of plain ONNX Runtime."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx

from icnnrt import arguments
from icnnrt.errors import ExportError, IcnnrtError
from icnnrt.format import package
from icnnrt.format.files import atomic_file
from icnnrt.format.folder import refuse_inside_a_package
from icnnrt.printable import cropped, harmless
from icnnrt_exporters.graphs.freezing import frozen
from icnnrt_exporters.graphs.inlining import inlined

# protobuf, and so ONNX, cannot hold a message of 2 GiB.
LARGEST = 2**31 - 1


def pack(
    source: str | Path | package.Package,
    target: str | Path,
    role: str = "argmin",
    *,
    portable: bool = False,
    freeze: bool = False,
    settings_as_inputs: bool = False,
    overwrite: bool = False,
) -> Path:
    """Write one graph of a package with its weights embedded.

    Args:
        source: the package folder, opened with all its checks, or a package that is open.
        target: the `.onnx` file to write, atomically.
        role: "value", "argmin", "adjoint", or another graph that the package has.
        portable: leave standard ONNX operators alone: no functions and no domain of ours, for tools that know neither.
            The native kernels can then not take over.
        freeze: make constants of the weights, and of `depth` where it is no input, and compute beforehand what hangs
            on them alone, for serving: runtimes lay constant matrices out for their products once. Not for "train",
            which must be fed its new weights.
        settings_as_inputs: make plain inputs, which have to be fed, of what is a setting at run time: `depth` of an
            adjoint, `iterations`, `mu` and `tolerance` over a polyhedron. As overridable initialisers they may be left
            out, but onnxruntime for JavaScript drops silently what is fed to such. Their defaults are in the file's
            metadata, as `default.<name>`.
        overwrite: replace a file that is there.

    Returns:
        The target. The file runs in any ONNX Runtime from 1.18 on without icnnrt: solver operators carry their bodies,
        or with `portable` are replaced by them. Weights keep their names and, without `freeze`, stay overridable
        initialisers.

    Raises:
        PackageError: the package is not sound. ExportError: no such graph, one that cannot be frozen, the target
        exists or cannot be written, the file would be too large for ONNX.
    """
    target = arguments.path(target, "target")
    opened = package.opened(source)
    if role not in opened.graphs:
        raise ExportError(
            f"graph: the package has no graph {role!r}; it has {', '.join(sorted(opened.graphs))}, so name one of them"
        )
    if freeze and role == "train":
        raise ExportError("freeze: the graph 'train' must be fed the weights it updates; pack it without freeze")
    if target.is_dir():
        raise ExportError(f"target: {target} is a folder; give the name of a file, such as {target / 'model.onnx'}")
    check_absent(target, overwrite)
    with of_anybody(opened):
        model = embedded(opened, role, portable=portable)
        if settings_as_inputs:
            ask_for_settings(opened, role, model)
        if freeze:
            model = frozen(model)
        write(target, model)
    return target


@contextmanager
def of_anybody(opened: package.Package) -> Iterator[None]:
    """Say in one sentence what onnx finds wrong with a graph of the package: it may come from anybody."""
    try:
        yield
    except (IcnnrtError, OSError, MemoryError):
        raise
    except Exception as error:  # onnx, onnx_ir and protobuf have classes of their own, and share no parent
        raise ExportError(
            f"source: onnx does not take a graph of {opened.path} ({cropped(str(error), 300)}); export it again"
        ) from harmless(error)


def embedded(opened: package.Package, role: str, *, portable: bool) -> onnx.ModelProto:
    """One graph with the package's weights in it."""
    model = onnx.load_model_from_string(opened.graphs[role])
    if portable:
        model = inlined(model)
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            # From the checked arrays, not from the disk: what was verified is what is written.
            tensor.CopyFrom(onnx.numpy_helper.from_array(opened.weights[tensor.name], tensor.name))
    return model


def ask_for_settings(opened: package.Package, role: str, model: onnx.ModelProto) -> None:
    """Take the defaults of a graph's settings out of it, so that they have to be fed."""
    signature = opened.manifest.graphs[role].signature
    assert signature is not None, "a package that is open lists what its graphs take and give"
    defaults = {name: tensor.default for name, tensor in signature.inputs.items() if tensor.default is not None}
    if not defaults:
        raise ExportError(f"settings_as_inputs: the graph {role!r} has no settings; leave it out")
    kept = [tensor for tensor in model.graph.initializer if tensor.name not in defaults]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    for given in model.graph.input:
        if given.name in defaults:
            given.doc_string = f"usually {defaults[given.name]}"
    for name, value in defaults.items():
        model.metadata_props.add(key=f"default.{name}", value=repr(value))


def check_absent(target: Path, overwrite: bool) -> None:
    """Told before the work, not after it."""
    refuse_inside_a_package(target, "target", kind=ExportError)
    if target.exists() and not overwrite:
        raise ExportError(f"target: {target} is there already; pass overwrite=True to replace it, or choose another")


def write(target: Path, model: onnx.ModelProto) -> None:
    """Check and write, atomically."""
    size = model.ByteSize()
    if size > LARGEST:
        raise ExportError(f"target: one file would hold {size} bytes, more than ONNX allows; use the package as it is")
    onnx.checker.check_model(model, full_check=True)
    try:
        with atomic_file(target) as file:
            file.write(model.SerializeToString(deterministic=True))
    except OSError as error:
        reason = error.strerror or error
        raise ExportError(f"target: {target} cannot be written ({reason}); choose a folder you can write to") from error
