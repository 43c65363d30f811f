// What a call may touch: its outputs and its workspace, nothing around them, nothing of the heap, and the workspace's
// old contents not at all.
#include <doctest/doctest.h>

#include <atomic>
#include <cstdlib>
#include <limits>
#include <new>
#include <string>
#include <vector>

#include "certificate.h"
#include "cuts.h"
#include "each_kernel.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// Sanitizers bring an allocator of their own, which must not be replaced.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define ICNNRT_TESTS_SANITIZED 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer) || __has_feature(memory_sanitizer)
#define ICNNRT_TESTS_SANITIZED 1
#endif
#endif

#ifndef ICNNRT_TESTS_SANITIZED
static std::atomic<long> allocations{0};

#ifdef __GLIBC__
// Every way to the heap passes here, operator new and the aligned forms included.
#define ICNNRT_TESTS_COUNT_ALLOCATIONS 1
extern "C" {
void* __libc_malloc(std::size_t);
void* __libc_calloc(std::size_t, std::size_t);
void* __libc_realloc(void*, std::size_t);
void* __libc_memalign(std::size_t, std::size_t);
void* malloc(std::size_t size) {
  ++allocations;
  return __libc_malloc(size);
}
void* calloc(std::size_t count, std::size_t size) {
  ++allocations;
  return __libc_calloc(count, size);
}
void* realloc(void* old, std::size_t size) {
  ++allocations;
  return __libc_realloc(old, size);
}
void* memalign(std::size_t alignment, std::size_t size) {
  ++allocations;
  return __libc_memalign(alignment, size);
}
void* aligned_alloc(std::size_t alignment, std::size_t size) {
  ++allocations;
  return __libc_memalign(alignment, size);
}
int posix_memalign(void** memory, std::size_t alignment, std::size_t size) {
  ++allocations;
  *memory = __libc_memalign(alignment, size);
  return *memory ? 0 : 12;  // ENOMEM
}
}
#endif
#endif

