"""`QPSolver` with a pattern beside the one without: one problem, two factorisations."""

import numpy as np
import pytest
from scipy import sparse
from sparse_programs import mpc, scattered, sizes

import icnnrt
from icnnrt.mathematics.qp_status import QPStatus
from icnnrt.serving.operators import operator_session

ANSWER = ("z", "lam", "nu", "bound_multipliers")
BOUNDS = ("lower", "upper", "h_lower")
NATIVE = operator_session("sparse_qp_solve", "float64")[1]
# Of both backends: how far answers of one problem are apart that stop at a residual of 1e-9, or 1e-6.
APART = {"float64": 1e-7, "float32": 2e-4}
BACKENDS = pytest.mark.parametrize("native", [None, False], ids=["native if there", "portable"])


def pattern_of(program):
    return icnnrt.QPPattern(program["Q"], program.get("G"), program.get("A"))


def solver_of(program, pattern, dtype="float64", batch=1, **keywords):
    box, two_sided = "lower" in program, "h_lower" in program
    return icnnrt.QPSolver(
        *sizes(program), batch=batch, dtype=dtype, box=box, two_sided=two_sided, pattern=pattern, **keywords
    )


def both(program, dtype="float64", batch=1, **keywords):
    """Solved with its pattern and without."""
    data = {name: np.asarray(a, dtype) for name, a in program.items()}
    found = []
    for pattern in (pattern_of(program), None):
        solver = solver_of(program, pattern, dtype, batch, **keywords)
        solver.solve(**data)
        found.append(solver)
    return found


def batch_of(program, B, seed=0):
    """B problems that differ in numbers, all feasible where the one is: p, and Q by a factor."""
    rng = np.random.default_rng(seed)
    scale = rng.uniform(0.5, 2.0, (B, 1, 1))
    p = program["p"] + 0.1 * rng.standard_normal((B, len(program["p"])))
    return program | {"Q": scale * program["Q"], "p": p}


PROGRAMS = {
    "mpc": mpc(12),
    "mpc with rows": mpc(8, rows=True),
    "scattered": scattered(40, 25, 8, 0.06),
    "no G": scattered(30, 0, 9, 0.08),
    "no A": scattered(30, 20, 0, 0.08),
    "neither": scattered(25, 0, 0, 0.1),
    "dense": scattered(12, 6, 3, 1.0),
    "one variable": {"Q": np.eye(1), "p": np.ones(1), "lower": np.zeros(1), "upper": np.ones(1)},
}


@BACKENDS
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_answers_certificates_and_gradients_are_those_without(name, dtype, native):
    program = PROGRAMS[name]
    sparse, dense = both(program, dtype, native=native)
    assert sparse.ok
    assert dense.ok
    assert np.nanmax(sparse.residual) <= {"float64": 1e-9, "float32": 1e-6}[dtype]
    for part in ANSWER:
        one, other = getattr(sparse, part), getattr(dense, part)
        np.testing.assert_allclose(one, other, rtol=0, atol=APART[dtype] * (1 + np.abs(other).max(initial=0)))
    rng = np.random.default_rng(1)
    bars = [rng.standard_normal(getattr(sparse, part).shape).astype(dtype) for part in ANSWER]
    for given in (bars[:1], bars):
        for one, other in zip(sparse.vjp(*given), dense.vjp(*given), strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=10 * APART[dtype] * (1 + np.abs(other).max(initial=0)))
        np.testing.assert_array_equal(sparse.reliable, dense.reliable)


def test_gradients_are_those_of_differences():
    program = mpc(5, 3, 1, start=0.5)
    pattern = pattern_of(program)
    solver = solver_of(program, pattern)
    rng = np.random.default_rng(2)
    z_bar = rng.standard_normal(len(program["p"]))
    solver.solve(**program)
    gradients = {name: np.array(a[0]) for name, a in solver.vjp(z_bar)._asdict().items() if name in program}
    for name in program:
        along = rng.standard_normal(program[name].shape)
        if name in "QA":
            along = along * (program[name] != 0)
        values = []
        for step in (1e-6, -1e-6):
            values.append(z_bar @ solver.solve(**(program | {name: program[name] + step * along}))[0])
            assert solver.ok
        difference = (values[0] - values[1]) / 2e-6
        np.testing.assert_allclose((gradients[name] * along).sum(), difference, rtol=1e-5, atol=1e-6)


