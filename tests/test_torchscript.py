"""TorchScript and torch.export files: what they compute is what the torch layer and the ONNX package compute."""

import copy
import functools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import exports
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import icnnrt
import icnnrt_exporters
from icnnrt.cli.app import CHECK_FAILED, ERROR
from icnnrt.cli.commands import app
from icnnrt.errors import ExportError
from icnnrt.mathematics import reference
from icnnrt_exporters.torch_files.file_parity import compare
from icnnrt_exporters.torch_files.program import export_program
from icnnrt_exporters.torch_files.script_solver import ScriptSolver
from icnnrt_exporters.torch_files.torchscript import check_torchscript, export_torchscript, load_torchscript
from icnnrt_models import FICNN, PICNN, BregmanProximalGradient, BundleEntropyArgmin

# TorchScript's end is announced on every use of it.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning"),
]

F64 = torch.float64
SAME_ALGORITHM = 1e-10  # float64 against float64: the same steps, sums in another order
# A float64 energy within rounding of the optimum tells y to the square root of rounding only, and on the nearly
# parallel cuts of a smooth energy that has converged the adjoint divides by their differences.
BOUNDS = {
    torch.float64: {"value": 1e-12, "gradient": 1e-12, "energy": 1e-10, "y": 1e-6, "exact": 1e-7},
    # Rounding of the energy: these networks are small and their cuts keep off kinks.
    torch.float32: {"value": 1e-6, "gradient": 1e-5, "energy": 1e-5, "y": 1e-4, "exact": 1e-3},
}


class Image(nn.Module):
    """No context(), no class of ours: an image as x, a parametrised layer, tied weights, a buffer, frozen weights."""

    y_dim = 6

    def __init__(self) -> None:
        super().__init__()
        self.of_x = nn.Conv2d(2, 3, 2)
        self.of_y = torch.nn.utils.parametrizations.weight_norm(nn.Linear(6, 12, bias=False))
        self.first, self.second = nn.Linear(12, 12), nn.Linear(12, 12)
        self.second.weight = self.first.weight
        self.frozen = nn.Parameter(torch.rand(12), requires_grad=False)
        self.unused = nn.Linear(2, 2)
        self.register_buffer("curvature", torch.tensor(0.1))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        u = torch.tanh(self.of_x(x)).flatten(1)
        h = self.of_y(y) + self.second(self.first(u))
        return (nn.functional.softplus(h) * self.frozen).sum(-1) + self.curvature * (y**2).sum(-1)


class Case(NamedTuple):
    make: Callable[[], nn.Module]
    x_shape: tuple[int, ...]
    n: int
    dtype: torch.dtype
    iterations: int
    gain: float = 2.0  # of the weights of y: bent enough that cuts matter


CASES = {
    "picnn-softplus-batchnorm-64": Case(
        lambda: PICNN(5, 4, (8, 8), activation="softplus", batch_norm=True), (5,), 4, F64, 3
    ),
    "picnn-relu-64": Case(lambda: PICNN(5, 7, (8, 8), activation="relu", positivity="softplus"), (5,), 7, F64, 8),
    "ficnn-relu-64": Case(lambda: FICNN(3, 4, (9, 9), activation="relu"), (3,), 4, F64, 12),
    "ficnn-softplus-no-x-64": Case(lambda: FICNN(0, 3, (9,), activation="softplus"), (0,), 3, F64, 3),
    "picnn-softplus-32": Case(lambda: PICNN(5, 4, (8,), activation="softplus"), (5,), 4, torch.float32, 2, 4.0),
    "picnn-relu-32": Case(lambda: PICNN(5, 4, (8,), activation="relu"), (5,), 4, torch.float32, 6),
    "ficnn-softplus-32": Case(lambda: FICNN(2, 1, (9,), activation="softplus"), (2,), 1, torch.float32, 1),
    "image-64": Case(Image, (2, 3, 3), 6, F64, 3),
}


