// What happens between two evaluations of the network, in one launch: each input read once, each output written once.
//
//     first:   x = sigma_0 z_0                                       x_in = c_in x
//     step:    x0 = project(clamp(c_skip x + c_out F))
//              x = x0 + sqrt(sigma_k^2 - sigma_min^2) z_k            x_in = c_in x
//     finish:  x0 = project(clamp(c_skip x + c_out F)), as uint8 or float32 NHWC
//
// arXiv 2303.01469, algorithms 1 and 4. `sampling.HostSteps` is the same in NumPy. Images x are float32 in the layout of the
// network, NCHW or NHWC; F and x_in have its type; what an edit knows and noise that is given are float32 NCHW.
//
// A thread owns W neighbouring pixels: as many as 16 bytes of the network's type hold, or one where the image is no
// multiple of them. It reads before it writes, so x may be written over x, and x_in over F.

#include "philox.h"

// A noise level's coefficients, in memory of the GPU, so that one captured graph serves requests of any levels.
struct Level {
    float c_skip, c_out, renoise, c_in;
};

// Tiles: C channels of W pixels

// image: of `channels` planes of `pixels` in NCHW, of `pixels` runs of `channels` in NHWC, where C is 1 or all channels.
template <bool NHWC, int C, int W, class T>
CM_INLINE void load_tile(const T* image, uint32_t channels, uint32_t pixels, uint32_t c, uint32_t pixel,
                         float (&tile)[C][W]) {
    if constexpr (NHWC && C > 1) {
        T run[W * C];
        load(image + pixel * C, run);
#pragma unroll
        for (int i = 0; i < W * C; i++) tile[i % C][i / C] = as_float(run[i]);
    } else if constexpr (NHWC) {
#pragma unroll
        for (int i = 0; i < W; i++) tile[0][i] = as_float(image[(pixel + i) * channels + c]);
    } else {
#pragma unroll
        for (int j = 0; j < C; j++) {
            T run[W];
            load(image + (c + j) * pixels + pixel, run);
#pragma unroll
            for (int i = 0; i < W; i++) tile[j][i] = as_float(run[i]);
        }
    }
}

template <bool NHWC, int C, int W, class T>
CM_INLINE void store_tile(const float (&tile)[C][W], T* image, uint32_t channels, uint32_t pixels, uint32_t c,
                          uint32_t pixel) {
    if constexpr (NHWC && C > 1) {
        T run[W * C];
#pragma unroll
        for (int i = 0; i < W * C; i++) round_to(tile[i % C][i / C], run[i]);
        store(run, image + pixel * C);
    } else if constexpr (NHWC) {
#pragma unroll
        for (int i = 0; i < W; i++) round_to(tile[0][i], image[(pixel + i) * channels + c]);
    } else {
#pragma unroll
        for (int j = 0; j < C; j++) {
            T run[W];
#pragma unroll
            for (int i = 0; i < W; i++) round_to(tile[j][i], run[i]);
            store(run, image + (c + j) * pixels + pixel);
        }
    }
}

// Standard normals of W elements of draw `draw` from `element` on, given or drawn. A run of 4 or 8 begins with a block.
template <int W>
CM_INLINE void noise(const Request* request, const float* given, uint32_t draw, uint32_t n, uint32_t size,
                     uint32_t element, float (&z)[W]) {
    if (given) {
        load(given + static_cast<size_t>(n) * size + element, z);
    } else if constexpr (W >= 4) {
#pragma unroll
        for (int i = 0; i < W; i += 4) {
            float four[4];
            normals(*request, draw, n, element / 4 + i / 4, four);
#pragma unroll
            for (int j = 0; j < 4; j++) z[i + j] = four[j];
        }
    } else {  // within one block
        float four[4];
        normals(*request, draw, n, element / 4, four);
#pragma unroll
        for (int i = 0; i < W; i++) {
            const uint32_t place = element % 4 + i;
            z[i] = place == 0 ? four[0] : place == 1 ? four[1] : place == 2 ? four[2] : four[3];
        }
    }
}

