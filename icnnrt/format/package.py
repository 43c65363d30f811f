"""The on-disk format of an icnnrt package, version 2; this docstring is its specification.

A package is a folder, by custom named `<name>.icnn`, of plain files:

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

Beside them may lie what people keep where they keep packages: whatever has a name that begins with a dot (.git,
.DS_Store, .cache), README.md, LICENSE, Thumbs.db and lost+found. It is not part of the package, is never read or
followed, and `Package.ignored` and `icnnrt inspect` name it. Any other file that the manifest does not list, and any
subfolder, is refused.

Symbolic links are refused too, unless the reader is asked to follow them (`follow_links`), as the caches of model hubs
and mounted volumes are made of them: then each file of the package may be a link, or several in a row, that ends at a
plain file. What is read is checked as ever, and where a link leads is the affair of whoever made it.

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
                     ...}, all that `convexity.Convexity` holds; of a proof, "rests_on": [name, ...] are the weights
                     whose values it needs, of the others it needs no more than their signs
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

Version 1 is read too, and written back as it came: `icnnrt.format.upgrade` says what it lacks. Version 2 is open until
it is released.

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
crash left behind may be deleted. What a package's folder holds besides the package stays: a replacement
has links or copies of such files in the new folder before it is renamed, so they are at the path whenever
a package is, and it refuses to begin where one of them is a folder or anything else that cannot be in
two places. A file in a folder aside that is neither the package's nor at the path is never deleted, and
keeps that folder. A reader that is opening a package while it is replaced may be told
that a file is missing or differs; it should open it again.
"""

import contextlib
import errno
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

from icnnrt.arguments import flag
from icnnrt.errors import InputError, PackageError
from icnnrt.format import wire
from icnnrt.format.fields import AGAIN, JsonObject, exactly, listing, load_json, surrogate, table, wrong
from icnnrt.format.files import sync_folder
from icnnrt.format.manifest import (
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
from icnnrt.format.signatures import declared, fits, listed, shown
from icnnrt.format.signs import NONNEGATIVE, Sign, united
from icnnrt.format.verdict import Convexity
from icnnrt.limits import check
from icnnrt.printable import harmless, named, show

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
    "opened",
    "weight_layout",
    "write",
]

