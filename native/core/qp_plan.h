// Where the matrices of quadratic programs may be other than 0, and the factor of the system that they make: read from
// numbers that anybody may have written, and found to lead nowhere outside.
#pragma once

#include <cstddef>
#include <cstdint>

namespace icnnrt {

inline constexpr std::int32_t kPlanVersion = 1;  // icnnrt/mathematics/qp_pattern.py has the same
inline constexpr std::size_t kPlanHead = 8;      // numbers before the lists

// Rows one after the other: the columns of row i, ascending, are columns[starts[i]] to columns[starts[i + 1]].
struct QpPatternRows {
  const std::int32_t* starts;
  const std::int32_t* columns;
  const std::int32_t* slot;  // of each entry among those of L
  std::size_t entries;
};

// With rows z, ν and λ, N = n + q + m of them, and P a permutation,
//     P [Q A' G'; A . .; G . .] P' + a diagonal = L D L'
// Of Q it has what is below the diagonal. L has ones on its diagonal, and below that the rows of column j, ascending,
// are rows[starts[j]] to rows[starts[j + 1]].
struct QpPlan {
  std::size_t n, m, q, N;
  QpPatternRows Q, G, A;
  const std::int32_t* place;   // [N] of each row
  const std::int32_t* order;   // [N] the row at each place
  const std::int32_t* starts;  // [N + 1]
  const std::int32_t* rows;
  std::size_t entries;  // of L
  double work;          // multiply-adds of a factorisation
};

// Null if `numbers` are a plan for these sizes, laid out as qp_pattern.py says; else what was expected of them. All
// that is read of a plan is within it, L has every entry that a factorisation makes, and no slot is another column's.
const char* read_plan(const std::int32_t* numbers, std::size_t count, std::size_t n, std::size_t m, std::size_t q,
                      QpPlan& plan) noexcept;

}  // namespace icnnrt
