// What no header of core exports, as one instruction set compiles it; compiled once for each, with
// ICNNRT_INSTRUCTION_SET naming it.
#include "core/exponential.h"
#include "core/symmetric.h"

#define ICNNRT_TESTS_JOINED(a, b) a##b
#define ICNNRT_TESTS_JOIN(a, b) ICNNRT_TESTS_JOINED(a, b)

// In place, for any number of values; only those that do not fill a vector are handed over with zeros.
extern "C" void ICNNRT_TESTS_JOIN(icnnrt_tests_exp_, ICNNRT_INSTRUCTION_SET)(double* values, std::size_t count) {
  using namespace icnnrt::ICNNRT_INSTRUCTION_SET;
  for (std::size_t i = 0; i < count; i += W) {
    const std::size_t here = count - i < W ? count - i : W;
    double lanes[W] = {};
    for (std::size_t j = 0; j < here; ++j) lanes[j] = values[i + j];
    store(lanes, icnnrt::ICNNRT_INSTRUCTION_SET::exp(load(lanes)));
    for (std::size_t j = 0; j < here; ++j) values[i + j] = lanes[j];
  }
}

// Factors A [m, ld] in place, ld = m padded to a multiple of 8, and puts A^-1 b into b.
extern "C" void ICNNRT_TESTS_JOIN(icnnrt_tests_solve_, ICNNRT_INSTRUCTION_SET)(double* A, std::size_t m, std::size_t ld,
                                                                               double* inverse, double* b) {
  using namespace icnnrt::ICNNRT_INSTRUCTION_SET;
  factor(A, m, ld, inverse);
  solve(A, m, ld, inverse, b);
}
