"""Damaged and hostile packages by the thousand: whatever a file holds, nothing but an IcnnrtError comes out of icnnrt.

A mutation is one of everything that may be wrong with a file: flipped bits, bytes set, cut off, inserted, doubled,
taken from another file; fields of its JSON deleted, swapped, made huge or of another type; fields of its protobuf
likewise. Most are sealed again, with sizes and hashes that agree, so that they get behind the checks of those. What
opens is then used: sessions, solvers, adjoints, tuning, the prover, the command line. Since onnxruntime may crash or
never return on a graph, this happens in child processes with limits; a crash fails the test, and names the mutation.

Each mutation is made from the seed and its own number alone:

    python tests/test_mutations.py 100000              a hundred thousand of them, with figures
    python tests/test_mutations.py --only 4711         one, with its traceback
    python tests/test_mutations.py --seed 7 100000     others
"""

import argparse
import collections
import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from amounts import amount

import icnnrt
from icnnrt import federated
from icnnrt.checking import golden
from icnnrt.checking.recommend import recommend
from icnnrt.checking.repair import project
from icnnrt.checking.verify import verify
from icnnrt.cli import tabular
from icnnrt.epigraph import epigraph
from icnnrt.errors import IcnnrtError
from icnnrt.format import wire
from icnnrt.format.checkpoints import History
from icnnrt.format.package import Package
from icnnrt.format.wire import BYTES, MESSAGES, VARINT, Wire
from icnnrt.serving.session import Session
from icnnrt.tuning.finetune import FineTuner

FIXTURES: Final = Path(__file__).parent / "fixtures" / "version1"
PACKAGES: Final = sorted(path.name for path in FIXTURES.glob("*.icnn"))
SEED: Final = 0
FEW: Final = 300  # of every run of the tests; more with ICNNRT_MUTATIONS
BATCH: Final = 2000  # in one child at most
PATIENCE: Final = 60  # seconds without a result, after which a child is given up
MEMORY: Final = 6 << 30  # bytes that a child may take

Rng = np.random.Generator


# --- Bytes ---------------------------------------------------------------------------------------

NUMBERS: Final = (0, 1, 2, 3, 7, 127, 128, 255, 65535, (1 << 31) - 1, *(1 << n for n in (31, 32, 62)), (1 << 63) - 1)
TEXTS: Final = (
    *(b"", b"x", b"y", b"f", b"\xf9", b"\0", b"../../etc/passwd", b"a" * 300, b"\x1b]0;q\x07"),
    "θ̄\u202e".encode(),
)


def damaged(data: bytes, rng: Rng, others: Sequence[bytes]) -> bytes:
    """The same with something wrong anywhere in it."""
    if not data:
        return bytes(rng.integers(0, 256, 16, np.uint8))
    at = int(rng.integers(len(data)))
    end = min(len(data), at + int(rng.integers(1, 1 + min(len(data), 1 << int(rng.integers(1, 12))))))
    match rng.integers(9):
        case 0:
            flipped = bytearray(data)
            for place in rng.integers(0, len(data), int(rng.integers(1, 9))):
                flipped[place] ^= 1 << int(rng.integers(8))
            return bytes(flipped)
        case 1:
            return data[:at] + bytes([int(rng.choice([0, 1, 0x7F, 0x80, 0xFF]))]) * (end - at) + data[end:]
        case 2:
            return data[:at]
        case 3:
            return data[:at] + bytes(rng.integers(0, 256, int(rng.integers(1, 40)), np.uint8)) + data[at:]
        case 4:
            return data[:end] + data[at:]
        case 5:
            return data[:at] + data[end:]
        case 6:
            other = others[int(rng.integers(len(others)))] or b"\0"
            start = int(rng.integers(len(other)))
            return data[:at] + other[start : start + end - at] + data[end:]
        case 7:
            return data + bytes(rng.integers(0, 256, int(rng.integers(1, 100)), np.uint8))
        case _:
            return data[:at] + struct.pack("<q", int(rng.choice(NUMBERS))) + data[at + 8 :]


# --- JSON ----------------------------------------------------------------------------------------


