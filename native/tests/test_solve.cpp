// BundleEntropySolve against solutions that were chosen first, against the reference, and by its certificate.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>
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
Real distance(const std::vector<T>& a, const std::vector<Real>& b) {
  Real largest = 0.0L;
  for (std::size_t j = 0; j < b.size(); ++j) {
    const Real difference = std::fabs(static_cast<Real>(a[j]) - b[j]);
    if (!(difference <= largest)) largest = difference;  // NaN stays
  }
  return largest;
}

// Around every width of a vector there is, and up to where a call is no longer small.
const std::size_t kDimensions[] = {1,  2,  3,  4,  5,  6,  7,  8,  9,   10,  15, 16,
                                   17, 23, 31, 32, 33, 63, 64, 65, 100, 159, 300};
const std::size_t kCuts[] = {1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 30, 40};

// Convergence is promised for slopes like these; for random cuts up to 1e3. Cuts that are built backwards are worse
// than random ones of the same slopes: all of the support meets where y is saturated, so that nothing near the solution
// tells of it.
const double kScales[] = {1e-3, 1e-1, 1.0, 10.0, 30.0};
const double kSteepScales[] = {100.0, 1e3, 1e4};

// A converged answer to cuts that were built backwards.
template <typename T>
void check_built(const Built<T>& built, const SolveAnswer<T>& answer, Real y_tolerance) {
  CHECK(complaint(built.cuts, answer) == "");
  const Real size = static_cast<Real>(size_of_values(built.cuts));
  CHECK(answer.residual[2] <= kGapTolerance * size);
  CHECK(distance(answer.y, built.y) <= y_tolerance);
  // Moving offsets by `rounding` moves the value by no more.
  CHECK(std::fabs(answer.lower_bound - built.value) <= built.rounding + kGapTolerance * size);
}

// How far rounding of the offsets to T may move y: dy is about de over the slopes, times how badly the cuts of the
// support are conditioned, for which there is a generous factor.
template <typename T>
Real built_tolerance(const Built<T>& built, double scale) {
  return kYTolerance<T> + 100.0L * built.rounding / static_cast<Real>(scale);
}

TEST_CASE_TEMPLATE("the optimum that was built in is found", T, float, double) {
  each_kernel<T>([](const icnnrt::Kernels<T>& kernels) {
    Caller caller;
    Random random(1);
    for (double scale : kScales)
      for (std::size_t n : kDimensions)
        for (std::size_t k : kCuts) {
          const std::size_t support = 1 + random.below(std::min(k, n));
          CAPTURE(scale);
          CAPTURE(n);
          CAPTURE(k);
          CAPTURE(support);
          const Built<T> built = build_backwards<T>(random, k, n, support, scale);
          check_built(built, caller.solve(kernels, built.cuts), built_tolerance(built, scale));
        }
  });
}

