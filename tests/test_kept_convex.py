"""An energy that was proven convex stays so, however it is tuned: signs are kept, and what rests on more is watched."""

import contextlib
import itertools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from amounts import ALL
from exports import export
from torch import Tensor, nn
from torch.nn import functional as F

import icnnrt
from icnnrt import federated
from icnnrt.convexity import prove
from icnnrt.errors import InputError, PackageError
from icnnrt.format.signs import NONNEGATIVE, NONPOSITIVE, Sign
from icnnrt.tuning.finetune import FineTuner
from icnnrt_exporters import TrainSpec
from icnnrt_exporters.assembly.train_graph import projected
from icnnrt_exporters.surgery import Ops, describe, numbered, value
from icnnrt_models import BundleEntropyArgmin

N = 3  # entries of x and of y
RATE, STEPS = 1e-2, 200 if ALL else 100


def small_(*weights: Tensor, sign: int = 1) -> None:
    """Of this sign, in place, and so near 0 that a few steps lead beyond."""
    with torch.no_grad():
        for weight in weights:
            weight.abs_().mul_(0.1 * sign)


class Foreign(nn.Module):
    """Two plain layers of which nobody says that they must not be negative."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.u, self.b, self.c = nn.Linear(N, 8), nn.Linear(N, 8), nn.Linear(8, 6), nn.Linear(6, 1)
        small_(self.b.weight, self.c.weight)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.c(F.softplus(self.b(F.softplus(self.a(y) + self.u(x)))))[:, 0]


class Joined(nn.Module):
    """One layer over [z, y]: the columns of z must not be negative, those of y may."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(2 * N, 5), nn.Linear(5 + N, 4), nn.Linear(4, 1)
        small_(self.b.weight[:, :5], self.c.weight)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        z = F.softplus(self.a(torch.cat([x, y], 1)))
        return self.c(F.softplus(self.b(torch.cat([z, y], 1))))[:, 0]


class Downward(nn.Module):
    """What is concave, weighted by what must not be positive."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = nn.Linear(2 * N, 5), nn.Linear(5, 1)
        small_(self.c.weight, sign=-1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.c(-F.softplus(self.a(torch.cat([x, y], 1))))[:, 0]


class Quadratic(nn.Module):
    """y'Qy/2 with Q as it is, which no sign keeps positive semidefinite; and a layer that needs signs."""

    def __init__(self) -> None:
        super().__init__()
        self.Q = nn.Parameter(0.05 * torch.eye(N) + 0.03)
        self.a, self.c = nn.Linear(2 * N, 5), nn.Linear(5, 1)
        small_(self.c.weight)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        z = F.softplus(self.a(torch.cat([x, y], 1)))
        return (y @ self.Q * y).sum(1) / 2 + self.c(z)[:, 0]


