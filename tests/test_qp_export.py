"""Networks with QPLayer outside torch: plain torch.onnx.export, packages, fine-tuning without torch."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from quadratic_programs import mixed
from torch import nn

import icnnrt
from icnnrt import native_library
from icnnrt.checking.verify import verify
from icnnrt.errors import CertificateError, ExportError, InputError
from icnnrt.mathematics.qp_status import statuses
from icnnrt.mathematics.status import Status
from icnnrt.tuning.finetune import FineTuner
from icnnrt_exporters import SGD, QPLayer, TrainSpec, add_bodies, export, qp_translation_table
from icnnrt_exporters.graphs.onnx_head import quiet
from icnnrt_models import BundleEntropyArgmin

VERSION1 = Path(__file__).parent / "fixtures" / "version1" / "qp.icnn"
Z = {torch.float64: 1e-6, torch.float32: 1e-4}


class Controller(nn.Module):
    """x -> a program -> another one, which a budget below zero leaves without a z."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.inner = nn.Linear(4, 6)
        self.factor = nn.Parameter(0.5 * torch.randn(6, 6, generator=g))
        self.G = nn.Parameter(torch.randn(3, 6, generator=g))
        self.budget = nn.Parameter(torch.tensor([3.0]))
        self.scale = nn.Linear(6, 6)
        self.qp = QPLayer()
        self.simplex = QPLayer()
        with torch.no_grad():
            for p in (*self.inner.parameters(), *self.scale.parameters()):
                p.copy_(0.5 * torch.randn(p.shape, generator=g))
        self.to(dtype)

    def forward(self, x):
        eye = torch.eye(6, dtype=x.dtype)
        ones = torch.ones(3, dtype=x.dtype)
        Q = self.factor @ self.factor.T + 0.1 * eye
        u = self.qp(Q, self.inner(x), self.G, ones, lower=-1.0, upper=1.0)
        # Of three kinds: something to divide, given by x.
        amount = self.budget + x[:, :1]
        return self.simplex(eye, self.scale(u), A=torch.ones(1, 6, dtype=x.dtype), b=amount, lower=0.0)


def inputs(B, dtype=torch.float64):
    return torch.randn(B, 4, generator=torch.Generator().manual_seed(B), dtype=torch.float64).to(dtype)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Module and package."""
    net = Controller().eval()
    path = tmp_path_factory.mktemp("qp") / "controller.icnn"
    x = inputs(16)
    # SGD, so that a step can be compared.
    export(net, None, x, net(x).detach(), path, kind="qp", train=TrainSpec(optimizer=SGD(momentum=0.0)))
    return net, path


# ---------------------------------------------------------------- torch.onnx.export


class Layer(nn.Module):
    """All data given, all of the answer."""

    def __init__(self):
        super().__init__()
        self.qp = QPLayer(multipliers=True)

    def forward(self, Q, p, G, h_lower, h, A, b, lower, upper):
        return tuple(self.qp(Q, p, G, h, A, b, h_lower=h_lower, lower=lower, upper=upper))


def sessions(path):
    """onnxruntime's own, without and with the native library."""
    yield onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    if native_library.build().library is not None:
        options = onnxruntime.SessionOptions()
        options.register_custom_ops_library(icnnrt.ops_library())
        yield onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def onnx_program(module, arguments):
    dim = torch.export.Dim("batch")
    with quiet():
        return torch.onnx.export(
            module,
            arguments,
            dynamo=True,
            dynamic_shapes=tuple({0: dim} for _ in arguments),
            opset_version=21,
            custom_translation_table=qp_translation_table(),
            verbose=False,
        )


@pytest.mark.parametrize("dtype", Z, ids=str)
def test_plain_onnx_with_and_without_native(dtype, tmp_path):
    net = Controller(dtype).eval()
    program = add_bodies(onnx_program(net, (inputs(5, dtype),)))
    path = tmp_path / "net.onnx"
    program.save(path)
    onnx.checker.check_model(path, full_check=True)
    model = onnx.load(path)
    assert sum(node.domain == "ai.icnnrt" and node.op_type == "QuadraticProgram" for node in model.graph.node) == 2
    assert {f.name for f in model.functions} >= {"QuadraticProgram"}
    for session in sessions(path):
        (name,) = (i.name for i in session.get_inputs())
        for B in (1, 3, 128):
            x = inputs(B, dtype)
            (z,) = session.run(None, {name: x.numpy()})
            torch.testing.assert_close(torch.from_numpy(z), net(x).detach(), rtol=Z[dtype], atol=Z[dtype])


