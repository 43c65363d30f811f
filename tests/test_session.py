"""Sessions on a package built by hand, whose argmin and adjoint are known in closed form.

The energy f(x, y) = Σ_j [(Wx + b)_j y_j + ½ q_j (y_j − ½)²] with K = 1 cut at y_init p:

    g = Wx + b + q(p − ½),  y = σ(−g),  λ = 1,  c_y = −D ȳ,  θ̄ = ∇θ [c_y' g]

q = 0 makes one cut exact (CONVERGED), q > 0 leaves a gap (GAP), q < 0 is not convex (NOT_CONVEX).
"""

import dataclasses
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import references
from onnx import TensorProto, helper

import icnnrt
from icnnrt.errors import (
    CertificateError,
    IcnnrtError,
    InputError,
    MissingDependencyError,
    PackageError,
    ProviderError,
)
from icnnrt.format import package as package_format
from icnnrt.format.contents import weight_layout
from icnnrt.format.manifest import SolverSpec
from icnnrt.format.package import Package
from icnnrt.mathematics import certificate
from icnnrt.mathematics.status import Status
from icnnrt.serving.runner import Runner

ort = pytest.importorskip("onnxruntime")

X_SHAPE, N = (2, 2), 3
TOLERANCE = {"float32": 2e-6, "float64": 1e-14}
T_OF = {"float32": TensorProto.FLOAT, "float64": TensorProto.DOUBLE}


# --- A package by hand ---------------------------------------------------------------------------


def weights(dtype: str = "float32", q: float = 0.0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "linear.weight": rng.normal(size=(N, 4)).astype(dtype),
        "linear.bias": rng.normal(size=N).astype(dtype),
        "curvature": np.full(N, q, dtype),
        "steps_trained": np.array(7, np.int64),  # not in any graph, as with a batch norm's counter
    }


class Builder:
    """Nodes over the shared weights, as one role's ONNX file."""

    def __init__(self, dtype: str, weights: dict[str, np.ndarray]) -> None:
        self.T, self.dtype, self.weights = T_OF[dtype], dtype, weights
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def __call__(self, op: str, *inputs: str, out: str | None = None, **attributes: Any) -> str:
        out = out or f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [out], **attributes))
        return out

    def constant(self, value: Any, dtype: Any = None) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(onnx.numpy_helper.from_array(np.array(value, dtype or self.dtype), name))
        return name

    def sum(self, v: str, axis: int = 1, out: str | None = None) -> str:
        return self("ReduceSum", v, self.constant([axis], np.int64), keepdims=0, out=out)

    def energy(self, y: str) -> tuple[str, str]:
        """f and gradient at y."""
        c = self("Add", self("MatMul", self("Flatten", "x"), self("Transpose", "linear.weight")), "linear.bias")
        moved = self("Sub", y, self.constant(0.5))
        qm = self("Mul", "curvature", moved)
        half = self("Mul", self.constant(0.5), self("Mul", qm, moved))
        return self.sum(self("Add", self("Mul", c, y), half)), self("Add", c, qm)

    def finish(
        self,
        inputs: list[tuple[str, Any, list[Any]]],
        outputs: list[tuple[str, Any, list[Any]]],
        overridable: bool = True,
    ) -> bytes:
        _, layout = weight_layout(self.weights)
        used = {name for node in self.nodes for name in node.input} & self.weights.keys()
        tensors = []
        for name in sorted(used):
            array = self.weights[name]
            tensor = TensorProto(name=name, dims=array.shape, data_type=helper.np_dtype_to_tensor_dtype(array.dtype))
            tensor.data_location = TensorProto.EXTERNAL
            entries = ("weights.safetensors", *map(str, layout[name]))
            for key, value in zip(("location", "offset", "length"), entries, strict=True):
                tensor.external_data.add(key=key, value=value)
            tensors.append(tensor)
        graph_inputs = [helper.make_tensor_value_info(*i) for i in inputs]
        if overridable:
            graph_inputs += [helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)) for t in tensors]
        graph_outputs = [helper.make_tensor_value_info(*o) for o in outputs]
        graph = helper.make_graph(self.nodes, "g", graph_inputs, graph_outputs, [*tensors, *self.constants])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        return model.SerializeToString()


def value_graph(dtype: str, w: dict[str, np.ndarray]) -> bytes:
    b = Builder(dtype, w)
    f, g = b.energy("y")
    b("Identity", f, out="f")
    b("Identity", g, out="gradient")
    return b.finish(
        [("x", b.T, ["batch", *X_SHAPE]), ("y", b.T, ["batch", N])],
        [("f", b.T, ["batch"]), ("gradient", b.T, ["batch", N])],
    )


def argmin_graph(dtype: str, w: dict[str, np.ndarray], overridable: bool = True) -> bytes:
    b = Builder(dtype, w)
    D = TensorProto.DOUBLE
    f, g = b.energy("y_init")
    half = b.constant(0.5)
    e = b("Add", f, b.sum(b("Mul", g, b("Sub", half, "y_init"))))
    b("Sigmoid", b("Neg", g), out="y")
    one = b.constant([1], np.int64)
    b("Unsqueeze", g, one, out="slopes")
    b("Unsqueeze", "y_init", one, out="cut_points")
    b("Unsqueeze", e, one, out="offsets")
    zero = b("Mul", "offsets", b.constant(0.0))
    b("Add", zero, b.constant(1.0), out="lam")
    b("Unsqueeze", "lam", one, out="lam_history")
    # dual: e − Σ [½|s| + log1p(e^−|s|)]
    s = b("Abs", b("Cast", g, to=D))
    log1p = b("Log", b("Add", b.constant(1.0, np.float64), b("Exp", b("Neg", s))))
    dual = b.sum(b("Add", b("Mul", b.constant(0.5, np.float64), s), log1p))
    b("Sub", b("Cast", e, to=D), dual, out="lower_bound")
    f_star, _ = b.energy("y")
    p = b("Cast", "y", to=D)
    tiny = b.constant(1e-300, np.float64)
    terms = [b("Mul", v, b("Log", b("Max", v, tiny))) for v in (p, b("Sub", b.constant(1.0, np.float64), p))]
    b("Add", b("Cast", f_star, to=D), b.sum(b("Add", *terms)), out="energy")
    b("Sub", "energy", "lower_bound", out="gap")
    b("Cast", zero, to=D, out="complementarity_history")
    b("Concat", *["complementarity_history"] * 3, axis=1, out="residual")
    return b.finish(
        [("x", b.T, ["batch", *X_SHAPE]), ("y_init", b.T, ["batch", N])],
        [
            ("y", b.T, ["batch", N]),
            ("lam", b.T, ["batch", 1]),
            ("slopes", b.T, ["batch", 1, N]),
            ("offsets", b.T, ["batch", 1]),
            ("cut_points", b.T, ["batch", 1, N]),
            ("lam_history", b.T, ["batch", 1, 1]),
            ("energy", D, ["batch"]),
            ("lower_bound", D, ["batch"]),
            ("gap", D, ["batch"]),
            ("residual", D, ["batch", 3]),
            ("complementarity_history", D, ["batch", 1]),
        ],
        overridable,
    )


