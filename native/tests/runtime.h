// A runtime as small as the operators allow: the entries of ONNX Runtime's table that native/ort uses, in few lines
// each, and counts of what was handed out and not given back. With it the library is run under sanitizers, threads and
// all, which ONNX Runtime itself is not built for.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "ort/abi.h"

// Handed out and not given back.
struct Live {
  std::atomic<long> statuses{0}, shapes{0}, memory_infos{0}, allocators{0}, allocations{0}, domains{0};

  bool none() const { return !(statuses || shapes || memory_infos || allocators || allocations || domains); }
};
inline Live live;

struct OrtStatus {
  OrtErrorCode code;
  std::string message;
};
struct OrtTensorTypeAndShapeInfo {
  ONNXTensorElementDataType type{};
  std::vector<std::int64_t> sizes;
  std::vector<std::string> names;
};
struct OrtMemoryInfo {};
struct OrtAllocator {
  bool scarce;
};
struct OrtCustomOpDomain {
  std::string name;
  std::vector<const icnnrt::ort::CustomOp*> operators;
};
struct OrtSessionOptions {
  std::vector<OrtCustomOpDomain*> domains;
  std::map<std::string, std::string> entries;
};
struct OrtKernelInfo {
  std::map<std::string, std::int64_t> attributes;
};
// A tensor in memory of exactly its size.
struct OrtValue {
  std::vector<std::int64_t> sizes;
  std::vector<unsigned char> bytes;
};
struct OrtKernelContext {
  std::vector<OrtValue> inputs, outputs;
  std::vector<std::size_t> item_sizes;  // of the outputs
  unsigned threads = 1;
  bool scarce = false;        // no memory to be had
  bool counted_only = false;  // outputs have sizes and no memory
};
struct OrtShapeInferContext {
  std::vector<OrtTensorTypeAndShapeInfo> inputs, outputs;
};

namespace icnnrt_tests {

// Named as in the table, so that the macro of abi.h puts each into its slot, and checks its type.
struct Runtime {
  using Status = OrtStatus*;
  using Info = OrtTensorTypeAndShapeInfo;

  static Status CreateStatus(OrtErrorCode code, const char* message) noexcept {
    ++live.statuses;
    return new OrtStatus{code, message};
  }
  static const char* GetErrorMessage(const OrtStatus* status) noexcept { return status->message.c_str(); }
  static void ReleaseStatus(Status status) { release(status, live.statuses); }

  static Status CreateCustomOpDomain(const char* name, OrtCustomOpDomain** out) noexcept {
    return made(*out = new OrtCustomOpDomain{name, {}}, live.domains);
  }
  static Status CustomOpDomain_Add(OrtCustomOpDomain* domain, const OrtCustomOp* op) noexcept {
    domain->operators.push_back(reinterpret_cast<const icnnrt::ort::CustomOp*>(op));
    return nullptr;
  }
  static Status AddCustomOpDomain(OrtSessionOptions* options, OrtCustomOpDomain* domain) noexcept {
    options->domains.push_back(domain);
    return nullptr;
  }
  static void ReleaseCustomOpDomain(OrtCustomOpDomain* domain) { release(domain, live.domains); }
  static Status AddSessionConfigEntry(OrtSessionOptions* options, const char* key, const char* value) noexcept {
    options->entries[key] = value;
    return nullptr;
  }
  static Status HasSessionConfigEntry(const OrtSessionOptions* options, const char* key, int* out) noexcept {
    *out = options->entries.count(key) != 0;
    return nullptr;
  }

  static Status GetTensorMutableData(OrtValue* value, void** out) noexcept {
    *out = value->bytes.data();
    return nullptr;
  }
  static Status TensorAt(OrtValue* value, const std::int64_t*, std::size_t count, void** out) noexcept {
    if (count != 0 || !value->sizes.empty()) return CreateStatus(icnnrt::ort::kInvalidArgument, "not as many axes");
    return GetTensorMutableData(value, out);
  }
  static Status CreateTensorTypeAndShapeInfo(Info** out) noexcept { return made(*out = new Info, live.shapes); }
  static Status GetTensorTypeAndShape(const OrtValue* value, Info** out) noexcept {
    return made(*out = new Info{{}, value->sizes, {}}, live.shapes);
  }
  static void ReleaseTensorTypeAndShapeInfo(Info* info) { release(info, live.shapes); }
  static Status SetTensorElementType(Info* info, ONNXTensorElementDataType type) noexcept {
    info->type = type;
    return nullptr;
  }
  static Status GetTensorElementType(const Info* info, ONNXTensorElementDataType* out) noexcept {
    *out = info->type;
    return nullptr;
  }
  static Status SetDimensions(Info* info, const std::int64_t* sizes, std::size_t count) noexcept {
    info->sizes.assign(sizes, sizes + count);
    return nullptr;
  }
  static Status GetDimensionsCount(const Info* info, std::size_t* out) noexcept {
    *out = info->sizes.size();
    return nullptr;
  }
  static Status GetDimensions(const Info* info, std::int64_t* out, std::size_t count) noexcept {
    std::copy_n(info->sizes.begin(), std::min(count, info->sizes.size()), out);
    return nullptr;
  }
  static Status SetSymbolicDimensions(Info* info, const char** names, std::size_t count) noexcept {
    info->names.assign(names, names + count);
    return nullptr;
  }
  static Status GetSymbolicDimensions(const Info* info, const char** out, std::size_t count) noexcept {
    for (std::size_t i = 0; i < count; ++i) out[i] = i < info->names.size() ? info->names[i].c_str() : "";
    return nullptr;
  }

