"""Export, end to end: what onnxruntime computes from a package is what torch computes from the module."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
import pytest
import references
import torch
from amounts import amount
from scipy.optimize import minimize
from torch import Tensor, nn

import icnnrt
from icnnrt.errors import ExportError
from icnnrt.mathematics import reference
from icnnrt_exporters.exporter import export
from icnnrt_exporters.graphs.packer import pack
from icnnrt_exporters.versions import IR_VERSION, OPSET
from icnnrt_models import FICNN, PICNN, BundleEntropyArgmin


class Foreign(nn.Module):
    """Nothing of ours: an image as x, pooling, ELU, a clamp in the forward, a buffer, scalars float32 cannot hold."""

    y_dim = 6

    def __init__(self) -> None:
        super().__init__()
        self.of_x = nn.Linear(4, 12)
        self.of_y = nn.Linear(6, 12, bias=False)
        self.mixing = nn.Parameter(torch.rand(12) - 0.2)
        self.register_buffer("curvature", torch.tensor(0.1))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = torch.relu(self.of_y(y) + self.of_x(torch.tanh(x.mean((2, 3))))) + 0.3
        return (nn.functional.elu(h) * self.mixing.clamp(min=0)).sum(-1) + self.curvature * 0.1 * (y**2).sum(-1)


class Vector(nn.Module):
    """Ends in a product with a vector, whose transposed form some runtimes get wrong for large batches."""

    y_dim = 4

    def __init__(self) -> None:
        super().__init__()
        self.of_x, self.of_y = nn.Linear(5, 16), nn.Linear(4, 16)
        self.v = nn.Parameter(torch.randn(16))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.softplus(self.of_y(y) + self.of_x(x)) @ nn.functional.softplus(self.v)


class Case(NamedTuple):
    make: Callable[[], nn.Module]
    x_shape: tuple[int, ...]
    n: int
    dtype: torch.dtype
    iterations: int


CASES = {
    "picnn-softplus-batchnorm-64": Case(
        lambda: PICNN(5, 4, (8, 8), activation="softplus", batch_norm=True), (5,), 4, torch.float64, 3
    ),
    "picnn-relu-reparametrised-64": Case(
        lambda: PICNN(5, 7, (8, 8), activation="relu", positivity="softplus"), (5,), 7, torch.float64, 8
    ),
    "picnn-leaky-32": Case(lambda: PICNN(5, 7, (8,), activation="leaky_relu"), (5,), 7, torch.float32, 6),
    "ficnn-celu-no-x-64": Case(lambda: FICNN(0, 3, (9, 9), activation="celu"), (0,), 3, torch.float64, 3),
    "ficnn-softplus-32": Case(lambda: FICNN(2, 1, (9, 9), activation="softplus"), (2,), 1, torch.float32, 4),
    "foreign-64": Case(Foreign, (4, 3, 2), 6, torch.float64, 3),
    "vector-32": Case(Vector, (5,), 4, torch.float32, 3),
    "one-cut-64": Case(lambda: FICNN(2, 3, (5,), activation="softplus"), (2,), 3, torch.float64, 1),
}


class Exported(NamedTuple):
    case: Case
    energy: nn.Module
    layer: BundleEntropyArgmin
    package: icnnrt.Package
    session: icnnrt.Session

    def contexts(self, B: int, seed: int = 1) -> np.ndarray:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(B, *self.case.x_shape, generator=generator, dtype=self.case.dtype).numpy()


def build(case: Case, path: Path, **keywords: Any) -> Exported:
    torch.manual_seed(0)
    energy = case.make().to(case.dtype).eval()
    if any(isinstance(m, nn.BatchNorm1d) for m in energy.modules()):
        energy.train()
        energy(torch.randn(64, *case.x_shape, dtype=case.dtype), torch.rand(64, case.n, dtype=case.dtype))
        energy.eval()
    layer = BundleEntropyArgmin(energy, iterations=case.iterations, y_dim=case.n)
    x = torch.randn(2, *case.x_shape, dtype=case.dtype)
    package = export(energy, layer, x, torch.rand(2, case.n, dtype=case.dtype), path, **keywords)
    return Exported(case, energy, layer, package, icnnrt.load(path))


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """The case of that name, exported once."""
    return functools.cache(lambda name: build(CASES[name], tmp_path_factory.mktemp("export") / f"{name}.icnn"))


# Every network, dtype, kind of kink, shape of x and way to a positive weight once.
REPEATING = ("picnn-leaky-32", "ficnn-softplus-32")


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.slow) if name in REPEATING else name for name in CASES])
def exported(request: pytest.FixtureRequest, built: Callable[[str], Exported]) -> Exported:
    return built(request.param)


@pytest.fixture
def picnn(built: Callable[[str], Exported]) -> Exported:
    return built("picnn-softplus-batchnorm-64")


def tolerance(dtype: torch.dtype, double: float, single: float) -> float:
    return double if dtype is torch.float64 else single


@pytest.mark.parametrize("B", [0, 1, 3, 128])
def test_value_and_gradient_equal_torch(exported: Exported, B: int) -> None:
    x = exported.contexts(B)
    y = np.random.default_rng(0).uniform(-1, 2, (B, exported.case.n)).astype(x.dtype)
    f, gradient = exported.session.value_and_gradient(x, y)
    judge = torch.from_numpy(y).requires_grad_()
    F = exported.energy(torch.from_numpy(x), judge)
    (G,) = torch.autograd.grad(F.sum(), judge)
    bound = tolerance(exported.case.dtype, 1e-12, 1e-5)
    np.testing.assert_allclose(f, F.detach().numpy(), rtol=bound, atol=bound)
    np.testing.assert_allclose(gradient, G.numpy(), rtol=bound, atol=bound)


@pytest.mark.parametrize("B", [0, 1, 3, 128])
def test_argmin_equals_torch(exported: Exported, B: int) -> None:
    x = exported.contexts(B)
    solution = exported.session.argmin(x)
    true = exported.layer.solve(torch.from_numpy(x))
    # Near the optimum of a smooth energy, f is known to its rounding only, and so y to the square root of that.
    settled = solution.gap < tolerance(exported.case.dtype, 1e-9, 1e-4)
    apart = np.abs(solution.y - true.y.numpy()).max(1)
    assert (apart[~settled] <= tolerance(exported.case.dtype, 1e-10, 2e-5)).all()
    assert (apart[settled] <= tolerance(exported.case.dtype, 1e-8, 3e-4)).all()
    bound = tolerance(exported.case.dtype, 1e-10, 1e-5)
    np.testing.assert_allclose(solution.energy, true.energy.numpy(), rtol=bound, atol=bound)
    np.testing.assert_allclose(solution.lower_bound, true.lower_bound.numpy(), rtol=bound, atol=bound)
    # The certificate the code itself returns.
    assert (solution.gap >= -tolerance(exported.case.dtype, 1e-10, 1e-5)).all()
    scale = np.maximum(1.0, np.abs(solution.lower_bound))
    assert (solution.complementarity_history <= tolerance(exported.case.dtype, 1e-8, 3e-5) * scale[:, None]).all()


@pytest.mark.parametrize("adjoint", ["exact", "prop3"])
@pytest.mark.parametrize("B", [1, 5, 200])
def test_adjoint_equals_torch(exported: Exported, adjoint: Any, B: int) -> None:
    solution = exported.session.argmin(exported.contexts(B + 16))
    # A cut whose point lies on a kink, to rounding, is of a face that the graph for cotangents may not see: it says so.
    kinked = exported.session.vjp(solution, solution.y, adjoint=adjoint).at_kink
    bends = any(type(m).__name__ in ("ReLU", "LeakyReLU") for m in exported.energy.modules())
    assert not kinked.any() or bends
    solution = solution[~kinked][:B]
    assert len(solution) == B
    x = np.array(solution.x)
    if adjoint == "prop3" and exported.case.dtype is torch.float32:
        # It divides by the differences of the cuts, which are rounding once a smooth energy is solved to float32.
        solution = solution[solution.gap > 1e-4]
        x = np.array(solution.x)
    y_bar = np.random.default_rng(0).normal(size=solution.y.shape).astype(x.dtype)
    cotangents = exported.session.vjp(solution, y_bar, adjoint=adjoint)
    exported.layer.adjoint = adjoint
    leaf = torch.from_numpy(x).requires_grad_()
    names = [name for name, p in exported.energy.named_parameters() if p.requires_grad]
    parameters = dict(exported.energy.named_parameters())
    x_bar, *theta_bar = torch.autograd.grad(
        exported.layer(leaf), [leaf, *(parameters[n] for n in names)], torch.from_numpy(y_bar), materialize_grads=True
    )
    # θ̄ is a sum over the batch, and so is its rounding.
    bound = tolerance(exported.case.dtype, 1e-9, 1e-3) * max(1.0, B / 10)
    assert not cotangents.at_kink.any()
    np.testing.assert_allclose(cotangents.x, x_bar.numpy(), rtol=bound, atol=bound)
    assert sorted(cotangents.weights) == sorted(names)
    for name, true in zip(names, theta_bar, strict=True):
        np.testing.assert_allclose(cotangents.weights[name], true.numpy(), rtol=bound, atol=bound, err_msg=name)


def test_exact_adjoint_equals_finite_differences_of_the_package(exported: Exported) -> None:
    if exported.case.dtype is not torch.float64 or exported.case.x_shape == (0,):
        pytest.skip("finite differences in x, in float64")
    x = exported.contexts(4)
    solution = exported.session.argmin(x)
    rng = np.random.default_rng(0)
    y_bar, along = rng.normal(size=solution.y.shape), rng.normal(size=x.shape)
    h = 1e-5

    def loss(t: float) -> np.ndarray:
        return (y_bar * exported.session.argmin(x + t * along).y).sum(1)

    slope = (loss(h) - loss(-h)) / (2 * h)
    x_bar = exported.session.vjp(solution, y_bar).x
    np.testing.assert_allclose((x_bar * along).reshape(4, -1).sum(1), slope, rtol=1e-6, atol=1e-8)


def test_the_reference_around_the_package_agrees(exported: Exported) -> None:
    """Third witness: float64 numpy, with the package's own value graph as the energy."""
    if exported.case.dtype is not torch.float64:
        pytest.skip("the reference is float64")
    x = exported.contexts(3)
    solution = exported.session.argmin(x)
    true = reference.bundle_entropy_argmin(
        lambda y: exported.session.value_and_gradient(x, y),
        np.full((3, exported.case.n), 0.5),
        exported.case.iterations,
    )
    np.testing.assert_allclose(solution.y, true.y, rtol=0, atol=1e-10)


