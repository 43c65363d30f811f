// The linear system of interior-point steps, of the polish and of the adjoint, condensed to x = [dz; dν].
#pragma once

#include "qp_problem.h"

namespace icnnrt {
namespace ICNNRT_INSTRUCTION_SET {

inline constexpr double kSmallestPivotOfP = 4.0 * kEps;  // of the diagonal: less is rounding; and the ridge
// A row of [G; I] whose weight is less than this part of ρ is left to the refinement.
inline constexpr double kNothing = 1e-3;
inline constexpr double kGamma = 1e2;  // γ
// The least ρ and δ of sparse factors, and how much oftener than dense ones they are refined; once where those are not.
inline constexpr double kSparseRho = 1e-7, kSparseDelta = 1e-8;
inline constexpr std::size_t kSparseRefinements = 2;

// dλ = W([G; I] dz + t), and
//
//     [Q + ρ + [G; I]'W[G; I]   A'] [dz]   [r_z − [G; I]'W t]
//     [A                        −δ] [dν] = [r_ν             ]
//
// as P = Q + ρ + [G; I]'W[G; I] + γA'A, with (1 − γδ) dν for dν: any γ gives the same, one above
// the size of an equilibrated Q keeps P well conditioned where Q has no curvature of its own but A leaves no freedom.
struct Newton {
  Factors factors;
  double* R;          // [m + q, ld] rows of √W G and √γ A
  double* diagonal;   // [2 size]
  double* W;          // [N] as condensed
  double* inverse_W;  // [N] as refined
  double rho, delta, gamma, left;
  double least_of_S;                    // pivot, as that of P
  bool plain = false;                   // factors are those of K, as P has it, for W = 0 and no ρ and δ
  double *e, *e_lam, *rows, *more_lam;  // [ld], [N], [N], [N] scratch of the refinement
};

// The same of sparse matrices, with y = dλ / √W among the unknowns: no row of G, however full, fills the others.
//
//     [Q + ρ + W of the box   A'   G'√W] [dz]   [r_z − the box's W t]
//     [A                     −δ        ] [dν] = [r_ν                ]
//     [√W G                        −1  ] [y ]   [−√W t              ]
//
// Pivots are taken in an order that knows no numbers, so ρ and δ are not let come near rounding; solve_refined sees to
// the difference.
ICNNRT_NO_INLINE void factor_sparse(const Problem& P, Newton& newton) {
  const Sparse& S = P.sparse;
  const QpPlan& plan = *S.plan;
  const double rho = max(newton.rho, kSparseRho), delta = max(newton.delta, kSparseDelta);
  for (std::size_t j = 0; j < P.n; ++j)
    S.diagonal[plan.place[j]] = S.Q_diagonal[j] + rho + (P.N > P.box ? newton.W[P.box + j] : 0.0);
  for (std::size_t i = 0; i < P.q; ++i) S.diagonal[plan.place[P.n + i]] = -delta;
  for (std::size_t i = 0; i < P.m; ++i) {
    S.diagonal[plan.place[P.n + P.q + i]] = -1.0;
    S.root[i] = __builtin_sqrt(newton.W[i]);
  }
  fill(S.L, plan.entries, 0.0);
  for (std::size_t at = 0; at < plan.Q.entries; ++at) S.L[plan.Q.slot[at]] = S.Q[at];
  for (std::size_t at = 0; at < plan.A.entries; ++at) S.L[plan.A.slot[at]] = S.A[at];
  for (std::size_t i = 0; i < P.m; ++i)
    for (std::int32_t at = plan.G.starts[i]; at < plan.G.starts[i + 1]; ++at)
      S.L[plan.G.slot[at]] = S.G[at] * S.root[i];
  newton.gamma = 0.0;
  newton.left = 1.0;
  factor(S, kSmallestPivotOfP);
}

// As `condensed`.
ICNNRT_NO_INLINE void condensed_sparse(const Problem& P, const Newton& newton, double* x, const double* t,
                                       double* d_lam, double* rows) {
  const Sparse& S = P.sparse;
  const std::int32_t *const of_z = S.plan->place, *const of_nu = of_z + P.n, *const of_lam = of_nu + P.q;
  for (std::size_t j = 0; j < P.n; ++j) S.y[of_z[j]] = x[j] - (P.N > P.box ? newton.W[P.box + j] * t[P.box + j] : 0.0);
  for (std::size_t i = 0; i < P.q; ++i) S.y[of_nu[i]] = x[P.n_blocks + i];
  for (std::size_t i = 0; i < P.m; ++i) S.y[of_lam[i]] = -S.root[i] * t[i];
  solve(S, S.y);
  for (std::size_t j = 0; j < P.n; ++j) x[j] = S.y[of_z[j]];
  for (std::size_t i = 0; i < P.q; ++i) x[P.n_blocks + i] = S.y[of_nu[i]];
  rows_times(P, x, rows);
  for (std::size_t i = 0; i < P.m; ++i) d_lam[i] = S.root[i] * S.y[of_lam[i]];
  for (std::size_t i = P.m; i < P.box; ++i) d_lam[i] = 0.0;
  for (std::size_t i = P.box; i < P.N; ++i) d_lam[i] = newton.W[i] * (rows[i] + t[i]);
  fill(S.y, S.plan->N, 0.0);
}

// The factors for newton.W, rho and delta. The least pivot of P against the diagonal that it is of: where that is no
// more than `enough`, there are none.
ICNNRT_NO_INLINE double factor(const Problem& P, Newton& newton, double enough = -__builtin_inf()) {
  if (is_sparse(P)) {
    factor_sparse(P, newton);
    return 1.0;
  }
  const Factors& f = newton.factors;
  newton.plain = false;
  const std::size_t ld = P.ld, n = P.n_blocks;
  double* const whole = newton.diagonal + P.size;
  for (std::size_t j = 0; j < n; ++j) {
    newton.diagonal[j] = j < P.n ? newton.rho : 1.0;
    whole[j] = P.K[j * ld + j];
  }
  for (std::size_t i = P.box; i < P.N; ++i)
    if (i - P.box < P.n) newton.diagonal[i - P.box] += newton.W[i];
  const double nothing = kNothing * newton.rho;
  std::size_t rows = 0;
  for (std::size_t i = 0; i < P.m; ++i) {
    const double w = newton.W[i];
    if (!(w > nothing)) continue;
    const double root = __builtin_sqrt(w);
    const double* const g = P.G + i * ld;
    double* const r = newton.R + rows++ * ld;
    std::size_t j = 0;
    for (; j < n; j += W) {
      const Vec scaled = load(g + j) * root;
      store(r + j, scaled);
      store(whole + j, load(whole + j) + scaled * scaled);
    }
    for (; j < ld; ++j) r[j] = 0.0;
  }
  for (std::size_t j = 0; j < n; ++j) whole[j] += newton.diagonal[j];
  newton.gamma = 0.0;
  if (P.q && !P.curved) {
    newton.gamma = min(kGamma, 0.5 / newton.delta);
    const double root = __builtin_sqrt(newton.gamma);
    for (std::size_t i = 0; i < P.q; ++i) {
      const double* const a = P.K + (n + i) * ld;
      double* const r = newton.R + rows++ * ld;
      std::size_t j = 0;
      for (; j < n; j += W) {
        const Vec scaled = load(a + j) * root;
        store(r + j, scaled);
        store(whole + j, load(whole + j) + scaled * scaled);
      }
      for (; j < ld; ++j) r[j] = 0.0;
    }
  }
  newton.left = 1.0 - newton.gamma * newton.delta;
  for (std::size_t j = 0; j < n; ++j) newton.diagonal[j] += kSmallestPivotOfP * whole[j];
  for (std::size_t j = n; j < P.size; ++j) newton.diagonal[j] = j < n + P.q ? newton.delta / newton.left : 1.0;
  const double least = factor_P(f, P.K, newton.R, rows, newton.diagonal, kSmallestPivotOfP, enough);
  newton.least_of_S = P.q && least > enough ? factor_S(f, P.K, newton.diagonal, kSmallestPivotOfP) : 1.0;
  return least;
}

// x [ld] from [r_z; r_ν] to [dz; dν]; dλ [N] from t; rows = [G; I] dz.
ICNNRT_NO_INLINE void condensed(const Problem& P, const Newton& newton, double* x, const double* t, double* d_lam,
                                double* rows) {
  if (is_sparse(P)) return condensed_sparse(P, newton, x, t, d_lam, rows);
  const std::size_t n = P.n_blocks;
  for (std::size_t i = 0; i < P.N; i += W) store(d_lam + i, -load(newton.W + i) * load(t + i));
  if (newton.gamma > 0.0) {
    // r_z += γ A'r_ν, without losing r_ν
    add_columns_times(P.G, P.ld, P.m, n, d_lam, x);
    double scaled[kBlock];
    for (std::size_t i = n; i < P.size; i += kBlock) {
      for (std::size_t k = 0; k < kBlock; ++k) scaled[k] = newton.gamma * x[i + k];
      add_columns_times(P.K + i * P.ld, P.ld, kBlock, n, scaled, x);
    }
  } else {
    add_columns_times(P.G, P.ld, P.m, n, d_lam, x);
  }
  for (std::size_t i = P.box; i < P.N; ++i) x[i - P.box] += d_lam[i];
  solve(newton.factors, x);
  rows_times(P, x, rows);
  for (std::size_t i = 0; i < P.N; i += W) store(d_lam + i, load(newton.W + i) * (load(rows + i) + load(t + i)));
  const double inverse = 1.0 / newton.left;
  for (std::size_t j = n; j < P.size; ++j) x[j] *= inverse;
}

// The same to the system with inverse_W, which sees dλ as unknown: W reaches 1e18, and W [G; I] dz would cancel.
// r [ld] = [r_z; r_ν] is kept; x, dλ and rows = [G; I] dz are written.
ICNNRT_NO_INLINE void solve_refined(const Problem& P, Newton& newton, const double* r, const double* t,
                                    std::size_t refinements, double* x, double* d_lam, double* rows) {
  copy(x, r, P.ld);
  condensed(P, newton, x, t, d_lam, rows);
  double* const e = newton.e;
  if (is_sparse(P)) refinements += refinements ? kSparseRefinements : 1;
  for (std::size_t pass = 0; pass < refinements; ++pass) {
    fill(e, P.ld, 0.0);
    add_Kz(P, x, e);
    add_Knu(P, x, e);
    add_columns_times(P, d_lam, e);
    for (std::size_t j = 0; j < P.n_blocks; ++j) e[j] = r[j] - e[j] - newton.rho * x[j];
    for (std::size_t j = P.n_blocks; j < P.size; ++j) e[j] = r[j] - e[j] + newton.delta * x[j];
    for (std::size_t i = 0; i < P.N; i += W)  // where W = 0, what is left here is not used
      store(newton.e_lam + i, load(rows + i) + load(t + i) - load(newton.inverse_W + i) * load(d_lam + i));
    condensed(P, newton, e, newton.e_lam, newton.more_lam, newton.rows);
    for (std::size_t j = 0; j < P.size; ++j) x[j] += e[j];
    for (std::size_t i = 0; i < P.N; i += W) {
      store(d_lam + i, load(d_lam + i) + load(newton.more_lam + i));
      store(rows + i, load(rows + i) + load(newton.rows + i));
    }
  }
}

}  // namespace ICNNRT_INSTRUCTION_SET
}  // namespace icnnrt
