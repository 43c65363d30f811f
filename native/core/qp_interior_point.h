// Mehrotra's predictor-corrector method on all sides of a quadratic program at once.
#pragma once

#include "qp_newton.h"

namespace icnnrt {
namespace ICNNRT_INSTRUCTION_SET {

// The constants of icnnrt/mathematics/interior_point.py, and below them those of what is done beyond it.
inline constexpr double kEnough = 1e-12;  // relative KKT residual at which a sample stops
inline constexpr double kNearly = 1e-9;   // and at which it does after so many steps without progress
inline constexpr double kBeyond = 1e-3;   // of a looser tolerance, at which a sample stops
inline constexpr std::size_t kPatience = 3;
inline constexpr double kProgress = 0.7;
inline constexpr double kQpToBoundary = 0.995;
inline constexpr double kSmallest = 1e-20;  // of slacks and multipliers, so that their quotients stay finite
inline constexpr double kFirstRho = 1e-8, kLeastRho = 1e-12;
inline constexpr double kLeastDelta = 1e-10;
// Close to the solution and without progress: larger weights than 1 / δ would hide the curvature of what they leave
// free.
inline constexpr std::size_t kStuck = 2, kStuckRefinements = 3;
inline constexpr double kClose = 1e-6, kStuckDelta = 1e-7;
inline constexpr double kWarm = 1e-2;
inline constexpr std::size_t kAmendments = 3;  // of a polish
// Multipliers from which on a polish begins at 0: those of rows that depend on each other have run away, and what they
// leave of each other is rounding. It does not need them, as conditions are linear in them.
inline constexpr double kRunning = 1e5;
// The corrector is refined where rounding of the condensed system may tell: close to the solution, and in steps that
// only hard problems take.
inline constexpr double kRefined = 1e-4;
inline constexpr std::size_t kHardStep = 8;
inline constexpr double kGuess = 1e-1;    // relative KKT residual above which the active set is not guessed
inline constexpr double kClosely = 1e-4;  // below it residuals are measured as they are told
inline constexpr double kHard = 1e8;      // weight of an active constraint in units of the curvature of Q

// When the method ends.
struct Ends {
  std::size_t steps;
  std::int64_t deadline;  // 0: never
  double nearly;          // after kPatience steps without progress
  double enough;          // at once

  explicit Ends(const QpSizes& sizes, double tolerance = kNearly)
      : steps(sizes.steps),
        deadline(sizes.deadline),
        nearly(max(tolerance, kNearly)),
        enough(min(tolerance, max(kBeyond * tolerance, kEnough))) {}

