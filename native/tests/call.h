// Calls a kernel with every array in memory of its own, right against a page that must not be touched: reading or
// writing one element beyond an array ends the process, writing before one is found out. Under AddressSanitizer reading
// before one, or beyond one that does not end at the page, ends the process too.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#if __has_include(<sys/mman.h>)
#include <sys/mman.h>
#include <unistd.h>
#define ICNNRT_TESTS_GUARD_PAGES 1
#endif

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define ICNNRT_TESTS_ASAN 1
#endif
#endif
#if defined(__SANITIZE_ADDRESS__)
#define ICNNRT_TESTS_ASAN 1
#endif
#ifdef ICNNRT_TESTS_ASAN
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#define ASAN_UNPOISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#endif

#include "core/kernels.h"
#include "cuts.h"

namespace icnnrt_tests {

// Memory for one array at a time, whose end is the end of the last page that may be touched. An array of T that ends
// there starts anywhere T may start, so vector loads meet every alignment.
class GuardedMemory {
 public:
  GuardedMemory() = default;
  GuardedMemory(const GuardedMemory&) = delete;
  GuardedMemory& operator=(const GuardedMemory&) = delete;
  ~GuardedMemory() { release(); }

  // `bytes` bytes at a multiple of `alignment`, as far to the end as that allows, filled with `fill`.
  void* take(std::size_t bytes, std::size_t alignment, unsigned char fill) {
    if (bytes + kMargin + alignment > capacity_) reserve(bytes + kMargin + alignment);
    const auto end = reinterpret_cast<std::uintptr_t>(base_) + capacity_;
    start_ = reinterpret_cast<unsigned char*>((end - bytes) / alignment * alignment);
    bytes_ = bytes;
    ASAN_UNPOISON_MEMORY_REGION(base_, capacity_);
    std::memset(start_ - kMargin, kPattern, kMargin);
    std::memset(start_, fill, bytes);
    std::memset(start_ + bytes, kPattern, after());
    ASAN_POISON_MEMORY_REGION(start_ - kMargin, kMargin);
    ASAN_POISON_MEMORY_REGION(start_ + bytes, after());
    return start_;
  }

  // True if nothing was written around the array, whose time is over.
  bool intact() const {
    ASAN_UNPOISON_MEMORY_REGION(base_, capacity_);
    for (std::size_t i = 0; i < kMargin; ++i)
      if ((start_ - kMargin)[i] != kPattern) return false;
    for (std::size_t i = 0; i < after(); ++i)
      if (start_[bytes_ + i] != kPattern) return false;
    return true;
  }

 private:
  static constexpr std::size_t kMargin = 1024;
  static constexpr unsigned char kPattern = 0xa5;

  std::size_t after() const { return static_cast<std::size_t>(base_ + capacity_ - (start_ + bytes_)); }

  void release() {
    ASAN_UNPOISON_MEMORY_REGION(base_, capacity_);
#ifdef ICNNRT_TESTS_GUARD_PAGES
    if (base_) munmap(base_, capacity_ + page_);
#else
    std::free(base_);
#endif
    base_ = nullptr;
    capacity_ = 0;
  }

  void reserve(std::size_t bytes) {
    release();
#ifdef ICNNRT_TESTS_GUARD_PAGES
    page_ = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    const std::size_t capacity = (bytes + page_ - 1) / page_ * page_;
    void* const memory = mmap(nullptr, capacity + page_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    const bool failed =
        memory == MAP_FAILED || mprotect(static_cast<unsigned char*>(memory) + capacity, page_, PROT_NONE) != 0;
#else
    const std::size_t capacity = bytes;
    void* const memory = std::malloc(capacity);
    const bool failed = memory == nullptr;
#endif
    if (failed) {
      std::fprintf(stderr, "no memory for %zu bytes and a guard page\n", bytes);
      std::abort();
    }
    base_ = static_cast<unsigned char*>(memory);
    capacity_ = capacity;
  }

  unsigned char* base_ = nullptr;
  std::size_t capacity_ = 0;
  std::size_t page_ = 0;
  unsigned char* start_ = nullptr;
  std::size_t bytes_ = 0;
};

template <typename T>
T* copied(GuardedMemory& memory, const std::vector<T>& values) {
  T* const array = static_cast<T*>(memory.take(values.size() * sizeof(T), alignof(T), 0));
  if (!values.empty()) std::memcpy(array, values.data(), values.size() * sizeof(T));
  return array;
}

template <typename T>
bool same_bits(const T* a, const std::vector<T>& b) {
  return b.empty() || std::memcmp(a, b.data(), b.size() * sizeof(T)) == 0;
}

template <typename T>
struct SolveAnswer {
  std::vector<T> y;
  std::vector<T> lam;
  double lower_bound;
  double residual[3];
  bool intact;  // nothing was written but the outputs and the workspace