# Far more than a package can have, and few enough to list.
MAX_ENTRIES: Final = 4096
# Of a package's folder, in bytes; file systems take 255, and folders aside have a token too.
MAX_NAME: Final = 224
# What lies beside packages in working copies, on volumes and in file managers; so does what begins with a dot.
IGNORED: Final = frozenset(("README.md", "LICENSE", "Thumbs.db", "lost+found"))

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
    ignored:   names of what else lies in the folder and is not read, such as .git or README.md

    Sessions are made from `graphs` and `weights` rather than from the files, so that what runs is
    what was checked, even if the folder changes meanwhile.
    """

    path: Path
    manifest: Manifest
    graphs: Mapping[str, bytes]
    weights: Mapping[str, np.ndarray]
    golden: Mapping[str, np.ndarray]
    ignored: tuple[str, ...] = ()

    @property
    def identity(self) -> str:
        """SHA-256 of the manifest, which holds those of all other files, in hexadecimal: equal packages have equal
        ones."""
        return hashlib.sha256(self.manifest.to_json()).hexdigest()

    def __repr__(self) -> str:
        return f"<Package {named(self.manifest.name)} at {self.path}: {', '.join(self.graphs)}>"

    @classmethod
    def open(cls, path: StrPath, *, follow_links: bool = False) -> "Package":
        """Read the package at `path` and check everything the module docstring promises.

        Each file is read once; hashing, checking and use share those bytes. Where the replacement
        of the package was interrupted, that is the old one (see the module docstring).

        follow_links: take symbolic links to files for the files, as the caches of model hubs and mounted volumes
                      need. Where they lead is up to whoever made them, so ask for it where that is you

        Raises `PackageError` with one sentence at the first thing that is wrong, `InputError` for what is no path.
        """
        follow_links = flag(follow_links, "follow_links")
        folder = _folder_of(path)
        try:
            return cls(folder, *_read_and_check(folder, follow_links))
        except PackageError as error:
            asides = _asides(folder)
            # The path once more, as a replacement that was under way may have ended meanwhile.
            for place in (*asides, folder) if asides else ():
                with contextlib.suppress(PackageError):
                    return cls(folder, *_read_and_check(place, follow_links))
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
        _check_table("parity", parity)
        _check_table("metadata", metadata)
        if convexity is not None and not isinstance(convexity, Convexity):
            raise InputError(f"convexity: expected a Convexity or None, but got {type(convexity).__name__}.")
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


def opened(source: StrPath | Package) -> Package:
    """The package itself, where it is open already, or the one at a path."""
    return source if isinstance(source, Package) else Package.open(source)


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
    for argument, given, kind_of in (
        ("solver", solver, SolverSpec),
        ("domain", domain, Domain),
        ("train", train, TrainingSpec),
        ("polyhedron", polyhedron, PolyhedronSpec),
        ("convexity", convexity, Convexity),
    ):
        if given is not None and not isinstance(given, kind_of):
            raise InputError(f"{argument}: expected a {kind_of.__name__} or None, but got {type(given).__name__}.")
    for argument, names in (("nonnegative", nonnegative), ("trainable", trainable), ("signs", signs or {})):
        several = isinstance(names, list | tuple | set | frozenset | Mapping)
        if not several or not all(isinstance(one, str) for one in names):
            raise InputError(f"{argument}: expected a list of names of weights, but got {show(names)}.")
    for argument, shape in (("x_shape", x_shape), ("y_shape", y_shape)):
        if not isinstance(shape, list | tuple):
            raise InputError(f"{argument}: expected a tuple of sizes, but got {show(shape)}.")
    for argument, content in (("producer", producer), ("parity", parity), ("metadata", metadata), ("golden", golden)):
        _check_table(argument, content)
    _check_table("graphs", graphs, needed=True)
    signs = signs or {}
    for argument, names in (("nonnegative", nonnegative), ("trainable", trainable), ("signs", signs)):
        for unknown in sorted(set(names) - weights.keys()):
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


def _check_table(argument: str, table: object, needed: bool = False) -> None:
    if not isinstance(table, Mapping) and (needed or table is not None):
        raise InputError(f"{argument}: expected a dict, but got {type(table).__name__}.")


def _check_arrays(weights: Mapping[str, object]) -> None:
    _check_table("weights", weights, needed=True)
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
        check(f"{entry.file}: the check of it")
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
    steps, there = wire.MAX_STEPS, frozenset(extents.values())
    for graph in manifest.graphs.values():
        steps -= _check_graph(manifest, graph.file, files[graph.file], there, steps)
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
        raise PackageError(f"{GOLDEN_FILE}: is no safetensors file ({error}); {AGAIN}.") from harmless(error)
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


def _survey(data: bytes, file: str) -> wire.Survey:
    """Walk a graph given as an argument; what is malformed there is the caller's."""
    try:
        return wire.survey(data, file)
    except PackageError as error:
        raise InputError(f"graphs: {error}") from error


def _check_graph(manifest: Manifest, file: str, data: bytes, extents: Collection[tuple[int, int]], steps: int) -> int:
    """Refuse a graph that reads other files, or uses operators from elsewhere; of `steps`, how many that took."""
    found = wire.survey(data, file, steps)
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
    if found.ir_version != manifest.ir_version:
        wrong(f"{file}: ir_version", f"{manifest.ir_version} as in {MANIFEST_FILE}", found.ir_version)
    versions = {"": manifest.opset, "ai.onnx": manifest.opset, OP_DOMAIN: 1}
    for domain, version in sorted(found.opset_imports):
        # Imports from other domains are harmless, as none of their operators is used.
        if version != versions.get(domain, version):
            wrong(f"{file}: the imported opset of {show(domain)}", f"{versions[domain]}", version)
    return found.steps


# --- Reading from the disk -----------------------------------------------------------------------


def _folder_of(path: object, argument: str = "path") -> Path:
    """The absolute path of a folder that a caller gave, or the `InputError`."""
    try:
        given = os.fspath(path)  # type: ignore[call-overload]
        if not isinstance(given, str):
            raise TypeError
        return Path(os.path.abspath(given))
    except OSError as error:  # a relative path, and the working directory is gone
        raise InputError(
            f"{argument}: the working directory, from which {show(str(path))} is counted, cannot be found "
            f"({error.strerror}); give an absolute path."
        ) from error
    except Exception:
        raise InputError(
            f"{argument}: expected a path, text or a pathlib.Path, but got {type(path).__name__}; see pathlib."
        ) from None


def _read_and_check(
    folder: Path, follow_links: bool
) -> tuple[Manifest, Mapping[str, bytes], Mapping[str, np.ndarray], Mapping[str, np.ndarray], tuple[str, ...]]:
    manifest, files, ignored = _read_folder(folder, follow_links)
    return *_check_files(manifest, files), ignored


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