class Written(NamedTuple):
    case: Case
    energy: nn.Module
    layer: BundleEntropyArgmin
    path: Path
    loaded: Any

    def inputs(self, B: int, seed: int = 1) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(B, *self.case.x_shape, generator=generator, dtype=F64).to(self.case.dtype)
        return x, torch.rand(B, self.case.n, generator=generator, dtype=F64).to(self.case.dtype)

    def unconverged(self, B: int, seed: int) -> tuple[Tensor, Tensor]:
        """Of a smooth energy samples whose gap is far above rounding: once it is not, cuts are nearly the same, and the
        adjoint divides by their differences. Pieces converge to cuts that differ."""
        x, y = self.inputs(256, seed)
        if any(type(m).__name__ == "ReLU" for m in self.energy.modules()):
            return x[:B], y[:B]
        far = self.layer.solve(x).gap >= (1e-10 if self.case.dtype == F64 else 1e-5)
        assert far.sum() >= B
        return x[far][:B], y[far][:B]


def build(case: Case, path: Path) -> Written:
    torch.manual_seed(0)
    energy = case.make().to(case.dtype)
    if any(isinstance(m, nn.BatchNorm1d) for m in energy.modules()):
        energy(torch.randn(64, *case.x_shape, dtype=case.dtype), torch.rand(64, case.n, dtype=case.dtype))
    energy.eval()
    with torch.no_grad():
        for name, p in energy.named_parameters():
            if name.endswith("W_y"):
                p.mul_(case.gain)
    layer = BundleEntropyArgmin(energy, iterations=case.iterations, y_dim=case.n)
    x = torch.randn(2, *case.x_shape, dtype=case.dtype)
    export_torchscript(energy, layer, x, torch.rand(2, case.n, dtype=case.dtype), path)
    return Written(case, energy, layer, path, load_torchscript(path))


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Written]:
    """The case of that name, exported once."""
    return functools.cache(lambda name: build(CASES[name], tmp_path_factory.mktemp("torchscript") / f"{name}.pt"))


@pytest.fixture(params=CASES)
def written(request: pytest.FixtureRequest, built: Callable[[str], Written]) -> Written:
    return built(request.param)


@pytest.fixture
def picnn(built: Callable[[str], Written]) -> Written:
    return built("picnn-softplus-batchnorm-64")


def tell(figures: dict[str, float], bounds: dict[str, float]) -> None:
    assert figures.keys() == bounds.keys()
    assert all(figures[name] <= bounds[name] for name in bounds), figures


# ---------------------------------------------------------------- against torch


def test_all_methods_equal_the_torch_layer(written: Written) -> None:
    tell(check_torchscript(written.path, written.energy, *written.unconverged(3, seed=1)), BOUNDS[written.case.dtype])


def test_one_loaded_file_serves_every_batch_with_and_without_gradients(written: Written) -> None:
    bounds = BOUNDS[written.case.dtype]
    # TorchScript compiles anew for what it has seen in its first two calls, so the later ones tell more.
    for B in (4, 4, 1, 0):
        x, y = written.unconverged(B, seed=B)
        y_bar = y - 0.3
        leaf = x.clone().requires_grad_()
        answer = written.layer(leaf)
        weights = {name: p for name, p in written.energy.named_parameters() if p.requires_grad}
        expected = dict(
            zip(
                ["x", *weights],
                torch.autograd.grad((answer * y_bar).sum(), [leaf, *weights.values()], materialize_grads=True),
                strict=True,
            )
        )
        with torch.set_grad_enabled(B % 4 == 0):
            before = torch.is_grad_enabled()
            solution = written.loaded.argmin(x)
            theta_bar, x_bar = written.loaded.vjp(x, y_bar)
            assert torch.is_grad_enabled() == before
        assert solution.y.dtype == x.dtype
        assert not solution.y.requires_grad
        torch.testing.assert_close(solution.y, answer.detach(), rtol=0, atol=bounds["y"])
        torch.testing.assert_close(written.loaded(x), solution.y, rtol=0, atol=0)
        for name, bar in (("x", x_bar), *theta_bar.items()):
            assert bar.dtype == expected[name].dtype
            scale = max(1.0, float(expected[name].abs().max())) if expected[name].numel() else 1.0
            torch.testing.assert_close(bar, expected.pop(name), rtol=0, atol=bounds["exact"] * scale)
        assert not expected, "a weight without a gradient"


