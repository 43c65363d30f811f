// Vectors of doubles as wide as the instruction set, and the columns of a matrix seen through them.
//
// Everything here has internal linkage in the instruction set's own namespace, and no function template of the
// standard library is used: the linker must never pick a copy that was compiled for another processor.
#pragma once

#include <cstddef>

namespace icnnrt {
namespace ICNNRT_INSTRUCTION_SET {

// ICNNRT_EIGHT_LANES, for tests: the code of AVX-512 on a processor without; the compiler makes two vectors of each.
#if defined(__AVX512F__) && !defined(ICNNRT_EIGHT_LANES)
#define ICNNRT_EIGHT_LANES 1
#endif

#if defined(ICNNRT_EIGHT_LANES)
inline constexpr std::size_t W = 8;  // doubles in a vector
#elif defined(__AVX2__)
inline constexpr std::size_t W = 4;
#else
inline constexpr std::size_t W = 2;
#endif

inline constexpr double kEps = 0x1p-52;  // twice the unit roundoff of double

typedef double Vec __attribute__((vector_size(W * sizeof(double))));
typedef unsigned long long BitsVec __attribute__((vector_size(W * sizeof(unsigned long long))));
typedef float FloatVec __attribute__((vector_size(W * sizeof(float))));

#define ICNNRT_INLINE static inline __attribute__((always_inline))
#define ICNNRT_NO_INLINE static __attribute__((noinline))

ICNNRT_INLINE Vec broadcast(double a) { return a - Vec{}; }

ICNNRT_INLINE Vec load(const double* p) {
  Vec x;
  __builtin_memcpy(&x, p, sizeof x);  // of any alignment
  return x;
}

ICNNRT_INLINE Vec load(const float* p) {
  FloatVec x;
  __builtin_memcpy(&x, p, sizeof x);
  return __builtin_convertvector(x, Vec);
}

ICNNRT_INLINE void store(double* p, Vec x) { __builtin_memcpy(p, &x, sizeof x); }

// Half of a vector added to the other, until one number is left.
ICNNRT_INLINE double sum(Vec x) {
#if defined(__AVX2__)
  typedef double Pair __attribute__((vector_size(2 * sizeof(double))));
#if defined(ICNNRT_EIGHT_LANES)
  typedef double Half __attribute__((vector_size(4 * sizeof(double))));
  Half halves[2];
  __builtin_memcpy(halves, &x, sizeof x);
  const Half y = halves[0] + halves[1];
#else
  const Vec y = x;
#endif
  Pair pairs[2];
  __builtin_memcpy(pairs, &y, sizeof y);
  const Pair z = pairs[0] + pairs[1];
  return z[0] + z[1];
#else
  return x[0] + x[1];
#endif
}

ICNNRT_INLINE double product(Vec x) {
  double a = x[0];
  for (std::size_t i = 1; i < W; ++i) a *= x[i];
  return a;
}

ICNNRT_INLINE Vec abs(Vec x) {
  BitsVec bits;
  __builtin_memcpy(&bits, &x, sizeof x);
  bits &= 0x7fffffffffffffffULL;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}

// NaN in x comes through, as every comparison with it is false.
ICNNRT_INLINE Vec clip(Vec x, double low, double high) {
  x = x < low ? broadcast(low) : x;
  return x > high ? broadcast(high) : x;
}

ICNNRT_INLINE double max(double a, double b) { return a < b ? b : a; }
ICNNRT_INLINE double min(double a, double b) { return b < a ? b : a; }
ICNNRT_INLINE double clip(double x, double low, double high) { return x < low ? low : x > high ? high : x; }

// Entries to reserve for k: whole vectors of any instruction set.
ICNNRT_INLINE std::size_t padded(std::size_t k) { return (k + 7) / 8 * 8; }

// n columns as blocks of W. The last block ends with the last column, so it may overlap the one before: nothing beyond
// a row is ever read. What is summed over columns counts the overlap once, by `first_new`. Arrays over the columns live
// in the workspace in blocks, padded to a multiple of W.
struct Columns {
  std::size_t n;          // at least W
  std::size_t blocks;     // ceil(n / W)
  std::size_t first_new;  // how many lanes of the last block the one before has counted already
};

ICNNRT_INLINE Columns columns(std::size_t n) {
  const std::size_t blocks = (n + W - 1) / W;
  return {n, blocks, blocks * W - n};
}

ICNNRT_INLINE std::size_t offset_of(const Columns& columns, std::size_t block) {
  return block + 1 < columns.blocks ? block * W : columns.n - W;
}

// 1 for lanes of the block that count, 0 for those that overlap.
ICNNRT_INLINE Vec counted(const Columns& columns, std::size_t block) {
  Vec ones = broadcast(1.0);
  if (block + 1 == columns.blocks)
    for (std::size_t i = 0; i < columns.first_new; ++i) ones[i] = 0.0;
  return ones;
}

}  // namespace ICNNRT_INSTRUCTION_SET
}  // namespace icnnrt
