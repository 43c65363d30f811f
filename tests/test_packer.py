"""Packed files: standard operators alone, weights frozen, and functions with their derivatives beside them."""

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from exports import export
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

import icnnrt
from icnnrt import native_library
from icnnrt.errors import ExportError, PackageError
from icnnrt.format import files, package
from icnnrt.format.contents import weight_layout
from icnnrt_exporters import pack, siblings
from icnnrt_exporters.graphs.freezing import frozen
from icnnrt_exporters.graphs.inlining import inlined
from icnnrt_models import FICNN, PICNN, BundleEntropyArgmin

Arrays = dict[str, NDArray[Any]]
DIGITS = Path(__file__).parents[1] / "models" / "digits_completion" / "digits_completion.icnn"
SPACE = Path(__file__).parent / "fixtures" / "version1" / "space.icnn"
KERNELS = native_library.build().library is not None
# The portable bodies' and the kernels' sums stand in another order: float32 answers differ by some 1e-6 (measured).
LOOSE = {"float32": 3e-4, "float64": 1e-9}


@pytest.fixture(scope="module")
def softplus_weights_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """float64, no x, y [3], with weights made positive by softplus: work that hangs on the weights alone."""
    generator = torch.Generator().manual_seed(0)
    energy = FICNN(0, 3, (6,), activation="softplus", positivity="softplus", dtype=torch.float64, generator=generator)
    return exported(energy, 0, 3, 3, tmp_path_factory.mktemp("packer") / "softplus.icnn")


@pytest.fixture(scope="module")
def double_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """float64, x [3] to y [4], a PICNN of softplus units.

    So steep that three cuts leave y on its way: near the optimum it is known to the root of rounding only, and so are
    gradients and differences.
    """
    generator = torch.Generator().manual_seed(0)
    energy = PICNN(3, 4, (6, 6), activation="softplus", dtype=torch.float64, generator=generator)
    with torch.no_grad():
        for name, p in energy.named_parameters():
            if name.endswith("W_y"):
                p.mul_(3.0)
    return exported(energy, 3, 4, 3, tmp_path_factory.mktemp("packer") / "double.icnn", gap_tolerance=1.0)


def exported(energy: torch.nn.Module, x_dim: int, n: int, iterations: int, path: Path, **options: Any) -> Path:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, x_dim, generator=generator, dtype=torch.float64)
    y = torch.rand(4, n, generator=generator, dtype=torch.float64)
    export(energy, BundleEntropyArgmin(energy, iterations=iterations, **options), x, y, path)
    return path


@pytest.fixture(scope="module")
def digits_package() -> Path:
    """float32, x [32] to y [32], with a training graph: the one that comes with the project."""
    return DIGITS


PACKAGES = ("digits_package", "double_package", "softplus_weights_package")


