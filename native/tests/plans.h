// Plans of sparse quadratic programs, made by eliminating rows of a whole matrix in any order.
#pragma once

#include <numeric>

#include "programs.h"

namespace icnnrt_tests {

// The program with most of its entries off the diagonal at 0; those of its answer's right-hand sides stay, so it is
// another problem, which has an answer if it has a box.
template <typename T>
void thin_out(Program<T>& program, Random& random, std::size_t one_of) {
  const std::size_t n = program.n;
  for (std::size_t i = 0; i < n; ++i)
    for (std::size_t j = 0; j < i; ++j)
      if (random.below(one_of)) program.Q[i * n + j] = program.Q[j * n + i] = T{0};
  const auto thin = [&](std::vector<T>& rows, std::size_t count) {
    for (std::size_t i = 0; i < count; ++i)
      for (std::size_t j = 0; j < n; ++j)
        if (j != i % n && random.below(one_of)) rows[i * n + j] = T{0};
  };
  thin(program.G, program.m);
  thin(program.A, program.q);
  for (std::size_t i = 0; i < program.m; ++i) {
    double r = 0.0;
    for (std::size_t j = 0; j < n; ++j) r += static_cast<double>(program.G[i * n + j]) * program.z[j];
    program.h[i] = static_cast<T>(r + 0.5);
    if (!program.h_lower.empty()) program.h_lower[i] = static_cast<T>(r - 0.5);
  }
  for (std::size_t i = 0; i < program.q; ++i) {
    double Az = 0.0;
    for (std::size_t j = 0; j < n; ++j) Az += static_cast<double>(program.A[i * n + j]) * program.z[j];
    program.b[i] = static_cast<T>(Az);
  }
}

// As qp_pattern.py lays it out; rows z, ν and λ are eliminated in a random order.
template <typename T>
std::vector<std::int32_t> plan_of(const Program<T>& program, Random& random) {
  const std::size_t n = program.n, m = program.m, q = program.q, N = n + m + q;
  std::vector<std::size_t> place(N), order(N);
  std::iota(order.begin(), order.end(), std::size_t{0});
  for (std::size_t i = N; i > 1; --i) std::swap(order[i - 1], order[random.below(i)]);
  for (std::size_t i = 0; i < N; ++i) place[order[i]] = i;
  std::vector<std::vector<char>> L(N, std::vector<char>(N, 0));  // L[column][row]
  struct Rows {
    std::vector<std::int32_t> starts{0}, columns;
    std::vector<std::size_t> at;  // of each entry the row of the system
  };
  const auto listed = [&](const std::vector<T>& M, std::size_t rows, std::size_t first, bool below) {
    Rows list;
    for (std::size_t i = 0; i < rows; ++i) {
      for (std::size_t j = 0; j < (below ? i : n); ++j)
        if (M[i * n + j] != T{0} || (below && M[j * n + i] != T{0})) {
          list.columns.push_back(static_cast<std::int32_t>(j));
          list.at.push_back(first + i);
          const std::size_t a = place[first + i], b = place[j];
          L[a < b ? a : b][a < b ? b : a] = 1;
        }
      list.starts.push_back(static_cast<std::int32_t>(list.columns.size()));
    }
    return list;
  };
  const Rows Q = listed(program.Q, n, 0, true), G = listed(program.G, m, n + q, false),
             A = listed(program.A, q, n, false);
  std::vector<std::int32_t> starts{0}, rows;
  std::vector<std::vector<std::int32_t>> slot(N, std::vector<std::int32_t>(N, 0));
  for (std::size_t j = 0; j < N; ++j) {
    for (std::size_t a = j + 1; a < N; ++a) {
      if (!L[j][a]) continue;
      for (std::size_t b = a + 1; b < N; ++b) L[a][b] = static_cast<char>(L[a][b] | L[j][b]);
      slot[j][a] = static_cast<std::int32_t>(rows.size());
      rows.push_back(static_cast<std::int32_t>(a));
    }
    starts.push_back(static_cast<std::int32_t>(rows.size()));
  }
  std::vector<std::int32_t> plan{icnnrt::kPlanVersion};
  for (const std::size_t number : {n, m, q, Q.columns.size(), G.columns.size(), A.columns.size(), rows.size()})
    plan.push_back(static_cast<std::int32_t>(number));
  const auto add = [&](const auto& list) {
    for (const auto number : list) plan.push_back(static_cast<std::int32_t>(number));
  };
  for (const Rows* list : {&Q, &G, &A}) {
    add(list->starts);
    add(list->columns);
  }
  add(place);
  add(order);
  add(starts);
  add(rows);
  for (const Rows* list : {&Q, &G, &A})
    for (std::size_t i = 0; i < list->columns.size(); ++i) {
      const std::size_t a = place[list->at[i]], b = place[static_cast<std::size_t>(list->columns[i])];
      plan.push_back(slot[a < b ? a : b][a < b ? b : a]);
    }
  return plan;
}

}  // namespace icnnrt_tests