def _read_folder(folder: Path, follow_links: bool) -> tuple[Manifest, dict[str, bytes], tuple[str, ...]]:
    """Read the manifest and then exactly the files it lists, by name and with the size it gives."""
    names, ignored = _list_folder(folder, follow_links)
    manifest = Manifest.from_json(_read_file(folder / MANIFEST_FILE, follow_links, limit=MAX_MANIFEST_BYTES))
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
    files = {name: _read_file(folder / name, follow_links, size=size) for name, size in listed.items()}
    return manifest, files, ignored


def _is_ignored(name: str) -> bool:
    return name.startswith(".") or name in IGNORED


def _list_folder(folder: Path, follow_links: bool = False) -> tuple[set[str], tuple[str, ...]]:
    """The names in a package folder, and those of what is ignored there.

    Refuses a folder without a manifest, and what is no plain file: with `follow_links`, no link to one either.
    """
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
            listed = list(islice(entries, MAX_ENTRIES + 1))
        # First, as it matters little what else such a folder holds; among very many files it may not be listed.
        if MANIFEST_FILE not in {entry.name for entry in listed} and not os.path.lexists(folder / MANIFEST_FILE):
            raise PackageError(
                f"expected a package, but the folder has no {MANIFEST_FILE}; "
                "give the path of the package folder itself, or export the package again."
            )
        if len(listed) > MAX_ENTRIES:
            raise PackageError(
                f"a package holds a few files, but there are more than {MAX_ENTRIES} in the folder; move out what does "
                "not belong to it."
            )
        names, ignored = set(), []
        for entry in sorted(listed, key=lambda e: e.name):
            if _is_ignored(entry.name):
                ignored.append(entry.name)
                continue
            if kind := _no_file(entry, follow_links):
                raise PackageError(f"a package holds plain files only, but {show(entry.name)} is {kind}.")
            names.add(entry.name)
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        raise PackageError(f"cannot be read ({error}); check the path and its permissions.") from error
    return names, tuple(ignored)


def _no_file(entry: os.DirEntry[str], follow_links: bool) -> str:
    """What an entry of a package's folder is, and a remedy, if it is no file; empty if it is one."""
    whole = "copy the package so that it holds the files themselves, and nothing else"
    if not entry.is_symlink():
        if entry.is_file(follow_symlinks=False):
            return ""
        kind = "a folder" if entry.is_dir(follow_symlinks=False) else "neither a file nor a folder"
        return f"{kind}; {whole}"
    if not follow_links:
        return (
            "a symbolic link; pass follow_links=True, or --follow-links on the command line, if whoever made the link "
            f"is to be trusted, or {whole}"
        )
    try:
        mode = os.stat(entry.path).st_mode
    except FileNotFoundError:
        return "a symbolic link to what is not there; copy the files that it and others lead to"
    except OSError as error:
        why = "leads in a circle" if error.errno == errno.ELOOP else f"cannot be followed ({error.strerror})"
        return f"a symbolic link that {why}; {whole}"
    if stat.S_ISREG(mode):
        return ""
    kind = "a folder" if stat.S_ISDIR(mode) else "what is neither a file nor a folder, such as a device or a pipe"
    return f"a symbolic link to {kind}; {whole}"


def _read_file(path: Path, follow_links: bool = False, *, size: int | None = None, limit: int | None = None) -> bytes:
    """Read a file that should have exactly `size` bytes, or at most `limit`."""
    try:
        # The name may have become a link or a pipe since it was listed: do not follow or wait.
        flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
        flags |= 0 if follow_links else getattr(os, "O_NOFOLLOW", 0)
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
    target = _folder_of(path)
    beside = _check_target(target, overwrite)
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
        manifest = Manifest.from_json(files[MANIFEST_FILE])
        checked = _check_files(manifest, files)
    except MemoryError:
        raise
    except Exception as error:  # of whatever an argument holds that is no text and no number
        raise InputError(f"{target.name} would not be a valid package: {error}") from error
    _replace_folder(target, files, beside)
    return Package(target, *checked, tuple(sorted(path.name for path in beside)))


def check_outside(path: StrPath, argument: str) -> None:
    """Refuse a place for a file or folder that lies in a package: with anything else in it a package does not open.

    Links are followed, for the place may be reached by them; whether case counts is the file system's affair.
    """
    try:
        folders = Path(os.path.realpath(path)).parents
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        raise InputError(f"{argument}: {path} cannot be looked at ({error}); choose another.") from error
    for folder in folders:
        if os.path.lexists(folder / MANIFEST_FILE) and _has_manifest(folder, follow_links=True):
            raise InputError(
                f"{argument}: {path} lies in the package {folder}, which would not open with another file in it; "
                "choose a place outside."
            )


