// What the kernels need of the machine: threads, barriers, shuffles, clusters, 16-byte accesses, conversions, launches.
// tests/host_cuda/host_device.h gives the same names on a CPU; no other file here knows the difference.
#pragma once

#include <cstdint>

namespace cpo {

constexpr int kWarp = 32;

struct alignas(16) Pack {  // one 16-byte access
  uint32_t word[4];
};

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

struct DeviceInfo {
  int multiprocessors;
  bool clusters;  // thread-block clusters: compute capability 9.0 and up
};

// Where a kernel runs. `cluster` blocks, a divisor of `grid`, share their shared memory.
struct LaunchShape {
  int64_t grid;
  int block;
  int cluster;
  int shared_bytes;
  void* stream;
};

constexpr int64_t kMaxGrid = 2147483647;  // blocks in x; y and z would stop at 65,535

}  // namespace cpo

#ifdef CPO_HOST_CUDA
#include "host_device.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <sstream>
#include <stdexcept>

#define CPO_DEVICE __device__ __forceinline__
// A kernel of up to `threads` threads a block, `blocks` of them at once on a multiprocessor.
#define CPO_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)

namespace cpo {

// ---- threads --------------------------------------------------------------------------------------------------------

CPO_DEVICE int thread_index() { return threadIdx.x; }
CPO_DEVICE int block_size() { return blockDim.x; }
CPO_DEVICE int64_t block_index() { return blockIdx.x; }
CPO_DEVICE int64_t grid_size() { return gridDim.x; }
CPO_DEVICE void sync_block() { __syncthreads(); }

// The block's shared memory: LaunchShape::shared_bytes.
template <typename T>
CPO_DEVICE T* shared() {
  extern __shared__ __align__(16) unsigned char cpo_shared_memory[];
  return reinterpret_cast<T*>(cpo_shared_memory);
}

// ---- clusters -------------------------------------------------------------------------------------------------------

CPO_DEVICE int cluster_size() {
#if __CUDA_ARCH__ >= 900
  return __clusterSizeInBlocks();
#else
  return 1;
#endif
}
CPO_DEVICE int cluster_rank() {
#if __CUDA_ARCH__ >= 900
  return __clusterRelativeBlockRank();
#else
  return 0;
#endif
}
// Every thread of the cluster arrives once and waits once; what was written before an arrival is seen after the wait.
CPO_DEVICE void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
CPO_DEVICE void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
// The same address in the shared memory of block `rank` of the cluster.
template <typename T>
CPO_DEVICE T* cluster_shared(T* pointer, int rank) {
#if __CUDA_ARCH__ >= 900
  return static_cast<T*>(__cluster_map_shared_rank(pointer, rank));
#else
  return pointer;
#endif
}

// ---- shuffles of any struct of 32-bit words, by whole warps ---------------------------------------------------------

template <typename T, typename Shuffle>
CPO_DEVICE T shuffle_words(T value, Shuffle&& shuffle) {
  static_assert(sizeof(T) % 4 == 0, "shuffles move 32-bit words");
  union Words {
    T value;
    uint32_t word[sizeof(T) / 4];
    CPO_DEVICE Words(T v) : value(v) {}
  } words(value);
#pragma unroll
  for (int i = 0; i < int(sizeof(T) / 4); ++i) words.word[i] = shuffle(words.word[i]);
  return words.value;
}
template <typename T>
CPO_DEVICE T shuffle_xor(T value, int mask) {
  return shuffle_words(value, [=](uint32_t w) { return __shfl_xor_sync(0xffffffffu, w, mask); });
}
template <typename T>
CPO_DEVICE T shuffle_up(T value) {
  return shuffle_words(value, [=](uint32_t w) { return __shfl_up_sync(0xffffffffu, w, 1); });
}
template <typename T>
CPO_DEVICE T shuffle_down(T value) {
  return shuffle_words(value, [=](uint32_t w) { return __shfl_down_sync(0xffffffffu, w, 1); });
}

// ---- memory ---------------------------------------------------------------------------------------------------------

CPO_DEVICE Pack load16(const void* p) {
  const uint4 v = *static_cast<const uint4*>(p);
  return {{v.x, v.y, v.z, v.w}};
}
CPO_DEVICE void store16(void* p, const Pack& v) {
  *static_cast<uint4*>(p) = make_uint4(v.word[0], v.word[1], v.word[2], v.word[3]);
}

// ---- numbers --------------------------------------------------------------------------------------------------------

// 2^t, about 2 ulp; below 2^-126 it is 0.
CPO_DEVICE float exp2_approx(float t) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(t));
  return y;
}
CPO_DEVICE float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// Products and sums that are never contracted into one fma: combining two partial sums must not depend on their order.
CPO_DEVICE float mul_rn(float a, float b) { return __fmul_rn(a, b); }
CPO_DEVICE double mul_rn(double a, double b) { return __dmul_rn(a, b); }
CPO_DEVICE float add_rn(float a, float b) { return __fadd_rn(a, b); }
CPO_DEVICE double add_rn(double a, double b) { return __dadd_rn(a, b); }

