// One quadratic program from the operator's inputs to its outputs.
#pragma once

#include "qp_active_set.h"

namespace icnnrt {
namespace ICNNRT_INSTRUCTION_SET {

inline constexpr double kEvenly = 1e-6;  // least entry of the diagonal against the largest, for no ray to be there
inline constexpr double kCurved = 1e-4;  // least pivot of Q, in units of its diagonal, that makes it definite
// As many constraints that a start is held at, and one of four variables more, are found again sooner by an active set
// than by a polish.
inline constexpr std::size_t kFew = 4;
// Steps from which on it is not the few that were allowed that left a problem unsolved.
inline constexpr std::size_t kPursued = 30;
inline constexpr std::size_t kPersistence = 4;  // times the steps that are allowed, of what begins once more
inline constexpr double kNoticeable = 1e-6;     // relative violation of a bound, by its own size
inline constexpr double kCertificate = 1e-7;    // how well a certificate must hold: its residual against what it proves
inline constexpr double kCancelled = 1e-6;      // the same against the terms that cancel
// The same, for any z as large as one that was found to be nearly feasible for its size.
inline constexpr double kOverrules = 0.1;
inline constexpr double kFalls = 1e-6;      // how fast the objective has to fall along a ray, against p and the ray
inline constexpr double kNarrow = 1e-9;     // relative distance of bounds that leave no room
inline constexpr double kCertified = 1e-9;  // the least relative amount of infeasibility that is told from rounding

// The relative KKT residual that counts as solved, and as inaccurate, and the rounding unit of the data.
template <typename T>
inline constexpr double kSolvedResidual = sizeof(T) == sizeof(double) ? 1e-9 : 1e-6;
template <typename T>
inline constexpr double kInaccurateResidual = sizeof(T) == sizeof(double) ? 1e-5 : 1e-4;
// How far a ray may leave what it should stay in, against the row and the ray: float is flat only up to rounding.
template <typename T>
inline constexpr double kRay = sizeof(T) == sizeof(double) ? 1e-8 : 1e-6;
template <typename T>
inline constexpr double kUnitRoundoff = sizeof(T) == sizeof(double) ? 0x1p-52 : 0x1p-23;

// The sparse matrices, their factor and its scratch.
static void lay_out(Layout& layout, Sparse& S) {
  const QpPlan& plan = *S.plan;
  struct {
    double** array;
    std::size_t count;
  } const arrays[] = {{&S.Q, plan.Q.entries}, {&S.Q_diagonal, plan.n}, {&S.G, plan.G.entries}, {&S.A, plan.A.entries},
                      {&S.L, plan.entries},   {&S.diagonal, plan.N},   {&S.pivot, plan.N},     {&S.inverse, plan.N},
                      {&S.root, plan.m},      {&S.y, plan.N}};
  for (const auto& [array, count] : arrays) *array = layout.take<double>(count);
  std::int32_t** const lists[] = {&S.next, &S.head, &S.link};
  for (std::int32_t** const list : lists) *list = layout.take<std::int32_t>(plan.N);
  fill(S.y, plan.N, 0.0);
}

// What a solve or an adjoint with q equality rows needs; `qp_workspace_bytes` in dispatch.cpp allows for it.
// Where there is a plan the matrices are sparse.
ICNNRT_NO_INLINE Layout lay_out(void* memory, std::size_t n, std::size_t m, std::size_t q, Problem& P, Iteration& it,
                                const QpPlan* plan = nullptr) {
  Layout layout{static_cast<unsigned char*>(memory)};
  P.n = n;
  P.m = m;
  P.q = q;
  P.n_blocks = in_blocks(n);
  P.size = P.n_blocks + in_blocks(q);
  P.ld = padded(P.size + kBlock) + 8;
  P.curved = false;
  P.box = padded(m);
  P.N = P.box + padded(n);
  const std::size_t ld = P.ld, N = P.N + 8;
  P.sparse.plan = plan;
  if (plan) {
    lay_out(layout, P.sparse);
  } else {
    P.K = layout.take<double>(P.size * ld);
    P.G = layout.take<double>(m * ld);
    it.newton.R = layout.take<double>((m + q) * ld);
    it.newton.factors = {P.size, P.n_blocks, ld, layout.take<double>(P.size * ld), layout.take<double>(P.size)};
    it.newton.diagonal = layout.take<double>(2 * P.size + 8);
  }
  double** const vectors[] = {&P.c,  &P.D,    &it.x,  &it.best_x, &it.polished, &it.dx,
                              &it.r, &it.rhs, &it.Kz, &it.G_lam,  &it.A_nu,     &it.newton.e};
  for (double** const vector : vectors) *vector = layout.take<double>(ld);
  double** const rows[] = {&P.E_G,
                           &it.rows,
                           &it.d_rows,
                           &it.lam,
                           &it.t,
                           &it.d_lam,
                           &it.newton.W,
                           &it.newton.inverse_W,
                           &it.newton.e_lam,
                           &it.newton.rows,
                           &it.newton.more_lam};
  for (double** const row : rows) *row = layout.take<double>(N);
  for (Side& side : P.side) {
    double** const arrays[] = {&side.bound,  &side.has, &side.lam, &side.s,        &side.d_lam, &side.d_s,
                               &side.excess, &side.w,   &side.e,   &side.best_lam, &side.best_s};
    for (double** const array : arrays) *array = layout.take<double>(N);
  }
  P.equal = {false, layout.take<unsigned char>(N), layout.take<double>(N), layout.take<double>(N)};
  it.active = layout.take<unsigned char>(N);
  it.tried = layout.take<unsigned char>(2 * N);
  double* const cleared[] = {it.x, it.best_x, it.polished, it.dx, it.r, it.rhs, it.newton.e};
  for (double* const x : cleared) fill(x, ld, 0.0);
  if constexpr (W > kBlock) {
    // Vectors of eight lanes read beyond blocks of four, where the workspace holds anything.
    for (double** const vector : vectors) fill(*vector, ld, 0.0);
    if (!plan) {
      fill(P.K, P.size * ld, 0.0);
      fill(it.newton.factors.U, P.size * ld, 0.0);
    }
  }
  return layout;
}

// Whether Q + noise has a factor: that is, whether its least eigenvalue is at least -noise up to rounding.
ICNNRT_NO_INLINE bool positive_semidefinite(Problem& P, Iteration& it, double unit_roundoff) {
  double size = 0.0;
  for (std::size_t i = 0; i < P.n; ++i) size = max(size, __builtin_fabs(curvature(P, i)));  // else it is indefinite
  const double noise = 8.0 * static_cast<double>(P.n) * max(unit_roundoff, 8.0 * kEps) * size;
  if (is_sparse(P)) {
    const double least = least_pivot_of_Q(P.sparse, size > 0.0 ? noise : 1.0);
    P.curved = size > 0.0 && least > kCurved;
    return least > 0.0;
  }
  Newton& newton = it.newton;
  newton.rho = newton.delta = 0.0;
  fill(newton.W, P.N, 0.0);
  P.curved = true;
  if (factor(P, newton, kCurved) > kCurved) return newton.plain = true;  // without noise
  double* const diagonal = newton.diagonal;
  for (std::size_t j = 0; j < P.n_blocks; ++j) {
    diagonal[j] = j < P.n && size > 0.0 ? noise : 1.0;
    diagonal[P.n_blocks + j] = P.K[j * P.ld + j] + diagonal[j];
  }
  const Factors f{P.n_blocks, P.n_blocks, P.ld, newton.factors.U, newton.factors.inverse};
  const double least = factor_P(f, P.K, nullptr, 0, diagonal, 0.0, -kInf);
  P.curved = size > 0.0 && least > kCurved;
  return least > 0.0;
}

// (z, λ, ν, μ) as [z; ν] and λ signed, unscaled, in it.x and it.lam; false if there is a NaN in it.
template <typename T>
static bool read_start(const T* start, const Problem& P, Iteration& it) {
  if (!start) return false;
  const T *const z = start, *const lam = z + P.n, *const nu = lam + P.m, *const mu = nu + P.q;
  double odd = 0.0;
  for (std::size_t i = 0; i < P.n + P.m + P.q + P.n; ++i) odd += static_cast<double>(start[i]) * 0.0;
  if (odd != 0.0) return false;
  for (std::size_t j = 0; j < P.n; ++j) it.x[j] = static_cast<double>(z[j]);
  for (std::size_t j = 0; j < P.q; ++j) it.x[P.n_blocks + j] = static_cast<double>(nu[j]);
  fill(it.lam, P.N, 0.0);
  for (std::size_t i = 0; i < P.m; ++i) it.lam[i] = static_cast<double>(lam[i]);
  for (std::size_t i = P.box; i < P.N && i - P.box < P.n; ++i) it.lam[i] = static_cast<double>(mu[i - P.box]);
  return true;
}

// An interior point near what read_start left, and the constraints that it is held at.
ICNNRT_NO_INLINE void warm_start(Problem& P, Iteration& it) {
  for (std::size_t j = 0; j < P.n; ++j) it.x[j] /= P.D[j];
  for (std::size_t j = P.n_blocks; j < P.n_blocks + P.q; ++j) it.x[j] *= P.cost / P.D[j];
  for (std::size_t i = 0; i < P.m; ++i) it.lam[i] *= P.cost / P.E_G[i];
  for (std::size_t i = P.box; i < P.N; ++i) it.lam[i] *= P.cost * P.D[i - P.box];
  rows_times(P, it.x, it.rows);
  for (std::size_t i = 0; i < P.N; ++i) it.active[i] = 0;
  for (unsigned k = 0; k < 2; ++k) {
    Side& side = P.side[k];
    if (!side.any) continue;
    for (std::size_t i = 0; i < P.N; ++i) {
      const double multiplier = side.sign * it.lam[i], slack = side.sign * (side.bound[i] - it.rows[i]);
      side.lam[i] = side.has[i] != 0.0 ? max(multiplier, kWarm) : 0.0;
      side.s[i] = side.has[i] != 0.0 ? max(slack, kWarm) : 1.0;
      if (side.has[i] != 0.0 && multiplier > 0.0 && multiplier > slack)
        it.active[i] = static_cast<unsigned char>(k + 1);
    }
  }
  for (std::size_t i = 0; P.equal.any && i < P.N; ++i)
    if (P.equal.has[i]) {
      P.equal.lam[i] = it.lam[i];
      it.active[i] = 1;
    }
}

// Leaves loose bounds out of steps, where their slacks would drown everything in rounding. Whether there are any.
[[gnu::cold]] ICNNRT_NO_INLINE bool leave_out_loose(Problem& P) {
  bool any = false;
  for (Side& side : P.side)
    for (std::size_t i = 0; side.any && i < P.N; ++i) {
      if (!is_loose(P, side, i)) continue;
      side.has[i] = side.lam[i] = 0.0;
      side.s[i] = 1.0;
      any = true;
    }
  return any;
}

// Takes them back, with the slacks of it.polished. Whether that is beyond one of them.
[[gnu::cold]] ICNNRT_NO_INLINE bool take_back_loose(Problem& P, Iteration& it) {
  bool outside = false;
  rows_times(P, it.polished, it.rows);
  for (Side& side : P.side)
    for (std::size_t i = 0; side.any && i < P.N; ++i) {
      if (!is_loose(P, side, i)) continue;
      const double slack = side.sign * (side.bound[i] - it.rows[i]);
      side.has[i] = 1.0;
      side.s[i] = max(slack, kSmallest);
      outside = outside || !(slack >= 0.0);
    }
  return outside;
}

// The method without loose bounds, unless `all_bounds`: z within them proves that their multipliers are 0, and beyond
// one of them nothing is solved. Answers as `solve_problem` does.
ICNNRT_NO_INLINE bool run(InteriorPoint& method, bool cold, bool all_bounds, const Ends& ends, double (&residual)[3]) {
  Problem& P = method.P;
  Iteration& it = method.it;
  method.left_out = !all_bounds && leave_out_loose(P);
  if (cold) {
    fill(it.x, P.ld, 0.0);
    method.start();
  }
  const bool polished = method.run(ends, residual);
  if (!polished) method.read_off();
  const bool outside = method.left_out && take_back_loose(P, it);
  if (method.soft == 0.0 && (!polished || outside)) kkt_residual(P, it, it.polished, it.lam, residual);
  return polished && !outside;
}

// Solves P, which is equilibrated; answers as `solve_problem` does.
ICNNRT_NO_INLINE bool solve_cold(Problem& P, Iteration& it, double soft, const Ends& ends, double (&residual)[3],
                                 bool fixed = false, bool all_bounds = false) {
  InteriorPoint method{P, it, soft, fixed};
  if (run(method, true, all_bounds, ends, residual)) return true;
  if (!method.left_out || soft > 0.0 || ends.at(worst(residual))) return false;
  resize(P, size_of_z(P, true));
  return run(method, true, true, ends, residual);
}

// Whether the active-set method finds the solution, as a polish does. Otherwise nothing has happened.
ICNNRT_NO_INLINE bool solve_by_active_set(Problem& P, Iteration& it, ActiveSet* set, bool warm, const Ends& ends,
                                          double (&residual)[3], bool any = false) {
  if (!set || !P.curved || ends.steps == 0) return false;
  for (std::size_t i = 0; i < P.N; ++i) it.tried[i] = it.active[i];
  const bool found = DualActiveSet{P, it, *set}.run(warm, any, ends, residual);
  it.taken += found;
  for (std::size_t i = 0; !found && i < P.N; ++i) it.active[i] = it.tried[i];
  return found;
}

// Solves P as it was read, from what read_start left if `warm`, by an active-set method first if there is memory for
// one. x and signed λ are left in it.polished and it.lam; true if they are a polished point, otherwise their slacks are
// in side.s.
ICNNRT_NO_INLINE bool solve_problem(Problem& P, Iteration& it, ActiveSet* set, bool warm, double soft, const Ends& ends,
                                    double (&residual)[3]) {
  equilibrate(P, it.Kz, it.newton.rows, it.r);
  if (warm) {
    InteriorPoint method{P, it, soft};
    warm_start(P, it);
    std::size_t held = 0;
    for (std::size_t i = 0; i < P.N; ++i) held += it.active[i] != 0;
    const bool few = held <= kFew + P.n / 4;
    if (few && solve_by_active_set(P, it, set, true, ends, residual)) return true;
    const bool polished = polish(P, it, kAmendments, min(ends.enough, kEnough), residual);
    it.taken += polished;
    if (polished || (!few && solve_by_active_set(P, it, set, true, ends, residual)) ||
        run(method, false, false, ends, residual))
      return true;
    if (ends.at(worst(residual))) return false;  // otherwise the start was misleading
  }
  if (!warm && solve_by_active_set(P, it, set, false, ends, residual)) return true;
  const bool one_of_many = it.one_of_many;
  if (solve_cold(P, it, soft, ends, residual)) return true;
  // Rather one answer of many than none; what its multipliers and slacks are tells of it.
  if (!one_of_many || ends.at(worst(residual))) return false;
  for (std::size_t i = 0; i < P.N; ++i) it.active[i] = 0;
  if (solve_by_active_set(P, it, set, false, ends, residual, true)) return true;
  InteriorPoint{P, it, soft}.read_off();
  kkt_residual(P, it, it.polished, it.lam, residual);
  return false;
}

// The bound that a signed multiplier points at; 0 where there is none.
ICNNRT_INLINE double pointed_at(const Problem& P, double multiplier, std::size_t i) {
  if (P.equal.any && P.equal.has[i]) return P.side[0].bound[i];
  const Side& side = P.side[multiplier >= 0.0 ? 0 : 1];
  return side.any && side.has[i] != 0.0 ? side.bound[i] : 0.0;
}

// Whether 0'z cannot be within the bounds of a row of zeros; then λ and ν as `infeasible` leaves them.
[[gnu::cold]] ICNNRT_NO_INLINE bool contradicted(const Problem& P, Iteration& it, double& amount) {
  amount = 0.0;
  fill(it.lam, P.N, 0.0);
  fill(it.polished, P.ld, 0.0);
  for (std::size_t i = 0; i < P.m; ++i) {
    if (largest_of_G(P, i) > 0.0) continue;
    for (const Side& side : P.side) {
      const bool held = side.any && (side.has[i] != 0.0 || (P.equal.any && P.equal.has[i]));
      if (!held || !(side.sign * side.bound[i] < 0.0)) continue;
      it.lam[i] = side.sign;
      amount -= side.sign * side.bound[i];
    }
  }
  for (std::size_t i = P.n_blocks; i < P.n_blocks + P.q; ++i) {
    if (P.c[i] == 0.0 || largest_of_A(P, i - P.n_blocks) > 0.0) continue;
    it.polished[i] = P.c[i] > 0.0 ? 1.0 : -1.0;
    amount += __builtin_fabs(P.c[i]);
  }
  return amount > 0.0;
}

// Bounds and b as they are about the z in it.polished, in units of what is violated there.
[[gnu::cold]] ICNNRT_NO_INLINE void move_to(Problem& P, Iteration& it) {
  rows_times(P, it.polished, it.rows);
  fill(it.Kz, P.ld, 0.0);
  add_Kz(P, it.polished, it.Kz);
  double out = 0.0;
  for (std::size_t i = P.n_blocks; i < P.size; ++i) out = max(out, __builtin_fabs(it.Kz[i] + P.c[i]));
  for (const Side& side : P.side)
    for (std::size_t i = 0; side.any && i < P.N; ++i) {
      const double beyond = side.sign * (it.rows[i] - side.bound[i]);
      const bool equal = P.equal.any && P.equal.has[i];
      if (equal || side.has[i] != 0.0) out = max(out, equal ? __builtin_fabs(beyond) : beyond);
    }
  const double per = out > 0x1p-1022 ? 1.0 / out : 1.0;
  for (std::size_t i = P.n_blocks; i < P.size; ++i) P.c[i] = (it.Kz[i] + P.c[i]) * per;
  for (Side& side : P.side)
    for (std::size_t i = 0; side.any && i < P.N; ++i)
      if (side.has[i] != 0.0 || (P.equal.any && P.equal.has[i])) side.bound[i] = (side.bound[i] - it.rows[i]) * per;
}

// Whether no z is feasible; then λ, ν and μ in it.lam and it.polished, over `amount`, have A'ν + G'λ + μ = 0 though
// their bounds sum to −1. Where violations are small, so are the multipliers, and known to few digits: so the problem
// is asked again about the z of the first answer. `read` reads the problem; `found` is a z that the certificate has to
// rule out, or null.
template <typename T, typename Read>
[[gnu::cold]] static bool infeasible(Problem& P, Iteration& it, const Ends& ends, const T* found, double& amount,
                                     const Read& read) {
  read();
  if (contradicted(P, it, amount)) return true;
  double residual[3];
  solve_problem(P, it, nullptr, false, 1.0, ends, residual);
  move_to(P, it);
  solve_cold(P, it, 1.0, ends, residual, false, true);
  read();
  equilibrate(P, it.Kz, it.newton.rows, it.r);
  double size = 0.0;
  amount = 0.0;
  const auto add = [&](double term) {
    amount -= term;
    size += __builtin_fabs(term);
  };
  for (std::size_t i = 0; i < P.N; ++i) add(it.lam[i] * pointed_at(P, it.lam[i], i));
  for (std::size_t i = P.n_blocks; i < P.size; ++i) add(-P.c[i] * it.polished[i]);
  fill(it.r, P.ld, 0.0);
  add_columns_times(P, it.lam, it.r);
  add_Knu(P, it.polished, it.r);
  fill(it.Kz, P.ld, 0.0);  // of the terms that cancel, their magnitudes
  add_magnitudes(P, it.lam, it.polished, it.Kz);
  for (std::size_t j = 0; P.N > P.box && j < P.n; ++j) it.Kz[j] += __builtin_fabs(it.lam[P.box + j]);
  const double off = largest(it.r, P.n);  // in units of z: no z of a reasonable size makes up for it
  const double magnitude = largest(it.Kz, P.n);
  double reach = 0.0;
  for (std::size_t j = 0; found && j < P.n; ++j) reach += __builtin_fabs(static_cast<double>(found[j])) / P.D[j];
  for (std::size_t i = 0; i < P.m; ++i) it.lam[i] *= P.E_G[i];
  for (std::size_t i = P.box; i < P.N; ++i) it.lam[i] /= P.D[i - P.box];
  for (std::size_t i = P.n_blocks; i < P.size; ++i) it.polished[i] *= P.D[i];
  return amount > kCertified * size && off <= kCertificate * amount && off <= kCancelled * magnitude &&
         off * reach <= kOverrules * amount;
}

// Whether the objective falls without end along the direction left in it.polished; over `amount`, p'd = −1. P is the
// problem of kRay, and p_size what its p was divided by.
[[gnu::cold]] ICNNRT_NO_INLINE bool unbounded(Problem& P, Iteration& it, const Ends& ends, double p_size,
                                              double tolerance, double& amount) {
  double residual[3];
  solve_problem(P, it, nullptr, false, 0.0, ends, residual);
  // Each row against its own size and that of d, in units of z.
  const double length = largest(it.polished, P.n);
  amount = 0.0;
  for (std::size_t j = 0; j < P.n; ++j) amount -= P.c[j] * it.polished[j];
  bool proven = amount > 0.0 && amount >= kFalls * largest(P.c, P.n) * length;
  amount *= p_size / P.cost;
  rows_times(P, it.polished, it.rows);
  fill(it.Kz, P.ld, 0.0);
  add_Kz(P, it.polished, it.Kz);
  for (std::size_t i = P.n_blocks; i < P.n_blocks + P.q; ++i)
    proven = proven && __builtin_fabs(it.Kz[i]) <= tolerance * largest_of_A(P, i - P.n_blocks) * length;
  for (const Side& side : P.side) {
    if (!side.any) continue;
    for (std::size_t i = 0; i < P.N; ++i) {
      if (side.has[i] == 0.0 && !(P.equal.any && P.equal.has[i])) continue;
      proven = proven && side.sign * it.rows[i] <= tolerance * (i < P.m ? largest_of_G(P, i) : 1.0) * length;
    }
  }
  for (std::size_t j = 0; j < P.n; ++j) it.polished[j] *= P.D[j];
  return proven;
}

// Whether a row is off noticeably for its own bound, in the units of the data: to a z of 1e10, 1 is nothing.
[[gnu::cold]] ICNNRT_NO_INLINE bool noticeably_off(const Problem& P, const Iteration& it, double relative) {
  if (relative == 0.0) return false;
  for (std::size_t i = 0; i < P.q; ++i) {
    const double b = P.c[P.n_blocks + i], Az = it.Kz[P.n_blocks + i];
    if (__builtin_fabs(Az + b) > kNoticeable * (P.E_A[i] + __builtin_fabs(b))) return true;
  }
  for (const Side& side : P.side)
    for (std::size_t i = 0; side.any && i < P.N; ++i) {
      const bool equal = P.equal.any && P.equal.has[i];
      if (!equal && side.has[i] == 0.0) continue;
      const double beyond = side.sign * (it.rows[i] - side.bound[i]), F = i < P.m ? P.E_G[i] : 1.0 / P.D[i - P.box];
      if (beyond > kNoticeable * (F + __builtin_fabs(side.bound[i]))) return true;
    }
  return false;
}

// What a problem is that was not solved, or maybe only in relation to a large z. A certificate is written to the ray,
// if there is one.
template <typename T>
[[gnu::cold]] static QpStatus certified(const QpSizes& sizes, const QpArguments<T>& args, void* memory, bool definite,
                                        QpStatus otherwise) {
  const std::size_t n = sizes.n, m = sizes.m, q = sizes.q;
  Problem P;
  Iteration it;
  bool crossed;
  double amount;
  const Ends ends(sizes);
  lay_out(memory, n, m, q, P, it, sizes.plan);
  const T* const found = otherwise == QpStatus::kSolved ? args.z : nullptr;
  if (infeasible(P, it, ends, found, amount, [&] { read_problem(args, Purpose::kFeasibility, P, crossed); })) {
    T *const lam = args.ray + n, *const nu = lam + m, *const mu = nu + q;
    for (std::size_t i = 0; i < m; ++i) lam[i] = static_cast<T>(it.lam[i] / amount);
    for (std::size_t i = 0; i < q; ++i) nu[i] = static_cast<T>(it.polished[P.n_blocks + i] / amount);
    for (std::size_t j = 0; P.N > P.box && j < n; ++j) mu[j] = static_cast<T>(it.lam[P.box + j] / amount);
    return QpStatus::kPrimalInfeasible;
  }
  if (definite || sizes.plan) return otherwise;
  lay_out(memory, n, m, q + n, P, it);
  read_problem(args, Purpose::kRay, P, crossed);
  P.curved = true;
  double p_size = 0x1p-1022;
  for (std::size_t j = 0; j < n; ++j) p_size = max(p_size, __builtin_fabs(static_cast<double>(args.p[j])));
  if (unbounded(P, it, ends, p_size, kRay<T>, amount)) {
    for (std::size_t j = 0; j < n; ++j) args.ray[j] = static_cast<T>(it.polished[j] / amount);
    return QpStatus::kDualInfeasible;
  }
  return otherwise;
}

// Whether a row is nearer to its lower bound, or has no upper one.
ICNNRT_INLINE bool nearer_below(const Problem& P, double row, std::size_t i) {
  const Side &upper = P.side[0], &lower = P.side[1];
  if (upper.has[i] == 0.0) return true;
  return lower.has[i] != 0.0 && row - lower.bound[i] < upper.bound[i] - row;
}

template <typename T>
[[gnu::cold]] static void write_nothing(const QpSizes& sizes, const QpArguments<T>& args) {
  const T nan = static_cast<T>(__builtin_nan(""));
  for (std::size_t j = 0; j < sizes.n; ++j) args.z[j] = args.mu[j] = args.box_slack[j] = nan;
  for (std::size_t i = 0; i < sizes.m; ++i) args.lam[i] = args.slack[i] = nan;
  for (std::size_t i = 0; i < sizes.q; ++i) args.nu[i] = nan;
  for (std::size_t i = 0; i < 3; ++i) args.residual[i] = __builtin_nan("");
}

template <typename T>
static bool finite(const QpSizes& sizes, const QpArguments<T>& args) {
  double odd = 0.0;
  for (std::size_t j = 0; j < sizes.n; ++j) odd += static_cast<double>(args.z[j] * 0 + args.mu[j] * 0);
  for (std::size_t i = 0; i < sizes.m; ++i) odd += static_cast<double>(args.lam[i] * 0);
  for (std::size_t i = 0; i < sizes.q; ++i) odd += static_cast<double>(args.nu[i] * 0);
  return odd == 0.0;
}

template <typename T>
static void write_answer(const Problem& P, const Iteration& it, bool polished, const double (&residual)[3],
                         const QpArguments<T>& args) {
  const double per_cost = 1.0 / P.cost;
  for (std::size_t j = 0; j < P.n; ++j) args.z[j] = static_cast<T>(it.polished[j] * P.D[j]);
  for (std::size_t i = 0; i < P.q; ++i) args.nu[i] = static_cast<T>(it.polished[P.n_blocks + i] * P.E_A[i] * per_cost);
  // Of the side that the multiplier points at, of 0 the nearer one; 1 where there is none; 0 of an equality, and of
  // nothing else, in T either.
  constexpr double least = sizeof(T) == sizeof(double) ? kSmallest : 0x1p-120;
  const auto slack_at = [&](std::size_t i) {
    const bool both = P.side[0].any && P.side[1].any;
    if (P.equal.any && P.equal.has[i]) return 0.0;
    // Bounds that leave no room hold z as an equality does, whichever of them λ points at.
    if (both && P.side[0].has[i] * P.side[1].has[i] != 0.0 &&
        P.side[0].bound[i] - P.side[1].bound[i] <= kNarrow * (1.0 + __builtin_fabs(P.side[0].bound[i])))
      return 0.0;
    const bool below = it.lam[i] < 0.0 || (it.lam[i] == 0.0 && both && nearer_below(P, it.rows[i], i));
    const unsigned k = both ? below : P.side[1].any;
    const Side& side = P.side[k];
    if (!side.any || side.has[i] == 0.0) return 1.0;
    if (!polished) return side.s[i];
    return it.active[i] ? kSmallest : max(side.sign * (side.bound[i] - it.rows[i]), kSmallest);
  };
  for (std::size_t i = 0; i < P.m; ++i) {
    args.lam[i] = static_cast<T>(it.lam[i] * P.E_G[i] * per_cost);
    const double slack = slack_at(i);
    args.slack[i] = static_cast<T>(slack == 0.0 ? 0.0 : max(slack / P.E_G[i], least));
  }
  for (std::size_t j = 0; j < P.n; ++j) {
    const bool has = P.N > P.box;
    args.mu[j] = static_cast<T>(has ? it.lam[P.box + j] / P.D[j] * per_cost : 0.0);
    const double slack = (has ? slack_at(P.box + j) : 1.0) * P.D[j];
    args.box_slack[j] = static_cast<T>(slack == 0.0 ? 0.0 : max(slack, least));
  }
  for (std::size_t i = 0; i < 3; ++i) args.residual[i] = residual[i];
}

// What neither was solved nor has a certificate begins again in units of the z that was seen, with rows in other units,
// multipliers about 0 and more steps; written where it is better than `off`.
template <typename T>
[[gnu::cold]] static void once_more(const QpSizes& sizes, const QpArguments<T>& args, void* memory, bool curved,
                                    const Ends& given, double& off, std::size_t& taken) {
  Ends ends = given;
  ends.steps *= kPersistence;
  Problem P;
  Iteration it;
  bool crossed;
  ActiveSet set;
  Layout layout = lay_out(memory, sizes.n, sizes.m, sizes.q, P, it, sizes.plan);
  if (!is_sparse(P)) lay_out(layout, P, set);
  read_problem(args, Purpose::kSolve, P, crossed);
  P.curved = curved;
  equilibrate(P, it.Kz, it.newton.rows, it.r, true);
  double size = 0.0, residual[3];
  for (std::size_t j = 0; j < P.n; ++j) size = max(size, __builtin_fabs(static_cast<double>(args.z[j])) / P.D[j]);
  resize(P, near_size(size));
  for (std::size_t i = 0; i < P.N; ++i) it.active[i] = 0;
  const bool polished = solve_by_active_set(P, it, is_sparse(P) ? nullptr : &set, false, ends, residual, true) ||
                        solve_cold(P, it, 0.0, ends, residual, true);
  taken += it.taken;
  if (!(worst(residual) < off)) return;
  off = worst(residual);
  write_answer(P, it, polished, residual, args);
}

template <typename T>
static void qp_solve(const QpSizes& sizes, const QpArguments<T>& args, void* memory) noexcept {
  Problem P;
  Iteration it;
  ActiveSet set;
  Layout layout = lay_out(memory, sizes.n, sizes.m, sizes.q, P, it, sizes.plan);
  if (!is_sparse(P)) lay_out(layout, P, set);
  for (std::size_t i = 0; i < 2 * sizes.n + sizes.m + sizes.q; ++i) args.ray[i] = T{0};
  bool crossed;
  const bool sound = read_problem(args, Purpose::kSolve, P, crossed);
  QpStatus status = QpStatus::kSolved;
  double residual[3];
  const bool asked = sizes.tolerance > 0.0;
  const double solved = asked ? sizes.tolerance : kSolvedResidual<T>;
  const Ends ends(sizes, asked ? sizes.tolerance : kNearly);
  if (!sound) {
    status = QpStatus::kNotFiniteInput;
  } else if (!positive_semidefinite(P, it, kUnitRoundoff<T>)) {
    status = QpStatus::kNotConvex;
  } else if (crossed) {
    status = QpStatus::kPrimalInfeasible;
  } else if (ends.over()) {
    status = QpStatus::kFailed;
  } else {
    const bool polished =
        solve_problem(P, it, is_sparse(P) ? nullptr : &set, read_start(args.start, P, it), 0.0, ends, residual);
    double off = worst(residual);
    write_answer(P, it, polished, residual, args);
    const bool left = !(off <= solved);
    if (left || noticeably_off(P, it, residual[1])) {
      double least = kInf, most = 0.0;  // of the diagonal of Q; an entry of 0 passes for curved by its noise
      for (std::size_t j = 0; j < P.n; ++j) {
        const double of_z = curvature(P, j) / (P.D[j] * P.D[j]);
        least = min(least, of_z);
        most = max(most, of_z);
      }
      const bool curved = P.curved, definite = !left || (curved && least >= kEvenly * most);
      if (left) status = QpStatus::kFailed;
      if (!ends.over()) status = certified(sizes, args, memory, definite, status);
      if (status == QpStatus::kFailed) {
        if (!ends.over() && off < kInf && it.taken >= kPursued)
          once_more(sizes, args, memory, curved, ends, off, it.taken);
        if (off <= solved)
          status = QpStatus::kSolved;
        else if (off <= kInaccurateResidual<T>)
          status = QpStatus::kInaccurate;
      }
    }
    if (status <= QpStatus::kInaccurate && !finite(sizes, args)) status = QpStatus::kFailed;  // beyond the range of T
  }
  if (status > QpStatus::kInaccurate) write_nothing(sizes, args);
  if (args.taken) *args.taken = static_cast<std::int32_t>(it.taken);
  *args.status = status;
}

}  // namespace ICNNRT_INSTRUCTION_SET
}  // namespace icnnrt
