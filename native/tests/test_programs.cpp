// Quadratic programs: solved, told apart from those that are not solvable, differentiated; memory, bad numbers.
#include <doctest/doctest.h>

#include <algorithm>

#include "each_kernel.h"
#include "programs.h"

namespace icnnrt_tests {
namespace {

using icnnrt::QpStatus;

// float rounds the answer, and rows of up to 40 such numbers are summed.
template <typename T>
constexpr double kResidual = sizeof(T) == 8 ? 1e-9 : 1e-4;
template <typename T>
constexpr double kDistance = sizeof(T) == 8 ? 1e-6 : 1e-3;

template <typename T>
double distance(const std::vector<T>& a, const std::vector<double>& b) {
  double most = a.size() == b.size() ? 0.0 : HUGE_VAL;
  for (std::size_t i = 0; i < a.size() && i < b.size(); ++i) most = std::fmax(most, std::fabs(a[i] - b[i]));
  return most;
}

TEST_CASE_TEMPLATE("what is solvable is solved", T, float, double) {
  each_program_kernel<T>([](const icnnrt::QpKernels<T>& kernels) {
    ProgramCaller caller;
    Random random(91);
    for (const ProgramShape& shape : kProgramShapes)
      for (bool both : {false, true}) {
        CAPTURE(shape.n);
        CAPTURE(shape.m);
        CAPTURE(shape.q);
        CAPTURE(both);
        Program<T> program = random_program<T>(random, shape, both);
        const ProgramAnswer<T> answer = caller.solve(kernels, program);
        CHECK(answer.status == QpStatus::kSolved);
        CHECK(answer.intact);
        CHECK(kkt_residual_of(program, answer) <= kResidual<T>);
        CHECK(distance(answer.z, program.z) <= kDistance<T>);
        for (T slack : answer.slack) CHECK(slack > T{0});
        for (T slack : answer.box_slack) CHECK(slack > T{0});
        for (T entry : answer.ray) CHECK(entry == T{0});
        // a warm start, one of another problem, and one that is none
        for (double factor : {1.0, 0.9, -3.0, 1e20}) {
          program.start.clear();
          for (const auto* part : {&answer.z, &answer.lam, &answer.nu, &answer.mu})
            for (T value : *part) program.start.push_back(static_cast<T>(factor * static_cast<double>(value)));
          const ProgramAnswer<T> again = caller.solve(kernels, program);
          CHECK(again.intact);
          if (factor == 1e20) continue;
          CHECK(again.status == QpStatus::kSolved);
          CHECK(kkt_residual_of(program, again) <= kResidual<T>);
        }
        program.start[0] = std::numeric_limits<T>::quiet_NaN();
        CHECK(caller.solve(kernels, program).same_bits_as(answer));
      }
  });
}

TEST_CASE_TEMPLATE("what is not solvable is told, with a certificate", T, float, double) {
  each_program_kernel<T>([](const icnnrt::QpKernels<T>& kernels) {
    ProgramCaller caller;
    Random random(92);
    const ProgramShape shape{10, 8, 3};
    const std::size_t n = shape.n;
    const Program<T> good = random_program<T>(random, shape, false);
    const auto status = [&](const Program<T>& program) { return caller.solve(kernels, program).status; };

    Program<T> program = good;  // two rows that exclude each other
    for (std::size_t j = 0; j < n; ++j) program.G[n + j] = -program.G[j];
    program.h[0] = program.h[1] = T{-1};
    const ProgramAnswer<T> apart = caller.solve(kernels, program);
    CHECK(apart.status == QpStatus::kPrimalInfeasible);
    double sum = 0.0;
    for (std::size_t i = 0; i < shape.m; ++i) sum += static_cast<double>(apart.ray[n + i] * program.h[i]);
    for (std::size_t i = 0; i < shape.q; ++i) sum += static_cast<double>(apart.ray[n + shape.m + i] * program.b[i]);
    CHECK(std::fabs(sum + 1.0) <= 1e-5);
    for (T value : apart.z) CHECK(std::isnan(value));

    program = good;  // flat along the first variable, and falling
    for (std::size_t j = 0; j < n; ++j) program.Q[j] = program.Q[j * n] = T{0};
    for (std::size_t i = 0; i < shape.q; ++i) program.A[i * n] = T{0};
    for (std::size_t i = 0; i < shape.m; ++i) program.G[i * n] = T{-1};
    program.p[0] = T{-1};
    const ProgramAnswer<T> falls = caller.solve(kernels, program);
    CHECK(falls.status == QpStatus::kDualInfeasible);
    double along = 0.0;
    for (std::size_t j = 0; j < n; ++j) along += static_cast<double>(falls.ray[j] * program.p[j]);
    CHECK(std::fabs(along + 1.0) <= 1e-5);

    program = good;
    program.h_lower.assign(shape.m, T{-100});
    program.h_lower[2] = program.h[2] + T{1};
    CHECK(status(program) == QpStatus::kPrimalInfeasible);
    program = good;
    program.Q[3 * n + 3] = T{-0.5};
    CHECK(status(program) == QpStatus::kNotConvex);
    for (std::vector<T> Program<T>::*part :
         {&Program<T>::Q, &Program<T>::p, &Program<T>::G, &Program<T>::A, &Program<T>::b})
      for (T bad : {std::numeric_limits<T>::quiet_NaN(), std::numeric_limits<T>::infinity()}) {
        program = good;
        (program.*part).back() = bad;
        CHECK(status(program) == QpStatus::kNotFiniteInput);
      }
    program = good;
    program.h[1] = -std::numeric_limits<T>::infinity();
    CHECK(status(program) == QpStatus::kNotFiniteInput);
    program.h[1] = std::numeric_limits<T>::infinity();
    CHECK(status(program) <= QpStatus::kSolved);
  });
}

TEST_CASE("the adjoint is the derivative") {
  each_program_kernel<double>([](const icnnrt::QpKernels<double>& kernels) {
    ProgramCaller caller;
    Random random(93);
    for (const ProgramShape& shape : kProgramShapes)
      for (bool both : {false, true}) {
        CAPTURE(shape.n);
        CAPTURE(shape.m);
        CAPTURE(both);
        Program<double> program = random_program<double>(random, shape, both);
        const ProgramAnswer<double> answer = caller.solve(kernels, program);
        const auto bar = [&](std::size_t count) {
          std::vector<double> values(count);
          for (double& value : values) value = random.uniform(-1.0, 1.0);
          return values;
        };
        const std::vector<double> z_bar = bar(shape.n), lam_bar = bar(shape.m), nu_bar = bar(shape.q),
                                  mu_bar = both ? bar(shape.n) : std::vector<double>(shape.n);
        const ProgramAdjoint<double> d = caller.adjoint(kernels, program, answer, z_bar, lam_bar, nu_bar, mu_bar);
        CHECK(d.intact);
        const auto loss = [&] {
          const ProgramAnswer<double> at = caller.solve(kernels, program);
          double total = 0.0;
          for (std::size_t j = 0; j < shape.n; ++j) total += z_bar[j] * at.z[j] + mu_bar[j] * at.mu[j];
          for (std::size_t i = 0; i < shape.m; ++i) total += lam_bar[i] * at.lam[i];
          for (std::size_t i = 0; i < shape.q; ++i) total += nu_bar[i] * at.nu[i];
          return total;
        };
        const auto derivative = [&](double& value) {
          const double there = value, h = 1e-5;
          value = there + h;
          const double above = loss();
          value = there - h;
          const double below = loss();
          value = there;
          return (above - below) / (2 * h);
        };
        CHECK(std::fabs(derivative(program.p[0]) - d.d_z[0]) <= 1e-6 * (1 + std::fabs(d.d_z[0])));
        for (std::size_t i = 0; i < shape.m && i < 4; ++i) {
          const double wanted = answer.lam[i] > 0 ? -d.d_lam[i] : 0.0;
          CHECK(std::fabs(derivative(program.h[i]) - wanted) <= 1e-6 * (1 + std::fabs(wanted)));
          const double of_G = answer.lam[i] * d.d_z[0] + d.d_lam[i] * answer.z[0];
          CHECK(std::fabs(derivative(program.G[i * shape.n]) - of_G) <= 1e-6 * (1 + std::fabs(of_G)));
        }
        for (std::size_t i = 0; i < shape.q && i < 2; ++i)
          CHECK(std::fabs(derivative(program.b[i]) + d.d_nu[i]) <= 1e-6 * (1 + std::fabs(d.d_nu[i])));
        if (both) {
          const double wanted = answer.mu[0] < 0 ? -d.d_mu[0] : 0.0;
          CHECK(std::fabs(derivative(program.lower[0]) - wanted) <= 1e-6 * (1 + std::fabs(wanted)));
        }
        ProgramAnswer<double> unsolved = answer;
        unsolved.status = QpStatus::kInaccurate;
        for (double value : caller.adjoint(kernels, program, unsolved, z_bar).d_z) CHECK(std::isnan(value));
      }
  });
}

// --- By an active set -----------------------------------------------------------------------------------------------

TEST_CASE_TEMPLATE("the only answer is found by its active set, which counts as one step", T, float, double) {
  each_program_kernel<T>([](const icnnrt::QpKernels<T>& kernels) {
    ProgramCaller caller;
    Random random(96);
    for (const ProgramShape& shape : kProgramShapes)
      for (bool both : {false, true}) {
        if (shape.n > 17) continue;
        CAPTURE(shape.n);
        CAPTURE(shape.m);
        CAPTURE(both);
        const Program<T> program = random_program<T>(random, shape, both);
        const ProgramAnswer<T> answer = caller.solve(kernels, program);
        CHECK(answer.status == QpStatus::kSolved);
        CHECK(answer.taken == 1);
        CHECK(caller.solve(kernels, program, 1).same_bits_as(answer));
        const ProgramAnswer<T> none = caller.solve(kernels, program, 0);
        CHECK(none.taken == 0);
        // What is held has next to no slack, and what is not has no multiplier.
        for (std::size_t i = 0; i < shape.m; ++i) {
          CHECK((answer.lam[i] != T{0}) == (answer.slack[i] < T(1e-9)));
          CHECK((program.lam[i] != 0.0) == (answer.lam[i] != T{0}));
        }
        for (std::size_t j = 0; j < shape.n; ++j) CHECK((program.mu[j] != 0.0) == (answer.mu[j] != T{0}));
      }
  });
}

TEST_CASE("constraints that depend on those in the set make one of them leave") {
  each_program_kernel<double>([](const icnnrt::QpKernels<double>& kernels) {
    ProgramCaller caller;
    Random random(97);
    // Points projected to polytopes: often to a corner, where n rows hold z and whatever else is violated depends on
    // them.
    std::size_t corners = 0, by_set = 0, all = 0;
    for (std::size_t round = 0; round < 200; ++round) {
      const std::size_t n = 1 + round % 4, m = 6 * n;
      Program<double> program{n, m, 0, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}};
      program.Q.assign(n * n, 0.0);
      for (std::size_t j = 0; j < n; ++j) program.Q[j * n + j] = 1.0;
      for (std::size_t j = 0; j < n; ++j) program.p.push_back(random.uniform(-20.0, 20.0));
      for (std::size_t i = 0; i < m * n; ++i) program.G.push_back(random.uniform(-1.0, 1.0));
      program.h.assign(m, 1.0);
      const ProgramAnswer<double> answer = caller.solve(kernels, program);
      CHECK(answer.status == QpStatus::kSolved);
      CHECK(kkt_residual_of(program, answer) <= 1e-9);
      std::size_t held = 0;
      for (double lam : answer.lam) held += lam > 0.0;
      corners += held == n && n > 1;
      by_set += answer.taken == 1;
      ++all;
    }
    CHECK(corners > 20);
    CHECK(by_set > all * 9 / 10);
  });
}

TEST_CASE("where there is more than one answer, or nearly so, the interior point method chooses") {
  each_program_kernel<double>([](const icnnrt::QpKernels<double>& kernels) {
    ProgramCaller caller;
    Random random(98);
    const ProgramShape shape{8, 6, 2};
    for (std::size_t round = 0; round < 20; ++round) {
      const Program<double> only = random_program<double>(random, shape, false);
      const auto first = [&](bool held) {
        return static_cast<std::size_t>(
            std::find_if(only.lam.begin(), only.lam.end(), [&](double lam) { return (lam > 0.0) == held; }) -
            only.lam.begin());
      };
      const std::size_t held = first(true), other = first(false), n = shape.n;
      if (held == shape.m || other == shape.m) continue;

      Program<double> program = only;  // a row that is there twice
      for (std::size_t j = 0; j < n; ++j) program.G[other * n + j] = only.G[held * n + j];
      program.h[other] = only.h[held];
      ProgramAnswer<double> answer = caller.solve(kernels, program);
      CHECK(answer.status == QpStatus::kSolved);
      CHECK(answer.taken > 1);
      CHECK(kkt_residual_of(program, answer) <= 1e-9);
      CHECK(std::fabs(answer.lam[held] - answer.lam[other]) <= 1e-6);  // in the middle of all answers

      program = only;  // a row that z touches, and no multiplier
      double r = 0.0;
      for (std::size_t j = 0; j < n; ++j) r += only.G[other * n + j] * only.z[j];
      program.h[other] = r;
      answer = caller.solve(kernels, program);
      CHECK(answer.status == QpStatus::kSolved);
      CHECK(answer.taken > 1);
      CHECK(distance(answer.z, only.z) <= 1e-5);

      program = only;  // equalities that say the same
      for (std::size_t j = 0; j < n; ++j) program.A[n + j] = 2.0 * only.A[j];
      program.b[1] = 2.0 * only.b[0];
      answer = caller.solve(kernels, program);
      CHECK(answer.status <= QpStatus::kInaccurate);
      CHECK(answer.taken > 1);
    }
  });
}

TEST_CASE_TEMPLATE("bounds that are far beyond z change nothing", T, float, double) {
  each_program_kernel<T>([](const icnnrt::QpKernels<T>& kernels) {
    ProgramCaller caller;
    Random random(99);
    for (const ProgramShape& shape : kProgramShapes)
      for (double far : {1e7, 1e10, 1e15, 9e19}) {
        CAPTURE(shape.n);
        CAPTURE(far);
        Program<T> program = random_program<T>(random, shape, true);
        const std::size_t n = shape.n;
        // linear, so that no active set is tried; float rounds p to where an objective falls without end
        for (std::size_t j = 0; sizeof(T) == 8 && j < n; ++j) {
          double Qz = 0.0;
          for (std::size_t k = 0; k < n; ++k) Qz += static_cast<double>(program.Q[j * n + k]) * program.z[k];
          program.p[j] = static_cast<T>(static_cast<double>(program.p[j]) + Qz);
        }
        if (sizeof(T) == 8) std::fill(program.Q.begin(), program.Q.end(), T{0});
        const auto open = [&](const std::vector<double>& multipliers, std::vector<T>& low, std::vector<T>& high) {
          for (std::size_t i = 0; i < multipliers.size(); ++i) {
            if (multipliers[i] >= 0.0) low[i] = static_cast<T>(-far);
            if (multipliers[i] < 0.0) high[i] = static_cast<T>(far);
          }
        };
        open(program.lam, program.h_lower, program.h);
        open(program.mu, program.lower, program.upper);
        const ProgramAnswer<T> answer = caller.solve(kernels, program);
        CHECK(answer.status == QpStatus::kSolved);
        CHECK(answer.intact);
        CHECK(kkt_residual_of(program, answer) <= kResidual<T>);
        for (T slack : answer.slack) CHECK(slack > T{0});
        for (T slack : answer.box_slack) CHECK(slack > T{0});
      }
  });
}

TEST_CASE("an objective that falls to far bounds is followed there, past nearer ones of others") {
  each_program_kernel<double>([](const icnnrt::QpKernels<double>& kernels) {
    ProgramCaller caller;
    for (double far : {1e7, 1e10}) {
      Program<double> program{
          3, 1, 0, std::vector<double>(9, 0.0), {1.0, -1.0, 0.0}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}};
      program.G = {0.0, 0.0, 1.0};
      program.h = {1.0};
      program.lower = {-far, -1.0, -far};
      program.upper = {far, 1.0, far};
      const ProgramAnswer<double> answer = caller.solve(kernels, program);
      CHECK(answer.status == QpStatus::kSolved);
      CHECK(std::fabs(answer.z[0] + far) <= 1e-6 * far);
    }
  });
}

