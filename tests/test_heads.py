"""Packages of the energy and its derivatives: heads, no solver, gradients alone, golden data."""

import contextlib
from pathlib import Path

import numpy as np
import pytest
from exports import export

import icnnrt
from icnnrt.checking.verify import verify

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")
import onnx_ir as ir  # noqa: E402
import onnxruntime  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from icnnrt_exporters import siblings  # noqa: E402
from icnnrt_exporters.graphs.onnx_head import to_onnx  # noqa: E402
from icnnrt_exporters.tracing.energy_graph import trace_energy  # noqa: E402
from icnnrt_exporters.tracing.heads import cut_vjp, hessian, hessian_vector_product, value_and_gradient  # noqa: E402
from icnnrt_models import FICNN, PICNN, BundleEntropyArgmin  # noqa: E402

HEADS = ("hvp", "hessian", "gradient_x", "pullback")


def energy64() -> PICNN:
    return PICNN(
        3, 4, hidden=(6, 5), activation="softplus", dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )


def examples(B: int, x_dim: int, n: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(B, x_dim, generator=generator, dtype=torch.float64).to(dtype),
        torch.rand(B, n, generator=generator, dtype=torch.float64).to(dtype),
    )


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every head, no solver, float64."""
    path = tmp_path_factory.mktemp("heads") / "heads.icnn"
    export(energy64(), None, *examples(6, 3, 4), path, heads=HEADS)
    return path


@pytest.fixture(scope="module")
def session(package: Path) -> icnnrt.Session:
    return icnnrt.load(package)


def test_what_the_package_says(session: icnnrt.Session) -> None:
    manifest = session.manifest
    assert set(manifest.graphs) == {"value", *HEADS}
    assert (manifest.kind, manifest.solver, manifest.domain) == ("energy", None, None)
    assert set(manifest.parity) == {"value", "gradient", *HEADS}
    assert all(figure < 1e-12 for figure in manifest.parity.values() if isinstance(figure, float))


def test_the_pullback_against_torch(session: icnnrt.Session) -> None:
    energy, (x, y) = energy64(), examples(5, 3, 4)
    f_bar, g_bar = torch.linspace(-1, 1, 5).double(), torch.cos(torch.arange(20.0)).double().reshape(5, 4)
    X, Y = x.clone().requires_grad_(), y.clone().requires_grad_()
    f = energy(X, Y)
    (g,) = torch.autograd.grad(f.sum(), Y, create_graph=True)
    named = dict(energy.named_parameters())
    bars = torch.autograd.grad((f_bar * f).sum() + (g_bar * g).sum(), [Y, X, *named.values()])
    pulled = session.pullback(x.numpy(), y.numpy(), f_bar.numpy(), g_bar.numpy())
    assert set(pulled.weights) == set(named)
    for got, true in zip((pulled.y, pulled.x, *(pulled.weights[name] for name in named)), bars, strict=True):
        np.testing.assert_allclose(got, true, rtol=1e-9, atol=1e-11)
    # A sample that holds NaN has no part in θ̄.
    broken = f_bar.numpy().copy()
    broken[1] = np.nan
    kept = [0, 2, 3, 4]
    part = session.pullback(x.numpy(), y.numpy(), broken, g_bar.numpy())
    alone = session.pullback(x.numpy()[kept], y.numpy()[kept], f_bar.numpy()[kept], g_bar.numpy()[kept])
    assert np.isnan(part.y[1]).all()
    assert np.isnan(part.x[1]).all()
    np.testing.assert_allclose(part.y[kept], alone.y, rtol=1e-12)
    for name in named:
        np.testing.assert_allclose(part.weights[name], alone.weights[name], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("B", [1, 3, 128])
def test_heads_against_torch(session: icnnrt.Session, B: int) -> None:
    energy, (x, y) = energy64(), examples(B, 3, 4)
    f, g, H = session.value_gradient_hessian(x.numpy(), y.numpy())
    X, Y = x.clone().requires_grad_(), y.clone().requires_grad_()
    true = energy(X, Y)
    by_x, by_y = torch.autograd.grad(true.sum(), (X, Y), create_graph=True)
    hessian = torch.stack([torch.autograd.grad(by_y[:, i].sum(), Y, retain_graph=True)[0] for i in range(4)], 1)
    np.testing.assert_allclose(f, true.detach(), rtol=1e-12)
    np.testing.assert_allclose(g, by_y.detach(), rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(H, hessian, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(session.gradient_x(x.numpy(), y.numpy()), by_x.detach(), rtol=1e-11, atol=1e-12)
    np.testing.assert_array_equal(session.value(x.numpy(), y.numpy()), f)
    np.testing.assert_array_equal(session.hessian(x.numpy(), y.numpy()), H)
    v = np.cos(np.arange(4.0 * B)).reshape(B, 4)
    np.testing.assert_allclose(session.hvp(x.numpy(), y.numpy(), v), np.einsum("bij,bj->bi", H, v), atol=1e-11)


def test_the_hessian_by_differences_and_its_sign(session: icnnrt.Session) -> None:
    x, y = (t.numpy() for t in examples(5, 3, 4))
    H, h = session.hessian(x, y), 1e-5
    for i in range(4):
        step = h * np.eye(4)[i]
        difference = (session.gradient(x, y + step) - session.gradient(x, y - step)) / (2 * h)
        np.testing.assert_allclose(H[:, :, i], difference, atol=1e-8)
    np.testing.assert_allclose(H, H.swapaxes(1, 2), atol=1e-14)
    assert np.linalg.eigvalsh(H).min() > -1e-12


def test_a_bad_sample_is_nan_and_spares_the_others(session: icnnrt.Session) -> None:
    x, y = (t.numpy().copy() for t in examples(4, 3, 4))
    v = np.ones((4, 4))
    good = session.value_gradient_hessian(x, y), session.hvp(x, y, v), session.gradient_x(x, y)
    x[1, 0], y[2, 3] = np.nan, np.inf
    bad = session.value_gradient_hessian(x, y), session.hvp(x, y, v), session.gradient_x(x, y)
    for before, after in zip((*good[0], *good[1:]), (*bad[0], *bad[1:]), strict=True):
        assert np.isnan(after[[1, 2]]).all()
        np.testing.assert_allclose(after[[0, 3]], before[[0, 3]], rtol=1e-13)
    v[3, 1] = np.nan
    assert np.isnan(session.hvp(x, y, v)[3]).all()


def test_an_empty_batch(session: icnnrt.Session) -> None:
    f, g, H = session.value_gradient_hessian(np.zeros((0, 3)), np.zeros((0, 4)))
    assert (f.shape, g.shape, H.shape) == ((0,), (0, 4), (0, 4, 4))


def test_what_is_not_there_is_told(session: icnnrt.Session, digits_like_package: Path) -> None:
    x = np.zeros((2, 3))
    with pytest.raises(icnnrt.InputError, match="argmin: the package heads was exported without a solver"):
        session.argmin(x)
    with pytest.raises(icnnrt.InputError, match="v: expected"):
        session.hvp(x, np.zeros((2, 4)), np.zeros((1, 4)))
    with icnnrt.load(digits_like_package) as other:
        shape = other.manifest.x_shape
        with pytest.raises(icnnrt.InputError, match=r"hessian: the package \w+ has no hessian.onnx; export it again"):
            other.hessian(np.zeros((2, *shape)), np.zeros((2, *other.manifest.y_shape)))
        with pytest.raises(icnnrt.InputError, match="lower: expected none, as the domain is 'unit_box'"):
            other.argmin(np.zeros((2, *shape)), lower=0.0)
    with pytest.raises(icnnrt.InputError, match="x: expected an array of shape"):
        session.value(None, np.zeros((2, 4)))


def test_verify_judges_the_heads(package: Path) -> None:
    report = verify(package, samples=8)
    verdicts = {check.name: check.verdict for check in report.checks}
    assert report.passed, report
    of_pullback = [f"pullback: {what}" for what in ("y", "x", "weights")]
    replayed = ["value.f", "hessian.hessian", "hvp.hvp", "pullback.y_bar", "pullback.x_bar"]
    for name in (*HEADS[:3], *of_pullback, "gradient", "convexity", *(f"golden: {output}" for output in replayed)):
        assert verdicts[name] == "pass", name


def test_verify_finds_a_pullback_that_is_wrong(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice what it should be, in all that it returns."""
    true = icnnrt.EnergySession.pullback

    def wrong(self: icnnrt.Session, *arguments: object) -> object:
        pulled = true(self, *arguments)  # type: ignore[arg-type]
        return type(pulled)(2.0 * pulled.y, 2.0 * pulled.x, {name: 2.0 * a for name, a in pulled.weights.items()})

    monkeypatch.setattr(icnnrt.EnergySession, "pullback", wrong)
    bad = [check.name for check in verify(package, samples=8).checks if check.verdict == "fail"]
    assert bad[:3] == [f"pullback: {part}" for part in ("y", "x", "weights")]
    assert all(name.startswith("golden: pullback.") for name in bad[3:])


