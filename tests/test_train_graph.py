"""train.onnx, run by plain onnxruntime with its outputs fed back as inputs, is torch's argmin layer under torch.optim.

Both sides solve each model to rounding, by different methods (the layer and the portable bodies with an interior point
method, the native kernels with Newton's), and where an answer amplifies rounding they part. The tight comparisons keep
away from that:

- A smooth energy near its optimum is flat to second order, so there y, and with it the gradient, is known to the
  square root of rounding only. Three cuts through steep energies leave the bundle method away from the optimum.
- From the third cut of a ReLU energy on, cut points are kinks to the last bit, and rounding picks the face. Two cuts
  have none there: ½, and the answer to the first.
- Of many steps that follow their own weights, one that amplifies rounding sends all others elsewhere. Each step of
  onnxruntime begins with the weights and the state that torch's same step began with.

`test_at_convergence` shows what holds of the rest, and of steps that follow their own weights.
"""

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from amounts import ALL
from safetensors import numpy as safetensors_numpy
from torch import Tensor, nn

import icnnrt
from icnnrt.errors import ExportError
from icnnrt.format.contents import weight_layout
from icnnrt.format.signatures import STEP_ANSWER
from icnnrt.format.signs import NONNEGATIVE, Sign
from icnnrt.native_library import build as native_build
from icnnrt_exporters import SGD, Adam, AdamW, TrainSpec, writing
from icnnrt_exporters.assembly import losses as losses_module
from icnnrt_exporters.assembly.losses import binary_cross_entropy, huber, loss_graph, named, squared_error
from icnnrt_exporters.assembly.optimizers import resolve
from icnnrt_exporters.assembly.train_graph import train_graph
from icnnrt_exporters.energy_package import RESIDUAL_TOLERANCE
from icnnrt_exporters.exporter import export
from icnnrt_exporters.graphs.onnx_head import quiet, to_onnx
from icnnrt_exporters.tracing.energy_graph import trace_energy
from icnnrt_exporters.tracing.heads import cut_vjp, hessian_vector_product, value_and_gradient
from icnnrt_models import FICNN, PICNN, BundleEntropyArgmin

Arrays = dict[str, np.ndarray]

STEPS = 100 if ALL else 30
TO_CONVERGENCE = 100
BATCH, SAMPLES = 6, 24
X_DIM, N = 3, 6
# Of weights and state after a step. float64: rounding of the solves. float32: of every node.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
# Of how many of the steps: where a multiplier and its slack are both nearly zero in one of the models, the gradient
# jumps, and each method smooths the jump in its own way. Few steps come so near.
MOST = 0.9
# On smooth energies solved to rounding; see the module docstring.
AT_CONVERGENCE = {torch.float64: 1e-6, torch.float32: 5e-3}
LOSS_AT_CONVERGENCE = 0.01

KERNELS = [
    "portable",
    pytest.param(
        "native", marks=pytest.mark.skipif(native_build().library is None, reason="this icnnrt has no native library")
    ),
]


# --- Graphs ----------------------------------------------------------------------------------------


class Traced(NamedTuple):
    """An energy whose heads are traced once, so that a training graph of any `TrainSpec` takes a second."""

    energy: nn.Module
    layer: BundleEntropyArgmin
    dtype: torch.dtype
    heads: tuple[Any, Any, Any]
    trainable: tuple[str, ...]
    theta: dict[str, Tensor]
    y: Tensor

    def write(self, folder: Path, spec: TrainSpec, residual_tolerance: float | None = None) -> Path:
        """train.onnx and the weights beside it, as a package has them."""
        target = spec.target(self.y)
        head, push, hvp = (model.clone() for model in self.heads)
        updated = spec.chosen(self.trainable)
        if updated != self.trainable:
            x = torch.zeros(len(self.y), X_DIM, dtype=self.dtype)
            with quiet():
                push = to_onnx(cut_vjp(trace_energy(self.energy, x, self.y), x, self.y, self.layer.iterations, updated))
        with quiet():
            loss = loss_graph(named(spec.loss)[1], self.y, target)
        graph = train_graph(
            head,
            push,
            hvp,
            loss,
            K=self.layer.iterations,
            steps=self.layer.steps,
            optimizer=resolve(spec.optimizer),
            updated=updated,
            signs={name: Sign(NONNEGATIVE) for name in nonnegative_of(self.energy)},
            depth=self.layer.iterations if spec.adjoint == "exact" else 1,
            clip_norm=spec.clip_norm,
            residual_tolerance=residual_tolerance or RESIDUAL_TOLERANCE[str(self.dtype).removeprefix("torch.")],
        )
        weights = {name: t.detach().numpy() for name, t in self.theta.items()}
        data, layout = weight_layout(weights)
        (folder / "weights.safetensors").write_bytes(data)
        path = folder / "train.onnx"
        path.write_bytes(writing.serialise(graph, weights, layout, {}))
        return path


def nonnegative_of(energy: nn.Module) -> tuple[str, ...]:
    return energy.nonnegative_weights() if hasattr(energy, "nonnegative_weights") else ()


