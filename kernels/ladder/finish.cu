// The end of a sample, from what eager code launches to cm_finish_half_nchw:
//
//     x0 = clamp(c_skip x + c_out F), NCHW     bytes = rint((x0 + 1) 127.5), NHWC, half to even
//
//   1  as eager code: six launches, float32 between them, and a transposition of what they made. 41 bytes an element.
//   2  fused, a thread an element in the order of x: reads of neighbours, but bytes written three apart.
//      7 bytes, all that has to move; but each sector of 32 bytes is written by threads of three blocks.
//   3  a thread a pixel, all its channels: what a warp writes lies side by side, though in three turns of a byte each.
//   4  four pixels a thread: reads of 16 bytes (8 of half type), writes of three words of four bytes.
//   5  cm_finish_half_nchw, which ships: eight pixels a thread, F too 16 bytes at a time, 24 bytes written as three
//      words of eight; any number of channels, a check for what is not finite, and float32 as well where asked for.
//
//     nvcc -O3 -std=c++17 -fmad=false -arch=sm_90 finish.cu -o finish && ./finish        # or 3 for version 3
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

constexpr Level LEVEL = {0.3f, 0.5f, 0.0f, 0.0f};
constexpr uint32_t C = 3;

struct Case {
    const Shape shape;
    const std::vector<float> x_values = inputs(shape.elements(), 3.0f, 1);
    const std::vector<Half> F_values = halves(inputs(shape.elements(), 1.0f, 2));
    Memory<float> x{x_values}, x0{x_values.size()}, other{x_values.size()};
    Memory<Half> F{F_values};
    Memory<uint8_t> planes{x_values.size()}, bytes{x_values.size()};
    Memory<int> not_finite{std::vector<int>{0}};
    Memory<Level> level{std::vector<Level>{LEVEL}};

    explicit Case(const Shape& shape) : shape(shape) {}
    void clear() { bytes.clear(); }