def test_golden_data_tells_a_changed_graph(package: Path, tmp_path: Path) -> None:
    opened = icnnrt.Package.open(package)
    assert {"x", "y", "y_dot", "value.f", "hessian.hessian", "gradient_x.gradient_x"} <= set(opened.golden)
    golden = {name: np.array(a) for name, a in opened.golden.items()}
    golden["value.f"] = golden["value.f"] + 1e-6
    spec = opened.manifest
    from icnnrt.format import package as packages

    packages.write(
        tmp_path / "bent.icnn",
        name="bent",
        dtype=spec.dtype,
        x_shape=spec.x_shape,
        y_shape=spec.y_shape,
        solver=None,
        graphs=opened.graphs,
        weights=opened.weights,
        nonnegative=(),
        trainable=(),
        golden=golden,
    )
    failed = [check.name for check in verify(tmp_path / "bent.icnn", samples=4).checks if check.verdict == "fail"]
    assert failed == ["golden: value.f"]
    # New weights make old answers untrue, so they are left out.
    weights = {name: 2 * a for name, a in opened.weights.items()}
    assert not opened.save(tmp_path / "moved.icnn", weights=weights).golden


def test_damaged_golden_data_is_refused(package: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy.icnn"
    shutil.copytree(package, copy)
    data = (copy / "golden.safetensors").read_bytes()
    (copy / "golden.safetensors").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(icnnrt.PackageError, match=r"golden.safetensors: its SHA-256 should be"):
        icnnrt.Package.open(copy)
    (copy / "golden.safetensors").unlink()
    with pytest.raises(icnnrt.PackageError, match=r"golden.safetensors is missing"):
        icnnrt.Package.open(copy)


class Slope(nn.Module):
    """∇_y of ½‖Ay‖² + x'y, given as it is."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.A = nn.Parameter(torch.randn(4, 4, generator=generator, dtype=torch.float64))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y @ self.A.T @ self.A + x


def test_a_gradient_alone(tmp_path: Path) -> None:
    slope, (x, y) = Slope(), examples(5, 4, 4)
    export(slope, None, x, y, tmp_path / "slope.icnn", kind="gradient", heads=("hvp", "hessian"))
    with icnnrt.load(tmp_path / "slope.icnn") as session:
        assert session.manifest.kind == "gradient"
        np.testing.assert_allclose(session.gradient(x.numpy(), y.numpy()), slope(x, y).detach(), atol=1e-12)
        Q = (slope.A.T @ slope.A).detach().numpy()
        np.testing.assert_allclose(session.hessian(x.numpy(), y.numpy()), np.broadcast_to(Q, (5, 4, 4)), atol=1e-12)
        np.testing.assert_allclose(session.hvp(x.numpy(), y.numpy(), y.numpy()), y.numpy() @ Q, atol=1e-12)
        with pytest.raises(icnnrt.InputError, match="holds the gradient of an energy alone"):
            session.value(x.numpy(), y.numpy())
    verdicts = {check.name: check.verdict for check in verify(tmp_path / "slope.icnn", samples=8).checks}
    assert verdicts["monotony"] == verdicts["hessian"] == "pass"
    with pytest.raises(icnnrt.ExportError, match="a gradient alone, no function whose derivative"):
        siblings(tmp_path / "slope.icnn", tmp_path)


def test_the_gradient_map_of_an_energy_without_context(tmp_path: Path) -> None:
    class Alone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = FICNN(0, 3, hidden=(5,), generator=torch.Generator().manual_seed(0))

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.f(x, y)

    energy = Alone()
    x, y = torch.zeros(4, 0), torch.rand(4, 3, generator=torch.Generator().manual_seed(0))
    export(energy, None, x, y, tmp_path / "map.icnn")
    with icnnrt.load(tmp_path / "map.icnn") as session:
        leaf = y.clone().requires_grad_()
        (true,) = torch.autograd.grad(energy(x, leaf).sum(), leaf)
        np.testing.assert_allclose(session.gradient(None, y.numpy()), true, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"heads": ["hessians"]}, "heads: expected 'hvp', .*, 'pullback' or 'polyhedron', but got 'hessians'"),
        ({"heads": "hvp"}, "heads: expected a list"),
        ({"kind": "map"}, "kind: expected 'energy', 'gradient' or 'qp'"),
        ({"kind": "gradient", "heads": ["gradient_x"]}, "no value to differentiate by x"),
        ({"kind": "gradient", "heads": ["pullback"]}, "leave 'pullback' out"),
    ],
)
def test_wrong_settings(tmp_path: Path, settings: dict[str, object], sentence: str) -> None:
    with pytest.raises(icnnrt.ExportError, match=sentence):
        export(energy64(), None, *examples(3, 3, 4), tmp_path / "no.icnn", **settings)  # type: ignore[arg-type]
    assert not (tmp_path / "no.icnn").exists()


def test_a_gradient_has_no_solver_and_no_training(tmp_path: Path) -> None:
    from icnnrt_exporters import TrainSpec

    layer = BundleEntropyArgmin(energy64(), iterations=3)
    with pytest.raises(icnnrt.ExportError, match="solver: a gradient alone has no value to minimise"):
        export(Slope(), layer, *examples(3, 4, 4), tmp_path / "no.icnn", kind="gradient")
    with pytest.raises(icnnrt.ExportError, match="train: a training graph needs the argmin"):
        export(energy64(), None, *examples(3, 3, 4), tmp_path / "no.icnn", train=TrainSpec())


def test_a_traced_head_is_not_traced_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor decomposed: which took more than half of the time of an export."""
    energy = PICNN(3, 4, hidden=(8, 8), activation="softplus").double()
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.rand(5, 4, dtype=torch.float64)

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("once more")

    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", fail)
    graph = trace_energy(energy, x, y)
    made = [
        value_and_gradient(graph, x, y),
        hessian_vector_product(graph, x, y),
        cut_vjp(graph, x, y, 3, list(graph.theta)),
        hessian(graph, x, y),
    ]
    monkeypatch.setattr(torch.export, "export", fail)
    models = [to_onnx(head) for head in made]
    for head, model in zip(made, models, strict=True):
        assert [v.name for v in model.graph.inputs] == [one.name for one in head.inputs]
        assert [v.name for v in model.graph.outputs] == head.outputs
    with monkeypatch.context() as slow:
        slow.setattr("icnnrt_exporters.graphs.onnx_head.sped_up", contextlib.nullcontext)
        as_ever = to_onnx(made[3])
    assert [node.op_type for node in as_ever.graph] == [node.op_type for node in models[3].graph]
    data = ir.to_proto(models[0]).SerializeToString()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    theta = {name: tensor.detach().numpy() for name, tensor in graph.theta.items()}
    for B in (1, 7):
        x, y = torch.randn(B, 3, dtype=torch.float64), torch.rand(B, 4, dtype=torch.float64, requires_grad=True)
        f, gradient = session.run(None, {**theta, "x": x.numpy(), "y": y.detach().numpy()})
        value = energy(x, y)
        np.testing.assert_allclose(f, value.detach().numpy(), rtol=1e-12)
        np.testing.assert_allclose(gradient, torch.autograd.grad(value.sum(), y)[0].numpy(), rtol=1e-11, atol=1e-13)