def traced(energy: nn.Module, K: int, n: int = N) -> Traced:
    parameter = next(energy.parameters())
    layer = BundleEntropyArgmin(energy, iterations=K, y_dim=n)
    x, y = torch.zeros(11, X_DIM, dtype=parameter.dtype), torch.full((11, n), 0.4, dtype=parameter.dtype)
    with quiet():
        graph = trace_energy(energy, x, y)
        learnable = {name for name, p in energy.named_parameters() if p.requires_grad}
        trainable = tuple(name for name in graph.theta if name in learnable)
        heads = (
            to_onnx(value_and_gradient(graph, x, y)),
            to_onnx(cut_vjp(graph, x, y, K, trainable)),
            to_onnx(hessian_vector_product(graph, x, y)),
        )
    return Traced(energy, layer, parameter.dtype, heads, trainable, dict(graph.theta), y)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def steep_(energy: nn.Module, factor: float) -> nn.Module:
    """The energy's slopes times a factor, so that few cuts leave the argmin far from converged."""
    with torch.no_grad():
        for name, p in energy.named_parameters():
            if name.endswith("W_y"):
                p.mul_(factor)
    return energy


def ficnn(activation: str, dtype: torch.dtype, positivity: Any = "projection") -> nn.Module:
    energy = FICNN(X_DIM, N, (10, 8), activation, positivity, generator=seeded(), dtype=dtype)
    return steep_(energy, 2.0 if activation == "relu" else 5.0)


ENERGIES: dict[str, Callable[[], tuple[nn.Module, int]]] = {
    "relu-64": lambda: (ficnn("relu", torch.float64), 2),
    "relu-32": lambda: (ficnn("relu", torch.float32), 2),
    "softplus-64": lambda: (ficnn("softplus", torch.float64), 3),
    "softplus-32": lambda: (ficnn("softplus", torch.float32), 3),
    "converged-softplus-64": lambda: (ficnn("softplus", torch.float64), 6),
    "converged-softplus-32": lambda: (ficnn("softplus", torch.float32), 6),
    "positive-64": lambda: (ficnn("softplus", torch.float64, "softplus"), 3),
}
_traced: dict[str, Traced] = {}


@pytest.fixture
def graphs() -> Callable[[str], Traced]:
    def get(name: str) -> Traced:
        if name not in _traced:
            _traced[name] = traced(*ENERGIES[name]())
        return _traced[name]

    return get


# --- Plain onnxruntime -----------------------------------------------------------------------------


class Plain:
    """What a user of onnxruntime does, in any language: outputs new.<name> are fed back as the inputs <name>."""

    def __init__(self, path: Path, kernels: str = "portable") -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        if kernels == "native":
            options.register_custom_ops_library(icnnrt.ops_library())
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.outputs = [node.name for node in self.session.get_outputs()]
        self.moving = [name.removeprefix("new.") for name in self.outputs if name.startswith("new.")]
        types = {"tensor(float)": np.float32, "tensor(double)": np.float64, "tensor(int64)": np.int64}
        self.values = {
            node.name: np.zeros(node.shape, types[node.type])
            for node in self.session.get_inputs()
            if node.name.startswith("state.")
        }
        weights = safetensors_numpy.load_file(path.parent / "weights.safetensors")
        self.values |= {name: weights[name] for name in self.moving if name in weights}
        self.rate = next(types[node.type] for node in self.session.get_inputs() if node.name == "learning_rate")

    def step(self, x: np.ndarray, target: np.ndarray, learning_rate: float) -> dict[str, np.ndarray]:
        feeds = {"x": x, "target": target, "learning_rate": np.array(learning_rate, self.rate), **self.values}
        out = dict(zip(self.outputs, self.session.run(None, feeds), strict=True))
        self.values = {name: out[f"new.{name}"] for name in self.moving}
        return out


class Data(NamedTuple):
    x: np.ndarray
    y: np.ndarray

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        rows = np.random.default_rng(step).choice(len(self.x), BATCH, replace=False)
        return self.x[rows], self.y[rows]


def data(dtype: torch.dtype, classes: bool = False) -> Data:
    rng, T = np.random.default_rng(0), str(dtype).removeprefix("torch.")
    y = rng.integers(N, size=SAMPLES) if classes else rng.uniform(0.05, 0.95, (SAMPLES, N)).astype(T)
    return Data(rng.standard_normal((SAMPLES, X_DIM)).astype(T), y)


def by_torch(
    g: Traced,
    samples: Data,
    loss: Callable[[Tensor, Tensor], Tensor],
    optimizer: Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer],
    *,
    clip_norm: float | None = None,
    updated: Sequence[str] | None = None,
    adjoint: str = "exact",
    steps: int = STEPS,
) -> tuple[list[Arrays], list[float], list[float]]:
    """The same by the argmin layer and torch.optim: weights and state as they were before each step and after the last,
    losses and gradient norms."""
    energy = copy.deepcopy(g.energy)
    layer = BundleEntropyArgmin(energy, g.layer.iterations, adjoint=adjoint, y_dim=g.layer.y_dim)  # type: ignore[arg-type]
    moving = [energy.get_parameter(name) for name in g.trainable if updated is None or name in updated]
    for p in energy.parameters():
        p.requires_grad_(any(p is q for q in moving))
    stepper = optimizer(moving)
    met, losses, norms = [], [], []

    def note() -> None:
        now = {name: p.detach().numpy().copy() for name, p in energy.named_parameters()}
        slots = [slot for slot, a in stepper.state[moving[0]].items() if slot != "step" and a is not None]
        for slot in slots:
            now[f"state.{slot}"] = np.concatenate([stepper.state[p][slot].numpy().ravel() for p in moving])
        met.append(now)

    note()
    for i in range(steps):
        x, y = map(torch.from_numpy, samples.batch(i))
        stepper.zero_grad()
        value = loss(layer(x), y)
        value = value.mean() if value.dim() else value
        value.backward()
        norms.append(float(nn.utils.clip_grad_norm_(moving, clip_norm or float("inf"))))
        stepper.step()
        if hasattr(energy, "project_"):
            energy.project_()
        note()
        losses.append(float(value.detach()))
    return met, losses, norms