// What an answer's own certificate promises of it, converged or not: the value lies between lower_bound and
// lower_bound + gap, and as -H is 4-strongly convex, 2 |y - y*|^2 <= gap.
TEST_CASE_TEMPLATE("steep cuts: the optimum is where the certificate says", T, float, double) {
  each_kernel<T>([](const icnnrt::Kernels<T>& kernels) {
    Caller caller;
    Random random(14);
    for (double scale : kSteepScales) {
      int solved = 0, all = 0;
      for (std::size_t n : {1, 2, 3, 5, 8, 9, 17, 40, 100})
        for (std::size_t k : {1, 2, 3, 5, 8, 17, 40})
          for (std::size_t steps : {std::size_t{2}, std::size_t{10}, kSteps, std::size_t{500}}) {
            CAPTURE(scale);
            CAPTURE(n);
            CAPTURE(k);
            CAPTURE(steps);
            const std::size_t support = 1 + random.below(std::min(k, n));
            const Built<T> built = build_backwards<T>(random, k, n, support, scale);
            const SolveAnswer<T> answer = caller.solve(kernels, built.cuts, {}, steps);
            CHECK(complaint(built.cuts, answer) == "");
            const Real size = static_cast<Real>(size_of_values(built.cuts));
            const Real rounding = built.rounding + static_cast<Real>(n + k) * kDoubleEps * size;
            const Real below = built.value - static_cast<Real>(answer.lower_bound);
            CHECK(below >= -rounding);
            CHECK(below <= static_cast<Real>(answer.residual[2]) + rounding);
            Real squares = 0.0L;
            for (std::size_t j = 0; j < n; ++j) {
              const Real apart = std::fabs(static_cast<Real>(answer.y[j]) - built.y[j]);
              squares += std::pow(std::fmax(0.0L, apart - kEps<T>), 2.0L);
            }
            CHECK(2.0L * squares <= static_cast<Real>(answer.residual[2]) + 2.0L * rounding);
            const bool converged = answer.residual[2] <= 1e-8 * size_of_values(built.cuts);
            if (steps == kSteps) {
              ++all;
              solved += converged;
            }
            if (steps == 500) CHECK(converged);  // hard, not impossible
          }
      const std::string name = kernels.instruction_set;
      MESSAGE(name << ": " << solved << " of " << all << " solved of those built with slopes of " << scale);
    }
  });
}

TEST_CASE_TEMPLATE("every dimension up to 300", T, float, double) {
  each_kernel<T>([](const icnnrt::Kernels<T>& kernels) {
    Caller caller;
    Random random(2);
    for (std::size_t n = 1; n <= 300; ++n) {
      const std::size_t k = 1 + random.below(40), support = 1 + random.below(std::min(k, n));
      CAPTURE(n);
      CAPTURE(k);
      const Built<T> built = build_backwards<T>(random, k, n, support, 3.0);
      check_built(built, caller.solve(kernels, built.cuts), built_tolerance(built, 3.0));
    }
  });
}

TEST_CASE_TEMPLATE("a warm start changes the way, not the answer", T, float, double) {
  each_kernel<T>([](const icnnrt::Kernels<T>& kernels) {
    Caller caller;
    Random random(3);
    for (double scale : kScales)
      for (std::size_t n : {1, 5, 16, 40})
        for (std::size_t k : {1, 2, 6, 25}) {
          const std::size_t support = 1 + random.below(std::min(k, n));
          const Built<T> built = build_backwards<T>(random, k, n, support, scale);
          const Real tolerance = built_tolerance(built, scale);
          const std::vector<T> cold = caller.solve(kernels, built.cuts).lam;
          for (std::size_t k_prev : {std::size_t{1}, k / 2, k - 1, k}) {
            if (k_prev == 0) continue;
            CAPTURE(scale);
            CAPTURE(n);
            CAPTURE(k);
            CAPTURE(k_prev);
            SUBCASE("from multipliers of the first cuts") {
              // as the solve before would have left them: on the simplex of the first cuts
              std::vector<T> first(cold.begin(), cold.begin() + static_cast<std::ptrdiff_t>(k_prev));
              T total = 0;
              for (T lam : first) total += lam;
              for (T& lam : first) lam = total > 0 ? lam / total : T{1} / static_cast<T>(k_prev);
              check_built(built, caller.solve(kernels, built.cuts, first), tolerance);
            }
            SUBCASE("from one cut alone") {
              std::vector<T> vertex(k_prev, T{0});
              vertex[random.below(k_prev)] = T{1};
              check_built(built, caller.solve(kernels, built.cuts, vertex), tolerance);
            }
            SUBCASE("from all cuts alike") {
              const std::vector<T> uniform(k_prev, T{1} / static_cast<T>(k_prev));
              check_built(built, caller.solve(kernels, built.cuts, uniform), tolerance);
            }
          }
        }
  });
}

