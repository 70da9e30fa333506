// What the row kernels of all instruction sets share with their callers. Plain data only: kernel files are compiled
// with other processor flags than the rest, so no inline code may be shared with them.
#pragma once

#include <cstdint>

namespace cpo {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// z = nat * y with y = tanh(inner * logit + offset) under a softcap and y = logit without: nat = softcap or scale,
// inner = scale / softcap, offset = inner * the row's subtracted constant. The kernels work with t = c * y - shift,
// in units of log 2 for float32 accumulation (c = nat * log2(e) rounded to float32) and of 1 for float64 (c = nat), so
// that e^(z - ...) = E^t with E = 2 or e.
struct RowMap {
  double nat;
  double c;
  double inner;
  double offset;
  bool softcap;
};

// Sums over some columns of a row, relative to E^shift, where shift is c * max_y rounded.
struct Partial {
  double shift;
  double max_y;
  double top;     // E^t at max_y, rounded as in the sums
  double sum;     // sum of E^t
  double sum_t;   // sum of t * E^t            (extras)
  double sum_sq;  // sum of E^(2t)             (extras)
  double sum_y;   // sum of y                  (extras)
};

// Rescales sums to a shift that is larger by -step, E^step = f: t becomes t + step. The sums of columns that hold the
// most negative number may have overflowed; they become 0 if f is 0, but NaN stays. Static: each instruction set has
// its own.
static inline void lower(Partial& total, double step, double f) {
  if (f == 0 && total.sum == total.sum) {
    total.sum_t = total.sum = total.sum_sq = 0;
    return;
  }
  total.sum_t = f * (total.sum_t + step * total.sum);
  total.sum *= f;
  total.sum_sq *= f * f;
}

constexpr int64_t kColumnBlock = 2048;  // its sums and maxima in float64 take 32 kB

// One table per instruction set and element type.
struct RowKernels {
  // Sums over x[0..n).
  Partial (*scan)(const void* x, int64_t n, const RowMap& map, bool extras);
  // x[i] <- E^t * (factor + per_t * t), times 1 - tanh^2 under a softcap, for i in [0, n). Prefetches `next`.
  void (*gradient)(void* x, int64_t n, const RowMap& map, double shift, double factor, double per_t, const void* next);
  // y of one logit, bitwise as in scan.
  double (*y_of)(const void* x, const RowMap& map);
  // With s_v = E^t * factor (* 1 - tanh^2) of rows x[0..rows), n <= kColumnBlock columns each, whose own offsets
  // replace that of the map: live[v] becomes 1 if s_v reaches eps in one of them; tail[v] (float or double) is their
  // sum if live[v] is 0, else 0. The sum of row r is added to row_sums[r].
  void (*columns)(const void* const* x, int64_t rows, int64_t n, const RowMap& map, const double* offset,
                  const double* shift, const double* factor, double eps, uint8_t* live, void* tail, double* row_sums);
  // out[i] = -s of column columns[i], i in [0, n); returns the sum of the unrounded s.
  double (*gather)(const void* x, const int64_t* columns, int64_t n, const RowMap& map, double shift, double factor,
                   void* out);
  // out[i] = sum_k factors[k] * terms[k][i] + sum_j made[j][i], i in [0, n), rounded once. factors and terms are float
  // or double; terms are in the order of `in_lane_order`.
  void (*sum_rows)(void* out, int64_t n, const void* factors, const void* const* terms, int64_t num_terms,
                   const void* const* made, int64_t num_made);
  void (*in_lane_order)(const void* from, void* to, int64_t n);
};

// Blocks of matmuls of bfloat16 numbers, summed in float32. A pair is two neighbours along the inner dimension in 32
// bits, the first one in the low half.
constexpr int64_t kPanel = 64;  // columns
constexpr int64_t kTile = 16;   // rows, pairs and columns of a tile of AMX

// Some rows of a head's weight, the columns of its logits, and rows of x.
struct HeadBlocks {
  const BFloat16* weight;
  int64_t weight_stride, columns;
  const uint32_t* x;  // as from pack_x, panels of rows
  int64_t pairs, rows;
  const float* bias;  // of the columns, or null
};

// What to find of the rows' logits in some columns, as they would be stored: c y as in RowMap, from columns beginning
// with first_column. Whole panels of rows.
struct LogitScan {
  float c;
  const float* minus;     // added before rounding
  const int32_t* labels;  // column of the head, or -1
  int64_t first_column;
  float *tops, *shifts, *powers, *sums;  // as in Partial
  float* at_label;                       // y of the label, if it is here
};

struct Bf16Matmul {
  // Without AMX, else null: c[r][0 .. kPanel * panels) += a b. Pair p of row r of a is at r * row_stride + p *
  // pair_stride, in bytes; b [panels, pairs, kPanel] holds pairs.
  void (*add)(const void* a, int64_t row_stride, int64_t pair_stride, int64_t rows, const uint32_t* b, int64_t pairs,
              int64_t panels, float* const* c);
  // The pairs of two rows of n numbers, zeros up to whole panels; a panel begins panel_stride pairs behind the one
  // before. high may be null, for zeros.
  void (*pack_pairs)(const BFloat16* low, const BFloat16* high, int64_t n, uint32_t* out, int64_t panel_stride);
  // A panel of `rows` rows of x as `logits` takes it: kPanel times `width` / 2 pairs, rounded up to kTile.
  void (*pack_x)(const BFloat16* x, int64_t rows, int64_t width, uint32_t* out);
  // out[t][v] = sum over pairs of weight[v] x[t], + bias[v] + minus[t]. Rows of weight are 2 * pairs numbers; minus
  // with whole panels.
  void (*logits)(const HeadBlocks& head, const float* minus, BFloat16* out, int64_t stride);
  // to[i] = factor * from[i], rounded.
  void (*round_row)(const float* from, int64_t n, float factor, BFloat16* to);
  // Float32 as its upper and lower 16 bits.
  void (*split_row)(const float* from, int64_t n, BFloat16* high, uint16_t* low);
  void (*join_row)(const BFloat16* high, const uint16_t* low, int64_t n, float* to);
  void (*scale_row)(const BFloat16* from, int64_t n, float factor, BFloat16* to);
  // to[i] += factor * x[i] - rounded * round(scale * x[i])
  void (*add_row)(const BFloat16* x, int64_t n, float factor, float rounded, float scale, float* to);

