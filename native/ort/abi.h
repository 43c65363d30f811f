// The part of ONNX Runtime's C interface that the operators use, declared here because no package ships its header.
//
// That interface only ever grows: a function keeps its slot in the table and its signature, and a structure its head.
// abi_check.cpp holds every slot, offset, signature and constant below against the real header where that is found.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#ifdef ICNNRT_ONNXRUNTIME_HEADER
#include ICNNRT_ONNXRUNTIME_HEADER
#else
struct OrtApi;
struct OrtAllocator;
struct OrtCustomOp;
struct OrtCustomOpDomain;
struct OrtKernelContext;
struct OrtKernelInfo;
struct OrtMemoryInfo;
struct OrtSessionOptions;
struct OrtShapeInferContext;
struct OrtStatus;
struct OrtTensorTypeAndShapeInfo;
struct OrtValue;
enum OrtErrorCode : unsigned;
enum OrtAllocatorType : int;
enum OrtMemType : int;
enum ONNXTensorElementDataType : unsigned;
enum OrtCustomOpInputOutputCharacteristic : unsigned;

struct OrtApiBase {
  const OrtApi* (*GetApi)(std::uint32_t version) noexcept;
  const char* (*GetVersionString)() noexcept;
};
#endif

namespace icnnrt::ort {

// The oldest version of the interface that has all of the below: ONNX Runtime 1.17.
inline constexpr std::uint32_t kApiVersion = 17;

inline constexpr auto kInvalidArgument = static_cast<OrtErrorCode>(2);
inline constexpr auto kFail = static_cast<OrtErrorCode>(1);
inline constexpr auto kFloat = static_cast<ONNXTensorElementDataType>(1);
inline constexpr auto kInt32 = static_cast<ONNXTensorElementDataType>(6);
inline constexpr auto kInt64 = static_cast<ONNXTensorElementDataType>(7);
inline constexpr auto kDouble = static_cast<ONNXTensorElementDataType>(11);
inline constexpr auto kArena = static_cast<OrtAllocatorType>(1);
inline constexpr auto kDefaultMemory = static_cast<OrtMemType>(0);
inline constexpr auto kRequired = static_cast<OrtCustomOpInputOutputCharacteristic>(0);

// clang-format off
#define ICNNRT_ORT_API(X)                                                                                              \
  X(0, CreateStatus, OrtStatus*(OrtErrorCode, const char* message) noexcept)                                           \
  X(2, GetErrorMessage, const char*(const OrtStatus*) noexcept)                                                        \
  X(26, CreateCustomOpDomain, OrtStatus*(const char* domain, OrtCustomOpDomain** out) noexcept)                        \
  X(27, CustomOpDomain_Add, OrtStatus*(OrtCustomOpDomain*, const OrtCustomOp*) noexcept)                               \
  X(28, AddCustomOpDomain, OrtStatus*(OrtSessionOptions*, OrtCustomOpDomain*) noexcept)                                \
  X(51, GetTensorMutableData, OrtStatus*(OrtValue*, void** out) noexcept)                                              \
  X(57, CreateTensorTypeAndShapeInfo, OrtStatus*(OrtTensorTypeAndShapeInfo** out) noexcept)                            \
  X(58, SetTensorElementType, OrtStatus*(OrtTensorTypeAndShapeInfo*, ONNXTensorElementDataType) noexcept)              \
  X(59, SetDimensions, OrtStatus*(OrtTensorTypeAndShapeInfo*, const std::int64_t* sizes, std::size_t) noexcept)        \
  X(60, GetTensorElementType,                                                                                          \
    OrtStatus*(const OrtTensorTypeAndShapeInfo*, ONNXTensorElementDataType* out) noexcept)                             \
  X(61, GetDimensionsCount, OrtStatus*(const OrtTensorTypeAndShapeInfo*, std::size_t* out) noexcept)                   \
  X(62, GetDimensions, OrtStatus*(const OrtTensorTypeAndShapeInfo*, std::int64_t* out, std::size_t) noexcept)          \
  X(63, GetSymbolicDimensions,                                                                                         \
    OrtStatus*(const OrtTensorTypeAndShapeInfo*, const char** out, std::size_t) noexcept)                              \
  X(65, GetTensorTypeAndShape, OrtStatus*(const OrtValue*, OrtTensorTypeAndShapeInfo** out) noexcept)                  \
  X(69, CreateCpuMemoryInfo, OrtStatus*(OrtAllocatorType, OrtMemType, OrtMemoryInfo** out) noexcept)                   \
  X(75, AllocatorAlloc, OrtStatus*(OrtAllocator*, std::size_t bytes, void** out) noexcept)                             \
  X(76, AllocatorFree, OrtStatus*(OrtAllocator*, void*) noexcept)                                                      \
  X(86, KernelInfoGetAttribute_int64,                                                                                  \
    OrtStatus*(const OrtKernelInfo*, const char* name, std::int64_t* out) noexcept)                                    \
  X(90, KernelContext_GetInput,                                                                                        \
    OrtStatus*(const OrtKernelContext*, std::size_t index, const OrtValue** out) noexcept)                             \
  X(91, KernelContext_GetOutput,                                                                                       \
    OrtStatus*(OrtKernelContext*, std::size_t index, const std::int64_t* sizes, std::size_t, OrtValue** out) noexcept) \
  X(93, ReleaseStatus, void(OrtStatus*))                                                                               \
  X(94, ReleaseMemoryInfo, void(OrtMemoryInfo*))                                                                       \
  X(99, ReleaseTensorTypeAndShapeInfo, void(OrtTensorTypeAndShapeInfo*))                                               \
  X(101, ReleaseCustomOpDomain, void(OrtCustomOpDomain*))                                                              \
  X(130, AddSessionConfigEntry, OrtStatus*(OrtSessionOptions*, const char* key, const char* value) noexcept)           \
  X(143, TensorAt, OrtStatus*(OrtValue*, const std::int64_t* indices, std::size_t, void** out) noexcept)               \
  X(132, ReleaseAllocator, void(OrtAllocator*))                                                                        \
  X(237, HasSessionConfigEntry, OrtStatus*(const OrtSessionOptions*, const char* key, int* out) noexcept)              \
  X(253, KernelContext_GetAllocator,                                                                                   \
    OrtStatus*(const OrtKernelContext*, const OrtMemoryInfo*, OrtAllocator** out) noexcept)                            \
  X(268, ShapeInferContext_GetInputTypeShape,                                                                          \
    OrtStatus*(const OrtShapeInferContext*, std::size_t index, OrtTensorTypeAndShapeInfo** out) noexcept)              \
  X(270, ShapeInferContext_SetOutputTypeShape,                                                                         \
    OrtStatus*(const OrtShapeInferContext*, std::size_t index, const OrtTensorTypeAndShapeInfo*) noexcept)             \
  X(271, SetSymbolicDimensions, OrtStatus*(OrtTensorTypeAndShapeInfo*, const char** names, std::size_t) noexcept)      \
  X(274, KernelContext_ParallelFor,                                                                                    \
    OrtStatus*(const OrtKernelContext*, void (*)(void* data, std::size_t index), std::size_t total,                    \
               std::size_t batches, void* data) noexcept)

// After `version`, which is 17, a custom operator is these pointers. 1.18 added four more, which it does not read in a
// structure of version 17; they are here so that a structure of ours is as large as any that it may copy.
#define ICNNRT_ORT_CUSTOM_OP(X)                                                                                        \
  X(CreateKernel, void*(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*))                                      \
  X(GetName, const char*(const OrtCustomOp*))                                                                          \
  X(GetExecutionProviderType, const char*(const OrtCustomOp*))                                                         \
  X(GetInputType, ONNXTensorElementDataType(const OrtCustomOp*, std::size_t))                                          \
  X(GetInputTypeCount, std::size_t(const OrtCustomOp*))                                                                \
  X(GetOutputType, ONNXTensorElementDataType(const OrtCustomOp*, std::size_t))                                         \
  X(GetOutputTypeCount, std::size_t(const OrtCustomOp*))                                                               \
  X(KernelCompute, void(void* kernel, OrtKernelContext*))                                                              \
  X(KernelDestroy, void(void* kernel))                                                                                 \
  X(GetInputCharacteristic, OrtCustomOpInputOutputCharacteristic(const OrtCustomOp*, std::size_t))                     \
  X(GetOutputCharacteristic, OrtCustomOpInputOutputCharacteristic(const OrtCustomOp*, std::size_t))                    \
  X(GetInputMemoryType, OrtMemType(const OrtCustomOp*, std::size_t))                                                   \
  X(GetVariadicInputMinArity, int(const OrtCustomOp*))                                                                 \
  X(GetVariadicInputHomogeneity, int(const OrtCustomOp*))                                                              \
  X(GetVariadicOutputMinArity, int(const OrtCustomOp*))                                                                \
  X(GetVariadicOutputHomogeneity, int(const OrtCustomOp*))                                                             \
  X(CreateKernelV2, OrtStatus*(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*, void** kernel))                \
  X(KernelComputeV2, OrtStatus*(void* kernel, OrtKernelContext*))                                                      \
  X(InferOutputShapeFn, OrtStatus*(const OrtCustomOp*, OrtShapeInferContext*))                                         \
  X(GetStartVersion, int(const OrtCustomOp*))                                                                          \
  X(GetEndVersion, int(const OrtCustomOp*))                                                                            \
  X(GetMayInplace, std::size_t(int** inputs, int** outputs))                                                           \
  X(ReleaseMayInplace, void(int* inputs, int* outputs))                                                                \
  X(GetAliasMap, std::size_t(int** inputs, int** outputs))                                                             \
  X(ReleaseAliasMap, void(int* inputs, int* outputs))
// clang-format on

// The functions above, copied out of a runtime's table.
struct Api {
#define ICNNRT_MEMBER(slot, name, ...) std::add_pointer_t<__VA_ARGS__> name;
  ICNNRT_ORT_API(ICNNRT_MEMBER)
#undef ICNNRT_MEMBER

  explicit Api(const OrtApi* api) {
    void* const* const table = reinterpret_cast<void* const*>(api);
#define ICNNRT_COPY(slot, name, ...) name = reinterpret_cast<std::add_pointer_t<__VA_ARGS__>>(table[slot]);
    ICNNRT_ORT_API(ICNNRT_COPY)
#undef ICNNRT_COPY
  }
};

// OrtCustomOp, version 17.
struct CustomOp {
  std::uint32_t version = kApiVersion;
#define ICNNRT_MEMBER(name, ...) std::add_pointer_t<__VA_ARGS__> name = nullptr;
  ICNNRT_ORT_CUSTOM_OP(ICNNRT_MEMBER)
#undef ICNNRT_MEMBER
};

}  // namespace icnnrt::ort