  bool over() const { return __builtin_expect(deadline != 0, false) && qp_now() >= deadline; }
  // Whether an attempt that left so large a residual is not followed by another.
  bool at(double residual) const { return residual <= nearly || over(); }
};

// The scratch of one solve, beside the problem.
struct Iteration {
  double *x, *best_x, *polished, *dx, *r, *rhs;  // [ld]
  double *Kz, *G_lam, *A_nu;                     // [ld]
  double *rows, *d_rows, *lam, *t, *d_lam;       // [N]; λ of both sides, signed
  unsigned char *active, *tried;                 // [N], [2 N]
                                                 // [N] side that each constraint is thought to be held at: 0, 1, 2
  Newton newton;
  std::size_t taken = 0;     // steps, a polish that finds the solution among them
  bool one_of_many = false;  // an active set had an answer, and others may be near
};

// it.rows, Kz, G_lam and A_nu at (x, λ signed).
ICNNRT_NO_INLINE void products(const Problem& P, Iteration& it, const double* x, const double* lam) {
  rows_times(P, x, it.rows);
  fill(it.Kz, P.ld, 0.0);
  fill(it.G_lam, P.ld, 0.0);
  fill(it.A_nu, P.ld, 0.0);
  add_Kz(P, x, it.Kz);
  add_Knu(P, x, it.A_nu);
  add_rows_of_G(P, lam, it.G_lam);
}

// Relative stationarity, feasibility and gap of (x, λ signed) from its products: the larger of those in the operator's
// units, which must not be so small that the 1 in a denominator lets everything pass, and those in the equilibrated
// ones. Stationarity is measured by Qz and p, which what the constraints do adds up to: multipliers of rows that depend
// on each other have no size, and would hide anything; what their rounding hides counts as off.
ICNNRT_NO_INLINE void relative(const Problem& P, const Iteration& it, const double* x, const double* lam,
                               double (&residual)[3]) {
  residual[0] = residual[1] = residual[2] = 0.0;
  const double hidden = kEps * largest(x + P.n_blocks, P.q, largest(lam, P.N));
  for (unsigned given = 0; given < 1u + P.scaled; ++given) {
    const double per_cost = given ? 1.0 / P.cost : 1.0;
    double off = 0.0, size = 0.0, objective = 0.0;
    for (std::size_t j = 0; j < P.n; ++j) {
      const double mu = P.N > P.box ? lam[P.box + j] : 0.0, per = given ? per_cost / P.D[j] : 1.0;
      off = larger(off, __builtin_fabs(it.Kz[j] + P.c[j] + it.G_lam[j] + it.A_nu[j] + mu) * per);
      size = larger(size, larger(__builtin_fabs(it.Kz[j]), __builtin_fabs(P.c[j])) * per);
      objective += (0.5 * it.Kz[j] + P.c[j]) * x[j];
    }
    double violated = 0.0, reach = 0.0, gap = 0.0;
    for (std::size_t j = 0; j < P.q; ++j) {
      const double Az = it.Kz[P.n_blocks + j], b = -P.c[P.n_blocks + j], per = given ? 1.0 / P.E_A[j] : 1.0;
      violated = larger(violated, __builtin_fabs(Az - b) * per);
      reach = larger(reach, larger(__builtin_fabs(Az), __builtin_fabs(b)) * per);
    }
    for (std::size_t i = 0; i < P.N; ++i) {
      if (i >= P.m && i < P.box) continue;
      const double per = !given ? 1.0 : i < P.m ? 1.0 / P.E_G[i] : P.D[i - P.box];
      if (P.equal.any && P.equal.has[i]) {
        const double beyond = __builtin_fabs(it.rows[i] - P.side[0].bound[i]);
        violated = larger(violated, beyond * per);
        gap += __builtin_fabs(lam[i]) * beyond;
        reach = larger(reach, __builtin_fabs(it.rows[i]) * per);
        continue;
      }
      bool held = false;
      for (const Side& side : P.side) {
        const double multiplier = side.sign * lam[i] <= 0.0 ? 0.0 : side.sign * lam[i];
        if (!side.any || side.has[i] == 0.0) {
          gap += multiplier / per;  // of a side that is not there: as wrong as a gap of that size
          continue;
        }
        held = true;
        const double beyond = side.sign * (it.rows[i] - side.bound[i]);
        violated = larger(violated, beyond <= 0.0 ? 0.0 : beyond * per);
        gap += __builtin_fabs(multiplier * beyond);
      }
      if (held) reach = larger(reach, __builtin_fabs(it.rows[i]) * per);
    }
    residual[0] = larger(residual[0], (given ? off : off + hidden) / (1.0 + size));
    residual[1] = larger(residual[1], violated / (1.0 + reach));
    residual[2] = larger(residual[2], gap * per_cost / (1.0 + __builtin_fabs(objective) * per_cost));
  }
}

ICNNRT_NO_INLINE void kkt_residual(const Problem& P, Iteration& it, const double* x, const double* lam,
                                   double (&residual)[3]) {
  products(P, it, x, lam);
  relative(P, it, x, lam, residual);
}

ICNNRT_INLINE double worst(const double (&residual)[3]) {
  double most = residual[0];
  for (const double r : residual) most = larger(most, r);
  return most == most ? most : kInf;
}

// A point that is held at the constraints of it.active exactly: Newton's step there to
//     Qz + p + [G; I]_a'λ + A'ν = 0,   [G; I]_a z = bounds,   Az = b
// from it.x. If it solves the problem, x and λ are left in it.polished and it.lam, and true is returned. Otherwise the
// set is amended where the point contradicts it, as often as `amendments` says.
ICNNRT_NO_INLINE bool polish(const Problem& P, Iteration& it, std::size_t amendments, double enough,
                             double (&residual)[3]) {
  Newton& newton = it.newton;
  double size = 0.0;
  for (std::size_t j = 0; j < P.n; ++j) size += curvature(P, j);
  size = size > 0.0 ? size / static_cast<double>(P.n) : 1.0;
  newton.rho = 1e-13 * size;
  newton.delta = 1e-13 / size;
  double most = largest(it.x + P.n_blocks, P.q);
  for (const Side& side : P.side)
    if (side.any) most = largest(side.lam, P.N, most);
  if (P.equal.any) most = largest(P.equal.lam, P.N, most);
  const bool running = most > kRunning;
  double* const x = it.polished;
  for (;; --amendments) {
    copy(x, it.x, P.ld);
    if (running) fill(x + P.n_blocks, P.ld - P.n_blocks, 0.0);
    rows_times(P, x, it.rows);
    fill(it.rhs, P.ld, 0.0);
    for (std::size_t i = 0; i < P.N; ++i) {
      const unsigned held = it.active[i];
      it.lam[i] = it.t[i] = newton.W[i] = newton.inverse_W[i] = 0.0;
      if (!held) continue;
      const Side& side = P.side[held - 1];
      if (!running)
        it.lam[i] = P.equal.any && P.equal.has[i] ? P.equal.lam[i] : side.any ? side.sign * side.lam[i] : 0.0;
      it.t[i] = it.rows[i] - side.bound[i];
      newton.W[i] = kHard * size;
    }
    add_Kz(P, x, it.rhs);
    add_Knu(P, x, it.rhs);
    add_columns_times(P, it.lam, it.rhs);
    for (std::size_t j = 0; j < P.size; ++j) it.rhs[j] = -(it.rhs[j] + P.c[j]);
    factor(P, newton);
    solve_refined(P, newton, it.rhs, it.t, 2, it.dx, it.d_lam, it.d_rows);
    for (std::size_t j = 0; j < P.ld; ++j) x[j] += it.dx[j];
    for (std::size_t i = 0; i < P.N; ++i) it.lam[i] += it.d_lam[i];
    // What would pull is let go, be it by rounding: a row has a multiplier of the side it is held at, or none.
    bool changed = false;
    for (std::size_t i = 0; i < P.N; ++i) {
      const unsigned held = it.active[i];
      if (!held || (P.equal.any && P.equal.has[i]) || !(P.side[held - 1].sign * it.lam[i] < 0.0)) continue;
      it.active[i] = 0;
      it.lam[i] = 0.0;
      changed = true;
    }
    kkt_residual(P, it, x, it.lam, residual);
    if (worst(residual) <= enough) return true;
    if (amendments == 0) return false;
    for (std::size_t i = 0; i < P.N; ++i) {
      if (it.active[i] || (P.equal.any && P.equal.has[i])) continue;
      for (unsigned k = 0; k < 2; ++k)
        if (P.side[k].any && P.side[k].has[i] != 0.0 && P.side[k].sign * (it.rows[i] - P.side[k].bound[i]) > kEnough) {
          it.active[i] = static_cast<unsigned char>(k + 1);
          changed = true;
        }
    }
    if (!changed) return false;
  }
}

namespace {

// The method on P, from it.x and the slacks and multipliers of P's sides; weights are λ / (s + δ λ).
//
// With soft > 0 a constraint may be violated by t at a price of ½ t² / soft; then λ = t / soft.
//
// With `fixed`, the centre of multipliers is 0 until the solution is close: where rows depend on each other, nothing
// else keeps theirs from running away.
struct InteriorPoint {
  Problem& P;
  Iteration& it;
  double soft;
  bool fixed = false;
  bool left_out = false;  // loose bounds are; then the method ends beyond them, where nothing else holds z
  double pull = 0.0;      // of the centre: δ of those multipliers whose centre is 0

