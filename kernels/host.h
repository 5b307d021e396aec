// CUDA's words for g++, so that the kernels run on the host as they are: grid, blocks, barriers and shared memory.
//
// host.cpp runs the threads of a block in turns, each until its next barrier, and the blocks of a cluster in turns, each
// until its next barrier of the cluster. What it cannot show is what depends on true concurrency: races that no order of
// turns brings out, and the speed.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <utility>

struct Dim3 {
    unsigned x, y, z;
};
struct alignas(8) uint2 {
    uint32_t x, y;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};

extern Dim3 gridDim, blockDim, blockIdx, threadIdx;
extern unsigned char* shared_memory;
void __syncthreads();
void cluster_sync();
const unsigned char* shared_of_block(const unsigned char* own, uint32_t rank);

template <class T>
const T* shared_of(const T* own, uint32_t rank) {
    return reinterpret_cast<const T*>(shared_of_block(reinterpret_cast<const unsigned char*>(own), rank));
}

#define CM_INLINE inline
#define CM_ENTRY(NAME) static void NAME
#define CM_BOUNDED_ENTRY(NAME, THREADS) CM_ENTRY(NAME)
#define CM_SHARED(NAME) unsigned char* const NAME = shared_memory

// A kernel by its name, called as cuLaunchKernel calls it: with a pointer to each argument.
using Call = void (*)(void** arguments);
void register_kernel(const char* name, Call call, bool has_barriers, unsigned most_threads = 1024);

template <auto KERNEL>
struct Unpacked;
template <class... A, void (*KERNEL)(A...)>
struct Unpacked<KERNEL> {
    template <size_t... I>
    static void each(void** arguments, std::index_sequence<I...>) {
        KERNEL(*static_cast<A*>(arguments[I])...);
    }
    static void call(void** arguments) { each(arguments, std::index_sequence_for<A...>()); }
};

#define CM_REGISTER(NAME, ...) \
    static const int registered_##NAME = (register_kernel(#NAME, Unpacked<NAME>::call, __VA_ARGS__), 0);

// The types of the network

struct Half {
    uint16_t bits;
};
struct BFloat16 {
    uint16_t bits;
};

CM_INLINE float from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

CM_INLINE uint32_t to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

CM_INLINE float as_float(float value) { return value; }
CM_INLINE float as_float(BFloat16 value) { return from_bits(static_cast<uint32_t>(value.bits) << 16); }
CM_INLINE float as_float(Half value) {
    const uint32_t sign = (value.bits & 0x8000u) << 16, exponent = value.bits >> 10 & 31, mantissa = value.bits & 1023;
    if (exponent == 31) return from_bits(sign | 0x7f800000u | mantissa << 13);
    if (exponent == 0) return from_bits(sign | to_bits(static_cast<float>(mantissa) * 0x1p-24f));
    return from_bits(sign | (exponent + 112) << 23 | mantissa << 13);
}

CM_INLINE void round_to(float value, float& rounded) { rounded = value; }
CM_INLINE void round_to(float value, BFloat16& rounded) {
    const uint32_t bits = to_bits(value);
    rounded.bits = value != value ? 0x7fff : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
CM_INLINE void round_to(float value, Half& rounded) {
    const uint32_t bits = to_bits(value), magnitude = bits & 0x7fffffffu;
    uint32_t half;
    if (magnitude > 0x7f800000u) {
        half = 0x7fff;
    } else if (magnitude >= 0x477ff000u) {  // 65520 and above round to infinity
        half = 0x7c00;
    } else if (magnitude >= 0x38800000u) {  // normal numbers
        half = (magnitude - 0x38000000u + 0xfff + (magnitude >> 13 & 1)) >> 13;
    } else {  // multiples of 2^-24; adding 2^-1 (of a spacing 2^-24) rounds to them, half to even
        half = to_bits(from_bits(magnitude) + 0.5f) & 0x7fffu;
    }
    rounded.bits = static_cast<uint16_t>(half | (magnitude > 0x7f800000u ? 0 : bits >> 16 & 0x8000u));
}
