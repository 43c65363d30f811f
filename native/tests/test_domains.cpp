// BundleSimplexSolve, BundleQuadraticSolve and their adjoints: by certificate, against solutions that were chosen
// first, against the reference, and against differences of solutions. What does not depend on the domain is tested with
// the box, in test_solve.cpp and its neighbours.
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

constexpr Domain kOthers[] = {Domain::kSimplex, Domain::kQuadratic};

template <typename T, typename Body>
void each_domain_and_kernel(const Body& body) {
  for (Domain domain : kOthers) {
    const std::string name = domain == Domain::kSimplex ? "simplex" : "quadratic";
    CAPTURE(name);
    each_kernel<T>(body, domain);
  }
}

template <typename A>
Real largest_of(const std::vector<A>& values) {
  Real largest = 0.0L;
  for (A value : values) {
    const Real size = std::fabs(static_cast<Real>(value));
    if (!(size <= largest)) largest = size;  // NaN stays
  }
  return largest;
}

template <typename A, typename B>
Real distance(const std::vector<A>& a, const std::vector<B>& b) {
  std::vector<Real> difference;
  for (std::size_t i = 0; i < b.size(); ++i) difference.push_back(static_cast<Real>(a[i]) - static_cast<Real>(b[i]));
  return largest_of(difference);
}

template <typename T>
std::vector<T> random_vector(Random& random, std::size_t size) {
  std::vector<T> result(size);
  for (T& value : result) value = static_cast<T>(random.normal());
  return result;
}

// Cuts of the support must be able to meet: on the simplex y has n - 1 dimensions, and all of them meet anywhere in n.
std::size_t random_support(Random& random, std::size_t k, std::size_t n) { return 1 + random.below(std::min(k, n)); }

// y has the units of the slopes where it is not confined.
template <typename T>
Real y_tolerance(const std::vector<Real>& y) {
  return kYTolerance<T> * std::fmax(1.0L, largest_of(y));
}

template <typename T>
void check_built(const Built<T>& built, const SolveAnswer<T>& answer, Real tolerance) {
  CHECK(complaint(built.cuts, answer) == "");
  const Real size = static_cast<Real>(size_of_values(built.cuts));
  CHECK(answer.residual[2] <= kGapTolerance * size);
  CHECK(distance(answer.y, built.y) <= tolerance);
  CHECK(std::fabs(answer.lower_bound - built.value) <= built.rounding + kGapTolerance * size);
}

// As in test_solve.cpp: how far rounding of the offsets to T may move y.
template <typename T>
Real built_tolerance(const Built<T>& built, double scale) {
  return y_tolerance<T>(built.y) + 100.0L * built.rounding / static_cast<Real>(scale);
}

TEST_CASE_TEMPLATE("other domains: the optimum that was built in is found", T, float, double) {
  each_domain_and_kernel<T>([](const icnnrt::Kernels<T>& kernels) {
    Caller caller;
    Random random(61);
    for (double scale : {1e-3, 1e-1, 1.0, 10.0})
      for (std::size_t n : {1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 33, 64, 159})
        for (std::size_t k : {1, 2, 3, 5, 8, 17, 40}) {
          const std::size_t support = random_support(random, k, n);
          CAPTURE(scale);
          CAPTURE(n);
          CAPTURE(k);
          CAPTURE(support);
          const Built<T> built = build_backwards<T>(random, k, n, support, scale, 0.0, kernels.domain);
          const SolveAnswer<T> cold = caller.solve(kernels, built.cuts);
          check_built(built, cold, built_tolerance(built, scale));
          const std::vector<T> first(cold.lam.begin(), cold.lam.begin() + static_cast<std::ptrdiff_t>((k + 1) / 2));
          check_built(built, caller.solve(kernels, built.cuts, first), built_tolerance(built, scale));
          std::vector<T> vertex(k, T{0});
          vertex[random.below(k)] = T{1};
          check_built(built, caller.solve(kernels, built.cuts, vertex), built_tolerance(built, scale));
        }
  });
}