def adjoint_graph(dtype: str, w: dict[str, np.ndarray]) -> bytes:
    """K = 1: c_y = −D ȳ, θ̄ = ∇θ [c_y' ∇_y f(x, y_init)]."""
    b = Builder(dtype, w)
    c = b("Neg", b("Mul", "y_bar", b("Mul", "y", b("Sub", b.constant(1.0), "y"))))
    x = b("Flatten", "x")
    b("MatMul", b("Transpose", c), x, out="theta_bar.linear.weight")
    b.sum(c, 0, out="theta_bar.linear.bias")
    points = b("Squeeze", "cut_points", b.constant([1], np.int64))
    b.sum(b("Mul", c, b("Sub", points, b.constant(0.5))), 0, out="theta_bar.curvature")
    b("Reshape", b("MatMul", c, "linear.weight"), b.constant([-1, *X_SHAPE], np.int64), out="x_bar")
    b("Squeeze", b("ReduceMax", "offsets", b.constant([1], np.int64)), b.constant([1], np.int64), out="unused_maximum")
    b("Mul", "unused_maximum", b.constant(0.0), out="slope_mismatch")
    if dtype == "float64":  # depth may be required or, as in true exports, have a default: one of each is tried
        b.constants.append(onnx.numpy_helper.from_array(np.array(1, np.int64), "depth"))
    return b.finish(
        [
            ("x", b.T, ["batch", *X_SHAPE]),
            ("y", b.T, ["batch", N]),
            ("slopes", b.T, ["batch", 1, N]),
            ("offsets", b.T, ["batch", 1]),
            ("cut_points", b.T, ["batch", 1, N]),
            ("lam_history", b.T, ["batch", 1, 1]),
            ("y_bar", b.T, ["batch", N]),
            ("depth", TensorProto.INT64, []),
        ],
        [
            ("x_bar", b.T, ["batch", *X_SHAPE]),
            ("slope_mismatch", b.T, ["batch"]),
            ("theta_bar.linear.weight", b.T, [N, 4]),
            ("theta_bar.linear.bias", b.T, [N]),
            ("theta_bar.curvature", b.T, [N]),
        ],
    )


def build(path: Path, dtype: str = "float32", q: float = 0.0, **changes: Any) -> Path:
    w = weights(dtype, q)
    fields: dict[str, Any] = {
        "name": "tiny",
        "dtype": dtype,
        "x_shape": X_SHAPE,
        "y_shape": (N,),
        "solver": SolverSpec(iterations=1, steps=5, gap_tolerance=1e-4, residual_tolerance=1e-3),
        "graphs": {
            "value": value_graph(dtype, w),
            "argmin": argmin_graph(dtype, w),
            "adjoint": adjoint_graph(dtype, w),
        },
        "weights": w,
        "nonnegative": ["curvature"] if q >= 0 else [],
        "trainable": ["linear.weight", "linear.bias", "curvature"],
        **changes,
    }
    package_format.write(path, **fields)
    return path


