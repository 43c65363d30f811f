"""The constants of the native kernels are those of the statements: the method is one, written twice."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from icnnrt.mathematics import (
    condensed_kkt,
    cut_model,
    domains,
    infeasibility,
    interior_point,
    namespace,
    qp_adjoint,
    qp_reference,
)
from icnnrt.mathematics.qp_reference import TOLERANCE

CORE = Path(__file__).resolve().parent.parent / "native" / "core"
FLOAT64, FLOAT32 = np.dtype(np.float64), np.dtype(np.float32)
# file, constant: what it is in the statement; of a ternary by type, both.
CONSTANTS: dict[tuple[str, str], Any] = {
    ("lanes.h", "kEps"): namespace.EPS,
    ("symmetric.h", "kSmallestPivot"): namespace.RIDGE,
    ("interior_point.h", "kLamFloor"): cut_model.LAM_FLOOR,
    ("interior_point.h", "kSlackFloor"): cut_model.SLACK_FLOOR,
    ("interior_point.h", "kBacktrack"): cut_model.BACKTRACK[::-1],  # shortest first there
    ("interior_point.h", "kReluctance"): cut_model.RELUCTANCE[::-1],
    ("entropy.h", "kLogitBound"): domains.LOGIT_BOUND,
    ("entropy.h", "kLogitStep"): domains.LOGIT_STEP,
    ("simplex.h", "kLogitBound"): domains.LOGIT_BOUND,
    ("simplex.h", "kLogitStep"): domains.LOGIT_STEP,
    ("qp_interior_point.h", "kEnough"): interior_point.ENOUGH,
    ("qp_interior_point.h", "kQpToBoundary"): interior_point.TO_BOUNDARY,
    ("qp_interior_point.h", "kSmallest"): interior_point.SMALLEST,
    ("qp_interior_point.h", "kFirstRho"): interior_point.RHO[0],
    ("qp_interior_point.h", "kLeastRho"): interior_point.RHO[1],
    ("qp_interior_point.h", "kLeastDelta"): interior_point.LEAST_DELTA,
    ("qp_interior_point.h", "kStuckDelta"): interior_point.STUCK_DELTA,
    ("qp_interior_point.h", "kStuck"): interior_point.STUCK,
    ("qp_interior_point.h", "kClose"): interior_point.CLOSE,
    ("qp_interior_point.h", "kPatience"): interior_point.PATIENCE,
    ("qp_interior_point.h", "kProgress"): interior_point.PROGRESS,
    ("qp_newton.h", "kGamma"): condensed_kkt.GAMMA,
    ("qp_problem.h", "kEquilibrations"): interior_point.EQUILIBRATIONS,
    ("qp_problem.h", "kLevel"): interior_point.LEVEL,
    ("qp_problem.h", "kFar"): interior_point.FAR,
    ("qp_problem.h", "kLeverOfP"): interior_point.LEVER_OF_P,
    ("qp_adjoint.h", "kAdjointRho"): qp_adjoint.RHO,
    ("qp_adjoint.h", "kAdjointDelta"): qp_adjoint.DELTA,
    ("qp_adjoint.h", "kProximalSteps"): qp_adjoint.FACTORS * qp_adjoint.STEPS,
    ("qp_adjoint.h", "kAdjointEnough"): qp_adjoint.ENOUGH,
    ("qp_adjoint.h", "kProximalSurely"): 2 * qp_adjoint.STEPS,
    ("qp_adjoint.h", "kRunaway"): qp_adjoint.RUNAWAY,
    ("qp_adjoint.h", "kSingularRho"): qp_adjoint.SINGULAR[0],
    ("qp_adjoint.h", "kSingularDelta"): qp_adjoint.SINGULAR[1],
    ("qp_adjoint.h", "kSeparated"): qp_adjoint.SEPARATED * qp_adjoint.STEPS,
    ("qp_adjoint.h", "kParted"): qp_adjoint.PARTED,
    ("qp_adjoint.h", "kDecided"): qp_adjoint.DECIDED,
    ("qp_adjoint.h", "kUnlikely"): qp_adjoint.UNLIKELY,
    ("qp_solve.h", "kNarrow"): interior_point.NARROW,
    ("qp_interior_point.h", "kNearly"): interior_point.NEARLY,
    ("qp_interior_point.h", "kWarm"): interior_point.WARM,
    ("qp_problem.h", "kBoundMax"): interior_point.BOUND_MAX,
    ("qp_solve.h", "kCertificate"): infeasibility.CERTIFICATE,
    ("qp_solve.h", "kCancelled"): infeasibility.CANCELLED,
    ("qp_solve.h", "kFalls"): infeasibility.FALLS,
    ("qp_solve.h", "kCertified"): infeasibility.CERTIFIED,
    ("qp_solve.h", "kSolvedResidual"): (TOLERANCE[FLOAT64][0], TOLERANCE[FLOAT32][0]),
    ("qp_solve.h", "kInaccurateResidual"): (TOLERANCE[FLOAT64][1], TOLERANCE[FLOAT32][1]),
    ("qp_solve.h", "kRay"): (qp_reference.RAY, qp_reference.RAY_FLOAT32),
}


def number(text: str) -> float:
    """A product of literals, where kEps may be a factor."""
    result = 1.0
    for factor in text.split("*"):
        literal = factor.strip()
        if literal == "kEps":
            result *= namespace.EPS
        else:
            result *= float.fromhex(literal) if "0x" in literal else float(literal)
    return result


@pytest.mark.parametrize(("file", "name"), CONSTANTS, ids=[f"{file}:{name}" for file, name in CONSTANTS])
def test_a_constant_of_the_kernels_is_that_of_the_statement(file: str, name: str) -> None:
    text = (CORE / file).read_text(encoding="utf-8")
    found = re.search(rf"\b{name}(?:\[\w+\])? = ([^;,{{]+|{{[^}}]*}})[;,]", text)
    assert found, f"{file} has no {name}"
    stated, written = CONSTANTS[file, name], found[1]
    if "?" in written:
        got: Any = tuple(number(part) for part in written.partition("?")[2].split(":"))
    elif written.startswith("{"):
        got = tuple(number(part) for part in written.strip("{}").split(","))
    else:
        got = number(written)
    assert got == stated