TEST_CASE("a row of no z is told, though a z of 1e10 leaves it by little of its own size") {
  each_program_kernel<double>([](const icnnrt::QpKernels<double>& kernels) {
    ProgramCaller caller;
    Program<double> program{2,  2,  0, std::vector<double>(4, 0.0), {1.0, 1.0}, {}, {}, {}, {}, {}, {}, {}, {}, {},
                            {}, {}, {}};
    program.G = {1.0, -0.5, -1.0, 0.5};
    program.h = {-1.0, -1.0};
    program.lower = {-1e10, -1e10};
    program.upper = {1e10, 1e10};
    CHECK(caller.solve(kernels, program).status == QpStatus::kPrimalInfeasible);
  });
}

TEST_CASE("a row that an equality implies leaves an answer, however little the curvature") {
  each_program_kernel<double>([](const icnnrt::QpKernels<double>& kernels) {
    ProgramCaller caller;
    Random random(100);
    for (double unit : {1.0, 1e-3, 1e-5})
      for (std::size_t round = 0; round < 20; ++round) {
        CAPTURE(unit);
        Program<double> program = random_program<double>(random, {5, 3, 1}, false);
        for (double& entry : program.Q) entry *= unit;
        for (double& entry : program.p) entry *= 20.0;
        for (std::size_t j = 0; j < 5; ++j) program.G[10 + j] = -program.A[j];
        program.h[2] = -program.b[0];
        const ProgramAnswer<double> answer = caller.solve(kernels, program);
        CHECK(answer.status == QpStatus::kSolved);
        double size = 1.0;  // of the objective
        for (std::size_t j = 0; j < 5; ++j) size += std::fabs(program.p[j] * answer.z[j]);
        CHECK(kkt_residual_of(program, answer) <= 1e-8 * size);
      }
  });
}

