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

// a as tiles. Those whose pairs do not lie one behind the other, and those at an edge, are copied, with zeros beyond
// it.
struct TilesOfA {
  const char* a;
  int64_t row_stride, pair_stride, rows, pairs, deep;  // deep: tiles along the inner dimension
  uint32_t* room;                                      // [tiles of rows, deep, kTile, kTile]

  bool in_place(int64_t i, int64_t k) const {
    return pair_stride == 4 && (i + 1) * kTile <= rows && (k + 1) * kTile <= pairs;
  }
  uint32_t* copy_of(int64_t i, int64_t k) const { return room + (i * deep + k) * kTile * kTile; }
  void copy() const {
    for (int64_t i = 0; i * kTile < rows; ++i) {
      for (int64_t k = 0; k < deep; ++k) {
        if (!in_place(i, k)) copy_tile(i, k);
      }
    }
  }
  // turned: the copy has rows of a as its columns.
  void copy_tile(int64_t i, int64_t k, bool turned = false) const {
    const int64_t n = rows - i * kTile, m = pairs - k * kTile;
    const char* from = a + i * kTile * row_stride + k * kTile * pair_stride;
    const bool across = pair_stride != 4;  // then a row is 4 bytes behind the one before
    const __mmask16 keep = first_lanes_of(across ? n : m);
    __m512i lines[kTile];
    for (int64_t j = 0; j < kTile; ++j) {
      const bool there = j < (across ? m : n);
      lines[j] = there ? _mm512_maskz_loadu_epi32(keep, from + j * (across ? pair_stride : row_stride))
                       : _mm512_setzero_si512();
    }
    if (across != turned) transpose16(lines);
    uint32_t* to = copy_of(i, k);
    for (int64_t j = 0; j < kTile; ++j) _mm512_store_si512(to + j * kTile, lines[j]);
  }
};

// c[0 .. kRowTiles * kTile) [column .. column + 32) += a b, in rows from the tile i of a. b: of the panel; its last
// `tail` pairs, if they fill no tile, in `rest`.
template <int kRowTiles>
inline void add_block_in_place(const TilesOfA& a, int64_t i, const uint32_t* b, const uint32_t* rest, float* const* c,
                      int64_t column) {
  const int64_t rows = a.rows - i * kTile < kRowTiles * kTile ? a.rows - i * kTile : kRowTiles * kTile;
  const int64_t stride = rows > 1 ? c[1] - c[0] : 0;
  bool even = rows == kRowTiles * kTile;  // rows at equal distances are summed where they are
  for (int64_t r = 2; even && r < rows; ++r) even = c[r] - c[r - 1] == stride;
  alignas(64) float apart[kRowTiles * kTile][2 * kTile];
  float* sums = even ? c[0] + column : &apart[0][0];
  const int64_t step = even ? stride : 2 * kTile;
  if (even) {
    _tile_loadd(0, sums, step * 4);
    _tile_loadd(1, sums + kTile, step * 4);
    if (kRowTiles == 2) {
      _tile_loadd(2, sums + kTile * step, step * 4);
      _tile_loadd(3, sums + kTile * step + kTile, step * 4);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < a.deep; ++k) {
    const uint32_t* right = (k + 1) * kTile <= a.pairs ? b + k * kTile * kPanel : rest;
    right += column % kPanel;
    _tile_loadd(6, right, kPanel * 4);
    _tile_loadd(7, right + kTile, kPanel * 4);
    for (int part = 0; part < kRowTiles; ++part) {
      const bool here = a.in_place(i + part, k);
      const char* left = here ? a.a + (i + part) * kTile * a.row_stride + k * kTile * 4
                              : reinterpret_cast<const char*>(a.copy_of(i + part, k));
      const int64_t left_stride = here ? a.row_stride : 4 * kTile;
      if (part == 0) {
        _tile_loadd(4, left, left_stride);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
      } else {
        _tile_loadd(5, left, left_stride);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
  }
  _tile_stored(0, sums, step * 4);
  _tile_stored(1, sums + kTile, step * 4);
  if (kRowTiles == 2) {
    _tile_stored(2, sums + kTile * step, step * 4);
    _tile_stored(3, sums + kTile * step + kTile, step * 4);
  }
  if (even) return;
  for (int64_t r = 0; r < rows; ++r) {
    for (int v = 0; v < 2 * kTile; v += 16) {
      float* to = c[r] + column + v;
      _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), _mm512_load_ps(&apart[r][v])));
    }
  }
}

