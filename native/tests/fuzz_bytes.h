// What a fuzz target makes its numbers of.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

#include "cuts.h"

namespace icnnrt_tests {

// The input's bytes, and after them pseudo-random ones that the input decides.
class Bytes {
 public:
  Bytes(const std::uint8_t* data, std::size_t size) : data_(data), size_(size), rest_(size) {
    for (std::size_t i = 0; i < size; ++i) rest_ = Random(rest_.bits() ^ data[i]);
  }

  std::uint8_t byte() {
    if (next_ < size_) return data_[next_++];
    return static_cast<std::uint8_t>(rest_.bits());
  }
  std::size_t below(std::size_t bound) { return (byte() + std::size_t{256} * byte()) % bound; }
  template <typename T>
  T any_bits() {
    unsigned char bytes[sizeof(T)];
    for (unsigned char& one : bytes) one = byte();
    T value;
    std::memcpy(&value, bytes, sizeof value);
    return value;
  }
  // -8 to 8 in sixteenths: few values, so that equal ones are frequent
  double coarse() { return (static_cast<int>(byte()) - 128) / 16.0; }
  double fine() { return coarse() + coarse() / 256.0 + coarse() / 65536.0; }

 private:
  const std::uint8_t* data_;
  std::size_t size_;
  std::size_t next_ = 0;
  Random rest_;
};

// Where T, or the square of a number of T, ends: rounding is relative no longer.
template <typename T>
int exponent_near_nothing(Bytes& bytes) {
  using Limits = std::numeric_limits<T>;
  const int exponent = Limits::min_exponent - static_cast<int>(bytes.below(Limits::digits + 8));
  return bytes.below(2) ? exponent : exponent / 2;
}

// How the numbers of one array come about.
template <typename T>
struct Numbers {
  Bytes& bytes;
  std::size_t kind;
  int exponent;

  explicit Numbers(Bytes& source) : bytes(source), kind(source.below(6)), exponent(0) {
    // most often near 1, but anywhere that squares do not overflow, and now and then beyond
    const int range = bytes.below(4) != 0 ? 14 : bytes.below(4) != 0 ? 60 : 1100;
    exponent = static_cast<int>(bytes.below(static_cast<std::size_t>(2 * range + 1))) - range;
  }
  T next() {
    switch (kind) {
      case 0:
        return bytes.any_bits<T>();
      case 1:
        return static_cast<T>(std::ldexp(bytes.coarse(), exponent));
      case 2:
        return static_cast<T>(std::ldexp(1.0 + bytes.coarse() * 0x1p-30, exponent));  // nearly parallel
      case 3:
        return static_cast<T>(std::ldexp(bytes.fine(), exponent + static_cast<int>(bytes.below(40)) - 20));
      default:
        return static_cast<T>(std::ldexp(bytes.fine(), exponent));
    }
  }
};

}  // namespace icnnrt_tests
