"""Programs in files: what is written is read back bit for bit, files of HiGHS too; the rest is refused."""

import contextlib
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from amounts import amount

import icnnrt
from icnnrt.errors import InputError
from icnnrt.programs import Coo, Program, read_program, write_program

# Two variables, one row of each kind and two with a range, every kind of bound; a constant of 4.
EXAMPLE = """\
* a comment
NAME          two  words
ROWS
 N  cost
 G  least
 L  most
 E  same
 E  band
 N  other
COLUMNS
    x         cost      1.5   least  2
    x         most      1.   other  7
    y         cost      -2    least  1
    y         most      2   same  1
    z  band   1
    w  cost  -1d0
RHS
    rhs1      cost      -4    least   2
    rhs1      most        6
    rhs1      band  1
RANGES
    r  most  5  band  -2
BOUNDS
 UP bnd1      x         20
 MI bnd1      y
 UP bnd1      y         1e20
 FR bnd1      z
 UP bnd1      w         -1
 FX bnd1      v         3
QUADOBJ
    x         x         8
    y         x         2
    y         y         10
ENDATA
what stands behind it is not read
"""


def written(tmp_path: Path, text: str, suffix: str = ".qps") -> Path:
    path = tmp_path / f"file{suffix}"
    path.write_text(text)
    return path


def test_every_section(tmp_path: Path) -> None:
    found = read_program(written(tmp_path, EXAMPLE))
    assert (found.name, found.maximise) == ("two words", False)
    assert (found.rows, found.equalities) == (("least", "most", "band"), ("same",))
    program = found.program
    assert program.variables == ("x", "y", "z", "w", "v")
    assert program.constant == 4.0
    data = program.dense()
    np.testing.assert_array_equal(data["Q"][:2, :2], [[8.0, 2.0], [2.0, 10.0]])
    assert not data["Q"][2:].any()
    np.testing.assert_array_equal(data["p"], [1.5, -2.0, 0.0, -1.0, 0.0])
    np.testing.assert_array_equal(data["G"], [[2.0, 1.0, 0, 0, 0], [1.0, 2.0, 0, 0, 0], [0, 0, 1.0, 0, 0]])
    np.testing.assert_array_equal(data["h_lower"], [2.0, 1.0, -1.0])
    np.testing.assert_array_equal(data["h"], [np.inf, 6.0, 1.0])
    np.testing.assert_array_equal(data["A"], [[0, 1.0, 0, 0, 0]])
    np.testing.assert_array_equal(data["b"], [0.0])
    np.testing.assert_array_equal(data["lower"], [0.0, -np.inf, -np.inf, -np.inf, 3.0])
    np.testing.assert_array_equal(data["upper"], [20.0, np.inf, np.inf, -1.0, 3.0])


def test_a_maximum_is_the_minimum_of_the_negative(tmp_path: Path) -> None:
    for sense in ("OBJSENSE\n    MAX\n", "OBJSENSE MAXIMIZE\n", "OBJSENSE\nMAX\n"):
        found = read_program(written(tmp_path, EXAMPLE.replace("ROWS\n", sense + "ROWS\n", 1)))
        least = read_program(written(tmp_path, EXAMPLE)).program
        assert found.maximise
        z = np.arange(5.0)
        assert found.program.objective(z) == -least.objective(z)


def test_both_triangles(tmp_path: Path) -> None:
    both = EXAMPLE.replace("QUADOBJ", "QMATRIX").replace("    y         y", "    x  y  2\n    y         y")
    Q = read_program(written(tmp_path, both)).program.Q.dense()
    np.testing.assert_array_equal(Q, read_program(written(tmp_path, EXAMPLE)).program.Q.dense())
    with pytest.raises(InputError, match="symmetric QMATRIX"):
        read_program(written(tmp_path, both.replace("x  y  2", "x  y  3")))