def test_bounds_hold_against_an_independent_solver(tmp_path: Path) -> None:
    torch.manual_seed(3)
    energy = PICNN(6, 5, (16, 16), activation="softplus").double().eval()
    with torch.no_grad():
        for p in energy.parameters():
            p.mul_(1.5)
    layer = BundleEntropyArgmin(energy, iterations=12)
    export(energy, layer, torch.randn(2, 6).double(), torch.rand(2, 5).double(), tmp_path / "p.icnn")
    session = icnnrt.load(tmp_path / "p.icnn")
    x = np.random.default_rng(0).normal(size=(amount(120), 6))
    solution = session.argmin(x)
    for i in range(len(x)):

        def objective(y: np.ndarray, i: int = i) -> tuple[float, np.ndarray]:
            f, g = session.value_and_gradient(x[i : i + 1], y[None])
            return float(f[0] + references.negative_entropy(y)), g[0] + np.log(y) - np.log1p(-y)

        best = minimize(
            objective,
            np.full(5, 0.5),
            jac=True,
            bounds=[(1e-12, 1 - 1e-12)] * 5,
            options={"ftol": 1e-15, "gtol": 1e-10},
        )
        assert solution.lower_bound[i] <= best.fun + 1e-9
        assert best.fun <= solution.energy[i] + 1e-9