// Projections: x0 with what an edit knows put in its place, exactly. Known images have a stride of 0 where all share one.

struct Plain {
    static constexpr int CHANNELS = 0;  // any

    template <int C, int W>
    CM_INLINE void project(float (&)[C][W], uint32_t, uint32_t, uint32_t, uint32_t) const {}
};

// m y + (1 - m) x0; y, known: (N or 1, C, H, W); m, mask: (N or 1, C or 1, H, W)
struct Mask {
    static constexpr int CHANNELS = 0;
    const float *known, *mask;
    uint32_t known_stride, mask_stride, mask_channel_stride;

    template <int C, int W>
    CM_INLINE void project(float (&x0)[C][W], uint32_t n, uint32_t c, uint32_t pixel, uint32_t pixels) const {
#pragma unroll
        for (int j = 0; j < C; j++) {
            float y[W], m[W];
            load(known + static_cast<size_t>(n) * known_stride + (c + j) * pixels + pixel, y);
            load(mask + static_cast<size_t>(n) * mask_stride + (c + j) * mask_channel_stride + pixel, m);
#pragma unroll
            for (int i = 0; i < W; i++) x0[j][i] = fmaf(m[i], y[i], (1.0f - m[i]) * x0[j][i]);
        }
    }
};

// x0 + w (w.y - w.x0) / |w|^2; known: w.y (N or 1, H, W); v = w / |w|^2
struct Luma {
    static constexpr int CHANNELS = 3;
    const float* known;
    uint32_t known_stride;
    float w[3], v[3];

    template <int W>
    CM_INLINE void project(float (&x0)[3][W], uint32_t n, uint32_t, uint32_t pixel, uint32_t) const {
        float y[W];
        load(known + static_cast<size_t>(n) * known_stride + pixel, y);
#pragma unroll
        for (int i = 0; i < W; i++) {
            const float luma = fmaf(w[2], x0[2][i], fmaf(w[1], x0[1][i], w[0] * x0[0][i]));
#pragma unroll
            for (int c = 0; c < 3; c++) x0[c][i] = fmaf(v[c], y[i] - luma, x0[c][i]);
        }
    }
};

// x0 + (mean of y - mean of x0) in each PxP patch; known: the means (N or 1, C, H / P, W / P). Works on patches.
struct Patch {
    const float* known;
    uint32_t known_stride, width;
};

// A step

// Out: the type of F; In: that of x_in.
template <class Out, class In>
struct Step {
    const Request* request;
    const Level* level;
    uint32_t draw;
    const float *given, *x;
    const Out* F;
    float* x_next;
    In* x_in;
    uint32_t images, channels, pixels, clip;
    int* not_finite;
};

template <class Out>
struct Finish {
    const Level* level;
    const float* x;
    const Out* F;
    uint8_t* bytes;
    float* floats;
    uint32_t images, channels, pixels, clip;
    int* not_finite;
};

// clamp(c_skip x + c_out F), or clamp(F) where there is no x: then F is f itself. True where all of it is finite.
template <bool NHWC, int C, int W, class S>
CM_INLINE bool denoised(const S& s, const Level& level, size_t image, uint32_t c, uint32_t pixel, float (&x0)[C][W]) {
    load_tile<NHWC>(s.F + image, s.channels, s.pixels, c, pixel, x0);
    if (s.x) {
        float x[C][W];
        load_tile<NHWC>(s.x + image, s.channels, s.pixels, c, pixel, x);
#pragma unroll
        for (int j = 0; j < C; j++)
#pragma unroll
            for (int i = 0; i < W; i++) x0[j][i] = fmaf(level.c_skip, x[j][i], level.c_out * x0[j][i]);
    }
    bool all_finite = true;
#pragma unroll
    for (int j = 0; j < C; j++)
#pragma unroll
        for (int i = 0; i < W; i++) {
            all_finite = all_finite && is_finite(x0[j][i]);
            if (s.clip) x0[j][i] = fminf(fmaxf(x0[j][i], -1.0f), 1.0f);
        }
    return all_finite;
}

