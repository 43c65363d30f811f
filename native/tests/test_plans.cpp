// Sparse quadratic programs by a plan: the answers without one, for every order of elimination; and plans that are
// none.
#include <doctest/doctest.h>

#include "each_kernel.h"
#include "plans.h"

namespace icnnrt_tests {
namespace {

using icnnrt::QpStatus;

// A plan in memory of exactly its size.
class GuardedPlan {
 public:
  template <typename T>
  const char* read(const std::vector<std::int32_t>& numbers, const Program<T>& of) {
    auto* const copy =
        static_cast<std::int32_t*>(memory_.take(numbers.size() * sizeof(std::int32_t), alignof(std::int32_t), kPoison));
    std::copy(numbers.begin(), numbers.end(), copy);
    return icnnrt::read_plan(copy, numbers.size(), of.n, of.m, of.q, plan);
  }

  icnnrt::QpPlan plan{};

 private:
  GuardedMemory memory_;
};

template <typename T>
double distance(const std::vector<T>& a, const std::vector<T>& b) {
  double most = 0.0, size = 1.0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    most = std::fmax(most, std::fabs(static_cast<double>(a[i] - b[i])));
    size = std::fmax(size, std::fabs(static_cast<double>(b[i])));
    if (!(std::isnan(a[i]) == std::isnan(b[i]))) return HUGE_VAL;
  }
  return most / size;
}

template <typename T>
constexpr double kApart = sizeof(T) == 8 ? 1e-7 : 1e-3;

TEST_CASE_TEMPLATE("answers and gradients by a plan are those without", T, float, double) {
  each_program_kernel<T>([](const icnnrt::QpKernels<T>& kernels) {
    ProgramCaller dense, sparse;
    Random random(17);
    for (const ProgramShape& shape : kProgramShapes)
      for (std::size_t one_of : {1, 4}) {
        CAPTURE(shape.n);
        CAPTURE(shape.m);
        CAPTURE(shape.q);
        CAPTURE(one_of);
        Program<T> program = random_program<T>(random, shape, true);
        thin_out(program, random, one_of);
        GuardedPlan guarded;
        REQUIRE(guarded.read(plan_of(program, random), program) == nullptr);
        sparse.plan = &guarded.plan;
        const ProgramAnswer<T> wanted = dense.solve(kernels, program), found = sparse.solve(kernels, program);
        CHECK(found.intact);
        CHECK(wanted.status == QpStatus::kSolved);
        CHECK(found.status == QpStatus::kSolved);
        CHECK(distance(found.z, wanted.z) <= kApart<T>);
        CHECK(sparse.solve(kernels, program, 50, 0x3f).same_bits_as(found));
        std::vector<T> z_bar(program.n, T{1});
        const ProgramAdjoint<T> back = sparse.adjoint(kernels, program, wanted, z_bar),
                                other = dense.adjoint(kernels, program, wanted, z_bar);
        CHECK(back.intact);
        CHECK(sparse.adjoint(kernels, program, wanted, z_bar, {}, {}, {}, 0x3f).same_bits_as(back));
        CHECK(back.weak == other.weak);
        if (other.share <= 1e-12) {
          CHECK(back.share <= 1e-9);
          CHECK(distance(back.d_z, other.d_z) <= kApart<T>);
        }
        for (const T entry : program.Q) CHECK(std::isfinite(entry));
        CHECK(kernels.within(guarded.plan, icnnrt::QpMatrix::kQ, program.Q.data()));
        CHECK(kernels.within(guarded.plan, icnnrt::QpMatrix::kG, program.G.data()));
        CHECK(kernels.within(guarded.plan, icnnrt::QpMatrix::kA, program.A.data()));
      }
  });
}

TEST_CASE_TEMPLATE("what has no answer is told by a plan too", T, float, double) {
  each_program_kernel<T>([](const icnnrt::QpKernels<T>& kernels) {
    ProgramCaller caller;
    Random random(18);
    Program<T> good = random_program<T>(random, {10, 8, 3}, true);
    thin_out(good, random, 3);
    GuardedPlan guarded;
    REQUIRE(guarded.read(plan_of(good, random), good) == nullptr);
    caller.plan = &guarded.plan;
    const auto status = [&](const Program<T>& program) { return caller.solve(kernels, program).status; };
    CHECK(status(good) == QpStatus::kSolved);

    Program<T> program = good;
    program.b[0] += T{100};  // beyond the box
    const ProgramAnswer<T> answer = caller.solve(kernels, program);
    CHECK(answer.status == QpStatus::kPrimalInfeasible);
    double worth = 0.0;
    for (std::size_t j = 0; j < 10; ++j) {
      const auto mu = static_cast<double>(answer.ray[21 + j]);
      double off = mu;
      for (std::size_t i = 0; i < 8; ++i) off += static_cast<double>(program.G[i * 10 + j] * answer.ray[10 + i]);
      for (std::size_t i = 0; i < 3; ++i) off += static_cast<double>(program.A[i * 10 + j] * answer.ray[18 + i]);
      CHECK(std::fabs(off) <= 1e-6);
      worth += mu * static_cast<double>(mu > 0.0 ? program.upper[j] : program.lower[j]);
    }
    for (std::size_t i = 0; i < 8; ++i) {
      const auto lam = static_cast<double>(answer.ray[10 + i]);
      worth += lam * static_cast<double>(lam > 0.0 ? program.h[i] : program.h_lower[i]);
    }
    for (std::size_t i = 0; i < 3; ++i) worth += static_cast<double>(answer.ray[18 + i] * program.b[i]);
    CHECK(worth == doctest::Approx(-1.0).epsilon(1e-3));

    program = good;
    program.Q[0] = T{-1};
    CHECK(status(program) == QpStatus::kNotConvex);
    program.Q[0] = std::numeric_limits<T>::quiet_NaN();
    CHECK(status(program) == QpStatus::kNotFiniteInput);
    program = good;
    program.A[0] = std::numeric_limits<T>::infinity();
    CHECK(status(program) == QpStatus::kNotFiniteInput);
  });
}

TEST_CASE_TEMPLATE("what lies outside a plan is seen, NaN too", T, float, double) {
  each_program_kernel<T>([](const icnnrt::QpKernels<T>& kernels) {
    Random random(19);
    Program<T> program = random_program<T>(random, {13, 30, 5}, true);
    thin_out(program, random, 5);
    GuardedPlan guarded;
    REQUIRE(guarded.read(plan_of(program, random), program) == nullptr);
    const auto try_all = [&](icnnrt::QpMatrix which, std::vector<T> matrix) {
      std::size_t outside = 0;
      for (std::size_t i = 0; i < matrix.size(); ++i) {
        const T before = matrix[i];
        for (const T value : {T{1}, std::numeric_limits<T>::denorm_min(), std::numeric_limits<T>::quiet_NaN()}) {
          matrix[i] = value;
          const bool expected = before != T{0} || (which == icnnrt::QpMatrix::kQ && i % 14 == 0);
          CHECK(kernels.within(guarded.plan, which, matrix.data()) == expected);
          outside += !expected;
        }
        matrix[i] = before;
      }
      CHECK(outside > 0);
    };
    try_all(icnnrt::QpMatrix::kQ, program.Q);
    try_all(icnnrt::QpMatrix::kG, program.G);
    try_all(icnnrt::QpMatrix::kA, program.A);
  });
}

TEST_CASE("plans that are none are refused, and others lead nowhere") {
  const icnnrt::QpKernels<double>& kernels = icnnrt::qp_kernels<double>();
  Random random(20);
  Program<double> program = random_program<double>(random, {8, 8, 4}, true);
  thin_out(program, random, 4);
  const std::vector<std::int32_t> plan = plan_of(program, random);
  GuardedPlan guarded;
  ProgramCaller caller;
  caller.plan = &guarded.plan;
  REQUIRE(guarded.read(plan, program) == nullptr);
  const ProgramAnswer<double> wanted = caller.solve(kernels, program);
  CHECK(wanted.status == QpStatus::kSolved);
  for (std::size_t count = 0; count < plan.size(); ++count)
    CHECK(guarded.read(std::vector<std::int32_t>(plan.begin(), plan.begin() + static_cast<std::ptrdiff_t>(count)),
                       program) != nullptr);
  constexpr std::int32_t kExtremes[] = {-1, 0, 1, 7, 8, 19, 20, 21, INT32_MAX, INT32_MIN};
  std::size_t refused = 0, read = 0;
  for (int trial = 0; trial < 20000; ++trial) {
    std::vector<std::int32_t> bad = plan;
    for (std::size_t changes = 1 + random.below(3); changes > 0; --changes) {
      std::int32_t& number = bad[random.below(bad.size())];
      number = random.below(2)
                   ? kExtremes[random.below(std::size(kExtremes))]
                   : static_cast<std::int32_t>(std::int64_t{number} + static_cast<std::int64_t>(random.below(5)) - 2);
    }
    if (guarded.read(bad, program)) {
      ++refused;
      continue;
    }
    ++read;  // a pattern of these sizes, though perhaps not of this program
    const ProgramAnswer<double> answer = caller.solve(kernels, program);
    CHECK(answer.intact);
    if (answer.status != QpStatus::kSolved) continue;
    const std::vector<double> z_bar(program.n, 1.0);
    CHECK(caller.adjoint(kernels, program, answer, z_bar).intact);
  }
  CHECK(refused > 15000);
  CHECK(read > 0);
}

}  // namespace
}  // namespace icnnrt_tests
