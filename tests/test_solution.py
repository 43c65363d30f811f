"""Every answer is a Solution: y, status, ok, advice, summary, info, length, samples by index, pickles, read-only."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_session import N, build

import icnnrt
from icnnrt import InputError, Status

FIXTURES = Path(__file__).parent / "fixtures" / "version1"
X = np.linspace(-1.0, 1.0, 12).reshape(3, 2, 2)


def answers(tmp_path: Path) -> dict[str, Any]:
    """One of every kind, of three samples each."""
    energy = icnnrt.load(build(tmp_path / "tiny.icnn", "float64"))
    network = icnnrt.load(FIXTURES / "qp.icnn")
    x = np.linspace(-1.0, 1.0, 3 * network.manifest.x_shape[0]).reshape(3, *network.manifest.x_shape)
    p = np.array([[1.0, -2.0], [0.5, 3.0], [np.nan, 0.0]])
    return {
        "argmin": energy.argmin(X),
        "argmin_polyhedron": energy.argmin_polyhedron(X, lower=0.0, upper=1.0, strict=False),
        "solve_qp": network.solve_qp(x),
        "qp": icnnrt.qp(np.eye(2), p, np.eye(2), np.ones((3, 2))),
    }


@pytest.fixture(scope="module")
def every(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return answers(tmp_path_factory.mktemp("solution"))


KINDS = {
    "argmin": icnnrt.ArgminSolution,
    "argmin_polyhedron": icnnrt.PolyhedronSolution,
    "solve_qp": icnnrt.QPNetworkSolution,
    "qp": icnnrt.QPSolution,
}


@pytest.mark.parametrize("name", KINDS)
def test_every_answer_is_a_solution(every: dict[str, Any], name: str) -> None:
    solution = every[name]
    assert isinstance(solution, icnnrt.Solution)
    assert type(solution) is KINDS[name]
    assert len(solution) == 3 == len(solution.y) == len(solution.status)
    np.testing.assert_array_equal(solution.ok, solution.status == Status.CONVERGED)
    assert {"providers", "native", "seconds"} <= solution.info.keys()
    assert solution.info["providers"] == ("CPUExecutionProvider",)
    assert solution.advice(-1).startswith("sample 2: ")
    assert solution.summary().startswith(repr(solution).removesuffix(">").partition(": ")[2])
    assert repr(solution).startswith(f"<{KINDS[name].__name__} of 3 x ")
    with pytest.raises(ValueError, match="read-only"):
        solution.y[...] = 0
    with pytest.raises(icnnrt.SampleError, match="sample 3 of 3 samples"):
        solution.advice(3)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("index", [1, -1, slice(1, 3), np.array([True, False, True]), [2, 0], []], ids=str)
def test_samples_are_selected_by_their_index(every: dict[str, Any], name: str, index: Any) -> None:
    solution = every[name]
    part = solution[index]
    at = np.atleast_1d(np.arange(3)[index]) if not isinstance(index, list) else np.array(index, int)
    assert type(part) is type(solution)
    assert len(part) == len(at)
    np.testing.assert_array_equal(part.y, solution.y[at])
    np.testing.assert_array_equal(part.status, solution.status[at])
    for k, i in enumerate(at):
        assert part.advice(k).partition(": ")[2] == solution.advice(int(i)).partition(": ")[2]


@pytest.mark.parametrize("name", KINDS)
def test_solutions_pickle(every: dict[str, Any], name: str) -> None:
    solution = every[name]
    again = pickle.loads(pickle.dumps(solution))  # noqa: S301
    assert type(again) is type(solution)
    np.testing.assert_array_equal(again.y, solution.y)
    assert dict(again.info) == dict(solution.info)
    assert again.summary() == solution.summary()
    with pytest.raises(ValueError, match="read-only"):
        again.y[...] = 0


def test_some_programs_of_a_batch_have_the_gradients_of_all() -> None:
    """Each sample's own data their rows, shared data the sum over what was selected."""
    rng = np.random.default_rng(0)
    p, h = rng.standard_normal((4, 2)), rng.random((1, 3))
    given = {"Q": np.eye(2), "p": p, "G": rng.standard_normal((4, 3, 2)), "h": h}
    whole, at = icnnrt.qp(**given), [3, 1]
    bar = rng.standard_normal((4, 2))
    found, true = whole[at].vjp(bar[at]), icnnrt.qp(given["Q"], p[at], given["G"][at], h).vjp(bar[at])
    for name in ("Q", "p", "G", "h"):
        np.testing.assert_allclose(getattr(found, name), getattr(true, name), rtol=0, atol=1e-9)
    assert whole[2].vjp(bar[2:3]).G.shape == (1, 3, 2)
    alone = icnnrt.qp(np.eye(2), np.ones(2))
    assert (alone.z.shape, alone[0].z.shape, alone[0].vjp(np.ones((1, 2))).p.shape) == ((2,), (1, 2), (2,))


