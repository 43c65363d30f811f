"""Contexts from files and answers into files: .npz, .npy and .csv, without pickle and with every size checked first.

A .csv holds one sample a row, its numbers in the order of the flattened shape, with at most one line of names above.
"""

import csv
import itertools
import json
import math
import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
from numpy.typing import NDArray

from icnnrt.arguments import check_shape, flag, names, refused
from icnnrt.arguments import path as path_of
from icnnrt.errors import InputError
from icnnrt.format.files import atomic_file
from icnnrt.format.folder import check_place
from icnnrt.printable import harmless, show
from icnnrt.serving.qp_session import QPNetworkSolution
from icnnrt.serving.solution import Solution

SUFFIXES: Final = (".npz", ".npy", ".csv")
MAX_BYTES: Final = 8 << 30  # of one array in memory; beyond it a machine swaps before anything is computed
MAX_TEXT_BYTES: Final = 1 << 30  # a Python number takes many times the bytes of its text
MAX_MEMBERS: Final = 1024  # of an .npz

Array = NDArray[Any]
StrPath = str | os.PathLike[str]


# --- Reading -------------------------------------------------------------------------------------


def read_array(path: StrPath, key: str, shape: tuple[int, ...]) -> Array:
    """Samples [N, *shape] from a .npz (the array `key`, or the only one), a .npy, or a .csv.

    Only a .csv is brought into shape, as it has none of its own; the others are returned as they are.
    Raises `InputError` with one sentence naming the file, what was expected, what came and the remedy.
    """
    path = _path(path)
    if not isinstance(shape, tuple) or not all(isinstance(size, int) and size >= 0 for size in shape):
        raise refused("shape", "that of a sample", show(shape))
    match _suffix(path, SUFFIXES):
        case ".csv":
            return _read_csv(path, key, shape)
        case ".npy":
            with _open(path) as file:
                return _read_npy(file, str(path), path.stat().st_size)
        case _:
            arrays = read_archive(path, (key,), only=True)
            return arrays[key]


def read_archive(
    path: StrPath, keys: Sequence[str], *, only: bool = False, also: Mapping[str, str] | None = None
) -> dict[str, Array]:
    """The arrays `keys` of a .npz; with `only`, a single array of any other name stands for the first key.

    `also` gives a second name that a key's array may have; one that bears the key itself is preferred.
    """
    path = _path(path)
    keys = names(keys, "keys", "names of arrays")
    if not keys or not isinstance(also, Mapping | None):
        raise refused("keys, also", "names of arrays", f"{show(keys)} and {show(also)}")
    only = flag(only, "only")
    _suffix(path, (".npz",))
    with _open(path) as file:
        try:
            archive = zipfile.ZipFile(file)
        except Exception as error:
            file.seek(0)
            # It begins as an archive does, and the list of its arrays stands at the end.
            if isinstance(error, zipfile.BadZipFile) and file.read(2) == b"PK":
                came = "one whose end is missing or damaged, so it is perhaps truncated"
                raise refused(str(path), "a whole .npz archive", came, "copy or save it again") from error
            came = f"something else ({error})"
            raise refused(str(path), "a .npz archive", came, "save it again") from harmless(error)
        with archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()[:MAX_MEMBERS]}
            if only and keys[0] not in members and len(members) == 1:
                members = {keys[0]: next(iter(members.values()))}
            for key, other in (also or {}).items():
                if key not in members and other in members:
                    members[key] = members[other]
            missing = [key for key in keys if key not in members]
            if missing:
                named = ", ".join(map(repr, itertools.islice(members, 5))) or "none"
                remedy = f"save it with np.savez({path.name!r}, {missing[0]}=...)"
                raise refused(str(path), f"an array named {missing[0]!r}", f"the arrays {named}", remedy)
            arrays = {}
            for key in keys:
                try:
                    with archive.open(members[key]) as stream:
                        arrays[key] = _read_npy(stream, f"{path}: {key}", members[key].file_size)
                except (InputError, MemoryError):
                    raise
                except Exception as error:  # zipfile and what it decompresses with raise many, and share no parent
                    raise InputError(f"{path}: {key} cannot be read ({error}); save it again.") from harmless(error)
            return arrays


def _read_npy(stream: IO[bytes], where: str, size: int) -> Array:
    """One .npy of `size` bytes. The header is held against that size before anything is allocated."""
    try:
        version = np.lib.format.read_magic(stream)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in read_header:
            raise refused(where, ".npy version 1.0 or 2.0", version, "save a plain array")
        shape, fortran, dtype = read_header[version](stream)
        if dtype.hasobject:
            came = "pickled Python objects, which are never loaded"
            raise refused(where, "numbers", came, "save it with a numeric dtype")
        if dtype.kind not in "fiub":
            raise refused(where, "real numbers", f"dtype {dtype}", "convert it to float first")
        count = math.prod(shape)
        if count * dtype.itemsize > min(size, MAX_BYTES):
            raise InputError(
                f"{where}: its header promises {count * dtype.itemsize} bytes, but at most {min(size, MAX_BYTES)} can "
                "be there; save the file again, or split it."
            )
        data = stream.read(count * dtype.itemsize)
        if len(data) < count * dtype.itemsize:
            raise InputError(f"{where}: the file is truncated; save it again.")
        return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")
    except (InputError, MemoryError):
        raise
    except Exception as error:  # the header is parsed as Python
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise refused(where, "a .npy array", f"something else ({reason})", "save it again") from harmless(error)


