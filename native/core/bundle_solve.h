// One solve of the k-cut model: Newton's method, and interior points where it does not get on.
#pragma once

#include "interior_point.h"
#include "newton.h"
#include "rows.h"

namespace icnnrt {
namespace ICNNRT_INSTRUCTION_SET {

// Multipliers below this are not worth a row of the Gram matrix: if such a cut matters, it comes back.
inline constexpr double kNegligible = 1e-9;

// Steps of Newton's method after the interior points: the support is known by then.
inline constexpr std::size_t kPolish = 3;

// λ with entries that are negligible set to zero, summing to 1; false if there is nothing left.
ICNNRT_INLINE bool pruned(const double* from, std::size_t k, double* lam) {
  double total = 0.0;
  for (std::size_t i = 0; i < k; ++i) {
    lam[i] = from[i] > kNegligible ? from[i] : 0.0;
    total += lam[i];
  }
  if (!(total > 0.0)) return false;
  for (std::size_t i = 0; i < k; ++i) lam[i] /= total;
  return true;
}

// Leaves ws.point standing at ws.lam, the best found. False if some cut is NaN or infinite.
template <typename Domain, typename U>
static bool solve_model(const Model<Domain, U>& cuts, Workspace& ws, const double* lam_start, std::size_t steps) {
  const std::size_t k = cuts.k;
  bool cold = lam_start == nullptr || !pruned(lam_start, k, ws.lam);
  if (cold)
    for (std::size_t i = 0; i < k; ++i) ws.lam[i] = 1.0 / static_cast<double>(k);
  evaluate<typename Domain::Size>(cuts, ws.lam, ws.rows, ws.point, ws.sizes);
  // What rounding may do to v, for any y there is.
  double enough = 0.0;
  for (std::size_t i = 0; i < k; ++i) {
    const double size = __builtin_fabs(cuts.e[i]) + Domain::reach(ws.sizes[i]);
    if (!(size <= 0x1p1000)) return false;
    enough = max(enough, size);
  }
  enough = 2.0 * kEps * (Domain::kUnit + enough);

  double best_gap = __builtin_inf();
  keep_best(ws, k, best_gap);
  if (newton(cuts, ws, cold, enough, steps, best_gap)) return true;
  keep_best(ws, k, best_gap);

  double total = 0.0;
  for (std::size_t i = 0; i < k; ++i) {
    const double start = cold ? 1.0 : max(lam_start[i], 0.0);
    total += ws.lam[i] = (cold ? 0.0 : 0.9 * start) + 0.1 / static_cast<double>(k);
  }
  for (std::size_t i = 0; i < k; ++i) ws.lam[i] /= total;
  evaluate(cuts, ws.lam, ws.rows, ws.point);
  keep_best(ws, k, best_gap);
  interior_point(cuts, ws, cold ? 2.0 : 4.0, enough, steps, best_gap);

  // From there Newton's method finds the exact support.
  if (steps > kPolish) steps = kPolish;
  if (pruned(ws.best, k, ws.lam)) {
    evaluate(cuts, ws.lam, ws.rows, ws.point);
    newton(cuts, ws, false, enough, steps, best_gap);
    if (ws.point.gap <= max(best_gap, enough)) return true;
  }
  for (std::size_t i = 0; i < k; ++i) ws.lam[i] = ws.best[i];
  evaluate(cuts, ws.lam, ws.rows, ws.point);
  return true;
}

template <typename Domain, typename T>
static void bundle_solve(const Sizes& sizes, const SolveArguments<T>& args, void* memory) noexcept {
  const std::size_t k = sizes.k, n = sizes.n;
  Workspace ws = lay_out(memory, k, n);
  for (std::size_t i = 0; i < k; ++i) ws.e[i] = static_cast<double>(args.offsets[i]);
  double* lam_start = nullptr;
  double start_size = 0.0;
  if (sizes.k_prev > 0) {
    lam_start = ws.start;
    for (std::size_t i = 0; i < k; ++i) {
      lam_start[i] = i < sizes.k_prev ? static_cast<double>(args.lam_start[i]) : 0.0;
      start_size += __builtin_fabs(lam_start[i]);
    }
  }
  bool finite = start_size <= 0x1p1000;
  if (finite && n < W) {
    finite = solve_model(Model<Domain, double>{short_cuts(sizes, args.slopes, ws)}, ws, lam_start, sizes.steps);
  } else if (finite) {
    finite = solve_model(Model<Domain, T>{{args.slopes, n, ws.e, k, columns(n)}}, ws, lam_start, sizes.steps);
  }
  if (!finite || !(ws.point.gap == ws.point.gap)) {
    for (std::size_t j = 0; j < n; ++j) args.y[j] = static_cast<T>(__builtin_nan(""));
    for (std::size_t i = 0; i < k; ++i) args.lam[i] = static_cast<T>(1.0 / static_cast<double>(k));
    *args.lower_bound = args.residual[0] = args.residual[2] = __builtin_nan("");
    args.residual[1] = 0.0;
    return;
  }
  double total = 0.0;
  for (std::size_t i = 0; i < k; ++i) {
    args.lam[i] = static_cast<T>(ws.lam[i]);
    total += ws.lam[i];
  }
  *args.lower_bound = ws.point.dual;
  args.residual[0] = write_columns(n, ws.point.y, args.y);
  args.residual[1] = __builtin_fabs(total - 1.0);
  args.residual[2] = ws.point.gap;
}

}  // namespace ICNNRT_INSTRUCTION_SET
}  // namespace icnnrt