TEST_CASE_TEMPLATE("duplicate cuts share their multiplier", T, float, double) {
  each_kernel<T>([](const icnnrt::Kernels<T>& kernels) {
    Caller caller;
    Random random(4);
    for (double scale : kScales)
      for (std::size_t n : {1, 3, 10, 33, 159})
        for (std::size_t copies : {2, 3, 7}) {
          CAPTURE(scale);
          CAPTURE(n);
          CAPTURE(copies);
          const std::size_t k = 1 + random.below(5), support = 1 + random.below(std::min(k, n));
          const Built<T> built = build_backwards<T>(random, k, n, support, scale);
          Built<T> repeated{Cuts<T>(k * copies, n), {}, {}, built.y, built.value, built.rounding};
          for (std::size_t i = 0; i < k * copies; ++i) {
            for (std::size_t j = 0; j < n; ++j) repeated.cuts.slope(i, j) = built.cuts.slope(i % k, j);
            repeated.cuts.offsets[i] = built.cuts.offsets[i % k];
          }
          const SolveAnswer<T> answer = caller.solve(kernels, repeated.cuts);
          check_built(repeated, answer, built_tolerance(built, scale));
          if (scale > 1.0) continue;
          // Where y is not saturated, the multipliers of the copies add up to that of the one.
          const SolveAnswer<T> single = caller.solve(kernels, built.cuts);
          for (std::size_t i = 0; i < k; ++i) {
            Real sum = 0.0L;
            for (std::size_t c = 0; c < copies; ++c) sum += static_cast<Real>(answer.lam[c * k + i]);
            CHECK(std::fabs(sum - static_cast<Real>(single.lam[i])) <= 1e-6L);
          }
        }
  });
}

TEST_CASE_TEMPLATE("all cuts equal", T, float, double) {
  each_kernel<T>([](const icnnrt::Kernels<T>& kernels) {
    Caller caller;
    Random random(5);
    for (double scale : kScales)
      for (std::size_t n : {1, 4, 11, 40})
        for (std::size_t k : {2, 5, 40}) {
          CAPTURE(scale);
          CAPTURE(n);
          CAPTURE(k);
          const Built<T> one = build_backwards<T>(random, 1, n, 1, scale);
          Built<T> all{Cuts<T>(k, n), {}, {}, one.y, one.value, one.rounding};
          for (std::size_t i = 0; i < k; ++i) {
            for (std::size_t j = 0; j < n; ++j) all.cuts.slope(i, j) = one.cuts.slope(0, j);
            all.cuts.offsets[i] = one.cuts.offsets[0];
          }
          check_built(all, caller.solve(kernels, all.cuts), kYTolerance<T>);
        }
  });
}

TEST_CASE_TEMPLATE("of parallel cuts the highest counts", T, float, double) {
  each_kernel<T>([](const icnnrt::Kernels<T>& kernels) {
    Caller caller;
    Random random(6);
    for (double scale : kScales)
      for (std::size_t n : {1, 3, 10, 33})
        for (double below : {1e-6, 1e-3, 1.0, 1e3}) {
          CAPTURE(scale);
          CAPTURE(n);
          CAPTURE(below);
          const std::size_t k = 1 + random.below(5), support = 1 + random.below(std::min(k, n));
          const Built<T> built = build_backwards<T>(random, k, n, support, scale);
          Built<T> doubled{Cuts<T>(2 * k, n), {}, {}, built.y, built.value, built.rounding};
          for (std::size_t i = 0; i < 2 * k; ++i) {
            for (std::size_t j = 0; j < n; ++j) doubled.cuts.slope(i, j) = built.cuts.slope(i / 2, j);
            doubled.cuts.offsets[i] = built.cuts.offsets[i / 2] - static_cast<T>(i % 2 ? below * scale : 0.0);
          }
          check_built(doubled, caller.solve(kernels, doubled.cuts), built_tolerance(built, scale));
        }
  });
}

