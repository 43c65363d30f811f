// Shapes of the outputs, as far as those of the inputs tell.
#pragma once

#include <cstring>
#include <iterator>

#include "status.h"

namespace icnnrt::ort {

// One axis: a size, a name, or neither. A name lives as long as the inference.
struct Axis {
  std::int64_t size = -1;
  const char* name = "";

  bool known() const { return size >= 0 || *name; }
};

// Axes by letter, as in "Bkn".
struct Axes {
  Axis by_letter[128];

  Axis& of(char letter) { return by_letter[static_cast<unsigned char>(letter)]; }
  Axis operator[](char letter) const {
    if (letter >= '0' && letter <= '9') return {letter - '0', ""};
    return by_letter[static_cast<unsigned char>(letter)];
  }
};

// A leading axis '*' is that of the batch or 1, for a tensor that all samples share. 'B' is then the largest of all,
// and not known before all are.
inline void read_batch(const Axis& leading, bool& all_known, Axis& batch) {
  all_known = all_known && leading.known();
  const bool shared = leading.size == 1 && *batch.name;
  if ((leading.size > batch.size && !shared) || (leading.size < 0 && batch.size <= 1 && *leading.name)) batch = leading;
}

inline OrtStatus* read_axes(const Api& api, OrtShapeInferContext* context, std::size_t index, const char* letters,
                            Axes& axes, bool& batch_known, ONNXTensorElementDataType& type) {
  OrtTensorTypeAndShapeInfo* info = nullptr;  // the context's own
  ICNNRT_TRY(api.ShapeInferContext_GetInputTypeShape(context, index, &info));
  ICNNRT_TRY(api.GetTensorElementType(info, &type));
  std::size_t rank = 0;
  ICNNRT_TRY(api.GetDimensionsCount(info, &rank));
  // An unknown rank looks like none. A wrong one is told when the kernel runs, in a sentence that reaches the user;
  // what inference says does not.
  if (rank != std::strlen(letters)) {
    batch_known = false;
    return nullptr;
  }
  constexpr std::size_t kMost = 4;
  std::int64_t sizes[kMost] = {};
  const char* names[kMost] = {};
  ICNNRT_TRY(api.GetDimensions(info, sizes, rank));
  ICNNRT_TRY(api.GetSymbolicDimensions(info, names, rank));
  for (std::size_t i = 0; i < rank; ++i) {
    if (letters[i] == '*') {
      read_batch({sizes[i], names[i] ? names[i] : ""}, batch_known, axes.of('B'));
      continue;
    }
    Axis& axis = axes.of(letters[i]);
    if (axis.size < 0 && sizes[i] >= 0) axis = {sizes[i], ""};
    if (!axis.known() && names[i]) axis.name = names[i];
  }
  return nullptr;
}

inline OrtStatus* write_axes(const Api& api, OrtShapeInferContext* context, std::size_t index, const char* letters,
                             const Axes& axes, ONNXTensorElementDataType type) {
  constexpr std::size_t kMost = 4;
  std::int64_t sizes[kMost] = {};
  const char* names[kMost] = {};
  const std::size_t rank = std::strlen(letters);
  for (std::size_t i = 0; i < rank; ++i) {
    const Axis axis = axes[letters[i]];
    if (!axis.known()) return nullptr;  // an axis without a size or a name would be taken for one of size -1
    sizes[i] = axis.size;
    names[i] = axis.name;
  }
  OrtTensorTypeAndShapeInfo* info = nullptr;
  ICNNRT_TRY(api.CreateTensorTypeAndShapeInfo(&info));
  OrtStatus* status = api.SetTensorElementType(info, type);
  if (!status) status = api.SetDimensions(info, sizes, rank);
  if (!status) status = api.SetSymbolicDimensions(info, names, rank);
  if (!status) status = api.ShapeInferContext_SetOutputTypeShape(context, index, info);
  api.ReleaseTensorTypeAndShapeInfo(info);
  return status;
}

// Operators of one name share one inference in ONNX Runtime, whatever their types, so T is that of the first input: it
// may be another than Op's own.
template <typename Op>
OrtStatus* infer_shapes(const Api& api, OrtShapeInferContext* context) {
  Axes axes;
  bool batch_known = true;
  ONNXTensorElementDataType T{}, other{};
  for (std::size_t i = 0; i < std::size(Op::kInputShapes); ++i) {
    ICNNRT_TRY(read_axes(api, context, i, Op::kInputShapes[i], axes, batch_known, i ? other : T));
  }
  Op::infer_axes(axes, batch_known);
  for (std::size_t i = 0; i < std::size(Op::kOutputShapes); ++i) {
    const auto type = Op::kOutputsOfT[i] == 'T' ? T : Op::kOutputTypes[i];
    ICNNRT_TRY(write_axes(api, context, i, Op::kOutputShapes[i], axes, type));
  }
  return nullptr;
}

}  // namespace icnnrt::ort
