"""argmin over a polyhedron by a session: against epigraphs, its certificate, differences of every gradient."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from exports import export

import icnnrt
from icnnrt.epigraph import epigraph
from icnnrt.format.signatures import POLYHEDRON_ROLES
from icnnrt.mathematics.status import Status
from icnnrt.serving.polyhedron import PolyhedronSolution

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")

from icnnrt_models import FICNN, PolyhedronArgmin  # noqa: E402

MU = 0.5
B, N = 3, 4
# Central, h = 1e-5, of a y known to 1e-6 where f is smooth and to 1e-9 where it is of pieces.
DIFFERENCES = {"smooth": 2e-3, "pieces": 1e-5}


@pytest.fixture(scope="module")
def sessions(polyhedron_packages: dict[str, Path]) -> dict[str, icnnrt.Session]:
    """By kind, of the method in Python; with " graph" behind it, of the package's graphs."""
    opened = {}
    for name, path in polyhedron_packages.items():
        opened[f"{name} graph"] = icnnrt.load(path)
        opened[name] = icnnrt.load(without_graphs(icnnrt.Package.open(path)))
    return opened


def without_graphs(package: icnnrt.Package) -> icnnrt.Package:
    """The package as if it had been exported without the head polyhedron."""
    kept = {role: graph for role, graph in package.graphs.items() if role not in POLYHEDRON_ROLES}
    graphs = {role: file for role, file in package.manifest.graphs.items() if role in kept}
    return replace(package, manifest=replace(package.manifest, graphs=graphs, polyhedron=None), graphs=kept)


def contexts() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((B, 3))


def constraints() -> dict[str, np.ndarray]:
    """Rows, an equality and a box, some of each active."""
    rng = np.random.default_rng(5)
    y = 0.2 * rng.standard_normal((B, N))
    G, A = rng.standard_normal((B, 2, N)), rng.standard_normal((B, 1, N))
    return {
        "G": G,
        "h": np.einsum("bmn,bn->bm", G, y) + 0.05,
        "A": A,
        "b": np.einsum("bmn,bn->bm", A, y),
        "lower": y - 0.4,
        "upper": y + np.where(rng.random((B, N)) < 0.5, 0.2, np.inf),
    }


@pytest.mark.parametrize("name", ["smooth", "pieces", "smooth graph", "pieces graph"])
def test_the_answer_is_feasible_certified_and_optimal(sessions: dict[str, icnnrt.Session], name: str) -> None:
    session, x, given = sessions[name], contexts(), constraints()
    found = session.argmin_polyhedron(x, **given, mu=MU, strict=True)
    assert found.ok.all()
    y = found.y
    np.testing.assert_allclose(found.energy, session.value(x, y) + 0.5 * MU * (y * y).sum(1), rtol=1e-12)
    assert (found.gap <= 1e-9 * np.maximum(1, np.abs(found.lower_bound))).all()
    for excess in (
        np.einsum("bmn,bn->bm", given["G"], y) - given["h"],
        np.abs(np.einsum("bmn,bn->bm", given["A"], y) - given["b"]),
        given["lower"] - y,
        y - given["upper"],
    ):
        assert excess.max() <= 1e-8
    # KKT: ∇f + μ y + G'λ + A'ν + bounds = 0 where f is smooth, with the signs of the multipliers
    assert found.lam.min() >= 0
    if name.startswith("smooth"):
        stationarity = session.gradient(x, y) + MU * y + found.bound_multipliers
        stationarity += np.einsum("bmn,bm->bn", given["G"], found.lam) + np.einsum("bmn,bm->bn", given["A"], found.nu)
        assert np.abs(stationarity).max() <= 1e-3
    else:
        optimum = [problem.solve().value for problem in epigraph(session, x, **given, mu=MU)]
        np.testing.assert_allclose(found.energy, optimum, atol=1e-8)


