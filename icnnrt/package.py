"""The on-disk format of an icnnrt package, version 2; this docstring is its specification.

A package is a folder, by custom named `<name>.icnn`, of plain files and nothing else:

    manifest.json          what the package holds; sizes and SHA-256 of the other files
    weights.safetensors    every weight, once
    value.onnx             energy and gradient      (x, y) -> f, gradient
    gradient.onnx          in place of value.onnx where kind is "gradient": (x, y) -> gradient
    solve.onnx             in place of value.onnx where kind is "qp": x -> z, status [B] int32, residual [B, 3]
    solve_adjoint.onnx     with it                  (x, z_bar) -> theta_bar, x_bar
    argmin.onnx            the solver               x -> y_star and its certificate; with a solver
    adjoint.onnx           cotangents               y_bar -> theta_bar, x_bar; with a solver
    hvp.onnx               Hessian-vector product   (x, y, y_dot) -> hvp; optional
    hessian.onnx           dense Hessian            (x, y) -> f, gradient, hessian (no f of kind "gradient"); optional
    gradient_x.onnx        by the context           (x, y) -> gradient_x; optional
    pullback.onnx          of value.onnx            (x, y, f_bar, gradient_bar) -> y_bar, x_bar, theta_bar; optional
    argmin_polyhedron.onnx   over {Gy <= h, ...}    (x, y_init, G, h, A, b, lower, upper) -> y and its certificate
    adjoint_polyhedron.onnx  with it                its solution, y_bar -> G_bar, ..., theta_bar, x_bar; optional, both
    train.onnx             one step of fine-tuning  (x, target, state) -> loss, new weights, new state; optional
    <role>.onnx            any further graph; role matches [a-z][a-z0-9_]*
    golden.safetensors     inputs and outputs to replay; optional

Subfolders, symbolic links, hidden files and files the manifest does not list are refused.

manifest.json is UTF-8 JSON of at most 4 MiB: one object, no key twice, no NaN or Infinity, with
exactly these keys, the last four where they apply:

    format           "icnnrt"
    format_version   2
    name             text
    producer         {text: text}, such as the versions of the tools that wrote the package
    dtype            "float32" or "float64": of x, y and the energy
    x_shape          [int, ...], per sample; [0] for an energy of y alone
    y_shape          [n], per sample
    kind             "energy", "gradient" where only the gradient of the energy was exported, or "qp" for a network
                     whose answer z [B, n] comes of convex quadratic programs (n = y_shape[0]): no energy, no solver
    domain           {"kind": "unit_box", "box" or "simplex"} or {"kind": "space", "mu": float > 0}: where y* lies,
                     see `manifest.Domain`; null without a solver. The graphs of a box take its bounds, `lower` and
                     `upper` [B, n], and solve for p = (y − lower)/(upper − lower)
    regulariser      "entropy", of space "quadratic", null without a solver
    solver           {"name": "BundleEntropy", "iterations": K >= 1, "steps": int >= 1,
                      "gap_tolerance": float > 0, "residual_tolerance": float > 0}, or the name
                     "BregmanProximalGradient" and also "step_size": float > 0; null without argmin.onnx
    opset            ONNX opset that every graph and function imports
    ir_version       ONNX IR version of every graph
    ops              {"ai.icnnrt": {"version": 1, "names": [every op the graphs use from it]}}
    graphs           {role: {"file": "<role>.onnx", "sha256": hex, "bytes": int,
                             "inputs": {name: {"dtype": text, "shape": [int or text, ...], "default": number}},
                             "outputs": {name: {"dtype": text, "shape": [int or text, ...]}}}}, weights aside;
                     value or, by kind, gradient or solve and solve_adjoint must be there, argmin and adjoint
                     exactly if a solver is. In a shape, "batch" is the number of samples and other text another
                     open size. An input with a default is a setting: an overridable initialiser, which may be left out
    weights          {"file": "weights.safetensors", "sha256": hex, "bytes": int,
                      "tensors": {name: {"shape": [int, ...], "dtype": text, "sign": sign, "trainable": bool}}};
                     a sign is null, "nonnegative", "nonpositive" or "zero" for every entry, or for runs of entries
                     along an axis, or with axis null along all entries row by row:
                     {"axis": int or null, "runs": [[start, stop, "nonnegative", "nonpositive" or "zero"], ...]}
    parity           {text: float or {text: float}}, errors measured against the original model
    metadata         {text: text, bool, number or null}, free
    train            only with train.onnx: {"loss": text, "optimizer": "SGD", "Adam" or "AdamW",
                      "settings": {text: float}, "slots": [text, ...], "weights": [name, ...],
                      "adjoint": "exact" or "prop3", "clip_norm": float > 0 or null,
                      "target_shape": [int, ...], "target_dtype": "float32", "float64" or "int64"};
                      the weights it updates are trainable and of the package's dtype
    polyhedron       only with argmin_polyhedron.onnx: {"iterations": int >= 1, "mu": float >= 0, "tolerance":
                      float >= 0, "adjoint": "prop3" or "implicit"}, see `manifest.PolyhedronSpec`
    convexity        of the value graph with the weights beside it: {"verdict": "proven", "violated" or "unknown",
                     ...}, all that `convexity.Convexity` holds
    golden           only with golden.safetensors: {"file": "golden.safetensors", "sha256": hex, "bytes": int}

Bounds, checked before anything is allocated: K <= 4096, steps <= 1000, K n <= 2^28, at most 2^31
elements in a shape and in all weights together, 65536 weights, 256 MiB a graph, 16 MiB of safetensors header, 64 MiB
of golden data.

weights.safetensors is an ordinary safetensors file: 8 bytes of header length N (little-endian), N
bytes of JSON header, data. The header agrees exactly with the manifest's tensors; their bytes
follow one another without gap or overlap, each tensor starting at a multiple of its item size. A
tensor has the sign it is given, a trainable one only finite entries: the convexity of the energy
rests on the first.

Graphs are ONNX models whose operators come from the default ONNX domain or from ai.icnnrt, never
EPContext, and whose functions are defined in ai.icnnrt only. An initializer may keep its bytes in
weights.safetensors: location exactly "weights.safetensors", offset 8 + N + the tensor's data
offset, length the tensor's size. It then is one whole tensor of that file, so writing new weights
of the same names, shapes and dtypes updates every graph and leaves the graphs as they are.

golden.safetensors holds the inputs of one batch by their names (x, y, y_dot, of a box lower and upper; of kind "qp" x
alone) and the outputs of each graph replayed as "<role>.<output>": what the machine of the export computed from them.

Version 1 is read too, and written back as it came: `icnnrt._upgrade` says what it lacks. Version 2 is open until it is
released.

A reader checks all of this before use. The hashes tell damage and half-written packages from whole
ones; they are no signature, and a package can still ask for a long computation: it is data from
whoever made it.

A new package is written to a hidden sibling folder, flushed to the disk, then renamed into place.
Replacing one takes two renames, the old folder aside (`.<name>.old-<token>`) and the new one in:
whatever interrupts them, the path holds the old package, the new one, or for the instant between
the renames nothing. It never holds a mixture. If that instant is where the power fails, the old
package lies whole in the folder aside. A reader that finds nothing at the path therefore reads the
newest folder aside that is whole, as the package at that path; it renames nothing. A folder aside
means nothing while there is something at the path: a write deletes those of its own name, before it
moves the old package aside and when the new one is in place. A folder `.<name>.new-<token>` that a
crash left behind may be deleted. A reader that is opening a package while it is replaced may be told
that a file is missing or differs; it should open it again.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import stat
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Final, TypeAlias

import numpy as np
from safetensors import numpy as safetensors_numpy

from icnnrt import _wire
from icnnrt._fields import AGAIN, JsonObject, exactly, listing, load_json, show, surrogate, table, wrong
from icnnrt._files import sync_folder
from icnnrt.convexity import Convexity
from icnnrt.errors import InputError, PackageError
from icnnrt.manifest import (
    FILE_SIZE,
    FORMAT,
    FORMAT_VERSION,
    GOLDEN_FILE,
    MANIFEST_FILE,
    MAX_ELEMENTS,
    MAX_GRAPH_BYTES,
    MAX_HEADER_BYTES,
    MAX_ITERATIONS,
    MAX_MANIFEST_BYTES,
    MAX_STEPS,
    OP_DOMAIN,
    RESERVED_NAME,
    SAFETENSORS_DTYPES,
    WEIGHTS_FILE,
    Domain,
    File,
    GraphFile,
    Manifest,
    OpSet,
    PolyhedronSpec,
    Scalar,
    SolverSpec,
    TrainingSpec,
    WeightsFile,
    WeightSpec,
    scalar,
    shape_of,
)
from icnnrt.signatures import declared, fits, listed, shown
from icnnrt.signs import NONNEGATIVE, Sign, united

__all__ = [
    "FORMAT",
    "FORMAT_VERSION",
    "GOLDEN_FILE",
    "MANIFEST_FILE",
    "MAX_ELEMENTS",
    "MAX_GRAPH_BYTES",
    "MAX_ITERATIONS",
    "MAX_MANIFEST_BYTES",
    "MAX_STEPS",
    "OP_DOMAIN",
    "WEIGHTS_FILE",
    "Domain",
    "File",
    "GraphFile",
    "Manifest",
    "OpSet",
    "Package",
    "PolyhedronSpec",
    "Scalar",
    "SolverSpec",
    "TrainingSpec",
    "WeightSpec",
    "WeightsFile",
    "weight_layout",
    "write",
]

# Far more than a package can have, and few enough to list.
MAX_ENTRIES: Final = 4096

_PACKAGE_FILE: Final = re.compile(
    rf"{'|'.join(map(re.escape, (MANIFEST_FILE, WEIGHTS_FILE, GOLDEN_FILE)))}|[a-z][a-z0-9_]*\.onnx"
)

StrPath: TypeAlias = str | os.PathLike[str]


@dataclass(frozen=True, eq=False)
class Package:
    """A package whose every file has been checked, with the bytes that were checked.

    path:      the folder, absolute
    manifest:  the contents of manifest.json
    graphs:    role -> bytes of its ONNX file
    weights:   name -> read-only array
    golden:    the arrays of golden.safetensors, read-only; empty without that file

    Sessions are made from `graphs` and `weights` rather than from the files, so that what runs is
    what was checked, even if the folder changes meanwhile.
    """

    path: Path
    manifest: Manifest
    graphs: Mapping[str, bytes]
    weights: Mapping[str, np.ndarray]
    golden: Mapping[str, np.ndarray]

    @property
    def identity(self) -> str:
        """SHA-256 of the manifest, which holds those of all other files, in hexadecimal: equal packages have equal
        ones."""
        return hashlib.sha256(self.manifest.to_json()).hexdigest()

    def __repr__(self) -> str:
        return f"<Package {self.manifest.name} at {self.path}: {', '.join(self.graphs)}>"

    @classmethod
    def open(cls, path: StrPath) -> "Package":
        """Read the package at `path` and check everything the module docstring promises.

        Each file is read once; hashing, checking and use share those bytes. Where the replacement
        of the package was interrupted, that is the old one (see the module docstring). Raises
        `PackageError` with one sentence at the first thing that is wrong.
        """
        folder = Path(os.path.abspath(path))
        try:
            return cls(folder, *_read_and_check(folder))
        except PackageError as error:
            asides = _asides(folder)
            # The path once more, as a replacement that was under way may have ended meanwhile.
            for place in (*asides, folder) if asides else ():
                with contextlib.suppress(PackageError):
                    return cls(folder, *_read_and_check(place))
            raise PackageError(f"{folder}: {error}") from error.__cause__

    def save(
        self,
        path: StrPath,
        *,
        weights: Mapping[str, np.ndarray] | None = None,
        parity: Mapping[str, float | Mapping[str, float]] | None = None,
        metadata: Mapping[str, Scalar] | None = None,
        convexity: Convexity | None = None,
        overwrite: bool = False,
    ) -> "Package":
        """Write this package to `path`, with new weights, parity, metadata or convexity where they are given.

        `weights` must have the names, shapes and dtypes of the old ones. What was computed with the old ones, golden
        data and the verdict on convexity, is left out of a package with new ones. Returns the package as written; for
        errors and interruptions see `write`.
        """
        golden: Mapping[str, np.ndarray] = {}
        if weights is None:
            weights, golden, convexity = self.weights, self.golden, convexity or self.manifest.convexity
        _check_arrays(weights)
        for name, old in self.weights.items():
            new = weights.get(name)
            if new is None or new.shape != old.shape or new.dtype != old.dtype:
                came = "nothing" if new is None else f"{new.dtype}{list(new.shape)}"
                raise InputError(
                    f"weights: expected {old.dtype}{list(old.shape)} for {show(name)}, but got {came}; "
                    "the graphs fix every name, shape and dtype, so export the model again to change them."
                )
        manifest = replace(
            self.manifest,
            parity=self.manifest.parity if parity is None else parity,
            metadata=self.manifest.metadata if metadata is None else metadata,
            convexity=convexity,
        )
        return _write(path, manifest, self.graphs, weights, golden, overwrite)


def write(
    path: StrPath,
    *,
    name: str,
    dtype: str,
    x_shape: Collection[int],
    y_shape: Collection[int],
    solver: SolverSpec | None,
    graphs: Mapping[str, bytes],
    weights: Mapping[str, np.ndarray],
    nonnegative: Collection[str],
    trainable: Collection[str],
    signs: Mapping[str, Sign] | None = None,
    kind: str = "energy",
    domain: Domain | None = None,
    opset: int = 21,
    ir_version: int = 10,
    producer: Mapping[str, str] | None = None,
    parity: Mapping[str, float | Mapping[str, float]] | None = None,
    metadata: Mapping[str, Scalar] | None = None,
    train: TrainingSpec | None = None,
    polyhedron: PolyhedronSpec | None = None,
    convexity: Convexity | None = None,
    golden: Mapping[str, np.ndarray] | None = None,
    overwrite: bool = False,
) -> Package:
    """Write a package and return it as `Package.open` would.

    graphs:       role -> bytes of the ONNX file; external data refers to weights.safetensors with
                  the offsets and lengths that `weight_layout(weights)` gives
    nonnegative:  names of the weights that must stay >= 0 for the energy to be convex
    signs:        what besides must hold of the signs of weights for that, by their names
    trainable:    names of the weights that fine-tuning may change
    domain:       where y* lies; with a solver [0, 1]^n by default
    train:        what train.onnx does, if `graphs` has the role train
    polyhedron:   what argmin_polyhedron.onnx and adjoint_polyhedron.onnx do, if `graphs` has them
    golden:       inputs and outputs to replay, as golden.safetensors holds them
    overwrite:    replace the package at `path`; anything there that is not a package is refused

    Everything is checked before the disk is touched. An interruption leaves what opens as the old
    package or as the new one, never a mixture (see the module docstring).

    Raises `InputError` when the parts do not make a valid package or `path` is taken, and `OSError`
    when the disk refuses; then the old package is put back.
    """
    _check_arrays(weights)
    signs = signs or {}
    for argument, named in (("nonnegative", nonnegative), ("trainable", trainable), ("signs", signs)):
        for unknown in sorted(set(named) - weights.keys()):
            raise InputError(
                f"{argument}: expected names of weights, but {show(unknown)} is none; "
                f"the weights are {show(sorted(weights))}."
            )
    tensors = {
        key: WeightSpec(
            tuple(array.shape),
            array.dtype.name,
            united(Sign(NONNEGATIVE) if key in nonnegative else None, signs.get(key), array.shape),
            key in trainable,
        )
        for key, array in weights.items()
    }
    used: set[str] = set()
    for role, graph in graphs.items():
        if not isinstance(graph, bytes):
            raise InputError(
                f"graphs: expected the bytes of an ONNX file for {show(role)}, but got {type(graph).__name__}; "
                "serialise the model first."
            )
        used |= {op for where, op in _survey(graph, f"{role}.onnx").operators if where == OP_DOMAIN}
    manifest = Manifest(
        name=name,
        producer=producer or {},
        dtype=dtype,
        x_shape=tuple(x_shape),
        y_shape=tuple(y_shape),
        kind=kind,
        domain=domain or (Domain() if solver else None),
        solver=solver,
        opset=opset,
        ir_version=ir_version,
        ops={OP_DOMAIN: OpSet(1, tuple(sorted(used)))},
        graphs={},
        weights=WeightsFile(WEIGHTS_FILE, "", 0, tensors),
        parity=parity or {},
        metadata=metadata or {},
        train=train,
        polyhedron=polyhedron,
        convexity=convexity,
    )
    return _write(path, manifest, graphs, weights, golden or {}, overwrite)


def weight_layout(weights: Mapping[str, np.ndarray]) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """Return the bytes of weights.safetensors and where each weight lies in them.

    The second value maps a name to (offset, length) in bytes from the start of the file, as ONNX
    external data wants them. Equal names, shapes and dtypes give equal offsets, whatever the order
    of the mapping and the values of the weights.
    """
    data = _safetensors(weights)
    header = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + header])
    offsets = {key: entries[key]["data_offsets"] for key in weights}
    return data, {key: (8 + header + begin, end - begin) for key, (begin, end) in offsets.items()}


def _safetensors(tensors: Mapping[str, np.ndarray]) -> bytes:
    _check_arrays(tensors)
    # safetensors copies memory as it lies: give it little-endian arrays in C order.
    arrays = {
        key: np.asarray(tensors[key], dtype=tensors[key].dtype.newbyteorder("<"), order="C") for key in sorted(tensors)
    }
    return bytes(safetensors_numpy.save(arrays))


def _check_arrays(weights: Mapping[str, object]) -> None:
    for key, array in weights.items():
        if not isinstance(key, str) or key == RESERVED_NAME or not key or surrogate(key):
            raise InputError(f"weights: expected names like those of a state dict, but one is {show(key)}; rename it.")
        if not isinstance(array, np.ndarray) or array.dtype.name not in SAFETENSORS_DTYPES:
            came = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
            raise InputError(
                f"weights: expected numpy arrays of dtype {', '.join(SAFETENSORS_DTYPES)}, but {show(key)} is "
                f"{came}; convert it first."
            )


# --- The bytes of the other files ---------------------------------------------------------------


def _check_files(
    manifest: Manifest, files: Mapping[str, bytes]
) -> tuple[Manifest, Mapping[str, bytes], Mapping[str, np.ndarray], Mapping[str, np.ndarray]]:
    """Check the bytes of every listed file against the manifest; return it, with what each graph takes and gives, the
    graphs, weights and golden data."""
    everything: list[File | WeightsFile] = [*manifest.graphs.values(), manifest.weights]
    if manifest.golden:
        everything.append(manifest.golden)
    for entry in everything:
        found = hashlib.sha256(files[entry.file]).hexdigest()
        if found != entry.sha256:
            raise PackageError(
                f"{entry.file}: its SHA-256 should be {entry.sha256}, but is {found}; "
                f"the file was changed or damaged, so copy the package again or {AGAIN}."
            )
    extents = _read_header(manifest, files[WEIGHTS_FILE])
    weights: dict[str, np.ndarray] = {}
    for name, spec in manifest.weights.tensors.items():
        # A view of bytes is read-only, and shares their memory.
        dtype = np.dtype(spec.dtype).newbyteorder("<")
        weights[name] = np.ndarray(spec.shape, dtype, buffer=files[WEIGHTS_FILE], offset=extents[name][0])
        _check_values(name, spec, weights[name])
    for graph in manifest.graphs.values():
        _check_graph(manifest, graph.file, files[graph.file], frozenset(extents.values()))
    graphs = {role: files[graph.file] for role, graph in manifest.graphs.items()}
    manifest = replace(manifest, graphs={role: _with_signature(manifest, role, data) for role, data in graphs.items()})
    golden = _read_golden(files[GOLDEN_FILE]) if manifest.golden else {}
    return manifest, MappingProxyType(graphs), MappingProxyType(weights), MappingProxyType(golden)


def _with_signature(manifest: Manifest, role: str, data: bytes) -> GraphFile:
    """The entry of a graph, with what it takes and gives: what the manifest lists, if that is what the file declares;
    where nothing is listed, what the file declares."""
    graph = manifest.graphs[role]
    if graph.signature is None:
        return replace(graph, signature=listed(manifest, role, data))
    found = declared(data, graph.file, manifest.weights.tensors)
    for what, told, came in (
        ("inputs", graph.signature.inputs, found.inputs),
        ("outputs", graph.signature.outputs, found.outputs),
    ):
        place = f"{MANIFEST_FILE}: graphs.{role}.{what}"
        for name in sorted(told.keys() ^ came.keys()):
            there = "the graph does not have" if name in told else "lacks what the graph has"
            raise PackageError(f"{place} {there}: {show(name)}; {AGAIN}.")
        for name, tensor in told.items():
            other = came[name]
            if other.dtype not in ("", tensor.dtype) or not fits(other.shape, tensor.shape):
                raise PackageError(
                    f"{place}.{show(name)[1:-1]} is {tensor.dtype} {shown(tensor.shape)}, but {graph.file} declares "
                    f"{other.dtype or 'another dtype'} {show(shown(other.shape))}; {AGAIN}."
                )
            if other.default != tensor.default:
                wrong(f"{place}.{show(name)[1:-1]}.default", f"{show(other.default)}, as in the graph", tensor.default)
    return graph


def _read_golden(data: bytes) -> dict[str, np.ndarray]:
    """The arrays of golden.safetensors; the size of the file bounds theirs."""
    try:
        arrays = safetensors_numpy.load(data)
    except Exception as error:
        raise PackageError(f"{GOLDEN_FILE}: is no safetensors file ({error}); {AGAIN}.") from error
    for array in arrays.values():
        array.flags.writeable = False
    return dict(arrays)


def _read_header(manifest: Manifest, data: bytes) -> dict[str, tuple[int, int]]:
    """Check the safetensors header against the manifest; return (offset, length) of each tensor."""
    file = WEIGHTS_FILE
    size = int.from_bytes(data[:8], "little")
    most = min(MAX_HEADER_BYTES, len(data) - 8)
    if size > most:
        raise PackageError(
            f"{file}: its header should have at most {max(most, 0)} bytes, but claims {size}; "
            f"the file is damaged, so {AGAIN}."
        )
    start = 8 + size
    header = JsonObject(load_json(data[8:start], f"{file} header"), f"{file} header: ")
    if "__metadata__" in header.left:
        header.take("__metadata__", table(scalar, 1024))
    tensors = manifest.weights.tensors
    for name in sorted(header.left.keys() ^ tensors.keys()):
        here, there = (file, MANIFEST_FILE) if name in header.left else (MANIFEST_FILE, file)
        raise PackageError(f"{file}: the weight {show(name)} is in {here} but not in {there}; {AGAIN}.")

    extents: dict[str, tuple[int, int]] = {}
    for name, spec in tensors.items():
        place = f"{file} header: {show(name)[1:-1]}."
        entry = JsonObject(header.left[name], place)
        entry.take("dtype", exactly(SAFETENSORS_DTYPES[spec.dtype]))
        shape = entry.take("shape", shape_of)
        if shape != spec.shape:
            wrong(f"{place}shape", f"{list(spec.shape)} as in {MANIFEST_FILE}", list(shape))
        offsets = entry.take("data_offsets", listing(FILE_SIZE, 2))
        entry.close()
        item = np.dtype(spec.dtype).itemsize
        length = item * math.prod(shape)
        if len(offsets) != 2 or offsets[1] - offsets[0] != length:
            wrong(f"{place}data_offsets", f"two offsets {length} bytes apart", list(offsets))
        if (start + offsets[0]) % item:
            wrong(f"{place}data_offsets", f"aligned to {item} bytes in the file", list(offsets))
        extents[name] = (start + offsets[0], length)

    expected = start
    for name, (offset, length) in sorted(extents.items(), key=lambda pair: pair[1]):
        if offset != expected:
            fault = "overlaps the weight before it" if offset < expected else "leaves a gap before it"
            raise PackageError(
                f"{file}: the weight {show(name)} should start at byte {expected}, but starts at {offset} and "
                f"{fault}; {AGAIN}."
            )
        expected += length
    if expected != len(data):
        raise PackageError(
            f"{file}: its weights should end with the file at byte {len(data)}, but end at {expected}; "
            f"the file is truncated or padded, so {AGAIN}."
        )
    return extents


def _check_values(name: str, spec: WeightSpec, array: np.ndarray) -> None:
    # Written so that NaN fails both.
    if spec.sign and (fault := spec.sign.fault(array)):
        raise PackageError(
            f"{WEIGHTS_FILE}: {show(name)} should be {fault}; project it onto its constraint, or do not declare it."
        )
    if spec.trainable and not np.isfinite(array).all():
        raise PackageError(
            f"{WEIGHTS_FILE}: {show(name)} should be finite, but holds NaN or infinity; "
            "the training diverged, so go back to earlier weights."
        )


def _survey(data: bytes, file: str) -> _wire.Survey:
    """Walk a graph given as an argument; what is malformed there is the caller's."""
    try:
        return _wire.survey(data, file)
    except PackageError as error:
        raise InputError(f"graphs: {error}") from error