def test_warm_start_counts_as_the_first_cut_point(picnn: Exported) -> None:
    x = picnn.contexts(3)
    cold = picnn.session.argmin(x)
    warm = picnn.session.argmin(x, warm=cold)
    np.testing.assert_array_equal(warm.cut_points[:, 0], cold.y)
    assert (warm.gap <= cold.gap + 1e-12).all()


def test_one_bad_sample_leaves_the_others_alone(picnn: Exported) -> None:
    x = picnn.contexts(4)
    good = picnn.session.argmin(x)
    spoilt = x.copy()
    spoilt[2] = np.nan
    solution = picnn.session.argmin(spoilt)
    assert solution.status[2] == icnnrt.Status.NOT_FINITE_INPUT
    assert np.isnan(solution.y[2]).all()
    others = [0, 1, 3]
    np.testing.assert_allclose(solution.y[others], good.y[others], rtol=0, atol=1e-12)
    np.testing.assert_array_equal(solution.status[others], good.status[others])


def nodes_of(graph: onnx.GraphProto) -> Iterator[tuple[onnx.NodeProto, bool]]:
    """Every node, and whether it stands in a loop."""
    for node in graph.node:
        yield node, False
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from ((inner, True) for inner, _ in nodes_of(attribute.g))


@pytest.mark.parametrize("role", ["argmin", "adjoint"])
def test_the_x_path_is_computed_once(picnn: Exported, role: str) -> None:
    """Every bias of the x path is added by one node of the whole graph, outside the loop: x meets each layer once."""
    x_path = [n for n in picnn.package.weights if n.startswith("context_layers") or ".W_yu" in n or ".W_zu" in n]
    biases = [f"layers.{i}.{b}" for i in range(3) for b in ("b_y", "b")] + ["layers.1.b_z", "context_layers.0.b"]
    graph = onnx.load_model_from_string(picnn.package.graphs[role]).graph
    reads = [(node, inside) for node, inside in nodes_of(graph)]
    for name in x_path:
        assert not any(inside for node, inside in reads if name in node.input), f"{name} is read inside the loop"
    for name in biases:
        assert name in picnn.package.weights
        # The last one shifts f alone, which no gradient needs.
        least = 0 if (role, name) == ("adjoint", "layers.2.b") else 1
        assert least <= sum(name in node.input for node, _ in reads) <= 1, name
    batch = {"argmin": 1, "adjoint": 2}[role]  # the adjoint pulls back through x once more, by transposed products
    for name in ("context_layers.0.W", "context_layers.1.W"):
        assert sum(name in node.input for node, _ in reads) <= batch


