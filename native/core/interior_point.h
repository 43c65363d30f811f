// The predictor-corrector interior point method on (λ, w, t) with logits u: slower than Newton's method, and sure.
#pragma once

#include "workspace.h"

namespace icnnrt {
namespace ICNNRT_INSTRUCTION_SET {

// The constants of icnnrt/mathematics/cut_model.py, which gives their reasons.
inline constexpr double kLamFloor = kEps * kEps;
inline constexpr double kSlackFloor = 1e-3 * kEps;
inline constexpr double kToBoundary = 0.99;
inline constexpr double kNearlyEnough = 1e3;
inline constexpr std::size_t kLengths = 3;
inline constexpr double kBacktrack[kLengths] = {0.25, 0.5, 1.0};
inline constexpr double kReluctance[kLengths] = {2.0, 2.0, 1.0};

// out = P r with P = A^-1 - A^-1 1 1'A^-1 / 1'A^-1 1, which does not see a constant in r. ws.ones is A^-1 1.
ICNNRT_INLINE void project(Workspace& ws, std::size_t k, double ones_total, const double* r, double* out) {
  double total = 0.0;
  for (std::size_t i = 0; i < k; ++i) out[i] = r[i];
  for (std::size_t i = k; i < ws.ld; ++i) out[i] = 0.0;
  solve(ws.A, k, ws.ld, ws.inverse, out);
  for (std::size_t i = 0; i < k; ++i) total += out[i];
  for (std::size_t i = 0; i < k; ++i) out[i] -= ws.ones[i] * (total / ones_total);
}

// From ws.lam > 0, at which ws.point stands, until the gap is `enough` or the steps are used up. ws.best and best_gap
// keep the best λ met. Logits start within ±`bound`.
//
// Steps are relative, η = dλ/λ and -ζ = dw/w, and complementarity is in units of λ∘w. Then λ∘dw + w∘dλ = r_c reads
// -ζ + η = r_c/(λ∘w), and the step to the boundary is 1 / max(-η, ζ).
template <typename Domain, typename U>
static void interior_point(const Model<Domain, U>& cuts, Workspace& ws, double bound, double enough, std::size_t& steps,
                           double& best_gap) {
  const std::size_t k = cuts.k;
  const Columns& columns = cuts.columns;
  double *const w = ws.w, *const r = ws.r, *const eta = ws.eta, *const m = ws.m, *const d_lam = ws.direction;

  const double slack_floor = min(kSlackFloor, 5e-4 * enough);  // the former, but where a domain has no unit
  for (std::size_t i = 0; i < k; ++i) ws.rows[i] = i;
  Domain::start_logits(columns, ws.point.s, bound, ws.u, ws.u_coefficient);
  times(cuts, ws.u_coefficient, w);  // v at y(u)
  double top = w[0], slack = 0.0;
  for (std::size_t i = 1; i < k; ++i) top = max(top, w[i]);
  for (std::size_t i = 0; i < k; ++i) slack += ws.lam[i] * (top - w[i]);
  for (std::size_t i = 0; i < k; ++i) w[i] = top - w[i] + (slack + 10.0 * kEps * (Domain::kUnit + __builtin_fabs(top)));

  for (; steps > 0 && best_gap > enough && ws.point.gap == ws.point.gap; --steps) {
    double* const lam = ws.lam;
    double mu = 0.0, ones_total = 0.0;
    for (std::size_t i = 0; i < k; ++i) mu += lam[i] * w[i];
    // Done by its own measure, λ'w, and within what Newton's method mends at once: rounding holds up the rest.
    if (mu <= 0.1 * enough && best_gap <= kNearlyEnough * enough) return;
    mu /= static_cast<double>(k);
    // r = v - G D r_u up to a constant, with r_u = u + G'λ; and A = G D G' + diag(w/λ)
    Domain::at_logits(columns, ws.u, ws.point.s, ws.other.D, ws.u_coefficient);
    times(cuts, ws.u_coefficient, r);
    for (std::size_t i = 0; i < k; ++i) ws.rows[i] = i;
    Domain::gram(cuts, ws.rows, k, ws.other.D, ws.centres, ws.A, ws.ld);
    top = r[0];
    for (std::size_t i = 1; i < k; ++i) top = max(top, r[i]);
    for (std::size_t i = 0; i < k; ++i) {
      for (std::size_t j = k; j < ws.ld; ++j) ws.A[i * ws.ld + j] = 0.0;
      ws.A[i * ws.ld + i] += w[i] / lam[i];
      ws.A[i * ws.ld + i] *= 1.0 + kSmallestPivot;
      r[i] -= top;
      ws.ones[i] = 1.0;
    }
    for (std::size_t i = k; i < ws.ld; ++i) ws.ones[i] = 0.0;
    factor(ws.A, k, ws.ld, ws.inverse);
    solve(ws.A, k, ws.ld, ws.inverse, ws.ones);
    for (std::size_t i = 0; i < k; ++i) ones_total += ws.ones[i];

    // predictor, r_c = -λ∘w:  dλ = P r,  ζ = 1 + η
    project(ws, k, ones_total, r, d_lam);
    double nearest = 1.0;
    for (std::size_t i = 0; i < k; ++i) {
      eta[i] = d_lam[i] / lam[i];
      nearest = max(nearest, max(-eta[i], 1.0 + eta[i]));
    }
    const double a = 1.0 / nearest;
    // (λ + a dλ)(w + a dw) = λ∘w∘((1 - a) - h) and a² dλ∘dw = -λ∘w∘h with h = aη(a + aη)
    double mean = 0.0;
    for (std::size_t i = 0; i < k; ++i) {
      const double a_eta = a * eta[i];
      m[i] = a_eta * (a + a_eta);
      mean += lam[i] * w[i] * m[i];
    }
    const double shrink = clip(1.0 - a - mean / static_cast<double>(k) / mu, 0.0, 1.0);
    const double sigma_c = shrink * shrink * shrink;

    // corrector, r_c = λ∘w∘(m - 1):  dλ = P(r + w∘m),  ζ = 1 + η - m
    for (std::size_t i = 0; i < k; ++i) {
      m[i] += sigma_c * mu / (lam[i] * w[i]);
      r[i] += w[i] * m[i];
    }
    project(ws, k, ones_total, r, d_lam);
    nearest = kToBoundary;
    for (std::size_t i = 0; i < k; ++i) {
      eta[i] = d_lam[i] / lam[i];
      nearest = max(nearest, max(-eta[i], 1.0 + eta[i] - m[i]));
    }
    const double longest = kToBoundary / nearest;

    // Plain predictor-corrector can cycle between two nearly parallel cuts, as v is not linear in the logits: three
    // step lengths, and a shorter one is taken when it leaves less than half the gap. The full step comes last, as it
    // is most often the one to go on with.
    auto try_length = [&](std::size_t length) {
      double total = 0.0;
      for (std::size_t i = 0; i < k; ++i) {
        ws.trial[i] = max(lam[i] + longest * kBacktrack[length] * d_lam[i], kLamFloor);
        total += ws.trial[i];
      }
      for (std::size_t i = 0; i < k; ++i) ws.trial[i] /= total;
      evaluate(cuts, ws.trial, ws.rows, ws.other);
      return ws.other.gap;
    };
    std::size_t chosen = kLengths - 1;
    double least = 0.0;
    for (std::size_t length = 0; length < kLengths; ++length) {
      const double gap = kReluctance[length] * try_length(length);
      if (length == 0 || gap <= least) {
        least = gap;
        chosen = length;
      }
    }
    if (chosen != kLengths - 1) try_length(chosen);
    const double alpha = longest * kBacktrack[chosen];

    // du = -(r_u + G'dλ), and α G'dλ = s - s_next
    Domain::move_logits(columns, ws.point.s, ws.other.s, alpha, ws.u);
    for (std::size_t i = 0; i < k; ++i) w[i] = max(w[i] * (1.0 - alpha * (1.0 + eta[i] - m[i])), slack_floor);
    const Point swapped = ws.point;
    ws.point = ws.other;
    ws.other = swapped;
    ws.lam = ws.trial;
    ws.trial = lam;
    if (ws.point.gap < best_gap) {
      best_gap = ws.point.gap;
      for (std::size_t i = 0; i < k; ++i) ws.best[i] = ws.lam[i];
    }
  }
}

}  // namespace ICNNRT_INSTRUCTION_SET
}  // namespace icnnrt
