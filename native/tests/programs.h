// Quadratic programs built backwards from an answer, calls of their kernels with every array guarded, and what an
// answer must hold.
#pragma once

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "call.h"
#include "core/qp.h"

namespace icnnrt_tests {

// Samples have one array each; sizes as in QpSizes. Empty h_lower, lower, upper and start are absent.
template <typename T>
struct Program {
  std::size_t n, m, q;
  std::vector<T> Q, p, G, h_lower, h, A, b, lower, upper, start;
  std::vector<double> z, lam, nu, mu;  // the answer

  icnnrt::QpSizes sizes(std::size_t steps = 50) const { return {n, m, q, steps}; }
};

struct ProgramShape {
  std::size_t n, m, q;
};

inline const ProgramShape kProgramShapes[] = {{1, 0, 0},   {1, 1, 0},   {2, 1, 1},   {4, 0, 0},
                                              {5, 0, 2},   {7, 9, 0},   {8, 8, 4},   {10, 5, 0},
                                              {10, 10, 3}, {13, 30, 5}, {17, 33, 7}, {40, 20, 9}};

// Strictly complementary, with about a third of the constraints active; with a box, and lower bounds, if `both`.
template <typename T>
Program<T> random_program(Random& random, const ProgramShape& shape, bool both) {
  const std::size_t n = shape.n, m = shape.m, q = shape.q;
  Program<T> made{n, m, q, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}};
  const auto fill = [&](std::size_t count) {
    std::vector<T> values(count);
    for (T& value : values) value = static_cast<T>(random.uniform(-1.0, 1.0));
    return values;
  };
  const std::vector<T> F = fill(n * n);
  made.Q.resize(n * n);
  for (std::size_t i = 0; i < n; ++i)
    for (std::size_t j = 0; j < n; ++j) {
      double total = i == j ? 0.5 : 0.0;
      for (std::size_t k = 0; k < n; ++k)
        total += static_cast<double>(F[i * n + k]) * static_cast<double>(F[j * n + k]) / static_cast<double>(n);
      made.Q[i * n + j] = static_cast<T>(total);
    }
  for (std::size_t i = 0; i < n; ++i)
    for (std::size_t j = 0; j < i; ++j) made.Q[i * n + j] = made.Q[j * n + i];
  made.G = fill(m * n);
  made.A = fill(q * n);
  for (std::size_t j = 0; j < n; ++j) made.z.push_back(random.uniform(-1.0, 1.0));
  std::size_t active = 0;
  const auto sides = [&](double r, std::vector<T>& low, std::vector<T>& high, std::vector<double>& multipliers) {
    // few enough that they are independent
    const std::size_t side = 2 * active + 2 * q < n ? random.below(both ? 3 : 2) : 0;
    active += side != 0;
    multipliers.push_back(side == 0 ? 0.0 : (side == 1 ? 1.0 : -1.0) * random.uniform(0.5, 1.5));
    high.push_back(static_cast<T>(r + (side == 1 ? 0.0 : random.uniform(0.5, 1.0))));
    low.push_back(static_cast<T>(r - (side == 2 ? 0.0 : random.uniform(0.5, 1.0))));
  };
  for (std::size_t i = 0; i < m; ++i) {
    double r = 0.0;
    for (std::size_t j = 0; j < n; ++j) r += static_cast<double>(made.G[i * n + j]) * made.z[j];
    sides(r, made.h_lower, made.h, made.lam);
  }
  for (std::size_t j = 0; j < n; ++j) {
    if (both) {
      sides(made.z[j], made.lower, made.upper, made.mu);
    } else {
      made.mu.push_back(0.0);
    }
  }
  if (!both) made.h_lower.clear();
  for (std::size_t i = 0; i < q; ++i) {
    made.nu.push_back(random.uniform(-1.0, 1.0));
    double Az = 0.0;
    for (std::size_t j = 0; j < n; ++j) Az += static_cast<double>(made.A[i * n + j]) * made.z[j];
    made.b.push_back(static_cast<T>(Az));
  }
  for (std::size_t j = 0; j < n; ++j) {
    double p = -made.mu[j];
    for (std::size_t k = 0; k < n; ++k) p -= static_cast<double>(made.Q[j * n + k]) * made.z[k];
    for (std::size_t i = 0; i < m; ++i) p -= static_cast<double>(made.G[i * n + j]) * made.lam[i];
    for (std::size_t i = 0; i < q; ++i) p -= static_cast<double>(made.A[i * n + j]) * made.nu[i];
    made.p.push_back(static_cast<T>(p));
  }
  return made;
}

