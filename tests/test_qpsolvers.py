"""icnnrt by the name of a solver of qpsolvers."""

import numpy as np
import pytest

qpsolvers = pytest.importorskip("qpsolvers")
sparse = pytest.importorskip("scipy.sparse")

from icnnrt.integrations.qpsolvers import register  # noqa: E402


def test_registered_once() -> None:
    register()
    register()
    assert qpsolvers.available_solvers.count("icnnrt") == 1
    assert qpsolvers.dense_solvers.count("icnnrt") == 1


@pytest.mark.parametrize("made_sparse", [False, True])
@pytest.mark.parametrize("parts", ["", "G", "A", "b", "GA", "GAb"])
def test_answers_are_optimal_by_the_measure_of_qpsolvers(parts: str, made_sparse: bool) -> None:
    register()
    rng = np.random.default_rng(5)
    n, m, q = 8, 6, 2
    F = rng.normal(size=(n, n))
    inside = rng.normal(size=n)
    G, A = rng.normal(size=(m, n)), rng.normal(size=(q, n))
    given = {
        **({"G": G, "h": G @ inside + rng.random(m)} if "G" in parts else {}),
        **({"A": A, "b": A @ inside} if "A" in parts else {}),
        **({"lb": inside - rng.random(n), "ub": inside + 1.0} if "b" in parts else {}),
    }
    P = F @ F.T
    if made_sparse:
        P = sparse.csc_matrix(P)
        given |= {name: sparse.csc_matrix(given[name]) for name in "GA" if name in given}
    problem = qpsolvers.Problem(P, rng.normal(size=n), **given)
    solution = qpsolvers.solve_problem(problem, solver="icnnrt")
    assert solution.found
    assert solution.is_optimal(1e-7)
    assert solution.obj == pytest.approx(float(0.5 * solution.x @ (F @ F.T) @ solution.x + problem.q @ solution.x))
    np.testing.assert_allclose(qpsolvers.solve_qp(*problem.unpack(), solver="icnnrt"), solution.x)


def test_what_has_no_answer_is_not_found(capsys: pytest.CaptureFixture[str]) -> None:
    register()
    problem = qpsolvers.Problem(np.eye(2), np.zeros(2), np.array([[1.0, 0.0], [-1.0, 0.0]]), np.array([-1.0, -1.0]))
    solution = qpsolvers.solve_problem(problem, solver="icnnrt", verbose=True)
    assert solution.found is False
    assert solution.x is None
    assert solution.extras["status"] == "INFEASIBLE"
    assert "INFEASIBLE" in capsys.readouterr().out
    assert qpsolvers.solve_qp(*problem.unpack(), solver="icnnrt") is None


def test_settings_reach_the_solver() -> None:
    register()
    problem = qpsolvers.Problem(np.eye(2), np.ones(2), lb=np.zeros(2))
    solution = qpsolvers.solve_problem(problem, solver="icnnrt", native=False)
    np.testing.assert_allclose(solution.x, 0.0, atol=1e-9)
    few = qpsolvers.solve_problem(problem, solver="icnnrt", native=False, steps=1)
    assert not few.found
    assert few.extras["steps"] == 1
    loose = qpsolvers.solve_problem(problem, solver="icnnrt", native=False, tolerance=1e-2)
    assert loose.found
    assert loose.extras["steps"] < solution.extras["steps"]