// What an answer's own certificate promises of it, converged or not: R is 1-strongly convex, in the sum of magnitudes
// on the simplex and in the root of the sum of squares elsewhere, so that |y - y*|^2 / 2 <= gap.
TEST_CASE_TEMPLATE("other domains, steep cuts: the optimum is where the certificate says", T, float, double) {
  each_domain_and_kernel<T>([](const icnnrt::Kernels<T>& kernels) {
    Caller caller;
    Random random(62);
    for (double scale : {30.0, 100.0, 1e3, 1e4}) {
      int solved = 0, all = 0;
      for (std::size_t n : {1, 2, 3, 5, 8, 9, 17, 40, 100})
        for (std::size_t k : {1, 2, 3, 5, 8, 17, 40})
          for (std::size_t steps : {std::size_t{2}, std::size_t{10}, kSteps, std::size_t{500}}) {
            CAPTURE(scale);
            CAPTURE(n);
            CAPTURE(k);
            CAPTURE(steps);
            const std::size_t support = random_support(random, k, n);
            const Built<T> built = build_backwards<T>(random, k, n, support, scale, 0.0, kernels.domain);
            const SolveAnswer<T> answer = caller.solve(kernels, built.cuts, {}, steps);
            CHECK(complaint(built.cuts, answer) == "");
            const Real size = static_cast<Real>(size_of_values(built.cuts));
            const Real rounding = built.rounding + static_cast<Real>(n + k) * kDoubleEps * size;
            const Real below = built.value - static_cast<Real>(answer.lower_bound);
            CHECK(below >= -rounding);
            CHECK(below <= static_cast<Real>(answer.residual[2]) + rounding);
            Real sum = 0.0L, squares = 0.0L;
            for (std::size_t j = 0; j < n; ++j) {
              const Real y = built.y[j], far = std::fabs(static_cast<Real>(answer.y[j]) - y);
              const Real apart = std::fmax(0.0L, far - kEps<T> * std::fabs(y) - kEps<T> * kEps<T>);
              sum += apart;
              squares += apart * apart;
            }
            if (kernels.domain == Domain::kSimplex) squares = sum * sum;
            CHECK(0.5L * squares <= static_cast<Real>(answer.residual[2]) + 2.0L * rounding);
            const bool converged = answer.residual[2] <= 1e-8 * size_of_values(built.cuts);
            if (steps == kSteps) {
              ++all;
              solved += converged;
            }
            if (steps == 500 || (steps == kSteps && kernels.domain == Domain::kQuadratic)) CHECK(converged);
          }
      const std::string name = kernels.instruction_set;
      const std::string of = kernels.domain == Domain::kSimplex ? ", simplex: " : ", quadratic: ";
      MESSAGE(name << of << solved << " of " << all << " solved of those built with slopes of " << scale);
    }
  });
}

TEST_CASE_TEMPLATE("other domains, random cuts: the reference's answer", T, float, double) {
  Caller caller;
  for (Domain domain : kOthers) {
    Random random(63);
    for (double scale : {1e-3, 1e-1, 1.0, 10.0, 100.0, 1e3})
      for (std::size_t n : {1, 2, 7, 10, 24, 159})
        for (std::size_t k : {2, 5, 12}) {
          const std::string name = domain == Domain::kSimplex ? "simplex" : "quadratic";
          CAPTURE(name);
          CAPTURE(scale);
          CAPTURE(n);
          CAPTURE(k);
          const Cuts<T> cuts = random_cuts<T>(random, k, n, scale, domain);
          const ReferenceSolution expected = reference_solution(cuts);
          const Real size = static_cast<Real>(size_of_values(cuts));
          REQUIRE(expected.at.gap <= 1e-15L * size);
          each_kernel<T>(
              [&](const icnnrt::Kernels<T>& kernels) {
                const SolveAnswer<T> answer = caller.solve(kernels, cuts);
                CHECK(complaint(cuts, answer) == "");
                CHECK(distance(answer.y, expected.at.y) <= y_tolerance<T>(expected.at.y));
                CHECK(std::fabs(answer.lower_bound - expected.at.dual) <= kGapTolerance * size);
                CHECK(answer.residual[2] <= kGapTolerance * size);
              },
              domain);
        }
  }
}

