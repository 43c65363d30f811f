// Products with the cuts G: the only work that grows with n.
#pragma once

#include "lanes.h"

namespace icnnrt {
namespace ICNNRT_INSTRUCTION_SET {

// The cuts of one sample: k rows of n columns, `stride` apart.
template <typename U>
struct Cuts {
  const U* G;
  std::size_t stride;
  const double* e;  // [k]
  std::size_t k;
  Columns columns;
};

// A size of the rows that is not wanted. Others are: `add` to take in a vector of the row, which `counted` says the
// lanes of that are new, and `of` the whole row. All are NaN or infinite if the row has an entry that is.
struct NoSize {
  static constexpr bool kWanted = false;
  ICNNRT_INLINE void add(Vec&, Vec, Vec) {}
  ICNNRT_INLINE double of(Vec) { return 0.0; }
};

// ‖g‖₁
struct SumOfMagnitudes {
  static constexpr bool kWanted = true;
  ICNNRT_INLINE void add(Vec& size, Vec g, Vec once) { size += abs(g) * once; }
  ICNNRT_INLINE double of(Vec size) { return sum(size); }
};

// ‖g‖²
struct SumOfSquares {
  static constexpr bool kWanted = true;
  ICNNRT_INLINE void add(Vec& size, Vec g, Vec once) { size += g * g * once; }
  ICNNRT_INLINE double of(Vec size) { return sum(size); }
};

// max |g_j|
struct LargestMagnitude {
  static constexpr bool kWanted = true;
  ICNNRT_INLINE void add(Vec& size, Vec g, Vec) { size = larger(size, abs(g)); }
  ICNNRT_INLINE double of(Vec size) {
    for (std::size_t i = 1; i < W; ++i) size = larger(size, broadcast(size[i]));
    return size[0];
  }

