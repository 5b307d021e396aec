// GroupNorm, scale and shift, and SiLU over NHWC images, from what eager code launches to cm_group_norm_silu_half:
//
//     y = silu(((x - mean) / sqrt(variance + eps) gamma + beta) (1 + scale) + shift), mean and variance of each group
//
//   1  as eager code: seven launches, float32 between them, a thread for each group's mean and one for its variance.
//      40 bytes an element.
//   2  a block for each group of an image, sums in shared memory, one launch. 8 bytes: x three times and y. With 4
//      channels a group a block reads 8 of each 256 bytes, a quarter of the sector of 32 that memory moves.
//   3  the group's elements kept in shared memory, so that x is read once: 4 bytes, all that has to move; but the
//      sectors are as in 2.
//   4  a slab is several groups that together fill whole sectors, and a thread moves eight channels, 16 bytes, at once.
//      Two launches, moments and y: 6 bytes, x being read twice.
//   5  cm_group_norm_silu_half, which ships: one launch, and a slab is shared out over a cluster of blocks, so that it
//      fits in their shared memory.
//
//     nvcc -O3 -std=c++17 -fmad=false -arch=sm_90 group_norm.cu -o group_norm && ./group_norm    # or 3 for version 3
//
// Measured: not yet; no GPU has run it.
//
//     version | ms | GB/s | of copy
//     --------|----|------|--------
//     1       |    |      |
//     2       |    |      |
//     3       |    |      |
//     4       |    |      |
//     5       |    |      |

#include "../group_norm.cu"
#include "ladder.h"

constexpr float EPS = 1e-5f, MEAN = 3.0f;
constexpr uint32_t SHARED = 48 << 10;  // bytes that a block may have without asking for more
constexpr const float* NO_OFFSET = nullptr;
constexpr uint32_t PARTS = 16;         // of a slab in version 4

struct Case {
    const Shape shape;
    const uint32_t groups = shape.channels % 32 ? 3 : 32, group = shape.channels / groups;  // channels of a group
    const std::vector<float> gamma_values = inputs(shape.channels, 2.0f, 1), beta_values = inputs(shape.channels, 1.0f, 2);
    const std::vector<Half> x_values = off_center(shape.elements());
    const std::vector<Half> scale_shift_values = halves(inputs(2 * shape.images * shape.channels, 0.5f, 4));
    Memory<float> gamma{gamma_values}, beta{beta_values}, h{x_values.size()};
    Memory<float> mean{shape.images * groups}, variance{shape.images * groups};
    Memory<float> moments{shape.images * groups * PARTS * MOMENTS};
    Memory<Half> x{x_values}, scale_shift{scale_shift_values}, y{x_values.size()};

    explicit Case(const Shape& shape) : shape(shape) {}
    void clear() { y.clear(); }

    // Far from 0, as the variance of squares would not bear.
    static std::vector<Half> off_center(size_t count) {
        std::vector<float> values = inputs(count, 1.0f, 3);
        for (float& value : values) value += MEAN;
        return halves(values);
    }

    // The formula in float64, y rounded once. Sums of thousands in float32 may err by 1e-5 of the mean.
    void check(Verdict& verdict) const {
        std::vector<double> expected(shape.elements());
        const size_t channels = shape.channels, pixels = shape.pixels;
        for (size_t n = 0; n < shape.images; n++)
            for (size_t g = 0; g < groups; g++) {
                double sum = 0, squares = 0;
                const auto each = [&](const auto& body) {
                    for (size_t pixel = 0; pixel < pixels; pixel++)
                        for (size_t c = g * group; c < (g + 1) * group; c++) body((n * pixels + pixel) * channels + c, c);
                };
                each([&](size_t i, size_t) { sum += number(x_values[i]); });
                const double count = static_cast<double>(group * pixels), average = sum / count;
                each([&](size_t i, size_t) { squares += std::pow(number(x_values[i]) - average, 2); });
                const double deviation = std::sqrt(squares / count + EPS);
                each([&](size_t i, size_t c) {
                    const double normal = (number(x_values[i]) - average) / deviation;
                    const double scale = number(scale_shift_values[2 * n * channels + c]);
                    const double shift = number(scale_shift_values[(2 * n + 1) * channels + c]);
                    const double value = (normal * gamma_values[c] + beta_values[c]) * (1 + scale) + shift;
                    expected[i] = value / (1 + std::exp(-value));
                });
            }
        verdict.compare("y", y, expected, 1.01 * HALF_ULP, 2e-4);
    }
};

// 1: a launch for each operation

// Of versions 1 to 3; is_kept: a group is in shared memory.
struct Groups {
    uint32_t channels, pixels, groups;
    float eps;
    uint32_t is_kept;
};