@pytest.mark.parametrize("role", ["value", "argmin", "adjoint"])
def test_graphs_state_their_versions_and_pass_the_checker(exported: Exported, role: str) -> None:
    model = onnx.load_model_from_string(exported.package.graphs[role])
    assert model.ir_version == IR_VERSION
    versions = {i.domain: i.version for i in model.opset_import}
    assert versions[""] == OPSET
    for function in model.functions:
        assert function.domain == "ai.icnnrt"
        assert {i.domain: i.version for i in function.opset_import}[""] == OPSET
    onnx.checker.check_model(exported.package.path / f"{role}.onnx", full_check=True)
    held = {t.name for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL}
    assert held <= set(exported.package.weights)
    inside = [t.name for t in model.graph.initializer if t.name in exported.package.weights and t.name not in held]
    assert not inside, "weights stand once, in weights.safetensors"
    assert sum(len(t.raw_data) for t in model.graph.initializer) < 4096


def test_weights_bear_their_state_dict_names(exported: Exported) -> None:
    state = exported.energy.state_dict()
    assert set(exported.package.weights) == set(state)
    for name, tensor in state.items():
        np.testing.assert_array_equal(exported.package.weights[name], tensor.numpy())
    restored = exported.case.make().to(exported.case.dtype)
    restored.load_state_dict({k: torch.from_numpy(v.copy()) for k, v in exported.package.weights.items()})