def places(content: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) in it."""
    if isinstance(content, dict | list):
        for key in content if isinstance(content, dict) else range(len(content)):
            yield content, key
            yield from places(content[key])


def anything(rng: Rng, near: object) -> Any:
    """A value of some type, often like the one that is there."""
    if isinstance(near, int | float) and not isinstance(near, bool) and rng.random() < 0.5:
        return [near + 1, -near, near * 2, near * 10**6, near + 0.5, 10**400, -1, 0, 2**31, 2**63, 1e308, 5e-324][
            int(rng.integers(12))
        ]
    if isinstance(near, list) and rng.random() < 0.5:
        return [near[::-1], near[:-1], [*near, *near], [near], [], near * 1000][int(rng.integers(6))]
    values = [None, True, False, 0, -1, 1.5, 10**30, "", "x", "y", "value", "../x", "\ud800", "a" * 5000, [], {}, [[]]]
    values += [[0], [1, 2, 3], {"a": 1}, "float64", "float32", "int64", "\x1b[31m", "0" * 64, [10**9] * 8]
    return values[int(rng.integers(len(values)))]


def json_damaged(text: bytes, rng: Rng) -> bytes:
    """A JSON object with one or two values wrong, or its text."""
    if rng.random() < 0.1:
        return damaged(text, rng, [text])
    content = json.loads(text)
    for _ in range(int(rng.integers(1, 3))):
        there = list(places(content))
        if not there:
            break
        container, key = there[int(rng.integers(len(there)))]
        match rng.integers(5):
            case 0:
                del container[key]
            case 1 if isinstance(container, dict):
                container[str(anything(rng, "")) + "k"] = container[key]
            case 2:
                other, its = there[int(rng.integers(len(there)))]
                container[key] = json.loads(json.dumps(other[its]))
            case _:
                container[key] = anything(rng, container[key])
    written = json.dumps(content)
    if rng.random() < 0.05:  # what Python does not write
        for old, new in (("1", "NaN"), ("true", "1e999"), ("{", '{"name": "again", ')):
            if rng.random() < 0.5:
                written = written.replace(old, new, 1)
    return written.encode("utf-8", "surrogatepass")


# --- Protobuf ------------------------------------------------------------------------------------


class Field(NamedTuple):
    """One field of a message: its bytes, and the message in it, if it is one."""

    number: int
    raw: bytes
    head: int  # how many bytes of it come before its content
    kind: str  # of the message in it, or ""
    inner: list["Field"]


class _All:
    def __contains__(self, number: object) -> bool:
        return True


def fields(kind: str, data: bytes) -> list[Field]:
    found = []
    walk = Wire(data, "a fixture")
    for number, _, start, stop, here in walk.fields(kind, 0, len(data), _All()):  # type: ignore[arg-type]
        inner = MESSAGES[kind][number].type if number in MESSAGES[kind] else ""
        inner = inner if inner in MESSAGES else ""
        content = fields(inner, data[start:stop]) if inner else []
        found.append(Field(number, data[here:stop], start - here, inner, content))
    return found


def varint(value: int) -> bytes:
    head = b""
    while value > 0x7F:
        head, value = head + bytes([value & 0x7F | 0x80]), value >> 7
    return head + bytes([value])


def of_bytes(number: int, content: bytes) -> bytes:
    return varint(number << 3 | BYTES) + varint(len(content)) + content


@cache
def tree(path: Path) -> tuple[list[Field], dict[str, list[tuple[int, ...]]]]:
    """The fields of a graph, and the ways to its messages by their type."""
    root = fields("ModelProto", path.read_bytes())
    ways: dict[str, list[tuple[int, ...]]] = {"ModelProto": [()]}

    def walk(inside: list[Field], way: tuple[int, ...]) -> None:
        for index, f in enumerate(inside):
            if f.kind:
                ways.setdefault(f.kind, []).append((*way, index))
                walk(f.inner, (*way, index))

    walk(root, ())
    return root, ways


def changed(f: Field, rng: Rng, siblings: list[Field], elsewhere: list[Field]) -> bytes:
    """The field with its content changed; as long as it says that it is."""
    wire = f.raw[0] & 7
    content = f.raw[f.head :]
    if wire == VARINT:
        value = int(rng.choice(NUMBERS)) if rng.random() < 0.6 else int(rng.integers(0, 40))
        value = (1 << 64) - 1 - value if rng.random() < 0.2 else value
        return varint(f.number << 3) + varint(value)
    if wire != BYTES:
        width = 4 if wire == 5 else 8
        number = float(rng.choice([0.0, -1.0, np.nan, np.inf, -np.inf, 1e30, 1e-30, 0.5]))
        return f.raw[: f.head] + struct.pack("<f" if width == 4 else "<d", number)
    match rng.integers(4):
        case 0:
            return of_bytes(f.number, TEXTS[int(rng.integers(len(TEXTS)))])
        case 1:
            return of_bytes(f.number, damaged(content, rng, [f.raw]))
        case 2:
            other = siblings[int(rng.integers(len(siblings)))]
            return of_bytes(f.number, other.raw[other.head :])
        case _:
            other = elsewhere[int(rng.integers(len(elsewhere)))]
            return of_bytes(f.number, other.raw[other.head :])


def graph_damaged(path: Path, other: Path, rng: Rng) -> bytes:
    """A graph with one or two fields wrong, of messages of any type alike; its lengths agree."""
    root, ways = tree(path)
    other_root, other_ways = tree(other)
    kinds = sorted(ways)
    kind = kinds[int(rng.integers(len(kinds)))]
    way = ways[kind][int(rng.integers(len(ways[kind])))]
    inside = root
    for index in way:
        inside = inside[index].inner
    elsewhere = other_root
    for index in other_ways.get(kind, [()])[int(rng.integers(len(other_ways.get(kind, [()]))))]:
        elsewhere = elsewhere[index].inner
    parts = [f.raw for f in inside]
    for _ in range(int(rng.integers(1, 3))):
        if not parts:
            break
        at = int(rng.integers(len(parts)))
        f = inside[at] if at < len(inside) else inside[0]
        match rng.integers(7):
            case 0:
                del parts[at]
                break
            case 1:
                parts.insert(at, parts[at])
            case 2:
                parts.append(parts.pop(at))
                break
            case 3 if elsewhere:
                parts.insert(at, elsewhere[int(rng.integers(len(elsewhere)))].raw)
                break
            case _:
                parts[at] = changed(f, rng, inside, elsewhere or inside)
    content = b"".join(parts)
    for depth in range(len(way), 0, -1):
        holder = root
        for index in way[: depth - 1]:
            holder = holder[index].inner
        raws = [f.raw for f in holder]
        raws[way[depth - 1]] = of_bytes(holder[way[depth - 1]].number, content)
        content = b"".join(raws)
    return content


# --- Files ---------------------------------------------------------------------------------------


def safetensors_damaged(data: bytes, rng: Rng) -> bytes:
    """A file of tensors with its header wrong, its numbers, or both."""
    size = int.from_bytes(data[:8], "little")
    header, numbers = data[8 : 8 + size], data[8 + size :]
    match rng.integers(4):
        case 0:
            return damaged(data, rng, [data])
        case 1:
            odd = np.repeat(rng.choice([np.nan, np.inf, -1.0, 1e30, 0.0, -0.0], 1), 2).astype("<f4").tobytes()
            at = 4 * int(rng.integers(max(len(numbers) // 4, 1)))
            return data[: 8 + size] + numbers[:at] + odd + numbers[at + 8 :]
        case _:
            header = json_damaged(header, rng)
            header += b" " * (-len(header) % 8)
            claim = len(header) if rng.random() < 0.9 else int(rng.choice(NUMBERS))
            return struct.pack("<Q", claim) + header + numbers


def sealed(folder: Path) -> None:
    """Sizes and hashes in the manifest made true again, where there is one that lists them."""
    try:
        content = json.loads((folder / "manifest.json").read_bytes())
        listed = [*content["graphs"].values(), *(content[key] for key in ("weights", "golden") if key in content)]
        for entry in listed:
            data = (folder / entry["file"]).read_bytes()
            entry.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        replaced(folder / "manifest.json", json.dumps(content).encode())
    except (OSError, LookupError, TypeError, ValueError, AttributeError):
        pass


def replaced(path: Path, data: bytes) -> None:
    """A file of its own: what is there is a name of the fixture."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def mutate(folder: Path, source: Path, rng: Rng) -> str:
    """Damage one file of the package in `folder`; returns its name."""
    names = sorted(path.name for path in folder.iterdir())
    name = str(rng.choice(names))
    if rng.random() < 0.25:
        name = "manifest.json"
    target, data = folder / name, (folder / name).read_bytes()
    package = FIXTURES / str(rng.choice(PACKAGES))
    graphs = sorted(package.glob("*.onnx"))
    other = graphs[int(rng.integers(len(graphs)))]
    whim = rng.random()
    if whim < 0.02:
        target.unlink()
        match rng.integers(4):
            case 0:
                target.mkdir()
            case 1:
                target.symlink_to(source / name)
            case 2:
                os.mkfifo(target)
            case _:
                pass
        return name
    if whim < 0.04:
        replaced(target, (folder / str(rng.choice(names))).read_bytes())
    elif whim < 0.25:
        replaced(target, damaged(data, rng, [other.read_bytes(), (folder / "manifest.json").read_bytes()]))
    elif name.endswith(".json"):
        replaced(target, json_damaged(data, rng))
    elif name.endswith(".safetensors"):
        replaced(target, safetensors_damaged(data, rng))
    else:
        replaced(target, graph_damaged(source / name, other, rng))
    if name != "manifest.json" and rng.random() < 0.9:
        sealed(folder)
    return name


