"""A reader of the protobuf wire format, just large enough to audit an ONNX model without onnx.

Before a graph is handed to onnxruntime, the package reader must know which files it would open and
which operators it would run. Both are found here, wherever ONNX lets them hide: initializers,
sparse initializers, tensors in attributes, subgraphs at any depth, function bodies, training info.

Protobuf lets fields come in any order, lets a singular field occur twice (the last scalar wins,
messages are merged), and lets readers differ on malformed bytes. The audit must hold for every
reader, so it collects *all* occurrences instead of choosing one, and refuses what is ambiguous.

Encoding: a message is a run of (tag, value); tag = field number << 3 | wire type, as a varint. Wire
types: 0 varint, 1 eight bytes, 2 length-prefixed bytes, 5 four bytes. Field numbers: onnx.proto3.
"""

import re
from collections.abc import Set
from dataclasses import dataclass
from typing import Final, NoReturn, TypeAlias

from icnnrt.errors import PackageError

# protobuf's own parsers stop at 100 nested messages; what they would refuse need not be walked.
MAX_DEPTH: Final = 100

VARINT, EIGHT_BYTES, BYTES, FOUR_BYTES = 0, 1, 2, 5  # wire types
_WIDTH: Final = {EIGHT_BYTES: 8, FOUR_BYTES: 4}

# Fields that hold messages through which a tensor, an operator or an opset import can be reached.
# tests/test_package.py compares this table with onnx's own descriptors.
CHILDREN: Final[dict[str, dict[int, str]]] = {
    "ModelProto": {
        7: "GraphProto",
        8: "OperatorSetIdProto",
        20: "TrainingInfoProto",
        25: "FunctionProto",
    },
    "TrainingInfoProto": {1: "GraphProto", 2: "GraphProto"},
    "GraphProto": {1: "NodeProto", 5: "TensorProto", 15: "SparseTensorProto"},
    "NodeProto": {5: "AttributeProto"},
    "AttributeProto": {
        5: "TensorProto",
        6: "GraphProto",
        10: "TensorProto",
        11: "GraphProto",
        22: "SparseTensorProto",
        23: "SparseTensorProto",
    },
    "SparseTensorProto": {1: "TensorProto", 2: "TensorProto"},
    "FunctionProto": {7: "NodeProto", 9: "OperatorSetIdProto", 11: "AttributeProto"},
    "TensorProto": {13: "StringStringEntryProto"},
}

# Scalar fields whose values are kept: field number -> wire type.
_KEPT: Final[dict[str, dict[int, int]]] = {
    "ModelProto": {1: VARINT},  # ir_version
    "NodeProto": {4: BYTES, 7: BYTES},  # op_type, domain
    "OperatorSetIdProto": {1: BYTES, 2: VARINT},  # domain, version
    "FunctionProto": {1: BYTES, 10: BYTES},  # name, domain
    "TensorProto": {8: BYTES, 14: VARINT},  # name, data_location
    "StringStringEntryProto": {1: BYTES, 2: BYTES},  # key, value
}

_FUNCTIONS: Final = 25  # of ModelProto
_EXTERNAL: Final = 1  # TensorProto.DataLocation.EXTERNAL
_NUMBER: Final = re.compile(r"[0-9]{1,18}")


@dataclass(frozen=True)
class ExternalData:
    """A tensor whose bytes lie outside the graph: `length` bytes at `offset` of file `location`."""

    tensor: str
    location: str
    offset: int
    length: int


@dataclass(frozen=True)
class Survey:
    """What one ONNX model reaches for. Domains are as written: the default one is "".

    `operators` and `functions` hold (domain, name) pairs, `opset_imports` (domain, version) pairs;
    those of functions and subgraphs are included. `ir_versions` holds every value in the file.
    """

    graphs: int
    ir_versions: frozenset[int]
    opset_imports: frozenset[tuple[str, int]]
    operators: frozenset[tuple[str, str]]
    functions: frozenset[tuple[str, str]]
    external: tuple[ExternalData, ...]


