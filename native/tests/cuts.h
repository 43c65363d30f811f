// Problems to solve: cuts drawn at random, and cuts built backwards from a solution that is chosen first.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/kernels.h"

namespace icnnrt_tests {

using icnnrt::Domain;

// 64-bit on every x86 and 128-bit on aarch64: enough to tell what double lost.
using Real = long double;

// splitmix64, and what is drawn from it by arithmetic alone: the same numbers on every platform.
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}

  std::uint64_t bits() {
    std::uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  double uniform() { return static_cast<double>(bits() >> 11) * 0x1p-53; }
  double uniform(double low, double high) { return low + (high - low) * uniform(); }
  std::size_t below(std::size_t bound) { return static_cast<std::size_t>(bits() % bound); }
  // Twelve uniform numbers have variance 1, and their sum is as good as normal.
  double normal() {
    double sum = -6.0;
    for (int i = 0; i < 12; ++i) sum += uniform();
    return sum;
  }

 private:
  std::uint64_t state_;
};

// k cuts in n dimensions: slopes G [k, n] and offsets e [k] at the centre of a domain.
template <typename T>
struct Cuts {
  std::size_t k;
  std::size_t n;
  std::vector<T> slopes;
  std::vector<T> offsets;
  Domain domain;

  Cuts(std::size_t cuts, std::size_t dimensions, Domain where = Domain::kEntropy)
      : k(cuts), n(dimensions), slopes(cuts * dimensions), offsets(cuts), domain(where) {}

  // Of the domain, in every column.
  Real centre() const {
    return domain == Domain::kEntropy ? 0.5L : domain == Domain::kSimplex ? 1.0L / static_cast<Real>(n) : 0.0L;
  }

  T& slope(std::size_t i, std::size_t j) { return slopes[i * n + j]; }
  T slope(std::size_t i, std::size_t j) const { return slopes[i * n + j]; }

  void copy_cut(std::size_t from, std::size_t to) {
    for (std::size_t j = 0; j < n; ++j) slope(to, j) = slope(from, j);
    offsets[to] = offsets[from];
  }
};

// How large values of the cuts get anywhere in the domain, or, where it has no end, anywhere that y(lam) lies: what
// rounding errors of v are relative to.
template <typename T>
double size_of_values(const Cuts<T>& cuts) {
  double size = 0.0;
  for (std::size_t i = 0; i < cuts.k; ++i) {
    double largest = std::fabs(static_cast<double>(cuts.offsets[i]));
    double steepest = 0.0, squares = 0.0;
    for (std::size_t j = 0; j < cuts.n; ++j) {
      const double g = std::fabs(static_cast<double>(cuts.slope(i, j)));
      if (cuts.domain == Domain::kEntropy) largest += 0.5 * g;
      steepest = std::fmax(steepest, g);
      squares += g * g;
    }
    if (cuts.domain == Domain::kSimplex) largest += 2.0 * steepest;
    if (cuts.domain == Domain::kQuadratic) largest += squares;
    if (!(largest <= size)) size = largest;
  }
  return 1.0 + size;
}

// Cuts that compete: v differs from cut to cut by about as much as y can change it. Entries of the slopes are about
// `scale` at n = 9 and fall as the root of n.
template <typename T>
Cuts<T> random_cuts(Random& random, std::size_t k, std::size_t n, double scale, Domain domain = Domain::kEntropy) {
  Cuts<T> cuts(k, n, domain);
  const double slope_scale = 3.0 * scale / std::sqrt(static_cast<double>(n));
  for (T& g : cuts.slopes) g = static_cast<T>(slope_scale * random.normal());
  for (T& e : cuts.offsets) e = static_cast<T>(0.3 * scale * random.normal());
  return cuts;
}

// y = y(s), and R(y).
struct LinkValues {
  std::vector<Real> y;
  Real regulariser;
};

inline LinkValues link_of(Domain domain, const std::vector<Real>& s) {
  LinkValues link{std::vector<Real>(s.size()), 0.0L};
  Real top = s[0], total = 0.0L;
  for (Real one : s) top = std::fmax(top, one);
  for (Real one : s) total += std::exp(one - top);
  for (std::size_t j = 0; j < s.size(); ++j) {
    Real& y = link.y[j];
    if (domain == Domain::kEntropy) {
      const Real e = std::exp(-std::fabs(s[j]));
      y = (s[j] >= 0 ? 1.0L : e) / (1.0L + e);
      // y log y + (1-y) log(1-y) = y s - log(1 + e^s)
      link.regulariser += y * s[j] - (std::fmax(s[j], 0.0L) + std::log1p(e));
    } else if (domain == Domain::kSimplex) {
      y = std::exp(s[j] - top) / total;
      link.regulariser += y * (s[j] - top - std::log(total));
    } else {
      y = s[j];
      link.regulariser += 0.5L * y * y;
    }
  }
  return link;
}

// Cuts whose optimum is known: the cuts of the support are equal at y(lam), all others lie below by a
// margin.
template <typename T>
struct Built {
  Cuts<T> cuts;
  std::vector<std::size_t> support;
  std::vector<Real> lam;
  std::vector<Real> y;
  Real value;            // of the model at y: dual and primal alike
  Real rounding = 0.0L;  // what rounding the offsets to T took from them, at most: the value is off by no more
};

// `support` cuts out of k carry lam; the entries of their slopes are about `scale`; all offsets lie around `height`.
template <typename T>
Built<T> build_backwards(Random& random, std::size_t k, std::size_t n, std::size_t support, double scale,
                         double height = 0.0, Domain domain = Domain::kEntropy) {
  Built<T> built{Cuts<T>(k, n, domain), {}, std::vector<Real>(k, 0.0L), std::vector<Real>(n), 0.0L};
  Cuts<T>& cuts = built.cuts;
  for (T& g : cuts.slopes) g = static_cast<T>(scale * random.normal());

  std::vector<std::size_t> order(k);
  for (std::size_t i = 0; i < k; ++i) order[i] = i;
  for (std::size_t i = k; i > 1; --i) {
    const std::size_t j = random.below(i);
    const std::size_t swapped = order[j];
    order[j] = order[i - 1];
    order[i - 1] = swapped;
  }
  built.support.assign(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(support));

  Real total = 0.0L;
  for (std::size_t i : built.support) total += built.lam[i] = static_cast<Real>(random.uniform(0.2, 1.0));
  for (std::size_t i : built.support) built.lam[i] /= total;

  const Real t = static_cast<Real>(height);  // the height at which the cuts of the support meet
  built.value = t;
  std::vector<Real> s(n, 0.0L);
  for (std::size_t j = 0; j < n; ++j)
    for (std::size_t i : built.support) s[j] -= built.lam[i] * static_cast<Real>(cuts.slope(i, j));
  const LinkValues link = link_of(domain, s);
  built.y = link.y;
  built.value += link.regulariser;
  for (std::size_t i = 0; i < k; ++i) {
    Real offset = t;
    for (std::size_t j = 0; j < n; ++j) offset -= static_cast<Real>(cuts.slope(i, j)) * (built.y[j] - cuts.centre());
    if (built.lam[i] == 0.0L) offset -= static_cast<Real>(scale * random.uniform(0.1, 1.0));
    cuts.offsets[i] = static_cast<T>(offset);
    built.rounding = std::fmax(built.rounding, std::fabs(static_cast<Real>(cuts.offsets[i]) - offset));
  }
  return built;
}

}  // namespace icnnrt_tests
