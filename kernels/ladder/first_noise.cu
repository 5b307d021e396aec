// The first noise, from what eager code launches to cm_first_noise_half_nchw:
//
//     x = sigma_0 z, float32     x_in = half(c_in x)
//
// z is the standard normal of (seed, image, draw, element): Philox4x32-10 and Box-Muller. It reads nothing.
//
//   1  as eager code: four launches, and the formula in double precision as NumPy has it, each thread making a block of
//      four normals' words and keeping one. 26 bytes an element.
//   2  fused: the same arithmetic, and x and x_in written from registers. 6 bytes, all that has to move.
//   3  logarithm, sine and cosine as polynomials in float32, to 1e-6: no double precision on the way.
//   4  a thread owns the four elements of a block: a quarter of the arithmetic, accesses of 16 bytes (8 of half type).
//   5  cm_first_noise_half_nchw, which ships: eight pixels a thread, so that x_in too moves 16 bytes at a time, and x
//      half a sector of 32 bytes with each of two accesses.
//
// Of all kernels this one writes least beside its arithmetic: 3 and 4 show what the arithmetic costs.
//
//     nvcc -O3 -std=c++17 -fmad=false -arch=sm_90 first_noise.cu -o first_noise && ./first_noise    # or 3 for version 3
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
constexpr uint32_t DRAW = 0;
constexpr float SIGMA = 80.0f, C_IN = 0.0125f;
constexpr Level LEVEL = {0.0f, 0.0f, SIGMA, C_IN};

struct Case {
    const Shape shape;
    Memory<float> x{shape.elements()}, z{shape.elements()}, scaled{shape.elements()};
    Memory<Half> x_in{shape.elements()};
    Memory<Level> level{std::vector<Level>{LEVEL}};
    Memory<Request> request{std::vector<Request>{{static_cast<uint32_t>(SEED), static_cast<uint32_t>(SEED >> 32),
                                                  static_cast<uint32_t>(FIRST), static_cast<uint32_t>(FIRST >> 32)}}};

    explicit Case(const Shape& shape) : shape(shape) {}
    uint32_t size() const { return shape.channels * shape.pixels; }

    void clear() {
        x.clear();
        x_in.clear();
    }

    // The formula in float64. A normal may err by 1e-6 max(1, |z|), which is noise.py's promise; x_in is rounded once.
    void check(Verdict& verdict) const {
        std::vector<double> noise(shape.elements()), in(shape.elements());
        for (size_t i = 0; i < noise.size(); i++) {
            noise[i] = SIGMA * reference_normal(SEED, FIRST + i / size(), DRAW, i % size());
            in[i] = C_IN * noise[i];
        }
        verdict.compare("x", x, noise, 1.1e-6, 1.1e-6 * SIGMA);
        verdict.compare("x_in", x_in, in, 1.01 * HALF_ULP, 1.1e-6 * SIGMA * C_IN);
    }
};

// Versions 1 and 2: an element's normal in double precision
__device__ float normal_in_double(const Request& request, uint32_t n, uint32_t element) {
    const uint32_t low = request.first_low + n, high = request.first_high + (low < n);
    const Words words = philox({element / 4, DRAW, low, high}, request.seed_low, request.seed_high);
    const uint32_t first = element % 4 < 2 ? words.a : words.c, second = element % 4 < 2 ? words.b : words.e;
    const double u = (first + 0.5) * 0x1p-32, v = (second + 0.5) * 0x1p-32;
    const double angle = 6.283185307179586 * v;
    return static_cast<float>(sqrt(-2.0 * log(u)) * (element % 2 ? cos(angle) : sin(angle)));
}

// 1: a launch for each operation

__global__ void draw(const Request* request, float* z, uint32_t images, uint32_t size) {
    const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x, n = i / size;
    if (n < images) z[i] = normal_in_double(*request, n, i - n * size);
}

