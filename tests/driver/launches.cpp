// Launches: held to the limits of the device and to what the compiler said, then run in the kernels' host build.
#include <stdio.h>
#include <string.h>

#include <algorithm>

#include "state.h"

namespace standin {

namespace {

struct Shape {
    unsigned grid[3], block[3], shared, cluster = 1;
};

// Programming guide, "Technical Specifications per Compute Capability"
void check_shape(const Function& function, const Shape& shape) {
    const auto& [grid, block, shared, cluster] = shape;
    for (int i = 0; i < 3; i++) require(grid[i] && block[i]);
    require(grid[0] <= 2147483647 && grid[1] <= 65535 && grid[2] <= 65535);
    require(block[0] <= 1024 && block[1] <= 1024 && block[2] <= 64);
    const unsigned threads = block[0] * block[1] * block[2];
    require(threads <= 1024);
    if (static_cast<int>(threads) > most_threads(*function.kernel)) {
        trace(text("  %u threads of %d registers are too many", threads, registers_of(*function.kernel)));
        throw CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES;
    }
    require(shared <= static_cast<unsigned>(function.most_dynamic_shared));
    require(cluster == 1 || (model().major >= 9 && cluster <= 8 && grid[0] % cluster == 0), CUDA_ERROR_INVALID_CLUSTER_SIZE);
}

// The parameters in the driver's memory: "natural alignment" each, as cuLaunchKernel has them in a buffer.
struct Arguments {
    alignas(16) char bytes[4096];
    std::vector<void*> places;
};

std::shared_ptr<Arguments> copy_arguments(const Kernel& kernel, void** arguments, void** extra) {
    const char* buffer = nullptr;
    size_t size = 0;
    for (void** each = extra; each && *each != CU_LAUNCH_PARAM_END; each += 2) {
        if (*each == CU_LAUNCH_PARAM_BUFFER_POINTER) buffer = static_cast<const char*>(each[1]);
        if (*each == CU_LAUNCH_PARAM_BUFFER_SIZE) size = *static_cast<size_t*>(each[1]);
    }
    require(!(arguments && extra) && (arguments || buffer || kernel.sizes.empty()));
    auto copies = std::make_shared<Arguments>();
    size_t at = 0;
    for (size_t i = 0; i < kernel.sizes.size(); i++) {
        const size_t bytes = kernel.sizes[i];
        at = (at + bytes - 1) / bytes * bytes;
        if (buffer && at + bytes > size) break;
        memcpy(copies->bytes + at, buffer ? buffer + at : arguments[i], bytes);
        copies->places.push_back(copies->bytes + at);
        at += bytes;
    }
    if (copies->places.size() < kernel.sizes.size() || (buffer && at != size)) {
        report_misuse(text("%s: %zu bytes of arguments", kernel.name.c_str(), size));
        throw CUDA_ERROR_INVALID_VALUE;
    }
    return copies;
}

// A parameter of 8 bytes is an address, or null: the kernels take no other such number.
bool are_addresses(const Kernel& kernel, const Arguments& arguments) {
    for (size_t i = 0; i < kernel.sizes.size(); i++) {
        uintptr_t address = 0;
        if (kernel.sizes[i] == 8) memcpy(&address, arguments.places[i], 8);
        if (address) try {
                check_range(address, 1, text("argument %zu of %s", i, kernel.name.c_str()).c_str());
            } catch (CUresult) {
                return false;
            }
    }
    return true;
}

void launch(CUfunction handle, const Shape& shape, CUstream stream_handle, void** arguments, void** extra) {
    Context& context = current();
    const auto function = functions.at(handle);
    const auto stream = stream_at(stream_handle);
    require(function->context == &context && stream->context == &context, CUDA_ERROR_INVALID_HANDLE);
    check_shape(*function, shape);
    const Kernel& kernel = *function->kernel;
    const auto copies = copy_arguments(kernel, arguments, extra);
    enqueue(*stream, "kernel", [=, &kernel] {
        if (!are_addresses(kernel, *copies)) return CUDA_ERROR_ILLEGAL_ADDRESS;
        int code = 0;
        const auto run = [&] {
            code = host_launch()(kernel.name.c_str(), shape.grid, shape.block, shape.cluster, shape.shared,
                                 copies->places.data());
        };
        if (!guarded(run)) {
            report_misuse(kernel.name + " touches memory that is not there");
            return CUDA_ERROR_ILLEGAL_ADDRESS;
        }
        if (code) report_misuse(text("%s: the host build answers %d", kernel.name.c_str(), code));
        return code ? CUDA_ERROR_LAUNCH_FAILED : CUDA_SUCCESS;
    });
}

}  // namespace
}  // namespace standin

using namespace standin;

CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                        unsigned block_y, unsigned block_z, unsigned shared, CUstream stream, void** arguments,
                        void** extra) {
    return answer(__func__, [&] {
        launch(function, {{grid_x, grid_y, grid_z}, {block_x, block_y, block_z}, shared}, stream, arguments, extra);
    });
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** arguments, void** extra) {
    return answer(__func__, [&] {
        unsigned cluster = 1;  // along x
        for (unsigned i = 0; i < config->numAttrs; i++) {
            const CUlaunchAttribute& each = config->attrs[i];
            const auto& shape = each.value.clusterDim;
            const bool is_cluster = each.id == CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION && shape.y == 1 && shape.z == 1;
            if (is_cluster) cluster = shape.x;
            if (each.id == CU_LAUNCH_ATTRIBUTE_IGNORE || each.id == CU_LAUNCH_ATTRIBUTE_PRIORITY || is_cluster) continue;
            report_unsupported(text("attribute %d of a launch", each.id));
            throw CUDA_ERROR_NOT_SUPPORTED;
        }
        const CUlaunchConfig& c = *config;
        launch(function,
               {{c.gridDimX, c.gridDimY, c.gridDimZ}, {c.blockDimX, c.blockDimY, c.blockDimZ}, c.sharedMemBytes, cluster},
               c.hStream, arguments, extra);
    });
}

// By registers, shared memory, threads and blocks, whichever is used up first.
CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, CUfunction handle, int threads, size_t shared) {
    return answer(__func__, [&] {
        current();
        const auto function = functions.at(handle);
        require(threads > 0 && threads <= 1024);
        const int warps = (threads + 31) / 32, a_warp = (registers_of(*function->kernel) * 32 + 255) / 256 * 256;
        const size_t bytes = shared + static_cast<size_t>(function->kernel->shared) + 1024;
        const int by_shared = static_cast<int>(static_cast<size_t>(model().shared_a_processor) / bytes);
        *blocks = std::min({16384 / a_warp * 4 / warps, by_shared, 64 / warps, 32});
    });
}
