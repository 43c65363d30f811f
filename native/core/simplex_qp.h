// A small concave quadratic programme over the simplex, by the primal active-set method.
#pragma once

#include "symmetric.h"

namespace icnnrt {
namespace ICNNRT_INSTRUCTION_SET {

struct SimplexQp {
  std::size_t m;
  const double* H;         // [m, ld] symmetric positive semidefinite
  std::size_t ld;          // a multiple of W
  double* gradient;        // [m] in: of the objective at z; out: at the solution
  double* z;               // [m] in: a point of the simplex; out: the solution
  std::size_t* free_rows;  // [m] in: `free_count` rows, all with z > 0 among them; out: the active set
  std::size_t free_count;
  double tolerance;  // gradients closer than this are equal
  // Scratch.
  double* A;        // [m, ld]
  double* inverse;  // [m]
  double* step;     // [ld]
  double* ones;     // [ld]
};

// p = the maximiser of g'p - ½ p'Hp over 1'p = 0, p = 0 outside the free rows. H is singular where cuts are duplicates:
// p may then be long, but it does not leave 1'p = 0, and the step to the boundary cuts it short. Returns the multiplier
// of 1'p = 0: what all free gradients become.
static double equality_step(SimplexQp& qp) {
  const std::size_t f = qp.free_count;
  double largest = 0.0, top = qp.gradient[qp.free_rows[0]];
  for (std::size_t a = 0; a < f; ++a) {
    const std::size_t i = qp.free_rows[a];
    largest = max(largest, qp.H[i * qp.ld + i]);
    top = max(top, qp.gradient[i]);
  }
  // A cut that y does not feel at all has H_ii = 0. Next to the largest it gets what rounding leaves of that, so that
  // the step towards or away from it is long but finite.
  const double ridge = 0x1p-60 * largest + 0x1p-900;
  for (std::size_t a = 0; a < f; ++a) {
    const double* H = qp.H + qp.free_rows[a] * qp.ld;
    double* A = qp.A + a * qp.ld;
    for (std::size_t b = 0; b < f; ++b) A[b] = H[qp.free_rows[b]];
    for (std::size_t b = f; b < padded(f); ++b) A[b] = 0.0;
    A[a] += kSmallestPivot * A[a] + ridge;
    qp.step[a] = qp.gradient[qp.free_rows[a]] - top;
    qp.ones[a] = 1.0;
  }
  for (std::size_t b = f; b < padded(f); ++b) qp.step[b] = qp.ones[b] = 0.0;
  factor(qp.A, f, qp.ld, qp.inverse);
  solve(qp.A, f, qp.ld, qp.inverse, qp.step);
  solve(qp.A, f, qp.ld, qp.inverse, qp.ones);
  double steps = 0.0, ones = 0.0;
  for (std::size_t a = 0; a < f; ++a) {
    steps += qp.step[a];
    ones += qp.ones[a];
  }
  const double level = steps / ones;
  for (std::size_t a = 0; a < f; ++a) qp.step[a] -= level * qp.ones[a];
  return top + level;
}

// Move z to the maximiser over the simplex. Ends after at most 3m + 10 changes of the active set, with z on the simplex
// in any case; whether that was enough shows in what it is used for.
static void solve_simplex_qp(SimplexQp& qp) {
  std::size_t entered = qp.m;  // the row that came last; m: none
  for (std::size_t change = 0; change < 3 * qp.m + 10; ++change) {
    double level = 0.0;
    double a = 1.0;
    std::size_t blocking = qp.m;
    if (qp.free_count > 1) {
      level = equality_step(qp);
      for (std::size_t t = 0; t < qp.free_count; ++t) {
        const double z = qp.z[qp.free_rows[t]];
        if (qp.step[t] < 0.0 && z < -a * qp.step[t]) {
          a = -z / qp.step[t];
          blocking = t;
        }
      }
      for (std::size_t t = 0; t < qp.free_count; ++t) {
        const double moved = a * qp.step[t];
        double& z = qp.z[qp.free_rows[t]];
        z = max(z + moved, 0.0);
        const double* H = qp.H + qp.free_rows[t] * qp.ld;
        for (std::size_t i = 0; i < qp.m; ++i) qp.gradient[i] -= H[i] * moved;
      }
    } else {
      level = qp.gradient[qp.free_rows[0]];
    }
    if (blocking < qp.m) {
      const std::size_t left = qp.free_rows[blocking];
      qp.z[left] = 0.0;
      qp.free_rows[blocking] = qp.free_rows[--qp.free_count];
      if (left == entered && a == 0.0) return;  // it would come in again for ever
      continue;
    }
    entered = qp.m;
    double most = level + qp.tolerance;
    for (std::size_t i = 0; i < qp.m; ++i) {
      bool free = false;
      for (std::size_t t = 0; t < qp.free_count; ++t) free = free || qp.free_rows[t] == i;
      if (!free && qp.gradient[i] > most) {
        most = qp.gradient[i];
        entered = i;
      }
    }
    if (entered == qp.m) return;
    qp.free_rows[qp.free_count++] = entered;
  }
}

}  // namespace ICNNRT_INSTRUCTION_SET
}  // namespace icnnrt
