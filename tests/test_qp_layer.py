"""Quadratic programs as a torch layer: held to the statement in numpy, to central differences, and to its sentences."""

import re
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from qp_backends import laid
from quadratic_programs import ANSWER, UNSOLVABLE, mixed, solvable, unsolvable

from icnnrt.mathematics.qp_reference import QP, qp_adjoint, qp_gradients, qp_solve
from icnnrt.mathematics.qp_status import STATUSES, QPStatus, statuses
from icnnrt_models import QPLayer, QPResult
from icnnrt_models.layers import qp_operators as home

# Both are converged to 1e-12 in the gap, which moves z by its root times 1/√(curvature), and less where constraints
# hold it.
SAME = 1e-6


def tensors(qp, dtype=torch.float64, requires_grad=False):
    return [torch.from_numpy(np.ascontiguousarray(a)).to(dtype).requires_grad_(requires_grad) for a in qp]


class Everything(torch.nn.Module):
    """All of an answer, from all data."""

    def __init__(self, **keywords):
        super().__init__()
        self.qp = QPLayer(multipliers=True, **keywords)

    def forward(self, *data):
        return tuple(laid(self.qp, *data))


def traced(module, data):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.trace(module, tuple(data), check_trace=False)


@pytest.mark.parametrize("why", UNSOLVABLE)
def test_what_is_not_solvable_raises_where_it_is_to(why):
    qp, wanted = unsolvable(1, 3, 10, 10, 3, why)
    found = laid(QPLayer(multipliers=True), *tensors(qp))
    assert (found.status == STATUSES[wanted]).all(), found.status
    assert found.z.isnan().all()
    with pytest.raises(ValueError, match=f"sample 0 and 2 more ended with {STATUSES[wanted].name}: .*[a-z]"):
        laid(QPLayer(on_unsafe="raise"), *tensors(qp))


def test_what_is_not_convex_is_told_with_sample_and_eigenvalue():
    """Of Q shared by all samples too."""
    Q = torch.eye(3, dtype=torch.float64).repeat(4, 1, 1)
    Q[2, 1, 1] = -0.25
    p = torch.ones(4, 3, dtype=torch.float64)
    layer = QPLayer(on_unsafe="raise")
    wanted = (
        r"on_unsafe: sample 2 ended with NOT_CONVEX: Q has the eigenvalue -2\.5e-01, .*add 2\.[67]e-01 to the diagonal"
    )
    with pytest.raises(ValueError, match=wanted):
        layer(Q, p, lower=-1.0, upper=1.0)
    with pytest.raises(ValueError, match=r"sample 0 and 3 more ended with NOT_CONVEX: Q has the eigenvalue -2\.5e-01"):
        layer(Q[2].requires_grad_(), p, lower=-1.0, upper=1.0)


@pytest.mark.parametrize("make", [lambda module, data: module, traced], ids=["eager", "traced"])
def test_neighbours_do_not_matter_and_gradients_are_those_stated(make):
    qp, wanted = mixed(7)
    solved = wanted == QPStatus.SOLVED
    stated = qp_solve(qp)
    rng = np.random.default_rng(0)
    bars = [rng.standard_normal(a.shape) for a in stated[:4]]
    gradients = qp_gradients(stated, qp_adjoint(np.nan_to_num(qp.Q), qp.G, qp.A, stated, *bars))
    example = tensors(solvable(1, 3, 12, 8, 3, two_sided=True).qp)
    for on_unsafe in ("nan", "skip"):
        module = make(Everything(on_unsafe=on_unsafe), example)
        data = tensors(qp, requires_grad=True)
        found = QPResult(*module(*data))
        assert (found.status.numpy() == statuses(wanted)).all()
        # The slack of a multiplier of 0 may be that of either side.
        pushing = np.abs(stated.lam) > 1e-6
        assert np.abs(found.slack.detach().numpy() - stated.slack)[pushing].max() <= SAME
        for field, own in (ANSWER | {"residual": "residual"}).items():
            np.testing.assert_allclose(getattr(found, own).detach(), getattr(stated, field), rtol=1e-6, atol=1e-9)
        # The loss leaves out what was not solved, but NaN · 0 is NaN on its way back.
        samples = sum((bar * a).sum(1) for bar, a in zip(map(torch.from_numpy, bars), found[:4], strict=True))
        torch.where(found.status == 0, samples, 0.0).sum().backward()
        for name, datum, gradient in zip(QP._fields, data, gradients, strict=True):
            grad = datum.grad.numpy()
            np.testing.assert_allclose(grad[solved], gradient[solved], rtol=1e-6, atol=1e-8, err_msg=name)
            if on_unsafe == "skip":
                assert (grad[~solved] == 0).all(), name
            else:
                # A bound that is not there has no gradient either way.
                there = np.isfinite(getattr(qp, name)) | np.isnan(getattr(qp, name))
                assert np.isnan(grad[~solved][there[~solved]]).all(), name


