// How far answers may be off, in one place, each with its reason.
#pragma once

#include <limits>

#include "cuts.h"

namespace icnnrt_tests {

// The kernels compute in double and round y once to T; in double they solve until the gap is rounding of v. The gap
// bounds y by its root only, which is 1e-8; this close it is where no two cuts are nearly parallel.
template <typename T>
inline constexpr Real kYTolerance = static_cast<Real>(std::numeric_limits<T>::epsilon()) + 1e-10L;

// Gap left after kSteps steps, relative to the size of v anywhere in the box, for slopes up to 1e3.
inline constexpr Real kGapTolerance = 1e-12L;

// The adjoint is exact but for its ridge, 1e-13 of the trace; but lam comes to it rounded to T, and so do its outputs.
template <typename T>
inline constexpr Real kAdjointTolerance = 100.0L * static_cast<Real>(std::numeric_limits<T>::epsilon()) + 1e-9L;

}  // namespace icnnrt_tests