// Stationarity, said without the kernels' formulas: y minimises max_i v_i + R(y), so no direction that stays in the
// domain goes down. The model rises from y as R does, by at least |d|²/2.
TEST_CASE("other domains: no point nearby is lower") {
  each_domain_and_kernel<double>([](const icnnrt::Kernels<double>& kernels) {
    Caller caller;
    Random random(64);
    const auto model = [](const Cuts<double>& cuts, const std::vector<Real>& y) {
      Real highest = -std::numeric_limits<Real>::infinity(), R = 0.0L;
      for (std::size_t i = 0; i < cuts.k; ++i) {
        Real v = static_cast<Real>(cuts.offsets[i]);
        for (std::size_t j = 0; j < cuts.n; ++j) v += static_cast<Real>(cuts.slope(i, j)) * (y[j] - cuts.centre());
        highest = std::fmax(highest, v);
      }
      for (Real one : y)
        R += cuts.domain == Domain::kSimplex ? (one > 0.0L ? one * std::log(one) : 0.0L) : 0.5L * one * one;
      return highest + R;
    };
    for (std::size_t n : {2, 3, 9, 30})
      for (std::size_t k : {1, 2, 6, 15}) {
        CAPTURE(n);
        CAPTURE(k);
        const Cuts<double> cuts = random_cuts<double>(random, k, n, 2.0, kernels.domain);
        const SolveAnswer<double> answer = caller.solve(kernels, cuts);
        const Real at = model(cuts, to_real(answer.y));
        CHECK(std::fabs(at - static_cast<Real>(answer.lower_bound)) <= 1e-12L);
        for (int direction = 0; direction < 20; ++direction) {
          std::vector<Real> other(n);
          Real total = 0.0L;
          for (std::size_t j = 0; j < n; ++j) {
            const Real y = static_cast<Real>(answer.y[j]), d = 1e-3L * static_cast<Real>(random.normal());
            total += other[j] = kernels.domain == Domain::kSimplex ? y * (1.0L + d) : y + d;
          }
          if (kernels.domain == Domain::kSimplex)
            for (Real& one : other) one /= total;
          CHECK(model(cuts, other) >= at - 1e-12L);
        }
      }
  });
}

TEST_CASE_TEMPLATE("other domains: duplicates and ties", T, float, double) {
  each_domain_and_kernel<T>([](const icnnrt::Kernels<T>& kernels) {
    Caller caller;
    Random random(65);
    for (double scale : {1e-3, 1.0, 10.0})
      for (std::size_t n : {1, 3, 10, 33, 159})
        for (std::size_t copies : {2, 3, 7}) {
          CAPTURE(scale);
          CAPTURE(n);
          CAPTURE(copies);
          const std::size_t k = 1 + random.below(5), support = random_support(random, k, n);
          const Built<T> built = build_backwards<T>(random, k, n, support, scale, 0.0, kernels.domain);
          Built<T> repeated{Cuts<T>(k * copies, n, kernels.domain), {}, {}, built.y, built.value, built.rounding};
          for (std::size_t i = 0; i < k * copies; ++i) {
            for (std::size_t j = 0; j < n; ++j) repeated.cuts.slope(i, j) = built.cuts.slope(i % k, j);
            repeated.cuts.offsets[i] = built.cuts.offsets[i % k];
          }
          check_built(repeated, caller.solve(kernels, repeated.cuts), built_tolerance(built, scale));
          // Columns that are all alike: y is the same in all of them.
          Cuts<T> alike(k, n, kernels.domain);
          for (std::size_t i = 0; i < k; ++i) {
            for (std::size_t j = 0; j < n; ++j) alike.slope(i, j) = built.cuts.slope(i, 0);
            alike.offsets[i] = built.cuts.offsets[i];
          }
          const SolveAnswer<T> answer = caller.solve(kernels, alike);
          CHECK(complaint(alike, answer) == "");
          CHECK(answer.residual[2] <= kGapTolerance * static_cast<Real>(size_of_values(alike)));
          for (T y : answer.y) CHECK(y == answer.y[0]);
        }
  });
}

