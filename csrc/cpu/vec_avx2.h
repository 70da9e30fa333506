// Vectors of AVX2 + FMA + F16C: the same functions as in vec_portable.h, which states their contracts.
// Included inside the anonymous namespace of one kernel file; include nothing here.

struct VecF {
  static constexpr int kLanes = 8;
  __m256 v;
};
struct VecD {
  static constexpr int kLanes = 4;
  __m256d v;
};

inline VecF set1(VecF, float x) { return {_mm256_set1_ps(x)}; }
inline VecF loadu(VecF, const float* p) { return {_mm256_loadu_ps(p)}; }
inline void storeu(float* p, VecF a) { _mm256_storeu_ps(p, a.v); }
inline VecF operator+(VecF a, VecF b) { return {_mm256_add_ps(a.v, b.v)}; }
inline VecF operator-(VecF a, VecF b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline VecF operator*(VecF a, VecF b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline VecF operator/(VecF a, VecF b) { return {_mm256_div_ps(a.v, b.v)}; }
inline VecF fma(VecF a, VecF b, VecF c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline VecF max(VecF a, VecF b) { return {_mm256_max_ps(a.v, b.v)}; }
inline VecF min(VecF a, VecF b) { return {_mm256_min_ps(a.v, b.v)}; }
inline VecF abs(VecF a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
inline VecF copy_sign(VecF a, VecF sign) {
  const __m256 bit = _mm256_set1_ps(-0.0f);
  return {_mm256_or_ps(_mm256_andnot_ps(bit, a.v), _mm256_and_ps(bit, sign.v))};
}
inline VecF first_lanes(VecF a, VecF b, long n) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const int count = n < 0 ? 0 : (n > 8 ? 8 : int(n));
  const __m256i keep = _mm256_cmpgt_epi32(_mm256_set1_epi32(count), lane);
  return {_mm256_blendv_ps(b.v, a.v, _mm256_castsi256_ps(keep))};
}
inline double reduce_add(VecF a) {
  float lanes[8];
  _mm256_storeu_ps(lanes, a.v);
  double total = 0;
  for (float x : lanes) total += x;
  return total;
}
inline float reduce_max(VecF a) {
  float lanes[8];
  _mm256_storeu_ps(lanes, a.v);
  float m = lanes[0];
  for (float x : lanes) m = m > x ? m : x;
  return m;
}
inline VecF round_nearest(VecF a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline VecF pow2(VecF n) {
  const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(biased, 23))};
}
inline VecF zero_below(VecF a, VecF x, VecF limit) {
  return {_mm256_and_ps(a.v, _mm256_cmp_ps(x.v, limit.v, _CMP_NLT_UQ))};
}

inline VecD set1(VecD, double x) { return {_mm256_set1_pd(x)}; }
inline VecD loadu(VecD, const double* p) { return {_mm256_loadu_pd(p)}; }
inline void storeu(double* p, VecD a) { _mm256_storeu_pd(p, a.v); }
inline VecD operator+(VecD a, VecD b) { return {_mm256_add_pd(a.v, b.v)}; }
inline VecD operator-(VecD a, VecD b) { return {_mm256_sub_pd(a.v, b.v)}; }
inline VecD operator*(VecD a, VecD b) { return {_mm256_mul_pd(a.v, b.v)}; }
inline VecD operator/(VecD a, VecD b) { return {_mm256_div_pd(a.v, b.v)}; }
inline VecD fma(VecD a, VecD b, VecD c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }
inline VecD max(VecD a, VecD b) { return {_mm256_max_pd(a.v, b.v)}; }
inline VecD min(VecD a, VecD b) { return {_mm256_min_pd(a.v, b.v)}; }
inline VecD abs(VecD a) { return {_mm256_andnot_pd(_mm256_set1_pd(-0.0), a.v)}; }
inline VecD copy_sign(VecD a, VecD sign) {
  const __m256d bit = _mm256_set1_pd(-0.0);
  return {_mm256_or_pd(_mm256_andnot_pd(bit, a.v), _mm256_and_pd(bit, sign.v))};
}
inline VecD first_lanes(VecD a, VecD b, long n) {
  const __m256i lane = _mm256_setr_epi64x(0, 1, 2, 3);
  const __m256i keep = _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), lane);
  return {_mm256_blendv_pd(b.v, a.v, _mm256_castsi256_pd(keep))};
}
inline double reduce_add(VecD a) {
  double lanes[4];
  _mm256_storeu_pd(lanes, a.v);
  return (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
}
inline double reduce_max(VecD a) {
  double lanes[4];
  _mm256_storeu_pd(lanes, a.v);
  double m = lanes[0];
  for (double x : lanes) m = m > x ? m : x;
  return m;
}
inline VecD round_nearest(VecD a) { return {_mm256_round_pd(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline VecD pow2(VecD n) {  // adding 1.5 * 2^52 leaves the integer in the low bits
  const __m256d shifted = _mm256_add_pd(n.v, _mm256_set1_pd(6755399441055744.0 + 1023.0));
  return {_mm256_castsi256_pd(_mm256_slli_epi64(_mm256_castpd_si256(shifted), 52))};
}
inline VecD zero_below(VecD a, VecD x, VecD limit) {
  return {_mm256_and_pd(a.v, _mm256_cmp_pd(x.v, limit.v, _CMP_NLT_UQ))};
}

inline VecF fma_exact(VecF a, VecF b, VecF c) { return fma(a, b, c); }
inline VecD fma_exact(VecD a, VecD b, VecD c) { return fma(a, b, c); }

inline void load2(const float* p, VecF& a, VecF& b) {
  a.v = _mm256_loadu_ps(p);
  b.v = _mm256_loadu_ps(p + 8);
}
inline void store2(float* p, VecF a, VecF b) {
  _mm256_storeu_ps(p, a.v);
  _mm256_storeu_ps(p + 8, b.v);
}
inline void load2(const double* p, VecD& a, VecD& b) {
  a.v = _mm256_loadu_pd(p);
  b.v = _mm256_loadu_pd(p + 4);
}
inline void store2(double* p, VecD a, VecD b) {
  _mm256_storeu_pd(p, a.v);
  _mm256_storeu_pd(p + 4, b.v);
}
// bfloat16: a takes the even elements, b the odd ones, so that each is one shift or mask away from float32.
inline void load2(const BFloat16* p, VecF& a, VecF& b) {
  const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  a.v = _mm256_castsi256_ps(_mm256_slli_epi32(raw, 16));
  b.v = _mm256_castsi256_ps(_mm256_and_si256(raw, _mm256_set1_epi32(int(0xffff0000u))));
}
inline __m256i round_to_bf16_bits(__m256 x) {  // round to nearest even into the upper half of each lane
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  return _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
}
inline void store2(BFloat16* p, VecF a, VecF b) {
  const __m256i even = _mm256_srli_epi32(round_to_bf16_bits(a.v), 16);
  const __m256i odd = round_to_bf16_bits(b.v);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_blend_epi16(even, odd, 0xaa));
}
inline void load2(const Half* p, VecF& a, VecF& b) {
  a.v = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  b.v = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)));
}
inline void store2(Half* p, VecF a, VecF b) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(b.v, _MM_FROUND_TO_NEAREST_INT));
}
