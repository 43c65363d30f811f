"""Make an energy convex in y by clipping the weights to blame, and tell how far that moves its answers."""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from icnnrt.arguments import integer
from icnnrt.checking.trial import contexts
from icnnrt.convexity import Convexity, grounds, prove
from icnnrt.errors import InputError
from icnnrt.format.fields import strict
from icnnrt.format.package import Package, opened
from icnnrt.format.signs import NONNEGATIVE, Sign, united
from icnnrt.serving.load import load

StrPath = str | os.PathLike[str]

# Clipping one layer may lay open what the next one is to blame for.
ROUNDS: Final = 16
SAMPLES: Final = 64


@dataclass(frozen=True)
class RepairReport:
    """What `project` found and did."""

    before: Convexity
    after: Convexity
    clipped: Mapping[str, int]
    """name -> how many entries were negative and are 0 now."""
    value_moved: float
    """Largest change of f over the samples, relative to max(1, |f|)."""
    y_moved: float | None
    """Largest change of an entry of y* over the samples that have one before and after; None without a solver."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for strict JSON: NaN and infinity are None."""
        plain = {**asdict(self), "before": self.before.to_json(), "after": self.after.to_json()}
        return dict(strict(plain))


def project(
    source: StrPath | Package, target: StrPath, x: object = None, *, seed: int = 0, overwrite: bool = False
) -> RepairReport:
    """Write the package `source`, or the one at that path, to `target` with the weights to blame for a lost convexity
    clipped to >= 0.

    x:     [B, *x_shape], contexts that the changes are measured at; random normal ones by default
    seed:  of those, and of the points y

    The verdict (`icnnrt.convexity`) names the weights whose sign broke a rule; their negative entries become 0, until f
    is proven convex. They are marked nonnegative in the manifest, so that fine-tuning projects them after each step,
    whether or not train.onnx does. The network is another one afterwards, how different, the report says: clipping may
    cost much of what was trained, and training with the constraint is better where it can be done. Nothing is written
    if f cannot be proven convex in this way, which is an `InputError`.
    """
    seed = integer(seed, "seed", 0)
    package = opened(source)
    if package.manifest.kind == "gradient":
        raise InputError("package: it holds a gradient alone, whose weights cannot be judged; export the energy.")
    if package.manifest.kind == "qp":
        raise InputError("package: expected one of an energy, but it holds a network of quadratic programs.")
    weights: dict[str, NDArray[Any]] = dict(package.weights)
    before = after = prove(package.graphs["value"], weights, seed=seed)
    clipped: dict[str, int] = {}
    for _ in range(ROUNDS):
        guilty = [name for name in after.blame if name in weights and (weights[name] < 0).any()]
        if after.verdict == "proven" or not guilty:
            break
        for name in guilty:
            clipped[name] = clipped.get(name, 0) + int((weights[name] < 0).sum())
            weights[name] = np.maximum(weights[name], 0)
        after = prove(package.graphs["value"], weights, seed=seed)
    if after.verdict != "proven":
        raise InputError(
            f"package: clipping weights does not make it convex: {after.sentence().removesuffix('.')}; "
            "change the network, or train it with the constraint."
        )
    value_moved, y_moved = _moves(package, weights, x, seed)
    tensors = package.manifest.weights.tensors
    given = {
        name: united(spec.sign, Sign(NONNEGATIVE) if name in clipped else None, spec.shape)
        for name, spec in tensors.items()
    }
    signs: Mapping[str, Sign] = {name: sign for name, sign in given.items() if sign}
    found = grounds(package.graphs["value"], weights, package.manifest.weights.trainable, signs)
    assert found is not None, "what is proven has grounds"
    signs, after = {**signs, **found.signs}, replace(after, rests_on=found.values)
    tensors = {name: replace(spec, sign=signs.get(name)) for name, spec in tensors.items()}
    manifest = replace(package.manifest, weights=replace(package.manifest.weights, tensors=tensors))
    metadata = {**manifest.metadata, "clipped_entries": sum(clipped.values())}
    draft = replace(package, manifest=manifest)
    draft.save(target, weights=weights, metadata=metadata, convexity=after, overwrite=overwrite)
    return RepairReport(before, after, clipped, value_moved, y_moved)


def _moves(package: Package, weights: Mapping[str, NDArray[Any]], x: object, seed: int) -> tuple[float, float | None]:
    """How far f and y* move when the weights become these."""
    manifest, rng = package.manifest, np.random.default_rng(seed)
    X = contexts(manifest, x, SAMPLES if x is None else None, rng)
    Y = rng.random((len(X), *manifest.y_shape)).astype(manifest.dtype)
    bounds: dict[str, object] = {}
    if manifest.domain is not None and manifest.domain.kind == "box":
        bounds = {"lower": 0.0, "upper": 1.0}
    with load(package) as session:
        found = []
        for new in (None, weights):
            if new is not None:
                session.update_weights(dict(new))
            y = session.argmin(X, **bounds).y if manifest.solver else None  # type: ignore[arg-type]
            found.append((session.value(X, Y).astype(np.float64), y))
    (f, y), (f_new, y_new) = found
    moved = float((np.abs(f_new - f) / np.maximum(1.0, np.abs(f))).max())
    if y is None or y_new is None:
        return moved, None
    apart = np.abs(y_new.astype(np.float64) - y)
    return moved, float(np.nanmax(apart, initial=0.0))
