// A dual active-set method for quadratic programs whose Q is definite: where few constraints are tried, it takes a
// small part of the operations of the interior point method.
#pragma once

#include "qp_interior_point.h"

namespace icnnrt {
namespace ICNNRT_INSTRUCTION_SET {

// What equalities and the constraints in the set leave of another one, squared and against the whole: if it is less, it
// depends on them; and if so much, multipliers are known well enough to be the only ones.
inline constexpr double kDependent = 1e-12;
inline constexpr double kIndependent = 1e-8;
inline constexpr double kViolated = 1e-9;  // equilibrated, from where on a constraint is brought into the set
// Multipliers in the set, and slacks out of it, that are less leave more than one answer to choose from, or nearly so.
inline constexpr double kDistinct = 1e-7;
// What is not as exact as this is refined, as rounding is seen in it.
inline constexpr double kSharp = 1e-13;
inline constexpr std::size_t kActiveSetRefinements = 2;
inline constexpr std::size_t kTogether = 4;  // constraints that come at once
// As many constraints may enter, and one more for every kPart variables, or a quarter as many rows: more cost what the
// interior point method takes, and so do problems where more are violated.
inline constexpr std::size_t kFewest = 40, kPart = 20;
inline constexpr double kQueued = 0.8;  // part of the largest violation, from where on a constraint comes with it

// With K = V'JV, c and x as in qp_problem.h, J = diag(1, −1), C = [G; I], and 𝒜 the constraints in the set, at their
// bounds d:
//
//     y_c = −V'⁻¹c,   y_i = V'⁻¹[C_i; 0],   U'U = Y'JY,   U'U λ* = Y'J y_c − d_𝒜,   x = V⁻¹J (y_c − Y λ*)
//
// x is the minimiser where those are equalities. A constraint in the set has a position, in the order in which they
// came; its y lies at the position's slot.
struct ActiveSet {
  std::size_t most = 0;            // constraints that may be in it
  std::size_t stride;              // of U
  double *Y, *U;                   // [most + kTogether, ld], [most, stride]; U without its diagonal
  double *y_c, *J, *Jy;            // [ld]
  double *diagonal, *inverse;      // [stride] of U, and their inverses
  double *lam, *lam_star, *l, *w;  // [stride]; U'l = Y'Jy of the constraint that comes, U'w = Y'J y_c − d_𝒜
  double *by_slot, *whole;         // [most + kTogether]; C_i Q⁻¹C_i'
  std::size_t *row, *slot;         // [most]; [most + kTogether]
  std::size_t* queue;              // [2 N] of constraints that come: row and side
  unsigned char* side;             // [most]
};

// What a solve needs beside what all take; `qp_workspace_bytes` in dispatch.cpp allows for it.
ICNNRT_NO_INLINE void lay_out(Layout& layout, const Problem& P, ActiveSet& set) {
  set.most = P.n > P.q ? P.n - P.q : 0;
  set.stride = padded(P.n);
  set.Y = layout.take<double>((P.n + kTogether) * P.ld);
  set.U = layout.take<double>(P.n * set.stride);
  double** const columns[] = {&set.y_c, &set.J, &set.Jy};
  for (double** const column : columns) *column = layout.take<double>(P.ld);
  double** const vectors[] = {&set.diagonal, &set.inverse, &set.lam, &set.lam_star, &set.l, &set.w};
  for (double** const vector : vectors) *vector = layout.take<double>(set.stride);
  set.by_slot = layout.take<double>(P.n + kTogether);
  set.whole = layout.take<double>(P.n + kTogether);
  set.row = layout.take<std::size_t>(P.n);
  set.slot = layout.take<std::size_t>(P.n + kTogether);
  set.queue = layout.take<std::size_t>(2 * P.N);
  set.side = layout.take<unsigned char>(P.n);
}

namespace {

// The method. λ stays feasible for the dual: of the sign of the side that its constraint is held at.
struct DualActiveSet {
  const Problem& P;
  Iteration& it;
  ActiveSet& set;
  std::size_t size = 0;    // of the set
  std::size_t filled = 0;  // slots whose y is there, of a constraint in the set or not
  std::size_t out = 0;     // constraints that x violates
  double arriving = 0.0;   // λ of the constraint that comes

  // False if this method is not for P: it has dependent equalities.
  __attribute__((noinline)) bool start() {
    Newton& newton = it.newton;
    if (P.scaled || !newton.plain) {
      newton.rho = newton.delta = 0.0;
      fill(newton.W, P.N, 0.0);
      factor(P, newton);
    }
    if (!(newton.least_of_S > kIndependent)) return false;
    for (std::size_t j = 0; j < P.ld; ++j) {
      set.y_c[j] = j < P.size ? -P.c[j] : 0.0;
      set.J[j] = j < P.n_blocks ? 1.0 : j < P.size ? -1.0 : 0.0;
    }
    double* const only[] = {set.y_c};
    forward(newton.factors, only);
    for (std::size_t i = 0; i < set.most + kTogether; ++i) set.slot[i] = i;
    fill(set.lam_star, set.stride, 0.0);
    fill(set.l, set.stride, 0.0);
    return true;
  }