@pytest.mark.parametrize("name", ["smooth", "pieces", "smooth graph", "pieces graph"])
def test_every_gradient_against_differences(sessions: dict[str, icnnrt.Session], name: str) -> None:
    session, x, given = sessions[name], contexts(), constraints()
    rng = np.random.default_rng(6)
    y_bar = rng.standard_normal((B, N))
    smooth = name.startswith("smooth")
    e, bound = (1e-3 if smooth else 1e-5), DIFFERENCES[name.split()[0]]

    def loss(session: icnnrt.Session, x: np.ndarray, given: dict[str, np.ndarray], mu: float = MU) -> np.ndarray:
        tolerance = 1e-11 if smooth else 1e-9
        found = session.argmin_polyhedron(x, **given, mu=mu, iterations=200, tolerance=tolerance)
        assert (found.gap <= 1e-9).all()
        return np.asarray((found.y * y_bar).sum(1))

    found = session.argmin_polyhedron(x, **given, mu=MU)
    bars = session.vjp_polyhedron(found, y_bar)
    for key, value in given.items():
        d = rng.standard_normal(value.shape)
        numeric = (
            loss(session, x, {**given, key: value + e * d}) - loss(session, x, {**given, key: value - e * d})
        ) / (2 * e)
        exact = (getattr(bars, key) * d).reshape(B, -1).sum(1)
        np.testing.assert_allclose(numeric, exact, rtol=bound, atol=bound, err_msg=key)
    numeric = (loss(session, x, given, MU + e) - loss(session, x, given, MU - e)) / (2 * e)
    np.testing.assert_allclose(numeric, bars.mu, rtol=bound, atol=bound)
    assert bars.x is not None
    assert bars.weights is not None
    d = rng.standard_normal(x.shape)
    numeric = (loss(session, x + e * d, given) - loss(session, x - e * d, given)) / (2 * e)
    np.testing.assert_allclose(numeric, (bars.x * d).sum(1), rtol=bound, atol=bound)
    moves = {key: 0.1 * rng.standard_normal(a.shape) for key, a in session.weights.items()}
    exact_total = sum((bars.weights[key] * moves[key]).sum() for key in bars.weights)
    totals = []
    with icnnrt.load(session.package) as other:
        before = dict(other.weights)
        for sign in (1, -1):
            other.update_weights({key: a + sign * e * moves[key] for key, a in before.items()})
            totals.append(loss(other, x, given).sum())
    assert (totals[0] - totals[1]) / (2 * e) == pytest.approx(exact_total, rel=bound, abs=bound)


def test_the_exact_adjoint_differentiates_the_iterations(sessions: dict[str, icnnrt.Session]) -> None:
    session, x, given = sessions["smooth"], contexts(), constraints()
    y_bar = np.random.default_rng(7).standard_normal((B, N))

    def run(x: np.ndarray) -> PolyhedronSolution:
        return session.argmin_polyhedron(x, **given, mu=MU, iterations=3, tolerance=0.0)

    found = run(x)
    bars = session.vjp_polyhedron(found, y_bar, adjoint="exact")
    assert bars.x is not None
    d, e = np.random.default_rng(8).standard_normal(x.shape), 1e-5
    plus, minus = run(x + e * d), run(x - e * d)
    same = (plus.trajectory.best == found.trajectory.best) & (minus.trajectory.best == found.trajectory.best)
    assert same.any()
    numeric = ((plus.y - minus.y) * y_bar).sum(1) / (2 * e)
    np.testing.assert_allclose(numeric[same], (bars.x * d).sum(1)[same], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["pieces", "pieces graph"])
