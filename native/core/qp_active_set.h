// A dual active-set method for quadratic programs whose Q is definite: where few constraints are tried, it takes a small
// part of the operations of the interior point method.
#pragma once

#include "qp_interior_point.h"

namespace icnnrt {
namespace ICNNRT_INSTRUCTION_SET {

// What equalities and the constraints in the set leave of another one, squared and against the whole, from where on it is
// independent of them.
inline constexpr double kIndependent = 1e-9;
inline constexpr double kViolated = 1e-9;  // equilibrated, from where on a constraint is brought into the set
// Multipliers in the set, and slacks out of it, that are less leave more than one answer to choose from, or nearly so.
inline constexpr double kDistinct = 1e-7;
inline constexpr std::size_t kActiveSetRefinements = 2;

// With K, c and x as in qp_problem.h, C = [G; I], and 𝒜 the constraints that are in the set, at their bounds d:
//
//     x₀ = −K⁻¹c,   v_i = K⁻¹[C_i; 0],   S_i = C v_i,   U'U = S_𝒜𝒜,   U'U λ* = C_𝒜 x₀ − d_𝒜,   x = x₀ − V λ*
//
// x is the minimiser where those are equalities. A constraint in the set has a position, in the order in which they came;
// its v and S lie at the position's slot.
struct ActiveSet {
  std::size_t most = 0;                // constraints that may be in it; 0: there is no memory for one
  std::size_t stride_S, stride;        // of S; of U
  double *V, *S, *U;                   // [most + 1, ld], [most + 1, N], [most, stride]; U without its diagonal
  double *diagonal, *inverse;          // [most] of U, and their inverses
  double *lam, *lam_star, *l, *w;      // [stride]; U'l = S_𝒜i of the constraint that comes, U'w = C_𝒜 x₀ − d_𝒜
  double* by_slot;                     // [most + 1]
  double* rows;                        // [N] C x₀
  std::size_t *row, *slot;             // [most], [most + 1]
  unsigned char* side;                 // [most]
};

// It takes the place of all the search for a ray needs beyond a solve: see `qp_workspace_bytes`.
ICNNRT_INLINE void lay_out(Layout& layout, const Problem& P, ActiveSet& set) {
  set.most = P.n;
  set.stride_S = P.N;
  set.stride = padded(P.n);
  set.V = layout.take<double>((P.n + 1) * P.ld);
  set.S = layout.take<double>((P.n + 1) * P.N);
  set.U = layout.take<double>(P.n * set.stride);
  double** const vectors[] = {&set.diagonal, &set.inverse, &set.lam, &set.lam_star, &set.l, &set.w};
  for (double** const vector : vectors) *vector = layout.take<double>(set.stride);
  set.by_slot = layout.take<double>(P.n + 1);
  set.rows = layout.take<double>(P.N);
  set.row = layout.take<std::size_t>(P.n);
  set.slot = layout.take<std::size_t>(P.n + 1);
  set.side = layout.take<unsigned char>(P.n);
}

namespace {

// The method. λ stays feasible for the dual: of the sign of the side that its constraint is held at.
struct DualActiveSet {
  const Problem& P;
  Iteration& it;
  ActiveSet& set;
  std::size_t size = 0;    // of the set
  std::size_t filled = 0;  // slots whose v and S are there, of constraints in the set or not
  double arriving = 0.0;   // λ of the constraint that comes
  double whole = 0.0;      // c'Q⁻¹c of it

  // False if this method is not for P: it has dependent equalities.
  __attribute__((noinline)) bool start() {
    Newton& newton = it.newton;
    newton.rho = newton.delta = 0.0;
    fill(newton.W, P.N, 0.0);
    if (!(factor(P, newton) > kIndependent)) return false;
    double* const x = it.best_x;  // x₀
    for (std::size_t j = 0; j < P.size; ++j) x[j] = -P.c[j];
    fill(x + P.size, P.ld - P.size, 0.0);
    solve(newton.factors, x);
    rows_times(P, x, set.rows);
    for (std::size_t i = 0; i <= set.most; ++i) set.slot[i] = i;
    fill(set.lam_star, set.stride, 0.0);
    fill(set.l, set.stride, 0.0);
    return true;
  }

