"""Where y may lie and where a solver starts, as users give it: bounds of a box, linear constraints, a first point."""

from collections.abc import Mapping

import numpy as np

from icnnrt.arguments import batch, converted
from icnnrt.errors import InputError
from icnnrt.format.manifest import Manifest, SolverSpec
from icnnrt.mathematics.bundle_qp import Polyhedron
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
    domain, n = manifest.domain, manifest.y_shape[0]
    given = {"lower": lower, "upper": upper}
    if domain is None or domain.kind != "box":
        for name, value in given.items():
            if value is not None:
                kind = domain.kind if domain else "none"
                raise InputError(f"{name}: expected none, as the domain is {kind!r}, but got one; leave it out.")
        return {}
    bounds = {}
    for name, value in given.items():
        if value is None:
            raise InputError(f"{name}: expected the bounds of y, as the domain is a box, but got none; give both.")
        array = converted(value, name)
        if array.ndim < 2 and array.dtype.kind in "fiu" and array.shape in ((), (n,)):
            array = np.broadcast_to(array, (B, n))
        bounds[name] = batch(array, name, manifest.dtype, (n,), length=B)
    return bounds


def start_of(manifest: Manifest, B: int, y_init: object, warm: Floats | None, bounds: Mapping[str, Floats]) -> Floats:
    """Where the solver starts, [B, n]: y_init, or the y of an earlier answer, or the centre of the domain."""
    if y_init is not None and warm is not None:
        raise InputError("y_init, warm: expected at most one of the two, but got both; leave one out.")
    if y_init is not None:
        return _inside(batch(y_init, "y_init", manifest.dtype, manifest.y_shape, length=B), manifest, bounds)
    centre = _centre(manifest, B, bounds)
    if warm is None:
        return centre
    Y = batch(warm, "warm", manifest.dtype, manifest.y_shape, length=B)
    Y = np.where(np.isnan(Y), centre, Y)
    return np.clip(Y, bounds["lower"], bounds["upper"]) if bounds else Y


def _centre(manifest: Manifest, B: int, bounds: Mapping[str, Floats]) -> Floats:
    assert manifest.domain is not None, "a solver has a domain"
    n, dtype = manifest.y_shape[0], np.dtype(manifest.dtype)
    if bounds:
        with np.errstate(invalid="ignore", over="ignore"):
            return np.asarray(bounds["lower"] + (bounds["upper"] - bounds["lower"]) / 2, dtype)
    at = {"unit_box": 0.5, "simplex": 1.0 / n, "space": 0.0}[manifest.domain.kind]
    return np.full((B, n), at, dtype)


def _inside(start: Floats, manifest: Manifest, bounds: Mapping[str, Floats]) -> Floats:
    """The start, which has to lie in the domain."""
    assert manifest.domain is not None, "a solver has a domain"
    if not len(start):
        return start
    kind = manifest.domain.kind
    low, high = {"box": (bounds.get("lower"), bounds.get("upper")), "space": (-np.inf, np.inf)}.get(kind, (0.0, 1.0))
    # NaN is outside. Samples whose bounds leave nothing are told by their status.
    inside = np.isfinite(start) & (start >= low) & (start <= high)
    if bounds:
        inside |= ~(bounds["lower"] <= bounds["upper"])
    if not inside.all():
        sample, entry = np.argwhere(~inside)[0]
        where = {"box": "numbers within the bounds", "space": "finite numbers"}.get(kind, "numbers in [0, 1]")
        raise InputError(
            f"y_init: expected {where}, but sample {sample} holds {start[sample, entry]}; clip it, or leave y_init out."
        )
    if kind == "simplex":
        off = np.abs(start.astype(np.float64).sum(1) - 1.0)
        if not off.max() <= start.shape[1] * np.sqrt(np.finfo(start.dtype).eps):
            raise InputError(
                f"y_init: expected rows of sum 1, but sample {int(off.argmax())} has {start[off.argmax()].sum()}; "
                "divide each row by its sum, or leave y_init out."
            )
    return start


def given_rows(B: int, n: int, **given: object) -> Polyhedron:
    """G, h, A, b, lower and upper, any of them None, as a polyhedron of B samples in float64.

    Each may be that of one sample, which then all share; bounds may be one number. Raises `InputError`.
    """
    arrays = {
        "lower": _rows("lower", -np.inf if given["lower"] is None else given["lower"], B, (n,), bound=True),
        "upper": _rows("upper", np.inf if given["upper"] is None else given["upper"], B, (n,), bound=True),
    }
    for left, right in (("G", "h"), ("A", "b")):
        M, v = given[left], given[right]
        if (M is None) != (v is None):
            raise InputError(f"{left}, {right}: expected both or neither, but got one of them.")
        matrix = _rows(left, np.zeros((0, n)) if M is None else M, B, (None, n))
        arrays |= {left: matrix, right: _rows(right, np.zeros(0) if v is None else v, B, matrix.shape[1:2])}
    return Polyhedron(**arrays)


def _rows(name: str, value: object, B: int, shape: tuple[int | None, ...], *, bound: bool = False) -> Array:
    """[B, *shape] in float64, from that, from [*shape] for all samples, or, of a bound, from one number."""
    try:
        if np.asarray(value).dtype.kind not in "fiub":  # of text numpy would make numbers
            raise TypeError("not of real numbers")
        array = np.array(value, np.float64)  # a copy: a solution keeps it, and callers write in theirs
        came = list(array.shape)  # before it is made to fit
    except Exception as error:  # an object may have an idea of its own of what it is as an array
        raise InputError(f"{name}: expected numbers, but got {type(value).__name__} ({error}).") from error
    if bound and array.ndim == 0:
        array = np.full((1, *(s or 0 for s in shape)), array)
    elif array.ndim == len(shape):
        array = array[None]
    if array.shape[:1] == (1,) != (B,):
        array = np.broadcast_to(array, (B, *array.shape[1:]))
    fits = array.ndim == len(shape) + 1 and array.shape[0] == B
    if not fits or any(s is not None and s != came for s, came in zip(shape, array.shape[1:], strict=True)):
        wanted = ", ".join("rows" if s is None else str(s) for s in shape)
        raise InputError(f"{name}: expected shape [{wanted}] or [{B}, {wanted}], but got {came}.")
    if np.isnan(array).any() or (not bound and name != "h" and np.isinf(array).any()):
        raise InputError(f"{name}: expected finite numbers, but it holds NaN or infinity; leave out what is no bound.")
    return array
