// A quadratic program in the workspace: in double, padded to whole blocks, equilibrated.
#pragma once

#include "layout.h"
#include "qp.h"
#include "qp_factor.h"
#include "qp_sparse.h"

namespace icnnrt {
namespace ICNNRT_INSTRUCTION_SET {

inline constexpr double kBoundMax = 1e20;  // bounds from there on are none
inline constexpr double kInf = __builtin_inf();

ICNNRT_INLINE bool is_bound(double a) { return __builtin_fabs(a) < kBoundMax; }

// Upper or lower bounds of [G; I] z.
struct Side {
  double sign;                // 1 of upper bounds, -1 of lower ones
  bool any;                   // else nothing below is read
  double* bound;              // [N], 0 where there is none
  double* has;                // [N], 1 or 0
  double* lam;                // [N] >= 0; 0 where there is no bound
  double* s;                  // [N] > 0; 1 where there is no bound
  double* d_lam;              // [N] of a step
  double* d_s;                // [N]
  double* excess;             // [N] r + s - bound, that is how far s is not the slack
  double* w;                  // [N] λ / s
  double* e;                  // [N] c / s
  double *best_lam, *best_s;  // [N]
};

// Constraints whose bounds are the same: λ has either sign, and there are no sides, so `has` is 0 there. The bound is
// that of the upper side.
struct Equalities {
  bool any;
  unsigned char* has;      // [N], 1 or 0
  double *lam, *best_lam;  // [N], 0 where there is none
};

// With x = [z; ν], both padded to blocks, and a row of [G; I] for each of N constraints:
//     K = [Q A'; A 0],   c = [p; -b],   K x + c + [G'λ + μ; 0] = 0
// The rows of the box come after those of G, if there is a box.
struct Problem {
  std::size_t n, m, q;
  std::size_t n_blocks, size, ld;  // n padded; n and q padded; of K, G and vectors x
  std::size_t box, N;              // where the box starts: m padded; and where it ends
  double* K;                       // [size, ld]
  double* G;                       // [m, ld]
  double* c;                       // [ld]
  Side side[2];
  Equalities equal;
  double *D, *E_G, *E_A;  // z = D ẑ, λ = E_G λ̂ / cost, ν = E_A ν̂ / cost, μ = μ̂ / D / cost: powers of 2
  double cost;
  bool scaled;    // else all of these are 1
  bool curved;    // Q is definite enough by itself: no γA'A need be added
  Sparse sparse;  // holds Q, A and G where it has a plan; then K and G above are not there
};

ICNNRT_INLINE bool is_sparse(const Problem& P) { return P.sparse.plan != nullptr; }

// Q_jj
ICNNRT_INLINE double& curvature(const Problem& P, std::size_t j) {
  return is_sparse(P) ? P.sparse.Q_diagonal[j] : P.K[j * P.ld + j];
}

// out [N] = [G; I] z
static void rows_times(const Problem& P, const double* x, double* out) {
  if (is_sparse(P)) {
    rows_times(P.sparse.plan->G, P.m, P.sparse.G, x, out);
  } else {
    rows_times(P.G, P.ld, P.m, P.n_blocks, x, out);
  }
  for (std::size_t i = P.m; i < P.box; ++i) out[i] = 0.0;
  for (std::size_t i = P.box; i < P.N; ++i) out[i] = i - P.box < P.n ? x[i - P.box] : 0.0;
}

// out [ld] += G'λ
static void add_rows_of_G(const Problem& P, const double* lam, double* out) {
  if (is_sparse(P)) return add_columns_times(P.sparse.plan->G, P.m, P.sparse.G, lam, out);
  add_columns_times(P.G, P.ld, P.m, P.n_blocks, lam, out);
}

// out [ld] += [G; I]' λ
static void add_columns_times(const Problem& P, const double* lam, double* out) {
  add_rows_of_G(P, lam, out);
  for (std::size_t i = P.box; i < P.N; ++i) out[i - P.box] += lam[i];  // padding has λ = 0
}

// out [ld] += K [z; 0], or += K [0; ν]
static void add_Kz(const Problem& P, const double* x, double* out) {
  if (!is_sparse(P)) return add_columns_times(P.K, P.ld, P.n_blocks, P.size, x, out);
  add_Q_times(P.sparse, x, out);
  add_rows_times(P.sparse.plan->A, P.q, P.sparse.A, x, out + P.n_blocks);
}
static void add_Knu(const Problem& P, const double* x, double* out) {
  if (is_sparse(P)) return add_columns_times(P.sparse.plan->A, P.q, P.sparse.A, x + P.n_blocks, out);
  add_columns_times(P.K + P.n_blocks * P.ld, P.ld, P.size - P.n_blocks, P.n_blocks, x + P.n_blocks, out);
}

ICNNRT_INLINE void fill(double* a, std::size_t count, double value) {
  for (std::size_t i = 0; i < count; ++i) a[i] = value;
}
ICNNRT_INLINE void copy(double* to, const double* from, std::size_t count) {
  __builtin_memcpy(to, from, count * sizeof(double));
}
// The larger of two sizes; NaN is larger than all.
ICNNRT_INLINE double larger(double a, double b) { return a < b || b != b ? b : a; }
ICNNRT_INLINE Vec larger(Vec a, Vec b) { return ((a < b) | (b != b)) ? b : a; }
ICNNRT_INLINE double largest(Vec a) {
  double most = a[0];
  for (std::size_t l = 1; l < W; ++l) most = larger(most, a[l]);
  return most;
}
ICNNRT_INLINE double largest(const double* a, std::size_t count, double so_far = 0.0) {
  for (std::size_t i = 0; i < count; ++i) so_far = larger(so_far, __builtin_fabs(a[i]));
  return so_far;
}

// The largest entry of a row.
ICNNRT_INLINE double largest_of_row(const QpPatternRows& rows, const double* values, std::size_t i) {
  return largest(values + rows.starts[i], static_cast<std::size_t>(rows.starts[i + 1] - rows.starts[i]));
}
static double largest_of_G(const Problem& P, std::size_t i) {
  return is_sparse(P) ? largest_of_row(P.sparse.plan->G, P.sparse.G, i) : largest(P.G + i * P.ld, P.n);
}
static double largest_of_A(const Problem& P, std::size_t i) {
  return is_sparse(P) ? largest_of_row(P.sparse.plan->A, P.sparse.A, i) : largest(P.K + (P.n_blocks + i) * P.ld, P.n);
}

// out [n] += |G|'|λ| + |A|'|ν|, with x = [z; ν]
ICNNRT_NO_INLINE void add_magnitudes(const Problem& P, const double* lam, const double* x, double* out) {
  const double* const nu = x + P.n_blocks;
  if (is_sparse(P)) {
    const auto add_of = [&](const double* by) {
      return [=](std::size_t i, std::size_t j, double a) { out[j] += __builtin_fabs(a * by[i]); };
    };
    each_entry(P.sparse.plan->G, P.m, P.sparse.G, add_of(lam));
    each_entry(P.sparse.plan->A, P.q, P.sparse.A, add_of(nu));
    return;
  }
  for (std::size_t i = 0; i < P.m; ++i)
    for (std::size_t j = 0; j < P.n; ++j) out[j] += __builtin_fabs(P.G[i * P.ld + j] * lam[i]);
  for (std::size_t i = 0; i < P.q; ++i)
    for (std::size_t j = 0; j < P.n; ++j) out[j] += __builtin_fabs(P.K[(P.n_blocks + i) * P.ld + j] * nu[i]);
}

// The power of 2 next to a positive number, by its logarithm: from √2 on the next one.
ICNNRT_INLINE double power_near(double wanted) {
  std::uint64_t bits;
  __builtin_memcpy(&bits, &wanted, sizeof bits);
  bits = (bits + 0x00095f619980c433ULL) & 0x7ff0000000000000ULL;
  double power;
  __builtin_memcpy(&power, &bits, sizeof power);
  return power;
}
ICNNRT_INLINE double root(double size) {  // next to 1 / √size
  return size > 0.0 ? power_near(1.0 / __builtin_sqrt(clip(size, 1e-12, 1e12))) : 1.0;
}

inline constexpr std::size_t kEquilibrations = 10;
// p counts this much less than Q in the size of the objective: z is what its curvature makes of it.
inline constexpr double kLeverOfP = 16.0;
inline constexpr double kLevel = 4.0;  // rows and columns within this factor of 1 are left alone
inline constexpr double kFar = 64.0;   // and so are variables whose size seems to be within this one
inline constexpr double kApart = 4.0;  // what units of rows are multiplied with, or divided by, in a last attempt
inline constexpr double kLoose = 1e5;  // times the size of z: bounds from there on are left out of steps

// What brings a number to about 1, if it is not within kLevel of it.
ICNNRT_INLINE double unit(double size) {
  return size > 0.0 && size < kInf && (size > kLevel || size < 1.0 / kLevel) ? power_near(1.0 / size) : 1.0;
}

// P.cost, and what brings the larger of Q and p in units of it to about 1; no entry of a semidefinite Q exceeds the
// largest of its diagonal.
ICNNRT_INLINE double cost_scale(const Problem& P) {
  double size = 0.0;
  for (std::size_t j = 0; j < P.n; ++j)
    size = max(size, max(curvature(P, j) * P.D[j], __builtin_fabs(P.c[j]) / kLeverOfP) * P.D[j]);
  return P.cost * unit(P.cost * size);
}

// A power of 2 near the size of z; 1 if it is near that, or not known.
ICNNRT_INLINE double near_size(double size) {
  if (size == 0.0 || !(size < kInf) || (size >= 1.0 / kFar && size <= kFar)) return 1.0;
  return power_near(clip(size, 0x1p-60, 0x1p60));
}

// The size of z: what b and bounds away from 0 demand, else what curvature and bounds allow, without those, unless
// `all_bounds`, that are far beyond the least.
ICNNRT_NO_INLINE double size_of_z(const Problem& P, bool all_bounds) {
  double average = 0.0, held = 0.0, least = kInf;
  for (std::size_t i = 0; i < P.n; ++i) average += curvature(P, i);
  average /= static_cast<double>(P.n);
  double away = largest(P.c + P.n_blocks, P.q);
  for (const Side& side : P.side) {
    if (!side.any) continue;
    for (std::size_t i = 0; i < P.N; ++i) {
      const double u = side.sign * side.bound[i];
      away = max(away, -u);
      if (u > 0.0) least = min(least, u);
    }
  }
  const double most = all_bounds ? kInf : kLoose * max(least, max(away, 1.0));
  for (const Side& side : P.side)
    for (std::size_t i = 0; side.any && i < P.N; ++i)
      if (!(side.sign * side.bound[i] > most)) held = max(held, __builtin_fabs(side.bound[i]));
  const double pull = largest(P.c, P.n), t = average > 0.0 ? pull / average : pull > 0.0 ? kInf : 0.0;
  return near_size(max(away, min(t, held > 0.0 ? held : kInf)));
}

// column [ld] = the largest entries of [Q G' A'; A 0 0], scaled on their left; row [m] those of G, scaled on both
// sides.
ICNNRT_NO_INLINE void largest_entries(const Problem& P, const double* cost_of_column, double* column, double* row) {
  if (is_sparse(P)) {
    fill(row, P.m, 0.0);
    return largest_entries(P.sparse, P.n_blocks, P.D, P.E_G, P.cost, column, row);
  }
  // K is symmetric: the largest entry of a column counts that of A' too.
  for (std::size_t i = 0; i < P.size; i += kBlock) {
    const double* const K = P.K + i * P.ld;
    const bool of_Q = i < P.n_blocks;
    for (std::size_t j = 0; j < P.size; j += W) {
      Vec most = load(column + j);
      const Vec cost = of_Q ? load(cost_of_column + j) : broadcast(1.0);
      for (std::size_t t = 0; t < kBlock; ++t) {
        const Vec size = abs(load(K + t * P.ld + j)) * P.D[i + t] * cost;
        most = most < size ? size : most;
      }
      store(column + j, most);
    }
  }
  for (std::size_t i = 0; i < P.m; ++i) {
    const Vec e = broadcast(P.E_G[i]);
    Vec most_of_row{};
    for (std::size_t j = 0; j < P.n_blocks; j += W) {
      const Vec size = abs(load(P.G + i * P.ld + j)) * e, so_far = load(column + j);
      store(column + j, so_far < size ? size : so_far);
      const Vec here = size * load(P.D + j);
      most_of_row = most_of_row < here ? here : most_of_row;
    }
    row[i] = largest(most_of_row);
  }
}

// All matrices by the scales on both sides.
ICNNRT_NO_INLINE void scale_matrices(const Problem& P, const double* cost_of_column) {
  if (is_sparse(P)) return scale(P.sparse, P.n_blocks, P.D, P.E_G, P.cost);
  for (std::size_t i = 0; i < P.size; ++i)
    for (std::size_t j = 0; j < P.size; j += W) {
      const Vec cost = i < P.n_blocks ? load(cost_of_column + j) : broadcast(1.0);
      store(P.K + i * P.ld + j, load(P.K + i * P.ld + j) * load(P.D + j) * P.D[i] * cost);
    }
  for (std::size_t i = 0; i < P.m; ++i)
    for (std::size_t j = 0; j < P.n_blocks; j += W)
      store(P.G + i * P.ld + j, load(P.G + i * P.ld + j) * load(P.D + j) * P.E_G[i]);
}

static void scale_Q(const Problem& P, double by) {
  if (is_sparse(P)) {
    for (std::size_t j = 0; j < P.n; ++j) P.sparse.Q_diagonal[j] *= by;
    for (std::size_t at = 0; at < P.sparse.plan->Q.entries; ++at) P.sparse.Q[at] *= by;
    return;
  }
  for (std::size_t i = 0; i < P.n; ++i)
    for (std::size_t j = 0; j < P.n; ++j) P.K[i * P.ld + j] *= by;
}

// The scales of rows of G and A by their largest entries, those of A in `column`; whether one is not 1.
ICNNRT_INLINE bool rows_to_units(Problem& P, const double* column, const double* row) {
  double off = 0.0;
  const auto to_unit = [&](double& scale, double size) { off = max(off, __builtin_fabs((scale = unit(size)) - 1.0)); };
  for (std::size_t i = 0; i < P.m; ++i) to_unit(P.E_G[i], row[i]);
  for (std::size_t i = P.n_blocks; i < P.n_blocks + P.q; ++i) to_unit(P.D[i], column[i]);
  return off > 0.0;
}

// Whether a side is a bound that is far beyond the size of z, be it left out or not.
ICNNRT_INLINE bool is_loose(const Problem& P, const Side& side, std::size_t i) {
  return side.sign * side.bound[i] > kLoose && !(P.equal.any && P.equal.has[i]);
}

// z in units of tau more than it was, a power of 2, and the objective next to 1.
ICNNRT_NO_INLINE void resize(Problem& P, double tau) {
  const double per_tau = 1.0 / tau;
  if (tau == 1.0) return;
  P.scaled = true;
  double size = 0.0;
  for (std::size_t j = 0; j < P.n; ++j)
    size = max(size, max(curvature(P, j) * tau, __builtin_fabs(P.c[j]) / kLeverOfP) * tau);
  const double cost = unit(size);
  P.cost *= cost;
  scale_Q(P, tau * tau * cost);
  for (std::size_t j = 0; j < P.size; ++j) {
    P.c[j] *= j < P.n_blocks ? tau * cost : per_tau;
    P.D[j] *= j < P.n_blocks ? tau : per_tau;
  }
  for (std::size_t i = 0; i < P.m; ++i) P.E_G[i] *= per_tau;
  for (Side& side : P.side)
    for (std::size_t i = 0; side.any && i < P.N; ++i) side.bound[i] *= per_tau;
}

// Rows of G and A brought to size 1, so that their units leave no trace in those of z; then rows and columns of
// [Q G' A'; G 0 0; A 0 0] near it (Ruiz), and the objective before every sweep: so columns are scaled by constraints
// rather than by penalties. Then z is, since every measure of the method has a floor of 1.
// With `apart`, the first half of the rows of G is in other units than the second: rounding takes another way then.
ICNNRT_NO_INLINE void equilibrate(Problem& P, double* column, double* row, double* cost_of_column, bool apart = false) {
  fill(P.D, P.ld, 1.0);  // D and E_A are one array of `ld`, as x is
  fill(P.E_G, P.box, 1.0);
  fill(cost_of_column, P.ld, 1.0);
  P.cost = 1.0;
  P.cost = cost_scale(P);
  P.scaled = P.cost != 1.0;
  for (std::size_t pass = 0; pass < kEquilibrations; ++pass) {
    double least = kInf, most = 0.0;
    const auto take = [&](double size) {
      if (size > 0.0) {
        least = min(least, size);
        most = max(most, size);
      }
    };
    fill(column, P.ld, 0.0);
    fill(cost_of_column, P.n, P.cost);
    largest_entries(P, cost_of_column, column, row);
    if (pass == 0 && rows_to_units(P, column, row)) {
      P.scaled = true;
      fill(column, P.ld, 0.0);
      largest_entries(P, cost_of_column, column, row);
    }
    for (std::size_t i = 0; i < P.m; ++i) take(row[i]);
    for (std::size_t j = 0; j < P.size; ++j) take(column[j] *= P.D[j]);
    if (!(most > kLevel) && !(least < 1.0 / kLevel)) break;
    P.scaled = true;
    for (std::size_t j = 0; j < P.size; ++j) P.D[j] *= root(column[j]);
    for (std::size_t i = 0; i < P.m; ++i) P.E_G[i] *= root(row[i]);
    P.cost = cost_scale(P);
  }
  P.E_A = P.D + P.n_blocks;
  for (std::size_t i = 0; apart && i < P.m; ++i) P.E_G[i] *= 2 * i < P.m ? kApart : 1.0 / kApart;
  P.scaled |= apart;
  if (P.scaled) {
    fill(cost_of_column, P.n, P.cost);
    scale_matrices(P, cost_of_column);
    for (std::size_t j = 0; j < P.size; ++j) P.c[j] *= P.D[j] * cost_of_column[j];
    for (Side& side : P.side) {
      if (!side.any) continue;
      for (std::size_t i = 0; i < P.m; ++i) side.bound[i] *= P.E_G[i];
      for (std::size_t i = P.box; i < P.N; ++i) side.bound[i] /= P.D[i - P.box];
    }
  }
  resize(P, size_of_z(P, false));
}

enum class Purpose { kSolve, kFeasibility, kRay };

// Reads a problem from the operator's inputs. For kFeasibility Q and p are 0; for kRay it is
//     min over d of ½ d'd + p'd / max |p|   s.t.  Ad = 0, Qd = 0, Gd and d in the recession cones of their bounds
// This reads all but the bounds. False if anything is NaN or infinite.
template <typename T>
ICNNRT_NO_INLINE bool read_matrices(const QpArguments<T>& args, Purpose purpose, Problem& P) {
  const std::size_t n = P.n, m = P.m, ld = P.ld;
  const std::size_t q_of_A = purpose == Purpose::kRay ? P.q - n : P.q;
  double odd = 0.0;  // NaN if an entry is NaN or infinite
  const auto get = [](const T* a, std::size_t i) { return static_cast<double>(a[i]); };
  fill(P.c, ld, 0.0);
  double p_size = 0.0;
  for (std::size_t j = 0; j < n; ++j) {
    const double p = get(args.p, j);
    odd += p * 0.0;
    p_size = max(p_size, __builtin_fabs(p));
    if (purpose != Purpose::kFeasibility) P.c[j] = p;
  }
  if (purpose == Purpose::kRay)
    for (std::size_t j = 0; j < n; ++j) P.c[j] /= max(p_size, 0x1p-1022);
  if (is_sparse(P)) {
    odd += read_entries(P.sparse, purpose == Purpose::kFeasibility ? nullptr : args.Q, args.G, args.A);
    for (std::size_t i = 0; args.b && i < P.q; ++i) odd += (P.c[P.n_blocks + i] = -get(args.b, i)) * 0.0;
    return odd == 0.0;
  }
  // Q, symmetrised, in square blocks so that both halves are read along rows
  double* const Q = purpose == Purpose::kRay ? P.K + (P.n_blocks + q_of_A) * ld : P.K;
  const auto clear = [&](std::size_t i, std::size_t from) { fill(P.K + i * ld + from, ld - from, 0.0); };
  if (purpose != Purpose::kSolve) {
    for (std::size_t i = 0; i < P.size; ++i) clear(i, 0);
  } else {
    for (std::size_t i = 0; i < n; ++i) clear(i, n);
    for (std::size_t i = n; i < P.size; ++i) clear(i, 0);
  }
  if (purpose != Purpose::kFeasibility) {
    constexpr std::size_t kTileSize = 8;
    Vec odd_lanes{};
    for (std::size_t i0 = 0; i0 < n; i0 += kTileSize)
      for (std::size_t j0 = 0; j0 <= i0; j0 += kTileSize) {
        const std::size_t rows = n - i0 < kTileSize ? n - i0 : kTileSize,
                          columns = n - j0 < kTileSize ? n - j0 : kTileSize;
        double turned[kTileSize][kTileSize];
        for (std::size_t j = 0; j < columns; ++j)
          for (std::size_t i = 0; i < rows; ++i) turned[i][j] = get(args.Q, (j0 + j) * n + i0 + i);
        for (std::size_t i = 0; i < rows; ++i) {
          double* const out = Q + (i0 + i) * ld + j0;
          const T* const in = args.Q + (i0 + i) * n + j0;
          if (columns == kTileSize) {
            for (std::size_t j = 0; j < kTileSize; j += W) {
              const Vec value = (load(in + j) + load(turned[i] + j)) * 0.5;
              odd_lanes += value * 0.0;
              store(out + j, value);
            }
          } else {
            for (std::size_t j = 0; j < columns; ++j) {
              out[j] = (static_cast<double>(in[j]) + turned[i][j]) * 0.5;
              odd += out[j] * 0.0;
            }
          }
        }
        if (i0 == j0) continue;
        for (std::size_t j = 0; j < columns; ++j)
          for (std::size_t i = 0; i < rows; ++i) Q[(j0 + j) * ld + i0 + i] = Q[(i0 + i) * ld + j0 + j];
      }
    odd += sum(odd_lanes);
  }
  if (purpose == Purpose::kRay) {
    for (std::size_t i = 0; i < n; ++i) {
      for (std::size_t j = 0; j < n; ++j) P.K[j * ld + P.n_blocks + q_of_A + i] = Q[i * ld + j];
      P.K[i * ld + i] = 1.0;
    }
  }
  for (std::size_t i = 0; i < q_of_A; ++i) {
    for (std::size_t j = 0; j < n; ++j) {
      const double a = get(args.A, i * n + j);
      odd += a * 0.0;
      P.K[(P.n_blocks + i) * ld + j] = P.K[j * ld + P.n_blocks + i] = a;
    }
    if (!args.b) continue;
    const double b = get(args.b, i);
    odd += b * 0.0;
    if (purpose != Purpose::kRay) P.c[P.n_blocks + i] = -b;
  }
  Vec odd_lanes{};
  for (std::size_t i = 0; i < m; ++i) {
    const T* const in = args.G + i * n;
    double* const out = P.G + i * ld;
    std::size_t j = 0;
    for (; j + W <= n; j += W) {
      const Vec value = load(in + j);
      odd_lanes += value * 0.0;
      store(out + j, value);
    }
    for (; j < n; ++j) odd += (out[j] = static_cast<double>(in[j])) * 0.0;
    fill(out + n, ld - n, 0.0);
  }
  return odd + sum(odd_lanes) == 0.0;
}

// False if anything is NaN, or infinite and no absent bound; `crossed` if a lower bound exceeds its upper one.
template <typename T>
ICNNRT_NO_INLINE bool read_problem(const QpArguments<T>& args, Purpose purpose, Problem& P, bool& crossed) {
  bool sound = read_matrices(args, purpose, P);
  const std::size_t n = P.n, m = P.m;
  const auto get = [](const T* a, std::size_t i) { return static_cast<double>(a[i]); };
  crossed = false;
  bool any_box = false;
  const T* const boxes[] = {args.lower, args.upper};
  for (const T* const bounds : boxes)
    for (std::size_t j = 0; bounds && j < n; ++j) any_box = any_box || !(__builtin_fabs(get(bounds, j)) >= kBoundMax);
  P.N = any_box ? P.box + (n + 7) / 8 * 8 : P.box;
  const auto read_bounds = [&](const T* bounds, std::size_t from, std::size_t count, std::size_t to, Side& side) {
    for (std::size_t i = from; i < to; ++i) side.bound[i] = side.has[i] = 0.0;
    for (std::size_t i = 0; bounds && i < count; ++i) {
      const double a = get(bounds, i);
      sound = sound && a == a && !(-side.sign * a >= kBoundMax);
      if (from + i >= to || !is_bound(a)) continue;
      side.bound[from + i] = purpose == Purpose::kRay ? 0.0 : a;
      side.has[from + i] = 1.0;
      side.any = true;
    }
  };
  P.side[0].sign = 1.0;
  P.side[1].sign = -1.0;
  P.side[0].any = P.side[1].any = false;
  read_bounds(args.h, 0, m, P.box, P.side[0]);
  read_bounds(args.h_lower, 0, m, P.box, P.side[1]);
  read_bounds(args.upper, P.box, n, P.N, P.side[0]);
  read_bounds(args.lower, P.box, n, P.N, P.side[1]);
  Equalities& equal = P.equal;
  equal.any = false;
  for (std::size_t i = 0; i < P.N; ++i) {
    equal.has[i] = 0;
    equal.lam[i] = 0.0;
    Side &upper = P.side[0], &lower = P.side[1];
    if (!upper.any || !lower.any || upper.has[i] * lower.has[i] == 0.0) continue;
    crossed = crossed || lower.bound[i] > upper.bound[i];
    if (lower.bound[i] != upper.bound[i]) continue;
    equal.any = true;
    equal.has[i] = 1;
    upper.has[i] = lower.has[i] = 0.0;
  }
  return sound;
}

}  // namespace ICNNRT_INSTRUCTION_SET
}  // namespace icnnrt
