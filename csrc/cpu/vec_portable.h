// Vectors in plain C++: the fallback for every processor, and the definitions that the x86 headers do not override.
// The compiler turns the fixed-length loops into the instructions of the baseline (SSE2, NEON).
// Included inside the anonymous namespace of one kernel file; include nothing here.

struct VecF {
  static constexpr int kLanes = 8;
  float v[kLanes];
};
struct VecD {
  static constexpr int kLanes = 8;
  double v[kLanes];
};

#define CPO_LANES(V, expression)                                 \
  V r;                                                           \
  for (int i = 0; i < V::kLanes; ++i) { r.v[i] = (expression); } \
  return r

#define CPO_PORTABLE_VEC(V, S, BITS, SBITS, MAGIC, MANTISSA, BIAS)                          \
  inline V set1(V, S x) { CPO_LANES(V, x); }                                                \
  inline V loadu(V, const S* p) { CPO_LANES(V, p[i]); }                                     \
  inline void storeu(S* p, V a) {                                                           \
    for (int i = 0; i < V::kLanes; ++i) p[i] = a.v[i];                                      \
  }                                                                                         \
  inline V operator+(V a, V b) { CPO_LANES(V, a.v[i] + b.v[i]); }                           \
  inline V operator-(V a, V b) { CPO_LANES(V, a.v[i] - b.v[i]); }                           \
  inline V operator*(V a, V b) { CPO_LANES(V, a.v[i] * b.v[i]); }                           \
  inline V operator/(V a, V b) { CPO_LANES(V, a.v[i] / b.v[i]); }                           \
  inline V fma(V a, V b, V c) { CPO_LANES(V, a.v[i] * b.v[i] + c.v[i]); }                   \
  /* A NaN in b stays: the same rule as maxps and minps. */                                 \
  inline V max(V a, V b) { CPO_LANES(V, a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }               \
  inline V min(V a, V b) { CPO_LANES(V, a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }               \
  inline V abs(V a) { CPO_LANES(V, __builtin_fabs(a.v[i])); }                               \
  inline V copy_sign(V a, V sign) { CPO_LANES(V, __builtin_copysign(a.v[i], sign.v[i])); }  \
  /* Lanes below n of a, the rest of b. */                                                  \
  inline V first_lanes(V a, V b, long n) { CPO_LANES(V, i < n ? a.v[i] : b.v[i]); }         \
  inline double reduce_add(V a) {                                                           \
    double total = 0;                                                                       \
    for (int i = 0; i < V::kLanes; ++i) total += a.v[i];                                    \
    return total;                                                                           \
  }                                                                                         \
  inline S reduce_max(V a) {                                                                \
    S m = a.v[0];                                                                           \
    for (int i = 1; i < V::kLanes; ++i) m = m > a.v[i] ? m : a.v[i];                        \
    return m;                                                                               \
  }                                                                                         \
  /* Nearest integer for |a| < 2^22 (2^51): adding 1.5 * 2^23 (2^52) drops the fraction. */ \
  inline V round_nearest(V a) { CPO_LANES(V, (a.v[i] + MAGIC) - MAGIC); }                   \
  /* 2^n for an integer n between the smallest and the largest normal exponent. */          \
  inline V pow2(V n) {                                                                      \
    V r;                                                                                    \
    for (int i = 0; i < V::kLanes; ++i) {                                                   \
      const S shifted = n.v[i] + (MAGIC + BIAS);                                            \
      BITS bits;                                                                            \
      __builtin_memcpy(&bits, &shifted, sizeof(bits));                                      \
      bits <<= MANTISSA;                                                                    \
      __builtin_memcpy(&r.v[i], &bits, sizeof(bits));                                       \
    }                                                                                       \
    return r;                                                                               \
  }                                                                                         \
  /* a where x >= limit or x is NaN, else 0. */                                             \
  inline V zero_below(V a, V x, V limit) { CPO_LANES(V, x.v[i] < limit.v[i] ? S(0) : a.v[i]); }

CPO_PORTABLE_VEC(VecF, float, uint32_t, int32_t, 12582912.0f, 23, 127.0f)
CPO_PORTABLE_VEC(VecD, double, uint64_t, int64_t, 6755399441055744.0, 52, 1023.0)
#undef CPO_PORTABLE_VEC

// a * b + c with one rounding: c cancels most of the product.
inline VecF fma_exact(VecF a, VecF b, VecF c) {
#ifdef __FP_FAST_FMAF
  CPO_LANES(VecF, __builtin_fmaf(a.v[i], b.v[i], c.v[i]));
#else
  CPO_LANES(VecF, float(double(a.v[i]) * b.v[i] + c.v[i]));
#endif
}
inline VecD fma_exact(VecD a, VecD b, VecD c) { return fma(a, b, c); }
#undef CPO_LANES

// load2/store2 move 2 * kLanes elements between memory and two vectors. How elements are distributed over the two
// vectors depends on the type. It is the same for load and store, and no kernel depends on it.
inline void load2(const float* p, VecF& a, VecF& b) {
  a = loadu(VecF{}, p);
  b = loadu(VecF{}, p + VecF::kLanes);
}
inline void store2(float* p, VecF a, VecF b) {
  storeu(p, a);
  storeu(p + VecF::kLanes, b);
}
inline void load2(const double* p, VecD& a, VecD& b) {
  a = loadu(VecD{}, p);
  b = loadu(VecD{}, p + VecD::kLanes);
}
inline void store2(double* p, VecD a, VecD b) {
  storeu(p, a);
  storeu(p + VecD::kLanes, b);
}
template <typename T>
inline void load2(const T* p, VecF& a, VecF& b) {
  for (int i = 0; i < VecF::kLanes; ++i) {
    a.v[i] = to_float(p[i]);
    b.v[i] = to_float(p[VecF::kLanes + i]);
  }
}
template <typename T>
inline void store2(T* p, VecF a, VecF b) {
  for (int i = 0; i < VecF::kLanes; ++i) {
    from_float(p[i], a.v[i]);
    from_float(p[VecF::kLanes + i], b.v[i]);
  }
}
