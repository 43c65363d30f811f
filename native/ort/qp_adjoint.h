// ai.icnnrt::QPAdjoint, and ::QPSensitivity and ::SparseQPSensitivity, which tell of the gradient too: checks, and one
// call of the core for every sample.
#pragma once

#include "qp_inputs.h"
#include "qp_plan.h"

namespace icnnrt::ort {

// The share of the loss without a gradient above which a plan is not to be relied on: it is exact, or far from it.
inline constexpr double kSparseShare = 1e-9;

template <typename T>
struct QpAdjoint {
  static constexpr const char* kName = "QPAdjoint";
  static constexpr ONNXTensorElementDataType T_ = sizeof(T) == sizeof(float) ? kFloat : kDouble;
  static constexpr QpInput kInputs[] = {
      {"Q", "nn"},           {"G", "mn"},          {"A", "qn"},    {"lam", "m"},   {"mu", "n"},
      {"slack", "m"},        {"box_slack", "n"},   {"status", ""}, {"z_bar", "n"}, {"lam_bar", "m", true},
      {"nu_bar", "q", true}, {"mu_bar", "n", true}};
  static constexpr std::size_t kCount = 12, kStatus = 7;
  // Of what may be absent no axis is known but the first.
  static constexpr const char* kInputShapes[] = {"*nn", "*mn", "*qn", "*m", "*n", "*m",
                                                 "*n",  "*",   "*n",  "*?", "*?", "*?"};
  static constexpr ONNXTensorElementDataType kInputTypes[] = {T_, T_, T_, T_, T_, T_, T_, kInt32, T_, T_, T_, T_};
  static constexpr const char* kOutputShapes[] = {"Bn", "Bm", "Bq", "Bn"};
  static constexpr ONNXTensorElementDataType kOutputTypes[] = {T_, T_, T_, T_};
  static constexpr const char* kOutputsOfT = "TTTT";  // all

  static void infer_axes(Axes& axes, bool batch_known) {
    if (!batch_known && axes.of('B').size <= 1) axes.of('B') = {};
  }

  const QpKernels<T>& kernels = icnnrt::qp_kernels<T>();

  OrtStatus* read_attributes(const Api&, const OrtKernelInfo*) { return nullptr; }

  OrtStatus* compute(const Call& call, const OrtMemoryInfo* memory) const { return differentiate(call, memory, false); }

 protected:
  // Input `plan_at` is a plan where that is not 0.
  OrtStatus* differentiate(const Call& call, const OrtMemoryInfo* memory, bool tells, std::size_t plan_at = 0) const {
    Input<T> inputs[kCount];
    Input<std::int32_t> status;
    QpData<T> data[kCount];
    QpData<std::int32_t> statuses;
    QpShapes shapes;
    for (std::size_t i = 0; i < kCount; ++i) {
      if (i != kStatus) ICNNRT_TRY(call.read(i, kInputs[i].name, inputs[i]));
    }
    ICNNRT_TRY(call.read(kStatus, kInputs[kStatus].name, status));
    inputs[kStatus].shape = status.shape;
    ICNNRT_TRY(read_sizes(call, inputs[0].shape, inputs[1].shape, inputs[2].shape, shapes));
    for (std::size_t i = 0; i < kCount; ++i) ICNNRT_TRY(read_batch(call, kInputs[i], inputs[i].shape, shapes));
    for (std::size_t i = 0; i < kCount; ++i) {
      if (i != kStatus) ICNNRT_TRY(check_input(call, kInputs[i], inputs[i], shapes, data[i]));
    }
    ICNNRT_TRY(check_input(call, kInputs[kStatus], status, shapes, statuses));

    const std::size_t B = shapes.B, n = shapes.n, m = shapes.m, q = shapes.q;
    T *d_z = nullptr, *d_lam = nullptr, *d_nu = nullptr, *d_mu = nullptr;
    ICNNRT_TRY(call.write(0, {B, n}, d_z));
    ICNNRT_TRY(call.write(1, {B, m}, d_lam));
    ICNNRT_TRY(call.write(2, {B, q}, d_nu));
    ICNNRT_TRY(call.write(3, {B, n}, d_mu));
    double* share = nullptr;
    std::int32_t* weak = nullptr;
    if (tells) {
      ICNNRT_TRY(call.write(4, {B}, share));
      ICNNRT_TRY(call.write(5, {B}, weak));
    }

    const QpSizes dense{n, m, q};
    QpSizes sizes = dense;
    QpSparse<T> sparse(call, kernels);
    if (plan_at) ICNNRT_TRY(sparse.read(plan_at, memory, shapes, {data[0], data[1], data[2]}, sizes));
    const auto solve = [&](std::size_t i, void* workspace) -> OrtStatus* {
      const QpAdjointArguments<T> arguments{data[0].of(i),
                                            data[1].of(i),
                                            data[2].of(i),
                                            data[3].of(i),
                                            data[4].of(i),
                                            data[5].of(i),
                                            data[6].of(i),
                                            static_cast<QpStatus>(*statuses.of(i)),
                                            data[8].of(i),
                                            data[9].of(i),
                                            data[10].of(i),
                                            data[11].of(i),
                                            d_z + i * n,
                                            d_lam + i * m,
                                            d_nu + i * q,
                                            d_mu + i * n,
                                            tells ? share + i : nullptr,
                                            tells ? weak + i : nullptr};
      const auto solve_densely = [&](void* memory) { kernels.adjoint(dense, arguments, memory); };
      if (plan_at && !sparse.fits(i)) return sparse.densely(solve_densely);
      kernels.adjoint(sizes, arguments, workspace);
      if (plan_at && arguments.status == QpStatus::kSolved && !(share[i] <= kSparseShare)) sparse.again(solve_densely);
      return nullptr;
    };
    return for_each_sample(call, memory, B, sizes, 2.0 * (plan_at ? sparse.work() : cost_of(sizes)), solve);
  }
};

template <typename T>
struct QpSensitivity : QpAdjoint<T> {
  static constexpr const char* kName = "QPSensitivity";
  static constexpr ONNXTensorElementDataType T_ = QpAdjoint<T>::T_;
  static constexpr const char* kOutputShapes[] = {"Bn", "Bm", "Bq", "Bn", "B", "B"};
  static constexpr ONNXTensorElementDataType kOutputTypes[] = {T_, T_, T_, T_, kDouble, kInt32};
  static constexpr const char* kOutputsOfT = "TTTT--";

  OrtStatus* compute(const Call& call, const OrtMemoryInfo* memory) const {
    return this->differentiate(call, memory, true);
  }
};

template <typename T>
struct SparseQpSensitivity : QpSensitivity<T> {
  static constexpr const char* kName = "SparseQPSensitivity";
  static constexpr ONNXTensorElementDataType T_ = QpAdjoint<T>::T_;
  static constexpr const char* kInputShapes[] = {"*nn", "*mn", "*qn", "*m", "*n", "*m", "*n",
                                                 "*",   "*n",  "*?",  "*?", "*?", "?"};
  static constexpr ONNXTensorElementDataType kInputTypes[] = {T_,     T_, T_, T_, T_, T_,    T_,
                                                              kInt32, T_, T_, T_, T_, kInt32};

  OrtStatus* compute(const Call& call, const OrtMemoryInfo* memory) const {
    return this->differentiate(call, memory, true, 12);
  }
};

}  // namespace icnnrt::ort