  static Status CreateCpuMemoryInfo(OrtAllocatorType, OrtMemType, OrtMemoryInfo** out) noexcept {
    return made(*out = new OrtMemoryInfo, live.memory_infos);
  }
  static void ReleaseMemoryInfo(OrtMemoryInfo* info) { release(info, live.memory_infos); }
  static Status KernelContext_GetAllocator(const OrtKernelContext* context, const OrtMemoryInfo*,
                                           OrtAllocator** out) noexcept {
    return made(*out = new OrtAllocator{context->scarce}, live.allocators);
  }
  static void ReleaseAllocator(OrtAllocator* allocator) { release(allocator, live.allocators); }
  static Status AllocatorAlloc(OrtAllocator* allocator, std::size_t bytes, void** out) noexcept {
    if (allocator->scarce) return CreateStatus(icnnrt::ort::kFail, "none left");
    return made(*out = std::malloc(bytes), live.allocations);
  }
  static Status AllocatorFree(OrtAllocator*, void* memory) noexcept {
    --live.allocations;
    std::free(memory);
    return nullptr;
  }

  static Status KernelInfoGetAttribute_int64(const OrtKernelInfo* info, const char* name, std::int64_t* out) noexcept {
    const auto found = info->attributes.find(name);
    if (found == info->attributes.end()) return CreateStatus(icnnrt::ort::kFail, "no such attribute");
    *out = found->second;
    return nullptr;
  }
  static Status KernelContext_GetInput(const OrtKernelContext* context, std::size_t i, const OrtValue** out) noexcept {
    *out = &context->inputs[i];
    return nullptr;
  }
  static Status KernelContext_GetOutput(OrtKernelContext* context, std::size_t i, const std::int64_t* sizes,
                                        std::size_t count, OrtValue** out) noexcept {
    OrtValue& value = context->outputs[i];
    value.sizes.assign(sizes, sizes + count);
    std::size_t bytes = context->item_sizes[i];
    for (std::int64_t size : value.sizes) bytes *= static_cast<std::size_t>(size);
    value.bytes.assign(context->counted_only ? 0 : bytes, 0xff);
    *out = &value;
    return nullptr;
  }
  static Status KernelContext_ParallelFor(const OrtKernelContext* context, void (*task)(void*, std::size_t),
                                          std::size_t total, std::size_t, void* data) noexcept {
    std::atomic<std::size_t> next{0};
    const auto work = [&] {
      for (std::size_t i = next++; i < total; i = next++) task(data, i);
    };
    std::vector<std::thread> others;
    for (unsigned t = 1; t < context->threads; ++t) others.emplace_back(work);
    work();
    for (std::thread& other : others) other.join();
    return nullptr;
  }

  static Status ShapeInferContext_GetInputTypeShape(const OrtShapeInferContext* context, std::size_t i,
                                                    Info** out) noexcept {
    *out = const_cast<Info*>(&context->inputs[i]);
    return nullptr;
  }
  // Takes a const context in the interface too.
  static Status ShapeInferContext_SetOutputTypeShape(const OrtShapeInferContext* context, std::size_t i,
                                                     const Info* info) noexcept {
    const_cast<OrtShapeInferContext*>(context)->outputs[i] = *info;
    return nullptr;
  }

  // The whole of it, as RegisterCustomOps takes it.
  static const OrtApiBase* base() {
    static const OrtApiBase made{
        [](std::uint32_t version) noexcept -> const OrtApi* {
          static const Table table;
          return version <= icnnrt::ort::kApiVersion ? reinterpret_cast<const OrtApi*>(table.slots) : nullptr;
        },
        []() noexcept { return "1.17.0"; }};
    return &made;
  }

 private:
  struct Table {
    void* slots[300] = {};

    Table() {
#define ICNNRT_FILL(slot, name, ...) \
  slots[slot] = reinterpret_cast<void*>(static_cast<std::add_pointer_t<__VA_ARGS__>>(&Runtime::name));
      ICNNRT_ORT_API(ICNNRT_FILL)
#undef ICNNRT_FILL
    }
  };

  template <typename T>
  static Status made(T*, std::atomic<long>& count) {
    ++count;
    return nullptr;
  }
  template <typename T>
  static void release(T* object, std::atomic<long>& count) {
    if (object) --count;
    delete object;
  }
};

}  // namespace icnnrt_tests
