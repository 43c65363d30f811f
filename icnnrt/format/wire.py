"""A reader of the protobuf wire format, just large enough to audit an ONNX model without onnx.

Before a graph is handed to onnxruntime, the package reader must know which files it would open and
which operators it would run. Both are found here, wherever ONNX lets them hide: initializers,
sparse initializers, tensors in attributes, subgraphs at any depth, function bodies, training info.

Protobuf lets fields come in any order, lets a singular field occur twice (the last scalar wins, messages are merged),
skips a known field of a wrong wire type, and cuts numbers to 32 bits; readers differ on each of these, and on malformed
bytes. The audit must hold for every reader, so it refuses what is ambiguous: each field has to be what `MESSAGES` says
of it. Fields that are not in it, such as later versions may bring, are skipped.

The work is bounded whatever the bytes are: contents such as a tensor's raw_data are stepped over,
and there are at most `MAX_STEPS`.

Encoding: a message is a run of (tag, value); tag = field number << 3 | wire type, as a varint. Wire
types: 0 varint, 1 eight bytes, 2 length-prefixed bytes, 5 four bytes. Field numbers: onnx.proto3.
"""

import codecs
import re
from collections import Counter
from collections.abc import Iterator, Set
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, NoReturn, TypeAlias

from icnnrt.errors import PackageError
from icnnrt.printable import show

# protobuf's own parsers stop at 100 nested messages; what they would refuse need not be walked.
MAX_DEPTH: Final = 100
# What a walk may take, in steps: one a field, `LONG` more for a number of three bytes or more, `MESSAGE` more for a
# message. A step takes 0.2 to 0.5 microseconds (measured), whatever it is spent on, so these take seconds; 200 000
# nodes with names and four attributes each take six millions.
MAX_STEPS: Final = 8 << 20
LONG, MESSAGE = 3, 2
# Of a name, in bytes, and of different operators, functions or opset imports: far more than there are.
MAX_NAME: Final = 1 << 14
MAX_DIFFERENT: Final = 1 << 12
# Of tensors that keep their bytes elsewhere: as many as a package may have weights.
MAX_EXTERNAL: Final = 1 << 16
# Of nodes that stand in functions, once every call of one is replaced by its body, as onnxruntime does: a dozen
# functions that call each other twice are a few hundred bytes, and would be thousands. Graphs of this package have
# some hundreds.
MAX_EXPANDED: Final = 1 << 16

VARINT, EIGHT_BYTES, BYTES, FOUR_BYTES = 0, 1, 2, 5  # wire types

# The messages that are walked, as onnx.proto3 declares them: all through which a tensor, an operator or an opset import
# can be reached, and all that `onnx_graph` reads. Number of a field, * where it is repeated, and its type: i 64 bits,
# n 32 bits or an enumeration, f float, d double, s text, b bytes, ~ a message that is stepped over, or a message. Of
# fields behind one |, a oneof, at most one may be there. tests/test_wire.py compares this with onnx's own descriptors.
_DECLARED: Final = """
ModelProto: 1i 2s 3s 4s 5i 6s 7GraphProto 8*OperatorSetIdProto 14*~ 20*TrainingInfoProto 25*FunctionProto 26*~
OperatorSetIdProto: 1s 2i
GraphProto: 1*NodeProto 2s 5*TensorProto 10s 11*ValueInfoProto 12*ValueInfoProto 13*~ 14*~ 15*SparseTensorProto 16*~
NodeProto: 1*s 2*s 3s 4s 5*AttributeProto 6s 7s 8s 9*~ 10*~
AttributeProto: 1s 2f 3i 4b 5TensorProto 6GraphProto 7*f 8*i 9*b 10*TensorProto 11*GraphProto 13s 14~ 15*~ 20n 21s
    22SparseTensorProto 23*SparseTensorProto
TensorProto: 1*i 2n 3~ 4*f 5*n 6*b 7*i 8s 9b 10*d 11*i 12s 13*StringStringEntryProto 14n 16*~
StringStringEntryProto: 1s 2s
SparseTensorProto: 1TensorProto 2TensorProto 3*i
ValueInfoProto: 1s 2TypeProto 3s 4*~
TypeProto: |1TypeProto.Tensor |4~ |5~ 6s |7~ |8~ |9~
TypeProto.Tensor: 1n 2TensorShapeProto
TensorShapeProto: 1*TensorShapeProto.Dimension
TensorShapeProto.Dimension: |1i |2s 3s
TrainingInfoProto: 1GraphProto 2GraphProto 3*~ 4*~
FunctionProto: 1s 4*s 5*s 6*s 7*NodeProto 8s 9*OperatorSetIdProto 10s 11*AttributeProto 12*~ 13s 14*~
"""
_FIELD: Final = re.compile(r"(\|?)([0-9]+)(\*?)([A-Za-z.~]+)")
_UTF_8: Final = codecs.getincrementaldecoder("utf-8")
_WIRES: Final = {"i": VARINT, "n": VARINT, "f": FOUR_BYTES, "d": EIGHT_BYTES}


