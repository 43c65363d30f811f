// Any quadratic program: no call of its kernels touches what is not its own, and what is said to be solved is.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <string>
#include <vector>

#include "fuzz_bytes.h"
#include "plans.h"

namespace icnnrt_tests {

using icnnrt::QpStatus;

inline constexpr double kNoBound = 1e20;  // bounds from here on are none

// Relative KKT residuals as icnnrt/mathematics/qp_reference.py defines them, each less what the rounding of the answer
// to T, and of the sums here, may have made of it.
template <typename T>
double relative_residual(const Program<T>& of, const ProgramAnswer<T>& answer) {
  const std::size_t n = of.n, m = of.m, q = of.q;
  constexpr double eps = 8.0 * std::numeric_limits<T>::epsilon();
  constexpr double least = std::numeric_limits<T>::denorm_min();
  // A sum, and the sum of its terms' sizes, with a least one for each: a factor may have been rounded to nothing.
  struct Sum {
    double value = 0.0, size = 0.0;
    void add(double a, double b) {
      value += a * b;
      size += std::fabs(a * b) + least / eps * std::fmax(std::fabs(a), std::fabs(b));
    }
  };
  const auto at = [](const std::vector<T>& a, std::size_t i) { return static_cast<double>(a[i]); };
  double worst = 0.0;
  const auto judge = [&](double residual, double rounding, double scale) {
    const double excess = (std::fabs(residual) - eps * rounding) / scale;
    if (!(excess <= worst)) worst = excess;  // NaN too
  };

  std::vector<Sum> total(n), Qz(n), G_lam(n), A_nu(n), Gz(m), Az(q);
  double of_terms = 1.0, of_rows = 1.0, objective = 0.0;
  for (std::size_t j = 0; j < n; ++j) {
    for (std::size_t k = 0; k < n; ++k) {
      const double entry = 0.5 * at(of.Q, j * n + k) + 0.5 * at(of.Q, k * n + j);
      Qz[j].add(entry, at(answer.z, k));
    }
    for (std::size_t i = 0; i < m; ++i) G_lam[j].add(at(of.G, i * n + j), at(answer.lam, i));
    for (std::size_t i = 0; i < q; ++i) A_nu[j].add(at(of.A, i * n + j), at(answer.nu, i));
    const double ends[] = {Qz[j].value, at(of.p, j), G_lam[j].value, A_nu[j].value, at(answer.mu, j)};
    for (double end : ends) of_terms = std::fmax(of_terms, 1.0 + std::fabs(end));
    objective += 0.5 * at(answer.z, j) * Qz[j].value + at(of.p, j) * at(answer.z, j);
  }
  for (std::size_t j = 0; j < n; ++j) {
    const double sum = Qz[j].value + at(of.p, j) + G_lam[j].value + A_nu[j].value + at(answer.mu, j);
    const double size =
        Qz[j].size + G_lam[j].size + A_nu[j].size + std::fabs(at(of.p, j)) + std::fabs(at(answer.mu, j)) + least / eps;
    judge(sum, size, of_terms);
  }
  for (std::size_t i = 0; i < m; ++i)
    for (std::size_t j = 0; j < n; ++j) Gz[i].add(at(of.G, i * n + j), at(answer.z, j));
  for (std::size_t i = 0; i < q; ++i) {
    for (std::size_t j = 0; j < n; ++j) Az[i].add(at(of.A, i * n + j), at(answer.z, j));
    of_rows = std::fmax(of_rows, 1.0 + std::fmax(std::fabs(Az[i].value), std::fabs(at(of.b, i))));
  }

  struct Held {
    Sum r;
    double low, high, multiplier;
  };
  std::vector<Held> held;
  for (std::size_t i = 0; i < m; ++i)
    held.push_back({Gz[i], of.h_lower.empty() ? -HUGE_VAL : at(of.h_lower, i), at(of.h, i), at(answer.lam, i)});
  for (std::size_t j = 0; j < n; ++j) {
    Sum z;
    z.add(1.0, at(answer.z, j));
    held.push_back({z, of.lower.empty() ? -HUGE_VAL : at(of.lower, j), of.upper.empty() ? HUGE_VAL : at(of.upper, j),
                    at(answer.mu, j)});
  }
  for (const Held& one : held)
    if (one.low > -kNoBound || one.high < kNoBound) of_rows = std::fmax(of_rows, 1.0 + std::fabs(one.r.value));
  for (std::size_t i = 0; i < q; ++i) judge(Az[i].value - at(of.b, i), Az[i].size + std::fabs(at(of.b, i)), of_rows);
  double gap = 0.0, of_gap = 0.0;
  for (const Held& one : held)
    for (double sign : {1.0, -1.0}) {
      const double bound = sign > 0 ? one.high : -one.low, pushed = std::fmax(sign * one.multiplier, 0.0);
      if (!(bound < kNoBound)) {
        gap += pushed;
        continue;
      }
      const double over = sign * one.r.value - bound, size = one.r.size + std::fabs(bound);
      judge(std::fmax(over, 0.0), size, of_rows);
      gap += pushed * std::fabs(over);
      of_gap += (pushed + least / eps) * size;
    }
  judge(gap, of_gap, 1.0 + std::fabs(objective));
  return worst;
}

// What must hold of an answer, "" if it does.
template <typename T>
std::string complaint(const Program<T>& of, const ProgramAnswer<T>& answer) {
  if (!answer.intact) return "the solve wrote memory that is not an output";
  const int code = static_cast<int>(answer.status);
  if (code < 0 || code > static_cast<int>(QpStatus::kNotConvex))
    return "a status that is none: " + std::to_string(code);

  bool bad = false;
  for (const auto* part : {&of.Q, &of.p, &of.G, &of.A, &of.b})
    for (T value : *part) bad = bad || !std::isfinite(value);
  for (const auto* part : {&of.h, &of.upper})
    for (T value : *part) bad = bad || std::isnan(value) || static_cast<double>(value) <= -kNoBound;
  for (const auto* part : {&of.h_lower, &of.lower})
    for (T value : *part) bad = bad || std::isnan(value) || static_cast<double>(value) >= kNoBound;
  // Q + Q' may overflow though Q does not.
  bool huge = false;
  for (T value : of.Q) huge = huge || std::fabs(static_cast<double>(value)) > std::numeric_limits<double>::max() / 2;
  if (!(huge && !bad) && bad != (answer.status == QpStatus::kNotFiniteInput))
    return std::string("data that are ") + (bad ? "not " : "") + "numbers have the status " + std::to_string(code);

  const bool there = answer.status <= QpStatus::kInaccurate;
  for (const auto* part : {&answer.z, &answer.lam, &answer.nu, &answer.mu})
    for (T value : *part)
      if (there ? !std::isfinite(value) : !std::isnan(value)) return "an answer that is not there, or none where it is";
  const auto two_sided = [](const std::vector<T>& low, const std::vector<T>& high, std::size_t i) {
    return !low.empty() && !high.empty() && static_cast<double>(low[i]) > -kNoBound &&
           static_cast<double>(high[i]) < kNoBound;
  };
  for (bool box : {false, true}) {
    const auto& part = box ? answer.box_slack : answer.slack;
    for (std::size_t i = 0; i < part.size(); ++i) {
      const bool may_be_0 = box ? two_sided(of.lower, of.upper, i) : two_sided(of.h_lower, of.h, i);
      if (there ? !(part[i] > T{0} || (part[i] == T{0} && may_be_0)) : !std::isnan(part[i]))
        return "a slack that is not above 0, or is 0 without two bounds, or there without an answer";
    }
  }
  for (double value : answer.residual)
    if (there ? !(value >= 0.0) : !std::isnan(value)) return "a residual that is none, or there without an answer";
  const bool proof = answer.status == QpStatus::kPrimalInfeasible || answer.status == QpStatus::kDualInfeasible;
  for (T value : answer.ray)
    if (!proof && value != T{0}) return "a ray that proves nothing";

  if (answer.status != QpStatus::kSolved) return "";
  constexpr double tolerance = sizeof(T) == sizeof(double) ? 1e-9 : 1e-6;
  for (double value : answer.residual)
    if (!(value <= tolerance)) return "solved, with a residual of " + std::to_string(value);
  double largest = 0.0;  // beyond this, what is multiplied here overflows
  for (const auto* part : {&of.Q, &of.p, &of.G, &of.A, &of.b, &answer.z, &answer.lam, &answer.nu, &answer.mu})
    for (T value : *part) largest = std::fmax(largest, std::fabs(static_cast<double>(value)));
  if (largest > 1e70) return "";
  const double residual = relative_residual(of, answer);
  if (!(residual <= 1.01 * tolerance)) {
    char text[80];
    std::snprintf(text, sizeof text, "solved, but the residual is %.3g", residual);
    return text;
  }
  return "";
}

template <typename T>
void try_programs(Bytes& bytes) {
  static thread_local ProgramCaller caller;
  std::vector<const icnnrt::QpKernels<T>*> runnable;
  for (std::size_t i = 0; i < icnnrt::kInstructionSets; ++i)
    if (const icnnrt::QpKernels<T>* kernels = icnnrt::qp_kernels_for<T>(i)) runnable.push_back(kernels);
  const icnnrt::QpKernels<T>& kernels = *runnable[bytes.below(runnable.size())];
  const std::size_t n = 1 + bytes.below(12), m = bytes.below(3) ? bytes.below(bytes.below(4) ? 8 : 24) : 0;
  const std::size_t q = bytes.below(2) ? bytes.below(bytes.below(4) ? (n + 1) / 2 : n + 3) : 0;
  const std::size_t steps = bytes.below(4) ? 50 : bytes.below(80);
  Program<T> of{n, m, q, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}};
  const auto check = [&](const std::string& what) {
    if (what.empty()) return;
    std::fprintf(stderr, "%s\nat n = %zu, m = %zu, q = %zu, steps = %zu, %s, %s\n", what.c_str(), n, m, q, steps,
                 kernels.instruction_set, sizeof(T) == sizeof(double) ? "double" : "float");
    std::abort();
  };

