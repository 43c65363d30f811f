// The kernels for one instruction set. Compiled once for each, with ICNNRT_INSTRUCTION_SET naming its namespace.
#include "bundle_adjoint.h"
#include "bundle_solve.h"
#include "entropy.h"
#include "quadratic.h"
#include "simplex.h"

#define ICNNRT_TEXT_OF(name) #name
#define ICNNRT_TEXT(name) ICNNRT_TEXT_OF(name)

namespace icnnrt {
namespace ICNNRT_INSTRUCTION_SET {

extern const Kernels<float> kFloat[kDomains];
extern const Kernels<double> kDouble[kDomains];

template <typename D, typename T>
constexpr Kernels<T> kernels_of(Domain domain) {
  return {ICNNRT_TEXT(ICNNRT_INSTRUCTION_SET), domain, bundle_solve<D, T>, bundle_adjoint<D, T>};
}

// In the order of `Domain`.
const Kernels<float> kFloat[kDomains] = {kernels_of<Entropy, float>(Domain::kEntropy),
                                         kernels_of<Simplex, float>(Domain::kSimplex),
                                         kernels_of<Quadratic, float>(Domain::kQuadratic)};
const Kernels<double> kDouble[kDomains] = {kernels_of<Entropy, double>(Domain::kEntropy),
                                           kernels_of<Simplex, double>(Domain::kSimplex),
                                           kernels_of<Quadratic, double>(Domain::kQuadratic)};

}  // namespace ICNNRT_INSTRUCTION_SET
}  // namespace icnnrt