class Declared(NamedTuple):
    """What onnx.proto3 says of one field."""

    number: int
    type: str  # i, n, f, d, s, b or ~, or the name of a message
    repeated: bool
    oneof: bool


def _declared() -> dict[str, dict[int, Declared]]:
    messages: dict[str, dict[int, Declared]] = {}
    for name, fields in re.findall(r"^(\S+): ((?:.*\n?)(?:    .*\n?)*)", _DECLARED, re.MULTILINE):
        given = [Declared(int(n), t, bool(star), bool(bar)) for bar, n, star, t in _FIELD.findall(fields)]
        messages[name] = {field.number: field for field in given}
    return messages


MESSAGES: Final = _declared()


# What to do with a field, by its tag: its number and wire type, a bit of its own, or of its oneof, where it may occur
# once, and whether it is text or a number of 32 bits. A plain tuple, since Python unpacks no other as fast.
_Tag: TypeAlias = tuple[int, int, int, bool]


def _tags(fields: dict[int, Declared]) -> dict[int, _Tag]:
    tags: dict[int, _Tag] = {}
    for number, _, repeated, oneof in fields.values():
        wire = _WIRES.get(fields[number].type, BYTES)
        once = 0 if repeated else 1 if oneof else 1 << number
        special = fields[number].type == "s" or (fields[number].type == "n" and not repeated)
        tags[number << 3 | wire] = (number, wire, once, special)
        if repeated and wire != BYTES:  # packed: many numbers in one field
            tags[number << 3 | BYTES] = (number, BYTES, 0, False)
    return tags


_TAGS: Final = {name: _tags(fields) for name, fields in MESSAGES.items()}


