// GroupNorm, scale and shift, and SiLU over NHWC images, with statistics in float32:
//
//     y = silu(((x + offset - mean) / sqrt(variance + eps) gamma + beta) (1 + scale) + shift)
//
// A slab is all pixels of some whole groups of one image that lie side by side. A grid of (parts, slabs, images) blocks
// shares the pixels of each slab out over its parts. There are two forms, of one arithmetic:
//
//   cm_group_norm_silu_T     one launch: the parts of a slab are a cluster, x stays in their shared memory and is read once
//   cm_group_norm_moments_T  two launches, for GPUs without clusters and slabs that fit in none: the parts' moments, and
//   cm_group_norm_apply_T    then y from x, read a second time
//
// Each part sums differences from its first pixel, then squares of differences from its own mean. Parts are combined in
// their order by Chan, Golub and LeVeque (1983, "Algorithms for computing the sample variance"). So neither a mean far
// from 0 nor the order in which blocks run is seen in y.

#include "cluster.h"

constexpr int NORM_THREADS = 512;  // of a block at most
constexpr int MOMENTS = 3;         // of a part of a group: first pixel, mean - first pixel, sum of squared differences

struct Norm {
    uint32_t channels, pixels, groups, slab;  // slab: channels of a block
};

// The pixels of part `part`: `count` from `first` on, as even as can be.
struct Share {
    uint32_t first, count;
    CM_INLINE Share(uint32_t pixels, uint32_t part, uint32_t parts) {
        const uint32_t each = pixels / parts, more = pixels - each * parts;
        first = part * each + (part < more ? part : more);
        count = each + (part < more ? 1 : 0);
    }
};

// A block's part of a slab, a thread's place in it, and what it has in shared memory. A thread moves W channels at once.
template <int W>
struct Place {
    uint32_t begin, slab, group, groups;   // first channel, channels, channels of a group, groups of the slab
    uint32_t columns, rows, column, row;   // of threads; the last slab may be narrower
    uint32_t parts, count;                 // pixels of this part
    size_t element;                        // of x and y: the thread's first
    uint32_t stride;                       // from a pixel to the next
    float *sums, *centers, *a, *b, *own;   // centers, a, b: (slab,); y = (x - center) a + b; own: (groups, MOMENTS)
    unsigned char* rest;                   // of shared memory

    // has_sums: it calls `sum`; has_moments: it calls `combine`, with moments where the sums were.
    CM_INLINE Place(const Norm& s, unsigned char* shared, bool has_sums, bool has_moments) {
        begin = blockIdx.y * s.slab;
        slab = s.slab < s.channels - begin ? s.slab : s.channels - begin;
        group = s.channels / s.groups;
        groups = slab / group;
        columns = slab / W;
        rows = blockDim.x / (s.slab / W);
        row = threadIdx.x / columns;
        column = threadIdx.x - row * columns;
        parts = gridDim.x;
        const Share share(s.pixels, blockIdx.x, parts);
        count = share.count;
        stride = s.channels;
        element = (static_cast<size_t>(blockIdx.z) * s.pixels + share.first) * stride + begin;
        sums = reinterpret_cast<float*>(shared);  // (W, rows, columns), then (groups, parts, MOMENTS)
        const uint32_t of_rows = has_sums ? rows * s.slab : 0;
        const uint32_t of_part = MOMENTS * (s.slab / group), of_parts = has_moments ? of_part * parts : 0;
        centers = sums + (of_rows < of_parts ? of_parts : of_rows);
        a = centers + s.slab;
        b = a + s.slab;
        own = b + s.slab;
        rest = shared + (own + of_part - sums + 3) / 4 * 16;
    }

    // body(element of x and y, element of the part) for each run of the thread.
    template <class Body>
    CM_INLINE void each(const Body& body) const {
        if (row < rows)
            for (uint32_t pixel = row; pixel < count; pixel += rows)
                body(element + static_cast<size_t>(pixel) * stride + column * W, pixel * slab + column * W);
    }

