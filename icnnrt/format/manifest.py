"""The contents of manifest.json as dataclasses whose fields say what each of them should be.

The docstring of `icnnrt.format.package` is the specification of the format; this file holds the part of it that one
JSON file can say about itself. What it says about the other files is checked in `icnnrt.format.contents`.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Final, TypeAlias

import numpy as np

from icnnrt.arguments import refused
from icnnrt.errors import PackageError
from icnnrt.format.fields import (
    AGAIN,
    SHA256,
    Depending,
    JsonObject,
    LeftOut,
    boolean,
    exactly,
    fields_of,
    integer,
    listing,
    load_json,
    matching,
    maybe,
    not_negative,
    plain,
    positive,
    real,
    record,
    surrogate,
    table,
    text,
    wrong,
)
from icnnrt.format.signatures import (
    ENERGY_ROLES,
    POLYHEDRON_ROLES,
    QP_ROLES,
    SOLVER_ROLES,
    TRAIN_ROLE,
    Signature,
    Tensor,
)
from icnnrt.format.signs import NONNEGATIVE, Sign
from icnnrt.format.upgrade import CURRENT, UNTOLD, as_version, upgraded
from icnnrt.format.verdict import Convexity, recorded
from icnnrt.mathematics.domains import MODELS
from icnnrt.printable import show

FORMAT: Final = "icnnrt"
FORMAT_VERSION: Final = CURRENT
MANIFEST_FILE: Final = "manifest.json"
WEIGHTS_FILE: Final = "weights.safetensors"
GOLDEN_FILE: Final = "golden.safetensors"
OP_DOMAIN: Final = "ai.icnnrt"

MAX_MANIFEST_BYTES: Final = 4 << 20
MAX_HEADER_BYTES: Final = 16 << 20
# Weights live in their own file, so even a large graph takes a few MiB.
MAX_GRAPH_BYTES: Final = 256 << 20
MAX_GOLDEN_BYTES: Final = 64 << 20
MAX_ITERATIONS: Final = 4096
MAX_STEPS: Final = 1000
# The cuts take K n slopes a sample; 2^28 of them are 1 GiB in float32.
MAX_SLOPES: Final = 1 << 28
MAX_ELEMENTS: Final = 1 << 31
MAX_RANK: Final = 8
MAX_WEIGHTS: Final = 1 << 16
MAX_GRAPHS: Final = 64
# Of a graph; the gradients of all weights are among them.
MAX_TENSORS: Final = MAX_WEIGHTS + 256
# The newest that a released onnxruntime loads (1.32).
MAX_OPSET: Final = 26
MAX_IR_VERSION: Final = 13

# safetensors' name of each dtype a weight may have.
SAFETENSORS_DTYPES: Final = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}
# safetensors keeps this key of its header for itself.
RESERVED_NAME: Final = "__metadata__"
_FLOATING: Final = ("float64", "float32", "float16")

Scalar: TypeAlias = str | bool | int | float | None

# --- Checks of single values ---------------------------------------------------------------------


def shape_of(value: object, place: str) -> tuple[int, ...]:
    shape = listing(integer(1, MAX_ELEMENTS), MAX_RANK)(value, place)
    if math.prod(shape) > MAX_ELEMENTS:
        wrong(place, f"a shape of at most {MAX_ELEMENTS} elements", value)
    return shape


def context_shape_of(value: object, place: str) -> tuple[int, ...]:
    """Like `shape_of`, but 0 is a size too: an energy of y alone has x of shape [B, 0]."""
    shape = listing(integer(0, MAX_ELEMENTS), MAX_RANK)(value, place)
    if math.prod(max(size, 1) for size in shape) > MAX_ELEMENTS:
        wrong(place, f"a shape of at most {MAX_ELEMENTS} elements", value)
    return shape


def decision_shape_of(value: object, place: str) -> tuple[int, ...]:
    shape = shape_of(value, place)
    if len(shape) != 1:
        wrong(place, "a list of exactly one dimension", value)
    return shape


def scalar(value: object, place: str) -> Scalar:
    if isinstance(value, str):
        if surrogate(value):
            wrong(place, "text", value)
    elif isinstance(value, int):
        if not abs(value) < 1 << 63:
            wrong(place, "an integer of at most 64 bits", value)
    elif value is not None and not isinstance(value, float):
        wrong(place, "text, a boolean, a number or null", value)
    return value


def measure(value: object, place: str) -> float | Mapping[str, float]:
    return table(real, 1024)(value, place) if isinstance(value, dict) else real(value, place)


def _weight_name(value: object, place: str) -> str:
    name = text(value, place)
    if name == RESERVED_NAME:
        wrong(place, f"any name but {RESERVED_NAME}", value)
    return name


def _role_file(value: object, place: str) -> str:
    """<role>.onnx, where the role is the key that the entry has."""
    return exactly(f"{place.split('.')[-2]}.onnx")(value, place)


def _default(value: object, place: str) -> bool | int | float:
    if isinstance(value, bool):
        return value
    return integer(-(1 << 63), (1 << 63) - 1)(value, place) if isinstance(value, int) else real(value, place)


def _size(value: object, place: str) -> int | str:
    if isinstance(value, str):
        return _OPEN_SIZE(value, place)
    return integer(0, MAX_ELEMENTS)(value, place)


_LOWER_CASE: Final = re.compile(r"[a-z][a-z0-9_]*")
_ROLE: Final = matching(_LOWER_CASE, "a role of lower-case letters, digits and _")
_SLOT: Final = matching(_LOWER_CASE, "a name of lower-case letters, digits and _")
_OPERATOR: Final = matching(re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}"), "the name of an operator")
_OPEN_SIZE: Final = matching(re.compile(r"[A-Za-z_][A-Za-z0-9_.]{0,255}"), "the name of an open size")
FILE_SIZE: Final = integer(0, 1 << 62)


def _only_of(key: str, value: str, check: Any) -> Depending:
    """A field that is there where another one has this value."""
    return Depending(lambda known: check if known[key] == value else None)


# --- Records -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Domain:
    """The set that y* lies in, with the regulariser R that belongs to it; y* minimises f + R.

    unit_box   [0, 1]^n, R = −H(y) = Σ y log y + (1−y) log(1−y)
    box        lower <= y <= upper, inputs of the graphs for each sample; R = −H(p), p = (y − lower)/(upper − lower)
    simplex    y >= 0 and 1'y = 1, R = Σ y log y
    space      R^n, R = (μ/2)‖y‖²
    """

    kind: Annotated[str, exactly(*MODELS)] = "unit_box"
    mu: Annotated[float | None, _only_of("kind", "space", positive)] = None
    """μ of `space`; None elsewhere."""

    @property
    def regulariser(self) -> str:
        """ "entropy" or "quadratic"."""
        return MODELS[self.kind].family


@dataclass(frozen=True)
class SolverSpec:
    """The solver built into argmin.onnx: `iterations` cuts K, each with `steps` interior-point steps.

    An answer counts as solved when its duality gap and its KKT residual are within the tolerances.
    """

    iterations: Annotated[int, integer(1, MAX_ITERATIONS)]
    steps: Annotated[int, integer(1, MAX_STEPS)]
    gap_tolerance: Annotated[float, positive]
    residual_tolerance: Annotated[float, positive]
    name: Annotated[str, exactly("BundleEntropy", "BregmanProximalGradient")] = "BundleEntropy"
    step_size: Annotated[float | None, _only_of("name", "BregmanProximalGradient", positive)] = None
    """τ of BregmanProximalGradient; None elsewhere."""


@dataclass(frozen=True)
class OpSet:
    """The operators that the graphs use from one custom domain."""

    version: Annotated[int, integer(1, 1)]
    names: Annotated[tuple[str, ...], listing(_OPERATOR, 1024)]


@dataclass(frozen=True)
class File:
    """A file of the package: its name, its SHA-256 in hexadecimal, its size in bytes. Golden data as it stands."""

    file: Annotated[str, exactly(GOLDEN_FILE)]
    sha256: Annotated[str, SHA256]
    bytes: Annotated[int, integer(8, MAX_GOLDEN_BYTES)]


@dataclass(frozen=True)
class GraphFile(File):
    """An ONNX file of the package."""

    file: Annotated[str, _role_file]
    bytes: Annotated[int, integer(1, MAX_GRAPH_BYTES)]
    signature: Signature | None = None
    """What it takes and gives, see `icnnrt.format.signatures`; None until the graph itself has been looked at."""


@dataclass(frozen=True)
class WeightSpec:
    """One weight: shape, numpy dtype name, the sign that f's convexity asks of it, whether it may be updated."""

    shape: Annotated[tuple[int, ...], shape_of]
    dtype: Annotated[str, exactly(*SAFETENSORS_DTYPES)]
    sign: Annotated[Sign | None, Depending(lambda known: lambda v, p: Sign.from_json(v, p, known["shape"]))]
    trainable: Annotated[bool, boolean]

    @property
    def nonnegative(self) -> bool:
        """Whether every entry has to be >= 0."""
        return self.sign == Sign(NONNEGATIVE)