TEST_CASE_TEMPLATE("other domains, one cut: y is known, lam is 1", T, float, double) {
  each_domain_and_kernel<T>([](const icnnrt::Kernels<T>& kernels) {
    Caller caller;
    Random random(66);
    for (double scale : {1e-3, 1.0, 30.0, 1e3, 1e4})
      for (std::size_t n = 1; n <= 70; ++n) {
        CAPTURE(scale);
        CAPTURE(n);
        const Built<T> built = build_backwards<T>(random, 1, n, 1, scale, 0.0, kernels.domain);
        const SolveAnswer<T> answer = caller.solve(kernels, built.cuts);
        CHECK(complaint(built.cuts, answer) == "");
        CHECK(answer.lam[0] == T{1});
        CHECK(answer.residual[2] == 0.0);
        for (std::size_t j = 0; j < n; ++j) {
          const Real y = std::fabs(built.y[j]);
          // log y is rounded before y is taken of it
          const Real logarithm = kernels.domain == Domain::kSimplex ? std::fabs(std::log(y + 1e-320L)) : 0.0L;
          const Real rounding = kEps<T> / 2 + (static_cast<Real>(n + 4) + logarithm) * kDoubleEps;
          CHECK(std::fabs(static_cast<Real>(answer.y[j]) - built.y[j]) <=
                rounding * y + static_cast<Real>(std::numeric_limits<T>::denorm_min()) + 1e-300L);
        }
      }
  });
}

TEST_CASE_TEMPLATE("other domains, no slope: y is the centre and the highest offset counts", T, float, double) {
  each_domain_and_kernel<T>([](const icnnrt::Kernels<T>& kernels) {
    Caller caller;
    for (T slope : {T{0}, -T{0}, std::numeric_limits<T>::denorm_min()})
      for (std::size_t n : {1, 2, 5, 8, 19})
        for (std::size_t k : {1, 2, 9}) {
          CAPTURE(slope);
          CAPTURE(n);
          CAPTURE(k);
          Cuts<T> cuts(k, n, kernels.domain);
          for (std::size_t i = 0; i < k; ++i) {
            for (std::size_t j = 0; j < n; ++j) cuts.slope(i, j) = (i + j) % 2 ? -slope : slope;
            cuts.offsets[i] = static_cast<T>(static_cast<double>(i * i % 5) - 2.0);
          }
          const T highest = *std::max_element(cuts.offsets.begin(), cuts.offsets.end());
          const SolveAnswer<T> answer = caller.solve(kernels, cuts);
          CHECK(complaint(cuts, answer) == "");
          for (T y : answer.y) CHECK(std::fabs(static_cast<Real>(y) - cuts.centre()) <= kEps<T>);
          const Real entropy = kernels.domain == Domain::kSimplex ? std::log(static_cast<Real>(n)) : 0.0L;
          CHECK(std::fabs(answer.lower_bound - (static_cast<Real>(highest) - entropy)) <= 1e-12L);
          CHECK(answer.residual[2] <= 1e-12L);
        }
  });
}

