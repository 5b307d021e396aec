// y = c_skip(sigma) x + c_out(sigma) F, from what eager code launches to cm_skip_scale_half, TensorRT's plugin:
//
//     c_skip = sigma_data^2 / ((sigma - sigma_boundary)^2 + sigma_data^2)
//     c_out  = sigma_data (sigma - sigma_boundary) / sqrt(sigma^2 + sigma_data^2)       a sigma for each image
//
//   1  as eager code: the coefficients in a launch, F cast, both products and their sum in one each. 34 bytes an element.
//   2  fused, a thread an element: 10 bytes, all that has to move. Each thread finds its image by a division, and makes
//      the coefficients anew: two divisions and a square root for one multiply-add.
//   3  a row of blocks for each image: no division to find it, and the coefficients once for four elements or more.
//   4  cm_skip_scale_half, which ships: eight elements a thread, moved 16 bytes at a time.
//
//     nvcc -O3 -std=c++17 -fmad=false -arch=sm_90 skip_scale.cu -o skip_scale && ./skip_scale    # or 3 for version 3
//
// Measured: not yet; no GPU has run it.
//
//     version | ms | GB/s | of copy
//     --------|----|------|--------
//     1       |    |      |
//     2       |    |      |
//     3       |    |      |
//     4       |    |      |

#include "../skip_scale.cu"
#include "ladder.h"

constexpr float SIGMA_DATA = 0.5f, SIGMA_BOUNDARY = 0.002f, X_LARGEST = 80.0f;

// The first image is at the boundary, where y is x to the bit; the others are anywhere up to sigma 80.
std::vector<float> noise_levels(uint32_t images) {
    std::vector<float> sigma = inputs(images, 40.0f, 3);
    for (float& s : sigma) s = std::max(40.0f + s, SIGMA_BOUNDARY);
    sigma[0] = SIGMA_BOUNDARY;
    return sigma;
}

struct Case {
    const Shape shape;
    const std::vector<float> x_values = inputs(shape.elements(), X_LARGEST, 1);
    const std::vector<float> sigma_values = noise_levels(shape.images);
    const std::vector<Half> F_values = halves(inputs(shape.elements(), 3.0f, 2));
    Memory<float> x{x_values}, sigma{sigma_values}, c_skip{shape.images}, c_out{shape.images}, y{x_values.size()};
    Memory<float> F_cast{x_values.size()}, skipped{x_values.size()};
    Memory<Half> F{F_values};

    explicit Case(const Shape& shape) : shape(shape) {}
    uint32_t size() const { return shape.channels * shape.pixels; }
    void clear() { y.clear(); }

    // The formula in float64. What may err is each product, by a few roundings: 4e-7 of the largest they are.
    void check(Verdict& verdict) const {
        std::vector<double> expected(shape.elements());
        const double data = SIGMA_DATA, variance = data * data;
        for (size_t i = 0; i < expected.size(); i++) {
            const double s = sigma_values[i / size()], d = s - SIGMA_BOUNDARY;
            const double skip = variance / (d * d + variance), out = data * d / std::sqrt(s * s + variance);
            expected[i] = skip * x_values[i] + out * number(F_values[i]);
        }
        verdict.compare("y", y, expected, 4e-7, 1.5e-6);
    }
};

// The coefficients of a level, as the versions before the last one make them.
CM_INLINE void coefficients(float sigma, float& c_skip, float& c_out) {
    const float d = sigma - SIGMA_BOUNDARY, variance = SIGMA_DATA * SIGMA_DATA;
    c_skip = variance / fmaf(d, d, variance);
    c_out = SIGMA_DATA * d / sqrtf(fmaf(sigma, sigma, variance));
}

// 1: a launch for each operation

__global__ void all_coefficients(const float* sigma, float* c_skip, float* c_out, uint32_t images) {
    const uint32_t n = blockIdx.x * blockDim.x + threadIdx.x;
    if (n < images) coefficients(sigma[n], c_skip[n], c_out[n]);
}

struct AsFloat {
    __device__ float operator()(Half F) const { return as_float(F); }
};
struct Add {
    __device__ float operator()(float a, float b) const { return a + b; }
};

// to = factor[image] from
__global__ void scale_images(const float* factor, const float* from, float* to, uint32_t images, uint32_t size) {
    const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x, n = i / size;
    if (n < images) to[i] = factor[n] * from[i];
}

void eager(Case& c, int threads) {
    const size_t count = c.shape.elements();
    const uint32_t images = c.shape.images, all = blocks(count, threads);
    launch(all_coefficients, blocks(images, threads), threads, 0, c.sigma.data, c.c_skip.data, c.c_out.data, images);
    map(AsFloat{}, count, threads, c.F_cast.data, c.F.data);
    launch(scale_images, all, threads, 0, c.c_out.data, c.F_cast.data, c.F_cast.data, images, c.size());
    launch(scale_images, all, threads, 0, c.c_skip.data, c.x.data, c.skipped.data, images, c.size());
    map(Add{}, count, threads, c.y.data, c.skipped.data, c.F_cast.data);
}

// 2: one launch

__global__ void fused(const float* x, const Half* F, const float* sigma, float* y, uint32_t images, uint32_t size) {
    const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x, n = i / size;
    if (n >= images) return;
    float c_skip, c_out;
    coefficients(sigma[n], c_skip, c_out);
    y[i] = fmaf(c_skip, x[i], c_out * as_float(F[i]));
}

// 3: a row of blocks for each image

__global__ void a_row(const float* x, const Half* F, const float* sigma, float* y, uint32_t size) {
    const size_t image = static_cast<size_t>(blockIdx.y) * size;
    float c_skip, c_out;
    coefficients(sigma[blockIdx.y], c_skip, c_out);
    for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < size; i += gridDim.x * blockDim.x)
        y[image + i] = fmaf(c_skip, x[image + i], c_out * as_float(F[image + i]));
}

// 4: what ships, launched as kernels/launches.py does

int bits_of(float value) {
    int bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

void shipped(Case& c, int threads) {
    const uint32_t size = c.size(), width = size % 8 ? 1 : 8;
    launch(cm_skip_scale_half, dim3(std::min(blocks((size + width - 1) / width, threads), 1u << 16), c.shape.images),
           threads, 0, c.x.data, c.F.data, c.sigma.data, size, c.shape.images, bits_of(SIGMA_DATA),
           bits_of(SIGMA_BOUNDARY), c.y.data);
}

int main(int argc, char** argv) {
    const std::vector<Version<Case>> versions = {
        {"1 a launch for each operation", 6 + 8 + 8 + 12, eager},
        {"2 fused, a thread an element", 4 + 2 + 4,
         [](Case& c, int threads) {
             launch(fused, blocks(c.shape.elements(), threads), threads, 0, c.x.data, c.F.data, c.sigma.data, c.y.data,
                    c.shape.images, c.size());
         }},
        {"3 a row of blocks an image", 4 + 2 + 4,
         [](Case& c, int threads) {
             launch(a_row, dim3(blocks((c.size() + 3) / 4, threads), c.shape.images), threads, 0, c.x.data, c.F.data,
                    c.sigma.data, c.y.data, c.size());
         }},
        {"4 cm_skip_scale_half", 4 + 2 + 4, shipped},
    };
    return climb(argc, argv, versions, shapes(3), {256, 3, 64 * 64}, 256);
}