    // The formula in float64. A byte is the nearest whole number to it, or either of two where it is halfway to 1e-4.
    void check(Verdict& verdict) const {
        std::vector<double> expected(shape.elements());
        for (size_t i = 0; i < expected.size(); i++) {
            const double f = double{LEVEL.c_skip} * x_values[i] + double{LEVEL.c_out} * number(F_values[i]);
            const double x0 = f < -1 ? -1 : f > 1 ? 1 : f;
            const size_t plane = i / shape.pixels, pixel = i % shape.pixels;
            expected[(plane / C * shape.pixels + pixel) * C + plane % C] = (x0 + 1) * 127.5;
        }
        verdict.compare("bytes", bytes, expected, 0, 0.5001);
        verdict.compare("not_finite", not_finite, {0.0}, 0, 0.5);
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
struct AddOne {
    __device__ float operator()(float x0) const { return x0 + 1.0f; }
};
struct Byte {
    __device__ uint8_t operator()(float grey) const { return static_cast<uint8_t>(rintf(grey)); }
};

__global__ void transpose(const uint8_t* planes, uint8_t* bytes, uint32_t images, uint32_t pixels) {
    const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x, plane = i / pixels, n = plane / C;
    if (n < images) bytes[(static_cast<size_t>(n) * pixels + i - plane * pixels) * C + plane % C] = planes[i];
}

void eager(Case& c, int threads) {
    const size_t count = c.shape.elements();
    map(SkipScale{LEVEL.c_skip, LEVEL.c_out}, count, threads, c.x0.data, c.x.data, c.F.data);
    map(Clamp{}, count, threads, c.x0.data, c.x0.data);
    map(AddOne{}, count, threads, c.other.data, c.x0.data);
    map(Scale{127.5f}, count, threads, c.other.data, c.other.data);
    map(Byte{}, count, threads, c.planes.data, c.other.data);
    launch(transpose, blocks(count, threads), threads, 0, c.planes.data, c.bytes.data, c.shape.images, c.shape.pixels);
}

// What the fused versions share: the byte of one element.
CM_INLINE uint8_t byte_of(const Level& level, float x, Half F) {
    const float f = fmaf(level.c_skip, x, level.c_out * as_float(F));
    return static_cast<uint8_t>(rintf((fminf(fmaxf(f, -1.0f), 1.0f) + 1.0f) * 127.5f));
}

// 2: one launch

__global__ void fused(const Level* level, const float* x, const Half* F, uint8_t* bytes, uint32_t images,
                      uint32_t pixels) {
    const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x, plane = i / pixels, n = plane / C;
    if (n >= images) return;
    bytes[(static_cast<size_t>(n) * pixels + i - plane * pixels) * C + plane % C] = byte_of(*level, x[i], F[i]);
}

// 3: all channels of a pixel

__global__ void a_pixel(const Level* level, const float* x, const Half* F, uint8_t* bytes, uint32_t images,
                        uint32_t pixels) {
    const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x, n = i / pixels, pixel = i - n * pixels;
    if (n >= images) return;
    const size_t image = static_cast<size_t>(n) * C * pixels;
    for (uint32_t c = 0; c < C; c++) {
        const size_t at = image + c * pixels + pixel;
        bytes[image + pixel * C + c] = byte_of(*level, x[at], F[at]);
    }
}

// 4: four pixels

__global__ void four_pixels(const Level* level, const float* x, const Half* F, uint8_t* bytes, uint32_t images,
                            uint32_t pixels) {
    const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x, per_image = pixels / 4, n = i / per_image;
    if (n >= images) return;
    const uint32_t pixel = (i - n * per_image) * 4;
    const size_t image = static_cast<size_t>(n) * C * pixels;
    uint8_t run[4 * C];
#pragma unroll
    for (uint32_t c = 0; c < C; c++) {
        float own[4];
        Half other[4];
        load(x + image + c * pixels + pixel, own);
        load(F + image + c * pixels + pixel, other);
#pragma unroll
        for (uint32_t j = 0; j < 4; j++) run[j * C + c] = byte_of(*level, own[j], other[j]);
    }
    store(run, bytes + image + pixel * C);
}

// 5: what ships, launched as kernels/launches.py does

void shipped(Case& c, int threads) {
    const uint32_t pixels = c.shape.pixels, width = pixels % 8 ? 1 : 8;
    const uint32_t grid = blocks(static_cast<size_t>(c.shape.images) * pixels / width, threads);
    float* floats = nullptr;
    launch(cm_finish_half_nchw, std::min(grid, 1u << 16), threads, 0, c.level.data, c.x.data, c.F.data, c.bytes.data,
           floats, c.shape.images, c.shape.channels, pixels, 1u, c.not_finite.data);
}

template <auto KERNEL, uint32_t ITEMS>  // ITEMS: of a thread for each pixel
void one_launch(Case& c, int threads) {
    const size_t items = static_cast<size_t>(c.shape.images) * c.shape.pixels * ITEMS;
    launch(KERNEL, blocks(items, threads), threads, 0, c.level.data, c.x.data, c.F.data, c.bytes.data, c.shape.images,
           c.shape.pixels);
}

void fours(Case& c, int threads) {
    if (c.shape.pixels % 4) return one_launch<a_pixel, 1>(c, threads);
    const size_t items = static_cast<size_t>(c.shape.images) * c.shape.pixels / 4;
    launch(four_pixels, blocks(items, threads), threads, 0, c.level.data, c.x.data, c.F.data, c.bytes.data,
           c.shape.images, c.shape.pixels);
}

int main(int argc, char** argv) {
    const std::vector<Version<Case>> versions = {
        {"1 a launch for each operation", 10 + 8 + 8 + 8 + 5 + 2, eager},
        {"2 fused, a thread an element", 4 + 2 + 1, one_launch<fused, C>},
        {"3 all channels of a pixel a thread", 4 + 2 + 1, one_launch<a_pixel, 1>},
        {"4 four pixels a thread", 4 + 2 + 1, fours},
        {"5 cm_finish_half_nchw", 4 + 2 + 1, shipped},
    };
    return climb(argc, argv, versions, shapes(C), {256, C, 64 * 64}, 256);
}
