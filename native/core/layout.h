// Arrays out of a workspace, each aligned.
#pragma once

#include "kernels.h"
#include "lanes.h"

namespace icnnrt {
namespace ICNNRT_INSTRUCTION_SET {

struct Layout {
  unsigned char* next;

  template <typename A>
  A* take(std::size_t count) {
    A* array = reinterpret_cast<A*>(next);
    const std::size_t bytes = count * sizeof(A);
    next += (bytes + kWorkspaceAlignment - 1) / kWorkspaceAlignment * kWorkspaceAlignment;
    return array;
  }
};

}  // namespace ICNNRT_INSTRUCTION_SET
}  // namespace icnnrt