@BACKENDS
def test_a_batch_has_data_of_its_own_and_shared_ones(native):
    program = mpc(6)
    data = batch_of(program, 5)
    sparse = solver_of(program, pattern_of(program), batch=5, native=native)
    sparse.solve(**data)
    assert sparse.ok
    z_bar = np.random.default_rng(0).standard_normal(sparse.z.shape)
    gradients = sparse.vjp(z_bar)
    for i in range(5):
        alone = solver_of(program, pattern_of(program), native=native)
        z = alone.solve(**(data | {"Q": data["Q"][i], "p": data["p"][i]}))
        np.testing.assert_array_equal(z[0], sparse.z[i])
        for one, many in zip(alone.vjp(z_bar[i]), gradients, strict=True):
            np.testing.assert_array_equal(one[0], many[i if len(many) > 1 else 0])


def test_a_row_for_all_rows_of_all_samples_is_taken_as_without():
    data = np.eye(6), -np.ones(6), np.ones((1, 1, 6)), np.arange(1.0, 5.0)
    z = icnnrt.QPSolver(6, 4, batch=2, pattern=icnnrt.QPPattern(np.eye(6), np.ones((4, 6)))).solve(*data)
    np.testing.assert_allclose(z, icnnrt.QPSolver(6, 4, batch=2).solve(*data), atol=1e-9)


def test_sparse_matrices_of_scipy_are_taken():
    program = mpc(5, rows=True)
    made = {name: sparse.csc_matrix(a) if name in "QGA" else a for name, a in program.items()}
    solver = solver_of(program, icnnrt.QPPattern(made["Q"], made["G"], made["A"]))
    z = solver.solve(**made).copy()
    np.testing.assert_array_equal(z, solver.solve(**program))
    assert solver.ok


def test_a_warm_start_ends_where_a_cold_one_does():
    program = mpc(10)
    warm, cold = (solver_of(program, pattern_of(program), warm=flag) for flag in (True, False))
    warm.solve(**program)
    for seed in range(3):
        p = program["p"] + 1e-3 * np.random.default_rng(seed).standard_normal(len(program["p"]))
        near = warm.solve(p=p).copy()
        assert warm.ok
        np.testing.assert_allclose(near, cold.solve(**(program | {"p": p})), rtol=0, atol=1e-7)
        assert warm.steps[0] <= cold.steps[0]


@BACKENDS
def test_what_has_no_answer_is_told_with_its_certificate(native):
    good = mpc(5)
    n, _, q = sizes(good)
    unreachable = good | {"b": 50.0 * good["b"]}
    sparse, dense = both(unreachable, native=native)
    assert sparse.status[0] == dense.status[0] == icnnrt.Status.INFEASIBLE
    nu, mu = sparse.ray[0, n : n + q], sparse.ray[0, n + q :]
    np.testing.assert_allclose(good["A"].T @ nu + mu, 0.0, rtol=0, atol=1e-7)
    worth = unreachable["b"] @ nu + good["upper"] @ np.maximum(mu, 0) + good["lower"] @ np.minimum(mu, 0)
    np.testing.assert_allclose(worth, -1.0, rtol=1e-7)

    free = {name: good[name] for name in "QpAb"} | {"Q": 0.0 * good["Q"]}
    sparse, dense = both(free, native=native)
    assert sparse.status[0] == dense.status[0] == icnnrt.Status.UNBOUNDED
    d = sparse.ray[0, :n]
    np.testing.assert_allclose(good["A"] @ d, 0.0, rtol=0, atol=1e-8 * np.abs(d).max())
    np.testing.assert_allclose(good["p"] @ d, -1.0, rtol=1e-7)

    for number, status in ((-1.0, icnnrt.Status.NOT_CONVEX), (np.nan, icnnrt.Status.NOT_FINITE_INPUT)):
        Q = good["Q"].copy()
        Q[3, 3] = number
        sparse, dense = both(good | {"Q": Q}, native=native)
        assert sparse.status[0] == dense.status[0] == status
        assert np.isnan(sparse.z).all()