def _check_graph(manifest: Manifest, file: str, data: bytes, extents: Collection[tuple[int, int]]) -> None:
    """Refuse a graph that reads other files, or uses operators from elsewhere."""
    found = _wire.survey(data, file)
    if not found.graphs:
        raise PackageError(f"{file}: expected an ONNX model, but it holds no graph; {AGAIN}.")
    for tensor in found.external:
        if tensor.location != WEIGHTS_FILE:
            raise PackageError(
                f"{file}: tensor {show(tensor.tensor)} should keep its external data in {WEIGHTS_FILE}, but names "
                f"{show(tensor.location)}; do not use this package unless you trust its source, and {AGAIN}."
            )
        if (tensor.offset, tensor.length) not in extents:
            raise PackageError(
                f"{file}: the external data of tensor {show(tensor.tensor)} should be one whole weight of "
                f"{WEIGHTS_FILE}, but bytes {tensor.offset} to {tensor.offset + tensor.length} are none; {AGAIN}."
            )
    named = {op for ops in manifest.ops.values() for op in ops.names}
    for domain, op in sorted(found.operators):
        if op == "EPContext":
            raise PackageError(
                f"{file}: EPContext runs precompiled code and is refused; export the package again without it."
            )
        if domain not in ("", "ai.onnx", OP_DOMAIN):
            raise PackageError(
                f"{file}: operators should come from ONNX itself or {OP_DOMAIN}, but {show(op)} comes from "
                f"{show(domain)}; {AGAIN} with standard operators."
            )
        if domain == OP_DOMAIN and op not in named:
            raise PackageError(
                f"{file}: {MANIFEST_FILE} should name every operator of {OP_DOMAIN}, but {show(op)} is used and not "
                f"in ops; {AGAIN}."
            )
    for domain, function in sorted(found.functions):
        if domain != OP_DOMAIN:
            raise PackageError(
                f"{file}: functions should be defined in {OP_DOMAIN}, but {show(function)} is defined in "
                f"{show(domain)}; {AGAIN}."
            )
    if found.ir_versions != {manifest.ir_version}:
        wrong(f"{file}: ir_version", f"{manifest.ir_version} as in {MANIFEST_FILE}", sorted(found.ir_versions))
    versions = {"": manifest.opset, "ai.onnx": manifest.opset, OP_DOMAIN: 1}
    for domain, version in sorted(found.opset_imports):
        # Imports from other domains are harmless, as none of their operators is used.
        if version != versions.get(domain, version):
            wrong(f"{file}: the imported opset of {show(domain)}", f"{versions[domain]}", version)