 private:
  // Of two that are not negative, and NaN above all: so are their bits.
  ICNNRT_INLINE Vec larger(Vec a, Vec b) {
    typedef long long SignedVec __attribute__((vector_size(W * sizeof(long long))));
    SignedVec x, y;
    __builtin_memcpy(&x, &a, sizeof a);
    __builtin_memcpy(&y, &b, sizeof b);
    x = x > y ? x : y;
    __builtin_memcpy(&a, &x, sizeof x);
    return a;
  }
};

// out_i = e_i + g_i'a for every row i; a [blocks, W] is zero where lanes overlap. sizes_i is the size of g_i, if
// wanted.
template <std::size_t R, typename Size, typename U>
ICNNRT_INLINE void rows_times(const Cuts<U>& cuts, std::size_t i, const double* a, double* out, double* sizes) {
  Vec total[R] = {}, size[R] = {};
  for (std::size_t b = 0; b < cuts.columns.blocks; ++b) {
    const std::size_t at = offset_of(cuts.columns, b);
    const Vec x = load(a + b * W);
    const Vec once = Size::kWanted ? counted(cuts.columns, b) : Vec{};
#pragma GCC unroll 4
    for (std::size_t r = 0; r < R; ++r) {
      const Vec g = load(cuts.G + (i + r) * cuts.stride + at);
      total[r] += g * x;
      Size::add(size[r], g, once);
    }
  }
#pragma GCC unroll 4
  for (std::size_t r = 0; r < R; ++r) {
    out[i + r] = cuts.e[i + r] + sum(total[r]);
    if (Size::kWanted) sizes[i + r] = Size::of(size[r]);
  }
}

template <typename Size, typename U>
ICNNRT_INLINE void times(const Cuts<U>& cuts, const double* a, double* out, double* sizes) {
  std::size_t i = 0;
  for (; i + 4 <= cuts.k; i += 4) rows_times<4, Size>(cuts, i, a, out, sizes);
  if (i + 2 <= cuts.k) {
    rows_times<2, Size>(cuts, i, a, out, sizes);
    i += 2;
  }
  if (i < cuts.k) rows_times<1, Size>(cuts, i, a, out, sizes);
}

// v = e + G a
template <typename U>
static void times(const Cuts<U>& cuts, const double* a, double* v) {
  times<NoSize>(cuts, a, v, nullptr);
}

// v = e + G a and the sizes of the rows in one reading of G.
template <typename Size, typename U>
static void times_and_sizes(const Cuts<U>& cuts, const double* a, double* v, double* sizes) {
  times<Size>(cuts, a, v, sizes);
}

// One block of G'λ over the given rows.
template <typename U>
ICNNRT_INLINE Vec transposed_times(const Cuts<U>& cuts, const std::size_t* rows, std::size_t m, const double* lam,
                                   std::size_t b) {
  const U* G = cuts.G + offset_of(cuts.columns, b);
  Vec even{}, odd{};
  std::size_t a = 0;
  for (; a + 2 <= m; a += 2) {
    even += load(G + rows[a] * cuts.stride) * lam[rows[a]];
    odd += load(G + rows[a + 1] * cuts.stride) * lam[rows[a + 1]];
  }
  if (a < m) even += load(G + rows[a] * cuts.stride) * lam[rows[a]];
  return even + odd;
}

template <bool kCentred>
ICNNRT_INLINE Vec centred(Vec g, double centre) {
  return kCentred ? g - centre : g;
}

// Rows and columns a tile of the Gram matrix keeps in registers: 16 accumulators where there are 32 registers.
#if defined(ICNNRT_EIGHT_LANES) || defined(__aarch64__)
inline constexpr std::size_t kTile = 4;
#else
inline constexpr std::size_t kTile = 3;
#endif

template <std::size_t S, bool kCentred, typename U>
ICNNRT_INLINE void gram_tile(const Cuts<U>& cuts, const std::size_t* rows, std::size_t m, const double* D,
                             const double* centres, std::size_t a_0, std::size_t b_0, double* H, std::size_t ld) {
  const U *left[S], *right[S];
  double left_centre[S], right_centre[S];
  for (std::size_t t = 0; t < S; ++t) {  // beyond the last row, the last row once more
    left[t] = cuts.G + rows[a_0 + t < m ? a_0 + t : m - 1] * cuts.stride;
    right[t] = cuts.G + rows[b_0 + t < m ? b_0 + t : m - 1] * cuts.stride;
    left_centre[t] = kCentred ? centres[rows[a_0 + t < m ? a_0 + t : m - 1]] : 0.0;
    right_centre[t] = kCentred ? centres[rows[b_0 + t < m ? b_0 + t : m - 1]] : 0.0;
  }
  Vec total[S][S] = {};
  for (std::size_t b = 0; b < cuts.columns.blocks; ++b) {
    const std::size_t at = offset_of(cuts.columns, b);
    const Vec d = load(D + b * W);
    Vec x[S];
#pragma GCC unroll 4
    for (std::size_t t = 0; t < S; ++t) x[t] = centred<kCentred>(load(left[t] + at), left_centre[t]) * d;
#pragma GCC unroll 4
    for (std::size_t q = 0; q < S; ++q) {
      const Vec y = centred<kCentred>(load(right[q] + at), right_centre[q]);
#pragma GCC unroll 4
      for (std::size_t t = 0; t < S; ++t) total[t][q] += x[t] * y;
    }
  }
#pragma GCC unroll 4
  for (std::size_t t = 0; t < S; ++t) {
#pragma GCC unroll 4
    for (std::size_t q = 0; q < S; ++q) {
      const std::size_t i = a_0 + t, j = b_0 + q;
      if (i < m && j <= i) H[i * ld + j] = H[j * ld + i] = sum(total[t][q]);
    }
  }
}

template <std::size_t S, bool kCentred, typename U>
ICNNRT_INLINE void gram_in_tiles(const Cuts<U>& cuts, const std::size_t* rows, std::size_t m, const double* D,
                                 const double* centres, double* H, std::size_t ld) {
  for (std::size_t a = 0; a < m; a += S)
    for (std::size_t b = 0; b <= a; b += S) gram_tile<S, kCentred>(cuts, rows, m, D, centres, a, b, H, ld);
}

// H = G D G' over the given m rows, [m, m] in rows of ld; symmetric, so half of it is computed.
// With centres c [k] it is (G - c1') D (G - c1')'.
template <bool kCentred, typename U>
static void gram(const Cuts<U>& cuts, const std::size_t* rows, std::size_t m, const double* D, const double* centres,
                 double* H, std::size_t ld) {
  if (m <= 2) {
    gram_in_tiles<2, kCentred>(cuts, rows, m, D, centres, H, ld);
  } else {
    gram_in_tiles<kTile, kCentred>(cuts, rows, m, D, centres, H, ld);
  }
}

}  // namespace ICNNRT_INSTRUCTION_SET
}  // namespace icnnrt