namespace icnnrt_tests {
namespace {

struct Shape {
  std::size_t k, n;
};

const Shape kShapes[] = {{1, 1},  {1, 2},  {2, 1},   {2, 3},   {3, 7},   {5, 8},   {7, 9},
                         {8, 15}, {9, 16}, {16, 17}, {17, 31}, {30, 10}, {40, 65}, {40, 300}};

TEST_CASE_TEMPLATE("nothing beyond the arrays is read or written", T, float, double) {
  each_kernel<T>([](const icnnrt::Kernels<T>& kernels) {
    Caller caller;  // guards every array; reading beyond one ends the process
    Random random(41);
    for (const Shape& shape : kShapes)
      for (std::size_t k_prev : {std::size_t{0}, std::size_t{1}, shape.k})
        for (std::size_t steps : {std::size_t{0}, std::size_t{1}, kSteps}) {
          CAPTURE(shape.k);
          CAPTURE(shape.n);
          CAPTURE(k_prev);
          CAPTURE(steps);
          const Cuts<T> cuts = random_cuts<T>(random, shape.k, shape.n, 3.0);
          const std::vector<T> lam_start(k_prev, T{1} / static_cast<T>(k_prev ? k_prev : 1));
          const SolveAnswer<T> answer = caller.solve(kernels, cuts, lam_start, steps);
          CHECK(answer.intact);
          CHECK(caller.adjoint(kernels, cuts, answer.lam, std::vector<T>(shape.n, T{1})).intact);
        }
  });
}

TEST_CASE_TEMPLATE("many cuts: the workspace is large enough", T, float, double) {
  each_kernel<T>([](const icnnrt::Kernels<T>& kernels) {
    Caller caller;
    Random random(46);
    for (std::size_t k : {63, 64, 65, 200})
      for (std::size_t n : {1, 3, 16, 40}) {
        CAPTURE(k);
        CAPTURE(n);
        const Cuts<T> cuts = random_cuts<T>(random, k, n, 3.0);
        const SolveAnswer<T> answer = caller.solve(kernels, cuts);
        CHECK(complaint(cuts, answer) == "");
        CHECK(caller.adjoint(kernels, cuts, answer.lam, std::vector<T>(n, T{1})).intact);
      }
  });
}

TEST_CASE_TEMPLATE("what the workspace held before does not matter", T, float, double) {
  each_kernel<T>([](const icnnrt::Kernels<T>& kernels) {
    Caller caller;
    Random random(42);
    for (const Shape& shape : kShapes)
      for (std::size_t k_prev : {std::size_t{0}, shape.k}) {
        CAPTURE(shape.k);
        CAPTURE(shape.n);
        CAPTURE(k_prev);
        const Cuts<T> cuts = random_cuts<T>(random, shape.k, shape.n, 10.0);
        const std::vector<T> lam_start(k_prev, T{1} / static_cast<T>(shape.k)), y_bar(shape.n, T{1});
        const SolveAnswer<T> solved = caller.solve(kernels, cuts, lam_start, kSteps, 0x00);
        const AdjointAnswer<T> adjoint = caller.adjoint(kernels, cuts, solved.lam, y_bar, 0x00);
        // NaN, a large number, a number near 1, a small one
        for (int byte : {0xff, 0x7e, 0x3f, 0x01}) {
          CAPTURE(byte);
          const auto fill = static_cast<unsigned char>(byte);
          CHECK(caller.solve(kernels, cuts, lam_start, kSteps, fill).same_bits_as(solved));
          CHECK(caller.adjoint(kernels, cuts, solved.lam, y_bar, fill).same_bits_as(adjoint));
        }
        // and another place in memory
        CHECK(Caller().solve(kernels, cuts, lam_start).same_bits_as(solved));
      }
  });
}

TEST_CASE_TEMPLATE("the same call twice gives the same bits", T, float, double) {
  each_kernel<T>([](const icnnrt::Kernels<T>& kernels) {
    Caller caller;
    Random random(43);
    for (const Shape& shape : kShapes) {
      const Cuts<T> cuts = random_cuts<T>(random, shape.k, shape.n, 30.0),
                    other = random_cuts<T>(random, shape.k, shape.n, 1.0);
      const SolveAnswer<T> first = caller.solve(kernels, cuts);
      caller.solve(kernels, other);
      CHECK(caller.solve(kernels, cuts).same_bits_as(first));
    }
  });
}

TEST_CASE("sizes that cannot be counted have no workspace") {
  constexpr std::size_t most = std::numeric_limits<std::size_t>::max();
  const icnnrt::Sizes too_large[] = {{most, most},
                                     {most, 1},
                                     {1, most},
                                     {most / 8, 1},
                                     {1, most / 8},
                                     {most / 2, 2},
                                     {std::size_t{1} << (sizeof(most) * 4), 1}};
  for (const icnnrt::Sizes& sizes : too_large) {
    CAPTURE(sizes.k);
    CAPTURE(sizes.n);
    CHECK(icnnrt::workspace_bytes(sizes) == 0);
  }
  // and more cuts or dimensions never want less
  std::size_t last = 0;
  for (std::size_t k = 1; k <= 100; ++k) {
    const std::size_t bytes = icnnrt::workspace_bytes({k, 10});
    CHECK(bytes >= last);
    last = bytes;
  }
  last = 0;
  for (std::size_t n = 1; n <= 300; ++n) {
    const std::size_t bytes = icnnrt::workspace_bytes({10, n});
    CHECK(bytes >= last);
    last = bytes;
  }
}

#ifdef ICNNRT_TESTS_COUNT_ALLOCATIONS
TEST_CASE_TEMPLATE("no call goes to the heap", T, float, double) {
  // Counts at all?
  const long before_one = allocations;
  delete new volatile int(1);
  REQUIRE(allocations > before_one);

  each_kernel<T>([](const icnnrt::Kernels<T>& kernels) {
    Random random(44);
    for (const Shape& shape : kShapes) {
      CAPTURE(shape.k);
      CAPTURE(shape.n);
      const icnnrt::Sizes sizes{shape.k, shape.n, shape.k, kSteps};
      const Cuts<T> cuts = random_cuts<T>(random, shape.k, shape.n, 100.0);
      std::vector<T> lam_start(shape.k, T{1} / static_cast<T>(shape.k)), y(shape.n), lam(shape.k), y_bar(shape.n, T{1}),
          c_y(shape.n), c_lam(shape.k);
      double lower_bound = 0.0, residual[3] = {};
      GuardedMemory memory;
      void* const workspace = memory.take(icnnrt::workspace_bytes(sizes), icnnrt::kWorkspaceAlignment, kPoison);
      const long before = allocations;
      kernels.solve(
          sizes,
          {cuts.slopes.data(), cuts.offsets.data(), lam_start.data(), y.data(), lam.data(), &lower_bound, residual},
          workspace);
      kernels.adjoint(sizes,
                      {cuts.slopes.data(), cuts.offsets.data(), lam.data(), y_bar.data(), c_y.data(), c_lam.data()},
                      workspace);
      icnnrt::kernels<T>();
      icnnrt::workspace_bytes(sizes);
      const long after = allocations;
      CHECK(after == before);
    }
  });
}
#endif

#if defined(__x86_64__)
// onnxruntime offers to treat subnormal numbers as zero, in the threads that call the kernels.
TEST_CASE_TEMPLATE("subnormal numbers taken as zero change nothing that matters", T, float, double) {
  each_kernel<T>([](const icnnrt::Kernels<T>& kernels) {
    Caller caller;
    Random random(45);
    constexpr unsigned flush_and_take_as_zero = 0x8040;
    for (double scale : {1.0, 100.0, 1e3})
      for (const Shape& shape : kShapes) {
        CAPTURE(scale);
        CAPTURE(shape.k);
        CAPTURE(shape.n);
        const Cuts<T> cuts = random_cuts<T>(random, shape.k, shape.n, scale);
        const unsigned usual = _mm_getcsr();
        _mm_setcsr(usual | flush_and_take_as_zero);
        const SolveAnswer<T> answer = caller.solve(kernels, cuts);
        const unsigned control_after = _mm_getcsr() & ~0x3fu;  // the flags below tell of past operations
        _mm_setcsr(usual);
        CHECK(control_after == ((usual | flush_and_take_as_zero) & ~0x3fu));
        CHECK(complaint(cuts, answer) == "");
      }
  });
}
#endif

}  // namespace
}  // namespace icnnrt_tests