def by_onnxruntime(
    path: Path,
    kernels: str,
    samples: Data,
    rate: float,
    met: list[Arrays] | None = None,
    state: bool = True,
    steps: int = STEPS,
) -> tuple[Plain, list[float], list[float], list[float]]:
    """Losses, gradient norms, and how far each step ends from where torch's step from the same point ends: in weights,
    and in state if that is asked for. Without `met` steps follow their own weights."""
    plain = Plain(path, kernels)
    losses, norms, apart = [], [], []
    for i in range(steps):
        if met:
            plain.values |= {name: array for name, array in met[i].items() if name in plain.moving}
        out = plain.step(*samples.batch(i), rate)
        assert out["accepted"]
        assert out["safe"].all()
        losses.append(float(out["loss"]))
        norms.append(float(out["gradient_norm"]))
        if met:
            judged = [name for name in met[i + 1] if name in plain.moving and (state or not name.startswith("state."))]
            apart.append(max(float(np.abs(plain.values[name] - met[i + 1][name]).max()) for name in judged))
    assert plain.values["state.step"] == steps
    return plain, losses, norms, apart


def most(errors: Any) -> float:
    """What all but few are within."""
    return float(np.quantile(errors, MOST))


# --- Parity with torch -----------------------------------------------------------------------------


def weighted(y: Tensor, target: Tensor) -> Tensor:
    """A loss of one's own, one number for each sample."""
    return ((y - target).abs() ** 1.5 * torch.arange(1, N + 1)).sum(1) / 3


def right_class(y: Tensor, target: Tensor) -> Tensor:
    """A loss of one's own with classes for targets."""
    return nn.functional.cross_entropy(4 * y, target)


class Run(NamedTuple):
    energy: str
    loss: Any
    optimizer: Any
    rate: float
    clip_norm: float | None = None
    classes: bool = False

    def judge(self) -> Callable[[Tensor, Tensor], Tensor]:
        """torch's own statement of the loss."""
        return JUDGES[self.loss] if isinstance(self.loss, str) else self.loss

    def judge_optimizer(self, parameters: Any) -> torch.optim.Optimizer:
        if isinstance(self.optimizer, str):
            return DEFAULTS[self.optimizer](parameters, self.rate)
        return getattr(optim, type(self.optimizer).__name__)(parameters, self.rate, **asdict(self.optimizer))


def huber_loss(y: Tensor, target: Tensor) -> Tensor:
    return nn.functional.huber_loss(y, target, delta=0.1)


mse, optim = nn.functional.mse_loss, torch.optim
JUDGES = {"squared_error": mse, "binary_cross_entropy": nn.functional.binary_cross_entropy, "huber": huber_loss}
DEFAULTS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p, rate: optim.SGD(p, rate, momentum=0.9),
    "adam": optim.Adam,
    "adamw": optim.AdamW,
}
# ε far above the rounding of a gradient. Of a weight whose gradient is zero, as of the bias of the last layer and of
# every ReLU that is on everywhere, Adam otherwise makes steps of that rounding, which differs between implementations.
EPS, EPS_32 = 1e-6, 1e-4
RUNS = {
    "sgd-momentum": Run("relu-64", "squared_error", "sgd", 0.3),
    "sgd-decay-clip": Run("softplus-64", "huber", SGD(0.5, weight_decay=0.02), 0.3, clip_norm=0.003),
    "sgd-positive": Run("positive-64", "squared_error", SGD(), 0.3),
    "sgd-classes": Run("softplus-64", right_class, "sgd", 0.1, classes=True),
    "adam": Run("softplus-64", "squared_error", "adam", 0.003),
    "adam-relu": Run("relu-64", "huber", Adam(eps=1e-5), 0.003),
    "adam-decay": Run("softplus-64", "binary_cross_entropy", Adam((0.8, 0.95), EPS, 0.01), 0.003),
    "adam-positive": Run("positive-64", "huber", "adam", 0.003),
    "adamw-clip": Run("softplus-64", "binary_cross_entropy", "adamw", 0.003, clip_norm=0.05),
    "adamw-own": Run("softplus-64", weighted, AdamW(eps=EPS, weight_decay=0.1), 0.003),
    "sgd-32": Run("relu-32", "squared_error", "sgd", 0.1),
    "sgd-decay-clip-32": Run("softplus-32", "binary_cross_entropy", SGD(0.5, 0.02), 0.1, clip_norm=0.05),
    "adam-32": Run("softplus-32", "squared_error", Adam(eps=EPS_32), 0.003),
    "adamw-clip-32": Run("softplus-32", "huber", AdamW(eps=EPS_32), 0.003, clip_norm=0.003),
    "adam-classes-32": Run("softplus-32", right_class, Adam(eps=EPS_32), 0.003, classes=True),
}


# Every loss, optimiser, clipping, sign, kind of target and dtype once; the others repeat them in other company.
COVERING = ("sgd-decay-clip", "sgd-positive", "sgd-classes", "adam-relu", "adamw-clip", "adamw-own", "sgd-32")