@pytest.mark.usefixtures("without_kernels")  # which end a solve with the same gap and other multipliers
def test_certificates_and_cuts_are_those_of_the_layer(picnn: Written) -> None:
    x, y = picnn.inputs(4)
    for start in (None, y, y.round()):
        got, expected = picnn.loaded.argmin(x, start), picnn.layer.solve(x, start)
        assert set(got._fields) == set(expected._fields)
        for field in got._fields:
            a, b = getattr(got, field), getattr(expected, field)
            assert a.dtype == b.dtype
            if field.startswith("lam"):  # what cuts nearly the same share between them is anyone's: G'λ is not
                a, b = (lam @ expected.slopes for lam in (a.reshape(4, -1, 3), b.reshape(4, -1, 3)))
            assert (a - b).abs().max() <= 1e-6, field
        assert (got.lam >= 0).all()
        assert (got.lam.sum(1) - 1).abs().max() <= 1e-12
        assert ((got.gap >= -1e-12) & (got.gap <= 1.0)).all()


@pytest.mark.parametrize("written", ["image-64"], indirect=True)
def test_gradients_equal_finite_differences_of_the_loaded_file(written: Written) -> None:
    x, y = written.inputs(2)
    y_bar = y - 0.3
    theta_bar, x_bar = written.loaded.vjp(x, y_bar)
    weights = dict(written.loaded.energy.named_parameters())
    largest = max(float(bar.norm()) for bar in theta_bar.values())
    h = 1e-5
    for i, (name, bar) in enumerate((("x", x_bar), *theta_bar.items())):
        target = x if name == "x" else weights[name]
        direction = torch.randn(target.shape, generator=torch.Generator().manual_seed(i), dtype=F64)
        direction /= direction.norm().clamp(min=1e-300)
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                # In place: the file is fine-tuned like that too.
                target += sign * h * direction
                values.append(float((written.loaded(x) * y_bar).sum()))
                target -= sign * h * direction
        measured = (values[0] - values[1]) / (2 * h)
        assert abs(float((bar * direction).sum()) - measured) <= 1e-6 * largest, name


@pytest.mark.parametrize(("k", "slope"), [(1, 1.0), (3, 10.0), (6, 100.0), (8, 1e-3)])
def test_the_inner_solver_is_the_reference(k: int, slope: float) -> None:
    solver = ScriptSolver(nn.Identity(), 5, k, reference.STEPS)
    generator = np.random.default_rng(k)
    G = generator.normal(size=(3, k, 5)) * slope
    e = generator.normal(size=(3, k))
    if k > 3:
        G[0, 1], e[0, 1] = G[0, 0], e[0, 0]  # a duplicate cut
        G[1] *= 1e-9
    start = None
    for lam_start in (None, np.full((3, k - 1), 1.0 / (k - 1)) if k > 1 else None):
        expected = reference.bundle_entropy_solve(G, e, lam_start)
        start = None if lam_start is None else torch.from_numpy(lam_start)
        got = solver.inner(torch.from_numpy(G), torch.from_numpy(e), start, reference.STEPS)
        np.testing.assert_allclose(got.y.numpy(), expected.y, rtol=0, atol=SAME_ALGORITHM)
        scale = 1 + np.abs(expected.lower_bound).max()
        np.testing.assert_allclose(got.lower_bound.numpy(), expected.lower_bound, rtol=0, atol=SAME_ALGORITHM * scale)
        assert (got.residual.numpy()[:, 2] <= 1e-8 * scale).all()
        y_bar = generator.normal(size=(3, 5))
        lam = torch.from_numpy(np.array(expected.lam))
        c = solver.kkt_adjoint(torch.from_numpy(G), torch.from_numpy(e), lam, torch.from_numpy(y_bar))
        c_y, c_lam = reference.kkt_adjoint(G, e, expected.lam, y_bar)
        np.testing.assert_allclose(c[0].numpy(), c_y, rtol=0, atol=SAME_ALGORITHM * (1 + np.abs(c_y).max()))
        # Duplicate cuts share their c_λ in any proportion: only what they do together is told.
        together = np.einsum("bk,bkn->bn", c_lam, G)
        mine = np.einsum("bk,bkn->bn", c[1].numpy(), G)
        np.testing.assert_allclose(mine, together, rtol=0, atol=1e-8 * (1 + np.abs(together).max()))


def test_a_sample_that_is_not_finite_is_nan_and_spoils_no_other(picnn: Written) -> None:
    x, _ = picnn.inputs(3)
    expected = picnn.loaded(x)
    x[1, 0] = float("nan")
    y = picnn.loaded(x)
    assert y[1].isnan().all()
    torch.testing.assert_close(y[[0, 2]], expected[[0, 2]], rtol=0, atol=1e-9)


