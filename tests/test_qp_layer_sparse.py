"""`QPLayer` with a pattern: eager, transformed, compiled and exported, beside the one without."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from sparse_programs import mpc
from torch import nn

import icnnrt
from icnnrt.errors import InputError
from icnnrt.tuning.finetune import FineTuner
from icnnrt_exporters import SGD, QPLayer, TrainSpec, add_bodies, export, qp_translation_table
from icnnrt_exporters.graphs.onnx_head import quiet
from icnnrt_models.layers import qp_operators
from icnnrt_models.layers.qp_plan import plan_of, text_of

PROGRAM = mpc(6, 3, 2, start=0.5)
PATTERN = icnnrt.QPPattern(PROGRAM["Q"], None, PROGRAM["A"])
N = len(PROGRAM["p"])
NATIVE = qp_operators.sparse_kernels(torch.float64) is not None


def tensors(dtype=torch.float64):
    return {name: torch.from_numpy(np.array(a)).to(dtype) for name, a in PROGRAM.items()}


def solved(layer, p, t, **changed):
    t = t | changed
    return layer(t["Q"], p, A=t["A"], b=t["b"], lower=t["lower"], upper=t["upper"])


def points(B=3, dtype=torch.float64):
    return tensors(dtype)["p"] + 0.1 * torch.randn(B, N, generator=torch.Generator().manual_seed(B), dtype=dtype)


@pytest.fixture
def ran(monkeypatch):
    """The dtype of each call of the sparse kernels."""
    asked, kernels = [], qp_operators.sparse_kernels
    monkeypatch.setattr(qp_operators, "sparse_kernels", lambda dtype: asked.append(dtype) or kernels(dtype))
    return asked


def test_a_plan_passes_through_text():
    np.testing.assert_array_equal(plan_of(text_of(PATTERN)), PATTERN.plan)
    assert text_of(None) == ""


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_answers_and_gradients_are_those_without(dtype, ran):
    near = {torch.float64: 1e-8, torch.float32: 1e-3}[dtype]
    t, p = tensors(dtype), points(3, dtype).requires_grad_()
    leaves = {name: t[name].clone().requires_grad_() for name in ("Q", "A", "b", "lower", "upper")}
    found = []
    for layer in (QPLayer(pattern=PATTERN), QPLayer()):
        z = solved(layer, p, t, **leaves)
        found.append([z, *torch.autograd.grad((z**2).sum(), [p, *leaves.values()])])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=near, atol=near * (1 + float(other.detach().abs().max())))
    assert ran == [dtype] * 2 * NATIVE  # forward and backward


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_transforms_and_compilation_keep_to_the_pattern(ran):
    t, ps = tensors(), points()
    sparse, dense = QPLayer(pattern=PATTERN), QPLayer()
    wanted = solved(dense, ps, t)
    torch.testing.assert_close(torch.func.vmap(lambda p: solved(sparse, p[None], t)[0])(ps), wanted)
    compiled = torch.compile(lambda p: solved(sparse, p, t), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(ps), wanted)
    for derivative in (torch.func.jacrev, torch.func.jacfwd):
        one, other = (derivative(lambda p, layer=layer: solved(layer, p[None], t)[0, :3])(ps[0]) for layer in
                      (sparse, dense))  # fmt: skip
        torch.testing.assert_close(one, other)
    one = torch.ones((), dtype=torch.float64)
    second = [
        torch.func.hessian(lambda s, layer=layer: (solved(layer, s * ps[:1], t) ** 2).sum())(one)
        for layer in (sparse, dense)
    ]
    torch.testing.assert_close(*second)
    assert bool(ran) == NATIVE


def test_gradients_are_those_of_differences():
    program = mpc(2, 2, 1, start=0.2)
    t = {name: torch.from_numpy(np.array(a)) for name, a in program.items()}
    layer = QPLayer(pattern=icnnrt.QPPattern(program["Q"], None, program["A"]))
    leaves = [t[name].clone().requires_grad_() for name in ("p", "b", "lower", "upper")]

    def f(p, b, lower, upper):
        return layer(t["Q"], p, A=t["A"], b=b, lower=lower, upper=upper)

    assert torch.autograd.gradcheck(f, leaves, eps=1e-6, atol=1e-6)
    assert torch.autograd.gradgradcheck(f, leaves, eps=1e-6, atol=1e-5)


def test_data_outside_the_pattern_are_solved_all_the_same():
    t, p = tensors(), points()
    Q = t["Q"].repeat(3, 1, 1)
    Q[1, 2, 3] = Q[1, 3, 2] = 0.3
    Q.requires_grad_()
    found = []
    for layer in (QPLayer(pattern=PATTERN), QPLayer()):
        z = solved(layer, p, t, Q=Q)
        found.append((z, *torch.autograd.grad((z**2).sum(), Q)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-7)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_traces_and_other_devices_take_the_method_in_torch():
    t, p = tensors(), points()
    layer = QPLayer(pattern=PATTERN)
    traced = torch.jit.trace(lambda p: solved(layer, p, t), (p,), check_trace=False)
    torch.testing.assert_close(traced(p), solved(layer, p, t), rtol=1e-7, atol=1e-7)
    assert solved(layer, p.to("meta"), {name: a.to("meta") for name, a in t.items()}).shape == p.shape


def test_what_is_no_pattern_is_refused():
    with pytest.raises(InputError, match="pattern: expected a QPPattern, but got Tensor; make one by"):
        QPLayer(pattern=torch.eye(3))
    with pytest.raises(InputError, match="pattern: expected one of n, m, q = 3, 0, 0, but got 30, 0, 18; make it of"):
        QPLayer(pattern=PATTERN)(torch.eye(3), torch.ones(3))


# --- Exported ------------------------------------------------------------------------------------


class Controller(nn.Module):
    """x -> the start of a plan of controls -> all of it."""

    def __init__(self, pattern):
        super().__init__()
        self.first = nn.Linear(4, 3, dtype=torch.float64)
        self.cost = nn.Parameter(torch.ones(N, dtype=torch.float64))
        self.qp = QPLayer(pattern=pattern)
        for name, a in tensors().items():
            self.register_buffer(f"of_{name}", a)
        with torch.no_grad():
            g = torch.Generator().manual_seed(0)
            for p in self.first.parameters():
                p.copy_(0.2 * torch.randn(p.shape, generator=g, dtype=torch.float64))

    def forward(self, x):
        b = torch.cat([self.first(x), self.of_b[3:].expand(x.shape[0], -1)], 1)
        Q = torch.diag(self.cost) * self.of_Q
        return self.qp(Q, self.of_p, A=self.of_A, b=b, lower=self.of_lower, upper=self.of_upper)


def x_of(B):
    return torch.randn(B, 4, generator=torch.Generator().manual_seed(B), dtype=torch.float64)


def test_plain_onnx_holds_the_operator_and_runs_anywhere(tmp_path):
    net = Controller(PATTERN).eval()
    path = tmp_path / "net.onnx"
    with quiet():
        program = torch.onnx.export(
            net, (x_of(5),), dynamo=True, dynamic_shapes=({0: torch.export.Dim("batch")},), opset_version=21,
            custom_translation_table=qp_translation_table(), verbose=False,
        )  # fmt: skip
    add_bodies(program).save(path)
    onnx.checker.check_model(path, full_check=True)
    model = onnx.load(path)
    ours = {node.op_type for node in model.graph.node if node.domain == "ai.icnnrt"}
    assert ours == {"SparseQuadraticProgram"}
    assert {f.name for f in model.functions} >= {"SparseQuadraticProgram", "QuadraticProgram"}
    options = [onnxruntime.SessionOptions()]
    if NATIVE:
        options.append(onnxruntime.SessionOptions())
        options[1].register_custom_ops_library(icnnrt.ops_library())
    for each in options:
        session = onnxruntime.InferenceSession(path, each, providers=["CPUExecutionProvider"])
        for B in (1, 4):
            (z,) = session.run(None, {session.get_inputs()[0].name: x_of(B).numpy()})
            torch.testing.assert_close(torch.from_numpy(z), net(x_of(B)).detach(), rtol=1e-6, atol=1e-6)


def test_a_package_solves_differentiates_and_trains(tmp_path):
    x = x_of(8)
    net, path = Controller(PATTERN).eval(), tmp_path / "net.icnn"
    target = net(x).detach() + 0.1
    export(net, None, x, target, path, kind="qp", train=TrainSpec(optimizer=SGD(momentum=0.0)))
    session = icnnrt.load(path)
    solution = session.solve_qp(x.numpy())
    assert np.all(solution.ok)
    dense = Controller(None).eval()
    dense.load_state_dict(net.state_dict())
    z = dense(x)
    np.testing.assert_allclose(solution.z, z.detach().numpy(), rtol=0, atol=1e-7)
    found = session.vjp(solution, np.ones_like(solution.z)).weights
    names = [name for name, _ in dense.named_parameters()]
    for name, true in zip(names, torch.autograd.grad(z.sum(), list(dense.parameters())), strict=True):
        np.testing.assert_allclose(found[name], true.numpy(), rtol=1e-6, atol=1e-7)
    before = {name: np.array(session.package.weights[name]) for name in names}
    FineTuner(session, learning_rate=1e-2).step(x.numpy(), target.numpy())
    torch.nn.functional.mse_loss(dense(x), target).backward()
    for name, p in dense.named_parameters():
        wanted = before[name] - 1e-2 * p.grad.numpy()
        np.testing.assert_allclose(session.weights[name], wanted, rtol=1e-6, atol=1e-7)
    portable = icnnrt.load(path, native=False).solve_qp(x.numpy())
    np.testing.assert_allclose(portable.z, solution.z, rtol=0, atol=1e-6)


def operators_of(path):
    graphs = (onnx.load_from_string(g) for g in icnnrt.load(path).package.graphs.values())
    return {node.op_type for g in graphs for node in g.graph.node if node.domain == "ai.icnnrt"}


@pytest.mark.parametrize(
    "kind",
    [
        "large",
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("small", "full at other weights", "of a shared one")),
    ],
)
def test_a_package_reads_off_where_matrices_are_zero_if_that_pays(kind, tmp_path):
    program = mpc(3 if kind == "small" else 14, 3, 2, start=0.3)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.qp = nn.Linear(4, 3, dtype=torch.float64), QPLayer()
            self.cost = nn.Parameter(torch.ones(len(program["p"]), dtype=torch.float64))
            self.more = nn.Parameter(torch.zeros(len(program["p"]), dtype=torch.float64))
            for name, a in program.items():
                self.register_buffer(f"of_{name}", torch.from_numpy(np.array(a)))
            nn.init.constant_(self.first.weight, 0.1)
            self.more_again = self.more

        def forward(self, x):
            b = torch.cat([self.first(x), self.of_b[3:].expand(x.shape[0], -1)], 1)
            Q = torch.diag(self.cost) * self.of_Q
            if kind == "full at other weights":
                Q = Q + torch.outer(self.more, self.more)
            if kind == "of a shared one":
                Q = Q + torch.outer(self.more_again, self.more_again)
            return self.qp(Q, self.of_p, A=self.of_A, b=b, lower=self.of_lower, upper=self.of_upper)

    net = Net().eval()
    x = x_of(5)
    path = tmp_path / "net.icnn"
    export(net, None, x, net(x).detach(), path, kind="qp")
    sparse = {"SparseQuadraticProgram", "SparseQPSensitivity"}
    assert operators_of(path) == (sparse if kind == "large" else {"QuadraticProgram", "QPAdjoint"})
    session = icnnrt.load(path)
    solution = session.solve_qp(x.numpy())
    np.testing.assert_allclose(solution.z, net(x).detach().numpy(), rtol=0, atol=1e-7)
    z = net(x)
    true = torch.autograd.grad(z.sum(), net.cost)[0].numpy()
    found = session.vjp(solution, np.ones_like(solution.z)).weights["cost"]
    np.testing.assert_allclose(found, true, rtol=1e-6, atol=1e-7)