  bool is_equality(std::size_t i) const { return P.equal.any && P.equal.has[i]; }
  double sign(std::size_t position) const { return P.side[set.side[position]].sign; }
  bool may_leave(std::size_t position) const { return !is_equality(set.row[position]); }

  // v and S of a constraint, in the slot after those of the set.
  __attribute__((noinline)) void bring(std::size_t i) {
    const std::size_t slot = set.slot[size];
    double* const v = set.V + slot * P.ld;
    if (i < P.m) {
      copy(v, P.G + i * P.ld, P.ld);
    } else {
      fill(v, P.ld, 0.0);
      v[i - P.box] = 1.0;
    }
    forward(it.newton.factors, v);
    whole = 0.0;
    for (std::size_t j = 0; j < P.n_blocks; ++j) whole += v[j] * v[j];
    backward(it.newton.factors, v);
    rows_times(P, v, set.S + slot * set.stride_S);
    if (slot >= filled) filled = slot + 1;
    arriving = 0.0;
  }

  // The constraint that was brought, at the end of the set. False if it depends on those there, or on equalities.
  __attribute__((noinline)) bool enter(std::size_t i, unsigned side) {
    const double* const S = set.S + set.slot[size] * set.stride_S;
    double* const l = set.l;
    for (std::size_t j = 0; j < size; ++j) l[j] = S[set.row[j]];
    double rest = S[i], below = 0.0;
    for (std::size_t j = 0; j < size; ++j) {
      const double* const U = set.U + j * set.stride;
      const double y = l[j] *= set.inverse[j];
      rest -= y * y;
      below += y * set.w[j];
      for (std::size_t c = (j + 1) / W * W; c < size; c += W) store(l + c, load(l + c) - load(U + c) * y);
    }
    if (size == set.most || !(rest > kIndependent * whole)) return false;
    for (std::size_t j = 0; j < size; ++j) set.U[j * set.stride + size] = l[j];
    fill(set.U + size * set.stride, set.stride, 0.0);
    set.diagonal[size] = __builtin_sqrt(rest);
    set.inverse[size] = 1.0 / set.diagonal[size];
    set.w[size] = (set.rows[i] - P.side[side].bound[i] - below) * set.inverse[size];
    set.lam[size] = arriving;
    set.row[size] = i;
    set.side[size] = static_cast<unsigned char>(side);
    l[size] = 0.0;
    ++size;
    return true;
  }

  // Rows of U from the position on are turned into the shape that they had, and w with them.
  __attribute__((noinline)) void leave(std::size_t position) {
    double* const turned = set.lam_star;  // the row that is turned away
    double* const U = set.U;
    const std::size_t stride = set.stride, last = size - 1;
    for (std::size_t j = 0; j < position; ++j) {
      for (std::size_t c = position; c < last; ++c) U[j * stride + c] = U[j * stride + c + 1];
      U[j * stride + last] = 0.0;
    }
    for (std::size_t c = position; c < last; ++c) turned[c] = U[position * stride + c + 1];
    double w = set.w[position];
    for (std::size_t j = position; j < last; ++j) {
      const double *const next = U + (j + 1) * stride;
      const double root = __builtin_sqrt(turned[j] * turned[j] + set.diagonal[j + 1] * set.diagonal[j + 1]);
      const double cosine = turned[j] / root, sine = set.diagonal[j + 1] / root;
      fill(U + j * stride, j + 1, 0.0);
      for (std::size_t c = j + 1; c < last; ++c) {
        const double a = turned[c], b = next[c + 1];
        U[j * stride + c] = cosine * a + sine * b;
        turned[c] = cosine * b - sine * a;
      }
      U[j * stride + last] = 0.0;
      set.diagonal[j] = root;
      set.inverse[j] = 1.0 / root;
      const double next_w = set.w[j + 1];
      set.w[j] = cosine * w + sine * next_w;
      w = cosine * next_w - sine * w;
      set.row[j] = set.row[j + 1];
      set.side[j] = set.side[j + 1];
      set.lam[j] = set.lam[j + 1];
    }
    const std::size_t slot = set.slot[position];
    for (std::size_t j = position; j < size; ++j) set.slot[j] = set.slot[j + 1];
    set.slot[size] = slot;
    fill(set.lam_star, set.stride, 0.0);
    fill(set.l, set.stride, 0.0);
    --size;
  }