  // The step to λ∘s + c = 0 on both sides, c / (s + δ λ) in side.e; r_d and r_ν in it.r. That of the equalities is left
  // in it.d_lam.
  __attribute__((noinline)) void direction(std::size_t refinements) {
    Newton& newton = it.newton;
    fill(it.t, P.N, 0.0);
    for (const Side& side : P.side) {
      if (!side.any) continue;
      for (std::size_t i = 0; i < P.N; i += W)
        store(it.t + i, load(it.t + i) + (load(side.e + i) + load(side.w + i) * load(side.excess + i)) * side.sign);
    }
    for (std::size_t i = 0; i < P.N; i += W) store(it.t + i, load(it.t + i) * load(newton.inverse_W + i));
    for (std::size_t i = 0; P.equal.any && i < P.N; ++i)
      if (P.equal.has[i]) it.t[i] = it.rows[i] - P.side[0].bound[i] - (soft + pull) * P.equal.lam[i];
    for (std::size_t j = 0; j < P.size; ++j) it.rhs[j] = -it.r[j];
    solve_refined(P, newton, it.rhs, it.t, refinements, it.dx, it.d_lam, it.d_rows);
    for (Side& side : P.side) {
      if (!side.any) continue;
      for (std::size_t i = 0; i < P.N; i += W) {
        const Vec ahead = load(side.excess + i) + load(it.d_rows + i) * side.sign;
        const Vec d_lam = load(side.e + i) + load(side.w + i) * ahead;
        store(side.d_lam + i, d_lam);
        store(side.d_s + i, load(side.has + i) * (d_lam * newton.delta - ahead));
      }
    }
  }

