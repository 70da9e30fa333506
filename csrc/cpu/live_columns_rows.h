// The row kernels of live_columns and live_grads, included after token_logps_rows.h. s_v = softmax_v * dz/du_v.

// Column of the i-th of the 2 * kLanes numbers from load2, which may separate even and odd columns.
template <typename T>
struct LaneOrder {
  using V = typename AccOf<T>::Vec;
  int column[2 * V::kLanes];
  LaneOrder() {
    T numbers[2 * V::kLanes];
    typename AccOf<T>::Scalar lanes[2 * V::kLanes];
    for (int i = 0; i < 2 * V::kLanes; ++i) from_acc(numbers[i], typename AccOf<T>::Scalar(i));
    V a, b;
    load2(numbers, a, b);
    storeu(lanes, a);
    storeu(lanes + V::kLanes, b);
    for (int i = 0; i < 2 * V::kLanes; ++i) column[i] = int(lanes[i]);
  }
};

// Adds s of kRows rows to the sums of n columns and updates their maxima; n is a multiple of 2 * kLanes.
// Prefetches the rows `next`.
template <typename T, bool kSoftcap, int kRows>
inline void add_rows(const T* const* x, const T* const* next, long n, const RowMap& map, const double* offset,
                     const double* shift, const double* factor, typename AccOf<T>::Scalar* sums,
                     typename AccOf<T>::Scalar* tops, double* row_sums) {
  using V = typename AccOf<T>::Vec;
  using S = typename AccOf<T>::Scalar;
  constexpr long W = V::kLanes;
  const S inner = S(map.inner);
  const V c = set1(V{}, S(map.c));
  V minus_shift[kRows], scale[kRows], total[kRows];
  for (int r = 0; r < kRows; ++r) {
    minus_shift[r] = set1(V{}, S(-shift[r]));
    scale[r] = set1(V{}, S(factor[r]));
    total[r] = set1(V{}, S(0));
  }
  for (long i = 0; i < n; i += 2 * W) {
    V sum_a = loadu(V{}, sums + i), sum_b = loadu(V{}, sums + i + W);
    V top_a = loadu(V{}, tops + i), top_b = loadu(V{}, tops + i + W);
    for (int r = 0; r < kRows; ++r) {
      V a, b;
      load2(x[r] + i, a, b);
      for (unsigned k = 0; k < 2 * W * sizeof(T); k += 64) {
        __builtin_prefetch(reinterpret_cast<const char*>(next[r] + i) + k, 0, 2);
      }
      a = gradient_of<kSoftcap>(a, inner, S(offset[r]), c, minus_shift[r], scale[r]);
      b = gradient_of<kSoftcap>(b, inner, S(offset[r]), c, minus_shift[r], scale[r]);
      sum_a = sum_a + a;
      sum_b = sum_b + b;
      top_a = max(top_a, a);
      top_b = max(top_b, b);
      total[r] = total[r] + (a + b);
    }
    storeu(sums + i, sum_a);
    storeu(sums + i + W, sum_b);
    storeu(tops + i, top_a);
    storeu(tops + i + W, top_b);
  }
  for (int r = 0; r < kRows; ++r) row_sums[r] += reduce_add(total[r]);
}

// Rows x[0..rows) of at most kColumnBlock columns: live (0 or 1; a 1 stays) where a maximum reaches eps, sums
// elsewhere.
template <typename T, bool kSoftcap>
void columns_of_rows(const T* const* x, int64_t rows, int64_t n, const RowMap& map, const double* offset,
                     const double* shift, const double* factor, double eps, uint8_t* live, void* tail,
                     double* row_sums) {
  using S = typename AccOf<T>::Scalar;
  constexpr long kStep = 2 * AccOf<T>::Vec::kLanes;
  static const LaneOrder<T> order;
  S sums[kColumnBlock + kStep] = {}, tops[kColumnBlock + kStep] = {};
  const long whole = n - n % kStep;
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) {
    // 2,048 columns are too short for the hardware prefetcher.
    const T* next[4];
    for (int k = 0; k < 4; ++k) next[k] = x[r + 4 + k < rows ? r + 4 + k : rows - 1];
    add_rows<T, kSoftcap, 4>(x + r, next, whole, map, offset + r, shift + r, factor + r, sums, tops, row_sums + r);
  }
  for (; r < rows; ++r)
    add_rows<T, kSoftcap, 1>(x + r, x + r, whole, map, offset + r, shift + r, factor + r, sums, tops, row_sums + r);
  if (whole < n) {  // the last columns, in their own order
    const S lowest = -S(kInfinity);
    for (r = 0; r < rows; ++r) {
      S part[kStep], size[kStep] = {}, top[kStep] = {};
      double row_sum = 0;
      for (long i = 0; i < kStep; ++i) part[i] = whole + i < n ? S(to_acc(x[r][whole + i])) : lowest;
      const S* p = part;
      add_rows<S, kSoftcap, 1>(&p, &p, kStep, map, offset + r, shift + r, factor + r, size, top, &row_sum);
      for (long i = 0; whole + i < n; ++i) {
        sums[whole + i] += size[i];
        tops[whole + i] = top[i] > tops[whole + i] ? top[i] : tops[whole + i];
        row_sums[r] += size[i];
      }
    }
  }
  S* out = static_cast<S*>(tail);
  for (long i = 0; i < n; ++i) {
    const long column = i < whole ? i - i % kStep + order.column[i % kStep] : i;
    if (tops[i] >= S(eps)) live[column] = 1;
    out[column] = live[column] ? S(0) : sums[i];
  }
}

