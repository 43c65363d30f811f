"""The on-disk format of an icnnrt package, version 2; this docstring is its specification.

A package is a folder, by custom named `<name>.icnn`, of plain files:

    manifest.json          what the package holds; sizes and SHA-256 of the other files
    weights.safetensors    every weight, once
    value.onnx             energy and gradient      (x, y) -> f, gradient
    gradient.onnx          in place of value.onnx where kind is "gradient": (x, y) -> gradient
    solve.onnx             in place of value.onnx where kind is "qp": x -> z, status [B] int32, residual [B, 3]
    solve_adjoint.onnx     with it                  (x, z_bar) -> theta_bar, x_bar
                           both take tolerance and steps too, with a default of 0: each program's own. Packages written
                           by earlier versions do not
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

Bounds, checked before anything is allocated: K <= 4096, steps <= 1000, K n <= 2^28, at most 2^31 elements in a shape
and in all weights together, 65536 weights, 256 MiB a graph, 16 MiB of safetensors header, 64 MiB of golden data.

weights.safetensors is an ordinary safetensors file: 8 bytes of header length N (little-endian), N bytes of JSON header,
data. The header agrees exactly with the manifest's tensors; their bytes follow one another without gap or overlap, each
tensor starting at a multiple of its item size. A tensor has the sign it is given, a trainable one only finite entries:
the convexity of the energy rests on the first.

Graphs are ONNX models whose operators come from the default ONNX domain or from ai.icnnrt, never
EPContext, and whose functions are defined in ai.icnnrt only. An initializer may keep its bytes in
weights.safetensors: location exactly "weights.safetensors", offset 8 + N + the tensor's data
offset, length the tensor's size. It then is one whole tensor of that file, so writing new weights
of the same names, shapes and dtypes updates every graph and leaves the graphs as they are.

golden.safetensors holds the inputs of one batch by their names (x, y, y_dot, of a box lower and upper; of kind "qp" x
alone) and the outputs of each graph replayed as "<role>.<output>": what the machine of the export computed from them.

Version 1 is read too, and written back as it came: `icnnrt.format.upgrade` says what it lacks. Version 2 is open until
it is released.

A reader checks all of this before use. The hashes tell damage and half-written packages from whole ones; they are no
signature, and a package can still ask for a long computation: it is data from whoever made it.

A new package is written to a hidden sibling folder, flushed to the disk, then renamed into place. Replacing one takes
two renames, the old folder aside (`.<name>.old-<token>`) and the new one in: whatever interrupts them, the path holds
the old package, the new one, or for the instant between the renames nothing. It never holds a mixture. If that instant
is where the power fails, the old package lies whole in the folder aside. A reader that finds nothing at the path
therefore reads the newest folder aside that is whole, as the package at that path; it renames nothing. A folder aside
means nothing while there is something at the path: a write deletes those of its own name, before it moves the old
package aside and when the new one is in place. A folder `.<name>.new-<token>` that a crash left behind may be deleted.
What a package's folder holds besides the package stays: a replacement has links or copies of such files in the new
folder before it is renamed, so they are at the path whenever a package is, and it refuses to begin where one of them is
a folder or anything else that cannot be in two places. A file in a folder aside that is neither the package's nor at
the path is never deleted, and keeps that folder. A reader that is opening a package while it is replaced may be told
that a file is missing or differs; it should open it again.
"""