  // How far slacks and multipliers may go, `part` of the way to the boundary: part / the largest of -d / value.
  __attribute__((noinline)) void to_boundary(double part, double& a_s, double& a_lam) const {
    Vec most_s = broadcast(part), most_lam = most_s;
    for (const Side& side : P.side) {
      if (!side.any) continue;
      for (std::size_t i = 0; i < P.N; i += W) {
        const Vec none = load(side.has + i);
        // where there is no side, λ = 0 and dλ = 0
        const Vec a = -load(side.d_s + i) / load(side.s + i),
                  b = -load(side.d_lam + i) / (load(side.lam + i) + (1.0 - none));
        most_s = a > most_s ? a : most_s;
        most_lam = b > most_lam ? b : most_lam;
      }
    }
    double of_s = part, of_lam = part;
    for (std::size_t l = 0; l < W; ++l) {
      of_s = max(of_s, most_s[l]);
      of_lam = max(of_lam, most_lam[l]);
    }
    a_s = part / of_s;
    a_lam = part / of_lam;
  }

  double number_of_sides() const {
    double count = 0.0;
    for (const Side& side : P.side)
      for (std::size_t i = 0; side.any && i < P.N; ++i) count += side.has[i];
    return max(count, 1.0);
  }

  // The minimiser of the objective plus ½ ‖slacks‖² on the equalities; slacks and multipliers are then lifted to be
  // positive, and balanced.
  __attribute__((noinline)) void start() {
    Newton& newton = it.newton;
    newton.rho = kFirstRho;
    newton.delta = soft + kFirstRho;
    for (std::size_t i = 0; i < P.N; ++i) {
      double count = 0.0, bounds = 0.0;
      for (const Side& side : P.side)
        if (side.any) {
          count += side.has[i];
          bounds += side.has[i] * side.bound[i];
        }
      newton.W[i] = count / (1.0 + soft);
      it.t[i] = -bounds / max(count, 1.0);
      if (P.equal.any && P.equal.has[i]) {
        newton.W[i] = 1.0 / newton.delta;
        it.t[i] = -P.side[0].bound[i];
      }
      newton.inverse_W[i] = newton.W[i] > 0.0 ? 1.0 / newton.W[i] : 0.0;
    }
    for (std::size_t j = 0; j < P.size; ++j) it.rhs[j] = -P.c[j];
    fill(it.rhs + P.size, P.ld - P.size, 0.0);
    factor(P, newton);
    solve_refined(P, newton, it.rhs, it.t, 0, it.x, it.d_lam, it.rows);
    double least_s = 0.0, least_lam = 0.0;
    for (const Side& side : P.side) {
      if (!side.any) continue;
      for (std::size_t i = 0; i < P.N; ++i) {
        const double slack = side.has[i] * side.sign * (side.bound[i] - it.rows[i]);
        least_s = min(least_s, slack);
        least_lam = min(least_lam, -slack);
      }
    }
    double total = 0.0, sum_s = 0.0, sum_lam = 0.0;
    for (Side& side : P.side) {
      if (!side.any) continue;
      for (std::size_t i = 0; i < P.N; ++i) {
        const double slack = side.sign * (side.bound[i] - it.rows[i]);
        side.s[i] = side.has[i] != 0.0 ? slack - 1.5 * least_s : 0.0;
        side.lam[i] = side.has[i] != 0.0 ? -slack - 1.5 * least_lam : 0.0;
        total += side.s[i] * side.lam[i];
        sum_s += side.s[i];
        sum_lam += side.lam[i];
      }
    }
    const bool balanced = total > 1e-8 * number_of_sides();
    const auto balance = [&](double by) { return balanced ? clip(0.5 * total / max(by, 1e-300), 1e-4, 1e8) : 1.0; };
    const double s_by = balance(sum_lam), lam_by = balance(sum_s);
    for (Side& side : P.side) {
      if (!side.any) continue;
      for (std::size_t i = 0; i < P.N; ++i) {
        side.s[i] = side.has[i] != 0.0 ? side.s[i] + s_by : 1.0;
        side.lam[i] = side.has[i] != 0.0 ? side.lam[i] + lam_by : 0.0;
      }
    }
    for (std::size_t i = 0; P.equal.any && i < P.N; ++i) P.equal.lam[i] = P.equal.has[i] ? it.d_lam[i] : 0.0;
  }

