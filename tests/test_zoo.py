"""Any torch energy exports: every style of the zoo, from torch to onnxruntime, in float32 and float64, for any batch.

An export costs seconds whatever its size, so several networks are exported together: a choir is one module that gives
each member its own columns of x and y, and whose energy is the sum. The gradient's columns and the Hessian's blocks are
then each member's own.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
import zoo
from amounts import amount
from scipy import special
from torch import Tensor, nn
from torch.nn import functional as F

from icnnrt.convexity import Repeated, grounds, prove
from icnnrt.errors import ExportError
from icnnrt_exporters.checks.preconditions import check_energy, float64_judge
from icnnrt_exporters.graphs.onnx_head import to_onnx
from icnnrt_exporters.tracing import decompositions, error_function, heads, windows
from icnnrt_exporters.tracing.energy_graph import EnergyGraph, trace_energy, trace_gradient
from icnnrt_exporters.tracing.heads import Head
from icnnrt_exporters.tracing.smooth_softplus import smoothed

BATCHES = (1, 3, 128)
# Relative to the largest entry. float64 differs by the order of sums; second derivatives add up more of them.
TOLERANCE = {
    torch.float64: {"f": 1e-12, "gradient": 1e-12, "hessian": 1e-9},
    torch.float32: {"f": 1e-5, "gradient": 1e-5},
}
ENERGIES = [name for name, style in zoo.ZOO.items() if style.kind == "energy"]
GRADIENTS = [name for name, style in zoo.ZOO.items() if style.kind == "gradient"]
# What works in place, or has no translation of its own, makes torch.onnx take the whole choir apart once more, the
# dearest step of an export; these sing together. Rounded scalars would show in the sum of all: they sing alone.
TAKEN_APART = ["max_affine", "quadratics", "recurrent_cell", "weight_normed", "norms"]
OTHERS = [name for name in ENERGIES if name not in (*TAKEN_APART, "scalars")]
CHOIRS = [*(OTHERS[i::3] for i in range(3)), TAKEN_APART, ["scalars"]]
# Where float32 takes another way than float64: kernels of its own for convolutions, erf and sigmoid; rounding.
SINGLE = [
    *("convolutional_context", "grouped_context", "decoded_context", "image_energy", "recurrent", "attentive_context"),
    *("normed", "error_function", "scalars", "selu", "largest_sum", "log_sum_exp"),
]
# Second derivatives of every network would take minutes to convert; these are of every kind and convert in seconds.
DENSE = ["gated", "convolutional_context", "parametrised", "leaky_squared", "hinge_spline", "hypernetwork", "concave"]


class Choir(nn.Module):
    """Several networks of the zoo as one."""

    def __init__(self, names: list[str], dtype: torch.dtype) -> None:
        super().__init__()
        self.members = nn.ModuleDict({name: zoo.build(name, dtype) for name in names})
        self.x_sizes = [math.prod(zoo.ZOO[name].x_shape) for name in names]
        self.y_sizes = [zoo.ZOO[name].n for name in names]

    def each(self, x: Tensor, y: Tensor) -> list[Tensor]:
        parts = zip(self.members.items(), x.split(self.x_sizes, 1), y.split(self.y_sizes, 1), strict=True)
        return [member(x_i.reshape(-1, *zoo.ZOO[name].x_shape), y_i) for (name, member), x_i, y_i in parts]

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        results = self.each(x, y)
        if zoo.ZOO[next(iter(self.members))].kind == "gradient":
            return torch.cat(results, 1)
        return torch.cat([f.reshape(-1, 1) for f in results], 1).sum(1)


def choir_examples(names: list[str], B: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    parts = [zoo.examples(name, B, dtype, seed + i) for i, name in enumerate(names)]
    return torch.cat([x.reshape(B, -1) for x, _ in parts], 1), torch.cat([y for _, y in parts], 1)


def serialised(head: Head, theta: dict[str, Tensor]) -> bytes:
    """The head as an ONNX model, weights as plain initialisers."""
    model = to_onnx(head)
    for v in list(model.graph.inputs):
        assert v.name is not None
        if v.name in theta:
            v.const_value = ir.tensor(theta[v.name].numpy(), name=v.name)
            model.graph.inputs.remove(v)
            model.graph.register_initializer(v)
    return ir.to_proto(model).SerializeToString()


def loaded(model: bytes) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def session(head: Head, theta: dict[str, Tensor]) -> onnxruntime.InferenceSession:
    return loaded(serialised(head, theta))


def answer(run: onnxruntime.InferenceSession, **inputs: Tensor) -> dict[str, np.ndarray]:
    """Outputs by name; an input that the energy does not depend on is left out of the graph's own."""
    wanted = {i.name for i in run.get_inputs()}
    feeds = {name: t.detach().numpy() for name, t in inputs.items() if name in wanted}
    return dict(zip([o.name for o in run.get_outputs()], run.run(None, feeds), strict=True))