# --- Reading from the disk -----------------------------------------------------------------------


def _read_and_check(
    folder: Path,
) -> tuple[Manifest, Mapping[str, bytes], Mapping[str, np.ndarray], Mapping[str, np.ndarray]]:
    return _check_files(*_read_folder(folder))


def _asides(target: Path, *, always: bool = False) -> list[Path]:
    """Folders that replacements of `target` have put aside, newest first; none, unless `always`, where it exists.

    A rename keeps a folder's time of change, so it is when the package was written.
    """
    found: list[tuple[int, str]] = []
    # ValueError: a null character in the path.
    with contextlib.suppress(OSError, ValueError):
        if always or not os.path.lexists(target):
            with os.scandir(target.parent) as entries:
                found = [
                    (entry.stat(follow_symlinks=False).st_mtime_ns, entry.name)
                    for entry in entries
                    if entry.name.startswith(f".{target.name}.old-") and entry.is_dir(follow_symlinks=False)
                ]
    return [target.with_name(name) for _, name in sorted(found, reverse=True)]


def _read_folder(folder: Path) -> tuple[Manifest, dict[str, bytes]]:
    """Read the manifest and then exactly the files it lists, by name and with the size it gives."""
    names = _list_folder(folder)
    manifest = Manifest.from_json(_read_file(folder / MANIFEST_FILE, limit=MAX_MANIFEST_BYTES))
    listed = {graph.file: graph.bytes for graph in manifest.graphs.values()}
    listed[manifest.weights.file] = manifest.weights.bytes
    if manifest.golden:
        listed[manifest.golden.file] = manifest.golden.bytes
    for name in sorted(listed.keys() - names):
        raise PackageError(f"{name} is missing, though {MANIFEST_FILE} lists it; copy the whole folder, or {AGAIN}.")
    for name in sorted(names - listed.keys() - {MANIFEST_FILE}):
        raise PackageError(
            f"{show(name)} does not belong to the package: {MANIFEST_FILE} does not list it; move it out of the folder."
        )
    return manifest, {name: _read_file(folder / name, size=size) for name, size in listed.items()}


