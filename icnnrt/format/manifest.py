"""The contents of manifest.json as dataclasses, and the checks of every field.

The docstring of `icnnrt.format.package` is the specification of the format; this file holds the part of it that one
JSON file can say about itself. What it says about the other files is checked in `icnnrt.format.package`.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, TypeAlias

import numpy as np

from icnnrt.errors import PackageError
from icnnrt.format.fields import (
    AGAIN,
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
from icnnrt.format.verdict import Convexity
from icnnrt.printable import show

FORMAT: Final = "icnnrt"
FORMAT_VERSION: Final = CURRENT
MANIFEST_FILE: Final = "manifest.json"
WEIGHTS_FILE: Final = "weights.safetensors"
GOLDEN_FILE: Final = "golden.safetensors"
OP_DOMAIN: Final = "ai.icnnrt"
# kind of domain -> its regulariser
REGULARISERS: Final = {"unit_box": "entropy", "box": "entropy", "simplex": "entropy", "space": "quadratic"}

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
_ROLE: Final = re.compile(r"[a-z][a-z0-9_]*")

Scalar: TypeAlias = str | bool | int | float | None


@dataclass(frozen=True)
class Domain:
    """The set that y* lies in, with the regulariser R that belongs to it; y* minimises f + R.

    unit_box   [0, 1]^n, R = −H(y) = Σ y log y + (1−y) log(1−y)
    box        lower <= y <= upper, inputs of the graphs for each sample; R = −H(p), p = (y − lower)/(upper − lower)
    simplex    y >= 0 and 1'y = 1, R = Σ y log y
    space      R^n, R = (μ/2)‖y‖²
    """

    kind: str = "unit_box"
    mu: float | None = None
    """μ of `space`; None elsewhere."""

    @property
    def regulariser(self) -> str:
        """ "entropy" or "quadratic"."""
        return REGULARISERS[self.kind]


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
    step_size: float | None = None
    """τ of BregmanProximalGradient; None elsewhere."""


@dataclass(frozen=True)
class OpSet:
    """The operators that the graphs use from one custom domain."""

    version: int
    names: tuple[str, ...]


@dataclass(frozen=True)
class File:
    """A file of the package: its name, its SHA-256 in hexadecimal, its size in bytes."""

    file: str
    sha256: str
    bytes: int


@dataclass(frozen=True)
class GraphFile(File):
    """An ONNX file of the package."""

    signature: Signature | None = None
    """What it takes and gives, see `icnnrt.format.signatures`; None until the graph itself has been looked at."""


@dataclass(frozen=True)
class WeightSpec:
    """One weight: shape, numpy dtype name, the sign that f's convexity asks of it, whether it may be updated."""

    shape: tuple[int, ...]
    dtype: str
    sign: Sign | None
    trainable: bool

    @property
    def nonnegative(self) -> bool:
        """Whether every entry has to be >= 0."""
        return self.sign == Sign(NONNEGATIVE)


