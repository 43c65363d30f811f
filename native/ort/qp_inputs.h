// The inputs of the operators on quadratic programs: their shapes, and one sample of each.
#pragma once

#include "batch.h"

namespace icnnrt::ort {

// Sizes of a call. Every input has a leading axis of B, or of 1 where all samples share it.
struct QpShapes {
  std::size_t n = 0, m = 0, q = 0;
  std::size_t B = 0;
  std::size_t batches_seen = 0;
};

// One input, its axes after the first named by letters: "nn", "mn", "m" and so on; "r" is n + m + q + n.
struct QpInput {
  const char* name;
  const char* axes;
  bool may_be_absent = false;  // as [1, 0]
};

template <typename T>
struct QpData {
  const T* data = nullptr;
  std::size_t stride = 0;  // from sample to sample: 0 where they share it

  const T* of(std::size_t sample) const { return data ? data + sample * stride : nullptr; }
};

inline std::size_t size_of(char letter, const QpShapes& shapes) {
  switch (letter) {
    case 'n':
      return shapes.n;
    case 'm':
      return shapes.m;
    case 'q':
      return shapes.q;
    default:
      return 2 * shapes.n + shapes.m + shapes.q;
  }
}

// n, m and q from Q, G and A.
inline OrtStatus* read_sizes(const Call& call, const Shape& Q, const Shape& G, const Shape& A, QpShapes& shapes) {
  if (Q.rank != 3 || Q.size[1] != Q.size[2] || Q.size[1] < 1)
    return call.wrong("Q", "square matrices [B, n, n] or [1, n, n] with n >= 1", Q, "pass the quadratic terms of z");
  shapes.n = Q[1];
  const auto check = [&](const char* name, const char* letters, const Shape& shape) -> OrtStatus* {
    if (shape.rank == 3 && shape[2] == shapes.n) return nullptr;
    char expected[160];
    std::snprintf(expected, sizeof expected, "%s with n = %zu as Q has", letters, shapes.n);
    return call.wrong(name, expected, shape, "pass a column for every variable, and no rows where there are none");
  };
  ICNNRT_TRY(check("G", "[B, m, n] or [1, m, n]", G));
  ICNNRT_TRY(check("A", "[B, q, n] or [1, q, n]", A));
  shapes.m = G[1];
  shapes.q = A[1];
  return nullptr;
}

// Every leading axis but 1 is the batch's.
inline OrtStatus* read_batch(const Call& call, const QpInput& input, const Shape& shape, QpShapes& shapes) {
  const std::size_t leading = shape.rank ? shape[0] : 1;
  if (leading == 1 && shape.rank) {
    if (!shapes.batches_seen) shapes.B = 1;
    return nullptr;
  }
  if (!shapes.batches_seen && shape.rank) {
    shapes.B = leading;
    shapes.batches_seen = 1;
    return nullptr;
  }
  if (shape.rank && leading == shapes.B) return nullptr;
  char expected[120];
  std::snprintf(expected, sizeof expected, "a leading axis of B = %zu as other inputs have, or of 1", shapes.B);
  return call.wrong(input.name, expected, shape, "pass one entry for every sample, or one that all share");
}

// Checks the axes of one input; the batch is known.
template <typename T>
OrtStatus* check_input(const Call& call, const QpInput& input, const Input<T>& given, const QpShapes& shapes,
                       QpData<T>& data) {
  const std::size_t rank = 1 + std::strlen(input.axes);
  const Shape& shape = given.shape;
  if (input.may_be_absent && shape.rank == 2 && shape[1] == 0) return nullptr;
  bool right = shape.rank == rank;
  std::size_t stride = 1;
  for (std::size_t i = 1; i < rank && right; ++i) {
    right = shape[i] == size_of(input.axes[i - 1], shapes);
    stride *= shape[i];
  }
  if (!right) {
    char expected[240];
    int at = std::snprintf(expected, sizeof expected, "[B");
    for (const char* axis = input.axes; *axis; ++axis)
      at += *axis == 'r' ? std::snprintf(expected + at, sizeof expected - at, ", n + m + q + n")
                         : std::snprintf(expected + at, sizeof expected - at, ", %c", *axis);
    at += std::snprintf(expected + at, sizeof expected - at, "]");
    if (input.may_be_absent) at += std::snprintf(expected + at, sizeof expected - at, " or [1, 0]");
    std::snprintf(expected + at, sizeof expected - at, " with n = %zu, m = %zu, q = %zu as Q, G and A have", shapes.n,
                  shapes.m, shapes.q);
    return call.wrong(input.name, expected, shape,
                      input.may_be_absent ? "leave it out by passing no columns, or pass one entry for each of them"
                                          : "pass one entry for each of them");
  }
  data.data = given.data;
  data.stride = shape.size[0] == 1 ? 0 : stride;
  return nullptr;
}

// Multiply-adds of one factorisation and the products around it.
inline double cost_of(const QpSizes& sizes) {
  const double n = static_cast<double>(sizes.n), m = static_cast<double>(sizes.m), q = static_cast<double>(sizes.q);
  return n * n * (m + q) / 2 + n * n * n / 6 + 10 * n * (n + m + q) + 40 * (n + m) + 2000;
}

}  // namespace icnnrt::ort
