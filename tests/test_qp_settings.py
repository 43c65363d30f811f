"""When the solver of quadratic programs ends: its tolerance, the most steps and time; and what it tells of them."""

import functools
import re

import numpy as np
import pytest
import torch
from qp_backends import BODIES, KERNELS, NATIVE, Reference, laid, node_alone, opened, torch_alone
from quadratic_programs import mixed, solvable

import icnnrt
from icnnrt.errors import CertificateError, InputError, LimitError
from icnnrt.mathematics.qp_reference import QP, STEPS, kkt_residual
from icnnrt.mathematics.qp_settings import Settings
from icnnrt.mathematics.qp_status import QPStatus
from icnnrt.mathematics.status import Status
from icnnrt.serving.qp_session import QPNetworkSolution
from icnnrt_models import QPLayer

each_native = pytest.mark.parametrize("native", [None, False], ids=["native if there", "portable"])
WAYS = {"reference": Reference(), "bodies": BODIES, **({"kernels": NATIVE} if KERNELS else {})}
each_way = pytest.mark.parametrize("way", WAYS)
BOUNDS = ("h_lower", "lower", "upper")


@functools.cache
def programs(dtype=np.float64):
    qp = solvable(3, 6, 8, 6, 2, two_sided=True, box=True).qp
    return QP(*(a.astype(dtype) for a in qp))


def solved(qp, **settings):
    return icnnrt.qp(*(getattr(qp, name) for name in "QpGhAb"), **{b: getattr(qp, b) for b in BOUNDS}, **settings)


# --- The operator, by each of its bodies ---------------------------------------------------------


@each_way
@pytest.mark.parametrize("tolerance", [1e-2, 1e-4, 1e-6])
def test_a_loose_tolerance_is_met_by_a_measure_of_its_own(way, tolerance):
    qp = programs()
    usual, loose = WAYS[way].solve(qp).handed, WAYS[way].solve(qp, tolerance=tolerance).handed
    assert (loose.status == QPStatus.SOLVED).all()
    assert (loose.steps <= usual.steps).all()
    assert (kkt_residual(qp, *loose[:4]) <= tolerance).all()
    if way != "kernels":  # which guess the active set, and then meet every tolerance
        assert (loose.steps < usual.steps).any()


@each_way
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_the_tolerance_decides_the_status_by_the_residual_that_is_told(way, dtype):
    for tolerance in (1e-15, 1e-12, 1e-9, 1e-3):
        for steps in (3, 5, 60):
            found = WAYS[way].solve(programs(dtype), dtype, steps=steps, tolerance=tolerance).handed
            is_solved = found.status == QPStatus.SOLVED
            worst = found.residual.max(1)
            assert (worst[is_solved] <= tolerance).all()
            assert (worst[found.status == QPStatus.INACCURATE] > tolerance).all()


def test_bodies_take_the_steps_of_the_statement():
    qp, _ = mixed(7)
    for settings in ({"steps": STEPS}, {"steps": STEPS, "tolerance": 1e-4}, {"steps": 4}):
        stated, found = (WAYS[way].solve(qp, **settings).handed for way in ("reference", "bodies"))
        np.testing.assert_array_equal(found.steps, stated.steps)
        np.testing.assert_array_equal(found.status, stated.status)


@each_way
def test_as_many_steps_as_were_told_are_enough_and_fewer_are_all_taken(way):
    qp = programs()
    usual = WAYS[way].solve(qp).handed
    for i, told in enumerate(usual.steps.tolist()):
        one = QP(*(a[i : i + 1] for a in qp))
        same = WAYS[way].solve(one, steps=told).handed
        assert same.steps == told
        np.testing.assert_array_equal(same.z[0], usual.z[i])
        for fewer in range(1, told):
            less = WAYS[way].solve(one, steps=fewer).handed
            assert less.steps == fewer
            assert not np.array_equal(less.z[0], usual.z[i])


@each_way
def test_what_is_not_solved_at_all_takes_no_steps(way):
    qp, wanted = mixed(7)
    found = WAYS[way].solve(qp).handed
    never = np.isin(wanted, (QPStatus.NOT_FINITE_INPUT, QPStatus.NOT_CONVEX))
    assert never.any()
    assert (found.steps[never] == 0).all()
    assert (found.steps[wanted == QPStatus.SOLVED] > 0).all()


