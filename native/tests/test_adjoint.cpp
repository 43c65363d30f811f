// BundleEntropyAdjoint against the linear system of Proposition 3 in long double, and against differences of solutions.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "certificate.h"
#include "cuts.h"
#include "each_kernel.h"
#include "reference.h"
#include "tolerances.h"

namespace icnnrt_tests {
namespace {

template <typename T>
std::vector<T> rounded(const std::vector<Real>& values) {
  std::vector<T> result;
  for (Real value : values) result.push_back(static_cast<T>(value));
  return result;
}

template <typename T>
std::vector<T> random_vector(Random& random, std::size_t size) {
  std::vector<T> result(size);
  for (T& value : result) value = static_cast<T>(random.normal());
  return result;
}

template <typename T>
Real largest_difference(const std::vector<T>& a, const std::vector<Real>& b) {
  Real largest = 0.0L;
  for (std::size_t i = 0; i < b.size(); ++i) {
    const Real difference = std::fabs(static_cast<Real>(a[i]) - b[i]);
    if (!(difference <= largest)) largest = difference;
  }
  return largest;
}

Real largest_of(const std::vector<Real>& values) {
  Real largest = 0.0L;
  for (Real value : values) largest = std::fmax(largest, std::fabs(value));
  return largest;
}

// c_lam has the units of y_bar / G.
template <typename T>
Real unit_of_c_lam(const Cuts<T>& cuts, const std::vector<T>& y_bar) {
  Real slope = 0.0L;
  for (T g : cuts.slopes) slope = std::fmax(slope, std::fabs(static_cast<Real>(g)));
  return std::fmax(1.0L, largest_of(to_real(y_bar))) / std::fmax(slope, 1e-30L);
}

template <typename T>
void check_adjoint(const icnnrt::Kernels<T>& kernels, Caller& caller, const Built<T>& built,
                   const std::vector<T>& y_bar) {
  const Cuts<T>& cuts = built.cuts;
  const std::vector<T> lam = rounded<T>(built.lam);
  const AdjointAnswer<T> answer = caller.adjoint(kernels, cuts, lam, y_bar);
  CHECK(answer.intact);
  const Evaluation at = evaluate(cuts, built.lam);
  const AdjointSolution expected = reference_adjoint(cuts, built.support, at.D, to_real(y_bar));
  const Real y_size = std::fmax(1.0L, largest_of(to_real(y_bar)));
  CHECK(largest_difference(answer.c_y, expected.c_y) <= kAdjointTolerance<T> * y_size);
  // Moves of c_lam that leave G'c_lam are not seen by c_y: nearly dependent slopes make it less well determined.
  const Real lam_size = std::fmax(unit_of_c_lam(cuts, y_bar), largest_of(expected.c_lam));
  CHECK(largest_difference(answer.c_lam, expected.c_lam) <= 10 * kAdjointTolerance<T> * lam_size);
}

TEST_CASE_TEMPLATE("the adjoint solves the system of Proposition 3", T, float, double) {
  each_kernel<T>([](const icnnrt::Kernels<T>& kernels) {
    Caller caller;
    Random random(21);
    for (double scale : {1e-3, 1e-1, 1.0, 3.0})
      for (std::size_t n : {1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, 159, 300})
        for (std::size_t k : {1, 2, 3, 5, 8, 17, 40}) {
          // half as many active cuts as dimensions, so that they are far from dependent
          const std::size_t support = 1 + random.below(std::min(k, (n + 1) / 2));
          CAPTURE(scale);
          CAPTURE(n);
          CAPTURE(k);
          CAPTURE(support);
          const Built<T> built = build_backwards<T>(random, k, n, support, scale);
          check_adjoint(kernels, caller, built, random_vector<T>(random, n));
        }
  });
}

// The solution of the cuts moved along a direction, in long double.
std::vector<Real> moved_y(const Cuts<double>& cuts, const Cuts<double>& direction, double step) {
  Cuts<double> moved = cuts;
  for (std::size_t i = 0; i < moved.slopes.size(); ++i) moved.slopes[i] += step * direction.slopes[i];
  for (std::size_t i = 0; i < moved.offsets.size(); ++i) moved.offsets[i] += step * direction.offsets[i];
  return reference_solution(moved).at.y;
}

TEST_CASE("the adjoint is the derivative of the solution") {
  // d(y_bar'y) = c_lam'de + sum (lam c_y' + c_lam (y - 1/2)') dG
  Caller caller;
  Random random(22);
  for (double scale : {0.3, 1.0, 5.0})
    for (std::size_t n : {1, 2, 5, 12, 33})
      for (std::size_t k : {1, 2, 5, 12}) {
        CAPTURE(scale);
        CAPTURE(n);
        CAPTURE(k);
        const std::size_t support = 1 + random.below(std::min(k, n));
        const Built<double> built = build_backwards<double>(random, k, n, support, scale);
        const Cuts<double> direction = random_cuts<double>(random, k, n, 1.0);
        const std::vector<double> y_bar = random_vector<double>(random, n);
        // Small beside the margin of the cuts that are not active, large beside the rounding of the moved cuts; a
        // power of two, so that the two steps are of the same length.
        const double step = 0x1p-16 * scale;
        const std::vector<Real> ahead = moved_y(built.cuts, direction, step);
        const std::vector<Real> behind = moved_y(built.cuts, direction, -step);
        Real difference = 0.0L;
        for (std::size_t j = 0; j < n; ++j) difference += static_cast<Real>(y_bar[j]) * (ahead[j] - behind[j]);
        difference /= 2.0L * static_cast<Real>(step);

        each_kernel<double>([&](const icnnrt::Kernels<double>& kernels) {
          const SolveAnswer<double> solved = caller.solve(kernels, built.cuts);
          const AdjointAnswer<double> answer = caller.adjoint(kernels, built.cuts, solved.lam, y_bar);
          Real derivative = 0.0L, terms = 0.0L;
          for (std::size_t i = 0; i < k; ++i) {
            derivative += static_cast<Real>(answer.c_lam[i]) * static_cast<Real>(direction.offsets[i]);
            for (std::size_t j = 0; j < n; ++j) {
              const Real g_bar = static_cast<Real>(solved.lam[i]) * static_cast<Real>(answer.c_y[j]) +
                                 static_cast<Real>(answer.c_lam[i]) * (static_cast<Real>(solved.y[j]) - 0.5L);
              derivative += g_bar * static_cast<Real>(direction.slope(i, j));
              terms += std::fabs(g_bar * static_cast<Real>(direction.slope(i, j)));
            }
          }
          // the error of central differences is the step squared times the third derivative
          CHECK(std::fabs(derivative - difference) <= 1e-7L * (1.0L + terms));
        });
      }
}

TEST_CASE_TEMPLATE("the adjoint shares out duplicates", T, float, double) {
  each_kernel<T>([](const icnnrt::Kernels<T>& kernels) {
    Caller caller;
    Random random(23);
    for (double scale : {0.1, 1.0, 3.0})
      for (std::size_t n : {1, 4, 11, 40})
        for (std::size_t copies : {2, 5}) {
          CAPTURE(scale);
          CAPTURE(n);
          CAPTURE(copies);
          const std::size_t k = 4, support = 1 + random.below(std::min(k, (n + 1) / 2));
          const Built<T> built = build_backwards<T>(random, k, n, support, scale);
          const std::vector<T> y_bar = random_vector<T>(random, n);
          Cuts<T> repeated(k * copies, n);
          std::vector<T> lam(k * copies);
          for (std::size_t i = 0; i < k * copies; ++i) {
            for (std::size_t j = 0; j < n; ++j) repeated.slope(i, j) = built.cuts.slope(i % k, j);
            repeated.offsets[i] = built.cuts.offsets[i % k];
            lam[i] = static_cast<T>(built.lam[i % k] / static_cast<Real>(copies));
          }
          const AdjointAnswer<T> answer = caller.adjoint(kernels, repeated, lam, y_bar);
          CHECK(answer.intact);
          const Evaluation at = evaluate(built.cuts, built.lam);
          const AdjointSolution expected = reference_adjoint(built.cuts, built.support, at.D, to_real(y_bar));
          const Real y_size = std::fmax(1.0L, largest_of(to_real(y_bar)));
          CHECK(largest_difference(answer.c_y, expected.c_y) <= kAdjointTolerance<T> * y_size);
          std::vector<Real> sums(k, 0.0L);
          for (std::size_t i = 0; i < k * copies; ++i) sums[i % k] += static_cast<Real>(answer.c_lam[i]);
          const Real lam_size = std::fmax(unit_of_c_lam(built.cuts, y_bar), largest_of(expected.c_lam));
          CHECK(largest_difference(sums, expected.c_lam) <= 10 * kAdjointTolerance<T> * lam_size);
        }
  });
}

// Interior points leave every cut a little multiplier: the slack of an inactive one must keep it out all the same.
TEST_CASE_TEMPLATE("inactive cuts with small multipliers do not count", T, float, double) {
  each_kernel<T>([](const icnnrt::Kernels<T>& kernels) {
    Caller caller;
    Random random(26);
    for (double small : {1e-20, 1e-15, 1e-12})
      for (std::size_t n : {2, 5, 17, 40})
        for (std::size_t k : {2, 6, 15}) {
          CAPTURE(small);
          CAPTURE(n);
          CAPTURE(k);
          const Built<T> built = build_backwards<T>(random, k, n, 1 + random.below(std::min(k - 1, (n + 1) / 2)), 1.0);
          const std::vector<T> y_bar = random_vector<T>(random, n);
          std::vector<T> lam = rounded<T>(built.lam);
          for (T& one : lam) one = one == T{0} ? static_cast<T>(small) : one;
          const AdjointAnswer<T> answer = caller.adjoint(kernels, built.cuts, lam, y_bar);
          CHECK(answer.intact);
          const Evaluation at = evaluate(built.cuts, built.lam);
          const AdjointSolution expected = reference_adjoint(built.cuts, built.support, at.D, to_real(y_bar));
          const Real y_size = std::fmax(1.0L, largest_of(to_real(y_bar)));
          CHECK(largest_difference(answer.c_y, expected.c_y) <= kAdjointTolerance<T> * y_size);
        }
  });
}

TEST_CASE_TEMPLATE("the adjoint is linear in y_bar", T, float, double) {
  each_kernel<T>([](const icnnrt::Kernels<T>& kernels) {
    Caller caller;
    Random random(24);
    for (std::size_t n : {1, 6, 17, 70})
      for (std::size_t k : {1, 3, 10}) {
        CAPTURE(n);
        CAPTURE(k);
        const std::size_t support = 1 + random.below(std::min(k, (n + 1) / 2));
        const Built<T> built = build_backwards<T>(random, k, n, support, 1.0);
        const std::vector<T> lam = rounded<T>(built.lam), y_bar = random_vector<T>(random, n);
        std::vector<T> larger = y_bar, zero(n, T{0});
        for (T& value : larger) value *= T{1024};
        const AdjointAnswer<T> one = caller.adjoint(kernels, built.cuts, lam, y_bar);
        const AdjointAnswer<T> many = caller.adjoint(kernels, built.cuts, lam, larger);
        const AdjointAnswer<T> none = caller.adjoint(kernels, built.cuts, lam, zero);
        // Powers of two change no rounding.
        for (std::size_t j = 0; j < n; ++j) CHECK(many.c_y[j] == T{1024} * one.c_y[j]);
        for (std::size_t i = 0; i < k; ++i) CHECK(many.c_lam[i] == T{1024} * one.c_lam[i]);
        for (T value : none.c_y) CHECK(value == T{0});
        for (T value : none.c_lam) CHECK(value == T{0});
      }
  });
}

// Steep cuts make the system too badly conditioned for a comparison; what must hold all the same is that c_lam sums to
// nothing (a constant added to f does not move y), that c_y belongs to it, and that all is finite.
TEST_CASE_TEMPLATE("the adjoint of steep, saturated and unsolved cuts", T, float, double) {
  each_kernel<T>([](const icnnrt::Kernels<T>& kernels) {
    Caller caller;
    Random random(25);
    for (double scale : {10.0, 1e2, 1e3, 1e4})
      for (std::size_t n : {1, 5, 16, 40})
        for (std::size_t k : {1, 2, 5, 20})
          for (std::size_t steps : {std::size_t{0}, kSteps}) {
            CAPTURE(scale);
            CAPTURE(n);
            CAPTURE(k);
            CAPTURE(steps);
            const Cuts<T> cuts = random_cuts<T>(random, k, n, scale);
            const SolveAnswer<T> solved = caller.solve(kernels, cuts, {}, steps);
            const std::vector<T> y_bar = random_vector<T>(random, n);
            const AdjointAnswer<T> answer = caller.adjoint(kernels, cuts, solved.lam, y_bar);
            CHECK(answer.intact);
            CHECK(all_finite(answer.c_y));
            CHECK(all_finite(answer.c_lam));
            const Evaluation at = evaluate(cuts, to_real(solved.lam));
            Real sum = 0.0L, size = 0.0L;
            for (T c : answer.c_lam) {
              sum += static_cast<Real>(c);
              size += std::fabs(static_cast<Real>(c));
            }
            CHECK(std::fabs(sum) <= (kEps<T> + 1e-9L) * std::fmax(size, unit_of_c_lam(cuts, y_bar)));
            for (std::size_t j = 0; j < n; ++j) {
              Real g_c = static_cast<Real>(y_bar[j]), terms = std::fabs(g_c);
              for (std::size_t i = 0; i < k; ++i) {
                const Real term = static_cast<Real>(cuts.slope(i, j)) * static_cast<Real>(answer.c_lam[i]);
                g_c += term;
                terms += std::fabs(term);
              }
              // D is known to the rounding of s, which grows with the slopes
              const Real d_error = 100.0L * static_cast<Real>(scale) * kDoubleEps;
              CHECK(std::fabs(static_cast<Real>(answer.c_y[j]) + at.D[j] * g_c) <=
                    at.D[j] * terms * (2.0L * kEps<T> + d_error) + 1e-30L);
            }
          }
  });
}

}  // namespace
}  // namespace icnnrt_tests
