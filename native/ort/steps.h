// The steps of the operators that solve: an attribute of most, an input of QuadraticProgram.
#pragma once

#include <cinttypes>

#include "status.h"

namespace icnnrt::ort {

// Far more than ever help; a file must not be able to ask for a computation without end.
inline constexpr std::int64_t kMostSteps = 1'000'000;

inline OrtStatus* check_steps(const Api& api, const char* op, const char* name, std::int64_t given, int usual,
                              std::size_t& steps) {
  if (given < 0 || given > kMostSteps) {
    return error(api, kInvalidArgument,
                 "ai.icnnrt::%s: %s: expected an integer from 0 to %" PRId64 ", but got %" PRId64 "; %d is usual.", op,
                 name, kMostSteps, given, usual);
  }
  steps = static_cast<std::size_t>(given);
  return nullptr;
}

inline OrtStatus* read_steps(const Api& api, const OrtKernelInfo* info, const char* op, int usual, std::size_t& steps) {
  std::int64_t given = 0;
  if (OrtStatus* status = api.KernelInfoGetAttribute_int64(info, "steps", &given); status) {
    api.ReleaseStatus(status);
    return error(api, kInvalidArgument,
                 "ai.icnnrt::%s: steps: expected an integer attribute, but got none; write it on the node, as a "
                 "default of the body is not seen here.",
                 op);
  }
  return check_steps(api, op, "steps", given, usual, steps);
}

}  // namespace icnnrt::ort
