// Blocks of bfloat16 matmuls with VDPBF16PS, which adds two products to a float32 lane: contracts in token_logps.h.
// Included inside the anonymous namespace of token_logps_avx512bf16.cpp.

constexpr int64_t kLogitPairs = 512;  // of H at a time: a panel of x, 128 kB, stays in the L2 cache
constexpr int kVectors = kPanel / 16;
constexpr int kBlockRows = 6;  // kBlockRows * kVectors sums, kVectors vectors of b and one of a: 29 of 32 registers

// One block [kRows, kPanel] of c.
template <int kRows>
inline void add_block(const char* a, int64_t row_stride, int64_t pair_stride, const uint32_t* b, int64_t pairs,
                      float* const* c, int64_t column) {
  __m512 sums[kRows][kVectors];
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) sums[r][v] = _mm512_loadu_ps(c[r] + column + 16 * v);
  }
  for (int64_t p = 0; p < pairs; ++p, a += pair_stride, b += kPanel) {
    __m512bh panel[kVectors];
    for (int v = 0; v < kVectors; ++v) panel[v] = (__m512bh)_mm512_loadu_si512(b + 16 * v);
    for (int r = 0; r < kRows; ++r) {
      int pair;
      __builtin_memcpy(&pair, a + r * row_stride, sizeof pair);
      const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
      for (int v = 0; v < kVectors; ++v) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], both, panel[v]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) _mm512_storeu_ps(c[r] + column + 16 * v, sums[r][v]);
  }
}

template <int kRows>
inline void add_rows_of_block(int64_t rows, const char* a, int64_t row_stride, int64_t pair_stride, const uint32_t* b,
                              int64_t pairs, float* const* c, int64_t column) {
  if (rows == kRows) add_block<kRows>(a, row_stride, pair_stride, b, pairs, c, column);
  if constexpr (kRows > 1) {
    if (rows < kRows) add_rows_of_block<kRows - 1>(rows, a, row_stride, pair_stride, b, pairs, c, column);
  }
}

void add_matmul(const void* a, int64_t row_stride, int64_t pair_stride, int64_t rows, const uint32_t* b, int64_t pairs,
                int64_t panels, float* const* c) {
  for (int64_t panel = 0; panel < panels; ++panel, b += pairs * kPanel) {
    const char* first = static_cast<const char*>(a);
    const int64_t blocks = (rows + kBlockRows - 1) / kBlockRows;
    for (int64_t block = 0, r = 0; block < blocks; ++block) {
      const int64_t size = rows * (block + 1) / blocks - r;  // evenly: fewer rows leave multipliers idle
      add_rows_of_block<kBlockRows>(size, first, row_stride, pair_stride, b, pairs, c + r, panel * kPanel);
      r += size, first += size * row_stride;
    }
  }
}

inline __mmask16 first_lanes_of(int64_t n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : (__mmask16)((1u << n) - 1); }
inline __mmask32 first_numbers_of(int64_t n) { return n >= 32 ? 0xffffffffu : (__mmask32)((1u << n) - 1); }  // n > 0

void pack_pairs(const BFloat16* low, const BFloat16* high, int64_t n, uint32_t* out, int64_t panel_stride) {
  for (int64_t i = 0; i < n; i += kPanel, out += panel_stride) {
    for (int v = 0; v < kPanel; v += 16) {
      const __mmask16 keep = first_lanes_of(n - i - v);
      const __m512i a = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(keep, low + i + v));
      __m512i b = _mm512_setzero_si512();
      if (high) b = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(keep, high + i + v)), 16);
      _mm512_storeu_si512(out + v, _mm512_or_si512(a, b));
    }
  }
}

inline __m512 load_row(__mmask16 keep, const float* p) { return _mm512_maskz_loadu_ps(keep, p); }
inline __m512 load_row(__mmask16 keep, const BFloat16* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(keep, p)), 16));
}

template <typename T>
void scale_row(const T* from, int64_t n, float factor, BFloat16* to) {
  const __m512 f = _mm512_set1_ps(factor);
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 keep = first_lanes_of(n - i);
    const __m512 x = _mm512_mul_ps(f, load_row(keep, from + i));
    _mm256_mask_storeu_epi16(to + i, keep, (__m256i)_mm512_cvtneps_pbh(x));
  }
}

// Whole cache lines go past the caches: the sums of the next rows are needed there. The atomic addition with which a
// thread asks for its next task orders them before what follows.
void split_row(const float* from, int64_t n, BFloat16* high, uint16_t* low) {
  const auto store = [](void* to, __m256i first, __m256i last, __mmask32 keep) {
    const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(first), last, 1);
    if (keep == 0xffffffffu && (reinterpret_cast<uintptr_t>(to) & 63) == 0) {
      _mm512_stream_si512(static_cast<__m512i*>(to), both);
    } else {
      _mm512_mask_storeu_epi16(to, keep, both);
    }
  };
  for (int64_t i = 0; i < n; i += 32) {
    const __m512i a = _mm512_maskz_loadu_epi32(first_lanes_of(n - i), from + i);
    const __m512i b = _mm512_maskz_loadu_epi32(first_lanes_of(n - i - 16), from + i + 16);
    const __mmask32 keep = first_numbers_of(n - i);
    store(high + i, _mm512_cvtepi32_epi16(_mm512_srli_epi32(a, 16)), _mm512_cvtepi32_epi16(_mm512_srli_epi32(b, 16)),
          keep);
    store(low + i, _mm512_cvtepi32_epi16(a), _mm512_cvtepi32_epi16(b), keep);
  }
}

