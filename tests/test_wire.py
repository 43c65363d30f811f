"""The audit of graphs: what readers of protobuf could read differently is refused, and no bytes take long to walk."""

import contextlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attacks
import onnx
import pytest
from amounts import amount
from attacks import field, varint
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from test_package import evil_branch

from icnnrt.errors import PackageError
from icnnrt.format import wire
from icnnrt.format.onnx_graph import read_graph
from icnnrt.format.package import Package
from icnnrt.format.wire import MAX_STEPS, MESSAGES, Declared


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return attacks.good(tmp_path / "tiny.icnn")


def refused(data: bytes, sentence: str) -> None:
    with pytest.raises(PackageError, match=sentence) as caught:
        wire.survey(data, "value.onnx")
    assert "\n" not in str(caught.value)


# --- Where the messages are, and what is in them -------------------------------------------------


def descriptors() -> dict[str, Any]:
    """Every message that is reached from ModelProto, by its name within onnx."""
    messages: dict[str, Any] = {}

    def collect(descriptor: Any) -> None:
        name = descriptor.full_name.removeprefix("onnx.")
        if name not in messages:
            messages[name] = descriptor
            for f in descriptor.fields:
                if f.message_type is not None:
                    collect(f.message_type)

    collect(onnx.ModelProto.DESCRIPTOR)
    return messages


# protobuf's FieldDescriptor.TYPE_* -> the letters of `MESSAGES`
LETTERS = {1: "d", 2: "f", 3: "i", 4: "i", 5: "n", 9: "s", 11: "~", 12: "b", 13: "n", 14: "n"}


def test_the_walk_knows_every_field_of_the_messages_that_it_walks() -> None:
    for name, declared in MESSAGES.items():
        found = {}
        for f in descriptors()[name].fields:
            inner = f.message_type and f.message_type.full_name.removeprefix("onnx.")
            type_ = inner if inner and declared[f.number].type == inner else LETTERS[f.type]
            oneof = f.containing_oneof is not None
            found[f.number] = Declared(f.number, type_, f.is_repeated, oneof)
        assert declared == found, name


def test_the_walk_knows_every_message_of_onnx_that_can_hold_a_tensor_or_an_operator() -> None:
    messages = descriptors()
    reaching = {"TensorProto", "NodeProto", "OperatorSetIdProto"}

    def inner(name: str) -> dict[int, str]:
        fields = messages[name].fields
        return {f.number: f.message_type.full_name.removeprefix("onnx.") for f in fields if f.message_type}

    for _ in messages:
        reaching |= {name for name in messages if reaching & set(inner(name).values())}
    assert reaching <= MESSAGES.keys()
    for name in reaching:
        stepped_over = {number for number, f in MESSAGES[name].items() if f.type == "~"}
        assert not any(inner(name)[number] in reaching for number in stepped_over)
    assert MESSAGES["TensorProto"][13].type == "StringStringEntryProto"  # external_data


def paths() -> dict[str, tuple[int, ...]]:
    """A way to each message: the numbers of the fields that lead there from ModelProto."""
    found: dict[str, tuple[int, ...]] = {"ModelProto": ()}
    queue = ["ModelProto"]
    for name in queue:
        for number, f in MESSAGES[name].items():
            if f.type in MESSAGES and f.type not in found:
                found[f.type] = (*found[name], number)
                queue.append(f.type)
    return found


def model(kind: str, content: bytes) -> bytes:
    """A ModelProto with one message of type `kind`, which holds `content`."""
    for number in reversed(paths()[kind]):
        content = field(number, content)
    return content


def one(f: Declared, value: bytes = b"") -> bytes:
    """The field once, with the value that is its default."""
    if f.type in "in":
        return varint(f.number << 3) + b"\0"
    if f.type in "fd":
        return varint(f.number << 3 | (5 if f.type == "f" else 1)) + bytes(4 if f.type == "f" else 8)
    return field(f.number, value)


def every(chosen: Callable[[Declared], bool]) -> list[Any]:
    return [
        pytest.param(kind, f, id=f"{kind}.{f.number}")
        for kind, fields in MESSAGES.items()
        for f in fields.values()
        if chosen(f)
    ]


@pytest.mark.parametrize(("kind", "f"), every(lambda f: not f.repeated))
def test_a_singular_field_given_twice_is_refused(kind: str, f: Declared) -> None:
    data = model(kind, one(f) + one(f))
    onnx.ModelProto().ParseFromString(data)  # protobuf takes it: the last one, or both merged
    refused(data, re.escape(f"field {f.number} of {kind} is given twice"))
    once = model(kind, one(f))
    with contextlib.suppress(PackageError) if kind == "StringStringEntryProto" else contextlib.nullcontext():
        wire.survey(once, "value.onnx")


