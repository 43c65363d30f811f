// ai.icnnrt::QPSolve, QuadraticProgram and SparseQuadraticProgram: checks, and one call of the core for every sample.
#pragma once

#include "qp_inputs.h"
#include "qp_plan.h"
#include "steps.h"

namespace icnnrt::ort {

inline constexpr int kUsualSteps = 60;

// Whether a sample that took so many steps had fewer or less time than it wanted, so that no other factor helps it.
inline bool ended_by_limits(const QpSizes& sizes, std::int32_t taken) {
  const bool few = sizes.steps < std::size_t{kUsualSteps} && static_cast<std::size_t>(taken) >= sizes.steps;
  return few || (sizes.deadline && qp_now() >= sizes.deadline);
}

// What all operators take and give.
template <typename T>
struct QpSolver {
  static constexpr ONNXTensorElementDataType T_ = sizeof(T) == sizeof(float) ? kFloat : kDouble;
  static constexpr QpInput kInputs[] = {{"Q", "nn"},          {"p", "n"},          {"G", "mn"}, {"h_lower", "m", true},
                                        {"h", "m"},           {"A", "qn"},         {"b", "q"},  {"lower", "n", true},
                                        {"upper", "n", true}, {"start", "r", true}};
  static constexpr std::size_t kCount = 10;

  static void infer_axes(Axes& axes, bool batch_known) {
    if (!batch_known && axes.of('B').size <= 1) axes.of('B') = {};
    const std::int64_t n = axes.of('n').size, m = axes.of('m').size, q = axes.of('q').size;
    if (n >= 0 && m >= 0 && q >= 0) axes.of('r').size = 2 * n + m + q;
  }

  const QpKernels<T>& kernels = icnnrt::qp_kernels<T>();

  // Sizes are read, settings given; the steps taken are an output where `tells_steps`, and input `plan_at` is a plan
  // where that is not 0, with which they are told.
  OrtStatus* solve(const Call& call, const OrtMemoryInfo* memory, QpSizes sizes, bool tells_steps,
                   std::size_t plan_at = 0) const {
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
    std::int32_t *status = nullptr, *taken = nullptr;
    ICNNRT_TRY(call.write(0, {B, n}, z));
    ICNNRT_TRY(call.write(1, {B, m}, lam));
    ICNNRT_TRY(call.write(2, {B, q}, nu));
    ICNNRT_TRY(call.write(3, {B, n}, mu));
    ICNNRT_TRY(call.write(4, {B, m}, slack));
    ICNNRT_TRY(call.write(5, {B, n}, box_slack));
    ICNNRT_TRY(call.write(6, {B, 3}, residual));
    ICNNRT_TRY(call.write(7, {B}, status));
    ICNNRT_TRY(call.write(8, {B, r}, ray));
    if (tells_steps) ICNNRT_TRY(call.write(9, {B}, taken));

    sizes.n = n;
    sizes.m = m;
    sizes.q = q;
    const QpSizes dense = sizes;
    QpSparse<T> sparse(call, kernels);
    if (plan_at) ICNNRT_TRY(sparse.read(plan_at, memory, shapes, {data[0], data[2], data[5]}, sizes));
    const auto solve_one = [&](std::size_t i, void* workspace) -> OrtStatus* {
      QpStatus told = QpStatus::kFailed;
      const QpArguments<T> arguments{data[0].of(i),    data[1].of(i), data[2].of(i), data[3].of(i),
                                     data[4].of(i),    data[5].of(i), data[6].of(i), data[7].of(i),
                                     data[8].of(i),    data[9].of(i), z + i * n,     lam + i * m,
                                     nu + i * q,       mu + i * n,    slack + i * m, box_slack + i * n,
                                     residual + i * 3, &told,         ray + i * r,   taken ? taken + i : nullptr};
      const auto solve_densely = [&](void* memory) { kernels.solve(dense, arguments, memory); };
      if (plan_at && !sparse.fits(i)) {
        ICNNRT_TRY(sparse.densely(solve_densely));
      } else {
        kernels.solve(sizes, arguments, workspace);
        // What is inaccurate is an answer, which a limit of time leaves as it is.
        const bool inaccurate = told == QpStatus::kInaccurate && !dense.deadline;
        if (plan_at && (inaccurate || told == QpStatus::kFailed) && !ended_by_limits(dense, taken[i])) {
          sparse.again(solve_densely);
          if (inaccurate && told == QpStatus::kFailed) kernels.solve(sizes, arguments, workspace);
        }
      }
      status[i] = static_cast<std::int32_t>(told);
      return nullptr;
    };
    const double cost = plan_at ? sparse.work() : cost_of(sizes);
    return for_each_sample(call, memory, B, sizes, 9.0 * cost, solve_one);  // nine steps are usual
  }
};

// Settled when it was written: the attribute `steps`, and the tolerance of the type.
template <typename T>
struct QpSolve : QpSolver<T> {
  using QpSolver<T>::T_;
  static constexpr const char* kName = "QPSolve";
  // Of what may be absent no axis is known but the first.
  static constexpr const char* kInputShapes[] = {"*nn", "*n", "*mn", "*?", "*m", "*qn", "*q", "*?", "*?", "*?"};
  static constexpr ONNXTensorElementDataType kInputTypes[] = {T_, T_, T_, T_, T_, T_, T_, T_, T_, T_};
  static constexpr const char* kOutputShapes[] = {"Bn", "Bm", "Bq", "Bn", "Bm", "Bn", "B3", "B", "Br"};
  static constexpr ONNXTensorElementDataType kOutputTypes[] = {T_, T_, T_, T_, T_, T_, kDouble, kInt32, T_};
  static constexpr const char* kOutputsOfT = "TTTTTT--T";