// x = x0 + renoise z in place of x0, and its scaled copy for the network.
template <bool NHWC, int C, int W, class Out, class In>
CM_INLINE void renoised(const Step<Out, In>& s, const Level& level, uint32_t n, size_t image, uint32_t c, uint32_t pixel,
                        float (&x0)[C][W]) {
#pragma unroll
    for (int j = 0; j < C; j++) {
        float z[W];
        noise(s.request, s.given, s.draw, n, s.channels * s.pixels, (c + j) * s.pixels + pixel, z);
#pragma unroll
        for (int i = 0; i < W; i++) x0[j][i] = fmaf(level.renoise, z[i], x0[j][i]);
    }
    store_tile<NHWC>(x0, s.x_next + image, s.channels, s.pixels, c, pixel);
    if (s.x_in) {
#pragma unroll
        for (int j = 0; j < C; j++)
#pragma unroll
            for (int i = 0; i < W; i++) x0[j][i] *= level.c_in;
        store_tile<NHWC>(x0, s.x_in + image, s.channels, s.pixels, c, pixel);
    }
}

// uint8 NHWC: rint((clip(x0) + 1) 127.5), half to even; or x0 itself.
template <int C, int W, class Out>
CM_INLINE void written(const Finish<Out>& s, size_t image, uint32_t c, uint32_t pixel, const float (&x0)[C][W]) {
    if (s.floats && C == s.channels) store_tile<(C > 1)>(x0, s.floats + image, C, s.pixels, c, pixel);
    if (s.floats && C != s.channels) store_tile<true>(x0, s.floats + image, s.channels, s.pixels, c, pixel);
    if (s.bytes) {
        uint8_t run[W * C];
#pragma unroll
        for (int i = 0; i < W * C; i++) {
            const float clipped = fminf(fmaxf(x0[i % C][i / C], -1.0f), 1.0f);
            run[i] = static_cast<uint8_t>(rintf((clipped + 1.0f) * 127.5f));
        }
        uint8_t* to = s.bytes + image;
        if (C == s.channels) {
            store(run, to + pixel * C);
        } else {
#pragma unroll
            for (int i = 0; i < W; i++) to[(pixel + i) * s.channels + c] = run[i];
        }
    }
}

// A launch is any number of blocks: each thread takes every (number of threads)-th item.
template <class Body>
CM_INLINE void each(uint32_t count, Body body) {
    const uint64_t stride = static_cast<uint64_t>(gridDim.x) * blockDim.x;
    for (uint64_t i = static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += stride)
        body(static_cast<uint32_t>(i));
}

template <int W>
struct Width {
    static constexpr int value = W;
};

// body(Width<W>, n, pixel) for W pixels at a time: those of 16 bytes of T, or 1 where they do not divide the image.
template <class T, class Body>
CM_INLINE void each_run(uint32_t images, uint32_t pixels, Body body) {
    constexpr int most = 16 / sizeof(T);
    const auto runs = [&](auto width) {
        constexpr int W = decltype(width)::value;
        const uint32_t per_image = pixels / W;
        each(images * per_image, [&](uint32_t i) {
            const uint32_t n = i / per_image;
            body(width, n, (i - n * per_image) * W);
        });
    };
    if (pixels % most == 0) {
        runs(Width<most>());
    } else {
        runs(Width<1>());
    }
}

// body(Width<C>, c) for the channels c to c + C - 1: three at once where they lie side by side or the body needs them so.
template <bool SIDE_BY_SIDE, int CHANNELS, class Body>
CM_INLINE void each_channel(uint32_t channels, Body body) {
    if constexpr (CHANNELS != 0) {
        body(Width<CHANNELS>(), 0);
    } else {
        if (SIDE_BY_SIDE && channels == 3) {
            body(Width<3>(), 0);
        } else {
            for (uint32_t c = 0; c < channels; c++) body(Width<1>(), c);
        }
    }
}

