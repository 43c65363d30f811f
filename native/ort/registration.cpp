// What ONNX Runtime calls for every SessionOptions that the library is registered with; icnnrt.ops_library() says where
// that is.
#include <atomic>
#include <new>
#include <utility>

#include "bundle_adjoint.h"
#include "bundle_solve.h"
#include "operator.h"
#include "qp_adjoint.h"
#include "qp_solve.h"

namespace icnnrt::ort {
namespace {

constexpr const char* kDomain = "ai.icnnrt";
// Session options that hold the operators say so by these entries, which icnnrt and everyone else may read back.
constexpr const char* kOperatorsEntry = "ai.icnnrt.operators";
constexpr const char* kOperators =
    "BundleEntropyAdjoint BundleEntropySolve BundleQuadraticAdjoint BundleQuadraticSolve BundleSimplexAdjoint "
    "BundleSimplexSolve QPAdjoint QPSensitivity QPSolve QuadraticProgram SparseQPSensitivity SparseQuadraticProgram";
constexpr const char* kInstructionSetEntry = "ai.icnnrt.instruction_set";

// What one ONNX Runtime holds on to: its sessions use the operators until the last of them is gone. A process may have
// several runtimes (onnxruntime for Python, and one inside some other library), each with a table of its own.
struct Domain {
  const OrtApi* key;
  const Api api;
  Operator operators[4 * kDomains + 12];
  OrtCustomOpDomain* domain = nullptr;
  Domain* next = nullptr;

  explicit Domain(const OrtApi* table) : key(table), api(table) {
    make<icnnrt::Domain::kEntropy>();
    make<icnnrt::Domain::kSimplex>();
    make<icnnrt::Domain::kQuadratic>();
    Operator* const of_qp = operators + 4 * kDomains;
    of_qp[0] = make_operator<QpSolve<float>>(api);
    of_qp[1] = make_operator<QpSolve<double>>(api);
    of_qp[2] = make_operator<QpAdjoint<float>>(api);
    of_qp[3] = make_operator<QpAdjoint<double>>(api);
    of_qp[4] = make_operator<QpSensitivity<float>>(api);
    of_qp[5] = make_operator<QpSensitivity<double>>(api);
    of_qp[6] = make_operator<QuadraticProgram<float>>(api);
    of_qp[7] = make_operator<QuadraticProgram<double>>(api);
    of_qp[8] = make_operator<SparseQuadraticProgram<float>>(api);
    of_qp[9] = make_operator<SparseQuadraticProgram<double>>(api);
    of_qp[10] = make_operator<SparseQpSensitivity<float>>(api);
    of_qp[11] = make_operator<SparseQpSensitivity<double>>(api);
  }

  // The operators of one domain of y.
  template <icnnrt::Domain where>
  void make() {
    Operator* const four = operators + 4 * static_cast<std::size_t>(where);
    four[0] = make_operator<BundleSolve<where, float>>(api);
    four[1] = make_operator<BundleSolve<where, double>>(api);
    four[2] = make_operator<BundleAdjoint<where, float>>(api);
    four[3] = make_operator<BundleAdjoint<where, double>>(api);
  }

  OrtStatus* fill() {
    ICNNRT_TRY(api.CreateCustomOpDomain(kDomain, &domain));
    for (const Operator& op : operators) {
      ICNNRT_TRY(
          api.CustomOpDomain_Add(domain, reinterpret_cast<const OrtCustomOp*>(static_cast<const CustomOp*>(&op))));
    }
    return nullptr;
  }

  static void destroy(Domain* self) {
    if (self->domain) self->api.ReleaseCustomOpDomain(self->domain);
    self->~Domain();
    std::free(self);
  }
};

// Every domain made so far, for the life of the library: ONNX Runtime unloads it after the last session that uses it.
struct Domains {
  std::atomic<Domain*> first{nullptr};

  ~Domains() {
    for (Domain* domain = first.load(); domain;) Domain::destroy(std::exchange(domain, domain->next));
  }

  OrtStatus* get(const OrtApi* table, Domain*& found) {
    Domain* made = nullptr;
    Domain* head = first.load();
    for (;;) {
      for (found = head; found && found->key != table;) found = found->next;
      if (found) {  // perhaps another thread's, a moment ago
        if (made) Domain::destroy(made);
        return nullptr;
      }
      if (!made) {
        const Api api(table);
        void* storage = std::malloc(sizeof(Domain));
        if (!storage) return error(api, kFail, "ai.icnnrt: memory ran out.");
        made = new (storage) Domain(table);
        if (OrtStatus* status = made->fill(); status) {
          Domain::destroy(made);
          return status;
        }
      }
      made->next = head;
      if (first.compare_exchange_weak(head, made)) {
        found = made;
        return nullptr;
      }
    }
  }
};

Domains domains;

OrtStatus* register_operators(OrtSessionOptions* options, const OrtApiBase* base) {
  const OrtApi* table = base->GetApi(kApiVersion);
  if (!table) {
    // Every runtime has version 1 of the table, and making a status is its first entry since then. A runtime that has
    // neither can be told nothing; then the entries below are missing, and the portable bodies run.
    const OrtApi* oldest = base->GetApi(1);
    if (!oldest) return nullptr;
    char message[300];
    std::snprintf(message, sizeof message,
                  "ai.icnnrt: expected an onnxruntime that offers version %u of its C interface, as 1.17 and later do, "
                  "but this is %s; install another onnxruntime, or go without native operators: "
                  "icnnrt.load(..., native=False).",
                  kApiVersion, base->GetVersionString());
    const auto create = reinterpret_cast<decltype(Api::CreateStatus)>(*reinterpret_cast<void* const*>(oldest));
    return create(kFail, message);
  }
  Domain* domain = nullptr;
  ICNNRT_TRY(domains.get(table, domain));
  const Api& api = domain->api;
  int already = 0;
  ICNNRT_TRY(api.HasSessionConfigEntry(options, kOperatorsEntry, &already));
  if (already) {
    return error(api, kInvalidArgument,
                 "ai.icnnrt: expected session options without its operators, but they are registered there already; "
                 "call register_custom_ops_library once for each SessionOptions.");
  }
  if (const char* const refused = refused_limit(); refused) {
    return error(api, kInvalidArgument,
                 "ai.icnnrt: %s: expected the name of an instruction set of this library (%s), but got '%s'; set one "
                 "of these before the process starts, or unset it.",
                 kLimitVariable, instruction_sets(), refused);
  }
  ICNNRT_TRY(api.AddCustomOpDomain(options, domain->domain));
  ICNNRT_TRY(api.AddSessionConfigEntry(options, kOperatorsEntry, kOperators));
  return api.AddSessionConfigEntry(options, kInstructionSetEntry, kernels<float>().instruction_set);
}

}  // namespace
}  // namespace icnnrt::ort

extern "C" [[gnu::visibility("default")]] OrtStatus* RegisterCustomOps(OrtSessionOptions* options,
                                                                       const OrtApiBase* base) {
  return icnnrt::ort::register_operators(options, base);
}
