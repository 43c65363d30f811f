"""Derivatives of `QPLayer` beyond gradients: forward mode, second ones, and what is compiled whole."""

import numpy as np
import pytest
import torch
from qp_backends import laid
from quadratic_programs import mixed, solvable
from torch.autograd import forward_ad

import icnnrt
from icnnrt.mathematics.qp_status import QPStatus
from icnnrt_models import QPLayer
from icnnrt_models.layers import qp_operators

# torch scripts what it decomposes operators into when torch.func.jvp is first called.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")

NAMES = ("Q", "p", "G", "h_lower", "h", "A", "b", "lower", "upper")


def tensors(qp):
    return [torch.from_numpy(np.array(a)) for a in qp]


def moving(seed, data):
    """A direction of every datum, 0 where it is infinite."""
    draw = torch.Generator().manual_seed(seed)
    return [torch.where(a.isfinite(), torch.randn(a.shape, generator=draw, dtype=a.dtype), 0.0) for a in data]


def multipliers(*data):
    found = laid(QPLayer(multipliers=True), *data)
    return found.z, found.lam, found.nu, found.bound_multipliers


@pytest.fixture(params=["kernels", "torch"])
def way(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(qp_operators, "kernels", lambda dtype: None)
    return request.param


@pytest.mark.parametrize("size", [(6, 4, 2), (4, 0, 0), (5, 3, 0)])
def test_forward_mode_is_that_of_the_runtime(way, size):
    qp = solvable(1, 3, *size, two_sided=True, box=True).qp
    data = tensors(qp)
    dots = moving(2, data)
    _, tangents = torch.func.jvp(multipliers, tuple(data), tuple(dots))
    sides = {n: getattr(qp, n) for n in ("h_lower", "lower", "upper")}
    wanted = icnnrt.qp(*(getattr(qp, n) for n in "QpGhAb"), **sides).jvp(
        **{f"{name}_dot": dot.numpy() for name, dot in zip(NAMES, dots, strict=True)}
    )
    for found, right in zip(tangents, wanted, strict=True):
        torch.testing.assert_close(found, torch.from_numpy(np.array(right)), rtol=1e-8, atol=1e-10)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(a, dot) for a, dot in zip(data, dots, strict=True)]
        dual = forward_ad.unpack_dual(multipliers(*duals)[0]).tangent
    torch.testing.assert_close(dual, tangents[0])


@pytest.mark.parametrize("at", [0, 1, 2, 4, 5, 6])
def test_forward_and_reverse_jacobians_agree(way, at):
    data = tensors(solvable(3, 2, 4, 3, 1).qp)

    def z(a):
        return laid(QPLayer(), *data[:at], a, *data[at + 1 :])

    forward, reverse = torch.func.jacfwd(z)(data[at]), torch.func.jacrev(z)(data[at])
    assert forward.abs().max() > 1e-6
    torch.testing.assert_close(forward, reverse, rtol=1e-8, atol=1e-10)


def test_forward_mode_under_vmap_and_over_it():
    data = tensors(solvable(4, 6, 4, 3, 1).qp)
    dots = moving(5, data)
    _, whole = torch.func.jvp(lambda *a: laid(QPLayer(), *a), tuple(data), tuple(dots))
    each = [a.reshape(3, 2, *a.shape[1:]) if len(a) == 6 else a for a in data]
    each_dot = [a.reshape(3, 2, *a.shape[1:]) if len(a) == 6 else a for a in dots]
    dims = tuple(0 if a.ndim > b.ndim else None for a, b in zip(each, data, strict=True))

    def one(*a):
        return laid(QPLayer(), *a)

    inside = torch.func.vmap(lambda a, d: torch.func.jvp(one, a, d)[1], (dims, dims))(tuple(each), tuple(each_dot))
    torch.testing.assert_close(inside.reshape(6, 4), whole)
    over = torch.func.jvp(torch.func.vmap(one, dims), tuple(each), tuple(each_dot))[1]
    torch.testing.assert_close(over.reshape(6, 4), whole)


def test_shared_data_move_every_sample():
    Q, p, *_ = tensors(solvable(6, 3, 4, 0, 0).qp)
    dot = torch.ones(4, 4, dtype=torch.float64)
    z, tangent = torch.func.jvp(lambda Q: QPLayer()(Q, p), (Q[0],), (dot,))
    torch.testing.assert_close(tangent, -torch.linalg.solve(Q[0], (dot @ z.T)).T)