class Wire:
    """The primitives: one number, the fields of one message. Never reads outside `data`.

    `left` is what is left of the steps that it may take.
    """

    def __init__(self, data: bytes, file: str, steps: int = MAX_STEPS) -> None:
        self.data = data
        self.file = file
        self.left = steps

    def refuse(self, at: int, what: str) -> NoReturn:
        raise PackageError(
            f"{self.file}: not a well-formed ONNX model: {what} at byte {at}; "
            "the file is damaged, so copy or export the package again."
        )

    def exhausted(self) -> NoReturn:
        raise PackageError(
            f"{self.file}: expected graphs of some hundred thousand nodes at most, but there are too many fields to "
            "walk through; keep tensors as raw bytes, write repeated steps as a Loop, and export the package again."
        )

    def varint(self, at: int, end: int) -> tuple[int, int]:
        """Return the unsigned integer at `at`, seven bits a byte, and where it ends."""
        value = shift = 0
        for byte in self.data[at : min(at + 10, end)]:  # 64 bits need at most ten bytes
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                if value >> 64:
                    break
                return value, at + shift // 7
        if shift < 70 and at + shift // 7 >= end:
            self.refuse(at, "a number runs past the end of its message")
        self.refuse(at, "a number has more than 64 bits")

    def fields(self, kind: str, at: int, end: int, wanted: Set[int]) -> Iterator[tuple[int, int, int, int, int]]:
        """Each `wanted` field of the message of type `kind` in data[at:end], in their order; all fields are walked.

        Yields its number, the value of a varint, where its content starts and stops, and where it begins itself. What
        is not as `MESSAGES` has it is refused.
        """
        data, tags, left = self.data, _TAGS[kind], self.left - MESSAGE
        if left < 0:
            self.exhausted()
        seen = value = 0
        here = at
        try:
            while at < end:
                here = at
                left -= 1
                if left < 0:
                    self.exhausted()
                tag = data[at]
                at += 1
                # Nearly all tags, lengths and numbers have one byte or two; a call costs several times the rest.
                if tag > 0x7F:
                    if (more := data[at]) < 0x80:
                        tag += (more << 7) - 0x80
                        at += 1
                    else:
                        tag, at = self.varint(here, end)
                        left -= LONG
                number, wire, once, special = tags.get(tag) or self.unknown(kind, tag, here)
                if once:
                    if seen & once:
                        self.refuse(here, f"field {number} of {kind} is given twice")
                    seen |= once
                if wire == BYTES:
                    stop = data[at]
                    at += 1
                    if stop > 0x7F:
                        if (more := data[at]) < 0x80:
                            stop += (more << 7) - 0x80
                            at += 1
                        else:
                            stop, at = self.varint(at - 1, end)
                            left -= LONG
                    stop += at
                    if stop > end:
                        self.refuse(here, f"field {number} of {kind} runs past the end of its message")
                    if special and not data[at:stop].isascii():
                        self.check_text(kind, number, at, stop)
                else:
                    if wire == VARINT:
                        value = data[at]
                        stop = at + 1
                        if value > 0x7F:
                            value, stop = self.varint(at, end)
                            left -= LONG
                            # Some readers cut it to 32 bits, and would see another number.
                            if special and 0x7FFFFFFF < value < 0xFFFFFFFF80000000:
                                self.refuse(here, f"field {number} of {kind} has more than 32 bits")
                    else:
                        stop = at + (4 if wire == FOUR_BYTES else 8)
                    if stop > end:
                        self.refuse(here, f"field {number} of {kind} runs past the end of its message")
                if number in wanted:
                    self.left = left
                    yield number, value, at, stop, here
                    left = self.left
                at = stop
        except IndexError:
            self.refuse(here, f"a field of {kind} runs past the end of its message")
        self.left = left

    def check_text(self, kind: str, number: int, at: int, stop: int) -> None:
        decoder = _UTF_8()
        try:
            for first in range(at, stop, 1 << 20):  # in parts, as text takes up to four times its bytes
                decoder.decode(self.data[first : min(first + (1 << 20), stop)], first + (1 << 20) >= stop)
        except UnicodeDecodeError:
            self.refuse(at, f"field {number} of {kind} should be UTF-8 text, but is not,")

    def unknown(self, kind: str, tag: int, here: int) -> _Tag:
        """What to do with a field that `MESSAGES` does not know, or knows as another type."""
        number, wire = tag >> 3, tag & 7
        # Some readers cut a tag to 32 bits, and would see another field than this walk does.
        if number == 0 or tag >> 32:
            self.refuse(here, f"{kind} has the impossible field number {number}")
        if wire not in (VARINT, EIGHT_BYTES, BYTES, FOUR_BYTES):
            self.refuse(here, f"{kind} has the unknown wire type {wire}")
        if number in MESSAGES[kind]:
            right = _WIRES.get(MESSAGES[kind][number].type, BYTES)
            self.refuse(here, f"field {number} of {kind} has wire type {wire} instead of {right}")
        return number, wire, 0, False


# --- What a model reaches for --------------------------------------------------------------------

_FUNCTIONS: Final = 25  # of ModelProto
_EXTERNAL: Final = 1  # TensorProto.DataLocation.EXTERNAL
_STRING: Final = 8  # TensorProto.DataType.STRING
_OF_TEXT: Final = frozenset(
    (b"RegexFullMatch", b"StringConcat", b"StringNormalizer", b"StringSplit", b"TfIdfVectorizer")
)
_NUMBER: Final = re.compile(r"[0-9]{1,18}")

