// What the five ladders share: memory, launches, the verdict on a version, the reference's noise, and the clock.
//
// A ladder has a Case, made of a Shape, with `clear()` before a run and `check(Verdict&)` after it, and Versions in order,
// the last of them the kernel that ships. Each is checked at every shape and block size before any is timed.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "../portable.h"

#define CUDA(CALL) succeed((CALL), #CALL)

inline void succeed(cudaError_t error, const char* what) {
    if (error == cudaSuccess) return;
    fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
    exit(1);
}

// Memory of the device, with GUARD bytes behind it that no version may write.
template <class T>
struct Memory {
    static constexpr int GUARD = 64, FILL = 0x5a;
    const size_t count;
    T* data = nullptr;

    explicit Memory(size_t count) : count(count) {
        CUDA(cudaMalloc(&data, bytes() + GUARD));
        clear();
    }
    explicit Memory(const std::vector<T>& values) : Memory(values.size()) {
        CUDA(cudaMemcpy(data, values.data(), bytes(), cudaMemcpyHostToDevice));
    }
    Memory(const Memory&) = delete;
    ~Memory() { cudaFree(data); }

    size_t bytes() const { return count * sizeof(T); }
    void clear() { CUDA(cudaMemset(data, FILL, bytes() + GUARD)); }
    std::vector<T> values() const {
        std::vector<T> values(count);
        CUDA(cudaMemcpy(values.data(), data, bytes(), cudaMemcpyDeviceToHost));
        return values;
    }
    bool is_overrun() const {
        std::array<unsigned char, GUARD> guard;
        CUDA(cudaMemcpy(guard.data(), data + count, GUARD, cudaMemcpyDeviceToHost));
        return std::any_of(guard.begin(), guard.end(), [](unsigned char byte) { return byte != FILL; });
    }
};

// Launches

inline cudaStream_t stream;

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared, Arguments... arguments) {
    kernel<<<grid, threads, shared, stream>>>(arguments...);
}

inline uint32_t blocks(size_t items, int threads) { return static_cast<uint32_t>((items + threads - 1) / threads); }

// What eager code launches for each operation: to[i] = op(from[i]...), a thread an element.
template <class Op, class To, class... From>
__global__ void map_elements(Op op, size_t count, To* to, const From*... from) {
    const size_t i = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < count) to[i] = op(from[i]...);
}

template <class Op, class To, class... From>
void map(Op op, size_t count, int threads, To* to, const From*... from) {
    void (*kernel)(Op, size_t, To*, const From*...) = map_elements<Op, To, From...>;
    launch(kernel, blocks(count, threads), threads, 0, op, count, to, from...);
}

CM_INLINE Half rounded(float value) {
    Half half;
    round_to(value, half);
    return half;
}

struct Cast {
    __device__ Half operator()(float value) const { return rounded(value); }
};

struct Scale {
    float factor;
    __device__ float operator()(float value) const { return factor * value; }
};

// Shapes, inputs and references

struct Shape {
    uint32_t images, channels, pixels;
    size_t elements() const { return static_cast<size_t>(images) * channels * pixels; }
};

// Awkward ones, and one each for runs of 4 and of 8.
inline std::vector<Shape> shapes(uint32_t channels) {
    std::vector<Shape> all;
    for (uint32_t pixels : {1, 3, 7, 12, 255, 1023, 1024})
        for (uint32_t images : {1, 5}) all.push_back({images, channels, pixels});
    return all;
}

// Numbers from -scale to scale, the same on every machine (splitmix64).
inline std::vector<float> inputs(size_t count, float scale, uint64_t seed) {
    std::vector<float> values(count);
    for (size_t i = 0; i < count; i++) {
        uint64_t bits = (seed << 40) + (i + 1) * 0x9E3779B97F4A7C15u;
        bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9u;
        bits = (bits ^ bits >> 27) * 0x94D049BB133111EBu;
        values[i] = scale * (static_cast<float>(bits >> 40) * 0x1p-23f - 1.0f);
    }
    return values;
}

inline std::vector<Half> halves(const std::vector<float>& values) {
    std::vector<Half> all(values.size());
    std::transform(values.begin(), values.end(), all.begin(), [](float value) { return __float2half_rn(value); });
    return all;
}

