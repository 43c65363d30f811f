"""The native kernels: bad input, threads, memory, the library itself. That they answer rightly: test_cut_models.py."""

import ctypes
import functools
import json
import os
import re
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from amounts import amount
from cut_models import BODIES, NATIVE, SIGNATURES, TYPES, model, random_cuts
from hypothesis import given, settings
from hypothesis import strategies as st

import icnnrt
from icnnrt import native_library
from icnnrt.errors import InputError, MissingDependencyError
from icnnrt.format.manifest import OP_DOMAIN
from icnnrt.format.package import Package
from icnnrt.mathematics import reference
from icnnrt.serving import direct_kernels
from icnnrt.serving.runner import Runner

if native_library.build().library is None:
    pytest.skip(f"there is no native library: {native_library.build().reason}", allow_module_level=True)

SIZE_LIMIT = 1_250_000  # bytes; a third for each instruction set, 18 kB of it for sparse factors
DIGITS = Path(__file__).parent.parent / "models" / "digits_completion" / "digits_completion.icnn"
each_dtype = pytest.mark.parametrize("dtype", TYPES)


def alone(op: str, dtype: type, **attributes: int) -> onnx.ModelProto:
    """One node without its body: nothing but the kernel can run it."""
    return model(op.removeprefix("BundleEntropy"), dtype, bodies=False, **attributes)


def native_session(op: str, dtype: type, *, threads: int = 1, **attributes: int) -> onnxruntime.InferenceSession:
    return NATIVE.session(op.removeprefix("BundleEntropy"), dtype, threads=threads, **attributes)


def solve_feeds(
    B: int, k: int, n: int, k_prev: int = 0, dtype: type = np.float64, scale: float = 3.0
) -> dict[str, Any]:
    G, e = random_cuts(k, B, k, n, scale)
    arrays = {"slopes": G, "offsets": e, "lam_start": np.full((B, k_prev), 1 / max(k_prev, 1))}
    return {name: array.astype(dtype) for name, array in arrays.items()}


def adjoint_feeds(B: int, k: int, n: int, dtype: type = np.float64) -> dict[str, Any]:
    feeds = solve_feeds(B, k, n)
    lam = reference.bundle_entropy_solve(feeds["slopes"], feeds["offsets"]).lam
    y_bar = np.random.default_rng(0).standard_normal((B, n))
    arrays = {"slopes": feeds["slopes"], "offsets": feeds["offsets"], "lam": lam, "y_bar": y_bar}
    return {name: array.astype(dtype) for name, array in arrays.items()}