@pytest.mark.parametrize("kernels", [False, *([True] if KERNELS else [])])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_qpsolve_is_the_same_with_its_settings_fixed(kernels, dtype):
    qp, _ = mixed(7)
    feeds = {name: a.astype(dtype) for name, a in {**qp._asdict(), "start": np.zeros((1, 0))}.items()}
    operators = NATIVE if kernels else BODIES
    for steps in (4, STEPS):
        fixed = node_alone("QPSolve", dtype, steps=steps) if kernels else operators.model("QPSolve", dtype, steps=steps)
        found = opened(fixed, kernels).run(None, feeds)
        for a, b in zip(found, operators.run(qp, dtype, steps=steps)[:-1], strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("none", [0.0, -1.0, np.nan, np.inf])
@each_way
def test_what_is_no_tolerance_is_that_of_the_type(way, none):
    if way == "reference":
        pytest.skip("it has None for it")
    usual, found = WAYS[way].run(programs()), WAYS[way].run(programs(), tolerance=none)
    for a, b in zip(found, usual, strict=True):
        np.testing.assert_array_equal(a, b)


# --- icnnrt.qp and QPSolver ----------------------------------------------------------------------


@each_native
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_settings_of_qp_and_of_a_solver_are_those_of_the_operator(native, dtype):
    qp = programs(dtype)
    for settings in ({}, {"tolerance": 1e-3}, {"steps": 3}, {"tolerance": 1e-2, "steps": 4, "seconds": 1e3}):
        solution = solved(qp, native=native, **settings)
        few = {name: a for name, a in settings.items() if name != "seconds"}
        way = "kernels" if solution.native else "bodies"
        found = WAYS[way].solve(qp, dtype, **{"steps": STEPS, **few}).handed
        np.testing.assert_array_equal(solution.z, found.z)
        np.testing.assert_array_equal(solution.steps, found.steps)
        assert solution.steps.dtype == np.int32
        assert solution.info["steps"] == settings.get("steps", STEPS)
        np.testing.assert_array_equal(solution[1:3].steps, solution.steps[1:3])
        solver = icnnrt.QPSolver(
            *(8, 6, 2), batch=6, dtype=np.dtype(dtype).name, box=True, two_sided=True, native=native, **settings
        )
        bounds = {name: getattr(qp, name) for name in BOUNDS}
        for _ in range(2):
            z = solver.solve(*(getattr(qp, name) for name in "QpGhAb"), **bounds)
            np.testing.assert_array_equal(z, solution.z)
            np.testing.assert_array_equal(solver.steps, solution.steps)
        assert [solver.advice(i) for i in range(6)] == [solution.advice(i) for i in range(6)]


def test_steps_of_one_problem_are_a_number():
    solution = icnnrt.qp(np.eye(2), np.ones(2), np.ones((1, 2)), -np.ones(1))
    assert isinstance(solution.steps, int)
    assert solution[:].steps.tolist() == [solution.steps]


@each_native
def test_a_call_that_has_time_is_not_changed_by_a_limit_of_it(native):
    usual, limited = (solved(programs(), native=native, seconds=s) for s in (None, 1e3))
    np.testing.assert_array_equal(limited.z, usual.z)


@pytest.mark.skipif(not KERNELS, reason="the native library is not built")
def test_kernels_end_each_sample_when_time_is_over():
    late = solved(programs(), seconds=1e-9)
    assert (late.status == Status.SOLVER).all()
    assert (late.steps == 0).all()
    assert "allow more time" in late.advice(0)
    solver = icnnrt.QPSolver(8, 6, seconds=1e-9)
    solver.solve(np.eye(8), np.ones(8))
    assert not solver.ok
    assert "allow more time" in solver.advice()


def test_portable_bodies_are_stopped_when_time_is_over():
    qp = solvable(4, 64, 20, 20, 2).qp  # which takes far longer than a timer to start
    with pytest.raises(LimitError, match="seconds: the portable operators were stopped after 1e-09 s"):
        solved(qp, seconds=1e-9, native=False)
    solver = icnnrt.QPSolver(20, 20, 2, batch=64, seconds=1e-9, native=False)
    with pytest.raises(LimitError, match="seconds"):
        solver.solve(*(getattr(qp, name) for name in "QpGhAb"))


NO_NUMBERS = (0, -1.0, np.nan, np.inf, "1", True)
ODD = (np.bool_(True), np.array([3]), np.array(3, object), np.array("3"), np.ma.masked, 10**400, b"3", [3], 1j)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        *(
            ({"tolerance": a}, "tolerance: expected a finite number above 0")
            for a in (0, -1.0, np.nan, np.inf, "1", True)
        ),
        ({"tolerance": 1e-16}, "tolerance: expected at least 2.2e-16, the rounding of float64, but got 1e-16"),
        *(({"steps": a}, "steps: expected an integer from 1 to 1000000") for a in (0, -1, 2.5, True, "9", 10**7)),
        *(({"seconds": a}, "seconds: expected a finite number above 0") for a in NO_NUMBERS),
        *(({name: a}, f"{name}: expected a") for name in ("tolerance", "steps", "seconds") for a in ODD),
    ],
    ids=str,
)
def test_wrong_settings_are_told(settings, sentence):
    with pytest.raises(InputError, match=sentence):
        icnnrt.qp(np.eye(2), np.ones(2), **settings)
    with pytest.raises(InputError, match=sentence):
        icnnrt.QPSolver(2, **settings)
    with pytest.raises(InputError, match=sentence):
        QPLayer(**settings)


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.array, torch.tensor])
def test_settings_may_be_scalars_of_any_library(kind):
    for seconds in (3, 1e9, 1e30):
        assert icnnrt.qp(np.eye(2), np.ones(2), tolerance=kind(1e-3), seconds=kind(seconds)).status == 0
        layer = QPLayer(tolerance=kind(1e-3), seconds=kind(seconds))
        assert isinstance(layer.tolerance, float)
        assert isinstance(layer.seconds, float)
    for steps in (np.int8(3), np.uint64(3), np.array(3), torch.tensor(3)):
        assert QPLayer(steps=steps).steps == 3
    assert QPLayer(steps=None).steps == STEPS


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("seconds", [1e9, 1e10, 1e300])
def test_a_limit_that_no_timer_counts_is_none(seconds):
    qp = programs()
    found = solved(qp, seconds=seconds, native=False)
    np.testing.assert_array_equal(found.z, solved(qp, native=False).z)


