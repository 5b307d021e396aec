// cm::SkipScale: y = c_skip(sigma) x + c_out(sigma) F, in float32 throughout, for the TensorRT plugin of that name.
//
// arXiv 2303.01469, appendix C, as export/skip_scale.py has it in standard ops:
//     c_skip = sigma_data^2 / ((sigma - sigma_boundary)^2 + sigma_data^2)
//     c_out  = sigma_data (sigma - sigma_boundary) / sqrt(sigma^2 + sigma_data^2)
//
// TensorRT gives a kernel its inputs, 32-bit integers and its outputs, in this order, and no floats: sigma_data and
// sigma_boundary come as their bit patterns. One block row for each image: gridDim.y = N. `make` rewrites the .ptx.

#include "portable.h"

// x, y: (N, pixels) float32; F: (N, pixels) T; sigma: (levels,) float32, where levels is N or 1. y may be x.
template <int W, class T>
CM_INLINE void skip_scale_runs(const float* x, const T* F, float c_skip, float c_out, int pixels, float* y) {
    const size_t image = static_cast<size_t>(blockIdx.y) * pixels;
    const uint32_t end = pixels, stride = gridDim.x * blockDim.x * W;
    for (uint32_t i = (blockIdx.x * blockDim.x + threadIdx.x) * W; i < end; i += stride) {
        float own[W];
        T other[W];
        load(x + image + i, own);
        load(F + image + i, other);
#pragma unroll
        for (int j = 0; j < W; j++) own[j] = fmaf(c_skip, own[j], c_out * as_float(other[j]));
        store(own, y + image + i);
    }
}

// A number as the sum of two, the second what rounding left out of the first: coefficients are rounded once, as those
// that the host computes for cm_step are.
struct Pair {
    float head, rest;
};

CM_INLINE Pair sum(float a, float b) {
    const float head = a + b, b_in_head = head - a;
    return {head, (a - (head - b_in_head)) + (b - b_in_head)};
}

// a^2 + b
CM_INLINE Pair square_plus(Pair a, float b) {
    const float square = a.head * a.head;
    const Pair s = sum(square, b);
    return {s.head, s.rest + fmaf(a.head, a.head, -square) + 2.0f * a.head * a.rest};
}

CM_INLINE float divided(Pair a, Pair b) {
    const float q = a.head / b.head;
    return q + (fmaf(-q, b.head, a.head) + a.rest - q * b.rest) / b.head;
}

CM_INLINE Pair root(Pair a) {
    const float r = sqrtf(a.head);
    return {r, (fmaf(-r, r, a.head) + a.rest) / (2.0f * r)};
}

template <class T>
CM_INLINE void skip_scale(const float* x, const T* F, const float* sigma, int pixels, int levels, int sigma_data_bits,
                          int sigma_boundary_bits, float* y) {
    const float sigma_data = bits_as_float(sigma_data_bits);
    const float s = sigma[levels == 1 ? 0 : blockIdx.y];
    const Pair d = sum(s, -bits_as_float(sigma_boundary_bits));
    const float variance = sigma_data * sigma_data, product = sigma_data * d.head;
    const float c_skip = divided({variance, 0.0f}, square_plus(d, variance));
    const Pair share = {product, fmaf(sigma_data, d.head, -product) + sigma_data * d.rest};
    const float c_out = divided(share, root(square_plus({s, 0.0f}, variance)));
    constexpr int most = 16 / sizeof(T);
    if (pixels % most == 0) {
        skip_scale_runs<most>(x, F, c_skip, c_out, pixels, y);
    } else {
        skip_scale_runs<1>(x, F, c_skip, c_out, pixels, y);
    }
}

#define SKIP_SCALE(NAME, T)                                                                                            \
    CM_ENTRY(NAME)                                                                                                     \
    (const float* x, const T* F, const float* sigma, int pixels, int levels, int sigma_data_bits,                      \
     int sigma_boundary_bits, float* y) {                                                                              \
        skip_scale(x, F, sigma, pixels, levels, sigma_data_bits, sigma_boundary_bits, y);                              \
    }                                                                                                                  \
    CM_REGISTER(NAME, false)

SKIP_SCALE(cm_skip_scale_float, float)
SKIP_SCALE(cm_skip_scale_half, Half)
SKIP_SCALE(cm_skip_scale_bfloat16, BFloat16)
