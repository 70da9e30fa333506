// The host emulation of csrc/cuda/device.h: the same names on a CPU, so that the kernel sources run where there is no
// GPU. Define CPO_HOST_CUDA and include this folder. One of two engines runs the threads of a cluster (or lone block):
//
//   fibers (default)         one OS thread; between two barriers the fibers run in an order drawn from `host_seed`.
//   CPO_HOST_THREADS         real threads, for ThreadSanitizer and AddressSanitizer; small blocks, it is slow.
//
// Seen: results that depend on the order of threads, races on shared and global memory (ThreadSanitizer), accesses
// out of bounds (AddressSanitizer; shared memory is a heap block of exactly its size), misaligned 16-byte accesses,
// shared memory read before it is written (it starts as NaN), threads that wait at different barriers (deadlock).
// Not seen: a missing __syncwarp or wrong shuffle mask (a shuffle here is a barrier of the warp), weak memory order
// (a cluster barrier here orders everything), registers, and what ptxas makes of it. compute-sanitizer sees those.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#define CPO_DEVICE inline
#define CPO_KERNEL(threads, blocks) void

namespace cpo::cuda {

using std::copysign, std::exp, std::expm1, std::fabs, std::fma, std::fmax, std::isnan, std::log;

[[noreturn]] inline void host_fail(const char* what) {
  std::fprintf(stderr, "host_cuda: %s\n", what);
  std::abort();
}

constexpr int kLaneBytes = 64;  // the largest struct that a shuffle moves

struct HostBarrier;
struct HostWarp;
struct HostBlock;
struct HostCluster;
struct HostThread {
  int index;
  HostBlock* block;
  long cluster_ticket;  // of its last cluster_arrive; -1: it has waited
  int shuffles;
};
HostThread& self();

}  // namespace cpo::cuda

#ifdef CPO_HOST_THREADS
#include "host_threads.h"
#else
#include "host_fibers.h"
#endif

namespace cpo::cuda {

struct HostWarp {
  HostBarrier barrier;
  alignas(16) unsigned char lane[2][kWarp][kLaneBytes];  // two, in turn: one barrier a shuffle is enough
};
struct HostBlock {
  int64_t index;
  int rank;
  HostCluster* cluster;
  HostBarrier barrier;
  std::unique_ptr<HostWarp[]> warps;
  std::unique_ptr<unsigned char[]> shared;
};
struct HostCluster {
  LaunchShape shape;
  HostBarrier barrier;
  std::vector<HostBlock> blocks;

  explicit HostCluster(const LaunchShape& s) : shape(s), blocks(s.cluster) {
    barrier.expected = s.cluster * s.block;
    for (int rank = 0; rank < s.cluster; ++rank) {
      HostBlock& block = blocks[rank];
      block.rank = rank;
      block.cluster = this;
      block.barrier.expected = s.block;
      block.warps.reset(new HostWarp[s.block / kWarp]);
      for (int w = 0; w < s.block / kWarp; ++w) block.warps[w].barrier.expected = kWarp;
      block.shared.reset(new unsigned char[s.shared_bytes]);
    }
  }
  // The blocks that follow `first` in the grid, with fresh shared memory: NaN in every floating type.
  void begin(int64_t first) {
    for (HostBlock& block : blocks) {
      block.index = first + block.rank;
      std::memset(block.shared.get(), 0xff, shape.shared_bytes);
    }
  }
};

// ---- threads --------------------------------------------------------------------------------------------------------

inline int thread_index() { return self().index; }
inline int block_size() { return self().block->cluster->shape.block; }
inline int64_t block_index() { return self().block->index; }
inline int64_t grid_size() { return self().block->cluster->shape.grid; }
inline void sync_block() {
  HostBarrier& barrier = self().block->barrier;
  barrier.wait(barrier.arrive());
}

template <typename T>
T* shared() {
  return reinterpret_cast<T*>(self().block->shared.get());
}

template <typename T>
T shuffle_xor(T value, int mask) {
  static_assert(sizeof(T) % 4 == 0 && sizeof(T) <= kLaneBytes, "shuffles move up to 16 words");
  HostWarp& warp = self().block->warps[self().index / kWarp];
  const int lane = self().index % kWarp, turn = self().shuffles++ % 2;
  std::memcpy(warp.lane[turn][lane], &value, sizeof(T));
  warp.barrier.wait(warp.barrier.arrive());
  std::memcpy(&value, warp.lane[turn][lane ^ mask], sizeof(T));
  return value;
}

// ---- clusters -------------------------------------------------------------------------------------------------------

inline int cluster_size() { return self().block->cluster->shape.cluster; }
inline int cluster_rank() { return self().block->rank; }
inline void cluster_arrive() {
  if (self().cluster_ticket >= 0) host_fail("cluster_arrive twice without cluster_wait");
  self().cluster_ticket = self().block->cluster->barrier.arrive();
}
inline void cluster_arrive_relaxed() { cluster_arrive(); }
inline void cluster_wait() {
  if (self().cluster_ticket < 0) host_fail("cluster_wait without cluster_arrive");
  self().block->cluster->barrier.wait(self().cluster_ticket);
  self().cluster_ticket = -1;
}
template <typename T>
T* cluster_shared(T* pointer, int rank) {
  HostBlock& mine = *self().block;
  if (rank < 0 || rank >= mine.cluster->shape.cluster) host_fail("cluster_shared of a rank outside the cluster");
  const auto offset = reinterpret_cast<unsigned char*>(pointer) - mine.shared.get();
  return reinterpret_cast<T*>(mine.cluster->blocks[rank].shared.get() + offset);
}

// ---- memory ---------------------------------------------------------------------------------------------------------

inline void check_aligned(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 16) host_fail("a 16-byte access at an address that is no multiple of 16");
}
inline Pack load16(const void* p) {
  check_aligned(p);
  Pack v;
  std::memcpy(&v, p, 16);
  return v;
}
inline void store16(void* p, const Pack& v) {
  check_aligned(p);
  std::memcpy(p, &v, 16);
}

