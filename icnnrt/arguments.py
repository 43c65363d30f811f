"""Arguments that users hand over, made into arrays of the package's dtype or refused with one sentence."""

import math
import operator
from collections.abc import Collection, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import DTypeLike, NDArray

from icnnrt.errors import InputError, SampleError
from icnnrt.printable import show

Floats = NDArray[Any]
# Bytes of an array that is copied in any case; a larger one may be used as it is, and nobody keeps it then.
COPIED: Final = 1 << 20


def batch(
    value: object,
    name: str,
    dtype: DTypeLike,
    shape: tuple[int, ...],
    *,
    length: int | None = None,
    copy: bool = True,
) -> Floats:
    """Return a new C-ordered array [B, *shape] of `dtype`; `length` is the B it must have, if that is known.

    Without `copy`, for use within one call, a large array that is so already is returned itself.

    Every float dtype is taken, rounded to `dtype` where that is narrower (Python lists are float64, and so is most
    data); what it cannot hold becomes infinity, which callers test for. Integers and booleans are taken where they
    convert exactly. Raises `InputError` naming the argument, what was expected, what came and the remedy.
    """
    dtype = np.dtype(dtype)
    given = converted(value, name)
    if given.dtype.kind not in "fiub":
        raise InputError(
            f"{name}: expected real numbers, but got dtype {given.dtype} from {type(value).__name__}; "
            f"convert it to {dtype} first."
        )
    if masked := _masked(value):
        raise InputError(
            f"{name}: expected numbers without a mask, but got {masked} masked of {given.size}; fill them in with "
            "numpy.ma.filled."
        )
    check_shape(given.shape, name, shape, length=length)
    if not copy and given.nbytes > COPIED and given.dtype == dtype and given.flags.c_contiguous and given.flags.aligned:
        return given
    with np.errstate(over="ignore"):
        array = np.array(given, dtype=dtype, order="C", copy=True)
    if given.dtype.kind in "iu" and not _exact(given, array):
        raise InputError(
            f"{name}: expected numbers that {dtype} holds exactly, but got {given.dtype} values up to "
            f"{np.abs(given.astype(np.float64)).max():.3e}; convert to {dtype} yourself if rounding them is meant."
        )
    return array


def converted(value: object, name: str) -> NDArray[Any]:
    """What numpy makes of it, or the `InputError`."""
    try:
        return np.asarray(value)
    except Exception as error:
        # Ragged lists, tensors on another device or with a gradient, objects with their own idea of __array__.
        raise InputError(
            f"{name}: expected an array, but {type(value).__name__} does not convert to one ({error}); "
            "pass a numpy array."
        ) from error


def flag(value: object, name: str) -> bool:
    """True or False, or the `InputError`."""
    if not isinstance(value, bool | np.bool_):
        raise InputError(f"{name}: expected True or False, but got {show(value)}.")
    return bool(value)


def choice(value: object, name: str, allowed: Sequence[str]) -> str:
    """One of these texts, or the `InputError`."""
    if not isinstance(value, str) or value not in allowed:
        came = repr(value) if isinstance(value, str) else show(value)
        raise InputError(f"{name}: expected {' or '.join(map(repr, allowed))}, but got {came}.")
    return value


def sample(i: object, samples: int) -> int:
    """The index of a sample, counted from the end where it is negative, or the `SampleError`."""
    try:
        at = operator.index(i)  # type: ignore[arg-type]
    except Exception as error:
        raise SampleError(f"sample: expected the number of a sample, but got {show(i)}.") from error
    if not -samples <= at < samples:
        given = f"give 0..{samples - 1}" if samples else "there is none to give"
        raise SampleError(f"sample {show(at)} of {samples} samples; {given}")
    return at % samples


def rows(index: Any, samples: int) -> Any:
    """An index of samples, so that the batch dimension stays: an integer, a slice, a mask or integers."""
    if isinstance(index, slice):
        return index
    if not isinstance(index, list) and not (isinstance(index, np.ndarray) and index.ndim):
        return [sample(index, samples)]
    chosen = converted(index, "index")
    mask = chosen.dtype == bool and chosen.shape == (samples,)
    inside = chosen.dtype.kind in "iu" and chosen.ndim == 1 and ((-samples <= chosen) & (chosen < samples)).all()
    if not (mask or inside or chosen.shape == (0,)):
        raise SampleError(
            f"index: expected integers below {samples}, or a mask of as many entries, but got {chosen.dtype} of shape "
            f"{list(chosen.shape)}, or some that are beyond."
        )
    return chosen if mask else chosen.astype(np.int64)


def _masked(value: object) -> int:
    """How many entries are masked, in a masked array or a list of them: numpy.asarray would unmask them."""
    rows = value if isinstance(value, list | tuple) else (value,)
    return sum(np.ma.count_masked(row) for row in rows if isinstance(row, np.ma.MaskedArray))


def _exact(integers: NDArray[Any], array: Floats) -> bool:
    if integers.dtype.itemsize * 8 <= np.finfo(array.dtype).nmant:
        return True
    # An integer that rounds up to 2^63 has no way back: such are not exact either, or not worth taking.
    with np.errstate(invalid="ignore"):
        return bool((np.abs(array) <= 2.0**62).all() and (array.astype(integers.dtype) == integers).all())