@pytest.fixture(
    scope="module",
    params=[name if name in COVERING else pytest.param(name, marks=pytest.mark.slow) for name in RUNS],
)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Traced, Path, Any]:
    one = RUNS[request.param]
    if one.energy not in _traced:
        _traced[one.energy] = traced(*ENERGIES[one.energy]())
    g = _traced[one.energy]
    example = torch.zeros(2, dtype=torch.int64) if one.classes else None
    spec = TrainSpec(one.loss, one.optimizer, clip_norm=one.clip_norm, target_example=example)
    path = g.write(tmp_path_factory.mktemp(request.param), spec)
    samples = data(g.dtype, one.classes)
    expected = by_torch(g, samples, one.judge(), one.judge_optimizer, clip_norm=one.clip_norm)
    return one, g, path, expected


@pytest.mark.parametrize("kernels", KERNELS)
def test_many_steps_equal_torch(run: tuple[Run, Traced, Path, Any], kernels: str) -> None:
    one, g, path, (met, losses, norms) = run
    samples, tolerance = data(g.dtype, one.classes), TOLERANCE[g.dtype]
    smooth = "relu" not in one.energy  # else what the projection takes away may be of another face of a kink
    plain, found_losses, found_norms, apart = by_onnxruntime(path, kernels, samples, one.rate, met, state=smooth)
    assert met[-1].keys() <= set(plain.moving)
    moved = max(float(np.abs(met[-1][name] - met[0][name]).max()) for name in met[0])
    print(f"moved {moved:.2e}, apart {most(apart):.1e}, at worst {max(apart):.1e}")
    assert moved > 0.01
    assert most(apart) <= tolerance
    np.testing.assert_allclose(found_losses, losses, rtol=10 * tolerance, atol=tolerance)
    if smooth:
        assert most(np.abs(np.divide(found_norms, norms) - 1)) <= 1e-3
    if one.clip_norm:
        assert max(norms) > one.clip_norm


@pytest.mark.parametrize(
    "name", ["converged-softplus-64", pytest.param("converged-softplus-32", marks=pytest.mark.slow)]
)
def test_at_convergence(graphs: Callable[[str], Traced], tmp_path: Path, name: str) -> None:
    """Weights part further than rounding alone would have them, losses hardly."""
    g, samples = graphs(name), data(graphs(name).dtype)
    path, steps = g.write(tmp_path, TrainSpec(optimizer=SGD(momentum=0.9))), TO_CONVERGENCE
    met, losses, _ = by_torch(g, samples, mse, lambda p: optim.SGD(p, 0.1, momentum=0.9), steps=steps)
    for kernels in ("portable", "native") if native_build().library else ("portable",):
        *_, apart = by_onnxruntime(path, kernels, samples, 0.1, met, steps=steps)
        _, found, *_ = by_onnxruntime(path, kernels, samples, 0.1, steps=steps)
        print(f"{name} {kernels}: apart {most(apart):.1e}, losses {np.abs(np.subtract(found, losses)).max():.1e}")
        assert most(apart) <= AT_CONVERGENCE[g.dtype]
        np.testing.assert_allclose(found, losses, rtol=LOSS_AT_CONVERGENCE)
        assert np.mean(found[-20:]) < 0.95 * np.mean(found[:20])


# --- Which weights move ----------------------------------------------------------------------------


def test_projection_keeps_weights_nonnegative_exactly(graphs: Callable[[str], Traced], tmp_path: Path) -> None:
    """Steps so long that many weights would cross zero."""
    g = graphs("softplus-64")
    plain = Plain(g.write(tmp_path, TrainSpec(optimizer="adam")))
    samples, at_zero = data(g.dtype), 0
    for i in range(30):
        assert plain.step(*samples.batch(i), 0.1)["accepted"]
        for name in nonnegative_of(g.energy):
            assert (plain.values[name] >= 0).all()
            at_zero += int((plain.values[name] == 0).sum())
    assert at_zero > 0
    free = [n for n in plain.values if n in g.theta and n not in nonnegative_of(g.energy)]
    assert any((plain.values[n] < 0).any() for n in free)


def test_softplus_positivity_needs_no_projection(graphs: Callable[[str], Traced], tmp_path: Path) -> None:
    g = graphs("positive-64")
    assert nonnegative_of(g.energy) == ()
    path = g.write(tmp_path, TrainSpec(optimizer=SGD()))
    plain, samples = Plain(path), data(g.dtype)
    raw = [name for name in g.trainable if name.endswith("raw_weight")]
    before = {name: plain.values[name].copy() for name in raw}
    for i in range(30):
        assert plain.step(*samples.batch(i), 20.0)["accepted"]
    assert any((plain.values[name] < before[name]).any() for name in raw)
    # ln(1 + e^r) > 0 for every r that float64 holds above −745.
    assert all((np.logaddexp(0.0, plain.values[name]) > 0).all() for name in raw)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ("last", ["layers.2.W_x", "layers.2.W_y", "layers.2.b", "layers.2.W_z.weight"]),
        (["layers.*.b"], ["layers.0.b", "layers.1.b", "layers.2.b"]),
        (["*.W_y", "layers.1.W_z.weight"], ["layers.0.W_y", "layers.1.W_y", "layers.1.W_z.weight", "layers.2.W_y"]),
    ],
)
def test_frozen_weights_are_not_touched(
    graphs: Callable[[str], Traced], tmp_path: Path, weights: Any, expected: list[str]
) -> None:
    g = graphs("softplus-64")
    spec = TrainSpec(optimizer=SGD(momentum=0.9), weights=weights, clip_norm=0.05)
    assert list(spec.chosen(g.trainable)) == expected
    path = g.write(tmp_path, spec)
    met, _, _ = by_torch(
        g, data(g.dtype), mse, lambda p: optim.SGD(p, 0.3, momentum=0.9), clip_norm=0.05, updated=expected
    )
    plain, _, _, apart = by_onnxruntime(path, "portable", data(g.dtype), 0.3, met)
    assert [name for name in plain.moving if not name.startswith("state.")] == expected
    entries = sum(g.theta[name].numel() for name in expected)
    assert plain.values["state.momentum_buffer"].shape == (entries,)
    assert most(apart) <= TOLERANCE[g.dtype]