def survey(data: bytes, file: str) -> Survey:
    """Walk the bytes of an ONNX ModelProto and return what it refers to.

    `file` is the name used in messages. Never reads outside `data`, whatever the bytes say; raises
    `PackageError` with one sentence when they are not a well-formed model.
    """
    walk = _Walk(data, file)
    fields = walk.message("ModelProto", 0, len(data), 1)
    return Survey(
        graphs=walk.graphs,
        ir_versions=frozenset(v for v in fields.get(1, []) if isinstance(v, int)),
        opset_imports=frozenset(walk.opset_imports),
        operators=frozenset(walk.operators),
        functions=frozenset(walk.functions),
        external=tuple(walk.external),
    )


def without_functions(data: bytes, domain: str, names: Set[str], file: str) -> bytes:
    """The model without the functions of these names in `domain`. `survey` must have found it well-formed."""
    walk = _Walk(data, file)
    dropped = {(domain.encode(), name.encode()) for name in names}
    kept, at = [], 0
    while at < len(data):
        number, _, _, start, stop = walk.field("ModelProto", at, len(data))
        if number != _FUNCTIONS or walk.function(start, stop) not in dropped:
            kept.append(data[at:stop])
        at = stop
    return b"".join(kept)


# Every kept value of one message, in the order of the bytes, by field number.
_Fields: TypeAlias = dict[int, list[int | bytes]]


class Wire:
    """The primitives: one number, one field. Never reads outside `data`."""

    def __init__(self, data: bytes, file: str) -> None:
        self.data = data
        self.file = file

    def refuse(self, at: int, what: str) -> NoReturn:
        raise PackageError(
            f"{self.file}: not a well-formed ONNX model: {what} at byte {at}; "
            "the file is damaged, so copy or export the package again."
        )

    def varint(self, at: int, end: int) -> tuple[int, int]:
        """Return the unsigned integer at `at`, seven bits a byte, and where it ends."""
        value = 0
        for index in range(10):  # 64 bits need at most ten bytes
            if at + index >= end:
                self.refuse(at, "a number runs past the end of its message")
            byte = self.data[at + index]
            value |= (byte & 0x7F) << (7 * index)
            if byte < 0x80:
                if value >> 64:
                    break
                return value, at + index + 1
        self.refuse(at, "a number has more than 64 bits")

    def field(self, kind: str, here: int, end: int) -> tuple[int, int, int, int, int]:
        """Return number, wire type, value (of a varint), start and end of the content of the field at `here`."""
        tag, at = self.varint(here, end)
        number, wire = tag >> 3, tag & 7
        # Some readers cut a tag to 32 bits, and would see another field than this walk does.
        if number == 0 or tag >> 32:
            self.refuse(here, f"{kind} has the impossible field number {number}")
        value = 0
        if wire == BYTES:
            size, at = self.varint(at, end)
            stop = at + size
        elif wire == VARINT:
            value, stop = self.varint(at, end)
        elif wire in _WIDTH:
            stop = at + _WIDTH[wire]
        else:
            self.refuse(here, f"{kind} has the unknown wire type {wire}")
        if stop > end:
            self.refuse(here, f"field {number} of {kind} runs past the end of its message")
        return number, wire, value, at, stop