// Elements columns[0 .. 2 * kLanes) of x, in the order of load2.
template <typename T, typename V>
inline void gather2(const T* x, const int64_t* columns, V& a, V& b) {
  T part[2 * V::kLanes];
  for (int k = 0; k < 2 * V::kLanes; ++k) part[k] = x[columns[k]];
  load2(part, a, b);
}

// out[i] = -s of column columns[i]; returns the sum of the unrounded s.
template <typename T, bool kSoftcap>
double gather_row(const T* x, const int64_t* columns, int64_t n, const RowMap& map, double shift, double factor_d,
                  T* out) {
  using V = typename AccOf<T>::Vec;
  using S = typename AccOf<T>::Scalar;
  constexpr long W = V::kLanes;
  constexpr long kStep = 2 * W;
  const S inner = S(map.inner), offset = S(map.offset);
  const V c = set1(V{}, S(map.c)), minus_shift = set1(V{}, S(-shift)), factor = set1(V{}, S(-factor_d));
  V total = set1(V{}, S(0));
  const long whole = n - n % kStep;
  for (long i = 0; i < whole; i += kStep) {
    V a, b;
    gather2(x, columns + i, a, b);
    a = gradient_of<kSoftcap>(a, inner, offset, c, minus_shift, factor);
    b = gradient_of<kSoftcap>(b, inner, offset, c, minus_shift, factor);
    total = total + (a + b);
    store2(out + i, a, b);
  }
  double sum = reduce_add(total);
  if (whole < n) {
    S part[kStep] = {};
    for (long i = whole; i < n; ++i) part[i - whole] = to_acc(x[columns[i]]);
    V a, b;
    load2(static_cast<const S*>(part), a, b);
    store2(part, gradient_of<kSoftcap>(a, inner, offset, c, minus_shift, factor),
           gradient_of<kSoftcap>(b, inner, offset, c, minus_shift, factor));
    for (long i = whole; i < n; ++i) {
      sum += part[i - whole];
      from_acc(out[i], part[i - whole]);
    }
  }
  return -sum;
}

// ---- sums of rows of dW
// --------------------------------------------------------------------------------------------------

template <typename T>
void in_lane_order(const void* from, void* to, int64_t n) {
  using S = typename AccOf<T>::Scalar;
  constexpr long kStep = 2 * AccOf<T>::Vec::kLanes;
  static const LaneOrder<T> order;
  const long whole = n - n % kStep;
  for (long i = 0; i < n; ++i) {
    const long at = i < whole ? i - i % kStep + order.column[i % kStep] : i;
    static_cast<S*>(to)[i] = static_cast<const S*>(from)[at];
  }
}

template <typename T>
void sum_rows(void* out, int64_t n, const void* factors_v, const void* const* terms_v, int64_t num_terms,
              const void* const* made_v, int64_t num_made) {
  using V = typename AccOf<T>::Vec;
  using S = typename AccOf<T>::Scalar;
  constexpr long W = V::kLanes;
  constexpr long kStep = 2 * W;
  const S* factors = static_cast<const S*>(factors_v);
  const S* const* terms = reinterpret_cast<const S* const*>(terms_v);
  const T* const* made = reinterpret_cast<const T* const*>(made_v);
  const long whole = n - n % kStep;
  for (long i = 0; i < whole; i += kStep) {
    V a = set1(V{}, S(0)), b = a;
    for (int64_t k = 0; k < num_terms; ++k) {
      const V factor = set1(V{}, factors[k]);
      a = fma(factor, loadu(V{}, terms[k] + i), a);
      b = fma(factor, loadu(V{}, terms[k] + i + W), b);
    }
    for (int64_t k = 0; k < num_made; ++k) {
      V c, d;
      load2(made[k] + i, c, d);
      a = a + c;
      b = b + d;
    }
    store2(static_cast<T*>(out) + i, a, b);
  }
  for (long i = whole; i < n; ++i) {
    S total = 0;
    for (int64_t k = 0; k < num_terms; ++k) total += factors[k] * terms[k][i];
    for (int64_t k = 0; k < num_made; ++k) total += to_acc(made[k][i]);
    from_acc(static_cast<T*>(out)[i], total);
  }
}

// ---- the table
// -----------------------------------------------------------------------------------------------------------

template <typename T>
void columns_entry(const void* const* x, int64_t rows, int64_t n, const RowMap& map, const double* offset,
                   const double* shift, const double* factor, double eps, uint8_t* live, void* tail, double* row_sums) {
  const T* const* p = reinterpret_cast<const T* const*>(x);
  map.softcap ? columns_of_rows<T, true>(p, rows, n, map, offset, shift, factor, eps, live, tail, row_sums)
              : columns_of_rows<T, false>(p, rows, n, map, offset, shift, factor, eps, live, tail, row_sums);
}

template <typename T>
double gather_entry(const void* x, const int64_t* columns, int64_t n, const RowMap& map, double shift, double factor,
                    void* out) {
  const T* p = static_cast<const T*>(x);
  T* q = static_cast<T*>(out);
  return map.softcap ? gather_row<T, true>(p, columns, n, map, shift, factor, q)
                     : gather_row<T, false>(p, columns, n, map, shift, factor, q);
}

template <typename T>
constexpr RowKernels row_kernels() {
  return {scan<T>, gradient<T>, y_of<T>, columns_entry<T>, gather_entry<T>, sum_rows<T>, in_lane_order<T>};
}