def _of_floats(spec: WeightSpec, place: str) -> None:
    if (spec.trainable or spec.sign) and spec.dtype not in _FLOATING:
        wrong(f"{place}.dtype", "a float dtype, as the weight is trainable or has a sign", spec.dtype)


@dataclass(frozen=True)
class WeightsFile:
    """The safetensors file of the package and the tensors it holds, by name."""

    file: Annotated[str, exactly(WEIGHTS_FILE)]
    sha256: Annotated[str, SHA256]
    bytes: Annotated[int, FILE_SIZE]
    tensors: Annotated[Mapping[str, WeightSpec], table(record(WeightSpec, _of_floats), MAX_WEIGHTS, _weight_name)]

    @property
    def trainable(self) -> tuple[str, ...]:
        """The names of those that may be updated."""
        return tuple(name for name, spec in self.tensors.items() if spec.trainable)

    @property
    def signs(self) -> dict[str, Sign]:
        """What is asked of the signs of weights, by the names of those of which something is."""
        return {name: spec.sign for name, spec in self.tensors.items() if spec.sign}


@dataclass(frozen=True)
class TrainingSpec:
    """What train.onnx does in one step: the loss of y*, the optimiser, and the weights that it updates.

    The optimiser's state is the step count `state.step` and for every slot one vector, `state.<slot>`, of the entries
    of all updated weights in their order, each row by row. It starts at zero.
    """

    loss: Annotated[str, text]
    optimizer: Annotated[str, exactly("SGD", "Adam", "AdamW")]
    settings: Annotated[Mapping[str, float], table(real, 64)]
    slots: Annotated[tuple[str, ...], listing(_SLOT, 8)]
    weights: Annotated[tuple[str, ...], listing(_weight_name, MAX_WEIGHTS)]
    adjoint: Annotated[str, exactly("exact", "prop3")]
    clip_norm: Annotated[float | None, maybe(positive)]
    target_shape: Annotated[tuple[int, ...], context_shape_of]
    target_dtype: Annotated[str, exactly("float64", "float32", "int64")]


