"""Graphs that want all time and all memory end at their limits, in one sentence."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import attacks
import numpy as np
import onnx
import pytest
from onnx import TensorProto as T
from onnx import helper, numpy_helper
from test_session import build
from typer.testing import CliRunner

import icnnrt
from icnnrt import LimitError, Limits, limits
from icnnrt.checking.verify import verify
from icnnrt.cli.commands import app
from icnnrt.errors import IcnnrtError, InputError, PackageError
from icnnrt.serving.served import Served

SHORT = Limits(seconds=0.5, bytes=64 << 20)
X, Y = np.zeros((2, 4)), np.zeros((2, 3))


def info(name: str, shape: Sequence[int | str], dtype: int = T.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, shape)


def node(op: str, inputs: str, outputs: str, **given: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs.split(), outputs.split(), **given)


def values(**arrays: Any) -> list[onnx.TensorProto]:
    return [numpy_helper.from_array(np.asarray(a), name) for name, a in arrays.items()]


def function(name: str, *nodes: onnx.NodeProto) -> onnx.FunctionProto:
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("ai.icnnrt", 1)]
    return helper.make_function("ai.icnnrt", name, ["a"], ["b"], list(nodes), imports)


def own(name: str, inputs: str, outputs: str) -> onnx.NodeProto:
    return node(name, inputs, outputs, domain="ai.icnnrt")


def loop(trips: int, *body: onnx.NodeProto, outputs: Sequence[onnx.ValueInfoProto] = ()) -> onnx.NodeProto:
    """v -> v + v and so on, so many times; `outputs` are what each trip gives besides."""
    steps = [node("Identity", "go", "goes"), node("Add", "v v", "next"), *body]
    ins = [info("i", [], T.INT64), info("go", [], T.BOOL), info("v", [1])]
    inner = helper.make_graph(steps, "body", ins, [info("goes", [], T.BOOL), info("next", [1]), *outputs])
    return node("Loop", "trips true zero", "bomb" + " all" * bool(outputs), body=inner)


# What makes `bomb` [1], which is added to f; with initialisers and functions.
Bomb = tuple[list[onnx.NodeProto], list[onnx.TensorProto], list[onnx.FunctionProto]]
LARGEST = node("ReduceMax", "large axis", "bomb", keepdims=0)
START = {"zero": np.zeros(1, np.float32), "true": np.array(True), "axis": np.array([1])}


def filled(count: int) -> Bomb:
    return [node("ConstantOfShape", "shape", "large"), LARGEST], values(shape=[1, count], **START), []


def endless() -> Bomb:
    return [loop(1 << 60)], values(trips=np.int64(1 << 60), **START), []


def hoarding() -> Bomb:
    grows = loop(1 << 60, node("Expand", "v shape", "part"), outputs=[info("part", [1 << 18])])
    return [grows], values(trips=np.int64(1 << 60), shape=[1 << 18], **START), []


def doubling() -> Bomb:
    """Twenty-four functions, each of which calls the one before twice."""
    made = [function("F0", node("Identity", "a", "b"))]
    made += [function(f"F{i}", own(f"F{i - 1}", "a", "t"), own(f"F{i - 1}", "t", "b")) for i in range(1, 24)]
    return [own("F23", "zero", "bomb")], values(**START), made


def circular() -> Bomb:
    return (
        [own("There", "zero", "bomb")],
        values(**START),
        [function("There", own("Back", "a", "b")), function("Back", own("There", "a", "b"))],
    )


def selfish() -> Bomb:
    return [own("Again", "zero", "bomb")], values(**START), [function("Again", own("Again", "a", "b"))]


def worded() -> Bomb:
    return [node("Cast", "zero", "text", to=T.STRING), node("Cast", "text", "bomb", to=T.FLOAT)], values(**START), []


def spelled() -> Bomb:
    word = helper.make_tensor("word", T.STRING, [1], [b"0"])
    return [node("Cast", "word", "bomb", to=T.FLOAT)], [word, *values(**START)], []


def referred() -> Bomb:
    """A Cast to whatever the call of the function says."""
    cast = node("Cast", "a", "t")
    cast.attribute.append(onnx.AttributeProto(name="to", type=onnx.AttributeProto.INT, ref_attr_name="kind"))
    body = function("Casts", cast, node("Cast", "t", "b", to=T.FLOAT))
    body.attribute.append("kind")
    call = own("Casts", "zero", "bomb")
    call.attribute.append(helper.make_attribute("kind", int(T.STRING)))
    return [call], values(**START), [body]


def joined() -> Bomb:
    return [node("StringConcat", "word word", "two"), node("Cast", "two", "bomb", to=T.FLOAT)], values(**START), []


def constant() -> Bomb:
    made = node("Constant", "", "word", value_strings=[b"0"])
    made.input[:] = []
    return [made, node("Cast", "word", "bomb", to=T.FLOAT)], values(**START), []


def product(n: int) -> Bomb:
    """One operator, which nothing interrupts, for some seconds."""
    nodes = [
        node("ReduceSum", "y", "total", keepdims=0),
        node("Cast", "total", "wide", to=T.DOUBLE),
        node("Expand", "wide size", "square"),
        node("MatMul", "square square", "long"),
        node("ReduceMax", "long both", "most", keepdims=0),
        node("Cast", "most", "short", to=T.FLOAT),
        node("Unsqueeze", "short first", "bomb"),
    ]
    return nodes, values(size=[n, n], both=[0, 1], first=[0], **START), []


def planted(path: Path, bomb: Bomb) -> Path:
    """A package whose value graph has a bomb in it."""
    nodes, tensors, functions = bomb
    ends = [
        node("ReduceSum", "y axis", "s", keepdims=0),
        node("Add", "s bomb", "f"),
        node("Identity", "y", "gradient"),
    ]
    graph = helper.make_graph(
        [*nodes, *ends],
        "g",
        [info("x", ["batch", 4]), info("y", ["batch", 3])],
        [info("f", ["batch"]), info("gradient", ["batch", 3])],
        tensors,
    )
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("ai.icnnrt", 1)]
    model = helper.make_model(graph, opset_imports=imports, functions=functions, ir_version=10)
    attacks.good(path, solver=None, graphs={"value": attacks.model()}, domain=None)
    attacks.plant(path, "value.onnx", model.SerializeToString())
    names = sorted({"BundleEntropySolve", *(one.name for one in functions)})
    attacks.edit_manifest(path, lambda content: content["ops"]["ai.icnnrt"].update(names=names))
    return path


def sentence(error: BaseException) -> str:
    text = str(error)
    assert "\n" not in text
    assert text.endswith(".")
    return text


RUNNING: list[tuple[Callable[[], Bomb], str]] = [
    (lambda: filled(3 << 30), "more memory than the limit of 67,108,864 bytes"),
    (lambda: filled(1 << 40), "more memory than the limit of 67,108,864 bytes"),
    (endless, r"takes longer than the limit of 0\.5 seconds"),
    (hoarding, "more memory than the limit of 67,108,864 bytes"),
]
READ: list[tuple[Callable[[], Bomb], str]] = [
    (doubling, "expected at most 65536 nodes in functions, each call counted, but there are 25165822"),
    (circular, "expected functions that end, but .* calls itself"),
    (selfish, 'expected functions that end, but "Again" calls itself'),
    (worded, "expected tensors of numbers, but one holds text"),
    (spelled, "expected tensors of numbers, but one holds text"),
    (constant, "expected tensors of numbers, but one holds text"),
    (referred, "expected tensors of numbers, but one holds text"),
    (joined, "expected tensors of numbers, but one holds text"),
]


@pytest.mark.parametrize("process", [False, True], ids=["here", "process"])
@pytest.mark.parametrize(("bomb", "what"), RUNNING, ids=["3 GiB", "1 TiB", "endless", "hoarding"])
def test_a_bomb_ends_at_its_limit(tmp_path: Path, bomb: Callable[[], Bomb], what: str, process: bool) -> None:
    path = planted(tmp_path / "b.icnn", bomb())
    given = Limits(5.0 if process and "memory" in what else SHORT.seconds, SHORT.bytes, process)
    with icnnrt.load(path, limits=given) as session:
        for _ in range(2):
            with pytest.raises(LimitError, match=what) as caught:
                session.value(X, Y)
            assert sentence(caught.value).startswith(str(path))


@pytest.mark.parametrize(("bomb", "what"), READ, ids=lambda b: b.__name__ if callable(b) else "")
def test_what_would_grow_before_it_runs_is_no_package(tmp_path: Path, bomb: Callable[[], Bomb], what: str) -> None:
    path = planted(tmp_path / "b.icnn", bomb())
    with pytest.raises(PackageError, match=what) as caught:
        icnnrt.load(path)
    sentence(caught.value)


def test_long_graphs_load_in_the_time_that_reading_them_takes(tmp_path: Path) -> None:
    """Optimisations would take time by the square of the nodes, which nothing ends."""
    steps = [node("Add", f"v{i} v{i}", f"v{i + 1}") for i in range(20_000)]
    nodes = [node("Identity", "zero", "v0"), *steps, node("Identity", "v20000", "bomb")]
    path = planted(tmp_path / "b.icnn", (nodes, values(**START), []))
    with icnnrt.load(path, limits=Limits(seconds=20)) as session:
        assert (session.value(X, Y) == 0).all()


def test_functions_of_usual_sizes_are_no_bombs(tmp_path: Path) -> None:
    made = [function(f"F{i}", own(f"F{i - 1}", "a", "b")) for i in range(1, 40)]
    made = [function("F0", node("Identity", "a", "b")), *made]
    path = planted(tmp_path / "b.icnn", ([own("F39", "zero", "bomb")], values(**START), made))
    assert (icnnrt.load(path, limits=SHORT).value(X, Y) == 0).all()


def test_no_operator_is_too_long_for_a_process(tmp_path: Path) -> None:
    path = planted(tmp_path / "b.icnn", product(12_000))
    with icnnrt.load(path, limits=Limits(seconds=1, bytes=4 << 30, process=True)) as session:
        with pytest.raises(LimitError, match="takes longer than the limit of 1 seconds"):
            session.value(X, Y)
        session.close()


@pytest.mark.parametrize("given", [SHORT, Limits(bytes=256 << 20, process=True)], ids=["here", "process"])
def test_good_packages_answer_the_same(train_package: Path, given: Limits, tmp_path: Path) -> None:
    free = icnnrt.load(train_package)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, *free.manifest.x_shape))
    target = rng.uniform(0.1, 0.9, (5, *free.manifest.y_shape)).astype(free.dtype)
    given = Limits(30.0, given.bytes, given.process)
    with icnnrt.load(train_package, limits=given) as bound:
        a, b = free.argmin(x), bound.argmin(x)
        np.testing.assert_allclose(a.y, b.y, rtol=1e-5)
        np.testing.assert_array_equal(a.status, b.status)
        np.testing.assert_allclose(free.vjp(a, a.y).x, bound.vjp(b, b.y).x, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(free.value(x, a.y), bound.value(x, a.y), rtol=1e-5)
        tuners = [icnnrt.FineTuner(session, learning_rate=1e-3) for session in (free, bound)]
        for _ in range(3):
            mine, theirs = (tuner.step(x, target) for tuner in tuners)
            assert mine.accepted
            assert theirs.accepted
            np.testing.assert_allclose(mine.loss, theirs.loss, rtol=1e-4)
        np.testing.assert_allclose(free.argmin(x).y, bound.argmin(x).y, rtol=1e-3)
        tuners[1].rollback()
        np.testing.assert_allclose(bound.argmin(x).y, b.y, rtol=1e-5)


def processes(session: icnnrt.Session) -> Served:
    """Those of a session that has some."""
    served = session.runner._served
    assert served is not None
    return served


def test_a_process_that_dies_while_it_is_idle_is_replaced(tmp_path: Path) -> None:
    with icnnrt.load(build(tmp_path / "tiny.icnn"), limits=Limits(process=True)) as session:
        x, served = np.ones((2, *session.manifest.x_shape)), processes(session)
        y = session.argmin(x).y
        (child,) = served._idle
        os.kill(child._process.pid, signal.SIGINT)  # as Ctrl-C in a terminal sends to all
        np.testing.assert_array_equal(session.argmin(x).y, y)
        assert served._idle == [child]
        os.kill(child._process.pid, signal.SIGKILL)
        child._process.wait()
        np.testing.assert_array_equal(session.argmin(x).y, y)
        assert served._idle != [child]
    assert not served._idle


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no interval timers")
def test_a_process_without_a_parent_ends_too(tmp_path: Path) -> None:
    path = planted(tmp_path / "b.icnn", product(12_000))
    code = (
        "import icnnrt, numpy as np, os, threading\n"
        f"session = icnnrt.load({str(path)!r}, limits=icnnrt.Limits(1, 4 << 30, process=True))\n"
        "started = session.runner._served._started\n"
        "def told(*given):\n"
        "    child = started(*given)\n"
        "    print(child._process.pid, flush=True)\n"
        "    threading.Timer(0.5, lambda: os._exit(9)).start()\n"
        "    return child\n"
        "session.runner._served._started = told\n"
        "session.value(np.zeros((2, 4)), np.zeros((2, 3)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 9, done.stderr
    pid = int(done.stdout)
    for _ in range(600):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        status = Path(f"/proc/{pid}/stat")
        if status.exists() and status.read_text().rpartition(")")[2].split()[0] == "Z":
            return  # dead, and nobody asks how
        time.sleep(0.1)
    pytest.fail("the process goes on")


def test_a_process_that_dies_is_one_sentence(tmp_path: Path) -> None:
    path = planted(tmp_path / "b.icnn", endless())
    with icnnrt.load(path, limits=Limits(process=True)) as session:
        served = processes(session)
        started = served._started

        def killed(*given: Any) -> Any:
            child = started(*given)
            threading.Timer(0.2, lambda: os.kill(child._process.pid, signal.SIGSEGV)).start()
            return child

        served._started = killed  # type: ignore[method-assign]
        with pytest.raises(PackageError, match=r"ended without an answer \(SIGSEGV\)") as caught:
            session.value(X, Y)
        sentence(caught.value)
    assert not served._idle


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_forked_child_starts_processes_of_its_own(tmp_path: Path) -> None:
    with icnnrt.load(build(tmp_path / "tiny.icnn"), limits=Limits(process=True)) as session:
        x, served = np.ones((2, *session.manifest.x_shape)), processes(session)
        y = session.argmin(x).y
        (theirs,) = served._idle
        pid = os.fork()
        if not pid:
            good = False
            with contextlib.suppress(BaseException):
                good = not served._idle and bool((session.argmin(x).y == y).all()) and served._idle != [theirs]
                session.close()
            os._exit(0 if good else 1)
        assert os.waitpid(pid, 0)[1] == 0
        np.testing.assert_array_equal(session.argmin(x).y, y)
        assert served._idle == [theirs]


def test_limits_of_several_sessions_are_each_its_own(tmp_path: Path) -> None:
    """Though onnxruntime has one place for what the next session is made with."""
    path = planted(tmp_path / "b.icnn", filled(24 << 20))  # 96 MiB
    failed: list[str] = []

    def tried(mebibytes: int) -> None:
        for _ in range(10):
            with icnnrt.load(path, limits=Limits(60, mebibytes << 20)) as session:
                try:
                    session.value(X, Y)
                    enough = True
                except LimitError:
                    enough = False
            if enough != (mebibytes > 96):
                failed.append(f"{mebibytes} MiB: {enough}")

    threads = [threading.Thread(target=tried, args=(m,)) for m in (64, 512, 32, 256)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_another_package_in_its_place_is_refused_by_the_process(tmp_path: Path) -> None:
    path = build(tmp_path / "tiny.icnn")
    with icnnrt.load(path, limits=Limits(process=True)) as session:
        attacks.edit_manifest(Path(path), lambda content: content.update(name="other"))
        with pytest.raises(PackageError, match="it was changed since"):
            session.argmin(np.ones((2, *session.manifest.x_shape)))


def test_a_block_has_limits_as_a_whole(train_package: Path) -> None:
    why = r"takes longer than the limit of 0\.001 seconds"
    with limits.within(Limits(seconds=1e-3)), pytest.raises(LimitError, match=why):
        verify(train_package)
    with limits.within(Limits(seconds=300)), icnnrt.load(train_package, limits=Limits(seconds=1e-4)) as session:
        with pytest.raises(LimitError, match=r"the limit of 0\.0001 seconds"):
            session.argmin(np.ones((2, *session.manifest.x_shape)))
        with pytest.raises(LimitError, match=r"the limit of 0\.0001 seconds"):
            session.prove_convexity()
    assert limits.deadline() is None
    assert limits.checked_limits(None) is None


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"seconds": 0}, "seconds: expected a finite number above 0, but got 0"),
        ({"seconds": -1}, "seconds: expected a finite number above 0"),
        ({"seconds": "3"}, "seconds: expected a finite number"),
        ({"seconds": 1e300}, r"seconds: expected at most 1e\+06"),
        ({"bytes": 1000}, "bytes: expected an integer from 1048576"),
        ({"bytes": 1 << 64}, "bytes: expected an integer from 1048576"),
        ({"process": 1}, "process: expected True or False"),
    ],
)
def test_limits_are_checked(given: dict[str, Any], why: str) -> None:
    with pytest.raises(InputError, match=why):
        Limits(**given)


def test_limits_are_no_numbers(train_package: Path) -> None:
    with pytest.raises(InputError, match=r"limits: expected icnnrt\.Limits or None, but got float"):
        icnnrt.load(train_package, limits=3.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("command", ["verify", "inspect", "run"])
def test_commands_take_limits(train_package: Path, tmp_path: Path, command: str) -> None:
    with icnnrt.load(train_package) as session:
        np.save(tmp_path / "x.npy", np.ones((2, *session.manifest.x_shape)))
    more = [str(tmp_path / "x.npy")] if command == "run" else []
    result = CliRunner().invoke(app, [command, str(train_package), *more, "--untrusted"])
    assert result.exit_code == 0, result.output
    result = CliRunner().invoke(app, [command, str(train_package), *more, "--untrusted", "--seconds", "1e-6"])
    assert result.exit_code == 1
    assert "takes longer than the limit of 1e-06 seconds" in " ".join(result.stderr.split())


@pytest.mark.parametrize("bomb", [endless, hoarding, doubling], ids=lambda b: b.__name__)
def test_a_bomb_verified_is_one_sentence(tmp_path: Path, bomb: Callable[[], Bomb]) -> None:
    path = planted(tmp_path / "b.icnn", bomb())
    result = CliRunner().invoke(app, ["verify", str(path), "--untrusted", "--seconds", "3", "--mebibytes", "64"])
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit | IcnnrtError)
