// The row kernels of token_logps, written once over the vectors of vec_*.h. Each token_logps_<isa>.cpp includes one
// vec header and this file inside an anonymous namespace, so that no code built with one processor's flags can be
// picked by the linker for another.

// ---- numbers of the two accumulation types -------------------------------------------------------------------------

template <typename T>
struct AccOf {
  using Vec = VecF;
  using Scalar = float;
};
template <>
struct AccOf<double> {
  using Vec = VecD;
  using Scalar = double;
};

constexpr long kBlock = 4096;  // elements between two updates of the maximum: 8 kB of bfloat16 stay in L1
constexpr float kInfinity = __builtin_inff();

// 2^t = 2^floor(t) * 2^f, f in [0, 1): minimax polynomial of degree 5 with p(0) = 1, relative error 8.3e-8
// (1.6e-7 after rounding).
inline VecF exp2_polynomial(VecF f) {
  VecF p = set1(f, 1.867130070e-03f);
  p = fma(p, f, set1(f, 9.017030322e-03f));
  p = fma(p, f, set1(f, 5.579991310e-02f));
  p = fma(p, f, set1(f, 2.401644502e-01f));
  p = fma(p, f, set1(f, 6.931513118e-01f));
  return fma(p, f, set1(f, 1.0f));
}

// E^t for float32: 2^t. Results below 2^-126 may be flushed to 0; -inf gives 0, NaN gives NaN.
inline VecF exp_unit(VecF t) {
#ifdef CPO_HAVE_EXP2
  return scale_by_pow2_floor(exp2_polynomial(exp2_floor_fraction(t)), t);
#else
  const VecF low = set1(t, -126.0f);
  const VecF x = max(low, min(set1(t, 127.0f), t));
  const VecF n = round_nearest(x - set1(t, 0.5f));
  return zero_below(exp2_polynomial(x - n) * pow2(n), t, low);
#endif
}

// (e^r - 1) for |r| <= log(2) / 2, Taylor to r^13: error 1e-17.
inline VecD expm1_polynomial(VecD r) {
  VecD p = set1(r, 1.0 / 6227020800.0);
  p = fma(p, r, set1(r, 1.0 / 479001600.0));
  p = fma(p, r, set1(r, 1.0 / 39916800.0));
  p = fma(p, r, set1(r, 1.0 / 3628800.0));
  p = fma(p, r, set1(r, 1.0 / 362880.0));
  p = fma(p, r, set1(r, 1.0 / 40320.0));
  p = fma(p, r, set1(r, 1.0 / 5040.0));
  p = fma(p, r, set1(r, 1.0 / 720.0));
  p = fma(p, r, set1(r, 1.0 / 120.0));
  p = fma(p, r, set1(r, 1.0 / 24.0));
  p = fma(p, r, set1(r, 1.0 / 6.0));
  p = fma(p, r, set1(r, 0.5));
  p = fma(p, r, set1(r, 1.0));
  return p * r;
}
// The same for float32, to r^7: error 3e-9 relative.
inline VecF expm1_polynomial(VecF r) {
  VecF p = set1(r, 1.0f / 5040.0f);
  p = fma(p, r, set1(r, 1.0f / 720.0f));
  p = fma(p, r, set1(r, 1.0f / 120.0f));
  p = fma(p, r, set1(r, 1.0f / 24.0f));
  p = fma(p, r, set1(r, 1.0f / 6.0f));
  p = fma(p, r, set1(r, 0.5f));
  p = fma(p, r, set1(r, 1.0f));
  return p * r;
}

// x - n log(2), with log(2) in two parts; the first has enough trailing zeros to make its product with n exact.
inline VecF minus_n_log2(VecF x, VecF n) { return fma(n, set1(x, 2.12194440e-4f), fma(n, set1(x, -0.693359375f), x)); }
inline VecD minus_n_log2(VecD x, VecD n) {
  return fma(n, set1(x, -1.90821492927058770002e-10), fma(n, set1(x, -6.93147180369123816490e-01), x));
}

// E^t for float64: e^t.
inline VecD exp_unit(VecD t) {
  const VecD low = set1(t, -708.0);
  const VecD x = max(low, min(set1(t, 708.0), t));
  const VecD n = round_nearest(x * set1(t, 1.44269504088896340736));
  const VecD scale = pow2(n);
  return zero_below(fma(scale, expm1_polynomial(minus_n_log2(x, n)), scale), t, low);
}

