// What multipliers λ imply: the primal point, the cut values, and the certificate.
#pragma once

#include "dense.h"

namespace icnnrt {
namespace ICNNRT_INSTRUCTION_SET {

// The cuts of one sample in a domain: `Entropy`, `Simplex` or `Quadratic`, each in a file of its own, with
//   Size, reach        how far v may be from e, from the sizes of the rows; kUnit, the size of R(y) beside it
//   conjugate          y, c and D at λ; returns R*(s) = max over y of s'(y - centre) - R(y)
//   gram               G D G' over some rows
//   minus_D_times      -D a
//   start_logits, at_logits, move_logits     of the interior points, which know y(λ) and D as functions of the logits u
template <typename Domain, typename U>
struct Model : Cuts<U> {};

struct Point {
  double* s;    // [blocks, W] -G'λ, up to a constant where y(λ) does not see one
  double* y;    // [blocks, W] y(λ)
  double* c;    // [blocks, W] y - centre; zero where lanes overlap
  double* D;    // [blocks, W] what D is made of; zero where lanes overlap
  double* v;    // [k] e + G(y - centre)
  double top;   // max v
  double gap;   // max v - λ'v: the duality gap; NaN if any cut is NaN or infinite
  double dual;  // e'λ - R*(s)
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

// Fill `point` for λ; with a size, also that of every cut. `rows` is scratch, [k + 1].
template <typename Size, typename Domain, typename U>
static void evaluate(const Model<Domain, U>& cuts, const double* lam, std::size_t* rows, Point& point, double* sizes) {
  const std::size_t m = support(lam, cuts.k, rows);
  const double conjugate = Domain::conjugate(cuts, rows, m, lam, point);
  times_and_sizes<Size>(cuts, point.c, point.v, sizes);
  double top = point.v[0], mean = 0.0, offset = 0.0;
  for (std::size_t i = 0; i < cuts.k; ++i) {
    top = max(top, point.v[i]);
    mean += lam[i] * point.v[i];  // over all cuts, so that one NaN is enough
    offset += lam[i] * cuts.e[i];
  }
  point.top = top;
  point.gap = top - mean;
  point.dual = offset - conjugate;
}

template <typename Domain, typename U>
static void evaluate(const Model<Domain, U>& cuts, const double* lam, std::size_t* rows, Point& point) {
  evaluate<NoSize>(cuts, lam, rows, point, nullptr);
}

}  // namespace ICNNRT_INSTRUCTION_SET
}  // namespace icnnrt
