// The solvers behind the operators of domain ai.icnnrt, on plain arrays: one sample a call.
//
// Problem (Amos, Xu, Kolter, Input Convex Neural Networks, ICML 2017): with k cuts, slopes G [k, n] and offsets e [k]
// at the centre c of a domain, on which R is strongly convex,
//     primal   min over y in the domain, t of  t + R(y)   s.t.  v = e + G(y - c) <= t 1
//     dual     max over lam in the simplex of  e'lam - R*(s),   s = -G'lam,   R*(s) = max over y of s'(y - c) - R(y)
//     link     y = y(lam) attains R*,   D = dy/ds
// max v - lam'v is the gap between the two.
//
// clang-format off
//     domain      y in             c    R(y)                          R*(s)                     y(lam)      D
//     kEntropy    [0,1]^n          1/2  sum y log y + (1-y) log(1-y)  sum softplus(s) - s/2     sigma(s)    diag(y(1-y))
//     kSimplex    y >= 0, 1'y = 1  1/n  sum y log y                   log sum e^s - mean(s)     softmax(s)  diag(y) - yy'
//     kQuadratic  R^n              0    y'y / 2                       s's / 2                   s           I
// clang-format on
//
// Nothing here allocates, throws, locks or keeps state: the caller passes a workspace, and calls with different
// workspaces may run at once. All arithmetic is in double, whatever T is. Results are a function of the arguments and
// of the instruction set alone.
#pragma once

#include <cstddef>

namespace icnnrt {

enum class Domain { kEntropy, kSimplex, kQuadratic };
inline constexpr std::size_t kDomains = 3;

inline constexpr std::size_t kWorkspaceAlignment = 64;  // bytes; a cache line, and the widest vector there is

// One problem of Bundle...Solve. All arrays are row-major and contiguous, of any alignment.
template <typename T>
struct SolveArguments {
  const T* slopes;      // G [k, n]
  const T* offsets;     // e [k]
  const T* lam_start;   // [k_prev], multipliers of the first cuts; not read when k_prev = 0 (cold start)
  T* y;                 // [n] out: y(lam), NaN if any cut is NaN or infinite
  T* lam;               // [k] out: on the simplex, the best found
  double* lower_bound;  // [1] out: dual value; NaN with y
  double* residual;     // [3] out: what rounding to T took from y, |1'lam - 1|, max v - lam'v; [0] and [2] NaN with y
};

// One problem of Bundle...Adjoint: the KKT solve of the paper's Proposition 3.
template <typename T>
struct AdjointArguments {
  const T* slopes;   // G [k, n]
  const T* offsets;  // e [k]
  const T* lam;      // [k], a solution of the model
  const T* y_bar;    // [n], cotangent of y
  T* c_y;            // [n] out
  T* c_lam;          // [k] out
};

// Sizes shared by all samples of a batch: 1 <= k, 1 <= n, 0 <= k_prev <= k. `steps` >= 0 bounds the steps of one solve,
// those of Newton's method and of the interior points together. Each takes one product G D G' and evaluates a few λ;
// beyond that an interior-point step solves one system of k equations, a Newton step one for every change of the
// active set.
struct Sizes {
  std::size_t k;
  std::size_t n;
  std::size_t k_prev = 0;
  std::size_t steps = 0;
};

// The kernels for one domain, compiled for one instruction set.
template <typename T>
struct Kernels {
  const char* instruction_set;
  Domain domain;
  void (*solve)(const Sizes&, const SolveArguments<T>&, void* workspace) noexcept;
  void (*adjoint)(const Sizes&, const AdjointArguments<T>&, void* workspace) noexcept;
};

// Bytes of workspace, aligned to kWorkspaceAlignment, that one call of `solve` or `adjoint` may use; it needs no
// initialisation and nothing in it outlives the call. 0 if the sizes are too large to count.
std::size_t workspace_bytes(const Sizes& sizes) noexcept;

// An environment variable with the name of an instruction set: better ones count as ones that this processor has not.
// It is for tests, and for the same bits on machines that differ; it cannot ask for what the processor lacks.
inline constexpr const char* kLimitVariable = "ICNNRT_MAX_INSTRUCTION_SET";
// Its value, cut at 40 bytes, if that names none of this library's instruction sets, and then nothing is left out;
// otherwise null.
const char* refused_limit() noexcept;
// The names of this library's instruction sets, best first, with a space between.
const char* instruction_sets() noexcept;

// The fastest kernels that this processor can run.
template <typename T>
const Kernels<T>& kernels(Domain domain = Domain::kEntropy) noexcept;

// All kernels in this library, best first, for tests: those that this processor cannot run are null.
inline constexpr std::size_t kInstructionSets = 3;
template <typename T>
const Kernels<T>* kernels_for(std::size_t instruction_set, Domain domain = Domain::kEntropy) noexcept;

}  // namespace icnnrt
