"""Arguments that users hand over: made into what a function works with, or refused with one sentence.

Such sentences have one grammar, and `refused` makes them::

    NAME: expected WHAT WAS, but got WHAT CAME; REMEDY.

Checks that only one place needs stand there, and raise `refused` too. Where not an argument is wrong but what goes with
it, as a folder that is not there or weights that have changed since, the sentence is another, and stands where it is
told. Nothing here knows torch: what has a shape is a tensor as well as an array.
"""

import math
import operator
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar, overload

import numpy as np
from numpy.typing import DTypeLike, NDArray

from icnnrt.errors import IcnnrtError, InputError, SampleError
from icnnrt.printable import cropped, show

Floats = NDArray[Any]
T = TypeVar("T")
E = TypeVar("E", bound=IcnnrtError)
# Bytes of an array that is copied in any case; a larger one may be used as it is, and nobody keeps it then.
COPIED: Final = 1 << 20
GIVE_ONE: Final = "give one"  # the remedy where all is said


@overload
def refused(name: str, expected: str, came: object, remedy: str = ...) -> InputError: ...
@overload
def refused(name: str, expected: str, came: object, remedy: str = ..., *, kind: type[E]) -> E: ...
def refused(
    name: str, expected: str, came: object, remedy: str = GIVE_ONE, *, kind: type[IcnnrtError] = InputError
) -> IcnnrtError:
    """The error of an argument that is not what was `expected`: `came` is text on it, such as what it is `shown` as."""
    return kind(f"{name}: expected {expected}, but got {came}; {remedy}.")


def shown(value: object) -> str:
    """What came, in few words: a number, text or nothing as it is, the shape of what has one, else the type."""
    if value is None or isinstance(value, str | int | float | complex | np.generic):
        return show(value)
    try:
        return f"shape {list(value.shape)}"  # type: ignore[attr-defined]
    except Exception:  # without one, or an object with an idea of its own of it
        return type(value).__name__


def instance(value: object, name: str, kind: type[T], expected: str, remedy: str = GIVE_ONE) -> T:
    """The value itself, of the type `kind`, or the `InputError`."""
    if not isinstance(value, kind):
        raise refused(name, expected, type(value).__name__, remedy)
    return value


def path(value: object, name: str) -> Path:
    """The path of a file or folder, as it was given, or the `InputError`."""
    try:
        given = os.fspath(value)  # type: ignore[call-overload]
    except Exception:
        given = None
    if not isinstance(given, str):
        raise refused(name, "a path, text or a pathlib.Path", shown(value), "see pathlib")
    return Path(given)


def names(value: object, name: str, of: str, remedy: str = "give a list of text") -> tuple[str, ...]:
    """A list, or another collection, of text: no text itself; or the `InputError`."""
    try:
        found = tuple(value) if isinstance(value, Collection) and not isinstance(value, str) else (None,)
    except Exception:  # an array without axes is a collection that cannot be iterated over
        found = (None,)
    if not all(isinstance(one, str) for one in found):
        raise refused(name, f"a list of {of}", show(value), remedy)
    return found


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
    given = reals(value, name, dtype)
    check_shape(given.shape, name, shape, length=length)
    if not copy and given.nbytes > COPIED and given.dtype == dtype and given.flags.c_contiguous and given.flags.aligned:
        return given
    return _rounded(given, name, dtype)


def whole_as_floats(given: NDArray[Any], name: str, dtype: DTypeLike) -> NDArray[Any]:
    """Integers as floats of `dtype`, or the `InputError` where it cannot hold them; anything else as it is."""
    return _rounded(given, name, np.dtype(dtype)) if given.dtype.kind in "iu" else given


def _rounded(given: NDArray[Any], name: str, dtype: np.dtype[Any]) -> Floats:
    with np.errstate(over="ignore"):
        array = np.array(given, dtype=dtype, order="C", copy=True)
    if given.dtype.kind in "iu" and not _exact(given, array):
        most = np.abs(given.astype(np.float64)).max()
        came, remedy = (
            f"{given.dtype} values up to {most:.3e}",
            f"convert to {dtype} yourself if rounding them is meant",
        )
        raise refused(name, f"numbers that {dtype} holds exactly", came, remedy)
    return array


def reals(value: object, name: str, dtype: DTypeLike) -> NDArray[Any]:
    """What numpy makes of it where that is real numbers without a mask, or the `InputError`, which advises `dtype`."""
    given = converted(value, name)
    if given.dtype.kind not in "fiub":
        came = f"dtype {given.dtype} from {type(value).__name__}"
        raise refused(name, "real numbers", came, f"convert it to {np.dtype(dtype)} first")
    if masked := _masked(value):
        came = f"{masked} masked of {given.size}"
        raise refused(name, "numbers without a mask", came, "fill them in with numpy.ma.filled")
    return given


