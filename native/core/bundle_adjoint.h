// The KKT solve of Proposition 3 (Amos, Xu, Kolter, 2017): from a cotangent of y to c_y and c_λ.
#pragma once

#include "rows.h"

namespace icnnrt {
namespace ICNNRT_INSTRUCTION_SET {

// The constants of icnnrt/mathematics/kkt_adjoint.py.
inline constexpr double kTraceRidge = 1e-13;
inline constexpr double kSmallestRidge = 1e-30;  // next to 0 where a domain has no unit

// x = Ã^-1 b with one refinement; A holds Ã's factors, H Ã itself, `residual` is scratch.
ICNNRT_INLINE void solve_refined(Workspace& ws, std::size_t m, const double* b, double* x, double* residual) {
  for (std::size_t a = 0; a < ws.ld; ++a) x[a] = a < m ? b[a] : 0.0;
  solve(ws.A, m, ws.ld, ws.inverse, x);
  for (std::size_t a = 0; a < ws.ld; ++a) {
    residual[a] = a < m ? b[a] : 0.0;
    for (std::size_t c = 0; a < m && c < m; ++c) residual[a] -= ws.H[a * ws.ld + c] * x[c];
  }
  solve(ws.A, m, ws.ld, ws.inverse, residual);
  for (std::size_t a = 0; a < m; ++a) x[a] += residual[a];
}

//   q = √λ,  w = max v - v,  r = -G D ȳ
//   Ã = diag(q) G D G' diag(q) + diag(w + δ),   δ = 1e-13 tr(diag(q) G D G' diag(q)) + 1e-30
//   X0 = Ã^-1 (q∘r),  X1 = Ã^-1 q,   c_λ = q∘(X0 - X1 (q'X0)/(q'X1)),   c_y = -D(ȳ + G'c_λ)
//
// Rows with λ = 0 have c_λ = 0 and no part in the others': they are left out.
// ws.u holds ȳ; c_λ is left in ws.direction and c_y in ws.u. False if anything given is NaN or infinite, or λ is
// negative or nothing but zeros.
template <typename Domain, typename U>
static bool solve_adjoint(const Model<Domain, U>& cuts, Workspace& ws) {
  const std::size_t k = cuts.k;
  const Columns& columns = cuts.columns;
  evaluate<typename Domain::Size>(cuts, ws.lam, ws.rows, ws.point, ws.sizes);
  double size = 0.0, total = 0.0;
  for (std::size_t i = 0; i < k; ++i) {
    size += __builtin_fabs(ws.e[i]) + ws.sizes[i] + __builtin_sqrt(ws.lam[i]);  // √ of a negative λ is NaN
    total += ws.lam[i];
  }
  Vec ybar_size{};
  for (std::size_t b = 0; b < columns.blocks; ++b) ybar_size += abs(load(ws.u + b * W));
  if (!(size + sum(ybar_size) <= 0x1p1000) || !(total > 0.0)) return false;
  const std::size_t m = support(ws.lam, k, ws.rows);
  for (std::size_t i = 0; i < k; ++i) ws.direction[i] = 0.0;
  if (m > 1) {  // a single cut's multiplier is 1 whatever happens
    Domain::minus_D_times(columns, ws.point.D, ws.u, ws.u_coefficient);
    for (std::size_t i = 0; i < k; ++i) ws.e[i] = 0.0;  // r = 0 - G D ȳ
    times(cuts, ws.u_coefficient, ws.r);
    Domain::gram(cuts, ws.rows, m, ws.point.D, ws.centres, ws.H, ws.ld);

    constexpr double ridge = kSmallestRidge * Domain::kUnit + 0x1p-1000;
    double* const q = ws.w;
    double trace = 0.0;
    for (std::size_t a = 0; a < m; ++a) {
      q[a] = __builtin_sqrt(ws.lam[ws.rows[a]]);
      trace += q[a] * q[a] * ws.H[a * ws.ld + a];
    }
    for (std::size_t a = 0; a < m; ++a) {
      for (std::size_t b = 0; b < ws.ld; ++b) ws.A[a * ws.ld + b] = b < m ? ws.H[a * ws.ld + b] *= q[a] * q[b] : 0.0;
      const double slack = ws.point.top - ws.point.v[ws.rows[a]];
      ws.A[a * ws.ld + a] = ws.H[a * ws.ld + a] += slack + (kTraceRidge * trace + ridge);
      ws.z[a] = q[a] * ws.r[ws.rows[a]];
    }
    factor(ws.A, m, ws.ld, ws.inverse);
    double *const X0 = ws.step, *const X1 = ws.ones;
    solve_refined(ws, m, ws.z, X0, ws.eta);
    solve_refined(ws, m, q, X1, ws.eta);
    double qX0 = 0.0, qX1 = 0.0;
    for (std::size_t a = 0; a < m; ++a) {
      qX0 += q[a] * X0[a];
      qX1 += q[a] * X1[a];
    }
    for (std::size_t a = 0; a < m; ++a) ws.direction[ws.rows[a]] = q[a] * (X0[a] - X1[a] * (qX0 / qX1));
  }
  for (std::size_t b = 0; b < columns.blocks; ++b)
    store(ws.u + b * W, load(ws.u + b * W) + transposed_times(cuts, ws.rows, m, ws.direction, b));
  Domain::minus_D_times(columns, ws.point.D, ws.u, ws.u);
  return true;
}

template <typename Domain, typename T>
static void bundle_adjoint(const Sizes& sizes, const AdjointArguments<T>& args, void* memory) noexcept {
  const std::size_t k = sizes.k, n = sizes.n;
  Workspace ws = lay_out(memory, k, n);
  for (std::size_t i = 0; i < k; ++i) {
    ws.e[i] = static_cast<double>(args.offsets[i]);
    ws.lam[i] = static_cast<double>(args.lam[i]);
  }
  read_columns(n, args.y_bar, ws.u);
  const bool sound = n < W ? solve_adjoint(Model<Domain, double>{short_cuts(sizes, args.slopes, ws)}, ws)
                           : solve_adjoint(Model<Domain, T>{{args.slopes, n, ws.e, k, columns(n)}}, ws);
  if (!sound) {
    for (std::size_t b = 0; b < columns_of(n).blocks; ++b) store(ws.u + b * W, broadcast(__builtin_nan("")));
  }
  for (std::size_t i = 0; i < k; ++i) args.c_lam[i] = static_cast<T>(sound ? ws.direction[i] : __builtin_nan(""));
  write_columns(n, ws.u, args.c_y);
}

}  // namespace ICNNRT_INSTRUCTION_SET
}  // namespace icnnrt
