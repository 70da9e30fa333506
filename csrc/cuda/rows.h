// How a row of logits is laid over threads, and moved between memory and registers.
//
// A row is cut into vectors of 16 bytes counted from its first element (Number<T>::kPer elements each), and into chunks
// of kGroup * kVectors vectors: lane l of a group of kGroup threads holds vectors l, l + kGroup, ... of a chunk. Which
// elements a lane holds, and so every bit of a row's sums, depends on nothing but the row: neither on its address, nor
// on the number of rows, nor on the kernel. In a row that does not start at a multiple of 16 bytes a warp still makes
// 16-byte accesses and shifts across its lanes; only its first and last elements move one by one.
#pragma once

#include "numbers.h"

namespace cpo {

constexpr int kVectors = 8;  // 16-byte loads in flight for each thread

template <typename T, int kGroup>
struct Layout {
  static constexpr int kPer = Number<T>::kPer;
  static constexpr int kChunkVectors = kGroup * kVectors;
  static constexpr int kChunk = kChunkVectors * kPer;  // columns
};

// Element `e` (a constant after unrolling) of a vector.
template <typename T>
CPO_DEVICE void put(Pack& v, int e, T x) {
  if constexpr (sizeof(T) == 2) {
    const uint32_t bits = x.bits, old = v.word[e / 2];
    v.word[e / 2] = e % 2 ? (old & 0xffffu) | bits << 16 : (old & 0xffff0000u) | bits;
  } else if constexpr (sizeof(T) == 4) {
    v.word[e] = bits_of(x);
  } else {
    v.word[2 * e] = low_bits_of(x);
    v.word[2 * e + 1] = high_bits_of(x);
  }
}
template <typename T>
CPO_DEVICE T get(const Pack& v, int e) {
  if constexpr (sizeof(T) == 2) {
    return {uint16_t(v.word[e / 2] >> (e % 2 * 16))};
  } else if constexpr (sizeof(T) == 4) {
    return float_of(v.word[e]);
  } else {
    return double_of(v.word[2 * e], v.word[2 * e + 1]);
  }
}

// 16 bytes of a and b side by side, from byte `bytes` of a on (0 < bytes < 16).
CPO_DEVICE Pack join(const Pack& a, const Pack& b, int bytes) {
  uint32_t w[8];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    w[i] = a.word[i];
    w[i + 4] = b.word[i];
  }
#pragma unroll
  for (int i = 0; i < 6; ++i) w[i] = bytes & 8 ? w[i + 2] : w[i];
#pragma unroll
  for (int i = 0; i < 5; ++i) w[i] = bytes & 4 ? w[i + 1] : w[i];
  Pack v;
#pragma unroll
  for (int i = 0; i < 4; ++i) v.word[i] = uint32_t((uint64_t(w[i + 1]) << 32 | w[i]) >> (bytes % 4 * 8));
  return v;
}

// Elements by which a row's start lies behind a multiple of 16 bytes.
template <typename T>
CPO_DEVICE int offset_of(const T* row) {
  return int(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T));
}

// Vector k of a row at `offset` > 0; `full` vectors are whole. Lane l of the warp asks for vector k0 + l.
// The aligned 16 bytes at vector k's start less `offset` hold the last elements of vector k - 1 and the first of k.
template <typename T>
CPO_DEVICE Pack load_shifted(const T* row, int offset, int k, int full) {
  constexpr int kPer = Number<T>::kPer;
  const int lane = thread_index() % kWarp, whole = full - (k - lane);  // vectors of this warp
  const int last = (whole < kWarp ? whole : kWarp) - 1;
  Pack v = Number<T>::lowest();
  if (lane > 0 && lane < whole) v = load16(row + k * kPer - offset);
  v = join(v, shuffle_down(v), offset * int(sizeof(T)));
#pragma unroll
  for (int e = 0; e < kPer; ++e) {
    const bool first_half = e < kPer - offset;
    if (lane < whole && ((lane == 0 && first_half) || (lane == last && !first_half))) put<T>(v, e, row[k * kPer + e]);
  }
  return lane < whole ? v : Number<T>::lowest();
}
template <typename T>
CPO_DEVICE void store_shifted(T* row, int offset, int k, int full, const Pack& v) {
  constexpr int kPer = Number<T>::kPer;
  const int lane = thread_index() % kWarp, whole = full - (k - lane);
  const int last = (whole < kWarp ? whole : kWarp) - 1;
  const Pack shifted = join(shuffle_up(v), v, (kPer - offset) * int(sizeof(T)));
  if (lane > 0 && lane < whole) store16(row + k * kPer - offset, shifted);
#pragma unroll
  for (int e = 0; e < kPer; ++e) {
    const bool first_half = e < kPer - offset;
    if (lane < whole && ((lane == 0 && first_half) || (lane == last && !first_half))) row[k * kPer + e] = get<T>(v, e);
  }
}