TEST_CASE("equal bounds are equalities that never leave the set") {
  each_program_kernel<double>([](const icnnrt::QpKernels<double>& kernels) {
    ProgramCaller caller;
    Random random(99);
    for (std::size_t round = 0; round < 20; ++round) {
      Program<double> program = random_program<double>(random, {9, 6, 1}, true);
      // a row and a variable that have to stay where they are, of whatever sign their multipliers come out
      double r = 0.0;
      for (std::size_t j = 0; j < 9; ++j) r += program.G[j] * program.z[j];
      program.h[0] = program.h_lower[0] = r;
      program.lower[4] = program.upper[4] = program.z[4];
      for (double& p : program.p) p += random.uniform(-0.2, 0.2);
      const ProgramAnswer<double> answer = caller.solve(kernels, program);
      CHECK(answer.status == QpStatus::kSolved);
      CHECK(kkt_residual_of(program, answer) <= 1e-9);
      CHECK(answer.slack[0] == 0.0);
      CHECK(answer.box_slack[4] == 0.0);
      CHECK(std::fabs(answer.z[4] - program.z[4]) <= 1e-12);
    }
  });
}

TEST_CASE("programs of any small shape stay within their workspace, be there a z or not") {
  each_program_kernel<double>([](const icnnrt::QpKernels<double>& kernels) {
    ProgramCaller caller;
    Random random(100);
    for (std::size_t n = 1; n <= 5; ++n)
      for (std::size_t m : {0, 1, 7, 8, 9, 24})
        for (std::size_t q = 0; q <= n + 4; ++q)
          for (bool both : {false, true}) {
            CAPTURE(n);
            CAPTURE(m);
            CAPTURE(q);
            CAPTURE(both);
            Program<double> program = random_program<double>(random, {n, m, q}, both);
            for (double& p : program.p) p *= 5.0;  // far from the start: much is violated there
            const ProgramAnswer<double> answer = caller.solve(kernels, program);
            CHECK(answer.intact);
            CHECK(caller.solve(kernels, program, 50, 0x3f).same_bits_as(answer));
            CHECK(caller.adjoint(kernels, program, answer, program.p).intact);
          }
  });
}

