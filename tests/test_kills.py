"""SIGKILL at random instants of tuning and saving: what is on the disk is always whole, and always something that was
committed."""

import functools
import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from amounts import amount
from numpy.typing import NDArray

import icnnrt
from icnnrt.format import wire
from icnnrt.format.package import Package
from icnnrt.tuning.finetune import FineTuner

KILLS = 200  # a quarter of a second each; for more: python tests/test_kills.py PACKAGE SCRATCH 5000


def digest(arrays: Mapping[str, NDArray[Any]]) -> str:
    parts = hashlib.sha256()
    for name in sorted(arrays):
        parts.update(name.encode() + np.ascontiguousarray(arrays[name]).tobytes())
    return parts.hexdigest()


def everything(tuner: FineTuner) -> dict[str, NDArray[Any]]:
    return {**tuner.session.weights, **tuner.state}


def tune_for_ever(tuner: FineTuner, path: Path, history: Path, log: Path, ready: int, seed: int) -> None:
    """What the device does, until it is killed; every state is logged before it is committed."""
    rng = np.random.default_rng(seed)
    tuner.resume(history)
    session = tuner.session
    x_shape, (n,) = session.manifest.x_shape, session.manifest.y_shape
    with open(log, "ab", buffering=0) as committed:
        first = True
        while True:
            tuner.step(rng.standard_normal((4, *x_shape)), rng.random((4, n)))
            committed.write(f"{digest(session.weights)}\n{digest(everything(tuner))}\n".encode())
            os.fsync(committed.fileno())
            if first:
                os.write(ready, b".")
                first = False
            put_away(tuner, path, history)


def put_away(tuner: FineTuner, path: Path, history: Path) -> None:
    tuner.save(history, keep=2)
    tuner.write_package(path, overwrite=True)


def kill_again_and_again(source: Path, scratch: Path, kills: int = KILLS) -> None:
    """In a process of its own, without torch: a fork then copies little."""
    # What the graphs are made of is found out once for the same bytes: that takes most of the time of opening and of
    # writing a package, and none of it is spent on the disk, where a kill could do harm.
    wire.survey = functools.cache(wire.survey)
    path, history, log = scratch / "device.icnn", scratch / "history", scratch / "committed"
    original = Package.open(source)
    original.save(path)
    # Its graphs are made once, here, and every child begins with a copy of them: making them takes the longest by far.
    tuner = FineTuner(icnnrt.load(path), learning_rate=0.01)
    log.write_text(f"{digest(original.weights)}\n{digest(everything(tuner))}\n")
    began = time.perf_counter()
    for _ in range(5):
        put_away(tuner, path, history)
    once = (time.perf_counter() - began) / 5  # seconds; kills come at random instants of the first two
    tuner.step(np.zeros((1, *tuner.session.manifest.x_shape)), np.zeros((1, *tuner.session.manifest.y_shape)))
    rng = np.random.default_rng(0)
    packages, checkpoints = set(), set()
    for kill in range(kills):
        ready, tell = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.close(ready)
                tune_for_ever(tuner, path, history, log, tell, kill)
            finally:
                os._exit(1)
        os.close(tell)
        assert os.read(ready, 1) == b".", "the child could not begin: the state that it found was not whole"
        time.sleep(rng.uniform(0.0, 2.0 * once))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(ready)

        committed = set(log.read_text().split("\n"))
        packages.add(digest(Package.open(path).weights))
        assert packages <= committed, f"after kill {kill} the package holds weights that were never committed"
        tuner.resume(history)
        checkpoints.add(digest(everything(tuner)))
        assert checkpoints <= committed, f"after kill {kill} the history holds a state that was never committed"
    assert len(packages) > kills // 10, f"{len(packages)}: the kills came too early for packages to be written"
    assert len(checkpoints) > kills // 10, f"{len(checkpoints)}: the kills came too early for checkpoints to be saved"
    # A write that comes to its end leaves none of the old packages behind.
    Package.open(path).save(path, overwrite=True)
    assert not list(scratch.glob(".device.icnn.old-*"))
    seconds = time.perf_counter() - began
    print(f"{kills} kills, {len(packages)} packages, {len(checkpoints)} checkpoints in {seconds:.0f} s")


def test_every_kill_leaves_a_committed_state(train_package: Path, tmp_path: Path) -> None:
    if not hasattr(os, "fork") or sys.platform == "darwin":
        pytest.skip("needs fork, and a runtime that survives it")
    done = subprocess.run(
        [sys.executable, __file__, str(train_package), str(tmp_path), str(amount(KILLS))],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{amount(KILLS)} kills")


if __name__ == "__main__":
    kill_again_and_again(*map(Path, sys.argv[1:3]), *map(int, sys.argv[3:]))
else:
    import pytest
