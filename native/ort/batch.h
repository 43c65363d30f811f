// The samples of one call, on ONNX Runtime's own threads.
//
// Every sample is solved by itself, from its inputs to its outputs, so that neither the number of threads nor its
// neighbours can change a bit of it.
#pragma once

#include <atomic>
#include <cstdint>
#include <type_traits>

#include "../core/kernels.h"
#include "../core/qp.h"
#include "shape_inference.h"
#include "tensors.h"

namespace icnnrt::ort {

// Workspaces up to this size lie on the stack (10 cuts of 400 entries): such a solve takes a few microseconds, of which
// asking for memory would be a tenth. ONNX Runtime itself needs more stack than this for a session.
inline constexpr std::size_t kStackBytes = std::size_t{1} << 16;
// What a task should cost at least, in multiply-adds: about 20 microseconds, as much as waking a thread for it.
inline constexpr double kTask = 5e5;
inline constexpr std::size_t kMostTasks = 256;

// Workspace of one thread, aligned, from the session's allocator: its arena keeps the pages, while malloc would hand
// them back to the kernel and fault them in again at every call.
class Workspace {
 public:
  Workspace(const Api& api, OrtAllocator* allocator) : api_(api), allocator_(allocator) {}
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() {
    if (raw_) {
      if (OrtStatus* status = api_.AllocatorFree(allocator_, raw_); status) api_.ReleaseStatus(status);
    }
  }

  OrtStatus* allocate(std::size_t bytes, void*& aligned) {
    ICNNRT_TRY(api_.AllocatorAlloc(allocator_, bytes + kWorkspaceAlignment, &raw_));
    const auto address = reinterpret_cast<std::uintptr_t>(raw_);
    aligned = reinterpret_cast<void*>((address + kWorkspaceAlignment - 1) / kWorkspaceAlignment * kWorkspaceAlignment);
    return nullptr;
  }

 private:
  const Api& api_;
  OrtAllocator* allocator_;
  void* raw_ = nullptr;
};

template <typename Solve>
struct Tasks {
  const Api& api;
  OrtAllocator* allocator;  // null if the workspace fits the stack
  std::size_t samples, tasks, bytes;
  const Solve& solve;
  std::atomic<OrtStatus*> failure{nullptr};

  // As a callback of KernelContext_ParallelFor.
  static void run(void* self, std::size_t task) {
    auto& tasks = *static_cast<Tasks*>(self);
    OrtStatus* status = tasks.allocator ? tasks.on_heap(task) : tasks.on_stack(task);
    OrtStatus* none = nullptr;
    if (status && !tasks.failure.compare_exchange_strong(none, status)) tasks.api.ReleaseStatus(status);
  }

 private:
  OrtStatus* on_stack(std::size_t task) {
    alignas(kWorkspaceAlignment) unsigned char workspace[kStackBytes];
    return run_samples(task, workspace);
  }

  OrtStatus* on_heap(std::size_t task) {
    Workspace memory(api, allocator);
    void* workspace = nullptr;
    ICNNRT_TRY(memory.allocate(bytes, workspace));
    return run_samples(task, workspace);
  }

  // What a sample returns, if anything, is a failure to get more memory.
  OrtStatus* run_samples(std::size_t task, void* workspace) {
    const std::size_t each = samples / tasks, more = samples % tasks;
    const std::size_t first = task * each + (task < more ? task : more);
    const std::size_t end = first + each + (task < more ? 1 : 0);
    for (std::size_t sample = first; sample < end; ++sample) {
      if constexpr (std::is_void_v<decltype(solve(sample, workspace))>) {
        solve(sample, workspace);
      } else {
        ICNNRT_TRY(solve(sample, workspace));
      }
    }
    return nullptr;
  }
};

// What a message says of a workspace.
struct WorkspaceText {
  char what[160];       // "k = 30 cuts of n = 600 entries"
  const char* counted;  // "slopes: expected [B, k, n]", of which it could be counted in bytes
  const char* remedy;
};

// Calls solve(sample, workspace) for every sample; `cost` is that of one, in multiply-adds. `bytes` of workspace are 0
// where they cannot be counted.
template <typename Solve>
OrtStatus* for_each_sample(const Call& call, const OrtMemoryInfo* memory, std::size_t samples, std::size_t bytes,
                           const WorkspaceText& text, double cost, const Solve& solve) {
  if (!samples) return nullptr;
  if (!bytes || bytes > PTRDIFF_MAX / 2) {
    return error(call.api, kInvalidArgument,
                 "ai.icnnrt::%s: %s whose workspace can be counted in bytes, but got %s; %s.", call.op, text.counted,
                 text.what, text.remedy);
  }
  const double wanted = static_cast<double>(samples) * cost / kTask;
  std::size_t tasks = wanted < static_cast<double>(kMostTasks) ? static_cast<std::size_t>(wanted) : kMostTasks;
  tasks = tasks < 1 ? 1 : tasks < samples ? tasks : samples;

  OrtAllocator* allocator = nullptr;
  if (bytes > kStackBytes) ICNNRT_TRY(call.api.KernelContext_GetAllocator(call.context, memory, &allocator));
  Tasks<Solve> job{call.api, allocator, samples, tasks, bytes, solve};
  OrtStatus* status = nullptr;
  if (tasks == 1) {
    Tasks<Solve>::run(&job, 0);
  } else {
    // 0 batches: threads take one task after the other, since some samples need more steps than others.
    status = call.api.KernelContext_ParallelFor(call.context, &Tasks<Solve>::run, tasks, 0, &job);
  }
  if (allocator) call.api.ReleaseAllocator(allocator);
  if (OrtStatus* cause = job.failure.load(); cause) {
    if (status) call.api.ReleaseStatus(status);
    status = error(call.api, kFail,
                   "ai.icnnrt::%s: %zu bytes of workspace for %s cannot be allocated (%s); free memory or %s.", call.op,
                   bytes, text.what, call.api.GetErrorMessage(cause), text.remedy);
    call.api.ReleaseStatus(cause);
  }
  return status;
}

// The same for quadratic programs of these sizes.
template <typename Solve>
OrtStatus* for_each_sample(const Call& call, const OrtMemoryInfo* memory, std::size_t samples, const QpSizes& sizes,
                           double cost, const Solve& solve) {
  WorkspaceText text{{}, "Q: expected [B, n, n]", "solve smaller problems"};
  std::snprintf(text.what, sizeof text.what, "n = %zu variables, m = %zu inequalities and q = %zu equalities", sizes.n,
                sizes.m, sizes.q);
  return for_each_sample(call, memory, samples, qp_workspace_bytes(sizes), text, cost, solve);
}

// The same for k cuts of n entries.
template <typename Solve>
OrtStatus* for_each_sample(const Call& call, const OrtMemoryInfo* memory, std::size_t samples, const Sizes& sizes,
                           double cost, const Solve& solve) {
  WorkspaceText text{{}, "slopes: expected [B, k, n]", "use fewer cuts"};
  std::snprintf(text.what, sizeof text.what, "k = %zu cuts of n = %zu entries", sizes.k, sizes.n);
  return for_each_sample(call, memory, samples, workspace_bytes(sizes), text, cost, solve);
}

}  // namespace icnnrt::ort