# --- What is done with a package that opens ------------------------------------------------------


class Case(NamedTuple):
    """A mutated package that opened, and what to use it with."""

    package: Package
    session: Session
    x: Any
    y: Any
    scratch: Path
    rng: Rng


def _bounds(case: Case) -> dict[str, float]:
    domain = case.package.manifest.domain
    return {"lower": 0.0, "upper": 1.0} if domain and domain.kind == "box" else {}


def use_value(case: Case) -> None:
    case.session.value_and_gradient(case.x, case.y)
    case.session.value(case.x, case.y)


def use_argmin(case: Case) -> None:
    solution = case.session.argmin(case.x, **_bounds(case))  # type: ignore[arg-type]
    repr(solution), solution.summary()
    case.session.vjp(solution, np.ones_like(solution.y), on_unsafe="skip")
    case.session.argmin(case.x, warm=solution, strict=True, **_bounds(case))  # type: ignore[arg-type]


def use_polyhedron(case: Case) -> None:
    solution = case.session.argmin_polyhedron(case.x, lower=0.0, upper=1.0, iterations=8)
    case.session.vjp_polyhedron(solution, np.ones_like(solution.y), on_unsafe="skip")


def use_qp(case: Case) -> None:
    answer = case.session.solve_qp(case.x)
    case.session.vjp(answer, np.ones_like(answer.z), on_unsafe="skip")


