// The kernels of quadratic programs for one instruction set, as instruction_set.cpp has those of the bundle solvers.
#include "qp_adjoint.h"
#include "qp_solve.h"

#define ICNNRT_TEXT_OF(name) #name
#define ICNNRT_TEXT(name) ICNNRT_TEXT_OF(name)

namespace icnnrt {
namespace ICNNRT_INSTRUCTION_SET {

template <typename T>
static bool qp_within(const QpPlan& plan, QpMatrix which, const T* matrix) noexcept {
  return within(plan, which, matrix);
}

extern const QpKernels<float> kQpFloat;
extern const QpKernels<double> kQpDouble;
const QpKernels<float> kQpFloat = {ICNNRT_TEXT(ICNNRT_INSTRUCTION_SET), qp_solve<float>, qp_adjoint<float>,
                                   qp_within<float>};
const QpKernels<double> kQpDouble = {ICNNRT_TEXT(ICNNRT_INSTRUCTION_SET), qp_solve<double>, qp_adjoint<double>,
                                     qp_within<double>};

}  // namespace ICNNRT_INSTRUCTION_SET
}  // namespace icnnrt