TEST_CASE_TEMPLATE("one cut: y is sigma(-g), lam is 1", T, float, double) {
  each_kernel<T>([](const icnnrt::Kernels<T>& kernels) {
    Caller caller;
    Random random(7);
    for (double scale : {1e-3, 1.0, 30.0, 1e3, 1e4})
      for (std::size_t n = 1; n <= 70; ++n) {
        CAPTURE(scale);
        CAPTURE(n);
        const Built<T> built = build_backwards<T>(random, 1, n, 1, scale);
        const SolveAnswer<T> answer = caller.solve(kernels, built.cuts);
        CHECK(complaint(built.cuts, answer) == "");
        CHECK(answer.lam[0] == T{1});
        // v is rounded, and so is the gap
        CHECK(std::fabs(answer.residual[2]) <= 1e-15L * static_cast<Real>(size_of_values(built.cuts)));
        for (std::size_t j = 0; j < n; ++j)
          CHECK(std::fabs(static_cast<Real>(answer.y[j]) - built.y[j]) <=
                (kEps<T> / 2 + 4 * kDoubleEps) * built.y[j] + static_cast<Real>(std::numeric_limits<T>::denorm_min()) +
                    1e-300L);
      }
  });
}

TEST_CASE_TEMPLATE("cuts without slope: y is 1/2 and the highest offset counts", T, float, double) {
  each_kernel<T>([](const icnnrt::Kernels<T>& kernels) {
    Caller caller;
    for (T slope : {T{0}, -T{0}, std::numeric_limits<T>::denorm_min(), std::numeric_limits<T>::min()})
      for (std::size_t n : {1, 2, 5, 8, 19})
        for (std::size_t k : {1, 2, 9}) {
          CAPTURE(slope);
          CAPTURE(n);
          CAPTURE(k);
          Cuts<T> cuts(k, n);
          for (std::size_t i = 0; i < k; ++i) {
            for (std::size_t j = 0; j < n; ++j) cuts.slope(i, j) = (i + j) % 2 ? -slope : slope;
            cuts.offsets[i] = static_cast<T>(static_cast<double>(i * i % 5) - 2.0);
          }
          const T highest = *std::max_element(cuts.offsets.begin(), cuts.offsets.end());
          const SolveAnswer<T> answer = caller.solve(kernels, cuts);
          CHECK(complaint(cuts, answer) == "");
          for (T y : answer.y) CHECK(y == T{0.5});
          const Real expected = static_cast<Real>(highest) - static_cast<Real>(n) * std::log(2.0L);
          CHECK(std::fabs(answer.lower_bound - expected) <= 1e-12L);
          CHECK(answer.residual[2] <= 1e-12L);
        }
  });
}

TEST_CASE_TEMPLATE("saturation: slopes of one sign, far beyond what moves sigma", T, float, double) {
  each_kernel<T>([](const icnnrt::Kernels<T>& kernels) {
    Caller caller;
    Random random(8);
    for (double sign : {1.0, -1.0})
      for (double steepness : {10.0, 50.0, 200.0, 800.0})
        for (std::size_t n : {1, 7, 30, 65})
          for (std::size_t k : {1, 2, 5, 20}) {
            CAPTURE(sign);
            CAPTURE(steepness);
            CAPTURE(n);
            CAPTURE(k);
            Cuts<T> cuts = random_cuts<T>(random, k, n, 1.0);
            for (T& g : cuts.slopes) g = static_cast<T>(sign * steepness * (1.0 + std::fabs(static_cast<double>(g))));
            const SolveAnswer<T> answer = caller.solve(kernels, cuts);
            CHECK(complaint(cuts, answer) == "");
            CHECK(answer.residual[2] <= kGapTolerance * static_cast<Real>(size_of_values(cuts)));
            for (T y : answer.y) CHECK(std::fabs(static_cast<double>(y) - (sign > 0 ? 0.0 : 1.0)) <= 1e-4);
          }
  });
}

