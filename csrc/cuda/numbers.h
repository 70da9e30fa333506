// Element types: conversion of 16 bytes to numbers and back, and functions of the accumulation types.
#pragma once

#include <math.h>

#include "device.h"

namespace cpo::cuda {

// Acc: float, or double for double. kPer: elements in 16 bytes.
template <typename T>
struct Number;

template <>
struct Number<float> {
  using Acc = float;
  static constexpr int kPer = 4;
  CPO_DEVICE static void unpack(const Pack& v, float (&x)[4]) {
#pragma unroll
    for (int e = 0; e < 4; ++e) x[e] = float_of(v.word[e]);
  }
  CPO_DEVICE static Pack pack(const float (&x)[4]) {
    return {{bits_of(x[0]), bits_of(x[1]), bits_of(x[2]), bits_of(x[3])}};
  }
};

template <>
struct Number<double> {
  using Acc = double;
  static constexpr int kPer = 2;
  CPO_DEVICE static void unpack(const Pack& v, double (&x)[2]) {
    x[0] = double_of(v.word[0], v.word[1]);
    x[1] = double_of(v.word[2], v.word[3]);
  }
  CPO_DEVICE static Pack pack(const double (&x)[2]) {
    return {{low_bits_of(x[0]), high_bits_of(x[0]), low_bits_of(x[1]), high_bits_of(x[1])}};
  }
};

template <>
struct Number<BFloat16> {
  using Acc = float;
  static constexpr int kPer = 8;
  CPO_DEVICE static void unpack(const Pack& v, float (&x)[8]) {
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      x[2 * w] = float_of(v.word[w] << 16);
      x[2 * w + 1] = float_of(v.word[w] & 0xffff0000u);
    }
  }
  CPO_DEVICE static Pack pack(const float (&x)[8]) {
    return {{pack_bfloat2(x[0], x[1]), pack_bfloat2(x[2], x[3]), pack_bfloat2(x[4], x[5]), pack_bfloat2(x[6], x[7])}};
  }
};

template <>
struct Number<Half> {
  using Acc = float;
  static constexpr int kPer = 8;
  CPO_DEVICE static void unpack(const Pack& v, float (&x)[8]) {
#pragma unroll
    for (int w = 0; w < 4; ++w) unpack_half2(v.word[w], x[2 * w], x[2 * w + 1]);
  }
  CPO_DEVICE static Pack pack(const float (&x)[8]) {
    return {{pack_half2(x[0], x[1]), pack_half2(x[2], x[3]), pack_half2(x[4], x[5]), pack_half2(x[6], x[7])}};
  }
};

template <typename T>
using AccOf = typename Number<T>::Acc;

template <typename T>
CPO_DEVICE T rounded(AccOf<T> x) {
  if constexpr (sizeof(T) == 2) {
    AccOf<T> all[Number<T>::kPer] = {x};
    return {uint16_t(Number<T>::pack(all).word[0])};
  } else {
    return x;
  }
}
CPO_DEVICE float widened(float x) { return x; }
CPO_DEVICE double widened(double x) { return x; }
CPO_DEVICE float widened(BFloat16 x) { return float_of(uint32_t(x.bits) << 16); }
CPO_DEVICE float widened(Half x) {
  float low, high;
  unpack_half2(x.bits, low, high);
  return low;
}

// E^t: 2^t for float, e^t for double; kLogE is the logarithm of E.
CPO_DEVICE float exp_unit(float t) { return exp2_approx(t); }
CPO_DEVICE double exp_unit(double t) { return exp(t); }
template <typename Acc>
constexpr Acc kLogE = sizeof(Acc) == 4 ? Acc(0.6931471805599453) : Acc(1);

// tanh(u) and 1 - tanh^2(u) without cancellation: with e = exp(-2|u|) they are 1 - 2 e / (1 + e) and 4 e / (1 + e)^2;
// near 0 tanh is its series to u^11 (relative error 2e-9 at 0.3).
CPO_DEVICE float tanh_and_slope(float u, float& slope) {
  const float e = exp2_approx(fabsf(u) * -2.885390082f);
  const float inverse = reciprocal_approx(1.0f + e);
  slope = 4.0f * e * inverse * inverse;
  const float q = u * u;
  float p = fmaf(q, -8.863235530e-3f, 2.186948854e-2f);
  p = fmaf(q, p, -5.396825397e-2f);
  p = fmaf(q, p, 1.333333333e-1f);
  p = fmaf(q, p, -3.333333333e-1f);
  return fabsf(u) < 0.3f ? fmaf(u * q, p, u) : copysignf(fmaf(-2.0f * e, inverse, 1.0f), u);
}
CPO_DEVICE double tanh_and_slope(double u, double& slope) {
  const double inverse = 1.0 / cosh(u);
  slope = inverse * inverse;
  return tanh(u);
}

}  // namespace cpo::cuda