  // out = U⁻¹ a; both may be the same.
  void solve_upper(const double* a, double* out) const {
    fill(out + size, set.stride - size, 0.0);
    for (std::size_t j = size; j-- > 0;) {
      const double* const U = set.U + j * set.stride;
      const double y = a[j];
      out[j] = 0.0;
      Vec rest{};
      for (std::size_t c = (j + 1) / W * W; c < size; c += W) rest += load(U + c) * load(out + c);
      out[j] = (y - sum(rest)) * set.inverse[j];
    }
  }

  // a = U'⁻¹ a
  void solve_lower(double* a) const {
    fill(a + size, set.stride - size, 0.0);
    for (std::size_t j = 0; j < size; ++j) {
      const double* const U = set.U + j * set.stride;
      const double y = a[j] *= set.inverse[j];
      for (std::size_t c = (j + 1) / W * W; c < size; c += W) store(a + c, load(a + c) - load(U + c) * y);
    }
  }

  // λ goes to λ*, or as far as signs allow: then the constraint that ends the way leaves, and true is returned.
  __attribute__((noinline)) bool step() {
    solve_upper(set.w, set.lam_star);
    std::size_t first = size;
    double far = 1.0;
    for (std::size_t j = 0; j < size; ++j) {
      const double there = sign(j) * set.lam_star[j], here = sign(j) * set.lam[j];
      if (there >= 0.0 || !may_leave(j)) continue;
      const double part = here > 0.0 ? here / (here - there) : 0.0;
      if (part < far || first == size) {
        far = part;
        first = j;
      }
    }
    if (first == size) {
      copy(set.lam, set.lam_star, size);
      return false;
    }
    for (std::size_t j = 0; j < size; ++j) set.lam[j] += far * (set.lam_star[j] - set.lam[j]);
    leave(first);
    return true;
  }

  // The constraint that was brought and depends on those in the set pushes, until one of them lets go and leaves. False
  // if none does: then no z is feasible.
  __attribute__((noinline)) bool push(unsigned side) {
    double* const d = set.lam_star;  // U'U d = −S_𝒜i
    solve_upper(set.l, d);
    const double push = P.side[side].sign;
    std::size_t first = size;
    double far = kInf;
    for (std::size_t j = 0; j < size; ++j) {
      const double falls = sign(j) * push * d[j];
      if (!(falls > 0.0) || !may_leave(j)) continue;
      const double part = max(sign(j) * set.lam[j], 0.0) / falls;
      if (part < far) {
        far = part;
        first = j;
      }
    }
    if (first == size) return false;
    for (std::size_t j = 0; j < size; ++j) set.lam[j] -= far * push * d[j];
    arriving += far * push;
    leave(first);
    return true;
  }

  // out += sign of it × M_𝒜'λ, M being S or V
  void add_products(const double* M, std::size_t stride, std::size_t columns, const double* lam, double* out) const {
    fill(set.by_slot, filled, 0.0);
    for (std::size_t j = 0; j < size; ++j) set.by_slot[set.slot[j]] = -lam[j];
    add_columns_times(M, stride, filled, columns, set.by_slot, out);
  }

  // The constraint that is furthest out at x₀ − V λ and its side; P.N if all are met.
  __attribute__((noinline)) std::size_t furthest_out(unsigned& side) const {
    copy(it.rows, set.rows, P.N);
    add_products(set.S, set.stride_S, P.N, set.lam, it.rows);
    double most = kViolated;
    std::size_t found = P.N;
    for (unsigned k = 0; k < 2; ++k) {
      const Side& of = P.side[k];
      if (!of.any) continue;
      Vec furthest{};
      const auto out = [&](std::size_t i) {
        return (load(it.rows + i) - load(of.bound + i)) * load(of.has + i) * of.sign;
      };
      for (std::size_t i = 0; i < P.N; i += W) furthest = larger(furthest, out(i));
      const double here = largest(furthest);
      if (!(here > most)) continue;
      for (std::size_t i = 0; i < P.N; i += W) {
        const Vec there = out(i);
        for (std::size_t l = 0; l < W; ++l)
          if (there[l] == here) found = i + l;
      }
      most = here;
      side = k;
    }
    return found;
  }

