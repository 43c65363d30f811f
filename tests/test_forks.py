"""A child that is forked while other threads are inside onnxruntime works: nothing it needs is locked for ever.

`python tests/test_forks.py PACKAGE 200` forks 200 times under load.
"""

import gc
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from amounts import ALL

import icnnrt
from icnnrt.serving import operators
from icnnrt.tuning.finetune import FineTuner

PATIENCE = 60.0  # seconds for a child, which only a deadlock takes
THREADS = 6


def child(call: Callable[[], Any]) -> str:
    """How a forked child ends that makes a call."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn of any fork beside threads
        pid = os.fork()
    if not pid:
        try:
            call()
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return "done" if status == 0 else f"status {status}"
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "hung"


def forked(package: str, forks: int) -> Counter[str]:
    session = icnnrt.load(package)
    other = icnnrt.load(package)  # whose weights nobody changes between an answer and its cotangents
    tuner = FineTuner(session, learning_rate=1e-4)
    solver = icnnrt.QPSolver(3, batch=2)
    X, Y = np.linspace(-1, 1, 6).reshape(2, 3), np.linspace(0.1, 0.9, 8).reshape(2, 4)
    Q, p = np.eye(3), np.ones((2, 3))
    expected = icnnrt.qp(Q, p).z

    def solve() -> None:
        np.testing.assert_allclose(solver.solve(Q=Q, p=p), expected)
        assert np.isfinite(solver.vjp(p).p).all()

    calls: dict[str, Callable[[], Any]] = {
        "argmin": lambda: session.argmin(X).ok.all() or os._exit(2),
        "step": lambda: tuner.step(X, Y).accepted or os._exit(2),
        "vjp": lambda: other.vjp(other.argmin(X), Y),
        "qp": lambda: np.testing.assert_allclose(icnnrt.qp(Q, p).z, expected),
        "QPSolver": solve,
        "load": lambda: icnnrt.load(package).value(X, Y),
    }
    solve()
    for call in calls.values():
        call()

    # In a child the only thread there is has it, whichever had it before.
    elsewhere = icnnrt.QPSolver(3, batch=2)
    first = threading.Thread(target=elsewhere.solve, args=(Q, p))
    first.start()
    first.join()
    calls["of another thread"] = lambda: np.testing.assert_allclose(elsewhere.solve(Q=Q, p=p), expected)

    def drop() -> None:
        """Nothing that was inherited is destroyed with what held it."""
        nonlocal session, tuner, solver
        session.argmin(X)
        session.close()
        del session, tuner, solver
        operators.sessions.give_up()
        gc.collect()

    load = cycle((calls["argmin"], calls["step"], calls["vjp"], calls["qp"]))
    calls["drop"] = drop
    stop = threading.Event()

    def work(call: Callable[[], Any]) -> None:
        while not stop.is_set():
            call()

    threads = [threading.Thread(target=work, args=(next(load),), daemon=True) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    ends: Counter[str] = Counter()
    try:
        for _, (name, call) in zip(range(forks), cycle(calls.items()), strict=False):
            ends[f"{name} {child(call)}"] += 1
    finally:
        stop.set()
    return ends


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_children_of_a_busy_process_work(train_package: Path) -> None:
    forks = 35 if ALL else 8
    # In a process of its own: this one may hold threads of torch, which forks of it have to do without.
    done = subprocess.run(
        [sys.executable, __file__, str(train_package), str(forks)],
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    assert done.stdout.split("\n")[0] == f"{forks} of {forks}", done.stdout


if __name__ == "__main__":
    found = forked(sys.argv[1], int(sys.argv[2]))
    good = sum(count for end, count in found.items() if end.endswith(" done"))
    print(f"{good} of {found.total()}", dict(found), sep="\n", flush=True)
    os._exit(good != found.total())