CPO_DEVICE void unpack_half2(uint32_t w, float& low, float& high) {
  const float2 f = __half22float2(*reinterpret_cast<const __half2*>(&w));
  low = f.x;
  high = f.y;
}
CPO_DEVICE uint32_t pack_half2(float low, float high) {
  const __half2 h = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&h);
}
CPO_DEVICE uint32_t pack_bfloat2(float low, float high) {
  const __nv_bfloat162 b = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&b);
}
CPO_DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }
CPO_DEVICE uint32_t bits_of(float x) { return __float_as_uint(x); }
CPO_DEVICE double double_of(uint32_t low, uint32_t high) { return __hiloint2double(int(high), int(low)); }
CPO_DEVICE uint32_t low_bits_of(double x) { return uint32_t(__double2loint(x)); }
CPO_DEVICE uint32_t high_bits_of(double x) { return uint32_t(__double2hiint(x)); }

// ---- the host's side ------------------------------------------------------------------------------------------------

inline void check_cuda(cudaError_t status, const char* op, const char* call) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // or the next, innocent call reports it
  std::ostringstream message;
  message << op << ": " << call << " failed: " << cudaGetErrorString(status) << " (" << cudaGetErrorName(status) << ")";
  throw std::runtime_error(message.str());
}

inline DeviceInfo device_info(const char* op, int device) {
  DeviceInfo info{};
  int clusters = 0;
  check_cuda(cudaDeviceGetAttribute(&info.multiprocessors, cudaDevAttrMultiProcessorCount, device), op,
             "cudaDeviceGetAttribute(MultiProcessorCount)");
  check_cuda(cudaDeviceGetAttribute(&clusters, cudaDevAttrClusterLaunch, device), op,
             "cudaDeviceGetAttribute(ClusterLaunch)");
  info.clusters = clusters != 0;
  return info;
}

// Waits for the stream, then reads.
inline void copy_to_host(const char* op, void* to, const void* from, size_t bytes, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  check_cuda(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, s), op, "cudaMemcpyAsync to the host");
  check_cuda(cudaStreamSynchronize(s), op, "cudaStreamSynchronize");
}

template <typename... Parameters, typename... Arguments>
void launch(const char* op, const LaunchShape& shape, void (*kernel)(Parameters...), const Arguments&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(shape.grid));
  config.blockDim = dim3(unsigned(shape.block));
  config.dynamicSmemBytes = size_t(shape.shared_bytes);
  config.stream = static_cast<cudaStream_t>(shape.stream);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = unsigned(shape.cluster);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  config.attrs = &attribute;
  config.numAttrs = shape.cluster > 1 ? 1 : 0;
  std::ostringstream call;
  call << "launch (grid " << shape.grid << ", block " << shape.block << ", cluster " << shape.cluster
       << ", shared memory " << shape.shared_bytes << ")";
  check_cuda(cudaLaunchKernelEx(&config, kernel, arguments...), op, call.str().c_str());
}

}  // namespace cpo
#endif