// tanh(u) = -m / (2 + m) and 1 - tanh^2(u) = 4 (1 + m) / (2 + m)^2 with m = e^(-2|u|) - 1: no cancellation.
template <typename V>
inline void tanh_and_slope(V u, V& y, V& slope) {
  using S = decltype(reduce_max(u));
  const V x = max(set1(u, S(-80)), abs(u) * set1(u, S(-2)));
  const V n = round_nearest(x * set1(u, S(1.44269504088896340736)));
  const V scale = pow2(n);
  const V one = set1(u, S(1)), two = set1(u, S(2));
  const V exp_x = scale * (one + expm1_polynomial(minus_n_log2(x, n)));
  const V m = fma(scale, expm1_polynomial(minus_n_log2(x, n)), scale - one);
  const V inverse = one / (two + m);
  y = copy_sign(m * inverse, u);
  slope = set1(u, S(4)) * exp_x * inverse * inverse;
}

template <bool kSoftcap, typename V, typename S>
inline V to_y(V x, S inner, S offset) {
  if (!kSoftcap) return x;
  V y, slope;
  tanh_and_slope(fma(x, set1(x, inner), set1(x, offset)), y, slope);
  return y;
}

// ---- scalars of the 16-bit types, for the last elements of a row
// ------------------------------------------------------

inline float to_acc(float x) { return x; }
inline double to_acc(double x) { return x; }
inline float to_acc(BFloat16 x) { return to_float(x); }
inline float to_acc(Half x) { return to_float(x); }
inline void from_acc(float& to, float x) { to = x; }
inline void from_acc(double& to, double x) { to = x; }
inline void from_acc(BFloat16& to, float x) { from_float(to, x); }
inline void from_acc(Half& to, float x) { from_float(to, x); }

// ---- scan
// ------------------------------------------------------------------------------------------------------------

// Largest y of x[0..n). kTail: n < 4 * kLanes elements in natural order (T is the accumulation type).
template <typename T, bool kSoftcap, bool kTail>
inline double block_max(const T* x, long n, typename AccOf<T>::Scalar inner, typename AccOf<T>::Scalar offset) {
  using V = typename AccOf<T>::Vec;
  constexpr long W = V::kLanes;
  const V lowest = set1(V{}, -kInfinity);
  V m0 = lowest, m1 = lowest, m2 = lowest, m3 = lowest;
  for (long i = 0; i < n; i += 4 * W) {
    V a, b, c, d;
    load2(x + i, a, b);
    load2(x + i + 2 * W, c, d);
    if (kTail) {
      a = first_lanes(a, lowest, n);
      b = first_lanes(b, lowest, n - W);
      c = first_lanes(c, lowest, n - 2 * W);
      d = first_lanes(d, lowest, n - 3 * W);
    }
    m0 = max(m0, a);
    m1 = max(m1, b);
    m2 = max(m2, c);
    m3 = max(m3, d);
  }
  const V m = max(max(m0, m1), max(m2, m3));
  // tanh is monotone, so the largest logit has the largest y.
  return reduce_max(to_y<kSoftcap>(set1(V{}, reduce_max(m)), inner, offset));
}

template <typename V>
struct Sums {
  V e, te, ee, y;
};

template <bool kExtras, bool kSoftcap, bool kTail, typename V, typename S>
inline void accumulate(Sums<V>& sums, V x, S inner, S offset, V c, V minus_shift, long n) {
  V y = to_y<kSoftcap>(x, inner, offset);
  V t = fma_exact(y, c, minus_shift);
  if (kTail) t = first_lanes(t, set1(t, S(-kInfinity)), n);
  const V e = exp_unit(t);
  sums.e = sums.e + e;
  if (kExtras) {
    if (kTail) y = first_lanes(y, set1(y, S(0)), n);
    sums.te = fma(max(set1(t, S(-1000)), t), e, sums.te);  // 0 * -inf stays 0
    sums.ee = fma(e, e, sums.ee);
    sums.y = sums.y + y;
  }
}

