// The kernels' interface to the GPU: threads, barriers, shuffles, clusters, 16-byte accesses, conversions, launches.
//
// A kernel file takes raw pointers, has no torch code, and uses the GPU only through this file. So
// tests/host_cuda/host_device.h can run the same sources on a CPU, with the same names and CPO_HOST_CUDA defined.
#pragma once

#include <cstdint>
#include <type_traits>

namespace cpo::cuda {

constexpr int kWarp = 32;
constexpr int64_t kMaxGrid = 2147483647;  // blocks in x; y and z would stop at 65,535

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
  bool clusters;  // blocks can share their shared memory: compute capability 9.0 and up
};

// The shape of a launch. `cluster`, a divisor of `grid`: that many blocks are resident together and can access each
// other's shared memory.
struct LaunchShape {
  int64_t grid;
  int block;
  int cluster;
  int shared_bytes;  // at most 48 KB
  void* stream;
};

// Calls run(...) with each flag as std::true_type or std::false_type.
template <typename Run>
void with_flags(const Run& run) {
  run();
}
template <typename Run, typename... Flags>
void with_flags(const Run& run, bool flag, Flags... flags) {
  if (flag) {
    with_flags([&](auto... on) { run(std::true_type{}, on...); }, flags...);
  } else {
    with_flags([&](auto... on) { run(std::false_type{}, on...); }, flags...);
  }
}

}  // namespace cpo::cuda

#ifdef CPO_HOST_CUDA
#include "host_device.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#define CPO_DEVICE __device__ __forceinline__
// A kernel of up to `threads` threads per block, with registers for `blocks` blocks on a multiprocessor.
#define CPO_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)

namespace cpo::cuda {

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

// The value of lane (lane ^ mask), of any struct of 32-bit words; all 32 lanes of the warp take part.
template <typename T>
CPO_DEVICE T shuffle_xor(T value, int mask) {
  static_assert(sizeof(T) % 4 == 0, "shuffles move 32-bit words");
  uint32_t word[sizeof(T) / 4];
  memcpy(word, &value, sizeof(T));
#pragma unroll
  for (int i = 0; i < int(sizeof(T) / 4); ++i) word[i] = __shfl_xor_sync(0xffffffffu, word[i], mask);
  memcpy(&value, word, sizeof(T));
  return value;
}

// ---- clusters: a single block is a cluster of 1 ---------------------------------------------------------------------

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
// Every thread of the cluster arrives once and waits once; writes before an arrival are visible after the wait.
// Not the `.aligned` forms, which require whole warps that have not diverged.
CPO_DEVICE void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}
// An arrival that only signals that this thread has got here, without waiting for its stores.
CPO_DEVICE void cluster_arrive_relaxed() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
#endif
}
CPO_DEVICE void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
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

// ---- memory ---------------------------------------------------------------------------------------------------------

CPO_DEVICE Pack load16(const void* p) {
  const uint4 v = *static_cast<const uint4*>(p);
  return {{v.x, v.y, v.z, v.w}};
}
// In PTX: nvcc 13.0 splits an assignment through uint4* into four stores of 4 bytes.
CPO_DEVICE void store16(void* p, const Pack& v) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)), "r"(v.word[0]),
               "r"(v.word[1]), "r"(v.word[2]), "r"(v.word[3])
               : "memory");
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
// A sum that is never contracted with a product into an fma.
CPO_DEVICE double add_rn(double a, double b) { return __dadd_rn(a, b); }
// A product that is rounded before anything is added to it: never part of an fma.
CPO_DEVICE float mul_rn(float a, float b) { return __fmul_rn(a, b); }
CPO_DEVICE double mul_rn(double a, double b) { return __dmul_rn(a, b); }
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
  cudaGetLastError();  // clears the error, which the next call would report otherwise
  throw std::runtime_error(std::string(op) + ": " + call + " failed: " + cudaGetErrorString(status) + " (" +
                           cudaGetErrorName(status) + ")");
}

// `kernel`: any of those to be launched. If built for an older target (an architecture list without 9.0), it cannot use
// clusters even if the device has them.
template <typename Kernel>
DeviceInfo device_info(const char* op, int device, Kernel kernel) {
  DeviceInfo info{};
  int clusters = 0;
  check_cuda(cudaDeviceGetAttribute(&info.multiprocessors, cudaDevAttrMultiProcessorCount, device), op,
             "cudaDeviceGetAttribute(MultiProcessorCount)");
  check_cuda(cudaDeviceGetAttribute(&clusters, cudaDevAttrClusterLaunch, device), op,
             "cudaDeviceGetAttribute(ClusterLaunch)");
  cudaFuncAttributes built{};
  check_cuda(cudaFuncGetAttributes(&built, reinterpret_cast<const void*>(kernel)), op, "cudaFuncGetAttributes");
  info.clusters = clusters != 0 && built.ptxVersion >= 90;
  return info;
}

// Synchronises with the stream, then reads.
inline void copy_to_host(const char* op, void* to, const void* from, size_t bytes, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  check_cuda(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, s), op, "cudaMemcpyAsync to the host");
  check_cuda(cudaStreamSynchronize(s), op, "cudaStreamSynchronize");
}

// The host may free the source afterwards: memory that is not page-locked is read before the call returns.
inline void copy_to_device(const char* op, void* to, const void* from, size_t bytes, void* stream) {
  check_cuda(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, static_cast<cudaStream_t>(stream)), op,
             "cudaMemcpyAsync to the device");
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
  const cudaError_t status = cudaLaunchKernelEx(&config, kernel, arguments...);
  if (status == cudaSuccess) return;
  const std::string call = "launch (grid " + std::to_string(shape.grid) + ", block " + std::to_string(shape.block) +
                           ", cluster " + std::to_string(shape.cluster) + ", shared memory " +
                           std::to_string(shape.shared_bytes) + ")";
  check_cuda(status, op, call.c_str());
}

}  // namespace cpo::cuda
#endif