def test_one_sample_without_an_answer_spoils_no_other():
    program = mpc(5)
    sparse = solver_of(program, pattern_of(program), batch=3)
    b = np.stack([program["b"], 50.0 * program["b"], program["b"]])
    p = np.stack([program["p"], program["p"], np.full_like(program["p"], np.nan)])
    sparse.solve(**(program | {"b": b, "p": p}))
    wanted = [icnnrt.Status.CONVERGED, icnnrt.Status.INFEASIBLE, icnnrt.Status.NOT_FINITE_INPUT]
    np.testing.assert_array_equal(sparse.status, wanted)
    alone = solver_of(program, pattern_of(program))
    np.testing.assert_array_equal(alone.solve(**program)[0], sparse.z[0])
    gradients = sparse.vjp(np.ones_like(sparse.z))
    assert np.isfinite(gradients.p[0]).all()
    assert np.isnan(gradients.p[1:]).all()


@pytest.mark.parametrize("name", ["degenerate", "dependent equalities", "low rank", "linear"])
def test_degenerate_programs_are_solved_as_without(name):
    program = scattered(30, 20, 8, 0.1, seed=4, rank=10 if name == "low rank" else None)
    if name == "degenerate":  # weakly active: rows that hold z have no multiplier
        z = np.linalg.solve(program["Q"], -program["p"])
        program |= {"h": program["G"] @ z, "b": program["A"] @ z}
    if name == "dependent equalities":
        program |= {"A": np.repeat(program["A"], 2, 0), "b": np.repeat(program["b"], 2)}
    if name == "linear":
        program |= {"Q": 0.0 * program["Q"], "lower": np.full(30, -3.0), "upper": np.full(30, 3.0)}
        z = np.random.default_rng(1).uniform(-1.0, 1.0, 30)
        program |= {"h": program["G"] @ z + 1.0, "b": program["A"] @ z}
    sparse, dense = both(program)
    assert sparse.ok
    assert dense.ok
    cost = [0.5 * z @ program["Q"] @ z + program["p"] @ z for z in (sparse.z[0], dense.z[0])]
    np.testing.assert_allclose(cost[0], cost[1], rtol=1e-7, atol=1e-7)
    z_bar = program["Q"] @ np.random.default_rng(3).standard_normal(30)  # which is told by the answer's unique part
    one, other = sparse.vjp(z_bar), dense.vjp(z_bar)
    np.testing.assert_array_equal(sparse.reliable, dense.reliable)
    if sparse.reliable[0]:
        np.testing.assert_allclose(one.p, other.p, rtol=0, atol=1e-6 * (1 + np.abs(other.p).max()))


def test_data_outside_the_pattern_are_refused_and_harm_nothing():
    program = mpc(4)
    solver = solver_of(program, pattern_of(program), batch=2)
    solver.solve(**program)
    Q = np.stack([program["Q"]] * 2)
    Q[1, 0, 5] = 0.25
    sentence = (
        r"Q: expected 0 outside the pattern, but got 0\.25 in row 0, column 5 of sample 1; make the pattern of all "
        r"matrices that may come\."
    )
    with pytest.raises(icnnrt.InputError, match=sentence):
        solver.solve(Q=Q, p=np.ones(24))
    with pytest.raises(icnnrt.InputError, match="A: expected 0 outside the pattern, but got 1 in row 0, column 3;"):
        solver.solve(A=np.ones(24))
    np.testing.assert_array_equal(solver.data.p[0], program["p"])
    solver.solve()
    assert solver.ok


