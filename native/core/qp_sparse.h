// Sparse matrices of a quadratic program, laid out by a plan: products with them, and LDL' of the system they make.
#pragma once

#include "qp.h"
#include "qp_factor.h"

namespace icnnrt {
namespace ICNNRT_INSTRUCTION_SET {

struct Sparse {
  const QpPlan* plan;                  // null: the matrices are dense, and nothing else here is there
  double *Q, *Q_diagonal, *G, *A;      // [|Q|] below the diagonal, [n], [|G|], [|A|]
  double* L;                           // [|L|] below the diagonal
  double *diagonal, *pivot, *inverse;  // [N] in the order of elimination: of the matrix, D, and D^-1
  double* root;                        // [m] √W
  double* y;                           // [N], 0 between uses
  std::int32_t *next, *head, *link;    // [N] of the factorisation
};

// f(row, column, value) for every entry of a matrix of these rows.
template <typename F>
ICNNRT_INLINE void each_entry(const QpPatternRows& pattern, std::size_t rows, double* values, const F& f) {
  for (std::size_t i = 0; i < rows; ++i)
    for (std::int32_t at = pattern.starts[i]; at < pattern.starts[i + 1]; ++at)
      f(i, static_cast<std::size_t>(pattern.columns[at]), values[at]);
}

// out [rows] = M x
ICNNRT_NO_INLINE void rows_times(const QpPatternRows& pattern, std::size_t rows, const double* values, const double* x,
                                 double* out) {
  for (std::size_t i = 0; i < rows; ++i) {
    double total = 0.0;
    for (std::int32_t at = pattern.starts[i]; at < pattern.starts[i + 1]; ++at)
      total += values[at] * x[pattern.columns[at]];
    out[i] = total;
  }
}

// out [rows] += M x
ICNNRT_NO_INLINE void add_rows_times(const QpPatternRows& pattern, std::size_t rows, const double* values,
                                     const double* x, double* out) {
  for (std::size_t i = 0; i < rows; ++i)
    for (std::int32_t at = pattern.starts[i]; at < pattern.starts[i + 1]; ++at)
      out[i] += values[at] * x[pattern.columns[at]];
}

// out [columns] += M'a
ICNNRT_NO_INLINE void add_columns_times(const QpPatternRows& pattern, std::size_t rows, const double* values,
                                        const double* a, double* out) {
  for (std::size_t i = 0; i < rows; ++i) {
    const double by = a[i];
    if (by == 0.0) continue;
    for (std::int32_t at = pattern.starts[i]; at < pattern.starts[i + 1]; ++at)
      out[pattern.columns[at]] += values[at] * by;
  }
}

// out [n] += Q z
ICNNRT_NO_INLINE void add_Q_times(const Sparse& S, const double* z, double* out) {
  const QpPatternRows& Q = S.plan->Q;
  for (std::size_t i = 0; i < S.plan->n; ++i) {
    double total = S.Q_diagonal[i] * z[i];
    for (std::int32_t at = Q.starts[i]; at < Q.starts[i + 1]; ++at) {
      const std::int32_t j = Q.columns[at];
      total += S.Q[at] * z[j];
      out[j] += S.Q[at] * z[i];
    }
    out[i] += total;
  }
}

// column [n; ν from n_blocks on] = the largest entries of [Q G' A'; A 0 0] scaled by D and E on their left, and by
// `cost` those of Q; row [m] those of G scaled on both sides. All of them are there before, at 0.
ICNNRT_NO_INLINE void largest_entries(const Sparse& S, std::size_t n_blocks, const double* D, const double* E,
                                      double cost, double* column, double* row) {
  const QpPlan& plan = *S.plan;
  const auto count = [](double& most, double size) { most = most < size ? size : most; };
  for (std::size_t j = 0; j < plan.n; ++j) count(column[j], __builtin_fabs(S.Q_diagonal[j]) * D[j] * cost);
  each_entry(plan.Q, plan.n, S.Q, [&](std::size_t i, std::size_t j, double a) {
    count(column[j], __builtin_fabs(a) * D[i] * cost);
    count(column[i], __builtin_fabs(a) * D[j] * cost);
  });
  each_entry(plan.A, plan.q, S.A, [&](std::size_t i, std::size_t j, double a) {
    count(column[j], __builtin_fabs(a) * D[n_blocks + i]);
    count(column[n_blocks + i], __builtin_fabs(a) * D[j]);
  });
  each_entry(plan.G, plan.m, S.G, [&](std::size_t i, std::size_t j, double a) {
    const double size = __builtin_fabs(a) * E[i];
    count(column[j], size);
    count(row[i], size * D[j]);
  });
}

// Q, A and G scaled by D and E on both sides, Q by `cost` too.
ICNNRT_NO_INLINE void scale(const Sparse& S, std::size_t n_blocks, const double* D, const double* E, double cost) {
  const QpPlan& plan = *S.plan;
  for (std::size_t j = 0; j < plan.n; ++j) S.Q_diagonal[j] *= D[j] * D[j] * cost;
  each_entry(plan.Q, plan.n, S.Q, [&](std::size_t i, std::size_t j, double& a) { a *= D[j] * D[i] * cost; });
  each_entry(plan.A, plan.q, S.A, [&](std::size_t i, std::size_t j, double& a) { a *= D[j] * D[n_blocks + i]; });
  each_entry(plan.G, plan.m, S.G, [&](std::size_t i, std::size_t j, double& a) { a *= D[j] * E[i]; });
}

// Q, symmetrised, G and A of a program; those of row-major arrays, of which Q may be null: 0. NaN if any entry is NaN
// or infinite, else 0.
template <typename T>
ICNNRT_NO_INLINE double read_entries(const Sparse& S, const T* Q, const T* G, const T* A) {
  const QpPlan& plan = *S.plan;
  const std::size_t n = plan.n;
  double odd = 0.0;
  const auto read = [&](double& a, double value) { odd += (a = value) * 0.0; };
  for (std::size_t j = 0; j < n; ++j) read(S.Q_diagonal[j], Q ? static_cast<double>(Q[j * n + j]) : 0.0);
  each_entry(plan.Q, n, S.Q, [&](std::size_t i, std::size_t j, double& a) {
    read(a, Q ? (static_cast<double>(Q[i * n + j]) + static_cast<double>(Q[j * n + i])) * 0.5 : 0.0);
  });
  each_entry(plan.G, plan.m, S.G,
             [&](std::size_t i, std::size_t j, double& a) { read(a, static_cast<double>(G[i * n + j])); });
  each_entry(plan.A, plan.q, S.A,
             [&](std::size_t i, std::size_t j, double& a) { read(a, static_cast<double>(A[i * n + j])); });
  return odd;
}

// How many of `count` numbers are not 0; NaN is not.
template <typename T>
ICNNRT_INLINE std::size_t nonzeros(const T* a, std::size_t count) {
  BitsVec lanes{};
  std::size_t i = 0, total = 0;
  for (; i + W <= count; i += W) lanes -= (BitsVec)(load(a + i) != 0.0);  // true is −1
  for (; i < count; ++i) total += a[i] != T{0};
  for (std::size_t l = 0; l < W; ++l) total += static_cast<std::size_t>(lanes[l]);
  return total;
}

// Whether nothing of a row-major matrix with n columns lies outside its pattern; Q's is that of both halves and the
// diagonal.
template <typename T>
ICNNRT_NO_INLINE bool within(const QpPlan& plan, QpMatrix which, const T* a) {
  const std::size_t n = plan.n;
  const bool square = which == QpMatrix::kQ;
  const QpPatternRows& pattern = square ? plan.Q : which == QpMatrix::kG ? plan.G : plan.A;
  const std::size_t rows = square ? n : which == QpMatrix::kG ? plan.m : plan.q;
  std::size_t inside = 0;
  for (std::size_t i = 0; i < rows; ++i) {
    if (square) inside += a[i * n + i] != T{0};
    for (std::int32_t at = pattern.starts[i]; at < pattern.starts[i + 1]; ++at) {
      const auto j = static_cast<std::size_t>(pattern.columns[at]);
      inside += a[i * n + j] != T{0};
      if (square) inside += a[j * n + i] != T{0};
    }
  }
  return nonzeros(a, rows * n) == inside;
}

// LDL' of what S.diagonal and S.L hold. Pivots of z are positive, and those of ν and λ negative, in any order. One that
// rounding has left nothing of says nothing: its row is cut off from the others. Returns the least pivot, with that
// sign, in units of what it is the difference of.
//
// Column j, when its turn comes, takes −l_jk d_k l_k from all columns k < j that have a row j. They are in a list from
// head[j] on by `link`, each with the place next[k] of that row in it.
ICNNRT_NO_INLINE double factor(const Sparse& S, double smallest) {
  const QpPlan& plan = *S.plan;
  double least = 1.0;
  for (std::size_t j = 0; j < plan.N; ++j) S.head[j] = -1;
  const auto wait = [&](std::int32_t k) {
    const std::int32_t row = plan.rows[S.next[k]];
    S.link[k] = S.head[row];
    S.head[row] = k;
  };
  for (std::size_t j = 0; j < plan.N; ++j) {
    const std::int32_t begin = plan.starts[j], end = plan.starts[j + 1];
    for (std::int32_t at = begin; at < end; ++at) S.y[plan.rows[at]] = S.L[at];
    double pivot = S.diagonal[j], whole = __builtin_fabs(pivot);
    const double sign = static_cast<std::size_t>(plan.order[j]) < plan.n ? 1.0 : -1.0;
    for (std::int32_t k = S.head[j], following; k >= 0; k = following) {
      following = S.link[k];
      const double l = S.L[S.next[k]], by = l * S.pivot[k], square = by * l;
      pivot -= square;
      whole += max(-sign * square, 0.0);
      const std::int32_t last = plan.starts[k + 1];
      for (std::int32_t at = ++S.next[k]; at < last; ++at) S.y[plan.rows[at]] -= by * S.L[at];
      if (S.next[k] < last) wait(k);
    }
    const bool good = sign * pivot > smallest * whole;
    least = min(least, pivot == pivot && whole > 0.0 ? sign * pivot / whole : -1.0);
    if (!good) pivot = sign * (whole > 0x1p-1000 ? whole : 1.0);
    S.pivot[j] = pivot;
    S.inverse[j] = 1.0 / pivot;
    const double by = good ? S.inverse[j] : 0.0;
    for (std::int32_t at = begin; at < end; ++at) {
      S.L[at] = S.y[plan.rows[at]] * by;
      S.y[plan.rows[at]] = 0.0;
    }
    if (begin < end) {
      S.next[j] = begin;
      wait(static_cast<std::int32_t>(j));
    }
  }
  return least;
}

// The least pivot of Q + noise, in units of its diagonal: that of the whole system without A and G.
ICNNRT_NO_INLINE double least_pivot_of_Q(const Sparse& S, double noise) {
  const QpPlan& plan = *S.plan;
  for (std::size_t i = plan.n; i < plan.N; ++i) S.diagonal[plan.place[i]] = -1.0;
  for (std::size_t j = 0; j < plan.n; ++j) S.diagonal[plan.place[j]] = S.Q_diagonal[j] + noise;
  for (std::size_t at = 0; at < plan.entries; ++at) S.L[at] = 0.0;
  for (std::size_t at = 0; at < plan.Q.entries; ++at) S.L[plan.Q.slot[at]] = S.Q[at];
  return factor(S, 0.0);
}

// y = (LDL')^-1 y
ICNNRT_NO_INLINE void solve(const Sparse& S, double* y) {
  const QpPlan& plan = *S.plan;
  for (std::size_t j = 0; j < plan.N; ++j) {
    const double by = y[j];
    if (by == 0.0) continue;
    for (std::int32_t at = plan.starts[j]; at < plan.starts[j + 1]; ++at) y[plan.rows[at]] -= S.L[at] * by;
  }
  for (std::size_t j = plan.N; j-- > 0;) {
    double rest = y[j] * S.inverse[j];
    for (std::int32_t at = plan.starts[j]; at < plan.starts[j + 1]; ++at) rest -= S.L[at] * y[plan.rows[at]];
    y[j] = rest;
  }
}

}  // namespace ICNNRT_INSTRUCTION_SET
}  // namespace icnnrt
