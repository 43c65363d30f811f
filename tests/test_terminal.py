"""What strangers wrote never reaches a terminal raw: no escape, no line that looks like one of icnnrt's own."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import attacks
import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from rich.columns import Columns
from rich.progress import Progress

import icnnrt
from icnnrt import FineTuner, IcnnrtError, PackageError, convexity
from icnnrt.cli.app import console, one_line, tell
from icnnrt.cli.commands import app
from icnnrt.format import package as package_format
from icnnrt.format.contents import weight_layout
from icnnrt.format.package import Package
from icnnrt.printable import cropped, harmless, is_plain, named, printable, show

FIXTURE = Path(__file__).parent / "fixtures" / "version1" / "unit_box.icnn"

# A window's title, colours, C1 and DEL, bidirectional overrides, zero-width and invisible characters, separators of
# lines, a carriage return and backspaces to write over what is there, markup and emoji of rich.
FORGED = "q forged: no check failed"
EVIL = (
    "\x1b]0;pwned\x07\x1b[31m\x9b2J\x7f\u202e\u2066\u200f\u200b\ufeff\u00ad\u2028\u2029\x85\x0b\x0c\x08\x08\r\n"
    f"{FORGED}\n{' ' * 130}{FORGED}\n[bold]b[/bold][/][link=file:///etc/passwd]l[/link][@click=x]:warning:\\"
)


def no_harm(text: str) -> None:
    """No character but newlines that is not printable, and no line that a value forged."""
    for line in text.split("\n"):
        assert line.isprintable(), ascii(line)
        assert not line.lstrip(" │├└─┃┡━╇╭╰").startswith("q forged"), line
    assert "⚠" not in text


# --- The functions -------------------------------------------------------------------------------


@pytest.mark.parametrize("character", [chr(c) for c in (*range(0x20), *range(0x7F, 0xA1), 0xAD)])
def test_control_characters_are_written_out(character: str) -> None:
    assert printable(f"a{character}b").isprintable()
    assert printable(f"a{character}b").startswith("a\\")


@pytest.mark.parametrize(
    "codes", [(0x200B, 0x200F), (0x2028, 0x202E), (0x2060, 0x206F), (0xD800, 0xD800), (0xDFFF, 0xDFFF), (0xE0001,) * 2]
)
def test_invisible_characters_are_written_out(codes: tuple[int, int]) -> None:
    for code in range(codes[0], codes[1] + 1):
        assert printable(chr(code)) == (f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}")


def test_text_of_any_script_stays() -> None:
    for text in ("Größe θ̄ ∇²f", "层.0.权重", "ошибка", "layers.0.W_z[1]", "a b  c", "\\x1b", "[bold]"):
        assert printable(text) == text


def test_names_are_quoted_where_they_look_like_none() -> None:
    for name in ("layers.0.W_z.weight", "model/layer:0", "ПИКНН", "W[0]"):
        assert named(name) == name
    for name in ("", "two words", "a\nb", "[red]", "x" * 81, "a; f is proven convex in y", "\x1b"):
        assert named(name) == show(name) or is_plain(name)
        assert len(named(name)) <= 80
    assert named("a b") == '"a b"'


def test_show_takes_anything() -> None:
    class Broken:
        def __repr__(self) -> str:
            raise RuntimeError

    for value in (EVIL, "x" * (1 << 20), 10**5000, Broken(), b"\x1b", {"\x1b": EVIL}, None, 1.5, "\ud800"):
        assert len(show(value)) <= 80
        assert show(value).isascii()
        assert show(value).isprintable()


def test_a_text_is_cropped_after_it_is_made_printable() -> None:
    assert cropped("\x1b" * 1000, 100) == "\\x1b" * 24 + "\\..."
    assert cropped("short", 100) == "short"


def test_errors_are_one_line_whatever_they_say() -> None:
    for kind in (IcnnrtError, PackageError, icnnrt.InputError, icnnrt.MissingDependencyError, icnnrt.ExportError):
        error = kind(f"weights: {EVIL}")
        no_harm(str(error))
        no_harm(repr(error))
        assert "\n" not in str(error)
    no_harm(str(harmless(ValueError(EVIL))))


@pytest.mark.parametrize("terminal", [False, True])
def test_a_console_prints_no_text_raw(
    terminal: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a terminal, no more than rich's own colours."""
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("TERM", "xterm-256color")
    screen = console()
    raw = EVIL.replace(" ", "_")  # what has blanks is broken there, unless it has one line to itself
    screen.print(raw, markup=False)
    screen.print(Columns([one_line(EVIL)]))
    with Progress(console=screen, auto_refresh=False) as progress:
        progress.add_task("")
        progress.console.print(raw, markup=False)
    tell(EVIL)
    out, err = capsys.readouterr()
    colours = re.compile(r"\x1b\[[0-9;?]*[mhlKAG]" if terminal else r"(?!)")
    no_harm(colours.sub("", out).replace("\r", ""))
    no_harm(err)