def random_program(rng: np.random.Generator) -> Program:
    n, m, q = int(rng.integers(1, 6)), int(rng.integers(0, 5)), int(rng.integers(0, 3))

    def coo(shape: tuple[int, int]) -> Coo:
        matrix = rng.normal(size=shape) * 10.0 ** rng.integers(-9, 9, shape) * (rng.random(shape) < 0.6)
        i, j = np.nonzero(matrix)
        return Coo(i, j, matrix[i, j], shape)

    def bounds(size: int) -> tuple[np.ndarray, np.ndarray]:
        low = rng.normal(size=size)
        high = low + rng.random(size) * (rng.random(size) < 0.8)
        return np.where(rng.random(size) < 0.3, -np.inf, low), np.where(rng.random(size) < 0.3, np.inf, high)

    half = rng.normal(size=(n, n)) * (rng.random((n, n)) < 0.5)
    square = half @ half.T
    i, j = np.nonzero(square)
    lower, upper = bounds(n)
    h_lower, h = bounds(m)
    names = [f"v{k}" for k in range(n)]
    p = rng.normal(size=n)
    Q = Coo(i, j, square[i, j], (n, n))
    return Program(Q, p, coo((m, n)), h, coo((q, n)), rng.normal(size=q), lower, upper, rng.normal(), names, h_lower)


def sides(data: dict[str, np.ndarray]) -> list[tuple[float, ...]]:
    """The rows of G, one for each side that is there."""
    above = [(*row, side) for row, side in zip(data["G"], data["h"], strict=True) if side < np.inf]
    below = [(*-row, -side) for row, side in zip(data["G"], data["h_lower"], strict=True) if side > -np.inf]
    return sorted(tuple(float(a) for a in side) for side in above + below)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    for _ in range(amount(200)):
        program = random_program(rng)
        write_program(tmp_path / "a.mps", program)
        found = read_program(tmp_path / "a.mps").program
        given, read = program.dense(), found.dense()
        for name in ("Q", "p", "A", "b", "lower", "upper"):
            np.testing.assert_array_equal(read[name], given[name], err_msg=name)
        assert sides(read) == sides(given)
        assert found.constant == program.constant


def test_what_is_no_program_is_not_written(tmp_path: Path) -> None:
    program = random_program(np.random.default_rng(5))
    write_program(str(tmp_path / "a.mps"), program)  # a path as text
    assert read_program(str(tmp_path / "a.mps")).program.constant == program.constant
    for arguments, said in (
        ((3, program), "path: expected a path"),
        ((tmp_path / "b.mps", program.dense()), "program: expected a Program, but got dict"),
        ((tmp_path / "b.mps", program, 3), "name: expected text, but got int"),
        ((tmp_path / "b.txt", program), "ending in .lp or .mps"),
    ):
        with pytest.raises(InputError, match=said):
            write_program(*arguments)  # type: ignore[arg-type]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mps"]


def test_highs_writes_what_is_read(tmp_path: Path) -> None:
    highspy = pytest.importorskip("highspy")
    rng = np.random.default_rng(4)
    for _ in range(amount(60)):
        program = random_program(rng)
        write_program(tmp_path / "a.mps", program)
        solver = highspy.Highs()
        solver.setOptionValue("output_flag", False)
        solver.setOptionValue("small_matrix_value", 1e-12)  # what is smaller it drops
        assert solver.readModel(str(tmp_path / "a.mps")) != highspy.HighsStatus.kError
        solver.writeModel(str(tmp_path / "b.mps"))
        found, given = read_program(tmp_path / "b.mps").program, program.dense()
        order = [found.variables.index(name) for name in program.variables]
        read = found.dense()
        assert found.constant == pytest.approx(program.constant)
        np.testing.assert_allclose(read["Q"][np.ix_(order, order)], given["Q"], rtol=1e-12)
        for name in ("p", "lower", "upper"):
            np.testing.assert_allclose(read[name][order], given[name], rtol=1e-12)
        np.testing.assert_allclose(read["A"][:, order], given["A"], rtol=1e-12)