@pytest.fixture(params=PACKAGES)
def source(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


class Sample:
    """A package, its runtime without kernels, and one batch of everything that its graphs take."""

    def __init__(self, path: Path) -> None:
        self.package = package.Package.open(path)
        self.session = icnnrt.load(path, native=False)
        manifest = self.package.manifest
        self.dtype = np.dtype(manifest.dtype)
        random = np.random.default_rng(0)
        B, (n,) = 3, manifest.y_shape
        self.x = random.standard_normal((B, *manifest.x_shape)).astype(self.dtype)
        self.y = random.random((B, n)).astype(self.dtype)
        self.y_bar = random.standard_normal((B, n)).astype(self.dtype)
        self.start = np.full((B, n), 0.5, self.dtype)
        self.solution = self.session.argmin(self.x)

    def feeds(self, role: str) -> Arrays:
        if role == "value":
            return {"x": self.x, "y": self.y}
        if role == "argmin":
            return {"x": self.x, "y_init": self.start}
        if role == "adjoint":
            fields = ("y", "slopes", "offsets", "cut_points", "lam_history")
            return {"x": self.x, "y_bar": self.y_bar} | {name: getattr(self.solution, name) for name in fields}
        assert role == "train"
        P = sum(self.package.weights[name].size for name in self.package.manifest.train.weights)
        state = {f"state.{slot}": np.zeros(P, self.dtype) for slot in self.package.manifest.train.slots}
        step = {"state.step": np.array(0), "learning_rate": np.array(0.01, self.dtype)}
        return {"x": self.x, "target": self.y} | state | step


sample_of = functools.cache(Sample)


def session_of(model: Path | onnx.ModelProto, *, native: bool = False) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    if native:
        options.register_custom_ops_library(icnnrt.ops_library())
    content = str(model) if isinstance(model, Path) else model.SerializeToString()
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def run(model: Path | onnx.ModelProto, feeds: Mapping[str, NDArray[Any]], *, native: bool = False) -> Arrays:
    session = session_of(model, native=native)
    return dict(zip([v.name for v in session.get_outputs()], session.run(None, dict(feeds)), strict=True))


def assert_close(came: Mapping[str, NDArray[Any]], expected: Mapping[str, NDArray[Any]], bound: float) -> None:
    assert came.keys() == expected.keys()
    for name, array in expected.items():
        assert came[name].dtype == array.dtype, name
        scale = max(1.0, float(np.nanmax(np.abs(array.astype(float)), initial=0.0)))
        np.testing.assert_allclose(
            came[name].astype(float), array.astype(float), rtol=bound, atol=bound * scale, err_msg=name
        )


def every_graph(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from every_graph(attribute.g)


def assert_standard(model: onnx.ModelProto) -> None:
    """Nothing but ONNX's own operators, and no value that is defined twice, in whatever graph."""
    onnx.checker.check_model(model, full_check=True)
    assert not model.functions
    assert [entry.domain for entry in model.opset_import] == [""]
    defined = []
    for graph in every_graph(model.graph):
        assert {node.domain for node in graph.node} <= {""}
        assert not [a.name for node in graph.node for a in node.attribute if a.ref_attr_name]
        defined += [name for node in graph.node for name in node.output if name]
        if graph is not model.graph:
            defined += [v.name for v in graph.input]
    assert len(defined) == len(set(defined))


# --- portable ------------------------------------------------------------------------------------


def test_portable_files_hold_standard_operators_alone_and_agree(source: Path, tmp_path: Path) -> None:
    sample = sample_of(source)
    for role in sample.package.graphs:
        plain = pack(source, tmp_path / f"{role}.onnx", role)
        portable = pack(source, tmp_path / f"portable_{role}.onnx", role, portable=True)
        model = onnx.load(portable)
        assert_standard(model)
        feeds = sample.feeds(role)
        # The same nodes in the same order.
        assert_close(run(portable, feeds), run(plain, feeds), 1e-6 if sample.dtype == np.float32 else 1e-12)
        assert {t.name for t in model.graph.initializer} & sample.package.weights.keys() == {
            v.name for v in session_of(portable).get_overridable_initializers() if v.name != "depth"
        }
    had = {f.name for role in ("argmin", "adjoint") for f in onnx.load(tmp_path / f"{role}.onnx").functions}
    assert had == {"BundleEntropySolve", "InverseSPD", "BundleEntropyAdjoint", "SolveSPD"}


@pytest.mark.parametrize("role", ["value", "argmin", "adjoint"])
def test_portable_files_run_in_the_reference_evaluator(
    role: str, softplus_weights_package: Path, tmp_path: Path
) -> None:
    """Although that joins what a Loop collects where the standard stacks it, and runs none that has no condition."""
    sample = sample_of(softplus_weights_package)
    target = pack(softplus_weights_package, tmp_path / "p.onnx", role, portable=True)
    evaluator = ReferenceEvaluator(str(target))
    came = dict(zip(evaluator.output_names, evaluator.run(None, sample.feeds(role)), strict=True))
    if role == "value":
        f, gradient = sample.session.value_and_gradient(sample.x, sample.y)
        assert_close(came, {"f": f, "gradient": gradient}, 1e-12)
    elif role == "argmin":
        assert_close(came, {name: getattr(sample.solution, name) for name in came}, 1e-9)
    else:
        expected = sample.session.vjp(sample.solution, sample.y_bar)
        assert_close({k: came[f"theta_bar.{k}"] for k in expected.weights}, expected.weights, 1e-9)


def calls_within_calls(*, body: bool = True) -> onnx.ModelProto:
    """x -> Loop of 2 trips: x <- If(true): Twice<by=3>(x), else: Twice<by=5>(x); Twice(a) = Add<by>(Add<by>(a)).

    The function's inner names are those of the main graph.
    """
    ours = [helper.make_opsetid("", 21), helper.make_opsetid("made.up", 1)]

    def referring(op: str, name: str, to: str, **more: Any) -> onnx.NodeProto:
        node = helper.make_node(op, ["x"] if op == "AddTo" else [], [name], **more)
        node.attribute.append(
            onnx.AttributeProto(
                name="by" if op == "AddTo" else "value_float", ref_attr_name=to, type=onnx.AttributeProto.FLOAT
            )
        )
        return node

    add_to = helper.make_function(
        "made.up",
        "AddTo",
        ["x"],
        ["y"],
        [referring("Constant", "t", "by"), helper.make_node("Add", ["x", "t"], ["y"])],
        ours,
        ["by"],
    )
    second = referring("AddTo", "y", "by", domain="made.up")
    second.input[0] = "t"
    twice = helper.make_function(
        "made.up", "Twice", ["x"], ["y"], [referring("AddTo", "t", "by", domain="made.up"), second], ours, ["by"]
    )

    def branch(by: float) -> onnx.GraphProto:
        node = helper.make_node("Twice", ["state"], [f"out_{by:.0f}"], domain="made.up", by=by)
        return helper.make_graph(
            [node], "branch", [], [helper.make_tensor_value_info(f"out_{by:.0f}", TensorProto.FLOAT, [2])]
        )

    first = helper.make_node("Equal", ["i", "zero"], ["is_first"])
    choice = helper.make_node("If", ["is_first"], ["next"], then_branch=branch(3.0), else_branch=branch(5.0))
    loop_body = helper.make_graph(
        [first, choice, helper.make_node("Identity", ["going"], ["go_on"])],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("going", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state", TensorProto.FLOAT, [2]),
        ],
        [
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", TensorProto.FLOAT, [2]),
        ],
    )
    graph = helper.make_graph(
        [
            helper.make_node("Neg", ["x"], ["t"]),
            helper.make_node("Loop", ["trips", "yes", "t"], ["y"], body=loop_body),
        ],
        "main",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])],
        [
            numpy_helper.from_array(np.array(2), "trips"),
            numpy_helper.from_array(np.array(0), "zero"),
            numpy_helper.from_array(np.array(True), "yes"),
        ],
    )
    functions = [add_to, twice] if body else [twice]
    return helper.make_model(graph, functions=functions, opset_imports=ours, ir_version=10)