class _Walk(Wire):
    """One pass over the bytes, with what it has found so far."""

    def __init__(self, data: bytes, file: str) -> None:
        super().__init__(data, file)
        self.graphs = 0
        self.opset_imports: set[tuple[str, int]] = set()
        self.operators: set[tuple[str, str]] = set()
        self.functions: set[tuple[str, str]] = set()
        self.external: list[ExternalData] = []

    def message(self, kind: str, start: int, end: int, depth: int) -> _Fields:
        """Walk the message of type `kind` in data[start:end] and return its kept scalars."""
        if depth > MAX_DEPTH:
            self.refuse(start, f"more than {MAX_DEPTH} messages lie inside one another")
        children, kept = CHILDREN.get(kind, {}), _KEPT.get(kind, {})
        fields: _Fields = {}
        entries: list[_Fields] = []
        at = start
        while at < end:
            here = at
            number, wire, value, at, stop = self.field(kind, here, end)
            expected = BYTES if number in children else kept.get(number, wire)
            if wire != expected:
                self.refuse(here, f"field {number} of {kind} has wire type {wire} instead of {expected}")
            if number in children:
                child = self.message(children[number], at, stop, depth + 1)
                if kind == "TensorProto":
                    entries.append(child)
            elif number in kept:
                fields.setdefault(number, []).append(self.data[at:stop] if wire == BYTES else value)
            at = stop
        self.record(kind, fields, entries, start)
        return fields

    def function(self, start: int, end: int) -> tuple[bytes, bytes]:
        """Return domain and name of the FunctionProto in data[start:end]: the last of each, as protobuf has it."""
        found = {1: b"", 10: b""}
        at = start
        while at < end:
            number, _, _, at, stop = self.field("FunctionProto", at, end)
            if number in found:
                found[number] = self.data[at:stop]
            at = stop
        return found[10], found[1]

    def record(self, kind: str, fields: _Fields, entries: list[_Fields], start: int) -> None:
        """Note what a finished message means for the survey."""
        if kind == "GraphProto":
            self.graphs += 1
        elif kind == "NodeProto":
            # A field given twice has two meanings: note every pair.
            names, domains = self.texts(fields, 4, start), self.texts(fields, 7, start)
            self.operators.update((domain, name) for domain in domains for name in names)
        elif kind == "FunctionProto":
            names, domains = self.texts(fields, 1, start), self.texts(fields, 10, start)
            self.functions.update((domain, name) for domain in domains for name in names)
        elif kind == "OperatorSetIdProto":
            versions = [v for v in fields.get(2, [0]) if isinstance(v, int)]
            domains = self.texts(fields, 1, start)
            self.opset_imports.update((domain, v) for domain in domains for v in versions)
        elif kind == "TensorProto" and (entries or _EXTERNAL in fields.get(14, [])):
            # Entries count whatever data_location says: merging could set it from elsewhere.
            self.external.append(self.external_data(fields, entries, start))

    def external_data(self, fields: _Fields, entries: list[_Fields], start: int) -> ExternalData:
        """Read a tensor's external_data: one location, one offset, one length, nothing else."""
        name = self.texts(fields, 8, start)[0]
        given: dict[str, str] = {}
        for entry in entries:
            keys, values = self.texts(entry, 1, start), self.texts(entry, 2, start)
            if len(keys) != 1 or len(values) != 1 or keys[0] in given:
                self.refuse(start, f"tensor {ascii(name)[:80]} gives external data twice")
            given[keys[0]] = values[0]
        # Without an offset or a length onnxruntime would choose them; other keys, such as
        # onnxruntime's prepacked blobs, would name more bytes to read.
        if set(given) != {"location", "offset", "length"} or not (
            _NUMBER.fullmatch(given["offset"]) and _NUMBER.fullmatch(given["length"])
        ):
            self.refuse(
                start,
                f"tensor {ascii(name)[:80]} needs external data of one location, one offset and "
                f"one length, but has {ascii(given)[:200]}",
            )
        return ExternalData(name, given["location"], int(given["offset"]), int(given["length"]))

    def texts(self, fields: _Fields, number: int, start: int) -> list[str]:
        """Return every value of a string field, or [""], its default, where it is absent."""
        try:
            return [v.decode() for v in fields.get(number, [b""]) if isinstance(v, bytes)]
        except UnicodeDecodeError:
            self.refuse(start, f"field {number} should be UTF-8 text, but is not, in the message")