# Fields that hold messages: number -> its type.
_CHILDREN: Final = {
    name: {number: field.type for number, field in fields.items() if field.type in MESSAGES}
    for name, fields in MESSAGES.items()
}
# Scalar fields whose values are kept.
_KEPT: Final[dict[str, frozenset[int]]] = {
    "ModelProto": frozenset((1,)),  # ir_version
    "NodeProto": frozenset((4, 7)),  # op_type, domain
    "OperatorSetIdProto": frozenset((1, 2)),  # domain, version
    "FunctionProto": frozenset((1, 10)),  # name, domain
    "AttributeProto": frozenset((1, 3, 21)),  # name, i, ref_attr_name
    "TensorProto": frozenset((2, 8, 14)),  # data_type, name, data_location
    "StringStringEntryProto": frozenset((1, 2)),  # key, value
}
_WANTED: Final = {name: _KEPT.get(name, frozenset()) | _CHILDREN[name].keys() for name in MESSAGES}
_EXTERNAL_DATA: Final = 13  # of TensorProto
_INITIALIZER, _SPARSE = 5, 15  # of GraphProto
# Fields that hold the inputs, the outputs and the nodes, and all that tell names.
_NAMES: Final = {
    "FunctionProto": (4, 5, 7, frozenset((4, 5, 7))),
    "GraphProto": (11, 12, 1, frozenset((1, _INITIALIZER, 11, 12, _SPARSE))),
}


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
    those of functions and subgraphs are included. `steps` is what the walk took of its bound.
    """

    graphs: int
    ir_version: int
    opset_imports: frozenset[tuple[str, int]]
    operators: frozenset[tuple[str, str]]
    functions: frozenset[tuple[str, str]]
    external: tuple[ExternalData, ...]
    steps: int


def survey(data: bytes, file: str, steps: int = MAX_STEPS) -> Survey:
    """Walk the bytes of an ONNX ModelProto and return what it refers to.

    `file` is the name used in messages, `steps` the most that the walk may take. Never reads outside `data`, whatever
    the bytes say; raises `PackageError` with one sentence when they are not a well-formed model.
    """
    walk = _Walk(data, file, steps)
    version = walk.message("ModelProto", 0, len(data), 1).get(1, 0)
    walk.check_expansion()
    return Survey(
        graphs=walk.graphs,
        ir_version=version,
        opset_imports=frozenset((domain.decode(), version) for domain, version in walk.opset_imports),
        operators=frozenset((domain.decode(), name.decode()) for domain, name in walk.operators),
        functions=frozenset((domain.decode(), name.decode()) for domain, name in walk.functions),
        external=tuple(walk.external),
        steps=steps - walk.left,
    )


def without_functions(data: bytes, domain: str, names: Set[str], file: str) -> bytes:
    """The model without the functions of these names in `domain`. `survey` must have found it well-formed."""
    walk = Wire(data, file)
    dropped = {(domain.encode(), name.encode()) for name in names}
    kept, at = [], 0
    for _, _, start, stop, here in walk.fields("ModelProto", 0, len(data), frozenset((_FUNCTIONS,))):
        inner = walk.fields("FunctionProto", start, stop, _KEPT["FunctionProto"])
        found = {number: data[first:last] for number, _, first, last, _ in inner}
        if (found.get(10, b""), found.get(1, b"")) in dropped:
            kept.append(data[at:here])
            at = stop
    return b"".join((*kept, data[at:]))


_Found: TypeAlias = dict[int, Any]  # the kept scalars of one message by field number: int, or bytes of text


class _Walk(Wire):
    """One pass over the bytes, with what it has found so far."""

    def __init__(self, data: bytes, file: str, steps: int) -> None:
        super().__init__(data, file, steps)
        self.graphs = 0
        self.opset_imports: set[tuple[bytes, int]] = set()
        self.operators: set[tuple[bytes, bytes]] = set()
        self.functions: set[tuple[bytes, bytes]] = set()
        self.external: list[ExternalData] = []
        # What is called how often: by the main graph, and by each function.
        self.called: Counter[tuple[bytes, bytes]] = Counter()
        self.calls: dict[tuple[bytes, bytes], Counter[tuple[bytes, bytes]]] = {}

    def message(self, kind: str, start: int, end: int, depth: int) -> _Found:
        """Walk the message of type `kind` in data[start:end] and return its kept scalars, by field number."""
        if depth > MAX_DEPTH:
            self.refuse(start, f"more than {MAX_DEPTH} messages lie inside one another")
        children = _CHILDREN[kind]
        found: _Found = {}
        entries: list[_Found] = []
        outer = self.called
        if kind == "FunctionProto":
            self.called = Counter()
        for number, value, at, stop, here in self.fields(kind, start, end, _WANTED[kind]):
            if number in children:
                child = self.message(children[number], at, stop, depth + 1)
                if children[number] == "FunctionProto":
                    self.check_function(at, stop)
                if number == _EXTERNAL_DATA and kind == "TensorProto":
                    entries.append(child)
                    if len(entries) > 8:
                        self.refuse(here, "a tensor has more than 8 entries of external data")
            elif MESSAGES[kind][number].type == "s":
                if stop - at > MAX_NAME:
                    self.refuse(here, f"field {number} of {kind} has more than {MAX_NAME} bytes")
                found[number] = self.data[at:stop]
            else:
                found[number] = value
        self.record(kind, found, entries, start)
        self.called = outer
        return found

    def record(self, kind: str, found: _Found, entries: list[_Found], start: int) -> None:
        """Note what a finished message means for the survey."""
        if kind == "NodeProto":
            operator = (found.get(7, b""), found.get(4, b""))
            self.note(self.operators, operator, "operators", start)
            if operator[1] in _OF_TEXT:
                self.refuse_text(start)
            self.called[operator] += 1
        elif kind == "GraphProto":
            self.graphs += 1
        elif kind == "FunctionProto":
            function = (found.get(10, b""), found.get(1, b""))
            self.note(self.functions, function, "functions", start)
            self.calls.setdefault(function, Counter()).update(self.called)  # of several with one name together
        elif kind == "AttributeProto":
            self.check_text_free(found, start)
        elif kind == "OperatorSetIdProto":
            self.note(self.opset_imports, (found.get(1, b""), found.get(2, 0)), "imported opsets", start)
        elif kind == "TensorProto" and found.get(2) == _STRING:
            self.refuse_text(start)
        elif kind == "TensorProto" and (entries or found.get(14) == _EXTERNAL):
            # Entries count whatever data_location says.
            self.external.append(self.external_data(found, entries, start))
            if len(self.external) > MAX_EXTERNAL:
                self.refuse(start, f"more than {MAX_EXTERNAL} tensors keep their bytes in another file")

    def check_text_free(self, found: _Found, start: int) -> None:
        """Refuse what makes tensors of text: a Cast to them, a Constant of text. No bound of memory holds for them, as
        each entry has memory of its own."""
        name = found.get(1)
        # A reference stands for whatever the call of the function says.
        if (name == b"to" and (found.get(3) == _STRING or 21 in found)) or name in (b"value_string", b"value_strings"):
            self.refuse_text(start)

    def refuse_text(self, start: int) -> NoReturn:
        raise PackageError(
            f"{self.file}: expected tensors of numbers, but one holds text, at byte {start}; an energy has no use for "
            "it, so export it without."
        )

    def check_expansion(self) -> None:
        """Refuse functions that call themselves, by way of others too, and those that grow beyond bounds in place."""
        sizes: dict[tuple[bytes, bytes], int] = {}  # nodes of a function once all calls in it are replaced
        opened: set[tuple[bytes, bytes]] = set()
        waiting = [one for one in self.called if one in self.calls]
        while waiting:
            one = waiting[-1]
            if one in sizes:
                waiting.pop()
                continue
            inner = [called for called in self.calls[one] if called in self.calls]
            if unsized := [called for called in inner if called not in sizes]:
                opened.add(one)
                if not opened.isdisjoint(unsized):
                    raise PackageError(
                        f"{self.file}: expected functions that end, but {show(one[1].decode())} calls itself; export "
                        "the package again."
                    )
                waiting += unsized
                continue
            sizes[one] = sum(self.calls[one].values()) + sum(
                self.calls[one][called] * sizes[called] for called in inner
            )
            opened.discard(one)
        expanded = sum(count * sizes[one] for one, count in self.called.items() if one in sizes)
        if expanded > MAX_EXPANDED:
            raise PackageError(
                f"{self.file}: expected at most {MAX_EXPANDED} nodes in functions, each call counted, but there are "
                f"{show(expanded)}; write repeated steps as a Loop, and export the package again."
            )

    def check_function(self, start: int, end: int) -> None:
        """Refuse a function that reads what is not made yet: onnxruntime, as it puts one in place, follows it into a
        crash. Of graphs it says so itself."""
        if unmade := self.unmade("FunctionProto", start, end):
            self.refuse(start, f"a function reads {show(min(unmade).decode())} before anything makes it")

    def unmade(self, kind: str, start: int, end: int) -> set[bytes]:
        """The names that a graph or a function reads, or gives, before anything in it makes them."""
        inputs, outputs, node, wanted = _NAMES[kind]
        made: set[bytes] = set()
        nodes: list[tuple[tuple[bytes, ...], tuple[bytes, ...]]] = []
        given: set[bytes] = set()
        for number, _, at, stop, _ in self.fields(kind, start, end, wanted):
            if number == node:
                nodes.append(self.names(at, stop))
            elif kind == "FunctionProto":
                (made if number == inputs else given).add(self.data[at:stop])
            else:
                where = {_INITIALIZER: ("TensorProto", 8), _SPARSE: ("SparseTensorProto", 1)}
                inner, name = where.get(number, ("ValueInfoProto", 1))
                for _, _, first, last, _ in self.fields(inner, at, stop, frozenset((name,))):
                    if number == _SPARSE:
                        of_values = self.fields("TensorProto", first, last, frozenset((8,)))
                        made.update(self.data[a:b] for _, _, a, b, _ in of_values)
                    else:
                        (given if number == outputs else made).add(self.data[first:last])
        missing: set[bytes] = set()
        for read, makes in nodes:
            missing.update(name for name in read if name not in made)
            made.update(makes)
        return (missing | (given - made)) - {b""}

    def names(self, start: int, end: int) -> tuple[tuple[bytes, ...], tuple[bytes, ...]]:
        """What a node reads, in the graphs inside it too, and what it makes."""
        read: list[bytes] = []
        makes: list[bytes] = []
        for number, _, at, stop, _ in self.fields("NodeProto", start, end, frozenset((1, 2, 5))):
            if number == 1:
                read.append(self.data[at:stop])
            elif number == 2:
                makes.append(self.data[at:stop])
            else:
                for _, _, first, last, _ in self.fields("AttributeProto", at, stop, frozenset((6, 11))):
                    read.extend(self.unmade("GraphProto", first, last))
        return tuple(read), tuple(makes)

    def note(self, those: set[Any], one: tuple[Any, Any], what: str, start: int) -> None:
        those.add(one)
        if len(those) > MAX_DIFFERENT:
            self.refuse(start, f"there are more than {MAX_DIFFERENT} different {what}")

    def external_data(self, found: _Found, entries: list[_Found], start: int) -> ExternalData:
        """Read a tensor's external_data: one location, one offset, one length, nothing else."""
        name = str(found.get(8, b""), "utf-8")
        given: dict[str, str] = {}
        for entry in entries:
            key, value = (entry.get(number, b"").decode() for number in (1, 2))
            if key in given:
                self.refuse(start, f"tensor {show(name)} gives external data twice")
            given[key] = value
        # Without an offset or a length onnxruntime would choose them; other keys, such as
        # onnxruntime's prepacked blobs, would name more bytes to read.
        if set(given) != {"location", "offset", "length"} or not (
            _NUMBER.fullmatch(given["offset"]) and _NUMBER.fullmatch(given["length"])
        ):
            self.refuse(
                start,
                f"tensor {show(name)} needs external data of one location, one offset and "
                f"one length, but has {ascii(given)[:200]}",
            )
        return ExternalData(name, given["location"], int(given["offset"]), int(given["length"]))