def test_a_shorter_way_back_for_the_cheaper_adjoint(graphs: Callable[[str], Traced], tmp_path: Path) -> None:
    g = graphs("softplus-64")
    path = g.write(tmp_path, TrainSpec(optimizer=SGD(), adjoint="prop3"))
    met, _, _ = by_torch(g, data(g.dtype), mse, lambda p: optim.SGD(p, 0.3), adjoint="prop3")
    exact, _, _ = by_torch(g, data(g.dtype), mse, lambda p: optim.SGD(p, 0.3))
    *_, apart = by_onnxruntime(path, "portable", data(g.dtype), 0.3, met)
    assert most(apart) <= TOLERANCE[g.dtype]
    assert max(np.abs(exact[1][n] - met[1][n]).max() for n in met[0]) > 1e-6


# --- Refusals --------------------------------------------------------------------------------------


def unchanged(plain: Plain, before: dict[str, np.ndarray]) -> bool:
    return all(before[name].tobytes() == plain.values[name].tobytes() for name in before)


STATES = {"sgd": SGD(momentum=0.9), "adam": Adam(weight_decay=0.1), "adamw": AdamW()}
REFUSING = [
    ("softplus-64", "sgd"),
    ("softplus-32", "adam"),
    *(pytest.param(*one, marks=pytest.mark.slow) for one in (("softplus-32", "sgd"), ("softplus-64", "adam"))),
    *(pytest.param(name, "adamw", marks=pytest.mark.slow) for name in ("softplus-64", "softplus-32")),
]


@pytest.mark.parametrize(("name", "optimizer"), REFUSING)
def test_a_refused_step_leaves_everything_as_it_was(
    graphs: Callable[[str], Traced], tmp_path: Path, name: str, optimizer: str
) -> None:
    """To the bit, and the next good step is as if nothing had been."""
    g = graphs(name)
    path = g.write(tmp_path, TrainSpec(optimizer=STATES[optimizer]))
    for kernels in ("portable", "native") if native_build().library else ("portable",):
        check_refusals(g, path, kernels)


def check_refusals(g: Traced, path: Path, kernels: str) -> None:
    plain, undisturbed, samples = Plain(path, kernels), Plain(path, kernels), data(g.dtype)
    for i in range(3):
        plain.step(*samples.batch(i), 0.01)
        undisturbed.step(*samples.batch(i), 0.01)
    # A weight on its bound, as −0, which a projection would make 0.
    held = nonnegative_of(g.energy)[0]
    for one in (plain, undisturbed):
        one.values[held] = one.values[held].copy()
        one.values[held].flat[0] = -0.0
    before = {name: array.copy() for name, array in plain.values.items()}
    x, y = samples.batch(3)
    huge = np.finfo(x.dtype).max
    attempts = {
        "target NaN": (x, np.where(np.arange(len(y))[:, None] == 2, np.nan, y).astype(y.dtype), 0.01),
        "x NaN": (np.where(np.arange(len(x))[:, None] == 1, np.nan, x).astype(x.dtype), y, 0.01),
        "x infinite": (np.where(np.arange(len(x))[:, None] == 1, np.inf, x).astype(x.dtype), y, 0.01),
        "energies overflow": (np.sign(x) * huge, y, 0.01),
        "target overflows": (x, (y * 0 + huge).astype(y.dtype), 0.01),
        "rate NaN": (x, y, np.nan),
        "rate infinite": (x, y, np.inf),
    }
    for what, attempt in attempts.items():
        assert not plain.step(*attempt)["accepted"], what
        assert unchanged(plain, before), what
    assert plain.step(x, y, 0.01)["accepted"]
    undisturbed.step(x, y, 0.01)
    assert unchanged(plain, undisturbed.values)
    assert not unchanged(plain, before)


def test_a_rate_that_throws_projected_weights_to_minus_infinity(
    graphs: Callable[[str], Traced], tmp_path: Path
) -> None:
    """The projection alone would make zeros of them, and the energy a linear one."""
    g = graphs("softplus-32")
    plain = Plain(g.write(tmp_path, TrainSpec(optimizer=SGD(momentum=0.9), weights=["*.W_z.weight"])))
    plain.values["state.momentum_buffer"] = np.full_like(plain.values["state.momentum_buffer"], 1e3)
    before = dict(plain.values)
    assert not plain.step(*data(g.dtype).batch(0), 1e37)["accepted"]
    assert unchanged(plain, before)


