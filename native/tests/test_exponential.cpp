// The kernels' exp against long double, in units in the last place.
#include <doctest/doctest.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "call.h"
#include "cuts.h"
#include "instruction_sets.h"  // ICNNRT_TESTS_INSTRUCTION_SETS(X): X(name) for each instruction set of the library

#define DECLARE(name) extern "C" void icnnrt_tests_exp_##name(double* values, std::size_t count);
ICNNRT_TESTS_INSTRUCTION_SETS(DECLARE)
#undef DECLARE

namespace icnnrt_tests {
namespace {

struct Exponential {
  const char* instruction_set;
  void (*apply)(double* values, std::size_t count);
};

const Exponential kExponentials[] = {
#define ENTRY(name) {#name, icnnrt_tests_exp_##name},
    ICNNRT_TESTS_INSTRUCTION_SETS(ENTRY)
#undef ENTRY
};

template <typename Body>
void each_exponential(const Body& body) {
  std::size_t bodies = 0;
  for (const icnnrt::Kernels<double>* kernels : runnable_kernels<double>())
    for (const Exponential& exponential : kExponentials)
      if (std::string(kernels->instruction_set) == exponential.instruction_set) {
        const std::string instruction_set = exponential.instruction_set;
        CAPTURE(instruction_set);
        body(exponential);
        ++bodies;
      }
  CHECK(bodies == runnable_kernels<double>().size());
}

constexpr double kBound = 708.0;  // the header's promise ends here
constexpr double kUlpsPromised = 1.0;

// |got - e^x| in units of the last place of e^x.
double ulps_off(double x, double got) {
  const Real exact = std::exp(static_cast<Real>(x));
  int exponent = 0;
  std::frexp(static_cast<double>(exact), &exponent);
  return static_cast<double>(std::fabs(static_cast<Real>(got) - exact) / std::ldexp(1.0L, exponent - 53));
}

struct Worst {
  double x = 0.0;
  double ulps = 0.0;
};

Worst worst_of(const Exponential& exponential, const std::vector<double>& arguments) {
  std::vector<double> values = arguments;
  exponential.apply(values.data(), values.size());
  Worst worst;
  for (std::size_t i = 0; i < values.size(); ++i) {
    const double ulps = ulps_off(arguments[i], values[i]);
    if (!(ulps <= worst.ulps)) worst = {arguments[i], ulps};
  }
  return worst;
}

void check_accuracy(const Exponential& exponential, const std::vector<double>& arguments) {
  const Worst worst = worst_of(exponential, arguments);
  CAPTURE(worst.x);
  CHECK(worst.ulps <= kUlpsPromised);
}

TEST_CASE("exp is within 1 ulp wherever the kernels use it") {
  if (std::numeric_limits<Real>::digits <= std::numeric_limits<double>::digits) {
    MESSAGE("long double is double here: nothing to compare with");
    return;
  }
  each_exponential([](const Exponential& exponential) {
    std::vector<double> arguments;
    SUBCASE("a grid over the whole range") {
      constexpr int steps = 200000;
      for (int i = -steps; i <= steps; ++i) arguments.push_back(kBound * i / steps);
    }
    SUBCASE("around every multiple of ln 2 / 2, where the reduction changes") {
      Random random(61);
      for (int m = -2043; m <= 2043; ++m) {
        const double x = m * 0.34657359027997264;
        if (std::fabs(x) > kBound - 1.0) continue;
        arguments.push_back(x);
        for (int i = 0; i < 20; ++i) arguments.push_back(x * (1.0 + random.uniform(-1e-14, 1e-14)));
        for (int i = 0; i < 20; ++i) arguments.push_back(x + random.uniform(-0.35, 0.35));
      }
    }
    SUBCASE("random, by all sizes down to nothing") {
      Random random(62);
      for (int exponent = -1074; exponent <= 9; ++exponent)
        for (int i = 0; i < 100; ++i) {
          const double x = std::ldexp(random.uniform(0.5, 1.0), exponent);
          arguments.push_back(x);
          arguments.push_back(-x);
        }
    }
    SUBCASE("neighbours of special points") {
      for (double x : {0.0, 1.0, -1.0, 0.5, -0.5, 0.6931471805599453, 0.34657359027997264, kBound, -kBound}) {
        double up = x, down = x;
        for (int i = 0; i < 200; ++i) {
          if (std::fabs(up) <= kBound) arguments.push_back(up);
          if (std::fabs(down) <= kBound) arguments.push_back(down);
          up = std::nextafter(up, 1e300);
          down = std::nextafter(down, -1e300);
        }
      }
    }
    if (!arguments.empty()) check_accuracy(exponential, arguments);
  });
}

TEST_CASE("exp at its ends") {
  each_exponential([](const Exponential& exponential) {
    constexpr double inf = std::numeric_limits<double>::infinity();
    constexpr double nan = std::numeric_limits<double>::quiet_NaN();
    const auto exp = [&](double x) {
      exponential.apply(&x, 1);
      return x;
    };
    CHECK(exp(0.0) == 1.0);
    CHECK(exp(-0.0) == 1.0);
    CHECK(exp(std::numeric_limits<double>::denorm_min()) == 1.0);
    CHECK(exp(-std::numeric_limits<double>::min()) == 1.0);
    // beyond the bound it stays where it was: neither it nor its reciprocal overflows or is subnormal
    for (double beyond : {kBound, std::nextafter(kBound, inf), 709.0, 710.0, 745.2, 1e3, 1e10, 1e300, inf}) {
      CAPTURE(beyond);
      CHECK(exp(beyond) == exp(kBound));
      CHECK(exp(-beyond) == exp(-kBound));
    }
    CHECK(std::isnormal(exp(kBound)));
    CHECK(std::isnormal(1.0 / exp(kBound)));
    CHECK(std::isnormal(exp(-kBound)));
    CHECK(std::isnormal(1.0 / exp(-kBound)));
    CHECK(std::isnan(exp(nan)));
    CHECK(std::isnan(exp(-nan)));
    CHECK(std::isnan(exp(std::numeric_limits<double>::signaling_NaN())));
  });
}

TEST_CASE("exp does not care in which lane a number stands, nor what stands beside it") {
  each_exponential([](const Exponential& exponential) {
    Random random(63);
    for (int round = 0; round < 200; ++round) {
      const double x = random.uniform(-700.0, 700.0);
      double alone = x;
      exponential.apply(&alone, 1);
      for (std::size_t lane = 0; lane < 8; ++lane) {
        double values[8];
        for (double& value : values) {
          const std::uint64_t bits = random.bits();
          std::memcpy(&value, &bits, sizeof value);  // anything, NaN and infinity too
        }
        values[lane] = x;
        exponential.apply(values, 8);
        CHECK(values[lane] == alone);
      }
    }
  });
}

}  // namespace
}  // namespace icnnrt_tests
