"""Linear and convex quadratic programs out of MPS files, fixed or free, and their quadratic kin (QPS).

    program = read_program("AFIRO.mps").program
    solution = icnnrt.qp(**program.dense())

    min over z of  ½ z'Qz + p'z + constant   s.t.  h_lower <= Gz <= h,   Az = b,   lower <= z <= upper

Sections: NAME, OBJSENSE, ROWS, COLUMNS, RHS, RANGES, BOUNDS, QUADOBJ or QSECTION (one triangle of Q), QMATRIX (both),
ENDATA. Fields are separated by blanks, so that names hold none. What the format leaves open is read as CPLEX and HiGHS
do: rows of kind N after the first are dropped; the right-hand side of the objective is −constant; an upper bound below
0 takes the lower bound 0 away if the file gives none; a range of an equality opens it upwards or, where it is negative,
downwards; a variable without entries may be met first in BOUNDS or Q. Bounds of 1e20 and beyond are none.

Source: IBM, *MPS file format: industry standard*; Maros, Meszaros, *A repository of convex quadratic programming
problems*, Optimization Methods and Software 11, 1999, of QUADOBJ.
"""

import os
import re
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from icnnrt import arguments
from icnnrt.arguments import refused
from icnnrt.errors import InputError
from icnnrt.mathematics.interior_point import BOUND_MAX
from icnnrt.printable import show
from icnnrt.programs.program import Coo, Program

SUFFIXES: Final = (".mps", ".qps")
LARGEST: Final = 1 << 28  # bytes of a file; a Python number takes many times the bytes of its text
FIELD: Final = re.compile(r"\S+")
NUMBER: Final = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eEdD][+-]?\d+)?|[+-]?[iI]nf(inity)?")
INTEGER: Final = frozenset(("BV", "LI", "UI", "SC"))
DECIMAL: Final = str.maketrans("dD", "ee")  # Fortran's exponents
ORDER: Final = ("ROWS", "COLUMNS", "RHS", "RANGES", "BOUNDS", "QUADOBJ", "QSECTION", "QMATRIX")


class ProgramFile(NamedTuple):
    """What a file holds: the program, and the names that it has in it."""

    program: Program
    name: str
    rows: tuple[str, ...]  # of G
    equalities: tuple[str, ...]  # of A
    maximise: bool  # the file asks for the maximum of −(½ z'Qz + p'z + constant)


class _Field(NamedTuple):
    text: str
    column: int  # from 1


def read_program(path: str | os.PathLike[str]) -> ProgramFile:
    """The program of a .mps or .qps; of a maximum its negative, to be minimised.

    Raises `InputError` naming the file, the line and the column for what is no such program, or one with integers, and
    for a file of more than 256 MiB.
    """
    place = arguments.path(path, "path")
    if place.suffix.lower() not in SUFFIXES:
        expected = f"a file name ending in {' or '.join(SUFFIXES)}"
        raise refused(str(place), expected, show(place.suffix), "the ending tells the format")
    try:
        with open(place, "rb") as file:
            data = file.read(LARGEST + 1)
    except OSError as error:
        raise InputError(f"{place}: cannot be read ({error.strerror or error}).") from error
    if len(data) > LARGEST:
        raise refused(str(place), f"at most {LARGEST >> 20} MiB", "more", "take a solver of sparse programs")
    return _Reader(str(place)).read(data.decode("utf-8", "surrogateescape"))