template <typename T, bool kExtras, bool kSoftcap, bool kTail>
inline void block_sums(const T* x, long n, const RowMap& map, Partial& total) {
  using V = typename AccOf<T>::Vec;
  using S = typename AccOf<T>::Scalar;
  constexpr long W = V::kLanes;
  const S inner = S(map.inner), offset = S(map.offset);
  const V zero = set1(V{}, S(0)), cs = set1(V{}, S(map.c)), minus_shift = set1(V{}, S(-total.shift));
  Sums<V> s0{zero, zero, zero, zero}, s1 = s0, s2 = s0, s3 = s0;
  for (long i = 0; i < n; i += 4 * W) {
    V a, b, d, e;
    load2(x + i, a, b);
    load2(x + i + 2 * W, d, e);
    if (!kTail) {
      // The next block. Read from DRAM on one Sapphire Rapids core, bfloat16: fwd 8.8 -> 6.8 ms for 256 x 151936.
      for (unsigned k = 0; k < 4 * W * sizeof(T); k += 64) {
        __builtin_prefetch(reinterpret_cast<const char*>(x + i + kBlock) + k, 0, 3);
      }
    }
    accumulate<kExtras, kSoftcap, kTail>(s0, a, inner, offset, cs, minus_shift, n);
    accumulate<kExtras, kSoftcap, kTail>(s1, b, inner, offset, cs, minus_shift, n - W);
    accumulate<kExtras, kSoftcap, kTail>(s2, d, inner, offset, cs, minus_shift, n - 2 * W);
    accumulate<kExtras, kSoftcap, kTail>(s3, e, inner, offset, cs, minus_shift, n - 3 * W);
  }
  total.sum += reduce_add((s0.e + s1.e) + (s2.e + s3.e));
  if (kExtras) {
    total.sum_t += reduce_add((s0.te + s1.te) + (s2.te + s3.te));
    total.sum_sq += reduce_add((s0.ee + s1.ee) + (s2.ee + s3.ee));
    total.sum_y += reduce_add((s0.y + s1.y) + (s2.y + s3.y));
  }
}

// Rescales the sums to a larger shift.
template <typename S>
inline void raise_shift(Partial& total, double shift) {
  const double step = total.shift - shift;
  lower(total, step, sizeof(S) == 4 ? __builtin_exp2(step) : __builtin_exp(step));
  total.shift = shift;
}

template <typename T, bool kExtras, bool kSoftcap, bool kTail>
inline void scan_block(const T* x, long n, const RowMap& map, Partial& total, bool& any) {
  using S = typename AccOf<T>::Scalar;
  const double max_y = block_max<T, kSoftcap, kTail>(x, n, S(map.inner), S(map.offset));
  if (max_y > total.max_y) {
    const double shift = S(S(map.c) * S(max_y));
    if (any) {
      raise_shift<S>(total, shift);
    } else {
      total.shift = shift;  // only -inf so far: the sums are 0 (or NaN)
      any = true;
    }
    total.max_y = max_y;
  }
  block_sums<T, kExtras, kSoftcap, kTail>(x, n, map, total);
}

template <typename T, bool kExtras, bool kSoftcap>
Partial scan_row(const T* x, long n, const RowMap& map) {
  using S = typename AccOf<T>::Scalar;
  constexpr long kStep = 4 * AccOf<T>::Vec::kLanes;
  using V = typename AccOf<T>::Vec;
  Partial total{};
  total.max_y = -__builtin_inf();
  bool any = false;
  const long whole = n - n % kStep;
  for (long i = 0; i < whole; i += kBlock) {
    const long count = whole - i < kBlock ? whole - i : kBlock;
    scan_block<T, kExtras, kSoftcap, false>(x + i, count, map, total, any);
  }
  if (whole < n) {
    S tail[kStep] = {};
    for (long i = whole; i < n; ++i) tail[i - whole] = to_acc(x[i]);
    scan_block<S, kExtras, kSoftcap, true>(tail, n - whole, map, total, any);
  }
  const V top_t = fma_exact(set1(V{}, S(total.max_y)), set1(V{}, S(map.c)), set1(V{}, S(-total.shift)));
  total.top = reduce_max(exp_unit(top_t));
  return total;
}

// ---- gradient
// ----------------------------------------------------------------------------------------------------------

