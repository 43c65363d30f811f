// The same mathematics once more in long double, slowly and by another method: what the kernels are compared with.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <vector>

#include "cuts.h"

namespace icnnrt_tests {

inline Real sigmoid(Real s) {
  const Real e = std::exp(-std::fabs(s));
  return (s >= 0 ? 1.0L : e) / (1.0L + e);
}

// What multipliers lam imply. They need not sum to 1, as rounding to float leaves them.
struct Evaluation {
  std::vector<Real> s, y, D, v;  // D: its diagonal, but y on the simplex, where D = diag(y) - yy'
  Real dual;                     // e'lam - R*(s), the lower bound; R*(s) = sum(|s|/2 + log(1 + e^-|s|)) in the box
  Real gap;                      // sum lam_i (max v - v_i) >= 0
};

template <typename T>
Evaluation evaluate(const Cuts<T>& cuts, const std::vector<Real>& lam) {
  Evaluation at{std::vector<Real>(cuts.n),
                std::vector<Real>(cuts.n),
                std::vector<Real>(cuts.n),
                std::vector<Real>(cuts.k),
                0.0L,
                0.0L};
  for (std::size_t i = 0; i < cuts.k; ++i)
    for (std::size_t j = 0; j < cuts.n; ++j) at.s[j] -= lam[i] * static_cast<Real>(cuts.slope(i, j));
  const Real top = *std::max_element(at.s.begin(), at.s.end());
  Real total = 0.0L;
  for (Real s : at.s) total += std::exp(s - top);
  for (std::size_t j = 0; j < cuts.n; ++j) {
    if (cuts.domain == Domain::kEntropy) {
      at.y[j] = sigmoid(at.s[j]);
      at.D[j] = at.y[j] * sigmoid(-at.s[j]);
      at.dual -= 0.5L * std::fabs(at.s[j]) + std::log1p(std::exp(-std::fabs(at.s[j])));
    } else if (cuts.domain == Domain::kSimplex) {
      at.y[j] = at.D[j] = std::exp(at.s[j] - top) / total;
      at.dual += ((at.s[j] - top) - std::log(total)) / static_cast<Real>(cuts.n);
    } else {
      at.y[j] = at.s[j];
      at.D[j] = 1.0L;
      at.dual -= 0.5L * at.s[j] * at.s[j];
    }
  }
  for (std::size_t i = 0; i < cuts.k; ++i) {
    at.v[i] = static_cast<Real>(cuts.offsets[i]);
    for (std::size_t j = 0; j < cuts.n; ++j) at.v[i] += static_cast<Real>(cuts.slope(i, j)) * (at.y[j] - cuts.centre());
    at.dual += lam[i] * static_cast<Real>(cuts.offsets[i]);
  }
  const Real highest = *std::max_element(at.v.begin(), at.v.end());
  for (std::size_t i = 0; i < cuts.k; ++i) at.gap += lam[i] * (highest - at.v[i]);
  return at;
}

// D a
template <typename T>
std::vector<Real> D_times(const Cuts<T>& cuts, const std::vector<Real>& D, const std::vector<Real>& a) {
  Real mean = 0.0L;
  std::vector<Real> product(cuts.n);
  if (cuts.domain == Domain::kSimplex) {
    Real total = 0.0L;
    for (Real y : D) total += y;
    for (std::size_t j = 0; j < cuts.n; ++j) mean += D[j] / total * a[j];
  }
  for (std::size_t j = 0; j < cuts.n; ++j) product[j] = D[j] * (a[j] - mean);
  return product;
}

// G D G', row-major [k, k].
template <typename T>
std::vector<Real> gram(const Cuts<T>& cuts, const std::vector<Real>& D) {
  std::vector<Real> GDG(cuts.k * cuts.k), mean(cuts.k, 0.0L);
  if (cuts.domain == Domain::kSimplex)
    for (std::size_t i = 0; i < cuts.k; ++i)
      for (std::size_t j = 0; j < cuts.n; ++j) mean[i] += D[j] * static_cast<Real>(cuts.slope(i, j));
  for (std::size_t i = 0; i < cuts.k; ++i)
    for (std::size_t l = 0; l <= i; ++l) {
      Real sum = 0.0L;
      for (std::size_t j = 0; j < cuts.n; ++j)
        sum += (static_cast<Real>(cuts.slope(i, j)) - mean[i]) * D[j] * (static_cast<Real>(cuts.slope(l, j)) - mean[l]);
      GDG[i * cuts.k + l] = GDG[l * cuts.k + i] = sum;
    }
  return GDG;
}

// A^-1 b by elimination with pivoting.
inline std::vector<Real> solve_linear(std::vector<Real> A, std::vector<Real> b) {
  const std::size_t size = b.size();
  for (std::size_t c = 0; c < size; ++c) {
    std::size_t pivot = c;
    for (std::size_t r = c + 1; r < size; ++r)
      if (std::fabs(A[r * size + c]) > std::fabs(A[pivot * size + c])) pivot = r;
    for (std::size_t l = 0; l < size; ++l) std::swap(A[c * size + l], A[pivot * size + l]);
    std::swap(b[c], b[pivot]);
    for (std::size_t r = c + 1; r < size; ++r) {
      const Real factor = A[r * size + c] / A[c * size + c];
      for (std::size_t l = c; l < size; ++l) A[r * size + l] -= factor * A[c * size + l];
      b[r] -= factor * b[c];
    }
  }
  for (std::size_t c = size; c-- > 0;) {
    for (std::size_t l = c + 1; l < size; ++l) b[c] -= A[c * size + l] * b[l];
    b[c] /= A[c * size + c];
  }
  return b;
}

// The solution by a barrier in the dual: minimise -dual(lam) - mu sum log lam_i on the simplex by Newton's method, for
// mu falling to nothing. The minimum for mu has the gap k mu. Nothing is shared with the kernels' method but
// `evaluate`: neither slacks, nor logits of their own, nor predictor and corrector.
//
// In relative steps x = dlam / lam, with L = diag(lam), the gradient of the dual being v:
//     (L G D G' L + mu I) x = L v + mu 1 - nu lam,   lam'x = 0.
struct ReferenceSolution {
  std::vector<Real> lam;
  Evaluation at;
  int newton_steps;
};

template <typename T>
ReferenceSolution reference_solution(const Cuts<T>& cuts) {
  const std::size_t k = cuts.k;
  ReferenceSolution solution{std::vector<Real>(k, 1.0L / static_cast<Real>(k)), {}, 0};
  std::vector<Real>& lam = solution.lam;
  const Real size = static_cast<Real>(size_of_values(cuts));
  const Real last = 4.0L * std::numeric_limits<Real>::epsilon() * size;
  Real mu = size;
  solution.at = evaluate(cuts, lam);
  for (bool done = false; !done && solution.newton_steps < 20000;) {
    done = mu <= last;
    for (int step = 0; step < 500; ++step) {
      ++solution.newton_steps;
      const Evaluation& at = solution.at;
      // The bordered system, so that nothing is assumed about its rank: mu I keeps it regular, duplicates or not.
      std::vector<Real> A((k + 1) * (k + 1)), b(k + 1);
      const std::vector<Real> GDG = gram(cuts, at.D);
      Real mean_v = 0.0L;  // taken from v, as nu would take it: less to cancel
      for (std::size_t i = 0; i < k; ++i) mean_v += lam[i] * at.v[i];
      for (std::size_t i = 0; i < k; ++i) {
        for (std::size_t l = 0; l < k; ++l) A[i * (k + 1) + l] = lam[i] * GDG[i * k + l] * lam[l];
        A[i * (k + 1) + i] += mu;
        A[i * (k + 1) + k] = A[k * (k + 1) + i] = lam[i];
        b[i] = lam[i] * (at.v[i] - mean_v) + mu;
      }
      const std::vector<Real> x = solve_linear(A, b);
      Real largest = 0.0L, most_negative = 0.0L, slope = 0.0L;
      for (std::size_t i = 0; i < k; ++i) {
        largest = std::fmax(largest, std::fabs(x[i]));
        most_negative = std::fmin(most_negative, x[i]);
        slope -= x[i] * b[i];  // of the objective along x, nu aside, which lam'x = 0 removes
      }
      // Along the line the objective is convex: a step is too long where it has begun to rise steeply.
      Real length = std::fmin(1.0L, -0.9L / std::fmin(most_negative, -1e-30L));
      std::vector<Real> trial(k);
      Evaluation trial_at;
      for (int halvings = 0; halvings < 60; ++halvings, length *= 0.5L) {
        Real total = 0.0L, trial_slope = 0.0L;
        for (std::size_t i = 0; i < k; ++i) total += trial[i] = lam[i] * (1.0L + length * x[i]);
        for (std::size_t i = 0; i < k; ++i) trial[i] /= total;
        trial_at = evaluate(cuts, trial);
        for (std::size_t i = 0; i < k; ++i)
          trial_slope -= x[i] * (lam[i] * (trial_at.v[i] - mean_v) + mu / (1.0L + length * x[i]));
        if (trial_slope <= 0.3L * std::fabs(slope) || largest < 1e-6L) break;
      }
      lam = trial;
      solution.at = trial_at;
      if (largest < (done ? 1e-9L : 0.1L)) break;
    }
    mu *= 0.1L;
  }
  return solution;
}

// Proposition 3 on known active cuts, straight from its linear system with y eliminated:
//     [G D G'  1] [c_lam]   [-G D y_bar]
//     [1'      0] [ tau ] = [     0    ],   c_y = -D (y_bar + G'c_lam),   c_lam = 0 off the support.
struct AdjointSolution {
  std::vector<Real> c_y, c_lam;
};

template <typename T>
AdjointSolution reference_adjoint(const Cuts<T>& cuts, const std::vector<std::size_t>& support,
                                  const std::vector<Real>& D, const std::vector<Real>& y_bar) {
  const std::size_t m = support.size();
  const std::vector<Real> GDG = gram(cuts, D), D_y_bar = D_times(cuts, D, y_bar);
  std::vector<Real> A((m + 1) * (m + 1)), b(m + 1);
  for (std::size_t a = 0; a < m; ++a) {
    for (std::size_t c = 0; c < m; ++c) A[a * (m + 1) + c] = GDG[support[a] * cuts.k + support[c]];
    A[a * (m + 1) + m] = A[m * (m + 1) + a] = 1.0L;
    for (std::size_t j = 0; j < cuts.n; ++j) b[a] -= static_cast<Real>(cuts.slope(support[a], j)) * D_y_bar[j];
  }
  const std::vector<Real> x = solve_linear(A, b);
  AdjointSolution solution{std::vector<Real>(cuts.n), std::vector<Real>(cuts.k, 0.0L)};
  for (std::size_t a = 0; a < m; ++a) solution.c_lam[support[a]] = x[a];
  std::vector<Real> sum = y_bar;
  for (std::size_t j = 0; j < cuts.n; ++j)
    for (std::size_t a = 0; a < m; ++a) sum[j] += static_cast<Real>(cuts.slope(support[a], j)) * x[a];
  solution.c_y = D_times(cuts, D, sum);
  for (Real& c : solution.c_y) c = -c;
  return solution;
}

}  // namespace icnnrt_tests