def test_samples_that_were_not_solved_give_no_gradient(graphs: Callable[[str], Traced], tmp_path: Path) -> None:
    """With a tolerance that some models miss, the step is that of the others, divided by the whole batch."""
    g = graphs("softplus-64")
    x, y = data(g.dtype).batch(0)
    usual = Plain(g.write(tmp_path, TrainSpec(optimizer=SGD()))).step(x, y, 0.1)
    worst = usual["complementarity_history"].max(1) / np.maximum(1, np.abs(usual["lower_bound"]))
    between = float(np.sort(worst)[2:4].mean())
    strict = Plain(g.write(tmp_path, TrainSpec(optimizer=SGD()), residual_tolerance=between))
    start = dict(strict.values)
    out = strict.step(x, y, 0.1)
    kept = worst <= between
    np.testing.assert_array_equal(out["safe"], kept)
    assert 0 < kept.sum() < BATCH
    assert out["accepted"]
    some = Plain(g.write(tmp_path, TrainSpec(optimizer=SGD())))
    some.step(x[kept], y[kept], 0.1 * kept.sum() / BATCH)
    for name in g.trainable:
        np.testing.assert_allclose(strict.values[name], some.values[name], rtol=0, atol=1e-13)
        assert not np.array_equal(strict.values[name], start[name]) or name.startswith("layers.2.")


# --- What TrainSpec refuses ------------------------------------------------------------------------


def sentence(error: pytest.ExceptionInfo[ExportError]) -> None:
    text = str(error.value)
    assert "\n" not in text
    assert text.count(". ") == 0
    assert ";" in text  # what to do about it


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: TrainSpec(loss="hinge"), "loss: expected 'squared_error', 'binary_cross_entropy', 'huber' or a func"),
        (lambda: TrainSpec(loss=3), r"'huber' or a function \(y, target\) -> loss, but got 3"),
        (lambda: TrainSpec(optimizer="lion"), "optimizer: expected 'sgd', 'adam', 'adamw' or SGD"),
        (lambda: TrainSpec(optimizer=optim.SGD), "optimizer: expected .*SGD.*, but got type"),
        (lambda: TrainSpec(clip_norm=0.0), "clip_norm: expected a positive number or None, but got 0.0"),
        (lambda: TrainSpec(clip_norm=float("nan")), "clip_norm: expected a positive number or None, but got nan"),
        (lambda: TrainSpec(clip_norm="1"), 'clip_norm: expected a positive number or None, but got "1"'),
        (lambda: TrainSpec(clip_norm=True), "clip_norm: expected a positive number or None, but got true"),
        (lambda: TrainSpec(adjoint="implicit"), "adjoint: expected 'exact' or 'prop3', but got 'impl"),
        (lambda: SGD(momentum=1.0), "momentum: expected a finite number of at least 0 and below 1, but got 1.0"),
        (lambda: SGD(weight_decay=-1.0), "weight_decay: expected a finite number of at least 0, but got -1.0"),
        (lambda: Adam(betas=(0.9, 1.0)), r"betas\[1\]: expected a finite number of at least 0 and below 1"),
        (lambda: Adam(eps=float("nan")), "eps: expected a finite number of at least 0, but got nan"),
        (lambda: AdamW(weight_decay=float("inf")), "weight_decay: expected a finite number of at least 0, but got inf"),
        (lambda: Adam(betas=0.9), r"betas: expected a tuple of two numbers, but got 0.9"),
        (lambda: Adam(eps="small"), 'eps: expected a finite number of at least 0, but got "small"'),
    ],
)
def test_a_wrong_spec_is_refused(make: Callable[[], object], expected: str) -> None:
    with pytest.raises(ExportError, match=expected) as error:
        make()
    sentence(error)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({"weights": "layers.*"}, r"weights: expected 'all', 'last' or a list of patterns, .*; write \['layers\.\*'\]"),
        (
            {"weights": ["layers.9.*"]},
            "weights: the pattern 'layers.9.\\*' fits none of the weights that require a gradi",
        ),
        (
            {"weights": []},
            r"weights: .* a list of patterns, but got \[\]; 'all' trains every weight",
        ),
        ({"weights": [3]}, r"weights: expected 'all', 'last' or a list of patterns, but got \[3\]"),
        ({"weights": 3}, r"weights: expected 'all', 'last' or a list of patterns, but got 3"),
    ],
)
def test_wrong_weights_are_refused(graphs: Callable[[str], Traced], spec: dict[str, Any], expected: str) -> None:
    with pytest.raises(ExportError, match=expected) as error:
        TrainSpec(**spec).chosen(graphs("softplus-64").trainable)
    sentence(error)


def test_nothing_to_train_is_refused() -> None:
    for weights in ("all", "last"):
        with pytest.raises(ExportError, match="no weight of the energy requires a gradient"):
            TrainSpec(weights=weights).chosen([])


def test_the_last_layer() -> None:
    def last(*names: str) -> tuple[str, ...]:
        return TrainSpec(weights="last").chosen(names)

    assert last("a.0.w", "a.0.b", "a.1.w", "a.1.b") == ("a.1.w", "a.1.b")
    assert last("v", "of_x.w", "of_y.w", "of_y.b") == ("of_y.w", "of_y.b")
    assert last("of_x.w", "v", "u") == ("v", "u")
    assert last("f.w", "f.parametrizations.w.original") == ("f.w", "f.parametrizations.w.original")
    assert last("W.0", "W.1") == ("W.1",)
    assert last("blocks.0.lin.w", "blocks.1.lin.w", "blocks.1.out.w") == ("blocks.1.lin.w", "blocks.1.out.w")


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ([1.0], "target_example: expected a batch of one target or more, but got list"),
        (torch.zeros(0, 3), r"target_example: expected a batch of one target or more, but got shape \[0, 3\]"),
        (torch.tensor(1.0), r"target_example: expected a batch of one target or more, but got shape \[\]"),
        (torch.zeros(2, dtype=torch.bool), "target_example: expected float32, float64 or int64, but got torch.bool"),
    ],
)
def test_a_wrong_target_example_is_refused(target: Any, expected: str) -> None:
    with pytest.raises(ExportError, match=expected) as error:
        TrainSpec(target_example=target).target(torch.zeros(2, 3))
    sentence(error)