def test_shared_data_get_the_sum():
    qp = solvable(3, 4, 6, 5, 2, two_sided=True, box=True).qp
    p = torch.from_numpy(qp.p).requires_grad_()
    shared = [torch.from_numpy(a[0].copy()).requires_grad_() for a in qp]
    each = [a.detach()[None].repeat(4, *[1] * a.dim()).requires_grad_() for a in shared]
    layer = QPLayer()
    w = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for make in (lambda module, data: module, traced):
        for data in (shared, each):
            module = make(Everything(), [data[0], p, *data[2:]])
            for datum in data:
                datum.grad = None
            (QPResult(*module(data[0], p, *data[2:])).z * w).sum().backward()
        for a, b in zip(shared, each, strict=True):
            if a is not shared[1]:
                torch.testing.assert_close(a.grad, b.grad.sum(0), rtol=1e-9, atol=1e-10)
    # Of nothing but shared data: one sample. An axis of size 1 is shared too.
    assert laid(layer, *shared).shape == (1, 6)
    assert laid(layer, shared[0][None], p, *(a[None] for a in shared[2:])).shape == (4, 6)


@pytest.mark.parametrize("B", [1, 128])
def test_float32(B):
    qp = solvable(4, B, 8, 6, 2, two_sided=True).qp
    narrow = tensors(qp, torch.float32, requires_grad=True)
    wide = [a.detach().double().requires_grad_() for a in narrow]
    found = laid(QPLayer(multipliers=True), *narrow)
    assert (found.status == 0).all()
    assert found.z.dtype == torch.float32
    assert found.residual.dtype == torch.float64
    truth = laid(QPLayer(), *wide)
    torch.testing.assert_close(found.z, truth.float(), rtol=1e-5, atol=1e-5)
    found.z.sin().sum().backward()
    truth.sin().sum().backward()
    for a, b in zip(narrow, wide, strict=True):
        torch.testing.assert_close(a.grad, b.grad.float(), rtol=1e-3, atol=1e-4)


def test_numbers_for_bounds_and_absent_parts():
    g = torch.Generator().manual_seed(0)
    p = torch.randn(5, 3, generator=g)
    eye = torch.eye(3)
    layer = QPLayer()
    torch.testing.assert_close(layer(eye, p), -p)
    torch.testing.assert_close(layer(eye, p, lower=0.0), (-p).clamp(min=0), rtol=1e-5, atol=1e-5)
    projected = layer(eye, p, A=torch.ones(1, 3), b=torch.ones(1), lower=0.0)
    torch.testing.assert_close(projected.sum(1), torch.ones(5))
    above = layer(eye, p, G=torch.ones(1, 3), h_lower=2.0)
    assert (above.sum(1) >= 2 - 1e-5).all()
    level = torch.tensor(0.5, requires_grad=True)
    layer(eye, p - 10, upper=level).sum().backward()
    assert level.grad == 15
    assert layer(eye, p[:0]).shape == (0, 3)


def test_transforms_of_torch_func():
    qp = tensors(solvable(5, 3, 4, 3, 1).qp)
    layer = QPLayer()
    gradient = torch.func.grad(lambda p: laid(layer, qp[0], p, *qp[2:]).sin().sum())(qp[1])
    p = qp[1].clone().requires_grad_()
    laid(layer, qp[0], p, *qp[2:]).sin().sum().backward()
    torch.testing.assert_close(gradient, p.grad)
    z, pull = torch.func.vjp(lambda p: laid(layer, qp[0], p, *qp[2:]), qp[1])
    torch.testing.assert_close(pull(z.cos())[0], p.grad)


# How many samples a problem has, and which data get a dimension more.
VMAPPED = [(3, ("p",)), (3, QP._fields), (1, ("p", "A", "b")), (1, ("Q", "h")), (3, ("lower", "upper"))]