TEST_CASE_TEMPLATE("programs: what the workspace held, and where it lay, does not matter", T, float, double) {
  each_program_kernel<T>([](const icnnrt::QpKernels<T>& kernels) {
    ProgramCaller caller;
    Random random(94);
    for (const ProgramShape& shape : kProgramShapes)
      for (int spoilt = 0; spoilt < 3; ++spoilt) {
        CAPTURE(shape.n);
        CAPTURE(shape.m);
        CAPTURE(spoilt);
        Program<T> program = random_program<T>(random, shape, true);
        // no z, and no end: the searches for certificates use the workspace otherwise
        if (spoilt == 1) program.lower[0] = program.upper[0] + T{1};
        if (spoilt == 2 && shape.m > 1) {
          for (std::size_t j = 0; j < shape.n; ++j) program.G[shape.n + j] = -program.G[j];
          program.h[0] = program.h[1] = T{-1};
          program.h_lower.clear();
        }
        const ProgramAnswer<T> answer = caller.solve(kernels, program);
        const ProgramAdjoint<T> adjoint = caller.adjoint(kernels, program, answer, program.p);
        for (int byte : {0xff, 0x7e, 0x3f, 0x00}) {
          const auto fill = static_cast<unsigned char>(byte);
          const ProgramAnswer<T> again = caller.solve(kernels, program, 50, fill);
          CHECK(again.intact);
          CHECK(again.same_bits_as(answer));
          CHECK(caller.adjoint(kernels, program, answer, program.p, {}, {}, {}, fill).same_bits_as(adjoint));
        }
        CHECK(ProgramCaller().solve(kernels, program).same_bits_as(answer));
        for (std::size_t steps : {0, 1, 2}) CHECK(caller.solve(kernels, program, steps).intact);
      }
  });
}