def use_tuner(case: Case) -> None:
    tuner = FineTuner(case.session)
    spec = case.package.manifest.train
    assert spec is not None
    target = np.full((len(case.x), *spec.target_shape), 0.5)
    tuner.step(case.x, target, **_bounds(case))  # type: ignore[arg-type]
    tuner.check(case.x, target, **_bounds(case))  # type: ignore[arg-type]
    history = case.scratch / "history"
    tuner.save(history, figures={"loss": 1.0})
    tuner.resume(history)
    tuner.rollback()
    tuner.write_package(case.scratch / "tuned.icnn", overwrite=True)


def use_weights(case: Case) -> None:
    weights = federated.get_weights(case.session)
    federated.set_weights(case.session, federated.weighted_average([weights, weights], [1, 2]))
    repr(case.session.weights), dict(case.session.weights)


def use_inspect(case: Case) -> None:
    from icnnrt.cli.app import console
    from icnnrt.cli.inspect import _tree

    with open(os.devnull, "w") as nowhere:
        screen = console()
        screen.file = nowhere
        content = json.loads(case.package.manifest.to_json())
        for tensor in content["weights"]["tensors"].values():
            tensor |= {"min": 0.0, "max": 1.0}
        screen.print(_tree(str(case.package.path), content))


def use_pack(case: Case) -> None:
    from icnnrt_exporters import pack

    roles = sorted(case.package.graphs)
    role = roles[int(case.rng.integers(len(roles)))]
    portable, freeze = (bool(case.rng.random() < 0.3) for _ in range(2))
    pack(case.package, case.scratch / "packed.onnx", role, portable=portable, freeze=freeze, overwrite=True)