def _read_csv(path: Path, key: str, shape: tuple[int, ...]) -> Array:
    if path.exists() and path.stat().st_size > MAX_TEXT_BYTES:
        expected = f"at most {MAX_TEXT_BYTES} bytes of text"
        raise refused(str(path), expected, path.stat().st_size, "save the numbers as .npy")
    width = math.prod(shape)
    rows: list[list[float]] = []
    with _open(path) as file:
        try:
            lines = csv.reader(file.read().decode("utf-8-sig").splitlines(), skipinitialspace=True)
            for line in lines:
                cells = [cell.strip() for cell in line]
                if not any(cells):
                    continue
                numbers = [_number(cell) for cell in cells]
                if not rows and lines.line_num == 1 and all(number is None for number in numbers):
                    continue  # the line of names; one with a number in it is a sample with a mistake in it
                if None in numbers:
                    at = numbers.index(None)
                    expected = f"a number in line {lines.line_num}, column {at + 1}"
                    remedy = "separate numbers by commas and write a missing one as nan"
                    raise refused(str(path), expected, repr(cells[at][:40]), remedy)
                if len(numbers) != width:
                    expected = f"{width} numbers a line, {key} of shape {list(shape)} flattened"
                    came, remedy = f"{len(numbers)} in line {lines.line_num}", "write one whole sample on every line"
                    raise refused(str(path), expected, came, remedy)
                rows.append([number for number in numbers if number is not None])
        except (UnicodeDecodeError, csv.Error) as error:
            raise refused(str(path), "UTF-8 text", f"something else ({error})", "save it again") from error
    if not rows:
        raise refused(str(path), "at least one line of numbers", "none", "write one sample a line")
    return np.array(rows, np.float64).reshape(-1, *shape)


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None


def _path(path: object) -> Path:
    given = path_of(path, "path")
    if "\0" in str(given):
        raise refused("path", "the name of a file", show(path))
    return given


def _suffix(path: Path, allowed: Sequence[str]) -> str:
    suffix = path.suffix.lower()
    if suffix not in allowed:
        *most, last = allowed
        expected = f"{', '.join(most)} or {last}" if most else last
        came = repr(path.suffix) if path.suffix else "a name without an ending"
        example = f"{path.stem or 'x'}{allowed[0]}"
        remedy = f"the ending tells the format, so use one of these, such as {example}"
        raise refused(str(path), f"a file name ending in {expected}", came, remedy)
    return suffix


@contextmanager
def _open(path: Path) -> Iterator[IO[bytes]]:
    try:
        if path.is_dir():
            raise InputError(f"{path}: expected a file, but it is a folder.")
        with open(path, "rb") as file:
            yield file
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}).") from error


# --- Writing -------------------------------------------------------------------------------------


def check_result(path: Path, *, source: Path | None = None, allowed: Sequence[str] = SUFFIXES) -> str:
    """The suffix of a file that results can be written to; told before the work, not after it."""
    suffix = _suffix(path, allowed)
    if path.is_dir():
        raise InputError(f"{path}: expected a file to write, but it is a folder.")
    check_place(path, "out")
    if source is not None and path.exists() and source.exists() and path.samefile(source):
        raise InputError(f"{path}: is the input file itself; choose another name for the result.")
    return suffix


def check_size(samples: int, iterations: int, n: int, dtype: np.dtype[Any], suffix: str) -> None:
    """Refuse what cannot be held in memory at once: a .npz holds K cuts of every sample."""
    numbers = 2 * iterations * n + iterations * (iterations + 4) + n + 8 if suffix == ".npz" else n
    if samples * numbers * dtype.itemsize > MAX_BYTES:
        raise InputError(
            f"out: {samples} samples of {numbers} numbers each are more than {MAX_BYTES >> 30} GiB; "
            f"{'write .npy or .csv, which hold y alone, or ' if suffix == '.npz' else ''}split the input."
        )


def write_answers(path: Path, y: Array, parts: Sequence[Solution], info: Mapping[str, Any]) -> None:
    """Write y (z of quadratic programs) to a .npy or .csv, or every field of the answers, one after the other, to a
    .npz; atomically."""
    with atomic_file(path) as file:
        match path.suffix.lower():
            case ".npy":
                np.save(file, y, allow_pickle=False)
            case ".csv":
                # Enough digits to read the very same numbers back.
                digits = "%.9g" if y.dtype == np.float32 else "%.17g"
                letter = "z" if isinstance(parts[0], QPNetworkSolution) else "y"
                names = ",".join(f"{letter}{j}" for j in range(y.shape[1]))
                np.savetxt(file, y, fmt=digits, delimiter=",", header=names, comments="")
            case _:
                np.savez(file, allow_pickle=False, **_columns(parts, info))


def _columns(parts: Sequence[Solution], info: Mapping[str, Any]) -> dict[str, Array]:
    names = [field.name for field in fields(parts[0]) if isinstance(getattr(parts[0], field.name), np.ndarray)]
    columns: dict[str, Array] = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    columns["info"] = np.array(json.dumps(dict(info), default=str))
    columns["weights_id"] = np.array(parts[0].weights_id)
    return columns


def bound(given: str, name: str, y_shape: tuple[int, ...], samples: int) -> Any:
    """Bounds of y as a command is given them: one number, or the rows of a file."""
    try:
        return float(given)
    except ValueError:
        array = read_array(Path(given), name, y_shape)
        check_shape(array.shape, name, y_shape, length=samples, where=given)
        return array