class Slopes(nn.Module):
    """A PReLU, convex as long as no slope exceeds 1."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c, self.act = nn.Linear(2 * N, 5), nn.Linear(5, 1), nn.PReLU(5, 0.97)
        small_(self.c.weight)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.c(self.act(self.a(torch.cat([x, y], 1))))[:, 0]


class Factored(nn.Module):
    """y'LL'y, which is positive semidefinite whatever L is."""

    def __init__(self) -> None:
        super().__init__()
        self.L = nn.Parameter(torch.randn(N, 2))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return ((y @ self.L) ** 2).sum(1) + (x * y).sum(1)


# Targets that ask for steps one way, and for many ways.
def steep(target: np.ndarray) -> np.ndarray:
    return np.where(target > 0.5, 0.98, 0.02)


def turned(target: np.ndarray) -> np.ndarray:
    return 1 - target


class Together(nn.Module):
    """Several as one."""

    def __init__(self) -> None:
        super().__init__()
        self.joined, self.downward, self.quadratic = Joined(), Downward(), Quadratic()
        self.slopes, self.factored = Slopes(), Factored()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.stack([part(x, y) for part in self.children()], 1).sum(1)


STYLES: dict[str, tuple[type[nn.Module], dict[str, object], tuple[str, ...]]] = {
    # style -> signs that are found, weights whose values the proof needs
    "foreign": (Foreign, {"b.weight": "nonnegative", "c.weight": "nonnegative"}, ()),
    "together": (
        Together,
        {
            "joined.b.weight": {"axis": 1, "runs": [[0, 5, "nonnegative"]]},
            "joined.c.weight": "nonnegative",
            "downward.c.weight": "nonpositive",
            "quadratic.c.weight": "nonnegative",
            "slopes.c.weight": "nonnegative",
        },
        ("quadratic.Q", "slopes.act.weight"),
    ),
}


def samples(seed: int = 0, B: int = 16) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((B, N)), rng.uniform(0.02, 0.98, (B, N))


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made: dict[str, Path] = {}
    for style, (kind, _, _) in STYLES.items():
        torch.manual_seed(0)
        energy = kind().double()
        path = tmp_path_factory.mktemp("styles") / f"{style}.icnn"
        x, y = map(torch.from_numpy, samples())
        layer = BundleEntropyArgmin(energy, iterations=4, y_dim=N)
        export(energy, layer, x, y, path, train=TrainSpec())
        made[style] = path
    return made


@pytest.mark.parametrize("style", STYLES)
def test_the_manifest_says_what_the_proof_rests_on(packages: dict[str, Path], style: str) -> None:
    _, signs, values = STYLES[style]
    manifest = icnnrt.Package.open(packages[style]).manifest
    assert {name: s.sign.to_json() for name, s in manifest.weights.tensors.items() if s.sign} == signs
    assert manifest.convexity is not None
    assert (manifest.convexity.verdict, manifest.convexity.rests_on) == ("proven", values)


@pytest.mark.parametrize(
    ("op", "value", "told"),
    [
        ("Identity", -0.25, "w should be >= 0 where it meets values that are convex in y, but reaches -0.25"),
        ("Neg", 0.25, "w should be <= 0 where it meets values that are concave in y, but reaches 0.25"),
    ],
)
def test_a_weight_of_the_wrong_sign_is_told_with_the_side_that_it_should_be_on(
    op: str, value: float, told: str
) -> None:
    model = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["": 18]>
        value (double[batch, 3] x, double[batch, 3] y) => (double[batch] f)
        <double[3, 1] w = {{{value}, {value}, {value}}}, int64[1] one = {{1}}> {{
            z = Exp(y)
            s = {op}(z)
            p = MatMul(s, w)
            f = Squeeze(p, one)
        }}"""
    )
    assert prove(model.SerializeToString(), {}).reason == told


@pytest.mark.parametrize("goal", [steep, turned], ids=["steep", "turned"])
@pytest.mark.parametrize("style", STYLES)
def test_proven_before_proven_after(packages: dict[str, Path], style: str, goal: Any, tmp_path: Path) -> None:
    session = icnnrt.load(packages[style])
    tuner = FineTuner(session, learning_rate=RATE)
    x, target = samples(1)
    _, signs, values = STYLES[style]
    reports, bound = [], set()
    for _ in range(STEPS):
        reports.append(tuner.step(x, goal(target)))
        bound |= {name for name in signs if (session.weights[name] == 0).any()}
    assert sum(r.accepted for r in reports) > STEPS / 2
    assert {name for r in reports for name in r.held} <= set(values)
    assert bound  # went as far as they may, so without their signs they would have gone beyond
    assert session.convexity.proven_with(session.weights_id)
    assert (session.argmin(x).status <= icnnrt.Status.GAP).all()
    assert session.prove_convexity().verdict == "proven"
    written = tuner.write_package(tmp_path / "tuned.icnn")
    assert written.manifest.convexity is not None
    assert written.manifest.convexity.verdict == "proven"
    assert written.manifest.convexity.rests_on == STYLES[style][2]
    with icnnrt.load(written) as again:
        np.testing.assert_array_equal(again.argmin(x).status, session.argmin(x).status)
        assert FineTuner(again, learning_rate=RATE).step(x, target).accepted