ACTIONS: Final[dict[str, Callable[[Case], object]]] = {
    "value": use_value,
    "gradient": lambda c: c.session.gradient(c.x, c.y),
    "hvp": lambda c: c.session.hvp(c.x, c.y, c.y),
    "hessian": lambda c: (c.session.hessian(c.x, c.y), c.session.value_gradient_hessian(c.x, c.y)),
    "gradient_x": lambda c: c.session.gradient_x(c.x, c.y),
    "pullback": lambda c: c.session.pullback(c.x, c.y, np.ones(len(c.x)), c.y),
    "argmin": use_argmin,
    "adjoint": use_argmin,
    "argmin_polyhedron": use_polyhedron,
    "adjoint_polyhedron": use_polyhedron,
    "solve": use_qp,
    "solve_adjoint": use_qp,
    "train": use_tuner,
    "prove": lambda c: c.session.prove_convexity(),
    "epigraph": lambda c: [p.solve() for p in epigraph(c.session, c.x, lower=0.0, upper=1.0)],
    "recommend": lambda c: recommend(c.session, c.x, 0.1, max_iterations=3, **_bounds(c)),  # type: ignore[arg-type]
    "golden": lambda c: golden.replay(c.session, c.package.golden),
    "weights": use_weights,
    "save": lambda c: c.package.save(c.scratch / "saved.icnn", overwrite=True),
    "inspect": use_inspect,
    "repair": lambda c: project(c.package, c.scratch / "repaired.icnn", overwrite=True),
    "pack": use_pack,
    "verify": lambda c: verify(c.package, samples=2),
}
# What takes long is done now and then.
OFTEN: Final = {"verify": 0.03, "pack": 0.15, "repair": 0.2, "epigraph": 0.5, "train": 0.3}


def use(folder: Path, file: str, scratch: Path, rng: Rng) -> list[str]:
    """Open the package and use it; returns how each thing that was tried has ended."""
    try:
        package = Package.open(folder)
    except IcnnrtError as error:
        return [told("open", error)]
    manifest = package.manifest
    repr(package)
    try:
        session = icnnrt.load(package, native=[None, False][int(rng.integers(2))])
    except IcnnrtError as error:
        return [told("load", error)]
    # A manifest may ask for samples of any size; that is its maker's affair, and not tried with many numbers.
    size = max(int(np.prod(manifest.x_shape)), manifest.y_shape[0])
    if size > 1 << 16:
        session.close()
        return ["large"]
    x = np.zeros((2, *manifest.x_shape)) + 0.25 * rng.standard_normal((2, *manifest.x_shape))
    y = np.full((2, *manifest.y_shape), 0.5)
    role = file.removesuffix(".onnx")
    wanted = [role] if role in ACTIONS else []
    if role in ("value", "gradient") and rng.random() < 0.5:
        wanted.append(str(rng.choice(["prove", "epigraph", "repair"])))
    names = list(ACTIONS)
    extra = names[int(rng.integers(len(names)))]
    if (not wanted or rng.random() < 0.3) and rng.random() < OFTEN.get(extra, 1.0):
        wanted.append(extra)
    endings = []
    with session:
        repr(session)
        for action in wanted:
            if action in ("train", "solve", "solve_adjoint") and action not in manifest.graphs:
                continue
            try:
                ACTIONS[action](Case(package, session, x, y, scratch, rng))
                endings.append(f"{action}: done")
            except IcnnrtError as error:
                endings.append(told(action, error))
    return endings or ["nothing tried"]


def told(action: str, error: IcnnrtError) -> str:
    assert str(error).isprintable(), ascii(str(error))
    return f"{action}: {type(error).__name__}"


# --- Other files ---------------------------------------------------------------------------------


def use_history(source: Path, folder: Path, rng: Rng) -> list[str]:
    """A folder of checkpoints with something wrong in it."""
    names = sorted(path.name for path in folder.iterdir())
    name = str(rng.choice(names)) if rng.random() < 0.5 else "history.json"
    target = folder / name
    data = target.read_bytes()
    if rng.random() < 0.05:
        target.unlink()
    elif name.endswith(".json"):
        replaced(target, json_damaged(data, rng) if rng.random() < 0.8 else damaged(data, rng, [data]))
    else:
        replaced(target, new := safetensors_damaged(data, rng))
        if rng.random() < 0.9:  # with a hash that agrees, in the name too
            history = json.loads((folder / "history.json").read_bytes())
            for entry in history["checkpoints"]:
                if entry["file"] == name:
                    digest = hashlib.sha256(new).hexdigest()
                    entry.update(bytes=len(new), sha256=digest, file=f"{name[:18]}{digest[:16]}.safetensors")
                    target.rename(folder / entry["file"])
            replaced(folder / "history.json", json.dumps(history).encode())
    session = _session(source)
    try:
        tuner = FineTuner(session)
        for checkpoint in History(folder, session.manifest).checkpoints:
            tuner.resume(folder, step=checkpoint.step)
        tuner.save(folder)
        tuner.resume(folder)
        return ["history: done"]
    except IcnnrtError as error:
        return [told("history", error)]