// Which of a lane's vectors of a chunk is vector k of the row; kVectors if none.
template <int kGroup>
CPO_DEVICE int slot_of(int k, int chunk, int lane) {
  const int distance = k - chunk * kGroup * kVectors;
  const bool mine = distance >= 0 && distance < kGroup * kVectors && distance % kGroup == lane;
  return mine ? distance / kGroup : kVectors;
}

// A lane's vectors of a chunk; -inf beyond the row's `columns`.
template <typename T, int kGroup>
CPO_DEVICE void load_chunk(const T* row, int columns, int chunk, int lane, Pack (&v)[kVectors]) {
  constexpr int kPer = Number<T>::kPer;
  const int full = columns / kPer, first = chunk * kGroup * kVectors + lane, offset = offset_of(row);
  if (offset == 0) {
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      const int k = first + j * kGroup;
      v[j] = k < full ? load16(row + k * kPer) : Number<T>::lowest();
    }
  } else {
#pragma unroll
    for (int j = 0; j < kVectors; ++j) v[j] = load_shifted(row, offset, first + j * kGroup, full);
  }
  const int slot = slot_of<kGroup>(full, chunk, lane);  // of the vector that is not whole
  if (slot < kVectors && full * kPer < columns) {
    Pack tail = Number<T>::lowest();
#pragma unroll
    for (int e = 0; e < kPer - 1; ++e) {
      if (full * kPer + e < columns) put<T>(tail, e, row[full * kPer + e]);
    }
#pragma unroll
    for (int j = 0; j < kVectors; ++j) v[j] = j == slot ? tail : v[j];
  }
}

template <typename T, int kGroup>
CPO_DEVICE void store_chunk(T* row, int columns, int chunk, int lane, const Pack (&v)[kVectors]) {
  constexpr int kPer = Number<T>::kPer;
  const int full = columns / kPer, first = chunk * kGroup * kVectors + lane, offset = offset_of(row);
  if (offset == 0) {
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      const int k = first + j * kGroup;
      if (k < full) store16(row + k * kPer, v[j]);
    }
  } else {
#pragma unroll
    for (int j = 0; j < kVectors; ++j) store_shifted(row, offset, first + j * kGroup, full, v[j]);
  }
  const int slot = slot_of<kGroup>(full, chunk, lane);
  if (slot < kVectors && full * kPer < columns) {
    Pack tail = v[0];
#pragma unroll
    for (int j = 1; j < kVectors; ++j) tail = j == slot ? v[j] : tail;
#pragma unroll
    for (int e = 0; e < kPer - 1; ++e) {
      if (full * kPer + e < columns) row[full * kPer + e] = get<T>(tail, e);
    }
  }
}

// Element `column` of a row, where this lane holds it: its slot and place, read and replaced without indexing
// registers at run time.
struct Spot {
  int slot;  // kVectors: another lane's
  int element;
};
template <typename T, int kGroup>
CPO_DEVICE Spot spot_of(int column, int chunk, int lane) {
  constexpr int kPer = Number<T>::kPer;
  return {slot_of<kGroup>(column / kPer, chunk, lane), column % kPer};
}
template <typename T>
CPO_DEVICE AccOf<T> element_at(const Pack (&v)[kVectors], Spot spot) {
  AccOf<T> x[Number<T>::kPer], found = 0;
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    Number<T>::unpack(v[j], x);
#pragma unroll
    for (int e = 0; e < Number<T>::kPer; ++e) found = j == spot.slot && e == spot.element ? x[e] : found;
  }
  return found;
}
template <typename T>
CPO_DEVICE void replace_at(Pack (&v)[kVectors], Spot spot, AccOf<T> value) {
  AccOf<T> all[Number<T>::kPer];
#pragma unroll
  for (int e = 0; e < Number<T>::kPer; ++e) all[e] = value;
  const Pack rounded = Number<T>::pack(all);
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
#pragma unroll
    for (int e = 0; e < Number<T>::kPer; ++e) {
      if (j == spot.slot && e == spot.element) put<T>(v[j], e, get<T>(rounded, e));
    }
  }
}

}  // namespace cpo