def test_frozen_weights_get_no_gradient(picnn: Written) -> None:
    loaded = load_torchscript(picnn.path)
    names = [name for name, _ in loaded.energy.named_parameters()]
    for name, p in loaded.energy.named_parameters():
        p.requires_grad_(name == names[3])
    x, y = picnn.inputs(2)
    expected, x_expected = picnn.loaded.vjp(x, y)
    theta_bar, x_bar = loaded.vjp(x, y)
    assert list(theta_bar) == [names[3]]
    torch.testing.assert_close(theta_bar[names[3]], expected[names[3]])
    torch.testing.assert_close(x_bar, x_expected)


# ---------------------------------------------------------------- against the package


def test_it_gives_the_answers_of_the_package(relu_network: FICNN, relu_package: Path, tmp_path: Path) -> None:
    energy = copy.deepcopy(relu_network)
    session = icnnrt.load(relu_package)
    generator = torch.Generator().manual_seed(2)
    x, y = torch.randn(5, 3, generator=generator, dtype=F64), torch.rand(5, 4, generator=generator, dtype=F64)
    path = export_torchscript(energy, BundleEntropyArgmin(energy, 12), x, y, tmp_path / "relu.pt")
    tell(check_torchscript(path, session, x, y), BOUNDS[F64])
    solution = session.argmin(x.numpy())
    assert np.abs(load_torchscript(path).argmin(x).y.numpy() - solution.y).max() <= 1e-6

    with torch.no_grad():
        energy.layers[0].W_y.mul_(1.1)  # another network's file
    other = export_torchscript(energy, BundleEntropyArgmin(energy, 12), x, y, tmp_path / "other.pt")
    assert check_torchscript(other, session, x, y)["y"] > 1e-3


class Files(NamedTuple):
    energy: nn.Module
    torchscript: Path
    program: Path


@pytest.fixture(scope="module")
def relu_files(relu_network: FICNN, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Files]:
    """Files of the network of `relu_package`, and of another one."""
    made = {}
    for name, factor in (("same", 1.0), ("other", 1.1)):
        energy = copy.deepcopy(relu_network)
        with torch.no_grad():
            energy.layers[0].W_y.mul_(factor)
        layer, folder = BundleEntropyArgmin(energy, 12), tmp_path_factory.mktemp(name)
        x, y = torch.randn(5, 3, dtype=F64), torch.rand(5, 4, dtype=F64)
        script = export_torchscript(energy, layer, x, y, folder / "relu.pt")
        made[name] = Files(energy, script, export_program(energy, layer, x, y, folder / "relu.pt2"))
    return made


def verify_command(package: Path, *options: object) -> Any:
    arguments = ["verify", package, "--samples", 2, *options]
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200", "NO_COLOR": "1"})


def test_verify_compares_files_with_the_package(relu_package: Path, relu_files: dict[str, Files]) -> None:
    same, other = relu_files["same"], relu_files["other"]
    done = verify_command(relu_package, "--torchscript", same.torchscript, "--program", same.program)
    assert done.exit_code == 0, done.output
    for name in ("torchscript: y", "torchscript: adjoint", "program: gradient"):
        assert name in done.stdout
    done = verify_command(relu_package, "--torchscript", other.torchscript, "--program", same.program, "--json")
    assert done.exit_code == CHECK_FAILED, done.output
    told = json.loads(done.stdout)
    assert told["passed"] is False
    verdicts = {check["name"]: check["verdict"] for check in told["checks"]}
    assert {name for name, verdict in verdicts.items() if verdict == "fail"} == {
        f"torchscript: {figure}" for figure in ("value", "gradient", "y", "energy", "adjoint")
    }
    assert {"program: value", "program: gradient"} <= verdicts.keys()