@cache
def _session(source: Path) -> Session:
    return icnnrt.load(source, native=False)


def use_table(folder: Path, rng: Rng) -> list[str]:
    """An .npz, .npy or .csv with something wrong in it, read as the command line reads it."""
    x = rng.standard_normal((3, 2))
    file = folder / ("x" + str(rng.choice([".npz", ".npy", ".csv"])))
    if file.suffix == ".npz":
        (np.savez_compressed if rng.random() < 0.5 else np.savez)(file, x=x, target=x)
    elif file.suffix == ".npy":
        np.save(file, x)
    else:
        file.write_text("\n".join(",".join(map(repr, row)) for row in x.tolist()))
    if file.suffix == ".npz" and rng.random() < 0.5:  # an array of the archive, in a sound archive
        with zipfile.ZipFile(file) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(file, "w") as archive:
            for name, data in members.items():
                archive.writestr(name if rng.random() < 0.9 else "\x1b" + name, damaged(data, rng, [data]))
    else:
        data = file.read_bytes()
        odd = (data, b"'descr': 'O', 'shape': (99999999999,)", b'nan,inf,1e999,\x00,"\n')
        file.write_bytes(damaged(data, rng, odd))
    try:
        tabular.read_array(file, "x", (2,))
        if file.suffix == ".npz":
            tabular.read_archive(file, ("x", "target"), also={"target": "y"})
        return ["table: done"]
    except IcnnrtError as error:
        return [told("table", error)]


# --- One mutation, many, and their children ------------------------------------------------------


def one(number: int, seed: int, histories: Path) -> list[str]:
    """Make the mutation of this number, and use it."""
    rng = np.random.default_rng([seed, number])
    scratch = Path(tempfile.mkdtemp(prefix="mutation-"))
    try:
        kind = rng.random()
        if kind < 0.06:
            return use_table(scratch, rng)
        folder = scratch / "package.icnn"
        source = FIXTURES / ("unit_box.icnn" if kind < 0.12 else str(rng.choice(PACKAGES)))
        folder.mkdir()
        for path in (histories if kind < 0.12 else source).iterdir():
            os.link(path, folder / path.name)
        if kind < 0.12:
            return use_history(source, folder, rng)
        file = mutate(folder, source, rng)
        return use(folder, file, scratch, rng)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def make_history(folder: Path) -> Path:
    """Two checkpoints of a fixture."""
    with icnnrt.load(FIXTURES / "unit_box.icnn", native=False) as session:
        tuner = FineTuner(session)
        for figure in (1.0, 0.5):
            tuner.step(np.ones((2, 2)), np.full((2, 3), 0.5))
            tuner.save(folder, figures={"loss": figure})
    return folder


