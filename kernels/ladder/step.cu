// The step between two evaluations of the network, from what eager code launches to cm_step_half_nchw:
//
//     x0 = clamp(c_skip x + c_out F)     x_next = x0 + renoise z     x_in = half(c_in x_next)
//
//   1  as eager code: six launches, float32 between them, z drawn beforehand and read. 48 bytes an element.
//   2  fused: what passes from one operation to the next stays in registers. Only z is read that need not be. 16 bytes.
//   3  the noise drawn where it is used. 12 bytes, all that has to move; but a Philox block makes four normals, and each
//      of four threads makes it anew and keeps one.
//   4  a thread owns the four elements of a block: a quarter of the arithmetic, accesses of 16 bytes (8 of half type).
//   5  cm_step_half_nchw, which ships: eight pixels a thread, so that F and x_in too move 16 bytes at a time. In return
//      each access of x fills half of every sector of 32 bytes, and the next one the other half: which of 4 and 5 is the
//      faster has to be measured.
//
//     nvcc -O3 -std=c++17 -fmad=false -arch=sm_90 step.cu -o step && ./step        # or 3 for version 3
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

#include "../steps.cu"
#include "ladder.h"

constexpr uint64_t SEED = 0x0123456789abcdef, FIRST = 0xfffffffe;  // the third image is past 32 bits
constexpr uint32_t DRAW = 1;
constexpr Level LEVEL = {0.3f, 0.5f, 0.8f, 1.2f};  // of no schedule: each coefficient is to show
constexpr float F_LARGEST = 3.0f, X_LARGEST = 5.0f;

// What is not finite has to be told, from each part of a batch.
std::vector<float> with_infinity(std::vector<float> values, bool has_infinity) {
    if (has_infinity) values.back() = INFINITY;
    return values;
}

std::vector<float> given_noise(const Shape& shape) {
    const size_t size = static_cast<size_t>(shape.channels) * shape.pixels;
    std::vector<float> z(shape.elements());
    for (size_t i = 0; i < z.size(); i++)
        z[i] = static_cast<float>(reference_normal(SEED, FIRST + i / size, DRAW, i % size));
    return z;
}

struct Case {
    const Shape shape;
    const bool has_infinity = shape.images > 1;
    const std::vector<float> x_values = inputs(shape.elements(), X_LARGEST, 1);
    const std::vector<Half> F_values = halves(with_infinity(inputs(shape.elements(), F_LARGEST, 2), has_infinity));
    const std::vector<float> z_values = given_noise(shape);
    Memory<float> x{x_values}, z{z_values}, x_next{x_values.size()}, x0{x_values.size()}, scaled{x_values.size()};
    Memory<Half> F{F_values}, x_in{x_values.size()};
    Memory<int> not_finite{std::vector<int>{0}};
    Memory<Level> level{std::vector<Level>{LEVEL}};
    Memory<Request> request{std::vector<Request>{{static_cast<uint32_t>(SEED), static_cast<uint32_t>(SEED >> 32),
                                                  static_cast<uint32_t>(FIRST), static_cast<uint32_t>(FIRST >> 32)}}};

    explicit Case(const Shape& shape) : shape(shape) {}
    uint32_t size() const { return shape.channels * shape.pixels; }

    void clear() {
        x_next.clear();
        x_in.clear();
        CUDA(cudaMemset(not_finite.data, 0, sizeof(int)));
    }

    // The formula in float64. A normal may err by 1e-6 max(1, |z|), which is noise.py's promise; x_in is rounded once.
    void check(Verdict& verdict) const {
        std::vector<double> next(shape.elements()), in(shape.elements());
        for (size_t i = 0; i < next.size(); i++) {
            const double f = double{LEVEL.c_skip} * x_values[i] + double{LEVEL.c_out} * number(F_values[i]);
            const double x0 = f < -1 ? -1 : f > 1 ? 1 : f;
            const double z = reference_normal(SEED, FIRST + i / size(), DRAW, i % size());
            next[i] = x0 + LEVEL.renoise * z;
            in[i] = LEVEL.c_in * next[i];
        }
        verdict.compare("x_next", x_next, next, 2e-6, 4e-6);
        verdict.compare("x_in", x_in, in, 1.01 * HALF_ULP, 4e-6);
        verdict.compare("not_finite", not_finite, {has_infinity ? 1.0 : 0.0}, 0, 0.5);
    }
};

// 1: a launch for each operation

struct SkipScale {
    float c_skip, c_out;
    __device__ float operator()(float x, Half F) const { return c_skip * x + c_out * as_float(F); }
};
struct Clamp {
    __device__ float operator()(float f) const { return fminf(fmaxf(f, -1.0f), 1.0f); }
};
struct Renoise {
    float renoise;
    __device__ float operator()(float x0, float z) const { return x0 + renoise * z; }
};

__global__ void any_not_finite(size_t count, const float* values, int* not_finite) {
    const size_t i = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < count && !is_finite(values[i])) *not_finite = 1;
}

void eager(Case& c, int threads) {
    const size_t count = c.shape.elements();
    map(SkipScale{LEVEL.c_skip, LEVEL.c_out}, count, threads, c.x0.data, c.x.data, c.F.data);
    launch(any_not_finite, blocks(count, threads), threads, 0, count, c.x0.data, c.not_finite.data);
    map(Clamp{}, count, threads, c.x0.data, c.x0.data);
    map(Renoise{LEVEL.renoise}, count, threads, c.x_next.data, c.x0.data, c.z.data);
    map(Scale{LEVEL.c_in}, count, threads, c.scaled.data, c.x_next.data);
    map(Cast{}, count, threads, c.x_in.data, c.scaled.data);
}