  bool is_equality(std::size_t i) const { return P.equal.any && P.equal.has[i]; }
  double sign(std::size_t position) const { return P.side[set.side[position]].sign; }
  bool may_leave(std::size_t position) const { return !is_equality(set.row[position]); }

  // y of R constraints, in the slots after those of the set.
  template <std::size_t R>
  __attribute__((noinline)) void bring(const std::size_t* queued) {
    double* y[R];
    for (std::size_t r = 0; r < R; ++r) {
      const std::size_t i = queued[2 * r], slot = set.slot[size + r];
      y[r] = set.Y + slot * P.ld;
      if (i < P.m) {
        copy(y[r], P.G + i * P.ld, P.ld);
      } else {
        fill(y[r], P.ld, 0.0);
        y[r][i - P.box] = 1.0;
      }
      if (slot >= filled) filled = slot + 1;
    }
    forward(it.newton.factors, y);
    arriving = 0.0;
  }

  double dot(const double* a, const double* b) const {
    Vec total{};
    for (std::size_t c = 0; c < P.size; c += W) total += load(a + c) * load(b + c);
    return sum(total);
  }

  // The constraint that was brought to the slot at that position, at the end of the set. False if it depends on those
  // there, or on equalities.
  __attribute__((noinline)) bool enter(std::size_t i, std::size_t side, std::size_t at) {
    const double* const y = set.Y + set.slot[at] * P.ld;
    double* const l = set.l;
    Vec magnitude{}, squares{};
    for (std::size_t c = 0; c < P.size; c += W) {
      const Vec here = load(y + c), turned = here * load(set.J + c);
      store(set.Jy + c, turned);
      magnitude += here * here;
      squares += here * turned;
    }
    double rest = sum(squares), below = 0.0;
    const double whole = 0.5 * (sum(magnitude) + rest);
    set.whole[set.slot[at]] = whole;
    for (std::size_t j = 0; j < size; ++j) l[j] = dot(set.Y + set.slot[j] * P.ld, set.Jy);
    for (std::size_t j = 0; j < size; ++j) {
      const double* const U = set.U + j * set.stride;
      const double known = l[j] *= set.inverse[j];
      rest -= known * known;
      below += known * set.w[j];
      for (std::size_t c = (j + 1) / W * W; c < size; c += W) store(l + c, load(l + c) - load(U + c) * known);
    }
    if (size == set.most || !(rest > kDependent * whole)) return false;
    const std::size_t slot = set.slot[at];
    set.slot[at] = set.slot[size];
    set.slot[size] = slot;
    for (std::size_t j = 0; j < size; ++j) set.U[j * set.stride + size] = l[j];
    fill(set.U + size * set.stride, set.stride, 0.0);
    set.diagonal[size] = __builtin_sqrt(rest);
    set.inverse[size] = 1.0 / set.diagonal[size];
    set.w[size] = (dot(set.y_c, set.Jy) - P.side[side].bound[i] - below) * set.inverse[size];
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
      const double* const next = U + (j + 1) * stride;
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
  __attribute__((noinline)) bool push(std::size_t side) {
    double* const d = set.lam_star;  // U'U d = Y'Jy
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

  // x = V⁻¹J (x − Y λ)
  void to_x(const double* lam, double* x) const {
    fill(set.by_slot, filled, 0.0);
    for (std::size_t j = 0; j < size; ++j) set.by_slot[set.slot[j]] = -lam[j];
    add_columns_times(set.Y, P.ld, filled, P.size, set.by_slot, x);
    double* const only[] = {x};
    backward(it.newton.factors, only);
  }

  // x in it.polished and C x in it.rows; then the constraints that x violates most are queued, the first of them that
  // which it violates most of all. How many there are.
  __attribute__((noinline)) std::size_t violated() {
    copy(it.polished, set.y_c, P.ld);
    to_x(set.lam, it.polished);
    rows_times(P, it.polished, it.rows);
    double most = kViolated;
    for (const Side& side : P.side) {
      if (!side.any) continue;
      Vec furthest{};
      for (std::size_t i = 0; i < P.N; i += W)
        furthest = larger(furthest, (load(it.rows + i) - load(side.bound + i)) * load(side.has + i) * side.sign);
      most = larger(most, largest(furthest));
    }
    if (!(most > kViolated)) return 0;
    std::size_t count = 0;
    out = 0;
    for (std::size_t k = 0; k < 2; ++k) {
      const Side& side = P.side[k];
      for (std::size_t i = 0; side.any && i < P.N; ++i) {
        const double by = (it.rows[i] - side.bound[i]) * side.has[i] * side.sign;
        out += by > kViolated;
        if (!(by >= kQueued * most)) continue;
        std::size_t *const first = set.queue, *const next = set.queue + 2 * count++;
        next[0] = i;
        next[1] = k;
        if (by != most) continue;
        for (std::size_t l = 0; l < 2; ++l) {
          const std::size_t other = first[l];
          first[l] = next[l];
          next[l] = other;
        }
      }
    }
    return count;
  }

  // Brings the first `count` of the queue, and how many of them enter.
  __attribute__((noinline)) std::size_t admit(std::size_t count) {
    const std::size_t before = size;
    for (std::size_t next = 0; next < count;) {
      const std::size_t* const queued = set.queue + 2 * next;
      const std::size_t left = count - next, together = left >= 4 ? 4 : left >= 2 ? 2 : 1, first = size;
      if (together == 4)
        bring<4>(queued);
      else if (together == 2)
        bring<2>(queued);
      else
        bring<1>(queued);
      for (std::size_t r = 0; r < together; ++r) enter(queued[2 * r], queued[2 * r + 1], first + r);
      next += together;
    }
    return size - before;
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
      if ((may_leave(j) && !(sign(j) * set.lam[j] > kDistinct)) ||
          !(set.diagonal[j] * set.diagonal[j] > kIndependent * set.whole[set.slot[j]]))
        return false;
    return true;
  }

  // x in it.polished and signed λ in it.lam, and whether they are good enough and, unless it may be `any`, the only
  // ones.
  __attribute__((noinline)) bool finish(bool any, const Ends& ends, double (&residual)[3]) {
    const double enough = min(ends.enough, kEnough);
    double *const x = it.polished, *const d_x = it.dx, *const d_lam = set.lam_star;
    fill(it.lam, P.N, 0.0);
    for (std::size_t i = 0; i < P.N; ++i) it.active[i] = 0;
    for (std::size_t j = 0; j < size; ++j) it.active[set.row[j]] = static_cast<unsigned char>(set.side[j] + 1);
    for (std::size_t pass = 0;; ++pass) {
      for (std::size_t j = 0; j < size; ++j) it.lam[set.row[j]] = set.lam[j];
      kkt_residual(P, it, x, it.lam, residual);
      const double off = worst(residual);
      if (off <= min(kSharp, enough) || pass == kActiveSetRefinements) {
        if (any) return off <= ends.nearly;
        if (off <= enough && distinct()) return true;
        it.one_of_many = off <= ends.nearly;
        return false;
      }
      for (std::size_t j = 0; j < P.size; ++j) d_x[j] = -(it.Kz[j] + P.c[j] + it.G_lam[j] + it.A_nu[j]);
      for (std::size_t i = P.box; i < P.N; ++i) d_x[i - P.box] -= it.lam[i];
      fill(d_x + P.size, P.ld - P.size, 0.0);
      double* const only[] = {d_x};
      forward(it.newton.factors, only);
      for (std::size_t j = 0; j < P.size; ++j) set.Jy[j] = set.J[j] * d_x[j];
      for (std::size_t j = 0; j < size; ++j) {
        const std::size_t i = set.row[j];
        d_lam[j] = dot(set.Y + set.slot[j] * P.ld, set.Jy) + it.rows[i] - P.side[set.side[j]].bound[i];
      }
      solve_lower(d_lam);
      solve_upper(d_lam, d_lam);
      to_x(d_lam, d_x);
      for (std::size_t j = 0; j < P.size; ++j) x[j] += d_x[j];
      for (std::size_t j = 0; j < size; ++j) set.lam[j] += d_lam[j];
    }
  }

  // From the constraints in it.active if `warm`. True if the solution was found: x is in it.polished, λ in it.lam.
  __attribute__((noinline)) bool run(bool warm, bool any, const Ends& ends, double (&residual)[3]) {
    if (!start()) return false;
    std::size_t count = 0;
    const auto queue = [&](std::size_t i, std::size_t side) {
      set.queue[2 * count] = i;
      set.queue[2 * count++ + 1] = side;
    };
    for (std::size_t i = 0; P.equal.any && i < P.N; ++i)
      if (P.equal.has[i]) queue(i, 0);
    if (admit(count) < count) return false;
    count = 0;
    for (std::size_t i = 0; warm && i < P.N; ++i)
      if (it.active[i] && !is_equality(i)) queue(i, it.active[i] - 1u);
    admit(count);
    const std::size_t most = kFewest + (P.n + 4 * (P.m + P.q)) / kPart;
    std::size_t left = most;  // constraints that may still enter
    for (std::size_t steps = 3 * most; steps > 0 && !ends.over(); --steps) {
      while (step())
        if (--steps == 0) return false;
      count = violated();
      if (count == 0) return finish(any, ends, residual);
      if (out > most) return false;
      std::size_t entered = size + count <= set.most ? admit(count) : 0;
      if (entered == 0) {
        bring<1>(set.queue);
        while (!enter(set.queue[0], set.queue[1], size))
          if (--steps == 0 || !push(set.queue[1])) return false;
        entered = 1;
      }
      if (entered > left) return false;
      left -= entered;
    }
    return false;
  }
};

}  // namespace

}  // namespace ICNNRT_INSTRUCTION_SET
}  // namespace icnnrt
