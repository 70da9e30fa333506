// Blocks of bfloat16 matmuls with AMX: contracts in token_logps.h. TDPBF16PS adds the product of a tile of 16 rows and
// 16 pairs, and one of 16 pairs and 16 columns, to 16 x 16 sums.
// Included inside the anonymous namespace of token_logps_avx512bf16.cpp.

struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

// What was written is in memory: gcc 12 does not know that tile instructions read it.
inline void before_tiles(const void* written) { __asm__ volatile("" : : "r"(written) : "memory"); }

// The tile registers are ours while it lives: 0 to 3 for sums, 4 and 5 for a, 6 and 7 for b. Then they are as they
// were: oneDNN does not load a configuration again that it believes to be there.
class Tiles {
 public:
  Tiles() {
    TileConfig ours{};
    ours.palette = 1;
    for (int i = 0; i < 8; ++i) ours.row_bytes[i] = 64, ours.rows[i] = kTile;
    _tile_storeconfig(&before_);
    before_tiles(&ours);
    _tile_loadconfig(&ours);
  }
  ~Tiles() {
    if (before_.palette) {
      before_tiles(&before_);
      _tile_loadconfig(&before_);
    } else {
      _tile_release();
    }
  }
  Tiles(const Tiles&) = delete;

 private:
  TileConfig before_;
};

// Memory of a thread that keeps its size.
inline uint32_t* tile_room(int64_t numbers) {
  static thread_local Lines<uint32_t> room;
  if (int64_t(room.size()) < numbers) room.resize(size_t(numbers));
  return room.data();
}

// Tiles along `inner` numbers.
inline int64_t pair_tiles_of(int64_t inner) { return (inner + 2 * kTile - 1) / (2 * kTile); }

void tiles_of_rows(const BFloat16* a, int64_t stride, int64_t rows, int64_t inner, uint32_t* out) {
  const int64_t deep = pair_tiles_of(inner);
  for (int64_t i = 0; i < rows; i += kTile) {
    for (int64_t k = 0; k < deep; ++k, out += kTile * kTile) {
      const __mmask32 keep = first_numbers_of(inner - 2 * kTile * k);
      for (int64_t t = 0; t < kTile; ++t) {
        const BFloat16* from = a + (i + t) * stride + 2 * kTile * k;
        const bool there = i + t < rows;
        _mm512_store_si512(out + t * kTile, there ? _mm512_maskz_loadu_epi16(keep, from) : _mm512_setzero_si512());
      }
    }
  }
}

constexpr int64_t kRowsAhead = 8;  // of b to prefetch: rows of the weight by index lie anywhere

// Of two rows of 32 numbers, the pairs of the first and of the last 16.
struct TwoPairs {
  __m512i first, last;
};
inline TwoPairs pairs_of(__m512i low, __m512i high) {
  const __m512i lower = _mm512_unpacklo_epi16(low, high), upper = _mm512_unpackhi_epi16(low, high);
  // Quarters of 4 pairs: 0, 2, 4, 6 in `lower` and 1, 3, 5, 7 in `upper`.
  const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11),
                last = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  return {_mm512_permutex2var_epi64(lower, first, upper), _mm512_permutex2var_epi64(lower, last, upper)};
}
// Numbers [first, first + 32) of two rows that have n; a row that is not there counts as zeros.
inline TwoPairs load_pairs(const BFloat16* low, const BFloat16* high, int64_t first, int64_t n) {
  const __mmask32 keep = first_numbers_of(n - first);
  const __m512i zeros = _mm512_setzero_si512();
  return pairs_of(low ? _mm512_maskz_loadu_epi16(keep, low + first) : zeros,
                  high ? _mm512_maskz_loadu_epi16(keep, high + first) : zeros);
}

void tiles_of_columns(const BFloat16* const* rows, int64_t inner, int64_t from, int64_t n, uint32_t* out) {
  const int64_t deep = pair_tiles_of(inner), tile = kTile * kTile;
  for (int64_t k = 0; k < deep; ++k) {
    for (int64_t i = 0; i < n; i += 2 * kTile) {
      __m512i first[kTile], last[kTile];
      for (int64_t p = 0; p < kTile; ++p) {
        const int64_t row = 2 * (k * kTile + p);
        const TwoPairs both = load_pairs(row < inner ? rows[row] + from : nullptr,
                                         row + 1 < inner ? rows[row + 1] + from : nullptr, i, n);
        first[p] = both.first, last[p] = both.last;
      }
      transpose16(first);
      uint32_t* to = out + (i / kTile * deep + k) * tile;
      for (int64_t t = 0; t < kTile; ++t) _mm512_store_si512(to + t * kTile, first[t]);
      if (i + kTile >= n) continue;
      transpose16(last);
      for (int64_t t = 0; t < kTile; ++t) _mm512_store_si512(to + deep * tile + t * kTile, last[t]);
    }
  }
}