@pytest.mark.parametrize(("kind", "f"), every(lambda f: f.oneof))
def test_two_members_of_a_oneof_are_refused(kind: str, f: Declared) -> None:
    other = next(o for o in MESSAGES[kind].values() if o.oneof and o.number != f.number)
    refused(model(kind, one(f) + one(other)), re.escape(f"field {other.number} of {kind} is given twice"))


@pytest.mark.parametrize(("kind", "f"), every(lambda f: f.type == "s"))
def test_text_is_utf_8(kind: str, f: Declared) -> None:
    refused(model(kind, one(f, b"\xf9")), re.escape(f"field {f.number} of {kind} should be UTF-8 text, but is not"))
    refused(model(kind, one(f, "ä".encode() * 600_000 + b"\xc3")), "should be UTF-8 text, but is not")


@pytest.mark.parametrize(("kind", "f"), every(lambda f: f.type == "n" and not f.repeated))
def test_a_number_of_32_bits_has_no_more(kind: str, f: Declared) -> None:
    """2^32 + 1 is 1 to readers that cut it, such as protobuf's own."""
    data = model(kind, field(f.number, (1 << 32) + 1))
    refused(data, re.escape(f"field {f.number} of {kind} has more than 32 bits"))
    for value in (1, (1 << 31) - 1, (1 << 64) - 1):
        if (kind, f.number) != ("TensorProto", 14):
            wire.survey(model(kind, field(f.number, value)), "value.onnx")


@pytest.mark.parametrize(("kind", "f"), every(lambda f: True))
def test_a_field_of_another_wire_type_is_refused(kind: str, f: Declared) -> None:
    """protobuf would skip it as unknown."""
    wire = 1 if f.type != "d" else 5
    data = model(kind, varint(f.number << 3 | wire) + bytes(8 if wire == 1 else 4))
    refused(data, re.escape(f"field {f.number} of {kind} has wire type {wire} instead of"))


# --- Bytes of all kinds --------------------------------------------------------------------------

# Appended to a good model: protobuf merges what occurs twice, so each of these changes its meaning.
NODE = field(4, b"Add") + field(7, b"com.evil") + field(7, b"")
PAIR = field(1, b"location") + field(2, b"weights.safetensors") + field(2, b"../secret")
DEEP = b""
for _ in range(40):
    DEEP = field(1, field(5, field(6, DEEP)))


@pytest.mark.parametrize(
    ("tail", "sentence"),
    [
        (field(7, b""), "field 7 of ModelProto is given twice"),
        (field(25, field(7, NODE)), "field 7 of NodeProto is given twice"),
        (field(20, field(1, field(5, field(13, PAIR)))), "field 2 of StringStringEntryProto is given twice"),
        (field(20, field(1, DEEP)), "more than 100 messages lie inside one another"),
        (varint(7 << 3 | 3), "unknown wire type 3"),
        (varint(7 << 3 | 7), "unknown wire type 7"),
        (field(0, 1), "impossible field number 0"),
        (varint(1 << 32 | 7 << 3 | 2) + b"\0", "impossible field number"),
        (b"\x42" + varint(2**40), "field 8 of ModelProto runs past the end"),
        (b"\x42" + varint(2**64), "a number has more than 64 bits"),
        (b"\x42" + b"\x80" * 10 + b"\0", "a number has more than 64 bits"),
        (b"\x42\x80\x80", "a number runs past the end|a field of ModelProto runs past the end"),
        (b"\x42\x80", "runs past the end"),
        (b"\x42", "runs past the end"),
        (b"\xa0", "runs past the end"),
        (b"\x28", "runs past the end"),
        (b"\x79\0\0", "field 15 of ModelProto runs past the end"),
        (b"\x7d\0\0", "field 15 of ModelProto runs past the end"),
        (field(1, 11), "field 1 of ModelProto is given twice"),
        (field(25, field(1, b"a" * 20_000)), "field 1 of FunctionProto has more than 16384 bytes"),
        (field(20, field(1, field(5, attacks.entry("offset", "0")))), "needs external data of one location"),
        (field(20, field(1, field(5, attacks.entry("offset", "0") * 9))), "more than 8 entries of external data"),
    ],
)
def test_bytes_that_readers_could_read_differently(good: Path, tail: bytes, sentence: str) -> None:
    attacks.plant(good, "value.onnx", attacks.model() + tail)
    with pytest.raises(PackageError, match=f"value.onnx: .*{sentence}"):
        Package.open(good)