@dataclass(frozen=True)
class PolyhedronSpec:
    """What argmin_polyhedron.onnx does unless it is told otherwise, and what adjoint_polyhedron.onnx is."""

    iterations: Annotated[int, integer(1, MAX_ITERATIONS)]
    """The most cuts."""
    mu: Annotated[float, not_negative]
    """μ of the regulariser (μ/2) ‖y‖²."""
    tolerance: Annotated[float, not_negative]
    """Of the gap, relative to max(1, |lower bound|), at which a sample is done."""
    adjoint: Annotated[str, exactly("prop3", "implicit")]
    """ "prop3" or "implicit": `icnnrt.serving.polyhedron_adjoint` tells them apart."""


def _graph_file(value: object, place: str) -> GraphFile:
    fields = JsonObject(value, f"{place}.")
    known = fields.take_all(GraphFile)
    inputs, outputs = fields.take("inputs", _tensors), fields.take("outputs", _tensors)
    fields.close()
    return GraphFile(**known, signature=None if inputs is None or outputs is None else Signature(inputs, outputs))


def _tensors(value: object, place: str) -> Mapping[str, Tensor] | None:
    return None if value is UNTOLD else table(_tensor, MAX_TENSORS)(value, place)


def _tensor(value: object, place: str) -> Tensor:
    fields = JsonObject(value, f"{place}.")
    tensor = Tensor(
        dtype=fields.take("dtype", exactly(*SAFETENSORS_DTYPES)),
        shape=fields.take("shape", listing(_size, MAX_RANK)),
        default=fields.take("default", _default) if "default" in fields.left else None,
    )
    fields.close()
    return tensor


def _graph_entry(graph: GraphFile) -> dict[str, Any]:
    entry = fields_of(graph)
    if graph.signature is not None:
        for key, tensors in vars(graph.signature).items():
            entry[key] = {name: {"dtype": t.dtype, "shape": list(t.shape)} for name, t in tensors.items()}
            for name, t in tensors.items():
                entry[key][name] |= {} if t.default is None else {"default": t.default}
    return entry