def test_parity_figures_are_stored(exported: Exported) -> None:
    parity = exported.package.manifest.parity
    assert {"value", "gradient", "energy", "y", "exact", "prop3", "gap_median", "gap_max"} <= set(parity)
    assert isinstance(parity["value"], float)
    assert parity["value"] < tolerance(exported.case.dtype, 1e-12, 1e-5)


def test_a_packed_file_runs_in_plain_onnxruntime(picnn: Exported, tmp_path: Path) -> None:
    target = pack(picnn.package.path, tmp_path / "argmin.onnx")
    onnx.checker.check_model(target, full_check=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(target, options, providers=["CPUExecutionProvider"])
    x = picnn.contexts(3)
    y, gap = session.run(["y", "gap"], {"x": x, "y_init": np.full((3, 4), 0.5)})
    solution = icnnrt.load(picnn.package.path, native=False).argmin(x)
    np.testing.assert_array_equal(y, solution.y)
    np.testing.assert_array_equal(gap, solution.gap)
    with pytest.raises(ExportError, match="is there already"):
        pack(picnn.package.path, target)
    with pytest.raises(ExportError, match="has no graph 'train'"):
        pack(picnn.package.path, tmp_path / "t.onnx", "train")


def test_exports_are_reproducible(picnn: Exported, tmp_path: Path) -> None:
    again = build(picnn.case, tmp_path / "again.icnn")
    for role, graph in picnn.package.graphs.items():
        assert again.package.graphs[role] == graph, role


def test_the_module_is_left_as_it_was(tmp_path: Path) -> None:
    energy = FICNN(2, 2, (3,)).train()
    before = {k: v.clone() for k, v in energy.state_dict().items()}
    export(energy, BundleEntropyArgmin(energy, iterations=2), torch.randn(2, 2), torch.rand(2, 2), tmp_path / "p.icnn")
    assert energy.training
    assert all(p.requires_grad for p in energy.parameters())
    for name, value in energy.state_dict().items():
        assert torch.equal(value, before[name])


def test_frozen_parameters_get_no_cotangent(tmp_path: Path) -> None:
    energy = FICNN(2, 2, (3,))
    energy.layers[0].b.requires_grad_(False)
    package = export(
        energy, BundleEntropyArgmin(energy, iterations=2), torch.randn(2, 2), torch.rand(2, 2), tmp_path / "p.icnn"
    )
    trainable = {name for name, spec in package.manifest.weights.tensors.items() if spec.trainable}
    assert "layers.0.b" not in trainable
    session = icnnrt.load(package)
    solution = session.argmin(np.zeros((2, 2), np.float32))
    assert set(session.vjp(solution, np.ones((2, 2), np.float32)).weights) == trainable


class FixedBatch(nn.Module):
    y_dim = 2

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (x.reshape(11, -1).sum(1) + y.sum(1)) * 1.0


class Table(nn.Module):
    y_dim = 2

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y * y


class Total(nn.Module):
    y_dim = 2

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (y * y).sum()


class NoTranslation(nn.Module):
    y_dim = 2

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.special.bessel_j0(x).sum(1) + (y * y).sum(1)


class Branching(nn.Module):
    y_dim = 2

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("switch", torch.tensor(1.0))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (y * y).sum(1) if self.switch > 0 else y.sum(1)


class Mixing(nn.Module):
    """Samples meet on the x path."""

    y_dim = 2

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return ((x @ x.T).softmax(0).sum(1)[:, None] * y * y).sum(1)


class MixingY(nn.Module):
    y_dim = 2

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return ((y - y.mean(0)) ** 2).sum(1)


class Named(nn.Module):
    """Weights under any names."""

    y_dim = 2

    def __init__(self, *names: str, tensor: Tensor | None = None) -> None:
        super().__init__()
        for name in names:
            if tensor is None:
                self.register_parameter(name, nn.Parameter(torch.ones(2)))
            else:
                self.register_buffer(name, tensor)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return sum(((weight * y * y).sum(1) for weight in self.parameters()), (y * y).sum(1))


class PlainTensor(nn.Module):
    y_dim = 2

    def __init__(self) -> None:
        super().__init__()
        self.matrix = torch.randn(2, 2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return ((y @ self.matrix) ** 2).sum(1)


BAD = [
    (Mixing, "depends on the others of its batch"),
    (MixingY, "depends on the others of its batch"),
    (PlainTensor, "register plain tensor attributes with register_buffer"),
    (lambda: Named("x"), "a weight is called 'x'"),
    (lambda: Named("depth"), "a weight is called 'depth'"),
    (lambda: Named("lam"), "a weight is called 'lam'"),
    (lambda: Named("a'b"), "holds a quote or a slash"),
    (
        lambda: Named("b", tensor=torch.ones(2, dtype=torch.bfloat16)),
        "b is torch.bfloat16, which a package cannot hold",
    ),
    (lambda: Named("b", tensor=torch.ones(0)), r"b is empty, of shape \(0,\)"),
    (FixedBatch, "must work for a batch of any size, but fails on 4 samples"),
    (Table, r"forward returned \(11, 2\) for a batch of 11; expected one energy per sample"),
    (Total, r"forward returned \(\) for a batch of 11"),
    (NoTranslation, "ONNX has no translation"),
    (Branching, "torch.export cannot follow its forward"),
]


@pytest.mark.parametrize(("bad", "sentence"), BAD)
def test_what_cannot_be_exported_is_refused_in_a_sentence(bad: Any, sentence: str, tmp_path: Path) -> None:
    energy = bad()
    with pytest.raises(ExportError, match=sentence) as caught:
        export(
            energy, BundleEntropyArgmin(energy, iterations=2), torch.randn(2, 3), torch.rand(2, 2), tmp_path / "p.icnn"
        )
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "p.icnn").exists()


class Tied(nn.Module):
    """One matrix under two names, which torch.export reads under the second."""

    y_dim = 3

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.softplus(self.b(nn.functional.softplus(self.a(y)) + x)).sum(1)


def test_a_shared_parameter_has_one_cotangent(tmp_path: Path) -> None:
    torch.manual_seed(0)
    energy = Tied().double()
    with torch.no_grad():
        energy.a.weight.abs_()
    layer = BundleEntropyArgmin(energy, iterations=3)
    export(energy, layer, torch.randn(2, 3).double(), torch.rand(2, 3).double(), tmp_path / "tied.icnn")
    session = icnnrt.load(tmp_path / "tied.icnn")
    (name,) = (n for n in session.weights if n.endswith("weight"))
    x = torch.randn(4, 3).double()
    solution = session.argmin(x.numpy())
    (true,) = torch.autograd.grad(layer(x).sum(), energy.a.weight)
    np.testing.assert_allclose(session.vjp(solution, np.ones((4, 3))).weights[name], true.numpy(), atol=1e-9)
    assert set(session.vjp(solution, np.ones((4, 3))).weights) == {name, "a.bias", "b.bias"}


def test_names_of_inner_values_are_free_for_weights(tmp_path: Path) -> None:
    """Weights called like the values of the graphs: nothing meets."""
    names = ("mul", "seed", "s", "val_0", "constant_0", "slopes_in", "offset_bar")
    energy = Named(*names)
    layer = BundleEntropyArgmin(energy, iterations=2)
    package = export(energy, layer, torch.randn(2, 3), torch.rand(2, 2), tmp_path / "p.icnn")
    assert set(package.weights) == set(names)


def test_every_submodule_keeps_its_mode(tmp_path: Path) -> None:
    energy = FICNN(2, 2, (3,)).train()
    energy.layers[0].eval()
    export(energy, BundleEntropyArgmin(energy, iterations=2), torch.randn(2, 2), torch.rand(2, 2), tmp_path / "p.icnn")
    assert energy.training
    assert not energy.layers[0].training


def test_a_solver_for_another_n_is_refused(tmp_path: Path) -> None:
    energy = FICNN(2, 2, (3,))
    layer = BundleEntropyArgmin(energy, iterations=2, y_dim=7)
    with pytest.raises(ExportError, match="made for y_dim=7, but y_example has 2 columns"):
        export(energy, layer, torch.randn(2, 2), torch.rand(2, 2), tmp_path / "p.icnn")
    with pytest.raises(ExportError, match="is not there; create it first"):
        export(energy, BundleEntropyArgmin(energy), torch.randn(2, 2), torch.rand(2, 2), tmp_path / "no" / "p.icnn")
    with pytest.raises(ExportError, match="is not a package of plain files alone, so it is not replaced"):
        export(energy, BundleEntropyArgmin(energy), torch.randn(2, 2), torch.rand(2, 2), tmp_path, overwrite=True)


@pytest.mark.parametrize(
    ("x", "y", "sentence"),
    [
        (torch.zeros(2, 2).double(), torch.zeros(2, 2), "expected one dtype"),
        (torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, 2), "x_example: expected a float32 or float64 tensor"),
        (torch.zeros(2, 2), torch.zeros(2), "y_example: expected at least one sample with a leading batch"),
        (torch.zeros(2, 2), torch.zeros(2, 1, 2), "y_example: expected shape"),
        (torch.zeros(0, 2), torch.zeros(2, 2), "x_example: expected at least one sample"),
        (torch.zeros(2, 5), torch.zeros(2, 2), "but fails on 4 samples"),
        (torch.full((2, 2), torch.nan), torch.zeros(2, 2), "x_example: expected finite numbers"),
        (np.zeros((2, 2)), torch.zeros(2, 2), "x_example: expected a float32 or float64 tensor, but got ndarray"),
    ],
)
def test_bad_examples_are_refused(x: Any, y: Any, sentence: str, tmp_path: Path) -> None:
    energy = FICNN(2, 2, (3,))
    with pytest.raises(ExportError, match=sentence):
        export(energy, BundleEntropyArgmin(energy, iterations=2), x, y, tmp_path / "p.icnn")