  const auto filled = [&](std::size_t count) {
    Numbers<T> numbers(bytes);
    std::vector<T> values(count);
    for (T& value : values) value = numbers.next();
    return values;
  };
  // Q: of a factor, most often of full rank; diagonal; nothing; or anything
  const std::size_t kind = bytes.below(8);
  of.Q.assign(n * n, T{0});
  if (kind < 5) {
    const std::size_t rank = bytes.below(3) ? n : bytes.below(n + 1);
    const std::vector<T> F = filled(n * rank);
    for (std::size_t i = 0; i < n; ++i)
      for (std::size_t j = 0; j < n; ++j)
        for (std::size_t k = 0; k < rank; ++k) of.Q[i * n + j] += F[i * rank + k] * F[j * rank + k];
  } else if (kind == 5) {
    const std::vector<T> diagonal = filled(n);
    for (std::size_t i = 0; i < n; ++i) of.Q[i * n + i] = std::fabs(diagonal[i]);
  } else if (kind == 6) {
    of.Q = filled(n * n);
  }
  of.p = filled(n);
  of.G = filled(m * n);
  of.A = filled(q * n);
  of.b = filled(q);
  of.h = filled(m);
  const auto infinite = [&](std::vector<T>& values, T infinity) {
    for (T& value : values)
      if (bytes.below(5) == 0) value = bytes.below(2) ? infinity : infinity > T{0} ? T(2e30) : T(-2e30);
  };
  constexpr T inf = std::numeric_limits<T>::infinity();
  if (bytes.below(3) == 0) of.h_lower = filled(m);
  if (bytes.below(2) == 0) of.lower = filled(n);
  if (bytes.below(2) == 0) of.upper = filled(n);
  // Most often in order: two unordered rows of random numbers always cross somewhere.
  if (bytes.below(8)) {
    for (std::size_t i = 0; i < of.h_lower.size(); ++i)
      if (of.h[i] < of.h_lower[i]) std::swap(of.h[i], of.h_lower[i]);
    for (std::size_t j = 0; j < n && !of.lower.empty() && !of.upper.empty(); ++j)
      if (of.upper[j] < of.lower[j]) std::swap(of.upper[j], of.lower[j]);
  }
  infinite(of.h, inf);
  infinite(of.upper, inf);
  infinite(of.h_lower, -inf);
  infinite(of.lower, -inf);
  // a z that meets all constraints, most often: rows and sides moved to where 0 is feasible
  if (bytes.below(4)) {
    for (T& value : of.h) value = std::fabs(value);
    for (T& value : of.h_lower) value = -std::fabs(value);
    for (T& value : of.upper) value = std::fabs(value);
    for (T& value : of.lower) value = -std::fabs(value);
    for (T& value : of.b) value = T{0};
  }
  // rows and right-hand sides that are there twice, or as their opposites
  const auto copied_row = [&](std::vector<T>& M, std::vector<T>& v, std::size_t rows) {
    for (std::size_t copies = bytes.below(3) || rows < 2 ? 0 : 1 + bytes.below(3); copies > 0; --copies) {
      const std::size_t from = bytes.below(rows), to = bytes.below(rows);
      const T sign = bytes.below(4) ? T{1} : T{-1};
      for (std::size_t j = 0; j < n; ++j) M[to * n + j] = sign * M[from * n + j];
      v[to] = sign > T{0} ? v[from] : v[to];
    }
  };
  copied_row(of.G, of.h, m);
  copied_row(of.A, of.b, q);
  // a few odd numbers among the others
  if (bytes.below(6) == 0) {
    constexpr T odd[] = {std::numeric_limits<T>::quiet_NaN(),  inf, -inf, std::numeric_limits<T>::max(),
                         std::numeric_limits<T>::denorm_min(), T{0}};
    std::vector<T>* const parts[] = {&of.Q, &of.p, &of.G, &of.h_lower, &of.h, &of.A, &of.b, &of.lower, &of.upper};
    for (std::size_t count = 1 + bytes.below(3); count > 0; --count) {
      std::vector<T>& part = *parts[bytes.below(9)];
      if (part.empty()) continue;
      const std::size_t which = bytes.below(7);
      part[bytes.below(part.size())] = which < 6 ? odd[which] : bytes.any_bits<T>();
    }
  }
  if (bytes.below(4) == 0) of.start = filled(2 * n + m + q);

