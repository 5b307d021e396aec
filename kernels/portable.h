// What a kernel is written in, so that nvcc compiles it for a GPU and g++ for the host (host.h has the words of CUDA).
//
// Nothing here rounds differently on the two, SiLU's exponential and quotient apart: every multiply-add is an explicit
// fmaf, contraction is off in both builds, division and square root are IEEE's, and the logarithm, sine and cosine of the
// noise are polynomials of our own.
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define CM_INLINE __device__ __forceinline__
#define CM_ENTRY(NAME) extern "C" __global__ void NAME
// A kernel for blocks of at most THREADS threads, two of which fit on a multiprocessor.
#define CM_BOUNDED_ENTRY(NAME, THREADS) extern "C" __global__ void __launch_bounds__(THREADS, 2) NAME
#define CM_REGISTER(NAME, ...)
#define CM_SHARED(NAME) extern __shared__ __align__(16) unsigned char NAME[]
using Half = __half;
using BFloat16 = __nv_bfloat16;
#else
#include "host.h"
#endif

// Types of the network: float32, float16 and bfloat16, rounded to nearest even

#ifdef __CUDACC__
CM_INLINE float as_float(float value) { return value; }
CM_INLINE float as_float(Half value) { return __half2float(value); }
CM_INLINE float as_float(BFloat16 value) { return __bfloat162float(value); }
CM_INLINE void round_to(float value, float& rounded) { rounded = value; }
CM_INLINE void round_to(float value, Half& rounded) { rounded = __float2half_rn(value); }
CM_INLINE void round_to(float value, BFloat16& rounded) { rounded = __float2bfloat16_rn(value); }
#endif

CM_INLINE float bits_as_float(uint32_t bits) {
#ifdef __CUDACC__
    return __uint_as_float(bits);
#else
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
#endif
}

CM_INLINE uint32_t float_as_bits(float value) {
#ifdef __CUDACC__
    return __float_as_uint(value);
#else
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
#endif
}

// a / b to 2 ulp on a GPU, where the exact one takes ten instructions; 0 for b above 2^126.
CM_INLINE float quotient(float a, float b) {
#ifdef __CUDACC__
    return __fdividef(a, b);
#else
    return a / b;
#endif
}

// e to the power of a, to 2 + 1.2 |a| ulp on a GPU, where the library's takes ten instructions.
CM_INLINE float exponential(float a) {
#ifdef __CUDACC__
    return __expf(a);
#else
    return expf(a);
#endif
}

CM_INLINE bool is_finite(float value) { return (float_as_bits(value) & 0x7f800000u) != 0x7f800000u; }

// Runs of W elements, moved by the fewest accesses. A run has to lie at a multiple of its own size from 16 bytes.

template <int BYTES>
struct Bytes;
template <>
struct Bytes<1> {
    using type = uint8_t;
};
template <>
struct Bytes<2> {
    using type = uint16_t;
};
template <>
struct Bytes<4> {
    using type = uint32_t;
};
template <>
struct Bytes<8> {
    using type = uint2;
};
template <>
struct Bytes<16> {
    using type = uint4;
};

// The widest access that divides a run of W elements: 16 bytes at most.
template <int W, class T>
struct Widest {
    static constexpr int bytes = W * sizeof(T);
    static constexpr int size = bytes % 16 == 0 ? 16 : bytes % 8 == 0 ? 8 : bytes % 4 == 0 ? 4 : bytes % 2 == 0 ? 2 : 1;
    using type = typename Bytes<size>::type;
};

template <int W, class T>
CM_INLINE void load(const T* from, T (&to)[W]) {
    using Word = typename Widest<W, T>::type;
    constexpr int words = W * sizeof(T) / sizeof(Word);
    Word word[words];
#pragma unroll
    for (int i = 0; i < words; i++) word[i] = reinterpret_cast<const Word*>(from)[i];
    memcpy(to, word, sizeof to);
}

template <int W, class T>
CM_INLINE void store(const T (&from)[W], T* to) {
    using Word = typename Widest<W, T>::type;
    constexpr int words = W * sizeof(T) / sizeof(Word);
    Word word[words];
    memcpy(word, from, sizeof from);
#pragma unroll
    for (int i = 0; i < words; i++) reinterpret_cast<Word*>(to)[i] = word[i];
}
