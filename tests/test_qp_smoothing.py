"""The smoothed gradient of quadratic programs: the derivative at a point of the central path."""

import numpy as np
import pytest
import torch
from qp_backends import laid
from quadratic_programs import solvable

import icnnrt
from icnnrt.errors import CertificateError, InputError
from icnnrt.mathematics.namespace import NUMPY
from icnnrt.mathematics.qp_reference import QP, qp_solve
from icnnrt.mathematics.qp_smoothing import smoothed
from icnnrt_models import QPLayer

KAPPAS = (1.0, 1e-2, 1e-4)


def problem(seed, q=1):
    """Two-sided rows and boxes, some of their sides absent, z = 0 well inside."""
    rng = np.random.default_rng(seed)
    n, m = 5, 6
    M, G, A = rng.standard_normal((n, n - seed % 2)), rng.standard_normal((m, n)), rng.standard_normal((q, n))
    above, below = rng.random((2, m)) + 0.1
    h_lower = np.where(rng.random(m) < 0.5, -below, -np.inf)
    upper = np.where(rng.random(n) < 0.5, np.inf, 1.0)
    data = M @ M.T, 3 * rng.standard_normal(n), G, h_lower, above, A, np.zeros(q), -rng.random(n) - 0.1, upper
    return QP(*(a[None] for a in data))


def barrier_point(qp, kappa):
    """z_κ by Newton's method on the barrier itself, with a search along the line: it shares nothing with the method."""
    Q, p, G, h_lower, h, A, _, lower, upper = (a[0] for a in qp)
    C = np.concatenate([G, np.eye(len(p))])
    low, high = np.concatenate([h_lower, lower]), np.concatenate([h, upper])

    def value(z):
        slacks = np.concatenate([high - C @ z, C @ z - low])
        if (slacks <= 0).any():
            return np.inf
        return 0.5 * z @ Q @ z + p @ z - kappa * np.log(slacks[np.isfinite(slacks)]).sum()

    basis = np.linalg.svd(A)[2][len(A) :].T  # of the null space of A; b = 0
    y = np.zeros(basis.shape[1])
    for _ in range(200):
        z = basis @ y
        up, down = 1 / (high - C @ z), 1 / (C @ z - low)  # 0 where there is no bound
        g = basis.T @ (Q @ z + p + kappa * C.T @ (up - down))
        H = basis.T @ (Q + kappa * (C.T * (up**2 + down**2)) @ C) @ basis
        d = -np.linalg.solve(H, g)
        if -g @ d < 1e-26:
            return z
        t = 1.0
        while not value(basis @ (y + t * d)) <= value(z) + 0.25 * t * g @ d + 1e-14 * abs(value(z)):
            t *= 0.5
            if t < 1e-9:
                return z
        y = y + t * d
    raise AssertionError("Newton's method has not converged")


def given(qp):
    """The arguments of `icnnrt.qp`."""
    Q, p, G, h_lower, h, A, b, lower, upper = qp
    equalities = {"A": A, "b": b} if b.shape[1] else {}
    return {"Q": Q, "p": p, "G": G, "h": h, "h_lower": h_lower, "lower": lower, "upper": upper, **equalities}


def gradients_of(way, qp, bars, kappa, **options):
    """Of z̄, λ̄, ν̄ and μ̄ by `icnnrt.qp` or the torch layer, as a QP."""
    if way == "icnnrt.qp":
        found = icnnrt.qp(**given(qp)).vjp(*bars, smoothing=kappa, **options)
        return QP(*(np.asarray(0.0 if (a := getattr(found, name)) is None else a) for name in QP._fields))
    data = [torch.from_numpy(np.array(a)).requires_grad_() for a in qp]
    found = laid(QPLayer(multipliers=True, smoothing=kappa, **options), *data)
    loss = sum((a * torch.from_numpy(bar)).sum() for a, bar in zip(found[:4], bars, strict=False))
    got = torch.autograd.grad(loss, data)
    return QP(*(a.numpy() for a in got))


WAYS = ("icnnrt.qp", "torch")