  const ProgramAnswer<T> answer = caller.solve(kernels, of, steps);
  check(complaint(of, answer));
  if (!caller.solve(kernels, of, steps, 0x3f).same_bits_as(answer)) check("the same call twice gave two answers");
  // From a start, cold, with all bounds, and four times as many of the last beginning and that with all bounds; an
  // active set counts as one.
  const std::size_t most = (of.start.empty() ? 2 : 3) * steps + 2 * 4 * steps + 3;
  if (answer.taken < 0 || static_cast<std::size_t>(answer.taken) > most) check("more steps than were asked for");
  // As many steps as were told are enough, where no beginning took all: what was tried besides leaves nothing behind.
  if (answer.status == QpStatus::kSolved && of.start.empty() && static_cast<std::size_t>(answer.taken) <= steps &&
      !caller.solve(kernels, of, static_cast<std::size_t>(answer.taken)).same_bits_as(answer))
    check("as many steps as were told gave another answer");

  std::vector<T> bars[4];
  const std::size_t sizes[] = {n, m, q, n};
  for (std::size_t i = 0; i < 4; ++i)
    if (i == 0 || bytes.below(2)) bars[i] = filled(sizes[i]);
  const ProgramAdjoint<T> adjoint = caller.adjoint(kernels, of, answer, bars[0], bars[1], bars[2], bars[3]);
  if (!adjoint.intact) check("the adjoint wrote memory that is not an output");
  if (!caller.adjoint(kernels, of, answer, bars[0], bars[1], bars[2], bars[3], 0x3f).same_bits_as(adjoint))
    check("the same adjoint twice gave two answers");
  if (answer.status != QpStatus::kSolved && !std::isnan(adjoint.share)) check("a share of what is not solved");
  if (answer.status != QpStatus::kSolved)
    for (const auto* part : {&adjoint.d_z, &adjoint.d_lam, &adjoint.d_nu, &adjoint.d_mu})
      for (T value : *part)
        if (!std::isnan(value)) check("a gradient of what is not solved");

  // The same by a plan, in any order of elimination: what it says is true, if it says less.
  static thread_local ProgramCaller sparse;
  Random order(bytes.below(256));
  const std::vector<std::int32_t> numbers = plan_of(of, order);
  icnnrt::QpPlan plan{};
  if (const char* const expected = icnnrt::read_plan(numbers.data(), numbers.size(), n, m, q, plan)) check(expected);
  sparse.plan = &plan;
  const ProgramAnswer<T> planned = sparse.solve(kernels, of, steps);
  check(complaint(of, planned));
  if (!sparse.solve(kernels, of, steps, 0x3f).same_bits_as(planned)) check("a plan twice gave two answers");
  const ProgramAdjoint<T> back = sparse.adjoint(kernels, of, planned, bars[0], bars[1], bars[2], bars[3]);
  if (!back.intact) check("the adjoint by a plan wrote memory that is not an output");
  if (!sparse.adjoint(kernels, of, planned, bars[0], bars[1], bars[2], bars[3], 0x3f).same_bits_as(back))
    check("an adjoint by a plan twice gave two answers");
}

}  // namespace icnnrt_tests