template <bool NHWC, class In>
CM_INLINE void first(const Step<In, In>& given) {
    const Level level = *given.level;
    const Request request = *given.request;  // in registers: this kernel has the fewest bytes to hide its noise behind
    Step<In, In> s = given;
    s.request = &request;
    each_run<In>(s.images, s.pixels, [&](auto width, uint32_t n, uint32_t pixel) {
        const size_t image = static_cast<size_t>(n) * s.channels * s.pixels;
        each_channel<NHWC, 0>(s.channels, [&](auto channels, uint32_t c) {
            float x[decltype(channels)::value][decltype(width)::value] = {};
            renoised<NHWC>(s, level, n, image, c, pixel, x);
        });
    });
}

template <bool NHWC, class Out, class In, class Edit>
CM_INLINE void step(const Step<Out, In>& s, const Edit& edit) {
    const Level level = *s.level;
    bool all_finite = true;
    each_run<In>(s.images, s.pixels, [&](auto width, uint32_t n, uint32_t pixel) {
        const size_t image = static_cast<size_t>(n) * s.channels * s.pixels;
        each_channel<NHWC, Edit::CHANNELS>(s.channels, [&](auto channels, uint32_t c) {
            float x0[decltype(channels)::value][decltype(width)::value];
            all_finite &= denoised<NHWC>(s, level, image, c, pixel, x0);
            edit.project(x0, n, c, pixel, s.pixels);
            renoised<NHWC>(s, level, n, image, c, pixel, x0);
        });
    });
    if (!all_finite) *s.not_finite = 1;
}

template <bool NHWC, class Out, class Edit>
CM_INLINE void finish(const Finish<Out>& s, const Edit& edit) {
    const Level level = *s.level;
    bool all_finite = true;
    each_run<Out>(s.images, s.pixels, [&](auto width, uint32_t n, uint32_t pixel) {
        const size_t image = static_cast<size_t>(n) * s.channels * s.pixels;
        each_channel<true, Edit::CHANNELS>(s.channels, [&](auto channels, uint32_t c) {
            float x0[decltype(channels)::value][decltype(width)::value];
            all_finite &= denoised<NHWC>(s, level, image, c, pixel, x0);
            edit.project(x0, n, c, pixel, s.pixels);
            written(s, image, c, pixel, x0);
        });
    });
    if (!all_finite) *s.not_finite = 1;
}

// Patches: a thread owns the PxP pixels of one and goes over them twice, for the mean and for the rest. What it reads
// again is in the cache still.

// body(n, c, first pixel, patch) for each patch of each channel.
template <class S, class Body>
CM_INLINE void each_patch(const S& s, uint32_t P, uint32_t width, Body body) {
    const uint32_t across = width / P, per_channel = s.pixels / (P * P);
    each(s.images * s.channels * per_channel, [&](uint32_t i) {
        const uint32_t plane = i / per_channel, patch = i - plane * per_channel;
        const uint32_t n = plane / s.channels, row = patch / across;
        body(n, plane - n * s.channels, row * P * width + (patch - row * across) * P, patch);
    });
}

// body(x0, pixel) for W pixels at a time of a patch, clamp(f); true where all of it is finite.
template <bool NHWC, int W, class S, class Body>
CM_INLINE bool over_patch(const S& s, const Level& level, size_t image, uint32_t c, uint32_t pixel, uint32_t P,
                          uint32_t width, Body body) {
    bool all_finite = true;
    for (uint32_t row = 0; row < P; row++)
        for (uint32_t i = 0; i < P; i += W) {
            float x0[1][W];
            all_finite &= denoised<NHWC>(s, level, image, c, pixel + row * width + i, x0);
            body(x0, pixel + row * width + i);
        }
    return all_finite;
}

