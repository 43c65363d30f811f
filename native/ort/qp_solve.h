// ai.icnnrt::QPSolve: checks, and one call of the core for every sample.
#pragma once

#include "qp_inputs.h"
#include "steps.h"

namespace icnnrt::ort {

template <typename T>
struct QpSolve {
  static constexpr const char* kName = "QPSolve";
  static constexpr ONNXTensorElementDataType T_ = sizeof(T) == sizeof(float) ? kFloat : kDouble;
  static constexpr QpInput kInputs[] = {{"Q", "nn"},          {"p", "n"},          {"G", "mn"}, {"h_lower", "m", true},
                                        {"h", "m"},           {"A", "qn"},         {"b", "q"},  {"lower", "n", true},
                                        {"upper", "n", true}, {"start", "r", true}};
  static constexpr std::size_t kCount = 10;
  // Of what may be absent no axis is known but the first.
  static constexpr const char* kInputShapes[] = {"*nn", "*n", "*mn", "*?", "*m", "*qn", "*q", "*?", "*?", "*?"};
  static constexpr ONNXTensorElementDataType kInputTypes[] = {T_, T_, T_, T_, T_, T_, T_, T_, T_, T_};
  static constexpr const char* kOutputShapes[] = {"Bn", "Bm", "Bq", "Bn", "Bm", "Bn", "B3", "B", "Br"};
  static constexpr ONNXTensorElementDataType kOutputTypes[] = {T_, T_, T_, T_, T_, T_, kDouble, kInt32, T_};
  static constexpr const char* kOutputsOfT = "TTTTTT--T";

  static void infer_axes(Axes& axes, bool batch_known) {
    if (!batch_known && axes.of('B').size <= 1) axes.of('B') = {};
    const std::int64_t n = axes.of('n').size, m = axes.of('m').size, q = axes.of('q').size;
    if (n >= 0 && m >= 0 && q >= 0) axes.of('r').size = 2 * n + m + q;
  }

  const QpKernels<T>& kernels = icnnrt::qp_kernels<T>();
  std::size_t steps = 0;

  OrtStatus* read_attributes(const Api& api, const OrtKernelInfo* info) {
    return read_steps(api, info, kName, 60, steps);
  }

  OrtStatus* compute(const Call& call, const OrtMemoryInfo* memory) const {
    Input<T> inputs[kCount];
    QpData<T> data[kCount];
    QpShapes shapes;
    for (std::size_t i = 0; i < kCount; ++i) ICNNRT_TRY(call.read(i, kInputs[i].name, inputs[i]));
    ICNNRT_TRY(read_sizes(call, inputs[0].shape, inputs[2].shape, inputs[5].shape, shapes));
    for (std::size_t i = 0; i < kCount; ++i) ICNNRT_TRY(read_batch(call, kInputs[i], inputs[i].shape, shapes));
    for (std::size_t i = 0; i < kCount; ++i) ICNNRT_TRY(check_input(call, kInputs[i], inputs[i], shapes, data[i]));

    const std::size_t B = shapes.B, n = shapes.n, m = shapes.m, q = shapes.q, r = n + m + q + n;
    T *z = nullptr, *lam = nullptr, *nu = nullptr, *mu = nullptr, *slack = nullptr, *box_slack = nullptr,
      *ray = nullptr;
    double* residual = nullptr;
    std::int32_t* status = nullptr;
    ICNNRT_TRY(call.write(0, {B, n}, z));
    ICNNRT_TRY(call.write(1, {B, m}, lam));
    ICNNRT_TRY(call.write(2, {B, q}, nu));
    ICNNRT_TRY(call.write(3, {B, n}, mu));
    ICNNRT_TRY(call.write(4, {B, m}, slack));
    ICNNRT_TRY(call.write(5, {B, n}, box_slack));
    ICNNRT_TRY(call.write(6, {B, 3}, residual));
    ICNNRT_TRY(call.write(7, {B}, status));
    ICNNRT_TRY(call.write(8, {B, r}, ray));

    const QpSizes sizes{n, m, q, steps};
    const auto solve = [&](std::size_t i, void* workspace) {
      QpStatus told = QpStatus::kFailed;
      const QpArguments<T> arguments{data[0].of(i),     data[1].of(i),    data[2].of(i), data[3].of(i), data[4].of(i),
                                     data[5].of(i),     data[6].of(i),    data[7].of(i), data[8].of(i), data[9].of(i),
                                     z + i * n,         lam + i * m,      nu + i * q,    mu + i * n,    slack + i * m,
                                     box_slack + i * n, residual + i * 3, &told,         ray + i * r};
      kernels.solve(sizes, arguments, workspace);
      status[i] = static_cast<std::int32_t>(told);
    };
    return for_each_sample(call, memory, B, sizes, 9.0 * cost_of(sizes), solve);  // nine steps are usual
  }
};

}  // namespace icnnrt::ort
