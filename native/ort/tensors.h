// Inputs and outputs of one call of a kernel.
#pragma once

#include <cinttypes>
#include <cstdint>

#include "status.h"

namespace icnnrt::ort {

inline constexpr std::size_t kMaxRank = 8;  // more is never right, and is shown cut off

struct Shape {
  std::size_t rank = 0;
  std::int64_t size[kMaxRank] = {};

  std::size_t operator[](std::size_t axis) const { return static_cast<std::size_t>(size[axis]); }
};

// A shape as a message shows it: [2, 5, 10].
struct Text {
  char chars[200];

  explicit Text(const Shape& shape) {
    int at = std::snprintf(chars, sizeof chars, "[");
    for (std::size_t i = 0; i < shape.rank && i < kMaxRank; ++i) {
      at += std::snprintf(chars + at, sizeof chars - at, "%s%" PRId64, i ? ", " : "", shape.size[i]);
    }
    std::snprintf(chars + at, sizeof chars - at, shape.rank > kMaxRank ? ", ...]" : "]");
  }
};

template <typename T>
struct Input {
  const T* data = nullptr;
  Shape shape;
};

// The memory of what a call has read so far. Kernels write a sample's results while they still read the next one's
// inputs, so outputs need memory of their own. ONNX Runtime 1.18 has put one over an input, from the second call of a
// session on, by the pattern of memory that it keeps of the first.
class InputMemory {
 public:
  void add(const char* name, const void* data, std::size_t bytes) {
    if (!data || !bytes || count_ == kMost) return;
    ranges_[count_++] = {name, reinterpret_cast<std::uintptr_t>(data), bytes};
  }

  // The input that these bytes lie over, or null.
  const char* under(const void* data, std::size_t bytes) const {
    if (!data) return nullptr;
    const auto begin = reinterpret_cast<std::uintptr_t>(data);
    for (std::size_t i = 0; i < count_; ++i) {
      const Range& range = ranges_[i];
      if (begin < range.begin + range.bytes && range.begin < begin + bytes) return range.name;
    }
    return nullptr;
  }

 private:
  struct Range {
    const char* name;
    std::uintptr_t begin;
    std::size_t bytes;
  };
  static constexpr std::size_t kMost = 16;  // no operator has as many inputs
  Range ranges_[kMost];
  std::size_t count_ = 0;
};

// One call of a kernel of operator `op`.
struct Call {
  const Api& api;
  OrtKernelContext* context;
  const char* op;
  mutable InputMemory inputs = {};

  // The type needs no check: ONNX Runtime chose this kernel by it.
  template <typename T>
  OrtStatus* read(std::size_t index, const char* name, Input<T>& input) const {
    const OrtValue* value = nullptr;
    ICNNRT_TRY(api.KernelContext_GetInput(context, index, &value));
    if (!value) return error(api, kInvalidArgument, "ai.icnnrt::%s: %s: expected a tensor, but got none.", op, name);
    OrtTensorTypeAndShapeInfo* info = nullptr;
    ICNNRT_TRY(api.GetTensorTypeAndShape(value, &info));
    OrtStatus* status = api.GetDimensionsCount(info, &input.shape.rank);
    if (!status)
      status = api.GetDimensions(info, input.shape.size, input.shape.rank < kMaxRank ? input.shape.rank : kMaxRank);
    api.ReleaseTensorTypeAndShapeInfo(info);
    ICNNRT_TRY(status);
    void* data = nullptr;
    // Inputs are read only; that function has no form for constants in version 17.
    ICNNRT_TRY(api.GetTensorMutableData(const_cast<OrtValue*>(value), &data));
    input.data = static_cast<const T*>(data);
    std::size_t bytes = sizeof(T);
    for (std::size_t i = 0; i < input.shape.rank && i < kMaxRank; ++i) bytes *= input.shape[i];
    inputs.add(name, data, bytes);
    return nullptr;
  }

  // The one number of an input, which is copied. Of a tensor without axes it is had without asking for its shape, which
  // takes longer than all else here.
  template <typename T>
  OrtStatus* read_number(std::size_t index, const char* name, T& number) const {
    const OrtValue* value = nullptr;
    ICNNRT_TRY(api.KernelContext_GetInput(context, index, &value));
    const std::int64_t nowhere = 0;
    void* data = nullptr;
    if (OrtStatus* status = value ? api.TensorAt(const_cast<OrtValue*>(value), &nowhere, 0, &data) : nullptr; status) {
      api.ReleaseStatus(status);
    } else if (data) {
      number = *static_cast<const T*>(data);
      return nullptr;
    }
    Input<T> input;
    ICNNRT_TRY(read(index, name, input));
    std::int64_t count = 1;
    for (std::size_t i = 0; i < input.shape.rank && i < kMaxRank; ++i) count *= input.shape.size[i];
    if (count != 1) return wrong(name, "one number", input.shape, "it is the same for all samples");
    number = *input.data;
    return nullptr;
  }

  template <typename T, std::size_t Rank>
  OrtStatus* write(std::size_t index, const std::size_t (&shape)[Rank], T*& data) const {
    std::int64_t sizes[Rank];
    for (std::size_t i = 0; i < Rank; ++i) sizes[i] = static_cast<std::int64_t>(shape[i]);
    OrtValue* value = nullptr;
    ICNNRT_TRY(api.KernelContext_GetOutput(context, index, sizes, Rank, &value));
    void* raw = nullptr;
    ICNNRT_TRY(api.GetTensorMutableData(value, &raw));
    data = static_cast<T*>(raw);
    std::size_t bytes = sizeof(T);
    for (const std::size_t size : shape) bytes *= size;
    if (const char* name = inputs.under(raw, bytes)) {
      return error(api, kFail,
                   "ai.icnnrt::%s: output %zu: expected memory of its own, but onnxruntime put it over input %s; turn "
                   "its memory pattern off (enable_mem_pattern = False, DisableMemPattern), or use 1.19 or later.",
                   op, index, name);
    }
    return nullptr;
  }

  // `name` should be `expected`, in letters, but is not; `why` begins with what the letters stand for.
  OrtStatus* wrong(const char* name, const char* expected, const Shape& came, const char* remedy) const {
    return error(api, kInvalidArgument, "ai.icnnrt::%s: %s: expected %s, but got %s; %s.", op, name, expected,
                 Text(came).chars, remedy);
  }

  // Slopes G [B, k, n], which every other shape follows from.
  OrtStatus* check_slopes(const Shape& slopes) const {
    if (slopes.rank == 3 && slopes.size[1] >= 1 && slopes.size[2] >= 1) return nullptr;
    return wrong("slopes", "[B, k, n] with at least one cut (k >= 1) of at least one entry (n >= 1)", slopes,
                 "pass the slopes of all cuts of every sample");
  }

  // An input of shape [B, size]; `letters` says so.
  OrtStatus* check_rows(const char* name, const char* letters, const Shape& shape, const Shape& slopes,
                        std::size_t size) const {
    if (shape.rank == 2 && shape.size[0] == slopes.size[0] && shape[1] == size) return nullptr;
    char expected[320];
    std::snprintf(expected, sizeof expected, "%s = [%" PRId64 ", %zu] with slopes [B, k, n] = %s", letters,
                  slopes.size[0], size, Text(slopes).chars);
    return wrong(name, expected, shape, "pass one row for every sample of slopes");
  }
};

}  // namespace icnnrt::ort