void tiles_of_b(const BFloat16* const* rows, int64_t inner, int64_t first, int64_t n, uint32_t* out) {
  const int64_t deep = pair_tiles_of(inner), tile = kTile * kTile;
  for (int64_t p = 0; p < deep * kTile; ++p) {
    for (int64_t next = 2 * p + kRowsAhead; next < 2 * p + kRowsAhead + 2 && next < inner; ++next) {
      for (int64_t v = 0; v < n; v += 2 * kTile) __builtin_prefetch(rows[next] + first + v);
    }
    const BFloat16* low = 2 * p < inner ? rows[2 * p] + first : nullptr;
    const BFloat16* high = 2 * p + 1 < inner ? rows[2 * p + 1] + first : nullptr;
    uint32_t* to = out + p * kTile;  // tiles [pairs, columns] follow one another along the pairs
    for (int64_t v = 0; v < n; v += 2 * kTile, to += 2 * deep * tile) {
      const TwoPairs both = load_pairs(low, high, v, n);
      _mm512_store_si512(to, both.first);
      _mm512_store_si512(to + deep * tile, both.last);
    }
  }
}

// The products of two tiles of columns and kRowTiles of rows, in the registers 0 to 3.
template <int kRowTiles>
inline void multiply_tiles(const uint32_t* a, const uint32_t* b, int64_t deep) {
  constexpr int64_t kNumbers = kTile * kTile;
  for (int64_t k = 0; k < deep * kNumbers; k += kNumbers) {
    _tile_loadd(6, b + k, 4 * kTile);
    _tile_loadd(4, a + k, 4 * kTile);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b + deep * kNumbers + k, 4 * kTile);
    _tile_dpbf16ps(1, 4, 7);
    if (kRowTiles == 2) {
      _tile_loadd(5, a + deep * kNumbers + k, 4 * kTile);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
}

template <int kRowTiles>
inline void add_block_of_tiles(const uint32_t* a, const uint32_t* b, int64_t deep, float* sums) {
  constexpr int64_t kNumbers = kTile * kTile;
  _tile_loadd(0, sums, 4 * kTile);
  _tile_loadd(1, sums + kNumbers, 4 * kTile);
  if (kRowTiles == 2) {
    _tile_loadd(2, sums + 2 * kNumbers, 4 * kTile);
    _tile_loadd(3, sums + 3 * kNumbers, 4 * kTile);
  }
  multiply_tiles<kRowTiles>(a, b, deep);
  _tile_stored(0, sums, 4 * kTile);
  _tile_stored(1, sums + kNumbers, 4 * kTile);
  if (kRowTiles == 2) {
    _tile_stored(2, sums + 2 * kNumbers, 4 * kTile);
    _tile_stored(3, sums + 3 * kNumbers, 4 * kTile);
  }
}

// Two tiles of b stay in the L1 cache while those of a pass by.
void add_tiles(const uint32_t* a, const uint32_t* b, int64_t row_tiles, int64_t column_tiles, int64_t deep,
               float* sums) {
  const Tiles ours;
  const int64_t tile = kTile * kTile;
  before_tiles(a);
  for (int64_t j = 0; j < column_tiles; j += 2, b += 2 * deep * tile) {
    for (int64_t i = 0; i < row_tiles; i += 2, sums += 4 * tile) {
      if (i + 1 < row_tiles) {
        add_block_of_tiles<2>(a + i * deep * tile, b, deep, sums);
      } else {
        add_block_of_tiles<1>(a + i * deep * tile, b, deep, sums);
        sums -= 2 * tile;
      }
    }
  }
}

// The first `rows` rows of a block of 32 columns, added to rows that lie anywhere.
inline void add_block_to_rows(const float (*block)[2 * kTile], int64_t rows, int64_t column, float* const* sums) {
  for (int64_t r = 0; r < rows; ++r) {
    float* to = sums[r] + column;
    _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), _mm512_load_ps(block[r])));
    _mm512_storeu_ps(to + kTile, _mm512_add_ps(_mm512_loadu_ps(to + kTile), _mm512_load_ps(block[r] + kTile)));
  }
}

// A block is added to its rows while the next one is multiplied.
void add_tiles_to_rows(const uint32_t* a, const uint32_t* b, int64_t rows, int64_t column_tiles, int64_t deep,
                       float* const* sums) {
  if (!rows || !deep) return;
  const Tiles ours;
  const int64_t tile = kTile * kTile;
  alignas(64) float blocks[2][2 * kTile][2 * kTile];
  int now = 0;
  int64_t count = 0, row = 0, column = 0;  // of the block that is yet to be added
  before_tiles(a);
  for (int64_t j = 0; j < column_tiles; j += 2, b += 2 * deep * tile) {
    for (int64_t i = 0; i < rows; i += 2 * kTile) {
      const bool both = i + kTile < rows;
      _tile_zero(0);
      _tile_zero(1);
      if (both) {
        _tile_zero(2);
        _tile_zero(3);
        multiply_tiles<2>(a + i / kTile * deep * tile, b, deep);
      } else {
        multiply_tiles<1>(a + i / kTile * deep * tile, b, deep);
      }
      add_block_to_rows(blocks[1 - now], count, column, sums + row);
      _tile_stored(0, blocks[now][0], 8 * kTile);
      _tile_stored(1, blocks[now][0] + kTile, 8 * kTile);
      if (both) {
        _tile_stored(2, blocks[now][kTile], 8 * kTile);
        _tile_stored(3, blocks[now][kTile] + kTile, 8 * kTile);
      }
      before_tiles(blocks);  // what they stored is read next
      count = rows - i < 2 * kTile ? rows - i : 2 * kTile, row = i, column = j * kTile;
      now = 1 - now;
    }
  }
  add_block_to_rows(blocks[1 - now], count, column, sums + row);
}

