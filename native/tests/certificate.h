// Whether an answer is what it says it is, told in long double by the cuts and the answer alone: converged or not,
// whatever the cuts. Used by the tests and by the fuzzer.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdio>
#include <limits>
#include <string>
#include <vector>

#include "call.h"
#include "cuts.h"
#include "reference.h"

namespace icnnrt_tests {

inline std::string describe(const char* what, Real got, Real allowed) {
  char text[200];
  std::snprintf(text, sizeof text, "%s: %.6Lg, allowed %.6Lg", what, got, allowed);
  return text;
}

template <typename T>
bool all_finite(const std::vector<T>& values) {
  for (T value : values)
    if (!std::isfinite(value)) return false;
  return true;
}

template <typename T>
std::vector<Real> to_real(const std::vector<T>& values) {
  return std::vector<Real>(values.begin(), values.end());
}

// Rounding of T and of the double arithmetic behind it.
template <typename T>
inline constexpr Real kEps = static_cast<Real>(std::numeric_limits<T>::epsilon());
inline constexpr Real kDoubleEps = static_cast<Real>(std::numeric_limits<double>::epsilon());
// Next to nothing rounding is no longer relative: a number of T, and a product in double, is off by half of these.
template <typename T>
inline constexpr Real kLeast = static_cast<Real>(std::numeric_limits<T>::denorm_min());
inline constexpr Real kDoubleLeast = static_cast<Real>(std::numeric_limits<double>::denorm_min());

// Beyond this the kernels' own arithmetic may overflow, and NaN is an honest answer.
inline constexpr double kHuge = 1e100;

// Cuts with NaN or infinity must show in everything that could be taken for an answer.
template <typename T>
std::string complaint_if_not_poisoned(const SolveAnswer<T>& answer) {
  for (T y : answer.y)
    if (!std::isnan(y)) return "y of cuts that are not finite is not NaN";
  if (!std::isnan(answer.lower_bound)) return "lower_bound of cuts that are not finite is not NaN";
  if (!std::isnan(answer.residual[0])) return "residual[0] of cuts that are not finite is not NaN";
  if (!std::isnan(answer.residual[2])) return "residual[2] of cuts that are not finite is not NaN";
  return {};
}

// What is wrong with an answer of `solve`; empty if nothing is.
template <typename T>
std::string complaint(const Cuts<T>& cuts, const SolveAnswer<T>& answer) {
  const std::size_t k = cuts.k, n = cuts.n;
  if (!answer.intact) return "memory that is not an output was written";
  if (!all_finite(cuts.slopes) || !all_finite(cuts.offsets)) return complaint_if_not_poisoned(answer);
  const double size = size_of_values(cuts);
  if (size > kHuge && complaint_if_not_poisoned(answer).empty()) return {};

  // lam on the simplex; as handed out each entry is rounded to T, and the sum with them
  Real total = 0.0L;
  for (T lam : answer.lam) {
    if (!std::isfinite(lam)) return "lam is not finite";
    if (lam < 0) return describe("lam is negative", lam, 0.0L);
    total += static_cast<Real>(lam);
  }
  const Real off_simplex = kEps<T> + static_cast<Real>(k) * kDoubleEps;
  if (!(std::fabs(total - 1.0L) <= off_simplex)) return describe("1'lam - 1", total - 1.0L, off_simplex);
  const double* const r = answer.residual;
  Real y_size = 1.0L;  // of its largest entry
  if (cuts.domain == Domain::kQuadratic)
    for (T y : answer.y) y_size = std::fmax(y_size, std::fabs(static_cast<Real>(y)));
  if (!(r[0] >= 0.0 && r[0] <= kEps<T> * y_size)) return describe("residual[0]", r[0], kEps<T> * y_size);
  if (!(r[1] >= 0.0 && r[1] <= static_cast<Real>(k) * kDoubleEps))
    return describe("residual[1]", r[1], static_cast<Real>(k) * kDoubleEps);

  // What can be off between the kernel and the same formulas on the lam it handed out. s = -G'lam: rounding of lam to
  // T, and the sum over the cuts. y = sigma(s): D changes at most by the factor e^|ds| on the way. Then v, y and s go
  // into the gap and the dual value. Each has a floor, for what is rounded to nothing on the way.
  const std::vector<Real> lam = to_real(answer.lam);
  const Evaluation at = evaluate(cuts, lam);
  const Real sum_error = static_cast<Real>(k + 4) * kDoubleEps;
  const Real lam_error = (kEps<T> > kDoubleEps ? kEps<T> : 0.0L) + sum_error;
  std::vector<Real> y_error(n);
  Real dual_error = 0.0L, dual_size = 0.0L;
  std::vector<Real> s_errors(n);
  Real largest_s_error = 0.0L, sum_of_y = 0.0L;
  for (std::size_t j = 0; j < n; ++j) {
    Real s_size = 0.0L, s_floor = 0.0L;
    for (std::size_t i = 0; i < k; ++i) {
      const Real slope = std::fabs(static_cast<Real>(cuts.slope(i, j)));
      s_size += lam[i] * slope;
      s_floor += kLeast<T> * slope + kDoubleLeast;
    }
    s_errors[j] = lam_error * s_size + s_floor;
    largest_s_error = std::fmax(largest_s_error, s_errors[j]);
  }
  for (std::size_t j = 0; j < n; ++j) {
    const Real s_error = s_errors[j];
    if (cuts.domain == Domain::kEntropy) {
      const Real rounding = 4.0L * kDoubleEps * at.y[j];
      y_error[j] = s_error > 100.0L ? 1.0L : std::fmin(1.0L, at.D[j] * std::expm1(s_error) + rounding);
      dual_error += s_error;
      dual_size += 0.5L * std::fabs(at.s[j]) + 1.0L;
    } else if (cuts.domain == Domain::kSimplex) {
      // s shifts by its largest entry, and y sums over the columns
      const Real rounding = static_cast<Real>(n + 4) * kDoubleEps * at.y[j];
      y_error[j] =
          largest_s_error > 50.0L ? 1.0L : std::fmin(1.0L, at.y[j] * std::expm1(2.0L * largest_s_error) + rounding);
      dual_error = std::fmax(dual_error, 2.0L * s_error);
      dual_size = std::fmax(dual_size, 2.0L * std::fabs(at.s[j]) + std::log(static_cast<Real>(n)) + 1.0L);
    } else {
      y_error[j] = s_error + 4.0L * kDoubleEps * std::fabs(at.y[j]);
      dual_error += (std::fabs(at.s[j]) + s_error) * s_error;
      dual_size += at.s[j] * at.s[j];
    }
    const Real y = static_cast<Real>(answer.y[j]);
    const Real allowed = y_error[j] + kEps<T> * std::fabs(at.y[j]) + static_cast<Real>(std::numeric_limits<T>::min()) +
                         1e-300L;  // subnormal y may be taken as zero, and the kernels' exp ends at e^-708
    if (!(std::fabs(y - at.y[j]) <= allowed)) return describe("y - y(lam)", y - at.y[j], allowed);
    if (cuts.domain != Domain::kQuadratic && !(y >= 0.0L && y <= 1.0L)) return describe("y outside [0, 1]", y, 0.0L);
    sum_of_y += y;
  }
  const Real off_sum = static_cast<Real>(n + 1) * kDoubleEps + 0.5L * kEps<T>;
  if (cuts.domain == Domain::kSimplex && !(std::fabs(sum_of_y - 1.0L) <= off_sum))
    return describe("1'y - 1", sum_of_y - 1.0L, off_sum);
  Real v_error = 0.0L;
  const Real terms = static_cast<Real>(n + k + 8) * kDoubleEps;
  for (std::size_t i = 0; i < k; ++i) {
    Real error = terms * std::fabs(static_cast<Real>(cuts.offsets[i]));
    for (std::size_t j = 0; j < n; ++j)
      error += std::fabs(static_cast<Real>(cuts.slope(i, j))) *
               (y_error[j] + terms * (cuts.domain == Domain::kEntropy ? 0.5L : std::fabs(at.y[j]) + cuts.centre()));
    v_error = std::fmax(v_error, error + static_cast<Real>(n) * kDoubleLeast);
    dual_error += std::fabs(static_cast<Real>(cuts.offsets[i])) * (lam[i] * lam_error + kLeast<T>)+kDoubleLeast;
    dual_size += lam[i] * std::fabs(static_cast<Real>(cuts.offsets[i]));
  }
  dual_error += terms * dual_size + static_cast<Real>(n) * kDoubleLeast;
  const Real gap_error = 2.0L * v_error + 2.0L * lam_error * static_cast<Real>(size);
  if (!(std::fabs(r[2] - at.gap) <= gap_error)) return describe("residual[2] - gap", r[2] - at.gap, gap_error);
  if (!(std::fabs(answer.lower_bound - at.dual) <= dual_error))
    return describe("lower_bound - dual(lam)", answer.lower_bound - at.dual, dual_error);
  return {};
}

}  // namespace icnnrt_tests