// A simplex of one point, and corners of larger ones.
TEST_CASE_TEMPLATE("simplex: corners", T, float, double) {
  each_kernel<T>(
      [](const icnnrt::Kernels<T>& kernels) {
        Caller caller;
        Random random(67);
        for (double steepness : {10.0, 100.0, 1e3, 1e4})
          for (std::size_t n : {1, 2, 7, 30, 65})
            for (std::size_t k : {1, 2, 5, 20}) {
              CAPTURE(steepness);
              CAPTURE(n);
              CAPTURE(k);
              // All cuts rise from the same corner; a large constant in all of them is not seen.
              const std::size_t corner = random.below(n);
              Cuts<T> cuts(k, n, Domain::kSimplex);
              for (std::size_t i = 0; i < k; ++i) {
                for (std::size_t j = 0; j < n; ++j)
                  cuts.slope(i, j) = static_cast<T>(steepness * (j == corner ? -1.0 : random.uniform(1.0, 2.0)));
                cuts.offsets[i] = static_cast<T>(random.normal());
              }
              const SolveAnswer<T> answer = caller.solve(kernels, cuts);
              CHECK(complaint(cuts, answer) == "");
              CHECK(answer.residual[2] <= kGapTolerance * static_cast<Real>(size_of_values(cuts)));
              for (std::size_t j = 0; j < n; ++j)
                CHECK(std::fabs(static_cast<double>(answer.y[j]) - (j == corner ? 1.0 : 0.0)) <= 1e-6);
              const AdjointAnswer<T> adjoint = caller.adjoint(kernels, cuts, answer.lam, random_vector<T>(random, n));
              CHECK(adjoint.intact);
              CHECK(largest_of(adjoint.c_y) <= 1e-4L);
              CHECK(std::isfinite(largest_of(adjoint.c_lam)));
            }
      },
      Domain::kSimplex);
}

// Slopes of any size are solved to the same relative accuracy: nothing in the domain has a size of its own.
TEST_CASE("quadratic: y and the adjoint scale with the slopes") {
  each_kernel<double>(
      [](const icnnrt::Kernels<double>& kernels) {
        Caller caller;
        Random random(68);
        for (std::size_t n : {1, 5, 16, 50})
          for (std::size_t k : {1, 3, 8, 20})
            for (double scale : {0x1p-100, 0x1p-20, 0x1p10, 0x1p100}) {
              CAPTURE(n);
              CAPTURE(k);
              CAPTURE(scale);
              const Cuts<double> cuts = random_cuts<double>(random, k, n, 1.0, Domain::kQuadratic);
              Cuts<double> scaled = cuts;
              for (double& g : scaled.slopes) g *= scale;
              for (double& e : scaled.offsets) e *= scale * scale;
              const SolveAnswer<double> one = caller.solve(kernels, cuts), other = caller.solve(kernels, scaled);
              CHECK(complaint(scaled, other) == "");
              std::vector<Real> expected = to_real(one.y);
              for (Real& y : expected) y *= static_cast<Real>(scale);
              CHECK(distance(other.y, expected) <= 1e-12L * largest_of(expected));
              CHECK(distance(other.lam, one.lam) <= 1e-9L);
              const std::vector<double> y_bar = random_vector<double>(random, n);
              const AdjointAnswer<double> one_back = caller.adjoint(kernels, cuts, one.lam, y_bar);
              const AdjointAnswer<double> other_back = caller.adjoint(kernels, scaled, one.lam, y_bar);
              CHECK(distance(other_back.c_y, one_back.c_y) <= 1e-9L * largest_of(y_bar));
              std::vector<Real> expected_c_lam = to_real(one_back.c_lam);
              for (Real& c : expected_c_lam) c /= static_cast<Real>(scale);
              CHECK(distance(other_back.c_lam, expected_c_lam) <= 1e-9L * largest_of(expected_c_lam));
            }
      },
      Domain::kQuadratic);
}

