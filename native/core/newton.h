// Newton's method on the dual, over the simplex: each step maximises the quadratic model of the dual exactly.
#pragma once

#include "simplex_qp.h"
#include "workspace.h"

namespace icnnrt {
namespace ICNNRT_INSTRUCTION_SET {

inline constexpr std::size_t kLineSearch = 5;  // step lengths tried
inline constexpr std::size_t kStalled = 3;     // steps that may fail to halve the gap: then interior points do better
// A logit that moved by less in the last step is right to the square of it, since Newton's method converges so.
inline constexpr double kFine = 1e-6;

ICNNRT_INLINE void keep_best(Workspace& ws, std::size_t k, double& best_gap) {
  if (!(ws.point.gap < best_gap)) return;
  best_gap = ws.point.gap;
  for (std::size_t i = 0; i < k; ++i) ws.best[i] = ws.lam[i];
}

// The model over the cuts that count: those in use, and those above the model's height.
template <typename Domain, typename U>
static SimplexQp quadratic_model(const Model<Domain, U>& cuts, Workspace& ws, bool cold, double tolerance) {
  const double height = ws.point.top - ws.point.gap;  // λ'v
  std::size_t m = 0, highest = 0;
  SimplexQp qp{};
  for (std::size_t i = 0; i < cuts.k; ++i) {
    if (!(ws.lam[i] > 0.0) && !(ws.point.v[i] > height)) continue;
    ws.gradient[m] = ws.point.v[i] - ws.point.top;
    ws.z[m] = ws.lam[i];
    if (ws.lam[i] > 0.0) ws.free_rows[qp.free_count++] = m;
    if (ws.gradient[m] > ws.gradient[highest]) highest = m;
    ws.candidates[m++] = i;
  }
  Domain::gram(cuts, ws.candidates, m, ws.point.D, ws.centres, ws.H, ws.ld);
  if (cold) {
    // λ = 1/k says nothing about the support: it is built up from the best single cut, not worn down from all.
    std::size_t best = 0;
    double best_value = 0.0;
    for (std::size_t i = 0; i < m; ++i) {
      double Hlam = 0.0;
      for (std::size_t j = 0; j < m; ++j) Hlam += ws.H[i * ws.ld + j] * ws.z[j];
      ws.gradient[i] += Hlam;
      const double value = ws.gradient[i] - 0.5 * ws.H[i * ws.ld + i];
      if (i == 0 || value > best_value) {
        best_value = value;
        best = i;
      }
    }
    for (std::size_t i = 0; i < m; ++i) {
      ws.gradient[i] -= ws.H[i * ws.ld + best];
      ws.z[i] = i == best ? 1.0 : 0.0;
    }
    ws.free_rows[0] = best;
    qp.free_count = 1;
  } else if (!(ws.z[highest] > 0.0)) {
    ws.free_rows[qp.free_count++] = highest;
  }
  qp.m = m;
  qp.H = ws.H;
  qp.ld = ws.ld;
  qp.gradient = ws.gradient;
  qp.z = ws.z;
  qp.free_rows = ws.free_rows;
  qp.tolerance = tolerance;
  qp.A = ws.A;
  qp.inverse = ws.inverse;
  qp.step = ws.step;
  qp.ones = ws.ones;
  return qp;
}

ICNNRT_INLINE double furthest(const Columns& columns, const double* a, const double* b) {
  Vec most{};
  for (std::size_t i = 0; i < columns.blocks; ++i) {
    const Vec distance = abs(load(a + i * W) - load(b + i * W));
    most = distance > most ? distance : most;
  }
  double result = 0.0;
  for (std::size_t i = 0; i < W; ++i) result = max(result, most[i]);
  return result;
}

// From ws.lam, at which ws.point stands, to a gap of at most `enough`; takes what it uses from `steps`. Returns whether
// it got there. In any case ws.lam is on the simplex and ws.point stands at it. The support of λ is exact: cuts that do
// not matter have λ = 0.
//
// Quadratic near the solution, so warm starts take one or two steps where interior points take seven; but far from it,
// where y saturates and the model is flat, it may not get on, and gives up early.
template <typename Domain, typename U>
static bool newton(const Model<Domain, U>& cuts, Workspace& ws, bool cold, double enough, std::size_t& steps,
                   double& best_gap) {
  std::size_t stalled = 0;
  bool solved = ws.point.gap <= enough;
  if (solved) return true;
  for (; steps > 0 && stalled < kStalled; --steps) {
    SimplexQp qp = quadratic_model(cuts, ws, cold, 0.25 * enough);
    cold = false;
    solve_simplex_qp(qp);

    for (std::size_t i = 0; i < cuts.k; ++i) ws.direction[i] = -ws.lam[i];
    for (std::size_t a = 0; a < qp.m; ++a) ws.direction[ws.candidates[a]] += qp.z[a];
    double slope = 0.0;
    for (std::size_t i = 0; i < cuts.k; ++i) slope += ws.direction[i] * (ws.point.v[i] - ws.point.top);
    if (!(slope > 0.0)) return solved;

    // The dual is concave along the step: stop where its slope is not yet down by more than half of what it was up.
    double a = 1.0;
    for (std::size_t trial = 1;; ++trial) {
      double total = 0.0;
      for (std::size_t i = 0; i < cuts.k; ++i) {
        ws.trial[i] = max(ws.lam[i] + a * ws.direction[i], 0.0);
        total += ws.trial[i];
      }
      if (a == 1.0) {  // without the rounding of λ + (z - λ), which would blur zeros
        total = 0.0;
        for (std::size_t i = 0; i < cuts.k; ++i) ws.trial[i] = 0.0;
        for (std::size_t c = 0; c < qp.m; ++c) total += ws.trial[ws.candidates[c]] = qp.z[c];
      }
      const double scale = 1.0 / total;
      for (std::size_t i = 0; i < cuts.k; ++i) ws.trial[i] *= scale;
      evaluate(cuts, ws.trial, ws.rows, ws.other);
      double slope_there = 0.0;
      for (std::size_t i = 0; i < cuts.k; ++i) slope_there += ws.direction[i] * (ws.other.v[i] - ws.other.top);
      if (slope_there >= -0.5 * slope || ws.other.gap <= enough) break;
      if (trial == kLineSearch) return solved;
      a *= clip(slope / (slope - slope_there), 0.1, 0.7);
    }

    const bool now = ws.other.gap <= enough;
    if (solved && !now) return true;  // a last step that rounding has spoilt
    stalled += !(ws.other.gap <= 0.5 * ws.point.gap);
    const bool fine = now && furthest(cuts.columns, ws.other.s, ws.point.s) <= kFine;
    const Point swapped = ws.point;
    ws.point = ws.other;
    ws.other = swapped;
    double* const lam = ws.lam;
    ws.lam = ws.trial;
    ws.trial = lam;
    keep_best(ws, cuts.k, best_gap);
    // The gap may be at rounding level while y is only right to its square root: one step more.
    if (fine || (now && solved)) {
      --steps;
      return true;
    }
    solved = now;
  }
  return solved;
}

}  // namespace ICNNRT_INSTRUCTION_SET
}  // namespace icnnrt