@pytest.mark.parametrize("wrong", [{"quadratic.Q": -1.0}, {"slopes.act.weight": 1.5}], ids=["quadratic", "slopes"])
def test_weights_that_would_lose_the_proof_stay(
    packages: dict[str, Path], wrong: dict[str, float], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    session = icnnrt.load(packages["together"])
    tuner = FineTuner(session, learning_rate=RATE)
    x, target = samples(2)
    assert tuner.step(x, target).accepted
    tuner.save(tmp_path / "h")
    real = tuner.session.runner.run

    def led_astray(*args: Any, **keywords: Any) -> Any:
        out, weights_id = real(*args, **keywords)
        for name, value in wrong.items():
            if f"new.{name}" in out:
                out[f"new.{name}"][...] = value
        return out, weights_id

    before = dict(session.weights)
    monkeypatch.setattr(tuner.session.runner, "run", led_astray)
    report = tuner.step(x, target)
    monkeypatch.undo()
    (name, value), *_ = wrong.items()
    assert report.accepted
    assert name in report.held
    np.testing.assert_array_equal(session.weights[name], before[name])
    assert any((session.weights[n] != before[n]).any() for n in before)
    weights_id = session.weights_id
    for where in (session, tuner):
        with pytest.raises(InputError, match="and the energy would no longer be known to be convex; average"):
            federated.set_weights(where, {name: np.full_like(before[name], value)})
    assert session.weights_id == weights_id
    assert tuner.step(x, target).accepted
    assert tuner.resume(tmp_path / "h").step == 1


def over(x: Tensor, y: Tensor, d: Tensor, c: Tensor) -> Tensor:
    return (y * y / d).sum(1)


def times_the_reciprocal(x: Tensor, y: Tensor, d: Tensor, c: Tensor) -> Tensor:
    return (y * y * (1 / d)).sum(1)


def at_a_temperature(x: Tensor, y: Tensor, d: Tensor, c: Tensor) -> Tensor:
    return d[0] * torch.logsumexp(y / d[0], 1)


def to_a_power(x: Tensor, y: Tensor, d: Tensor, c: Tensor) -> Tensor:
    return (y * y * d**-2).sum(1)


def logarithm_of_a_sum(x: Tensor, y: Tensor, d: Tensor, c: Tensor) -> Tensor:
    return torch.log((torch.exp(y) * c).sum(1) + d[0])


def with_a_divisor_of_x(x: Tensor, y: Tensor, d: Tensor, c: Tensor) -> Tensor:
    return (y * y / (d * (1 + x.abs()))).sum(1)


def with_x_alone_beside(x: Tensor, y: Tensor, d: Tensor, c: Tensor) -> Tensor:
    return (y * y / (d * x.exp())).sum(1)


def before_y_is_met(x: Tensor, y: Tensor, d: Tensor, c: Tensor) -> Tensor:
    return (x * d.log()).sum(1)


class Divided(nn.Module):
    """Something is divided by d, and must not be by 0; c scales convex y² besides."""

    def __init__(self, form: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.d, self.c, self.form = nn.Parameter(torch.full((N,), 0.1)), nn.Parameter(torch.full((N,), 0.1)), form

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.form(x, y, self.d, self.c) + (self.c * (y * y)).sum(1) + (x * y).sum(1)


@pytest.mark.parametrize(
    "form",
    [
        *(over, at_a_temperature, to_a_power, logarithm_of_a_sum, with_a_divisor_of_x, with_x_alone_beside),
        pytest.param(times_the_reciprocal, marks=pytest.mark.slow),
    ],
    ids=lambda form: form.__name__,
)
def test_no_weight_that_f_is_divided_by_becomes_zero(
    form: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], tmp_path: Path
) -> None:
    """A sign holds 0 as well, where f would not be finite for any x: the proof is repeated for such weights."""
    energy = Divided(form).double()
    x, y = map(torch.from_numpy, samples())
    session = icnnrt.load(
        export(energy, BundleEntropyArgmin(energy, iterations=4, y_dim=N), x, y, tmp_path / "d.icnn", train=TrainSpec())
    )
    manifest = session.manifest
    assert manifest.convexity is not None
    assert (manifest.convexity.verdict, manifest.convexity.rests_on) == ("proven", ("d",))
    assert manifest.weights.signs == {"c": Sign(NONNEGATIVE)}
    with pytest.raises(InputError, match=r"not finite where .*\bd (may )?puts? it"):
        federated.set_weights(session, {"d": np.zeros(N)})
    zero = {"c": np.zeros(N), "d": np.zeros(N)}
    assert prove(session.package.graphs["value"], zero).verdict != "proven"
    tuner = FineTuner(session, learning_rate=0.05)
    inputs, target = samples(1)
    for _ in range(30):
        tuner.step(inputs, steep(target))
    assert np.isfinite(session.value(inputs, target)).all()
    assert session.prove_convexity().verdict == "proven"


def test_nor_where_it_is_met_before_y_is(tmp_path: Path) -> None:
    energy = Divided(before_y_is_met).double()
    x, y = map(torch.from_numpy, samples())
    session = icnnrt.load(export(energy, None, x, y, tmp_path / "d.icnn"))
    assert session.manifest.convexity is not None
    assert (session.manifest.convexity.verdict, session.manifest.convexity.rests_on) == ("proven", ("d",))
    for number in (0.0, -1.0):
        with pytest.raises(InputError, match="Log is not finite where d puts it"):
            federated.set_weights(session, {"d": np.full(N, number)})


class Difference(nn.Module):
    """(a − b)‖y‖², convex as long as a is not less than b: a proof that needs the values of two weights."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor([3.0])), nn.Parameter(torch.tensor([1.0]))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (self.a - self.b) * (y * y).sum(1) + (x * y).sum(1)


def test_a_proof_is_of_the_weights_that_there_are(tmp_path: Path) -> None:
    """Not of those that were tried last."""
    energy = Difference().double()
    x, y = map(torch.from_numpy, samples())
    layer = BundleEntropyArgmin(energy, iterations=4, y_dim=N)
    session = icnnrt.load(export(energy, layer, x, y, tmp_path / "d.icnn", train=TrainSpec()))
    convexity = session.manifest.convexity
    assert convexity is not None
    assert convexity.rests_on == ("a", "b")
    tuner = FineTuner(session, learning_rate=RATE)
    federated.set_weights(tuner, {"a": np.array([23.0]), "b": np.array([-19.0])})
    federated.set_weights(tuner, {"a": np.array([3.0]), "b": np.array([1.0])})
    with pytest.raises(InputError, match="no longer be known to be convex"):
        federated.set_weights(tuner, {"b": np.array([22.0])})
    with pytest.raises(InputError, match="no longer be known to be convex"):
        federated.set_weights(tuner, {"a": np.array([0.5])})
    federated.set_weights(tuner, {"b": np.array([2.5])})
    federated.set_weights(session, {"a": np.array([2.75])})
    assert session.convexity.proven_with(session.weights_id)
    assert session.prove_convexity().verdict == "proven"


def test_weights_that_are_set_meanwhile_are_judged_together(tmp_path: Path) -> None:
    energy = Difference().double()
    x, y = map(torch.from_numpy, samples())
    layer = BundleEntropyArgmin(energy, iterations=4, y_dim=N)
    package = export(energy, layer, x, y, tmp_path / "d.icnn", train=TrainSpec())
    for _ in range(30):
        session = icnnrt.load(package)
        start = threading.Barrier(2)

        def put(name: str, value: float, session: icnnrt.Session = session, start: Any = start) -> None:
            start.wait()
            with contextlib.suppress(InputError):
                federated.set_weights(session, {name: np.array([value])})

        threads = [threading.Thread(target=put, args=one) for one in (("a", 1.5), ("b", 1.52))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert session.weights["a"] >= session.weights["b"]


class Partly(nn.Module):
    """y'Qy/2 with a Q that is not trained, and a part that is."""

    def __init__(self, curvature: float) -> None:
        super().__init__()
        self.register_buffer("Q", curvature * torch.eye(N))
        self.a, self.c = nn.Linear(2 * N, 5), nn.Linear(5, 1)
        small_(self.c.weight)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        z = F.softplus(self.a(torch.cat([x, y], 1)))
        return (y @ self.Q * y).sum(1) / 2 + self.c(z)[:, 0]


@pytest.mark.filterwarnings("ignore:energy. f is not convex")
def test_a_checkpoint_brings_no_other_weights_than_trained_ones(tmp_path: Path) -> None:
    x, y = map(torch.from_numpy, samples())
    sessions = []
    for curvature in (-0.2, 1.0):
        torch.manual_seed(0)
        energy = Partly(curvature).double()
        layer = BundleEntropyArgmin(energy, iterations=4, y_dim=N)
        path = tmp_path / f"{curvature}.icnn"
        made = export(energy, layer, x, y, path, train=TrainSpec(), allow_not_convex=True)
        sessions.append(icnnrt.load(made))
    bent, good = sessions
    FineTuner(bent).save(tmp_path / "h")
    with pytest.raises(PackageError, match="Q, which is not trained, to be that of this package"):
        FineTuner(good).resume(tmp_path / "h")
    assert good.convexity.proven_with(good.weights_id)


def test_live_session_and_written_package_agree_on_every_status(packages: dict[str, Path], tmp_path: Path) -> None:
    """Of an energy that ceases to be convex behind the tuner's back, too."""
    session = icnnrt.load(packages["foreign"])
    tuner = FineTuner(session, learning_rate=RATE)
    x, _ = samples(3)
    bent = {"c.weight": -np.abs(session.weights["c.weight"]) - 1}
    session.update_weights(bent)
    found = session.prove_convexity()
    assert found.verdict == "violated"
    assert (session.argmin(x).status == icnnrt.Status.NOT_CONVEX).all()
    session.update_weights({name: np.abs(array) for name, array in bent.items()})
    assert session.prove_convexity().verdict == "proven"
    assert (session.argmin(x).status != icnnrt.Status.NOT_CONVEX).all()
    assert tuner.steps == 0


# --- In the graph ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [b for b in itertools.product(range(4), repeat=3) if any(b)], ids=str)
def test_the_projection_of_the_graph_is_that_of_the_sign(bits: tuple[int, ...]) -> None:
    """train.onnx and numpy state one projection: of whole weights, of runs along an axis, of entries row by row."""
    rng = np.random.default_rng(sum(bits))
    shapes = {"a": (2, 3), "b": (3, 2), "c": (1, 3)}
    patterns = {
        "a": np.broadcast_to(np.array(bits, np.uint8), (2, 3)),
        "b": np.broadcast_to(np.array(bits, np.uint8)[:, None], (3, 2)),
        "c": np.array([bits], np.uint8),
    }
    signs = {n: sign for n, p in patterns.items() if (sign := Sign.of(p)) is not None}
    op = Ops("p")
    w = value("w", ir.DataType.DOUBLE, [15])
    made = describe(projected(op, w, shapes, signs, ir.DataType.DOUBLE), "out", ir.DataType.DOUBLE, [15])
    graph = ir.Graph([w], [made], nodes=op.nodes, initializers=numbered(op.constants), name="g", opset_imports={"": 21})
    model = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    x = rng.standard_normal(15)
    (got,) = onnxruntime.InferenceSession(model).run(None, {"w": x})
    parts = np.split(x, [6, 12])
    expected = [
        signs[n].project(p.reshape(s)).ravel() if n in signs else p
        for (n, s), p in zip(shapes.items(), parts, strict=True)
    ]
    np.testing.assert_array_equal(got, np.concatenate(expected))
    for n, pattern in patterns.items():
        if n in signs:
            assert signs[n].asks(NONNEGATIVE) == bool((pattern & NONNEGATIVE).any())
            assert signs[n].asks(NONPOSITIVE) == bool((pattern & NONPOSITIVE).any())
            np.testing.assert_array_equal(signs[n].bits(shapes[n]), pattern)
