// ai.icnnrt::BundleEntropyAdjoint and its like for other domains: checks, and one call of the core for every sample.
#pragma once

#include "batch.h"

namespace icnnrt::ort {

template <Domain kDomain, typename T>
struct BundleAdjoint {
  static constexpr const char* kName = kDomain == Domain::kEntropy   ? "BundleEntropyAdjoint"
                                       : kDomain == Domain::kSimplex ? "BundleSimplexAdjoint"
                                                                     : "BundleQuadraticAdjoint";
  static constexpr ONNXTensorElementDataType T_ = sizeof(T) == sizeof(float) ? kFloat : kDouble;
  static constexpr const char* kInputShapes[] = {"Bkn", "Bk", "Bk", "Bn"};
  static constexpr ONNXTensorElementDataType kInputTypes[] = {T_, T_, T_, T_};
  static constexpr const char* kOutputShapes[] = {"Bn", "Bk"};
  static constexpr ONNXTensorElementDataType kOutputTypes[] = {T_, T_};
  static constexpr const char* kOutputsOfT = "TT";  // all

  static void infer_axes(Axes&, bool) {}

  const Kernels<T>& kernels = icnnrt::kernels<T>(kDomain);

  OrtStatus* read_attributes(const Api&, const OrtKernelInfo*) { return nullptr; }

  OrtStatus* compute(const Call& call, const OrtMemoryInfo* memory) const {
    Input<T> slopes, offsets, lam, y_bar;
    ICNNRT_TRY(call.read(0, "slopes", slopes));
    ICNNRT_TRY(call.read(1, "offsets", offsets));
    ICNNRT_TRY(call.read(2, "lam", lam));
    ICNNRT_TRY(call.read(3, "y_bar", y_bar));
    ICNNRT_TRY(call.check_slopes(slopes.shape));
    const std::size_t B = slopes.shape[0], k = slopes.shape[1], n = slopes.shape[2];
    ICNNRT_TRY(call.check_rows("offsets", "[B, k]", offsets.shape, slopes.shape, k));
    ICNNRT_TRY(call.check_rows("lam", "[B, k]", lam.shape, slopes.shape, k));
    ICNNRT_TRY(call.check_rows("y_bar", "[B, n]", y_bar.shape, slopes.shape, n));

    T *c_y = nullptr, *c_lam = nullptr;
    ICNNRT_TRY(call.write(0, {B, n}, c_y));
    ICNNRT_TRY(call.write(1, {B, k}, c_lam));

    const Sizes sizes{k, n};
    const auto solve = [&](std::size_t b, void* workspace) {
      const AdjointArguments<T> arguments{slopes.data + b * k * n, offsets.data + b * k, lam.data + b * k,
                                          y_bar.data + b * n,      c_y + b * n,          c_lam + b * k};
      kernels.adjoint(sizes, arguments, workspace);
    };
    // One Gram matrix of k²n/2, a handful of products with G, a factorisation, the exponentials.
    const double K = static_cast<double>(k), N = static_cast<double>(n);
    return for_each_sample(call, memory, B, sizes, N * (K * K / 2 + 4 * K + 20) + K * K * K + 4000, solve);
  }
};

}  // namespace icnnrt::ort
