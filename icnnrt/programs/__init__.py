"""Linear and convex quadratic programs as files that other solvers write and read: MPS, QPS and LP."""

from icnnrt.programs.program import Coo, Program
from icnnrt.programs.reading import ProgramFile, read_program
from icnnrt.programs.writing import write_program

__all__ = ["Coo", "Program", "ProgramFile", "read_program", "write_program"]