// write(x0, n, image, c, pixel) for W pixels at a time, moved to the mean that is known of their patch.
template <bool NHWC, int W, class S, class Write>
CM_INLINE void project_patches(const S& s, const Patch& edit, uint32_t P, Write write) {
    const Level level = *s.level;
    const uint32_t per_channel = s.pixels / (P * P);
    bool all_finite = true;
    each_patch(s, P, edit.width, [&](uint32_t n, uint32_t c, uint32_t pixel, uint32_t patch) {
        const size_t image = static_cast<size_t>(n) * s.channels * s.pixels;
        float sum = 0.0f;
        all_finite &= over_patch<NHWC, W>(s, level, image, c, pixel, P, edit.width, [&](auto& x0, uint32_t) {
#pragma unroll
            for (int i = 0; i < W; i++) sum += x0[0][i];
        });
        const float mean = edit.known[static_cast<size_t>(n) * edit.known_stride + c * per_channel + patch];
        const float difference = mean - sum / static_cast<float>(P * P);
        over_patch<NHWC, W>(s, level, image, c, pixel, P, edit.width, [&](auto& x0, uint32_t at) {
#pragma unroll
            for (int i = 0; i < W; i++) x0[0][i] += difference;
            write(level, x0, n, image, c, at);
        });
    });
    if (!all_finite) *s.not_finite = 1;
}

template <bool NHWC, class Out, class In>
CM_INLINE void step_patches(const Step<Out, In>& s, const Patch& edit, uint32_t P) {
    const auto write = [&](const Level& level, auto& x0, uint32_t n, size_t image, uint32_t c, uint32_t pixel) {
        renoised<NHWC>(s, level, n, image, c, pixel, x0);
    };
    if (P % 4 == 0) {
        project_patches<NHWC, 4>(s, edit, P, write);
    } else {
        project_patches<NHWC, 2>(s, edit, P, write);
    }
}

template <bool NHWC, class Out>
CM_INLINE void finish_patches(const Finish<Out>& s, const Patch& edit, uint32_t P) {
    const auto write = [&](const Level&, auto& x0, uint32_t, size_t image, uint32_t c, uint32_t pixel) {
        written(s, image, c, pixel, x0);
    };
    if (P % 4 == 0) {
        project_patches<NHWC, 4>(s, edit, P, write);
    } else {
        project_patches<NHWC, 2>(s, edit, P, write);
    }
}

// Entry points: cm_first_noise, cm_step and cm_finish, for each type and layout, the latter two for each projection.
// kernels/launches.py calls them. The step of a network in half types whose last convolution is float32 has names of its
// own, as cm_step_half_float_nchw.

#define STEP_ARGUMENTS(OUT, IN)                                                                                      \
    const Request *request, const Level *level, uint32_t draw, const float *given, const float *x, const OUT *F,     \
        float *x_next, IN *x_in, uint32_t images, uint32_t channels, uint32_t pixels, uint32_t clip, int *not_finite
#define STEP(OUT, IN) \
    Step<OUT, IN> { request, level, draw, given, x, F, x_next, x_in, images, channels, pixels, clip, not_finite }
#define FINISH_ARGUMENTS(OUT)                                                                       \
    const Level *level, const float *x, const OUT *F, uint8_t *bytes, float *floats, uint32_t images, \
        uint32_t channels, uint32_t pixels, uint32_t clip, int *not_finite
#define FINISH(OUT) \
    Finish<OUT> { level, x, F, bytes, floats, images, channels, pixels, clip, not_finite }
#define MASK_ARGUMENTS                                                                                               \
    const float *known, const float *mask, uint32_t known_stride, uint32_t mask_stride, uint32_t mask_channel_stride
#define MASK \
    Mask { known, mask, known_stride, mask_stride, mask_channel_stride }
#define LUMA_ARGUMENTS \
    const float *known, uint32_t known_stride, float w0, float w1, float w2, float v0, float v1, float v2
#define LUMA \
    Luma { known, known_stride, {w0, w1, w2}, {v0, v1, v2} }
#define PATCH_ARGUMENTS const float *known, uint32_t known_stride, uint32_t width, uint32_t P
#define PATCH \
    Patch { known, known_stride, width }