def apart(got: np.ndarray, true: Tensor) -> float:
    expected = true.detach().numpy()
    assert got.shape == expected.shape
    assert got.dtype in (np.float32, np.float64)
    return float(np.abs(got - expected).max() / max(1.0, np.abs(expected).max()))


def columns(g: Tensor, y: Tensor) -> Tensor:
    """∂g_i/∂y_j, [B, n, n]."""
    rows = [
        torch.autograd.grad(g[:, i].sum(), y, retain_graph=True, materialize_grads=True)[0] for i in range(g.shape[1])
    ]
    return torch.stack(rows, 1)


class Sung(NamedTuple):
    """A choir's session, and torch's answers to the same inputs."""

    names: list[str]
    dtype: torch.dtype
    got: dict[int, dict[str, np.ndarray]]
    true: dict[int, dict[str, Tensor]]
    judge: Choir
    model: bytes

    def block(self, name: str) -> slice:
        i = self.names.index(name)
        start = sum(self.judge.y_sizes[:i])
        return slice(start, start + self.judge.y_sizes[i])


SUNG: dict[tuple[tuple[str, ...], torch.dtype, bool], Sung | Exception] = {}


def sing(names: list[str], dtype: torch.dtype, dense: bool = False) -> Sung:
    """Export a choir, once, and run it at every batch; dense: with its Hessian."""
    key = (tuple(names), dtype, dense)
    if key not in SUNG:
        try:
            SUNG[key] = _sing(names, dtype, dense)
        except Exception as error:  # a choir that fails fails every member's test, and is not tried again for each
            SUNG[key] = error
    sung = SUNG[key]
    if isinstance(sung, Exception):
        raise sung
    return sung


def _sing(names: list[str], dtype: torch.dtype, dense: bool) -> Sung:
    choir = Choir(names, dtype).eval()
    x, y = choir_examples(names, 4, dtype)
    gradient = zoo.ZOO[names[0]].kind == "gradient"
    graph = (trace_gradient if gradient else trace_energy)(choir, x, y)
    head = heads.hessian if dense else heads.gradient if gradient else heads.value_and_gradient
    model = serialised(head(graph, x[:1].repeat(7, 1), y[:1].repeat(7, 1)), graph.theta)
    run = loaded(model)
    judge = smoothed(Choir(names, torch.float64).eval())
    assert isinstance(judge, Choir)
    got, true = {}, {}
    for B in BATCHES:
        x, y = choir_examples(names, B, dtype, seed=100)
        got[B] = answer(run, x=x, y=y)
        X, Y = x.double(), y.double().requires_grad_()
        out = judge(X, Y)
        g = out if gradient else torch.autograd.grad(out.sum(), Y, create_graph=True)[0]
        true[B] = {"gradient": g.detach()} | ({} if gradient else {"f": out.detach()})
        if dense:
            true[B]["hessian"] = columns(g, Y) if g.requires_grad else Y.new_zeros(B, Y.shape[1], Y.shape[1])
    return Sung(names, dtype, got, true, judge, model)


