// Addressable noise on the device: the integers of cm_runtime/noise.py bit for bit, its normals to 1e-6 max(1, |z|).
//
// Philox4x32-10: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3". Box-Muller in float32 by polynomials
// of our own, because those of CUDA's library and the host's differ: what is tested on the host is what a GPU draws.
#pragma once

#include "portable.h"

struct Words {
    uint32_t a, b, c, e;
};

// Philox4x32-10 of a counter and a key of two words.
CM_INLINE Words philox(Words counter, uint32_t key_low, uint32_t key_high) {
#pragma unroll
    for (int round = 0; round < 10; round++) {
        const uint64_t even = static_cast<uint64_t>(counter.a) * 0xD2511F53u;
        const uint64_t odd = static_cast<uint64_t>(counter.c) * 0xCD9E8D57u;
        counter = {static_cast<uint32_t>(odd >> 32) ^ counter.b ^ key_low, static_cast<uint32_t>(odd),
                   static_cast<uint32_t>(even >> 32) ^ counter.e ^ key_high, static_cast<uint32_t>(even)};
        key_low += 0x9E3779B9u;
        key_high += 0xBB67AE85u;
    }
    return counter;
}

// sqrt(-2 ln u), u = (word + 1/2) 2^-32. Where u is near 1 its logarithm is that of 1 - d, d exact from the integer.
CM_INLINE float radius(uint32_t word) {
    const bool is_near_1 = word >= 0xAAAAAAABu;  // u above 2/3
    const float distance = fmaf(static_cast<float>(is_near_1 ? ~word : word), 0x1p-32f, 0x1p-33f);  // 1 - u, or u
    const uint32_t bits = float_as_bits(distance);
    // u = 2^exponent (1 + f), f from -1/3 to 1/3; 0x3f2aaaab is 2/3
    const int exponent = is_near_1 ? 0 : static_cast<int>(bits - 0x3f2aaaabu) >> 23;
    const float f = is_near_1 ? -distance : bits_as_float(bits - (static_cast<uint32_t>(exponent) << 23)) - 1.0f;
    // (ln(1 + f) - f + f^2 / 2) / f^3, to 5e-9 of ln(1 + f) / f
    float P = -0.13191646f;
    P = fmaf(P, f, 0.13962452f);
    P = fmaf(P, f, -0.12115126f);
    P = fmaf(P, f, 0.1401092f);
    P = fmaf(P, f, -0.16685466f);
    P = fmaf(P, f, 0.20010044f);
    P = fmaf(P, f, -0.24999689f);
    P = fmaf(P, f, 0.33333224f);
    const float log_1_f = fmaf(f * f, fmaf(f, P, -0.5f), f);
    return sqrtf(-2.0f * fmaf(static_cast<float>(exponent), 0.6931472f, log_1_f));
}

// sin 2 pi v and cos 2 pi v, v = (word + 1/2) 2^-32: in quarter turns, q + t with q whole and t from -1/2 to 1/2.
CM_INLINE void sine_cosine(uint32_t word, float& sine, float& cosine) {
    const uint32_t q = (word + 0x20000000u) >> 30;
    const float t = fmaf(static_cast<float>(static_cast<int32_t>(word - (q << 30))), 0x1p-30f, 0x1p-31f);
    const float u = t * t;
    float S = -0.004602177f;
    S = fmaf(S, u, 0.07968023f);
    S = fmaf(S, u, -0.6459635f);
    S = fmaf(S, u, 1.5707964f);
    S *= t;
    float C = 0.0009040216f;
    C = fmaf(C, u, -0.020860288f);
    C = fmaf(C, u, 0.25366923f);
    C = fmaf(C, u, -1.2337005f);
    C = fmaf(C, u, 1.0f);
    sine = q & 1 ? C : S;
    cosine = q & 1 ? S : C;
    sine = q & 2 ? -sine : sine;
    cosine = (q + 1) & 2 ? -cosine : cosine;
}

// The images of a request: image n of a batch is number first + n of the seed.
struct Request {
    uint32_t seed_low, seed_high, first_low, first_high;
};

// Standard normals of elements 4 block to 4 block + 3 of image n's draw.
CM_INLINE void normals(const Request& request, uint32_t draw, uint32_t n, uint32_t block, float (&z)[4]) {
    const uint32_t low = request.first_low + n;
    const uint32_t high = request.first_high + (low < n);
    const Words words = philox({block, draw, low, high}, request.seed_low, request.seed_high);
    float sine, cosine;
    sine_cosine(words.b, sine, cosine);
    float r = radius(words.a);
    z[0] = r * sine;
    z[1] = r * cosine;
    sine_cosine(words.e, sine, cosine);
    r = radius(words.c);
    z[2] = r * sine;
    z[3] = r * cosine;
}
