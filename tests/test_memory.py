"""Long runs take no memory. Each has a process of its own: one that ran other tests grows and shrinks by what they
left to the allocators."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

STATM = Path("/proc/self/statm")
STATUS = Path("/proc/self/status")
STEPS, CHECKED_EVERY = 10_000, 500
CALLS = 50_000
POINTS = {"evaluation": 1_000_000, "value": 1_000_000, "argmin": 60_000, "vjp": 60_000, "pullback": 60_000}
BESIDES = 200_000_000  # what a call may take besides its outputs


def resident() -> int:
    """Bytes of this process in memory."""
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def steps_of_a_tuner(package: str) -> None:
    """The weights are looked at after every step, at a rate that keeps many of them on their bound."""
    from test_finetune import X_DIM, N, check_convex

    import icnnrt
    from icnnrt.tuning.finetune import FineTuner

    session = icnnrt.load(package)
    tuner = FineTuner(session, learning_rate=0.02)
    rng = np.random.default_rng(0)
    held = [name for name, spec in session.manifest.weights.tensors.items() if spec.nonnegative]
    measured, on_bound = [], 0
    for step in range(STEPS):
        assert tuner.step(rng.standard_normal((4, X_DIM)), rng.random((4, N))).accepted
        smallest = [float(session.weights[name].min()) for name in held]
        assert min(smallest) >= 0.0
        on_bound += smallest.count(0.0)
        if step % CHECKED_EVERY == 0:
            check_convex(session, seed=step)
            measured.append(resident())
    assert on_bound > STEPS // 2
    settled = measured[2:]
    growth = max(settled) - settled[0]
    assert growth < 4 << 20, f"{growth} bytes in {STEPS} steps"  # a leak of 420 bytes a step


def calls_of_kernels() -> None:
    """Calls of all kinds, errors among them, and sessions."""
    from test_native import adjoint_feeds, fuzzed, loose_graph, native_session, session_on_kernels, solve_feeds

    small, large = solve_feeds(1, 5, 10), solve_feeds(3, 20, 300)
    adjoint = adjoint_feeds(2, 5, 10)
    wrong = {**small, "offsets": np.zeros((1, 6))}
    solver, back = (
        native_session("BundleEntropySolve", np.float64, steps=60),
        fuzzed("BundleEntropyAdjoint", np.float64),
    )
    refused = fuzzed("BundleEntropySolve", np.float64)
    graph = loose_graph("BundleEntropySolve", np.float32, steps=3)  # writing it leaves more than calls do

    def calls(count: int) -> None:
        for i in range(count):
            solver.run(None, small)
            back.run(None, adjoint)
            if i % 50 == 0:
                solver.run(None, large)
                with pytest.raises(Exception, match="offsets"):
                    refused.run(None, wrong)
            if i % 500 == 0:
                session_on_kernels(graph)

    calls(CALLS // 10)
    before = resident()
    calls(CALLS)
    growth = resident() - before
    assert growth < 4_000_000, f"{growth} bytes in {CALLS} calls"  # one leaked shape a call would be six megabytes


def peak() -> int:
    """The most bytes of this process in memory until now. getrusage tells that of the process it came from as well."""
    return 1024 * int(STATUS.read_text().split("VmHWM:")[1].split()[0])


def large_batch(package: str, call: str) -> None:
    """Peak memory is the outputs and a bound, and what the call took comes back."""
    import icnnrt

    session, samples, rng = icnnrt.load(package), POINTS[call], np.random.default_rng(0)
    x, y = rng.standard_normal((samples, 2)), rng.random((samples, 6))

    def outputs(count: int) -> list[np.ndarray]:
        X, Y = x[:count], y[:count]
        if call == "evaluation":
            return list(session.value_gradient_hessian(X, Y))
        if call == "value":
            return [session.value(X, Y)]
        if call == "pullback":
            pulled = session.pullback(X, Y, Y[:, 0], Y)
            return [pulled.y, pulled.x]
        solution = session.argmin(X)
        given = [a for a in map(solution.__getattribute__, solution.__slots__) if isinstance(a, np.ndarray)]
        return given if call == "argmin" else [*given, session.vjp(solution, Y, on_unsafe="skip").x]

    outputs(2)
    before = resident()
    found = outputs(samples)
    taken = peak() - before - sum(a.nbytes for a in found)
    assert all(len(a) == samples for a in found)
    assert taken < BESIDES, f"{taken} bytes besides the outputs"
    del found
    kept = resident() - before
    assert kept < BESIDES // 2, f"{kept} bytes are kept"


PROGRAMS = {"steps": steps_of_a_tuner, "calls": calls_of_kernels, "large": large_batch}


def alone(program: str, *arguments: object) -> None:
    if not STATM.exists():
        pytest.skip("resident memory is read from /proc")
    command = [sys.executable, __file__, program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_ten_thousand_steps_stay_convex_and_take_no_memory(train_package: Path) -> None:
    alone("steps", train_package)


@pytest.mark.slow
def test_calls_of_the_kernels_take_no_memory() -> None:
    pytest.importorskip("onnxruntime")
    from icnnrt import native_library

    if native_library.build().library is None:
        pytest.skip("the native kernels are not built")
    alone("calls")


LARGE = [call if call == "argmin" else pytest.param(call, marks=pytest.mark.slow) for call in POINTS]


@pytest.mark.parametrize("call", LARGE)
def test_large_batches_take_their_outputs_and_a_bound(six_strains: Path, call: str) -> None:
    alone("large", six_strains, call)


if __name__ == "__main__":
    PROGRAMS[sys.argv[1]](*sys.argv[2:])