def test_second_derivatives_by_finite_differences(way):
    data = tensors(solvable(7, 2, 4, 3, 1, two_sided=True).qp)
    free = [0, 1, 2, 4, 5, 6]
    for at in free:
        data[at].requires_grad_()

    def loss(*moved):
        whole = list(data)
        for at, a in zip(free, moved, strict=True):
            whole[at] = a
        return (laid(QPLayer(), *whole).sin() ** 2).sum()

    assert torch.autograd.gradgradcheck(loss, tuple(data[at] for at in free), rtol=1e-4, atol=1e-6)


def test_second_derivatives_every_way():
    Q, p, G, _, h, *_ = tensors(solvable(8, 1, 4, 3, 0).qp)

    def loss(p):
        return (QPLayer()(Q, p, G, h) ** 3).sum()

    ways = [
        torch.func.jacfwd(torch.func.grad(loss)),
        torch.func.jacrev(torch.func.grad(loss)),
        torch.func.jacrev(torch.func.jacfwd(loss)),
        torch.func.jacfwd(torch.func.jacfwd(loss)),
    ]
    first, *others = (second(p) for second in ways)
    assert first.abs().max() > 1e-3
    for other in others:
        torch.testing.assert_close(other, first, rtol=1e-8, atol=1e-10)
    step = 1e-5 * torch.eye(4, dtype=torch.float64)[:, None]
    gradient = torch.func.grad(loss)
    numeric = torch.stack([(gradient(p + e) - gradient(p - e)) / 2e-5 for e in step], -1)
    torch.testing.assert_close(first.reshape(1, 4, 4), numeric.reshape(1, 4, 4), rtol=1e-5, atol=1e-6)


def test_samples_without_an_answer():
    qp, wanted = mixed(9)
    data = tensors(qp)
    dots = moving(10, data)
    good = torch.from_numpy(wanted == QPStatus.SOLVED)
    for on_unsafe, lost in (("nan", lambda t: t.isnan().all()), ("skip", lambda t: (t == 0).all())):
        layer = QPLayer(on_unsafe=on_unsafe)
        tangent = torch.func.jvp(lambda *a, layer=layer: laid(layer, *a), tuple(data), tuple(dots))[1]
        assert tangent[good].isfinite().all()
        assert lost(tangent[~good])


def test_the_bare_operator_has_no_forward_mode():
    """torch would give the tangent 0."""
    Q, p, *_ = tensors(solvable(11, 2, 3, 0, 0).qp)
    none, rows = p[:, :0], Q[:, :0]

    def bare(p):
        return torch.ops.icnnrt.qp_solve(Q, p, rows, none, none, rows, none, none, none, none, 50, False)[0]

    with pytest.raises(RuntimeError, match="expected no forward mode"):
        torch.func.jvp(bare, (p,), (p,))
    with pytest.raises(RuntimeError, match="expected no forward mode"):
        torch.func.jacfwd(bare)(p)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="expected no forward mode"):
        bare(forward_ad.make_dual(p, p))
    torch.testing.assert_close(torch.func.jvp(lambda p: QPLayer()(Q, p), (p,), (p,))[0], bare(p))


@pytest.mark.parametrize("on_unsafe", ["nan", "skip"])
def test_one_graph_forward_and_backward(on_unsafe):
    data = tensors(solvable(12, 3, 5, 4, 1).qp)
    layer = QPLayer(on_unsafe=on_unsafe)
    compiled = torch.compile(lambda *a: laid(layer, *a), fullgraph=True, backend="aot_eager")
    found = []
    for function in (compiled, lambda *a: laid(layer, *a)):
        leaves = [a.clone().requires_grad_(bool(a.isfinite().all())) for a in data]
        z = function(*leaves)
        (z**2).sum().backward()
        found.append((z, *(a.grad for a in leaves if a.grad is not None)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_compiled_it_still_raises():
    layer = torch.compile(QPLayer(on_unsafe="raise"), backend="eager")
    with pytest.raises(ValueError, match="on_unsafe: sample 0"):
        layer(torch.eye(2), torch.ones(2), torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), torch.tensor([-1.0, -1.0]))


def test_under_autocast_the_layer_keeps_its_dtype():
    Q, p, *_ = (a.float() for a in tensors(solvable(13, 3, 5, 0, 0).qp))
    p.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        z = QPLayer()(Q, p)
        assert z.dtype == torch.float32
        z.sum().backward()
    plain = p.detach().clone().requires_grad_()
    QPLayer()(Q, plain).sum().backward()
    torch.testing.assert_close(z, QPLayer()(Q, plain))
    torch.testing.assert_close(p.grad, plain.grad)
