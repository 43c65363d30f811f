"""Objectives over polyhedra that fall without end, or do not, whatever the size of their slopes: every statement of the
bundle method has to tell them apart, and to show a ray along which f falls."""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from amounts import ALL
from exports import export

import icnnrt
from icnnrt.format.signatures import POLYHEDRON_ROLES
from icnnrt.mathematics.bundle_qp import bundle_qp_argmin
from icnnrt.mathematics.polyhedron_programs import Polyhedron
from icnnrt.mathematics.status import Status

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")

from icnnrt_models import PolyhedronArgmin  # noqa: E402

N, ROWS = 3, 3
SIZES = (1.0, 1e-3, 1e-5, 1e-6, 1e-7, 1e-9, 1e-12) if ALL else (1.0, 1e-6, 1e-12)  # of all slopes
# y >= 0 and two rows, with e_0 and much else in its recession cone
G, H = np.array([[-1.0, 1.0, 0.0], [-0.5, 0.25, 1.0]]), np.array([1.0, 2.0])
TOLERANCE = {"float64": 1e-9, "float32": 1e-5}


class OfContext(torch.nn.Module):
    """f = (s_0 max v + s_1 log Σ e^v) |w| + b'y, v = Ay + a, x = (A, a, b, s)."""

    def __init__(self, dtype: Any) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones((), dtype=dtype))

    def forward(self, x: Any, y: Any) -> Any:
        A, a, b, s = x.split([ROWS * N, ROWS, N, 2], 1)
        v, s = (A.reshape(-1, ROWS, N) * y[:, None]).sum(2) + a, s.abs() * self.w.abs()
        top = v.amax(1)
        return s[:, 0] * top + s[:, 1] * (top + (v - top[:, None]).exp().sum(1).log()) + (b * y).sum(1)


class Cases(NamedTuple):
    x: np.ndarray
    least: np.ndarray  # the minimum over the polyhedron; −∞
    names: list[str]


def cases() -> Cases:
    down = [[-1.0, 0.5, 1.0], [-0.5, -0.25, 0.5], [-0.25, 0.0, 1.0]]  # each falls along e_0
    kink = [[1.0, 0.0, 0.0], [-1.0, 0.5, 0.0], [-2.0, 0.0, 1.0]]
    rows, least, names = [], [], []

    def case(
        name: str, c: float, minimum: float, *, A: Any = None, a: Any = 0.0, b: Any = 0.0, s: Any = (0, 0)
    ) -> None:
        A = np.zeros((ROWS, N)) if A is None else np.array(A)
        rows.append(np.concatenate([A.ravel(), np.zeros(ROWS) + a, c * (np.zeros(N) + b), c * np.array(s, float)]))
        least.append(c * minimum)
        names.append(f"{name}, {c:g}")

    for c in SIZES:
        case("affine, falls", c, -np.inf, b=[-1.0, 0.0, 0.0])
        case("affine, falls askew", c, -np.inf, b=[0.3, -1.0, 0.1])  # not along e_1, which has a row against it
        case("pieces, fall", c, -np.inf, A=down, a=[3.0, 1.0, -1.0], s=(1, 0))
        case("smooth, falls", c, -np.inf, A=down, a=[3.0, 1.0, -1.0], s=(0, 1))
        case("both, fall", c, -np.inf, A=down, b=[0.1, 0.0, 0.1], s=(1, 1))
        case("affine, bounded", c, 0.0, b=[1.0, 0.5, 0.25])
        case("constant", c, 0.0)
        case("pieces, bounded", c, 0.5, A=kink, a=[-0.5, 1.5, 1.0], s=(1, 0))
        # v = (y_0, −y_0, 0), of which the first cut, at 0, is flat
        case("smooth, bounded", c, np.log(3.0), A=[[1.0, 0, 0], [-1.0, 0, 0], [0, 0, 0]], b=[0, 1.0, 1.0], s=(0, 1))
        # log(1 + e^(2 − y_0) + e^(−40)) + y_0/8: cuts far out bound it, the first does not
        case("escapes at first", c, np.nan, A=[[-1.0, 0, 0], [0, 0, 0], [0, 0, 0]], a=[2.0, 0, -40], b=0.125, s=(0, 1))
    e = 1 / 7  # e^(2 − y_0), where −e/(1 + e) + 1/8 = 0
    least_1 = np.log(1 + e) + 0.125 * (2 - np.log(e))
    least = [c * least_1 if np.isnan(m) else m for m, c in zip(least, np.repeat(SIZES, 10), strict=True)]
    return Cases(np.array(rows), np.array(least), names)