def test_every_status_in_onnx(tmp_path):
    qp, wanted = mixed(3)
    data = tuple(torch.from_numpy(np.ascontiguousarray(a)) for a in qp)
    proto = onnx_program(Layer(), data).model_proto
    path = tmp_path / "layer.onnx"
    onnx.save(add_bodies(proto), path)
    true = Layer()(*data)
    for session in sessions(path):
        found = session.run(None, {i.name: a.numpy() for i, a in zip(session.get_inputs(), data, strict=True)})
        assert (found[-2] == statuses(wanted)).all()
        for mine, torchs in zip(found[:4], true[:4], strict=True):
            np.testing.assert_allclose(mine, torchs.numpy(), rtol=1e-5, atol=1e-6)


def test_bodies_need_their_opset():
    with pytest.raises(ExportError, match="program: expected opset 21 or later"):
        add_bodies(
            onnx.helper.make_model(
                onnx.helper.make_graph([], "g", [], []), opset_imports=[onnx.helper.make_opsetid("", 18)]
            )
        )


# ---------------------------------------------------------------- packages


def test_a_package_answers_as_torch(made):
    net, path = made
    T = net.G.dtype
    for native in (False, None):
        with icnnrt.load(path, native=native) as session:
            for B in (1, 3, 128):
                x = inputs(B, T)
                x[:, 0].clamp_(min=-2.5)  # what remains to be divided
                answer = session.solve_qp(x.numpy())
                assert answer.ok.all(), answer
                torch.testing.assert_close(torch.from_numpy(answer.z.copy()), net(x).detach(), rtol=Z[T], atol=Z[T])
                assert answer.residual.max() <= 1e-6