def test_a_tolerance_below_the_rounding_of_float32_is_told_where_data_are():
    sentence = r"tolerance: expected at least 1.2e-07, the rounding of float32, but got 1e-08; .* or give float64"
    Q, p = np.eye(2, dtype=np.float32), np.ones(2, np.float32)
    with pytest.raises(InputError, match=sentence):
        icnnrt.qp(Q, p, tolerance=1e-8)
    with pytest.raises(InputError, match=sentence):
        icnnrt.QPSolver(2, dtype="float32", tolerance=1e-8)
    layer = QPLayer(tolerance=1e-8)
    layer(torch.eye(2).double(), torch.ones(2).double())
    with pytest.raises(InputError, match=sentence):
        layer(torch.eye(2), torch.ones(2))


def test_advice_tells_steps_and_tolerance_and_never_what_the_user_has():
    for dtype in (np.float64, np.float32):
        few = solved(programs(dtype), native=False, steps=4, tolerance=1e-6)
        told = [few.advice(i) for i in np.flatnonzero(few.status == Status.INACCURATE)]
        assert told
        for sentence in told:
            assert "4 steps ended above the tolerance of 1e-06" in sentence
            assert "allow more steps" in sentence
    assert solved(programs(), native=False, steps=4, seconds=1e3).advice(0) == solved(
        programs(), native=False, steps=4
    ).advice(0)
    for status in (Status.INACCURATE, Status.SOLVER, Status.NOT_FINITE):
        for dtype, double in (("float64", True), ("float32", False)):
            course = Settings(tolerance=1e-5).told(dtype, 60, 0.0)
            sentence = icnnrt.mathematics.qp_status.advise(status, residual=(1.0, 0.0, 0.0), **course)
            assert ("float64" in sentence) is not double