@pytest.fixture(params=["float32", "float64"])
def dtype(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def session(tmp_path: Path, dtype: str) -> icnnrt.Session:
    return icnnrt.load(build(tmp_path / "tiny.icnn", dtype))


@pytest.fixture
def gappy(tmp_path: Path, dtype: str) -> icnnrt.Session:
    """q = 1: one cut leaves a gap."""
    return icnnrt.load(build(tmp_path / "gappy.icnn", dtype, q=1.0))


def contexts(B: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(B, *X_SHAPE))


def truth(w: dict[str, np.ndarray], x: np.ndarray, p: np.ndarray | float = 0.5) -> np.ndarray:
    """y of the one-cut method, in float64."""
    W, b, q = (w[k].astype(np.float64) for k in ("linear.weight", "linear.bias", "curvature"))
    return references.sigmoid(-(x.reshape(len(x), 4) @ W.T + b + q * (p - 0.5)))


# --- argmin --------------------------------------------------------------------------------------


@pytest.mark.parametrize("B", [0, 1, 7])
def test_argmin_returns_every_array_in_its_shape_and_dtype(session: icnnrt.Session, dtype: str, B: int) -> None:
    solution = session.argmin(contexts(B))
    T = np.dtype(dtype)
    expected: dict[str, tuple[tuple[int, ...], Any]] = {
        "x": ((B, *X_SHAPE), T),
        "y": ((B, N), T),
        "lam": ((B, 1), T),
        "slopes": ((B, 1, N), T),
        "offsets": ((B, 1), T),
        "cut_points": ((B, 1, N), T),
        "lam_history": ((B, 1, 1), T),
        "energy": ((B,), np.float64),
        "lower_bound": ((B,), np.float64),
        "gap": ((B,), np.float64),
        "residual": ((B, 3), np.float64),
        "complementarity_history": ((B, 1), np.float64),
        "status": ((B,), np.int8),
    }
    for name, (shape, kind) in expected.items():
        array = getattr(solution, name)
        assert (array.shape, array.dtype) == (shape, kind), name
        assert not array.flags.writeable, name
    assert len(solution) == B
    assert solution.ok.all()
    assert solution.info["iterations"] == 1
    assert solution.info["providers"] == ("CPUExecutionProvider",)
    np.testing.assert_allclose(solution.y, truth(weights(dtype), contexts(B)), atol=TOLERANCE[dtype])


def test_the_certificate_agrees_with_what_numpy_recomputes(gappy: icnnrt.Session, dtype: str) -> None:
    s = gappy.argmin(contexts(5))
    kkt = certificate.kkt_residuals(s.slopes, s.offsets, s.lam, s.y)
    assert kkt.max() < 10 * TOLERANCE[dtype]
    np.testing.assert_allclose(
        certificate.duality_gap(s.energy, s.slopes, s.offsets, s.lam), s.gap, atol=10 * TOLERANCE[dtype]
    )
    assert (s.gap > 1e-4).any()


def test_a_gap_is_told_with_advice(gappy: icnnrt.Session) -> None:
    solution = gappy.argmin(contexts(5))
    worst = int(solution.gap.argmax())
    assert solution.status[worst] == Status.GAP
    assert "1 cuts left a gap of" in solution.advice(worst)
    assert "more iterations (2)" in solution.advice(worst)
    assert "GAP" in solution.summary()
    assert "GAP" in repr(solution)
    assert "\n" not in repr(solution)


def test_a_concave_energy_is_told(tmp_path: Path, dtype: str) -> None:
    session = icnnrt.load(build(tmp_path / "p.icnn", dtype, q=-1.0))
    solution = session.argmin(contexts(5))
    assert (solution.status == Status.NOT_CONVEX).all()
    assert "not convex in y" in solution.advice(0)


def test_an_overflow_is_told_and_spares_the_others(session: icnnrt.Session, dtype: str) -> None:
    x = contexts(4).astype(dtype)
    alone = session.argmin(x)
    x[2] = np.finfo(dtype).max
    solution = session.argmin(x)
    assert solution.status.tolist() == [0, 0, Status.NOT_FINITE, 0]
    assert f"range of {dtype}" in solution.advice(2)
    keep = [0, 1, 3]
    np.testing.assert_allclose(solution.y[keep], alone.y[keep], rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_sample_is_not_run_and_spares_the_others(session: icnnrt.Session, dtype: str, bad: float) -> None:
    x = contexts(4)
    x[1, 0, 1] = bad
    solution = session.argmin(x)
    assert solution.status.tolist() == [0, Status.NOT_FINITE_INPUT, 0, 0]
    for name in ("y", "lam", "slopes", "energy", "gap", "residual"):
        array = getattr(solution, name)
        assert np.isnan(array[1]).all()
        assert np.isfinite(array[[0, 2, 3]]).all()
    np.testing.assert_allclose(solution.y[[0, 2, 3]], truth(weights(dtype), x[[0, 2, 3]]), atol=TOLERANCE[dtype])
    assert solution.advice(1).startswith("sample 1: x holds NaN or infinity")
    assert session.argmin(np.full((2, *X_SHAPE), bad)).status.tolist() == [Status.NOT_FINITE_INPUT] * 2


def test_float64_that_float32_cannot_hold_is_a_bad_sample(tmp_path: Path) -> None:
    session = icnnrt.load(build(tmp_path / "p.icnn"))
    assert session.argmin(np.full((1, *X_SHAPE), 1e300)).status.tolist() == [Status.NOT_FINITE_INPUT]


def test_strict_names_the_samples(gappy: icnnrt.Session, tmp_path: Path) -> None:
    x = contexts(6)
    x[1] = np.nan
    with pytest.raises(CertificateError, match=r"of 6 samples did not converge: .*NOT_FINITE_INPUT, sample 1: x holds"):
        gappy.argmin(x, strict=True)
    strict = icnnrt.load(gappy.path, strict=True)
    with pytest.raises(CertificateError, match="strict: "):
        strict.argmin(x)
    assert len(strict.argmin(x, strict=False)) == 6


def test_a_start_is_where_the_first_cut_is_made(gappy: icnnrt.Session, dtype: str) -> None:
    x = contexts(4)
    start = np.random.default_rng(2).random((4, N))
    solution = gappy.argmin(x, y_init=start)
    np.testing.assert_array_equal(solution.cut_points[:, 0], start.astype(dtype))
    np.testing.assert_allclose(solution.y, truth(weights(dtype, 1.0), x, start), atol=TOLERANCE[dtype])
    cold = gappy.argmin(x)
    assert (cold.cut_points == 0.5).all()
    warm = gappy.argmin(x, warm=cold)
    np.testing.assert_array_equal(warm.cut_points[:, 0], cold.y)
    assert (warm.gap < cold.gap + 1e-6).all()


def test_a_warm_start_from_a_bad_sample_is_cold(session: icnnrt.Session) -> None:
    x = contexts(2)
    x[0] = np.nan
    warm = session.argmin(contexts(2), warm=session.argmin(x))
    assert (warm.cut_points[0] == 0.5).all()
    assert warm.ok.all()


@pytest.mark.parametrize(
    ("start", "sentence"),
    [
        ({"y_init": np.full((2, N), 1.5)}, r"y_init: expected numbers in \[0, 1\], but got 1.5 in sample 0"),
        ({"y_init": np.full((2, N), np.nan)}, "y_init: expected numbers in"),
        ({"y_init": np.full((3, N), 0.5)}, r"y_init: expected shape \[2, 3\], but got \[3, 3\]; it needs one row"),
        ({"y_init": np.full(N, 0.5)}, r"pass y_init\[None\]"),
        (
            {"warm": np.full((2, N), 0.5)},
            "warm: expected what session.argmin returned, but got ndarray; pass an array as y_init",
        ),
    ],
)
def test_a_bad_start_is_refused(session: icnnrt.Session, start: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        session.argmin(contexts(2), **start)


def test_a_warm_start_of_another_batch_or_with_a_start_is_refused(session: icnnrt.Session) -> None:
    other = session.argmin(contexts(3))
    with pytest.raises(InputError, match="warm: expected shape"):
        session.argmin(contexts(2), warm=other)
    with pytest.raises(InputError, match="at most one"):
        session.argmin(contexts(3), warm=other, y_init=other.y)


# --- What x may be -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", [np.float16, np.float32, np.float64, np.longdouble, np.int8, np.int64, np.uint64, bool]
)
def test_numbers_of_every_kind_are_converted(session: icnnrt.Session, dtype: str, kind: Any) -> None:
    x = np.array([[[0, 1], [1, 0]], [[1, 1], [0, 0]]]).astype(kind)
    solution = session.argmin(x)
    assert solution.x.dtype == dtype
    np.testing.assert_array_equal(solution.x, x.astype(dtype))
    np.testing.assert_array_equal(session.argmin(x.tolist()).y, solution.y)


def test_byte_order_and_memory_order_do_not_matter(session: icnnrt.Session) -> None:
    x = contexts(6)
    expected = session.argmin(x).y
    for other in (x.astype(">f8"), np.asfortranarray(x), np.repeat(x, 2, axis=0)[::2]):
        np.testing.assert_array_equal(session.argmin(other).y, expected)


def test_x_is_copied(session: icnnrt.Session, dtype: str) -> None:
    x = contexts(2).astype(dtype)
    solution = session.argmin(x)
    before = x.copy()
    x[:] = 0
    np.testing.assert_array_equal(solution.x, before)


@pytest.mark.parametrize(
    ("x", "sentence"),
    [
        (np.zeros(X_SHAPE), r"x: expected shape \[B, 2, 2\], but got \[2, 2\]; .* pass x\[None\]"),
        (np.zeros((3, 4)), r"x: expected shape \[B, 2, 2\], but got \[3, 4\]"),
        (1.0, "x: expected shape"),
        ([], "x: expected shape"),
        (np.zeros((1, *X_SHAPE), complex), "x: expected real numbers, but got dtype complex128"),
        (np.zeros((1, *X_SHAPE), object), "x: expected real numbers, but got dtype object"),
        (np.full((1, *X_SHAPE), "1"), "x: expected real numbers"),
        (None, "x: expected real numbers, but got dtype object from NoneType"),
        ([[1.0], [1.0, 2.0]], "x: expected an array, but got list, which does not convert"),
        (np.full((1, *X_SHAPE), 2**53 + 1), "holds exactly, but got int64 values up to 9.007e"),
        (np.full((1, *X_SHAPE), 2**64 - 1, np.uint64), "holds exactly, but got uint64"),
        (np.ma.masked_equal(np.eye(2)[None], 1.0), "x: expected numbers without a mask, but got 2 masked of 4; fill"),
        ([np.ma.masked_equal(np.eye(2), 1.0)] * 2, "x: expected numbers without a mask, but got 4 masked of 8; fill"),
    ],
)
def test_other_contexts_are_refused(session: icnnrt.Session, x: Any, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence) as caught:
        session.argmin(x)
    assert str(caught.value).endswith(".")


def test_masked_arrays_that_mask_nothing_are_taken(session: icnnrt.Session) -> None:
    x = contexts(2)
    for unmasked in (np.ma.array(x), np.ma.array(x, mask=np.zeros_like(x, bool)), list(np.ma.array(x))):
        np.testing.assert_array_equal(session.argmin(unmasked).y, session.argmin(x).y)


# --- value_and_gradient --------------------------------------------------------------------------


@pytest.mark.parametrize("B", [0, 1, 6])
def test_value_and_gradient(gappy: icnnrt.Session, dtype: str, B: int) -> None:
    x, y = contexts(B), np.random.default_rng(3).normal(size=(B, N)) * 3  # also outside the box
    f, gradient = gappy.value_and_gradient(x, y)
    w = {k: v.astype(np.float64) for k, v in weights(dtype, 1.0).items()}
    c = x.reshape(B, 4) @ w["linear.weight"].T + w["linear.bias"]
    assert (f.shape, f.dtype, gradient.shape, gradient.dtype) == ((B,), dtype, (B, N), dtype)
    np.testing.assert_allclose(f, (c * y + 0.5 * (y - 0.5) ** 2).sum(1), atol=50 * TOLERANCE[dtype])
    np.testing.assert_allclose(gradient, c + y - 0.5, atol=50 * TOLERANCE[dtype])


def test_value_and_gradient_of_bad_samples_is_nan(session: icnnrt.Session) -> None:
    x, y = contexts(4), np.zeros((4, N))
    x[0, 0, 0], y[2, 1] = np.nan, np.inf
    f, gradient = session.value_and_gradient(x, y)
    assert np.isnan(f).tolist() == [True, False, True, False]
    assert np.isnan(gradient).all(1).tolist() == [True, False, True, False]
    assert np.isfinite(gradient[[1, 3]]).all()
    with pytest.raises(InputError, match=r"y: expected shape \[4, 3\], but got \[3, 3\]"):
        session.value_and_gradient(x, y[:3])


# --- vjp -----------------------------------------------------------------------------------------


def loss(session: icnnrt.Session, x: np.ndarray, y_bar: np.ndarray) -> float:
    return float((session.argmin(x).y * y_bar).sum())


@pytest.mark.parametrize("adjoint", ["exact", "prop3"])
def test_vjp_is_the_finite_difference(tmp_path: Path, adjoint: str) -> None:
    session = icnnrt.load(build(tmp_path / "p.icnn", "float64", q=1.0))
    x, y_bar, h = contexts(3), np.random.default_rng(4).normal(size=(3, N)), 1e-6
    cotangents = session.vjp(session.argmin(x), y_bar, adjoint=adjoint)
    assert not cotangents.skipped.any()
    assert set(cotangents.weights) == {"linear.weight", "linear.bias", "curvature"}
    dx = np.random.default_rng(5).normal(size=x.shape)
    slope = (loss(session, x + h * dx, y_bar) - loss(session, x - h * dx, y_bar)) / (2 * h)
    np.testing.assert_allclose((cotangents.x * dx).sum(), slope, rtol=1e-6)
    old = dict(session.weights)
    for name in ("linear.weight", "linear.bias"):
        dw = np.random.default_rng(6).normal(size=old[name].shape)
        ends = []
        for step in (h, -h):
            session.update_weights({name: old[name] + step * dw})
            ends.append(loss(session, x, y_bar))
        session.update_weights({name: old[name]})
        np.testing.assert_allclose((cotangents.weights[name] * dw).sum(), (ends[0] - ends[1]) / (2 * h), rtol=1e-6)


def test_vjp_sums_over_the_batch_and_is_read_only(session: icnnrt.Session, dtype: str) -> None:
    solution = session.argmin(contexts(4))
    y_bar = np.random.default_rng(4).normal(size=(4, N))
    whole = session.vjp(solution, y_bar)
    parts = [session.vjp(solution[i], y_bar[i : i + 1]) for i in range(4)]
    for name, bar in whole.weights.items():
        assert bar.dtype == dtype
        assert not bar.flags.writeable
        np.testing.assert_allclose(bar, sum(p.weights[name] for p in parts), atol=20 * TOLERANCE[dtype])
    np.testing.assert_allclose(whole.x, np.concatenate([p.x for p in parts]), atol=20 * TOLERANCE[dtype])
    with pytest.raises(TypeError):
        whole.weights["new"] = 0  # type: ignore[index]
    strided = session.vjp(solution[::2], y_bar[::2])
    np.testing.assert_allclose(strided.x, whole.x[::2], atol=20 * TOLERANCE[dtype])


def test_vjp_of_no_samples_is_zero(session: icnnrt.Session) -> None:
    cotangents = session.vjp(session.argmin(contexts(0)), np.zeros((0, N)))
    assert cotangents.x.shape == (0, *X_SHAPE)
    assert all((bar == 0).all() for bar in cotangents.weights.values())


def test_vjp_refuses_or_skips_unsafe_samples(session: icnnrt.Session, dtype: str) -> None:
    x = contexts(4)
    x[1] = np.nan
    solution = session.argmin(x)
    y_bar = np.ones((4, N))
    y_bar[1] = np.nan  # what a loss makes of y = NaN
    with pytest.raises(CertificateError, match=r"1 of 4 samples: sample 1: x holds NaN"):
        session.vjp(solution, y_bar)
    skipping = session.vjp(solution, y_bar, on_unsafe="skip")
    assert skipping.skipped.tolist() == [False, True, False, False]
    assert np.isnan(skipping.x[1]).all()
    keep = [0, 2, 3]
    without = session.vjp(session.argmin(x[keep]), y_bar[keep])
    np.testing.assert_allclose(skipping.x[keep], without.x, atol=TOLERANCE[dtype])
    for name, bar in without.weights.items():
        np.testing.assert_allclose(skipping.weights[name], bar, atol=10 * TOLERANCE[dtype])
    nothing = session.vjp(solution[1], y_bar[1:2], on_unsafe="skip")
    assert all((bar == 0).all() for bar in nothing.weights.values())


def test_vjp_exact_needs_every_model_solved(session: icnnrt.Session) -> None:
    solution = session.argmin(contexts(2))
    forged = dataclasses.replace(solution, complementarity_history=np.array([[0.0], [0.5]]))
    with pytest.raises(CertificateError, match=r"sample 1: a model before the last was left with .* 5.0e-01"):
        session.vjp(forged, np.ones((2, N)))
    assert session.vjp(forged, np.ones((2, N)), on_unsafe="skip").skipped.tolist() == [False, True]
    assert not session.vjp(forged, np.ones((2, N)), adjoint="prop3").skipped.any()


@pytest.mark.parametrize(
    ("y_bar", "options", "sentence"),
    [
        (np.ones((3, N)), {}, r"y_bar: expected shape \[2, 3\], but got \[3, 3\]"),
        (np.ones((2, N), complex), {}, "y_bar: expected real numbers"),
        (np.full((2, N), np.inf), {}, "y_bar: expected finite numbers, but got NaN or infinity in sample 0"),
        (np.ones((2, N)), {"adjoint": "implicit"}, "adjoint: expected 'exact' or 'prop3', but got 'implicit'"),
        (np.ones((2, N)), {"on_unsafe": "ignore"}, "on_unsafe: expected 'raise' or 'skip'"),
    ],
)
def test_vjp_refuses_bad_arguments(
    session: icnnrt.Session, y_bar: np.ndarray, options: dict[str, str], sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        session.vjp(session.argmin(contexts(2)), y_bar, **options)


def test_vjp_refuses_what_is_no_solution(session: icnnrt.Session) -> None:
    with pytest.raises(InputError, match=r"solution: expected what session.argmin returned, but got ndarray"):
        session.vjp(np.ones((2, N)), np.ones((2, N)))  # type: ignore[arg-type]


# --- Weights -------------------------------------------------------------------------------------


def test_weights_are_read_only_copies(session: icnnrt.Session, dtype: str) -> None:
    assert set(session.weights) == set(weights(dtype))
    for name, array in weights(dtype).items():
        np.testing.assert_array_equal(session.weights[name], array, strict=True)
        with pytest.raises(ValueError, match="read-only"):
            session.weights[name][...] = 0
    with pytest.raises(TypeError):
        session.weights["curvature"] = 0  # type: ignore[index]


def test_an_update_reaches_every_graph_and_leaves_old_solutions_stale(session: icnnrt.Session, dtype: str) -> None:
    x, y = contexts(3), np.zeros((3, N))
    package = Package.open(session.path)
    old, before = session.argmin(x), session.value_and_gradient(x, y)
    session.vjp(old, np.ones((3, N)))
    new = {**weights(dtype), "linear.bias": np.array([5, -5, 1], dtype)}
    session.update_weights({"linear.bias": new["linear.bias"]})
    np.testing.assert_allclose(session.argmin(x).y, truth(new, x), atol=TOLERANCE[dtype])
    assert (session.value_and_gradient(x, y)[1] != before[1]).all()
    with pytest.raises(InputError, match="solution: expected one that argmin computed with the weights this session"):
        session.vjp(old, np.ones((3, N)))
    session.vjp(session.argmin(x), np.ones((3, N)))
    # The package in memory and on the disk is as it was.
    np.testing.assert_array_equal(package.weights["linear.bias"], weights(dtype)["linear.bias"])
    np.testing.assert_array_equal(Package.open(session.path).weights["linear.bias"], weights(dtype)["linear.bias"])


@pytest.mark.parametrize(
    ("new", "sentence"),
    [
        ({"bias": np.zeros(N)}, "no weight 'bias'"),
        ({"linear.bias": np.zeros(N + 1)}, "for 'linear.bias', but got float64"),
        ({"linear.bias": np.zeros(N, np.float16)}, "for 'linear.bias', but got float16"),
        ({"linear.bias": [0.0] * N}, "for 'linear.bias', but got list"),
    ],
)
def test_a_wrong_update_changes_nothing(session: icnnrt.Session, new: Any, sentence: str) -> None:
    before, token = session.argmin(contexts(2)), session.weights_id
    with pytest.raises(InputError, match=sentence):
        session.update_weights({"linear.weight": np.zeros((N, 4), session.dtype), **new})
    assert session.weights_id == token
    np.testing.assert_array_equal(session.argmin(contexts(2)).y, before.y)


def test_constants_of_a_frozen_export_run_but_cannot_be_updated(tmp_path: Path) -> None:
    w = weights()
    graphs = {
        "value": value_graph("float32", w),
        "argmin": argmin_graph("float32", w, overridable=False),
        "adjoint": adjoint_graph("float32", w),
    }
    session = icnnrt.load(build(tmp_path / "p.icnn", graphs=graphs))
    np.testing.assert_allclose(session.argmin(contexts(2)).y, truth(w, contexts(2)), atol=TOLERANCE["float32"])
    with pytest.raises(InputError, match=r"'linear.bias' was exported as a constant"):
        session.update_weights({"linear.bias": np.zeros(N, np.float32)})


def test_a_solution_of_the_same_package_serves_and_of_another_does_not(tmp_path: Path, session: icnnrt.Session) -> None:
    y_bar = np.ones((2, N))
    twin = icnnrt.load(session.path)
    session.vjp(pickle.loads(pickle.dumps(twin.argmin(contexts(2)))), y_bar)  # noqa: S301
    other = icnnrt.load(build(tmp_path / "other.icnn", session.manifest.dtype, q=1.0))
    with pytest.raises(InputError, match="comes from another package"):
        session.vjp(other.argmin(contexts(2)), y_bar)


# --- Solutions as objects ------------------------------------------------------------------------


def test_a_solution_is_indexed_by_sample(session: icnnrt.Session) -> None:
    x = contexts(5)
    x[3] = np.nan
    solution = session.argmin(x)
    assert [len(solution[i]) for i in (0, -1, slice(1, 4), solution.ok, [0, 2])] == [1, 1, 3, 4, 2]
    np.testing.assert_array_equal(solution[-1].y, solution.y[-1:])
    np.testing.assert_array_equal(solution[solution.ok].energy, solution.energy[[0, 1, 2, 4]])
    assert [one.ok[0] for one in solution] == [True, True, True, False, True]
    for ask in (lambda: solution[5], lambda: solution.advice(9)):
        with pytest.raises(IndexError, match=r"sample [59] of 5 samples; give 0\.\.4"):
            ask()
    with pytest.raises(IndexError, match="sample 0 of 0 samples; there is none to give"):
        solution[:0].advice(0)
    assert solution[3].advice(0).startswith("sample 0: x holds NaN")


def test_a_solution_is_frozen_and_pickles(session: icnnrt.Session) -> None:
    solution = session.argmin(contexts(2))
    with pytest.raises(dataclasses.FrozenInstanceError):
        solution.y = np.zeros(2)  # type: ignore[misc]
    with pytest.raises(TypeError):
        solution.info["native"] = True  # type: ignore[index]
    copy = pickle.loads(pickle.dumps(solution))  # noqa: S301
    np.testing.assert_array_equal(copy.y, solution.y)
    assert not copy.y.flags.writeable
    assert dict(copy.info) == dict(solution.info)
    cotangents = session.vjp(solution, np.ones((2, N)))
    again = pickle.loads(pickle.dumps(cotangents))  # noqa: S301
    np.testing.assert_array_equal(again.weights["linear.bias"], cotangents.weights["linear.bias"])
    assert "3 weights and 2 samples, 0 skipped" in repr(cotangents)


def test_the_arrays_of_a_record_cannot_be_made_writeable(session: icnnrt.Session) -> None:
    solution = session.argmin(contexts(4))
    cotangents = session.vjp(solution, np.ones((4, N)))
    copy = pickle.loads(pickle.dumps(solution))  # noqa: S301
    for one in (solution, solution[::2], solution[solution.ok], copy, cotangents):
        for name in one.__slots__:
            value = getattr(one, name)
            for array in value.values() if name == "weights" else [value]:
                if isinstance(array, np.ndarray):
                    with pytest.raises(ValueError, match="WRITEABLE"):
                        array.flags.writeable = True
                    with pytest.raises(ValueError, match="WRITEABLE"):
                        array[:1].flags.writeable = True
    # No copies are made for it, and an array that somebody else holds stays theirs to write.
    mine = solution.gap.copy()
    theirs = dataclasses.replace(solution, gap=mine).gap
    assert np.shares_memory(mine, theirs)
    assert mine.flags.writeable


def test_solutions_outlive_later_runs_and_the_session(session: icnnrt.Session) -> None:
    first = session.argmin(contexts(3))
    y = first.y.copy()
    for seed in range(3):
        session.argmin(contexts(3, seed + 10))
    session.close()
    np.testing.assert_array_equal(first.y, y)


# --- Sessions ------------------------------------------------------------------------------------


def test_a_session_says_what_it_is(session: icnnrt.Session, dtype: str) -> None:
    assert session.dtype == np.dtype(dtype)
    assert session.manifest.name == "tiny"
    assert session.path.name == "tiny.icnn"
    assert repr(session) == f"<EnergySession of tiny: x [2, 2], y [3], {dtype}, CPUExecutionProvider>"


def test_a_closed_session_refuses(session: icnnrt.Session) -> None:
    solution = session.argmin(contexts(1))
    with session:
        pass
    calls = [
        lambda: session.argmin(contexts(1)),
        lambda: session.argmin(contexts(0)),
        lambda: session.value_and_gradient(contexts(1), solution.y),
        lambda: session.vjp(solution, solution.y),
        lambda: session.weights["curvature"],
        lambda: dict(session.weights),
    ]
    for call in calls:
        with pytest.raises(IcnnrtError, match=r"closed; call icnnrt.load again"):
            call()


def test_a_graph_that_is_ready_after_close_serves_its_call_and_is_not_kept(
    session: icnnrt.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner: Runner = session.runner
    make = runner._make

    def make_slowly(role: str) -> Any:
        graph = make(role)
        closing = threading.Thread(target=session.close)  # from another thread, as no lock may be waited for
        closing.start()
        closing.join(10)
        assert not closing.is_alive()
        return graph

    monkeypatch.setattr(runner, "_make", make_slowly)
    assert session.argmin(contexts(2)).ok.all()
    assert runner._graphs.find("argmin") is None
    with pytest.raises(IcnnrtError, match=r"closed; call icnnrt.load again"):
        session.argmin(contexts(2))


def test_load_takes_an_open_package(session: icnnrt.Session) -> None:
    again = icnnrt.load(Package.open(session.path), threads=2)
    np.testing.assert_array_equal(again.argmin(contexts(2)).y, session.argmin(contexts(2)).y)


def test_what_runs_is_what_was_checked(tmp_path: Path) -> None:
    session = icnnrt.load(build(tmp_path / "p.icnn"))
    for file in (tmp_path / "p.icnn").iterdir():
        file.write_bytes(b"changed after it was checked")
    np.testing.assert_allclose(session.argmin(contexts(2)).y, truth(weights(), contexts(2)), atol=2e-6)


def test_eight_threads_agree_with_one(gappy: icnnrt.Session) -> None:
    batches = [contexts(1 + i % 5, seed=i) for i in range(64)]
    expected = [gappy.argmin(x).y for x in batches]
    fresh = icnnrt.load(gappy.path)
    start = threading.Barrier(8)

    def work(worker: int) -> list[np.ndarray]:
        start.wait()
        return [fresh.argmin(x).y for x in batches]

    with ThreadPoolExecutor(8) as pool:
        for answers in pool.map(work, range(8)):
            for got, want in zip(answers, expected, strict=True):
                np.testing.assert_array_equal(got, want)
    assert len(fresh.runner._graphs.find("argmin").idle) <= 8


def test_threads_see_whole_updates_only(session: icnnrt.Session, dtype: str) -> None:
    """W and b are always updated together; a torn pair would give some other y."""
    zero = np.zeros((N, 4), dtype)
    pairs = [{"linear.weight": zero + k, "linear.bias": np.full(N, -4 * k, dtype)} for k in (0, 100)]
    x = np.ones((1, *X_SHAPE))  # Wx + b = 0 with either pair
    session.update_weights(pairs[0])
    stop = threading.Event()

    def solve() -> int:
        count = 0
        while not stop.is_set():
            assert (session.argmin(x).y == 0.5).all()
            count += 1
        return count

    with ThreadPoolExecutor(4) as pool:
        runs = [pool.submit(solve) for _ in range(4)]
        for i in range(200):
            session.update_weights(pairs[i % 2])
        stop.set()
        assert all(run.result() > 0 for run in runs)


def test_nothing_is_printed(tmp_path: Path) -> None:
    path = build(tmp_path / "p.icnn")
    script = (
        f"import icnnrt, numpy as np; s = icnnrt.load({str(path)!r}); r = s.argmin(np.ones((2, 2, 2)));"
        "s.value_and_gradient(r.x, r.y); s.vjp(r, r.y)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


# --- What may be missing or wrong ----------------------------------------------------------------


def test_providers(session: icnnrt.Session, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = "CPUExecutionProvider"
    for providers in ([cpu], [(cpu, {})], None):
        assert icnnrt.load(session.path, providers=providers).argmin(contexts(1)).info["providers"] == (cpu,)
    with pytest.raises(
        ProviderError, match=r"providers: NoneExecutionProvider is not in this onnxruntime, which has .*CPU"
    ):
        icnnrt.load(session.path, providers=["NoneExecutionProvider", cpu])
    for wrong in (cpu, [], [3], [(cpu,)], [(cpu, 3)]):
        with pytest.raises(InputError, match="providers: expected"):
            icnnrt.load(session.path, providers=wrong)  # type: ignore[arg-type]
    monkeypatch.setattr(ort.InferenceSession, "get_providers", lambda self: ["SomeExecutionProvider"])
    with pytest.raises(ProviderError, match="CPUExecutionProvider was asked for, but onnxruntime fell back to"):
        icnnrt.load(session.path).argmin(contexts(1))


def test_a_gpu_that_is_not_there_is_an_error(session: icnnrt.Session) -> None:
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        pytest.skip("this onnxruntime knows no CUDA")
    loaded = icnnrt.load(session.path, providers=["CUDAExecutionProvider"])
    try:
        solution = loaded.argmin(contexts(2))
    except ProviderError as error:
        assert "CUDAExecutionProvider" in str(error)  # noqa: PT017
    else:
        np.testing.assert_allclose(solution.y, session.argmin(contexts(2)).y, atol=1e-5)


@pytest.mark.parametrize("threads", [0, -1, 1.0, True, "2"])
def test_wrong_threads_are_refused(session: icnnrt.Session, threads: Any) -> None:
    with pytest.raises(InputError, match="threads: expected an integer from 1"):
        icnnrt.load(session.path, threads=threads)


def test_without_onnxruntime_packages_open_and_sessions_say_what_to_install(
    session: icnnrt.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    package = Package.open(session.path)
    with pytest.raises(MissingDependencyError, match=r"'icnnrt\[cpu\]' or pip install 'icnnrt\[gpu\]', never both\.$"):
        icnnrt.load(package)
    # What is left of two installed onnxruntimes when one of them is removed.
    monkeypatch.setitem(sys.modules, "onnxruntime", type(sys)("onnxruntime"))
    with pytest.raises(MissingDependencyError, match="installed in part only; pip uninstall"):
        icnnrt.load(package)


def test_graphs_that_are_not_what_icnnrt_feeds_are_refused(tmp_path: Path) -> None:
    w = weights()
    good = {
        "value": value_graph("float32", w),
        "argmin": argmin_graph("float32", w),
        "adjoint": adjoint_graph("float32", w),
    }
    swapped = icnnrt.load(build(tmp_path / "a.icnn", graphs={**good, "argmin": good["value"]}))
    with pytest.raises(PackageError, match=r"argmin.onnx should take x, y_init .*, but has no input y_init"):
        swapped.argmin(contexts(1))
    other = icnnrt.load(build(tmp_path / "b.icnn", graphs=good, dtype="float64", weights=w))
    sentence = (
        r"argmin.onnx: expected x to be float64 \[batch, 2, 2\] as the manifest has it, but the graph has float32"
    )
    with pytest.raises(PackageError, match=sentence):
        other.argmin(contexts(1))
    model = onnx.load_from_string(good["argmin"])
    model.graph.node[0].op_type = "NoSuchOperator"
    broken = icnnrt.load(build(tmp_path / "c.icnn", graphs={**good, "argmin": model.SerializeToString()}))
    with pytest.raises(PackageError, match=r"argmin.onnx: onnxruntime cannot load it"):
        broken.argmin(contexts(1))


def cuts(n: int) -> dict[str, Any]:
    return {"solver": SolverSpec(iterations=n, steps=5, gap_tolerance=1e-4, residual_tolerance=1e-3)}


@pytest.mark.parametrize(
    ("changes", "role", "expected"),
    [
        (cuts(2), "argmin", "lam to be T [batch, 2]"),
        (cuts(2), "adjoint", "slopes to be T [batch, 2, 3]"),
        ({"y_shape": (4,)}, "value", "y to be T [batch, 4]"),
        ({"y_shape": (4,)}, "argmin", "y_init to be T [batch, 4]"),
        ({"y_shape": (4,)}, "adjoint", "y to be T [batch, 4]"),
        *(({"x_shape": (4, 2)}, role, "x to be T [batch, 4, 2]") for role in ("value", "argmin", "adjoint")),
        *(({"x_shape": (4,)}, role, "x to be T [batch, 4]") for role in ("value", "argmin", "adjoint")),
    ],
)
def test_a_manifest_that_disagrees_with_the_graphs_is_refused(
    tmp_path: Path, dtype: str, changes: dict[str, Any], role: str, expected: str
) -> None:
    session = icnnrt.load(build(tmp_path / "p.icnn", dtype, **changes))
    with pytest.raises(PackageError) as caught:
        session.runner._graph(role)
    message = str(caught.value)
    expected = expected.replace("T", dtype)
    assert f"{role}.onnx: expected {expected} as the manifest has it, but the graph has {dtype} [batch, " in message
    assert message.endswith("; export the package again.")


def redeclared(data: bytes, name: str, dims: list[Any] | None) -> bytes:
    """The graph with another declaration of its output; None for no shape at all."""
    model = onnx.load_from_string(data)
    old = next(output for output in model.graph.output if output.name == name)
    old.CopyFrom(helper.make_tensor_value_info(name, old.type.tensor_type.elem_type, dims))
    return model.SerializeToString()


def renamed(data: bytes, old: str, new: str) -> bytes:
    """The graph with the names of two outputs, or of an output and a value, exchanged."""
    model = onnx.load_from_string(data)
    for output in model.graph.output:
        output.name = {old: new, new: old}.get(output.name, output.name)
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = [{old: new, new: old}.get(name, name) for name in names]
    return model.SerializeToString()


@pytest.mark.parametrize(
    ("role", "pair", "sentence"),
    [
        ("argmin", ("residual", "gap"), r"argmin.onnx: expected gap to be float64 \[batch\] .* float64 \[batch, 3\]"),
        ("argmin", ("energy", "offsets"), r"expected offsets to be float32 \[batch, 1\] .* has float64 \[batch\]"),
        ("value", ("f", "gradient"), r"value.onnx: expected f to be float32 \[batch\] .* has float32 \[batch, 3\]"),
        (
            "adjoint",
            ("theta_bar.linear.weight", "theta_bar.curvature"),
            r"expected theta_bar.linear.weight to be float32 \[3, 4\] .* has float32 \[3\]",
        ),
        ("adjoint", ("x_bar", "slope_mismatch"), r"expected x_bar to be float32 \[batch, 2, 2\] .* float32 \[batch\]"),
    ],
)
def test_outputs_of_another_shape_or_dtype_are_refused(
    tmp_path: Path, role: str, pair: tuple[str, str], sentence: str
) -> None:
    w = weights()
    graphs = {
        "value": value_graph("float32", w),
        "argmin": argmin_graph("float32", w),
        "adjoint": adjoint_graph("float32", w),
    }
    session = icnnrt.load(build(tmp_path / "p.icnn", graphs={**graphs, role: renamed(graphs[role], *pair)}))
    with pytest.raises(PackageError, match=sentence):
        session.runner._graph(role)


def test_a_graph_of_one_batch_size_is_refused(tmp_path: Path) -> None:
    w = weights()
    model = onnx.load_from_string(value_graph("float32", w))
    for value in (*model.graph.input, *model.graph.output):
        if value.name in ("x", "y", "f", "gradient"):
            value.type.tensor_type.shape.dim[0].dim_value = 1
    graphs = {
        "value": model.SerializeToString(),
        "argmin": argmin_graph("float32", w),
        "adjoint": adjoint_graph("float32", w),
    }
    session = icnnrt.load(build(tmp_path / "p.icnn", graphs=graphs))
    with pytest.raises(PackageError, match=r"expected x to be float32 \[batch, 2, 2\] .* has float32 \[1, 2, 2\]"):
        session.value_and_gradient(contexts(1), np.zeros((1, N)))


@pytest.mark.parametrize("bad", [[], [0]])
def test_outputs_that_only_a_run_shows_to_be_of_another_shape_are_refused(tmp_path: Path, bad: list[int]) -> None:
    """A Compress by a computed condition leaves every size open where the graph is declared."""
    w = weights()
    b = Builder("float32", w)
    f, g = b.energy("y")
    b("Identity", f, out="f")
    wide = b("Concat", g, g, axis=1)
    length = b("Gather", b("Shape", wide), b.constant([1], np.int64))  # 2n, which no inference follows
    keep = b("Less", b("Range", b.constant(0, np.int64), b("Squeeze", length), b.constant(1, np.int64)), length)
    b("Compress", wide, keep, axis=1, out="gradient")
    value = b.finish(
        [("x", b.T, ["batch", *X_SHAPE]), ("y", b.T, ["batch", N])],
        [("f", b.T, ["batch"]), ("gradient", b.T, ["batch", "open"])],
    )
    graphs = {"value": value, "argmin": argmin_graph("float32", w), "adjoint": adjoint_graph("float32", w)}
    session = icnnrt.load(build(tmp_path / "p.icnn", graphs=graphs))
    x = contexts(3)
    x[bad] = np.nan
    with pytest.raises(PackageError, match=r"value.onnx: expected gradient to be \[\d, 3\] .* graph has \[\d, 6\]"):
        session.value_and_gradient(x, np.zeros((3, N)))


def test_sizes_left_open_are_taken_for_what_they_turn_out_to_be(tmp_path: Path, dtype: str) -> None:
    w = weights(dtype)
    graphs = {
        "value": redeclared(redeclared(value_graph(dtype, w), "gradient", ["b", "n"]), "f", None),
        "argmin": redeclared(argmin_graph(dtype, w), "slopes", ["batch", "cuts", "n"]),
        "adjoint": adjoint_graph(dtype, w),
    }
    session = icnnrt.load(build(tmp_path / "p.icnn", dtype, graphs=graphs))
    solution = session.argmin(contexts(2))
    assert solution.ok.all()
    assert session.value_and_gradient(solution.x, solution.y)[0].shape == (2,)


def test_a_graph_whose_tensor_bears_another_name_is_refused(tmp_path: Path) -> None:
    """It would be read from whatever weights.safetensors lies in the working directory."""
    model = onnx.load_from_string(value_graph("float32", weights()))
    old = next(t for t in model.graph.initializer if t.name == "linear.bias")
    alien = TensorProto()
    alien.CopyFrom(old)
    alien.name = "alien"
    model.graph.initializer.append(alien)
    w = weights()
    graphs = {
        "value": model.SerializeToString(),
        "argmin": argmin_graph("float32", w),
        "adjoint": adjoint_graph("float32", w),
    }
    session = icnnrt.load(build(tmp_path / "p.icnn", graphs=graphs))
    with pytest.raises(PackageError, match="should bear the names of weights, each once"):
        session.value_and_gradient(contexts(1), np.zeros((1, N)))


def test_a_failing_run_is_one_sentence_and_leaves_the_session_usable(
    session: icnnrt.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Any, *args: Any) -> None:
        raise RuntimeError("out of memory\nand much detail")

    with monkeypatch.context() as patch:
        patch.setattr(ort.InferenceSession, "run_with_iobinding", fail)
        sentence = r"argmin.onnx: onnxruntime failed on a batch of 2 \(out of memory\); run smaller batches\.$"
        with pytest.raises(IcnnrtError, match=sentence):
            session.argmin(contexts(2))
        patch.setattr(ort.InferenceSession, "run_with_iobinding", lambda *_: {}["bad kernel"])
        with pytest.raises(IcnnrtError, match=r"\('bad kernel'\); icnnrt verify says whether the package is sound"):
            session.argmin(contexts(2))
    assert session.argmin(contexts(2)).ok.all()
    session.update_weights({})


def test_the_runner_makes_sessions_when_they_are_needed(session: icnnrt.Session) -> None:
    runner: Runner = session.runner
    assert not runner._graphs._made
    session.argmin(contexts(1))
    assert set(runner._graphs._made) == {"argmin"}


# --- The verdict ---------------------------------------------------------------------------------


def verdict(**changes: Any) -> Status:
    sample: dict[str, Any] = {
        "x_finite": np.array([True]),
        "y": np.array([[0.25, 0.75]]),
        "energy": np.array([-5.0]),
        "lower_bound": np.array([-5.0]),
        "gap": np.array([0.0]),
        "residual": np.zeros((1, 3)),
        "tolerances": certificate.Tolerances(1e-4, 1e-3),
        "rounding": np.array([1e-6]),
        "uncertainty": np.array([1e-7]),
        "violation": np.array([0.0]),
        **{k: np.array(v) for k, v in changes.items()},
    }
    status = certificate.status_of(**sample)
    assert status.dtype == np.int8
    return Status(status[0])


def test_the_verdict_and_which_of_two_wins() -> None:
    assert verdict() == Status.CONVERGED
    assert verdict(gap=[4.9e-4]) == Status.CONVERGED  # tolerances are relative to |lower_bound| = 5
    assert verdict(gap=[5.1e-4]) == Status.GAP
    assert verdict(gap=[5e-7], residual=[[0, 0, 1e-6]]) == Status.CONVERGED  # negative within rounding
    assert verdict(gap=[1e-2], residual=[[0, 0, 4.9e-3]]) == Status.GAP
    assert verdict(gap=[1e-2], residual=[[0, 0, 5.1e-3]]) == Status.SOLVER
    assert verdict(residual=[[0, 5.1e-3, 0]]) == Status.SOLVER
    assert verdict(gap=[-2e-6]) == Status.NOT_CONVEX
    assert verdict(gap=[1e-2], residual=[[0, 0, 2e-2]]) == Status.NOT_CONVEX
    assert verdict(violation=[2e-6], gap=[1e-2]) == Status.NOT_CONVEX
    for name, bad in (("energy", [np.nan]), ("lower_bound", [-np.inf]), ("gap", [np.inf]), ("y", [[np.nan, 0.5]])):
        assert verdict(**{name: bad}) == Status.NOT_FINITE
        assert verdict(**{name: bad}, x_finite=[False]) == Status.NOT_FINITE_INPUT
    assert verdict(residual=[[np.nan, 0, 0]], violation=[1.0]) == Status.NOT_FINITE


def test_violation_finds_a_cut_above_the_energy() -> None:
    """f(y) = −y² has tangents above it, f(y) = y² has not."""
    points = np.array([[[0.2], [0.5], [0.9]]])
    for sign in (1.0, -1.0):
        f, g = sign * points[..., 0] ** 2, sign * 2 * points
        offsets = f + (g * (0.5 - points)).sum(2)
        violation = certificate.convexity_violation(g, offsets, points)
        # Tangent at 0.9 and energy at 0.2, or the other way round: they differ by the square of the distance.
        np.testing.assert_allclose(violation, [0.0 if sign > 0 else 0.49], atol=1e-15)


def test_kkt_residuals_of_a_solution_built_backwards() -> None:
    """Choose λ and G, then e such that every cut is active at y = σ(−G'λ)."""
    rng = np.random.default_rng(0)
    B, K, n = 4, 3, 5
    G, λ = rng.normal(size=(B, K, n)), rng.dirichlet(np.ones(K), size=B)
    y = references.sigmoid(-np.einsum("bkn,bk->bn", G, λ))
    e = -np.einsum("bkn,bn->bk", G, y - 0.5)
    assert certificate.kkt_residuals(G, e, λ, y).max() < 1e-15
    energy = references.negative_entropy(y)  # max v = 0
    assert np.abs(certificate.duality_gap(energy, G, e, λ)).max() < 1e-14
    e[:, 0] += 0.5
    np.testing.assert_allclose(certificate.kkt_residuals(G, e, λ, y)[:, 2], 0.5 * (1 - λ[:, 0]), atol=1e-14)
    λ[1, 0] += 0.1
    np.testing.assert_allclose(certificate.kkt_residuals(G, e, λ, y)[1, 1], 0.1, atol=1e-14)