@pytest.mark.parametrize("tail", [b"\xc0\x3e\x05", b"\x78\x05", field(500, b"later"), b"\x7a\x80\x00"])
def test_fields_of_later_versions_are_skipped(tail: bytes) -> None:
    before = wire.survey(attacks.model(), "value.onnx")
    after = wire.survey(attacks.model() + tail, "value.onnx")
    assert (after.operators, after.external, after.graphs) == (before.operators, before.external, before.graphs)


def test_the_walk_finds_what_onnx_finds() -> None:
    found = wire.survey(attacks.model(evil_branch), "value.onnx")
    assert found.operators == {
        ("", "Add"),
        ("", "Identity"),
        ("", "If"),
        ("", "Loop"),
        ("ai.icnnrt", "BundleEntropySolve"),
    }
    assert found.functions == {("ai.icnnrt", "BundleEntropySolve")}
    assert found.opset_imports == {("", 21), ("ai.icnnrt", 1)}
    assert found.ir_version == 10
    assert found.graphs == 3
    assert sorted(t.location for t in found.external) == ["../../secret"] + ["weights.safetensors"] * 2


def test_functions_are_left_out_and_nothing_else() -> None:
    def more(m: onnx.ModelProto) -> None:
        m.functions.add(name="Other", domain="ai.icnnrt")
        m.functions.add(name="BundleEntropySolve", domain="elsewhere")

    data = attacks.model(more)
    left = onnx.ModelProto.FromString(wire.without_functions(data, "ai.icnnrt", {"BundleEntropySolve"}, "value.onnx"))
    whole = onnx.ModelProto.FromString(data)
    del whole.functions[0]
    assert left == whole
    assert wire.without_functions(data, "ai.icnnrt", {"Absent"}, "value.onnx") == data


