// The library loaded, registered and run by the runtime of runtime.h.
#pragma once

#include <dlfcn.h>
#include <doctest/doctest.h>

#include <string>
#include <vector>

#include "call.h"
#include "runtime.h"

namespace icnnrt_tests {

// The library from its loading to its unloading.
struct Library {
  void* handle = dlopen(ICNNRT_TESTS_LIBRARY, RTLD_NOW | RTLD_LOCAL);
  OrtSessionOptions options;

  Library() {
    REQUIRE(handle);
    REQUIRE(add_to(options) == nullptr);
  }
  ~Library() {
    dlclose(handle);
    CHECK(live.none());
  }

  OrtStatus* add_to(OrtSessionOptions& to) const { return add_to(handle, to); }
  static OrtStatus* add_to(void* handle, OrtSessionOptions& to) {
    using Register = OrtStatus* (*)(OrtSessionOptions*, const OrtApiBase*);
    return reinterpret_cast<Register>(dlsym(handle, "RegisterCustomOps"))(&to, Runtime::base());
  }

  template <typename T>
  const icnnrt::ort::CustomOp* find(const std::string& name) const {
    const auto type = sizeof(T) == sizeof(float) ? icnnrt::ort::kFloat : icnnrt::ort::kDouble;
    for (const icnnrt::ort::CustomOp* op : options.domains.at(0)->operators)
      if (op->GetName(as_given(op)) == name && op->GetInputType(as_given(op), 0) == type) return op;
    return nullptr;
  }

  static const OrtCustomOp* as_given(const icnnrt::ort::CustomOp* op) {
    return reinterpret_cast<const OrtCustomOp*>(op);
  }
};

// One node; what went wrong is empty if nothing did.
struct Node {
  const icnnrt::ort::CustomOp* op;
  void* kernel = nullptr;
  std::string refused;

  Node(const icnnrt::ort::CustomOp* made_by, const OrtKernelInfo& info) : op(made_by) {
    refused = told(op->CreateKernelV2(Library::as_given(op), nullptr, &info, &kernel));
  }
  Node(const Node&) = delete;
  Node& operator=(const Node&) = delete;
  ~Node() {
    if (refused.empty()) op->KernelDestroy(kernel);
  }

  std::string run(OrtKernelContext& context) const {
    context.outputs.assign(op->GetOutputTypeCount(Library::as_given(op)), {});
    context.item_sizes.clear();
    for (std::size_t i = 0; i < context.outputs.size(); ++i)
      context.item_sizes.push_back(op->GetOutputType(Library::as_given(op), i) == icnnrt::ort::kDouble ? 8 : 4);
    return told(op->KernelComputeV2(kernel, &context));
  }

  static std::string told(OrtStatus* status) {
    const std::string message = status ? status->message : "";
    Runtime::ReleaseStatus(status);
    return message;
  }
};

inline const OrtKernelInfo kUsual{{{"steps", kSteps}}};

template <typename T>
OrtValue tensor(std::vector<std::int64_t> sizes, const std::vector<T>& values) {
  OrtValue made{std::move(sizes), std::vector<unsigned char>(values.size() * sizeof(T))};
  if (!values.empty()) std::memcpy(made.bytes.data(), values.data(), made.bytes.size());
  return made;
}

template <typename T>
OrtValue zeros(std::vector<std::int64_t> sizes) {
  std::size_t count = 1;
  for (std::int64_t size : sizes) count *= static_cast<std::size_t>(size);
  return tensor(std::move(sizes), std::vector<T>(count));
}

template <typename T>
std::vector<T> sample_of(const OrtValue& value, std::size_t sample, std::size_t count) {
  std::vector<T> values(count);
  std::memcpy(values.data(), value.bytes.data() + sample * count * sizeof(T), count * sizeof(T));
  return values;
}

}  // namespace icnnrt_tests
