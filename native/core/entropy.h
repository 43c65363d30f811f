// The box [0, 1]^n with entropy: R(y) = Σ y log y + (1-y) log(1-y).
#pragma once

#include "diagonal.h"
#include "exponential.h"
#include "point.h"

namespace icnnrt {
namespace ICNNRT_INSTRUCTION_SET {

//   centre ½,   y(λ) = σ(s),   D = diag(σ(s) σ(-s)),   R*(s) = Σ softplus(s) - ½ s
struct Entropy : Diagonal {
  using Size = SumOfMagnitudes;
  static constexpr double kUnit = 1.0;
  ICNNRT_INLINE double reach(double size) { return 0.5 * size; }

  // The constants of icnnrt/mathematics/domains.py, which gives their reasons.
  static constexpr double kLogitBound = 45.0;
  static constexpr double kLogitStep = 4.0;

  // y is never below e^-708.
  template <typename U>
  ICNNRT_INLINE double conjugate(const Cuts<U>& cuts, const std::size_t* rows, std::size_t m, const double* lam,
                                 Point& point) {
    const Columns& columns = cuts.columns;
    // Σ softplus(s) - ½ s = Σ ½|s| + log(1 + e^-|s|), and 1 / (1 + e^-|s|) = max(σ(s), σ(-s)): the logarithm of a
    // product of numbers in [½, 1], taken before it can underflow.
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
    return 0.5 * sum(size) - logarithms;
  }

  // u from s within ±bound, and c = y(u) - ½.
  ICNNRT_INLINE void start_logits(const Columns& columns, const double* s, double bound, double* u, double* c) {
    for (std::size_t b = 0; b < columns.blocks; ++b) {
      const Vec logits = clip(load(s + b * W), -bound, bound);
      store(u + b * W, logits);
      store(c + b * W, (1.0 / (1.0 + exp(-logits)) - 0.5) * counted(columns, b));
    }
  }

  // D at u, and c(u) - D(u - s).
  ICNNRT_INLINE void at_logits(const Columns& columns, const double* u, const double* s, double* D_at, double* c) {
    for (std::size_t b = 0; b < columns.blocks; ++b) {
      const Vec logits = load(u + b * W);
      const Vec E = exp(-logits), y = 1.0 / (1.0 + E), once = counted(columns, b);
      const Vec D = E * y * y * once;
      store(D_at + b * W, D);
      store(c + b * W, (y - 0.5) * once - D * (logits - load(s + b * W)));
    }
  }

  // u += α du with α du = next - s - α(u - s), within what a step and a logit may be.
  ICNNRT_INLINE void move_logits(const Columns& columns, const double* s_at, const double* s_next, double alpha,
                                 double* logits) {
    for (std::size_t b = 0; b < columns.blocks; ++b) {
      const Vec u = load(logits + b * W), s = load(s_at + b * W), next = load(s_next + b * W);
      const Vec du = clip(next - s - alpha * (u - s), -kLogitStep, kLogitStep);
      store(logits + b * W, clip(u + du, -kLogitBound, kLogitBound));
    }
  }
};

}  // namespace ICNNRT_INSTRUCTION_SET
}  // namespace icnnrt