template <bool kSoftcap, bool kPerT = false, typename V, typename S>
inline V gradient_of(V x, S inner, S offset, V c, V minus_shift, V factor, V per_t = V{}) {
  V y = x, slope;
  if (kSoftcap) tanh_and_slope(fma(x, set1(x, inner), set1(x, offset)), y, slope);
  const V t = fma_exact(y, c, minus_shift);
  if (kPerT) factor = fma(max(set1(t, S(-1000)), t), per_t, factor);  // 0 * -inf stays 0
  const V g = exp_unit(t) * factor;
  return kSoftcap ? g * slope : g;
}

template <typename T, bool kSoftcap, bool kPerT>
inline void gradient_blocks(T* x, long n, const RowMap& map, double shift, double factor_d, double per_t_d,
                            const T* next) {
  using V = typename AccOf<T>::Vec;
  using S = typename AccOf<T>::Scalar;
  constexpr long W = V::kLanes;
  const S inner = S(map.inner), offset = S(map.offset);
  const V c = set1(V{}, S(map.c)), minus_shift = set1(V{}, S(-shift)), factor = set1(V{}, S(factor_d));
  const V per_t = set1(V{}, S(per_t_d));
  const auto of = [&](V v) { return gradient_of<kSoftcap, kPerT>(v, inner, offset, c, minus_shift, factor, per_t); };
  for (long i = 0; i < n; i += 4 * W) {
    V a, b, d, e;
    load2(x + i, a, b);
    load2(x + i + 2 * W, d, e);
    // The next row into L2 (same machine, float32: fused 18.8 -> 17.7 ms, bwd 16.4 -> 14.8 ms).
    for (unsigned k = 0; k < 4 * W * sizeof(T); k += 64) {
      __builtin_prefetch(reinterpret_cast<const char*>(next + i) + k, 0, 2);
    }
    store2(x + i, of(a), of(b));
    store2(x + i + 2 * W, of(d), of(e));
  }
}

template <typename T, bool kSoftcap, bool kPerT>
void gradient_row(T* x, long n, const RowMap& map, double shift, double factor, double per_t, const T* next) {
  using S = typename AccOf<T>::Scalar;
  constexpr long kStep = 4 * AccOf<T>::Vec::kLanes;
  const long whole = n - n % kStep;
  gradient_blocks<T, kSoftcap, kPerT>(x, whole, map, shift, factor, per_t, next);
  if (whole < n) {
    S tail[kStep] = {};
    for (long i = whole; i < n; ++i) tail[i - whole] = to_acc(x[i]);
    gradient_blocks<S, kSoftcap, kPerT>(tail, kStep, map, shift, factor, per_t, tail);
    for (long i = whole; i < n; ++i) from_acc(x[i], tail[i - whole]);
  }
}

// ---- the table
// -----------------------------------------------------------------------------------------------------------

template <typename T>
Partial scan(const void* x, int64_t n, const RowMap& map, bool extras) {
  const T* p = static_cast<const T*>(x);
  if (map.softcap) return extras ? scan_row<T, true, true>(p, n, map) : scan_row<T, false, true>(p, n, map);
  return extras ? scan_row<T, true, false>(p, n, map) : scan_row<T, false, false>(p, n, map);
}

template <typename T>
void gradient(void* x, int64_t n, const RowMap& map, double shift, double factor, double per_t, const void* next) {
  T* p = static_cast<T*>(x);
  const T* q = static_cast<const T*>(next);
  if (per_t != 0) {
    map.softcap ? gradient_row<T, true, true>(p, n, map, shift, factor, per_t, q)
                : gradient_row<T, false, true>(p, n, map, shift, factor, per_t, q);
  } else {
    map.softcap ? gradient_row<T, true, false>(p, n, map, shift, factor, per_t, q)
                : gradient_row<T, false, false>(p, n, map, shift, factor, per_t, q);
  }
}

template <typename T>
double y_of(const void* x, const RowMap& map) {
  using V = typename AccOf<T>::Vec;
  using S = typename AccOf<T>::Scalar;
  const S value = to_acc(*static_cast<const T*>(x));
  return map.softcap ? reduce_max(to_y<true>(set1(V{}, value), S(map.inner), S(map.offset))) : value;
}
