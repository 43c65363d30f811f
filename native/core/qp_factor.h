// U'DU of quasidefinite matrices [P A'; A -S] given as sums of squares, and products with their parts.
#pragma once

#include "lanes.h"

namespace icnnrt {
namespace ICNNRT_INSTRUCTION_SET {

// Rows that one tile of the factorisation holds: sizes of matrices are padded to multiples of it.
inline constexpr std::size_t kBlock = 4;

ICNNRT_INLINE std::size_t in_blocks(std::size_t n) { return (n + kBlock - 1) / kBlock * kBlock; }

// The factors of a matrix of `size` rows, the first `positive` of which belong to P. Both are multiples of kBlock.
struct Factors {
  std::size_t size, positive;
  std::size_t ld;   // at least size + 12; columns from `size` on are zero
  double* U;        // [size, ld]; what lies on and below the diagonal is void
  double* inverse;  // [size] of the diagonal of U
};

// acc[t] += ± X[:, i + t] X[:, c...] over some rows of X.
template <std::size_t V, bool kMinus>
ICNNRT_INLINE void accumulate(Vec (&acc)[kBlock][V], const double* X, std::size_t ld, std::size_t rows, std::size_t i,
                              std::size_t c) {
  for (std::size_t k = 0; k < rows; ++k, X += ld) {
    Vec x[V];
#pragma GCC unroll 4
    for (std::size_t v = 0; v < V; ++v) x[v] = load(X + c + v * W);
#pragma GCC unroll 4
    for (std::size_t t = 0; t < kBlock; ++t) {
      const Vec a = broadcast(X[i + t]);
#pragma GCC unroll 4
      for (std::size_t v = 0; v < V; ++v) acc[t][v] = kMinus ? acc[t][v] - a * x[v] : acc[t][v] + a * x[v];
    }
  }
}

// Factors of the kBlock rows on the diagonal.
struct Corner {
  double l[kBlock][kBlock];
  double scale[kBlock];  // of the rows
};

// Rows i... of U, columns c...; where `corner` is wanted, c = i.
template <std::size_t V, bool kDiagonal>
ICNNRT_INLINE double factor_tile(const Factors& f, const double* K, const double* R, std::size_t rows_of_R,
                                 const double* diagonal, double smallest, std::size_t i, std::size_t c,
                                 Corner& corner) {
  Vec acc[kBlock][V];
  const std::size_t ld = f.ld;
  double least = 1.0;
#pragma GCC unroll 4
  for (std::size_t t = 0; t < kBlock; ++t)
#pragma GCC unroll 4
    for (std::size_t v = 0; v < V; ++v) acc[t][v] = load(K + (i + t) * ld + c + v * W);
  if (i < f.positive) {
    if (c < f.positive) accumulate<V, false>(acc, R, ld, rows_of_R, i, c);
    accumulate<V, true>(acc, f.U, ld, i, i, c);
  } else {
    accumulate<V, false>(acc, f.U, ld, f.positive, i, c);
    accumulate<V, true>(acc, f.U + f.positive * ld, ld, i - f.positive, i, c);
  }
  if (kDiagonal) {
    double a[kBlock][kBlock + W];
    for (std::size_t t = 0; t < kBlock; ++t)
      for (std::size_t v = 0; v * W < kBlock; ++v) store(a[t] + v * W, acc[t][v < V ? v : 0]);
    for (std::size_t t = 0; t < kBlock; ++t) {
      double pivot = a[t][t] + diagonal[i + t];
      for (std::size_t s = 0; s < t; ++s) pivot -= corner.l[s][t] * corner.l[s][t];
      // What rounding has left of a pivot says nothing: the row is cut off from the others.
      const double whole = diagonal[f.size + i + t];
      const bool good = pivot > smallest * whole;
      least = min(least, pivot == pivot && whole > 0.0 ? pivot / whole : -1.0);
      const double inverse = 1.0 / __builtin_sqrt(good ? pivot : whole > 0x1p-1000 ? whole : 1.0);
      f.inverse[i + t] = inverse;
      corner.scale[t] = good ? inverse : 0.0;
      for (std::size_t j = t + 1; j < kBlock; ++j) {
        double u = a[t][j];
        for (std::size_t s = 0; s < t; ++s) u -= corner.l[s][t] * corner.l[s][j];
        corner.l[t][j] = u * corner.scale[t];
      }
    }
  }
#pragma GCC unroll 4
  for (std::size_t t = 0; t < kBlock; ++t) {
#pragma GCC unroll 4
    for (std::size_t v = 0; v < V; ++v) {
#pragma GCC unroll 4
      for (std::size_t s = 0; s < t; ++s) acc[t][v] -= corner.l[s][t] * acc[s][v];
      acc[t][v] *= corner.scale[t];
      store(f.U + (i + t) * ld + c + v * W, acc[t][v]);
    }
  }
  return least;
}

// Rows i to i + kBlock of U.
ICNNRT_NO_INLINE double factor_rows(const Factors& f, const double* K, const double* R, std::size_t rows_of_R,
                                    const double* diagonal, double smallest, std::size_t i) {
  Corner corner;
  std::size_t c = i;
  double least;
  const auto left = [&] { return (f.size - c + W - 1) / W; };
  if (left() >= 3) {
    least = factor_tile<3, true>(f, K, R, rows_of_R, diagonal, smallest, i, c, corner);
    c += 3 * W;
  } else {
    least = factor_tile<2, true>(f, K, R, rows_of_R, diagonal, smallest, i, c, corner);
    c += 2 * W;
  }
  while (c < f.size) {
    if (left() >= 3) {
      factor_tile<3, false>(f, K, R, rows_of_R, diagonal, smallest, i, c, corner);
      c += 3 * W;
    } else if (left() == 2) {
      factor_tile<2, false>(f, K, R, rows_of_R, diagonal, smallest, i, c, corner);
      c += 2 * W;
    } else {
      factor_tile<1, false>(f, K, R, rows_of_R, diagonal, smallest, i, c, corner);
      c += W;
    }
  }
  return least;
}

//     [P A'; A -S] = U' diag(1, -1) U,   P = K_P + R'R + diag(diagonal),   S = diag(diagonal)
//
// K [size, ld] holds K_P and A'; where S stands it is zero. R [rows, ld] is zero beyond P's columns. `diagonal` [size]
// is followed by the diagonal of P as a whole [size], which pivots are measured by; the rest of that is filled in here.
//
// The rows of P. Returns the least pivot in units of the diagonal as a whole; where that is no more than `enough`, what
// follows is left out.
ICNNRT_NO_INLINE double factor_P(const Factors& f, const double* K, const double* R, std::size_t rows_of_R,
                                 const double* diagonal, double smallest, double enough) {
  double least = 1.0;
  for (std::size_t i = 0; i < f.positive && least > enough; i += kBlock)
    least = min(least, factor_rows(f, K, R, rows_of_R, diagonal, smallest, i));
  return least;
}

// The rows below, after those. Returns the least pivot alike.
ICNNRT_NO_INLINE double factor_S(const Factors& f, const double* K, double* diagonal, double smallest) {
  double least = 1.0;
  double* const whole = diagonal + f.size;
  for (std::size_t c = f.positive; c < f.size; ++c) whole[c] = diagonal[c];
  for (std::size_t k = 0; k < f.positive; ++k)
    for (std::size_t c = f.positive; c < f.size; c += W) {
      const Vec u = load(f.U + k * f.ld + c);
      store(whole + c, load(whole + c) + u * u);
    }
  for (std::size_t c = f.positive; c < f.size; ++c) diagonal[c] += smallest * whole[c];
  for (std::size_t i = f.positive; i < f.size; i += kBlock)
    least = min(least, factor_rows(f, K, nullptr, 0, diagonal, smallest, i));
  return least;
}

// The two halves of `solve`, of R vectors at once: x [ld] = U'^-1 x, and x = U^-1 diag(1, -1) x; zero from `size` on.
template <std::size_t R>
ICNNRT_NO_INLINE void forward(const Factors& f, double* const (&x)[R]) {
  const std::size_t ld = f.ld;
  for (std::size_t i = 0; i < f.size; i += kBlock) {
    const double* const U = f.U + i * ld;
    double y[R][kBlock];
    for (std::size_t r = 0; r < R; ++r)
      for (std::size_t t = 0; t < kBlock; ++t) {
        double rest = x[r][i + t];
        for (std::size_t s = 0; s < t; ++s) rest -= U[s * ld + i + t] * y[r][s];
        x[r][i + t] = y[r][t] = rest * f.inverse[i + t];
      }
    for (std::size_t c = i + kBlock; c < f.size; c += W) {
      const Vec u[kBlock] = {load(U + c), load(U + ld + c), load(U + 2 * ld + c), load(U + 3 * ld + c)};
      for (std::size_t r = 0; r < R; ++r)
        store(x[r] + c, load(x[r] + c) - ((u[0] * y[r][0] + u[1] * y[r][1]) + (u[2] * y[r][2] + u[3] * y[r][3])));
    }
  }
}

template <std::size_t R>
ICNNRT_NO_INLINE void backward(const Factors& f, double* const (&x)[R]) {
  const std::size_t ld = f.ld;
  for (std::size_t r = 0; r < R; ++r)
    for (std::size_t c = f.positive; c < f.size; ++c) x[r][c] = -x[r][c];
  for (std::size_t i = f.size; i > 0;) {
    i -= kBlock;
    const double* const U = f.U + i * ld;
    Vec rest[R][kBlock] = {};
    for (std::size_t c = i + kBlock; c < f.size; c += W) {
      for (std::size_t r = 0; r < R; ++r) {
        const Vec y = load(x[r] + c);
#pragma GCC unroll 4
        for (std::size_t t = 0; t < kBlock; ++t) rest[r][t] += load(U + t * ld + c) * y;
      }
    }
    for (std::size_t r = 0; r < R; ++r)
      for (std::size_t t = kBlock; t-- > 0;) {
        double y = x[r][i + t] - sum(rest[r][t]);
        for (std::size_t s = t + 1; s < kBlock; ++s) y -= U[t * ld + i + s] * x[r][i + s];
        x[r][i + t] = y * f.inverse[i + t];
      }
  }
}

// x [ld] = [P A'; A -S]^-1 x; zero from `size` on.
ICNNRT_INLINE void solve(const Factors& f, double* x) {
  double* const only[] = {x};
  forward(f, only);
  backward(f, only);
}

// out [rows] = M x over `columns` of M's columns; beyond them M and x are zero for a vector.
ICNNRT_NO_INLINE void rows_times(const double* M, std::size_t ld, std::size_t rows, std::size_t columns,
                                 const double* x, double* out) {
  std::size_t i = 0;
  for (; i + 4 <= rows; i += 4) {
    const double* const row = M + i * ld;
    Vec total[4] = {};
    for (std::size_t c = 0; c < columns; c += W) {
      const Vec y = load(x + c);
#pragma GCC unroll 4
      for (std::size_t t = 0; t < 4; ++t) total[t] += load(row + t * ld + c) * y;
    }
#pragma GCC unroll 4
    for (std::size_t t = 0; t < 4; ++t) out[i + t] = sum(total[t]);
  }
  for (; i < rows; ++i) {
    Vec total{};
    for (std::size_t c = 0; c < columns; c += W) total += load(M + i * ld + c) * load(x + c);
    out[i] = sum(total);
  }
}

// out [columns] += M'a; out is written up to a multiple of W.
ICNNRT_NO_INLINE void add_columns_times(const double* M, std::size_t ld, std::size_t rows, std::size_t columns,
                                        const double* a, double* out) {
  std::size_t i = 0;
  for (; i + 4 <= rows; i += 4) {
    const double* const row = M + i * ld;
    const double w[4] = {a[i], a[i + 1], a[i + 2], a[i + 3]};
    if (w[0] == 0.0 && w[1] == 0.0 && w[2] == 0.0 && w[3] == 0.0) continue;
    for (std::size_t c = 0; c < columns; c += W)
      store(out + c, load(out + c) + ((load(row + c) * w[0] + load(row + ld + c) * w[1]) +
                                      (load(row + 2 * ld + c) * w[2] + load(row + 3 * ld + c) * w[3])));
  }
  for (; i < rows; ++i)
    for (std::size_t c = 0; c < columns; c += W) store(out + c, load(out + c) + load(M + i * ld + c) * a[i]);
}

}  // namespace ICNNRT_INSTRUCTION_SET
}  // namespace icnnrt