@pytest.mark.parametrize(
    ("old", "new", "line", "column", "said"),
    [
        (" N  cost", " X  cost", 4, 2, 'expected N, L, G or E, but got "X"'),
        (" G  least", " G  least  2", 5, 12, "expected the kind of a row and its name, but got 3 fields"),
        (" L  most", " L  least", 6, 5, "expected each row once"),
        ("    x         cost      1.5   least  2", "    x  cost  1.5  nowhere  2", 11, 19, "expected a row of ROWS"),
        ("    x         most      1.   other  7", "    x  cost  3", 12, 8, "expected each entry once"),
        ("    y         most      2   same  1", "    y  most  2_0", 14, 14, 'expected a finite number, but got "2_0"'),
        ("    y         most      2   same  1", "    y  most  nan", 14, 14, "expected a finite number"),
        ("    y         most      2   same  1", "    y  most  1e400", 14, 14, "expected a finite number"),
        ("    z  band   1", "    m  'MARKER'  'INTORG'", 15, 8, "expected continuous variables"),
        ("    rhs1      most        6", "    rhs2  most  6", 19, 5, "expected one vector in RHS"),
        ("    rhs1      most        6", "    rhs1  least  6", 19, 11, "expected each row once"),
        (" UP bnd1      x         20", " BV bnd1 x", 24, 2, "expected continuous variables"),
        (" UP bnd1      x         20", " XX bnd1 x 1", 24, 2, "expected LO, UP, FX, FR, MI or PL"),
        (" UP bnd1      x         20", " UP", 24, 2, "expected a kind, the name of the bounds"),
        ("    y         x         2", "    x  x  2", 32, 5, "expected each entry of Q once"),
        ("QUADOBJ", "QUADRATIC", 30, 1, "expected a section such as NAME"),
        ("COLUMNS", "RHS", 10, 1, "expected COLUMNS before RHS"),
        ("RANGES", "RHS", 21, 1, "expected each section once"),
        ("ENDATA\nwhat stands behind it is not read\n", "", 35, 1, "expected ENDATA, but got the end of the file"),
    ],
)
def test_a_malformed_file_is_refused_by_line_and_column(
    tmp_path: Path, old: str, new: str, line: int, column: int, said: str
) -> None:
    assert old in EXAMPLE
    path = written(tmp_path, EXAMPLE.replace(old, new, 1))
    with pytest.raises(InputError) as error:
        read_program(path)
    assert str(error.value).startswith(f"{path}, line {line}, column {column}: {said}")


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_program(tmp_path / "none.qps")
    with pytest.raises(InputError, match=r"ending in \.mps or \.qps"):
        read_program(tmp_path / "none.lp")
    with pytest.raises(InputError, match="path: expected a path"):
        read_program(3)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="a program with a variable"):
        read_program(written(tmp_path, "ROWS\n N cost\nCOLUMNS\nENDATA\n"))
    many = "".join(f" x{j} cost 1\n" for j in range(20_000))
    large = read_program(written(tmp_path, f"ROWS\n N cost\nCOLUMNS\n{many}ENDATA\n")).program
    with pytest.raises(InputError, match="MiB of matrices with their zeros"):
        large.dense()


def test_any_text_is_a_program_or_a_sentence() -> None:
    """Bytes changed, lost and doubled."""
    draw = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.mps"
        for _ in range(amount(2000)):
            data = bytearray(EXAMPLE.encode())
            for _ in range(draw.randint(1, 4)):
                at = draw.randrange(len(data))
                match draw.randrange(3):
                    case 0:
                        data[at] = draw.randrange(256)
                    case 1:
                        del data[at : at + draw.randint(1, 20)]
                    case _:
                        data[at:at] = data[at : at + draw.randint(1, 60)]
            path.write_bytes(data)
            with contextlib.suppress(InputError):
                read_program(path)


