// The kernels for one instruction set. Compiled once for each, with ICNNRT_INSTRUCTION_SET naming its namespace.
#include "bundle_entropy_adjoint.h"
#include "bundle_entropy_solve.h"

#define ICNNRT_TEXT_OF(name) #name
#define ICNNRT_TEXT(name) ICNNRT_TEXT_OF(name)

namespace icnnrt {
namespace ICNNRT_INSTRUCTION_SET {

extern const Kernels<float> kFloat;
extern const Kernels<double> kDouble;

const Kernels<float> kFloat{ICNNRT_TEXT(ICNNRT_INSTRUCTION_SET), bundle_entropy_solve<float>,
                            bundle_entropy_adjoint<float>};
const Kernels<double> kDouble{ICNNRT_TEXT(ICNNRT_INSTRUCTION_SET), bundle_entropy_solve<double>,
                              bundle_entropy_adjoint<double>};

}  // namespace ICNNRT_INSTRUCTION_SET
}  // namespace icnnrt
