// e^x for a vector of doubles.
#pragma once

#include "lanes.h"

namespace icnnrt {
namespace ICNNRT_INSTRUCTION_SET {

// Beyond these arguments e^x is taken at the bound, so that neither it nor its reciprocal overflows or is subnormal.
inline constexpr double kExponentBound = 708.0;

// e^x within 1 ulp for |x| <= 708; e^±708 beyond; NaN for NaN.
//
// x = m ln 2 + r with integer m and |r| <= ln 2 / 2 (and a rounding more), e^x = 2^m e^r,
// e^r = 1 + r + r² q(r) with q of degree 9. 1 + r + r² q(r) is the minimax polynomial for the relative error, found by
// Remez' algorithm in 50 digits; with the coefficients rounded to double it is off by at most 2^-56, an eighth of half
// an ulp. The rest is rounding: ln 2 is split so that m times its high part is exact, which leaves r off by 2^-54
// relative to 1, and r + r² q is at most 0.42, so that its rounding weighs less than half of the last sum's.
ICNNRT_INLINE Vec exp(Vec x) {
  constexpr double kLog2E = 0x1.71547652b82fep+0;
  constexpr double kLn2High = 0x1.62e42fee00000p-1;  // 32 bits: its product with m is exact
  constexpr double kLn2Low = 0x1.a39ef35793c76p-33;
  constexpr double kRounder = 0x1.8p+52;  // adding it leaves the nearest integer in the low bits

  x = clip(x, -kExponentBound, kExponentBound);
  const Vec shifted = x * kLog2E + kRounder;
  const Vec m = shifted - kRounder;
  const Vec high = x - m * kLn2High;
  const Vec r = high - m * kLn2Low;
  const Vec r_low = (high - r) - m * kLn2Low;

  const Vec r2 = r * r, r4 = r2 * r2;
  const Vec q01 = r * 0x1.5555555555558p-3 + 0x1.0000000000009p-1;
  const Vec q23 = r * 0x1.111111110f808p-7 + 0x1.55555555503f4p-5;
  const Vec q45 = r * 0x1.a01a01b009b94p-13 + 0x1.6c16c185fded5p-10;
  const Vec q67 = r * 0x1.71ddf6badec7dp-19 + 0x1.a01993bebde07p-16;
  const Vec q89 = r * 0x1.af631dc77317bp-26 + 0x1.28b40639f7187p-22;
  const Vec q = (q89 * r4 + (q67 * r2 + q45)) * r4 + (q23 * r2 + q01);
  const Vec e_r = ((r2 * q + r_low) + r) + 1.0;

  BitsVec exponent, bits;
  __builtin_memcpy(&exponent, &shifted, sizeof shifted);
  __builtin_memcpy(&bits, &e_r, sizeof e_r);
  bits += exponent << 52;  // only the low bits of `shifted`, m, stay
  Vec result;
  __builtin_memcpy(&result, &bits, sizeof bits);
  return x == x ? result : x;  // the bits of a NaN are not to be counted with
}

}  // namespace ICNNRT_INSTRUCTION_SET
}  // namespace icnnrt