def test_advice_says_that_float32_is_rounded_after_the_residual():
    for dtype, said in ((np.float32, True), (np.float64, False)):
        advice = solved(programs(dtype)).advice(0)
        assert advice.startswith("sample 0: converged")
        assert ("before it was rounded to float32" in advice) is said


# --- Gradients of inaccurate answers -------------------------------------------------------------


def inaccurate():
    """A solution with samples of three kinds, and the accurate one."""
    qp = programs()
    for steps in range(3, 9):
        few = solved(qp, native=False, steps=steps)
        if {Status.INACCURATE, Status.SOLVER} <= set(few.status.tolist()):
            return few, solved(qp, native=False)
    raise AssertionError


def test_inaccurate_answers_give_gradients_when_asked():
    few, whole = inaccurate()
    kept = np.isin(few.status, (Status.INACCURATE, Status.CONVERGED))
    assert (few.residual[kept] < 1e-5).all()
    bar = np.ones_like(few.z)
    used, withheld, true = few.vjp(bar, on_unsafe="use"), few.vjp(bar), whole.vjp(bar)
    assert np.isnan(withheld.p[few.status != Status.CONVERGED]).all()
    for name in QP._fields:
        np.testing.assert_allclose(getattr(used, name)[kept], getattr(true, name)[kept], rtol=1e-3, atol=1e-4)
        assert np.isnan(getattr(used, name)[~kept]).any()
    assert not used.skipped.any()
    assert (few.status == Status.INACCURATE).any()
    assert not used.reliable[few.status != Status.CONVERGED].any()
    dot = np.ones_like(few.z)
    moved, wanted = few.jvp(p_dot=dot, on_unsafe="use"), whole.jvp(p_dot=dot)
    np.testing.assert_allclose(moved.z[kept], wanted.z[kept], rtol=1e-3, atol=1e-4)
    assert np.isnan(moved.z[~kept]).all()
    with pytest.raises(CertificateError, match="'use' for inaccurate ones"):
        few.vjp(bar, on_unsafe="raise")


@pytest.mark.parametrize("tolerance", [0.11, 1.0, 1e300])
def test_a_tolerance_that_takes_anything_is_refused(tolerance):
    with pytest.raises(InputError, match=r"tolerance: expected at most 0\.1"):
        icnnrt.qp(np.eye(1), np.zeros(1), np.array([[1.0], [-1.0]]), -np.ones(2), tolerance=tolerance)
    with pytest.raises(InputError, match=r"tolerance: expected at most 0\.1"):
        QPLayer(tolerance=tolerance)


class Laid(torch.nn.Module):
    """A layer, of data in the order of `QP`."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, *data):
        return laid(self.layer, *data)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("traced", [False, True])
def test_a_layer_gives_them_too(traced):
    few, whole = inaccurate()
    kept = torch.from_numpy(np.isin(few.status, (Status.INACCURATE, Status.CONVERGED)))
    data = [torch.from_numpy(np.array(a)).requires_grad_() for a in programs()]
    steps = int(few.info["steps"])
    gradients = {}
    for on_unsafe in ("use", "nan"):
        run = Laid(QPLayer(on_unsafe=on_unsafe, steps=steps))
        with torch_alone():
            if traced:
                run = torch.jit.trace(run, tuple(data), check_trace=False)
            (gradients[on_unsafe],) = torch.autograd.grad(run(*data).nan_to_num().sum(), data[1])
    true = torch.from_numpy(np.array(whole.vjp(np.ones_like(few.z)).p))
    torch.testing.assert_close(gradients["use"][kept], true[kept], rtol=1e-3, atol=1e-4)
    assert gradients["nan"][torch.from_numpy(few.status != Status.CONVERGED)].isnan().all()


def test_advice_on_several_programs_tells_only_what_is_known():
    """A network's programs have settings of their own, and nobody counts their steps."""

    def advice(status, settings):
        none, one = np.zeros((1, 2)), np.full((1, 3), 1e-7)
        return QPNetworkSolution(none, none, np.array([status], np.int32), one, {}, "", settings).advice(0)

    for status in (Status.INACCURATE, Status.SOLVER):
        told = advice(status, Settings())
        assert not re.search(r"\d+ steps|tolerance of", told)
        assert "scale" in told
        told = advice(status, Settings(tolerance=1e-8, steps=5))
        assert "at most 5 steps" in told
        assert "allow more steps" in told
    assert "tolerance of 1e-08" in advice(Status.INACCURATE, Settings(tolerance=1e-8))


