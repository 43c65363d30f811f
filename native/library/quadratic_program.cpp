// One quadratic program, or its adjoint, for whoever has plain arrays and no need of onnxruntime's threads: a call of
// onnxruntime takes several times as long as a small program does.
//
// icnnrt/serving/direct_kernels.py has the same structs and says what they hold. Names are those of core/qp.h; arrays
// are of double where `itemsize` is 8, and of float where it is 4.
#include <algorithm>
#include <cstdint>

#include "../core/qp.h"

#define ICNNRT_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

struct Sizes {
  std::size_t itemsize, n, m, q;
};

struct SolveCall {
  Sizes sizes;
  std::size_t steps;
  double tolerance, seconds;  // as `set_limits` takes them
  const void *Q, *p, *G, *h_lower, *h, *A, *b, *lower, *upper;
  void* start;  // if there is one, memory for the answer that z, lam, nu and mu hold, which the solve starts from
  void *z, *lam, *nu, *mu, *slack, *box_slack, *residual, *status, *ray, *taken;
  void* workspace;
};

struct AdjointCall {
  Sizes sizes;
  const void *Q, *G, *A, *lam, *mu, *slack, *box_slack, *status, *z_bar, *lam_bar, *nu_bar, *mu_bar;
  void *d_z, *d_lam, *d_nu, *d_mu, *share, *weak;
  void* workspace;
};

icnnrt::QpSizes sizes_of(const Sizes& sizes) { return {sizes.n, sizes.m, sizes.q}; }

template <typename T>
const T* in(const void* array) {
  return static_cast<const T*>(array);
}
template <typename T>
T* out(void* array) {
  return static_cast<T*>(array);
}

template <typename T>
void read_last_answer(const SolveCall& call) {
  const auto& [itemsize, n, m, q] = call.sizes;
  T* into = out<T>(call.start);
  const auto append = [&into](const void* part, std::size_t size) {
    std::copy_n(in<T>(part), size, into);
    into += size;
  };
  append(call.z, n);
  append(call.lam, m);
  append(call.nu, q);
  append(call.mu, n);
}

template <typename T>
void solve(const SolveCall& call) {
  icnnrt::QpSizes sizes = sizes_of(call.sizes);
  if (call.start) read_last_answer<T>(call);
  sizes.steps = call.steps;
  icnnrt::set_limits(sizes, call.tolerance, call.seconds);
  icnnrt::QpStatus status;
  icnnrt::qp_kernels<T>().solve(sizes,
                                {in<T>(call.Q),
                                 in<T>(call.p),
                                 in<T>(call.G),
                                 in<T>(call.h_lower),
                                 in<T>(call.h),
                                 in<T>(call.A),
                                 in<T>(call.b),
                                 in<T>(call.lower),
                                 in<T>(call.upper),
                                 in<T>(call.start),
                                 out<T>(call.z),
                                 out<T>(call.lam),
                                 out<T>(call.nu),
                                 out<T>(call.mu),
                                 out<T>(call.slack),
                                 out<T>(call.box_slack),
                                 out<double>(call.residual),
                                 &status,
                                 out<T>(call.ray),
                                 out<std::int32_t>(call.taken)},
                                call.workspace);
  *out<std::int32_t>(call.status) = static_cast<std::int32_t>(status);
}

template <typename T>
void adjoint(const AdjointCall& call) {
  icnnrt::qp_kernels<T>().adjoint(
      sizes_of(call.sizes),
      {in<T>(call.Q), in<T>(call.G), in<T>(call.A), in<T>(call.lam), in<T>(call.mu), in<T>(call.slack),
       in<T>(call.box_slack), static_cast<icnnrt::QpStatus>(*in<std::int32_t>(call.status)), in<T>(call.z_bar),
       in<T>(call.lam_bar), in<T>(call.nu_bar), in<T>(call.mu_bar), out<T>(call.d_z), out<T>(call.d_lam),
       out<T>(call.d_nu), out<T>(call.d_mu), out<double>(call.share), out<std::int32_t>(call.weak)},
      call.workspace);
}

}  // namespace

// Bytes of workspace, aligned to 64, that either call may use; 0 if the sizes are too large to count.
ICNNRT_EXPORT std::size_t icnnrt_qp_workspace_bytes(std::size_t n, std::size_t m, std::size_t q) {
  return icnnrt::qp_workspace_bytes({n, m, q});
}

ICNNRT_EXPORT void icnnrt_qp_solve(const SolveCall* call) {
  call->sizes.itemsize == sizeof(double) ? solve<double>(*call) : solve<float>(*call);
}

ICNNRT_EXPORT void icnnrt_qp_adjoint(const AdjointCall* call) {
  call->sizes.itemsize == sizeof(double) ? adjoint<double>(*call) : adjoint<float>(*call);
}
