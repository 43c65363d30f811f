"""Whatever interrupts a call, at whatever place, leaves a session and a tuner that work: Ctrl-C, an alarm, anything.

Two witnesses: an exception is injected at every instruction of Python's of the runner, the weights and the tuner, and
real timers go off at random instants. After each, another thread has to get its answer.
"""

import gc
import inspect
import pickle
import shutil
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from amounts import ALL, amount

import icnnrt
from icnnrt import federated, limits
from icnnrt.serving import operators, qp_solver, quadratic_program
from icnnrt.serving.once import Once
from icnnrt.serving.runner import Runner
from icnnrt.serving.served import Served
from icnnrt.serving.turns import Link, Turns
from icnnrt.serving.weight_sets import WeightSet
from icnnrt.tuning.finetune import FineTuner

PATIENCE = 60  # seconds that another thread is waited for, which only a deadlock takes
# What a run, an update of weights and a commit of the tuner go through; other functions hold nothing that is shared.
WAY = frozenset(
    function.__code__
    for function in (
        *(Runner.run, inspect.unwrap(Runner.run), Runner._run, Runner._computed, Runner._opened, Runner._graph),
        *(Runner.update_weights, Runner.weights.fget, Runner.check_weights),  # type: ignore[attr-defined]
        *(limits.call, limits._end_of, Served.run, Served._asked, Served._idle_one, Served._started),
        *(Once.get, Once.find, Turns.take, Link.follow, Link.last, WeightSet.__init__, WeightSet.values),
        *map(inspect.unwrap, (FineTuner._step, FineTuner._check, FineTuner.settle, FineTuner.rollback)),
        *(FineTuner._step, FineTuner._undo_if_guilty, FineTuner._commit, FineTuner._now, FineTuner._run),
        *(FineTuner._moved, FineTuner.keep, inspect.unwrap(FineTuner.set_weights)),
        *(operators.operator_session, quadratic_program._run, qp_solver.QPSolver.solve, qp_solver._Bound.__call__),
    )
)


class Injected(BaseException):
    """As KeyboardInterrupt, no Exception."""


def interrupted(call: Callable[[], object], at: int | None) -> bool:
    """Run `call`, and raise at instruction `at` of `WAY`; whether there was one."""
    count = 0

    def trace(frame: Any, event: str, argument: object) -> Any:
        nonlocal count
        if frame.f_code not in WAY:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            count += 1
            if count - 1 == at:
                raise Injected
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except Injected:
        return True
    finally:
        sys.settrace(before)
    return False


@pytest.fixture
def elsewhere() -> Iterator[Callable[[Callable[[], Any]], Any]]:
    """Run something in another thread, and fail if it does not end."""
    with ThreadPoolExecutor(1) as pool:
        yield lambda call: pool.submit(call).result(timeout=PATIENCE)


STRIDE = 1 if ALL else 13  # instructions from one interruption to the next
X, Y = np.linspace(-1, 1, 6).reshape(2, 3), np.linspace(0.1, 0.9, 8).reshape(2, 4)
Q, P = np.eye(3), np.ones((2, 3))


def calls(session: icnnrt.Session, tuner: FineTuner) -> dict[str, Callable[[], object]]:
    solver = icnnrt.QPSolver(3, batch=2)
    solver.solve(Q=Q, p=P)
    solution = session.argmin(X)
    return {
        "value": lambda: session.value(X, Y),
        "argmin": lambda: session.argmin(X),
        "vjp": lambda: session.vjp(session.argmin(X), Y),
        "weights": lambda: dict(session.weights),
        "stale": lambda: solution.ok.all(),
        "step": lambda: tuner.step(X, Y),
        "check": lambda: tuner.check(X, Y),
        "rollback": tuner.rollback,
        "set weights": lambda: federated.set_weights(tuner, federated.get_weights(tuner)),
        "qp": lambda: icnnrt.qp(Q, P).vjp(P).p,
        "QPSolver": lambda: solver.solve(p=P),
    }


@pytest.mark.parametrize("name", ["value", "step", "check", "rollback", "set weights", "qp", "QPSolver"])
def test_an_exception_at_any_instruction(
    train_package: Path, elsewhere: Callable[[Callable[[], Any]], Any], name: str
) -> None:
    session = icnnrt.load(train_package)
    tuner = FineTuner(session, learning_rate=1e-3)
    call = calls(session, tuner)[name]
    call()
    for at in count(0, STRIDE):
        steps, weights_id = tuner.steps, session.weights_id
        if not interrupted(call, at):
            break
        if name == "step":  # all of it or nothing
            assert (tuner.steps - steps, session.weights_id != weights_id) in ((0, False), (1, True))
        assert elsewhere(lambda: session.argmin(X).ok.all())
        if at % 4 == 0:
            assert elsewhere(lambda: tuner.step(X, Y).accepted)
    assert at > 20
    elsewhere(session.close)


@pytest.mark.parametrize(("process", "stride"), [(False, STRIDE), (True, 13 * STRIDE)], ids=["here", "process"])
def test_a_call_with_limits_may_be_interrupted_at_any_instruction(
    train_package: Path, process: bool, stride: int
) -> None:
    """Its end is then nobody else's, and its process is not asked again."""
    with icnnrt.load(train_package, limits=icnnrt.Limits(30, process=process)) as session:
        f = session.value(X, Y)
        for at in count(0, stride):
            if not interrupted(partial(session.value, X, Y), at):
                break
            assert limits.deadline() is None
            np.testing.assert_array_equal(session.value(X, Y), f)
        assert at > 100