    // The sums over all threads of what each has of its W channels, to be read by `group_sum`. All must call it.
    CM_INLINE void sum(const float (&part)[W]) const {
        const uint32_t next_channel = rows * columns;
        float* place = sums + row * columns + column;
        if (row < rows) {
#pragma unroll
            for (int i = 0; i < W; i++) place[i * next_channel] = part[i];
        }
        for (uint32_t n = rows; n > 1;) {
            const uint32_t left = (n + 3) / 4;
            __syncthreads();
            if (row < left)
                for (uint32_t other = left; row + other < n; other += left) {
#pragma unroll
                    for (int i = 0; i < W; i++) place[i * next_channel] += place[i * next_channel + other * columns];
                }
            n = left;
        }
        __syncthreads();
    }

    // The sum over the group of channel c of the slab.
    CM_INLINE float group_sum(uint32_t c) const {
        float sum = 0.0f;
        for (uint32_t i = c / group * group, end = i + group; i < end; i++) sum += sums[i % W * rows * columns + i / W];
        return sum;
    }
};

// x of the block's part into `kept`, and the moments of each of its groups to `moments`, `stride` floats apart.
// offset: (channels,) or null. Differences are those from a center less the offset, so that no pass adds it.
template <int W, class T>
CM_INLINE void keep_and_reduce(const Place<W>& at, const T* x, const float* offset, T* kept, float* moments,
                               uint32_t stride) {
    at.each([&](size_t i, uint32_t k) { copy_run<W>(x + i, kept + k); });
    for (uint32_t c = threadIdx.x; c < at.slab; c += blockDim.x) {
        const uint32_t first = c / at.group * at.group;
        at.centers[c] = as_float(x[at.element + first]) + (offset ? offset[at.begin + first] : 0.0f);
        at.b[c] = at.centers[c] - (offset ? offset[at.begin + c] : 0.0f);
    }
    wait_for_copies();
    __syncthreads();

    const float size = static_cast<float>(at.count) * static_cast<float>(at.group);
    float center[W], mean[W], part[W] = {};
#pragma unroll
    for (int i = 0; i < W; i++) center[i] = at.row < at.rows ? at.b[at.column * W + i] : 0.0f;
    at.each([&](size_t, uint32_t k) {
        T run[W];
        load(kept + k, run);
#pragma unroll
        for (int i = 0; i < W; i++) part[i] += as_float(run[i]) - center[i];
    });
    at.sum(part);
    for (uint32_t c = threadIdx.x; c < at.slab; c += blockDim.x) at.a[c] = at.group_sum(c) / size;
    __syncthreads();  // all have read the sums that the next ones are written over
#pragma unroll
    for (int i = 0; i < W; i++) {
        mean[i] = at.row < at.rows ? at.a[at.column * W + i] : 0.0f;
        part[i] = 0.0f;
    }
    at.each([&](size_t, uint32_t k) {
        T run[W];
        load(kept + k, run);
#pragma unroll
        for (int i = 0; i < W; i++) {
            const float difference = as_float(run[i]) - center[i] - mean[i];
            part[i] = fmaf(difference, difference, part[i]);
        }
    });
    at.sum(part);
    for (uint32_t g = threadIdx.x; g < at.groups; g += blockDim.x) {
        moments[g * stride] = at.centers[g * at.group];
        moments[g * stride + 1] = at.a[g * at.group];
        moments[g * stride + 2] = at.group_sum(g * at.group);
    }
}

// a + b; what that has rounded away is added to `lost`.
CM_INLINE float sum(float a, float b, float& lost) {
    const float rounded = a + b, a_again = rounded - b;
    lost += (a - a_again) + (b - (rounded - a_again));
    return rounded;
}

// How x becomes y.
struct Affine {
    const float *offset, *gamma, *beta;  // (channels,); offset or null
    float eps;
    uint32_t silu;
};