def test_inlining_reaches_calls_in_calls_in_branches_in_loops() -> None:
    model = inlined(calls_within_calls())
    assert_standard(model)
    x = np.array([1.0, -2.0], np.float32)
    np.testing.assert_array_equal(run(model, {"x": x})["y"], -x + 2 * 3 + 2 * 5)


def test_inlining_refuses_an_operator_without_a_body() -> None:
    with pytest.raises(ExportError, match=r"portable: made\.up::AddTo has no body of standard operators"):
        inlined(calls_within_calls(body=False))


# --- freeze --------------------------------------------------------------------------------------


@pytest.mark.parametrize("portable", [False, True])
def test_frozen_files_agree_and_have_no_weight_to_replace(source: Path, portable: bool, tmp_path: Path) -> None:
    sample = sample_of(source)
    for role in sample.package.graphs.keys() - {"train"}:
        feeds = sample.feeds(role)
        plain = pack(source, tmp_path / f"{role}.onnx", role)
        target = pack(source, tmp_path / f"frozen_{role}.onnx", role, freeze=True, portable=portable)
        model = onnx.load(target)
        onnx.checker.check_model(model, full_check=True)
        session = session_of(target)
        assert not session.get_overridable_initializers()
        assert {v.name for v in session.get_inputs()} == feeds.keys()
        bound = 1e-5 if sample.dtype == np.float32 else 1e-11
        assert_close(run(target, feeds), run(plain, feeds), bound)
        if portable:
            assert_standard(model)
        else:
            assert [f.name for f in model.functions] == [f.name for f in onnx.load(plain).functions]