  void keep_best() {
    copy(it.best_x, it.x, P.ld);
    if (P.equal.any) copy(P.equal.best_lam, P.equal.lam, P.N);
    for (Side& side : P.side) {
      if (!side.any) continue;
      copy(side.best_lam, side.lam, P.N);
      copy(side.best_s, side.s, P.N);
    }
  }

  // λ of both sides and of the equalities, signed.
  void sign_multipliers() {
    for (std::size_t i = 0; i < P.N; ++i) {
      it.lam[i] = (P.side[0].any ? P.side[0].lam[i] : 0.0) - (P.side[1].any ? P.side[1].lam[i] : 0.0);
      if (P.equal.any) it.lam[i] += P.equal.lam[i];
    }
  }

  // From it.x and the sides' slacks and multipliers; leaves the best iterate in it.x and in them. True if the polish
  // found the solution instead, with x in it.polished and λ in it.lam.
  __attribute__((noinline)) bool run(const Ends& ends, double (&polished)[3]) {
    Newton& newton = it.newton;
    const double count = number_of_sides();
    double scale_nu = 1.0, best = kInf, rho = kFirstRho, mu_before = kInf;
    for (std::size_t j = P.n_blocks; j < P.size; ++j) scale_nu = max(scale_nu, 1.0 + __builtin_fabs(P.c[j]));
    std::size_t idle = 0;
    keep_best();
    for (std::size_t i = 0; i < 2 * P.N; ++i) it.tried[i] = 0xff;
    for (std::size_t step = 0;; ++step, ++it.taken) {
      sign_multipliers();
      products(P, it, it.x, it.lam);
      double objective = 0.0, gap = 0.0, off = 0.0, size = 0.0, violated = 0.0, reach = 0.0;
      for (std::size_t j = 0; j < P.n_blocks; ++j) {
        objective += (0.5 * it.Kz[j] + P.c[j]) * it.x[j];
        it.r[j] = it.Kz[j] + P.c[j] + it.G_lam[j] + it.A_nu[j];
      }
      for (std::size_t j = 0; P.N > P.box && j < P.n; ++j) it.r[j] += it.lam[P.box + j];
      off = largest(it.r, P.n_blocks);
      const double* const parts[] = {it.Kz, P.c, it.G_lam, it.A_nu};
      for (const double* const part : parts)
        if (soft > 0.0 || part == it.Kz || part == P.c) size = largest(part, P.n_blocks, size);
      for (std::size_t j = P.n_blocks; j < P.size; ++j) {
        it.r[j] = it.Kz[j] + P.c[j] - soft * it.x[j];
        reach = larger(reach, __builtin_fabs(it.Kz[j]));
        violated = larger(violated, __builtin_fabs(it.r[j]));
      }
      for (Side& side : P.side) {
        if (!side.any) continue;
        Vec most{}, furthest{}, total{};
        for (std::size_t i = 0; i < P.N; i += W) {
          const Vec has = load(side.has + i), rows = load(it.rows + i), s = load(side.s + i), lam = load(side.lam + i);
          const Vec excess = has * ((rows - load(side.bound + i)) * side.sign + s - lam * soft), size = abs(excess),
                    here = has * abs(rows);
          store(side.excess + i, excess);
          most = larger(most, size);
          furthest = larger(furthest, here);
          total += s * lam;
        }
        violated = larger(violated, largest(most));
        reach = larger(reach, largest(furthest));
        gap += sum(total);
      }
      for (std::size_t i = 0; P.equal.any && i < P.N; ++i)
        if (P.equal.has[i]) {
          violated = larger(violated, __builtin_fabs(it.rows[i] - P.side[0].bound[i] - soft * P.equal.lam[i]));
          reach = larger(reach, __builtin_fabs(it.rows[i]));
        }
      double residual =
          larger(larger(off / (1.0 + size), violated / (scale_nu + reach)), gap / (1.0 + __builtin_fabs(objective)));
      if (!(residual < kInf)) residual = kInf;
      if (soft == 0.0 && residual <= larger(kClosely, ends.nearly)) {
        double exactly[3];
        relative(P, it, it.x, it.lam, exactly);
        residual = worst(exactly);
      }
      idle = residual < kProgress * best ? 0 : idle + 1;
      if (residual < best) {
        best = residual;
        keep_best();
      }
      if (best <= ends.enough || (best <= ends.nearly && idle >= kPatience) || step == ends.steps || ends.over()) break;
      if (left_out && beyond_loose()) break;

      if (soft == 0.0 && guess(residual)) {
        if (polish(P, it, kAmendments, min(ends.enough, kEnough), polished)) {
          ++it.taken;
          return true;
        }
        if (P.equal.any) rows_times(P, it.x, it.rows);  // the polish has left its own
      }

      const double mu = gap / count;
      rho = max(rho * min(mu / max(mu_before, 1e-300), 1.0), kLeastRho);
      mu_before = mu;
      newton.rho = rho;
      const bool stuck = idle >= kStuck && best < kClose;
      newton.delta = soft + (stuck ? kStuckDelta : max(rho, kLeastDelta));
      if (fixed) pull_to_0(stuck ? 0.0 : newton.delta - soft);
      fill(newton.W, P.N, 0.0);
      for (Side& side : P.side) {
        if (!side.any) continue;
        for (std::size_t i = 0; i < P.N; i += W) {
          const Vec s = load(side.s + i), lam = load(side.lam + i), w = lam / (s + lam * newton.delta);
          store(side.w + i, w);
          store(side.e + i, -w * s);
          store(newton.W + i, load(newton.W + i) + w);
        }
      }
      for (std::size_t i = 0; P.equal.any && i < P.N; ++i)
        if (P.equal.has[i]) newton.W[i] = 1.0 / newton.delta;
      for (std::size_t i = 0; i < P.N; i += W) {
        const Vec w = load(newton.W + i), inverse = 1.0 / w;
        store(newton.inverse_W + i, w > 0.0 ? inverse : Vec{});
      }
      factor(P, newton);

      direction(0);  // predictor
      if (soft == 0.0) look_ahead();
      double a_s, a_lam, ahead = 0.0;
      to_boundary(1.0, a_s, a_lam);
      for (const Side& side : P.side) {
        if (!side.any) continue;
        Vec total{};
        for (std::size_t i = 0; i < P.N; i += W)
          total += load(side.has + i) * (load(side.s + i) + load(side.d_s + i) * a_s) *
                   (load(side.lam + i) + load(side.d_lam + i) * a_lam);
        ahead += sum(total);
      }
      const double ratio = clip(ahead / max(gap, 1e-300), 0.0, 1.0), target = ratio * ratio * ratio * mu;
      for (Side& side : P.side) {
        if (!side.any) continue;
        for (std::size_t i = 0; i < P.N; i += W) {
          const Vec s = load(side.s + i), lam = load(side.lam + i);
          store(side.e + i, load(side.has + i) * (target - s * lam - load(side.d_s + i) * load(side.d_lam + i)) /
                                (s + lam * newton.delta));
        }
      }
      direction(stuck ? kStuckRefinements : residual < kRefined || step >= kHardStep);  // corrector
      double sum_of_d = 0.0;
      for (std::size_t j = 0; j < P.size; ++j) sum_of_d += it.dx[j] * 0.0;
      to_boundary(kQpToBoundary, a_s, a_lam);
      if (sum_of_d != 0.0 || !(a_s > 0.0) || !(a_lam > 0.0)) continue;  // rounding has had its way
      for (std::size_t j = 0; j < P.n_blocks; ++j) it.x[j] += a_s * it.dx[j];
      for (std::size_t j = P.n_blocks; j < P.size; ++j) it.x[j] += a_lam * it.dx[j];
      for (Side& side : P.side) {
        if (!side.any) continue;
        for (std::size_t i = 0; i < P.N; i += W) {
          const Vec lam = load(side.lam + i) + load(side.d_lam + i) * a_lam,
                    s = load(side.s + i) + load(side.d_s + i) * a_s, least = broadcast(kSmallest);
          store(side.lam + i, load(side.has + i) * (lam < least ? least : lam));
          store(side.s + i, s < least ? least : s);
        }
      }
      for (std::size_t i = 0; P.equal.any && i < P.N; ++i)
        if (P.equal.has[i]) P.equal.lam[i] += a_lam * it.d_lam[i];
    }
    copy(it.x, it.best_x, P.ld);
    if (P.equal.any) copy(P.equal.lam, P.equal.best_lam, P.N);
    for (Side& side : P.side) {
      if (!side.any) continue;
      copy(side.lam, side.best_lam, P.N);
      copy(side.s, side.best_s, P.N);
    }
    return false;
  }