// centers, a and b of the slab's channels from the moments of all parts, which are in `sums`.
template <int W, class T>
CM_INLINE void combine(const Place<W>& at, const Norm& s, const Affine& f, const T* scale_shift) {
    for (uint32_t c = threadIdx.x; c < at.slab; c += blockDim.x) {
        const float* moments = at.sums + c / at.group * at.parts * MOMENTS;
        const auto mean_of = [&](uint32_t p) { return moments[p * MOMENTS] - moments[0] + moments[p * MOMENTS + 1]; };
        const auto pixels_of = [&](uint32_t p) { return static_cast<float>(Share(s.pixels, p, at.parts).count); };
        float mean = 0.0f, squares = 0.0f;  // the mean is one of differences from moments[0]
        for (uint32_t p = 0; p < at.parts; p++) mean = fmaf(pixels_of(p), mean_of(p), mean);
        mean = mean / static_cast<float>(s.pixels);
        for (uint32_t p = 0; p < at.parts; p++) {
            const float difference = mean_of(p) - mean;
            squares += moments[p * MOMENTS + 2];
            squares = fmaf(pixels_of(p) * static_cast<float>(at.group), difference * difference, squares);
        }
        float lost = 0.0f;
        const float center = sum(moments[0], mean, lost);
        const float variance = squares / (static_cast<float>(s.pixels) * static_cast<float>(at.group));
        float a = f.gamma[at.begin + c] / sqrtf(variance + f.eps), b = f.beta[at.begin + c];
        if (scale_shift) {
            const T* of_image = scale_shift + static_cast<size_t>(blockIdx.z) * 2 * s.channels + at.begin + c;
            const float scale = 1.0f + as_float(*of_image);
            a *= scale;
            b = fmaf(b, scale, as_float(of_image[s.channels]));
        }
        at.centers[c] = f.offset ? sum(center, -f.offset[at.begin + c], lost) : center;
        at.a[c] = a;
        at.b[c] = fmaf(-lost, a, b);
    }
    __syncthreads();
}

// y of the block's part; source(element of x, element of the part): where its runs are read.
template <int W, class T, class Source>
CM_INLINE void normalise(const Place<W>& at, uint32_t silu, const Source& source, T* y) {
    float center[W], a[W], b[W];
#pragma unroll
    for (int i = 0; i < W; i++) {
        const uint32_t c = at.row < at.rows ? at.column * W + i : 0;
        center[i] = at.centers[c];
        a[i] = at.a[c];
        b[i] = at.b[c];
    }
    at.each([&](size_t element, uint32_t k) {
        T run[W];
        load(source(element, k), run);
#pragma unroll
        for (int i = 0; i < W; i++) {
            const float h = fmaf(as_float(run[i]) - center[i], a[i], b[i]);
            round_to(silu ? quotient(h, 1.0f + exponential(-h)) : h, run[i]);
        }
        store(run, y + element);
    });
}

// x, y: (N, pixels, channels) T, and may be the same; scale_shift: (N, 2 channels) T or null, scales first.
// W: channels that a thread moves at once, 16 bytes of T, or 1. The parts of a slab are a cluster.
template <int W, class T>
CM_INLINE void group_norm_silu(const Norm& s, const Affine& f, const T* x, const T* scale_shift, T* y) {
    CM_SHARED(shared);
    const Place<W> at(s, shared, true, true);
    T* kept = reinterpret_cast<T*>(at.rest);  // (pixels of the part, slab)
    keep_and_reduce<W>(at, x, f.offset, kept, at.own, MOMENTS);
    cluster_sync();
    const uint32_t size = at.groups * MOMENTS;
    for (uint32_t i = threadIdx.x; i < size * at.parts; i += blockDim.x) {
        const uint32_t part = i / size, k = i - part * size, g = k / MOMENTS;
        at.sums[(g * at.parts + part) * MOMENTS + k - g * MOMENTS] = *shared_of(at.own + k, part);
    }
    cluster_sync();  // behind which nobody reads another block's memory
    combine<W>(at, s, f, scale_shift);
    normalise<W>(at, f.silu, [&](size_t, uint32_t k) { return kept + k; }, y);
}