def test_samples_that_fail_leave_the_others_alone(sessions: dict[str, icnnrt.Session], name: str) -> None:
    session, x, given = sessions[name], contexts(), constraints()
    alone = session.argmin_polyhedron(x, **given, mu=MU)
    x[1, 0] = np.nan
    given["lower"][2], given["upper"][2] = 2.0, 1.0
    found = session.argmin_polyhedron(x, **given, mu=MU)
    assert found.status.tolist() == [Status.CONVERGED, Status.NOT_FINITE_INPUT, Status.INFEASIBLE]
    np.testing.assert_allclose(found.y[0], alone.y[0], atol=1e-6)
    for array in (found.y, found.energy, found.gap, found.lam, found.nu, found.bound_multipliers):
        assert np.isnan(array[1:]).all()
    with pytest.raises(
        icnnrt.CertificateError, match=r"2 of 3 samples: sample 1: x or a constraint .*on_unsafe='skip'"
    ):
        session.vjp_polyhedron(found, np.ones((B, N)))
    bars = session.vjp_polyhedron(found, np.ones((B, N)), on_unsafe="skip")
    whole = session.vjp_polyhedron(alone, [[1.0] * N, [0.0] * N, [0.0] * N])
    assert bars.skipped.tolist() == [False, True, True]
    assert bars.x is not None
    assert bars.weights is not None
    assert whole.weights is not None
    assert np.isnan(bars.h[1:]).all()
    assert np.isnan(bars.x[1:]).all()
    np.testing.assert_allclose(bars.h[0], whole.h[0], atol=1e-6)
    for name, array in whole.weights.items():
        np.testing.assert_allclose(bars.weights[name], array, atol=1e-6)
    with pytest.raises(icnnrt.CertificateError, match="strict: 2 of 3"):
        session.argmin_polyhedron(x, **given, mu=MU, strict=True)


def test_what_falls_without_end_has_no_answer(sessions: dict[str, icnnrt.Session]) -> None:
    """Without μ and bounds a feasible point is there, but no lower bound: NaN, beside a sample that is bounded."""
    session, x = sessions["pieces"], contexts()
    lower, upper = np.full((B, N), -np.inf), np.full((B, N), np.inf)
    lower[1], upper[1] = -1.0, 1.0
    found = session.argmin_polyhedron(x, lower=lower, upper=upper, mu=0.0)
    assert found.status.tolist() == [Status.UNBOUNDED, Status.CONVERGED, Status.UNBOUNDED]
    far = 1e3 * found.ray[[0, 2]]
    assert (session.value(x[[0, 2]], 2 * far) < session.value(x[[0, 2]], far)).all()
    for array in (found.y, found.energy, found.lower_bound, found.gap, found.bound_multipliers):
        assert np.isnan(array[[0, 2]]).all()
        assert np.isfinite(array[1]).all()
    alone = session.argmin_polyhedron(x[1:2], lower=-1.0, upper=1.0, mu=0.0)
    np.testing.assert_allclose(found.energy[1], alone.energy[0], atol=1e-9)
    assert found.advice(-1).startswith("sample 2: the energy falls along `ray`, within the constraints,")
    assert found.summary().splitlines() == ["1 CONVERGED, 2 UNBOUNDED", found.advice(0)]
    assert repr(found) == f"<PolyhedronSolution of 3 x {N}: 1 CONVERGED, 2 UNBOUNDED>"
    with pytest.raises(IndexError, match="sample 3 of 3 samples"):
        found.advice(3)
    bars = session.vjp_polyhedron(found, np.ones((B, N)), on_unsafe="skip")
    assert bars.skipped.tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("adjoint", "native"),
    [("prop3", None), ("exact", None), ("exact", False), pytest.param("prop3", False, marks=pytest.mark.slow)],
)
def test_gradients_do_not_depend_on_the_units_of_rows(
    polyhedron_packages: dict[str, Path], adjoint: str, native: bool | None
) -> None:
    """Of pieces, whose argmin is found to the last digits in any units."""
    session = icnnrt.load(polyhedron_packages["pieces"], native=native)
    rng = np.random.default_rng(6)
    x, G, h, y_bar = (rng.standard_normal(shape) for shape in ((5, 3), (6, 4), 6, (5, 4)))
    h, A, b = abs(h), np.ones((1, 4)), np.full(1, 0.1)
    solution = session.argmin_polyhedron(x, G=G, h=h, A=A, b=b, mu=0.1)
    plain = session.vjp_polyhedron(solution, y_bar, adjoint=adjoint)
    units, unit = 10.0 ** np.array([-7.0, 4.0, 0.0, -3.0, 6.0, -10.0]), 1e-7
    other = session.argmin_polyhedron(x, G=units[:, None] * G, h=units * h, A=unit * A, b=unit * b, mu=0.1)
    np.testing.assert_allclose(other.y, solution.y, rtol=1e-8, atol=1e-10)
    scaled = session.vjp_polyhedron(other, y_bar, adjoint=adjoint)
    pairs = [(scaled.G * units[:, None], plain.G), (scaled.h * units, plain.h), (scaled.A * unit, plain.A)]
    for got, wanted in [*pairs, (scaled.b * unit, plain.b), (scaled.x, plain.x), (scaled.mu, plain.mu)]:
        np.testing.assert_allclose(got, wanted, rtol=1e-7, atol=1e-8 * (1.0 + np.abs(wanted).max()))


