// The emulator's convert.cuh: the same roundings, in integers; the special functions by libm, which is more exact.
#pragma once

inline float f16_value(unsigned short bits) {
  const unsigned sign = (bits & 0x8000u) << 16, rest = bits & 0x7fffu;
  if (rest >= 0x7c00) return __uint_as_float(sign | 0x7f800000 | rest << 13);
  return __uint_as_float(sign | rest << 13) * 0x1p112f;  // exact, subnormals too
}
inline unsigned short f16_bits(float x) {
  const unsigned bits = __float_as_uint(x), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) return 0x7fff;                                       // NaN
  if (rest >= 0x477ff000) return sign | 0x7c00;                               // 65520 and up
  if (rest < 0x38800000) return sign | unsigned(rintf(fabsf(x) * 0x1p24f));   // subnormal
  return sign | (rest - (112u << 23) + 0xfff + (rest >> 13 & 1)) >> 13;
}
inline unsigned short bf16_bits(float x) {
  const unsigned bits = __float_as_uint(x);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline unsigned f16_pair(float low, float high) { return f16_bits(low) | unsigned(f16_bits(high)) << 16; }
inline unsigned bf16_pair(float low, float high) { return bf16_bits(low) | unsigned(bf16_bits(high)) << 16; }

inline unsigned f16_product(unsigned a, unsigned b) {
  return f16_pair(f16_value(a) * f16_value(b), f16_value(a >> 16) * f16_value(b >> 16));
}
inline unsigned bf16_product(unsigned a, unsigned b) {
  const auto value = [](unsigned high) { return __uint_as_float(high & 0xffff0000u); };
  return bf16_pair(value(a << 16) * value(b << 16), value(a) * value(b));
}

inline float e4m3_value(unsigned char bits) {
  const int exponent = bits >> 3 & 15, fraction = bits & 7;
  const float sign = bits & 0x80 ? -1.f : 1.f;
  if ((bits & 0x7f) == 0x7f) return NAN;
  return sign * (exponent ? ldexpf(8 + fraction, exponent - 10) : ldexpf(fraction, -9));
}
inline unsigned char e4m3_bits(float x) {
  const unsigned char sign = std::signbit(x) ? 0x80 : 0;
  if (std::isnan(x)) return 0x7f;
  const float size = fabsf(x);
  if (size >= 448.f) return sign | 0x7e;
  int exponent;
  frexpf(size, &exponent);
  exponent = max(exponent, -5);                                     // the last binade of normal numbers: 2^-6
  const int steps = int(rintf(ldexpf(size, 4 - exponent)));         // of 2^(exponent - 4), ties to even
  return sign | (steps < 8 ? steps : ((exponent + 6) << 3) + steps - 8);  // a carry moves on to the next binade
}
inline unsigned short e4m3_pair(float low, float high) { return e4m3_bits(low) | e4m3_bits(high) << 8; }
inline unsigned f16_pair_of_e4m3(unsigned short pair) {
  return f16_pair(e4m3_value(pair & 0xff), e4m3_value(pair >> 8));
}

inline float flush_subnormal(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0.f, x) : x; }
inline float fast_exp2(float x) { return flush_subnormal(exp2f(x)); }
inline float fast_log2(float x) { return log2f(flush_subnormal(x)); }
inline float fast_reciprocal(float x) { return flush_subnormal(1.f / flush_subnormal(x)); }