# --- A package made of escapes -------------------------------------------------------------------


def rename(model: onnx.ModelProto, weights: set[str]) -> None:
    """Escapes in every name but those of the main graph's inputs and outputs, which icnnrt knows."""
    kept = {v.name for v in (*model.graph.input, *model.graph.output)} - weights
    kept |= {v for v in kept if not v.startswith(("theta_bar.", "new."))}

    def of(name: str) -> str:
        for prefix in ("theta_bar.", "new."):
            if name.startswith(prefix) and name.removeprefix(prefix) in weights:
                return name + EVIL
        return name if not name or name in kept else name + EVIL

    def graph(g: onnx.GraphProto) -> None:
        g.name += EVIL
        g.doc_string = EVIL
        for value in (*g.input, *g.output, *g.value_info, *g.initializer):
            value.name = of(value.name)
        for node in g.node:
            nodes(node)

    def nodes(node: onnx.NodeProto) -> None:
        node.name += EVIL
        node.input[:] = [of(name) for name in node.input]
        node.output[:] = [of(name) for name in node.output]
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                graph(attribute.g)

    graph(model.graph)
    for function in model.functions:
        for node in function.node:
            node.name += EVIL


def evil_package(path: Path, change: Callable[[onnx.ModelProto], None] = lambda model: None) -> Path:
    """The fixture, working, with escapes in every text that its files hold."""
    old = Package.open(FIXTURE)
    weights = {name + EVIL: np.array(array) for name, array in old.weights.items()}
    layout = weight_layout(weights)[1]
    graphs = {}
    for role, data in old.graphs.items():
        model = onnx.ModelProto.FromString(data)
        rename(model, set(old.weights))
        for tensor in model.graph.initializer:
            if tensor.external_data:
                offset, length = layout[tensor.name]
                given = {"location": "weights.safetensors", "offset": str(offset), "length": str(length)}
                for entry in tensor.external_data:
                    entry.value = given[entry.key]
        if role == "value":
            change(model)
        graphs[role] = model.SerializeToString()
    m = old.manifest
    assert m.train is not None
    assert m.convexity is not None
    tensors = m.weights.tensors
    package_format.write(
        path,
        name="evil" + EVIL,
        dtype=m.dtype,
        x_shape=m.x_shape,
        y_shape=m.y_shape,
        solver=m.solver,
        graphs=graphs,
        weights=weights,
        nonnegative=[name + EVIL for name, spec in tensors.items() if spec.nonnegative],
        trainable=[name + EVIL for name, spec in tensors.items() if spec.trainable],
        domain=m.domain,
        producer={"tool" + EVIL: "1" + EVIL, "long": EVIL * 8},
        parity={"value" + EVIL: 1.0, "argmin": {"max" + EVIL: 1.0}},
        metadata={"note" + EVIL: "a" + EVIL, "nul": "\0" + EVIL, "long": EVIL * 20},
        train=replace(
            m.train,
            loss="loss" + EVIL,
            settings={**m.train.settings, "more" + EVIL: 1.0},
            weights=tuple(name + EVIL for name in m.train.weights),
        ),
        convexity=replace(
            m.convexity,
            verdict="unknown",
            reason="because" + EVIL,
            node=("Op" + EVIL, "out" + EVIL),
            blame=("w" + EVIL,),
            min_weight=("w" + EVIL, 1.0),
        ),
        golden={name + EVIL if "." in name else name: np.array(a) for name, a in old.golden.items()},
    )
    return path