template <typename T>
struct ProgramAnswer {
  std::vector<T> z, lam, nu, mu, slack, box_slack, ray;
  std::vector<double> residual;
  icnnrt::QpStatus status;
  bool intact;
  std::int32_t taken;

  bool same_bits_as(const ProgramAnswer& other) const {
    return same_bits(z.data(), other.z) && same_bits(lam.data(), other.lam) && same_bits(nu.data(), other.nu) &&
           same_bits(mu.data(), other.mu) && same_bits(slack.data(), other.slack) &&
           same_bits(box_slack.data(), other.box_slack) && same_bits(ray.data(), other.ray) &&
           same_bits(residual.data(), other.residual) && status == other.status && taken == other.taken;
  }
};

template <typename T>
struct ProgramAdjoint {
  std::vector<T> d_z, d_lam, d_nu, d_mu;
  double share;
  std::int32_t weak;
  bool intact;

  bool same_bits_as(const ProgramAdjoint& other) const {
    return same_bits(d_z.data(), other.d_z) && same_bits(d_lam.data(), other.d_lam) &&
           same_bits(d_nu.data(), other.d_nu) && same_bits(d_mu.data(), other.d_mu) &&
           same_bits(&share, std::vector<double>{other.share}) && weak == other.weak;
  }
};

// Holds the memory of the arrays from call to call; one a thread.
class ProgramCaller {
 public:
  const icnnrt::QpPlan* plan = nullptr;  // of sparse matrices

  template <typename T>
  ProgramAnswer<T> solve(const icnnrt::QpKernels<T>& kernels, const Program<T>& of, std::size_t steps = 50,
                         unsigned char fill = kPoison) {
    const std::size_t n = of.n, m = of.m, q = of.q;
    const std::vector<T>* const inputs[] = {&of.Q, &of.p, &of.G,     &of.h_lower, &of.h,
                                            &of.A, &of.b, &of.lower, &of.upper,   &of.start};
    const T* in[10];
    for (std::size_t i = 0; i < 10; ++i) {
      in[i] = copied(memory_[i], *inputs[i]);
      if ((i == 3 || i >= 7) && inputs[i]->empty()) in[i] = nullptr;
    }
    const std::size_t counts[] = {n, m, q, n, m, n, 2 * n + m + q};
    T* out[7];
    for (std::size_t i = 0; i < 7; ++i)
      out[i] = static_cast<T*>(memory_[10 + i].take(counts[i] * sizeof(T), alignof(T), fill));
    auto* const residual = static_cast<double*>(memory_[17].take(3 * sizeof(double), alignof(double), fill));
    icnnrt::QpStatus status = icnnrt::QpStatus::kFailed;
    std::int32_t taken = -1;
    icnnrt::QpSizes sizes = of.sizes(steps);
    sizes.plan = plan;
    void* const workspace = memory_[18].take(icnnrt::qp_workspace_bytes(sizes), icnnrt::kWorkspaceAlignment, fill);
    kernels.solve(sizes, {in[0],  in[1],  in[2],  in[3],  in[4],  in[5],  in[6],    in[7],   in[8],  in[9],
                          out[0], out[1], out[2], out[3], out[4], out[5], residual, &status, out[6], &taken},
                  workspace);
    ProgramAnswer<T> answer{{}, {}, {}, {}, {}, {}, {}, {residual, residual + 3}, status, true, taken};
    std::vector<T>* const outputs[] = {&answer.z,     &answer.lam,       &answer.nu, &answer.mu,
                                       &answer.slack, &answer.box_slack, &answer.ray};
    for (std::size_t i = 0; i < 7; ++i) outputs[i]->assign(out[i], out[i] + counts[i]);
    for (std::size_t i = 0; i < 19; ++i) answer.intact = answer.intact && memory_[i].intact();
    for (std::size_t i = 0; i < 10; ++i) answer.intact = answer.intact && (!in[i] || same_bits(in[i], *inputs[i]));
    return answer;
  }

