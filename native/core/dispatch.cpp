// Which kernels this processor can run, and how much workspace they take.
#include <cstdlib>
#include <cstring>
#include <ctime>

#include "kernels.h"
#include "qp.h"

// The instruction sets this library was compiled for, best first.
#if defined(ICNNRT_X86_64) && defined(ICNNRT_EIGHT_LANES)  // of a test: what stands for AVX-512 is compiled for AVX2
#define ICNNRT_INSTRUCTION_SETS(X)                                                                                \
  X(x86_64_v3, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("fma")) \
  X(x86_64_v2, true)
#elif defined(ICNNRT_X86_64)
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

namespace {

#define ICNNRT_NAME(name, supported) #name,
constexpr const char* kNames[] = {ICNNRT_INSTRUCTION_SETS(ICNNRT_NAME)};
#undef ICNNRT_NAME
constexpr std::size_t kCompiled = sizeof kNames / sizeof *kNames;

// Read once, when the library is loaded: all that a process computes is then of one instruction set.
struct Limit {
  std::size_t best = 0;   // the first of kNames that may be used
  char refused[41] = {};  // what was asked for, if it is none of them: so much of it as a message needs

  Limit() noexcept {
    const char* const wanted = std::getenv(kLimitVariable);
    if (!wanted || !*wanted) return;
    while (best < kCompiled && std::strcmp(wanted, kNames[best]) != 0) ++best;
    if (best < kCompiled) return;
    best = 0;
    std::strncpy(refused, wanted, sizeof refused - 1);
  }
};
const Limit limit;

}  // namespace

const char* refused_limit() noexcept { return *limit.refused ? limit.refused : nullptr; }

const char* instruction_sets() noexcept {
#define ICNNRT_NAME(name, supported) " " #name
  static constexpr char names[] = ICNNRT_INSTRUCTION_SETS(ICNNRT_NAME);
  return names + 1;  // without the first space
#undef ICNNRT_NAME
}

#define ICNNRT_DEFINE(T, kTable)                                                          \
  template <>                                                                             \
  const Kernels<T>* kernels_for<T>(std::size_t instruction_set, Domain domain) noexcept { \
    if (instruction_set < limit.best) return nullptr;                                     \
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
    if (instruction_set < limit.best) return nullptr;                           \
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

std::int64_t qp_now() noexcept {
  timespec now{};
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<std::int64_t>(now.tv_sec) * 1'000'000'000 + now.tv_nsec;
}

std::size_t qp_workspace_bytes(const QpSizes& sizes) noexcept {
  // What `lay_out` in qp_solve.h takes: K and U [size, ld], G and R [m, ld] and [m + q, ld], 12 [ld], 3 [size], 35 [N],
  // and bytes. All but the bytes are whole vectors.
  constexpr std::size_t kMost = std::size_t{1} << (sizeof(std::size_t) * 4 - 5);
  if (sizes.n > kMost || sizes.m > kMost || sizes.q > kMost) return 0;
  const auto up_to = [](std::size_t a, std::size_t multiple) { return (a + multiple - 1) / multiple * multiple; };
  const std::size_t n = sizes.n, m = sizes.m, N = up_to(m, 8) + up_to(n, 8) + 8;
  const auto size_of = [&](std::size_t q) { return up_to(n, 4) + up_to(q, 4); };
  const auto ld_of = [&](std::size_t q) { return up_to(size_of(q) + 4, 8) + 8; };
  const auto vectors = [&](std::size_t q) { return 15 * ld_of(q) + 38 * N + 32; };
  if (const QpPlan* plan = sizes.plan)  // those, the entries, seven vectors and lists, and room to align each of these
    return (vectors(sizes.q) + plan->Q.entries + plan->G.entries + plan->A.entries + plan->entries + n + m +
            6 * plan->N + 128) *
           sizeof(double);
  const auto laid_out = [&](std::size_t q) { return (2 * size_of(q) + 2 * m + q) * ld_of(q) + vectors(q); };
  // The search for a ray has the rows of Q among its equalities. A solve has an active set beside it: Y [n + 4, ld],
  // 3 [ld], U [n, n], 8 [n], 3 [n + 4] and 2 [N].
  const std::size_t ray = laid_out(sizes.q + n);
  const std::size_t solve = laid_out(sizes.q) + (n + 7) * ld_of(sizes.q) + (n + 12) * up_to(n, 8) + 2 * N + 32;
  return (ray > solve ? ray : solve) * sizeof(double);
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