// Where a group of an image begins, and the sum of `body` over its elements, by one thread.
template <class Body>
__device__ float sum_of_group(const Groups& s, uint32_t i, const Half* x, Body body) {
    const uint32_t n = i / s.groups, group = s.channels / s.groups;
    const Half* first = x + static_cast<size_t>(n) * s.pixels * s.channels + (i - n * s.groups) * group;
    float sum = 0.0f;
    for (uint32_t pixel = 0; pixel < s.pixels; pixel++)
        for (uint32_t c = 0; c < group; c++) sum += body(as_float(first[static_cast<size_t>(pixel) * s.channels + c]));
    return sum / (static_cast<float>(group) * static_cast<float>(s.pixels));
}

__global__ void means(Groups s, const Half* x, float* mean, uint32_t count) {
    const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) mean[i] = sum_of_group(s, i, x, [](float v) { return v; });
}

__global__ void variances(Groups s, const Half* x, const float* mean, float* variance, uint32_t count) {
    const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    const float m = mean[i];
    variance[i] = sum_of_group(s, i, x, [m](float v) { return (v - m) * (v - m); });
}

// Of element i: its channel, its image, and the number of its group.
struct Element {
    uint32_t c, n, i;
};
CM_INLINE Element element_at(const Groups& s, size_t element) {
    const size_t pixel = element / s.channels;
    const uint32_t c = static_cast<uint32_t>(element % s.channels), n = static_cast<uint32_t>(pixel / s.pixels);
    return {c, n, n * s.groups + c / (s.channels / s.groups)};
}

__global__ void subtract_and_divide(Groups s, const Half* x, const float* mean, const float* variance, float* h, size_t count) {
    const size_t element = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (element >= count) return;
    const Element at = element_at(s, element);
    h[element] = (as_float(x[element]) - mean[at.i]) / sqrtf(variance[at.i] + s.eps);
}

__global__ void affine(Groups s, const float* gamma, const float* beta, float* h, size_t count) {
    const size_t element = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (element >= count) return;
    const uint32_t c = element_at(s, element).c;
    h[element] = h[element] * gamma[c] + beta[c];
}

__global__ void modulate(Groups s, const Half* scale_shift, float* h, size_t count) {
    const size_t element = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (element >= count) return;
    const Element at = element_at(s, element);
    const Half* own = scale_shift + static_cast<size_t>(at.n) * 2 * s.channels + at.c;
    h[element] = h[element] * (1.0f + as_float(own[0])) + as_float(own[s.channels]);
}

struct Silu {
    __device__ float operator()(float h) const { return h / (1.0f + expf(-h)); }
};

Groups groups_of(const Case& c) { return {c.shape.channels, c.shape.pixels, c.groups, EPS, 0}; }

void eager(Case& c, int threads) {
    const size_t count = c.shape.elements();
    const uint32_t all = c.shape.images * c.groups, grid = blocks(count, threads);
    const Groups s = groups_of(c);
    launch(means, blocks(all, threads), threads, 0, s, c.x.data, c.mean.data, all);
    launch(variances, blocks(all, threads), threads, 0, s, c.x.data, c.mean.data, c.variance.data, all);
    launch(subtract_and_divide, grid, threads, 0, s, c.x.data, c.mean.data, c.variance.data, c.h.data, count);
    launch(affine, grid, threads, 0, s, c.gamma.data, c.beta.data, c.h.data, count);
    launch(modulate, grid, threads, 0, s, c.scale_shift.data, c.h.data, count);
    map(Silu{}, count, threads, c.h.data, c.h.data);
    map(Cast{}, count, threads, c.y.data, c.h.data);
}

// 2 and 3: a block for each group

// The sum over the block of each thread's own, in memory of a float a thread.
CM_INLINE float block_sum(float own, float* sums) {
    sums[threadIdx.x] = own;
    for (uint32_t n = blockDim.x; n > 1; n = (n + 1) / 2) {
        const uint32_t half = (n + 1) / 2;
        __syncthreads();
        if (threadIdx.x + half < n) sums[threadIdx.x] += sums[threadIdx.x + half];
    }
    __syncthreads();
    const float sum = sums[0];
    __syncthreads();  // all have read it before the next sum is written over it
    return sum;
}

__global__ void a_group(Groups s, const Half* x, const float* gamma, const float* beta, const Half* scale_shift, Half* y) {
    CM_SHARED(shared);
    float* sums = reinterpret_cast<float*>(shared);
    Half* kept = reinterpret_cast<Half*>(sums + blockDim.x);
    const uint32_t group = s.channels / s.groups, count = group * s.pixels, begin = blockIdx.x * group;
    const size_t image = static_cast<size_t>(blockIdx.y) * s.pixels * s.channels + begin;
    const auto address = [&](uint32_t i) { return image + static_cast<size_t>(i / group) * s.channels + i % group; };
    const auto element = [&](uint32_t i) { return as_float(s.is_kept ? kept[i] : x[address(i)]); };
    float part = 0.0f;
    for (uint32_t i = threadIdx.x; i < count; i += blockDim.x) {
        if (s.is_kept) kept[i] = x[address(i)];
        part += element(i);
    }
    const float mean = block_sum(part, sums) / static_cast<float>(count);
    part = 0.0f;
    for (uint32_t i = threadIdx.x; i < count; i += blockDim.x) part += (element(i) - mean) * (element(i) - mean);
    const float deviation = sqrtf(block_sum(part, sums) / static_cast<float>(count) + s.eps);
    const Half* scales = scale_shift + static_cast<size_t>(blockIdx.y) * 2 * s.channels;
    for (uint32_t i = threadIdx.x; i < count; i += blockDim.x) {
        const uint32_t c = begin + i % group;
        const float normal = (element(i) - mean) / deviation * gamma[c] + beta[c];
        y[address(i)] = rounded(Silu{}(normal * (1.0f + as_float(scales[c])) + as_float(scales[s.channels + c])));
    }
}