def test_a_program_of_the_argmin_is_compared_by_its_answer(
    relu_package: Path, relu_files: dict[str, Files], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layer stands for the program, which takes a minute to write."""
    layers = {name: BundleEntropyArgmin(files.energy, 12) for name, files in relu_files.items()}

    class Loaded:
        def __init__(self, path: Path) -> None:
            self.layer = layers["same" if path == relu_files["same"].program else "other"]

        def module(self) -> Any:
            names = ("y", "lam", "energy", "lower_bound", "gap", "residual")
            return lambda x, y_init: [getattr(self.layer.solve(x, y_init), name) for name in names]

    monkeypatch.setattr(torch.export, "load", Loaded)
    x = np.random.default_rng(0).standard_normal((20, 3))
    for name, files in relu_files.items():
        checks = compare(relu_package, None, [files.program], x, samples=5)
        assert [check.name for check in checks] == ["program: y", "program: energy"]
        assert {check.verdict for check in checks} == {"pass" if name == "same" else "fail"}


def test_files_that_cannot_be_compared_are_one_sentence(
    relu_package: Path, digits_like_package: Path, relu_files: dict[str, Files], tmp_path: Path
) -> None:
    def refused(package: Path, *options: object) -> str:
        done = verify_command(package, *options)
        assert done.exit_code == ERROR, done.output
        assert done.stdout == ""
        assert done.stderr.strip().count("\n") == 0
        return str(done.stderr)

    same = relu_files["same"]
    assert "there is no such file" in refused(relu_package, "--torchscript", tmp_path / "none.pt")
    assert "write it anew with icnnrt_exporters.export_program" in refused(relu_package, "--program", same.torchscript)
    assert "torch cannot load it, or run it" in refused(digits_like_package, "--torchscript", same.torchscript)
    (tmp_path / "bad.pt").write_bytes(b"nonsense")
    assert "export_torchscript" in refused(relu_package, "--torchscript", tmp_path / "bad.pt")


# ---------------------------------------------------------------- hosts without icnnrt


def test_a_fresh_process_with_torch_alone_serves_it(picnn: Written, tmp_path: Path) -> None:
    x, y = picnn.inputs(3)
    torch.save((x, y), tmp_path / "in.pt")
    code = f"""
import sys, warnings
warnings.simplefilter("ignore")
import torch
loaded = torch.jit.load({str(picnn.path)!r})
x, y = torch.load({str(tmp_path / "in.pt")!r})
solution = loaded.argmin(x)
theta_bar, x_bar = loaded.vjp(x, y)
torch.save((loaded.value(x, y).detach(), loaded.gradient(x, y), solution.y, solution.gap, theta_bar, x_bar,
            dict(loaded.energy.state_dict()), loaded.iterations), {str(tmp_path / "out.pt")!r})
foreign = [name for name in sys.modules if name.partition(".")[0] in ("icnnrt", "icnnrt_models", "icnnrt_exporters")]
assert not foreign, foreign
"""
    # -I: neither this folder nor the environment's paths lend it icnnrt by accident.
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    value, gradient, answer, gap, theta_bar, x_bar, state, iterations = torch.load(tmp_path / "out.pt")
    here = picnn.loaded
    solution, (theta_here, x_here) = here.argmin(x), here.vjp(x, y)
    for got, expected in (
        (value, here.value(x, y)),
        (gradient, here.gradient(x, y)),
        (answer, solution.y),
        (gap, solution.gap),
        (x_bar, x_here),
    ):
        torch.testing.assert_close(got, expected.detach(), rtol=0, atol=1e-9)
    assert theta_bar.keys() == theta_here.keys()
    assert iterations == picnn.case.iterations
    torch.testing.assert_close(state, dict(picnn.energy.state_dict()), rtol=0, atol=0)


HOST = """
#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/serialization/import.h>

#include <cstdio>

// argmin and vjp at x = 0.25, ȳ = 1: y, x̄ and θ̄ of the last bias, a number a line.
int main(int, char** argv) {
  auto loaded = torch::jit::load(argv[1]);
  const auto x = at::full({2, 5}, 0.25, at::kDouble);
  const auto tell = [](const at::Tensor& t) {
    const auto flat = t.contiguous();
    for (int64_t i = 0; i < flat.numel(); ++i) std::printf("%.17g\\n", flat.data_ptr<double>()[i]);
  };
  const auto y = loaded.get_method("argmin")({x}).toTuple()->elements()[0].toTensor();
  tell(y);
  const auto bars = loaded.get_method("vjp")({x, at::ones_like(y)}).toTuple();
  tell(bars->elements()[1].toTensor());
  tell(bars->elements()[0].toGenericDict().at("layers.1.b").toTensor());
}
"""


def test_a_cpp_host_with_libtorch_alone_serves_it(picnn: Written) -> None:
    compiler = shutil.which("g++")
    home = Path(torch.__file__).parent
    if compiler is None or not (home / "include" / "torch" / "csrc" / "jit" / "api" / "module.h").is_file():
        pytest.skip("no g++, or a torch without its headers")
    command = [compiler, "-std=c++20", "-O0", "-w", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    command += [f"-I{home / 'include'}", f"-I{home / 'include' / 'torch' / 'csrc' / 'api' / 'include'}"]
    command += ["host.cpp", "-o", "host", f"-L{home / 'lib'}", "-Wl,--no-as-needed"]
    command += ["-ltorch", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{home / 'lib'}"]

    def compiled(folder: Path) -> None:
        (folder / "host.cpp").write_text(HOST, encoding="utf-8")
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    host = exports.once(exports.fingerprint((HOST, command)), compiled) / "host"
    done = subprocess.run([str(host), str(picnn.path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    x = torch.full((2, 5), 0.25, dtype=F64)
    y = picnn.loaded(x)
    theta_bar, x_bar = picnn.loaded.vjp(x, torch.ones_like(y))
    expected = torch.cat([y.flatten(), x_bar.flatten(), theta_bar["layers.1.b"]])
    got = torch.tensor([float(line) for line in done.stdout.split()], dtype=F64)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)


# ---------------------------------------------------------------- what is refused


class OneSize(nn.Module):
    y_dim = 3

    def __init__(self) -> None:
        super().__init__()
        self.of_y = nn.Linear(3, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.softplus(self.of_y(y) + x.new_zeros(int(x.shape[0]), 3)).sum(1)


class OneBranch(OneSize):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        f = nn.functional.softplus(self.of_y(y)).sum(1)
        return f + 1.0 if float(x[0, 0]) < -1e6 or len(x) % 11 == 0 else f + 0.0 * x.sum(1)


class ByNumpy(OneSize):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.from_numpy(np.square(y.detach().numpy())).sum(1)


class ByOwnFunction(OneSize):
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, y: Tensor) -> Tensor:
            return y * y

        @staticmethod
        def backward(ctx: Any, bar: Tensor) -> Tensor:
            return bar

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.Square.apply(y).sum(1)


def attempt(energy: nn.Module, path: Path, **keywords: Any) -> Path:
    energy = energy.double()
    layer = BundleEntropyArgmin(energy, 3)
    for name, value in keywords.pop("solver", {}).items():
        setattr(layer, name, value)
    x, y = keywords.pop("examples", (torch.randn(2, 3, dtype=F64), torch.rand(2, 3, dtype=F64)))
    return export_torchscript(energy, layer, x, y, path, **keywords)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (OneSize, r"does not hold for a batch of 1.*use x\.shape\[0\] as it is"),
        (OneBranch, "trace differs from the module by .* on a batch of 1; take branches"),
        (ByNumpy, "autograd does not follow its output"),
        (ByOwnFunction, "torch.jit cannot write its forward .Could not export Python function call 'Square'"),
    ],
)
def test_energies_that_a_trace_does_not_hold(make: type[nn.Module], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=sentence):
        attempt(make(), tmp_path / "no.pt")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def small() -> FICNN:
    return FICNN(3, 3, (4,))


def test_targets_domains_and_examples_that_do_not_fit(small: FICNN, tmp_path: Path) -> None:
    path = attempt(small, tmp_path / "model.pt")
    before = path.read_bytes()
    bregman: Any = BregmanProximalGradient(small)
    with pytest.raises(ExportError, match="is there already; pass overwrite=True"):
        attempt(small, path)
    with pytest.raises(ExportError, match="is a folder; give the name of a file"):
        attempt(small, tmp_path)
    with pytest.raises(ExportError, match="is not there; create it first"):
        attempt(small, tmp_path / "nowhere" / "model.pt")
    with pytest.raises(ExportError, match="the bundle method alone, but got a BregmanProximalGradient"):
        export_torchscript(small, bregman, torch.rand(2, 3), torch.rand(2, 3), path, overwrite=True)
    with pytest.raises(ExportError, match="its domain is 'simplex', but this export writes 'unit_box' alone"):
        attempt(small, path, overwrite=True, solver={"domain": "simplex"})
    with pytest.raises(ExportError, match="expected one dtype"):
        attempt(small, path, overwrite=True, examples=(torch.randn(2, 3, dtype=F64), torch.rand(2, 3)))
    with pytest.raises(ExportError, match="head: expected 'value' or 'argmin', but got 'nothing'"):
        export_program(small, BundleEntropyArgmin(small, 3), torch.rand(2, 3), torch.rand(2, 3), path, head="nothing")
    assert path.read_bytes() == before
    small.train()
    attempt(small, path, overwrite=True, solver={"domain": "unit_box"})
    assert small.training
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt"]


def test_bad_inputs_of_a_loaded_file(picnn: Written) -> None:
    x, y = picnn.inputs(3)
    for arguments, sentence in (
        ((x, y[:2]), "y_init must have shape"),
        ((x, y.float()), "y_init must have the dtype of x"),
        ((x, y + 2.0), "y_init must lie in"),
        ((x, y * float("nan")), "y_init must lie in"),
    ):
        with pytest.raises(torch.jit.Error, match=sentence):
            picnn.loaded.argmin(*arguments)
    with pytest.raises(torch.jit.Error, match="y_bar must have the shape of y"):
        picnn.loaded.vjp(x, y[:2])
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"[Ii]nference"):
        picnn.loaded.argmin(x)
    with torch.no_grad():
        with pytest.raises(RuntimeError):
            picnn.loaded.gradient(x[:, :2], y)
        assert not torch.is_grad_enabled(), "an error must leave the mode as it was"


# ---------------------------------------------------------------- torch.export


@pytest.mark.parametrize("name", ["image-64"])
def test_the_program_has_value_and_gradient_for_every_batch(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    energy = case.make().to(case.dtype)
    layer = BundleEntropyArgmin(energy, case.iterations, y_dim=case.n)
    x, y = torch.randn(2, *case.x_shape, dtype=case.dtype), torch.rand(2, case.n, dtype=case.dtype)
    path = export_program(energy, layer, x, y, tmp_path / "model.pt2")
    assert energy.training
    energy.eval()
    program = torch.export.load(path)
    aliases = {"first.weight", "second.weight"}
    assert set(program.state_dict) - aliases == set(energy.state_dict()) - aliases
    for name, tensor in program.state_dict.items():
        assert torch.equal(tensor, energy.state_dict()[name])
    module = program.module()
    for B in (1, 2, 7):
        x, y = torch.randn(B, *case.x_shape, dtype=case.dtype), torch.rand(B, case.n, dtype=case.dtype)
        leaf = y.clone().requires_grad_()
        f = energy(x, leaf)
        (g,) = torch.autograd.grad(f.sum(), leaf)
        with torch.no_grad():
            got = module(x, y)
        bounds = BOUNDS[case.dtype]
        torch.testing.assert_close(got[0], f.detach(), rtol=bounds["value"], atol=bounds["value"])
        torch.testing.assert_close(got[1], g, rtol=bounds["gradient"], atol=bounds["gradient"])


def test_the_program_of_the_argmin(tmp_path: Path) -> None:
    torch.manual_seed(0)
    energy = PICNN(2, 3, (5,), activation="softplus", dtype=F64)
    layer = BundleEntropyArgmin(energy, 2)
    x, y = torch.randn(2, 2, dtype=F64), torch.rand(2, 3, dtype=F64)
    program = torch.export.load(export_program(energy, layer, x, y, tmp_path / "argmin.pt2", head="argmin"))
    assert set(program.state_dict) == set(energy.state_dict())
    module = program.module()
    for B in (1, 3):
        x, y = torch.randn(B, 2, dtype=F64), torch.rand(B, 3, dtype=F64)
        with torch.no_grad():
            got, expected = module(x, y), layer.solve(x, y)
        for value, field in zip(got, ("y", "lam", "energy", "lower_bound", "gap", "residual"), strict=True):
            torch.testing.assert_close(value, getattr(expected, field), rtol=0, atol=SAME_ALGORITHM, msg=field)


def test_the_package_names_them() -> None:
    assert icnnrt_exporters.export_torchscript is export_torchscript
    assert icnnrt_exporters.export_program is export_program
    assert icnnrt_exporters.check_torchscript is check_torchscript
