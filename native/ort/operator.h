// An operator as ONNX Runtime wants it: a table of functions, and a kernel object for every node.
#pragma once

#include <cstdlib>
#include <iterator>
#include <new>

#include "shape_inference.h"
#include "tensors.h"

namespace icnnrt::ort {

// What ONNX Runtime is given, and gives back to every function of the table.
struct Operator : CustomOp {
  const Api* api = nullptr;
};

// One node. Nothing in it changes after it is made: any number of threads may compute at once.
template <typename Op>
struct Kernel {
  const Api& api;
  OrtMemoryInfo* memory = nullptr;
  Op op{};

  static OrtStatus* create(const OrtCustomOp* self, const OrtApi*, const OrtKernelInfo* info, void** out) {
    const Api& api = *static_cast<const Operator*>(reinterpret_cast<const CustomOp*>(self))->api;
    void* storage = std::malloc(sizeof(Kernel));
    if (!storage) return error(api, kFail, "ai.icnnrt::%s: memory ran out.", Op::kName);
    auto* kernel = new (storage) Kernel{api};
    OrtStatus* status = kernel->op.read_attributes(api, info);
    if (!status) status = api.CreateCpuMemoryInfo(kArena, kDefaultMemory, &kernel->memory);
    if (status) {
      destroy(kernel);
    } else {
      *out = kernel;
    }
    return status;
  }

  static OrtStatus* compute(void* self, OrtKernelContext* context) {
    const auto& kernel = *static_cast<const Kernel*>(self);
    return kernel.op.compute(Call{kernel.api, context, Op::kName}, kernel.memory);
  }

  static void destroy(void* self) {
    if (!self) return;
    auto* kernel = static_cast<Kernel*>(self);
    if (kernel->memory) kernel->api.ReleaseMemoryInfo(kernel->memory);
    std::free(kernel);
  }
};

template <typename Op>
Operator make_operator(const Api& api) {
  Operator made;
  made.api = &api;
  made.GetName = [](const OrtCustomOp*) { return Op::kName; };
  made.GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };  // the CPU
  made.GetInputType = [](const OrtCustomOp*, std::size_t i) { return Op::kInputTypes[i]; };
  made.GetInputTypeCount = [](const OrtCustomOp*) { return std::size(Op::kInputTypes); };
  made.GetOutputType = [](const OrtCustomOp*, std::size_t i) { return Op::kOutputTypes[i]; };
  made.GetOutputTypeCount = [](const OrtCustomOp*) { return std::size(Op::kOutputTypes); };
  made.GetInputCharacteristic = [](const OrtCustomOp*, std::size_t) { return kRequired; };
  made.GetOutputCharacteristic = [](const OrtCustomOp*, std::size_t) { return kRequired; };
  made.GetInputMemoryType = [](const OrtCustomOp*, std::size_t) { return kDefaultMemory; };
  // Asked only of variadic inputs and outputs, which there are none of; a null pointer might be asked all the same.
  const auto zero = [](const OrtCustomOp*) { return 0; };
  made.GetVariadicInputMinArity = made.GetVariadicInputHomogeneity = zero;
  made.GetVariadicOutputMinArity = made.GetVariadicOutputHomogeneity = zero;
  made.CreateKernelV2 = &Kernel<Op>::create;
  made.KernelComputeV2 = &Kernel<Op>::compute;
  made.KernelDestroy = &Kernel<Op>::destroy;
  made.InferOutputShapeFn = [](const OrtCustomOp* self, OrtShapeInferContext* context) -> OrtStatus* {
    const Api& api = *static_cast<const Operator*>(reinterpret_cast<const CustomOp*>(self))->api;
    // ONNX Runtime drops what is returned here without releasing it.
    if (OrtStatus* status = infer_shapes<Op>(api, context); status) api.ReleaseStatus(status);
    return nullptr;
  };
  made.GetStartVersion = [](const OrtCustomOp*) { return 1; };
  made.GetEndVersion = [](const OrtCustomOp*) { return INT32_MAX; };
  return made;
}

}  // namespace icnnrt::ort