@BACKENDS
def test_data_written_outside_the_pattern_in_place_are_solved_as_they_are(native):
    program = mpc(4, start=0.3)
    n = len(program["p"])
    solver = solver_of(program, pattern_of(program), batch=2, native=native)
    solver.solve(**program)
    solver.data.Q[1, 2, 3] = solver.data.Q[1, 3, 2] = 0.5
    z = solver.solve().copy()
    assert solver.ok
    gradients = solver.vjp(np.ones((2, n)))
    for i in range(2):
        dense = solver_of(program, None)
        dense.solve(**(program | {"Q": solver.data.Q[i]}))
        np.testing.assert_allclose(z[i], dense.z[0], rtol=0, atol=1e-7)
        wanted = dense.vjp(np.ones(n))
        np.testing.assert_allclose(gradients.p[i], wanted.p[0], rtol=0, atol=1e-6)
    assert np.abs(z[0] - z[1]).max() > 1e-4


def test_a_pattern_of_other_sizes_is_refused():
    program = mpc(4)
    with pytest.raises(icnnrt.InputError, match="pattern: expected one of n, m, q = 24, 1, 16, but got 24, 0, 16"):
        icnnrt.QPSolver(24, 1, 16, pattern=pattern_of(program))
    with pytest.raises(icnnrt.InputError, match="pattern: expected a QPPattern, but got ndarray"):
        icnnrt.QPSolver(24, 0, 16, pattern=program["Q"])


@pytest.mark.skipif(not NATIVE, reason="of the native kernels' input")
def test_hostile_plans_are_told_and_lead_nowhere():
    program = mpc(4, rows=True)
    session, _ = operator_session("sparse_qp_solve", "float64")
    n, m, q = sizes(program)
    feeds = {name: a[None] for name, a in program.items() if name not in BOUNDS}
    plan = pattern_of(program).plan

    def status(numbers):
        return session.run(["status", "z"], feeds | {"plan": np.asarray(numbers, np.int32)})

    code, z = status(plan)
    assert code[0] == QPStatus.SOLVED
    others = (pattern_of(mpc(5, rows=True)).plan, plan[:-1], np.append(plan, 0), plan[:3], plan[:0], np.zeros(50))
    for other in others:
        with pytest.raises(Exception, match=r"SparseQuadraticProgram: plan: expected .*; pass icnnrt\.QPPattern"):
            status(other)
    rng = np.random.default_rng(0)
    extremes = np.array([-1, 0, 1, n, n + m + q, 2**31 - 1, -(2**31)])
    refused = 0
    for _ in range(400):
        bad = plan.copy()
        for at in rng.integers(0, len(plan), rng.integers(1, 4)):
            bad[at] = rng.choice(extremes) if rng.random() < 0.5 else bad[at] + rng.integers(-2, 3)
        try:
            code, answer = status(bad)
        except Exception as error:
            if "SparseQuadraticProgram: plan: expected" not in str(error):
                raise
            refused += 1
        else:  # another pattern of the same sizes, which the data keep to or not
            assert code[0] == QPStatus.SOLVED
            np.testing.assert_allclose(answer, z, rtol=0, atol=1e-7)
    assert refused > 300


@pytest.mark.skipif(not NATIVE, reason="portable bodies know one way")
def test_what_ends_by_its_steps_is_not_solved_again_without_the_pattern():
    program = mpc(12)
    sparse, dense = both(program, steps=1)
    assert sparse.steps[0] == dense.steps[0] == 1
    assert dense.ok  # by an active set, which a pattern does not have
    assert not sparse.ok
    assert "allow more steps" in sparse.advice()


@pytest.mark.skipif(not NATIVE, reason="of the native kernels' clock")
def test_a_limit_of_time_is_kept():
    program = mpc(12)
    solver = solver_of(program, pattern_of(program), seconds=1e-9)
    solver.solve(**program)
    assert solver.status[0] == icnnrt.Status.SOLVER
    assert solver.steps[0] == 0
