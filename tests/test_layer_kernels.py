"""Layers solve by the native kernels where torch runs eagerly on the CPU, and in torch everywhere else: which ran."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from icnnrt import native_library
from icnnrt.errors import MissingDependencyError
from icnnrt.mathematics.domains import MODELS, NAMES
from icnnrt_models import PICNN, BundleEntropyArgmin, PolyhedronArgmin, QPLayer
from icnnrt_models.layers import bundle_entropy, kernels, qp_operators

needs_kernels = pytest.mark.skipif(not native_library.build().library, reason="the native kernels are not built")
X, N, B = 3, 6, 4
# Both end a solve with a duality gap at rounding level, which tells λ and y to the root of it, about 1e-8.
SAME = 1e-7


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The roles of the kernels that answered, in order."""
    roles: list[str] = []
    plain = kernels.kernel

    def noted(role: str, dtype: str) -> Any:
        found = plain(role, dtype)

        def run(arrays: Any, **settings: Any) -> Any:
            roles.append(role)
            return found(arrays, **settings)  # type: ignore[misc]

        return found and run

    for module in (bundle_entropy, qp_operators):
        monkeypatch.setattr(module, "kernel", noted)
    return roles


def by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_entropy, "kernel", lambda role, dtype: None)


def cuts(seed: int, k: int = 4, domain: str = "unit_box") -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    Y = rng.random((B, k, N))
    W = rng.standard_normal((N, N))
    G = Y @ (W @ W.T) + rng.standard_normal((B, 1, N))
    f = 0.5 * ((Y @ (W @ W.T)) * Y).sum(2)
    c = MODELS[domain].centre(N)
    return torch.from_numpy(G), torch.from_numpy(f + (G * (c - Y)).sum(2))


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("domain", NAMES)
def test_a_training_step_is_the_same_by_kernels_and_by_torch(
    domain: str, dtype: torch.dtype, ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(3)
    energy = PICNN(X, N, hidden=(16, 16), activation="softplus").to(dtype)
    layer = BundleEntropyArgmin(energy, iterations=5, domain=domain)  # type: ignore[arg-type]
    x = torch.randn(B, X, dtype=dtype, requires_grad=True)
    bounds = {"lower": -1.0, "upper": 2.0} if domain == "box" else {}

    def step() -> list[Tensor]:
        y = layer(x, **bounds)
        return [y.detach(), *torch.autograd.grad((y - 0.3).square().sum(), [x, *energy.parameters()])]

    fast = step()
    role = bundle_entropy.role(MODELS[domain])
    assert ran.count(f"{role}_solve") == 5
    assert ran.count(f"{role}_adjoint") == 5
    assert len(ran) == 10
    by_torch(monkeypatch)
    slow = step()
    # In float32 a digit of y that is rounded the other way is another cut point.
    bound = SAME if dtype == torch.float64 else 1e-3
    for a, b in zip(fast, slow, strict=True):
        assert (a - b).abs().max() <= bound * max(1.0, float(b.abs().max()))


@needs_kernels
@pytest.mark.parametrize("domain", ["unit_box", "simplex", "space"])
def test_of_a_model_both_give_the_same_and_nan_to_the_same_samples(
    domain: str, ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    G, e = cuts(1, domain=domain)
    G[1, 2, 0] = torch.nan
    e[2, 0] = torch.inf
    model = MODELS[domain]
    fast = bundle_entropy.bundle_entropy_solve(G, e, domain=model)
    warm = bundle_entropy.bundle_entropy_solve(G, e, fast.lam[:, :3].nan_to_num(), domain=model)
    assert ran == [f"{bundle_entropy.role(model)}_solve"] * 2
    by_torch(monkeypatch)
    slow = bundle_entropy.bundle_entropy_solve(G, e, domain=model)
    bad = torch.tensor([False, True, True, False])
    for one in (fast, warm, slow):
        assert (one.y.isnan().all(1) == bad).all()
        assert (one.lower_bound.isnan() == bad).all()
        torch.testing.assert_close(one.y[~bad], slow.y[~bad], rtol=0, atol=SAME)
        torch.testing.assert_close(one.lower_bound[~bad], slow.lower_bound[~bad], rtol=1e-12, atol=1e-12)


def faked(f: Callable[[Tensor], Tensor], G: Tensor) -> None:
    with FakeTensorMode() as mode:
        f(mode.from_tensor(G))


def scripted(f: Callable[[Tensor], Tensor], G: Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.trace(f, (G,), check_trace=False)


Way = Callable[[Callable[[Tensor], Tensor], Tensor], Any]
WAYS: dict[str, Way] = {
    "vmap": lambda f, G: torch.vmap(f)(G),
    "grad": lambda f, G: torch.func.grad(lambda a: f(a).sum())(G),
    "jit.trace": scripted,
    "make_fx": lambda f, G: make_fx(f)(G),
    "compile": lambda f, G: torch.compile(f, backend="eager")(G),
    "fake": faked,
    "meta": lambda f, G: f(G.to("meta")),
}


@pytest.mark.parametrize("way", WAYS)
def test_whatever_watches_is_served_by_torch(way: str) -> None:
    G, _ = cuts(2)
    found: list[bool] = []

    def inside(a: Tensor) -> Tensor:
        found.append(kernels.eager_on_cpu(a))
        return a * 2

    assert kernels.eager_on_cpu(G)
    WAYS[way](inside, G)
    assert found == [False]
    assert kernels.eager_on_cpu(G)


def test_other_depths_and_machines_without_kernels_are_served_by_torch(
    ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    G, e = cuts(3)
    few = bundle_entropy.bundle_entropy_solve(G, e, steps=50)
    assert ran == []
    monkeypatch.setattr(kernels, "operator_session", _without)
    kernels.kernel.cache_clear()
    monkeypatch.setattr(bundle_entropy, "kernel", kernels.kernel)
    try:
        torch.testing.assert_close(bundle_entropy.bundle_entropy_solve(G, e).y, few.y, rtol=0, atol=1e-12)
    finally:
        kernels.kernel.cache_clear()


def _without(role: str, dtype: str) -> Any:
    raise MissingDependencyError("there is no library")


@needs_kernels
def test_whatever_tensors_come_are_taken(ran: list[str]) -> None:
    """A cotangent that is negative by a bit alone, and float32, which the layer itself never gives."""
    layer = BundleEntropyArgmin(PICNN(X, N, hidden=(8,)).double(), iterations=3)
    x = torch.randn(B, X, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    seed = torch.complex(y.detach(), y.detach()).conj().imag
    assert seed.is_neg()
    torch.testing.assert_close(
        torch.autograd.grad(y, x, seed, retain_graph=True)[0], torch.autograd.grad(y, x, seed.resolve_neg())[0]
    )
    G, e = cuts(4)
    ran.clear()
    assert bundle_entropy.bundle_entropy_solve(G.float(), e.float()).y.dtype == torch.float32
    assert ran == []


def programs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Q, p, G and h of B quadratic programs."""
    g = torch.Generator().manual_seed(5)
    F, p, G = (torch.randn(B, *shape, generator=g, dtype=torch.float64) for shape in ((N, N), (N,), (3, N)))
    return F @ F.mT, p, G, torch.ones(B, 3, dtype=torch.float64)


BOTH = ["qp_solve", "qp_sensitivity"]
Layer = Callable[[Tensor], Tensor]
# z and its derivative by p, and which kernels answered. An operator of torch is one call for whatever holds it, so the
# kernels run it in compiled code as well, and once for all that vmap runs over; a trace holds the solver itself.
PROGRAM_WAYS: dict[str, tuple[Callable[[Layer, Tensor], Tensor], list[str]]] = {
    "eager": (lambda f, p: f(p), BOTH),
    "vmap": (lambda f, p: torch.vmap(f)(p[None]), BOTH),
    "compile": (lambda f, p: torch.compile(f, backend="eager")(p), BOTH),
    "jit.trace": (lambda f, p: torch.jit.trace(f, (p.detach(),), check_trace=False)(p), []),
}


@needs_kernels
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("way", PROGRAM_WAYS)
def test_quadratic_programs_are_solved_by_kernels_but_in_traces(way: str, ran: list[str]) -> None:
    Q, p, G, h = programs()
    layer = QPLayer()
    run, wanted = PROGRAM_WAYS[way]
    p.requires_grad_()
    run(lambda p: layer(Q, p, G, h), p).sum().backward()
    assert ran == wanted
    assert p.grad is not None


@needs_kernels
def test_programs_with_settings_are_solved_by_kernels(ran: list[str]) -> None:
    QPLayer(steps=20, tolerance=1e-4)(*programs())
    assert ran == BOTH[:1]


@needs_kernels
def test_programs_of_other_devices_are_solved_in_torch(ran: list[str]) -> None:
    Q, p, G, h = programs()
    QPLayer()(*(a.to("meta") for a in (Q, p, G, h)))
    with FakeTensorMode() as mode:
        QPLayer()(*map(mode.from_tensor, (Q, p, G, h)))
    assert ran == []


@needs_kernels
def test_programs_of_an_argmin_over_a_polyhedron_are_solved_by_kernels(ran: list[str]) -> None:
    energy = PICNN(X, N, hidden=(8,), activation="softplus").double()
    layer = PolyhedronArgmin(energy, iterations=4, adjoint="implicit", tolerance=0.0)
    x = torch.randn(B, X, dtype=torch.float64, requires_grad=True)
    y = layer(x, lower=-1.0, upper=1.0)
    assert ran[:1] == ["qp_solve"]
    assert layer.last is not None
    assert ran.count("qp_solve") >= 1 + int(layer.last.cuts.max())  # of the feasible point nearest to y_init first
    ran.clear()
    y.sum().backward()
    assert ran == BOTH  # Newton's program, and its adjoint