def test_no_samples(sessions: dict[str, icnnrt.Session]) -> None:
    session = sessions["pieces"]
    found = session.argmin_polyhedron(np.zeros((0, 3)), lower=-1.0, upper=1.0, mu=MU)
    assert (len(found), found.y.shape, found.status.shape) == (0, (0, N), (0,))
    bars = session.vjp_polyhedron(found, np.zeros((0, N)))
    assert bars.lower.shape == (0, N)
    assert bars.weights is not None
    assert all((a == 0).all() for a in bars.weights.values())


@pytest.mark.parametrize("native", [None, False])
@pytest.mark.parametrize("mu", [0.1, 1.0])
def test_every_sample_of_an_easy_batch_converges(tmp_path: Path, native: bool | None, mu: float) -> None:
    """Where a model is not solved from the answer of the one before, it is without."""
    generator = torch.Generator().manual_seed(0)
    energy = FICNN(3, N, hidden=(16, 16), activation="relu", dtype=torch.float64, generator=generator)
    x = torch.rand(4, 3, generator=generator, dtype=torch.float64)
    export(energy, None, x, torch.rand(4, N, generator=generator, dtype=torch.float64), tmp_path / "a.icnn")
    with icnnrt.load(tmp_path / "a.icnn", native=native) as session:
        found = session.argmin_polyhedron(np.random.default_rng(0).random((32, 3)), lower=-1.0, upper=1.0, mu=mu)
    assert (found.status == Status.CONVERGED).all()


def test_a_float32_package(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    energy = FICNN(3, N, hidden=(8, 8), activation="relu", generator=generator)
    x, y = torch.randn(4, 3, generator=generator), torch.rand(4, N, generator=generator)
    layer = PolyhedronArgmin(energy, iterations=60, mu=MU)
    package = export(energy, layer, x, y, tmp_path / "a.icnn")
    spec = package.manifest.polyhedron
    assert spec is not None
    assert (spec.iterations, spec.mu, spec.adjoint, package.manifest.solver) == (60, MU, "prop3", None)
    with icnnrt.load(package) as graph:
        by_graph = graph.argmin_polyhedron(contexts(), **constraints())  # μ as it was exported
        told = graph.vjp_polyhedron(by_graph, np.ones((B, N)))
    with icnnrt.load(without_graphs(icnnrt.Package.open(tmp_path / "a.icnn"))) as session:
        found = session.argmin_polyhedron(contexts(), **constraints(), mu=MU)
        assert found.ok.all()
        optimum = [problem.solve().value for problem in epigraph(session, contexts(), **constraints(), mu=MU)]
        np.testing.assert_allclose(found.energy, optimum, atol=2e-5)
        bars = session.vjp_polyhedron(found, np.ones((B, N)))
        assert bars.x is None
        assert bars.weights is None
        assert np.isfinite(bars.G).all()
        # The same cuts but for the rounding of float32.
        assert by_graph.ok.all()
        np.testing.assert_allclose(by_graph.energy, found.energy, atol=2e-5)
        np.testing.assert_allclose(told.b, bars.b, atol=1e-3)
        assert told.x is not None
        assert (told.x.dtype, told.G.dtype, by_graph.y.dtype) == (np.float32, np.float64, np.float64)
        assert by_graph.x.dtype == np.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mu": -1.0}, "mu: expected a finite number of at least 0"),
        ({"mu": np.ones(3)}, "mu: expected a finite number of at least 0"),
        ({"mu": "1"}, "mu: expected a finite number of at least 0"),
        ({"tolerance": None, "iterations": 2**70}, "iterations: expected an integer from 1 to 4096"),
        ({"iterations": 0}, "iterations: expected an integer from 1 to 4096"),
        ({"tolerance": np.nan}, "tolerance: expected a finite number"),
        ({"h": [1.0]}, "G: expected a row for each bound .*, as h was given, but got none; pass G with it"),
        (
            {"A": np.ones((2, 3)), "b": [1.0, 1.0]},
            r"A: expected shape \[q, 4\] or, for a batch, \[3, q, 4\], but got \[2, 3\]",
        ),
        (
            {"G": np.ones((2, 4)), "h": [1.0]},
            r"h: expected shape \[2\] or, for a batch, \[3, 2\], but got \[1\]; h has",
        ),
        ({"lower": np.nan}, "lower: expected finite numbers"),
        ({"y_init": np.full((B, N), np.inf)}, "y_init: expected finite numbers"),
    ],
)
def test_wrong_arguments(sessions: dict[str, icnnrt.Session], arguments: dict[str, object], message: str) -> None:
    with pytest.raises(icnnrt.InputError, match=message):
        sessions["pieces"].argmin_polyhedron(contexts(), **arguments)