def _list_folder(folder: Path) -> set[str]:
    """Return the names in a package folder, refusing one without a manifest and all that are not plain files."""
    try:
        if folder.is_file():
            raise PackageError(
                "expected a package, which is a folder, but this is a file; a packed .onnx runs as it is "
                "in onnxruntime.InferenceSession, an archive must be unpacked first."
            )
        if not os.path.lexists(folder):
            aside = _asides(folder)
            remedy = (
                f"a new one was being written, and the old one, in {aside[0].name}, is damaged too; copy the package "
                f"again or {AGAIN}."
                if aside
                else "check the path, or export the model first."
            )
            raise PackageError(f"expected a package folder, but there is nothing; {remedy}")
        with os.scandir(folder) as entries:
            listed = list(islice(entries, MAX_ENTRIES))
        # First, as it matters little what else such a folder holds; among very many files it may not be listed.
        if MANIFEST_FILE not in {entry.name for entry in listed} and not os.path.lexists(folder / MANIFEST_FILE):
            raise PackageError(
                f"expected a package, but the folder has no {MANIFEST_FILE}; "
                "give the path of the package folder itself, or export the package again."
            )
        for entry in sorted(listed, key=lambda e: e.name):
            kind = (
                "a symbolic link"
                if entry.is_symlink()
                else "a folder"
                if entry.is_dir(follow_symlinks=False)
                else None
                if entry.is_file(follow_symlinks=False)
                else "neither a file nor a folder"
            )
            if kind:
                raise PackageError(
                    f"a package holds plain files only, but {show(entry.name)} is {kind}; "
                    "copy the package so that it holds the files themselves, and nothing else."
                )
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        raise PackageError(f"cannot be read ({error}); check the path and its permissions.") from error
    return {entry.name for entry in listed}


