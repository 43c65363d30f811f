"""What a tuner is given: samples to learn from, and new values for weights."""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from icnnrt.arguments import batch, converted, finite_rows, instance, refused
from icnnrt.errors import InputError
from icnnrt.format.manifest import Manifest, TrainingSpec
from icnnrt.mathematics.domains import MODELS
from icnnrt.printable import named, show
from icnnrt.serving.domain_arguments import bounds_of
from icnnrt.serving.session import Session
from icnnrt.serving.weight_sets import WeightSet

Arrays = dict[str, NDArray[Any]]

MAX_INTEGER: Final = 2.0**53  # up to here float64, which targets pass through, holds every integer
# Losses whose targets are values in [0, 1]: where y lies there, and everywhere.
IN_UNIT_BOX: Final = ("squared_error", "binary_cross_entropy", "huber")
CROSS_ENTROPY: Final = ("binary_cross_entropy",)


def samples(
    manifest: Manifest,
    spec: TrainingSpec,
    x: object,
    target: object,
    lower: object = None,
    upper: object = None,
    *,
    strict: bool,
    of: str = "",
) -> tuple[Arrays, int]:
    """What train.onnx takes of finite samples, by name, and how many others there were, which `strict` refuses.

    `of` is what the samples are for, and stands before the names of the arguments.
    """
    x_name, target_name = f"{of}x", f"{of}target"
    X = batch(x, x_name, manifest.dtype, manifest.x_shape)
    integers = spec.target_dtype == "int64"
    T = batch(target, target_name, "float64" if integers else spec.target_dtype, spec.target_shape, length=len(X))
    if not len(X):
        raise refused(x_name, "at least one sample", "none")
    bounds = bounds_of(manifest, len(X), lower, upper)
    finite = np.logical_and.reduce([finite_rows(a) for a in (X, T, *bounds.values())])
    if bounds:  # NaN is told before
        finite &= (bounds["lower"] <= bounds["upper"]).all(1)
    if strict and not finite.all():
        came = f"NaN or infinity in sample {int(np.argmin(finite))}"
        remedy = "clean it, or pass strict=False to skip such samples"
        raise refused(f"{x_name}, {target_name}", "finite numbers", came, remedy)
    if not finite.any():
        raise refused(f"{x_name}, {target_name}", "finite numbers", "NaN or infinity in every sample", "clean them")
    skipped = int((~finite).sum())
    if skipped:
        X, T, bounds = X[finite], T[finite], {name: a[finite] for name, a in bounds.items()}
    if integers:
        if (np.rint(T) != T).any() or (np.abs(T) > MAX_INTEGER).any():
            raise refused(target_name, "integers, as the package's loss takes", "others", "round them")
        T = T.astype(np.int64)
    domain = MODELS[manifest.domain.kind] if manifest.domain else None
    inside = IN_UNIT_BOX if domain and domain.edges == (0.0, 1.0) and not domain.bounds else CROSS_ENTROPY
    if spec.loss in inside and T.size and not (T.min() >= 0 and T.max() <= 1):
        sample = int(np.argmax(((T < 0) | (T > 1)).reshape(len(T), -1).any(1)))
        came = f"{float(T[sample].min()):g} to {float(T[sample].max()):g} in finite sample {sample}"
        raise refused(target_name, "numbers in [0, 1], where y lies", came, "scale the targets as in training")
    return {"x": X, "target": T, **bounds}, skipped


def exchanged(manifest: Manifest) -> tuple[str, ...]:
    """Names of the weights that travel: those that the training graph moves; without one, every trainable one."""
    if manifest.train is not None:
        return manifest.train.weights
    return manifest.weights.trainable


def new_weights(session: Session, weights: Mapping[str, NDArray[Any]], present: WeightSet) -> Arrays:
    """New values for some weights as they are given, in the dtypes of the package; `present` are the other ones.

    Raises what `icnnrt.federated.set_weights` documents.
    """
    manifest = session.manifest
    instance(weights, "weights", Mapping, "arrays by name", "see get_weights")
    known = set(exchanged(manifest))
    checked: Arrays = {}
    for name, given in weights.items():
        if name not in known:
            expected = f"names of weights that {named(manifest.name)} trains"
            raise refused("weights", expected, show(name), "give weights of the same package")
        spec = manifest.weights.tensors[name]
        array = converted(given, "weights")
        if array.dtype.kind != "f" or array.shape != spec.shape:
            expected, came = f"{named(name)} as {spec.dtype}{list(spec.shape)}", f"{array.dtype}{list(array.shape)}"
            raise refused("weights", expected, came, "give weights of the same package")
        with np.errstate(over="ignore"):
            array = np.array(array, spec.dtype, order="C")
        if not np.isfinite(array).all():
            raise InputError(f"weights: {named(name)} holds NaN or infinity; leave out the device that it comes from.")
        checked[name] = array
    if fault := session.convexity.fault(checked, present.arrays):
        raise InputError(
            f"weights: {fault}, and the energy would no longer be known to be convex; average, and add no noise, or "
            "project what comes of it."
        )
    return checked