@pytest.mark.parametrize("kernel", [True, False], ids=["kernel", "torch"])
@pytest.mark.parametrize(("samples", "over"), VMAPPED)
def test_vmap_is_a_loop(samples, over, kernel, monkeypatch):
    if not kernel:
        monkeypatch.setattr(home, "kernels", lambda dtype: None)
    E = 4
    base = QP(*tensors(solvable(9, samples, 5, 4, 2, two_sided=True, box=True).qp))
    by = torch.linspace(1.0, 1.3, E, dtype=torch.float64)
    rows = dict.fromkeys(("Q", "p", "G", "A", "b"), by) | dict.fromkeys(("h", "upper"), 0.1 * by)
    rows |= dict.fromkeys(("h_lower", "lower"), -0.1 * by)
    # Bounds become looser, the others are scaled, so that there is a solution yet.
    many = [
        torch.stack([a + step if name in ("h", "upper", "h_lower", "lower") else a * step for step in rows[name]])
        for name, a in base._asdict().items()
    ]
    # One dimension is last, one datum without it is shared by all samples.
    data = [a if name in over else a[0] for name, a in zip(QP._fields, many, strict=True)]
    data = [a.movedim(0, -1) if name == "p" and "p" in over else a for name, a in zip(QP._fields, data, strict=True)]
    data[0] = data[0] if "Q" in over else data[0][:1]
    dims = tuple((-1 if name == "p" else 0) if name in over else None for name in QP._fields)

    def one(e):
        return [a if d is None else a.movedim(d, 0)[e] for a, d in zip(data, dims, strict=True)]

    module = Everything()
    found = QPResult(*torch.func.vmap(module, dims)(*data))
    loop = [QPResult(*module(*one(e))) for e in range(E)]
    for field in QPResult._fields:
        stacked = torch.stack([getattr(r, field) for r in loop])
        torch.testing.assert_close(getattr(found, field), stacked, rtol=1e-9, atol=1e-9, msg=field)

    def loss(*data):
        z, lam, nu, mu, *_ = module(*data)
        return z.sin().sum() + (lam * lam).sum() + nu.sum() + mu.sum()

    every = tuple(range(9))
    each = torch.func.vmap(torch.func.grad(loss, every), dims)(*data)
    for e in range(E):
        for name, a, b in zip(QP._fields, each, torch.func.grad(loss, every)(*one(e)), strict=True):
            torch.testing.assert_close(a[e], b, rtol=1e-7, atol=1e-8, msg=name)
    # The other way round: what all of them share gets the sum.
    total = torch.func.grad(lambda *data: torch.func.vmap(loss, dims)(*data).sum(), every)(*data)
    for name, dim, a, b in zip(QP._fields, dims, total, each, strict=True):
        torch.testing.assert_close(a, b.sum(0) if dim is None else b.movedim(0, dim), rtol=1e-7, atol=1e-8, msg=name)


@pytest.mark.parametrize("B", [1, 3])
def test_jacrev_is_a_loop_of_vjps(B):
    qp = tensors(solvable(10, B, 4, 3, 1, two_sided=True).qp)
    qp[2] = qp[2][:1]
    layer = QPLayer()
    every = tuple(range(9))
    jacobian = torch.func.jacrev(lambda *data: laid(layer, *data), every)(*qp)
    z, pull = torch.func.vjp(lambda *data: laid(layer, *data), *qp)
    for b in range(B):
        for j in range(4):
            e = torch.zeros_like(z)
            e[b, j] = 1.0
            for name, J, row in zip(QP._fields, jacobian, pull(e), strict=True):
                torch.testing.assert_close(J[b, j], row, rtol=1e-8, atol=1e-9, msg=name)
    # Of each sample alone: the blocks of the diagonal.
    alone = torch.func.jacrev(lambda Q, p, *rest: laid(layer, Q, p, qp[2][0], *rest)[0], 1)
    blocks = torch.func.vmap(alone)(*qp[:2], *qp[3:])
    diagonal = torch.stack([jacobian[1][b, :, b] for b in range(B)])
    torch.testing.assert_close(blocks, diagonal, rtol=1e-8, atol=1e-9)


def test_the_operators_themselves_are_vmapped():
    qp = tensors(solvable(11, 6, 4, 3, 1).qp)
    start, steps = torch.zeros(1, 0, dtype=torch.float64), 50
    found = torch.ops.icnnrt.qp_solve(*qp, start, steps, False)
    E = [a.reshape(2, 3, *a.shape[1:]) for a in qp]
    vmapped = torch.func.vmap(lambda *data: torch.ops.icnnrt.qp_solve(*data, start, steps, False))(*E)
    for a, b in zip(vmapped, found, strict=True):
        torch.testing.assert_close(a.flatten(0, 1), b)
    _, lam, _, mu, slack, box_slack, _, status, *_ = found
    fixed = (qp[0], qp[2], qp[5], lam, mu, slack, box_slack, status)
    bars = torch.eye(4, dtype=torch.float64)[:, None].expand(4, 6, 4)
    d = torch.func.vmap(lambda z_bar: torch.ops.icnnrt.qp_sensitivity(*fixed, z_bar, start, start, start))(bars)
    for j in range(4):
        for a, b in zip(d, torch.ops.icnnrt.qp_sensitivity(*fixed, bars[j], start, start, start), strict=True):
            torch.testing.assert_close(a[j], b)


