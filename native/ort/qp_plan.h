// The input `plan` of operators on sparse quadratic programs, and the samples that go without it.
#pragma once

#include "qp_inputs.h"

namespace icnnrt::ort {

// The bytes of a dense workspace from where on a sample that keeps to its plan is not tried without: those of 5,000
// variables, whose factors take minutes.
inline constexpr std::size_t kMostAgain = std::size_t{1} << 30;

// A plan is a promise about Q, G and A. A sample that does not keep it is solved as if there were none: slower, and
// never wrong. So is one that is not solved by it, where that may help; else it stays as it is. For that a call has an
// allocator.
template <typename T>
class QpSparse {
 public:
  QpSparse(const Call& call, const QpKernels<T>& kernels) : call_(call), kernels_(kernels) {}
  QpSparse(const QpSparse&) = delete;
  QpSparse& operator=(const QpSparse&) = delete;
  ~QpSparse() {
    if (allocator_) call_.api.ReleaseAllocator(allocator_);
  }

  // `matrices` are Q, G and A.
  OrtStatus* read(std::size_t index, const OrtMemoryInfo* memory, const QpShapes& shapes,
                  const QpData<T> (&matrices)[3], QpSizes& sizes) {
    Input<std::int32_t> plan;
    ICNNRT_TRY(call_.read(index, "plan", plan));
    const char* expected = "one row of integers";
    if (plan.shape.rank == 1) expected = read_plan(plan.data, plan.shape[0], shapes.n, shapes.m, shapes.q, plan_);
    if (expected) {
      return error(call_.api, kInvalidArgument,
                   "ai.icnnrt::%s: plan: expected %s, for n = %zu variables, m = %zu inequalities and q = %zu "
                   "equalities, but got another of shape %s; pass icnnrt.QPPattern(Q, G, A).plan.",
                   call_.op, expected, shapes.n, shapes.m, shapes.q, Text(plan.shape).chars);
    }
    for (std::size_t i = 0; i < 3; ++i) {
      matrices_[i] = matrices[i];
      if (!matrices[i].stride && shapes.B) fits_ = fits_ && within(i, 0);  // of all samples at once
    }
    bytes_ = qp_workspace_bytes(sizes);
    sizes.plan = &plan_;
    return call_.api.KernelContext_GetAllocator(call_.context, memory, &allocator_);
  }

  bool fits(std::size_t sample) const {
    bool all = fits_;
    for (std::size_t i = 0; i < 3; ++i) all = all && (!matrices_[i].stride || within(i, sample));
    return all;
  }

  // solve(workspace) of dense matrices.
  template <typename Solve>
  OrtStatus* densely(const Solve& solve) const {
    if (!bytes_ || bytes_ > PTRDIFF_MAX / 2)
      return error(call_.api, kFail, "ai.icnnrt::%s: Q, G and A are too large to be solved without a plan", call_.op);
    Workspace workspace(call_.api, allocator_);
    void* memory = nullptr;
    ICNNRT_TRY(workspace.allocate(bytes_, memory));
    solve(memory);
    return nullptr;
  }

  // The same of a sample that has an answer by the plan, and keeps it where there is no memory for another.
  template <typename Solve>
  void again(const Solve& solve) const {
    if (bytes_ > kMostAgain) return;
    if (OrtStatus* status = densely(solve); status) call_.api.ReleaseStatus(status);
  }

  double work() const { return plan_.work + 10.0 * static_cast<double>(plan_.entries + plan_.N); }

 private:
  bool within(std::size_t i, std::size_t sample) const {
    constexpr QpMatrix kWhich[] = {QpMatrix::kQ, QpMatrix::kG, QpMatrix::kA};
    return kernels_.within(plan_, kWhich[i], matrices_[i].of(sample));
  }

  const Call& call_;
  const QpKernels<T>& kernels_;
  OrtAllocator* allocator_ = nullptr;
  QpPlan plan_{};
  QpData<T> matrices_[3];
  bool fits_ = true;
  std::size_t bytes_ = 0;  // of dense matrices
};

}  // namespace icnnrt::ort
