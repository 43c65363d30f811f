// What multipliers λ imply: the primal point, the cut values, and the certificate.
#pragma once

#include "dense.h"
#include "exponential.h"

namespace icnnrt {
namespace ICNNRT_INSTRUCTION_SET {

struct Point {
  double* s;    // [blocks, W] -G'λ
  double* y;    // [blocks, W] σ(s), never below e^-708
  double* c;    // [blocks, W] y - ½; zero where lanes overlap
  double* D;    // [blocks, W] σ(s) σ(-s); zero where lanes overlap
  double* v;    // [k] e + G(y - ½)
  double top;   // max v
  double gap;   // max v - λ'v: the duality gap; NaN if any cut is NaN or infinite
  double dual;  // e'λ + ½ 1's - Σ softplus(s)
};

// The rows with λ_i > 0, ascending; returns how many there are.
ICNNRT_INLINE std::size_t support(const double* lam, std::size_t k, std::size_t* rows) {
  std::size_t m = 0;
  for (std::size_t i = 0; i < k; ++i) {
    rows[m] = i;
    m += lam[i] > 0.0;
  }
  return m;
}

// Fill `point` for λ; with `sizes`, also ‖g_i‖₁ of every cut. `rows` is scratch, [k + 1].
template <bool kSizes, typename U>
static void evaluate(const Cuts<U>& cuts, const double* lam, std::size_t* rows, Point& point, double* sizes) {
  const Columns& columns = cuts.columns;
  const std::size_t m = support(lam, cuts.k, rows);
  // Σ softplus(s) - ½ s = Σ ½|s| + log(1 + e^-|s|), and 1 / (1 + e^-|s|) = max(σ(s), σ(-s)): the logarithm of a product
  // of numbers in [½, 1], taken before it can underflow.
  constexpr std::size_t kFactors = 960 / W;
  double logarithms = 0.0;
  Vec size{}, factors = broadcast(1.0);
  for (std::size_t b = 0; b < columns.blocks; ++b) {
    const Vec slope = transposed_times(cuts, rows, m, lam, b);
    const Vec E = exp(slope);
    const Vec y = 1.0 / (1.0 + E);
    const Vec z = E * y;  // σ(-s)
    Vec c = y - 0.5, D = z * y, factor = y > z ? y : z, magnitude = abs(slope);
    if (b + 1 == columns.blocks && columns.first_new != 0) {
      const Vec once = counted(columns, b);
      c *= once;
      D *= once;
      magnitude *= once;
      factor = once != 0.0 ? factor : broadcast(1.0);
    }
    store(point.s + b * W, -slope);
    store(point.y + b * W, y);
    store(point.c + b * W, c);
    store(point.D + b * W, D);
    size += magnitude;
    factors *= factor;
    if ((b + 1) % kFactors == 0) {
      logarithms += __builtin_log(product(factors));
      factors = broadcast(1.0);
    }
  }
  logarithms += __builtin_log(product(factors));

  if (kSizes) {
    times_and_sizes(cuts, point.c, point.v, sizes);
  } else {
    times(cuts, point.c, point.v);
  }
  double top = point.v[0], mean = 0.0, offset = 0.0;
  for (std::size_t i = 0; i < cuts.k; ++i) {
    top = max(top, point.v[i]);
    mean += lam[i] * point.v[i];  // over all cuts, so that one NaN is enough
    offset += lam[i] * cuts.e[i];
  }
  point.top = top;
  point.gap = top - mean;
  point.dual = offset - (0.5 * sum(size) - logarithms);
}

}  // namespace ICNNRT_INSTRUCTION_SET
}  // namespace icnnrt
