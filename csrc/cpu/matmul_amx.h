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

// The products of two tiles of columns and kRowTiles of rows, in the registers 0 to 3. Loads of `a`, which lies in the
// L2 cache, leave b in L1: 424 ns for 72 products in place of 550 (5.9 each from registers alone).
// ahead: the sums of the next block, to prefetch, or null.
template <int kRowTiles>
inline void multiply_tiles(const uint32_t* a, const uint32_t* b, int64_t deep, const float* ahead = nullptr) {
  constexpr int64_t kNumbers = kTile * kTile;
  int64_t line = 0;
  for (int64_t k = 0; k < deep * kNumbers; k += kNumbers) {
    if (ahead) {
      for (; line * deep * kNumbers < 4 * kTile * (k + kNumbers); ++line)
        __builtin_prefetch(ahead + line * kTile, 1, 3);
    }
    _tile_stream_loadd(4, a + k, 4 * kTile);
    if (kRowTiles == 2) _tile_stream_loadd(5, a + deep * kNumbers + k, 4 * kTile);
    _tile_loadd(6, b + k, 4 * kTile);
    _tile_dpbf16ps(0, 4, 6);
    if (kRowTiles == 2) _tile_dpbf16ps(2, 5, 6);
    _tile_loadd(7, b + deep * kNumbers + k, 4 * kTile);
    _tile_dpbf16ps(1, 4, 7);
    if (kRowTiles == 2) _tile_dpbf16ps(3, 5, 7);
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
  multiply_tiles<kRowTiles>(a, b, deep, sums + 2 * kRowTiles * kNumbers);
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

// The rows of x as the second operand: tiles of pairs and rows.
void pack_x_amx(const BFloat16* x, int64_t rows, int64_t width, uint32_t* out) {
  for (int64_t t = 0; t < kPanel; t += kTile) {
    for (int64_t k = 0; k < width; k += 2 * kTile, out += kTile * kTile) {
      const __mmask32 keep = first_numbers_of(width - k);
      __m512i lines[kTile];
      for (int64_t i = 0; i < kTile; ++i) {
        const bool there = t + i < rows;
        lines[i] = there ? _mm512_maskz_loadu_epi16(keep, x + (t + i) * width + k) : _mm512_setzero_si512();
      }
      transpose16(lines);
      for (int64_t i = 0; i < kTile; ++i) _mm512_store_si512(out + i * kTile, lines[i]);
    }
  }
}

// ---- logits

constexpr int64_t kWide = 2 * kTile;  // columns and rows of a block of logits

// A block [32 columns, 32 rows] of products: its first column and row, its columns, and the rows from there on, none if
// its sums are not complete.
struct LogitBlock {
  float (*sums)[kWide];
  const float* bias;  // of the columns, or null
  int64_t column, row, columns, rows;

  __m512 at(int64_t v, int64_t t) const {
    const __m512 sum = _mm512_load_ps(sums[v] + t);
    return bias ? _mm512_add_ps(sum, _mm512_set1_ps(bias[v])) : sum;
  }
};

// 32 rows of the weight, `deep` tiles of each, as the first operand: tile k of 16 rows i is at first + i * row_tile +
// k * pair_tile, in bytes, its rows `line` apart. `next`: such rows to prefetch.
struct WeightTiles {
  const char* first;
  int64_t row_tile, pair_tile, line, deep;
  const char* next;
  int64_t next_line;
};

// The products with 32 rows of x, added to the registers 0 to 3, while `use` works on the block before; prefetches rows
// [from, to) of w.next.
template <typename Use>
inline void multiply_logits(const WeightTiles& w, const uint32_t* x, int64_t x_row_tile, Use& use,
                            const LogitBlock& before, int64_t from, int64_t to) {
  constexpr int64_t kNumbers = kTile * kTile;
  int piece = 0;
  for (int64_t k = 0; k < w.deep; ++k) {
    const char* a = w.first + k * w.pair_tile;
    _tile_stream_loadd(4, x + k * kNumbers, 4 * kTile);
    _tile_stream_loadd(5, x + x_row_tile + k * kNumbers, 4 * kTile);
    _tile_loadd(6, a, w.line);
    _tile_dpbf16ps(0, 6, 4);
    _tile_dpbf16ps(1, 6, 5);
    _tile_loadd(7, a + w.row_tile, w.line);
    _tile_dpbf16ps(2, 7, 4);
    _tile_dpbf16ps(3, 7, 5);
    for (int64_t v = from; v < to; ++v) __builtin_prefetch(w.next + v * w.next_line + k * 4 * kTile, 0, 2);
    for (; piece * w.deep < Use::kPieces * (k + 1); ++piece) {
      if (before.rows > 0) use.piece(before, piece);
    }
  }
}

constexpr int64_t kDeep = 20;       // tiles along H at a time: 32 rows of them take 40 of 48 kB of the L1 cache
constexpr int64_t kSameSet = 2048;  // bytes: lines that are a multiple of them apart share two sets of the L1 cache

// All blocks of X W^T, for `use`, which does with a block what is to be done, in Use::kPieces pieces, while the next
// one is multiplied. Rows of W stay in the L1 cache while all of x passes by: one core took 8.2 ms for 246 rows of 576
// x 49,152 if nothing was done with them, 8.4 if they were rounded and stored to the same place, and 10.4 with all
// stores (oneDNN 24).
template <typename Use>
void for_logits(const HeadBlocks& head, Use& use) {
  const Tiles ours;
  constexpr int64_t kNumbers = kTile * kTile, kBlock = kWide * kWide;
  const int64_t deep = (head.pairs + kTile - 1) / kTile, blocks = (head.rows + kWide - 1) / kWide;
  const int64_t parts = (deep + kDeep - 1) / kDeep, kept = parts > 1 ? blocks : 1;
  const int64_t line = 2 * head.weight_stride;
  uint32_t* const room = tile_room(kept * kBlock + 2 * kDeep * kNumbers);
  float (*const sums)[kWide] = reinterpret_cast<float (*)[kWide]>(room);  // [kept, 32 columns, 32 rows]
  uint32_t* const copied = room + kept * kBlock;
  const bool copies = head.pairs % kTile || line % kSameSet == 0;
  alignas(64) float biases[2][kWide] = {};  // in turns: those of the columns before are still needed
  LogitBlock made{};
  for (int64_t first = 0; first < head.columns; first += kWide) {
    const int64_t some = head.columns - first < kWide ? head.columns - first : kWide;
    float* bias = biases[first / kWide % 2];
    for (int64_t v = 0; head.bias && v < kWide; ++v) bias[v] = v < some ? head.bias[first + v] : 0.0f;
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t low = deep * part / parts, count = deep * (part + 1) / parts - low, number = low * kWide;
      const BFloat16* from = head.weight + first * head.weight_stride + number;
      const BFloat16* next =
          part + 1 < parts ? from + count * kWide : head.weight + (first + kWide) * head.weight_stride;
      WeightTiles w{reinterpret_cast<const char*>(from), kTile * line, 4 * kTile, line, count,
                    reinterpret_cast<const char*>(next), line};
      if (copies || some < kWide) {
        const int64_t left = 2 * head.pairs - number, numbers = left < count * kWide ? left : count * kWide;
        for (int64_t i = 0; i < kWide; i += kTile) {
          tiles_of_rows(from + i * head.weight_stride, head.weight_stride, some - i < kTile ? some - i : kTile, numbers,
                        copied + i * kTile * count);
        }
        w.first = reinterpret_cast<const char*>(copied);
        w.row_tile = 4 * kNumbers * count, w.pair_tile = 4 * kNumbers, w.line = 4 * kTile;
      }
      before_tiles(copied);
      for (int64_t i = 0; i < blocks; ++i) {
        float (*block)[kWide] = sums + i % kept * kWide;
        if (part == 0) {
          _tile_zero(0);
          _tile_zero(1);
          _tile_zero(2);
          _tile_zero(3);
        } else {
          _tile_loadd(0, block[0], 8 * kTile);
          _tile_loadd(1, block[0] + kTile, 8 * kTile);
          _tile_loadd(2, block[kTile], 8 * kTile);
          _tile_loadd(3, block[kTile] + kTile, 8 * kTile);
        }
        multiply_logits(w, head.x + (2 * i * deep + low) * kNumbers, deep * kNumbers, use, made, i * kWide / blocks,
                        (i + 1) * kWide / blocks);
        _tile_stored(0, block[0], 8 * kTile);
        _tile_stored(1, block[0] + kTile, 8 * kTile);
        _tile_stored(2, block[kTile], 8 * kTile);
        _tile_stored(3, block[kTile] + kTile, 8 * kTile);
        before_tiles(block);  // what they stored is read next
        made = {
            block, head.bias ? bias : nullptr, first, i * kWide, some, part + 1 < parts ? 0 : head.rows - i * kWide};
      }
    }
  }
  for (int piece = 0; made.rows > 0 && piece < Use::kPieces; ++piece) use.piece(made, piece);
}

// Rounded, in pairs.
inline __m512i interleaved(__m512 even, __m512 odd) {
  alignas(64) static const uint16_t kOrder[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                  8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_permutexvar_epi16(_mm512_load_si512(kOrder), (__m512i)_mm512_cvtne2ps_pbh(odd, even));
}

// Subtracts constants of the rows, rounds, transposes and stores.
struct StoreLogits {
  static constexpr int kPieces = 16;
  const float* minus;
  BFloat16* out;
  int64_t stride;
  __m512i turned[kWide];  // pairs of columns, of rows in the quarters of a vector

  inline __attribute__((always_inline)) void piece(const LogitBlock& block, int piece) {
    const int64_t first = piece % 2 * kTile;  // of the rows
    const int quarter = piece / 2 % 4;
    if (first >= block.rows) return;
    __m512i* lines = turned + first;
    if (piece < kPieces / 2) {  // 8 columns
      const __m512 lacks = _mm512_loadu_ps(minus + block.row + first);
      const auto rounded = [&](int v) {
        const __m512 even = _mm512_add_ps(block.at(8 * quarter + v, first), lacks);
        const __m512 odd = _mm512_add_ps(block.at(8 * quarter + v + 1, first), lacks);
        return interleaved(even, odd);
      };
      const __m512i a = rounded(0), b = rounded(2), c = rounded(4), d = rounded(6);
      const __m512i low = _mm512_unpacklo_epi32(a, b), high = _mm512_unpacklo_epi32(c, d);
      const __m512i low2 = _mm512_unpackhi_epi32(a, b), high2 = _mm512_unpackhi_epi32(c, d);
      lines[4 * quarter] = _mm512_unpacklo_epi64(low, high);
      lines[4 * quarter + 1] = _mm512_unpackhi_epi64(low, high);
      lines[4 * quarter + 2] = _mm512_unpacklo_epi64(low2, high2);
      lines[4 * quarter + 3] = _mm512_unpackhi_epi64(low2, high2);
      return;
    }
    // lines[4 i + j] holds columns 8 i to 8 i + 7 of row 4 q + j in its quarter q.
    const __m512i a = lines[quarter], b = lines[4 + quarter], c = lines[8 + quarter], d = lines[12 + quarter];
    const __m512i even_low = _mm512_shuffle_i32x4(a, b, 0x88), odd_low = _mm512_shuffle_i32x4(a, b, 0xdd);
    const __m512i even_high = _mm512_shuffle_i32x4(c, d, 0x88), odd_high = _mm512_shuffle_i32x4(c, d, 0xdd);
    const __m512i rows[4] = {
        _mm512_shuffle_i32x4(even_low, even_high, 0x88), _mm512_shuffle_i32x4(odd_low, odd_high, 0x88),
        _mm512_shuffle_i32x4(even_low, even_high, 0xdd), _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd)};
    for (int q = 0; q < 4; ++q) {
      const int64_t t = first + 4 * q + quarter;
      if (t >= block.rows) return;
      BFloat16* to = out + (block.row + t) * stride + block.column;
      if (block.columns == kWide && (reinterpret_cast<uintptr_t>(to) & 63) == 0) {
        _mm512_stream_si512(reinterpret_cast<__m512i*>(to), rows[q]);
      } else {
        _mm512_mask_storeu_epi16(to, first_numbers_of(block.columns), rows[q]);
      }
    }
  }
};

// E^t, or 0 where `keep` is not set.
inline __m512 power_where(__mmask16 keep, __m512 t) {
  return _mm512_maskz_scalef_ps(keep, exp2_polynomial(exp2_floor_fraction(VecF{t})).v, t);
}

// Of the rounded logits of every row: the sums of E^(c y - shift), the largest y, shift = c times that, and the
// label's.
struct ScanLogits {
  static constexpr int kPieces = 18;  // of 16 rows each: their largest, then 8 times the sums of 4 columns
  const LogitScan& to;

  inline __attribute__((always_inline)) void piece(const LogitBlock& block, int piece) {
    const int64_t first = piece / 9 * kTile, t = block.row + first;
    if (first >= block.rows) return;
    float *top = to.tops + t, *shift = to.shifts + t, *sum = to.sums + t;
    const __m512 c = _mm512_set1_ps(to.c), minus = _mm512_loadu_ps(to.minus + t);
    const auto y = [&](int64_t v) { return _mm512_add_ps(block.at(v, first), minus); };
    const __m512i upper = _mm512_set1_epi32(int(0xffff0000u));
    if (piece % 9 == 0) {
      find_labels(block, first);
      const __m512 lowest = _mm512_set1_ps(-kInfinity);
      __m512 largest[4] = {lowest, lowest, lowest, lowest};
      for (int64_t v = 0; v + 4 <= block.columns; v += 4) {
        for (int k = 0; k < 4; ++k) largest[k] = _mm512_max_ps(y(v + k), largest[k]);
      }
      for (int64_t v = block.columns & ~3; v < block.columns; ++v) largest[0] = _mm512_max_ps(y(v), largest[0]);
      __m512 found = _mm512_max_ps(_mm512_max_ps(largest[0], largest[1]), _mm512_max_ps(largest[2], largest[3]));
      found = rounded_pairs(found, found, upper).even;
      const __m512 before = _mm512_loadu_ps(top);
      const __mmask16 higher = _mm512_cmp_ps_mask(found, before, _CMP_GT_OQ);
      if (!higher) return;
      const __m512 old = _mm512_loadu_ps(shift), raised = _mm512_mul_ps(c, found);
      // Where nothing but -inf came before, the sum is 0 (or NaN) and has no shift.
      const __mmask16 any = _mm512_mask_cmp_ps_mask(higher, before, lowest, _CMP_GT_OQ);
      const __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(sum), power_where(0xffff, _mm512_sub_ps(old, raised)));
      _mm512_mask_storeu_ps(sum, any, scaled);
      _mm512_mask_storeu_ps(shift, higher, raised);
      _mm512_mask_storeu_ps(top, higher, found);
      return;
    }
    const __m512 minus_shift = _mm512_sub_ps(_mm512_setzero_ps(), _mm512_loadu_ps(shift));
    const int64_t column = (piece % 9 - 1) * 4;
    __m512 parts[4];
    for (int k = 0; k < 4; k += 2) {
      const TwoRounded both = rounded_pairs(y(column + k), y(column + k + 1), upper);
      const __mmask16 keep = column + k < block.columns ? 0xffff : 0;
      const __mmask16 keep_odd = column + k + 1 < block.columns ? 0xffff : 0;
      parts[k] = power_where(keep, _mm512_fmadd_ps(both.even, c, minus_shift));
      parts[k + 1] = power_where(keep_odd, _mm512_fmadd_ps(both.odd, c, minus_shift));
    }
    const __m512 added = _mm512_add_ps(_mm512_add_ps(parts[0], parts[1]), _mm512_add_ps(parts[2], parts[3]));
    _mm512_storeu_ps(sum, _mm512_add_ps(_mm512_loadu_ps(sum), added));
  }

  struct TwoRounded {
    __m512 even, odd;
  };
  static inline __attribute__((always_inline)) TwoRounded rounded_pairs(__m512 even, __m512 odd, __m512i upper) {
    const __m512i both = interleaved(even, odd);
    return {_mm512_castsi512_ps(_mm512_slli_epi32(both, 16)), _mm512_castsi512_ps(_mm512_and_si512(both, upper))};
  }

  void find_labels(const LogitBlock& block, int64_t first) const {
    const __m512i labels = _mm512_loadu_si512(to.labels + block.row + first);
    const __m512i at = _mm512_sub_epi32(labels, _mm512_set1_epi32(int(to.first_column + block.column)));
    unsigned here = _mm512_cmplt_epu32_mask(at, _mm512_set1_epi32(int(block.columns)));
    for (; here; here &= here - 1) {
      const int64_t t = first + __builtin_ctz(here), v = to.labels[block.row + t] - to.first_column - block.column;
      const float sum = block.bias ? block.sums[v][t] + block.bias[v] : block.sums[v][t];
      BFloat16 stored;
      from_float(stored, sum + to.minus[block.row + t]);
      to.at_label[block.row + t] = to_float(stored);
    }
  }
};

void logits_amx(const HeadBlocks& head, const float* minus, BFloat16* out, int64_t stride) {
  StoreLogits store{minus, out, stride, {}};
  for_logits(head, store);
  _mm_sfence();
}

void scan_logits(const HeadBlocks& head, const LogitScan& to) {
  const int64_t whole = (head.rows + kWide - 1) / kWide * kWide;
  for (int64_t t = 0; t < whole; ++t) to.tops[t] = -kInfinity, to.shifts[t] = to.sums[t] = 0;
  ScanLogits scan{to};
  for_logits(head, scan);
  for (int64_t t = 0; t < whole; t += kTile) {
    const __m512 minus_shift = _mm512_sub_ps(_mm512_setzero_ps(), _mm512_loadu_ps(to.shifts + t));
    const __m512 top = _mm512_fmadd_ps(_mm512_loadu_ps(to.tops + t), _mm512_set1_ps(to.c), minus_shift);
    _mm512_storeu_ps(to.powers + t, power_where(0xffff, top));
  }
}
