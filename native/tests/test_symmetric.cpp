// LDL' of Gram matrices, singular ones above all: a bundle method collects cuts that are nearly each other's copies.
#include <doctest/doctest.h>

#include <cmath>
#include <vector>

#include "call.h"
#include "cuts.h"
#include "each_kernel.h"
#include "instruction_sets.h"  // ICNNRT_TESTS_INSTRUCTION_SETS(X): X(name) for each instruction set of the library

#define DECLARE(name) \
  extern "C" void icnnrt_tests_solve_##name(double* A, std::size_t m, std::size_t ld, double* inverse, double* b);
ICNNRT_TESTS_INSTRUCTION_SETS(DECLARE)
#undef DECLARE

namespace icnnrt_tests {
namespace {

using Solve = void (*)(double* A, std::size_t m, std::size_t ld, double* inverse, double* b);

Solve solve_of(const std::string& instruction_set) {
#define ENTRY(name) \
  if (instruction_set == #name) return icnnrt_tests_solve_##name;
  ICNNRT_TESTS_INSTRUCTION_SETS(ENTRY)
#undef ENTRY
  return nullptr;
}

struct Gram {
  std::size_t m, ld;
  std::vector<double> A;

  // G G' of m random rows that lie in a space of `rank` dimensions.
  Gram(Random& random, std::size_t m, std::size_t rank) : m(m), ld((m + 7) / 8 * 8), A(m * ld) {
    std::vector<double> G(m * rank);
    for (double& g : G) g = random.normal();
    for (std::size_t i = 0; i < m; ++i)
      for (std::size_t j = 0; j < m; ++j)
        for (std::size_t r = 0; r < rank; ++r) A[i * ld + j] += G[i * rank + r] * G[j * rank + r];
  }
};

template <typename Body>
void each_solve(const Body& body) {
  each_kernel<double>([&](const icnnrt::Kernels<double>& kernels) {
    const Solve solve = solve_of(kernels.instruction_set);
    const bool compiled = solve != nullptr;
    REQUIRE(compiled);
    body(solve);
  });
}

TEST_CASE("a regular system is solved") {
  each_solve([](Solve solve) {
    Random random(41);
    for (std::size_t m = 1; m <= 33; ++m) {
      CAPTURE(m);
      const Gram gram(random, m, m + 5);
      std::vector<double> A = gram.A, inverse(gram.ld), b(gram.ld), x(m);
      for (double& entry : x) entry = random.normal();
      for (std::size_t i = 0; i < m; ++i)
        for (std::size_t j = 0; j < m; ++j) b[i] += gram.A[i * gram.ld + j] * x[j];
      solve(A.data(), m, gram.ld, inverse.data(), b.data());
      for (std::size_t i = 0; i < m; ++i) CHECK(std::fabs(b[i] - x[i]) <= 1e-9);
    }
  });
}

TEST_CASE("of a singular matrix the factors stay finite, however many rows depend on the others") {
  each_solve([](Solve solve) {
    Random random(42);
    for (std::size_t m : {6, 12, 20, 23, 30, 40})
      for (std::size_t rank : {1, 2, 5}) {
        CAPTURE(m);
        CAPTURE(rank);
        const Gram gram(random, m, rank);
        double largest = 0.0;
        for (double a : gram.A) largest = std::fmax(largest, std::fabs(a));
        std::vector<double> A = gram.A, inverse(gram.ld), x(gram.ld), b(gram.ld);
        // b = A 1 lies in the range of A: it has solutions, and one of them has to come out.
        for (std::size_t i = 0; i < m; ++i)
          for (std::size_t j = 0; j < m; ++j) b[i] += gram.A[i * gram.ld + j];
        x = b;
        solve(A.data(), m, gram.ld, inverse.data(), x.data());
        for (std::size_t i = 0; i < m; ++i) {
          for (std::size_t j = i; j < m; ++j) CHECK(std::fabs(A[i * gram.ld + j]) <= 1e6);
          double product = 0.0;
          for (std::size_t j = 0; j < m; ++j) product += gram.A[i * gram.ld + j] * x[j];
          CHECK(std::fabs(product - b[i]) <= 1e-8 * largest * static_cast<double>(m));
        }
      }
  });
}

}  // namespace
}  // namespace icnnrt_tests
