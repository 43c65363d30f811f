// All of R^n with R(y) = ½‖y‖².
#pragma once

#include "diagonal.h"
#include "point.h"

namespace icnnrt {
namespace ICNNRT_INSTRUCTION_SET {

//   centre 0,   y(λ) = s,   D = I,   R*(s) = ½‖s‖²
//
// The dual is quadratic itself: a step of Newton's method over all cuts that matter is exact. The interior points have
// nothing to gain from logits of their own, as y is linear in λ: u = s throughout.
struct Quadratic : Diagonal {
  // |g_i'y| <= ‖g_i‖ max ‖g‖: y is a mean of slopes.
  using Size = SumOfSquares;
  static constexpr double kUnit = 0.0;  // y has the units of the slopes, and those are anyone's
  ICNNRT_INLINE double reach(double size) { return size; }

  template <typename U>
  ICNNRT_INLINE double conjugate(const Cuts<U>& cuts, const std::size_t* rows, std::size_t m, const double* lam,
                                 Point& point) {
    Vec squares{};
    for (std::size_t b = 0; b < cuts.columns.blocks; ++b) {
      const Vec s = -transposed_times(cuts, rows, m, lam, b), once = counted(cuts.columns, b), c = s * once;
      store(point.s + b * W, s);
      store(point.y + b * W, s);
      store(point.c + b * W, c);
      store(point.D + b * W, once);
      squares += c * c;
    }
    return 0.5 * sum(squares);
  }

  ICNNRT_INLINE void start_logits(const Columns& columns, const double* s, double, double*, double* c) {
    for (std::size_t b = 0; b < columns.blocks; ++b) store(c + b * W, load(s + b * W) * counted(columns, b));
  }

  ICNNRT_INLINE void at_logits(const Columns& columns, const double*, const double* s, double* D, double* c) {
    for (std::size_t b = 0; b < columns.blocks; ++b) {
      const Vec once = counted(columns, b);
      store(D + b * W, once);
      store(c + b * W, load(s + b * W) * once);
    }
  }

  ICNNRT_INLINE void move_logits(const Columns&, const double*, const double*, double, double*) {}
};

}  // namespace ICNNRT_INSTRUCTION_SET
}  // namespace icnnrt