def test_vmap_over_samples_without_an_answer():
    qp, wanted = mixed(7)
    data = [a[:, None] for a in tensors(qp)]
    found = torch.func.vmap(Everything())(*data)
    assert (found[6][:, 0].numpy() == statuses(wanted)).all()
    with pytest.raises(ValueError, match=r"on_unsafe: sample \[\d, 0\] and \d+ more ended with"):
        torch.func.vmap(Everything(on_unsafe="raise"))(*data)
    solved = torch.from_numpy(wanted == QPStatus.SOLVED)
    for on_unsafe, lost in (("nan", lambda g: g.isnan().all()), ("skip", lambda g: (g == 0).all())):
        layer = QPLayer(on_unsafe=on_unsafe)
        loss = lambda *data, layer=layer: laid(layer, *data).nan_to_num().sum()  # noqa: E731
        gradient = torch.func.vmap(torch.func.grad(loss, 1))(*data)
        assert lost(gradient[~solved])
        assert gradient[solved].isfinite().all()


def test_the_operators_pass_torchs_own_checks():
    qp = tensors(solvable(7, 3, 4, 3, 1, two_sided=True).qp, requires_grad=True)
    torch.library.opcheck(
        torch.ops.icnnrt.qp_solve.default,
        (*qp, torch.zeros(1, 0, dtype=torch.float64), 50, False),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_a_kernel_can_take_over(monkeypatch):
    """What `kernels` returns is asked, with the arguments of the operators."""
    seen = []

    def solve(arrays):
        seen.append([a.shape for a in arrays])
        r = qp_solve(QP(*(np.broadcast_to(a, (2, *a.shape[1:])) for a in arrays[:9])))
        return tuple(r)

    def adjoint(arrays):
        seen.append([a.shape for a in arrays])
        rows = [np.ones_like(arrays[i]) for i in (8, 3)] + [np.ones((2, 1)), np.ones((2, 4))]
        return [*rows, np.zeros(2), np.zeros(2, np.int32)]

    monkeypatch.setattr(home, "kernels", lambda dtype: home.Kernels(solve, adjoint))
    qp = tensors(solvable(8, 2, 4, 3, 1, two_sided=True, box=True).qp, requires_grad=True)
    z = laid(QPLayer(), *qp)
    z.sum().backward()
    assert seen[0] == [*(tuple(a.shape) for a in qp), (1, 0)]
    assert seen[1][-3:] == [(1, 0), (1, 0), (1, 0)]
    assert (qp[1].grad == 1).all()


Q3, P3 = torch.eye(3), torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("arguments", "keywords", "sentence"),
    [
        (
            (torch.ones(2, 3), P3),
            {},
            "Q: expected a square matrix [n, n] or a batch of them [B, n, n], but got shape [2, 3]; ",
        ),
        ((torch.eye(4), P3), {}, "p: expected shape [4] or, for a batch, [B, 4], but got [2, 3]; p has an entry for"),
        ((Q3, torch.zeros(1, 2, 3)), {}, "p: expected shape [3] or, for a batch, [B, 3], but got [1, 2, 3]; p has"),
        ((Q3, P3.int()), {}, "p: expected float32 or float64, but got torch.int32; convert"),
        ((Q3.double(), P3), {}, "Q: expected torch.float32 on cpu, as p is, but got torch.float64 on cpu; "),
        (
            (Q3, P3, torch.ones(4, 2), torch.ones(4)),
            {},
            "G: expected shape [m, 3] or, for a batch, [B, m, 3], but got [4, 2]; G has a row",
        ),
        (
            (Q3, P3, torch.ones(4, 3), torch.ones(5)),
            {},
            "h: expected shape [4] or, for a batch, [B, 4], but got [5]; h has an entry for each",
        ),
        (
            (Q3, P3, torch.ones(4, 3), [1.0]),
            {},
            "h: expected a tensor, or one number, but got list; pass torch.as_tensor",
        ),
        (
            (Q3, P3, torch.ones(4, 3)),
            {},
            "h: expected an entry for each row of G, as G was given, but got none; pass h or h_lower",
        ),
        (
            (Q3, P3, None, torch.ones(4)),
            {},
            "G: expected a row for each bound and a column for each variable, as h was given, but got n",
        ),
        (
            (Q3, P3, None, None, torch.ones(1, 3)),
            {},
            "b: expected an entry for each row of A, as A was given, but got none; pass b with it",
        ),
        (
            (Q3, P3),
            {"lower": torch.ones(2)},
            "lower: expected shape [3] or, for a batch, [B, 3], but got [2]; lower has",
        ),
        (
            (torch.eye(3).expand(3, 3, 3), P3),
            {},
            "p: expected 3 samples, as Q has, or 1 for all, but got 2; data share",
        ),
        (([[1.0]], P3), {}, "Q: expected a tensor, but got list; pass torch.as_tensor"),
    ],
)
def test_errors_are_sentences(arguments, keywords, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        QPLayer()(*arguments, **keywords)


def test_settings_are_checked():
    choices = "'nan', 'use', 'skip' or 'raise'"
    with pytest.raises(ValueError, match=f"on_unsafe: expected {choices}, but got 'zero'; choose 'skip'"):
        QPLayer(on_unsafe="zero")
    with pytest.raises(ValueError, match="steps"):
        QPLayer(steps=0)
    assert "on_unsafe='skip'" in repr(QPLayer(on_unsafe="skip"))


LONELY = """
import sys, torch
module = torch.jit.load(sys.argv[1])
assert not [name for name in sys.modules if name.startswith("icnnrt")]
for B in (1, 3, 128):
    module.zero_grad()
    z = module(torch.load(sys.argv[2] + str(B)))
    z.sin().sum().backward()
    torch.save((z.detach(), [p.grad for p in module.parameters()]), sys.argv[3] + str(B))
"""


class Controller(torch.nn.Module):
    """x -> parameters of a quadratic program -> its answer."""

    def __init__(self, **keywords):
        super().__init__()
        self.inner = torch.nn.Linear(4, 6)
        self.factor = torch.nn.Parameter(0.5 * torch.randn(6, 6))
        self.G = torch.nn.Parameter(torch.randn(3, 6))
        self.qp = QPLayer(**keywords)

    def forward(self, x):
        Q = self.factor @ self.factor.T + 0.1 * torch.eye(6, dtype=x.dtype)
        return self.qp(Q, self.inner(x), self.G, torch.ones(3, dtype=x.dtype), lower=-1.0, upper=1.0)


def test_a_trace_runs_in_a_process_without_us(tmp_path, monkeypatch):
    # The steps that a trace holds: where a multiplier is nearly zero, the kernels' gradients part from theirs.
    monkeypatch.setattr(home, "kernels", lambda dtype: None)
    torch.manual_seed(0)
    net = Controller().double()
    module = traced(net, [torch.randn(5, 4, dtype=torch.float64)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(module, tmp_path / "net.pt")
    for B in (1, 3, 128):
        torch.save(torch.randn(B, 4, dtype=torch.float64), tmp_path / f"in{B}")
    paths = [str(tmp_path / name) for name in ("net.pt", "in", "out")]
    subprocess.run([sys.executable, "-c", LONELY, *paths], check=True, cwd=tmp_path)
    for B in (1, 3, 128):
        net.zero_grad()
        z = net(torch.load(tmp_path / f"in{B}"))
        z.sin().sum().backward()
        there, gradients = torch.load(tmp_path / f"out{B}")
        torch.testing.assert_close(there, z.detach(), rtol=1e-9, atol=1e-9)
        for a, b in zip(gradients, net.parameters(), strict=True):
            torch.testing.assert_close(a, b.grad, rtol=1e-7, atol=1e-8)


FIRST = """
import torch
from icnnrt_models import QPLayer
layer, Q = QPLayer(), torch.eye(3, dtype=torch.float64)
p = torch.ones(2, 3, dtype=torch.float64)
module = torch.jit.trace(lambda p: layer(Q, p), (p,), check_trace=False)
assert (module(2 * p) + 2 * p).abs().max() < 1e-9
"""


def test_a_trace_may_be_the_first_that_a_process_asks_of_the_layer():
    """The solver is compiled by traces of its own, and torch's do not nest."""
    subprocess.run([sys.executable, "-W", "ignore", "-c", FIRST], check=True)


def test_a_trace_that_must_solve_raises():
    net = Controller(on_unsafe="raise").double()
    module = traced(net, [torch.randn(5, 4, dtype=torch.float64)])
    with pytest.raises(Exception, match="on_unsafe: a quadratic program has no solution"):
        module(torch.full((2, 4), torch.nan, dtype=torch.float64))