def test_an_energy_that_is_not_convex_is_refused_unless_told_otherwise(tmp_path: Path) -> None:
    class Dented(nn.Module):
        y_dim = 2

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            # Concave in y_0 above 0.9 alone, where no cut comes near.
            return 20.0 * y.sum(1) - 3.0 * torch.relu(y[:, 0] - 0.9) ** 2 + 0.0 * x.sum(1)

    energy = Dented()
    layer = BundleEntropyArgmin(energy)
    x, y = torch.randn(2, 2), torch.rand(2, 2)
    stages: list[str] = []
    with pytest.raises(ExportError, match=r"f is not convex in y: between two points it lies .* above its chord"):
        export(energy, layer, x, y, tmp_path / "p.icnn", progress=stages.append)
    assert stages == ["tracing the energy", "value and gradient", "convexity"]  # before any solver is built
    with pytest.warns(UserWarning, match="not convex in y"):
        package = export(energy, layer, x, y, tmp_path / "p.icnn", allow_not_convex=True)
    assert "exact" in package.manifest.parity  # its adjoint was checked all the same
    assert package.manifest.convexity is not None
    assert package.manifest.convexity.verdict == "violated"
    with icnnrt.load(package) as session:
        solution = session.argmin(np.zeros((3, 2), np.float32))
        assert solution.gap.max() < 1e-3  # by the cuts alone it looks solved
        assert (solution.status == icnnrt.Status.NOT_CONVEX).all()
        assert "not convex in y" in solution.advice(0)
        with pytest.raises(icnnrt.CertificateError):
            session.vjp(solution, np.ones_like(solution.y))


def test_nothing_is_overwritten_unasked(picnn: Exported) -> None:
    with pytest.raises(ExportError, match="is there already; pass overwrite=True"):
        export(picnn.energy, picnn.layer, torch.randn(2, 5).double(), torch.rand(2, 4).double(), picnn.package.path)
