// Vectors of AVX-512 (F, BW, DQ, VL): the same functions as in vec_portable.h, which states their contracts.
// With -mavx512bf16 the bfloat16 store uses the conversion instruction.
// Included inside the anonymous namespace of one kernel file; include nothing here.

struct VecF {
  static constexpr int kLanes = 16;
  __m512 v;
};
struct VecD {
  static constexpr int kLanes = 8;
  __m512d v;
};

inline VecF set1(VecF, float x) { return {_mm512_set1_ps(x)}; }
inline VecF loadu(VecF, const float* p) { return {_mm512_loadu_ps(p)}; }
inline void storeu(float* p, VecF a) { _mm512_storeu_ps(p, a.v); }
inline VecF operator+(VecF a, VecF b) { return {_mm512_add_ps(a.v, b.v)}; }
inline VecF operator-(VecF a, VecF b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline VecF operator*(VecF a, VecF b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline VecF operator/(VecF a, VecF b) { return {_mm512_div_ps(a.v, b.v)}; }
inline VecF fma(VecF a, VecF b, VecF c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline VecF max(VecF a, VecF b) { return {_mm512_max_ps(a.v, b.v)}; }
inline VecF min(VecF a, VecF b) { return {_mm512_min_ps(a.v, b.v)}; }
inline VecF abs(VecF a) { return {_mm512_abs_ps(a.v)}; }
inline VecF copy_sign(VecF a, VecF sign) {
  const __m512 bit = _mm512_set1_ps(-0.0f);
  return {_mm512_or_ps(_mm512_andnot_ps(bit, a.v), _mm512_and_ps(bit, sign.v))};
}
inline VecF first_lanes(VecF a, VecF b, long n) {
  const __mmask16 keep = n <= 0 ? 0 : (n >= 16 ? 0xffff : (__mmask16)((1u << n) - 1));
  return {_mm512_mask_blend_ps(keep, b.v, a.v)};
}
inline double reduce_add(VecF a) {
  const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(a.v));
  const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(a.v, 1));
  return _mm512_reduce_add_pd(_mm512_add_pd(low, high));
}
inline float reduce_max(VecF a) { return _mm512_reduce_max_ps(a.v); }
inline VecF round_nearest(VecF a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline VecF pow2(VecF n) { return {_mm512_scalef_ps(_mm512_set1_ps(1.0f), n.v)}; }

inline VecD set1(VecD, double x) { return {_mm512_set1_pd(x)}; }
inline VecD loadu(VecD, const double* p) { return {_mm512_loadu_pd(p)}; }
inline void storeu(double* p, VecD a) { _mm512_storeu_pd(p, a.v); }
inline VecD operator+(VecD a, VecD b) { return {_mm512_add_pd(a.v, b.v)}; }
inline VecD operator-(VecD a, VecD b) { return {_mm512_sub_pd(a.v, b.v)}; }
inline VecD operator*(VecD a, VecD b) { return {_mm512_mul_pd(a.v, b.v)}; }
inline VecD operator/(VecD a, VecD b) { return {_mm512_div_pd(a.v, b.v)}; }
inline VecD fma(VecD a, VecD b, VecD c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
inline VecD max(VecD a, VecD b) { return {_mm512_max_pd(a.v, b.v)}; }
inline VecD min(VecD a, VecD b) { return {_mm512_min_pd(a.v, b.v)}; }
inline VecD abs(VecD a) { return {_mm512_abs_pd(a.v)}; }
inline VecD copy_sign(VecD a, VecD sign) {
  const __m512d bit = _mm512_set1_pd(-0.0);
  return {_mm512_or_pd(_mm512_andnot_pd(bit, a.v), _mm512_and_pd(bit, sign.v))};
}
inline VecD first_lanes(VecD a, VecD b, long n) {
  const __mmask8 keep = n <= 0 ? 0 : (n >= 8 ? 0xff : (__mmask8)((1u << n) - 1));
  return {_mm512_mask_blend_pd(keep, b.v, a.v)};
}
inline double reduce_add(VecD a) { return _mm512_reduce_add_pd(a.v); }
inline double reduce_max(VecD a) { return _mm512_reduce_max_pd(a.v); }
inline VecD round_nearest(VecD a) { return {_mm512_roundscale_pd(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline VecD pow2(VecD n) { return {_mm512_scalef_pd(_mm512_set1_pd(1.0), n.v)}; }
inline VecD zero_below(VecD a, VecD x, VecD limit) {
  return {_mm512_maskz_mov_pd(_mm512_cmp_pd_mask(x.v, limit.v, _CMP_NLT_UQ), a.v)};
}

inline VecF fma_exact(VecF a, VecF b, VecF c) { return fma(a, b, c); }
inline VecD fma_exact(VecD a, VecD b, VecD c) { return fma(a, b, c); }

inline void load2(const float* p, VecF& a, VecF& b) {
  a.v = _mm512_loadu_ps(p);
  b.v = _mm512_loadu_ps(p + 16);
}
inline void store2(float* p, VecF a, VecF b) {
  _mm512_storeu_ps(p, a.v);
  _mm512_storeu_ps(p + 16, b.v);
}
inline void load2(const double* p, VecD& a, VecD& b) {
  a.v = _mm512_loadu_pd(p);
  b.v = _mm512_loadu_pd(p + 8);
}
inline void store2(double* p, VecD a, VecD b) {
  _mm512_storeu_pd(p, a.v);
  _mm512_storeu_pd(p + 8, b.v);
}
// bfloat16: a takes the even elements, b the odd ones, so that each is one shift or mask away from float32.
inline void load2(const BFloat16* p, VecF& a, VecF& b) {
  const __m512i raw = _mm512_loadu_si512(p);
  a.v = _mm512_castsi512_ps(_mm512_slli_epi32(raw, 16));
  b.v = _mm512_castsi512_ps(_mm512_and_si512(raw, _mm512_set1_epi32(int(0xffff0000u))));
}
// Elements columns[0 .. 32) of x, in the order of load2. A lane gathers 4 bytes, elements c - 1 and c for a column c:
// with c and c + 1 it would reach beyond the row. Column 0 is not gathered.
inline void gather2(const BFloat16* x, const int64_t* columns, VecF& a, VecF& b) {
  const __m512i even = _mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 28, 24, 20, 16, 12, 8, 4, 0);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(2));
  __m512i ids[4];
  for (int k = 0; k < 4; ++k) ids[k] = _mm512_loadu_si512(columns + 8 * k);
  const __m512i first = _mm512_castps_si512(_mm512_set1_ps(to_float(*x))), high = _mm512_set1_epi32(int(0xffff0000u));
  const auto of = [&](__m512i which) {
    const __m512i low = _mm512_permutex2var_epi32(ids[0], which, ids[1]);
    const __m512i at =
        _mm512_inserti32x8(low, _mm512_castsi512_si256(_mm512_permutex2var_epi32(ids[2], which, ids[3])), 1);
    const void* before = reinterpret_cast<const char*>(x) - 2;
    const __m512i found = _mm512_mask_i32gather_epi32(first, _mm512_test_epi32_mask(at, at), at, before, 2);
    return VecF{_mm512_castsi512_ps(_mm512_and_si512(found, high))};
  };
  a = of(even), b = of(odd);
}
#ifdef __AVX512BF16__
inline void store2(BFloat16* p, VecF a, VecF b) {
  alignas(64) static const uint16_t kInterleave[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                       8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(b.v, a.v);  // the 16 even elements, then the 16 odd ones
  _mm512_storeu_si512(p, _mm512_permutexvar_epi16(_mm512_load_si512(kInterleave), halves));
}
#else
inline __m512i round_to_bf16_bits(__m512 x) {  // round to nearest even into the upper half of each lane
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  return _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
}
inline void store2(BFloat16* p, VecF a, VecF b) {
  const __m512i even = _mm512_srli_epi32(round_to_bf16_bits(a.v), 16);
  const __m512i odd = round_to_bf16_bits(b.v);
  _mm512_storeu_si512(p, _mm512_mask_blend_epi16(0xaaaaaaaau, even, odd));
}
#endif
inline void load2(const Half* p, VecF& a, VecF& b) {
  a.v = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  b.v = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 16)));
}
inline void store2(Half* p, VecF a, VecF b) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 16), _mm512_cvtps_ph(b.v, _MM_FROUND_TO_NEAREST_INT));
}

// 2^t in few instructions: scalef takes floor(t) itself, reduce gives t - floor(t) (and 0 for -inf).
#define CPO_HAVE_EXP2
inline VecF exp2_floor_fraction(VecF t) { return {_mm512_reduce_ps(t.v, 0x09)}; }
inline VecF scale_by_pow2_floor(VecF a, VecF t) { return {_mm512_scalef_ps(a.v, t.v)}; }
