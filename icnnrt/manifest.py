"""The contents of manifest.json as dataclasses, and the checks of every field.

The docstring of `icnnrt.package` is the specification of the format; this file holds the part of it that one JSON
file can say about itself. What it says about the other files is checked in `icnnrt.package`.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np

from icnnrt._fields import (
    AGAIN,
    FORMAT_VERSION,
    JsonObject,
    boolean,
    exactly,
    integer,
    listing,
    load_json,
    matching,
    plain,
    positive,
    real,
    surrogate,
    table,
    text,
    wrong,
)
from icnnrt.errors import PackageError

FORMAT: Final = "icnnrt"
MANIFEST_FILE: Final = "manifest.json"
WEIGHTS_FILE: Final = "weights.safetensors"
OP_DOMAIN: Final = "ai.icnnrt"
REQUIRED_ROLES: Final = ("value", "argmin", "adjoint")
TRAIN_ROLE: Final = "train"

MAX_MANIFEST_BYTES: Final = 1 << 20
MAX_HEADER_BYTES: Final = 16 << 20
# Weights live in their own file, so even a large graph takes a few MiB.
MAX_GRAPH_BYTES: Final = 256 << 20
MAX_ITERATIONS: Final = 4096
MAX_STEPS: Final = 1000
# The cuts take K n slopes a sample; 2^28 of them are 1 GiB in float32.
MAX_SLOPES: Final = 1 << 28
MAX_ELEMENTS: Final = 1 << 31
MAX_RANK: Final = 8
MAX_WEIGHTS: Final = 1 << 16
MAX_GRAPHS: Final = 64
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
_ROLE: Final = re.compile(r"[a-z][a-z0-9_]*")

Scalar: TypeAlias = str | bool | int | float | None


@dataclass(frozen=True)
class Domain:
    """The set the decision variable y lies in: every entry between `lower` and `upper`."""

    kind: str = "box"
    lower: float = 0.0
    upper: float = 1.0


@dataclass(frozen=True)
class SolverSpec:
    """The solver built into argmin.onnx: `iterations` cuts K, each with `steps` interior-point steps.

    An answer counts as solved when its duality gap and its KKT residual are within the tolerances.
    """

    iterations: int
    steps: int
    gap_tolerance: float
    residual_tolerance: float
    name: str = "BundleEntropy"


@dataclass(frozen=True)
class OpSet:
    """The operators that the graphs use from one custom domain."""

    version: int
    names: tuple[str, ...]


@dataclass(frozen=True)
class GraphFile:
    """An ONNX file of the package: its name, its SHA-256 in hexadecimal, its size in bytes."""

    file: str
    sha256: str
    bytes: int


@dataclass(frozen=True)
class WeightSpec:
    """One weight: shape, numpy dtype name, whether it must stay >= 0, whether it may be updated."""

    shape: tuple[int, ...]
    dtype: str
    nonnegative: bool
    trainable: bool


@dataclass(frozen=True)
class WeightsFile:
    """The safetensors file of the package and the tensors it holds, by name."""

    file: str
    sha256: str
    bytes: int
    tensors: Mapping[str, WeightSpec]


@dataclass(frozen=True)
class TrainingSpec:
    """What train.onnx does in one step: the loss of y*, the optimiser, and the weights that it updates.

    The optimiser's state is the step count `state.step` and for every slot one vector, `state.<slot>`, of the entries
    of all updated weights in their order, each row by row. It starts at zero.
    """

    loss: str
    optimizer: str
    settings: Mapping[str, float]
    slots: tuple[str, ...]
    weights: tuple[str, ...]
    adjoint: str
    clip_norm: float | None
    target_shape: tuple[int, ...]
    target_dtype: str


@dataclass(frozen=True)
class Manifest:
    """The contents of manifest.json; the module docstring explains every field.

    Instances that `from_json` returns have been checked. One built by hand is checked when it is
    written.
    """

    name: str
    producer: Mapping[str, str]
    dtype: str
    x_shape: tuple[int, ...]
    y_shape: tuple[int, ...]
    domain: Domain
    regulariser: str
    solver: SolverSpec
    opset: int
    ir_version: int
    ops: Mapping[str, OpSet]
    graphs: Mapping[str, GraphFile]
    weights: WeightsFile
    parity: Mapping[str, float | Mapping[str, float]]
    metadata: Mapping[str, Scalar]
    train: TrainingSpec | None = None
    format: str = FORMAT
    format_version: int = FORMAT_VERSION

    @classmethod
    def from_json(cls, data: bytes) -> "Manifest":
        """Read and check the bytes of a manifest.json.

        Raises `PackageError` with one sentence: the field, what was expected, what came, the remedy.
        """
        if len(data) > MAX_MANIFEST_BYTES:
            raise PackageError(
                f"{MANIFEST_FILE}: expected at most {MAX_MANIFEST_BYTES} bytes, but it has {len(data)}; "
                "shorten metadata and producer."
            )
        return _read_manifest(load_json(data, MANIFEST_FILE))

    def to_json(self) -> bytes:
        """Return the bytes of manifest.json; equal manifests give equal bytes."""
        content: dict[str, object] = {
            "format": self.format,
            "format_version": self.format_version,
            "name": self.name,
            "producer": dict(self.producer),
            "dtype": self.dtype,
            "x_shape": list(self.x_shape),
            "y_shape": list(self.y_shape),
            "domain": vars(self.domain),
            "regulariser": self.regulariser,
            "solver": vars(self.solver),
            "opset": self.opset,
            "ir_version": self.ir_version,
            "ops": {domain: {"version": o.version, "names": list(o.names)} for domain, o in self.ops.items()},
            "graphs": {role: vars(graph) for role, graph in self.graphs.items()},
            "weights": {
                "file": self.weights.file,
                "sha256": self.weights.sha256,
                "bytes": self.weights.bytes,
                "tensors": {n: {**vars(t), "shape": list(t.shape)} for n, t in self.weights.tensors.items()},
            },
            "parity": {k: dict(v) if isinstance(v, Mapping) else v for k, v in self.parity.items()},
            "metadata": dict(self.metadata),
        }
        if self.train is not None:
            content["train"] = {
                **vars(self.train),
                "settings": dict(self.train.settings),
                "slots": list(self.train.slots),
                "weights": list(self.train.weights),
                "target_shape": list(self.train.target_shape),
            }
        text = json.dumps(content, indent=1, allow_nan=False, ensure_ascii=True, default=plain)
        return text.encode() + b"\n"


# --- Field by field ------------------------------------------------------------------------------


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


_SHA256: Final = matching(re.compile(r"[0-9a-f]{64}"), "64 lower-case hexadecimal digits")
FILE_SIZE: Final = integer(0, 1 << 62)


def _domain(value: object, place: str) -> Domain:
    fields = JsonObject(value, f"{place}.")
    kind = fields.take("kind", exactly("box"))
    bounds: list[float] = []
    for key, only in (("lower", 0.0), ("upper", 1.0)):
        bounds.append(fields.take(key, real))
        if bounds[-1] != only:
            wrong(f"{place}.{key}", f"{only}, the only {key} bound of format_version {FORMAT_VERSION}", bounds[-1])
    fields.close()
    return Domain(kind, *bounds)


def _solver(value: object, place: str) -> SolverSpec:
    fields = JsonObject(value, f"{place}.")
    spec = SolverSpec(
        name=fields.take("name", exactly("BundleEntropy")),
        iterations=fields.take("iterations", integer(1, MAX_ITERATIONS)),
        steps=fields.take("steps", integer(1, MAX_STEPS)),
        gap_tolerance=fields.take("gap_tolerance", positive),
        residual_tolerance=fields.take("residual_tolerance", positive),
    )
    fields.close()
    return spec


def _op_set(value: object, place: str) -> OpSet:
    fields = JsonObject(value, f"{place}.")
    identifier = matching(re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}"), "the name of an operator")
    ops = OpSet(fields.take("version", integer(1, 1)), fields.take("names", listing(identifier, 1024)))
    fields.close()
    return ops


def _graph_file(value: object, place: str) -> GraphFile:
    fields = JsonObject(value, f"{place}.")
    graph = GraphFile(
        file=fields.take("file", exactly(f"{place.rpartition('.')[2]}.onnx")),
        sha256=fields.take("sha256", _SHA256),
        bytes=fields.take("bytes", integer(1, MAX_GRAPH_BYTES)),
    )
    fields.close()
    return graph


def _weight_spec(value: object, place: str) -> WeightSpec:
    fields = JsonObject(value, f"{place}.")
    spec = WeightSpec(
        shape=fields.take("shape", shape_of),
        dtype=fields.take("dtype", exactly(*SAFETENSORS_DTYPES)),
        nonnegative=fields.take("nonnegative", boolean),
        trainable=fields.take("trainable", boolean),
    )
    fields.close()
    if (spec.trainable or spec.nonnegative) and spec.dtype not in _FLOATING:
        wrong(f"{place}.dtype", "a float dtype, as the weight is trainable or nonnegative", spec.dtype)
    return spec


def _weight_name(value: object, place: str) -> str:
    name = text(value, place)
    if name == RESERVED_NAME:
        wrong(place, f"any name but {RESERVED_NAME}", value)
    return name


def _weights_file(value: object, place: str) -> WeightsFile:
    fields = JsonObject(value, f"{place}.")
    weights = WeightsFile(
        file=fields.take("file", exactly(WEIGHTS_FILE)),
        sha256=fields.take("sha256", _SHA256),
        bytes=fields.take("bytes", FILE_SIZE),
        tensors=fields.take("tensors", table(_weight_spec, MAX_WEIGHTS, _weight_name)),
    )
    fields.close()
    return weights


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


def _clip_norm(value: object, place: str) -> float | None:
    return None if value is None else positive(value, place)


def _train(value: object, place: str) -> TrainingSpec:
    fields = JsonObject(value, f"{place}.")
    slot = matching(re.compile(r"[a-z][a-z0-9_]*"), "a name of lower-case letters, digits and _")
    spec = TrainingSpec(
        loss=fields.take("loss", text),
        optimizer=fields.take("optimizer", exactly("SGD", "Adam", "AdamW")),
        settings=fields.take("settings", table(real, 64)),
        slots=fields.take("slots", listing(slot, 8)),
        weights=fields.take("weights", listing(_weight_name, MAX_WEIGHTS)),
        adjoint=fields.take("adjoint", exactly("exact", "prop3")),
        clip_norm=fields.take("clip_norm", _clip_norm),
        target_shape=fields.take("target_shape", context_shape_of),
        target_dtype=fields.take("target_dtype", exactly("float64", "float32", "int64")),
    )
    fields.close()
    return spec


def _read_manifest(value: object) -> Manifest:
    place = f"{MANIFEST_FILE}: "
    fields = JsonObject(value, place)
    fields.take("format", exactly(FORMAT))
    # Before anything else: a later version may have any other fields.
    version = fields.take("format_version", integer(1, 1 << 31))
    if version > FORMAT_VERSION:
        raise PackageError(
            f"{place}format_version is {version}, newer than the {FORMAT_VERSION} that this icnnrt reads; "
            "upgrade icnnrt."
        )
    role = matching(_ROLE, "a role of lower-case letters, digits and _")
    manifest = Manifest(
        name=fields.take("name", text),
        producer=fields.take("producer", table(text, 1024)),
        dtype=fields.take("dtype", exactly("float32", "float64")),
        x_shape=fields.take("x_shape", context_shape_of),
        y_shape=fields.take("y_shape", decision_shape_of),
        domain=fields.take("domain", _domain),
        regulariser=fields.take("regulariser", exactly("entropy")),
        solver=fields.take("solver", _solver),
        opset=fields.take("opset", integer(1, MAX_OPSET)),
        ir_version=fields.take("ir_version", integer(8, MAX_IR_VERSION)),
        ops=fields.take("ops", table(_op_set, 1, exactly(OP_DOMAIN))),
        graphs=fields.take("graphs", table(_graph_file, MAX_GRAPHS, role)),
        weights=fields.take("weights", _weights_file),
        parity=fields.take("parity", table(measure, 1024)),
        metadata=fields.take("metadata", table(scalar, 1024)),
        train=fields.take("train", _train) if "train" in fields.left else None,
    )
    fields.close()
    _check_train(manifest, place)
    for required in REQUIRED_ROLES:
        if required not in manifest.graphs:
            raise PackageError(f"{place}graphs.{required} is missing; {AGAIN}.")
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
    slopes = manifest.solver.iterations * manifest.y_shape[0]
    if slopes > MAX_SLOPES:
        raise PackageError(
            f"{place}solver.iterations times y_shape[0] should be at most {MAX_SLOPES}, but is {slopes}; "
            "export the package again with fewer iterations."
        )
    return manifest