def check_shape(
    came: tuple[int, ...], name: str, shape: tuple[int, ...], *, length: int | None = None, where: str = ""
) -> None:
    """Refuse what is not [B, *shape] with B = `length`, if that is known; `where` is the file it was read from."""
    if came and came[1:] == shape and length in (None, came[0]):
        return
    expected = ", ".join(["B" if length is None else str(length), *map(str, shape)])
    if came == shape:
        remedy = f"a single sample needs a batch dimension too, so pass {name}[None]"
    elif len(came) == len(shape) + 1 and came[1:] == shape:
        remedy = "it needs one row for every sample"
    else:
        remedy = "the shape of a sample is fixed by the package"
    place = f"{where}: {name}" if where else name
    raise InputError(f"{place}: expected shape [{expected}], but got {list(came)}; {remedy}.")


def writeable(out: object, name: str, dtype: DTypeLike, shape: tuple[int, ...], inputs: Sequence[object]) -> Floats:
    """`out` itself, an array that a result of this dtype and shape may be written to, or the `InputError`.

    It may share no memory with the `inputs`, which are read while it is written.
    """
    dtype = np.dtype(dtype)
    if not isinstance(out, np.ndarray) or isinstance(out, np.ma.MaskedArray):
        raise InputError(f"{name}: expected a numpy array to write to, but got {type(out).__name__}.")
    if out.dtype != dtype or out.shape != shape:
        raise InputError(
            f"{name}: expected an array of {dtype}{list(shape)} to write to, but got {out.dtype}{list(out.shape)}; "
            f"make one by numpy.empty({shape}, {dtype.name!r})."
        )
    if not out.flags.c_contiguous or not out.flags.writeable:
        kind = "a C-contiguous" if not out.flags.c_contiguous else "a writeable"
        raise InputError(f"{name}: expected {kind} array to write to, but got another; make one by numpy.empty.")
    for array in inputs:
        if isinstance(array, np.ndarray) and np.may_share_memory(out, array) and np.shares_memory(out, array):
            raise InputError(f"{name}: expected an array of its own, but it shares memory with an argument; copy one.")
    return out


def finite_in_all(arrays: Collection[Floats]) -> NDArray[np.bool_] | None:
    """[B] bool: which samples hold finite numbers only in every array; None where all do, which is told sooner."""
    if all(np.isfinite(array).all() for array in arrays):
        return None
    return np.asarray(np.logical_and.reduce([finite_rows(array) for array in arrays]))


def finite_rows(array: Floats) -> NDArray[np.bool_]:
    """[B] bool: which samples hold finite numbers only."""
    return np.asarray(np.isfinite(array).all(axis=tuple(range(1, array.ndim))))


def integer(value: object, name: str, least: int, most: int | None = None, *, expected: str = "") -> int:
    """An integer from `least` to `most` as Python's own, or the `InputError`; `expected` says it in other words.

    Scalars of numpy, and arrays without axes of it or of another library, are integers where their dtype is; floats
    are none, whatever their value, and neither are booleans.
    """
    given = alone(value)
    try:
        found = None if isinstance(given, float) else operator.index(given)  # type: ignore[arg-type]
    except TypeError:
        found = None
    if found is None or found < least or (most is not None and found > most):
        usual = f"an integer of at least {least}" if most is None else f"an integer from {least} to {most}"
        raise InputError(f"{name}: expected {expected or usual}, but got {show(value)}.")
    return found


def number(
    value: object,
    name: str,
    *,
    least: float = -math.inf,
    above: float = -math.inf,
    finite: bool = True,
    expected: str = "",
) -> float:
    """A number of at least `least` and above `above` as a float, or the `InputError`; NaN is none.

    Numbers are what `integer` takes, and floats of every kind; infinity only where it need not be finite. `expected`
    says it in other words.
    """
    given = alone(value)
    found = math.nan
    if isinstance(given, int | float):
        try:
            found = float(given)
        except OverflowError:  # an integer beyond every float
            found = math.inf if given > 0 else -math.inf
    # Written so that NaN is refused.
    if not (found >= least and (found > above or above == -math.inf)) or (finite and math.isinf(found)):
        bound = f" of at least {least:g}" if least > -math.inf else f" above {above:g}" if above > -math.inf else ""
        usual = f"a {'finite ' * finite}number{bound}"
        raise InputError(f"{name}: expected {expected or usual}, but got {show(value)}.")
    return found


def alone(value: object) -> object:
    """A Python number in place of a scalar, or of an array without axes; None for what is no number."""
    if isinstance(value, int | float):
        return None if isinstance(value, bool) else value
    if np.ma.is_masked(value):
        return None
    try:
        array = np.asarray(value)
    except Exception:  # ragged lists, tensors on another device: as in `batch`
        return None
    if array.ndim or array.dtype.kind not in "iuf":
        return None
    return float(array) if array.dtype.kind == "f" else int(array)


def check_finite_bar(y_bar: Floats, skipped: NDArray[np.bool_]) -> None:
    """Refuse a cotangent y_bar with NaN or infinity in a sample that is not skipped."""
    bad = ~finite_rows(y_bar) & ~skipped
    if bad.any():
        raise InputError(
            f"y_bar: expected finite numbers, but sample {int(np.argmax(bad))} holds NaN or infinity; "
            "the loss diverged there, so leave the sample out."
        )