@settings(max_examples=amount(400), deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_walked_or_refused(data: bytes) -> None:
    with contextlib.suppress(PackageError):
        wire.survey(data, "x.onnx")
    with contextlib.suppress(PackageError):
        read_graph(data, {})


# --- The order of nodes in functions -------------------------------------------------------------


def function(nodes: list[onnx.NodeProto], outputs: list[str]) -> bytes:
    made = helper.make_function("ai.icnnrt", "F", ["a"], outputs, nodes, [helper.make_opsetid("", 21)])
    return onnx.ModelProto(functions=[made]).SerializeToString()


def branch(*reads: str, gives: str = "r") -> onnx.NodeProto:
    """An If whose branches read these names, of the graph around them or of their own."""
    inner = [helper.make_node("Sum", list(reads), ["r"])]
    weight = onnx.helper.make_tensor("own", TensorProto.FLOAT, [1], [1.0])
    graph = helper.make_graph(inner, "g", [], [helper.make_tensor_value_info(gives, 1, None)], [weight])
    return helper.make_node("If", ["a"], ["c"], then_branch=graph, else_branch=graph)


EXP = helper.make_node("Exp", ["a"], ["b"])
GOOD: list[tuple[list[onnx.NodeProto], list[str]]] = [
    ([EXP, helper.make_node("Add", ["a", "b"], ["c"])], ["c"]),
    ([helper.make_node("Clip", ["a", "", "a"], ["c"])], ["c", "a"]),
    ([EXP, branch("b", "own")], ["c", "b"]),
    ([branch("a"), EXP], ["c", "b"]),
    ([branch("own", gives="a")], ["c"]),
]
BAD: list[tuple[list[onnx.NodeProto], list[str], str]] = [
    ([helper.make_node("Add", ["a", "b"], ["c"]), EXP], ["c"], "b"),
    ([helper.make_node("Add", ["a", "c"], ["c"])], ["c"], "c"),
    ([EXP], ["c"], "c"),
    ([EXP, branch("absent")], ["c"], "absent"),
    ([branch("b"), EXP], ["c"], "b"),
    ([branch("a", gives="absent"), EXP], ["c"], "absent"),
]


@pytest.mark.parametrize(("nodes", "outputs"), GOOD)
def test_functions_in_order_are_taken(nodes: list[onnx.NodeProto], outputs: list[str]) -> None:
    wire.survey(function(nodes, outputs), "value.onnx")


@pytest.mark.parametrize(("nodes", "outputs", "name"), BAD)
def test_functions_out_of_order_are_refused(nodes: list[onnx.NodeProto], outputs: list[str], name: str) -> None:
    """onnxruntime follows them into a crash."""
    refused(function(nodes, outputs), f'a function reads "{name}" before anything makes it')


# --- Work ----------------------------------------------------------------------------------------


def steps(data: bytes) -> int:
    return wire.survey(data, "value.onnx").steps


def tensor(content: bytes) -> bytes:
    return field(7, field(5, content))


def test_what_a_tensor_holds_is_stepped_over() -> None:
    """However large it is: raw, packed, or in text."""
    for number in (4, 5, 6, 7, 9, 10, 11):
        assert steps(tensor(field(number, bytes(1 << 24)))) == steps(tensor(field(number, bytes(1 << 16))))
    assert steps(field(7, field(10, b"a" * (1 << 24)))) == steps(field(7, field(10, b"a" * (1 << 16))))


def test_graphs_of_200_000_nodes_are_within_the_bound() -> None:
    def nodes(count: int) -> bytes:
        made = [
            helper.make_node(
                "Conv",
                [f"value_{i}", f"layers.{i}.weight"],
                [f"value_{i + 1}"],
                name=f"node_Conv_{i}",
                kernel_shape=[3, 3],
                pads=[1, 1, 1, 1],
                dilations=[1, 1],
                group=1,
            )
            for i in range(count)
        ]
        values = [helper.make_tensor_value_info(f"value_{i}", TensorProto.FLOAT, ["n", 8, 9, 9]) for i in range(count)]
        return helper.make_model(helper.make_graph(made, "g", [], [], value_info=values)).SerializeToString()

    few, many = steps(nodes(100)), steps(nodes(1100))
    assert few + 200 * (many - few) < MAX_STEPS


TOO_MUCH = {
    "empty nodes": field(7, field(1, b"") * 500),
    "empty attributes": field(7, field(1, field(5, b"") * 500)),
    "empty dimensions": field(7, field(11, field(2, field(1, field(2, field(1, b"") * 500))))),
    "fields of two bytes": field(7, b"\x0a\x00" * 500),
    "unknown fields": b"\xf8\x07\x00" * 1000,
    "unpacked floats": tensor(b"\x25abcd" * 1000),
    "unpacked integers": tensor(b"\x08\x01" * 1000),
    "long numbers": tensor((b"\x08" + b"\xff" * 9 + b"\x01") * 250),
    "functions": field(25, b"") * 500,
    "nested": field(7, field(1, field(5, field(6, field(1, field(5, field(6, b"")))))) * 100),
    "inputs of one node": field(7, field(1, field(1, b"a") * 1000)),
}


@pytest.mark.parametrize("case", TOO_MUCH)
def test_the_walk_ends_at_its_bound(case: str) -> None:
    with pytest.raises(PackageError, match="expected graphs of some hundred thousand nodes at most"):
        wire.survey(TOO_MUCH[case], "value.onnx", 1000)


def test_the_reader_of_the_prover_ends_at_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("icnnrt.format.onnx_graph.MAX_STEPS", 1000)
    packed = tensor(field(1, b"\x05" * 1000) + field(2, 7))
    for data in (*(TOO_MUCH[case] for case in ("fields of two bytes", "unpacked floats", "empty nodes")), packed):
        with pytest.raises(PackageError, match="expected graphs of some hundred thousand nodes at most"):
            read_graph(data, {})


def test_the_graphs_of_a_package_share_one_bound(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = sum(steps(graph) for graph in Package.open(good).graphs.values())
    monkeypatch.setattr(wire, "MAX_STEPS", taken)
    Package.open(good)
    monkeypatch.setattr(wire, "MAX_STEPS", taken - 1)
    with pytest.raises(PackageError, match="too many fields to"):
        Package.open(good)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (
            field(7, b"".join(field(1, field(4, b"%05d" % i)) for i in range(4097))),
            "more than 4096 different operators",
        ),
        (b"".join(field(25, field(1, b"%05d" % i)) for i in range(4097)), "more than 4096 different functions"),
        (b"".join(field(8, field(2, i)) for i in range(4097)), "more than 4096 different imported opsets"),
    ],
)
def test_what_is_kept_is_bounded(data: bytes, sentence: str) -> None:
    refused(data, sentence)


def test_external_tensors_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "MAX_EXTERNAL", 2)
    entries = attacks.entry("location", "a") + attacks.entry("offset", "0") + attacks.entry("length", "0")
    refused(field(7, field(5, entries) * 3), "more than 2 tensors keep their bytes in another file")