def test_a_source_tree_finds_the_library_of_the_installation_it_hides(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where Python is started in a clone: the sources there come first, without what the build generated."""

    def hidden(name: str) -> Any:
        raise ImportError(name)

    expected = native_library.build()
    monkeypatch.setattr(native_library.importlib, "import_module", hidden)
    assert native_library.build.__wrapped__() == expected
    monkeypatch.setattr(native_library.importlib.metadata, "distribution", _not_installed)
    assert "never installed" in native_library.build.__wrapped__().reason


def _not_installed(name: str) -> Any:
    raise native_library.importlib.metadata.PackageNotFoundError(name)


def test_a_model_with_bodies_runs_the_kernels() -> None:
    """Once the library is registered, with the body still there: what it gives is the kernel's, to the bit."""
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(icnnrt.ops_library())
    whole = model("Solve", np.float64, steps=60).SerializeToString()
    session = onnxruntime.InferenceSession(whole, options, providers=["CPUExecutionProvider"])
    feeds = solve_feeds(7, 10, 40)
    kernel = native_session("BundleEntropySolve", np.float64, steps=60).run(None, feeds)
    body = BODIES.session("Solve", np.float64, steps=60).run(None, feeds)
    got = session.run(None, feeds)
    for a, b in zip(got, kernel, strict=True):
        np.testing.assert_array_equal(a, b)
    assert any((a != b).any() for a, b in zip(got, body, strict=True))


def test_shapes_are_inferred() -> None:
    session = native_session("BundleEntropySolve", np.float32, steps=1)
    # The model's own declarations are the same; a wrong inference would be refused, and a wrong type too.
    assert [(o.name, o.shape, o.type) for o in session.get_outputs()] == [
        ("y", ["B", "n"], "tensor(float)"),
        ("lam", ["B", "k"], "tensor(float)"),
        ("lower_bound", ["B"], "tensor(double)"),
        ("residual", ["B", 3], "tensor(double)"),
    ]
    proto = alone("BundleEntropyAdjoint", np.float64)
    for output in proto.graph.output:
        output.type.tensor_type.ClearField("shape")
    for source, sizes in zip(proto.graph.input, [(2, 5, 10), (2, 5), (2, 5), (2, 10)], strict=True):
        for axis, size in zip(source.type.tensor_type.shape.dim, sizes, strict=True):
            axis.dim_value = size
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(icnnrt.ops_library())
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    assert [o.shape for o in session.get_outputs()] == [[2, 10], [2, 5]]


# --- Malformed input -----------------------------------------------------------------------------

SOLVE = {"slopes": (2, 3, 4), "offsets": (2, 3), "lam_start": (2, 0)}
ADJOINT = {"slopes": (2, 3, 4), "offsets": (2, 3), "lam": (2, 3), "y_bar": (2, 4)}
MALFORMED: list[tuple[dict[str, tuple[int, ...]], str, tuple[int, ...], str]] = [
    (SOLVE, "slopes", (2, 0, 4), "slopes: expected [B, k, n] with at least one cut (k >= 1) of at least one entry"),
    (SOLVE, "slopes", (2, 3, 0), "slopes: expected [B, k, n] with at least one cut (k >= 1) of at least one entry"),
    (SOLVE, "slopes", (0, 0, 4), "slopes: expected [B, k, n] with at least one cut (k >= 1) of at least one entry"),
    (SOLVE, "slopes", (6, 4), "but got [6, 4]; pass the slopes of all cuts of every sample"),
    (SOLVE, "slopes", (), "slopes: expected [B, k, n] with at least one cut (k >= 1)"),
    (SOLVE, "slopes", (1,) * 9, "but got [1, 1, 1, 1, 1, 1, 1, 1, ...]"),
    (SOLVE, "offsets", (2, 4), "offsets: expected [B, k] = [2, 3] with slopes [B, k, n] = [2, 3, 4], but got [2, 4]"),
    (SOLVE, "offsets", (3, 3), "offsets: expected [B, k] = [2, 3] with slopes [B, k, n] = [2, 3, 4], but got [3, 3]"),
    (SOLVE, "offsets", (2, 3, 1), "but got [2, 3, 1]; pass one row for every sample of slopes"),
    (SOLVE, "lam_start", (2, 4), "lam_start: expected [B, k_prev] with B = 2 and 0 <= k_prev <= k = 3, but got [2, 4]"),
    (SOLVE, "lam_start", (1, 3), "none of them ([B, 0]) for a cold start"),
    (SOLVE, "lam_start", (6,), "lam_start: expected [B, k_prev] with B = 2"),
    (ADJOINT, "slopes", (2, 0, 4), "slopes: expected [B, k, n] with at least one cut"),
    (ADJOINT, "offsets", (2, 2), "offsets: expected [B, k] = [2, 3]"),
    (ADJOINT, "lam", (2, 2), "lam: expected [B, k] = [2, 3] with slopes [B, k, n] = [2, 3, 4], but got [2, 2]"),
    (ADJOINT, "y_bar", (2, 3), "y_bar: expected [B, n] = [2, 4] with slopes [B, k, n] = [2, 3, 4], but got [2, 3]"),
    (ADJOINT, "y_bar", (0, 4), "but got [0, 4]"),
]


def loose_graph(op: str, dtype: type, **attributes: int) -> bytes:
    """A graph that declares no shapes, so that onnxruntime checks none before the kernel does."""
    proto = alone(op, dtype, **attributes)
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.ClearField("shape")
    return bytes(proto.SerializeToString())


def session_on_kernels(graph: bytes) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    options.register_custom_ops_library(icnnrt.ops_library())
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def loose_session(op: str, dtype: type, **attributes: int) -> onnxruntime.InferenceSession:
    return session_on_kernels(loose_graph(op, dtype, **attributes))


def test_an_output_over_an_input_is_refused() -> None:
    """As a host may bind one, and as onnxruntime 1.18 lays one: inputs are read while outputs are written."""
    session, feeds = native_session("BundleEntropyAdjoint", np.float64), adjoint_feeds(2, 5, 10)
    expected, _ = session.run(None, feeds)
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in feeds.items()}
    binding = session.io_binding()
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    binding.bind_ortvalue_output("c_y", values["y_bar"])  # the shape is the same
    binding.bind_output("c_lam")
    with pytest.raises(Exception, match=r"output 0: expected memory of its own, .* over input y_bar"):
        session.run_with_iobinding(binding)
    binding.bind_output("c_y")
    session.run_with_iobinding(binding)
    np.testing.assert_array_equal(binding.copy_outputs_to_cpu()[0], expected)


