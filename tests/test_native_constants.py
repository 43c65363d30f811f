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
    kkt_adjoint,
    namespace,
    qp_adjoint,
    qp_reference,
    quadratic_program,
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
    ("interior_point.h", "kToBoundary"): cut_model.TO_BOUNDARY,
    ("interior_point.h", "kBacktrack"): cut_model.BACKTRACK[::-1],  # shortest first there
    ("interior_point.h", "kReluctance"): cut_model.RELUCTANCE[::-1],
    ("entropy.h", "kLogitBound"): domains.LOGIT_BOUND,
    ("entropy.h", "kLogitStep"): domains.LOGIT_STEP,
    ("simplex.h", "kLogitBound"): domains.LOGIT_BOUND,
    ("simplex.h", "kLogitStep"): domains.LOGIT_STEP,
    ("bundle_adjoint.h", "kTraceRidge"): kkt_adjoint.TRACE_RIDGE,
    ("bundle_adjoint.h", "kSmallestRidge"): kkt_adjoint.SMALLEST_RIDGE,
    ("qp_interior_point.h", "kEnough"): interior_point.ENOUGH,
    ("qp_interior_point.h", "kQpToBoundary"): interior_point.TO_BOUNDARY,
    ("qp_interior_point.h", "kSmallest"): interior_point.SMALLEST,
    ("qp_interior_point.h", "kFirstRho"): interior_point.RHO[0],
    ("qp_interior_point.h", "kLeastRho"): interior_point.RHO[1],
    ("qp_interior_point.h", "kLeastDelta"): interior_point.LEAST_DELTA,
    ("qp_interior_point.h", "kStuckDelta"): interior_point.STUCK_DELTA,
    ("qp_interior_point.h", "kStuck"): interior_point.STUCK,
    ("qp_interior_point.h", "kClose"): interior_point.CLOSE,
    ("qp_interior_point.h", "kBeyond"): interior_point.BEYOND,
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
    ("qp_adjoint.h", "kWeak"): (qp_adjoint.WEAK["float64"], qp_adjoint.WEAK["float32"]),
    ("qp_solve.h", "kNarrow"): interior_point.NARROW,
    ("qp_interior_point.h", "kNearly"): interior_point.NEARLY,
    ("qp_interior_point.h", "kWarm"): interior_point.WARM,
    ("qp_problem.h", "kBoundMax"): interior_point.BOUND_MAX,
    ("qp_problem.h", "kLoose"): interior_point.LOOSE,
    ("qp_problem.h", "kApart"): interior_point.APART,
    ("qp_solve.h", "kPersistence"): quadratic_program.PERSISTENCE,
    ("qp_solve.h", "kNoticeable"): interior_point.NOTICEABLE,
    ("qp_solve.h", "kPursued"): quadratic_program.PURSUED,
    ("qp_solve.h", "kOverrules"): infeasibility.OVERRULES,
    ("qp_solve.h", "kCertificate"): infeasibility.CERTIFICATE,
    ("qp_solve.h", "kCancelled"): infeasibility.CANCELLED,
    ("qp_solve.h", "kFalls"): infeasibility.FALLS,
    ("qp_solve.h", "kCertified"): infeasibility.CERTIFIED,
    ("qp_solve.h", "kSolvedResidual"): (TOLERANCE[FLOAT64][0], TOLERANCE[FLOAT32][0]),
    ("qp_solve.h", "kInaccurateResidual"): (TOLERANCE[FLOAT64][1], TOLERANCE[FLOAT32][1]),
    ("qp_solve.h", "kRay"): (qp_reference.RAY, qp_reference.RAY_FLOAT32),
}
# Those that no statement has, and why.
LAYOUT = "how numbers lie in memory and registers, which changes none of them"
OF_NEWTON = "of Newton's method on the dual, which the kernels try first and the statements do not know"
OF_POLISH = "of the guess at the active set, which the kernels polish and the statements do not know"
DEFINITE = "of the factorisation that tells whether Q is positive definite, for which the statements ask eigenvalues"
OF_EXP = "of the kernels' own exponential function, which the statements take from numpy, torch and onnxruntime"
REFINED = "of how often a direction is refined: in the statements once, in the kernels where rounding tells"
UNIT = "what rounding is told against; 0 in R^n, where y has no unit of its own and the statement keeps 1"
OF_ACTIVE_SET = "of the active-set method, which the kernels try first and the statements do not know"
OF_PLANS = "of sparse factors, of which the statements know nothing"
OURS = {
    ("qp.h", "kMostSeconds"): "longer than any call, so that nanoseconds do not overflow",
    ("qp_active_set.h", "kActiveSetRefinements"): OF_ACTIVE_SET,
    ("qp_active_set.h", "kDependent"): OF_ACTIVE_SET,
    ("qp_active_set.h", "kDistinct"): OF_ACTIVE_SET,
    ("qp_active_set.h", "kFewest"): OF_ACTIVE_SET,
    ("qp_active_set.h", "kIndependent"): OF_ACTIVE_SET,
    ("qp_active_set.h", "kPart"): OF_ACTIVE_SET,
    ("qp_active_set.h", "kQueued"): OF_ACTIVE_SET,
    ("qp_active_set.h", "kSharp"): OF_ACTIVE_SET,
    ("qp_active_set.h", "kTogether"): OF_ACTIVE_SET,
    ("qp_active_set.h", "kViolated"): OF_ACTIVE_SET,
    ("qp_newton.h", "kSparseDelta"): OF_PLANS,
    ("qp_newton.h", "kSparseRefinements"): OF_PLANS,
    ("qp_newton.h", "kSparseRho"): OF_PLANS,
    ("qp_plan.h", "kPlanHead"): OF_PLANS,
    ("qp_solve.h", "kFew"): OF_ACTIVE_SET,
    ("bundle_solve.h", "kNegligible"): OF_NEWTON,
    ("bundle_solve.h", "kPolish"): OF_NEWTON,
    ("newton.h", "kFine"): OF_NEWTON,
    ("newton.h", "kLineSearch"): OF_NEWTON,
    ("newton.h", "kStalled"): OF_NEWTON,
    ("interior_point.h", "kNearlyEnough"): OF_NEWTON,
    ("interior_point.h", "kLengths"): LAYOUT,
    ("dense.h", "kTile"): LAYOUT,
    ("kernels.h", "kDomains"): LAYOUT,
    ("kernels.h", "kInstructionSets"): LAYOUT,
    ("kernels.h", "kWorkspaceAlignment"): LAYOUT,
    ("dispatch.cpp", "kCompiled"): LAYOUT,
    ("dispatch.cpp", "kMost"): LAYOUT,
    ("qp_factor.h", "kBlock"): LAYOUT,
    ("qp_problem.h", "kTileSize"): LAYOUT,
    ("qp_problem.h", "kInf"): "infinity",
    ("entropy.h", "kFactors"): "how many numbers in [½, 1] have a product that does not underflow, of W lanes",
    ("entropy.h", "kUnit"): UNIT,
    ("simplex.h", "kUnit"): UNIT,
    ("quadratic.h", "kUnit"): UNIT,
    ("exponential.h", "kExponentBound"): OF_EXP,
    ("exponential.h", "kLog2E"): OF_EXP,
    ("exponential.h", "kLn2High"): OF_EXP,
    ("exponential.h", "kLn2Low"): OF_EXP,
    ("exponential.h", "kRounder"): OF_EXP,
    ("qp_interior_point.h", "kRunning"): OF_POLISH,
    ("qp_interior_point.h", "kAmendments"): OF_POLISH,
    ("qp_interior_point.h", "kGuess"): OF_POLISH,
    ("qp_interior_point.h", "kHard"): OF_POLISH,
    ("qp_interior_point.h", "kClosely"): "further away the kernels measure residuals by a cheaper figure",
    ("qp_interior_point.h", "kHardStep"): REFINED,
    ("qp_interior_point.h", "kRefined"): REFINED,
    ("qp_interior_point.h", "kStuckRefinements"): REFINED,
    ("qp_newton.h", "kNothing"): "rows of the least weight, which the kernels leave to the refinement",
    ("qp_newton.h", "kSmallestPivotOfP"): "the ridge of the kernels' own factorisation",
    ("qp_solve.h", "kCurved"): DEFINITE,
    ("qp_solve.h", "kEvenly"): DEFINITE,
    ("qp_solve.h", "kUnitRoundoff"): "eps of the data's type",
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


def test_every_constant_of_the_kernels_is_compared_or_their_own() -> None:
    definition = re.compile(r"\bconstexpr (?:double|std::size_t) (k[A-Z][^;]*);")
    found = {
        (file.name, name)
        for file in (*CORE.glob("*.h"), *CORE.glob("*.cpp"))
        for names in definition.findall(file.read_text(encoding="utf-8"))
        for name in re.findall(r"\b(k[A-Z]\w*)(?:\[\w+\])? = ", names)
    }
    assert not CONSTANTS.keys() & OURS.keys()
    assert found == CONSTANTS.keys() | OURS.keys()