// What the fused versions share: the new x of one element.
CM_INLINE float renoised_element(const Level& level, float x, Half F, float z, bool& all_finite) {
    const float f = fmaf(level.c_skip, x, level.c_out * as_float(F));
    all_finite = all_finite && is_finite(f);
    return fmaf(level.renoise, z, fminf(fmaxf(f, -1.0f), 1.0f));
}

// 2: one launch

__global__ void fused(const Level* level, const float* x, const Half* F, const float* z, float* x_next, Half* x_in,
                      int* not_finite, size_t count) {
    const size_t i = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= count) return;
    bool all_finite = true;
    const float next = renoised_element(*level, x[i], F[i], z[i], all_finite);
    x_next[i] = next;
    x_in[i] = rounded(level->c_in * next);
    if (!all_finite) *not_finite = 1;
}

// 3: the noise from its counter

__global__ void drawing(const Request* request, const Level* level, const float* x, const Half* F, float* x_next,
                        Half* x_in, int* not_finite, uint32_t images, uint32_t size) {
    const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x, n = i / size, element = i - n * size;
    if (n >= images) return;
    float z[4];
    normals(*request, DRAW, n, element / 4, z);
    const float own = element % 4 < 2 ? (element % 2 ? z[1] : z[0]) : element % 2 ? z[3] : z[2];
    bool all_finite = true;
    const float next = renoised_element(*level, x[i], F[i], own, all_finite);
    x_next[i] = next;
    x_in[i] = rounded(level->c_in * next);
    if (!all_finite) *not_finite = 1;
}

// 4: a block of noise a thread

__global__ void fours(const Request* request, const Level* level, const float* x, const Half* F, float* x_next,
                      Half* x_in, int* not_finite, uint32_t images, uint32_t size) {
    const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x, per_image = (size + 3) / 4, n = i / per_image;
    if (n >= images) return;
    const uint32_t block = i - n * per_image, count = min(4u, size - block * 4);
    const size_t at = static_cast<size_t>(n) * size + block * 4;
    const bool is_whole = size % 4 == 0;  // then every run of four is aligned too
    float own[4], z[4];
    Half other[4], in[4];
    if (is_whole) {
        load(x + at, own);
        load(F + at, other);
    } else {
        for (uint32_t j = 0; j < 4; j++) {
            own[j] = j < count ? x[at + j] : 0.0f;
            other[j] = j < count ? F[at + j] : rounded(0.0f);
        }
    }
    normals(*request, DRAW, n, block, z);
    bool all_finite = true;
    for (uint32_t j = 0; j < 4; j++) {
        own[j] = renoised_element(*level, own[j], other[j], z[j], all_finite);
        in[j] = rounded(level->c_in * own[j]);
    }
    if (is_whole) {
        store(own, x_next + at);
        store(in, x_in + at);
    } else {
        for (uint32_t j = 0; j < count; j++) {
            x_next[at + j] = own[j];
            x_in[at + j] = in[j];
        }
    }
    if (!all_finite) *not_finite = 1;
}

// 5: what ships, launched as kernels/launches.py does

void shipped(Case& c, int threads) {
    const uint32_t pixels = c.shape.pixels, width = pixels % 8 ? 1 : 8;
    const uint32_t grid = blocks(static_cast<size_t>(c.shape.images) * pixels / width, threads);
    const float* given = nullptr;
    launch(cm_step_half_nchw, std::min(grid, 1u << 16), threads, 0, c.request.data, c.level.data, DRAW, given, c.x.data,
           c.F.data, c.x_next.data, c.x_in.data, c.shape.images, c.shape.channels, pixels, 1u, c.not_finite.data);
}

int main(int argc, char** argv) {
    const std::vector<Version<Case>> versions = {
        {"1 a launch for each operation", 10 + 4 + 8 + 12 + 8 + 6, eager},
        {"2 fused, the noise from memory", 4 + 2 + 4 + 4 + 2,
         [](Case& c, int threads) {
             const size_t count = c.shape.elements();
             launch(fused, blocks(count, threads), threads, 0, c.level.data, c.x.data, c.F.data, c.z.data, c.x_next.data,
                    c.x_in.data, c.not_finite.data, count);
         }},
        {"3 the noise drawn, one of four kept", 4 + 2 + 4 + 2,
         [](Case& c, int threads) {
             launch(drawing, blocks(c.shape.elements(), threads), threads, 0, c.request.data, c.level.data, c.x.data,
                    c.F.data, c.x_next.data, c.x_in.data, c.not_finite.data, c.shape.images, c.size());
         }},
        {"4 a block of noise and four elements a thread", 4 + 2 + 4 + 2,
         [](Case& c, int threads) {
             const size_t items = static_cast<size_t>(c.shape.images) * ((c.size() + 3) / 4);
             launch(fours, blocks(items, threads), threads, 0, c.request.data, c.level.data, c.x.data, c.F.data,
                    c.x_next.data, c.x_in.data, c.not_finite.data, c.shape.images, c.size());
         }},
        {"5 cm_step_half_nchw", 4 + 2 + 4 + 2, shipped},
    };
    return climb(argc, argv, versions, shapes(3), {256, 3, 64 * 64}, 256);
}