def branching(y: Tensor, target: Tensor) -> Tensor:
    return (y - target).square().mean() if y.max() > 0.3 else y.mean()


def fixed_batch(y: Tensor, target: Tensor) -> Tensor:
    return (y - target).square().reshape(11, -1).mean()


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (lambda y, t: (y - t).square(), "loss: expected a float scalar or one number .*, but got torch.float"),
        (lambda y, t: 1.0, "loss: expected a float scalar or one number .*, but got float"),
        (lambda y, t: (y > t).sum(), "loss: expected a float scalar or one number .*, but got torch.int64"),
        (lambda y, t: (y > t).double().mean(), "loss: expected a function of y that torch can differentiate"),
        (lambda y, t: t.square().mean(), "loss: expected a function of y that torch can differentiate"),
        (lambda y, t: nn.functional.cross_entropy(y, t[:, :2]), r"loss: it fails on y \[11, 6\] and target \[11, 6\]"),
        (lambda y, t: torch.linalg.svdvals(y - t).sum(), "loss: it does not export"),
        (branching, "loss: it does not export"),
        (fixed_batch, "loss: it does not export"),
    ],
)  # fmt: skip
def test_a_wrong_loss_is_refused(loss: Any, expected: str) -> None:
    y = torch.full((2, N), 0.5, dtype=torch.float64)
    with quiet(), pytest.raises(ExportError, match=expected) as error:
        loss_graph(loss, y, y)
    sentence(error)


