// Between rows of n numbers as they lie in memory and the blocks that the solvers work on.
#pragma once

#include "workspace.h"

namespace icnnrt {
namespace ICNNRT_INSTRUCTION_SET {

// The columns of a row of n, also where it is shorter than a vector: then it stands at the end of one block.
ICNNRT_INLINE Columns columns_of(std::size_t n) { return n < W ? Columns{W, 1, W - n} : columns(n); }

// Rows shorter than a vector, copied so that each ends with its block; zeros come before.
template <typename T>
ICNNRT_INLINE Cuts<double> short_cuts(const Sizes& sizes, const T* slopes, Workspace& ws) {
  const Columns columns = columns_of(sizes.n);
  for (std::size_t i = 0; i < sizes.k; ++i) {
    double* const row = ws.short_rows + i * W;
    for (std::size_t j = 0; j < columns.first_new; ++j) row[j] = 0.0;
    for (std::size_t j = 0; j < sizes.n; ++j) row[columns.first_new + j] = static_cast<double>(slopes[i * sizes.n + j]);
  }
  return {ws.short_rows, W, ws.e, sizes.k, columns};
}

// The columns that a block adds: `count` of them from `first` on, in lanes from `skipped` on.
struct Lanes {
  std::size_t first, skipped, count;
};

ICNNRT_INLINE Lanes lanes_of(std::size_t n, std::size_t block) {
  const Columns columns = columns_of(n);
  const std::size_t skipped = block + 1 == columns.blocks ? columns.first_new : 0;
  return {block + 1 == columns.blocks ? n - (W - skipped) : block * W, skipped, W - skipped};
}

// A row of n numbers as blocks, with zeros where lanes overlap.
template <typename T>
ICNNRT_INLINE void read_columns(std::size_t n, const T* from, double* to) {
  const std::size_t blocks = columns_of(n).blocks;
  for (std::size_t b = 0; b < blocks; ++b) {
    const Lanes lanes = lanes_of(n, b);
    for (std::size_t i = 0; i < lanes.skipped; ++i) to[b * W + i] = 0.0;
    for (std::size_t i = 0; i < lanes.count; ++i)
      to[b * W + lanes.skipped + i] = static_cast<double>(from[lanes.first + i]);
  }
}

// Blocks as a row of n numbers; returns the most that rounding to T moved one.
template <typename T>
ICNNRT_INLINE double write_columns(std::size_t n, const double* from, T* to) {
  const std::size_t blocks = columns_of(n).blocks;
  double rounding = 0.0;
  for (std::size_t b = 0; b < blocks; ++b) {
    const Lanes lanes = lanes_of(n, b);
    for (std::size_t i = 0; i < lanes.count; ++i) {
      const double exact = from[b * W + lanes.skipped + i];
      const T rounded = static_cast<T>(exact);
      to[lanes.first + i] = rounded;
      rounding = max(rounding, __builtin_fabs(static_cast<double>(rounded) - exact));
    }
  }
  return rounding;
}

}  // namespace ICNNRT_INSTRUCTION_SET
}  // namespace icnnrt