// Philox4x32-10 as its paper has it, to hold philox.h to; checked by the authors' known answer.
using Counter = std::array<uint32_t, 4>;
constexpr Counter reference_words(Counter counter, std::array<uint32_t, 2> key) {
    for (int round = 0; round < 10; round++) {
        const uint64_t product0 = uint64_t{0xD2511F53} * counter[0], product1 = uint64_t{0xCD9E8D57} * counter[2];
        const uint32_t high0 = product0 >> 32, high1 = product1 >> 32;
        counter = {high1 ^ counter[1] ^ key[0], static_cast<uint32_t>(product1), high0 ^ counter[3] ^ key[1],
                   static_cast<uint32_t>(product0)};
        key = {key[0] + 0x9E3779B9, key[1] + 0xBB67AE85};
    }
    return counter;
}
constexpr Counter KNOWN = reference_words({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0});
static_assert(KNOWN[0] == 0xd16cfe09 && KNOWN[1] == 0x94fdcceb && KNOWN[2] == 0x5001e420 && KNOWN[3] == 0x24126ea1, "");

// The normal of one element, as cm_runtime/noise.py defines it.
inline double reference_normal(uint64_t seed, uint64_t image, uint32_t draw, size_t element) {
    const Counter words =
        reference_words({static_cast<uint32_t>(element / 4), draw, static_cast<uint32_t>(image),
                         static_cast<uint32_t>(image >> 32)},
                        {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)});
    const size_t pair = element % 4 / 2 * 2;
    const double u = (words[pair] + 0.5) / 4294967296.0, v = (words[pair + 1] + 0.5) / 4294967296.0;
    const double radius = std::sqrt(-2.0 * std::log(u)), angle = 2.0 * 3.14159265358979323846 * v;
    return radius * (element % 2 ? std::cos(angle) : std::sin(angle));
}

constexpr double HALF_ULP = 1.0 / 2048;  // relative, of what is rounded to half precision once

inline double number(float value) { return value; }
inline double number(int value) { return value; }
inline double number(uint8_t value) { return value; }
inline double number(Half value) { return __half2float(value); }

// The largest error of a version, as a share of what is allowed: above 1 is wrong.
struct Verdict {
    double worst = 0;
    std::string wrong;

    // got may differ from expected by relative |expected| + absolute.
    template <class T>
    void compare(const char* name, const Memory<T>& got, const std::vector<double>& expected, double relative,
                 double absolute) {
        const std::vector<T> values = got.values();
        for (size_t i = 0; i < values.size(); i++) {
            const double value = number(values[i]), allowed = relative * std::fabs(expected[i]) + absolute;
            const double error = std::fabs(value - expected[i]) / allowed;
            worst = std::max(worst, error);
            if (error <= 1 || !wrong.empty()) continue;  // a NaN is not
            char text[128];
            snprintf(text, sizeof text, "%s[%zu] is %.9g, not %.9g within %.2g", name, i, value, expected[i], allowed);
            wrong = text;
        }
        if (got.is_overrun() && wrong.empty()) wrong = std::string("what lies behind ") + name + " is overwritten";
    }
};

// The clock

struct Times {
    double median, lowest, highest;  // milliseconds
};

// Of one run among `runs` in a CUDA graph, which is how the runtime launches them.
template <class Run>
Times clocked(int runs, Run run) {
    constexpr int WARM_UP = 3, REPEATS = 21;
    cudaGraph_t graph;
    cudaGraphExec_t executable;
    CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < runs; i++) run(i);
    CUDA(cudaStreamEndCapture(stream, &graph));
    CUDA(cudaGraphInstantiate(&executable, graph, 0));
    cudaEvent_t begin, end;
    CUDA(cudaEventCreate(&begin));
    CUDA(cudaEventCreate(&end));
    std::vector<double> times;
    for (int i = 0; i < WARM_UP + REPEATS; i++) {
        float milliseconds;
        CUDA(cudaEventRecord(begin, stream));
        CUDA(cudaGraphLaunch(executable, stream));
        CUDA(cudaEventRecord(end, stream));
        CUDA(cudaEventSynchronize(end));
        CUDA(cudaEventElapsedTime(&milliseconds, begin, end));
        if (i >= WARM_UP) times.push_back(milliseconds / runs);
    }
    std::sort(times.begin(), times.end());
    CUDA(cudaEventDestroy(begin));
    CUDA(cudaEventDestroy(end));
    CUDA(cudaGraphExecDestroy(executable));
    CUDA(cudaGraphDestroy(graph));
    return {times[REPEATS / 2], times.front(), times.back()};
}