  // Empty cotangents but z_bar are zero.
  template <typename T>
  ProgramAdjoint<T> adjoint(const icnnrt::QpKernels<T>& kernels, const Program<T>& of, const ProgramAnswer<T>& answer,
                            const std::vector<T>& z_bar, const std::vector<T>& lam_bar = {},
                            const std::vector<T>& nu_bar = {}, const std::vector<T>& mu_bar = {},
                            unsigned char fill = kPoison) {
    const std::size_t n = of.n, m = of.m, q = of.q;
    const std::vector<T>* const inputs[] = {
        &of.Q,  &of.G,    &of.A,   &answer.lam, &answer.mu, &answer.slack, &answer.box_slack,
        &z_bar, &lam_bar, &nu_bar, &mu_bar};
    const T* in[11];
    for (std::size_t i = 0; i < 11; ++i) {
      in[i] = copied(memory_[i], *inputs[i]);
      if (i >= 8 && inputs[i]->empty()) in[i] = nullptr;
    }
    const std::size_t counts[] = {n, m, q, n};
    T* out[4];
    for (std::size_t i = 0; i < 4; ++i)
      out[i] = static_cast<T*>(memory_[11 + i].take(counts[i] * sizeof(T), alignof(T), fill));
    auto* const share = static_cast<double*>(memory_[15].take(sizeof(double), alignof(double), fill));
    auto* const weak = static_cast<std::int32_t*>(memory_[16].take(sizeof(std::int32_t), alignof(std::int32_t), fill));
    icnnrt::QpSizes sizes = of.sizes();
    sizes.plan = plan;
    void* const workspace = memory_[18].take(icnnrt::qp_workspace_bytes(sizes), icnnrt::kWorkspaceAlignment, fill);
    kernels.adjoint(sizes,
                    {in[0], in[1], in[2], in[3], in[4], in[5], in[6], answer.status, in[7], in[8], in[9], in[10],
                     out[0], out[1], out[2], out[3], share, weak},
                    workspace);
    ProgramAdjoint<T> made{{}, {}, {}, {}, *share, *weak, true};
    std::vector<T>* const outputs[] = {&made.d_z, &made.d_lam, &made.d_nu, &made.d_mu};
    for (std::size_t i = 0; i < 4; ++i) outputs[i]->assign(out[i], out[i] + counts[i]);
    for (std::size_t i = 0; i < 17; ++i) made.intact = made.intact && memory_[i].intact();
    return made;
  }

 private:
  GuardedMemory memory_[19];
};

// The largest absolute KKT residual of an answer: stationarity, violation, gap.
template <typename T>
double kkt_residual_of(const Program<T>& of, const ProgramAnswer<T>& answer) {
  const std::size_t n = of.n, m = of.m, q = of.q;
  const auto at = [](const std::vector<T>& a, std::size_t i) { return static_cast<double>(a[i]); };
  double most = 0.0, gap = 0.0;
  const auto larger = [&](double a) { most = std::isnan(a) || a > most ? a : most; };
  const auto held = [&](double r, double multiplier, const std::vector<T>& low, const std::vector<T>& high,
                        std::size_t i) {
    const double bounds[] = {high.empty() ? HUGE_VAL : at(high, i), low.empty() ? HUGE_VAL : -at(low, i)};
    for (double sign : {1.0, -1.0}) {
      const double bound = bounds[sign < 0], pushed = std::fmax(sign * multiplier, 0.0);
      larger(sign * r - bound);
      if (pushed > 0.0) gap += bound < 1e30 ? std::fabs(pushed * (bound - sign * r)) : pushed;
    }
  };
  for (std::size_t j = 0; j < n; ++j) {
    double total = at(of.p, j) + at(answer.mu, j);
    for (std::size_t k = 0; k < n; ++k) total += (at(of.Q, j * n + k) + at(of.Q, k * n + j)) / 2 * at(answer.z, k);
    for (std::size_t i = 0; i < m; ++i) total += at(of.G, i * n + j) * at(answer.lam, i);
    for (std::size_t i = 0; i < q; ++i) total += at(of.A, i * n + j) * at(answer.nu, i);
    larger(std::fabs(total));
    held(at(answer.z, j), at(answer.mu, j), of.lower, of.upper, j);
  }
  for (std::size_t i = 0; i < m; ++i) {
    double r = 0.0;
    for (std::size_t j = 0; j < n; ++j) r += at(of.G, i * n + j) * at(answer.z, j);
    held(r, at(answer.lam, i), of.h_lower, of.h, i);
  }
  for (std::size_t i = 0; i < q; ++i) {
    double r = -at(of.b, i);
    for (std::size_t j = 0; j < n; ++j) r += at(of.A, i * n + j) * at(answer.z, j);
    larger(std::fabs(r));
  }
  larger(gap);
  return most;
}

}  // namespace icnnrt_tests
