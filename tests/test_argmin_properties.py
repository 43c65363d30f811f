"""K cuts of an energy, every way to take them in every domain: told by certificate and by differences.

The numpy reference, the torch layer with and without kernels, and sessions on portable bodies and on kernels. Energies
are recomputed by torch, bounds by the certificate and by many points, gradients by differences of the way's own
answers. No way is the judge of another.
"""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from cut_models import KERNELS
from exports import export

import icnnrt
from icnnrt.mathematics import certificate, reference
from icnnrt.mathematics.domains import MODELS, Coordinates, box_coordinates, space_coordinates
from icnnrt.mathematics.namespace import NUMPY
from icnnrt.mathematics.status import Status
from icnnrt_models import PICNN, BundleEntropyArgmin
from icnnrt_models.layers import bundle_entropy

T, X_DIM, N, K, MU, B = torch.float64, 3, 4, 4, 0.7, 24
KINDS = ("unit_box", "box", "simplex", "space")
WAYS = ("reference", "torch", "portable", *(("layer", "native") if KERNELS else ()))
EXACT = 1e-9  # sums in another order, of energies of usual size
DIFFERENCES = (
    1e-5  # relative to the largest: h⁴ of truncation, rounding of y (1e-13) over h, and how sharply K steps turn
)
MOST = 0.8  # of the samples: where a sample's cut lies on a kink, y has no derivative that differences see


def coordinates(kind: str, bounds: dict[str, np.ndarray]) -> Coordinates:
    if kind == "box":
        return box_coordinates(bounds["lower"], bounds["upper"])
    return space_coordinates(MU) if kind == "space" else Coordinates(0.0, 1.0)


def inputs(kind: str, count: int = B) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    rng = np.random.default_rng(3)
    x, lower = rng.standard_normal((count, X_DIM)), rng.uniform(-2.0, 1.0, (count, N))
    return x, {"lower": lower, "upper": lower + rng.uniform(0.1, 2.0, (count, N))} if kind == "box" else {}


def points(kind: str, count: int, seed: int) -> np.ndarray:
    """p [count, n] of the domain, in its coordinates."""
    rng = np.random.default_rng(seed)
    if kind == "simplex":
        return rng.dirichlet(np.ones(N), count)
    return rng.standard_normal((count, N)) if kind == "space" else rng.random((count, N))