void pack_x_amx(const BFloat16* x, int64_t rows, int64_t width, uint32_t* out) {
  tiles_of_rows(x, width, rows, width, out);
}

// Up to kTile rows of `numbers` numbers of W as tiles of pairs and columns.
void turned_tiles(const BFloat16* weight, int64_t stride, int64_t rows, int64_t numbers, uint32_t* out) {
  for (int64_t k = 0; k < numbers; k += 2 * kTile, out += kTile * kTile) {
    const __mmask32 keep = first_numbers_of(numbers - k);
    __m512i lines[kTile];
    for (int64_t i = 0; i < kTile; ++i) {
      lines[i] = i < rows ? _mm512_maskz_loadu_epi16(keep, weight + i * stride + k) : _mm512_setzero_si512();
    }
    transpose16(lines);
    for (int64_t i = 0; i < kTile; ++i) _mm512_store_si512(out + i * kTile, lines[i]);
  }
}

// Sums of 32 rows and 32 columns, less what the rows lack, rounded.
inline void store_rounded(const float (*sums)[2 * kTile], int64_t rows, __mmask32 keep, __m512 low_bias,
                          __m512 high_bias, const float* minus, BFloat16* out, int64_t stride) {
  for (int64_t t = 0; t < rows; ++t, out += stride) {
    const __m512 m = _mm512_set1_ps(minus[t]);
    const __m512 low = _mm512_add_ps(_mm512_add_ps(_mm512_load_ps(sums[t]), m), low_bias);
    const __m512 high = _mm512_add_ps(_mm512_add_ps(_mm512_load_ps(sums[t] + kTile), m), high_bias);
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(high, low);
    if (keep == 0xffffffffu && (reinterpret_cast<uintptr_t>(out) & 63) == 0) {
      _mm512_stream_si512(reinterpret_cast<__m512i*>(out), both);
    } else {
      _mm512_mask_storeu_epi16(out, keep, both);
    }
  }
}

// Rows of W become the second operand: 32 of them stay in the L1 cache (up to H = 768) while all of x passes by.
void logits_amx(const BFloat16* weight, int64_t weight_stride, int64_t columns, const uint32_t* x, int64_t pairs,
                int64_t rows, const float* bias, const float* minus, BFloat16* out, int64_t stride) {
  const Tiles ours;
  const int64_t deep = (pairs + kTile - 1) / kTile, tile = kTile * kTile;
  uint32_t* w = tile_room(2 * deep * tile);  // [2, deep, kTile pairs, kTile columns]
  alignas(64) float sums[2 * kTile][2 * kTile];
  for (int64_t first = 0; first < columns; first += 2 * kTile) {
    const int64_t some = columns - first < 2 * kTile ? columns - first : 2 * kTile;
    for (int64_t i = 0; i < 2; ++i) {
      turned_tiles(weight + (first + i * kTile) * weight_stride, weight_stride, some - i * kTile, 2 * pairs,
                   w + i * deep * tile);
    }
    before_tiles(w);
    const __mmask32 keep = first_numbers_of(some);
    const __m512 low_bias = bias ? _mm512_maskz_loadu_ps((__mmask16)keep, bias + first) : _mm512_setzero_ps();
    const __m512 high_bias =
        bias ? _mm512_maskz_loadu_ps((__mmask16)(keep >> kTile), bias + first + kTile) : _mm512_setzero_ps();
    for (int64_t t = 0; t < rows; t += 2 * kTile) {
      const uint32_t* a = x + t / kTile * deep * tile;
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int64_t k = 0; k < deep * tile; k += tile) {
        _tile_loadd(6, w + k, 4 * kTile);
        _tile_loadd(7, w + deep * tile + k, 4 * kTile);
        _tile_loadd(4, a + k, 4 * kTile);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, a + deep * tile + k, 4 * kTile);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      _tile_stored(0, sums[0], 8 * kTile);
      _tile_stored(1, sums[0] + kTile, 8 * kTile);
      _tile_stored(2, sums[kTile], 8 * kTile);
      _tile_stored(3, sums[kTile] + kTile, 8 * kTile);
      store_rounded(sums, rows - t < 2 * kTile ? rows - t : 2 * kTile, keep, low_bias, high_bias, minus + t,
                    out + t * stride + first, stride);
    }
  }
  _mm_sfence();
}
