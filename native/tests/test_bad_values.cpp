// NaN and infinity in a sample: told in every output, and never beyond it.
#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "certificate.h"
#include "cuts.h"
#include "each_kernel.h"

namespace icnnrt_tests {
namespace {

template <typename T>
std::vector<T> bad_values() {
  constexpr T inf = std::numeric_limits<T>::infinity();
  return {std::numeric_limits<T>::quiet_NaN(), -std::numeric_limits<T>::quiet_NaN(),
          std::numeric_limits<T>::signaling_NaN(), inf, -inf};
}

TEST_CASE_TEMPLATE("one bad number among the cuts poisons the whole answer", T, float, double) {
  each_kernel<T>([](const icnnrt::Kernels<T>& kernels) {
    Caller caller;
    Random random(31);
    for (T bad : bad_values<T>())
      for (std::size_t n : {1, 2, 7, 8, 16, 19, 40})
        for (std::size_t k : {1, 2, 5, 13})
          for (bool warm : {false, true}) {
            CAPTURE(bad);
            CAPTURE(n);
            CAPTURE(k);
            CAPTURE(warm);
            const Cuts<T> cuts = random_cuts<T>(random, k, n, 3.0);
            const std::vector<T> lam_start(warm ? k : 0, T{1} / static_cast<T>(k));
            // every corner of the array, and somewhere within it
            for (std::size_t place : {std::size_t{0}, n - 1, (k - 1) * n, k * n - 1, random.below(k * n)}) {
              Cuts<T> spoilt = cuts;
              spoilt.slopes[place] = bad;
              CAPTURE(place);
              CHECK(complaint(spoilt, caller.solve(kernels, spoilt, lam_start)) == "");
            }
            for (std::size_t place : {std::size_t{0}, k - 1, random.below(k)}) {
              Cuts<T> spoilt = cuts;
              spoilt.offsets[place] = bad;
              CAPTURE(place);
              CHECK(complaint(spoilt, caller.solve(kernels, spoilt, lam_start)) == "");
            }
            Cuts<T> all_bad = cuts;
            for (T& g : all_bad.slopes) g = bad;
            for (T& e : all_bad.offsets) e = bad;
            CHECK(complaint(all_bad, caller.solve(kernels, all_bad, lam_start)) == "");
            // and nothing of it is left behind
            CHECK(caller.solve(kernels, cuts, lam_start).same_bits_as(Caller().solve(kernels, cuts, lam_start)));
          }
  });
}

// What a caller may pass as multipliers of the last solve is not checked by anyone before: it may be a poisoned answer.
TEST_CASE_TEMPLATE("a bad start spoils no more than its own sample, and never silently", T, float, double) {
  each_kernel<T>([](const icnnrt::Kernels<T>& kernels) {
    Caller caller;
    Random random(32);
    std::vector<T> starts = bad_values<T>();
    for (T start :
         {T{0}, T{-1}, T{1e30f}, T{-1e30f}, std::numeric_limits<T>::denorm_min(), std::numeric_limits<T>::max()})
      starts.push_back(start);
    for (T bad : starts)
      for (std::size_t n : {1, 7, 16})
        for (std::size_t k : {1, 2, 5})
          for (std::size_t bad_entries : {std::size_t{1}, k}) {
            CAPTURE(bad);
            CAPTURE(n);
            CAPTURE(k);
            CAPTURE(bad_entries);
            const Cuts<T> cuts = random_cuts<T>(random, k, n, 3.0);
            std::vector<T> lam_start(k, T{1} / static_cast<T>(k));
            for (std::size_t i = 0; i < bad_entries; ++i) lam_start[k - 1 - i] = bad;
            const SolveAnswer<T> answer = caller.solve(kernels, cuts, lam_start);
            CHECK(answer.intact);
            if (complaint_if_not_poisoned(answer) != "") CHECK(complaint(cuts, answer) == "");
          }
  });
}

// The sum of these is zero, and that of their positive parts infinite.
TEST_CASE("a start of huge numbers that cancel is told") {
  each_kernel<double>([](const icnnrt::Kernels<double>& kernels) {
    Caller caller;
    Random random(34);
    const Cuts<double> cuts = random_cuts<double>(random, 4, 9, 1.0);
    const SolveAnswer<double> answer = caller.solve(kernels, cuts, {1.5e308, -1.5e308, 1.5e308, -1.5e308});
    if (complaint_if_not_poisoned(answer) != "") CHECK(complaint(cuts, answer) == "");
  });
}

TEST_CASE_TEMPLATE("no multipliers have no adjoint", T, float, double) {
  each_kernel<T>([](const icnnrt::Kernels<T>& kernels) {
    Caller caller;
    Random random(35);
    const Cuts<T> cuts = random_cuts<T>(random, 3, 9, 1.0);
    const AdjointAnswer<T> answer = caller.adjoint(kernels, cuts, std::vector<T>(3), std::vector<T>(9, T{1}));
    for (T c : answer.c_y) CHECK(std::isnan(c));
    for (T c : answer.c_lam) CHECK(std::isnan(c));
  });
}

TEST_CASE_TEMPLATE("bad numbers in the adjoint's inputs reach its outputs, and nothing else", T, float, double) {
  each_kernel<T>([](const icnnrt::Kernels<T>& kernels) {
    Caller caller;
    Random random(33);
    for (T bad : bad_values<T>())
      for (std::size_t n : {1, 2, 8, 19})
        for (std::size_t k : {1, 2, 7}) {
          CAPTURE(bad);
          CAPTURE(n);
          CAPTURE(k);
          const Cuts<T> cuts = random_cuts<T>(random, k, n, 1.0);
          const std::vector<T> lam(k, T{1} / static_cast<T>(k)), y_bar(n, T{1});
          const AdjointAnswer<T> clean = caller.adjoint(kernels, cuts, lam, y_bar);
          CHECK(all_finite(clean.c_y));
          CHECK(all_finite(clean.c_lam));
          for (int input = 0; input < 4; ++input) {
            CAPTURE(input);
            Cuts<T> spoilt = cuts;
            std::vector<T> spoilt_lam = lam, spoilt_y_bar = y_bar;
            if (input == 0) spoilt.slopes[random.below(k * n)] = bad;
            if (input == 1) spoilt.offsets[random.below(k)] = bad;
            if (input == 2) spoilt_lam[random.below(k)] = bad;
            if (input == 3) spoilt_y_bar[random.below(n)] = bad;
            const AdjointAnswer<T> answer = caller.adjoint(kernels, spoilt, spoilt_lam, spoilt_y_bar);
            CHECK(answer.intact);
            bool told = false;
            for (T c : answer.c_y) told = told || !std::isfinite(c);
            CHECK(told);
          }
          CHECK(caller.adjoint(kernels, cuts, lam, y_bar).same_bits_as(clean));
        }
  });
}

}  // namespace
}  // namespace icnnrt_tests
