// The probability simplex with entropy: R(y) = Σ y log y.
#pragma once

#include "exponential.h"
#include "point.h"

namespace icnnrt {
namespace ICNNRT_INSTRUCTION_SET {

//   centre 1/n,   y(λ) = softmax(s),   D = diag(y) - yy',   R*(s) = log Σ e^s - mean(s)
//
// Where a Point or another file speaks of D, it holds y, zero where lanes overlap: D is never formed. Nor is a product
// with it the difference of two: where y is all but a corner of the simplex, D is far smaller than its parts, and
// nothing of it would be left. Instead D a = y∘(a - y'a) and G D G' = (G - (Gy)1') diag(y) (G - (Gy)1')'.
struct Simplex {
  // |g'(y - 1/n)| <= 2 max |g_j|
  using Size = LargestMagnitude;
  static constexpr double kUnit = 1.0;
  ICNNRT_INLINE double reach(double size) { return 2.0 * size; }

  // As in the box, but the largest logit is 0.
  static constexpr double kLogitBound = 45.0;
  static constexpr double kLogitStep = 4.0;

  // The largest of all lanes that count.
  struct Largest {
    Vec lanes = broadcast(-__builtin_inf());

    __attribute__((always_inline)) void take(Vec x, Vec once) {
      x = once != 0.0 ? x : lanes;
      lanes = x > lanes ? x : lanes;
    }
    __attribute__((always_inline)) double number() const {
      double most = lanes[0];
      for (std::size_t i = 1; i < W; ++i) most = max(most, lanes[i]);
      return most;
    }
  };

  // point.s is shifted so that the largest is 0. y is never below e^-708 / n.
  template <typename U>
  ICNNRT_INLINE double conjugate(const Cuts<U>& cuts, const std::size_t* rows, std::size_t m, const double* lam,
                                 Point& point) {
    const Columns& columns = cuts.columns;
    Largest largest;
    for (std::size_t b = 0; b < columns.blocks; ++b) {
      const Vec s = -transposed_times(cuts, rows, m, lam, b);
      store(point.s + b * W, s);
      largest.take(s, counted(columns, b));
    }
    const double top = largest.number();
    Vec below{};
    for (std::size_t b = 0; b < columns.blocks; ++b) {
      const Vec s = load(point.s + b * W) - top;
      store(point.s + b * W, s);
      below += s * counted(columns, b);
    }
    const double total = softmax(columns, point.s, point.D);
    const double centre = 1.0 / count(columns);
    for (std::size_t b = 0; b < columns.blocks; ++b) {
      const Vec y = load(point.D + b * W);
      store(point.y + b * W, y);
      store(point.c + b * W, y - counted(columns, b) * centre);
    }
    return __builtin_log(total) - sum(below) * centre;
  }

  // H = G D G' over the given m rows; `centres` is scratch.
  template <typename U>
  ICNNRT_INLINE void gram(const Cuts<U>& cuts, const std::size_t* rows, std::size_t m, const double* y, double* centres,
                          double* H, std::size_t ld) {
    Cuts<U> slopes = cuts;
    slopes.e = centres;
    for (std::size_t i = 0; i < cuts.k; ++i) centres[i] = 0.0;
    times(slopes, y, centres);
    ICNNRT_INSTRUCTION_SET::gram<true>(cuts, rows, m, y, centres, H, ld);
  }

  // out = -D a; `a` and `out` may be the same. What rounding leaves of y'(a - y'a) counts where y is all but a corner,
  // so it is taken out too.
  ICNNRT_INLINE void minus_D_times(const Columns& columns, const double* y, const double* a, double* out) {
    const double mean = dot(columns, y, a);
    for (std::size_t b = 0; b < columns.blocks; ++b) store(out + b * W, load(a + b * W) - mean);
    const double rest = dot(columns, y, out);
    for (std::size_t b = 0; b < columns.blocks; ++b)
      store(out + b * W, -(load(y + b * W) * (load(out + b * W) - rest)));
  }

  // u from s, no more than `bound` below the largest, and c = y(u) - 1/n.
  ICNNRT_INLINE void start_logits(const Columns& columns, const double* s, double bound, double* u, double* c) {
    for (std::size_t b = 0; b < columns.blocks; ++b) store(u + b * W, clip(load(s + b * W), -bound, 0.0));
    softmax(columns, u, c);
    for (std::size_t b = 0; b < columns.blocks; ++b)
      store(c + b * W, load(c + b * W) - counted(columns, b) * (1.0 / count(columns)));
  }

  // D at u, and c(u) - D(u - s).
  ICNNRT_INLINE void at_logits(const Columns& columns, const double* u, const double* s, double* y, double* c) {
    softmax(columns, u, y);
    for (std::size_t b = 0; b < columns.blocks; ++b) store(c + b * W, load(u + b * W) - load(s + b * W));
    minus_D_times(columns, y, c, c);
    for (std::size_t b = 0; b < columns.blocks; ++b)
      store(c + b * W, load(y + b * W) - counted(columns, b) * (1.0 / count(columns)) + load(c + b * W));
  }

  // u += α du with α du = next - s - α(u - s), less its mean y(u)'du, which y does not see; within what a step and a
  // logit may be. Next to the mean no logit that matters runs ahead of the others: counted from the largest, every
  // change of the largest moved all the others.
  ICNNRT_INLINE void move_logits(const Columns& columns, const double* s, const double* next, double alpha, double* u) {
    const auto move = [&](std::size_t b) __attribute__((always_inline)) {
      const Vec at = load(s + b * W);
      return load(next + b * W) - at - alpha * (load(u + b * W) - at);
    };
    Vec moves{}, weights{};
    for (std::size_t b = 0; b < columns.blocks; ++b) {
      const Vec E = exp(load(u + b * W)) * counted(columns, b);
      moves += E * move(b);
      weights += E;
    }
    const double mean = sum(moves) / sum(weights);
    Largest largest;
    for (std::size_t b = 0; b < columns.blocks; ++b) {
      const Vec moved = load(u + b * W) + clip(move(b) - mean, -kLogitStep, kLogitStep);
      store(u + b * W, moved);
      largest.take(moved, counted(columns, b));
    }
    const double top = largest.number();
    for (std::size_t b = 0; b < columns.blocks; ++b) store(u + b * W, clip(load(u + b * W) - top, -kLogitBound, 0.0));
  }

 private:
  // How many columns there are; `Columns` counts those of short rows with the zeros before them.
  ICNNRT_INLINE double count(const Columns& columns) {
    return static_cast<double>(columns.blocks * W - columns.first_new);
  }

  ICNNRT_INLINE double dot(const Columns& columns, const double* a, const double* b) {
    Vec total{};
    for (std::size_t i = 0; i < columns.blocks; ++i) total += load(a + i * W) * load(b + i * W);
    return sum(total);
  }

  // y = e^u / Σ e^u, zero where lanes overlap, for u whose largest is 0; returns the sum.
  ICNNRT_INLINE double softmax(const Columns& columns, const double* u, double* y) {
    Vec total{};
    for (std::size_t b = 0; b < columns.blocks; ++b) {
      const Vec E = exp(load(u + b * W)) * counted(columns, b);
      store(y + b * W, E);
      total += E;
    }
    const double all = sum(total);
    for (std::size_t b = 0; b < columns.blocks; ++b) store(y + b * W, load(y + b * W) / all);
    return all;
  }
};

}  // namespace ICNNRT_INSTRUCTION_SET
}  // namespace icnnrt