CASES = [
    *((name, choir, torch.float64) for choir in (*CHOIRS, GRADIENTS) for name in choir),
    *((name, choir, torch.float32) for choir in (SINGLE, ["norms"], GRADIENTS) for name in choir),
]


def cases(of: list[tuple[str, list[str], torch.dtype]]) -> list[Any]:
    """As parameters: convolutions and others once more in float32 are slow."""
    slow = [pytest.mark.slow]
    return [pytest.param(*one, marks=slow if one[1] is SINGLE else [], id=f"{one[0]}-{str(one[2])[6:]}") for one in of]


@pytest.mark.parametrize(("name", "choir", "dtype"), cases(CASES))
def test_onnxruntime_equals_torch(name: str, choir: list[str], dtype: torch.dtype) -> None:
    sung = sing(choir, dtype)
    own = sung.block(name)
    for B in BATCHES:
        got, true, bound = sung.got[B], sung.true[B], TOLERANCE[dtype]
        assert apart(got["gradient"][:, own], true["gradient"][:, own]) <= bound["gradient"]
        if "f" in true:
            assert apart(got["f"], true["f"]) <= bound["f"]


def solo(sung: Sung, name: str) -> bytes:
    """The choir's graph with this member's energy alone as its output f, and less what that is not computed from."""
    model = onnx.load_from_string(sung.model)
    made = {output: node for node in model.graph.node for output in node.output}
    together = made["f"]
    del model.graph.output[1:]
    if len(sung.names) == 1:
        return model.SerializeToString()
    (parts,) = (node for node in model.graph.node if node.output[0] == together.input[0])
    assert (together.op_type, parts.op_type, len(parts.input)) == ("ReduceSum", "Concat", len(sung.names))
    together.input[0] = parts.input[sung.names.index(name)]
    return model.SerializeToString()


VERDICTS = [(name, choir, dtype) for name, choir, dtype in CASES if zoo.ZOO[name].kind == "energy"]


@pytest.mark.parametrize(("name", "choir", "dtype"), cases(VERDICTS))
def test_the_certificate_says_so(name: str, choir: list[str], dtype: torch.dtype) -> None:
    """Of each member's part of its choir's graph, as ONNX Runtime has it."""
    verdict = prove(solo(sing(choir, dtype), name), {})
    assert verdict.verdict == zoo.ZOO[name].verdict, verdict.sentence()


PROVEN = [(name, choir, dtype) for name, choir, dtype in VERDICTS if zoo.ZOO[name].verdict == "proven"]


@pytest.mark.parametrize(("name", "choir", "dtype"), cases(PROVEN))
def test_what_a_proof_rests_on_lasts(name: str, choir: list[str], dtype: torch.dtype) -> None:
    """Many steps that only signs and repeated proofs hold, then the proof from the beginning."""
    sung = sing(choir, dtype)
    model, own = solo(sung, name), f"members.{name}."
    tensors = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load_from_string(model).graph.initializer}
    weights = {n: tensors[n] for n, _ in sung.judge.named_parameters() if n.startswith(own) and n in tensors}
    found = grounds(model, {}, weights)
    assert found is not None
    again = Repeated(model, {}, found, weights) if found.values else None
    rng, refused = np.random.default_rng(len(name)), 0
    pull = {n: rng.standard_normal(w.shape) for n, w in weights.items()}
    for _ in range(amount(200)):
        new = {n: w - 0.01 * np.sign(pull[n] + 0.5 * rng.standard_normal(w.shape)) for n, w in weights.items()}
        new = {n: found.signs[n].project(w) if n in found.signs else w for n, w in new.items()}
        if again is not None and again.failure(new):
            refused += 1
        else:
            weights = {n: w.astype(tensors[n].dtype) for n, w in new.items()}
    assert found.values or not refused
    moved = onnx.load_from_string(model)
    for tensor in moved.graph.initializer:
        if tensor.name in weights:
            tensor.CopyFrom(onnx.numpy_helper.from_array(weights[tensor.name], tensor.name))
    verdict = prove(moved.SerializeToString(), {})
    assert verdict.verdict == "proven", verdict.sentence()