@pytest.mark.parametrize("kappa", KAPPAS)
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("way", WAYS)
def test_it_is_the_derivative_of_the_barrier_problem(way, seed, kappa):
    qp = problem(seed, q=seed % 3)
    rng = np.random.default_rng(seed + 100)
    z_bar = rng.standard_normal((1, 5))
    gradients = gradients_of(way, qp, [z_bar], kappa)
    for name in ("Q", "p", "G", "h", "h_lower", "lower", "upper"):
        datum = getattr(qp, name)
        d = np.where(np.isfinite(datum), rng.standard_normal(datum.shape), 0.0)
        d = d + d.swapaxes(1, 2) if name == "Q" else d
        step = 1e-5
        ahead, behind = (barrier_point(qp._replace(**{name: datum + sign * step * d}), kappa) for sign in (1, -1))
        slope = z_bar[0] @ (ahead - behind) / (2 * step)
        got = (d * np.where(d == 0, 0.0, getattr(gradients, name))).sum()
        np.testing.assert_allclose(got, slope, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("seed", range(4))
def test_so_are_gradients_by_equalities_and_of_multipliers(seed):
    qp, kappa = problem(seed, q=2), 1e-2
    rng = np.random.default_rng(seed)
    answer = qp_solve(qp)[:4]
    bars = [rng.standard_normal(a.shape) for a in answer]
    gradients = gradients_of("icnnrt.qp", qp, bars, kappa)

    def loss(program):
        found = smoothed(NUMPY, program, answer, [0.0 * a for a in answer], kappa)
        return sum((a * bar).sum() for a, bar in zip(found[:4], bars, strict=True))

    for name in QP._fields:
        datum = getattr(qp, name)
        d = np.where(np.isfinite(datum), rng.standard_normal(datum.shape), 0.0)
        d = d + d.swapaxes(1, 2) if name == "Q" else d
        slope = (loss(qp._replace(**{name: datum + 1e-6 * d})) - loss(qp._replace(**{name: datum - 1e-6 * d}))) / 2e-6
        got = (d * np.where(d == 0, 0.0, getattr(gradients, name))).sum()
        np.testing.assert_allclose(got, slope, rtol=1e-5, atol=1e-5, err_msg=name)
    for name, a, b in zip(QP._fields, gradients, gradients_of("torch", qp, bars, kappa), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("kind", ["random", "duplicate rows", "scaled rows", "scaled columns", "dependent equalities"])
@pytest.mark.parametrize("seed", range(3))
def test_it_becomes_the_gradient_at_the_answer(kind, seed):
    qp = solvable(seed, 4, 6, 5, 2, kind=kind).qp
    exact = icnnrt.qp(**given(qp)).vjp(np.ones((4, 6)))
    off = []
    for kappa in (1e-3, 1e-5, 1e-7):
        near = icnnrt.qp(**given(qp)).vjp(np.ones((4, 6)), smoothing=kappa)
        assert near.reliable.all()
        off.append(np.abs(near.p - exact.p).max() / np.abs(exact.p).max())
    assert off[2] < 1e-2
    assert off[2] <= off[1] <= off[0]


def test_a_smoothing_below_rounding_is_right_or_told():
    """Three rows through a vertex of two variables, whose point of the path is known in closed form no more."""
    Q, p, G, h = np.eye(2), np.array([-2.0, -3.0]), np.ones((1, 2)), np.array([2.0])
    solution = icnnrt.qp(Q, p, G, h, upper=np.ones(2))
    wanted = solution.vjp(np.array([0.0, 1.0]), smoothing=1e-6).h[0]
    for kappa in 10.0 ** -np.arange(7, 16):
        found = solution.vjp(np.array([0.0, 1.0]), smoothing=kappa)
        if found.reliable.all():
            np.testing.assert_allclose(found.h, wanted, rtol=1e-3)
        else:
            assert np.isnan(found.h).all()


def test_it_tells_of_a_bound_that_does_not_hold_yet():
    """Where the exact gradient is blind: z = −p inside its bounds has no gradient by them."""
    solution = icnnrt.qp(np.eye(2), np.zeros(2), lower=-1.0, upper=1.0)
    assert (solution.vjp(np.ones(2)).upper == 0.0).all()
    near = solution.vjp(np.ones(2), smoothing=0.1)
    assert near.upper > 0.0
    assert near.lower > 0.0
    # Of 1 = z, at its bound and with a multiplier of 0, the smoothed one lies between the two that there are.
    kink = icnnrt.qp(np.eye(1), -np.ones(1), upper=1.0)
    assert not kink.vjp(np.ones(1)).reliable.any()
    between = kink.vjp(np.ones(1), smoothing=1e-8)
    assert between.reliable.all()
    np.testing.assert_allclose([between.p[0], between.upper], [-0.5, 0.5], atol=1e-3)


def test_a_batch_and_shared_data():
    rng = np.random.default_rng(5)
    p, z_bar = 3 * rng.standard_normal((6, 4)), rng.standard_normal((6, 4))
    Q, G, h = np.eye(4), rng.standard_normal((3, 4)), np.ones(3)
    p[2] = np.nan
    with np.errstate(invalid="raise"):
        batch = icnnrt.qp(Q, p, G, h, lower=-1.0).vjp(z_bar, smoothing=1e-2, on_unsafe="skip")
    assert batch.skipped.tolist() == [False, False, True, False, False, False]
    rest = [0, 1, 3, 4, 5]
    alone = [icnnrt.qp(Q, p[i], G, h, lower=-1.0).vjp(z_bar[i], smoothing=1e-2) for i in rest]
    np.testing.assert_allclose(batch.p[rest], [one.p for one in alone], rtol=1e-9, atol=1e-12)
    for name in ("Q", "G", "h", "lower"):
        total = sum(getattr(one, name) for one in alone)
        np.testing.assert_allclose(getattr(batch, name), total, rtol=1e-9, atol=1e-12)
    assert np.isnan(batch.p[2]).all()


def test_float32():
    qp = problem(1)
    wide = icnnrt.qp(**given(qp)).vjp(np.ones((1, 5)), smoothing=1e-2)
    data = {name: a.astype(np.float32) for name, a in given(qp).items()}
    narrow = icnnrt.qp(**data).vjp(np.ones((1, 5), np.float32), smoothing=1e-2)
    assert narrow.p.dtype == np.float32
    assert narrow.reliable.all()
    np.testing.assert_allclose(narrow.p, wide.p, rtol=1e-4, atol=1e-4)


def test_without_an_interior_there_is_no_point_and_it_is_told():
    G, h = np.array([[1.0, 0.0], [-1.0, 0.0]]), np.array([1.0, -1.0])
    solution = icnnrt.qp(np.eye(2), np.zeros(2), G, h)
    gradients = solution.vjp(np.ones(2), smoothing=0.1)
    assert np.isnan(gradients.p).all()
    assert not gradients.reliable.any()
    assert "no point of the central path was found" in gradients.advice()
    with pytest.raises(CertificateError, match="no point of the central path"):
        solution.vjp(np.ones(2), smoothing=0.1, on_unsafe="raise")
    data = [torch.tensor(a, requires_grad=True) for a in (np.eye(2), np.zeros(2), G, h)]
    QPLayer(smoothing=0.1)(*data).sum().backward()
    assert all(a.grad.isnan().all() for a in data[1:2])
    with pytest.raises(InputError, match="NO_GRADIENT: no point of the central path"):
        QPLayer(smoothing=0.1, on_unsafe="raise")(*data).sum().backward()


@pytest.mark.parametrize("kappa", [0.0, -1.0, np.nan, np.inf, "little"])
def test_wrong_smoothing(kappa):
    solution = icnnrt.qp(np.eye(2), np.zeros(2), lower=-1.0)
    with pytest.raises(InputError, match=r"smoothing: expected .*leave it out for the gradient at the answer itself"):
        solution.vjp(np.ones(2), smoothing=kappa)
    with pytest.raises(InputError, match="smoothing: expected"):
        QPLayer(smoothing=kappa)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_transforms_of_torch():
    qp, layer = problem(2), QPLayer(smoothing=1e-2)
    fixed = [torch.from_numpy(np.array(a)) for a in qp]

    def of(p):
        return laid(layer, fixed[0], p, *fixed[2:])

    p = fixed[1]
    jacobian = torch.func.jacrev(of)(p)
    _, pull = torch.func.vjp(of, p)
    for i in range(5):
        (row,) = pull(torch.eye(5, dtype=torch.float64)[None, i])
        torch.testing.assert_close(jacobian[0, i], row, rtol=1e-9, atol=1e-12)
    (whole,) = pull(torch.ones(1, 5, dtype=torch.float64))
    torch.testing.assert_close(torch.func.grad(lambda p: of(p).sum())(p), whole, rtol=1e-9, atol=1e-12)
    many = torch.func.vmap(torch.func.grad(lambda p: of(p[None]).sum()))(torch.cat([p, p]))
    torch.testing.assert_close(many, torch.cat([whole, whole]), rtol=1e-9, atol=1e-12)
    with pytest.raises(RuntimeError, match="no forward mode with smoothing"):
        torch.func.jvp(of, (p,), (p,))
    leaf = p.clone().requires_grad_()
    (first,) = torch.autograd.grad(of(leaf).sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="expected one derivative with smoothing"):
        torch.autograd.grad(first.sum(), leaf)


def test_compiled():
    qp, layer = problem(4), QPLayer(smoothing=1e-2)
    fixed = [torch.from_numpy(np.array(a)) for a in qp]
    got = []
    for call in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        p = fixed[1].clone().requires_grad_()
        laid(call, fixed[0], p, *fixed[2:]).sum().backward()
        got.append(p.grad)
    torch.testing.assert_close(*got)
