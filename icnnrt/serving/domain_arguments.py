"""Where y may lie and where a solver starts, as users give it: bounds of a box, linear constraints, a first point."""

from collections.abc import Mapping

import numpy as np

from icnnrt.arguments import batch, converted, refused
from icnnrt.errors import InputError
from icnnrt.format.manifest import Manifest, SolverSpec
from icnnrt.mathematics.domains import MODELS, check_bounds
from icnnrt.mathematics.polyhedron_programs import Polyhedron
from icnnrt.mathematics.qp_data import SHAPES, check_shapes
from icnnrt.printable import named
from icnnrt.serving.solution import Array, Floats


def solver_of(manifest: Manifest, what: str) -> SolverSpec:
    """The solver of a package, or the `InputError` of `what` needs one."""
    if manifest.kind == "qp":
        raise no_energy(what)
    if manifest.solver is None:
        raise InputError(
            f"{what}: the package {named(manifest.name)} was exported without a solver, so it serves the "
            "energy and its derivatives alone; export it again with a solver."
        )
    return manifest.solver


def no_energy(what: str) -> InputError:
    """What to raise where a network of quadratic programs is asked for what energies have."""
    return InputError(f"{what}: the package holds a network of quadratic programs, no energy; use `solve_qp`.")


def bounds_of(manifest: Manifest, B: int, lower: object, upper: object) -> dict[str, Floats]:
    """lower and upper as [B, n] for a box, nothing for other domains."""
    n = manifest.y_shape[0]
    if not check_bounds(MODELS[manifest.domain.kind] if manifest.domain else None, lower, upper):
        return {}
    bounds = {}
    for name, value in (("lower", lower), ("upper", upper)):
        array = converted(value, name)
        if array.ndim < 2 and array.dtype.kind in "fiu" and array.shape in ((), (n,)):
            array = np.broadcast_to(array, (B, n))
        bounds[name] = batch(array, name, manifest.dtype, (n,), length=B)
    return bounds


def start_of(manifest: Manifest, B: int, y_init: object, warm: Floats | None, bounds: Mapping[str, Floats]) -> Floats:
    """Where the solver starts, [B, n]: y_init, or the y of an earlier answer, or the centre of the domain."""
    if y_init is not None and warm is not None:
        raise InputError("y_init, warm: expected at most one of the two, but got both; leave one out.")
    assert manifest.domain is not None, "a solver has a domain"
    domain = MODELS[manifest.domain.kind]
    if y_init is not None:
        Y = batch(y_init, "y_init", manifest.dtype, manifest.y_shape, length=B)
        domain.check_start(Y, bounds)
        return Y
    centre = np.full((B, *manifest.y_shape), domain.centre(manifest.y_shape[0]), manifest.dtype)
    if bounds:
        with np.errstate(invalid="ignore", over="ignore"):
            centre = bounds["lower"] + (bounds["upper"] - bounds["lower"]) * centre
    if warm is None:
        return centre
    Y = batch(warm, "warm", manifest.dtype, manifest.y_shape, length=B)
    Y = np.where(np.isnan(Y), centre, Y)
    return np.clip(Y, bounds["lower"], bounds["upper"]) if bounds else Y


def given_rows(B: int, n: int, **given: object) -> Polyhedron:
    """G, h, A, b, lower and upper, any of them None, as a polyhedron of B samples in float64.

    Each as `icnnrt.mathematics.qp_data` says: that of one sample is shared by all. Raises `InputError`.
    """
    arrays = {name: _numbers(name, value) for name, value in given.items() if value is not None}
    sizes = check_shapes({name: arrays[name].shape if name in arrays else None for name in given}, n, B)
    absent = {"lower": -np.inf, "upper": np.inf}
    whole = {}
    for name in Polyhedron._fields:
        shape = [getattr(sizes, letter) for letter in SHAPES[name]]
        whole[name] = np.broadcast_to(arrays.get(name, absent.get(name, 0.0)), (B, *shape))
    return Polyhedron(**whole)


def _numbers(name: str, value: object) -> Array:
    """In float64, finite but for what bounds."""
    try:
        if np.asarray(value).dtype.kind not in "fiub":  # of text numpy would make numbers
            raise TypeError("not of real numbers")
        array = np.array(value, np.float64)  # a copy: a solution keeps it, and callers write in theirs
    except Exception as error:  # an object may have an idea of its own of what it is as an array
        raise refused(name, "numbers", f"{type(value).__name__} ({error})") from error
    if np.isnan(array).any() or (name not in ("lower", "upper", "h") and np.isinf(array).any()):
        raise refused(name, "finite numbers", "NaN or infinity", "leave out what is no bound")
    return array
