// Any sizes, any numbers, of the kernels here and of those in fuzz_programs.h: no call crashes, touches what is not its
// own, or says what is not true.
//
// With libFuzzer, which Clang brings, this is a fuzzer:
//     cmake --preset fuzz && cmake --build --preset fuzz
//     build/native-fuzz/native/tests/icnnrt_fuzz_kernels -max_total_time=600 <folder for what it finds>
// With replay.cpp it runs a bounded number of pseudo-random inputs, with any compiler.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "certificate.h"
#include "fuzz_bytes.h"
#include "fuzz_programs.h"

namespace icnnrt_tests {
namespace {

[[noreturn]] void fail(const std::string& what, const icnnrt::Sizes& sizes, const char* instruction_set,
                       bool is_double) {
  std::fprintf(stderr, "%s\nat k = %zu, n = %zu, k_prev = %zu, steps = %zu, %s, %s\n", what.c_str(), sizes.k, sizes.n,
               sizes.k_prev, sizes.steps, instruction_set, is_double ? "double" : "float");
  std::abort();
}

template <typename T>
void try_kernels(Bytes& bytes) {
  static thread_local Caller caller;
  const Domain domain = static_cast<Domain>(bytes.below(icnnrt::kDomains));
  const std::vector<const icnnrt::Kernels<T>*> runnable = runnable_kernels<T>(domain);
  const icnnrt::Kernels<T>& kernels = *runnable[bytes.below(runnable.size())];
  Cuts<T> cuts(1 + bytes.below(bytes.below(4) ? 8 : 41), 1 + bytes.below(bytes.below(4) ? 20 : 130), domain);
  const std::size_t k = cuts.k, n = cuts.n;
  const std::size_t k_prev = bytes.below(2) ? bytes.below(k + 1) : 0;
  const std::size_t steps = bytes.below(2) ? kSteps : bytes.below(80);
  const icnnrt::Sizes sizes{k, n, k_prev, steps};
  const auto check = [&](const std::string& what) {
    if (!what.empty()) fail(what, sizes, kernels.instruction_set, sizeof(T) == sizeof(double));
  };

  Numbers<T> slopes(bytes), offsets(bytes), starts(bytes), y_bars(bytes);
  for (T& g : cuts.slopes) g = slopes.next();
  for (T& e : cuts.offsets) e = offsets.next();
  if (bytes.below(16) == 0) {
    const int exponent = exponent_near_nothing<T>(bytes);
    for (auto* numbers : {&cuts.slopes, &cuts.offsets})
      for (T& one : *numbers) one = static_cast<T>(std::ldexp(static_cast<double>(one), exponent));
  }
  for (std::size_t copies = bytes.below(4) ? 0 : bytes.below(k); copies > 0; --copies)
    cuts.copy_cut(bytes.below(k), bytes.below(k));
  for (std::size_t odd = bytes.below(8) ? 0 : bytes.below(4); odd > 0; --odd)  // a few odd numbers among the others
    cuts.slopes[bytes.below(k * n)] = bytes.any_bits<T>();
  std::vector<T> lam_start(k_prev), y_bar(n);
  // most often on the simplex, as the last solve leaves it
  const bool on_simplex = bytes.below(4) != 0;
  double total = 0.0;
  for (T& lam : lam_start) {
    lam = on_simplex ? static_cast<T>(bytes.below(3) == 0 ? 0.0 : bytes.byte() / 255.0) : starts.next();
    total += static_cast<double>(lam);
  }
  if (on_simplex && total > 0.0)
    for (T& lam : lam_start) lam = static_cast<T>(static_cast<double>(lam) / total);
  for (T& value : y_bar) value = y_bars.next();

  const SolveAnswer<T> solved = caller.solve(kernels, cuts, lam_start, steps);
  // A start that is no multipliers at all may poison the answer, but must not make it wrong.
  if (!solved.intact || on_simplex || !complaint_if_not_poisoned(solved).empty()) check(complaint(cuts, solved));
  // A solver that stops with this sample must do so the same way again, whatever lay in its workspace.
  if (!caller.solve(kernels, cuts, lam_start, steps, 0x3f).same_bits_as(solved))
    check("the same call twice gave two answers");

  const AdjointAnswer<T> adjoint = caller.adjoint(kernels, cuts, solved.lam, y_bar);
  if (!adjoint.intact) check("the adjoint wrote memory that is not an output");
  if (!caller.adjoint(kernels, cuts, solved.lam, y_bar, 0x3f).same_bits_as(adjoint))
    check("the same adjoint twice gave two answers");
  const bool inputs_finite = all_finite(cuts.slopes) && all_finite(cuts.offsets) && all_finite(y_bar);
  if (!inputs_finite) {
    bool told = false;
    for (T c : adjoint.c_y) told = told || !std::isfinite(c);
    if (!told) check("the adjoint of numbers that are not finite is finite");
  }
  double largest_y_bar = 0.0, smallest_slope = 1.0;
  for (T value : y_bar) largest_y_bar = std::fmax(largest_y_bar, std::fabs(static_cast<double>(value)));
  for (T g : cuts.slopes)
    if (g != 0) smallest_slope = std::fmin(smallest_slope, std::fabs(static_cast<double>(g)));
  // c_lam has the units of y_bar / G, and must fit in T
  if (inputs_finite && size_of_values(cuts) < 1e15 && largest_y_bar < 1e15 && smallest_slope > 1e-15)
    if (!all_finite(adjoint.c_y) || !all_finite(adjoint.c_lam)) check("the adjoint of finite numbers is not finite");
}

}  // namespace
}  // namespace icnnrt_tests

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  icnnrt_tests::Bytes bytes(data, size);
  switch (bytes.byte() % 4) {
    case 0:
      icnnrt_tests::try_kernels<float>(bytes);
      break;
    case 1:
      icnnrt_tests::try_kernels<double>(bytes);
      break;
    case 2:
      icnnrt_tests::try_programs<float>(bytes);
      break;
    default:
      icnnrt_tests::try_programs<double>(bytes);
  }
  return 0;
}