@pytest.mark.skipif(not KERNELS, reason="there is no native library")
@pytest.mark.parametrize(
    ("role", "freeze"),
    [
        *(("adjoint", False), ("adjoint", True), ("argmin_polyhedron", False)),
        pytest.param("argmin_polyhedron", True, marks=pytest.mark.slow),
    ],
)
def test_settings_are_plain_inputs_where_hosts_need_it(role: str, freeze: bool, tmp_path: Path) -> None:
    opened = icnnrt.Package.open(SPACE)
    files = [tmp_path / name for name in ("usual.onnx", "asked.onnx")]
    for file, asked in zip(files, (False, True), strict=True):
        pack(opened, file, role, portable=True, freeze=freeze, settings_as_inputs=asked)
    usual, asking = (onnxruntime.InferenceSession(file) for file in files)
    signature = opened.manifest.graphs[role].signature
    assert signature is not None
    settings = {name: np.array(t.default, t.dtype) for name, t in signature.inputs.items() if t.default is not None}
    assert settings
    required = [v.name for v in asking.get_inputs()]
    assert set(required) == {*(v.name for v in usual.get_inputs()), *settings}
    assert not settings.keys() & {v.name for v in asking.get_overridable_initializers()}
    told = asking.get_modelmeta().custom_metadata_map
    for name, value in settings.items():
        assert told[f"default.{name}"] == repr(value.item())
    rng = np.random.default_rng(0)
    feeds = {}
    for name, (dtype, shape, default) in signature.inputs.items():
        if default is None:
            sizes = [2 if size == "batch" else size if isinstance(size, int) else 1 for size in shape]
            feeds[name] = rng.uniform(0.1, 0.9, sizes).astype(dtype)
    if role == "argmin_polyhedron":  # G y <= 2
        feeds |= {"h": np.full_like(feeds["h"], 2.0), "A": feeds["A"][:, :0], "b": feeds["b"][:, :0]}
        feeds |= {"lower": np.full_like(feeds["lower"], -5.0), "upper": np.full_like(feeds["upper"], 5.0)}
    for a, b in zip(usual.run(None, feeds), asking.run(None, feeds | settings), strict=True):
        np.testing.assert_array_equal(a, b)


def test_frozen_files_use_the_kernels(digits_package: Path, tmp_path: Path) -> None:
    target = pack(digits_package, tmp_path / "frozen.onnx", freeze=True)
    sample = sample_of(digits_package)
    expected = icnnrt.load(digits_package, native=True).argmin(sample.x)
    came = run(target, sample.feeds("argmin"), native=True)
    np.testing.assert_allclose(came["y"], expected.y, rtol=0, atol=1e-6)


@pytest.mark.parametrize("role", ["value", "argmin", "adjoint"])
def test_freezing_computes_softplus_of_the_weights_beforehand(
    role: str, softplus_weights_package: Path, tmp_path: Path
) -> None:
    plain = onnx.load(pack(softplus_weights_package, tmp_path / "plain.onnx", role))
    model = onnx.load(pack(softplus_weights_package, tmp_path / "frozen.onnx", role, freeze=True))
    raw = [name for name in package.Package.open(softplus_weights_package).weights if name.endswith("raw_weight")]
    assert raw

    def readers(of: onnx.ModelProto) -> list[str]:
        return [n.op_type for g in every_graph(of.graph) for n in g.node if set(raw) & set(n.input)]

    assert {"Abs", "Max"} <= set(readers(plain))  # softplus
    left = {t.name for t in model.graph.initializer}
    # The adjoint needs the derivative of softplus, which is folded as well.
    assert not readers(model)
    assert left.isdisjoint(raw)
    assert len(model.graph.node) < len(plain.graph.node)


