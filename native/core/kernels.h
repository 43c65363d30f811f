// The solvers behind the operators of domain ai.icnnrt, on plain arrays: one sample a call.
//
// Problem (Amos, Xu, Kolter, Input Convex Neural Networks, ICML 2017): with k cuts, slopes G [k, n] and centred
// offsets e [k],
//     primal   min over y in [0,1]^n, t of  t - H(y)   s.t.  e + G(y - 1/2) <= t 1,
//              H(y) = - sum y log y + (1-y) log(1-y)
//     dual     max over lam in the simplex of  e'lam + 1/2 1's - sum softplus(s),   s = -G'lam
//     link     y = sigma(s),   D = diag(sigma(s) sigma(-s)),   v = e + G(y - 1/2)
// max v - lam'v is the gap between the two.
//
// Nothing here allocates, throws, locks or keeps state: the caller passes a workspace, and calls with different
// workspaces may run at once. All arithmetic is in double, whatever T is. Results are a function of the arguments and
// of the instruction set alone.
#pragma once

#include <cstddef>

namespace icnnrt {

inline constexpr std::size_t kWorkspaceAlignment = 64;  // bytes; a cache line, and the widest vector there is

// One problem of BundleEntropySolve. All arrays are row-major and contiguous, of any alignment.
template <typename T>
struct SolveArguments {
  const T* slopes;      // G [k, n]
  const T* offsets;     // e [k]
  const T* lam_start;   // [k_prev], multipliers of the first cuts; not read when k_prev = 0 (cold start)
  T* y;                 // [n] out: sigma(-G'lam), NaN if any cut is NaN or infinite
  T* lam;               // [k] out: on the simplex, the best found
  double* lower_bound;  // [1] out: dual value; NaN with y
  double* residual;     // [3] out: what rounding to T took from y, |1'lam - 1|, max v - lam'v; [0] and [2] NaN with y
};

// One problem of BundleEntropyAdjoint: the KKT solve of the paper's Proposition 3.
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

// The kernels compiled for one instruction set.
template <typename T>
struct Kernels {
  const char* instruction_set;
  void (*solve)(const Sizes&, const SolveArguments<T>&, void* workspace) noexcept;
  void (*adjoint)(const Sizes&, const AdjointArguments<T>&, void* workspace) noexcept;
};

// Bytes of workspace, aligned to kWorkspaceAlignment, that one call of `solve` or `adjoint` may use; it needs no
// initialisation and nothing in it outlives the call. 0 if the sizes are too large to count.
std::size_t workspace_bytes(const Sizes& sizes) noexcept;

// The fastest kernels that this processor can run.
template <typename T>
const Kernels<T>& kernels() noexcept;

// All kernels in this library, best first, for tests: those that this processor cannot run are null.
inline constexpr std::size_t kInstructionSets = 3;
template <typename T>
const Kernels<T>* kernels_for(std::size_t instruction_set) noexcept;

}  // namespace icnnrt
