// LDL' of small symmetric positive semidefinite matrices.
#pragma once

#include "lanes.h"

namespace icnnrt {
namespace ICNNRT_INSTRUCTION_SET {

// Duplicate cuts make a Gram matrix singular up to rounding. A pivot below this part of its diagonal entry is rounding
// alone, and so is what is left of its row: the one is raised to it and the other dropped. If the row stayed, a few
// such pivots in succession would square their quotients into infinity.
inline constexpr double kSmallestPivot = 4.0 * kEps;

// A = U' diag(1/inverse) U with unit upper triangular U, in place: row j of A [m, ld] becomes row j of U from column j
// on. A scaling of A's rows and columns alike changes nothing but exponents. ld is a multiple of W and the entries
// beyond column m are zero; what lies below the diagonal is lost.
static void factor(double* A, std::size_t m, std::size_t ld, double* inverse) {
  for (std::size_t j = 0; j < m; ++j) inverse[j] = kSmallestPivot * A[j * ld + j];
  for (std::size_t j = 0; j < m; ++j) {
    double* row = A + j * ld;
    const double smallest = inverse[j];
    const bool lost = !(row[j] > smallest);
    inverse[j] = 1.0 / max(lost ? smallest : row[j], 0x1p-1000);
    if (lost) {
      for (std::size_t i = j; i < m; ++i) row[i] = 0.0;
      continue;
    }
    for (std::size_t i = j + 1; i < m; ++i) {
      const double l = row[i] * inverse[j];
      double* other = A + i * ld;
      for (std::size_t c = i / W * W; c < m; c += W) store(other + c, load(other + c) - load(row + c) * l);
    }
    for (std::size_t c = j / W * W; c < m; c += W) store(row + c, load(row + c) * inverse[j]);
  }
}

// b = A^-1 b by the factors; b has room for a multiple of W, and is finite there.
static void solve(const double* U, std::size_t m, std::size_t ld, const double* inverse, double* b) {
  for (std::size_t j = 0; j + 1 < m; ++j) {
    const double* row = U + j * ld;
    const double x = b[j];
    const std::size_t first = (j + 1) / W * W;
    // The block that holds j + 1 may hold earlier entries too: those are done.
    for (std::size_t i = j + 1; i < m && i < first + W; ++i) b[i] -= row[i] * x;
    for (std::size_t c = first + W; c < m; c += W) store(b + c, load(b + c) - load(row + c) * x);
  }
  for (std::size_t j = m; j-- > 0;) {
    const double* row = U + j * ld;
    double x = b[j] * inverse[j];
    const std::size_t first = (j + 1) / W * W;
    for (std::size_t i = j + 1; i < m && i < first + W; ++i) x -= row[i] * b[i];
    Vec rest{};
    for (std::size_t c = first + W; c < m; c += W) rest += load(row + c) * load(b + c);
    b[j] = x - sum(rest);
  }
}

}  // namespace ICNNRT_INSTRUCTION_SET
}  // namespace icnnrt
