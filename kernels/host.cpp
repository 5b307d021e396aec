// Launches the kernels on the host: `make host` builds build/host.so, which the tests load.

#include <stdio.h>
#include <ucontext.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "philox.h"

Dim3 gridDim, blockDim, blockIdx, threadIdx;
unsigned char* shared_memory;

namespace {

struct Kernel {
    Call call;
    bool has_barriers;
    unsigned most_threads;
};

std::map<std::string, Kernel>& kernels() {
    static std::map<std::string, Kernel> all;
    return all;
}

enum class At { RUNNING, BARRIER, CLUSTER_BARRIER, END };  // where a thread waits
enum Wrong { NONE, NAME, SHAPE, BARRIER, OVERRUN, CLUSTER_BARRIER, ENDED };

constexpr size_t STACK = 64 << 10, GUARD = 4096;
struct Thread {
    ucontext_t context;
    At at;
    std::unique_ptr<unsigned char[]> stack{new unsigned char[STACK]};
};

// A block of the cluster that runs.
struct Block {
    Dim3 index;
    At at;
    std::vector<uint4> memory;
    std::vector<Thread> threads;

    unsigned char* shared() { return reinterpret_cast<unsigned char*>(memory.data()); }
};

std::vector<Block> cluster;
size_t running_block, running;
ucontext_t scheduler;
Call running_call;
void** running_arguments;
unsigned shared_size, order_seed;
bool has_read_ended;

void wait_at(At at) {
    Thread& thread = cluster[running_block].threads[running];
    thread.at = at;
    swapcontext(&thread.context, &scheduler);
}

void start() {
    running_call(running_arguments);
    wait_at(At::END);
}

Dim3 thread_index(size_t i) {
    const unsigned x = i % blockDim.x, y = i / blockDim.x % blockDim.y, z = i / blockDim.x / blockDim.y;
    return {x, y, z};
}

void prepare(Block& block, Dim3 index, size_t threads) {
    block.index = index;
    block.at = At::RUNNING;
    block.memory.resize((shared_size + GUARD) / sizeof(uint4) + 1);
    memset(block.shared(), 0xff, block.memory.size() * sizeof(uint4));  // NaN, as far as it is not written
    if (block.threads.size() < threads) block.threads.resize(threads);
    for (size_t i = 0; i < threads; i++) {
        Thread& thread = block.threads[i];
        getcontext(&thread.context);
        thread.context.uc_stack.ss_sp = thread.stack.get();
        thread.context.uc_stack.ss_size = STACK;
        thread.context.uc_link = nullptr;
        makecontext(&thread.context, start, 0);
    }
}

void enter(size_t block) {
    running_block = block;
    blockIdx = cluster[block].index;
    shared_memory = cluster[block].shared();
}

// Runs every thread to its next barrier, over and over, until all are at the cluster's or at the end; false where some
// are elsewhere. Odd turns go backwards, so that what needs a barrier and has none is seen.
bool run_block(size_t number, size_t count) {
    Block& block = cluster[number];
    enter(number);
    for (bool is_backwards = false;; is_backwards = !is_backwards) {
        for (size_t i = 0; i < count; i++) {
            running = is_backwards ? count - 1 - i : i;
            threadIdx = thread_index(running);
            swapcontext(&scheduler, &block.threads[running].context);
        }
        block.at = block.threads[0].at;
        for (size_t i = 1; i < count; i++)
            if (block.threads[i].at != block.at) return false;
        if (block.at != At::BARRIER) return true;
    }
}

// 0 to count - 1: as they are, or in an order of its own for each seed but 0.
std::vector<size_t> ordered(size_t count) {
    std::vector<size_t> order(count);
    std::iota(order.begin(), order.end(), 0);
    if (order_seed) std::shuffle(order.begin(), order.end(), std::mt19937(order_seed));
    return order;
}

Wrong run_cluster(const std::vector<Dim3>& blocks, size_t threads) {
    if (cluster.size() < blocks.size()) cluster.resize(blocks.size());
    for (size_t i = 0; i < blocks.size(); i++) prepare(cluster[i], blocks[i], threads);
    has_read_ended = false;
    for (std::vector<size_t> order = ordered(blocks.size());; std::reverse(order.begin(), order.end())) {
        for (size_t i : order)
            if (!run_block(i, threads)) return BARRIER;
        for (size_t i = 0; i < blocks.size(); i++) {
            if (cluster[i].at != cluster[0].at) return CLUSTER_BARRIER;
            for (size_t k = 0; k < GUARD; k++)
                if (cluster[i].shared()[shared_size + k] != 0xff) return OVERRUN;
        }
        if (has_read_ended) return ENDED;
        if (cluster[0].at == At::END) return NONE;
    }
}

}  // namespace

void __syncthreads() { wait_at(At::BARRIER); }
void cluster_sync() { wait_at(At::CLUSTER_BARRIER); }

const unsigned char* shared_of_block(const unsigned char* own, uint32_t rank) {
    Block& block = cluster[rank];
    if (block.at == At::END) has_read_ended = true;
    return block.shared() + (own - shared_memory);
}

void register_kernel(const char* name, Call call, bool has_barriers, unsigned most_threads) {
    kernels()[name] = {call, has_barriers, most_threads};
}

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

// The order in which launches run their blocks: 0 as they are numbered, each other seed another.
extern "C" void cm_set_order(unsigned seed) { order_seed = seed; }

// As cuLaunchKernelEx, with `blocks` neighbours along x a cluster: 0, or 1 for a name that is none, 2 for a shape that no
// GPU takes, 3 for a barrier that not all reach, 4 for a write beyond the shared memory, 5 for a barrier of the cluster
// that not all of its blocks reach, 6 for a read of the shared memory of a block that has ended.
extern "C" int cm_launch_cluster(const char* name, const unsigned* grid, const unsigned* block, unsigned blocks,
                                 unsigned shared, void** arguments) {
    const auto found = kernels().find(name);
    if (found == kernels().end()) return NAME;
    gridDim = {grid[0], grid[1], grid[2]};
    blockDim = {block[0], block[1], block[2]};
    const size_t count = static_cast<size_t>(blockDim.x) * blockDim.y * blockDim.z;
    const size_t all = static_cast<size_t>(gridDim.x) * gridDim.y * gridDim.z;
    if (count == 0 || count > found->second.most_threads || all == 0 || gridDim.y > 65535 || gridDim.z > 65535) return SHAPE;
    if (blocks == 0 || blocks > 8 || gridDim.x % blocks) return SHAPE;
    running_call = found->second.call;
    running_arguments = arguments;
    shared_size = shared;
    const auto index = [](size_t i) {
        return Dim3{static_cast<unsigned>(i % gridDim.x), static_cast<unsigned>(i / gridDim.x % gridDim.y),
                    static_cast<unsigned>(i / gridDim.x / gridDim.y)};
    };
    for (size_t number : ordered(all / blocks)) {
        std::vector<Dim3> indices;
        for (size_t i = 0; i < blocks; i++) indices.push_back(index(number * blocks + i));
        if (found->second.has_barriers) {
            if (const Wrong wrong = run_cluster(indices, count)) return wrong;
            continue;
        }
        for (const Dim3& each : indices) {
            blockIdx = each;
            for (size_t i = 0; i < count; i++) {
                threadIdx = thread_index(i);
                running_call(arguments);
            }
        }
    }
    return NONE;
}

// As cuLaunchKernel; see cm_launch_cluster.
extern "C" int cm_launch(const char* name, const unsigned* grid, const unsigned* block, unsigned shared,
                         void** arguments) {
    return cm_launch_cluster(name, grid, block, 1, shared, arguments);
}