TEST_CASE_TEMPLATE("other domains, fewer steps: the best iterate, and the truth about it", T, float, double) {
  each_domain_and_kernel<T>([](const icnnrt::Kernels<T>& kernels) {
    Caller caller;
    Random random(69);
    for (double scale : {1.0, 30.0, 1e3, 1e6})
      for (std::size_t n : {1, 9, 40})
        for (std::size_t k : {2, 7, 20}) {
          const Cuts<T> cuts = random_cuts<T>(random, k, n, scale, kernels.domain);
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

template <typename T>
std::vector<T> bad_values() {
  constexpr T inf = std::numeric_limits<T>::infinity();
  return {std::numeric_limits<T>::quiet_NaN(), -std::numeric_limits<T>::quiet_NaN(), inf, -inf};
}

TEST_CASE_TEMPLATE("other domains: one bad number poisons its own answer and no other", T, float, double) {
  each_domain_and_kernel<T>([](const icnnrt::Kernels<T>& kernels) {
    Caller caller;
    Random random(70);
    for (T bad : bad_values<T>())
      for (std::size_t n : {1, 2, 7, 8, 19, 40})
        for (std::size_t k : {1, 2, 5, 13})
          for (bool warm : {false, true}) {
            CAPTURE(bad);
            CAPTURE(n);
            CAPTURE(k);
            CAPTURE(warm);
            const Cuts<T> cuts = random_cuts<T>(random, k, n, 3.0, kernels.domain);
            const std::vector<T> lam_start(warm ? k : 0, T{1} / static_cast<T>(k)), y_bar(n, T{1});
            const std::vector<T> lam(k, T{1} / static_cast<T>(k));
            for (std::size_t place : {std::size_t{0}, n - 1, (k - 1) * n, k * n - 1, random.below(k * n)}) {
              CAPTURE(place);
              Cuts<T> spoilt = cuts;
              spoilt.slopes[place] = bad;
              CHECK(complaint(spoilt, caller.solve(kernels, spoilt, lam_start)) == "");
              const AdjointAnswer<T> adjoint = caller.adjoint(kernels, spoilt, lam, y_bar);
              CHECK(adjoint.intact);
              for (T c : adjoint.c_y) CHECK(std::isnan(c));
              for (T c : adjoint.c_lam) CHECK(std::isnan(c));
            }
            Cuts<T> spoilt = cuts;
            spoilt.offsets[random.below(k)] = bad;
            CHECK(complaint(spoilt, caller.solve(kernels, spoilt, lam_start)) == "");
            std::vector<T> spoilt_lam = lam, spoilt_y_bar = y_bar;
            spoilt_lam[random.below(k)] = bad;
            spoilt_y_bar[random.below(n)] = bad;
            for (T c : caller.adjoint(kernels, cuts, spoilt_lam, y_bar).c_y) CHECK(std::isnan(c));
            for (T c : caller.adjoint(kernels, cuts, lam, spoilt_y_bar).c_y) CHECK(std::isnan(c));
            // A start that is none spoils the answer, or does not: but the answer says which.
            if (warm) {
              std::vector<T> bad_start = lam_start;
              bad_start[random.below(k)] = bad;
              const SolveAnswer<T> answer = caller.solve(kernels, cuts, bad_start);
              if (complaint_if_not_poisoned(answer) != "") CHECK(complaint(cuts, answer) == "");
            }
            // and nothing of it is left behind, in the caller's memory or elsewhere
            CHECK(caller.solve(kernels, cuts, lam_start).same_bits_as(Caller().solve(kernels, cuts, lam_start)));
            CHECK(caller.adjoint(kernels, cuts, lam, y_bar).same_bits_as(Caller().adjoint(kernels, cuts, lam, y_bar)));
          }
  });
}

// c_lam has the units of y_bar / G.
template <typename T>
Real unit_of_c_lam(const Cuts<T>& cuts, const std::vector<T>& y_bar) {
  return std::fmax(1.0L, largest_of(y_bar)) / std::fmax(largest_of(cuts.slopes), 1e-30L);
}

TEST_CASE_TEMPLATE("other domains: the adjoint solves the system of Proposition 3", T, float, double) {
  each_domain_and_kernel<T>([](const icnnrt::Kernels<T>& kernels) {
    Caller caller;
    Random random(71);
    for (double scale : {1e-3, 1e-1, 1.0, 3.0})
      for (std::size_t n : {1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 33, 64, 159})
        for (std::size_t k : {1, 2, 3, 5, 8, 17, 40})
          for (std::size_t copies : {1, 2}) {
            // half as many active cuts as dimensions, so that they are far from dependent
            const std::size_t support = 1 + random.below(std::min(k, n / 2 + (n == 1)));
            CAPTURE(scale);
            CAPTURE(n);
            CAPTURE(k);
            CAPTURE(support);
            CAPTURE(copies);
            const Built<T> built = build_backwards<T>(random, k, n, support, scale, 0.0, kernels.domain);
            const std::vector<T> y_bar = random_vector<T>(random, n);
            Cuts<T> cuts(k * copies, n, kernels.domain);
            std::vector<T> lam(k * copies);
            for (std::size_t i = 0; i < k * copies; ++i) {
              for (std::size_t j = 0; j < n; ++j) cuts.slope(i, j) = built.cuts.slope(i % k, j);
              cuts.offsets[i] = built.cuts.offsets[i % k];
              lam[i] = static_cast<T>(built.lam[i % k] / static_cast<Real>(copies));
            }
            const AdjointAnswer<T> answer = caller.adjoint(kernels, cuts, lam, y_bar);
            CHECK(answer.intact);
            const Evaluation at = evaluate(built.cuts, built.lam);
            const AdjointSolution expected = reference_adjoint(built.cuts, built.support, at.D, to_real(y_bar));
            const Real y_size = std::fmax(1.0L, largest_of(y_bar));
            CHECK(distance(answer.c_y, expected.c_y) <= kAdjointTolerance<T> * y_size);
            std::vector<Real> sums(k, 0.0L);
            for (std::size_t i = 0; i < k * copies; ++i) sums[i % k] += static_cast<Real>(answer.c_lam[i]);
            const Real lam_size = std::fmax(unit_of_c_lam(cuts, y_bar), largest_of(expected.c_lam));
            CHECK(distance(sums, expected.c_lam) <= 10 * kAdjointTolerance<T> * lam_size);
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

TEST_CASE("other domains: the adjoint is the derivative of the solution") {
  // d(y_bar'y) = c_lam'de + sum (lam c_y' + c_lam (y - centre)') dG
  Caller caller;
  for (Domain domain : kOthers) {
    Random random(72);
    for (double scale : {0.3, 1.0, 5.0})
      for (std::size_t n : {1, 2, 5, 12, 33})
        for (std::size_t k : {1, 2, 5, 12}) {
          const std::string name = domain == Domain::kSimplex ? "simplex" : "quadratic";
          CAPTURE(name);
          CAPTURE(scale);
          CAPTURE(n);
          CAPTURE(k);
          const std::size_t support = 1 + random.below(std::min(k, n / 2 + (n == 1)));
          const Built<double> built = build_backwards<double>(random, k, n, support, scale, 0.0, domain);
          const Cuts<double> direction = random_cuts<double>(random, k, n, 1.0, domain);
          const std::vector<double> y_bar = random_vector<double>(random, n);
          // as in test_adjoint.cpp
          const double step = 0x1p-16 * scale;
          const std::vector<Real> ahead = moved_y(built.cuts, direction, step);
          const std::vector<Real> behind = moved_y(built.cuts, direction, -step);
          Real difference = 0.0L;
          for (std::size_t j = 0; j < n; ++j) difference += static_cast<Real>(y_bar[j]) * (ahead[j] - behind[j]);
          difference /= 2.0L * static_cast<Real>(step);
          each_kernel<double>(
              [&](const icnnrt::Kernels<double>& kernels) {
                const SolveAnswer<double> solved = caller.solve(kernels, built.cuts);
                const AdjointAnswer<double> answer = caller.adjoint(kernels, built.cuts, solved.lam, y_bar);
                Real derivative = 0.0L, terms = 0.0L;
                for (std::size_t i = 0; i < k; ++i) {
                  derivative += static_cast<Real>(answer.c_lam[i]) * static_cast<Real>(direction.offsets[i]);
                  for (std::size_t j = 0; j < n; ++j) {
                    const Real g_bar =
                        static_cast<Real>(solved.lam[i]) * static_cast<Real>(answer.c_y[j]) +
                        static_cast<Real>(answer.c_lam[i]) * (static_cast<Real>(solved.y[j]) - built.cuts.centre());
                    derivative += g_bar * static_cast<Real>(direction.slope(i, j));
                    terms += std::fabs(g_bar * static_cast<Real>(direction.slope(i, j)));
                  }
                }
                CHECK(std::fabs(derivative - difference) <= 1e-7L * (1.0L + terms));
              },
              domain);
        }
  }
}

// As in test_adjoint.cpp: c_lam sums to nothing, c_y belongs to it, and all is finite. On the simplex c_y sums to
// nothing too.
TEST_CASE_TEMPLATE("other domains: the adjoint of steep, saturated and unsolved cuts", T, float, double) {
  each_domain_and_kernel<T>([](const icnnrt::Kernels<T>& kernels) {
    Caller caller;
    Random random(73);
    for (double scale : {10.0, 1e2, 1e3, 1e4})
      for (std::size_t n : {1, 5, 16, 40})
        for (std::size_t k : {1, 2, 5, 20})
          for (std::size_t steps : {std::size_t{0}, kSteps}) {
            CAPTURE(scale);
            CAPTURE(n);
            CAPTURE(k);
            CAPTURE(steps);
            const Cuts<T> cuts = random_cuts<T>(random, k, n, scale, kernels.domain);
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
            std::vector<Real> g_c = to_real(y_bar);
            Real terms = 0.0L;
            for (std::size_t j = 0; j < n; ++j) {
              Real here = std::fabs(g_c[j]);
              for (std::size_t i = 0; i < k; ++i) {
                const Real term = static_cast<Real>(cuts.slope(i, j)) * static_cast<Real>(answer.c_lam[i]);
                g_c[j] += term;
                here += std::fabs(term);
              }
              terms = std::fmax(terms, here);
            }
            const std::vector<Real> D_g_c = D_times(cuts, at.D, g_c);
            // D is known to the rounding of s, which grows with the slopes and with that of lam
            const Real d_error =
                kernels.domain == Domain::kSimplex ? 100.0L * static_cast<Real>(scale) * kDoubleEps : 0.0L;
            Real c_sum = 0.0L;
            for (std::size_t j = 0; j < n; ++j) {
              const Real c = static_cast<Real>(answer.c_y[j]);
              CHECK(std::fabs(c + D_g_c[j]) <= at.D[j] * terms * (4.0L * kEps<T> + d_error) + 1e-30L);
              c_sum += c;
            }
            if (kernels.domain == Domain::kSimplex) CHECK(std::fabs(c_sum) <= 4.0L * kEps<T> * terms);
          }
  });
}

TEST_CASE_TEMPLATE("other domains: their kernels are found", T, float, double) {
  for (Domain domain : {Domain::kEntropy, Domain::kSimplex, Domain::kQuadratic}) {
    CHECK(icnnrt::kernels<T>(domain).domain == domain);
    CHECK(&icnnrt::kernels<T>(domain) == runnable_kernels<T>(domain).front());
    CHECK(icnnrt::kernels<T>(domain).instruction_set == std::string(icnnrt::kernels<T>().instruction_set));
  }
}

}  // namespace
}  // namespace icnnrt_tests