// moments: (N, groups, parts, MOMENTS) float32.
template <int W, class T>
CM_INLINE void group_norm_moments(const Norm& s, const T* x, const float* offset, float* moments) {
    CM_SHARED(shared);
    const Place<W> at(s, shared, true, false);
    const size_t first = static_cast<size_t>(blockIdx.z) * s.groups + at.begin / at.group;
    keep_and_reduce<W>(at, x, offset, reinterpret_cast<T*>(at.rest), moments + (first * at.parts + blockIdx.x) * MOMENTS,
                       at.parts * MOMENTS);
}

template <int W, class T>
CM_INLINE void group_norm_apply(const Norm& s, const Affine& f, const T* x, const float* moments, const T* scale_shift,
                                T* y) {
    CM_SHARED(shared);
    const Place<W> at(s, shared, false, true);
    const float* first = moments + (static_cast<size_t>(blockIdx.z) * s.groups + at.begin / at.group) * at.parts * MOMENTS;
    for (uint32_t i = threadIdx.x; i < at.groups * at.parts * MOMENTS; i += blockDim.x) at.sums[i] = first[i];
    __syncthreads();
    combine<W>(at, s, f, scale_shift);
    normalise<W>(at, f.silu, [&](size_t element, uint32_t) { return x + element; }, y);
}

#define GROUP_NORM(SUFFIX, T, W)                                                                                      \
    CM_BOUNDED_ENTRY(cm_group_norm_silu_##SUFFIX, NORM_THREADS)                                                       \
    (const T* x, const float* offset, const float* gamma, const float* beta, const T* scale_shift, T* y,              \
     uint32_t channels, uint32_t pixels, uint32_t groups, uint32_t slab, float eps, uint32_t silu) {                  \
        group_norm_silu<W>(Norm{channels, pixels, groups, slab}, Affine{offset, gamma, beta, eps, silu}, x,           \
                           scale_shift, y);                                                                           \
    }                                                                                                                 \
    CM_BOUNDED_ENTRY(cm_group_norm_moments_##SUFFIX, NORM_THREADS)                                                    \
    (const T* x, const float* offset, float* moments, uint32_t channels, uint32_t pixels, uint32_t groups,            \
     uint32_t slab) {                                                                                                 \
        group_norm_moments<W>(Norm{channels, pixels, groups, slab}, x, offset, moments);                              \
    }                                                                                                                 \
    CM_BOUNDED_ENTRY(cm_group_norm_apply_##SUFFIX, NORM_THREADS)                                                      \
    (const T* x, const float* moments, const float* offset, const float* gamma, const float* beta,                    \
     const T* scale_shift, T* y, uint32_t channels, uint32_t pixels, uint32_t groups, uint32_t slab, float eps,       \
     uint32_t silu) {                                                                                                 \
        group_norm_apply<W>(Norm{channels, pixels, groups, slab}, Affine{offset, gamma, beta, eps, silu}, x, moments, \
                            scale_shift, y);                                                                          \
    }                                                                                                                 \
    CM_REGISTER(cm_group_norm_silu_##SUFFIX, true, NORM_THREADS)                                                      \
    CM_REGISTER(cm_group_norm_moments_##SUFFIX, true, NORM_THREADS)                                                   \
    CM_REGISTER(cm_group_norm_apply_##SUFFIX, true, NORM_THREADS)

GROUP_NORM(float, float, 4)
GROUP_NORM(half, Half, 8)
GROUP_NORM(bfloat16, BFloat16, 8)
GROUP_NORM(float_any, float, 1)
GROUP_NORM(half_any, Half, 1)
GROUP_NORM(bfloat16_any, BFloat16, 1)