def _read_file(path: Path, *, size: int | None = None, limit: int | None = None) -> bytes:
    """Read a file that should have exactly `size` bytes, or at most `limit`."""
    try:
        # The name may have become a link or a pipe since it was listed: do not follow or wait.
        flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        with open(path, "rb", opener=lambda name, _: os.open(name, flags)) as stream:
            status = os.fstat(stream.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise PackageError(f"{path.name}: expected a plain file; copy the package again or {AGAIN}.")
            # The size on disk is checked before memory is taken for it.
            found = status.st_size
            if found == size or (size is None and limit is not None and found <= limit):
                data = stream.read(found + 1)
                if len(data) == found:
                    return data
                found = len(data)  # it changed while it was read
    except OSError as error:
        raise PackageError(f"{path.name}: cannot be read ({error}); check its permissions.") from error
    if size is None:
        raise PackageError(f"{path.name}: expected at most {limit} bytes, but it has {found}; {AGAIN}.")
    raise PackageError(
        f"{path.name}: expected {size} bytes, as {MANIFEST_FILE} says, but it has {found}; "
        f"the file is truncated or was changed, so copy the package again or {AGAIN}."
    )


# --- Writing to the disk ------------------------------------------------------------------------


def _write(
    path: StrPath,
    draft: Manifest,
    graphs: Mapping[str, bytes],
    weights: Mapping[str, np.ndarray],
    golden: Mapping[str, np.ndarray],
    overwrite: bool,
) -> Package:
    """Complete the draft with sizes and hashes, check the whole, and put it on the disk."""
    target = Path(os.path.abspath(path))
    _check_target(target, overwrite)
    data, _ = weight_layout(weights)
    files = {f"{role}.onnx": graph for role, graph in graphs.items()}
    manifest = replace(
        draft,
        graphs={
            role: GraphFile(f"{role}.onnx", hashlib.sha256(graph).hexdigest(), len(graph))
            for role, graph in graphs.items()
        },
        weights=replace(draft.weights, sha256=hashlib.sha256(data).hexdigest(), bytes=len(data)),
        golden=None,
    )
    files[WEIGHTS_FILE] = data
    if golden:
        files[GOLDEN_FILE] = held = _safetensors(golden)
        manifest = replace(manifest, golden=File(GOLDEN_FILE, hashlib.sha256(held).hexdigest(), len(held)))
    try:
        manifest = manifest.checked()  # before what its graphs take and give, which it says how to tell
        manifest = replace(
            manifest,
            graphs={
                role: replace(manifest.graphs[role], signature=listed(manifest, role, graph))
                for role, graph in graphs.items()
            },
        )
        files[MANIFEST_FILE] = manifest.to_json()
        checked = _check_files(Manifest.from_json(files[MANIFEST_FILE]), files)
    except (PackageError, TypeError, ValueError) as error:  # json raises the last two
        raise InputError(f"{target.name} would not be a valid package: {error}") from error
    _replace_folder(target, files)
    return Package(target, *checked)


def check_outside(path: StrPath, argument: str) -> None:
    """Refuse a place for a file or folder that lies in a package: with anything else in it a package does not open.

    Links are followed, for the place may be reached by them; whether case counts is the file system's affair.
    """
    for folder in Path(os.path.realpath(path)).parents:
        if os.path.lexists(folder / MANIFEST_FILE) and _has_manifest(folder):
            raise InputError(
                f"{argument}: {path} lies in the package {folder}, which would not open with another file in it; "
                "choose a place outside."
            )


def _check_target(target: Path, overwrite: bool) -> None:
    """Refuse a path that is taken by anything but a package that may be overwritten."""
    if not target.parent.is_dir():
        raise InputError(f"path: expected a place in an existing folder, but {target.parent} is none; create it first.")
    check_outside(target, "path")
    if not os.path.lexists(target):
        if not overwrite and (aside := next(filter(_is_package, _asides(target)), None)):
            raise InputError(
                f"path: {target} is a package whose replacement was interrupted, in {aside.name}; pass overwrite=True "
                "to replace it, or choose another path."
            )
        return
    if target.is_symlink() or not _is_package(target):
        raise InputError(
            f"path: {target} exists and is not a package of plain files alone, so it is not replaced; "
            "choose another path or remove it yourself."
        )
    if not overwrite:
        raise InputError(f"path: {target} exists; pass overwrite=True to replace it, or choose another path.")


def _is_package(folder: Path) -> bool:
    """Tell whether a folder may be deleted as a package: it holds nothing that is not one's."""
    try:
        return all(_PACKAGE_FILE.fullmatch(name) for name in _list_folder(folder)) and _has_manifest(folder)
    except PackageError:
        return False


def _has_manifest(folder: Path) -> bool:
    """Whether the manifest.json of a folder says that it is a package's, and not one of the many others."""
    try:
        manifest = load_json(_read_file(folder / MANIFEST_FILE, limit=MAX_MANIFEST_BYTES), MANIFEST_FILE)
    except PackageError:
        return False
    return isinstance(manifest, dict) and manifest.get("format") == FORMAT


def _replace_folder(target: Path, files: Mapping[str, bytes]) -> None:
    """Put a folder with these files at `target`; the module docstring says what holds on the way."""
    token = secrets.token_hex(8)
    new = target.with_name(f".{target.name}.new-{token}")
    old = target.with_name(f".{target.name}.old-{token}")
    try:
        os.mkdir(new)
        for name, data in files.items():
            with open(new / name, "xb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
        sync_folder(new)
        if os.path.lexists(target):
            # Left behind by an earlier interruption; the only folder aside is to be this package's.
            _remove(_asides(target, always=True))
            os.rename(target, old)
        os.rename(new, target)
    except BaseException:
        try:
            if os.path.lexists(old) and not os.path.lexists(target):
                os.rename(old, target)
        finally:
            shutil.rmtree(new, ignore_errors=True)
        raise
    try:
        sync_folder(target.parent)
    except OSError as error:
        if os.path.lexists(old):
            error.add_note(f"{target} is the new package; the old one is kept in {old}.")
        raise
    # Only now is the new package sure to survive a loss of power.
    _remove(_asides(target, always=True))


def _remove(folders: list[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
