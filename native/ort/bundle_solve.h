// ai.icnnrt::BundleEntropySolve and its like for other domains: checks, and one call of the core for every sample.
#pragma once

#include "batch.h"
#include "steps.h"

namespace icnnrt::ort {

template <Domain kDomain, typename T>
struct BundleSolve {
  static constexpr const char* kName = kDomain == Domain::kEntropy   ? "BundleEntropySolve"
                                       : kDomain == Domain::kSimplex ? "BundleSimplexSolve"
                                                                     : "BundleQuadraticSolve";
  static constexpr ONNXTensorElementDataType T_ = sizeof(T) == sizeof(float) ? kFloat : kDouble;
  // Shapes for inference, a letter an axis; p is k_prev.
  static constexpr const char* kInputShapes[] = {"Bkn", "Bk", "Bp"};
  static constexpr ONNXTensorElementDataType kInputTypes[] = {T_, T_, T_};
  static constexpr const char* kOutputShapes[] = {"Bn", "Bk", "B", "B3"};
  static constexpr ONNXTensorElementDataType kOutputTypes[] = {T_, T_, kDouble, kDouble};
  static constexpr const char* kOutputsOfT = "TT--";  // the others are double always

  static void infer_axes(Axes&, bool) {}

  const Kernels<T>& kernels = icnnrt::kernels<T>(kDomain);
  std::size_t steps = 0;

  OrtStatus* read_attributes(const Api& api, const OrtKernelInfo* info) {
    return read_steps(api, info, kName, 60, steps);
  }

  OrtStatus* compute(const Call& call, const OrtMemoryInfo* memory) const {
    Input<T> slopes, offsets, lam_start;
    ICNNRT_TRY(call.read(0, "slopes", slopes));
    ICNNRT_TRY(call.read(1, "offsets", offsets));
    ICNNRT_TRY(call.read(2, "lam_start", lam_start));
    ICNNRT_TRY(call.check_slopes(slopes.shape));
    const std::size_t B = slopes.shape[0], k = slopes.shape[1], n = slopes.shape[2];
    ICNNRT_TRY(call.check_rows("offsets", "[B, k]", offsets.shape, slopes.shape, k));
    const Shape& start = lam_start.shape;
    if (start.rank != 2 || start[0] != B || start[1] > k) {
      char expected[160];
      std::snprintf(expected, sizeof expected, "[B, k_prev] with B = %zu and 0 <= k_prev <= k = %zu", B, k);
      return call.wrong("lam_start", expected, start,
                        "pass multipliers of the first k_prev cuts, none of them ([B, 0]) for a cold start");
    }
    const std::size_t k_prev = start[1];

    T *y = nullptr, *lam = nullptr;
    double *lower_bound = nullptr, *residual = nullptr;
    ICNNRT_TRY(call.write(0, {B, n}, y));
    ICNNRT_TRY(call.write(1, {B, k}, lam));
    ICNNRT_TRY(call.write(2, {B}, lower_bound));
    ICNNRT_TRY(call.write(3, {B, 3}, residual));

    const Sizes sizes{k, n, k_prev, steps};
    const auto solve = [&](std::size_t b, void* workspace) {
      const SolveArguments<T> arguments{
          slopes.data + b * k * n, offsets.data + b * k, lam_start.data + b * k_prev, y + b * n, lam + b * k,
          lower_bound + b,         residual + b * 3};
      kernels.solve(sizes, arguments, workspace);
    };
    // Nine steps are usual, of k²n/2 for the Gram matrix, a handful of products with G, some k³, the exponentials, and
    // what no vector speeds up.
    const double K = static_cast<double>(k), N = static_cast<double>(n);
    const double cost = 9.0 * (N * (K * K / 2 + 8 * K + 40) + K * K * K + 4000);
    return for_each_sample(call, memory, B, sizes, cost, solve);
  }
};

}  // namespace icnnrt::ort