  bool same_bits_as(const SolveAnswer& other) const {
    return same_bits(y.data(), other.y) && same_bits(lam.data(), other.lam) &&
           std::memcmp(&lower_bound, &other.lower_bound, sizeof lower_bound) == 0 &&
           std::memcmp(residual, other.residual, sizeof residual) == 0;
  }
};

template <typename T>
struct AdjointAnswer {
  std::vector<T> c_y;
  std::vector<T> c_lam;
  bool intact;

  bool same_bits_as(const AdjointAnswer& other) const {
    return same_bits(c_y.data(), other.c_y) && same_bits(c_lam.data(), other.c_lam);
  }
};

inline constexpr std::size_t kSteps = 60;       // what the reference in Python takes at most
inline constexpr unsigned char kPoison = 0xff;  // as floating-point numbers: NaN

// Holds the memory of the arrays from call to call; one a thread.
class Caller {
 public:
  // `fill` is what the workspace and the outputs hold before the call.
  template <typename T>
  SolveAnswer<T> solve(const icnnrt::Kernels<T>& kernels, const Cuts<T>& cuts, const std::vector<T>& lam_start = {},
                       std::size_t steps = kSteps, unsigned char fill = kPoison) {
    const icnnrt::Sizes sizes{cuts.k, cuts.n, lam_start.size(), steps};
    icnnrt::SolveArguments<T> arguments{};
    arguments.slopes = copied(memory_[0], cuts.slopes);
    arguments.offsets = copied(memory_[1], cuts.offsets);
    arguments.lam_start = copied(memory_[2], lam_start);
    arguments.y = array<T>(memory_[3], cuts.n, fill);
    arguments.lam = array<T>(memory_[4], cuts.k, fill);
    arguments.lower_bound = array<double>(memory_[5], 1, fill);
    arguments.residual = array<double>(memory_[6], 3, fill);
    void* const workspace = memory_[7].take(icnnrt::workspace_bytes(sizes), icnnrt::kWorkspaceAlignment, fill);

    kernels.solve(sizes, arguments, workspace);

    SolveAnswer<T> answer{std::vector<T>(arguments.y, arguments.y + cuts.n),
                          std::vector<T>(arguments.lam, arguments.lam + cuts.k),
                          *arguments.lower_bound,
                          {arguments.residual[0], arguments.residual[1], arguments.residual[2]},
                          true};
    for (const GuardedMemory& memory : memory_) answer.intact = answer.intact && memory.intact();
    answer.intact = answer.intact && same_bits(arguments.slopes, cuts.slopes) &&
                    same_bits(arguments.offsets, cuts.offsets) && same_bits(arguments.lam_start, lam_start);
    return answer;
  }

  template <typename T>
  AdjointAnswer<T> adjoint(const icnnrt::Kernels<T>& kernels, const Cuts<T>& cuts, const std::vector<T>& lam,
                           const std::vector<T>& y_bar, unsigned char fill = kPoison) {
    const icnnrt::Sizes sizes{cuts.k, cuts.n};
    icnnrt::AdjointArguments<T> arguments{};
    arguments.slopes = copied(memory_[0], cuts.slopes);
    arguments.offsets = copied(memory_[1], cuts.offsets);
    arguments.lam = copied(memory_[2], lam);
    arguments.y_bar = copied(memory_[3], y_bar);
    arguments.c_y = array<T>(memory_[4], cuts.n, fill);
    arguments.c_lam = array<T>(memory_[5], cuts.k, fill);
    memory_[6].take(0, 1, fill);
    void* const workspace = memory_[7].take(icnnrt::workspace_bytes(sizes), icnnrt::kWorkspaceAlignment, fill);

    kernels.adjoint(sizes, arguments, workspace);

    AdjointAnswer<T> answer{std::vector<T>(arguments.c_y, arguments.c_y + cuts.n),
                            std::vector<T>(arguments.c_lam, arguments.c_lam + cuts.k), true};
    for (const GuardedMemory& memory : memory_) answer.intact = answer.intact && memory.intact();
    answer.intact = answer.intact && same_bits(arguments.slopes, cuts.slopes) &&
                    same_bits(arguments.offsets, cuts.offsets) && same_bits(arguments.lam, lam) &&
                    same_bits(arguments.y_bar, y_bar);
    return answer;
  }

 private:
  template <typename T>
  static T* array(GuardedMemory& memory, std::size_t size, unsigned char fill) {
    return static_cast<T*>(memory.take(size * sizeof(T), alignof(T), fill));
  }

  GuardedMemory memory_[8];
};

// The kernels that this processor can run, best first.
template <typename T>
std::vector<const icnnrt::Kernels<T>*> runnable_kernels(Domain domain = Domain::kEntropy) {
  std::vector<const icnnrt::Kernels<T>*> runnable;
  for (std::size_t i = 0; i < icnnrt::kInstructionSets; ++i)
    if (const icnnrt::Kernels<T>* kernels = icnnrt::kernels_for<T>(i, domain)) runnable.push_back(kernels);
  return runnable;
}

}  // namespace icnnrt_tests
