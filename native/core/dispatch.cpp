// Which kernels this processor can run, and how much workspace they take.
#include "kernels.h"
#include "qp.h"

// The instruction sets this library was compiled for, best first.
#if defined(ICNNRT_X86_64)
#define ICNNRT_INSTRUCTION_SETS(X)                                                                                \
  X(x86_64_v4, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&                         \
                   __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&                    \
                   __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("bmi2") &&                        \
                   __builtin_cpu_supports("fma"))                                                                 \
  X(x86_64_v3, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("fma")) \
  X(x86_64_v2, true)
#elif defined(__aarch64__)
#define ICNNRT_INSTRUCTION_SETS(X) X(aarch64, true)
#else
#define ICNNRT_INSTRUCTION_SETS(X) X(baseline, true)
#endif

namespace icnnrt {

#define ICNNRT_DECLARE(name, supported)           \
  namespace name {                                \
  extern const Kernels<float> kFloat[kDomains];   \
  extern const Kernels<double> kDouble[kDomains]; \
  extern const QpKernels<float> kQpFloat;         \
  extern const QpKernels<double> kQpDouble;       \
  }
ICNNRT_INSTRUCTION_SETS(ICNNRT_DECLARE)
#undef ICNNRT_DECLARE

#define ICNNRT_DEFINE(T, kTable)                                                          \
  template <>                                                                             \
  const Kernels<T>* kernels_for<T>(std::size_t instruction_set, Domain domain) noexcept { \
    std::size_t left = instruction_set;                                                   \
    ICNNRT_INSTRUCTION_SETS(ICNNRT_NTH_##kTable)                                          \
    return nullptr;                                                                       \
  }                                                                                       \
  template <>                                                                             \
  const Kernels<T>& kernels<T>(Domain domain) noexcept {                                  \
    std::size_t n = 0;                                                                    \
    while (kernels_for<T>(n, domain) == nullptr) ++n; /* the last runs everywhere */      \
    return *kernels_for<T>(n, domain);                                                    \
  }
#define ICNNRT_NTH_kFloat(name, supported) \
  if (left-- == 0) return (supported) ? &name::kFloat[static_cast<std::size_t>(domain)] : nullptr;
#define ICNNRT_NTH_kDouble(name, supported) \
  if (left-- == 0) return (supported) ? &name::kDouble[static_cast<std::size_t>(domain)] : nullptr;
ICNNRT_DEFINE(float, kFloat)
ICNNRT_DEFINE(double, kDouble)

#define ICNNRT_DEFINE_QP(T, kTable)                                             \
  template <>                                                                   \
  const QpKernels<T>* qp_kernels_for<T>(std::size_t instruction_set) noexcept { \
    std::size_t left = instruction_set;                                         \
    ICNNRT_INSTRUCTION_SETS(ICNNRT_NTH_##kTable)                                \
    return nullptr;                                                             \
  }                                                                             \
  template <>                                                                   \
  const QpKernels<T>& qp_kernels<T>() noexcept {                                \
    std::size_t n = 0;                                                          \
    while (qp_kernels_for<T>(n) == nullptr) ++n; /* the last runs everywhere */ \
    return *qp_kernels_for<T>(n);                                               \
  }
#define ICNNRT_NTH_kQpFloat(name, supported) \
  if (left-- == 0) return (supported) ? &name::kQpFloat : nullptr;
#define ICNNRT_NTH_kQpDouble(name, supported) \
  if (left-- == 0) return (supported) ? &name::kQpDouble : nullptr;
ICNNRT_DEFINE_QP(float, kQpFloat)
ICNNRT_DEFINE_QP(double, kQpDouble)

std::size_t qp_workspace_bytes(const QpSizes& sizes) noexcept {
  // Enough for `lay_out` in qp_solve.h, of a solve and of the search for a ray, which has the rows of Q among its
  // equalities: 2 [size, ld] and 2 [m, ld] and 1 [q, ld], 15 [ld], 37 [N], with size < 2 n + q + 8, ld < size + 16,
  // N < n + m + 24, each array rounded up to the alignment.
  std::size_t size = 0, ld = 0, rows = 0, matrices = 0, N = 0, total = 0;
  const bool overflow = __builtin_mul_overflow(sizes.n, 2, &size) || __builtin_add_overflow(size, sizes.q, &size) ||
                        __builtin_add_overflow(size, 8, &size) || __builtin_add_overflow(size, 16, &ld) ||
                        __builtin_mul_overflow(size, 3, &rows) || __builtin_add_overflow(rows, sizes.m, &rows) ||
                        __builtin_add_overflow(rows, sizes.m, &rows) || __builtin_add_overflow(rows, 24, &rows) ||
                        __builtin_mul_overflow(rows, ld, &matrices) || __builtin_add_overflow(sizes.n, sizes.m, &N) ||
                        __builtin_add_overflow(N, 40, &N) || __builtin_mul_overflow(N, 40, &N) ||
                        __builtin_add_overflow(matrices, N, &total) || __builtin_add_overflow(total, 1024, &total) ||
                        __builtin_mul_overflow(total, sizeof(double), &total);
  return overflow ? 0 : total;
}

std::size_t workspace_bytes(const Sizes& sizes) noexcept {
  // Enough for the arrays of workspace.h with the widest vector there is: 2 [k, ld] and 1 [k, 8], 19 [ld], 3 [k + 1],
  // 10 [columns]. ld < k + 8 and columns < n + 8, and the rest pays for rounding each array up to the alignment.
  std::size_t k = 0, n = 0, square = 0, vectors = 0, columns = 0, total = 0;
  const bool overflow = __builtin_add_overflow(sizes.k, 16, &k) || __builtin_add_overflow(sizes.n, 16, &n) ||
                        __builtin_mul_overflow(k, k, &square) || __builtin_mul_overflow(square, 3, &square) ||
                        __builtin_mul_overflow(k, 32, &vectors) || __builtin_mul_overflow(n, 12, &columns) ||
                        __builtin_add_overflow(square, vectors, &total) ||
                        __builtin_add_overflow(total, columns, &total) ||
                        __builtin_mul_overflow(total, sizeof(double), &total);
  return overflow ? 0 : total;
}

}  // namespace icnnrt