def command(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-m", "icnnrt", "qp", *arguments], capture_output=True, text=True)


def test_the_command(tmp_path: Path) -> None:
    path = written(tmp_path, EXAMPLE)
    program = read_program(path).program
    solution = icnnrt.qp(**program.dense())
    done = command(str(path))
    assert done.returncode == 0, done.stderr
    assert "two words" in done.stdout
    assert f"objective {program.objective(solution.z):.9g}" in done.stdout
    done = command(str(path), "--json")
    told = json.loads(done.stdout)
    assert told["status"] == "CONVERGED"
    assert told["z"] == solution.z.tolist()
    assert told["variable_names"] == ["x", "y", "z", "w", "v"]
    assert max(told["residual"].values()) < 1e-9
    assert told["steps"] == solution.steps
    assert f"steps     {solution.steps}\n" in command(str(path)).stdout
    few = command(str(path), "--json", "--portable", "--steps", "2", "--tolerance", "1e-3")
    assert few.returncode == 3
    assert json.loads(few.stdout)["steps"] == 2
    assert "allow more steps" in json.loads(few.stdout)["advice"]
    refused = command(str(path), "--tolerance", "0")
    assert refused.returncode == 1
    assert "tolerance: expected a finite number above 0" in refused.stderr
    assert command(str(path), "--seconds", "60").returncode == 0
    done = command(str(path), "--json", "--out", str(tmp_path / "z.npz"))
    with np.load(tmp_path / "z.npz") as found:
        np.testing.assert_array_equal(found["z"], solution.z)
        assert found["row_names"].tolist() == ["least", "most", "band"]
    assert command(str(path), "--out", str(tmp_path / "z.csv")).returncode == 0
    lines = (tmp_path / "z.csv").read_text().splitlines()
    assert lines[0] == "variable,z,bound_multiplier"
    assert [float(line.split(",")[1]) for line in lines[1:]] == solution.z.tolist()


def test_the_command_on_a_maximum_and_on_what_has_no_answer(tmp_path: Path) -> None:
    largest = "OBJSENSE MAX\nROWS\n N cost\n L most\nCOLUMNS\n x cost 2 most 1\nRHS\n most 3\nENDATA\n"
    done = command(str(written(tmp_path, largest, ".mps")), "--json")
    assert json.loads(done.stdout)["objective"] == pytest.approx(6.0)
    empty = EXAMPLE.replace(" FX bnd1      v         3", " LO bnd1 y 7")
    done = command(str(written(tmp_path, empty)), "--json")
    assert done.returncode == 3
    told = json.loads(done.stdout)
    assert told["status"] == "INFEASIBLE"
    assert any(told["ray"])
    assert "as `ray` proves" in told["advice"]
    done = command(str(written(tmp_path, empty)))
    assert done.returncode == 3
    assert "--out FILE.npz writes it" in " ".join(done.stdout.split())
    done = command(str(written(tmp_path, empty)), "--out", str(tmp_path / "z.npz"))
    assert done.returncode == 3
    with np.load(tmp_path / "z.npz") as found:
        assert found["ray"].tolist() == told["ray"]
    for arguments, said in (
        ((str(tmp_path / "a.lp"),), "ending in .mps or .qps"),
        ((str(written(tmp_path, EXAMPLE)), "--out", "a.txt"), "ending in .npz or .csv"),
    ):
        done = command(*arguments)
        assert done.returncode == 1
        assert said in done.stderr
        assert done.stderr.count("\n") == 1


def test_names_of_strangers_do_not_reach_the_terminal(tmp_path: Path) -> None:
    hostile = (
        EXAMPLE.replace("two  words", "\x1b[31mred\x07")
        .replace("    v ", "    v\x1b[2J ")
        .replace(" v  ", " v\x1b[2J ")
    )
    done = command(str(written(tmp_path, hostile)))
    assert done.returncode == 0, done.stderr
    assert "\x1b[31m" not in done.stdout
    assert "\x1b[2J" not in done.stdout