TEST_CASE_TEMPLATE("large constants in f cost no more than their rounding", T, float, double) {
  each_kernel<T>([](const icnnrt::Kernels<T>& kernels) {
    Caller caller;
    Random random(9);
    for (double height : {-1e3, 1e3, 1e6, -1e6, 1e9})
      for (std::size_t n : {1, 6, 17, 64})
        for (std::size_t k : {1, 4, 12}) {
          CAPTURE(height);
          CAPTURE(n);
          CAPTURE(k);
          const std::size_t support = 1 + random.below(std::min(k, n));
          const Built<T> built = build_backwards<T>(random, k, n, support, 1.0, height);
          const SolveAnswer<T> answer = caller.solve(kernels, built.cuts);
          CHECK(complaint(built.cuts, answer) == "");
          CHECK(answer.residual[2] <= kGapTolerance * static_cast<Real>(size_of_values(built.cuts)));
          CHECK(std::fabs(answer.lower_bound - built.value) <=
                built.rounding + kGapTolerance * static_cast<Real>(size_of_values(built.cuts)));
          // y is a root more sensitive than the value where the gap is rounding of v: 2 |dy|^2 <= gap
          const Real uncertain = built.rounding + kDoubleEps * static_cast<Real>(size_of_values(built.cuts));
          CHECK(distance(answer.y, built.y) <= kYTolerance<T> + std::sqrt(8.0L * uncertain));
        }
  });
}

TEST_CASE_TEMPLATE("random cuts: the reference's answer", T, float, double) {
  Random random(10);
  Caller caller;
  for (double scale : {1e-3, 1e-1, 1.0, 10.0, 100.0, 1e3})
    for (std::size_t n : {1, 2, 3, 7, 10, 24, 40, 159})
      for (std::size_t k : {2, 5, 10, 40}) {
        CAPTURE(scale);
        CAPTURE(n);
        CAPTURE(k);
        const Cuts<T> cuts = random_cuts<T>(random, k, n, scale);
        const ReferenceSolution expected = reference_solution(cuts);
        const Real size = static_cast<Real>(size_of_values(cuts));
        REQUIRE(expected.at.gap <= 1e-15L * size);
        each_kernel<T>([&](const icnnrt::Kernels<T>& kernels) {
          const SolveAnswer<T> answer = caller.solve(kernels, cuts);
          CHECK(complaint(cuts, answer) == "");
          CHECK(distance(answer.y, expected.at.y) <= kYTolerance<T>);
          CHECK(std::fabs(answer.lower_bound - expected.at.dual) <= kGapTolerance * size);
          CHECK(answer.residual[2] <= kGapTolerance * size);
        });
      }
}

// Convergence is not promised here, only the truth about it.
TEST_CASE_TEMPLATE("slopes of 1e4 and beyond: the certificate holds whatever happens", T, float, double) {
  each_kernel<T>([](const icnnrt::Kernels<T>& kernels) {
    Caller caller;
    Random random(11);
    int solved = 0, all = 0;
    for (double scale : {1e4, 1e5, 1e8, 1e20})
      for (std::size_t n : {1, 2, 5, 10, 33, 100})
        for (std::size_t k : {1, 2, 5, 10, 30}) {
          CAPTURE(scale);
          CAPTURE(n);
          CAPTURE(k);
          const Cuts<T> cuts = random_cuts<T>(random, k, n, scale);
          const SolveAnswer<T> answer = caller.solve(kernels, cuts);
          CHECK(complaint(cuts, answer) == "");
          if (scale == 1e4) {
            ++all;
            solved += answer.residual[2] <= 1e-8 * size_of_values(cuts);
          }
        }
    const std::string name = kernels.instruction_set;
    MESSAGE(name << ": " << solved << " of " << all << " solved of random ones with slopes of 1e4");
  });
}

TEST_CASE_TEMPLATE("no steps: where it starts, and the truth about it", T, float, double) {
  each_kernel<T>([](const icnnrt::Kernels<T>& kernels) {
    Caller caller;
    Random random(15);
    for (std::size_t n : {1, 9, 40})
      for (std::size_t k : {1, 3, 8, 20}) {
        CAPTURE(n);
        CAPTURE(k);
        const Cuts<T> cuts = random_cuts<T>(random, k, n, 3.0);
        const SolveAnswer<T> answer = caller.solve(kernels, cuts, {}, 0);
        CHECK(complaint(cuts, answer) == "");
        const Real start = 1.0L / static_cast<Real>(k), rounding = kEps<T> + static_cast<Real>(k) * kDoubleEps;
        for (T lam : answer.lam) CHECK(std::fabs(static_cast<Real>(lam) - start) <= rounding * start);
      }
  });
}