class _Reader:
    """The state of one file as its lines go by."""

    def __init__(self, place: str) -> None:
        self.place, self.line = place, 0
        self.name, self.maximise = "", False
        self.objective: str | None = None
        self.kinds: dict[str, str] = {}  # of rows: L, G, E, or N of those to be dropped
        self.columns: dict[str, int] = {}
        self.entries: dict[tuple[str, int], float] = {}  # by row and column
        self.right: dict[str, float] = {}
        self.ranges: dict[str, float] = {}
        self.lower: dict[int, float] = {}
        self.upper: dict[int, float] = {}
        self.square: dict[tuple[int, int], float] = {}
        self.triangle = True
        self.vector: dict[str, str] = {}  # by section: the name of the only right-hand side, ranges and bounds

    def read(self, text: str) -> ProgramFile:
        sections: dict[str, Callable[[list[_Field]], None]] = {
            "NAME": self._nothing,
            "OBJSENSE": self._sense,
            "ROWS": self._row,
            "COLUMNS": self._column,
            "RHS": lambda fields: self._pairs("RHS", fields, self.right, self.objective),
            "RANGES": lambda fields: self._pairs("RANGES", fields, self.ranges, None),
            "BOUNDS": self._bound,
            **dict.fromkeys(("QUADOBJ", "QSECTION", "QMATRIX"), self._quadratic),
        }
        section, seen = "", list[str]()
        for fields, starts in self._lines(text):
            word = fields[0].text.upper()
            if starts and (word in sections or word == "ENDATA"):
                section = word
                if word == "ENDATA":
                    break
                self._in_order(fields[0], word, seen)
                if word == "NAME":
                    self.name = " ".join(field.text for field in fields[1:])
                elif word == "OBJSENSE" and len(fields) > 1:
                    self._sense(fields[1:])
                self.triangle = word != "QMATRIX"
            elif not section or (starts and section != "OBJSENSE"):
                self._refuse(fields[0], f"a section such as {', '.join(sections)}", remedy="data lines are indented")
            else:
                sections[section](fields)
        if section != "ENDATA":
            self.line += 1
            self._refuse(_Field("", 1), "ENDATA", "the end of the file", "it is perhaps truncated; copy it again")
        return self._finished()

    def _lines(self, text: str) -> Iterator[tuple[list[_Field], bool]]:
        """The fields of each line that has any, and whether the line is not indented."""
        for line in text.split("\n"):
            self.line += 1
            if line[:1] != "*" and (fields := [_Field(m.group(), m.start() + 1) for m in FIELD.finditer(line)]):
                yield fields, not line[0].isspace()

    def _in_order(self, field: _Field, word: str, seen: list[str]) -> None:
        if word in seen or (word[0] == "Q" and any(other[0] == "Q" for other in seen)):
            self._refuse(field, "each section once, and one of Q", remedy="keep one of them")
        needed = "ROWS" if word == "COLUMNS" else "COLUMNS" if word in ORDER[2:] else None
        if needed and needed not in seen:
            self._refuse(field, f"{needed} before {word}", remedy=f"move {needed} up")
        seen.append(word)

    # --- Sections ----------------------------------------------------------------------------------------------------

    def _nothing(self, fields: list[_Field]) -> None:
        self._refuse(fields[0], "ROWS after NAME")

    def _sense(self, fields: list[_Field]) -> None:
        word = fields[0].text.upper()
        if word not in ("MIN", "MAX", "MINIMIZE", "MAXIMIZE"):
            self._refuse(fields[0], "MIN or MAX")
        self.maximise = word.startswith("MAX")

    def _row(self, fields: list[_Field]) -> None:
        kind, name = self._count(fields, (2,), "the kind of a row and its name")
        if kind.text not in ("N", "L", "G", "E"):
            self._refuse(kind, "N, L, G or E")
        if name.text in self.kinds or name.text == self.objective:
            self._refuse(name, "each row once", remedy="give it another name")
        if kind.text == "N" and self.objective is None:
            self.objective = name.text
        else:
            self.kinds[name.text] = kind.text

    def _column(self, fields: list[_Field]) -> None:
        if len(fields) > 1 and fields[1].text.upper() == "'MARKER'":
            self._refuse(fields[1], "continuous variables", remedy="integers are not solved here")
        self._count(fields, (3, 5), "a variable, then a row and a number, once or twice")
        j = self._variable(fields[0])
        for row, number in zip(fields[1::2], fields[2::2], strict=True):
            if row.text not in self.kinds and row.text != self.objective:
                self._refuse(row, "a row of ROWS")
            if (row.text, j) in self.entries:
                self._refuse(row, "each entry once", remedy="add them up")
            self.entries[row.text, j] = self._number(number)

    def _pairs(self, section: str, fields: list[_Field], into: dict[str, float], also: str | None) -> None:
        """A name of the vector, which may be missing, then a row and a number, once or twice."""
        self._count(fields, (2, 3, 4, 5), f"a name of the {section}, then a row and a number, once or twice")
        first = len(fields) % 2
        if first:
            self._one_vector(section, fields[0])
        for row, number in zip(fields[first::2], fields[first + 1 :: 2], strict=True):
            if row.text not in self.kinds and row.text != also:
                self._refuse(row, "a row of ROWS")
            if row.text in into:
                self._refuse(row, "each row once", remedy="keep one of them")
            into[row.text] = self._number(number, finite=row.text == also)

    def _bound(self, fields: list[_Field]) -> None:
        kind = fields[0].text.upper()
        if kind in INTEGER:
            self._refuse(fields[0], "continuous variables", remedy="integers are not solved here")
        if kind not in ("LO", "UP", "FX", "FR", "MI", "PL"):
            self._refuse(fields[0], "LO, UP, FX, FR, MI or PL")
        with_number = kind in ("LO", "UP", "FX")
        counts = (3, 4) if with_number else (2, 3, 4)
        self._count(fields, counts, "a kind, the name of the bounds, a variable and, of LO, UP and FX, a number")
        numbers = fields[-1:] if with_number else fields[3:]  # some write one after FR, MI and PL too
        rest = fields[1 : len(fields) - len(numbers)]
        if len(rest) == 2:
            self._one_vector("BOUNDS", rest[0])
        j = self._variable(rest[-1])
        value = self._number(numbers[0], finite=False) if with_number else 0.0
        if kind == "UP" and value < 0 and j not in self.lower:
            self.lower[j] = -np.inf
        if kind in ("LO", "FX"):
            self.lower[j] = value
        if kind in ("UP", "FX"):
            self.upper[j] = value
        if kind in ("MI", "FR"):
            self.lower[j] = -np.inf
        if kind in ("PL", "FR"):
            self.upper[j] = np.inf

    def _quadratic(self, fields: list[_Field]) -> None:
        first, second, number = self._count(fields, (3,), "two variables and a number")
        i, j = self._variable(first), self._variable(second)
        value = self._number(number)
        if (i, j) in self.square or (self.triangle and i != j and (j, i) in self.square):
            self._refuse(first, "each entry of Q once", remedy="QMATRIX is for both triangles, QUADOBJ for one")
        self.square[i, j] = value

    # --- Fields ------------------------------------------------------------------------------------------------------

    def _count(self, fields: list[_Field], counts: tuple[int, ...], expected: str) -> list[_Field]:
        if len(fields) not in counts:
            here = fields[counts[0]] if len(fields) > counts[0] else fields[-1]
            self._refuse(here, expected, f"{len(fields)} fields", "names hold no blanks")
        return fields

    def _variable(self, field: _Field) -> int:
        return self.columns.setdefault(field.text, len(self.columns))

    def _one_vector(self, section: str, field: _Field) -> None:
        if self.vector.setdefault(section, field.text) != field.text:
            self._refuse(field, f"one vector in {section}", remedy="keep one of them")

    def _number(self, field: _Field, *, finite: bool = True) -> float:
        value = float(field.text.translate(DECIMAL)) if NUMBER.fullmatch(field.text) else np.nan
        if np.isnan(value) or (finite and np.isinf(value)):
            self._refuse(field, "a finite number" if finite else "a number")
        return value

    def _refuse(
        self, field: _Field, expected: str, came: object = None, remedy: str = "see the MPS format"
    ) -> NoReturn:
        where = f"{self.place}, line {self.line}, column {field.column}"
        raise refused(where, expected, show(field.text) if came is None else came, remedy)

    # --- The program -------------------------------------------------------------------------------------------------

    def _finished(self) -> ProgramFile:
        equal = {row for row, kind in self.kinds.items() if kind == "E" and row not in self.ranges}
        rows = [row for row, kind in self.kinds.items() if kind != "N" and row not in equal]
        equalities = [row for row in self.kinds if row in equal]
        n, sides = len(self.columns), [self._sides(row) for row in rows]
        if not n:
            raise refused(self.place, "a program with a variable", "none", "see the section COLUMNS")
        objective = np.zeros(n)
        for (row, j), value in self.entries.items():
            if row == self.objective:
                objective[j] = value
        sign = -1.0 if self.maximise else 1.0
        lower, upper = np.zeros(n), np.full(n, np.inf)
        lower[list(self.lower)], upper[list(self.upper)] = list(self.lower.values()), list(self.upper.values())
        constant = -self.right.get(self.objective or "", 0.0)
        program = Program(
            Q=self._square(n, sign),
            p=sign * objective,
            G=self._matrix(rows, n),
            h=_open(np.array([high for _, high in sides])),
            A=self._matrix(equalities, n),
            b=np.array([self.right.get(row, 0.0) for row in equalities]),
            lower=_open(lower),
            upper=_open(upper),
            constant=sign * constant,
            variables=tuple(self.columns),
            h_lower=_open(np.array([low for low, _ in sides])),
        )
        if not np.isfinite(program.b).all():
            raise refused(self.place, "finite right-hand sides of equalities", "an infinite one", "see RHS")
        return ProgramFile(program, self.name, tuple(rows), tuple(equalities), self.maximise)

    def _sides(self, row: str) -> tuple[float, float]:
        """h_lower and h of a row that is no equality."""
        right, kind = self.right.get(row, 0.0), self.kinds[row]
        width = self.ranges.get(row, np.inf)
        if kind == "E":
            return (right, right + width) if width >= 0 else (right + width, right)
        return (right - abs(width), right) if kind == "L" else (right, right + abs(width))

    def _matrix(self, rows: list[str], n: int) -> Coo:
        at = {row: i for i, row in enumerate(rows)}
        triplets = [(at[row], j, value) for (row, j), value in self.entries.items() if row in at]
        return _coo(triplets, (len(rows), n))

    def _square(self, n: int, sign: float) -> Coo:
        triplets = [(i, j, sign * value) for (i, j), value in self.square.items()]
        if self.triangle:
            triplets += [(j, i, value) for i, j, value in triplets if i != j]
        elif wrong := next((at for at, value in self.square.items() if self.square.get(at[::-1]) != value), None):
            names = tuple(self.columns)
            came = f"another entry at {show(names[wrong[1]])}, {show(names[wrong[0]])} than at the transpose"
            raise refused(self.place, "a symmetric QMATRIX", came, "write both triangles, or one in QUADOBJ")
        return _coo(triplets, (n, n))


def _coo(triplets: list[tuple[int, int, float]], shape: tuple[int, int]) -> Coo:
    rows, columns, values = zip(*triplets, strict=True) if triplets else ((), (), ())
    return Coo(np.array(rows, np.int64), np.array(columns, np.int64), np.array(values, np.float64), shape)


def _open(bounds: NDArray[np.float64]) -> NDArray[np.float64]:
    """With infinity for those that are none."""
    return np.where(np.abs(bounds) >= BOUND_MAX, np.copysign(np.inf, bounds), bounds)