def test_the_first_call_may_be_interrupted_at_any_instruction(train_package: Path) -> None:
    """While a session of onnxruntime is made, too."""
    package = icnnrt.Package.open(train_package)
    for at in count(0, 3 * STRIDE):
        session = icnnrt.load(package, limits=icnnrt.Limits() if at % 2 else None)
        if not interrupted(partial(session.value, X, Y), at):
            break
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(session.value, X, Y).result(timeout=PATIENCE).shape == (2,)
    assert at > 20


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no interval timers")
def test_alarms_at_random_instants(
    train_package: Path, elsewhere: Callable[[Callable[[], Any]], Any], tmp_path: Path
) -> None:
    session = icnnrt.load(train_package)
    tuner = FineTuner(session, learning_rate=1e-3)
    made = calls(session, tuner)
    for call in made.values():
        call()
    tuner.save(tmp_path / "h")

    def ring(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    rng, hits = np.random.default_rng(0), 0
    before = signal.signal(signal.SIGALRM, ring)
    try:
        for k in range(amount(2000)):
            call = list(made.values())[k % len(made)]
            try:
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-5, 3e-3))
                for _ in range(4):
                    call()
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                hits += 1
            if k % 50 == 0:
                assert elsewhere(lambda: tuner.step(X, Y)).accepted
    except KeyboardInterrupt:  # of the last one, late
        pass
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert hits > amount(2000) // 10
    assert elsewhere(lambda: tuner.step(X, Y)).accepted
    assert elsewhere(lambda: session.argmin(X)).ok.all()
    elsewhere(lambda: tuner.resume(tmp_path / "h"))
    assert elsewhere(lambda: icnnrt.qp(Q, P)).ok.all()
    elsewhere(session.close)


# --- Turns -----------------------------------------------------------------------------------------


def test_turns_are_taken_one_after_the_other() -> None:
    turns, together, most = Turns(), 0, 0

    def work() -> None:
        nonlocal together, most
        for _ in range(300):
            turn = turns.take()
            try:
                inner = turns.take()  # whoever has it may take it again
                together += 1
                most = max(most, together)
                inner.end()
                together -= 1
            finally:
                turn.end()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()
    assert most == 1


def test_a_turn_that_nobody_ended_is_over_although_a_traceback_is_kept(
    elsewhere: Callable[[Callable[[], Any]], Any],
) -> None:
    turns = Turns()

    def broken() -> None:
        turn = turns.take()
        raise Injected(turn)

    with pytest.raises(Injected) as kept:
        broken()
    elsewhere(lambda: turns.take().end())
    with pytest.raises(Injected) as again:
        broken()
    turns.take().end()
    assert kept.tb
    assert again.tb


def test_a_turn_lasts_while_its_holder_works(elsewhere: Callable[[Callable[[], Any]], Any]) -> None:
    turns, order = Turns(), []
    turn = turns.take()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(lambda: (turns.take(), order.append("other")))
        threading.Event().wait(0.3)  # several looks
        order.append("holder")
        turn.end()
        waiting.result(timeout=PATIENCE)
    assert order == ["holder", "other"]


# --- Sets of weights ---------------------------------------------------------------------------------


def test_what_is_read_while_weights_change_is_of_one_time(train_package: Path) -> None:
    session = icnnrt.load(train_package)
    names = [name for name, array in session.weights.items() if array.dtype.kind == "f"]
    began, done = threading.Event(), threading.Event()

    def change() -> None:
        k = 0
        while not done.is_set():
            k += 1
            session.update_weights({name: np.full_like(session.weights[name], k % 97) for name in names})
            began.set()

    thread = threading.Thread(target=change)
    thread.start()
    try:
        assert began.wait(PATIENCE)
        for _ in range(300):
            read = dict(session.weights)
            assert len({float(number) for name in names for number in (read[name].min(), read[name].max())}) == 1
            assert len({float(array.min()) for array in federated.get_weights(session).values()}) == 1
        for _ in range(3):
            assert session.prove_convexity().verdict == "proven"
    finally:
        done.set()
        thread.join(PATIENCE)


def test_old_weights_are_gone_with_the_last_that_uses_them(train_package: Path) -> None:
    """However many steps a tuner takes."""
    session = icnnrt.load(train_package)
    tuner = FineTuner(session, learning_rate=1e-3)
    met = []
    for _ in range(20):
        tuner.step(X, Y)
        met.append(weakref.ref(next(iter(session.weights.values())).base))
    gc.collect()
    assert sum(ref() is not None for ref in met) <= 2  # the present ones, and those proven before


# --- Pickles -----------------------------------------------------------------------------------------


def test_a_session_is_pickled_as_the_place_of_its_package(train_package: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.icnn"
    shutil.copytree(train_package, path)
    session = icnnrt.load(path, threads=2, strict=True, native=False)
    data = pickle.dumps(session)
    assert len(data) < 1000
    again = pickle.loads(data)  # noqa: S301
    assert again.options == session.options
    np.testing.assert_array_equal(again.argmin(X).y, session.argmin(X).y)
    tuner = FineTuner(session)
    with pytest.raises(
        icnnrt.InputError, match="a FineTuner, which belongs to the session it tunes; save a checkpoint"
    ):
        pickle.dumps(tuner)
    tuner.step(X, Y)
    with pytest.raises(icnnrt.InputError, match="but they have been updated since; write them by"):
        pickle.dumps(session)
    tuner.write_package(path, overwrite=True)
    with pytest.raises(icnnrt.PackageError, match="this is another one, or it was changed since"):
        pickle.loads(data)  # noqa: S301
    again = pickle.loads(pickle.dumps(icnnrt.load(path)))  # noqa: S301
    assert again.weights_id == icnnrt.load(path).weights_id
    session.close()
    with pytest.raises(icnnrt.IcnnrtError, match="the session is closed"):
        pickle.dumps(session)
