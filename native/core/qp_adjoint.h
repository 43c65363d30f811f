// The adjoint of a quadratic program: one KKT system, condensed as in the solver.
#pragma once

#include "qp_solve.h"

namespace icnnrt {
namespace ICNNRT_INSTRUCTION_SET {

inline constexpr std::size_t kRefinements = 3;  // each leaves about 1e-8 of the error

//     [Q  G'       A'  I      ] [d_z]     [−z̄]
//     [G  −1/W_λ              ] [d_λ]  =  [−λ̄]         W_λ = |λ| / slack,  W_μ = |μ| / box_slack
//     [A           0          ] [d_ν]     [−ν̄]
//     [I               −1/W_μ ] [d_μ]     [−μ̄]
template <typename T>
static void qp_adjoint(const QpSizes& sizes, const QpAdjointArguments<T>& args, void* memory) noexcept {
  const std::size_t n = sizes.n, m = sizes.m, q = sizes.q;
  if (args.status != QpStatus::kSolved) {
    const T nan = static_cast<T>(__builtin_nan(""));
    for (std::size_t j = 0; j < n; ++j) args.d_z[j] = args.d_mu[j] = nan;
    for (std::size_t i = 0; i < m; ++i) args.d_lam[i] = nan;
    for (std::size_t i = 0; i < q; ++i) args.d_nu[i] = nan;
    return;
  }
  Problem P;
  Iteration it;
  lay_out(memory, n, m, q, P, it);
  Newton& newton = it.newton;
  QpArguments<T> data{};
  data.Q = args.Q;
  data.p = args.z_bar;
  data.G = args.G;
  data.A = args.A;
  read_matrices(data, Purpose::kSolve, P);
  bool any_box = false;
  for (std::size_t j = 0; j < n; ++j)
    any_box = any_box || args.mu[j] != T{0} || (args.mu_bar && args.mu_bar[j] != T{0});
  P.N = any_box ? P.N : P.box;
  for (Side& side : P.side) side.any = false;

  // In units of the curvature of Q, and of the rows: an active constraint counts 1e8 times as much as Q, and the
  // refinements take the rest of the way to a hard one.
  double size = 0.0;
  for (std::size_t j = 0; j < n; ++j) size += __builtin_fabs(P.K[j * P.ld + j]);
  size = size > 0.0 ? size / static_cast<double>(n) : 1.0;
  newton.rho = 1e-13 * size;
  newton.delta = 1e-13 / size;
  const auto weigh = [&](std::size_t i, double multiplier, double slack, double row, double bar) {
    const double W_true = __builtin_fabs(multiplier) / slack, W_most = kHard * size / (row > 0.0 ? row : 1.0);
    newton.inverse_W[i] = W_true > 0.0 ? 1.0 / W_true : 0.0;
    newton.W[i] = W_true < kInf ? W_true * (W_most / (W_true + W_most)) : W_most;
    it.t[i] = bar;
  };
  for (std::size_t i = 0; i < P.box; ++i) {
    if (i >= m) {
      weigh(i, 0.0, 1.0, 1.0, 0.0);
      continue;
    }
    Vec row{};
    for (std::size_t j = 0; j < P.n_blocks; j += W) row += load(P.G + i * P.ld + j) * load(P.G + i * P.ld + j);
    weigh(i, static_cast<double>(args.lam[i]), static_cast<double>(args.slack[i]), sum(row),
          args.lam_bar ? static_cast<double>(args.lam_bar[i]) : 0.0);
  }
  for (std::size_t i = P.box; i < P.N; ++i) {
    const std::size_t j = i - P.box;
    if (j < n) {
      weigh(i, static_cast<double>(args.mu[j]), static_cast<double>(args.box_slack[j]), 1.0,
            args.mu_bar ? static_cast<double>(args.mu_bar[j]) : 0.0);
    } else {
      weigh(i, 0.0, 1.0, 1.0, 0.0);
    }
  }
  for (std::size_t j = 0; j < n; ++j) it.rhs[j] = -static_cast<double>(args.z_bar[j]);
  for (std::size_t j = 0; j < q; ++j) it.rhs[P.n_blocks + j] = args.nu_bar ? -static_cast<double>(args.nu_bar[j]) : 0.0;
  factor(P, newton);
  solve_refined(P, newton, it.rhs, it.t, kRefinements, it.dx, it.d_lam, it.d_rows);
  for (std::size_t j = 0; j < n; ++j) {
    args.d_z[j] = static_cast<T>(it.dx[j]);
    args.d_mu[j] = static_cast<T>(any_box ? it.d_lam[P.box + j] : 0.0);
  }
  for (std::size_t i = 0; i < m; ++i) args.d_lam[i] = static_cast<T>(it.d_lam[i]);
  for (std::size_t i = 0; i < q; ++i) args.d_nu[i] = static_cast<T>(it.dx[P.n_blocks + i]);
}

}  // namespace ICNNRT_INSTRUCTION_SET
}  // namespace icnnrt