def test_wrong_cotangents(sessions: dict[str, icnnrt.Session]) -> None:
    session = sessions["pieces"]
    found = session.argmin_polyhedron(contexts(), mu=MU)
    with pytest.raises(
        icnnrt.InputError, match="adjoint: expected 'auto', 'prop3', 'implicit' or 'exact', but got 'best'"
    ):
        session.vjp_polyhedron(found, np.ones((B, N)), adjoint="best")
    with pytest.raises(icnnrt.InputError, match=r"hessian: the package pieces has no hessian\.onnx"):
        session.vjp_polyhedron(found, np.ones((B, N)), adjoint="implicit")
    with pytest.raises(icnnrt.InputError, match="y_bar: expected finite numbers, but got NaN or infinity in sample 1"):
        session.vjp_polyhedron(found, [[0.0] * N, [np.nan] * N, [0.0] * N])
    with pytest.raises(icnnrt.InputError, match=r"solution: expected what session\.argmin_polyhedron"):
        session.vjp_polyhedron("y", np.ones((B, N)))  # type: ignore[arg-type]
    with icnnrt.load(session.package) as other:
        other.update_weights(dict(other.weights))
        with pytest.raises(icnnrt.InputError, match="other weights"):
            other.vjp_polyhedron(found, np.ones((B, N)))


class NotConvex(torch.nn.Module):
    """Falls to both sides of y = 0, where its cuts are flat and show nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones(3, N, dtype=torch.float64))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.relu(x @ self.w * y).sum(1) - (y**2).sum(1)


@pytest.mark.parametrize("heads", [["polyhedron"], []])
def test_an_energy_that_was_exported_as_not_convex(heads: list[str], tmp_path: Path) -> None:
    x, y = torch.rand(4, 3, dtype=torch.float64), torch.rand(4, N, dtype=torch.float64)
    with pytest.warns(UserWarning, match="not convex in y"):
        export(NotConvex(), None, x, y, tmp_path / "a.icnn", heads=heads, allow_not_convex=True)
    with icnnrt.load(tmp_path / "a.icnn") as session:
        found = session.argmin_polyhedron(x.numpy(), lower=-1.0, upper=1.0)
        assert (found.status == Status.NOT_CONVEX).all()
        with pytest.raises(icnnrt.CertificateError):
            session.argmin_polyhedron(x.numpy(), lower=-1.0, upper=1.0, strict=True)