def converted(value: object, name: str) -> NDArray[Any]:
    """What numpy makes of it, or the `InputError`; of a sparse matrix of scipy it is the one with its zeros."""
    try:
        if type(value).__module__.startswith("scipy.sparse"):
            value = value.toarray()  # type: ignore[attr-defined]
        return np.asarray(value)
    except Exception as error:
        # Ragged lists, tensors on another device or with a gradient, objects with their own idea of __array__.
        came = f"{type(value).__name__}, which does not convert to one ({cropped(str(error), 80)})"
        raise refused(name, "an array", came, "pass a numpy array") from error


def flag(value: object, name: str) -> bool:
    """True or False, or the `InputError`."""
    if not isinstance(value, bool | np.bool_):
        raise refused(name, "True or False", shown(value))
    return bool(value)


def choice(
    value: object,
    name: str,
    allowed: Sequence[str],
    remedy: str = "give one of them",
    *,
    also: str = "",
    kind: type[IcnnrtError] = InputError,
) -> str:
    """One of these texts, or the error; `also` says what else would have been taken."""
    if not isinstance(value, str) or value not in allowed:
        *others, last = (*map(repr, allowed), *([also] if also else []))
        listed = f"{', '.join(others)} or {last}" if others else last
        came = cropped(repr(value), 80) if isinstance(value, str) else shown(value)
        raise refused(name, listed, came, remedy, kind=kind)
    return value


def sample(i: object, samples: int) -> int:
    """The index of a sample, counted from the end where it is negative, or the `SampleError`."""
    try:
        at = operator.index(i)  # type: ignore[arg-type]
    except Exception as error:
        raise refused("sample", "the number of a sample", show(i), "count from 0", kind=SampleError) from error
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
        expected = f"integers below {samples}, or a mask of as many entries"
        came = f"{chosen.dtype} of shape {list(chosen.shape)}, or some that are beyond"
        raise refused("index", expected, came, "count from 0", kind=SampleError)
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
    raise refused(f"{where}: {name}" if where else name, f"shape [{expected}]", list(came), remedy)


def writeable(out: object, name: str, dtype: DTypeLike, shape: tuple[int, ...], inputs: Sequence[object]) -> Floats:
    """`out` itself, an array that a result of this dtype and shape may be written to, or the `InputError`.

    It may share no memory with the `inputs`, which are read while it is written.
    """
    dtype = np.dtype(dtype)
    if not isinstance(out, np.ndarray) or isinstance(out, np.ma.MaskedArray):
        raise refused(name, "a numpy array to write to", type(out).__name__, "make one by numpy.empty")
    if out.dtype != dtype or out.shape != shape:
        wanted, came = f"an array of {dtype}{list(shape)} to write to", f"{out.dtype}{list(out.shape)}"
        raise refused(name, wanted, came, f"make one by numpy.empty({shape}, {dtype.name!r})")
    if not out.flags.c_contiguous or not out.flags.writeable:
        kind = "a C-contiguous" if not out.flags.c_contiguous else "a writeable"
        raise refused(name, f"{kind} array to write to", "another", "make one by numpy.empty")
    for array in inputs:
        if isinstance(array, np.ndarray) and np.may_share_memory(out, array) and np.shares_memory(out, array):
            raise refused(name, "an array of its own", "one that shares memory with an argument", "copy it")
    return out


def finite_in_all(arrays: Collection[Floats]) -> NDArray[np.bool_] | None:
    """[B] bool: which samples hold finite numbers only in every array; None where all do, which is told sooner."""
    if all(np.isfinite(array).all() for array in arrays):
        return None
    return np.asarray(np.logical_and.reduce([finite_rows(array) for array in arrays]))


def finite_rows(array: Floats) -> NDArray[np.bool_]:
    """[B] bool: which samples hold finite numbers only."""
    return np.asarray(np.isfinite(array).all(axis=tuple(range(1, array.ndim))))


def integer(
    value: object,
    name: str,
    least: int,
    most: int | None = None,
    *,
    expected: str = "",
    remedy: str = GIVE_ONE,
    kind: type[IcnnrtError] = InputError,
) -> int:
    """An integer from `least` to `most` as Python's own, or the error; `expected` says it in other words.

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
        raise refused(name, expected or usual, show(value), remedy, kind=kind)
    return found


def number(
    value: object,
    name: str,
    *,
    least: float = -math.inf,
    above: float = -math.inf,
    below: float = math.inf,
    finite: bool = True,
    expected: str = "",
    remedy: str = GIVE_ONE,
    kind: type[IcnnrtError] = InputError,
) -> float:
    """A number of at least `least`, above `above` and below `below` as a float, or the `InputError`; NaN is none.

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
    inside = found >= least and (found > above or above == -math.inf) and (found < below or below == math.inf)
    if not inside or (finite and math.isinf(found)):
        bound = f" of at least {least:g}" if least > -math.inf else f" above {above:g}" if above > -math.inf else ""
        bound += f"{' and' * bool(bound)} below {below:g}" if below < math.inf else ""
        usual = f"a {'finite ' * finite}number{bound}"
        raise refused(name, expected or usual, show(value), remedy, kind=kind)
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
        came = f"NaN or infinity in sample {int(np.argmax(bad))}"
        raise refused("y_bar", "finite numbers", came, "the loss diverged there, so leave the sample out")