#define STEPS(SUFFIX, OUT, IN, NHWC)                                                                     \
    CM_ENTRY(cm_step_##SUFFIX)(STEP_ARGUMENTS(OUT, IN)) { step<NHWC>(STEP(OUT, IN), Plain{}); }          \
    CM_ENTRY(cm_step_mask_##SUFFIX)(STEP_ARGUMENTS(OUT, IN), MASK_ARGUMENTS) {                           \
        step<NHWC>(STEP(OUT, IN), MASK);                                                                 \
    }                                                                                                    \
    CM_ENTRY(cm_step_luma_##SUFFIX)(STEP_ARGUMENTS(OUT, IN), LUMA_ARGUMENTS) {                           \
        step<NHWC>(STEP(OUT, IN), LUMA);                                                                 \
    }                                                                                                    \
    CM_ENTRY(cm_step_patch_##SUFFIX)(STEP_ARGUMENTS(OUT, IN), PATCH_ARGUMENTS) {                         \
        step_patches<NHWC>(STEP(OUT, IN), PATCH, P);                                                     \
    }                                                                                                    \
    CM_REGISTER(cm_step_##SUFFIX, false)                                                                 \
    CM_REGISTER(cm_step_mask_##SUFFIX, false)                                                            \
    CM_REGISTER(cm_step_luma_##SUFFIX, false)                                                            \
    CM_REGISTER(cm_step_patch_##SUFFIX, false)

#define KERNELS(SUFFIX, T, NHWC)                                                                         \
    CM_ENTRY(cm_first_noise_##SUFFIX)                                                                    \
    (const Request* request, const Level* level, uint32_t draw, const float* given, float* x, T* x_in,   \
     uint32_t images, uint32_t channels, uint32_t pixels) {                                              \
        first<NHWC>(Step<T, T>{request, level, draw, given, nullptr, nullptr, x, x_in, images, channels, \
                               pixels, 0, nullptr});                                                     \
    }                                                                                                    \
    STEPS(SUFFIX, T, T, NHWC)                                                                            \
    CM_ENTRY(cm_finish_##SUFFIX)(FINISH_ARGUMENTS(T)) { finish<NHWC>(FINISH(T), Plain{}); }              \
    CM_ENTRY(cm_finish_mask_##SUFFIX)(FINISH_ARGUMENTS(T), MASK_ARGUMENTS) {                             \
        finish<NHWC>(FINISH(T), MASK);                                                                   \
    }                                                                                                    \
    CM_ENTRY(cm_finish_luma_##SUFFIX)(FINISH_ARGUMENTS(T), LUMA_ARGUMENTS) {                             \
        finish<NHWC>(FINISH(T), LUMA);                                                                   \
    }                                                                                                    \
    CM_ENTRY(cm_finish_patch_##SUFFIX)(FINISH_ARGUMENTS(T), PATCH_ARGUMENTS) {                           \
        finish_patches<NHWC>(FINISH(T), PATCH, P);                                                       \
    }                                                                                                    \
    CM_REGISTER(cm_first_noise_##SUFFIX, false)                                                          \
    CM_REGISTER(cm_finish_##SUFFIX, false)                                                               \
    CM_REGISTER(cm_finish_mask_##SUFFIX, false)                                                          \
    CM_REGISTER(cm_finish_luma_##SUFFIX, false)                                                          \
    CM_REGISTER(cm_finish_patch_##SUFFIX, false)

KERNELS(float_nchw, float, false)
KERNELS(float_nhwc, float, true)
KERNELS(half_nchw, Half, false)
KERNELS(half_nhwc, Half, true)
KERNELS(bfloat16_nchw, BFloat16, false)
KERNELS(bfloat16_nhwc, BFloat16, true)
STEPS(half_float_nchw, float, Half, false)
STEPS(half_float_nhwc, float, Half, true)
STEPS(bfloat16_float_nchw, float, BFloat16, false)
STEPS(bfloat16_float_nhwc, float, BFloat16, true)
