#include "qp_plan.h"

namespace icnnrt {
namespace {

// Lists out of the numbers, one after the other.
struct Lists {
  const std::int32_t* next;
  std::size_t left;

  bool take(std::size_t count, const std::int32_t*& list) {
    if (count > left) return false;
    list = next;
    next += count;
    left -= count;
    return true;
  }
};

// Whether starts [count + 1] go up from 0 to `entries`, and the numbers of each row ascend below `limit`. Those of row
// i are at least i + `beyond` where that is not negative, and below i where it is -2.
bool ascends(const std::int32_t* starts, const std::int32_t* numbers, std::size_t count, std::size_t entries,
             std::size_t limit, int beyond) {
  if (starts[0] != 0 || static_cast<std::size_t>(starts[count]) != entries) return false;
  for (std::size_t i = 0; i < count; ++i) {
    if (starts[i] > starts[i + 1] || static_cast<std::size_t>(starts[i + 1]) > entries) return false;
    std::int64_t least = beyond >= 0 ? static_cast<std::int64_t>(i) + beyond : 0;
    const auto most = static_cast<std::int64_t>(beyond == -2 ? i : limit);
    for (std::int32_t at = starts[i]; at < starts[i + 1]; ++at) {
      if (numbers[at] < least || numbers[at] >= most) return false;
      least = std::int64_t{numbers[at]} + 1;
    }
  }
  return true;
}

// Whether the column of L has this row.
bool has(const QpPlan& plan, std::int32_t column, std::int32_t row) {
  std::int32_t low = plan.starts[column], high = plan.starts[column + 1];
  while (low < high) {
    const std::int32_t middle = low + (high - low) / 2;
    if (plan.rows[middle] == row) return true;
    if (plan.rows[middle] < row) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return false;
}

// Whether L has each of these entries where its slot says; row i of the matrix is row first + i of the system.
bool slotted(const QpPlan& plan, const QpPatternRows& matrix, std::size_t count, std::size_t first) {
  for (std::size_t i = 0; i < count; ++i)
    for (std::int32_t at = matrix.starts[i]; at < matrix.starts[i + 1]; ++at) {
      const std::int32_t one = plan.place[first + i], other = plan.place[matrix.columns[at]], slot = matrix.slot[at];
      const std::int32_t column = one < other ? one : other, row = one < other ? other : one;
      if (slot < plan.starts[column] || slot >= plan.starts[column + 1] || plan.rows[slot] != row) return false;
    }
  return true;
}

}  // namespace

const char* read_plan(const std::int32_t* numbers, std::size_t count, std::size_t n, std::size_t m, std::size_t q,
                      QpPlan& plan) noexcept {
  if (count < kPlanHead || numbers[0] != kPlanVersion) return "a plan of this version";
  for (std::size_t i = 1; i < kPlanHead; ++i)
    if (numbers[i] < 0) return "numbers of rows and entries";
  const auto number = [&](std::size_t i) { return static_cast<std::size_t>(numbers[i]); };
  if (number(1) != n || number(2) != m || number(3) != q) return "a plan for as many variables, rows and equalities";
  plan = {n, m, q, n + m + q, {}, {}, {}, nullptr, nullptr, nullptr, nullptr, number(7), 0.0};
  plan.Q.entries = number(4);
  plan.G.entries = number(5);
  plan.A.entries = number(6);
  const std::size_t N = plan.N;
  Lists lists{numbers + kPlanHead, count - kPlanHead};
  const bool whole = lists.take(n + 1, plan.Q.starts) && lists.take(plan.Q.entries, plan.Q.columns) &&
                     lists.take(m + 1, plan.G.starts) && lists.take(plan.G.entries, plan.G.columns) &&
                     lists.take(q + 1, plan.A.starts) && lists.take(plan.A.entries, plan.A.columns) &&
                     lists.take(N, plan.place) && lists.take(N, plan.order) && lists.take(N + 1, plan.starts) &&
                     lists.take(plan.entries, plan.rows) && lists.take(plan.Q.entries, plan.Q.slot) &&
                     lists.take(plan.G.entries, plan.G.slot) && lists.take(plan.A.entries, plan.A.slot);
  if (!whole || lists.left != 0) return "as many numbers as its head says";
  if (!ascends(plan.Q.starts, plan.Q.columns, n, plan.Q.entries, n, -2) ||
      !ascends(plan.G.starts, plan.G.columns, m, plan.G.entries, n, -1) ||
      !ascends(plan.A.starts, plan.A.columns, q, plan.A.entries, n, -1))
    return "rows of Q, G and A whose columns ascend, of Q below the diagonal";
  for (std::size_t i = 0; i < N; ++i) {
    if (plan.place[i] < 0 || static_cast<std::size_t>(plan.place[i]) >= N || plan.order[i] < 0 ||
        static_cast<std::size_t>(plan.order[i]) >= N)
      return "an order of all rows";
  }
  for (std::size_t i = 0; i < N; ++i)
    if (static_cast<std::size_t>(plan.order[plan.place[i]]) != i) return "an order of all rows";
  if (!ascends(plan.starts, plan.rows, N, plan.entries, N, 1))
    return "columns of L whose rows ascend below the diagonal";
  // What a column connects is in the column of the first of them.
  for (std::size_t j = 0; j < N; ++j) {
    const std::int32_t begin = plan.starts[j], end = plan.starts[j + 1];
    for (std::int32_t at = begin + 1; at < end; ++at)
      if (!has(plan, plan.rows[begin], plan.rows[at])) return "a factor with all its entries";
    const auto below = static_cast<double>(end - begin);
    plan.work += 0.5 * below * (below + 3.0);
  }
  if (!slotted(plan, plan.Q, n, 0) || !slotted(plan, plan.G, m, n + q) || !slotted(plan, plan.A, q, n))
    return "slots of the entries of Q, G and A in the factor";
  return nullptr;
}

}  // namespace icnnrt
