// cm::SkipScale: y = c_skip(sigma) x + c_out(sigma) F, in float32 throughout, for the TensorRT plugin of that name.
//
// arXiv 2303.01469, appendix C, as export/skip_scale.py has it in standard ops:
//     c_skip = sigma_data^2 / ((sigma - sigma_boundary)^2 + sigma_data^2)
//     c_out  = sigma_data (sigma - sigma_boundary) / sqrt(sigma^2 + sigma_data^2)
//
// TensorRT gives a kernel its inputs, 32-bit integers and its outputs, in this order, and no floats: sigma_data and
// sigma_boundary come as their bit patterns. One block row for each image: gridDim.y = N. `make` rewrites the .ptx.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

__device__ __forceinline__ float as_float(float value) { return value; }
__device__ __forceinline__ float as_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float as_float(__nv_bfloat16 value) { return __bfloat162float(value); }

// x, y: (N, pixels) float32; F: (N, pixels) T; sigma: (levels,) float32, where levels is N or 1.
template <typename T>
__device__ __forceinline__ void skip_scale(const float* __restrict__ x, const T* __restrict__ F,
                                           const float* __restrict__ sigma, int pixels, int levels,
                                           int sigma_data_bits, int sigma_boundary_bits, float* __restrict__ y) {
    const float sigma_data = __int_as_float(sigma_data_bits);
    const float s = sigma[levels == 1 ? 0 : blockIdx.y];
    const float d = s - __int_as_float(sigma_boundary_bits);
    const float variance = sigma_data * sigma_data;
    const float c_skip = variance / (d * d + variance);
    const float c_out = sigma_data * d / sqrtf(s * s + variance);
    const int pixel = blockIdx.x * blockDim.x + threadIdx.x;
    if (pixel < pixels) {
        const size_t i = static_cast<size_t>(blockIdx.y) * pixels + pixel;
        y[i] = c_skip * x[i] + c_out * as_float(F[i]);
    }
}

#define SKIP_SCALE(NAME, T)                                                                                          \
    extern "C" __global__ void NAME(const float* x, const T* F, const float* sigma, int pixels, int levels,          \
                                    int sigma_data_bits, int sigma_boundary_bits, float* y) {                        \
        skip_scale(x, F, sigma, pixels, levels, sigma_data_bits, sigma_boundary_bits, y);                            \
    }

SKIP_SCALE(skip_scale_float, float)
SKIP_SCALE(skip_scale_half, __half)
SKIP_SCALE(skip_scale_bfloat16, __nv_bfloat16)