  // Products of whole blocks with AMX, else null. Operands are tiles [kTile, kTile] of pairs, with zeros beyond their
  // edges: of a [tiles of rows, tiles of pairs], of b [tiles of columns, tiles of pairs]. Tiles of columns are
  // multiplied in twos: b and the sums have one more where their number is odd.
  void (*tiles_of_rows)(const BFloat16* a, int64_t stride, int64_t rows, int64_t inner, uint32_t* out);
  // Numbers [first, first + n) of `inner` rows: as the rows of a, and as the columns of b.
  void (*tiles_of_columns)(const BFloat16* const* rows, int64_t inner, int64_t first, int64_t n, uint32_t* out);
  void (*tiles_of_b)(const BFloat16* const* rows, int64_t inner, int64_t first, int64_t n, uint32_t* out);
  // sums [tiles of columns / 2, tiles of rows, 2, kTile, kTile] += a b
  void (*add_tiles)(const uint32_t* a, const uint32_t* b, int64_t row_tiles, int64_t column_tiles, int64_t pair_tiles,
                    float* sums);
  // The same where row i of the sums, i in [0, rows), is at sums[i].
  void (*add_tiles_to_rows)(const uint32_t* a, const uint32_t* b, int64_t rows, int64_t column_tiles,
                            int64_t pair_tiles, float* const* sums);
  // With AMX, else null.
  void (*scan_logits)(const HeadBlocks& head, const LogitScan& to);
};

enum ElementType { kFloat32, kBFloat16, kFloat16, kFloat64, kElementTypes };

struct IsaKernels {
  RowKernels rows[kElementTypes];
  Bf16Matmul matmul;  // null functions without bfloat16 instructions
};

const IsaKernels* kernels_portable();
#ifdef CPO_X86
const IsaKernels* kernels_avx2();
const IsaKernels* kernels_avx512();
const IsaKernels* kernels_avx512bf16();
const IsaKernels* kernels_amx();  // null if the compiler did not know AMX
#endif

}  // namespace cpo
