"""`QPSolver`, which keeps its memory, beside `icnnrt.qp`, which does not."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from quadratic_programs import ANSWER, mixed, solvable

import icnnrt
from icnnrt.errors import InputError
from icnnrt.mathematics.qp_reference import QP
from icnnrt.mathematics.qp_status import QPStatus, statuses


def both(qp, dtype="float64", **keywords):
    B, n = qp.p.shape
    qp = QP(*(a.astype(dtype) for a in qp))
    solver = icnnrt.QPSolver(
        n, qp.h.shape[1], qp.b.shape[1], batch=B, dtype=dtype, box=True, two_sided=True, **keywords
    )
    return solver, qp


@pytest.mark.parametrize("native", [None, False], ids=["native if there", "portable"])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_answers_and_gradients_are_those_of_qp(native, dtype):
    known = solvable(3, 5, 7, 4, 2, two_sided=True, box=True)
    solver, qp = both(known.qp, dtype, native=native)
    z = solver.solve(*(getattr(qp, name) for name in "QpGhAb"), lower=qp.lower, upper=qp.upper, h_lower=qp.h_lower)
    solution = icnnrt.qp(
        *(getattr(qp, name) for name in "QpGhAb"), lower=qp.lower, upper=qp.upper, h_lower=qp.h_lower, native=native
    )
    assert z is solver.z
    assert solver.ok
    for name in (*ANSWER.values(), "slack", "box_slack", "residual", "status", "ray"):
        np.testing.assert_array_equal(getattr(solver, name), getattr(solution, name))
    rng = np.random.default_rng(0)
    bars = [rng.standard_normal(getattr(solver, name).shape).astype(dtype) for name in ANSWER.values()]
    gradients, wanted = solver.vjp(*bars), solution.vjp(*bars)
    for name in gradients._fields:
        np.testing.assert_allclose(getattr(gradients, name), getattr(wanted, name), rtol=1e-6, atol=1e-12)
    assert solver.vjp(bars[0]) is gradients
    for name in gradients._fields:
        np.testing.assert_allclose(
            getattr(gradients, name), getattr(solution.vjp(bars[0]), name), rtol=1e-6, atol=1e-12
        )


def test_data_stay_until_they_are_given_anew():
    qp = solvable(4, 1, 6, 3, 1).qp
    solver = icnnrt.QPSolver(6, 3, 1)
    solver.solve(qp.Q[0], qp.p[0], qp.G[0], qp.h[0], qp.A[0], qp.b[0])
    p = qp.p + 0.1
    z = solver.solve(p=p).copy()
    np.testing.assert_array_equal(z, icnnrt.qp(qp.Q, p, qp.G, qp.h, qp.A, qp.b).z)
    solver.data.p[...] = qp.p
    np.testing.assert_array_equal(solver.solve(), icnnrt.qp(qp.Q, qp.p, qp.G, qp.h, qp.A, qp.b).z)


def test_unsolved_samples_are_nan_alone_and_a_warm_start_forgets_them():
    qp, wanted = mixed(11)
    solver, qp = both(qp, warm=True)
    bounds = {name: getattr(qp, name) for name in ("lower", "upper", "h_lower")}
    for _ in range(2):
        z = solver.solve(*(getattr(qp, name) for name in "QpGhAb"), **bounds)
        np.testing.assert_array_equal(solver.status, statuses(wanted))
        assert not solver.ok
        unsolved = wanted != QPStatus.SOLVED
        assert np.isnan(z[unsolved]).all()
        assert np.isfinite(z[~unsolved]).all()
        gradients = solver.vjp(np.ones_like(z))
        assert np.isnan(gradients.p[unsolved]).all()
        assert np.isfinite(gradients.p[~unsolved]).all()
    assert "INFEASIBLE" in repr(solver)


def test_a_warm_start_solves_the_problem_that_is_given():
    qp = solvable(5, 4, 10, 8, 2).qp
    solver = icnnrt.QPSolver(10, 8, 2, batch=4, warm=True)
    solver.solve(*(getattr(qp, name) for name in "QpGhAb"))
    near = qp.p + 1e-2
    np.testing.assert_allclose(solver.solve(p=near), icnnrt.qp(qp.Q, near, qp.G, qp.h, qp.A, qp.b).z, rtol=0, atol=1e-7)
    assert solver.ok


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_warm_start_of_one_problem_is_that_of_several(dtype: str):
    """One is solved without onnxruntime, and several by it: to the bit alike, from the first call on."""
    n, m, q = 9, 6, 2
    alone = icnnrt.QPSolver(n, m, q, dtype=dtype, warm=True)
    several = icnnrt.QPSolver(n, m, q, batch=2, dtype=dtype, warm=True)
    assert np.isnan(alone.z).all()  # nothing is solved yet
    qp, rng = solvable(7, 1, n, m, q).qp, np.random.default_rng(8)
    far = {name: getattr(qp, name)[0].astype(dtype) for name in "QpGhAb"}
    for moved in (0.0, 1e-3, 1e-3, 3.0, 0.0):
        far["p"] = (far["p"] + moved * rng.standard_normal(n)).astype(dtype)
        alone.solve(**far)
        several.solve(**far)
        for name in ("z", "lam", "nu", "bound_multipliers", "residual", "steps"):
            np.testing.assert_array_equal(getattr(alone, name)[0], getattr(several, name)[1], err_msg=name)
        assert alone.ok


def test_bad_input_is_told_in_a_sentence_and_harms_nothing():
    solver = icnnrt.QPSolver(3, 2)
    with pytest.raises(icnnrt.InputError, match="z_bar: expected a solved problem"):
        solver.vjp(np.ones(3))
    with pytest.raises(icnnrt.InputError, match=r"G: expected shape \[1, 2, 3\] or \[2, 3\], but got \[2, 4\]"):
        solver.solve(np.eye(3), np.ones(3), np.ones((2, 4)), np.ones(2))
    with pytest.raises(icnnrt.InputError, match=r"lower: expected none.*box=True"):
        solver.solve(np.eye(3), np.ones(3), np.ones((2, 3)), np.ones(2), lower=0.0)
    np.testing.assert_allclose(solver.solve(np.eye(3), np.ones(3), np.ones((2, 3)), np.ones(2)), -np.ones((1, 3)))
    with pytest.raises(icnnrt.InputError, match=r"z_bar: expected shape \[1, 3\] or \[3\], but got \[4\]"):
        solver.vjp(np.ones(4))
    for bad, came in ((1j * np.ones(3), "complex128"), (["1", "2", "3"], "<U1"), ([None] * 3, "object")):
        with pytest.raises(icnnrt.InputError, match=f"p: expected real numbers, but got {came}"):
            solver.solve(2 * np.eye(3), bad)
        with pytest.raises(icnnrt.InputError, match="z_bar: expected real numbers"):
            solver.vjp(bad)
    with pytest.raises(icnnrt.InputError, match="z_bar: expected real numbers"):
        solver.vjp(None)
    with pytest.raises(icnnrt.InputError, match="p: expected an array, but got list, which does not convert"):
        solver.solve(2 * np.eye(3), [[1.0], [1.0, 2.0]])
    with pytest.raises(icnnrt.InputError, match="h: expected shape"):
        solver.solve(2 * np.eye(3), np.zeros(3), h=np.ones(3))
    # Nothing of a refused call was taken over, and whole numbers are real.
    np.testing.assert_array_equal(solver.data.Q[0], np.eye(3))
    np.testing.assert_allclose(solver.solve(p=[2, 2, 2]), -2 * np.ones((1, 3)))
    for keywords, name in (
        ({"n": 0}, "n"),
        ({"n": 2, "m": -1}, "m"),
        ({"n": 2.5}, "n"),
        ({"n": 2, "batch": 0}, "batch"),
    ):
        with pytest.raises(icnnrt.InputError, match=f"^{name}: expected an integer"):
            icnnrt.QPSolver(**keywords)
    with pytest.raises(icnnrt.InputError, match="dtype"):
        icnnrt.QPSolver(2, dtype="float16")


def test_a_call_that_raises_leaves_no_answer_of_another_problem(monkeypatch):
    solver = icnnrt.QPSolver(2, warm=True, native=False)
    first = solver.solve(np.eye(2), np.ones(2)).copy()
    assert solver.ok

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(solver._solve), "__call__", stop)
        with pytest.raises(KeyboardInterrupt):
            solver.solve(p=np.zeros(2))
    assert not solver.ok
    assert np.isnan(solver.z).all()
    np.testing.assert_array_equal(solver.solve(p=np.ones(2)), first)  # from a cold start


def test_an_interrupt_between_data_leaves_no_answer_of_the_old_ones():
    """The signal comes when Q is new and p is not."""
    solver = icnnrt.QPSolver(2, 1)
    solver.solve(np.eye(2), np.ones(2), np.ones((1, 2)), np.zeros(1))
    assert solver.vjp(np.ones((1, 2))).p.any()
    assert solver.reliable.all()

    def copied(into):
        class Half:
            def __setitem__(self, at, value):
                into[at] = value
                raise KeyboardInterrupt

        return Half()

    name, into, *rest = solver._inputs[0]
    solver._inputs[0] = (name, copied(into), *rest)
    with pytest.raises(KeyboardInterrupt):
        solver.solve(3 * np.eye(2), -np.ones(2))
    assert not solver.ok
    assert np.isnan(solver.z).all()
    assert not solver.reliable.any()


def test_a_gradient_is_reliable_until_the_next_solve():
    """The rows of the first program depend on each other, those of the second do not."""
    solver, two = icnnrt.QPSolver(2, 2), np.ones((2, 2))
    solver.solve(np.eye(2), -np.ones(2), two, np.ones(2))
    before = solver.vjp(np.array([[1.0, 2.0]])).h.copy()
    assert not solver.reliable.any()
    solver.solve(G=np.array([[1.0, 1.0], [1.0, -1.0]]), h=np.array([1.0, 5.0]))
    np.testing.assert_array_equal(solver.gradients.h, before)  # still of the first
    assert not solver.reliable.any()
    solver.vjp(np.array([[1.0, 2.0]]))
    assert solver.reliable.all()
    solver.solve(p=np.full(2, np.nan))
    assert not solver.reliable.any()


def test_what_became_of_the_samples_is_told_as_qp_tells_it():
    qp, _ = mixed(11)
    solver, qp = both(qp)
    with pytest.raises(InputError, match="advice: expected a solved problem"):
        solver.advice(0)
    assert solver.summary() == "not run"
    assert not solver.ok
    assert (solver.status == icnnrt.Status.SOLVER).all()
    assert np.isnan(solver.z).all()
    assert np.isnan(solver.residual).all()
    bounds = {name: getattr(qp, name) for name in ("lower", "upper", "h_lower")}
    solver.solve(*(getattr(qp, name) for name in "QpGhAb"), **bounds)
    solution = icnnrt.qp(*(getattr(qp, name) for name in "QpGhAb"), **bounds)
    assert [solver.advice(i) for i in range(len(solution))] == [solution.advice(i) for i in range(len(solution))]
    assert solver.summary() == solution.summary()
    assert solver.summary().partition("\n")[0] in repr(solver)
    with pytest.raises(IndexError, match="samples"):
        solver.advice(len(solution))


def test_a_second_thread_is_refused():
    solver = icnnrt.QPSolver(2)
    z = solver.solve(np.eye(2), np.ones(2)).copy()
    with ThreadPoolExecutor(1) as pool:
        for call in (lambda: solver.solve(p=np.zeros(2)), lambda: solver.vjp(np.ones(2))):
            with pytest.raises(icnnrt.InputError, match="solver: expected calls from one thread, but got another"):
                pool.submit(call).result()
        made_here = icnnrt.QPSolver(2)  # it is the first call that counts
        pool.submit(made_here.solve, np.eye(2), np.ones(2)).result()
    np.testing.assert_array_equal(solver.z, z)
    np.testing.assert_array_equal(solver.solve(p=np.zeros(2)), 0.0)