import contextlib
import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from icnnrt.arguments import flag, instance, names, refused
from icnnrt.errors import InputError, PackageError
from icnnrt.format import replacement, wire
from icnnrt.format.contents import check_arrays, check_table, checked_contents, safetensors_bytes
from icnnrt.format.folder import StrPath, asides, folder_of, read_folder
from icnnrt.format.manifest import (
    GOLDEN_FILE,
    MANIFEST_FILE,
    OP_DOMAIN,
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
)
from icnnrt.format.signatures import listed
from icnnrt.format.signs import NONNEGATIVE, Sign, united
from icnnrt.format.verdict import Convexity
from icnnrt.printable import named, show


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
        folder = folder_of(path)

        def read(place: Path) -> "Package":
            manifest, files, ignored = read_folder(place, follow_links)
            return cls(folder, *checked_contents(manifest, files), ignored)

        try:
            return read(folder)
        except PackageError as error:
            found = asides(folder)
            # The path once more, as a replacement that was under way may have ended meanwhile.
            for place in (*found, folder) if found else ():
                with contextlib.suppress(PackageError):
                    return read(place)
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
        check_table("parity", parity)
        check_table("metadata", metadata)
        if convexity is not None:
            instance(convexity, "convexity", Convexity, "a Convexity or None")
        if weights is None:
            weights, golden, convexity = self.weights, self.golden, convexity or self.manifest.convexity
        check_arrays(weights)
        for name, old in self.weights.items():
            new = weights.get(name)
            if new is None or new.shape != old.shape or new.dtype != old.dtype:
                came = "nothing" if new is None else f"{new.dtype}{list(new.shape)}"
                remedy = "the graphs fix every name, shape and dtype, so export the model again to change them"
                raise refused("weights", f"{old.dtype}{list(old.shape)} for {show(name)}", came, remedy)
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
    check_arrays(weights)
    for argument, given, kind_of in (
        ("solver", solver, SolverSpec),
        ("domain", domain, Domain),
        ("train", train, TrainingSpec),
        ("polyhedron", polyhedron, PolyhedronSpec),
        ("convexity", convexity, Convexity),
    ):
        if given is not None:
            instance(given, argument, kind_of, f"a {kind_of.__name__} or None")
    for argument, listed_names in (("nonnegative", nonnegative), ("trainable", trainable), ("signs", signs or {})):
        names(listed_names, argument, "names of weights")
    for argument, shape in (("x_shape", x_shape), ("y_shape", y_shape)):
        if not isinstance(shape, list | tuple):
            raise refused(argument, "a tuple of sizes", show(shape))
    for argument, content in (("producer", producer), ("parity", parity), ("metadata", metadata), ("golden", golden)):
        check_table(argument, content)
    check_table("graphs", graphs, needed=True)
    signs = signs or {}
    for argument, listed_names in (("nonnegative", nonnegative), ("trainable", trainable), ("signs", signs)):
        for unknown in sorted(set(listed_names) - weights.keys()):
            remedy = f"the weights are {show(sorted(weights))}"
            raise refused(argument, "names of weights", show(unknown), remedy)
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
        instance(graph, "graphs", bytes, f"the bytes of an ONNX file for {show(role)}", "serialise the model first")
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


def _survey(data: bytes, file: str) -> wire.Survey:
    """Walk a graph given as an argument; what is malformed there is the caller's."""
    try:
        return wire.survey(data, file)
    except PackageError as error:
        raise InputError(f"graphs: {error}") from error


def _write(
    path: StrPath,
    draft: Manifest,
    graphs: Mapping[str, bytes],
    weights: Mapping[str, np.ndarray],
    golden: Mapping[str, np.ndarray],
    overwrite: bool,
) -> Package:
    """Complete the draft with sizes and hashes, check the whole, and put it on the disk."""
    target = folder_of(path)
    beside = replacement.check_target(target, overwrite)
    files = {f"{role}.onnx": graph for role, graph in graphs.items()}
    files |= {WEIGHTS_FILE: safetensors_bytes(weights)} | ({GOLDEN_FILE: safetensors_bytes(golden)} if golden else {})
    entries = {name: File(name, hashlib.sha256(data).hexdigest(), len(data)) for name, data in files.items()}
    manifest = replace(
        draft,
        graphs={role: GraphFile(**vars(entries[f"{role}.onnx"])) for role in graphs},
        weights=replace(draft.weights, **vars(entries[WEIGHTS_FILE])),
        golden=entries.get(GOLDEN_FILE),
    )
    try:
        manifest = manifest.checked()  # before what its graphs take and give, which it says how to tell
        told = {role: listed(manifest, role, graph) for role, graph in graphs.items()}
        manifest = replace(
            manifest, graphs={role: replace(g, signature=told[role]) for role, g in manifest.graphs.items()}
        )
        files[MANIFEST_FILE] = manifest.to_json()
        manifest = Manifest.from_json(files[MANIFEST_FILE])
        checked = checked_contents(manifest, files)
    except MemoryError:
        raise
    except Exception as error:  # of whatever an argument holds that is no text and no number
        raise InputError(f"{target.name} would not be a valid package: {error}") from error
    replacement.replace_folder(target, files, beside)
    return Package(target, *checked, tuple(sorted(path.name for path in beside)))
