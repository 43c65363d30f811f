// The solver behind ai.icnnrt::QPSolve, QuadraticProgram and QPAdjoint, on plain arrays: one quadratic program a call.
//
//     min over z in R^n of  ½ z'Qz + p'z   s.t.  h_lower <= Gz <= h,   Az = b,   lower <= z <= upper
//
// with Q [n, n] positive semidefinite, G [m, n], A [q, n]; any bound may be infinite, m and q may be 0. Multipliers are
// signed: λ_i > 0 pushes back from h_i, λ_i < 0 from h_lower_i, and so μ for the box.
// icnnrt/mathematics/quadratic_program.py states it all. As in kernels.h nothing here allocates, throws, locks or keeps
// state, and all arithmetic is in double. A clock is read where there is a deadline.
#pragma once

#include <cstddef>
#include <cstdint>

#include "qp_plan.h"

namespace icnnrt {

enum class QpStatus : std::int32_t {
  kSolved,
  kInaccurate,
  kPrimalInfeasible,
  kDualInfeasible,
  kFailed,
  kNotFiniteInput,
  kNotConvex
};

// Sizes and settings shared by all samples of a batch, 1 <= n; `steps` bounds the interior-point steps from one start.
// With none of them no active set is tried either.
struct QpSizes {
  std::size_t n;
  std::size_t m;
  std::size_t q;
  std::size_t steps = 0;
  double tolerance = 0.0;     // the relative KKT residual that counts as solved; that of T unless it is positive
  std::int64_t deadline = 0;  // nanoseconds of `qp_now` at which a solve ends where it stands; 0: never
  // Of matrices that are sparse, which then have nothing outside it; null: dense. Solved by a plan, what is not SOLVED
  // may well be without: rays are not looked for, and pivots are taken in an order that knows no numbers.
  const QpPlan* plan = nullptr;
};

enum class QpMatrix { kQ, kG, kA };

// Nanoseconds of a clock that only goes forward.
[[gnu::cold]] std::int64_t qp_now() noexcept;

// A tolerance, and so many seconds from now, as they are given: what is not positive, or infinite, is none.
inline void set_limits(QpSizes& sizes, double tolerance, double seconds) noexcept {
  constexpr double kMostSeconds = 1e9;
  sizes.tolerance = tolerance > 0.0 && tolerance < __builtin_inf() ? tolerance : 0.0;
  if (seconds > 0.0 && seconds < kMostSeconds) sizes.deadline = qp_now() + static_cast<std::int64_t>(seconds * 1e9);
}

// All arrays are row-major and contiguous, of any alignment. Those of size 0 are not read.
template <typename T>
struct QpArguments {
  const T* Q;        // [n, n]; its symmetric part counts
  const T* p;        // [n]
  const T* G;        // [m, n]
  const T* h_lower;  // [m], or null: none
  const T* h;        // [m]
  const T* A;        // [q, n]
  const T* b;        // [q]
  const T* lower;    // [n], or null: none
  const T* upper;    // [n], or null: none
  const T* start;    // [n + m + q + n], (z, λ, ν, μ) of a problem nearby, or null; with any NaN in it a cold start
  T* z;              // [n] out, NaN unless solved or inaccurate, and so the multipliers, slacks and residuals
  T* lam;            // [m] out
  T* nu;             // [q] out
  T* mu;             // [n] out
  T* slack;          // [m] out, of the side that λ points at; 0 of bounds that leave no room, and of nothing else
  T* box_slack;      // [n] out
  double* residual;  // [3] out: relative stationarity, feasibility, duality gap, of z and λ before they are T
  QpStatus* status;  // [1] out
  T* ray;            // [n + m + q + n] out: certificate of infeasibility, or 0
  // [1] out, or null: interior-point steps, of certificates aside; 1 where an active set gave the answer
  std::int32_t* taken = nullptr;
};

template <typename T>
struct QpAdjointArguments {
  const T* Q;          // [n, n]
  const T* G;          // [m, n]
  const T* A;          // [q, n]
  const T* lam;        // [m], and so on: what the solve gave
  const T* mu;         // [n]
  const T* slack;      // [m]
  const T* box_slack;  // [n]
  QpStatus status;
  const T* z_bar;      // [n], cotangents
  const T* lam_bar;    // [m], or null: zero
  const T* nu_bar;     // [q], or null: zero
  const T* mu_bar;     // [n], or null: zero
  T* d_z;              // [n] out, NaN unless status is solved
  T* d_lam;            // [m] out
  T* d_nu;             // [q] out
  T* d_mu;             // [n] out
  double* share;       // [1] out, or null: the part of the loss that has no gradient, NaN unless status is solved
  std::int32_t* weak;  // [1] out, if share is: how many rows are weakly active
};

template <typename T>
struct QpKernels {
  const char* instruction_set;
  void (*solve)(const QpSizes&, const QpArguments<T>&, void* workspace) noexcept;
  void (*adjoint)(const QpSizes&, const QpAdjointArguments<T>&, void* workspace) noexcept;
  bool (*within)(const QpPlan&, QpMatrix which, const T* matrix) noexcept;  // whether it has nothing outside the plan
};

// Bytes of workspace, aligned to kWorkspaceAlignment, that one call may use; 0 if the sizes are too large to count.
std::size_t qp_workspace_bytes(const QpSizes& sizes) noexcept;

// The fastest kernels that this processor can run; and all, best first, for tests: null those that it cannot run.
template <typename T>
const QpKernels<T>& qp_kernels() noexcept;
template <typename T>
const QpKernels<T>* qp_kernels_for(std::size_t instruction_set) noexcept;

}  // namespace icnnrt