void add_matmul_amx(const void* a, int64_t row_stride, int64_t pair_stride, int64_t rows, const uint32_t* b,
                    int64_t pairs, int64_t panels, float* const* c) {
  if (!rows || !pairs) return;
  const Tiles ours;
  const int64_t deep = (pairs + kTile - 1) / kTile, tail = pairs % kTile, wide = (rows + kTile - 1) / kTile;
  const int64_t copied = wide * deep * kTile * kTile;
  const TilesOfA left{static_cast<const char*>(a),       row_stride, pair_stride, rows, pairs, deep,
                      tile_room(copied + kTile * kPanel)};
  left.copy();
  uint32_t* rest = left.room + copied;
  if (tail) std::memset(rest, 0, size_t(kTile * kPanel) * 4);
  for (int64_t panel = 0; panel < panels; ++panel, b += pairs * kPanel) {
    if (tail) std::memcpy(rest, b + (pairs - tail) * kPanel, size_t(tail * kPanel) * 4);
    before_tiles(left.room);
    for (int64_t i = 0; i < wide; i += 2) {
      for (int64_t column = panel * kPanel; column < (panel + 1) * kPanel; column += 2 * kTile) {
        if (i + 1 < wide) {
          add_block_in_place<2>(left, i, b, rest, c + i * kTile, column);
        } else {
          add_block_in_place<1>(left, i, b, rest, c + i * kTile, column);
        }
      }
    }
  }
}

inline __mmask32 first_numbers_of(int64_t n) { return n >= 32 ? 0xffffffffu : (__mmask32)((1u << n) - 1); }

void tiles_of_rows(const BFloat16* a, int64_t stride, int64_t rows, int64_t inner, uint32_t* out) {
  const int64_t deep = (inner + 2 * kTile - 1) / (2 * kTile);
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
  const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), last = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  return {_mm512_permutex2var_epi64(lower, first, upper), _mm512_permutex2var_epi64(lower, last, upper)};
}
// Numbers [first, first + 32) of two rows that have n; a row that is not there counts as zeros.
inline TwoPairs load_pairs(const BFloat16* low, const BFloat16* high, int64_t first, int64_t n) {
  const __mmask32 keep = first_numbers_of(n - first);
  const __m512i zeros = _mm512_setzero_si512();
  return pairs_of(low ? _mm512_maskz_loadu_epi16(keep, low + first) : zeros,
                  high ? _mm512_maskz_loadu_epi16(keep, high + first) : zeros);
}

void tiles_of_columns(const BFloat16* a, int64_t stride, int64_t rows, int64_t inner, uint32_t* out) {
  const int64_t deep = (inner + 2 * kTile - 1) / (2 * kTile), tile = kTile * kTile;
  for (int64_t k = 0; k < deep; ++k) {
    for (int64_t i = 0; i < rows; i += 2 * kTile) {
      __m512i first[kTile], last[kTile];
      for (int64_t p = 0; p < kTile; ++p) {
        const int64_t row = 2 * (k * kTile + p);
        const TwoPairs both = load_pairs(row < inner ? a + row * stride : nullptr,
                                         row + 1 < inner ? a + (row + 1) * stride : nullptr, i, rows);
        first[p] = both.first, last[p] = both.last;
      }
      transpose16(first);
      uint32_t* to = out + (i / kTile * deep + k) * tile;
      for (int64_t t = 0; t < kTile; ++t) _mm512_store_si512(to + t * kTile, first[t]);
      if (i + kTile >= rows) continue;
      transpose16(last);
      for (int64_t t = 0; t < kTile; ++t) _mm512_store_si512(to + deep * tile + t * kTile, last[t]);
    }
  }
}

void tiles_of_b(const BFloat16* const* b, int64_t inner, int64_t first, int64_t columns, uint32_t* out) {
  const int64_t deep = (inner + 2 * kTile - 1) / (2 * kTile), tile = kTile * kTile;
  for (int64_t p = 0; p < deep * kTile; ++p) {
    for (int64_t next = 2 * p + kRowsAhead; next < 2 * p + kRowsAhead + 2 && next < inner; ++next) {
      for (int64_t v = 0; v < columns; v += 2 * kTile) __builtin_prefetch(b[next] + first + v);
    }
    const BFloat16* low = 2 * p < inner ? b[2 * p] + first : nullptr;
    const BFloat16* high = 2 * p + 1 < inner ? b[2 * p + 1] + first : nullptr;
    uint32_t* to = out + p * kTile;  // tiles [pairs, columns] follow one another along the pairs
    for (int64_t v = 0; v < columns; v += 2 * kTile, to += 2 * deep * tile) {
      const TwoPairs both = load_pairs(low, high, v, columns);
      _mm512_store_si512(to, both.first);
      _mm512_store_si512(to + deep * tile, both.last);
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

// x [rows, width], rows <= kPanel, as tiles [kPanel / kTile, deep, kTile, kTile] of pairs.
void pack_x_amx(const BFloat16* x, int64_t rows, int64_t width, uint32_t* out) {
  const int64_t pairs = width / 2, deep = (pairs + kTile - 1) / kTile;
  const TilesOfA tiles{reinterpret_cast<const char*>(x), 2 * width, 4, rows, pairs, deep, out};
  for (int64_t i = 0; i < kPanel / kTile; ++i) {
    for (int64_t k = 0; k < deep; ++k) tiles.copy_tile(i, k);
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
    const TilesOfA tiles{
        reinterpret_cast<const char*>(weight + first * weight_stride), 2 * weight_stride, 4, some, pairs, deep, w};
    for (int64_t i = 0; i < 2; ++i) {
      for (int64_t k = 0; k < deep; ++k) tiles.copy_tile(i, k, true);
    }
    before_tiles(w);
    const __mmask32 keep = some == 2 * kTile ? 0xffffffffu : (__mmask32)((1u << some) - 1);
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