def test_a_loss_that_onnx_computes_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a translation of one of its operators might."""
    real = losses_module.to_onnx
    monkeypatch.setattr(losses_module, "to_onnx", lambda head: real(loss_head_times(head)))

    def loss_head_times(head: Any) -> Any:
        for node in head.graph.graph.nodes:
            if node.op == "output":
                value, y_bar = node.args[0]
                with head.graph.graph.inserting_before(node):
                    twice = head.graph.graph.call_function(torch.ops.aten.mul.Tensor, (y_bar, 2.0))
                twice.meta = dict(y_bar.meta)
                node.args = ((value, twice),)
        head.graph.recompile()
        return head

    y = torch.full((2, N), 0.5, dtype=torch.float64)
    with (
        quiet(),
        pytest.raises(ExportError, match="loss: what ONNX computes of 11 samples differs from torch") as error,
    ):
        loss_graph(squared_error, y, y)
    sentence(error)


@pytest.mark.parametrize("loss", [squared_error, binary_cross_entropy, huber])
def test_the_built_in_losses_are_finite_at_the_edges(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    for dtype in (torch.float32, torch.float64):
        y = torch.tensor([[0.0, 1.0, 1.0, 0.0]], dtype=dtype, requires_grad=True)
        value = loss(y, torch.tensor([[1.0, 0.0, 1.0, 0.0]], dtype=dtype))
        value.backward()
        assert torch.isfinite(value)
        assert torch.isfinite(y.grad).all()


def test_names_of_losses() -> None:
    def mine(y: Tensor, target: Tensor) -> Tensor:
        return y.sum()

    def huber(y: Tensor, target: Tensor) -> Tensor:
        return y.sum()

    assert named("huber")[0] == "huber"
    assert named(squared_error)[0] == "squared_error"
    assert named(mine) == ("mine", mine)
    assert named(huber)[0] == "custom"  # not the one that users know by this name
    assert named(lambda y, t: y.sum())[0] == "custom"
    assert named(nn.MSELoss())[0] == "MSELoss"


# --- Whole exports ---------------------------------------------------------------------------------


class Foreign(nn.Module):
    """Nothing of ours; convex through a clamp in the forward, so that no weight need be projected."""

    y_dim = N

    def __init__(self) -> None:
        super().__init__()
        self.of_x = nn.Linear(X_DIM, 9)
        self.of_y = nn.Linear(N, 9, bias=False)
        self.mixing = nn.Parameter(torch.rand(9) - 0.2)
        self.scale = nn.Parameter(torch.tensor(8.0), requires_grad=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = nn.functional.softplus(self.scale * self.of_y(y) + self.of_x(x))
        return 10 * (h * self.mixing.clamp(min=0)).sum(-1)


class Whole(NamedTuple):
    make: Callable[[], nn.Module]
    spec: TrainSpec
    optimizer: Callable[[Any], torch.optim.Optimizer]
    frozen: tuple[str, ...] = ()


WHOLE = {
    "ficnn": Whole(
        lambda: ficnn("softplus", torch.float64), TrainSpec(optimizer="sgd"), lambda p: optim.SGD(p, 0.1, momentum=0.9)
    ),
    "picnn": Whole(
        lambda: steep_(PICNN(X_DIM, N, (6,), batch_norm=True, generator=seeded(), dtype=torch.float64), 5.0),
        TrainSpec(optimizer=SGD(momentum=0.9), weights=["layers.*"], clip_norm=0.1),
        lambda p: optim.SGD(p, 0.1, momentum=0.9),
        ("context_layers.",),
    ),
    "foreign": Whole(
        lambda: Foreign().double(), TrainSpec(loss=weighted, optimizer=SGD()), lambda p: optim.SGD(p, 0.1), ("scale",)
    ),
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_package_with_train_onnx(name: str, tmp_path: Path) -> None:
    case = WHOLE[name]
    torch.manual_seed(0)
    energy = case.make().eval()
    layer = BundleEntropyArgmin(energy, iterations=3)
    samples = data(torch.float64)
    x, y = map(torch.from_numpy, samples)
    package = export(energy, layer, x[:4], y[:4], tmp_path / "p.icnn", train=case.spec)
    said = package.manifest.train
    assert said is not None
    assert said.loss == named(case.spec.loss)[0]
    assert said.optimizer == "SGD"
    assert said.slots == ("momentum_buffer",)
    assert said.clip_norm == case.spec.clip_norm
    assert said.target_shape == (N,)
    assert said.target_dtype == "float64"
    assert not any(name.startswith(case.frozen) for name in said.weights if case.frozen)
    for graph in package.path.glob("*.onnx"):
        onnx.checker.check_model(graph)
    judge = copy.deepcopy(energy)
    judged = BundleEntropyArgmin(judge, iterations=3)
    moving = [p for n, p in judge.named_parameters() if n in said.weights]
    stepper = case.optimizer(moving)
    plain = Plain(package.path / "train.onnx")
    parameters = dict(judge.named_parameters())
    for i in range(10):
        with torch.no_grad():  # from the same weights: steps too long for their energy magnify rounding, each anew
            for weight in said.weights:
                parameters[weight].copy_(torch.from_numpy(plain.values[weight]))
        x_i, y_i = samples.batch(i)
        stepper.zero_grad()
        loss = named(case.spec.loss)[1](judged(torch.from_numpy(x_i)), torch.from_numpy(y_i)).mean()
        loss.backward()
        if case.spec.clip_norm:
            nn.utils.clip_grad_norm_(moving, case.spec.clip_norm)
        stepper.step()
        if hasattr(judge, "project_"):
            judge.project_()
        out = plain.step(x_i, y_i, 0.1)
        assert out["accepted"]
        assert float(out["loss"]) == pytest.approx(float(loss.detach()), abs=1e-9)
        for weight in said.weights:
            # By a solve that ends at rounding and tells y to the root of it.
            wanted = parameters[weight].detach().numpy()
            np.testing.assert_allclose(plain.values[weight], wanted, rtol=0, atol=1e-8)
        # A weight of the last layer that y does not meet has no gradient.
        last = weight.rpartition(".")[2] in ("b", "W_x", "W_u", "bias")
        assert last or not np.array_equal(plain.values[weight], package.weights[weight])
    assert set(STEP_ANSWER) <= set(plain.outputs)


def test_classes_for_a_float32_package(tmp_path: Path) -> None:
    """Integer targets through a whole export, and what the manifest says of them."""
    energy = ficnn("softplus", torch.float32)
    samples = data(torch.float32, classes=True)
    x, y = torch.from_numpy(samples.x), torch.full((4, N), 0.5)
    spec = TrainSpec(right_class, Adam(eps=EPS_32), target_example=torch.from_numpy(samples.y))
    package = export(energy, BundleEntropyArgmin(energy, iterations=3), x[:4], y, tmp_path / "p.icnn", train=spec)
    said = package.manifest.train
    assert said is not None
    assert (said.loss, said.target_shape, said.target_dtype) == ("right_class", (), "int64")
    assert json.loads((package.path / "manifest.json").read_bytes())["train"]["slots"] == ["exp_avg", "exp_avg_sq"]
    plain = Plain(package.path / "train.onnx")
    losses = [float(plain.step(*samples.batch(i), 0.03)["loss"]) for i in range(60)]
    assert np.mean(losses[-10:]) < 0.95 * np.mean(losses[:10])


def test_targets_of_another_float_dtype(graphs: Callable[[str], Traced], tmp_path: Path) -> None:
    g = graphs("softplus-32")
    target = torch.zeros(1, N, dtype=torch.float64)
    plain = Plain(g.write(tmp_path, TrainSpec(optimizer=SGD(), target_example=target)))
    x, y = data(g.dtype).batch(0)
    out = plain.step(x, y.astype(np.float64), 0.1)
    assert out["accepted"]
    assert out["loss"].dtype == np.float32


class Awkward(nn.Module):
    """A weight that bears a name of the training graph."""

    y_dim = N

    def __init__(self, name: str) -> None:
        super().__init__()
        *path, own = name.split(".")
        at: nn.Module = self
        for part in path:
            at.add_module(part, nn.Module())
            at = at.get_submodule(part)
        at.register_parameter(own, nn.Parameter(torch.ones(N, dtype=torch.float64)))
        self.name = name

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (self.get_parameter(self.name) * y).square().sum(1) + x.sum(1)


@pytest.mark.parametrize("name", ["target", "learning_rate", "loss", "safe", "state.step", "new.w"])
def test_weights_named_like_the_graphs_own(name: str, tmp_path: Path) -> None:
    energy = Awkward(name)
    x, y = torch.zeros(4, X_DIM, dtype=torch.float64), torch.full((4, N), 0.5, dtype=torch.float64)
    with pytest.raises(ExportError, match=r"energy: a weight is called .* training graph") as error:
        export(energy, BundleEntropyArgmin(energy, iterations=2), x, y, tmp_path / "p.icnn", train=TrainSpec())
    sentence(error)
    assert not any(tmp_path.iterdir())