DENSE_CHOIRS = [pytest.param(DENSE, marks=pytest.mark.slow), GRADIENTS]
each_dense_choir = pytest.mark.parametrize("choir", DENSE_CHOIRS, ids=["energies", "gradients"])


@each_dense_choir
def test_hessians_equal_torch(choir: list[str]) -> None:
    sung = sing(choir, torch.float64, dense=True)
    for B in BATCHES:
        for output, true in sung.true[B].items():
            assert apart(sung.got[B][output], true) <= TOLERANCE[torch.float64][output], output


@each_dense_choir
def test_hessians_are_symmetric_and_members_do_not_meet(choir: list[str]) -> None:
    sung = sing(choir, torch.float64, dense=True)
    H = sung.got[3]["hessian"]
    for name in choir:
        own = sung.block(name)
        others = np.ones(H.shape[1], bool)
        others[own] = False
        assert not H[:, own][:, :, others].any()
        block = H[:, own, own]
        if zoo.ZOO[name].kind == "energy":
            np.testing.assert_array_equal(block, block.transpose(0, 2, 1))
        else:
            skew = np.abs(block - block.transpose(0, 2, 1)).max()
            assert (skew > 1e-3) if zoo.ZOO[name].verdict == "violated" else (skew < 1e-12)


def test_a_column_counts_as_one_energy_a_sample() -> None:
    energy = zoo.build("column", torch.float32)
    x, y = zoo.examples("column", 5, torch.float32)
    judge = float64_judge(energy)
    assert energy(x, y).shape == (5, 1)
    assert judge(x.double(), y.double()).shape == (5,)
    assert dict(judge.named_parameters()).keys() == dict(energy.named_parameters()).keys()
    check_energy(energy, judge, x, y)


