// float32 <-> bfloat16 and float16 for single elements, rounding to nearest even. Included inside a namespace.

inline float float_of_bits(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t bits_of_float(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits;
}

inline float to_float(BFloat16 x) { return float_of_bits(uint32_t(x.bits) << 16); }

inline void from_float(BFloat16& to, float x) {
  const uint32_t bits = bits_of_float(x);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  to.bits = nan ? uint16_t((bits >> 16) | 0x40u) : uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline float to_float(Half x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = uint32_t(x.bits & 0x7fffu) << 13;
  // Exponents move by 112 through a product by 2^112, which is exact for subnormals too; 31 becomes 255 apart.
  const float value = float_of_bits(magnitude) * 5.192296858534828e33f;
  const uint32_t bits = magnitude >= 0x0f800000u ? (magnitude | 0x7f800000u) : bits_of_float(value);
  return float_of_bits(sign | bits);
}

inline void from_float(Half& to, float x) {
  const uint32_t bits = bits_of_float(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;  // NaN
  } else if (magnitude >= 0x477ff000u) {
    half = 0x7c00u;  // 65520 and more round to infinity
  } else if (magnitude < 0x38800000u) {
    // Below 2^-14: adding 0.5 leaves the value in units of 2^-24 in the low bits, rounded by the addition.
    half = bits_of_float(float_of_bits(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  to.bits = uint16_t(sign | half);
}