def test_its_adjoint_is_autograds(made):
    net, path = made
    T = net.G.dtype
    x = inputs(9, T).requires_grad_()
    bar = torch.randn(9, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(T)
    net.zero_grad()
    (net(x) * bar).sum().backward()
    with icnnrt.load(path) as session:
        answer = session.solve_qp(x.detach().numpy())
        found = session.vjp(answer, bar.numpy())
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-3}[T]
    torch.testing.assert_close(torch.from_numpy(found.x.copy()), x.grad, rtol=tolerance, atol=tolerance)
    assert found.weights.keys() == dict(net.named_parameters()).keys()
    for name, parameter in net.named_parameters():
        mine = torch.from_numpy(found.weights[name].copy())
        torch.testing.assert_close(mine, parameter.grad, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("native", [None, False], ids=["native if there", "portable"])
def test_settings_of_a_package(made, native):
    _, path = made
    x = inputs(5).numpy()
    with icnnrt.load(path, native=native) as session:
        usual = session.solve_qp(x)
        loose = session.solve_qp(x, tolerance=1e-3)
        assert loose.ok.all()
        assert (loose.residual <= 1e-3).all()
        few = session.solve_qp(x, steps=2)
        assert few.info["steps"] == 2
        if native is False:  # the active set of native kernels takes one
            assert (few.status != Status.CONVERGED).any()
            assert "2 steps" in few.summary()
            assert "allow more steps" in few.summary()
        # The adjoint solves as the answer was solved.
        bar = np.ones_like(usual.z)
        for settings in ({"tolerance": 1e-3}, {"tolerance": 0.1, "steps": 5}):
            found = session.solve_qp(x, **settings)
            assert found.ok.all()
            assert found[1:].settings == found.settings
            cotangents = session.vjp(found, bar)
            np.testing.assert_allclose(cotangents.x, session.vjp(usual, bar).x, atol=1e-3)
        for settings, sentence in (
            ({"tolerance": 0.0}, "tolerance: expected a finite number above 0"),
            ({"tolerance": 1e-17}, "tolerance: expected at least"),
            ({"steps": 0}, "steps: expected an integer from 1"),
        ):
            with pytest.raises(InputError, match=sentence):
                session.solve_qp(x, **settings)


def test_settings_of_layers_are_those_of_the_package(made, tmp_path):
    net = Controller().eval()
    for layer in (net.qp, net.simplex):
        layer.tolerance, layer.steps = 1e-4, 30
    x = inputs(3)
    export(net, None, x, net(x).detach(), tmp_path / "own.icnn", kind="qp")
    with icnnrt.load(tmp_path / "own.icnn", native=False) as session, icnnrt.load(made[1], native=False) as other:
        own = session.solve_qp(x.numpy())
        np.testing.assert_array_equal(own.z, other.solve_qp(x.numpy(), tolerance=1e-4).z)
        assert (own.residual > other.solve_qp(x.numpy()).residual).any()


def test_smoothing_is_left_out_of_a_package_and_the_layer_keeps_it(tmp_path):
    net = Controller().eval()
    net.qp.smoothing = net.simplex.smoothing = 1e-2
    x = inputs(3)
    with pytest.warns(UserWarning, match="smoothing of its QPLayer is left out of what is exported") as told:
        export(net, None, x, net(x).detach(), tmp_path / "net.icnn", kind="qp")
    assert {w.filename for w in told} == {__file__}
    assert net.qp.smoothing == net.simplex.smoothing == 1e-2
    net.qp.smoothing = net.simplex.smoothing = None
    net.qp.seconds = 1.0
    with pytest.warns(UserWarning, match=r"seconds of its QPLayer are left out .*icnnrt\.Limits"):
        export(net, None, x, net(x).detach(), tmp_path / "seconds.icnn", kind="qp")
    assert net.qp.seconds == 1.0
    x.requires_grad_()
    (true,) = torch.autograd.grad(net(x).sum(), x)
    with icnnrt.load(tmp_path / "net.icnn") as session:
        solution = session.solve_qp(x.detach().numpy())
        np.testing.assert_allclose(session.vjp(solution, np.ones_like(solution.z)).x, true, rtol=1e-6, atol=1e-8)


def test_packages_written_before_have_no_settings():
    with icnnrt.load(VERSION1) as session:
        x = np.zeros((2, *session.manifest.x_shape), session.dtype)
        session.solve_qp(x)
        for settings in ({"tolerance": 1e-3}, {"steps": 9}):
            with pytest.raises(InputError, match="expected none, as the package was written without that setting"):
                session.solve_qp(x, **settings)


def test_what_has_no_solution_spoils_nothing(made):
    """A budget below zero cannot be divided; NaN is not run."""
    net, path = made
    T = net.G.dtype
    x = inputs(6, T)
    x[1, 0], x[4, 2] = -10.0, torch.nan
    good = np.array([0, 2, 3, 5])
    with icnnrt.load(path) as session:
        answer = session.solve_qp(x.numpy())
        assert answer.status[[1, 4]].tolist() == [Status.INFEASIBLE, Status.NOT_FINITE_INPUT]
        assert np.isnan(answer.z[[1, 4]]).all()
        assert answer.ok[good].all()
        alone = session.solve_qp(x.numpy()[good])
        np.testing.assert_allclose(answer.z[good], alone.z, rtol=Z[T], atol=Z[T])
        bar = np.ones_like(answer.z)
        bar[1] = np.nan
        with pytest.raises(CertificateError, match=r"sample 1: no z meets the constraints.*sample 4"):
            session.vjp(answer, bar)
        found, expected = session.vjp(answer, bar, on_unsafe="skip"), session.vjp(alone, bar[good])
        assert found.skipped.tolist() == [False, True, False, False, True, False]
        assert np.isnan(found.x[[1, 4]]).all()
        for name, theta_bar in expected.weights.items():
            np.testing.assert_allclose(found.weights[name], theta_bar, rtol=1e-4, atol=1e-5)
        none = session.vjp(answer[[1, 4]], bar[[1, 4]], on_unsafe="skip")
        assert all((a == 0).all() for a in none.weights.values())
        assert "1 INFEASIBLE" in answer.summary()
        assert len(session.solve_qp(x.numpy()[:0])) == 0
        with pytest.raises(
            CertificateError, match="strict: 2 of 6 samples did not converge: INFEASIBLE, sample 1: no z"
        ):
            session.solve_qp(x.numpy(), strict=True)


class Chain(nn.Module):
    """A program that x makes infeasible, of whose answer another one is made."""

    def __init__(self):
        super().__init__()
        self.inner, self.scale = nn.Linear(2, 3).double(), nn.Linear(3, 3).double()
        self.first, self.second = QPLayer(), QPLayer()

    def forward(self, x):
        eye, ones = torch.eye(3, dtype=x.dtype), torch.ones(1, 3, dtype=x.dtype)
        z = self.first(eye, self.inner(x), lower=-1.0, upper=x[:, :1].expand(-1, 3))
        return self.second(eye, self.scale(z), A=ones, b=ones[0, :1], lower=0.0)


def test_the_first_program_that_fails_tells_why(tmp_path):
    """Its NaN makes the second one NOT_FINITE_INPUT, which is not the cause."""
    net, x = Chain(), torch.rand(4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    export(net, None, x, net(x).detach(), tmp_path / "chain.icnn", kind="qp")
    x[1, 0] = -3.0
    x[2, 1] = torch.nan
    with icnnrt.load(tmp_path / "chain.icnn") as session:
        status = session.solve_qp(x.numpy()).status.tolist()
    assert status == [Status.CONVERGED, Status.INFEASIBLE, Status.NOT_FINITE_INPUT, Status.CONVERGED]


def test_fine_tuning_without_torch(made, tmp_path):
    """Towards another network's answers; a sample whose program has no solution is left out of loss and gradient."""
    net, path = made
    T = net.G.dtype
    x = inputs(32, T)
    x[:, 0].clamp_(min=-2.0)
    with torch.no_grad():
        other = Controller(T)
        for p in other.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()), dtype=T))
        target = other(x)
    assert torch.isfinite(target).all()
    x[3, 0] = -10.0
    with icnnrt.load(path) as session:
        tuner = FineTuner(session, learning_rate=0.1 if torch.float64 == T else 1e-2)
        first = tuner.step(x.numpy(), target.numpy())
        assert first.accepted, first
        assert (first.unsafe, first.samples) == (1, 32)
        keep = [i for i in range(32) if i != 3]
        true = (net(x[keep]) - target[keep]).detach().square().mean()
        assert first.loss == pytest.approx(float(true), rel=1e-4)
        reports = [tuner.step(x.numpy(), target.numpy()) for _ in range(25)]
        assert all(r.accepted for r in reports)
        assert tuner.loss(x.numpy(), target.numpy()) < 0.7 * first.loss
        weights = dict(session.weights)
        tuner.write_package(tmp_path / "tuned.icnn")
        tuner.save(tmp_path / "history")
        # Nothing but what cannot be solved: nothing moves.
        bad = tuner.step(x.numpy()[3:4], target.numpy()[3:4])
        assert not bad.accepted
        assert np.isnan(bad.loss)
        assert "no sample has a quadratic program with a solution" in bad.reason
        assert bad.reason.index("loosen the constraints") < bad.reason.index("lower the learning rate")
    with icnnrt.load(tmp_path / "tuned.icnn") as session:
        assert all((session.weights[name] == a).all() for name, a in weights.items())
        assert session.manifest.kind == "qp"
        # The same numbers in torch.
        with torch.no_grad():
            tuned = Controller(T)
            tuned.load_state_dict({name: torch.from_numpy(a.copy()) for name, a in weights.items()})
            z = tuned(x[keep])
        found = session.solve_qp(x[keep].numpy())
        np.testing.assert_allclose(found.z, z.numpy(), rtol=Z[T], atol=Z[T])