@dataclass(frozen=True)
class Manifest:
    """The contents of manifest.json; the module docstring explains every field.

    Instances that `from_json` returns have been checked. One built by hand is checked when it is written.
    """

    name: Annotated[str, text]
    producer: Annotated[Mapping[str, str], table(text, 1024)]
    dtype: Annotated[str, exactly("float32", "float64")]
    x_shape: Annotated[tuple[int, ...], context_shape_of]
    y_shape: Annotated[tuple[int, ...], decision_shape_of]
    domain: Annotated[Domain | None, maybe(record(Domain))]
    solver: Annotated[SolverSpec | None, maybe(record(SolverSpec))]
    opset: Annotated[int, integer(1, MAX_OPSET)]
    ir_version: Annotated[int, integer(8, MAX_IR_VERSION)]
    ops: Annotated[Mapping[str, OpSet], table(record(OpSet), 1, exactly(OP_DOMAIN))]
    graphs: Annotated[Mapping[str, GraphFile], table(_graph_file, MAX_GRAPHS, _ROLE)]
    weights: Annotated[WeightsFile, record(WeightsFile)]
    parity: Annotated[Mapping[str, float | Mapping[str, float]], table(measure, 1024)]
    metadata: Annotated[Mapping[str, Scalar], table(scalar, 1024)]
    kind: Annotated[str, exactly(*ENERGY_ROLES)] = "energy"
    train: Annotated[TrainingSpec | None, LeftOut(record(TrainingSpec))] = None
    polyhedron: Annotated[PolyhedronSpec | None, LeftOut(record(PolyhedronSpec))] = None
    convexity: Annotated[Convexity | None, LeftOut(recorded)] = None
    golden: Annotated[File | None, LeftOut(record(File))] = None
    format: str = FORMAT
    format_version: int = FORMAT_VERSION
    """As it was read, and as it is written again."""

    @classmethod
    def from_json(cls, data: bytes) -> "Manifest":
        """Read and check the bytes of a manifest.json.

        Raises `PackageError` with one sentence: the field, what was expected, what came, the remedy.
        """
        if not isinstance(data, bytes):
            raise refused(MANIFEST_FILE, "its bytes", type(data).__name__, "read the file", kind=PackageError)
        if len(data) > MAX_MANIFEST_BYTES:
            expected, remedy = f"at most {MAX_MANIFEST_BYTES} bytes", "shorten metadata and producer"
            raise refused(MANIFEST_FILE, expected, len(data), remedy, kind=PackageError)
        return _read_manifest(load_json(data, MANIFEST_FILE))

    def checked(self) -> "Manifest":
        """This manifest after the checks of `from_json`; graphs may lack what they take and give."""
        content: Any = load_json(json.dumps(self.content(), allow_nan=False, default=plain).encode(), MANIFEST_FILE)
        for graph in content["graphs"].values():
            graph.setdefault("inputs", UNTOLD)
            graph.setdefault("outputs", UNTOLD)
        return replace(_read_manifest(content), format_version=self.format_version)

    def to_json(self) -> bytes:
        """Return the bytes of manifest.json, of the version it was read in; equal manifests give equal bytes."""
        content = as_version(self.content(), self.format_version)
        text = json.dumps(content, indent=1, allow_nan=False, ensure_ascii=True, default=plain)
        return text.encode() + b"\n"

    def content(self) -> dict[str, Any]:
        """What manifest.json holds in the current version of the format."""
        content = fields_of(self) | {
            "format": self.format,
            "format_version": CURRENT,
            "regulariser": self.domain.regulariser if self.domain else None,
            "graphs": {role: _graph_entry(graph) for role, graph in self.graphs.items()},
        }
        return {key: content[key] for key in _ORDER if key in content}


# Of the keys in the file.
_ORDER: Final = (
    *("format", "format_version", "name", "producer", "dtype", "x_shape", "y_shape", "kind", "domain", "regulariser"),
    *("solver", "opset", "ir_version", "ops", "graphs", "weights", "parity", "metadata"),
    *("train", "polyhedron", "convexity", "golden"),
)


# --- What the fields say of one another ----------------------------------------------------------


def _check_train(manifest: Manifest, place: str) -> None:
    """train.onnx and what the manifest says of it come together, and it updates trainable weights."""
    spec = manifest.train
    if (spec is None) != (TRAIN_ROLE not in manifest.graphs):
        there, missing = ("train", f"graphs.{TRAIN_ROLE}") if spec else (f"graphs.{TRAIN_ROLE}", "train")
        raise PackageError(f"{place}{there} is there but {missing} is missing; {AGAIN}.")
    if spec is None:
        return
    if not spec.weights:
        wrong(f"{place}train.weights", "the names of one weight or more", [])
    for name in spec.weights:
        tensor = manifest.weights.tensors.get(name)
        if tensor is None or not tensor.trainable or tensor.dtype != manifest.dtype:
            wrong(f"{place}train.weights", f"names of trainable weights of dtype {manifest.dtype}", name)
    for field, names in (("weights", spec.weights), ("slots", spec.slots)):
        if len(set(names)) < len(names):
            wrong(f"{place}train.{field}", "names that occur once", list(names))


