// Which kernels this processor can run, and how much workspace they take.
#include "kernels.h"

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
