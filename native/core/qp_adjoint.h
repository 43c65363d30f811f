// The adjoint of a quadratic program: one KKT system, condensed as in the solver.
#pragma once

#include "qp_solve.h"

namespace icnnrt {
namespace ICNNRT_INSTRUCTION_SET {

// The constants of icnnrt/mathematics/qp_adjoint.py.
inline constexpr double kAdjointRho = 1e-12, kAdjointDelta = 1e-8;
inline constexpr std::size_t kProximalSteps = 10;  // of the proximal point method: 2 are usual
inline constexpr double kAdjointEnough = 1e-14;    // relative residual at which it stops
inline constexpr std::size_t kProximalSurely = 4;  // steps after which it tells whether x runs away
inline constexpr double kRunaway = 1e-13;          // r − K x against x from where on it does
inline constexpr double kSingularRho = 1e-7, kSingularDelta = 1e-4;
inline constexpr std::size_t kSeparated = 8, kParted = 3;  // steps that separate the parts of r, and how often
// The larger of multiplier and slack, equilibrated, of a row that may as well not hold z; where the lesser is less than
// the first part of it, as many times as large as the second.
inline constexpr double kDecided = 1e-3, kUnlikely = 100.0;
template <typename T>
inline constexpr double kWeak = sizeof(T) == sizeof(double) ? 1e-4 : 1e-3;

//     [Q    G_a'  A'  I_a'] [d_z]     [−z̄]
//     [G_a                ] [d_λ]  =  [−λ̄]
//     [A                  ] [d_ν]     [−ν̄]         on the rows that hold z, which have 0 slack, or less than λ
//     [I_a                ] [d_μ]     [−μ̄]
template <typename T>
static void qp_adjoint(const QpSizes& sizes, const QpAdjointArguments<T>& args, void* memory) noexcept {
  const std::size_t n = sizes.n, m = sizes.m, q = sizes.q;
  if (args.status != QpStatus::kSolved) {
    const T nan = static_cast<T>(__builtin_nan(""));
    for (std::size_t j = 0; j < n; ++j) args.d_z[j] = args.d_mu[j] = nan;
    for (std::size_t i = 0; i < m; ++i) args.d_lam[i] = nan;
    for (std::size_t i = 0; i < q; ++i) args.d_nu[i] = nan;
    if (args.share) {
      *args.share = __builtin_nan("");
      *args.weak = 0;
    }
    return;
  }
  Problem P;
  Iteration it;
  lay_out(memory, n, m, q, P, it, sizes.plan);
  Newton& newton = it.newton;
  QpArguments<T> data{};
  data.Q = args.Q;
  data.p = args.z_bar;
  data.G = args.G;
  data.A = args.A;
  read_matrices(data, Purpose::kSolve, P);
  fill(P.c, P.ld, 0.0);
  bool any_box = false;
  for (std::size_t j = 0; j < n; ++j)
    any_box = any_box || args.mu[j] != T{0} || (args.mu_bar && args.mu_bar[j] != T{0}) || args.box_slack[j] <= T{0};
  P.N = any_box ? P.N : P.box;
  for (Side& side : P.side) side.any = false;
  equilibrate(P, it.Kz, it.newton.rows, it.r);
  const double per_cost = 1.0 / P.cost;

  double* const r = it.rows;  // [N] of the constraints that hold z
  std::int32_t weak = 0;
  const auto holds = [&](double multiplier, double slack, double unit) {
    const double force = __builtin_fabs(multiplier) * P.cost / unit, room = slack * unit, near = max(force, room);
    weak += slack > 0.0 && (force + room > (1.0 + kDecided) * near ? near : kUnlikely * near) < kWeak<T>;
    return slack <= 0.0 || force > room;
  };
  const auto hold = [&](std::size_t i, double multiplier, double slack, double unit, double bar) {
    const bool held = holds(multiplier, slack, unit);
    newton.W[i] = held ? 1.0 : 0.0;
    r[i] = held ? -bar * unit * per_cost : 0.0;
  };
  const auto get = [](const T* a, std::size_t i) { return a ? static_cast<double>(a[i]) : 0.0; };
  const auto read_cotangents = [&]() __attribute__((noinline)) {
    weak = 0;
    for (std::size_t i = 0; i < P.N; ++i) {
      if (i < m)
        hold(i, get(args.lam, i), get(args.slack, i), P.E_G[i], get(args.lam_bar, i));
      else if (i >= P.box && i - P.box < n)
        hold(i, get(args.mu, i - P.box), get(args.box_slack, i - P.box), 1.0 / P.D[i - P.box],
             get(args.mu_bar, i - P.box));
      else
        hold(i, 0.0, 1.0, 1.0, 0.0);
    }
    // Where no bound pushes, some may be weakly active all the same.
    for (std::size_t j = 0; !any_box && j < n; ++j) holds(0.0, get(args.box_slack, j), 1.0 / P.D[j]);
    for (std::size_t j = 0; j < n; ++j) it.r[j] = -static_cast<double>(args.z_bar[j]) * P.D[j];
    for (std::size_t j = n; j < P.ld; ++j) it.r[j] = 0.0;
    for (std::size_t j = 0; j < q; ++j) it.r[P.n_blocks + j] = -get(args.nu_bar, j) * P.E_A[j] * per_cost;
  };
  read_cotangents();
  const double size = largest(r, P.N, largest(it.r, P.ld, 0x1p-1000));
  const auto begin = [&](double rho, double delta) __attribute__((noinline)) {
    newton.rho = rho;
    newton.delta = delta;
    for (std::size_t i = 0; i < P.N; ++i) {
      newton.W[i] = newton.W[i] > 0.0 ? 1.0 / delta : 0.0;
      newton.inverse_W[i] = newton.W[i] > 0.0 ? delta : 0.0;
    }
    factor(P, newton);
  };
  // x = 0, and r is left.
  const auto restart = [&]() __attribute__((noinline)) {
    fill(it.x, P.ld, 0.0);
    fill(it.lam, P.N, 0.0);
    copy(it.rhs, it.r, P.ld);
    for (std::size_t i = 0; i < P.N; ++i) it.t[i] = -r[i];
  };
  // A step of the proximal point method; r − K x is left in it.rhs and, with the other sign, in it.t. Its size.
  const auto advance = [&]() __attribute__((noinline)) {
    solve_refined(P, newton, it.rhs, it.t, 1, it.dx, it.d_lam, it.d_rows);
    for (std::size_t j = 0; j < P.size; ++j) it.x[j] += it.dx[j];
    for (std::size_t i = 0; i < P.N; ++i) it.lam[i] += it.d_lam[i];
    fill(it.Kz, P.ld, 0.0);
    add_Kz(P, it.x, it.Kz);
    add_Knu(P, it.x, it.Kz);
    add_columns_times(P, it.lam, it.Kz);
    rows_times(P, it.x, it.d_rows);
    for (std::size_t j = 0; j < P.size; ++j) it.rhs[j] = it.r[j] - it.Kz[j];
    for (std::size_t i = 0; i < P.N; ++i) it.t[i] = newton.W[i] > 0.0 ? it.d_rows[i] - r[i] : 0.0;
    return largest(it.t, P.N, largest(it.rhs, P.size));
  };
  // From 0 it tends to the solution of least norm, however singular the system is; or it runs away.
  begin(kAdjointRho, kAdjointDelta);
  restart();
  double left = size;
  bool runaway = false;
  for (std::size_t step = 1; step <= kProximalSteps && !runaway; ++step) {
    left = advance();
    if (!(left > kAdjointEnough * size)) break;
    runaway = step >= kProximalSurely && left > kRunaway * largest(it.lam, P.N, largest(it.x, P.size));
  }
  if (runaway) {
    begin(kSingularRho, kSingularDelta);
    for (std::size_t part = 0; part < kParted && left > kAdjointEnough * size; ++part) {
      for (std::size_t j = 0; part && j < P.size; ++j) it.r[j] -= it.rhs[j];
      for (std::size_t i = 0; part && i < P.N; ++i) r[i] += it.t[i];
      restart();
      for (std::size_t step = 0; step < kSeparated && left > kAdjointEnough * size; ++step) left = advance();
    }
  }
  if (args.share) {  // r − K x of the whole r, against that
    for (std::size_t j = 0; j < P.size; ++j) it.Kz[j] = it.r[j] - it.rhs[j];
    for (std::size_t i = 0; i < P.N; ++i) it.d_rows[i] = r[i] + it.t[i];
    if (runaway) read_cotangents();
    const double per_size = 1.0 / size;
    double lost = 0.0, whole = 0.0;
    const auto count = [&](double of_r, double of_K) {
      const double part = of_r * per_size, left_of_it = (of_r - of_K) * per_size;
      whole += part * part;
      lost += left_of_it * left_of_it;
    };
    for (std::size_t j = 0; j < P.size; ++j) count(it.r[j], it.Kz[j]);
    for (std::size_t i = 0; i < P.N; ++i) count(r[i], it.d_rows[i]);
    *args.share = __builtin_sqrt(lost / max(whole, 1.0));
    *args.weak = weak;
  }
  for (std::size_t j = 0; j < n; ++j) {
    args.d_z[j] = static_cast<T>(it.x[j] * P.D[j] * P.cost);
    args.d_mu[j] = static_cast<T>(any_box ? it.lam[P.box + j] / P.D[j] : 0.0);
  }
  for (std::size_t i = 0; i < m; ++i) args.d_lam[i] = static_cast<T>(it.lam[i] * P.E_G[i]);
  for (std::size_t i = 0; i < q; ++i) args.d_nu[i] = static_cast<T>(it.x[P.n_blocks + i] * P.E_A[i]);
}

}  // namespace ICNNRT_INSTRUCTION_SET
}  // namespace icnnrt