class Case:
    """An energy, its layer, and its package."""

    def __init__(self, kind: str, activation: str, folder: Path) -> None:
        generator = torch.Generator().manual_seed(0)
        self.kind, self.domain = kind, MODELS[kind]
        self.energy = PICNN(X_DIM, N, (7, 5), activation=activation, dtype=T, generator=generator)
        with torch.no_grad():
            for name, p in self.energy.named_parameters():
                if name.endswith("W_y"):
                    p.mul_(2.0)  # bent enough that cuts matter
        more: dict[str, Any] = {"mu": MU} if kind == "space" else {}
        self.layer = BundleEntropyArgmin(self.energy, K, domain=kind, gap_tolerance=10.0, **more)  # type: ignore[arg-type]
        x, y = torch.randn(4, X_DIM, generator=generator, dtype=T), torch.rand(4, N, generator=generator, dtype=T)
        self.path = folder / f"{kind}.icnn"
        export(self.energy, self.layer, x, y, self.path)

    def value_and_gradient(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        leaf = torch.tensor(y, requires_grad=True)
        f = self.energy(torch.from_numpy(x), leaf)
        return f.detach().numpy(), torch.autograd.grad(f.sum(), leaf)[0].numpy()


class InTorch:
    """The layer, by torch's own solver or by kernels."""

    def __init__(self, case: Case, kernels: bool) -> None:
        self.case = case
        self.by: Callable[[], Any] = (
            nullcontext if kernels else lambda: mock.patch.object(bundle_entropy, "kernel", return_value=None)
        )

    def solve(self, x: Any, **bounds: Any) -> Any:
        with self.by():
            return self.case.layer.solve(torch.from_numpy(x), **self.given(bounds))

    def given(self, bounds: dict[str, Any]) -> dict[str, torch.Tensor]:
        return {name: torch.from_numpy(bound) for name, bound in bounds.items()}

    def pull(self, y_bar: np.ndarray, x: Any, **bounds: Any) -> dict[str, np.ndarray]:
        leaves = {name: t.requires_grad_() for name, t in self.given({"x": x, **bounds}).items()}
        weights = dict(self.case.energy.named_parameters())
        with self.by():
            loss = (self.case.layer(**leaves) * torch.from_numpy(y_bar)).sum()
            found = torch.autograd.grad(loss, [*leaves.values(), *weights.values()])
        return {name: g.numpy() for name, g in zip([*leaves, *weights], found, strict=True)}

    def move(self, by: dict[str, np.ndarray]) -> None:
        with torch.no_grad():
            for name, p in self.case.energy.named_parameters():
                if name in by:
                    p.add_(torch.from_numpy(by[name]))


class InSession:
    """A package, on portable bodies or on kernels."""

    def __init__(self, case: Case, native: bool | None) -> None:
        self.session = icnnrt.load(case.path, native=native)

    def solve(self, x: Any, **bounds: Any) -> Any:
        found = self.session.argmin(x, **bounds)
        assert (found.status <= Status.GAP).all()
        return found

    def pull(self, y_bar: np.ndarray, x: Any, **bounds: Any) -> dict[str, np.ndarray]:
        found = self.session.vjp(self.session.argmin(x, **bounds), y_bar)
        return {name: getattr(found, name) for name in ("x", *bounds)} | dict(found.weights)

    def move(self, by: dict[str, np.ndarray]) -> None:
        self.session.update_weights({name: self.session.weights[name] + step for name, step in by.items()})


class InNumpy:
    """The reference, over torch's energy; its gradients stand in test_domains.py."""

    def __init__(self, case: Case) -> None:
        self.case = case

    def solve(self, x: Any, **bounds: Any) -> Any:
        at = coordinates(self.case.kind, bounds)
        of_p = reference.in_coordinates(lambda y: self.case.value_and_gradient(x, y), at)
        centre = np.full((len(x), N), self.case.domain.centre(N))
        found = reference.bundle_entropy_argmin(of_p, centre, K, domain=self.case.domain)
        return found._replace(y=at.y(found.y))


MAKE: dict[str, Callable[[Case], Any]] = {
    "reference": InNumpy,
    "torch": lambda case: InTorch(case, kernels=False),
    "layer": lambda case: InTorch(case, kernels=True),
    "portable": lambda case: InSession(case, native=False),
    "native": lambda case: InSession(case, native=True),
}


@pytest.fixture(scope="module", params=["relu", "softplus"])
def activation(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=KINDS)
def case(request: pytest.FixtureRequest, activation: str, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(request.param, activation, tmp_path_factory.mktemp(activation))


@pytest.mark.parametrize("way", WAYS)
def test_the_certificate_holds(case: Case, way: str) -> None:
    for count in (1, B):
        x, bounds = inputs(case.kind, count)
        found = MAKE[way](case).solve(x, **bounds)
        names = ("y", "energy", "gap", "lower_bound", "slopes", "offsets", "lam", "cut_points")
        y, energy, gap, lower_bound, slopes, offsets, lam, cut_points = (np.asarray(getattr(found, n)) for n in names)
        at, domain = coordinates(case.kind, bounds), case.domain
        if case.kind == "box":
            assert ((bounds["lower"] <= y) & (y <= bounds["upper"])).all()
        p = at.p(y)
        true = case.value_and_gradient(x, y)[0] + domain.regulariser(NUMPY, p)[:, 0]
        np.testing.assert_allclose(energy, true, rtol=EXACT, atol=EXACT)
        np.testing.assert_allclose(lower_bound, energy - gap, rtol=EXACT, atol=EXACT)
        np.testing.assert_allclose(
            certificate.duality_gap(energy, slopes, offsets, lam, domain), gap, rtol=EXACT, atol=EXACT
        )
        residual = certificate.kkt_residuals(slopes, offsets, lam, p, domain)
        assert (residual[:, :2].max(1) <= 1e-8 * (1 + np.abs(p).max(1))).all()
        assert (residual[:, 2] <= gap + EXACT).all()
        assert certificate.convexity_violation(slopes, offsets, cut_points, domain).max() <= EXACT
        for seed in range(10):  # what is below f at its cuts is below it anywhere
            q = points(case.kind, count, seed)
            f = case.value_and_gradient(x, at.y(q))[0]
            cuts = offsets + np.einsum("bkn,bn->bk", slopes, q - domain.centre(N))
            assert (cuts.max(1) <= f + EXACT * (1 + np.abs(f))).all()
            assert (lower_bound <= f + domain.regulariser(NUMPY, q)[:, 0] + EXACT).all()


def differences(way: Any, y_bar: np.ndarray, at: dict[str, np.ndarray], name: str, along: np.ndarray) -> np.ndarray:
    """d(ȳ'y)/dt of at[name] + t·along, [B]: central, extrapolated."""

    def loss(t: float) -> np.ndarray:
        return np.asarray((np.asarray(way.solve(**{**at, name: at[name] + t * along}).y) * y_bar).sum(1))

    def central(h: float) -> np.ndarray:
        return (loss(h) - loss(-h)) / (2 * h)

    return (4 * central(1e-5) - central(2e-5)) / 3


@pytest.mark.parametrize("way", [way for way in WAYS if way != "reference"])
def test_gradients_are_the_derivative_of_the_answers(case: Case, activation: str, way: str) -> None:
    rng, ours = np.random.default_rng(5), MAKE[way](case)
    x, bounds = inputs(case.kind)
    at, y_bar = {"x": x, **bounds}, rng.standard_normal((B, N))
    found = ours.pull(y_bar, **at)
    for name, value in at.items():
        along = rng.standard_normal(value.shape)
        true, told = differences(ours, y_bar, at, name, along), (found[name] * along).sum(1)
        assert np.abs(true).max() > 1e-3, name  # else nothing would be told
        right = np.abs(told - true) <= DIFFERENCES * (1 + np.abs(told).max())
        assert right.mean() >= (MOST if activation == "relu" else 1.0), (name, told - true)
    if activation == "relu":
        return  # a weight moves all samples, and one of them is on a kink: test_argmin_layer.py draws until none is
    along = {name: rng.standard_normal(found[name].shape) for name in found if name not in at}

    def moved(t: float) -> float:
        ours.move({name: t * step for name, step in along.items()})
        try:
            return float((np.asarray(ours.solve(**at).y) * y_bar).sum())
        finally:
            ours.move({name: -t * step for name, step in along.items()})

    told = sum(float((found[name] * step).sum()) for name, step in along.items())
    h = 1e-6
    assert told == pytest.approx((moved(h) - moved(-h)) / (2 * h), rel=1e-4, abs=1e-5)
