// GroupNorm, scale and shift, and SiLU in one launch over NHWC images, with statistics in float32:
//
//     y = silu(((x - mean) / sqrt(variance + eps) gamma + beta) (1 + scale) + shift)
//
// A block owns a slab, all pixels of some whole groups of one image that lie side by side and fill 32 bytes or more, so
// that every access is of whole sectors. Where the slab fits in shared memory it is read once; otherwise three times,
// twice of them from cache. The variance is that of differences from the mean, not of squares.

#include "portable.h"

struct Norm {
    uint32_t channels, pixels, groups, slab;  // slab: channels of a block
    float eps;
    uint32_t silu, is_kept;  // is_kept: the slab is in shared memory
};

// The sums of `part` over the rows of threads that share a column of W channels: sums[channel of the slab].
template <int W>
CM_INLINE void sum_rows(const float (&part)[W], float* partial, uint32_t slab, uint32_t rows, uint32_t row,
                        uint32_t column) {
    const bool is_used = row < rows;
    float* own = partial + row * slab + column * W;
#pragma unroll
    for (int i = 0; i < W; i++)
        if (is_used) own[i] = part[i];
    for (uint32_t n = rows; n > 1; n = (n + 1) / 2) {
        const uint32_t half = (n + 1) / 2;
        __syncthreads();
        if (is_used && row + half < n) {
#pragma unroll
            for (int i = 0; i < W; i++) own[i] += own[half * slab + i];
        }
    }
    __syncthreads();
}

// The sum over the group that channel c of the slab is of.
CM_INLINE float group_sum(const float* sums, uint32_t c, uint32_t group) {
    float sum = 0.0f;
    const uint32_t begin = c / group * group;
    for (uint32_t i = begin; i < begin + group; i++) sum += sums[i];
    return sum;
}

// x, y: (N, pixels, channels) T; gamma, beta: (channels,) float32; scale_shift: (N, 2 channels) T or null, scales first.
// W: channels that a thread moves at once, 16 bytes of T, or 1. A grid of (slabs, N) blocks of any number of threads.
template <int W, class T>
CM_INLINE void group_norm_silu(const Norm& s, const T* x, const float* gamma, const float* beta, const T* scale_shift,
                               T* y) {
    CM_SHARED(shared);
    const uint32_t begin = blockIdx.x * s.slab, slab = s.slab < s.channels - begin ? s.slab : s.channels - begin;
    const uint32_t columns = slab / W, rows = blockDim.x / (s.slab / W);  // of threads; the last slab may be narrower
    const uint32_t row = threadIdx.x / columns, column = threadIdx.x - row * columns, group = s.channels / s.groups;
    float* partial = reinterpret_cast<float*>(shared);  // (rows, slab)
    float* means = partial + rows * s.slab;  // (slab,), as a and b are: y = (x - mean) a + b
    float *a = means + s.slab, *b = a + s.slab;
    T* kept = reinterpret_cast<T*>(partial + (static_cast<size_t>(rows + 3) * s.slab + 3) / 4 * 4);  // (pixels, slab)
    const size_t image = static_cast<size_t>(blockIdx.y) * s.pixels * s.channels + begin + column * W;
    const uint32_t first = row < rows ? row : s.pixels;

    const auto element = [&](uint32_t pixel, bool is_again, float (&v)[W]) {
        T run[W];
        if (s.is_kept && is_again) {
            load(kept + pixel * slab + column * W, run);
        } else {
            load(x + image + static_cast<size_t>(pixel) * s.channels, run);
            if (s.is_kept) store(run, kept + pixel * slab + column * W);
        }
#pragma unroll
        for (int i = 0; i < W; i++) v[i] = as_float(run[i]);
    };

    const float count = static_cast<float>(group) * static_cast<float>(s.pixels);
    float mean[W], part[W] = {};
    for (uint32_t pixel = first; pixel < s.pixels; pixel += rows) {
        float v[W];
        element(pixel, false, v);
#pragma unroll
        for (int i = 0; i < W; i++) part[i] += v[i];
    }
    sum_rows(part, partial, slab, rows, row, column);
    for (uint32_t c = threadIdx.x; c < slab; c += blockDim.x) means[c] = group_sum(partial, c, group) / count;
    __syncthreads();  // all have read the sums that the next ones are written over
#pragma unroll
    for (int i = 0; i < W; i++) {
        mean[i] = row < rows ? means[column * W + i] : 0.0f;
        part[i] = 0.0f;
    }
    for (uint32_t pixel = first; pixel < s.pixels; pixel += rows) {
        float v[W];
        element(pixel, true, v);
#pragma unroll
        for (int i = 0; i < W; i++) part[i] = fmaf(v[i] - mean[i], v[i] - mean[i], part[i]);
    }
    sum_rows(part, partial, slab, rows, row, column);
    for (uint32_t c = threadIdx.x; c < slab; c += blockDim.x) {
        a[c] = gamma[begin + c] / sqrtf(group_sum(partial, c, group) / count + s.eps);
        b[c] = beta[begin + c];
        if (scale_shift) {
            const T* own = scale_shift + static_cast<size_t>(blockIdx.y) * 2 * s.channels + begin + c;
            const float scale = 1.0f + as_float(*own);
            a[c] *= scale;
            b[c] = fmaf(b[c], scale, as_float(own[s.channels]));
        }
    }
    __syncthreads();
    float own_a[W], own_b[W];
#pragma unroll
    for (int i = 0; i < W; i++) {
        own_a[i] = row < rows ? a[column * W + i] : 0.0f;
        own_b[i] = row < rows ? b[column * W + i] : 0.0f;
    }
    for (uint32_t pixel = first; pixel < s.pixels; pixel += rows) {
        float v[W];
        T run[W];
        element(pixel, true, v);
#pragma unroll
        for (int i = 0; i < W; i++) {
            const float h = fmaf(v[i] - mean[i], own_a[i], own_b[i]);
            round_to(s.silu ? quotient(h, 1.0f + expf(-h)) : h, run[i]);
        }
        store(run, y + image + static_cast<size_t>(pixel) * s.channels);
    }
}

#define GROUP_NORM(SUFFIX, T, W)                                                                                      \
    CM_ENTRY(cm_group_norm_silu_##SUFFIX)                                                                             \
    (const T* x, const float* gamma, const float* beta, const T* scale_shift, T* y, uint32_t channels,                \
     uint32_t pixels, uint32_t groups, uint32_t slab, float eps, uint32_t silu, uint32_t is_kept) {                   \
        group_norm_silu<W>(Norm{channels, pixels, groups, slab, eps, silu, is_kept}, x, gamma, beta, scale_shift, y); \
    }                                                                                                                 \
    CM_REGISTER(cm_group_norm_silu_##SUFFIX, true)

GROUP_NORM(float, float, 4)
GROUP_NORM(half, Half, 8)
GROUP_NORM(bfloat16, BFloat16, 8)
GROUP_NORM(float_any, float, 1)
GROUP_NORM(half_any, Half, 1)
GROUP_NORM(bfloat16_any, BFloat16, 1)