@pytest.mark.parametrize("name", ENERGIES)
def test_verdicts_are_true(name: str) -> None:
    """By Jensen's inequality at the middle of many chords."""
    energy, n = zoo.build(name, torch.float64), zoo.ZOO[name].n
    generator = torch.Generator().manual_seed(0)
    x, _ = zoo.examples(name, 4000, torch.float64)
    a, b = torch.rand(2, 4000, n, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        above = energy(x, (a + b) / 2) - (energy(x, a) + energy(x, b)) / 2
    if zoo.ZOO[name].verdict == "violated":
        assert float(above.max()) > 1e-4
    else:
        assert float(above.max()) < 1e-9  # torch's softplus steps down by 2e-9 at its threshold of 20


def traced(name: str, dtype: torch.dtype) -> tuple[nn.Module, EnergyGraph, Tensor, Tensor]:
    energy = zoo.build(name, dtype)
    x, y = zoo.examples(name, 7, dtype)
    trace = trace_energy if zoo.ZOO[name].kind == "energy" else trace_gradient
    return energy, trace(energy, x, y), x, y


SLOW_IMAGE = pytest.param("image_energy", torch.float32, marks=pytest.mark.slow)
SLOW_GROUPS = pytest.param("grouped_context", torch.float64, marks=pytest.mark.slow)


@pytest.mark.parametrize(("name", "dtype"), [("gated", torch.float64), ("monotone", torch.float64), SLOW_IMAGE])
def test_hessian_products(name: str, dtype: torch.dtype) -> None:
    """From x; convolutions keep their own kernel in float32, backwards and twice so."""
    energy, graph, x, y = traced(name, dtype)
    run = session(heads.hessian_product(graph, x, y), graph.theta)
    judge = energy.double()
    for B in BATCHES:
        x, y = zoo.examples(name, B, dtype, seed=1)
        v = torch.linspace(-1, 1, y.numel(), dtype=dtype).reshape(y.shape)
        X, Y = x.double(), y.double().requires_grad_()
        out = judge(X, Y)
        g = out if zoo.ZOO[name].kind == "gradient" else torch.autograd.grad(out.sum(), Y, create_graph=True)[0]
        true = (columns(g, Y) @ v.double()[:, :, None]).squeeze(2)
        got = answer(run, x=x, y=y, y_dot=v)["hvp"]
        assert apart(got, true) <= (1e-9 if dtype is torch.float64 else 1e-5)


@pytest.mark.parametrize(("name", "dtype"), [("convolutional_context", torch.float32), SLOW_GROUPS])
def test_gradients_in_x(name: str, dtype: torch.dtype) -> None:
    energy, graph, x, y = traced(name, dtype)
    run = session(heads.gradient_x(graph, x, y), graph.theta)
    judge = energy.double()
    for B in BATCHES:
        x, y = zoo.examples(name, B, dtype, seed=1)
        X = x.double().requires_grad_()
        (true,) = torch.autograd.grad(judge(X, y.double()).sum(), X)
        got = answer(run, x=x, y=y)["gradient_x"]
        assert apart(got, true) <= (1e-12 if dtype is torch.float64 else 1e-5)


def test_a_gradient_map_has_no_value() -> None:
    _, graph, x, y = traced("gradient_map", torch.float64)
    for head in (heads.value_and_gradient, heads.gradient_x, heads.hessian_vector_product):
        with pytest.raises(ExportError, match="the forward returns its gradient"):
            head(graph, x, y)
    head = heads.gradient(graph, x, y)
    assert head.outputs == ["gradient"]


CONVOLUTIONS = [
    # kernel, stride, padding, dilation, groups, output padding of the transposed one
    ((3, 2), 2, 1, 1, 1, 1),
    ((3, 3), 1, 0, 2, 2, 0),
    ((2, 3), 3, 1, 2, 2, 1),
    ((1, 1), 1, 0, 1, 4, 0),
]


@pytest.mark.parametrize(("k", "s", "p", "d", "G", "left"), CONVOLUTIONS)
def test_convolutions_as_products(k: tuple[int, int], s: int, p: int, d: int, G: int, left: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 4, 9, 8, dtype=torch.float64)
    W, b = torch.randn(8, 4 // G, *k, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    S = [
        windows.selection((N, windows.convolved(N, k_i, s, p, d), k_i, s, p, d), torch.float64)
        for N, k_i in zip((9, 8), k, strict=True)
    ]
    torch.testing.assert_close(windows.convolve(x, W, b, G, k, *S), F.conv2d(x, W, b, s, p, d, G), rtol=0, atol=1e-13)
    W, b = torch.randn(4, 3, *k, dtype=torch.float64), torch.randn(3 * G, dtype=torch.float64)
    true = F.conv_transpose2d(x, W, b, s, p, left, G, d)
    S = [
        windows.selection((N, places, k_i, s, p, d), torch.float64)
        for N, places, k_i in zip(true.shape[2:], (9, 8), k, strict=True)
    ]
    torch.testing.assert_close(windows.convolve_transposed(x, W, b, G, k, *S), true, rtol=0, atol=1e-13)


class Pools(nn.Module):
    """Every window over an image that the lowering knows, with the options that change what it computes."""

    def each(self, image: Tensor) -> list[Tensor]:
        return [
            F.avg_pool2d(image, 3, 2, 1, ceil_mode=True, count_include_pad=False),
            F.avg_pool2d(image, 4, 3, 2, ceil_mode=True),
            F.avg_pool2d(image, 2, divisor_override=3),
            F.max_pool2d(image, 3, 2, 1, dilation=2, ceil_mode=True),
            F.max_pool2d(image.clamp(min=0.5), 3, 1),  # many equal entries: the first takes the gradient
            F.adaptive_avg_pool2d(image, (3, 4)),
            F.adaptive_max_pool2d(image, (4, 3)),
            F.interpolate(image, scale_factor=1.5, mode="nearest"),
            F.interpolate(image, (5, 9), mode="bilinear", align_corners=True),
            F.interpolate(image, (9, 4), mode="bicubic"),
            F.pad(image, (1, 2, 0, 3), mode="reflect"),
            F.pad(image, (1, 0, 2, 1), mode="replicate"),
            F.avg_pool1d(image.flatten(2), 5, 3),
            F.max_pool1d(image.flatten(1, 2), 2, padding=1),
            F.max_pool3d(image[:, None], (1, 2, 3)),
        ]

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        image = y.reshape(y.shape[0], 1, 6, 7)
        return torch.cat([(h * h + h).flatten(1) for h in self.each(image)], 1).sum(1) + x.sum(1)


def test_pooling_interpolation_and_padding() -> None:
    """Values, gradients and curvature of the lowered graph are torch's; the networks above run such graphs."""
    pools = Pools()
    x, y = torch.randn(7, 1, dtype=torch.float64), torch.rand(7, 42, dtype=torch.float64)
    graph = trace_energy(pools, x, y)
    for B in BATCHES:
        x, y = torch.randn(B, 1, dtype=torch.float64), torch.rand(B, 42, dtype=torch.float64).requires_grad_()
        v = torch.randn(B, 42, dtype=torch.float64)
        found, true = graph.value(graph.theta, graph.prepare(graph.theta, x), y), pools(x, y)
        slopes = [torch.autograd.grad(f.sum(), y, create_graph=True)[0] for f in (found, true)]
        products = [torch.autograd.grad((g * v).sum(), y)[0] for g in slopes]
        torch.testing.assert_close(found, true, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(products[0], products[1], rtol=1e-13, atol=1e-13)


FUNCTIONS = [
    (error_function.erf, special.erf, -7, 7),
    (error_function.erfc, special.erfc, -7, 26),
    (decompositions.expm1, np.expm1, -50, 50),
    (decompositions.sinh, np.sinh, -50, 50),
    (decompositions.cosh, np.cosh, -50, 50),
    (decompositions.tan, np.tan, -1.5, 1.5),
    (decompositions.asinh, np.arcsinh, -1e3, 1e3),
    (decompositions.acosh, np.arccosh, 1.001, 1e3),
    (decompositions.atanh, np.arctanh, -0.999, 0.999),
]


@pytest.mark.parametrize(("ours", "true", "low", "high"), FUNCTIONS, ids=[f[1].__name__ for f in FUNCTIONS])
def test_functions_that_onnxruntime_lacks_in_float64(ours: Any, true: Any, low: float, high: float) -> None:
    s = torch.cat([torch.linspace(low, high, 20001, dtype=torch.float64), torch.logspace(-12, -1, 50).double()])
    s = s[(s >= low) & (s <= high)]
    np.testing.assert_allclose(ours(s).numpy(), true(s.numpy()), rtol=1e-14)


class Thresholds(nn.Module):
    """softplus as torch spells it: positional, by keyword, as a module, and with a threshold of somebody's own."""

    def __init__(self, own: float = 20.0) -> None:
        super().__init__()
        self.act, self.own = nn.Softplus(beta=2.0), own

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        s = F.softplus(y) + F.softplus(input=y, beta=3, threshold=25) + self.act(y) + F.softplus(y + x, 1.0, self.own)
        return s.sum(1)


@pytest.mark.parametrize("own", [20.0, 5.0])
def test_softplus_has_no_step_in_graphs_nor_in_their_judge(own: float) -> None:
    """But where a threshold below torch's own was asked for."""
    energy = Thresholds(own).double()
    x, y = torch.zeros(600, 1, dtype=torch.float64), torch.linspace(-50, 50, 600, dtype=torch.float64)[:, None]
    judge = smoothed(float64_judge(energy))
    graph = trace_energy(energy, x, y)
    leaf = y.clone().requires_grad_()
    (slope,) = torch.autograd.grad(judge(x, leaf).sum(), leaf)
    z = y.numpy()[:, 0]
    last = np.where(z > own, z, np.logaddexp(0, z)) if own < 20 else np.logaddexp(0, z)
    true = np.logaddexp(0, z) + np.logaddexp(0, 3 * z) / 3 + np.logaddexp(0, 2 * z) / 2 + last
    steep = special.expit(z) + special.expit(3 * z) + special.expit(2 * z)
    steep += np.where((z > own) & (own < 20), 1, special.expit(z))
    f = graph.value(graph.theta, graph.prepare(graph.theta, x), y)
    traced = heads.value_and_gradient(graph, x, y).graph(*graph.theta.values(), x, y)
    for got in (f, judge(x, y), traced[0]):
        np.testing.assert_allclose(got.numpy(), true, rtol=1e-15, atol=1e-15)
    for got in (slope, traced[1]):
        np.testing.assert_allclose(got.numpy()[:, 0], steep, rtol=1e-15, atol=1e-15)
    assert np.abs(energy(x, y).numpy() - true).max() <= 2 * 2.1e-9


# --- refusals ---------------------------------------------------------------------------------------------------------


class Inner(nn.Module):
    """A submodule with the trouble in it, so that the sentence has a path to name."""

    def __init__(self, trouble: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.trouble = trouble

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.trouble(x, y)


class Outer(nn.Module):
    def __init__(self, trouble: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.block = nn.ModuleList([Inner(trouble)])

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.block[0](x, y)


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        return (y * y).sum(1)


class Remembering(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(2))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        self.mean.mul_(0.9)
        return (y * y).sum(1) + self.mean.sum()


def takes_gradient(x: Tensor, y: Tensor) -> Tensor:
    with torch.enable_grad():
        leaf = y.detach().requires_grad_()
        (g,) = torch.autograd.grad((leaf**4).sum(), leaf, create_graph=True)
    return g.sum(1)


def branches(x: Tensor, y: Tensor) -> Tensor:
    if y.sum() > 0:
        return (y * y).sum(1)
    return y.sum(1)


def in_place(x: Tensor, y: Tensor) -> Tensor:
    return y.mul_(2).sum(1)


REFUSED: list[tuple[Callable[[], nn.Module], str]] = [
    (lambda: Outer(branches), r"\(in block.0, a Inner\): it branches on.*at `if y.sum\(\) > 0:`; write torch.where"),
    (lambda: Outer(lambda x, y: y[y > 0.5].sum().expand(y.shape[0])), r"aten.index \(in block.0, a Inner\) has a size"),
    (lambda: Outer(lambda x, y: y.sum(1) * x.sum().item()), r"aten.item \(in block.0, a Inner\) has a size, or is a P"),
    (lambda: Outer(takes_gradient), r"\(in block.0, a Inner\) calls torch.autograd itself.*return the energy alone"),
    (
        lambda: Outer(lambda x, y: torch.fft.fft(y).abs().sum(1)),
        r"fft_fft \(in block.0, a Inner\) computes in torch.comp",
    ),
    (
        lambda: Outer(lambda x, y: (y.half() ** 2).sum(1).to(y.dtype)),
        r"\(in block.0, a Inner\) computes in torch.float16",
    ),
    (lambda: Outer(lambda x, y: (y.half() ** 2).sum(1)), r"forward returned torch.float16; convert"),
    (
        lambda: Outer(lambda x, y: y.round().sum(1)),
        r"only through aten.round \(in block.0, a Inner\), which has",
    ),
    (lambda: Outer(lambda x, y: (y > 0.5).to(y.dtype).sum(1)), r"only through aten.gt \(in block.0, a Inner\)"),
    (lambda: Outer(lambda x, y: y.detach().square().sum(1)), r"only through aten.detach \(in block.0"),
    (
        lambda: Outer(lambda x, y: (y + torch.rand_like(y)).sum(1)),
        r"aten.rand_like \(in block.0, a Inner\) draws",
    ),
    (lambda: Outer(in_place), r"changes its argument y in place; let it work on y.clone\(\)"),
    (
        lambda: Outer(lambda x, y: y.square()),
        r"forward returned \(11, 2\) for a batch of 11; expected one energy",
    ),
    (lambda: Outer(lambda x, y: (y.sum(1), y)), r"forward returned tuple"),
    (lambda: Outer(lambda x, y: y.sum(1) @ torch.ones(3)), r"fails \(in block.0, a Inner\) on 11 samples"),
    (
        lambda: Outer(lambda x, y: y.to(torch.float32 if y.dtype == torch.float64 else y.dtype).sum(1)),
        "expected one dtype",
    ),
    (Counting, r"changes the Python attribute calls, from 0 to 2"),
    (Remembering, r"changes the buffer mean; call .eval\(\) first"),
]


@pytest.mark.parametrize(("bad", "sentence"), REFUSED)
def test_what_cannot_be_traced_is_refused(bad: Callable[[], nn.Module], sentence: str) -> None:
    energy = bad().double()
    with pytest.raises(ExportError, match=sentence) as caught:
        trace_energy(energy, torch.randn(2, 3, dtype=torch.float64), torch.rand(2, 2, dtype=torch.float64))
    assert "\n" not in str(caught.value)


UNTRANSLATED: list[tuple[Callable[[Tensor, Tensor], Tensor], torch.dtype, str]] = [
    (
        lambda x, y: torch.special.bessel_j0(x).sum(1) + (y * y).sum(1),
        torch.float64,
        r"ONNX has no translation for bessel_j0 \(in block.0, a Inner\)",
    ),
    (
        lambda x, y: (y * torch.atan(y)).sum(1),
        torch.float64,
        r"Atan \(in block.0, a Inner\) has no float64 kernel in ONNX Runtime; convert",
    ),
]


@pytest.mark.parametrize(("trouble", "dtype", "sentence"), UNTRANSLATED)
def test_what_onnx_lacks_is_refused(
    trouble: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype, sentence: str
) -> None:
    x, y = torch.randn(5, 3, dtype=dtype), torch.rand(5, 2, dtype=dtype)
    with pytest.raises(ExportError, match=sentence):
        to_onnx(heads.value_and_gradient(trace_energy(Outer(trouble), x, y), x, y))


def test_what_has_no_derivative_is_refused() -> None:
    energy = Outer(lambda x, y: torch.special.bessel_j0(y).sum(1))
    with pytest.raises(ExportError, match=r"aten.special_bessel_j0 \(in block.0, a Inner\) has no derivative in torch"):
        trace_energy(energy, torch.randn(5, 3), torch.rand(5, 2))


def test_maxima_with_their_places_are_refused() -> None:
    def places(x: Tensor, y: Tensor) -> Tensor:
        values, where = F.max_pool1d(y[:, None], 2, return_indices=True)
        return (values * where).sum((1, 2))

    with pytest.raises(ExportError, match=r"the places of the maxima.*\(in block.0, a Inner\)"):
        trace_energy(Outer(places), torch.randn(2, 3), torch.rand(2, 4))


def test_a_gradient_of_another_shape_is_refused() -> None:
    with pytest.raises(ExportError, match=r"forward returned \(11,\) for a batch of 11; expected the gradient in y"):
        trace_gradient(Outer(lambda x, y: y.sum(1)), torch.randn(2, 3), torch.rand(2, 2))