def _check_polyhedron(manifest: Manifest, place: str) -> None:
    """The two graphs and what the manifest says of them come together, in a package of an energy."""
    there = [role for role in POLYHEDRON_ROLES if role in manifest.graphs]
    if manifest.polyhedron is None and there:
        raise PackageError(f"{place}graphs.{there[0]} is there but polyhedron is missing; {AGAIN}.")
    if manifest.polyhedron is None:
        return
    for role in POLYHEDRON_ROLES:
        if role not in there:
            raise PackageError(f"{place}polyhedron is there but graphs.{role} is missing; {AGAIN}.")
    if manifest.kind != "energy":
        wrong(f"{place}polyhedron", f"absent of kind {show(manifest.kind)}", "there")


def _check_roles(manifest: Manifest, regulariser: str | None, place: str) -> None:
    """The graphs that kind and solver ask for are there; a solver has a domain and the other way round."""
    solver, domain = manifest.solver, manifest.domain
    qp = manifest.kind == "qp"
    required = [*(QP_ROLES if qp else [ENERGY_ROLES[manifest.kind]]), *(SOLVER_ROLES if solver else ())]
    for role in required:
        if role not in manifest.graphs:
            raise PackageError(f"{place}graphs.{role} is missing; {AGAIN}.")
    of_kinds = {*ENERGY_ROLES.values(), *QP_ROLES}
    for role in (*sorted(of_kinds), *SOLVER_ROLES, TRAIN_ROLE):
        if role in manifest.graphs and role not in required and not (role == TRAIN_ROLE and (solver or qp)):
            what = f"kind {show(manifest.kind)}" if role in of_kinds else "a package without a solver"
            raise PackageError(f"{place}graphs.{role} does not belong to {what}; {AGAIN}.")
    if solver and manifest.kind == "gradient":
        wrong(f"{place}solver", "null, as a gradient alone has no value to minimise", solver.name)
    if solver and qp:
        wrong(f"{place}solver", "null, as a network of quadratic programs has no energy to minimise", solver.name)
    if (solver is None) != (domain is None):
        wrong(f"{place}domain", "null without a solver, and there with one", domain and domain.kind)
    if regulariser != (domain.regulariser if domain else None):
        wrong(f"{place}regulariser", f"{show(domain.regulariser if domain else None)}, as domain has it", regulariser)


def _read_manifest(value: object) -> Manifest:
    place = f"{MANIFEST_FILE}: "
    fields = JsonObject(value, place)
    fields.take("format", exactly(FORMAT))
    # Before anything else: a later version may have any other fields.
    fields.left, version = upgraded(fields.left, place)
    fields.left.pop("format_version", None)
    manifest = Manifest(**fields.take_all(Manifest), format_version=version)
    regulariser = fields.take("regulariser", maybe(exactly("entropy", "quadratic")))
    fields.close()
    _check_roles(manifest, regulariser, place)
    for name in (manifest.convexity and manifest.convexity.rests_on) or ():
        if name not in manifest.weights.tensors:
            wrong(f"{place}convexity.rests_on", "names of weights", name)
    _check_train(manifest, place)
    _check_polyhedron(manifest, place)
    tensors = manifest.weights.tensors.values()
    elements = sum(math.prod(tensor.shape) for tensor in tensors)
    size = sum(math.prod(tensor.shape) * np.dtype(tensor.dtype).itemsize for tensor in tensors)
    if elements > MAX_ELEMENTS:
        raise PackageError(
            f"{place}weights.tensors should have at most {MAX_ELEMENTS} elements together, but have {elements}; "
            "export a smaller model."
        )
    if not size < manifest.weights.bytes <= size + 8 + MAX_HEADER_BYTES:
        wrong(f"{place}weights.bytes", f"{size}, the bytes of the tensors, and a header", manifest.weights.bytes)
    slopes = manifest.solver.iterations * manifest.y_shape[0] if manifest.solver else 0
    if slopes > MAX_SLOPES:
        raise PackageError(
            f"{place}solver.iterations times y_shape[0] should be at most {MAX_SLOPES}, but is {slopes}; "
            "export the package again with fewer iterations."
        )
    return manifest