void join_row(const BFloat16* high, const uint16_t* low, int64_t n, float* to) {
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 keep = first_lanes_of(n - i);
    const __m512i a = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(keep, high + i));
    const __m512i b = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(keep, low + i));
    _mm512_mask_storeu_epi32(to + i, keep, _mm512_or_si512(_mm512_slli_epi32(a, 16), b));
  }
}

void add_row(const BFloat16* x, int64_t n, float factor, float rounded, float scale, float* to) {
  const __m512 f = _mm512_set1_ps(factor), r = _mm512_set1_ps(rounded), s = _mm512_set1_ps(scale);
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 keep = first_lanes_of(n - i);
    const __m512 value = load_row(keep, x + i);
    const __m256i scaled = (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(s, value));
    const __m512 back = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(scaled), 16));
    const __m512 sum = _mm512_fmadd_ps(f, value, _mm512_maskz_loadu_ps(keep, to + i));
    _mm512_mask_storeu_ps(to + i, keep, _mm512_fnmadd_ps(r, back, sum));
  }
}

// 32-bit lanes: a[i][j] <-> a[j][i].
inline void transpose16(__m512i* a) {
  __m512i b[16];
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  // a[4 i + j] holds column 4 q + j of rows 4 i to 4 i + 3 in its quarter q.
  for (int j = 0; j < 4; ++j) {
    const __m512i low01 = _mm512_shuffle_i32x4(a[j], a[4 + j], 0x44),
                  high01 = _mm512_shuffle_i32x4(a[j], a[4 + j], 0xee);
    const __m512i low23 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x44);
    const __m512i high23 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xee);
    b[j] = _mm512_shuffle_i32x4(low01, low23, 0x88);
    b[4 + j] = _mm512_shuffle_i32x4(low01, low23, 0xdd);
    b[8 + j] = _mm512_shuffle_i32x4(high01, high23, 0x88);
    b[12 + j] = _mm512_shuffle_i32x4(high01, high23, 0xdd);
  }
  for (int i = 0; i < 16; ++i) a[i] = b[i];
}

// Rounds sums [32 columns, kPanel rows] to 32 columns of `rows` rows of out.
inline void store_transposed(const float* sums, int64_t rows, int64_t columns, BFloat16* out, int64_t stride) {
  const __mmask32 keep = first_numbers_of(columns);
  for (int64_t low = 0; low < rows; low += 16) {
    __m512i pairs[16];
    for (int i = 0; i < 16; ++i) {
      const __m256i even = (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(sums + 2 * i * kPanel + low));
      const __m256i odd = (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(sums + (2 * i + 1) * kPanel + low));
      pairs[i] = _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
    }
    transpose16(pairs);
    for (int i = 0; i < 16 && low + i < rows; ++i) {
      BFloat16* at = out + (low + i) * stride;
      if (columns >= 32 && (reinterpret_cast<uintptr_t>(at) & 63) == 0) {
        _mm512_stream_si512(reinterpret_cast<__m512i*>(at), pairs[i]);
      } else {
        _mm512_mask_storeu_epi16(at, keep, pairs[i]);
      }
    }
  }
}

// The pairs of neighbours in the rows of x, as the second operand of logits_tile: [pairs, kPanel].
void pack_x(const BFloat16* x, int64_t rows, int64_t width, uint32_t* out) {
  for (int64_t t = 0; t < rows; ++t, x += width) {
    for (int64_t p = 0; p < width / 2; ++p) out[p * kPanel + t] = x[2 * p].bits | uint32_t(x[2 * p + 1].bits) << 16;
  }
}

void logits_tile(const HeadBlocks& head, const float* minus, BFloat16* out, int64_t stride) {
  const auto& [weight, weight_stride, columns, x, pairs, rows, bias] = head;
  const int64_t padded = (pairs + kTile - 1) / kTile * kTile;
  alignas(64) float sums[32 * kPanel];
  float* of_column[32];
  for (int i = 0; i < 32; ++i) of_column[i] = sums + i * kPanel;
  for (int64_t first = 0; first < columns; first += 32) {
    const int64_t some = columns - first < 32 ? columns - first : 32;
    for (int64_t i = 0; i < 32 && first + 32 + i < columns; ++i) {
      const BFloat16* next = weight + (first + 32 + i) * weight_stride;
      for (int64_t k = 0; k < 2 * pairs; k += 32) __builtin_prefetch(next + k, 0, 2);
    }
    for (int64_t low = 0; low < rows; low += kPanel) {
      for (int64_t i = 0; i < some; ++i) {
        const __m512 b = _mm512_set1_ps(bias ? bias[first + i] : 0.0f);
        for (int v = 0; v < kPanel; v += 16) {
          _mm512_store_ps(of_column[i] + v, _mm512_add_ps(b, _mm512_loadu_ps(minus + low + v)));
        }
      }
      for (int64_t p = 0; p < pairs; p += kLogitPairs) {
        const int64_t n = pairs - p < kLogitPairs ? pairs - p : kLogitPairs;
        add_matmul(weight + first * weight_stride + 2 * p, 2 * weight_stride, 4, some, x + low * padded + p * kPanel, n,
                   1, of_column);
      }
      store_transposed(sums, rows - low < kPanel ? rows - low : kPanel, some, out + low * stride + first, stride);
    }
  }
  _mm_sfence();
}