def _check_target(target: Path, overwrite: bool) -> tuple[Path, ...]:
    """Refuse a path that is taken by anything but a package that may be overwritten, or that lies in one.

    Returns what lies in the folder to be replaced and is not the package's, which is to be in the new one too.
    """
    there = old = None
    overwrite = flag(overwrite, "overwrite")
    try:
        if "\0" in str(target):
            raise InputError(f"path: expected a place on the disk, but got {show(str(target))}; choose another.")
        if len(os.fsencode(target.name)) > MAX_NAME:
            raise InputError(
                f"path: expected a name of at most {MAX_NAME} bytes, as the folders that a replacement makes beside it "
                f"have longer ones, but got one of {len(os.fsencode(target.name))}; choose a shorter one."
            )
        if not target.parent.is_dir():
            raise InputError(
                f"path: expected a place in an existing folder, but {target.parent} is none; create it first."
            )
        check_outside(target, "path")
        there = os.path.lexists(target)
        old = target if there else next(filter(_is_package, _asides(target)), None)
        if there and (target.is_symlink() or not _is_package(target)):
            raise InputError(
                f"path: {target} exists and is not a package of plain files alone, so it is not replaced; "
                "choose another path or remove it yourself."
            )
        beside = _beside(old) if old else ()
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        if isinstance(error, InputError):
            raise
        raise InputError(f"path: {target} cannot be looked at ({error}); choose another.") from error
    if old and not overwrite:
        if there:
            raise InputError(f"path: {target} exists; pass overwrite=True to replace it, or choose another path.")
        raise InputError(
            f"path: {target} is a package whose replacement was interrupted, in {old.name}; pass overwrite=True "
            "to replace it, or choose another path."
        )
    stuck = [path.name for path in beside if not _can_be_carried(path)]
    if stuck:
        names = ", ".join(show(name) for name in stuck[:5]) + (f" and {len(stuck) - 5} more" if len(stuck) > 5 else "")
        raise InputError(
            f"path: {target} also holds {names}, which a replacement of the folder cannot take along; choose another "
            "path, or move what is not the package's out of the folder."
        )
    return beside


def _beside(folder: Path) -> tuple[Path, ...]:
    """What lies in a package's folder and is not read."""
    return tuple(folder / name for name in _list_folder(folder)[1])


def _can_be_carried(path: Path) -> bool:
    mode = path.lstat().st_mode
    return stat.S_ISREG(mode) or stat.S_ISLNK(mode)


def _carry(path: Path, folder: Path) -> None:
    """Have a file of the old folder in the new one too: a second name for it, or a copy where there are no such."""
    new = folder / path.name
    with contextlib.suppress(FileNotFoundError):  # somebody has removed it
        if path.is_symlink():
            os.symlink(os.readlink(path), new)
            return
        try:
            os.link(path, new)
        except FileNotFoundError:
            raise
        except OSError:  # a file system that has no links
            shutil.copy2(path, new)
            with open(new, "rb+") as copy:
                os.fsync(copy.fileno())


def _is_package(folder: Path) -> bool:
    """Tell whether a folder may be replaced as a package: it holds nothing else, or what is ignored in one."""
    try:
        if not all(_PACKAGE_FILE.fullmatch(name) for name in _list_folder(folder)[0]):
            return False
    except PackageError:
        return False
    return _has_manifest(folder)


def _has_manifest(folder: Path, follow_links: bool = False) -> bool:
    """Whether the manifest.json of a folder says that it is a package's, and not one of the many others."""
    try:
        data = _read_file(folder / MANIFEST_FILE, follow_links, limit=MAX_MANIFEST_BYTES)
        manifest = load_json(data, MANIFEST_FILE)
    except PackageError:
        return False
    return isinstance(manifest, dict) and manifest.get("format") == FORMAT


def _replace_folder(target: Path, files: Mapping[str, bytes], beside: Collection[Path] = ()) -> None:
    """Put a folder with these files, and what was `beside` the old ones, at `target`.

    The module docstring says what holds on the way.
    """
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
        for path in beside:
            _carry(path, new)
        sync_folder(new)
        if os.path.lexists(target):
            # Left behind by an earlier interruption; the only folder aside is to be this package's.
            _remove_asides(target)
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
    _remove_asides(target)


def _remove_asides(target: Path) -> None:
    """Delete the folders aside of `target`, but no file that is neither a package's nor at `target` too."""
    for folder in _asides(target, always=True):
        with contextlib.suppress(OSError):
            for name in os.listdir(folder):
                if _PACKAGE_FILE.fullmatch(name) or (_is_ignored(name) and os.path.lexists(target / name)):
                    with contextlib.suppress(OSError):  # a folder, for one
                        os.unlink(folder / name)
            os.rmdir(folder)