def fails_when_run(model: onnx.ModelProto) -> None:
    """Reads beyond a tensor, which only shows while it runs; onnxruntime's error then names the node."""
    g = model.graph
    g.initializer.append(numpy_helper.from_array(np.zeros(2, np.float32), "two" + EVIL))
    g.initializer.append(numpy_helper.from_array(np.array([1 << 40]), "far" + EVIL))
    g.node.append(helper.make_node("Shape", ["x"], ["shape" + EVIL], name="shape" + EVIL))
    g.node.append(helper.make_node("Mul", ["shape" + EVIL, "far" + EVIL], ["index" + EVIL], name="index" + EVIL))
    g.node.append(helper.make_node("Gather", ["two" + EVIL, "index" + EVIL], ["got" + EVIL], name="gather" + EVIL))
    g.node.append(helper.make_node("ReduceMax", ["got" + EVIL], ["m" + EVIL], keepdims=0, name="max" + EVIL))
    (f,) = [o for o in g.output if o.name == "f"]
    for node in g.node:
        node.output[:] = ["f0" + EVIL if name == "f" else name for name in node.output]
        node.input[:] = ["f0" + EVIL if name == "f" else name for name in node.input]
    g.node.append(helper.make_node("Add", ["f0" + EVIL, "m" + EVIL], [f.name], name="add" + EVIL))


def fails_when_loaded(model: onnx.ModelProto) -> None:
    node = helper.make_node("Add", ["x", "absent" + EVIL], ["n" + EVIL], name="lost" + EVIL)
    model.graph.node.append(node)