@dataclass(frozen=True)
class WeightsFile:
    """The safetensors file of the package and the tensors it holds, by name."""

    file: str
    sha256: str
    bytes: int
    tensors: Mapping[str, WeightSpec]

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
class PolyhedronSpec:
    """What argmin_polyhedron.onnx does unless it is told otherwise, and what adjoint_polyhedron.onnx is."""

    iterations: int
    """The most cuts."""
    mu: float
    """μ of the regulariser (μ/2) ‖y‖²."""
    tolerance: float
    """Of the gap, relative to max(1, |lower bound|), at which a sample is done."""
    adjoint: str
    """ "prop3" or "implicit": `icnnrt.serving.polyhedron_adjoint` tells them apart."""


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
    domain: Domain | None
    solver: SolverSpec | None
    opset: int
    ir_version: int
    ops: Mapping[str, OpSet]
    graphs: Mapping[str, GraphFile]
    weights: WeightsFile
    parity: Mapping[str, float | Mapping[str, float]]
    metadata: Mapping[str, Scalar]
    kind: str = "energy"
    train: TrainingSpec | None = None
    polyhedron: PolyhedronSpec | None = None
    convexity: Convexity | None = None
    golden: File | None = None
    format: str = FORMAT
    format_version: int = FORMAT_VERSION
    """As it was read, and as it is written again."""

    @classmethod
    def from_json(cls, data: bytes) -> "Manifest":
        """Read and check the bytes of a manifest.json.

        Raises `PackageError` with one sentence: the field, what was expected, what came, the remedy.
        """
        if not isinstance(data, bytes):
            raise PackageError(f"{MANIFEST_FILE}: expected its bytes, but got {type(data).__name__}; read the file.")
        if len(data) > MAX_MANIFEST_BYTES:
            raise PackageError(
                f"{MANIFEST_FILE}: expected at most {MAX_MANIFEST_BYTES} bytes, but it has {len(data)}; "
                "shorten metadata and producer."
            )
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
        content: dict[str, Any] = {
            "format": self.format,
            "format_version": CURRENT,
            "name": self.name,
            "producer": dict(self.producer),
            "dtype": self.dtype,
            "x_shape": list(self.x_shape),
            "y_shape": list(self.y_shape),
            "kind": self.kind,
            "domain": _given(self.domain),
            "regulariser": self.domain.regulariser if self.domain else None,
            "solver": _given(self.solver),
            "opset": self.opset,
            "ir_version": self.ir_version,
            "ops": {domain: {"version": o.version, "names": list(o.names)} for domain, o in self.ops.items()},
            "graphs": {role: _graph_entry(graph) for role, graph in self.graphs.items()},
            "weights": {
                "file": self.weights.file,
                "sha256": self.weights.sha256,
                "bytes": self.weights.bytes,
                "tensors": {n: _weight_entry(t) for n, t in self.weights.tensors.items()},
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
        if self.polyhedron is not None:
            content["polyhedron"] = vars(self.polyhedron)
        if self.convexity is not None:
            content["convexity"] = self.convexity.to_json()
        if self.golden is not None:
            content["golden"] = vars(self.golden)
        return content


def _given(spec: Domain | SolverSpec | None) -> dict[str, object] | None:
    """The fields that are not None, since those that are belong to other kinds."""
    return None if spec is None else {key: value for key, value in vars(spec).items() if value is not None}


def _graph_entry(graph: GraphFile) -> dict[str, Any]:
    entry: dict[str, Any] = {"file": graph.file, "sha256": graph.sha256, "bytes": graph.bytes}
    if graph.signature is not None:
        for key, tensors in (("inputs", graph.signature.inputs), ("outputs", graph.signature.outputs)):
            entry[key] = {
                name: {
                    "dtype": tensor.dtype,
                    "shape": list(tensor.shape),
                    **({} if tensor.default is None else {"default": tensor.default}),
                }
                for name, tensor in tensors.items()
            }
    return entry


def _weight_entry(spec: WeightSpec) -> dict[str, Any]:
    sign = None if spec.sign is None else spec.sign.to_json()
    return {"shape": list(spec.shape), "dtype": spec.dtype, "sign": sign, "trainable": spec.trainable}


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


def _domain(value: object, place: str) -> Domain | None:
    if value is None:
        return None
    fields = JsonObject(value, f"{place}.")
    kind = fields.take("kind", exactly(*REGULARISERS))
    domain = Domain(kind, fields.take("mu", positive) if kind == "space" else None)
    fields.close()
    return domain


def _solver(value: object, place: str) -> SolverSpec | None:
    if value is None:
        return None
    fields = JsonObject(value, f"{place}.")
    name = fields.take("name", exactly("BundleEntropy", "BregmanProximalGradient"))
    spec = SolverSpec(
        name=name,
        iterations=fields.take("iterations", integer(1, MAX_ITERATIONS)),
        steps=fields.take("steps", integer(1, MAX_STEPS)),
        gap_tolerance=fields.take("gap_tolerance", positive),
        residual_tolerance=fields.take("residual_tolerance", positive),
        step_size=fields.take("step_size", positive) if name == "BregmanProximalGradient" else None,
    )
    fields.close()
    return spec


def _regulariser(value: object, place: str) -> str | None:
    return None if value is None else exactly("entropy", "quadratic")(value, place)


def _convexity(value: object, place: str) -> Convexity:
    if not isinstance(value, dict):
        wrong(place, "a JSON object", value)
    return Convexity.from_json(value)


def _golden(value: object, place: str) -> File:
    fields = JsonObject(value, f"{place}.")
    golden = File(
        fields.take("file", exactly(GOLDEN_FILE)),
        fields.take("sha256", _SHA256),
        fields.take("bytes", integer(8, MAX_GOLDEN_BYTES)),
    )
    fields.close()
    return golden


def _op_set(value: object, place: str) -> OpSet:
    fields = JsonObject(value, f"{place}.")
    identifier = matching(re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}"), "the name of an operator")
    ops = OpSet(fields.take("version", integer(1, 1)), fields.take("names", listing(identifier, 1024)))
    fields.close()
    return ops


def _default(value: object, place: str) -> bool | int | float:
    if isinstance(value, bool):
        return value
    return integer(-(1 << 63), (1 << 63) - 1)(value, place) if isinstance(value, int) else real(value, place)


def _size(value: object, place: str) -> int | str:
    if isinstance(value, str):
        return matching(re.compile(r"[A-Za-z_][A-Za-z0-9_.]{0,255}"), "the name of an open size")(value, place)
    return integer(0, MAX_ELEMENTS)(value, place)


def _tensor(value: object, place: str) -> Tensor:
    fields = JsonObject(value, f"{place}.")
    tensor = Tensor(
        dtype=fields.take("dtype", exactly(*SAFETENSORS_DTYPES)),
        shape=fields.take("shape", listing(_size, MAX_RANK)),
        default=fields.take("default", _default) if "default" in fields.left else None,
    )
    fields.close()
    return tensor


def _tensors(value: object, place: str) -> Mapping[str, Tensor] | None:
    return None if value is UNTOLD else table(_tensor, MAX_TENSORS)(value, place)


def _graph_file(value: object, place: str) -> GraphFile:
    fields = JsonObject(value, f"{place}.")
    file = fields.take("file", exactly(f"{place.rpartition('.')[2]}.onnx"))
    sha256 = fields.take("sha256", _SHA256)
    size = fields.take("bytes", integer(1, MAX_GRAPH_BYTES))
    inputs, outputs = fields.take("inputs", _tensors), fields.take("outputs", _tensors)
    fields.close()
    signature = None if inputs is None or outputs is None else Signature(inputs, outputs)
    return GraphFile(file, sha256, size, signature)


def _weight_spec(value: object, place: str) -> WeightSpec:
    fields = JsonObject(value, f"{place}.")
    shape = fields.take("shape", shape_of)
    spec = WeightSpec(
        shape=shape,
        dtype=fields.take("dtype", exactly(*SAFETENSORS_DTYPES)),
        sign=fields.take("sign", lambda sign, inside: Sign.from_json(sign, inside, shape)),
        trainable=fields.take("trainable", boolean),
    )
    fields.close()
    if (spec.trainable or spec.sign) and spec.dtype not in _FLOATING:
        wrong(f"{place}.dtype", "a float dtype, as the weight is trainable or has a sign", spec.dtype)
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


def _not_negative(value: object, place: str) -> float:
    number = real(value, place)
    if not number >= 0:
        wrong(place, "a number of at least 0", value)
    return number


def _polyhedron(value: object, place: str) -> PolyhedronSpec:
    fields = JsonObject(value, f"{place}.")
    spec = PolyhedronSpec(
        iterations=fields.take("iterations", integer(1, MAX_ITERATIONS)),
        mu=fields.take("mu", _not_negative),
        tolerance=fields.take("tolerance", _not_negative),
        adjoint=fields.take("adjoint", exactly("prop3", "implicit")),
    )
    fields.close()
    return spec


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
    fields.left, version = upgraded(fields.left, place)
    fields.left.pop("format_version", None)
    role = matching(_ROLE, "a role of lower-case letters, digits and _")
    manifest = Manifest(
        name=fields.take("name", text),
        producer=fields.take("producer", table(text, 1024)),
        dtype=fields.take("dtype", exactly("float32", "float64")),
        x_shape=fields.take("x_shape", context_shape_of),
        y_shape=fields.take("y_shape", decision_shape_of),
        kind=fields.take("kind", exactly(*ENERGY_ROLES)),
        domain=fields.take("domain", _domain),
        solver=fields.take("solver", _solver),
        opset=fields.take("opset", integer(1, MAX_OPSET)),
        ir_version=fields.take("ir_version", integer(8, MAX_IR_VERSION)),
        ops=fields.take("ops", table(_op_set, 1, exactly(OP_DOMAIN))),
        graphs=fields.take("graphs", table(_graph_file, MAX_GRAPHS, role)),
        weights=fields.take("weights", _weights_file),
        parity=fields.take("parity", table(measure, 1024)),
        metadata=fields.take("metadata", table(scalar, 1024)),
        train=fields.take("train", _train) if "train" in fields.left else None,
        polyhedron=fields.take("polyhedron", _polyhedron) if "polyhedron" in fields.left else None,
        convexity=fields.take("convexity", _convexity) if "convexity" in fields.left else None,
        golden=fields.take("golden", _golden) if "golden" in fields.left else None,
        format_version=version,
    )
    regulariser = fields.take("regulariser", _regulariser)
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