  // Whether multipliers in the set and slacks out of it are far enough from 0 for no other answer to be near: with
  // independent constraints in the set, that is the only one.
  bool distinct() const {
    for (unsigned k = 0; k < 2; ++k) {
      const Side& side = P.side[k];
      for (std::size_t i = 0; side.any && i < P.N; ++i)
        if (side.has[i] != 0.0 && it.active[i] != k + 1 && !(side.sign * (side.bound[i] - it.rows[i]) > kDistinct))
          return false;
    }
    for (std::size_t j = 0; j < size; ++j)
      if (may_leave(j) && !(sign(j) * set.lam[j] > kDistinct)) return false;
    return true;
  }

  // x in it.polished and signed λ in it.lam, and how good they are. Newton's steps follow where rounding is seen.
  __attribute__((noinline)) bool finish(double enough, double (&residual)[3]) {
    double *const x = it.polished, *const d_x = it.dx, *const d_lam = set.lam_star;
    fill(it.lam, P.N, 0.0);
    for (std::size_t i = 0; i < P.N; ++i) it.active[i] = 0;
    for (std::size_t j = 0; j < size; ++j) it.active[set.row[j]] = static_cast<unsigned char>(set.side[j] + 1);
    copy(x, it.best_x, P.ld);
    add_products(set.V, P.ld, P.size, set.lam, x);
    for (std::size_t pass = 0;; ++pass) {
      for (std::size_t j = 0; j < size; ++j) it.lam[set.row[j]] = set.lam[j];
      kkt_residual(P, it, x, it.lam, residual);
      if (worst(residual) <= enough) return distinct();
      if (pass == kActiveSetRefinements) return false;
      for (std::size_t j = 0; j < P.size; ++j) d_x[j] = -(it.Kz[j] + P.c[j] + it.G_lam[j] + it.A_nu[j]);
      for (std::size_t i = P.box; i < P.N; ++i) d_x[i - P.box] -= it.lam[i];
      fill(d_x + P.size, P.ld - P.size, 0.0);
      solve(it.newton.factors, d_x);
      rows_times(P, d_x, it.d_rows);
      for (std::size_t j = 0; j < size; ++j) {
        const std::size_t i = set.row[j];
        d_lam[j] = it.d_rows[i] + it.rows[i] - P.side[set.side[j]].bound[i];
      }
      solve_lower(d_lam);
      solve_upper(d_lam, d_lam);
      add_products(set.V, P.ld, P.size, d_lam, d_x);
      for (std::size_t j = 0; j < P.size; ++j) x[j] += d_x[j];
      for (std::size_t j = 0; j < size; ++j) set.lam[j] += d_lam[j];
    }
  }

  // From the constraints in it.active if `warm`. True if the solution was found: x is in it.polished, λ in it.lam.
  __attribute__((noinline)) bool run(bool warm, const Ends& ends, double (&residual)[3]) {
    if (!start()) return false;
    for (std::size_t i = 0; P.equal.any && i < P.N; ++i) {
      if (!P.equal.has[i]) continue;
      bring(i);
      if (!enter(i, 0)) return false;
    }
    for (std::size_t i = 0; warm && i < P.N; ++i) {
      if (!it.active[i] || is_equality(i)) continue;
      bring(i);
      enter(i, it.active[i] - 1u);
    }
    const std::size_t most = 3 * (P.N + P.q) + 10;
    for (std::size_t steps = 0; steps < most && !ends.over(); ++steps) {
      if (step()) continue;
      unsigned side = 0;
      const std::size_t i = furthest_out(side);
      if (i == P.N) return finish(min(ends.enough, kEnough), residual);
      bring(i);
      while (!enter(i, side))
        if (++steps >= most || !push(side)) return false;
    }
    return false;
  }
};

}  // namespace

}  // namespace ICNNRT_INSTRUCTION_SET
}  // namespace icnnrt
