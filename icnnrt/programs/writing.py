"""Linear and convex quadratic programs as text, CPLEX' LP format and free MPS: HiGHS, Gurobi, CPLEX and SCIP read them.

    min over z of  ½ z'Qz + p'z + constant   s.t.  h_lower <= Gz <= h,   Az = b,   lower <= z <= upper

Numbers have as many digits as give the same float64 back. A row with two sides is written as two, since both formats
tell the second by its distance from the first, which rounds. What the formats take for granted is written out: every
bound, as both take 0 for a lower bound that is not there. In LP a quadratic objective is [ ... ] / 2 of both triangles'
sum; in MPS it is the section QUADOBJ with the entries of one triangle, and the constant is the negative of the
objective's right-hand side.
"""

import os
import re
from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np

from icnnrt import arguments
from icnnrt.arguments import instance, refused
from icnnrt.errors import InputError
from icnnrt.format.files import atomic_file
from icnnrt.format.folder import refuse_inside_a_package
from icnnrt.printable import show
from icnnrt.programs.program import Coo, Program

Lines = Iterator[str]

SUFFIXES: Final = (".lp", ".mps")
NOT_NAME: Final = re.compile(r"[^A-Za-z0-9_.-]")
RELATIONS: Final = {"<=": "L", ">=": "G", "=": "E"}
COLUMNS: Final = 200  # of a line: CPLEX takes no more than 560


def write_program(path: str | os.PathLike[str], program: Program, name: str = "icnnrt") -> None:
    """Write a .lp or a .mps, atomically: a scratch file beside it, flushed to the disk, then renamed.

    Of `name` letters, digits and _ . - are kept, and what else it has becomes _: it stands in a line of the file.

    Raises `InputError` for another ending, numbers that are not finite, a lower bound of +inf or an upper one of −inf.
    """
    place = arguments.path(path, "path")
    instance(program, "program", Program, "a Program", "`read_program(file).program` is one")
    instance(name, "name", str, "text", "")
    writers = {".lp": _lp, ".mps": _mps}
    writer = writers.get(place.suffix.lower())
    if writer is None:
        raise refused(
            str(place), "a file name ending in .lp or .mps", show(place.suffix), "the ending tells the format"
        )
    parts = (program.Q.values, program.p, program.G.values, program.A.values, program.b, program.constant)
    low, high = (program.lower, program.h_lower), (program.upper, program.h)
    sides = [np.asarray(side) for side in (*low, *high) if side is not None]
    if not all(np.isfinite(a).all() for a in parts) or any(np.isnan(side).any() for side in sides):
        raise refused(str(place), "finite numbers to write", "a program with NaN or infinity", "clean the data")
    none = [(low, np.inf), (high, -np.inf)]
    if any((np.asarray(side) == bad).any() for pair, bad in none for side in pair if side is not None):
        raise InputError(
            f"{place}: expected bounds that leave something, but a lower one is +inf or an upper one −inf; where there "
            "is none, lower is −inf and upper +inf."
        )
    refuse_inside_a_package(place, "path")
    with atomic_file(place) as file:
        for line in writer(program, NOT_NAME.sub("_", name)):
            file.write(line.encode("ascii") + b"\n")


def _number(value: Any) -> str:
    return repr(float(value))


def _rows(program: Program) -> Iterator[tuple[str, str, list[tuple[int, float]], float]]:
    """Name, relation, terms by column and right-hand side of every row; of one with two sides the lower comes after."""
    sides = [("g", "<=", program.G, program.h), ("a", "=", program.A, program.b)]
    if program.h_lower is not None:
        sides.insert(1, ("l", ">=", program.G, program.h_lower))
    for kind, relation, matrix, right in sides:
        rows: list[list[tuple[int, float]]] = [[] for _ in range(matrix.shape[0])]
        for i, j, value in _entries(matrix):
            rows[i].append((j, value))
        for i, (row, value) in enumerate(zip(rows, right.tolist(), strict=True)):
            if np.isfinite(value):
                yield f"{kind}{i}", relation, row, value


def _entries(matrix: Coo) -> Iterator[tuple[int, int, float]]:
    return zip(matrix.rows.tolist(), matrix.columns.tolist(), matrix.values.tolist(), strict=True)


def _term(value: float, variable: str) -> str:
    return f"{'-' if value < 0 else '+'} {_number(abs(value))} {variable}"


def _wrapped(head: str, terms: Sequence[str]) -> Lines:
    line = head
    for term in terms:
        if len(line) + len(term) >= COLUMNS:
            yield line
            line = "  "
        line = f"{line} {term}"
    yield line


def _lp(program: Program, name: str) -> Lines:
    names = program.variables
    yield f"\\ {name}"
    yield "Minimize"
    terms = [_term(value, names[j]) for j, value in enumerate(program.p.tolist()) if value]
    if len(program.Q.values):
        quadratic = []
        for i, j, value in _entries(program.Q):
            if i == j:
                quadratic.append(_term(value, f"{names[i]} ^ 2"))
            elif i < j:
                quadratic.append(_term(2.0 * value, f"{names[i]} * {names[j]}"))
        terms += ["+ [", *quadratic, "] / 2"]
    if program.constant:
        terms.append(f"{'-' if program.constant < 0 else '+'} {_number(abs(program.constant))}")
    # An objective must have a term.
    yield from _wrapped(" obj:", terms or [f"+ 0.0 {names[0]}"])
    yield "Subject To"
    for row, relation, entries, right in _rows(program):
        row_terms = [_term(value, names[j]) for j, value in entries] or [f"+ 0.0 {names[0]}"]
        yield from _wrapped(f" {row}:", [*row_terms, f"{relation} {_number(right)}"])
    yield "Bounds"
    for variable, low, high in zip(names, program.lower.tolist(), program.upper.tolist(), strict=True):
        if low == -np.inf and high == np.inf:
            yield f" {variable} free"
        else:
            yield f" {_bound(low)} <= {variable} <= {_bound(high)}"
    yield "End"


def _bound(value: float) -> str:
    return {np.inf: "+inf", -np.inf: "-inf"}.get(value) or _number(value)


def _mps(program: Program, name: str) -> Lines:
    names = program.variables
    yield f"NAME {name}"
    yield "ROWS"
    yield " N obj"
    rows = list(_rows(program))
    yield from (f" {RELATIONS[relation]} {row}" for row, relation, _, _ in rows)
    yield "COLUMNS"
    columns: list[list[tuple[str, float]]] = [[("obj", value)] for value in program.p.tolist()]
    for row, _, entries, _ in rows:
        for j, value in entries:
            columns[j].append((row, value))
    for variable, column in zip(names, columns, strict=True):
        yield from (f" {variable} {row} {_number(value)}" for row, value in column)
    yield "RHS"
    if program.constant:
        yield f" RHS obj {_number(-program.constant)}"
    yield from (f" RHS {row} {_number(right)}" for row, _, _, right in rows if right)
    yield "BOUNDS"
    for variable, low, high in zip(names, program.lower.tolist(), program.upper.tolist(), strict=True):
        if low == high:
            yield f" FX BND {variable} {_number(low)}"
            continue
        if low == -np.inf:
            yield f" {'FR' if high == np.inf else 'MI'} BND {variable}"
        else:
            yield f" LO BND {variable} {_number(low)}"
        if high != np.inf:
            yield f" UP BND {variable} {_number(high)}"
    if len(program.Q.values):
        yield "QUADOBJ"
        yield from (f" {names[i]} {names[j]} {_number(value)}" for i, j, value in _entries(program.Q) if i <= j)
    yield "ENDATA"