def test_some_samples_of_a_polyhedron_have_their_cotangents(tmp_path: Path) -> None:
    session = icnnrt.load(build(tmp_path / "tiny.icnn", "float64"))
    solution = session.argmin_polyhedron(X, lower=0.0, upper=1.0, strict=False)
    bar = np.ones((3, N))
    whole = session.vjp_polyhedron(solution, bar, adjoint="prop3", on_unsafe="skip")
    part = session.vjp_polyhedron(solution[[2, 0]], bar[:2], adjoint="prop3", on_unsafe="skip")
    np.testing.assert_array_equal(part.skipped, whole.skipped[[2, 0]])
    for name in ("lower", "upper", "mu"):
        np.testing.assert_allclose(getattr(part, name), getattr(whole, name)[[2, 0]], rtol=0, atol=1e-7)


def test_a_gradient_wants_the_solution_of_its_own_method(every: dict[str, Any], tmp_path: Path) -> None:
    session, network = icnnrt.load(build(tmp_path / "tiny.icnn", "float64")), icnnrt.load(FIXTURES / "qp.icnn")
    for vjp, own in ((session.vjp, "argmin"), (session.vjp_polyhedron, "argmin_polyhedron"), (network.vjp, "solve_qp")):
        for name in KINDS.keys() - {own}:
            with pytest.raises(InputError, match=f"solution: expected what session.{own} returned, but got "):
                vjp(every[name], every[name].y)
    with pytest.raises(InputError, match=r"warm: expected what session\.argmin returned, but got PolyhedronSolution"):
        session.argmin(X, warm=every["argmin_polyhedron"])


def test_sessions_of_both_kinds(tmp_path: Path) -> None:
    session, network = icnnrt.load(build(tmp_path / "tiny.icnn")), icnnrt.load(FIXTURES / "qp.icnn")
    for one, kind in ((session, icnnrt.EnergySession), (network, icnnrt.QPSession)):
        assert isinstance(one, icnnrt.Session)
        assert type(one) is kind
        assert type(pickle.loads(pickle.dumps(one))) is kind  # noqa: S301
    with pytest.raises(InputError, match="solve_qp: expected a package of kind 'qp', but got tiny of kind 'energy'"):
        session.solve_qp(X)
    calls = {name for name in vars(icnnrt.EnergySession) if not name.startswith("_")} - {"solve_qp", "vjp"}
    for name in calls:
        with pytest.raises(InputError, match=f"{name}: the package holds a network of quadratic programs, no energy"):
            getattr(network, name)()


def test_a_session_is_of_its_own_kind_of_package(tmp_path: Path) -> None:
    energy, network = icnnrt.Package.open(build(tmp_path / "tiny.icnn")), icnnrt.Package.open(FIXTURES / "qp.icnn")
    with pytest.raises(InputError, match="package: expected one of kind 'qp', but got one of kind 'energy'; call icnn"):
        icnnrt.QPSession(energy)
    with pytest.raises(
        InputError, match="package: expected one of kind 'energy' or 'gradient', but got one of kind 'q"
    ):
        icnnrt.EnergySession(network)