def test_one_step_is_torchs(made):
    """SGD without momentum: θ − rate·θ̄, and the norm of θ̄."""
    net, path = made
    x, target = inputs(8), torch.ones(8, 6, dtype=torch.float64)
    net.zero_grad()
    (net(x) - target).square().mean().backward()
    with icnnrt.load(path) as session:
        FineTuner(session, learning_rate=0.1).step(x.numpy(), target.numpy())
        for name, p in net.named_parameters():
            moved = p - 0.1 * p.grad
            np.testing.assert_allclose(session.weights[name], moved.detach().numpy(), rtol=1e-6, atol=1e-8)


def test_verify_checks_it(made):
    net, path = made
    x = inputs(24, net.G.dtype)
    x[:, 0].clamp_(min=-2.0)
    report = verify(path, x.numpy(), samples=24)
    assert report.passed, report
    checks = {check.name: check.verdict for check in report.checks}
    assert checks["golden: solve.z"] == checks["adjoint: x"] == checks["adjoint: weights"] == "pass"
    assert report.status == {"CONVERGED": 24}


def test_the_command_line_serves_it(made, tmp_path):
    """run, inspect and tune; what needs an energy says so."""
    from typer.testing import CliRunner

    from icnnrt.cli.commands import app

    def icnnrt_(*arguments):
        return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200", "NO_COLOR": "1"})

    _, path = made
    x = inputs(6).numpy()
    x[:, 0] = np.maximum(x[:, 0], -2.0)
    np.save(tmp_path / "good.npy", x)
    x[2, 0], x[4, 1] = -10.0, np.nan
    np.save(tmp_path / "x.npy", x)
    with icnnrt.load(path) as session:
        answer = session.solve_qp(x)
    names = [Status(code).name for code in answer.status]
    done = icnnrt_("run", path, tmp_path / "x.npy", "--json")
    assert done.exit_code == 3, done.output
    told = json.loads(done.stdout)
    assert told["status"] == {"CONVERGED": 4, "INFEASIBLE": 1, "NOT_FINITE_INPUT": 1}
    assert told["sample_status"] == names
    assert told["z"][2] == [None] * 6
    np.testing.assert_array_equal(told["z"][0], answer.z[0])
    assert told["advice"] == "sample 2: no z meets the constraints: loosen them"
    shown = icnnrt_("run", path, tmp_path / "good.npy")
    assert shown.exit_code == 0, shown.output
    assert "6 CONVERGED" in shown.stdout
    for suffix in ("npz", "npy", "csv"):
        out = tmp_path / f"z.{suffix}"
        assert icnnrt_("run", path, tmp_path / "x.npy", "--out", out).exit_code == 3
        if suffix == "csv":
            assert out.read_text().startswith("z0,z1,")
            z = np.loadtxt(out, delimiter=",", skiprows=1)
        else:
            z = np.load(out) if suffix == "npy" else np.load(out)["z"]
        np.testing.assert_array_equal(z, answer.z)
    np.testing.assert_array_equal(np.load(tmp_path / "z.npz")["status"], answer.status)
    strict = icnnrt_("run", path, tmp_path / "x.npy", "--strict", "--out", tmp_path / "none.npy")
    assert strict.exit_code == 3
    assert "2 of 6 samples are not solved, nothing is written: sample 2: no z" in strict.stderr
    assert not (tmp_path / "none.npy").exists()
    assert "x [4] → z [6]" in icnnrt_("inspect", path).stdout
    for arguments, sentence in (
        (("run", path, tmp_path / "x.npy", "--lower", "0"), "lower: expected none, as controller is a network of quad"),
        (("epigraph", path, tmp_path / "x.npy", tmp_path / "a.lp"), "source: expected a package of an energy"),
        (("repair", path, "--project", "--out", tmp_path / "r.icnn"), "package: expected one of an energy"),
    ):
        refused = icnnrt_(*arguments)
        assert refused.exit_code == 1
        assert sentence in refused.stderr


