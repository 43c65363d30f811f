"""Inference as a linear or quadratic program: one optimum against another, files read back by HiGHS, refusals."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from exports import export

import icnnrt
from icnnrt.epigraph import EpigraphProblem, epigraph
from icnnrt.errors import InputError
from icnnrt.format.package import Package
from icnnrt.mathematics.domains import SPACE, space_coordinates
from icnnrt.mathematics.reference import bundle_entropy_argmin, in_coordinates
from icnnrt.mathematics.status import Status
from icnnrt.programs import Coo, Program, write_program

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")
from torch import Tensor, nn  # noqa: E402

from icnnrt_models import FICNN, PICNN  # noqa: E402

# Of the optimum and the energy at it, relative to max(1, |optimum|): qp_solve stops at 1e-12, and promises 1e-9.
EXACT = 1e-8
# HiGHS' own tolerances are 1e-7.
HIGHS = 1e-6
# The bundle method in K = 120 cuts.
BUNDLE = 1e-6


class Odd(nn.Module):
    """All that bends in pieces and is convex; entries of y and numbers meet in one maximum."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.a = nn.Parameter(torch.randn(6, 4, generator=generator, dtype=torch.float64))
        self.s = nn.PReLU(dtype=torch.float64)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        z = y @ self.a.T + x.sum(1, keepdim=True)
        pairs = torch.maximum(z[:, :3], z[:, 3:])
        pooled = nn.functional.max_pool1d(z[:, None], 3, stride=2, padding=1)[:, 0]
        masked = torch.where(x[:, :1] > 0, z, 2 * z).abs()
        concave = torch.minimum(z[:, 0], z[:, 1])
        return (
            pairs.sum(1)
            + pooled.mean(1)
            + torch.amax(z, 1)
            + self.s(z).sum(1)
            + torch.clamp(z, min=0.1).sum(1)
            + nn.functional.hardtanh(x).sum(1)
            + masked.sum(1)
            + nn.functional.leaky_relu(torch.relu(y).sum(1))
            - 0.5 * concave
        )