# --- QPLayer -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [True, False], ids=["kernel", "torch"])
def test_a_layer_has_settings_and_tells_its_steps(kernel):
    qp = programs()
    data = [torch.from_numpy(np.array(a)) for a in qp]
    way = "kernels" if kernel and KERNELS else "reference"
    for settings in ({}, {"tolerance": 1e-3}, {"steps": 4}, {"steps": 5, "tolerance": 1e-2}):
        layer = QPLayer(multipliers=True, **settings)
        if kernel:
            found = laid(layer, *data)
        else:
            with torch_alone():
                found = laid(layer, *data)
        wanted = WAYS[way].solve(qp, **{"steps": STEPS, **settings}).handed
        np.testing.assert_array_equal(found.steps.numpy(), wanted.steps)
        np.testing.assert_allclose(found.z.numpy(), wanted.z, rtol=1e-7, atol=1e-9)
    assert "steps=5, tolerance=0.01" in repr(layer)


def test_a_compiled_layer_keeps_its_settings():
    data = [torch.from_numpy(np.array(a)) for a in programs()]
    layer = QPLayer(multipliers=True, steps=4, tolerance=1e-2)
    compiled = torch.compile(functools.partial(laid, layer), backend="eager", fullgraph=True)
    for a, b in zip(compiled(*data), laid(layer, *data), strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.skipif(not KERNELS, reason="the native library is not built")
def test_a_layer_ends_when_time_is_over_wherever_kernels_answer():
    data = [torch.from_numpy(np.array(a)) for a in programs()]
    late, usual = (QPLayer(multipliers=True, seconds=seconds) for seconds in (1e-9, 1e3))
    ways = {
        "eager": lambda layer: functools.partial(laid, layer),
        "compiled": lambda layer: torch.compile(functools.partial(laid, layer), backend="eager", fullgraph=True),
        "exported": lambda layer: torch.export.export(Laid(layer), tuple(data)).module(),
    }
    for way in ways.values():
        found = way(late)(*data)
        assert (found.status == Status.SOLVER).all()
        assert (found.steps == 0).all()
        torch.testing.assert_close(way(usual)(*data).z, laid(QPLayer(), *data))
    found = torch.func.vmap(functools.partial(laid, late))(*(a[:, None] for a in data))
    assert found.z.isnan().all()
    with pytest.raises(InputError, match=r"ended with SOLVER: 0 steps .*allow more time"):
        laid(QPLayer(seconds=1e-9, on_unsafe="raise"), *data)
    p = data[1].requires_grad_()
    (gradient,) = torch.autograd.grad(laid(QPLayer(seconds=1e3), *data).sum(), p)
    (wanted,) = torch.autograd.grad(laid(QPLayer(), *data).sum(), p)
    torch.testing.assert_close(gradient, wanted)
    assert "seconds=1000.0" in repr(usual)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_layer_refuses_a_limit_of_time_where_nothing_looks_at_a_clock():
    data = [torch.from_numpy(np.array(a)) for a in programs()]
    layer = QPLayer(seconds=1.0)
    with torch_alone(), pytest.raises(InputError, match=r"seconds: expected native kernels, .*none on this machine"):
        laid(layer, *data)
    with pytest.raises(InputError, match=r"seconds: expected native kernels, .*but got a trace"):
        torch.jit.trace(Laid(layer), tuple(data), check_trace=False)


def test_a_layer_that_raises_tells_steps_and_tolerance():
    data = [torch.from_numpy(np.array(a)) for a in programs()]
    with torch_alone(), pytest.raises(ValueError, match=r"on_unsafe: .* steps .*allow more steps"):
        laid(QPLayer(on_unsafe="raise", steps=3), *data)