template <bool KEPT>
void a_block_a_group(Case& c, int threads) {
    Groups s = groups_of(c);
    const size_t sums = threads * sizeof(float), kept = sums + static_cast<size_t>(c.group) * s.pixels * sizeof(Half);
    s.is_kept = KEPT && kept <= SHARED;
    launch(a_group, dim3(c.groups, c.shape.images), threads, s.is_kept ? kept : sums, s, c.x.data, c.gamma.data,
           c.beta.data, c.scale_shift.data, c.y.data);
}

// 4 and 5: what ships, cut as kernels/group_norm.py does it

struct Cut {
    uint32_t slab, parts;
    dim3 grid;
    size_t sums, kept;  // bytes of shared memory
};

// parts: at most; fewer where a part of the slab fits in half of 226 KB all the same.
Cut cut(const Case& c, int threads, uint32_t most) {
    const uint32_t channels = c.shape.channels, pixels = c.shape.pixels, width = channels % 8 ? 1 : 8;
    uint32_t unit = c.group;  // the least number of channels that is whole groups and whole runs
    while (unit % width) unit += c.group;
    Cut all;
    all.slab = std::min((16 + unit - 1) / unit * unit, channels);
    for (all.parts = 1;; all.parts *= 2) {
        const uint32_t rows = threads / (all.slab / width), moments = MOMENTS * all.parts * (all.slab / c.group);
        all.sums = (std::max(rows * all.slab, moments) + 3 * all.slab + moments / all.parts + 3) / 4 * 16;
        all.kept = all.sums + (pixels + all.parts - 1) / all.parts * all.slab * sizeof(Half);
        if (2 * all.parts > std::min(most, pixels) || all.kept <= (226 << 10) / 2) break;
    }
    all.grid = dim3(all.parts, (channels + all.slab - 1) / all.slab, c.shape.images);
    return all;
}

template <class... Parameters, class... Arguments>
void launch_clusters(void (*kernel)(Parameters...), const Cut& all, int threads, size_t shared, bool is_cluster,
                     Arguments... arguments) {
    CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)));
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = is_cluster ? all.parts : 1;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = all.grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
    cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

void two_launches(Case& c, int threads) {
    threads = std::min(threads, NORM_THREADS);
    const Cut all = cut(c, threads, PARTS);
    const bool is_wide = c.shape.channels % 8 == 0;
    launch_clusters(is_wide ? cm_group_norm_moments_half : cm_group_norm_moments_half_any, all, threads, all.kept, false,
                    c.x.data, NO_OFFSET, c.moments.data, c.shape.channels, c.shape.pixels, c.groups, all.slab);
    launch_clusters(is_wide ? cm_group_norm_apply_half : cm_group_norm_apply_half_any, all, threads, all.sums, false,
                    c.x.data, c.moments.data, NO_OFFSET, c.gamma.data, c.beta.data, c.scale_shift.data, c.y.data, c.shape.channels,
                    c.shape.pixels, c.groups, all.slab, EPS, 1u);
}

void shipped(Case& c, int threads) {
    threads = std::min(threads, NORM_THREADS);
    const Cut all = cut(c, threads, 8);
    launch_clusters(c.shape.channels % 8 ? cm_group_norm_silu_half_any : cm_group_norm_silu_half, all, threads, all.kept,
                    true, c.x.data, NO_OFFSET, c.gamma.data, c.beta.data, c.scale_shift.data, c.y.data, c.shape.channels,
                    c.shape.pixels, c.groups, all.slab, EPS, 1u);
}

int main(int argc, char** argv) {
    const std::vector<Version<Case>> versions = {
        {"1 a launch for each operation", 2 + 2 + 6 + 8 + 8 + 8 + 6, eager},
        {"2 a block a group, x read three times", 3 * 2 + 2, a_block_a_group<false>},
        {"3 a block a group, x kept in shared memory", 2 + 2, a_block_a_group<true>},
        {"4 two launches: moments, then y", 2 * 2 + 2, two_launches},
        {"5 cm_group_norm_silu_half, clusters", 2 + 2, shipped},
    };
    std::vector<Shape> all = shapes(128);
    for (uint32_t channels : {6, 96}) {  // 2 and 3 channels a group: no runs of 8, and slabs of 24
        const std::vector<Shape> more = shapes(channels);
        all.insert(all.end(), more.begin(), more.end());
    }
    return climb(argc, argv, versions, all, {256, 128, 32 * 32}, 512);
}
