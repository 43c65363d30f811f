"""What the operators of quadratic programs take and give, by name and in order: whoever writes, calls or runs them has
it from here.

QuadraticProgram takes `SOLVE_INPUTS`, `SETTINGS`, and gives `SOLUTION`; QPSensitivity takes `ADJOINT_INPUTS` and gives
`SENSITIVITY`, of which QPAdjoint gives the first four. Their sparse twins take a `plan` after all else.
"""

from typing import Final

from icnnrt.mathematics.qp_data import SHAPES
from icnnrt.mathematics.qp_reference import QPReference, QPSensitivity

__all__ = ["ADJOINT_INPUTS", "SENSITIVITY", "SETTINGS", "SOLUTION", "SOLVE_INPUTS"]

SOLVE_INPUTS: Final = (*SHAPES, "start")
SETTINGS: Final = ("tolerance", "most_steps", "seconds")
SOLUTION: Final = QPReference._fields
ADJOINT_INPUTS: Final = (
    *("Q", "G", "A", "lam", "mu", "slack", "box_slack", "status"),
    *("z_bar", "lam_bar", "nu_bar", "mu_bar"),
)
SENSITIVITY: Final = QPSensitivity._fields