@each_dtype
@pytest.mark.parametrize(("shapes", "name", "shape", "sentence"), MALFORMED)
def test_a_malformed_input_is_told(
    shapes: dict[str, tuple[int, ...]], name: str, shape: tuple[int, ...], sentence: str, dtype: type
) -> None:
    op, attributes = ("BundleEntropySolve", {"steps": 5}) if shapes is SOLVE else ("BundleEntropyAdjoint", {})
    feeds = {key: np.zeros(shape if key == name else size, dtype) for key, size in shapes.items()}
    with pytest.raises(Exception, match=re.escape(sentence)) as caught:
        loose_session(op, dtype, **attributes).run(None, feeds)
    assert f"ai.icnnrt::{op}: {name}: expected" in str(caught.value)


@pytest.mark.parametrize(
    ("attributes", "sentence"),
    [
        ({}, "steps: expected an integer attribute, but got none; write it on the node"),
        ({"steps": -1}, "steps: expected an integer from 0 to 1000000, but got -1"),
        ({"steps": 1_000_001}, "steps: expected an integer from 0 to 1000000, but got 1000001"),
        ({"steps": 2.5}, "steps: expected an integer attribute, but got none"),
    ],
)
def test_a_malformed_attribute_is_told_at_load(attributes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(Exception, match=re.escape(sentence)):
        loose_session("BundleEntropySolve", np.float32, **attributes)


@pytest.mark.parametrize("dtypes", [(1, 0, 0), (0, 1, 0), (0, 0, 1)])
def test_a_graph_of_two_types_does_not_load(dtypes: tuple[int, ...]) -> None:
    """A kernel takes the memory of all its inputs for numbers of one type: onnxruntime must never give it others."""
    proto = alone("BundleEntropySolve", np.float64, steps=1)
    for value, other in zip(proto.graph.input, dtypes, strict=True):
        if other:
            value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    assert "BundleEntropySolve" in refusal(proto)


@pytest.mark.parametrize("outputs", [["y"], ["y", "", "", ""], ["", "", "", "residual"]])
def test_an_output_left_out_does_not_load(outputs: list[str]) -> None:
    """A kernel writes all that it has: onnxruntime must never leave it without memory for one."""
    proto = alone("BundleEntropySolve", np.float64, steps=1)
    proto.graph.node[0].output[:] = outputs
    kept = [value for value in proto.graph.output if value.name in outputs]
    del proto.graph.output[:]
    proto.graph.output.extend(kept)
    assert "BundleEntropySolve" in refusal(proto)


def refusal(proto: onnx.ModelProto) -> str:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(icnnrt.ops_library())
    with pytest.raises(Exception, match=r"\[ONNXRuntimeError\]") as caught:
        onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return str(caught.value)


@pytest.mark.parametrize(("B", "threads"), [(1, 1), (3, 2)])
def test_a_workspace_that_cannot_be_had_is_an_error(B: int, threads: int) -> None:
    """Four million cuts: matrices of k×k would take more than there are addresses. Several threads may find out."""
    k = 4_000_000
    feeds = {"slopes": np.zeros((B, k, 1)), "offsets": np.zeros((B, k)), "lam_start": np.zeros((B, 0))}
    with pytest.raises(
        Exception, match=r"bytes of workspace for k = 4000000 cuts of n = 1 entries cannot be allocated"
    ):
        native_session("BundleEntropySolve", np.float64, threads=threads, steps=1).run(None, feeds)


@settings(max_examples=amount(200), deadline=None)
@given(
    op=st.sampled_from(["BundleEntropySolve", "BundleEntropyAdjoint"]),
    base=st.tuples(*[st.integers(0, 4)] * 4),
    changes=st.lists(st.tuples(st.integers(0, 3), st.lists(st.integers(0, 5), max_size=4)), max_size=2),
    dtype=st.sampled_from([np.float32, np.float64]),
    seed=st.integers(0, 2**32 - 1),
    bad=st.sampled_from([0.0, np.nan, np.inf, 1e300]),
)
def test_any_shape_is_served_or_refused(
    op: str, base: tuple[int, ...], changes: list[tuple[int, list[int]]], dtype: type, seed: int, bad: float
) -> None:
    """Shapes that fit, or nearly: an answer of the right shape or a sentence, never a crash."""
    B, k, n, k_prev = base
    names = SIGNATURES[op.removeprefix("BundleEntropy")][0]
    sizes = {"B": B, "k": k, "n": n, "k_prev": k_prev}
    shapes = [[sizes[letter] for letter in letters] for letters in names.values()]
    for place, shape in changes:
        shapes[place % len(shapes)] = shape
    rng = np.random.default_rng(seed)
    with np.errstate(over="ignore"):
        arrays = [np.asarray(np.where(rng.random(s) < 0.1, bad, rng.standard_normal(s)), dtype) for s in shapes]
    session = fuzzed(op, dtype)
    try:
        outputs = session.run(None, dict(zip(names, arrays, strict=True)))
    except Exception as error:
        if not re.search(rf"ai\.icnnrt::{op}: \w+: expected ", str(error)):
            raise
        return
    B, k, n = arrays[0].shape
    for output, letters in zip(outputs, SIGNATURES[op.removeprefix("BundleEntropy")][1].values(), strict=True):
        assert list(output.shape) == [{"B": B, "k": k, "n": n}.get(letter, letter) for letter in letters]


@functools.cache
def fuzzed(op: str, dtype: type) -> onnxruntime.InferenceSession:
    return loose_session(op, dtype, **({"steps": 60} if op == "BundleEntropySolve" else {}))


# --- Samples, threads, memory --------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize(("B", "k", "n"), [(500, 5, 10), (64, 10, 159), (9, 30, 400)])
def test_threads_and_neighbours_change_no_bit(B: int, k: int, n: int, dtype: type) -> None:
    for op, feeds, attributes in (
        ("BundleEntropySolve", solve_feeds(B, k, n, 2, dtype), {"steps": 60}),
        ("BundleEntropyAdjoint", adjoint_feeds(B, k, n, dtype), {}),
    ):
        serial = native_session(op, dtype, **attributes).run(None, feeds)
        threaded = native_session(op, dtype, threads=4, **attributes)
        for _ in range(3):
            for a, b in zip(serial, threaded.run(None, feeds), strict=True):
                np.testing.assert_array_equal(a, b)
        for i in (0, B // 2, B - 1):
            alone = native_session(op, dtype, **attributes).run(None, {key: v[i : i + 1] for key, v in feeds.items()})
            for a, b in zip(serial, alone, strict=True):
                np.testing.assert_array_equal(a[i], b[0])
        feeds["offsets"][B // 2] = np.nan
        others = np.arange(B) != B // 2
        for a, b in zip(serial, threaded.run(None, feeds), strict=True):
            np.testing.assert_array_equal(a[others], b[others])


def test_one_session_serves_many_threads() -> None:
    session = native_session("BundleEntropySolve", np.float64, threads=2, steps=60)
    cases = [solve_feeds(B, k, n) for B, k, n in [(1, 3, 5), (40, 10, 159), (2, 30, 64), (300, 5, 10)]]
    expected = [session.run(None, feeds) for feeds in cases]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(20):
            for a, b in zip(session.run(None, cases[i % 4]), expected[i % 4], strict=True):
                if not np.array_equal(a, b):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# --- The library ---------------------------------------------------------------------------------


def test_the_library_is_small_and_exports_what_it_says() -> None:
    library = Path(icnnrt.ops_library())
    assert library.stat().st_size < SIZE_LIMIT
    try:
        listed = subprocess.run(["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True)
    except FileNotFoundError:
        pytest.skip("needs nm")
    names = [line.split()[-1].removeprefix("_") for line in listed.stdout.splitlines() if " w " not in line]
    assert sorted(names) == [
        "RegisterCustomOps", "icnnrt_qp_adjoint", "icnnrt_qp_solve", "icnnrt_qp_workspace_bytes"
    ]  # fmt: skip
    whole = subprocess.run(["nm", library], capture_output=True, text=True, check=False)
    assert not whole.stdout.strip(), "the library should be stripped"


def test_registering_twice_is_an_error() -> None:
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(icnnrt.ops_library())
    assert options.get_session_config_entry("ai.icnnrt.operators") == (
        "BundleEntropyAdjoint BundleEntropySolve BundleQuadraticAdjoint BundleQuadraticSolve BundleSimplexAdjoint "
        "BundleSimplexSolve QPAdjoint QPSensitivity QPSolve QuadraticProgram SparseQPSensitivity SparseQuadraticProgram"
    )
    assert options.get_session_config_entry("ai.icnnrt.instruction_set") in native_library.build().instruction_sets
    with pytest.raises(Exception, match="registered there already; call register_custom_ops_library once"):
        options.register_custom_ops_library(icnnrt.ops_library())


@pytest.mark.parametrize("limit", ["", *native_library.build().instruction_sets])
def test_the_instruction_set_can_be_lowered(limit: str) -> None:
    sets = native_library.build().instruction_sets
    best = doctor("")["native"]["instruction_set"]
    native = doctor(limit)["native"]
    assert native["instruction_set"] == sets[max(sets.index(limit or best), sets.index(best))]
    assert native["limit"] == (limit or None)


def test_an_instruction_set_that_is_none_is_refused() -> None:
    sentence = (
        f"ICNNRT_MAX_INSTRUCTION_SET: expected the name of an instruction set of this library "
        f"({' '.join(native_library.build().instruction_sets)}), but got 'sse2'; set one of these before the process "
        "starts, or unset it."
    )
    assert doctor("sse2", 1)["problems"] == [sentence]
    program = f"""
import icnnrt
icnnrt.load({str(DIGITS)!r}, native=False)
try:
    icnnrt.load({str(DIGITS)!r})
except icnnrt.InputError as error:
    print(error)
"""
    assert limited("sse2", "-c", program).stdout.strip() == sentence


def limited(limit: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own, as the library reads the variable once."""
    environment = {**os.environ, native_library.LIMIT_VARIABLE: limit}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, check=False)


def doctor(limit: str, code: int = 0) -> Any:
    done = limited(limit, "-m", "icnnrt", "doctor", "--json")
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("oldest_too", [True, False])
def test_an_onnxruntime_without_the_interface_is_told(oldest_too: bool) -> None:
    """One too old for version 17 of it, or one so new that it has dropped that: a sentence, and nothing else of such a
    runtime is touched. One that has not even version 1 left, whose first entry makes a status, cannot be told."""
    told: list[bytes] = []

    @ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)
    def create_status(code: int, message: bytes) -> int:
        told.append(message)
        return 42

    table = (ctypes.c_void_p * 1)(ctypes.cast(create_status, ctypes.c_void_p))
    name = ctypes.create_string_buffer(b"9.99.0")

    @ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)
    def get_api(version: int) -> int | None:
        return ctypes.addressof(table) if version == 1 and oldest_too else None

    @ctypes.CFUNCTYPE(ctypes.c_void_p)
    def get_version_string() -> int:
        return ctypes.addressof(name)

    base = (ctypes.c_void_p * 2)(*(ctypes.cast(f, ctypes.c_void_p) for f in (get_api, get_version_string)))
    register = ctypes.CDLL(icnnrt.ops_library()).RegisterCustomOps
    register.argtypes, register.restype = (ctypes.c_void_p, ctypes.c_void_p), ctypes.c_void_p
    assert register(None, ctypes.addressof(base)) == (42 if oldest_too else None)
    if oldest_too:
        (message,) = told
        assert b"offers version 17 of its C interface, as 1.17 and later do, but this is 9.99.0; install" in message


def test_plain_onnxruntime_runs_a_packed_graph(digits_like_package: Path, tmp_path: Path) -> None:
    from icnnrt_exporters.graphs.packer import pack

    x = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    packed = str(pack(digits_like_package, tmp_path / "argmin.onnx"))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.register_custom_ops_library(icnnrt.ops_library())
    feeds = {"x": x, "y_init": np.full((3, 5), 0.5, np.float32)}
    (y,) = onnxruntime.InferenceSession(packed, options, providers=["CPUExecutionProvider"]).run(["y"], feeds)
    np.testing.assert_array_equal(y, icnnrt.load(digits_like_package, native=True).argmin(x).y)


def test_every_thread_may_make_sessions() -> None:
    """The first registration of a process, in many threads at once, and the library unloaded again."""
    code = (
        "import threading, onnxruntime, icnnrt\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "def make(i):\n"
        "    options = onnxruntime.SessionOptions()\n"
        "    options.register_custom_ops_library(icnnrt.ops_library())\n"
        "    return options.get_session_config_entry('ai.icnnrt.operators')\n"
        "with ThreadPoolExecutor(8) as pool:\n"
        "    print(len(set(pool.map(make, range(200)))))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr


# --- Sessions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", ["digits_like_package", "relu_package"])
def test_a_session_says_what_ran(package: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(package)
    x = np.random.default_rng(0).standard_normal((4, 4 if package == "digits_like_package" else 3))
    sessions = {native: icnnrt.load(path, native=native) for native in (None, True, False)}
    solutions = {native: session.argmin(x) for native, session in sessions.items()}
    for native, session in sessions.items():
        assert session.native == solutions[native].info["native"] == (native is not False)
        assert (", native>" in repr(session)) == session.native
    np.testing.assert_array_equal(solutions[None].y, solutions[True].y)
    tolerance = 1e-4 if package == "digits_like_package" else 1e-6
    np.testing.assert_allclose(solutions[True].y, solutions[False].y, atol=tolerance)
    y_bar = np.random.default_rng(1).standard_normal(solutions[True].y.shape)
    kernels, bodies = (sessions[native].vjp(solutions[native], y_bar) for native in (True, False))
    np.testing.assert_allclose(kernels.x, bodies.x, atol=1e3 * tolerance, rtol=1e-3)
    # An update of the weights reaches a session on kernels as it does one on bodies.
    # Of all of them: x moves no answer within one piece of a ReLU network, and so do few weights by themselves.
    trainable = [name for name, spec in sessions[True].manifest.weights.tensors.items() if spec.trainable]
    for session in sessions.values():
        half = {name: session.weights[name] * np.asarray(0.5, session.weights[name].dtype) for name in trainable}
        session.update_weights(half)
    again = [sessions[native].argmin(x).y for native in (True, False)]
    np.testing.assert_allclose(*again, atol=tolerance)
    assert np.abs(again[0] - solutions[True].y).max() > 1e-3


def test_nothing_ran_natively_before_anything_ran() -> None:
    session = icnnrt.load(DIGITS)
    assert session.native
    assert not session.argmin(np.empty((0, 32))).info["native"]
    assert session.argmin(np.zeros((1, 32))).info["native"]
    assert not session.argmin(np.full((1, 32), np.nan)).info["native"]


def test_a_native_session_has_no_bodies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is why it is known that the kernels run."""
    seen: list[bytes] = []
    plain = onnxruntime.InferenceSession

    def watch(data: bytes, *arguments: Any, **keywords: Any) -> Any:
        seen.append(data)
        return plain(data, *arguments, **keywords)

    monkeypatch.setattr(onnxruntime, "InferenceSession", watch)
    runner = Runner(Package.open(DIGITS), None, None, True)
    for role in ("value", "argmin", "adjoint"):
        runner._make(role)
    for data, role in zip(seen, ("value", "argmin", "adjoint"), strict=True):
        before = onnx.ModelProto.FromString(runner.package.graphs[role])
        after = onnx.ModelProto.FromString(data)
        named = {f.name for f in after.functions}
        assert named == {f.name for f in before.functions} - {"BundleEntropySolve", "BundleEntropyAdjoint"}
        del before.functions[:], after.functions[:]
        assert before == after
    assert {f.domain for f in onnx.ModelProto.FromString(runner.package.graphs["argmin"]).functions} == {OP_DOMAIN}


@pytest.mark.parametrize("native", ["yes", 1, 0])
def test_native_is_a_flag(native: object) -> None:
    with pytest.raises(InputError, match="native: expected True, False or None"):
        icnnrt.load(DIGITS, native=native)  # type: ignore[arg-type]


@pytest.fixture
def other_library(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pretend that something else was built."""

    def pretend(library: Path | None, reason: str = "") -> None:
        native_library.kernels.cache_clear()
        monkeypatch.setattr(native_library, "build", lambda: native_library.Build(library, reason, "", ()))

    yield pretend
    native_library.kernels.cache_clear()


def test_without_a_library(other_library: Any) -> None:
    other_library(None, "no C++ compiler was found")
    session = icnnrt.load(DIGITS)
    assert not session.native
    assert not session.argmin(np.zeros((1, 32))).info["native"]
    for call in (icnnrt.ops_library, lambda: icnnrt.load(DIGITS, native=True)):
        with pytest.raises(MissingDependencyError, match=r"native library, as no C\+\+ compiler was found; install it"):
            call()


def test_a_library_that_onnxruntime_cannot_use(other_library: Any, tmp_path: Path) -> None:
    broken = tmp_path / "libicnnrt_ops.so"
    broken.write_bytes(b"no library")
    other_library(broken)
    with pytest.raises(MissingDependencyError, match=r"native: onnxruntime cannot use .*libicnnrt_ops\.so"):
        icnnrt.load(DIGITS, native=True)
    with pytest.warns(RuntimeWarning, match="cannot use .* Operators run on their portable bodies") as warned:
        session = icnnrt.load(DIGITS)
    assert warned[0].filename == __file__
    assert not session.native
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        icnnrt.load(DIGITS, native=False)


def test_a_library_of_another_version_is_told(other_library: Any) -> None:
    direct_kernels._library.cache_clear()
    other_library(Path(np._core._multiarray_umath.__file__))  # a library of something else
    with pytest.raises(MissingDependencyError, match=r"is of another version of icnnrt .*; install icnnrt anew"):
        direct_kernels._library()
    direct_kernels._library.cache_clear()


def test_a_source_tree_that_was_never_installed_runs_portably() -> None:
    root = Path(icnnrt.__file__).parent.parent
    code = (
        "import sys\n"
        f"sys.path.insert(0, {str(root)!r})\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if 'ScikitBuild' not in type(f).__name__]\n"
        "import importlib.metadata\n"
        "def distribution(name): raise importlib.metadata.PackageNotFoundError(name)\n"
        "importlib.metadata.distribution = distribution\n"
        "import icnnrt\n"
        "from icnnrt.native_library import build\n"
        "assert icnnrt.__file__.startswith(sys.path[0]) and not build().library, build()\n"
        f"print(icnnrt.load({str(DIGITS)!r}).native, build().reason)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "False icnnrt runs from a source tree that was never installed", done.stderr
