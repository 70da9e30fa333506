// live_columns, live_grads and live_sum: the columns of the vocabulary in which a set of rows has a significant
// gradient, the gradient there, and dW from the sets' products. Formulas: cpo_kernels/reference/live_columns.py; s_tv =
// softmax_tv * dz/du.
//
//   prepare   the softmax of a row, once per row instead of once per tile
//   sets      a block owns a tile of the vocabulary of one set: each warp sweeps some of its rows and keeps the largest
//             s and the sum of its columns in registers; the warps are combined at the end
//   row_sums  adds the tiles of a row in order
//   gather    one warp per row: the live columns of its set
//   find      the index of each row of dW in the products of each set: one search each, whose latency the whole grid
//             hides; in `sum` every block would wait for it again for each of its sets
//   sum       a warp holds some rows of a tile of dW in registers, walks the sets in order, and rounds once
//
// No atomics: results are bitwise reproducible. A row that does not count has factor 0, and its logits are not read.
#pragma once

#include "row_gradient.h"

namespace cpo::cuda {

constexpr int kSetThreads = 128;
constexpr int kTileVectors = 2;  // per lane: 512 16-bit columns per tile, whose maxima and sums take 32 registers
constexpr int kTileRows = 2;     // rows per warp whose loads are in flight together
constexpr int kGathered = 4;     // columns per lane whose loads are in flight together
constexpr int kSumThreads = 128;
constexpr int kSumRows = 4;  // rows of dW per warp, which share the reads of `tails`; 16-bit sums of 8 rows would spill

template <typename T>
constexpr int kTile = kWarp * kTileVectors * Number<T>::kPer;

// s = factor E^(c y - shift), times 1 - tanh^2 under a softcap; factor 0: the row does not count.
template <typename Acc>
struct RowShift {
  Acc shift, factor;
};

// The terms of a set in a row of dW: `tail` times its tails, and row `made` of the products; -1 if it has no product.
template <typename Acc>
struct alignas(2 * sizeof(Acc)) RowOfSet {
  Acc tail;
  int32_t made;
};

template <typename T>
CPO_DEVICE bool counts(const Problem<T>& p, const AccOf<T>* lse, int64_t i) {
  return p.labels[i] != p.ignore_index && fabs(lse[i]) < AccOf<T>(INFINITY);
}

// lacks [rows]: the constants that the y lack; or null.
template <typename T, int kThreads>
CPO_KERNEL(kThreads, 1)
prepare_kernel(Problem<T> p, const AccOf<T>* lse, const AccOf<T>* lacks, RowShift<AccOf<T>>* shifts) {
  const int64_t i = block_index() * kThreads + thread_index();
  if (i >= p.rows) return;
  const Softmax<AccOf<T>> s = softmax_of_lse(lse[i], lacks ? lacks[i] : AccOf<T>(0), p);
  shifts[i] = counts(p, lse, i) ? RowShift<AccOf<T>>{s.shift, s.factor * p.scale} : RowShift<AccOf<T>>{0, 0};
}

// The index in its tile of number e of vector j of this lane. Rows on 16-byte boundaries are read in vectors, others
// one number at a time, 32 neighbours together.
template <typename T, bool kWide>
CPO_DEVICE int place_in_tile(int j, int e) {
  constexpr int kPer = Number<T>::kPer;
  const int lane = thread_index() % kWarp;
  return kWide ? (j * kWarp + lane) * kPer + e : (j * kPer + e) * kWarp + lane;
}

// Vector j of a tile that begins at `first`; -inf beyond the vocabulary. It is packed on every path: unpacked numbers
// would take twice the registers until they are used.
template <typename T, bool kWide>
CPO_DEVICE Pack load_vector(const T* row, int first, int j, int columns) {
  constexpr int kPer = Number<T>::kPer;
  if (kWide && first + place_in_tile<T, kWide>(j, kPer - 1) < columns) {
    return load16(row + first + place_in_tile<T, kWide>(j, 0));
  }
  AccOf<T> x[kPer];
#pragma unroll
  for (int e = 0; e < kPer; ++e) {
    const int column = first + place_in_tile<T, kWide>(j, e);
    x[e] = column < columns ? widened(row[column]) : -AccOf<T>(INFINITY);
  }
  return Number<T>::pack(x);
}

template <typename Acc>
CPO_DEVICE Acc warp_sum(Acc x) {
#pragma unroll
  for (int mask = kWarp / 2; mask; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}

// live, tail [sets, columns], partial [tiles, rows]. Shared memory: a maximum and a sum per warp and column.
template <typename T, int kThreads, bool kSoftcap, bool kAnchored, bool kWide>
CPO_KERNEL(kThreads, (sizeof(T) == 8 ? 512 : 640) / kThreads)
sets_kernel(Problem<T> p, const RowShift<AccOf<T>>* shifts, AccOf<T> threshold, int64_t set_rows, int64_t tiles,
            bool* live, AccOf<T>* tail, AccOf<T>* partial) {
  using Acc = AccOf<T>;
  constexpr int kPer = Number<T>::kPer, kWarps = kThreads / kWarp;
  const int64_t set = block_index() / tiles, tile = block_index() % tiles;
  const int first = int(tile) * kTile<T>, warp = thread_index() / kWarp;
  const int64_t low = set * set_rows, high = low + set_rows < p.rows ? low + set_rows : p.rows;
  Acc tops[kTileVectors][kPer] = {}, sums[kTileVectors][kPer] = {};
  for (int64_t i = low + warp * kTileRows; i < high; i += kWarps * kTileRows) {
    Pack v[kTileRows][kTileVectors];
    RowShift<Acc> s[kTileRows];
#pragma unroll
    for (int r = 0; r < kTileRows; ++r) s[r] = i + r < high ? shifts[i + r] : RowShift<Acc>{0, 0};
#pragma unroll
    for (int r = 0; r < kTileRows; ++r) {
      if (s[r].factor == 0) continue;
#pragma unroll
      for (int j = 0; j < kTileVectors; ++j) {
        v[r][j] = load_vector<T, kWide>(p.logits + (i + r) * p.stride, first, j, p.columns);
      }
    }
#pragma unroll
    for (int r = 0; r < kTileRows; ++r) {
      if (i + r >= high) break;
      Acc total = 0;
      if (s[r].factor != 0) {
        const Weights<Acc> w{s[r].shift, s[r].factor, 0, offset_of<kSoftcap, kAnchored>(p, i + r)};
        const int64_t label = p.labels[i + r] - first;
        const bool has_label = label >= 0 && label < kTile<T> && label + first < p.columns;
#pragma unroll
        for (int j = 0; j < kTileVectors; ++j) {
          Acc x[kPer];
          Number<T>::unpack(v[r][j], x);
#pragma unroll
          for (int e = 0; e < kPer; ++e) {
            const Acc size = gradient_of<kSoftcap, kAnchored, false>(x[e], w, p);
            tops[j][e] = fmax(tops[j][e], size);
            sums[j][e] += size;
            total += size;
          }
        }
        if (has_label) {
#pragma unroll
          for (int j = 0; j < kTileVectors; ++j) {
#pragma unroll
            for (int e = 0; e < kPer; ++e) {
              if (place_in_tile<T, kWide>(j, e) == label) tops[j][e] = Acc(INFINITY);
            }
          }
          if (kAnchored && thread_index() % kWarp == 0) {  // `total` has the exact logit; a live column needs no sum
            const Acc stored = widened(p.logits[(i + r) * p.stride + first + label]);
            total -= gradient_of<kSoftcap, kAnchored, false>(stored, w, p);
            total += gradient_of<kSoftcap, kAnchored, false>(exact_logit(p, i + r), w, p);
          }
        }
      }
      total = warp_sum(total);
      if (thread_index() % kWarp == 0) partial[tile * p.rows + i + r] = total;
    }
  }
  Acc* const all_tops = shared<Acc>();  // [warps, tile]
  Acc* const all_sums = all_tops + kWarps * kTile<T>;
#pragma unroll
  for (int j = 0; j < kTileVectors; ++j) {
#pragma unroll
    for (int e = 0; e < kPer; ++e) {
      const int at = warp * kTile<T> + place_in_tile<T, kWide>(j, e);
      all_tops[at] = tops[j][e];
      all_sums[at] = sums[j][e];
    }
  }
  sync_block();
  for (int place = thread_index(); place < kTile<T> && first + place < p.columns; place += kThreads) {
    Acc top = all_tops[place], sum = all_sums[place];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) {
      top = fmax(top, all_tops[w * kTile<T> + place]);
      sum += all_sums[w * kTile<T> + place];
    }
    const int64_t at = set * p.columns + first + place;
    live[at] = top >= threshold;
    tail[at] = top >= threshold ? Acc(0) : sum;
  }
}

// row_sums [rows]: NaN if a row with a label has no finite lse.
template <typename T, int kThreads>
CPO_KERNEL(kThreads, 1)
row_sums_kernel(Problem<T> p, const AccOf<T>* lse, const AccOf<T>* partial, int64_t tiles, AccOf<T>* row_sums) {
  const int64_t i = block_index() * kThreads + thread_index();
  if (i >= p.rows) return;
  double total = counts(p, lse, i) || p.labels[i] == p.ignore_index ? 0.0 : double(NAN);
#pragma unroll 8
  for (int64_t tile = 0; tile < tiles; ++tile) total += double(partial[tile * p.rows + i]);
  row_sums[i] = AccOf<T>(total);
}

// [g_A, tau] of all sets, concatenated; ids [sum of a_k], offsets [sets + 1]; `blocks` per set.
template <typename T, int kThreads, bool kSoftcap, bool kAnchored>
CPO_KERNEL(kThreads, 1)
gather_kernel(Problem<T> p, const AccOf<T>* lse, const AccOf<T>* row_sums, const int64_t* ids, const int64_t* offsets,
              int64_t set_rows, int64_t blocks, T* out) {
  using Acc = AccOf<T>;
  const int lane = thread_index() % kWarp;
  const int64_t set = block_index() / blocks;
  const int64_t within = block_index() % blocks * (kThreads / kWarp) + thread_index() / kWarp;
  const int64_t i = set * set_rows + within;
  if (within >= set_rows || i >= p.rows) return;
  const int64_t first = offsets[set], count = offsets[set + 1] - first, label = p.labels[i];
  T* const g = out + set_rows * (first + set) + within * (count + 1);  // earlier sets have set_rows rows
  const T* const row = p.logits + i * p.stride;
  const bool counted = counts(p, lse, i);
  const Softmax<Acc> s = softmax_of_lse(lse[i], lacking<kSoftcap, kAnchored>(p, i), p);
  Weights<Acc> w{s.shift, s.factor * p.scale, 0, offset_of<kSoftcap, kAnchored>(p, i)};
  if (!counted) w = {0, 0, 0, 0};
  Acc x_label = 0, at_label = 0;
  if (counted && column_of(p, label) >= 0) {
    x_label = kAnchored ? exact_logit(p, i) : widened(row[label]);
    Acc slope = 1;
    const Acc y = y_and_slope<kSoftcap, kAnchored>(p, x_label, w.offset, slope);
    at_label = -expm1(fma(p.nat, y, -s.log_sum)) * p.scale * slope;
  }
  Acc total = 0;
  for (int64_t j = lane; j < count; j += kWarp * kGathered) {
    int64_t column[kGathered];
    Acc x[kGathered];
#pragma unroll
    for (int e = 0; e < kGathered; ++e) column[e] = j + e * kWarp < count ? ids[first + j + e * kWarp] : -1;
#pragma unroll
    for (int e = 0; e < kGathered; ++e) { x[e] = counted && column[e] >= 0 ? widened(row[column[e]]) : -Acc(INFINITY); }
#pragma unroll
    for (int e = 0; e < kGathered; ++e) {
      if (column[e] < 0) break;
      if (kAnchored && counted && column[e] == label) x[e] = x_label;
      const Acc size = gradient_of<kSoftcap, kAnchored, false>(x[e], w, p);
      total += size;
      g[j + e * kWarp] = rounded<T>(counted && column[e] == label ? at_label : -size);
    }
  }
  total = warp_sum(total) - row_sums[i];
  if (lane != 0) return;
  const Acc none = label == p.ignore_index ? Acc(0) : Acc(NAN);
  g[count] = rounded<T>(counted ? (total > 0 ? Acc(0) : total) : none);
}

// found [sets, padded]. If a set's ids are not sorted, a search ends at another of its rows, never outside them.
template <typename T, int kThreads>
CPO_KERNEL(kThreads, 1)
find_kernel(const T* tail, int64_t stride, int64_t columns, int64_t padded, int64_t count, const int64_t* ids,
            const int64_t* offsets, RowOfSet<AccOf<T>>* found) {
  const int64_t i = block_index() * kThreads + thread_index();
  if (i >= count) return;
  const int64_t set = i / padded, v = i % padded, end = offsets[set + 1];
  int64_t low = offsets[set];
  for (int64_t high = end; low < high;) {
    const int64_t middle = low + (high - low) / 2;
    if (ids[middle] < v) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  const AccOf<T> q = v < columns ? widened(tail[set * stride + v]) : AccOf<T>(0);
  found[i] = {q, low < end && ids[low] == v ? int32_t(low) : -1};
}

// This lane's numbers of a row of tails, in the order of load_vector; 0 beyond the row.
template <typename T, bool kWide>
CPO_DEVICE void load_tails(const AccOf<T>* row, int first, int width, AccOf<T> (&x)[Number<T>::kPer]) {
  using Acc = AccOf<T>;
  constexpr int kPer = Number<T>::kPer, kPerAcc = Number<Acc>::kPer;
  if constexpr (kWide) {
#pragma unroll
    for (int e = 0; e < kPer; e += kPerAcc) {
      Acc part[kPerAcc];
      Number<Acc>::unpack(load16(row + first + place_in_tile<T, true>(0, e)), part);
#pragma unroll
      for (int i = 0; i < kPerAcc; ++i) x[e + i] = part[i];
    }
  } else {
#pragma unroll
    for (int e = 0; e < kPer; ++e) {
      const int column = first + place_in_tile<T, false>(0, e);
      x[e] = column < width ? row[column] : Acc(0);
    }
  }
}

// out [columns, width]. Wide: rows of whole vectors on 16-byte boundaries.
template <typename T, int kThreads, bool kWide>
CPO_KERNEL(kThreads, 640 / kThreads)
sum_kernel(const RowOfSet<AccOf<T>>* found, const AccOf<T>* tails, const T* made, int64_t sets, int64_t columns,
           int64_t padded, int width, int64_t tiles, T* out) {
  using Acc = AccOf<T>;
  constexpr int kPer = Number<T>::kPer;
  const int64_t v = (block_index() / tiles * (kThreads / kWarp) + thread_index() / kWarp) * kSumRows;
  const int first = int(block_index() % tiles) * kWarp * kPer;
  if (v >= columns || first + place_in_tile<T, kWide>(0, 0) >= width) return;
  Acc total[kSumRows][kPer] = {};
  for (int64_t set = 0; set < sets; ++set) {
    RowOfSet<Acc> row[kSumRows];
    Pack part[kSumRows];
#pragma unroll
    for (int r = 0; r < kSumRows; ++r) row[r] = found[set * padded + v + r];
#pragma unroll
    for (int r = 0; r < kSumRows; ++r) {
      part[r] = {};
      if (row[r].made < 0) continue;
      const T* const line = made + int64_t(row[r].made) * width;
      part[r] =
          kWide ? load16(line + first + place_in_tile<T, true>(0, 0)) : load_vector<T, false>(line, first, 0, width);
    }
    Acc x[kPer];
    load_tails<T, kWide>(tails + set * width, first, width, x);
#pragma unroll
    for (int r = 0; r < kSumRows; ++r) {
#pragma unroll
      for (int e = 0; e < kPer; ++e) total[r][e] = fma(row[r].tail, x[e], total[r][e]);
      if (row[r].made < 0) continue;
      Acc y[kPer];
      Number<T>::unpack(part[r], y);
#pragma unroll
      for (int e = 0; e < kPer; ++e) total[r][e] += y[e];
    }
  }
#pragma unroll
  for (int r = 0; r < kSumRows; ++r) {
    if (v + r >= columns) return;
    T* const line = out + (v + r) * width + first;
    if constexpr (kWide) {
      store16(line + place_in_tile<T, true>(0, 0), Number<T>::pack(total[r]));
    } else {
#pragma unroll
      for (int e = 0; e < kPer; ++e) {
        const int place = place_in_tile<T, false>(0, e);
        if (first + place < width) line[place] = rounded<T>(total[r][e]);
      }
    }
  }
}

// ---- launches -------------------------------------------------------------------------------------------------------

inline int64_t shares(int64_t whole, int64_t part) { return (whole + part - 1) / part; }

// Numbers of the accumulation type that launch_live_columns needs in device memory.
template <typename T>
int64_t live_scratch_size(const Problem<T>& p) {
  return p.rows * (2 + shares(p.columns, kTile<T>));
}

template <typename T>
void launch_live_columns(const char* op, const Problem<T>& p, const AccOf<T>* lse, double eps, int64_t set_rows,
                         bool softcap, AccOf<T>* scratch, bool* live, AccOf<T>* tail, AccOf<T>* row_sums,
                         void* stream) {
  using Acc = AccOf<T>;
  const int64_t tiles = shares(p.columns, kTile<T>), sets = shares(p.rows, set_rows);
  auto* shifts = reinterpret_cast<RowShift<Acc>*>(scratch);
  Acc* partial = scratch + 2 * p.rows;
  const LaunchShape rows{shares(p.rows, kSumThreads), kSumThreads, 1, 0, stream};
  launch(op, rows, prepare_kernel<T, kSumThreads>, p, lse, softcap ? nullptr : p.anchors, shifts);
  const bool wide = reinterpret_cast<uintptr_t>(p.logits) % 16 == 0 && p.stride % Number<T>::kPer == 0;
  const int shared_bytes = 2 * (kSetThreads / kWarp) * kTile<T> * int(sizeof(Acc));
  const LaunchShape tiled{sets * tiles, kSetThreads, 1, shared_bytes, stream};
  const auto sweep = [&](auto capped, auto anchored, auto in_vectors) {
    launch(op, tiled, sets_kernel<T, kSetThreads, capped, anchored, in_vectors>, p, shifts, Acc(eps * p.scale),
           set_rows, tiles, live, tail, partial);
  };
  with_flags(sweep, softcap, p.anchors != nullptr, wide);
  launch(op, rows, row_sums_kernel<T, kSumThreads>, p, lse, partial, tiles, row_sums);
}

template <typename T>
void launch_live_grads(const char* op, const Problem<T>& p, const AccOf<T>* lse, const AccOf<T>* row_sums,
                       const int64_t* ids, const int64_t* offsets, int64_t set_rows, bool softcap, T* out,
                       void* stream) {
  const int64_t sets = shares(p.rows, set_rows), blocks = shares(set_rows, kSetThreads / kWarp);
  const LaunchShape shape{sets * blocks, kSetThreads, 1, 0, stream};
  const auto gather = [&](auto capped, auto anchored) {
    launch(op, shape, gather_kernel<T, kSetThreads, capped, anchored>, p, lse, row_sums, ids, offsets, set_rows, blocks,
           out);
  };
  with_flags(gather, softcap, p.anchors != nullptr);
}

constexpr int kSumBlockRows = kSetThreads / kWarp * kSumRows;

inline int64_t padded_rows(int64_t columns) { return shares(columns, kSumBlockRows) * kSumBlockRows; }

// Numbers of the accumulation type that launch_live_sum needs in device memory.
inline int64_t sum_scratch_size(int64_t sets, int64_t columns) { return 2 * sets * padded_rows(columns); }

template <typename T>
int64_t sum_tiles(int64_t width) {
  return shares(width, kWarp * Number<T>::kPer);
}

// tail [sets, columns] in rows of `stride`; columns and width are at least 1.
template <typename T>
void launch_live_sum(const char* op, const T* tail, int64_t stride, const AccOf<T>* tails, const T* made,
                     const int64_t* ids, const int64_t* offsets, int64_t sets, int64_t columns, int64_t width,
                     AccOf<T>* scratch, T* out, void* stream) {
  auto* found = reinterpret_cast<RowOfSet<AccOf<T>>*>(scratch);
  const int64_t padded = padded_rows(columns), count = sets * padded, tiles = sum_tiles<T>(width);
  if (sets > 0) {
    launch(op, {shares(count, kSumThreads), kSumThreads, 1, 0, stream}, find_kernel<T, kSumThreads>, tail, stride,
           columns, padded, count, ids, offsets, found);
  }
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  const bool wide = width % Number<T>::kPer == 0 && aligned(tails) && aligned(made) && aligned(out);
  const auto kernel = wide ? sum_kernel<T, kSetThreads, true> : sum_kernel<T, kSetThreads, false>;
  launch(op, {padded / kSumBlockRows * tiles, kSetThreads, 1, 0, stream}, kernel, found, tails, made, sets, columns,
         padded, int(width), tiles, out);
}

}  // namespace cpo::cuda