def test_a_package_runs_without_torch(made):
    _, path = made
    code = (
        "import sys, numpy as np, icnnrt; s = icnnrt.load(sys.argv[1]); a = s.solve_qp(np.zeros((2, 4)));"
        "assert a.ok.all(); s.vjp(a, np.ones((2, 6)));"
        "assert not {'torch', 'onnx', 'icnnrt_models', 'icnnrt_exporters'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)


def test_what_does_not_belong_is_told(made, tmp_path):
    net, path = made
    T = net.G.dtype
    x = inputs(4, T)
    z = net(x).detach()
    with icnnrt.load(path) as session:
        for call in (session.value, session.gradient):
            with pytest.raises(InputError, match="network of quadratic programs, no energy; use `solve_qp`"):
                call(x.numpy(), z.numpy())
        with pytest.raises(InputError, match="argmin: the package holds a network of quadratic programs"):
            session.argmin(x.numpy())
        with pytest.raises(InputError, match="solution: expected what session"):
            session.vjp(z.numpy(), z.numpy())
        with pytest.raises(InputError, match="prove_convexity: the package holds a network of quadratic"):
            session.prove_convexity()
    wrong = [
        (
            net,
            {"solver": BundleEntropyArgmin(nn.Linear(1, 1), y_dim=6)},
            "solver: a network of quadratic",
        ),
        (net, {"heads": ["hvp"]}, "heads: a network of quadratic programs has no energy"),
        (nn.Linear(4, 6, dtype=T), {}, "module: expected a network with a QPLayer"),
        (net, {"train": TrainSpec(adjoint="prop3")}, "adjoint: a quadratic program has one adjoint"),
        (Multipliers(T), {}, "module: forward returned QPResult for a batch"),
        (Mixing(T), {}, "module: the answer of a sample depends on the others"),
    ]
    for module, keywords, sentence in wrong:
        solver = keywords.pop("solver", None)
        with pytest.raises(ExportError, match=sentence):
            export(module, solver, x, z, tmp_path / "no.icnn", kind="qp", **keywords)
    with pytest.raises(ExportError, match="y_example: expected answers of 6 columns"):
        export(net, None, x, z[:, :2], tmp_path / "no.icnn", kind="qp")
    assert not list(tmp_path.iterdir())


class Multipliers(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.w = nn.Parameter(torch.ones(4, dtype=dtype))
        self.qp = QPLayer(multipliers=True)

    def forward(self, x):
        return self.qp(torch.eye(4, dtype=x.dtype), self.w * x)


class Mixing(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.w = nn.Parameter(torch.ones(4, dtype=dtype))
        self.qp = QPLayer()

    def forward(self, x):
        return self.qp(torch.eye(4, dtype=x.dtype), self.w * (x - x.mean(0)), lower=-0.1)
