// One test body for every instruction set that this processor has.
#pragma once

#include <doctest/doctest.h>

#include <string>

#include "call.h"

namespace icnnrt_tests {

// body(kernels) for each instruction set's kernels; what fails says by which.
template <typename T, typename Body>
void each_kernel(const Body& body, Domain domain = Domain::kEntropy) {
  for (const icnnrt::Kernels<T>* kernels : runnable_kernels<T>(domain)) {
    const std::string instruction_set = kernels->instruction_set;
    CAPTURE(instruction_set);
    body(*kernels);
  }
}

}  // namespace icnnrt_tests