  std::size_t steps = 0;

  OrtStatus* read_attributes(const Api& api, const OrtKernelInfo* info) {
    return read_steps(api, info, kName, kUsualSteps, steps);
  }

  OrtStatus* compute(const Call& call, const OrtMemoryInfo* memory) const {
    return this->solve(call, memory, {0, 0, 0, steps}, false);
  }
};

// Settings are inputs: tolerance, most_steps and seconds.
template <typename T>
struct QuadraticProgram : QpSolver<T> {
  using QpSolver<T>::T_;
  static constexpr const char* kName = "QuadraticProgram";
  static constexpr const char* kInputShapes[] = {"*nn", "*n", "*mn", "*?", "*m", "*qn", "*q",
                                                 "*?",  "*?", "*?",  "",   "",   ""};
  static constexpr ONNXTensorElementDataType kInputTypes[] = {T_, T_, T_, T_,      T_,     T_,     T_,
                                                              T_, T_, T_, kDouble, kInt64, kDouble};
  static constexpr const char* kOutputShapes[] = {"Bn", "Bm", "Bq", "Bn", "Bm", "Bn", "B3", "B", "Br", "B"};
  static constexpr ONNXTensorElementDataType kOutputTypes[] = {T_, T_, T_, T_, T_, T_, kDouble, kInt32, T_, kInt32};
  static constexpr const char* kOutputsOfT = "TTTTTT--T-";

  OrtStatus* read_attributes(const Api&, const OrtKernelInfo*) { return nullptr; }

  OrtStatus* compute(const Call& call, const OrtMemoryInfo* memory) const { return run(call, memory, 0); }

 protected:
  OrtStatus* run(const Call& call, const OrtMemoryInfo* memory, std::size_t plan_at) const {
    QpSizes sizes{};
    double tolerance = 0.0, seconds = 0.0;
    std::int64_t steps = 0;
    ICNNRT_TRY(call.read_number(10, "tolerance", tolerance));
    ICNNRT_TRY(call.read_number(11, "most_steps", steps));
    ICNNRT_TRY(call.read_number(12, "seconds", seconds));
    ICNNRT_TRY(check_steps(call.api, kName, "most_steps", steps, kUsualSteps, sizes.steps));
    set_limits(sizes, tolerance, seconds);
    return this->solve(call, memory, sizes, true, plan_at);
  }
};

// Matrices that have nothing outside a plan, by that.
template <typename T>
struct SparseQuadraticProgram : QuadraticProgram<T> {
  using QpSolver<T>::T_;
  static constexpr const char* kName = "SparseQuadraticProgram";
  static constexpr const char* kInputShapes[] = {"*nn", "*n", "*mn", "*?", "*m", "*qn", "*q",
                                                 "*?",  "*?", "*?",  "",   "",   "",    "?"};
  static constexpr ONNXTensorElementDataType kInputTypes[] = {T_, T_, T_, T_,      T_,     T_,      T_,
                                                              T_, T_, T_, kDouble, kInt64, kDouble, kInt32};

  OrtStatus* compute(const Call& call, const OrtMemoryInfo* memory) const { return this->run(call, memory, 13); }
};

}  // namespace icnnrt::ort