def child(first: int, count: int, seed: int, histories: Path) -> None:
    """One line a mutation: its number as it begins, then how it ended."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, ValueError):
        pass
    # Most graphs are those of the fixtures, and what they hold is found out once: it takes most of the time.
    walked, seen = wire.survey, dict[bytes, wire.Survey]()

    def survey(data: bytes, file: str, steps: int = wire.MAX_STEPS) -> wire.Survey:
        if (found := seen.get(data)) is None:
            found = walked(data, file, steps)
            if len(seen) < len(PACKAGES) * 8:
                seen[data] = found
        return found

    wire.survey = survey
    for path in FIXTURES.glob("*/*.onnx"):
        survey(path.read_bytes(), path.name)
    for number in range(first, first + count):
        print(f"begin {number}", flush=True)
        try:
            endings = one(number, seed, histories)
        except MemoryError:  # of the limit above
            endings = ["MemoryError"]
        except BaseException as error:
            print(f"escaped {number} {type(error).__name__}: {ascii(str(error))[:300]}", flush=True)
            print(ascii(traceback.format_exc())[-1500:], file=sys.stderr, flush=True)
            continue
        print("end " + "; ".join(endings), flush=True)


class Result(NamedTuple):
    """What came of many mutations."""

    count: int
    endings: collections.Counter[str]
    escaped: list[str]
    crashed: list[str]
    hung: list[str]
    raw: list[str]  # what was printed and should not have been


def run(count: int, seed: int, workers: int = 1, progress: bool = False) -> Result:
    result = Result(count, collections.Counter(), [], [], [], [])
    with tempfile.TemporaryDirectory() as scratch:
        histories = make_history(Path(scratch) / "history")
        batch = min(BATCH, -(-count // workers))
        queue = collections.deque((first, min(batch, count - first)) for first in range(0, count, batch))
        running: list[_Child] = []
        done, began = 0, time.time()
        while queue or running:
            while queue and len(running) < workers:
                running.append(_Child(*queue.popleft(), seed, histories, Path(scratch)))
            time.sleep(0.05)
            for one_child in list(running):
                left = one_child.poll(result)
                if left is not None:
                    running.remove(one_child)
                    done += one_child.count - left[1]
                    if left[1]:
                        queue.appendleft(left)
                    if progress:
                        bad = len(result.escaped), len(result.crashed), len(result.hung)
                        print(f"{done} in {time.time() - began:.0f} s, escaped, crashed, hung {bad}", flush=True)
    return result


class _Child:
    """A process that is on its way through some mutations."""

    def __init__(self, first: int, count: int, seed: int, histories: Path, scratch: Path) -> None:
        self.first, self.count, self.seed = first, count, seed
        self.out = scratch / f"{first}.out"
        self.err = scratch / f"{first}.err"
        arguments = [sys.executable, __file__, "--child", str(first), str(count), str(seed), str(histories)]
        with open(self.out, "wb") as out, open(self.err, "wb") as err:
            self.process = subprocess.Popen(arguments, stdout=out, stderr=err)
        self.size, self.since = 0, time.time()

    def poll(self, result: Result) -> tuple[int, int] | None:
        """Once it has ended: what it has not come to, (first, count)."""
        size = self.out.stat().st_size
        if size != self.size:
            self.size, self.since = size, time.time()
        code = self.process.poll()
        hangs = code is None and time.time() - self.since > PATIENCE
        if code is None and not hangs:
            return None
        if hangs:
            self.process.kill()
            self.process.wait()
        lines = self.out.read_text("utf-8", "replace").splitlines()
        number = self.first - 1
        for line in lines:
            match line.split(" ", 1):
                case ["begin", rest]:
                    number = int(rest)
                case ["end", rest]:
                    result.endings.update(rest.split("; "))
                case ["escaped", rest]:
                    result.escaped.append(rest)
        err = self.err.read_text("utf-8", "surrogateescape")
        if bad := [line for line in err.split("\n") if not line.isprintable()]:
            result.raw.append(f"{self.first}: {ascii(bad[0])[:200]}")
        if hangs:
            result.hung.append(str(number))
        elif code:
            result.crashed.append(f"{number} (exit code {code}: {err[-200:]!a})")
        return number + 1, self.first + self.count - number - 1


def test_no_mutation_of_any_file_gets_an_exception_out() -> None:
    count = int(os.environ.get("ICNNRT_MUTATIONS", amount(FEW)))
    result = run(count, SEED, workers=2)
    replay = f"replay with: python tests/test_mutations.py --seed {SEED} --only NUMBER"
    assert not result.escaped, f"{replay}: {result.escaped[:5]}"
    assert not result.crashed, f"{replay}: {result.crashed[:5]}"
    assert not result.raw, f"{replay}: {result.raw[:5]}"
    assert sum(n for ending, n in result.endings.items() if ending.endswith(": done")) > count // 20
    assert sum(n for ending, n in result.endings.items() if ending.startswith("open: ")) > count // 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", nargs="?", type=int, default=FEW)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--only", type=int)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--child", nargs=4)
    chosen = parser.parse_args()
    if chosen.child:
        first, count, seed, histories = chosen.child
        child(int(first), int(count), int(seed), Path(histories))
    elif chosen.only is not None:
        with tempfile.TemporaryDirectory() as scratch:
            print(one(chosen.only, chosen.seed, make_history(Path(scratch) / "history")))
    else:
        result = run(chosen.count, chosen.seed, chosen.workers, progress=True)
        for ending, times in result.endings.most_common():
            print(f"{times:8d}  {ending}")
        for what in ("escaped", "crashed", "hung", "raw"):
            print(f"{what}: {len(getattr(result, what))}")
            for line in getattr(result, what)[:100]:
                print("   ", line)
        raise SystemExit(bool(result.escaped or result.crashed or result.raw))


if __name__ == "__main__":
    main()