TEST_CASE_TEMPLATE("fewer steps: the best iterate, and the truth about it", T, float, double) {
  each_kernel<T>([](const icnnrt::Kernels<T>& kernels) {
    Caller caller;
    Random random(12);
    for (double scale : {1.0, 30.0, 1e3, 1e4})
      for (std::size_t n : {1, 9, 40})
        for (std::size_t k : {2, 7, 20}) {
          const Cuts<T> cuts = random_cuts<T>(random, k, n, scale);
          double last = std::numeric_limits<double>::infinity();
          for (std::size_t steps : {0, 1, 2, 3, 5, 8, 13, 20, 40, 100}) {
            CAPTURE(scale);
            CAPTURE(n);
            CAPTURE(k);
            CAPTURE(steps);
            const SolveAnswer<T> answer = caller.solve(kernels, cuts, {}, steps);
            CHECK(complaint(cuts, answer) == "");
            CHECK(answer.residual[2] <= last + 1e-14 * size_of_values(cuts));
            last = answer.residual[2];
          }
        }
  });
}

TEST_CASE_TEMPLATE("the order of the cuts, a constant, and the sides of the box do not matter", T, float, double) {
  each_kernel<T>([](const icnnrt::Kernels<T>& kernels) {
    Caller caller;
    Random random(13);
    for (double scale : {0.1, 1.0, 30.0})
      for (std::size_t n : {1, 5, 18, 50})
        for (std::size_t k : {2, 6, 15}) {
          CAPTURE(scale);
          CAPTURE(n);
          CAPTURE(k);
          const Cuts<T> cuts = random_cuts<T>(random, k, n, scale);
          const SolveAnswer<T> answer = caller.solve(kernels, cuts);
          const std::vector<Real> y = to_real(answer.y);
          const Real size = static_cast<Real>(size_of_values(cuts));

          Cuts<T> reversed(k, n);
          for (std::size_t i = 0; i < k; ++i) {
            for (std::size_t j = 0; j < n; ++j) reversed.slope(i, j) = cuts.slope(k - 1 - i, j);
            reversed.offsets[i] = cuts.offsets[k - 1 - i];
          }
          const SolveAnswer<T> of_reversed = caller.solve(kernels, reversed);
          CHECK(distance(of_reversed.y, y) <= 2 * kYTolerance<T>);
          CHECK(std::fabs(of_reversed.lower_bound - answer.lower_bound) <= 2 * kGapTolerance * size);

          Cuts<T> mirrored = cuts;
          for (T& g : mirrored.slopes) g = -g;
          std::vector<Real> mirrored_y = y;
          for (Real& one : mirrored_y) one = 1.0L - one;
          const SolveAnswer<T> of_mirrored = caller.solve(kernels, mirrored);
          CHECK(distance(of_mirrored.y, mirrored_y) <= 2 * kYTolerance<T>);

          Cuts<T> below(k + 1, n);  // a cut that lies below the others everywhere
          std::copy(cuts.slopes.begin(), cuts.slopes.end(), below.slopes.begin());
          std::copy(cuts.offsets.begin(), cuts.offsets.end(), below.offsets.begin());
          below.copy_cut(0, k);
          below.offsets[k] -= static_cast<T>(100.0 * scale);
          const SolveAnswer<T> of_below = caller.solve(kernels, below);
          CHECK(distance(of_below.y, y) <= 2 * kYTolerance<T>);
          CHECK(static_cast<double>(of_below.lam[k]) <= 1e-6);
        }
  });
}

}  // namespace
}  // namespace icnnrt_tests
