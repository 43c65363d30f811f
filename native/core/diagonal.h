// Products with a diagonal D.
#pragma once

#include "dense.h"

namespace icnnrt {
namespace ICNNRT_INSTRUCTION_SET {

struct Diagonal {
  // H = G D G' over the given m rows.
  template <typename U>
  ICNNRT_INLINE void gram(const Cuts<U>& cuts, const std::size_t* rows, std::size_t m, const double* D, double*,
                          double* H, std::size_t ld) {
    ICNNRT_INSTRUCTION_SET::gram<false>(cuts, rows, m, D, nullptr, H, ld);
  }

  // out = -D a; `a` and `out` may be the same.
  ICNNRT_INLINE void minus_D_times(const Columns& columns, const double* D, const double* a, double* out) {
    for (std::size_t b = 0; b < columns.blocks; ++b) store(out + b * W, -(load(D + b * W) * load(a + b * W)));
  }
};

}  // namespace ICNNRT_INSTRUCTION_SET
}  // namespace icnnrt