  [[gnu::cold]] bool beyond_loose() const {
    for (const Side& side : P.side)
      for (std::size_t i = 0; side.any && i < P.N; ++i)
        if (is_loose(P, side, i) && side.sign * (it.rows[i] - side.bound[i]) > 0.0) return true;
    return false;
  }

  // The residuals of constraints as they are with that weight about multipliers of 0.
  [[gnu::cold]] void pull_to_0(double weight) {
    pull = weight;
    for (std::size_t j = P.n_blocks; j < P.size; ++j) it.r[j] -= weight * it.x[j];
    for (Side& side : P.side)
      for (std::size_t i = 0; side.any && i < P.N; ++i) side.excess[i] -= weight * side.lam[i];
  }

  // x and signed λ to where the polish leaves them.
  void read_off() {
    copy(it.polished, it.x, P.ld);
    sign_multipliers();
  }

 private:
  // Whether the constraints that seem to be held are those that the last predictor saw ahead, and not tried yet.
  bool guess(double residual) {
    unsigned char* const ahead = it.tried + P.N;
    bool same = true, tried = true;
    for (std::size_t i = 0; i < P.N; ++i) {
      unsigned held = 0;
      double most = 0.0;
      for (unsigned k = 0; k < 2; ++k) {
        const Side& side = P.side[k];
        if (side.any && side.lam[i] > side.s[i] && side.lam[i] > most) {
          held = k + 1;
          most = side.lam[i];
        }
      }
      if (P.equal.any && P.equal.has[i]) held = 1;
      it.active[i] = static_cast<unsigned char>(held);
      same = same && ahead[i] == held;
      tried = tried && it.tried[i] == held;
    }
    if (!same || tried || !(residual < kGuess)) return false;
    for (std::size_t i = 0; i < P.N; ++i) it.tried[i] = it.active[i];
    return true;
  }

  // Where λ is larger than s after a whole step, which is what decides it in the end.
  void look_ahead() {
    unsigned char* const ahead = it.tried + P.N;
    for (std::size_t i = 0; i < P.N; ++i) {
      double most = 0.0;
      ahead[i] = P.equal.any && P.equal.has[i];
      for (unsigned k = 0; k < 2; ++k) {
        const Side& side = P.side[k];
        if (!side.any) continue;
        const double lam = side.lam[i] + side.d_lam[i];
        if (lam > side.s[i] + side.d_s[i] && lam > most) {
          ahead[i] = static_cast<unsigned char>(k + 1);
          most = lam;
        }
      }
    }
  }
};

}  // namespace

}  // namespace ICNNRT_INSTRUCTION_SET
}  // namespace icnnrt