def folding_model() -> onnx.ModelProto:
    """W [2, 2] as a replaceable weight; each node of constants is of another kind."""
    W = np.array([[1.0, -2.0], [3.0, 4.0]], np.float32)
    loop_body = helper.make_graph(
        [
            helper.make_node("Relu", ["W"], ["inner_relu"]),
            helper.make_node("MatMul", ["state", "inner_relu"], ["product"]),
            helper.make_node("Add", ["product", "folded_outside"], ["next"]),
            helper.make_node("Neg", ["W"], ["handed_out"]),
            helper.make_node("Identity", ["going"], ["go_on"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("going", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state", TensorProto.FLOAT, [2, 2]),
        ],
        [
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", TensorProto.FLOAT, [2, 2]),
            helper.make_tensor_value_info("handed_out", TensorProto.FLOAT, [2, 2]),
        ],
    )
    graph = helper.make_graph(
        [
            helper.make_node("Transpose", ["W"], ["flipped"]),
            helper.make_node("Exp", ["flipped"], ["folded_outside"]),
            helper.make_node("Loop", ["trips", "yes", "x"], ["y", "collected"], body=loop_body),
            helper.make_node("Expand", ["folded_outside", "shape"], ["large"]),
            helper.make_node("ReduceSum", ["large", "axis"], ["small_again"], keepdims=0),
            helper.make_node("ReduceSum", ["large"], ["of_large"], keepdims=0),
            helper.make_node("Mul", ["large", "x"], ["kept_large"]),
            helper.make_node("ReduceSum", ["kept_large"], ["sum"], keepdims=0),
            helper.make_node("Add", ["sum", "of_large"], ["total"]),
            helper.make_node("Add", ["small_again", "y"], ["z"]),
            helper.make_node("RandomNormalLike", ["W"], ["noise"]),
            helper.make_node("Mul", ["noise", "x"], ["noisy"]),
            helper.make_node("Abs", ["W"], ["constant_output"]),
            helper.make_node("Sign", ["W"], ["of_no_use"]),
        ],
        "main",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 2]),
            helper.make_tensor_value_info("W", TensorProto.FLOAT, [2, 2]),
        ],
        [
            helper.make_tensor_value_info("z", TensorProto.FLOAT, [2, 2]),
            helper.make_tensor_value_info("collected", TensorProto.FLOAT, [3, 2, 2]),
            helper.make_tensor_value_info("total", TensorProto.FLOAT, []),
            helper.make_tensor_value_info("constant_output", TensorProto.FLOAT, [2, 2]),
            helper.make_tensor_value_info("noisy", TensorProto.FLOAT, [2, 2]),
        ],
        [
            numpy_helper.from_array(W, "W"),
            numpy_helper.from_array(np.array(3), "trips"),
            numpy_helper.from_array(np.array(True), "yes"),
            numpy_helper.from_array(np.array([20000, 2, 2]), "shape"),
            numpy_helper.from_array(np.array([0]), "axis"),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def test_folding_leaves_what_must_stay() -> None:
    model = folding_model()
    before = model.SerializeToString()
    result = frozen(model)
    assert model.SerializeToString() == before
    onnx.checker.check_model(result, full_check=True)
    # Gone: Transpose, Exp, both sums of the large value, Sign. Left: the large one itself, chance, and the output.
    left = [node.op_type for node in result.graph.node]
    assert left == ["Loop", "Expand", "Mul", "ReduceSum", "Add", "Add", "RandomNormalLike", "Mul", "Abs"]
    (_, body) = every_graph(result.graph)
    assert [node.op_type for node in body.node] == ["MatMul", "Add", "Neg", "Identity"]
    assert [v.name for v in result.graph.input] == ["x"]
    assert max(np.prod(t.dims, initial=1) for t in result.graph.initializer) == 4
    x = np.array([[0.1, 0.2], [0.3, 0.4]], np.float32)
    came, expected = run(result, {"x": x}), run(model, {"x": x})
    for name in ("z", "collected", "total", "constant_output"):
        np.testing.assert_allclose(came[name], expected[name], rtol=1e-5, err_msg=name)


def test_what_onnxruntime_cannot_compute_is_one_sentence() -> None:
    model = folding_model()
    model.graph.node[0].op_type = "NoSuchOperator"
    with pytest.raises(ExportError, match="freeze: onnxruntime cannot compute what hangs on the weights alone"):
        frozen(model)


# --- siblings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("package_name", "portable"), [*((name, False) for name in PACKAGES), ("double_package", True)]
)
def test_siblings_agree_with_the_session(
    package_name: str, portable: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    source = request.getfixturevalue(package_name)
    sample = sample_of(source)
    paths = siblings(source, tmp_path, portable=portable)
    assert [p.name for p in paths] == ["argmin.onnx", "adj_argmin.onnx", "value.onnx", "adj_value.onnx"]
    for path in paths:
        model = onnx.load(path)
        onnx.checker.check_model(model, full_check=True)
        if portable:
            assert_standard(model)
    argmin, adj_argmin, value, adj_value = paths
    bound = LOOSE[sample.dtype.name]
    feeds = sample.feeds("argmin")
    came = run(argmin, feeds)
    np.testing.assert_allclose(came["y"], sample.solution.y, rtol=0, atol=bound)

    expected = sample.session.vjp(sample.solution, sample.y_bar)
    session = session_of(adj_argmin)
    assert [v.name for v in session.get_inputs()] == ["x", "y_init", "adj_y"]
    assert {v.name for v in session.get_overridable_initializers()} <= sample.package.weights.keys()
    assert session.get_outputs()[0].name == "adj_x"
    came = run(adj_argmin, feeds | {"adj_y": sample.y_bar})
    gradients = {f"adj_{name}": a for name, a in expected.weights.items()}
    assert_close(came, {"adj_x": expected.x} | gradients, bound)

    feeds = sample.feeds("value")
    f, gradient = sample.session.value_and_gradient(sample.x, sample.y)
    assert_close(run(value, feeds), {"f": f}, bound)
    adj_f = np.array([1.0, -2.0, 0.5], sample.dtype)
    assert_close(run(adj_value, feeds | {"adj_f": adj_f}), {"adj_y": adj_f[:, None] * gradient}, bound)


def test_adj_argmin_equals_finite_differences_of_argmin(double_package: Path, tmp_path: Path) -> None:
    """By x, and by a weight that both files can be fed."""
    sample = sample_of(double_package)
    argmin, adj_argmin, *_ = siblings(double_package, tmp_path / "fd")
    assert (argmin.name, adj_argmin.name) == ("fd_argmin.onnx", "adj_fd_argmin.onnx")
    weight = "layers.1.b"
    W = sample.package.weights[weight] + 0.1  # not the value in the file
    feeds = sample.feeds("argmin") | {weight: W}
    came = run(adj_argmin, feeds | {"adj_y": sample.y_bar})
    session = session_of(argmin)

    def loss(**changed: NDArray[Any]) -> float:
        (y,) = session.run(["y"], feeds | {name.replace("__", "."): a for name, a in changed.items()})
        return float((y * sample.y_bar).sum())

    random = np.random.default_rng(1)
    step = 1e-4
    for name, at in (("x", sample.x), (weight, W)):
        direction = random.standard_normal(at.shape)
        argument = name.replace(".", "__")
        difference = loss(**{argument: at + step * direction}) - loss(**{argument: at - step * direction})
        # Relative to the gradient, of which the direction may show little.
        close = 2e-4 * np.linalg.norm(came[f"adj_{name}"]) * np.linalg.norm(direction)
        np.testing.assert_allclose((came[f"adj_{name}"] * direction).sum(), difference / (2 * step), rtol=0, atol=close)


def rewritten(source: Path, target: Path, **changed: Any) -> Path:
    """A copy of a package with some of what it holds replaced."""
    opened = package.Package.open(source)
    manifest = opened.manifest
    tensors = manifest.weights.tensors
    content: dict[str, Any] = {
        "name": manifest.name,
        "dtype": manifest.dtype,
        "x_shape": manifest.x_shape,
        "y_shape": manifest.y_shape,
        "solver": manifest.solver,
        "graphs": {role: graph for role, graph in opened.graphs.items() if role != "train"},
        "weights": opened.weights,
        "nonnegative": [name for name, spec in tensors.items() if spec.nonnegative],
        "trainable": [name for name, spec in tensors.items() if spec.trainable],
    }
    package.write(target, **(content | changed))
    return target


def test_samples_without_a_gradient_are_marked_and_left_out(double_package: Path, tmp_path: Path) -> None:
    sample = sample_of(double_package)
    _, adj_argmin, *_ = siblings(double_package, tmp_path)
    y_bar = sample.y_bar.copy()
    y_bar[0] = np.nan  # where there is no answer, its loss has no gradient either
    # Kernels are held to kernels: where a multiplier is nearly zero, gradients of other methods part from theirs.
    for bad, native in itertools.product((np.nan, np.inf), (False, True) if KERNELS else (False,)):
        x = sample.x.copy()
        x[0, 1] = bad
        with icnnrt.load(double_package, native=native) as session:
            expected = session.vjp(session.argmin(x), y_bar, on_unsafe="skip")
        assert expected.skipped.tolist() == [True, False, False]
        gradients = {f"adj_{name}": a for name, a in expected.weights.items()}
        came = run(adj_argmin, {"x": x, "y_init": sample.start, "adj_y": y_bar}, native=native)
        assert np.isnan(came["adj_x"][0]).all()
        assert_close(came, {"adj_x": expected.x} | gradients, 1e-9)
        assert all(np.isfinite(came[name]).all() for name in gradients)


def test_samples_that_prove_the_energy_not_convex_are_marked(double_package: Path, tmp_path: Path) -> None:
    weights = {name: a.copy() for name, a in package.Package.open(double_package).weights.items()}
    for name in weights:
        if ".W_z." in name:
            weights[name][:, :3] = -3.0
    source = rewritten(double_package, tmp_path / "not_convex.icnn", weights=weights, nonnegative=[])
    session = icnnrt.load(source, native=False)
    x = np.random.default_rng(3).standard_normal((12, 3)) * 2
    y_bar = np.ones((12, 4))
    solution = session.argmin(x)
    assert (solution.status == icnnrt.Status.NOT_CONVEX).any()
    expected = session.vjp(solution, y_bar, on_unsafe="skip")
    _, adj_argmin, *_ = siblings(source, tmp_path)
    came = run(adj_argmin, {"x": x, "y_init": np.full((12, 4), 0.5), "adj_y": y_bar})
    np.testing.assert_array_equal(np.isnan(came["adj_x"]).all(1), expected.skipped)


def test_no_sample_of_an_energy_seen_not_to_be_convex_has_a_gradient(nonconvex_package: Path, tmp_path: Path) -> None:
    """Those that converged by their cuts alone neither, as for `vjp`."""
    _, adj_argmin, *_ = siblings(nonconvex_package, tmp_path)
    x = np.random.default_rng(0).standard_normal((12, 4)).astype(np.float32)
    start, y_bar = np.full((12, 5), 0.5, np.float32), np.ones((12, 5), np.float32)
    came = run(adj_argmin, {"x": x, "y_init": start, "adj_y": y_bar})
    assert np.isnan(came.pop("adj_x")).all()
    assert all((bar == 0).all() for bar in came.values())


def test_a_package_with_the_gradient_by_x_has_adj_x(double_package: Path, tmp_path: Path) -> None:
    """A made-up graph, as any would do: gradient_x = x · Σy + Σ of a bias of the package."""
    opened = package.Package.open(double_package)
    weight = "layers.0.b"
    offset, length = weight_layout(opened.weights)[1][weight]
    bias = opened.weights[weight]
    tensor = TensorProto(name=weight, data_type=TensorProto.DOUBLE, dims=bias.shape)
    tensor.data_location = TensorProto.EXTERNAL
    for key, entry in (("location", package.WEIGHTS_FILE), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(entry))
    graph = helper.make_graph(
        [
            helper.make_node("ReduceSum", ["y", "axis"], ["energy/sum"], keepdims=1),
            helper.make_node("Mul", ["x", "energy/sum"], ["energy/scaled"]),
            helper.make_node("ReduceSum", [weight], ["energy/bias"], keepdims=0),
            helper.make_node("Add", ["energy/scaled", "energy/bias"], ["gradient_x"]),
        ],
        "gradient_x",
        [
            helper.make_tensor_value_info("x", TensorProto.DOUBLE, ["batch", 3]),
            helper.make_tensor_value_info("y", TensorProto.DOUBLE, ["batch", 4]),
            helper.make_tensor_value_info(weight, TensorProto.DOUBLE, bias.shape),
        ],
        [helper.make_tensor_value_info("gradient_x", TensorProto.DOUBLE, ["batch", 3])],
        [tensor, numpy_helper.from_array(np.array([1]), "axis")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    graphs = {role: content for role, content in opened.graphs.items() if role != "train"}
    graphs["gradient_x"] = model.SerializeToString()
    source = rewritten(double_package, tmp_path / "more.icnn", graphs=graphs)
    *_, adj_value = siblings(source, tmp_path)
    sample = sample_of(source)
    _, gradient = sample.session.value_and_gradient(sample.x, sample.y)
    adj_f = np.array([1.0, -2.0, 0.5])
    came = run(adj_value, sample.feeds("value") | {"adj_f": adj_f, weight: bias})
    gradient_x = sample.x * sample.y.sum(1, keepdims=True) + bias.sum()
    assert_close(came, {"adj_x": adj_f[:, None] * gradient_x, "adj_y": adj_f[:, None] * gradient}, 1e-12)
    # A further role is packed like the others.
    packed = pack(source, tmp_path / "g.onnx", "gradient_x", freeze=True, portable=True)
    np.testing.assert_allclose(run(packed, sample.feeds("value"))["gradient_x"], gradient_x, rtol=1e-13)


# --- What is refused -----------------------------------------------------------------------------


def test_refusals_are_one_sentence_and_write_nothing(double_package: Path, tmp_path: Path) -> None:
    def refused(match: str, call: Callable[[], object]) -> None:
        before = sorted(tmp_path.iterdir())
        with pytest.raises(ExportError, match=match) as told:
            call()
        assert "\n" not in str(told.value)
        assert sorted(tmp_path.iterdir()) == before

    p, there = double_package, tmp_path / "there.onnx"
    there.write_bytes(b"old")
    refused("has no graph 'hvp'; it has", lambda: pack(p, tmp_path / "o.onnx", "hvp", portable=True, freeze=True))
    refused("freeze: the graph 'train' must be fed", lambda: pack(DIGITS, tmp_path / "o.onnx", "train", freeze=True))
    refused("is there already; pass overwrite=True", lambda: pack(p, there, portable=True))
    refused("is a folder; give the name of a file", lambda: pack(p, tmp_path))
    refused("cannot be written .*; choose a folder", lambda: pack(p, tmp_path / "nowhere" / "o.onnx", "value"))
    refused("cannot be written .*; choose a folder", lambda: pack(p, there / "o.onnx", "value"))
    refused("cannot be written .*; choose a folder", lambda: siblings(p, tmp_path / "nowhere" / "o"))
    assert there.read_bytes() == b"old"
    with pytest.raises(PackageError):
        siblings(tmp_path / "none.icnn", tmp_path)

    (tmp_path / "adj_value.onnx").write_bytes(b"old")  # the last of the four
    refused("adj_value.onnx is there already", lambda: siblings(p, tmp_path))
    assert siblings(p, tmp_path, overwrite=True)[-1].stat().st_size > 3
    (tmp_path / "f_value.onnx").mkdir()
    refused("f_value.onnx is a folder", lambda: siblings(p, tmp_path / "f", overwrite=True))


def test_a_weight_whose_gradient_would_be_called_like_the_seed(double_package: Path, tmp_path: Path) -> None:
    """adj_y is the seed of y*, and would be the gradient of a weight y as well."""
    opened = package.Package.open(double_package)
    old = "layers.0.b"
    adjoint = onnx.load_model_from_string(opened.graphs["adjoint"])
    for v in adjoint.graph.output:
        if v.name == f"theta_bar.{old}":
            for node in adjoint.graph.node:
                for i, name in enumerate(node.output):
                    if name == v.name:
                        node.output[i] = "theta_bar.y"
            v.name = "theta_bar.y"
    graphs = {role: content for role, content in opened.graphs.items() if role != "train"}
    graphs["adjoint"] = adjoint.SerializeToString()
    source = rewritten(double_package, tmp_path / "odd.icnn", graphs=graphs)
    with pytest.raises(ExportError, match="'adj_y' has two meanings in a sibling; rename it"):
        siblings(source, tmp_path)
    assert not list(tmp_path.glob("*.onnx"))


# --- Writing, and the command line ---------------------------------------------------------------


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "f"
    target.write_bytes(b"old")

    def fail() -> None:
        with files.atomic_file(target) as file:
            file.write(b"half")
            (scratch,) = (p for p in tmp_path.iterdir() if p != target)
            assert files.scratch_of(scratch.name) == "f"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]
    with files.atomic_file(target) as file:
        file.write(b"ne")
        file.write(b"w")
        assert target.read_bytes() == b"old"
    assert target.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [target]
    plain = tmp_path / "plain"
    plain.write_bytes(b"")
    assert target.stat().st_mode == plain.stat().st_mode


def test_the_command_line(tmp_path: Path) -> None:
    testing = pytest.importorskip("typer.testing")
    from icnnrt.cli.commands import app

    def icnnrt_pack(*arguments: object, code: int = 0) -> Any:
        result = testing.CliRunner().invoke(app, ["pack", str(DIGITS), *map(str, arguments)])
        assert result.exit_code == code, result.output
        return result

    target = tmp_path / "o.onnx"
    icnnrt_pack(target, "--portable", "--freeze")
    model = onnx.load(target)
    assert_standard(model)
    assert {v.name for v in model.graph.input} == {"x", "y_init"}
    icnnrt_pack(tmp_path / "asked.onnx", "--graph", "adjoint", "--settings-as-inputs")
    assert "depth" not in {tensor.name for tensor in onnx.load(tmp_path / "asked.onnx").graph.initializer}
    assert icnnrt_pack(tmp_path, "--siblings", "--portable").stdout.count("bytes") == 4
    assert_standard(onnx.load(tmp_path / "adj_argmin.onnx"))
    assert "adj_value.onnx" in icnnrt_pack(tmp_path, "--siblings", "--overwrite").stdout.replace("\n", "")
    icnnrt_pack(tmp_path / "f", "--siblings")
    assert (tmp_path / "adj_f_value.onnx").exists()
    assert "--freeze was given" in icnnrt_pack(tmp_path, "--siblings", "--freeze", code=1).stderr
    assert "but --graph was given" in icnnrt_pack(tmp_path, "--siblings", "--graph", "value", code=1).stderr
    assert "is there already" in icnnrt_pack(tmp_path, "--siblings", code=1).stderr
    assert "create it first" in icnnrt_pack(tmp_path / "nowhere" / "f", "--siblings", code=1).stderr
    assert "must be fed" in icnnrt_pack(tmp_path / "t.onnx", "--graph", "train", "--freeze", code=1).stderr