template <class Case>
struct Version {
    const char* name;
    double bytes;  // that its launches read and write in all, for each element
    void (*run)(Case&, int threads);
};

// Checks at `threads` and at other block sizes; ends the program where a version is wrong. The largest errors.
template <class Case>
std::vector<double> checked(const std::vector<Version<Case>>& versions, const std::vector<Shape>& shapes, int threads) {
    std::vector<double> worst(versions.size());
    for (const Shape& shape : shapes) {
        Case c(shape);
        for (size_t v = 0; v < versions.size(); v++)
            for (int block : {32, 64, 96, 128, 256, 512, 1024}) {
                c.clear();
                versions[v].run(c, block);
                const cudaError_t error = cudaGetLastError();
                if (error == cudaErrorLaunchOutOfResources && block > threads) continue;  // too many registers
                succeed(error, versions[v].name);
                CUDA(cudaStreamSynchronize(stream));
                Verdict verdict;
                c.check(verdict);
                worst[v] = std::max(worst[v], verdict.worst);
                if (verdict.wrong.empty()) continue;
                fprintf(stderr, "\"%s\" is wrong for %u images of %ux%u in blocks of %d: %s\n", versions[v].name,
                        shape.images, shape.channels, shape.pixels, block, verdict.wrong.c_str());
                exit(1);
            }
    }
    return worst;
}

// Times them at `big`, each run with the next of several sets of memory, so that the cache never has what it needs.
template <class Case>
void timed(const std::vector<Version<Case>>& versions, const std::vector<double>& worst, Shape big, int threads) {
    int cache;
    cudaDeviceProp device;
    CUDA(cudaDeviceGetAttribute(&cache, cudaDevAttrL2CacheSize, 0));
    CUDA(cudaGetDeviceProperties(&device, 0));
    const size_t size = static_cast<size_t>(versions.back().bytes * big.elements() / 2) / 256 * 256;
    const int sets = 2 + static_cast<int>(4.0 * cache / (2.0 * size)), runs = 4 * sets;
    const Memory<uint8_t> from(size * sets), to(size * sets);
    const Times copy = clocked(runs, [&](int i) {
        const size_t at = i % sets * size;
        CUDA(cudaMemcpyAsync(to.data + at, from.data + at, size, cudaMemcpyDeviceToDevice, stream));
    });
    std::vector<std::unique_ptr<Case>> cases;
    for (int i = 0; i < sets; i++) cases.push_back(std::make_unique<Case>(big));

    printf("%s, %u images of %ux%u, %d sets of memory; errors are shares of what is allowed\n", device.name, big.images,
           big.channels, big.pixels, sets);
    printf("%-48s %9s %19s %8s %7s %8s %7s\n", "version", "ms", "lowest - highest", "MB", "GB/s", "of copy", "error");
    const auto row = [&](const char* name, const Times& times, double bytes, double error) {
        const double rate = bytes / times.median * 1e-6, best = 2.0 * size / copy.median * 1e-6;
        printf("%-48s %9.4f %9.4f %9.4f %8.1f %7.0f %7.1f%% %7.3f\n", name, times.median, times.lowest, times.highest,
               bytes * 1e-6, rate, 100 * rate / best, error);
    };
    row("0 cudaMemcpyAsync", copy, 2.0 * size, 0);
    for (size_t v = 0; v < versions.size(); v++) {
        const Times times = clocked(runs, [&](int i) { versions[v].run(*cases[i % sets], threads); });
        row(versions[v].name, times, versions[v].bytes * big.elements(), worst[v]);
    }
}

// What each main does: checks, then times, the version that its argument names, or all. threads: of a block when timed.
template <class Case>
int climb(int argc, char** argv, std::vector<Version<Case>> versions, std::vector<Shape> shapes, Shape big, int threads) {
    if (argc > 1) {
        const int asked = atoi(argv[1]), last = static_cast<int>(versions.size());
        if (asked < 1 || asked > last) {
            fprintf(stderr, "%s: versions are 1 to %d\n", argv[0], last);
            return 2;
        }
        versions = {versions[asked - 1]};
    }
    CUDA(cudaStreamCreate(&stream));
    shapes.push_back(big);
    timed(versions, checked(versions, shapes, threads), big, threads);
    return 0;
}
