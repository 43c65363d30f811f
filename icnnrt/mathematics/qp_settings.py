"""When the solver of quadratic programs ends: its tolerance, the most steps it takes, and the most time."""

from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from icnnrt.arguments import integer, number, refused
from icnnrt.mathematics.interior_point import STEPS
from icnnrt.mathematics.qp_names import SETTINGS
from icnnrt.mathematics.qp_reference import TOLERANCE

__all__ = [
    "MOST_STEPS",
    "MOST_TOLERANCE",
    "USUAL",
    "Settings",
    "checked_smoothing",
    "checked_tolerance",
]

MOST_TOLERANCE: Final = 0.1
MOST_STEPS: Final = 1_000_000  # native/ort/steps.h has the same


class Settings(NamedTuple):
    """What was asked for; None is what is usual."""

    tolerance: float | None = None  # the relative KKT residual at which a sample counts as solved
    steps: int | None = None  # the most of the interior point method, from one start
    seconds: float | None = None  # of a call

    @classmethod
    def checked(cls, tolerance: object, steps: object, seconds: object, dtype: Any) -> "Settings":
        """Those of arguments, for data of this dtype, or the `InputError`."""
        return cls(
            None if tolerance is None else checked_tolerance(tolerance, dtype),
            None if steps is None else _checked_steps(steps),
            None if seconds is None else number(seconds, "seconds", above=0, remedy="leave it out for no limit"),
        )

    def feeds(self) -> dict[str, NDArray[Any]]:
        """What QuadraticProgram takes of them; of the others it has defaults."""
        kinds = np.float64, np.int64, np.float64
        given = zip(SETTINGS, kinds, self, strict=True)
        return {name: np.array(value, kind) for name, kind, value in given if value is not None}

    def told(self, dtype: Any, taken: int, elapsed: float | None = None) -> dict[str, Any]:
        """What advice tells of them on a sample that took so many steps, in a call of so many seconds.

        None where the call has no limit of time, or nobody knows how long it took.
        """
        most = STEPS if self.steps is None else self.steps
        late = self.seconds is not None and elapsed is not None and elapsed >= self.seconds
        return {
            "steps": taken,
            "tolerance": TOLERANCE[np.dtype(dtype)][0] if self.tolerance is None else self.tolerance,
            "double": np.dtype(dtype) == np.float64,
            "allow": "more time" if late else "more steps" if most <= taken and most < STEPS else "",
        }

    def asked(self, dtype: Any) -> dict[str, Any]:
        """The same where nobody knows more than what was asked for: of several programs, with settings of their own."""
        few = self.steps is not None and self.steps < STEPS
        return {
            "steps": None,
            "most": self.steps,
            "tolerance": self.tolerance,
            "double": np.dtype(dtype) == np.float64,
            "allow": "more steps" if few else "",
        }


USUAL: Final = Settings()


def checked_tolerance(tolerance: object, dtype: Any) -> float:
    """A positive finite number that data of this dtype can meet, or the `InputError`."""
    usual = TOLERANCE[np.dtype(dtype)][0]
    found = number(tolerance, "tolerance", above=0, remedy=f"leave it out for {usual:g}")
    if found > MOST_TOLERANCE:  # that of a point far from any answer
        raise refused("tolerance", f"at most {MOST_TOLERANCE:g}", f"{found:g}", f"leave it out for {usual:g}")
    least = float(np.finfo(dtype).eps)
    if found < least:
        wanted, wider = f"at least {least:.1e}, the rounding of {np.dtype(dtype)}", np.dtype(dtype) == np.float32
        raise refused("tolerance", wanted, f"{found:g}", f"leave it out for {usual:g}{', or give float64' * wider}")
    return found


def _checked_steps(steps: object) -> int:
    """How many steps the method may take, or the `InputError`."""
    return integer(steps, "steps", 1, MOST_STEPS, remedy=f"give the most interior-point steps, {STEPS} is usual")


def checked_smoothing(smoothing: object) -> float:
    """The κ of `icnnrt.mathematics.qp_smoothing`, or the `InputError`."""
    return number(smoothing, "smoothing", above=0, remedy="leave it out for the gradient at the answer itself")
