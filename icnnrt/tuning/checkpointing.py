"""Weights and optimiser state to checkpoints and back, after checking that they are of the same network."""

import json
import math
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from icnnrt.arguments import alone, refused
from icnnrt.errors import PackageError
from icnnrt.format.checkpoints import STATE, WEIGHT, Checkpoint, History, fingerprint_points
from icnnrt.format.manifest import TrainingSpec
from icnnrt.printable import named
from icnnrt.serving.session import Session
from icnnrt.serving.weight_sets import WeightSet, as_used

Arrays = dict[str, NDArray[Any]]

STEP: Final = "state.step"


def saved(
    session: Session,
    history: History,
    step: int,
    weights: WeightSet,
    state: Arrays,
    figures: Mapping[str, float | None],
) -> Checkpoint:
    """Save weights and state as they are after so many steps."""
    numbers = {name: None if value is None else alone(value) for name, value in figures.items()}
    lost = [name for name, one in numbers.items() if isinstance(one, float) and not math.isfinite(one)]
    finite = {name: value for name, value in figures.items() if value is not None and name not in lost}
    try:
        return history.save(step, weights.arrays, state, finite, _fingerprint(session, weights))
    except OSError as error:
        error.add_note(
            f"Step {step} is not saved in {history.folder}; weights and state are still in memory, so make room or "
            "choose another folder and call save again."
        )
        raise


def checkpoint_of(history: History, step: int | None) -> Checkpoint:
    """The last one of a history, or that of a step, or the `InputError`."""
    if not history.folder.exists():
        came = f"{history.folder}, which is not there"
        raise refused("history", "a folder of checkpoints", came, "check the path, or call save first")
    fitting = [c for c in history.checkpoints if step in (None, c.step)]
    if not fitting:
        there = ", ".join(str(c.step) for c in history.checkpoints)
        expected = f"a checkpoint{'' if step is None else f' of step {step}'} in {history.folder}"
        raise refused("history", expected, f"those of steps {there}" if there else "none", "call save first")
    return fitting[-1]


def restored(
    session: Session, spec: TrainingSpec, present: Arrays, history: History, checkpoint: Checkpoint
) -> tuple[Arrays, Arrays]:
    """The weights and the state of a checkpoint, after checking that they are of this network; `present` is the state
    of now."""
    tensors = history.load(checkpoint)
    weights = {n.removeprefix(WEIGHT): a for n, a in tensors.items() if n.startswith(WEIGHT)}
    state = {n: a for n, a in tensors.items() if n.startswith(STATE)}
    expected = {name: (a.shape, a.dtype.name) for name, a in present.items()}
    expected |= {name: (one.shape, one.dtype) for name, one in session.manifest.weights.tensors.items()}
    came = {name: (a.shape, a.dtype.name) for name, a in (weights | state).items()}
    path = history.folder / checkpoint.file
    if came != expected or len(tensors) != len(expected):
        odd = sorted(json.dumps(n) for n in expected.keys() ^ came.keys()) or ["shapes or dtypes"]
        raise PackageError(
            f"{path}: expected the weights and the optimiser state of this package, but {odd[0]} differ; give the "
            "history of this package."
        )
    _check(session, spec, path, weights, state, checkpoint.step)
    there = WeightSet({name: as_used(array) for name, array in weights.items()}, secrets.token_hex(8))
    history.check(checkpoint, _fingerprint(session, there))
    return weights, state


def _fingerprint(session: Session, weights: WeightSet) -> list[float | None]:
    """What the network gives at a few points with these weights, see `icnnrt.format.checkpoints`."""
    if session.manifest.kind == "qp":
        return []
    feeds = fingerprint_points(session.manifest)
    found = session.runner.run("value", feeds, weights=weights, only=("f",))[0]["f"]
    return [value if math.isfinite(value) else None for value in found.tolist()]


def _check(session: Session, spec: TrainingSpec, path: Path, weights: Arrays, state: Arrays, step: int) -> None:
    """Refuse numbers that are not those of this network after so many steps."""
    for name, array in (weights | state).items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise PackageError(f"{path}: {named(name)} holds NaN or infinity; resume from another checkpoint.")
    for name in weights.keys() - set(spec.weights):
        if not np.array_equal(as_used(weights[name]), session.runner.weights.arrays[name], equal_nan=True):
            raise PackageError(
                f"{path}: expected {named(name)}, which is not trained, to be that of this package, but it is "
                "another; resume with the package that it was saved by."
            )
    if fault := session.convexity.fault(weights, {}):
        raise PackageError(
            f"{path}: {fault}, and the energy would no longer be known to be convex; resume from another checkpoint."
        )
    if state[STEP] != step:
        raise PackageError(
            f"{path}: expected the state of step {step}, as the history has it, but it is of step "
            f"{int(state[STEP])}; resume from another checkpoint."
        )
