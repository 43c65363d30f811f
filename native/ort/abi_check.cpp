// Holds abi.h against ONNX Runtime's own header: it compiles, or names what differs. Nothing of it is linked.
// Compile with -DICNNRT_ONNXRUNTIME_HEADER='"/path/to/onnxruntime_c_api.h"'.
#ifndef ICNNRT_ONNXRUNTIME_HEADER
#error "say where onnxruntime_c_api.h is: -DICNNRT_ONNXRUNTIME_HEADER='\"/path/to/onnxruntime_c_api.h\"'"
#endif

#include "abi.h"

// The header asks that statuses be used, which a type cannot carry.
#pragma GCC diagnostic ignored "-Wignored-attributes"

namespace icnnrt::ort {

static_assert(ORT_API_VERSION >= kApiVersion, "this header is older than what abi.h declares");

// In both, `name` is a pointer to a function; noexcept is part of its type.
#define ICNNRT_CHECK(slot, name, ...)                                                                      \
  static_assert(offsetof(::OrtApi, name) == (slot) * sizeof(void*), "OrtApi::" #name " has another slot"); \
  static_assert(std::is_same_v<decltype(::OrtApi::name), decltype(Api::name)>, "OrtApi::" #name " has another type");
ICNNRT_ORT_API(ICNNRT_CHECK)
#undef ICNNRT_CHECK

#define ICNNRT_CHECK(name, ...)                                                                                      \
  static_assert(offsetof(::OrtCustomOp, name) == offsetof(CustomOp, name), "OrtCustomOp::" #name " lies elsewhere"); \
  static_assert(std::is_same_v<decltype(::OrtCustomOp::name), decltype(CustomOp::name)>,                             \
                "OrtCustomOp::" #name " has another type");
ICNNRT_ORT_CUSTOM_OP(ICNNRT_CHECK)
#undef ICNNRT_CHECK
static_assert(offsetof(::OrtCustomOp, version) == offsetof(CustomOp, version));

static_assert(offsetof(::OrtApiBase, GetApi) == 0);
static_assert(offsetof(::OrtApiBase, GetVersionString) == sizeof(void*));
static_assert(std::is_same_v<decltype(::OrtApiBase::GetApi), const OrtApi* (*)(std::uint32_t) noexcept>);
static_assert(std::is_same_v<decltype(::OrtApiBase::GetVersionString), const char* (*)() noexcept>);

static_assert(kInvalidArgument == ORT_INVALID_ARGUMENT && kFail == ORT_FAIL);
static_assert(kFloat == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT && kDouble == ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE);
static_assert(kInt32 == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32);
static_assert(kInt64 == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64);
static_assert(kArena == OrtArenaAllocator && kDefaultMemory == OrtMemTypeDefault);
static_assert(kRequired == INPUT_OUTPUT_REQUIRED);
static_assert(sizeof(OrtErrorCode) == 4 && sizeof(OrtAllocatorType) == 4 && sizeof(OrtMemType) == 4 &&
              sizeof(ONNXTensorElementDataType) == 4 && sizeof(OrtCustomOpInputOutputCharacteristic) == 4);

}  // namespace icnnrt::ort
