// The layout of a row of logits, and which of its columns a thread holds.
//
// A row is `head` columns up to its first 16-byte boundary, `vectors` of 16 bytes, and fewer than kPer columns after
// them. Threads are numbered over all blocks that share a row: thread `first` of `stride` holds the vectors first,
// first + stride, ... in chunks of kVectors, and the first few threads hold one of the outer columns each, the edges.
#pragma once

#include "numbers.h"

namespace cpo::cuda {

// Vectors of a chunk: the 16-byte loads that a thread has in flight. kStreamed is enough for a single sweep. A thread
// of the fused kernel keeps its last chunk in registers: as many vectors as 64 registers hold without spills (with nvcc
// 13.0 for every target: 8, or 5 with a softcap or the extras).
constexpr int kStreamed = 4;
constexpr int kHeldPlain = 8, kHeldBeside = 5;

// What all rows share. z = nat * y, with y = tanh(inner * logit) under a softcap and y = logit without.
// Exponentials are E^(c y - shift), E = 2 for float (one instruction) and e for double: c = nat / log E.
//
// With anchors, the constant anchors[i] was subtracted from row i. Under a softcap y = tanh(inner * logit + offset);
// without one all y of the row lack the constant too, and it is added to the row's outputs.
template <typename T>
struct Problem {
  T* logits;              // [rows, width], `stride` elements from row to row
  const int64_t* labels;  // [rows]
  int64_t rows, stride, ignore_index;
  int width, columns;  // the vocabulary is the first `columns`
  AccOf<T> nat, c, inner, scale;
  const AccOf<T>* anchors;  // [2, rows], the subtracted constants and the exact logits of the labels; or null
};

// The offset added to inner * logit in row i. Kernels that are not kAnchored have no anchors; kAnchored ones may have.
template <bool kSoftcap, bool kAnchored, typename T>
CPO_DEVICE AccOf<T> offset_of(const Problem<T>& p, int64_t i) {
  return kSoftcap && kAnchored && p.anchors ? p.anchors[i] * p.inner : AccOf<T>(0);
}

// The constant that the y of row i lack.
template <bool kSoftcap, bool kAnchored, typename T>
CPO_DEVICE AccOf<T> lacking(const Problem<T>& p, int64_t i) {
  return !kSoftcap && kAnchored && p.anchors ? p.anchors[i] : AccOf<T>(0);
}

// The exact logit of the label of row i, less the constant of the row, like the stored ones.
template <typename T>
CPO_DEVICE AccOf<T> exact_logit(const Problem<T>& p, int64_t i) {
  return p.anchors[p.rows + i] - p.anchors[i];
}

template <typename T>
struct Row {
  static constexpr int kPer = Number<T>::kPer;
  T* start;
  int columns, head, vectors;

  CPO_DEVICE Row(T* start_, int columns_) : start(start_), columns(columns_) {
    const int to_boundary = int((16 - reinterpret_cast<uintptr_t>(start_) % 16) % 16 / sizeof(T));
    head = to_boundary < columns_ ? to_boundary : columns_;
    vectors = (columns_ - head) / kPer;
  }
  CPO_DEVICE T* vector(int k) const { return start + head + int64_t(k) * kPer; }
};

template <int kThreads, int kVectors>
struct Part {
  int first, stride;

  CPO_DEVICE Part(int share, int shares) : first(share * kThreads + thread_index()), stride(shares * kThreads) {}
  template <typename T>
  CPO_DEVICE int chunks(const Row<T>& row) const {
    return (row.vectors + stride * kVectors - 1) / (stride * kVectors);
  }
  CPO_DEVICE int vector(int chunk, int j) const { return first + (chunk * kVectors + j) * stride; }
  // The column outside the vectors that this thread holds, or -1.
  template <typename T>
  CPO_DEVICE int edge(const Row<T>& row) const {
    const int column = first < row.head ? first : row.vectors * Row<T>::kPer + first;
    return first < 2 * Row<T>::kPer && column < row.columns ? column : -1;
  }
  template <typename T>
  CPO_DEVICE bool owns(const Row<T>& row, int column) const {
    const int k = (column - row.head) / Row<T>::kPer;
    const bool inside = column >= row.head && k < row.vectors;
    return inside ? k % stride == first : column >= 0 && column == edge(row);
  }
  template <typename T>
  CPO_DEVICE void load(const Row<T>& row, int chunk, Pack (&v)[kVectors]) const {
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      const int k = vector(chunk, j);
      if (k < row.vectors) v[j] = load16(row.vector(k));
    }
  }
  // Zeros.
  template <typename T>
  CPO_DEVICE void clear(const Row<T>& row) const {
    for (int k = first; k < row.vectors; k += stride) store16(row.vector(k), Pack{});
    const int column = edge(row);
    if (column >= 0) row.start[column] = T{};
  }
};

}  // namespace cpo::cuda
