// One test body for every instruction set that this processor has.
#pragma once

#include <doctest/doctest.h>

#include <string>

#include "call.h"
#include "core/qp.h"

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

// The same of those of quadratic programs.
template <typename T, typename Body>
void each_program_kernel(const Body& body) {
  for (std::size_t i = 0; i < icnnrt::kInstructionSets; ++i)
    if (const icnnrt::QpKernels<T>* kernels = icnnrt::qp_kernels_for<T>(i)) {
      const std::string instruction_set = kernels->instruction_set;
      CAPTURE(instruction_set);
      body(*kernels);
    }
}

}  // namespace icnnrt_tests