def is_refused(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Shell" + EVIL, ["x"], ["n"], domain="evil" + EVIL))


@pytest.fixture(scope="module")
def evil(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evil")
    evil_package(folder / "evil.icnn")
    evil_package(folder / "runs.icnn", fails_when_run)
    evil_package(folder / "loads.icnn", fails_when_loaded)
    refused = folder / "refused.icnn"
    shutil.copytree(folder / "evil.icnn", refused)
    model = onnx.ModelProto.FromString((refused / "value.onnx").read_bytes())
    is_refused(model)
    attacks.plant(refused, "value.onnx", model.SerializeToString())
    misfit = folder / "misfit.icnn"
    shutil.copytree(folder / "evil.icnn", misfit)
    (misfit / ("more" + EVIL.replace("/", "")[:60] + ".onnx")).write_bytes(b"")
    manifest = folder / "manifest.icnn"
    shutil.copytree(folder / "evil.icnn", manifest)
    attacks.edit_manifest(manifest, lambda m: m.update({"key" + EVIL: EVIL}))
    rng = np.random.default_rng(0)
    np.save(folder / "x.npy", rng.standard_normal((4, 2)).astype("f"))
    np.savez(folder / "data.npz", x=rng.standard_normal((8, 2)).astype("f"), target=np.full((8, 3), 0.5, "f"))
    np.savez(folder / "odd.npz", **{"x" + EVIL: np.zeros((4, 2)), "y" + EVIL: np.zeros(3)})  # type: ignore[arg-type]
    (folder / "odd.csv").write_text(f"{EVIL.splitlines()[0]},1\n1,2\n")
    (folder / "pickled.npy").write_bytes(b"\x93NUMPY\x01\0\x76\0{'descr': '" + EVIL.encode()[:90] + b"'}")
    return folder


COMMANDS: list[list[str]] = [
    ["inspect", "PACKAGE"],
    ["verify", "PACKAGE", "--samples", "4"],
    ["verify", "PACKAGE", "--samples", "4", "--recommend", "1e-2"],
    ["run", "PACKAGE", "x.npy"],
    ["run", "PACKAGE", "x.npy", "--out", "OUT.npz", "--strict"],
    ["run", "PACKAGE", "odd.npz"],
    ["run", "PACKAGE", "odd.csv"],
    ["run", "PACKAGE", "pickled.npy"],
    ["tune", "PACKAGE", "data.npz", "--out", "OUT.icnn", "--epochs", "1", "--history", "OUT.history"],
    ["tune", "PACKAGE", "odd.npz", "--out", "OUT.icnn"],
    ["repair", "PACKAGE", "--out", "OUT.icnn", "--project"],
    ["epigraph", "PACKAGE", "x.npy", "OUT.lp"],
    ["pack", "PACKAGE", "OUT.onnx"],
    ["pack", "PACKAGE", "OUT2.onnx", "--graph", "value", "--portable"],
    ["pack", "PACKAGE", "OUT3.onnx", "--freeze"],
]
WITH_JSON = ("inspect", "verify", "run", "tune", "repair", "epigraph")


def call(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> tuple[Any, str, str]:
    """The command in this process, with what it and onnxruntime, which is not Python, print."""
    capfd.readouterr()
    try:
        code = app(arguments, prog_name="icnnrt", standalone_mode=False)
    except SystemExit as exit_:
        code = exit_.code
    out, err = capfd.readouterr()
    return code, out, err


@pytest.mark.parametrize("package", ["evil", "runs", "loads", "refused", "misfit", "manifest"])
@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: " ".join(c[:1] + c[2:3]))
def test_no_command_prints_a_strangers_text_raw(
    evil: Path,
    command: list[str],
    package: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    places = {"PACKAGE": f"{package}.icnn"}
    arguments = [places.get(a, a) for a in command]
    arguments = [str(evil / a) if (evil / a).exists() else a.replace("OUT", str(tmp_path / "out")) for a in arguments]
    code, out, err = call(arguments, capfd)
    no_harm(out)
    no_harm(err)
    if package in ("refused", "misfit", "manifest"):
        assert code == 1
        assert err.count("\n") == 1
    if command[0] in WITH_JSON:
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        _, out, err = call([*arguments, "--json"], capfd)
        no_harm(err)
        assert out.isascii()
        no_harm(out)
        if out:
            assert out.count("\n") == 1
            json.loads(out)


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_doctor_prints_nothing_raw(
    more: list[str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name of the platform and the place of the library are the machine's, but who knows."""
    monkeypatch.setattr("platform.platform", lambda: EVIL)
    _, out, err = call(["doctor", *more], capfd)
    no_harm(out)
    no_harm(err)
    assert "pwned" in out


def test_the_package_of_escapes_works(evil: Path, tmp_path: Path) -> None:
    """Else the commands above would all end at the same error."""
    with icnnrt.load(evil / "evil.icnn") as session:
        solution = session.argmin(np.zeros((1, 2)))
        assert solution.ok.all()
        no_harm(repr(session))
        no_harm(repr(session.package))
        no_harm(repr(session.weights))
        tuner = FineTuner(session)
        no_harm(repr(tuner))
        assert tuner.step(np.zeros((2, 2)), np.full((2, 3), 0.5)).accepted
        tuner.save(tmp_path / "history", figures={"loss": 1.0})
        no_harm(session.manifest.convexity.sentence())  # type: ignore[union-attr]


@pytest.mark.parametrize("package", ["runs", "loads"])
def test_a_traceback_is_harmless_too(evil: Path, package: str) -> None:
    """Python prints an error with its cause, which onnxruntime raised, and onnxruntime prints lines of its own."""
    code = f"import icnnrt; icnnrt.load({str(evil / f'{package}.icnn')!r}).value([[0, 0]], [[0, 0, 0]])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    text = done.stderr.decode()
    assert "RuntimeError" in text
    no_harm(text)


@pytest.mark.parametrize("change", ["name", "figures", "key"])
def test_a_history_is_told_harmlessly(evil: Path, tmp_path: Path, change: str) -> None:
    with icnnrt.load(evil / "evil.icnn") as session:
        FineTuner(session).save(tmp_path / "history", figures={"loss" + EVIL: 1.0})
        file = tmp_path / "history" / "history.json"
        content = json.loads(file.read_text())
        if change == "name":
            content["checkpoints"][0]["file"] = "../" + EVIL
        elif change == "figures":
            content["checkpoints"][0]["figures"] = {EVIL: "1"}
        else:
            content[EVIL] = 1
        file.write_text(json.dumps(content))
        with pytest.raises(PackageError) as caught:
            FineTuner(session).resume(tmp_path / "history")
    no_harm(str(caught.value))


def test_a_verdict_is_one_sentence() -> None:
    witness = convexity.Witness((EVIL,), (), (), 1.0, 1.0)
    for verdict in ("proven", "violated", "unknown"):
        found = convexity.Convexity(verdict, EVIL * 100, (EVIL, EVIL), (EVIL,), witness, (EVIL, 1.0))  # type: ignore[arg-type]
        no_harm(found.sentence())
        assert "\n" not in found.sentence()
        assert len(found.sentence()) < 5000
