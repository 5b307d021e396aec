// Launches the kernels on the host: `make host` builds build/host.so, which the tests load.

#include <stdio.h>
#include <ucontext.h>

#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "philox.h"

Dim3 gridDim, blockDim, blockIdx, threadIdx;
unsigned char* shared_memory;

namespace {

struct Kernel {
    Call call;
    bool has_barriers;
};

std::map<std::string, Kernel>& kernels() {
    static std::map<std::string, Kernel> all;
    return all;
}

constexpr size_t STACK = 64 << 10;
struct Thread {
    ucontext_t context;
    bool is_done;
    std::vector<unsigned char> stack = std::vector<unsigned char>(STACK);
};
std::vector<Thread> threads;
ucontext_t scheduler;
size_t running;
Call running_call;
void** running_arguments;

void start() {
    running_call(running_arguments);
    threads[running].is_done = true;
    swapcontext(&threads[running].context, &scheduler);
}

Dim3 thread_index(size_t i) {
    const unsigned x = i % blockDim.x, y = i / blockDim.x % blockDim.y, z = i / blockDim.x / blockDim.y;
    return {x, y, z};
}

// Runs every thread to its next barrier, over and over; false where some end and others wait. Odd turns go backwards, so
// that what needs a barrier and has none is seen.
bool run_block(size_t count) {
    for (size_t i = 0; i < count; i++) {
        Thread& thread = threads[i];
        thread.is_done = false;
        getcontext(&thread.context);
        thread.context.uc_stack.ss_sp = thread.stack.data();
        thread.context.uc_stack.ss_size = STACK;
        thread.context.uc_link = nullptr;
        makecontext(&thread.context, start, 0);
    }
    for (bool is_backwards = false;; is_backwards = !is_backwards) {
        size_t done = 0;
        for (size_t i = 0; i < count; i++) {
            running = is_backwards ? count - 1 - i : i;
            threadIdx = thread_index(running);
            swapcontext(&scheduler, &threads[running].context);
            done += threads[running].is_done;
        }
        if (done == count) return true;
        if (done) return false;
    }
}

}  // namespace

void __syncthreads() { swapcontext(&threads[running].context, &scheduler); }

void register_kernel(const char* name, Call call, bool has_barriers) { kernels()[name] = {call, has_barriers}; }

// The names of all kernels, a line each.
extern "C" const char* cm_kernels() {
    static std::string names;
    names.clear();
    for (const auto& kernel : kernels()) names += kernel.first + "\n";
    return names.c_str();
}

// philox.h's words of a counter and a key, four and two words, by themselves.
extern "C" void cm_words(const uint32_t* counter, const uint32_t* key, uint32_t* words) {
    const Words made = philox({counter[0], counter[1], counter[2], counter[3]}, key[0], key[1]);
    memcpy(words, &made, sizeof made);
}

// The two normals of two words.
extern "C" void cm_box_muller(uint32_t a, uint32_t b, float* z) {
    float sine, cosine;
    sine_cosine(b, sine, cosine);
    z[0] = radius(a) * sine;
    z[1] = radius(a) * cosine;
}

// As cuLaunchKernel: 0, or 1 for a name that is none, 2 for a shape that no GPU takes, 3 for a barrier that not all reach,
// 4 for a write beyond the shared memory.
extern "C" int cm_launch(const char* name, const unsigned* grid, const unsigned* block, unsigned shared,
                         void** arguments) {
    const auto found = kernels().find(name);
    if (found == kernels().end()) return 1;
    gridDim = {grid[0], grid[1], grid[2]};
    blockDim = {block[0], block[1], block[2]};
    const size_t count = static_cast<size_t>(blockDim.x) * blockDim.y * blockDim.z;
    const size_t blocks = static_cast<size_t>(gridDim.x) * gridDim.y * gridDim.z;
    if (count == 0 || count > 1024 || blocks == 0 || gridDim.y > 65535 || gridDim.z > 65535) return 2;
    constexpr size_t GUARD = 4096;
    std::vector<uint4> memory((shared + GUARD) / sizeof(uint4) + 1);
    shared_memory = reinterpret_cast<unsigned char*>(memory.data());
    running_call = found->second.call;
    running_arguments = arguments;
    if (found->second.has_barriers && threads.size() < count) threads.resize(count);
    for (blockIdx.z = 0; blockIdx.z < gridDim.z; blockIdx.z++)
        for (blockIdx.y = 0; blockIdx.y < gridDim.y; blockIdx.y++)
            for (blockIdx.x = 0; blockIdx.x < gridDim.x; blockIdx.x++) {
                memset(shared_memory, 0xff, memory.size() * sizeof(uint4));  // NaN, as far as it is not written
                if (found->second.has_barriers) {
                    if (!run_block(count)) return 3;
                } else {
                    for (size_t i = 0; i < count; i++) {
                        threadIdx = thread_index(i);
                        running_call(arguments);
                    }
                }
                for (size_t i = 0; i < GUARD; i++)
                    if (shared_memory[shared + i] != 0xff) return 4;
            }
    return 0;
}