TEST_CASE_TEMPLATE("programs of odd numbers end", T, float, double) {
  each_program_kernel<T>([](const icnnrt::QpKernels<T>& kernels) {
    ProgramCaller caller;
    Random random(95);
    const T most = std::numeric_limits<T>::max(), least = std::numeric_limits<T>::denorm_min();
    for (T odd : {most, -most, least, static_cast<T>(1e30), static_cast<T>(-1e30), static_cast<T>(1e19), T{0}})
      for (std::vector<T> Program<T>::*part :
           {&Program<T>::Q, &Program<T>::p, &Program<T>::G, &Program<T>::h_lower, &Program<T>::h, &Program<T>::A,
            &Program<T>::b, &Program<T>::lower, &Program<T>::upper})
        for (bool all : {false, true}) {
          Program<T> program = random_program<T>(random, {6, 5, 2}, true);
          for (T& value : program.*part) value = all || random.below(6) == 0 ? odd : value;
          const ProgramAnswer<T> answer = caller.solve(kernels, program);
          CHECK(answer.intact);
          if (answer.status == QpStatus::kSolved)
            for (T value : answer.z) CHECK(std::isfinite(static_cast<double>(value)));
          CHECK(caller.adjoint(kernels, program, answer, program.p).intact);
        }
  });
}

TEST_CASE("programs too large to count have no workspace") {
  constexpr std::size_t most = std::numeric_limits<std::size_t>::max();
  for (const icnnrt::QpSizes& sizes :
       {icnnrt::QpSizes{most, 0, 0}, {1, most, 0}, {1, 0, most}, {most / 2, 1, 1}, {std::size_t{1} << 40, 0, 0}}) {
    CAPTURE(sizes.n);
    CHECK(icnnrt::qp_workspace_bytes(sizes) == 0);
  }
}

}  // namespace
}  // namespace icnnrt_tests