void eager(Case& c, int threads) {
    const size_t count = c.shape.elements();
    launch(draw, blocks(count, threads), threads, 0, c.request.data, c.z.data, c.shape.images, c.size());
    map(Scale{SIGMA}, count, threads, c.x.data, c.z.data);
    map(Scale{C_IN}, count, threads, c.scaled.data, c.x.data);
    map(Cast{}, count, threads, c.x_in.data, c.scaled.data);
}

// 2: one launch

__global__ void fused(const Request* request, const Level* level, float* x, Half* x_in, uint32_t images, uint32_t size) {
    const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x, n = i / size;
    if (n >= images) return;
    const float own = level->renoise * normal_in_double(*request, n, i - n * size);
    x[i] = own;
    x_in[i] = rounded(level->c_in * own);
}

// 3: polynomials

__global__ void polynomials(const Request* request, const Level* level, float* x, Half* x_in, uint32_t images,
                            uint32_t size) {
    const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x, n = i / size, element = i - n * size;
    if (n >= images) return;
    float z[4];
    normals(*request, DRAW, n, element / 4, z);
    const float own = level->renoise * (element % 4 < 2 ? (element % 2 ? z[1] : z[0]) : element % 2 ? z[3] : z[2]);
    x[i] = own;
    x_in[i] = rounded(level->c_in * own);
}

// 4: a block of noise a thread

__global__ void fours(const Request* request, const Level* level, float* x, Half* x_in, uint32_t images, uint32_t size) {
    const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x, per_image = (size + 3) / 4, n = i / per_image;
    if (n >= images) return;
    const uint32_t block = i - n * per_image, count = min(4u, size - block * 4);
    const size_t at = static_cast<size_t>(n) * size + block * 4;
    float own[4];
    Half in[4];
    normals(*request, DRAW, n, block, own);
    for (uint32_t j = 0; j < 4; j++) {
        own[j] *= level->renoise;
        in[j] = rounded(level->c_in * own[j]);
    }
    if (size % 4 == 0) {  // then every run of four is aligned too
        store(own, x + at);
        store(in, x_in + at);
    } else {
        for (uint32_t j = 0; j < count; j++) {
            x[at + j] = own[j];
            x_in[at + j] = in[j];
        }
    }
}

// 5: what ships, launched as kernels/launches.py does

void shipped(Case& c, int threads) {
    const uint32_t pixels = c.shape.pixels, width = pixels % 8 ? 1 : 8;
    const uint32_t grid = blocks(static_cast<size_t>(c.shape.images) * pixels / width, threads);
    const float* given = nullptr;
    launch(cm_first_noise_half_nchw, std::min(grid, 1u << 16), threads, 0, c.request.data, c.level.data, DRAW, given,
           c.x.data, c.x_in.data, c.shape.images, c.shape.channels, pixels);
}

template <auto KERNEL>
void one_element_a_thread(Case& c, int threads) {
    launch(KERNEL, blocks(c.shape.elements(), threads), threads, 0, c.request.data, c.level.data, c.x.data, c.x_in.data,
           c.shape.images, c.size());
}

int main(int argc, char** argv) {
    const std::vector<Version<Case>> versions = {
        {"1 a launch for each operation, in double", 4 + 8 + 8 + 6, eager},
        {"2 fused, in double", 4 + 2, one_element_a_thread<fused>},
        {"3 polynomials in float, one of four kept", 4 + 2, one_element_a_thread<polynomials>},
        {"4 a block of noise and four elements a thread", 4 + 2,
         [](Case& c, int threads) {
             const size_t items = static_cast<size_t>(c.shape.images) * ((c.size() + 3) / 4);
             launch(fours, blocks(items, threads), threads, 0, c.request.data, c.level.data, c.x.data, c.x_in.data,
                    c.shape.images, c.size());
         }},
        {"5 cm_first_noise_half_nchw", 4 + 2, shipped},
    };
    return climb(argc, argv, versions, shapes(3), {256, 3, 64 * 64}, 256);
}