// ---- numbers --------------------------------------------------------------------------------------------------------

namespace host {
#include "../../csrc/cpu/scalar16.h"
}

inline float exp2_approx(float t) {
  const float y = std::exp2(t);
  return y < 1.17549435e-38f ? 0.0f : y;
}
inline float reciprocal_approx(float x) { return 1.0f / x; }
inline double add_rn(double a, double b) {
  asm("" : "+m"(a), "+m"(b));  // where the compiler cannot see that one is a product
  return a + b;
}
inline float mul_rn(float a, float b) { return a * b; }  // compile with -ffp-contract=off
inline double mul_rn(double a, double b) { return a * b; }
inline void unpack_half2(uint32_t w, float& low, float& high) {
  low = host::to_float(Half{uint16_t(w)});
  high = host::to_float(Half{uint16_t(w >> 16)});
}
template <typename T>
uint32_t pack_two(float low, float high) {
  T a, b;
  host::from_float(a, low);
  host::from_float(b, high);
  return uint32_t(b.bits) << 16 | a.bits;
}
inline uint32_t pack_half2(float low, float high) { return pack_two<Half>(low, high); }
inline uint32_t pack_bfloat2(float low, float high) { return pack_two<BFloat16>(low, high); }

template <typename To, typename From>
To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}
inline float float_of(uint32_t bits) { return same_bits<float>(bits); }
inline uint32_t bits_of(float x) { return same_bits<uint32_t>(x); }
inline double double_of(uint32_t low, uint32_t high) { return same_bits<double>(uint64_t(high) << 32 | low); }
inline uint32_t low_bits_of(double x) { return uint32_t(same_bits<uint64_t>(x)); }
inline uint32_t high_bits_of(double x) { return uint32_t(same_bits<uint64_t>(x) >> 32); }

// ---- the host's side ------------------------------------------------------------------------------------------------

template <typename... Parameters, typename... Arguments>
void launch(const char*, const LaunchShape& shape, void (*kernel)(Parameters...), const Arguments&... arguments) {
  if (shape.block % kWarp || shape.block > 1024) host_fail("block size is no multiple of 32 up to 1024");
  if (shape.cluster < 1 || shape.cluster > 8 || shape.grid % shape.cluster) host_fail("cluster does not divide grid");
  if (shape.shared_bytes > 48 * 1024) host_fail("more than 48 KB of shared memory");
  if (shape.grid < 1 || shape.grid > kMaxGrid) host_fail("a grid of no blocks, or of more than 2^31 - 1");
  HostCluster cluster(shape);
  run_grid(cluster, [&] { kernel(static_cast<Parameters>(arguments)...); });
}

}  // namespace cpo::cuda