class Conv(nn.Module):
    """Convolutions over y as an image, with max pooling and a batch norm in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.c = nn.Conv2d(1, 3, 3, padding=1, dtype=torch.float64)
        self.norm = nn.BatchNorm2d(3, dtype=torch.float64)
        self.norm.running_mean.normal_()
        self.d = nn.Conv2d(3, 2, 3, dtype=torch.float64)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        z = torch.relu(self.norm(self.c(y.reshape(-1, 1, 4, 4))))
        z = nn.functional.max_pool2d(nn.functional.conv2d(z, self.d.weight.abs(), self.d.bias), 2)
        return torch.relu(z).flatten(1).sum(1) + (x * y[:, :3]).sum(1)


def energies() -> dict[str, tuple[nn.Module, int]]:
    def seeded() -> torch.Generator:
        return torch.Generator().manual_seed(0)

    T = torch.float64
    return {
        "FICNN": (FICNN(3, 4, hidden=(9, 8), activation="relu", dtype=T, generator=seeded()), 4),
        "PICNN": (PICNN(3, 4, hidden=(9, 8), activation="relu", dtype=T, generator=seeded()), 4),
        "leaky": (FICNN(3, 4, hidden=(6,), activation="leaky_relu", dtype=T, generator=seeded()), 4),
        "odd": (Odd(), 4),
        "conv": (Conv(), 16),
    }


@pytest.fixture(scope="module")
def sessions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, icnnrt.Session]:
    folder, opened = tmp_path_factory.mktemp("epigraph"), {}
    generator = torch.Generator().manual_seed(1)
    for name, (energy, n) in energies().items():
        x = torch.randn(4, 3, generator=generator, dtype=torch.float64)
        y = torch.randn(4, n, generator=generator, dtype=torch.float64)
        export(energy, None, x, y, folder / f"{name}.icnn")
        opened[name] = icnnrt.load(folder / f"{name}.icnn")
    return opened


NAMES = ("FICNN", "PICNN", "leaky", "odd", "conv")
CASES = ("quadratic", "box", "rows")


def constraints(case: str, n: int) -> dict[str, object]:
    rng = np.random.default_rng(7)
    if case == "quadratic":
        return {"mu": 0.5}
    if case == "box":
        return {"lower": -1.0, "upper": rng.uniform(0.5, 2.0, n)}
    G = rng.standard_normal((2, n))
    return {
        "mu": 0.1,
        "lower": -2.0,
        "G": G,
        "h": G @ np.full(n, 0.3),
        "A": np.ones((1, n)),
        "b": [0.3 * n],
    }


def contexts() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((3, 3))


def energy_at(session: icnnrt.Session, x: np.ndarray, y: np.ndarray, mu: float) -> np.ndarray:
    return np.asarray(session.value(x, y) + 0.5 * mu * (y * y).sum(1))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", NAMES)
def test_the_optimum_is_the_energy_there(sessions: dict[str, icnnrt.Session], name: str, case: str) -> None:
    session, x = sessions[name], contexts()
    n = session.manifest.y_shape[0]
    given = constraints(case, n)
    problems = epigraph(session, x, **given)
    found = [problem.solve() for problem in problems]
    assert [one.status for one in found] == [Status.CONVERGED] * 3
    y, optimum = np.stack([one.y for one in found]), np.array([one.value for one in found])
    mu = float(given.get("mu", 0.0))  # type: ignore[arg-type]
    np.testing.assert_allclose(energy_at(session, x, y, mu), optimum, rtol=EXACT, atol=EXACT)
    # No feasible y nearby or far is better.
    rng = np.random.default_rng(1)
    for scale in (1e-3, 1e-1, 1.0):
        other = y + scale * rng.standard_normal(y.shape)
        if case == "box":
            other = np.clip(other, given["lower"], given["upper"])
        if case != "rows":
            assert (energy_at(session, x, other, mu) >= optimum - EXACT).all()


@pytest.mark.parametrize("name", ["FICNN", "PICNN", "leaky"])
def test_the_bundle_method_finds_the_same_optimum(sessions: dict[str, icnnrt.Session], name: str) -> None:
    session, x, mu = sessions[name], contexts(), 0.5

    def value_and_gradient(y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return session.value_and_gradient(x, y)

    at = space_coordinates(mu)
    trajectory = bundle_entropy_argmin(in_coordinates(value_and_gradient, at), np.zeros((3, 4)), 120, domain=SPACE)
    assert trajectory.gap.max() <= BUNDLE
    found = [problem.solve() for problem in epigraph(session, x, mu=mu)]
    optimum = np.array([one.value for one in found])
    np.testing.assert_allclose(trajectory.energy, optimum, atol=BUNDLE)
    assert (trajectory.lower_bound <= optimum + EXACT).all()
    # ‖y − y*‖² <= 2 (energy − optimum) / μ
    apart = np.abs(at.y(trajectory.y) - [one.y for one in found]).max()
    assert apart <= np.sqrt(2 * BUNDLE / mu)


@pytest.mark.parametrize("suffix", [".lp", ".mps"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", NAMES)
def test_highs_reads_the_file_and_finds_the_same_optimum(
    sessions: dict[str, icnnrt.Session], name: str, case: str, suffix: str, tmp_path: Path
) -> None:
    session = sessions[name]
    n = session.manifest.y_shape[0]
    for i, problem in enumerate(epigraph(session, contexts()[:2], **constraints(case, n))):
        file = tmp_path / f"{i}{suffix}"
        problem.write(file, session.manifest.name)
        optimum, z = highs(file)
        mine = problem.solve()
        assert optimum == pytest.approx(mine.value, rel=HIGHS, abs=HIGHS)
        y = np.array([[z[f"y{j}"] for j in range(n)]])
        mu = float(constraints(case, n).get("mu", 0.0))  # type: ignore[arg-type]
        assert energy_at(session, contexts()[i : i + 1], y, mu)[0] == pytest.approx(optimum, rel=HIGHS, abs=HIGHS)


def highs(file: Path) -> tuple[float, dict[str, float]]:
    highspy = pytest.importorskip("highspy")
    solver = highspy.Highs()
    solver.setOptionValue("output_flag", False)
    assert solver.readModel(str(file)) == highspy.HighsStatus.kOk
    solver.run()
    assert solver.getModelStatus() == highspy.HighsModelStatus.kOptimal
    names = solver.getLp().col_names_
    return solver.getInfo().objective_function_value, dict(zip(names, solver.getSolution().col_value, strict=True))


@pytest.mark.parametrize("suffix", [".lp", ".mps"])
def test_every_part_of_a_file_arrives(suffix: str, tmp_path: Path) -> None:
    """Off-diagonal curvature, every kind of bound, empty rows and columns, a constant, numbers of all sizes."""
    Q = np.array([[2.0, 1 / 3, 0, 0, 0], [1 / 3, 4.0, 0, 0, 0], *np.zeros((2, 5)), [0, 0, 0, 0, 1e-7]])
    G = np.array([[1.0, -1e-6 / 3, 3.0, 0, 1.0], np.zeros(5)])
    A = np.array([[0, 1.0, 1.0, 1.0, 0]])

    def coo(matrix: np.ndarray) -> Coo:
        i, j = np.nonzero(matrix)
        return Coo(i, j, matrix[i, j], matrix.shape)

    inf = np.inf
    lower, upper = np.array([-inf, -inf, -2.5, 1.25, 0.1]), np.array([inf, -0.5, inf, 1.25, 7e5])
    p = np.array([-1.0, 0.1, 0.7, 0.0, 1e-9])
    program = Program(
        coo(Q), p, coo(G), np.array([1e3 / 3, 5.0]), coo(A), np.array([-2.0]), lower, upper, -12.5, list("abcdf")
    )
    file = tmp_path / f"all{suffix}"
    write_program(file, program)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    highspy = pytest.importorskip("highspy")
    solver = highspy.Highs()
    solver.setOptionValue("output_flag", False)
    assert solver.readModel(str(file)) == highspy.HighsStatus.kOk
    lp, hessian = solver.getLp(), solver.getModel().hessian_
    order = [list(lp.col_names_).index(name) for name in program.variables]
    np.testing.assert_array_equal(np.array(lp.col_cost_)[order], p)
    np.testing.assert_array_equal(np.array(lp.col_lower_)[order], lower)
    np.testing.assert_array_equal(np.array(lp.col_upper_)[order], upper)
    assert lp.offset_ == -12.5
    rows = list(lp.row_names_)
    np.testing.assert_array_equal(
        np.array(lp.row_upper_)[[rows.index(r) for r in ("g0", "g1", "a0")]], [1e3 / 3, 5, -2]
    )
    assert lp.row_lower_[rows.index("a0")] == -2.0
    dense = np.zeros((5, 5))
    for j in range(5):
        for k in range(hessian.start_[j], hessian.start_[j + 1]):
            dense[hessian.index_[k], j] = hessian.value_[k]
    dense = dense + np.tril(dense, -1).T
    np.testing.assert_allclose(dense[np.ix_(order, order)], Q, rtol=1e-15)


def test_a_float32_package_is_followed_in_float64(tmp_path: Path) -> None:
    energy = FICNN(3, 4, hidden=(8, 8), activation="relu", generator=torch.Generator().manual_seed(0))
    export(energy, None, torch.randn(4, 3), torch.rand(4, 4), tmp_path / "a.icnn")
    with icnnrt.load(tmp_path / "a.icnn") as session:
        found = [problem.solve() for problem in epigraph(session, contexts(), mu=1.0)]
        y = np.stack([one.y for one in found])
        np.testing.assert_allclose(energy_at(session, contexts(), y, 1.0), [one.value for one in found], atol=1e-5)


def test_new_weights_of_a_session_count(sessions: dict[str, icnnrt.Session]) -> None:
    package = sessions["FICNN"].package
    with icnnrt.load(package) as session:
        before = epigraph(session, contexts(), mu=1.0)[0]
        session.update_weights({name: 2 * array for name, array in session.weights.items() if name.endswith("b")})
        after = epigraph(session, contexts(), mu=1.0)[0].solve()
        assert after.value != before.solve().value
        assert epigraph(package, contexts(), mu=1.0)[0].solve().value == before.solve().value
        assert session.value(contexts()[:1], after.y[None])[0] + 0.5 * (after.y**2).sum() == pytest.approx(after.value)


def test_what_presses_on_nothing_is_left_out(tmp_path: Path) -> None:
    energy = FICNN(3, 4, hidden=(6, 5), activation="relu", dtype=torch.float64)
    with torch.no_grad():
        energy.get_parameter("layers.1.W_z.weight")[:, 2] = 0.0
        energy.get_parameter("layers.2.W_z.weight")[:, 1] = 0.0
    export(energy, None, torch.randn(4, 3).double(), torch.rand(4, 4).double(), tmp_path / "a.icnn")
    problem = epigraph(Package.open(tmp_path / "a.icnn"), contexts()[:1], mu=1.0)[0]
    assert {"t1_2", "t2_1"}.isdisjoint(problem.variables)
    assert {"t1_1", "t2_2"} <= set(problem.variables)
    assert len(problem.variables) == 4 + 5 + 4
    assert len(problem.units) == 2
    assert problem.solve().status == Status.CONVERGED


def test_bad_problems_get_a_status(sessions: dict[str, icnnrt.Session]) -> None:
    session, x = sessions["FICNN"], contexts()[:1]
    none = epigraph(session, x, lower=1.0, upper=0.0)[0].solve()
    assert none.status == Status.INFEASIBLE
    assert not none.ok
    assert none.advice() == "no z meets the constraints: loosen them"  # without a word of a ray, which is not there
    assert none.summary() == f"INFEASIBLE\n{none.advice()}"
    rows = {"G": [[1.0, 0, 0, 0], [-1.0, 0, 0, 0]], "h": [-1.0, -1.0]}
    assert epigraph(session, x, mu=1.0, **rows)[0].solve().status == Status.INFEASIBLE
    # The last layer is affine in y besides, so that it falls without end somewhere or has a minimum; told either way.
    assert epigraph(session, x)[0].solve().status in (Status.CONVERGED, Status.UNBOUNDED)


class Smooth(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.softplus(y + x).sum(1)


class Square(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (y * y).sum(1) + torch.relu(x).sum(1)


class Negative(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y.sum(1) - torch.relu(y + x).sum(1)


class Jump(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.where(y > x, 2 * y, y).sum(1)


@pytest.mark.parametrize(
    ("energy", "message"),
    [
        (Smooth(), r"piecewise linear in y, but its Exp .*; keep to affine maps.*session.argmin"),
        (Square(), r"its Mul .* multiplies two values that both depend on y"),
        (Negative(), r"the factor -1, so f is not proven convex; make the weights"),
        (Jump(), r"its Where .* chooses by a condition on y, and the pieces are not known to join"),
    ],
)
def test_what_is_not_piecewise_linear_and_convex_is_refused(energy: nn.Module, message: str, tmp_path: Path) -> None:
    x, y = torch.randn(4, 3).double(), torch.rand(4, 3).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of those that are not convex
        export(energy, None, x, y, tmp_path / "a.icnn", allow_not_convex=True)
    with pytest.raises(InputError, match=message):
        epigraph(Package.open(tmp_path / "a.icnn"), np.ones((1, 3)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mu": -1.0}, "mu: expected a finite number of at least 0"),
        ({"mu": np.nan}, "mu: expected a finite number"),
        ({"G": np.ones((1, 4))}, "h: expected an entry for each row of G, as G was given, but got none"),
        ({"G": np.ones((1, 3)), "h": [1.0]}, r"G: expected shape \[m, 4\]"),
        ({"A": np.ones((1, 4)), "b": [1.0, 2.0]}, r"b: expected shape \[1\]"),
        ({"A": np.full((1, 4), np.nan), "b": [1.0]}, "A: expected finite numbers"),
        ({"lower": "low"}, "lower: expected numbers"),
        ({"lower": np.nan}, "lower: expected finite numbers"),
        ({"upper": np.ones(3)}, r"upper: expected shape \[4\]"),
        ({"lower": np.inf}, "lower: expected numbers, or -inf for none, but got inf"),
        ({"upper": [1.0, -np.inf, 1.0, 1.0]}, "upper: expected numbers, or inf for none, but got -inf"),
    ],
)
def test_wrong_arguments(sessions: dict[str, icnnrt.Session], arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        epigraph(sessions["FICNN"], contexts(), **arguments)


def test_wrong_contexts_and_sources(sessions: dict[str, icnnrt.Session]) -> None:
    with pytest.raises(InputError, match="x: expected finite numbers, but got others in sample 1"):
        epigraph(sessions["FICNN"], [[0.0] * 3, [np.nan] * 3])
    with pytest.raises(InputError, match="x: expected"):
        epigraph(sessions["FICNN"], None)
    with pytest.raises(InputError, match="source: expected a session or a package, but got str"):
        epigraph("a.icnn", contexts())  # type: ignore[arg-type]


def test_a_file_that_cannot_be_written_leaves_nothing(sessions: dict[str, icnnrt.Session], tmp_path: Path) -> None:
    problem = epigraph(sessions["FICNN"], contexts()[:1])[0]
    with pytest.raises(InputError, match=r"ending in \.lp or \.mps"):
        problem.write(tmp_path / "a.txt")
    broken: EpigraphProblem = problem._replace(constant=np.nan)
    with pytest.raises(InputError, match="finite numbers"):
        broken.write(tmp_path / "a.lp")
    for bad in (problem._replace(lower=-problem.lower), problem._replace(upper=-problem.upper)):
        with pytest.raises(InputError, match="expected bounds that leave something"):
            bad.write(tmp_path / "a.lp")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [".lp", ".mps"])
def test_a_name_adds_no_lines(sessions: dict[str, icnnrt.Session], tmp_path: Path, suffix: str) -> None:
    problem = epigraph(sessions["FICNN"], contexts()[:1])[0]
    plain, odd = tmp_path / f"plain{suffix}", tmp_path / f"odd{suffix}"
    problem.write(plain, "a.b-c_d")
    problem.write(odd, "a\nb\rc\vd é\u2028")
    first, *rest = plain.read_text().splitlines()
    assert first.endswith(" a.b-c_d")
    odd_first, *odd_rest = odd.read_text().splitlines()
    assert odd_first.endswith(" a_b_c_d___")
    assert odd_rest == rest


def test_the_command(sessions: dict[str, icnnrt.Session], tmp_path: Path) -> None:
    session = sessions["PICNN"]
    np.savetxt(tmp_path / "x.csv", contexts(), delimiter=",")
    command = [sys.executable, "-m", "icnnrt", "epigraph", str(session.path), str(tmp_path / "x.csv")]
    for suffix in (".lp", ".mps"):
        out = tmp_path / f"out{suffix}"
        options = ["--sample", "1", "--mu", "0.5", "--lower", "-1", "--solve", "--json"]
        done = subprocess.run([*command, str(out), *options], capture_output=True, text=True, check=True)
        summary = json.loads(done.stdout)
        (problem,) = epigraph(session, contexts()[1:2], mu=0.5, lower=-1.0)
        assert summary["optimum"] == pytest.approx(problem.solve().value, rel=EXACT)
        assert (summary["variables"], summary["rows"], summary["status"]) == (
            len(problem.variables),
            len(problem.h),
            "CONVERGED",
        )
        assert out.stat().st_size > 0
    plain = subprocess.run([*command, str(tmp_path / "b.lp")], capture_output=True, text=True, check=True)
    assert "4 variables y" in plain.stdout
    for arguments, message in (
        (["a.txt"], "ending in .lp or .mps"),
        ([str(tmp_path / "c.lp"), "--sample", "9"], "expected one of the 3 samples"),
    ):
        failed = subprocess.run([*command, *arguments], capture_output=True, text=True)
        assert failed.returncode == 1
        assert message in failed.stderr
        assert failed.stderr.count("\n") == 1