@pytest.fixture(scope="module", params=["float64", "float32"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    dtype = getattr(torch, request.param)
    energy, x = OfContext(dtype), torch.randn(4, ROWS * N + ROWS + N + 2, dtype=dtype)
    path = tmp_path_factory.mktemp("rays") / "of_context.icnn"
    export(energy, None, x, torch.rand(4, N, dtype=dtype), path, heads=("polyhedron",))
    return energy, path


def answers(statement: str, energy: Any, path: Path) -> Any:
    x = cases().x
    given: dict[str, Any] = {"G": G, "h": H, "lower": 0.0}
    package = icnnrt.Package.open(path)
    if statement == "graph":
        return icnnrt.load(package).argmin_polyhedron(x, **given, mu=0.0)
    if statement == "bodies":
        return icnnrt.load(package, native=False).argmin_polyhedron(x, **given, mu=0.0)
    if statement == "session":
        graphs = {role: file for role, file in package.manifest.graphs.items() if role not in POLYHEDRON_ROLES}
        kept = {role: package.graphs[role] for role in graphs}
        plain = replace(package, manifest=replace(package.manifest, graphs=graphs, polyhedron=None), graphs=kept)
        return icnnrt.load(plain).argmin_polyhedron(x, **given, mu=0.0)
    T = energy.w.dtype
    if statement == "torch":
        layer = PolyhedronArgmin(energy, 100, 0.0, y_dim=N)
        numbers = {name: torch.as_tensor(np.asarray(a, np.float64)) for name, a in given.items() if name != "lower"}
        return layer.solve(torch.from_numpy(x).to(T), **numbers, lower=0.0)
    X, name = torch.from_numpy(x).to(T), str(T).removeprefix("torch.")

    def value_and_gradient(y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        point = torch.from_numpy(y).to(T).requires_grad_()
        f = energy(X, point)
        (g,) = torch.autograd.grad(f.sum(), point)
        f, g, rounded = (v.detach().double().numpy() for v in (f, g, point))
        return f + (g * (y - rounded)).sum(1), g

    B = len(x)
    P = Polyhedron(
        *(np.broadcast_to(a, (B, *a.shape)) for a in (G, H, np.zeros((0, N)), np.zeros(0))),
        *(np.zeros((B, N)), np.full((B, N), np.inf)),
    )
    return bundle_qp_argmin(value_and_gradient, P, 100, 0.0, tolerance=TOLERANCE[name], precision=np.dtype(name))


def slope_far_out(x: np.ndarray, d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """lim (f(y + td) − f(y)) / t, and the size of what it is summed from."""
    A, _, b, s = np.split(x, np.cumsum([ROWS * N, ROWS, N]), axis=1)
    v = (A.reshape(-1, ROWS, N) @ d[:, :, None])[:, :, 0]
    return s.sum(1) * v.max(1) + (b * d).sum(1), s.sum(1) * np.abs(v).max(1) + (np.abs(b) * np.abs(d)).sum(1)


@pytest.mark.parametrize("statement", ["numpy", "session", "graph", "bodies", "torch"])
def test_unbounded_is_told_by_a_ray_and_bounded_by_a_bound(made: tuple[Any, Path], statement: str) -> None:
    energy, path = made
    x, least, names = cases()
    found = answers(statement, energy, path)
    y, status, ray, lower_bound, value = (
        np.asarray(getattr(found, name)) for name in ("y", "status", "ray", "lower_bound", "energy")
    )
    falls = np.isneginf(least)
    told = {name: Status(int(code)).name for name, code in zip(names, status, strict=True)}
    assert (status[falls] == Status.UNBOUNDED).all(), {name: code for name, code in told.items() if "fall" in name}
    assert np.isnan(y[falls]).all()
    d = ray[falls]
    assert (np.abs(d).max(1) == 1).all()
    assert (d >= 0).all()
    assert (d @ G.T <= 1e-8).all()
    slope, size = slope_far_out(x[falls], d)
    assert (slope < -1e-6 * size).all()

    bounded, small = ~falls, TOLERANCE[str(energy.w.dtype).removeprefix("torch.")]
    assert np.isin(status[bounded], (Status.CONVERGED, Status.GAP, Status.PRECISION)).all(), told
    assert (ray[bounded] == 0).all()
    status, value, lower_bound, true = status[bounded], value[bounded], lower_bound[bounded], least[bounded]
    near = 2 * small * np.maximum(1.0, np.abs(true))
    assert (lower_bound <= true + near).all()
    assert (value >= true - near).all()
    assert (value <= true + near)[status == Status.CONVERGED].all()
    easy = [not name.startswith(("smooth", "escapes")) for name in np.array(names)[bounded]]
    assert (status[easy] == Status.CONVERGED).all(), told


def test_what_is_unbounded_has_no_gradient(made: tuple[Any, Path]) -> None:
    session = icnnrt.load(made[1])
    found = session.argmin_polyhedron(cases().x, G=G, h=H, lower=0.0, mu=0.0)
    unbounded = found.status == Status.UNBOUNDED
    assert unbounded.any()
    i = int(np.argmax(unbounded))
    assert found.advice(i).startswith(f"sample {i}: the energy falls along `ray`, within the constraints")
    y_bar = np.ones_like(found.y)
    bars = session.vjp_polyhedron(found, y_bar, on_unsafe="skip")
    assert bars.skipped[unbounded].all()
    assert not bars.skipped.all()
    assert np.isnan(bars.h[unbounded]).all()
    assert bars.weights is not None
    assert all(np.isfinite(a).all() for a in bars.weights.values())
    with pytest.raises(icnnrt.CertificateError, match="falls along `ray`"):
        session.vjp_polyhedron(found, y_bar)


def test_with_curvature_or_bounds_there_is_a_minimum(made: tuple[Any, Path]) -> None:
    session, (x, least, _) = icnnrt.load(made[1]), cases()
    x = x[np.isneginf(least)]
    for given in ({"mu": 1e-2}, {"mu": 0.0, "upper": 10.0}):
        found = session.argmin_polyhedron(x, G=G, h=H, lower=0.0, **given)
        assert np.isin(found.status, (Status.CONVERGED, Status.GAP, Status.PRECISION)).all()
        assert (found.ray == 0).all()
