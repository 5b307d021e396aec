// Devices: as many as CM_DRIVER_GPUS says, of the model that CM_DRIVER_GPU names, with CM_DRIVER_ROOM bytes each.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "state.h"

namespace standin {

namespace {

// Programming guide, table "Technical Specifications per Compute Capability"; bytes as nvidia-smi shows them.
constexpr Model MODELS[] = {
    {"sm_90", 9, 0, 132, 232448, 233472, 143771ull << 20},   // H200
    {"sm_80", 8, 0, 108, 166912, 167936, 81920ull << 20},    // A100
    {"sm_86", 8, 6, 84, 101376, 102400, 24576ull << 20},     // A10
    {"sm_100", 10, 0, 148, 232448, 233472, 183359ull << 20}, // B200
    {"sm_120", 12, 0, 170, 101376, 102400, 32607ull << 20},  // RTX 5090
    {"sm_75", 7, 5, 40, 65536, 65536, 15360ull << 20},       // T4, which the kernels are not built for
};

// CUdevice_attribute -> value where it is the same for all of them.
const std::map<int, int>& common_attributes() {
    static const auto& all = *new std::map<int, int>{
        {1, 1024},         // MAX_THREADS_PER_BLOCK
        {2, 1024},         // MAX_BLOCK_DIM_X
        {3, 1024},         // MAX_BLOCK_DIM_Y
        {4, 64},           // MAX_BLOCK_DIM_Z
        {5, 2147483647},   // MAX_GRID_DIM_X
        {6, 65535},        // MAX_GRID_DIM_Y
        {7, 65535},        // MAX_GRID_DIM_Z
        {8, 49152},        // MAX_SHARED_MEMORY_PER_BLOCK
        {9, 65536},        // TOTAL_CONSTANT_MEMORY
        {10, 32},          // WARP_SIZE
        {11, 2147483647},  // MAX_PITCH
        {12, 65536},       // MAX_REGISTERS_PER_BLOCK
        {13, 1980000},     // CLOCK_RATE, kHz
        {14, 512},         // TEXTURE_ALIGNMENT
        {15, 1},           // GPU_OVERLAP
        {17, 0},           // KERNEL_EXEC_TIMEOUT
        {18, 0},           // INTEGRATED
        {19, 1},           // CAN_MAP_HOST_MEMORY
        {20, 0},           // COMPUTE_MODE: default
        {31, 1},           // CONCURRENT_KERNELS
        {32, 1},           // ECC_ENABLED
        {34, 0},           // PCI_DEVICE_ID
        {35, 0},           // TCC_DRIVER
        {36, 3201000},     // MEMORY_CLOCK_RATE, kHz
        {37, 6144},        // GLOBAL_MEMORY_BUS_WIDTH
        {38, 62914560},    // L2_CACHE_SIZE
        {39, 2048},        // MAX_THREADS_PER_MULTIPROCESSOR
        {40, 3},           // ASYNC_ENGINE_COUNT
        {41, 1},           // UNIFIED_ADDRESSING
        {50, 0},           // PCI_DOMAIN_ID
        {78, 1},           // STREAM_PRIORITIES_SUPPORTED
        {79, 1},           // GLOBAL_L1_CACHE_SUPPORTED
        {80, 1},           // LOCAL_L1_CACHE_SUPPORTED
        {82, 65536},       // MAX_REGISTERS_PER_MULTIPROCESSOR
        {83, 1},           // MANAGED_MEMORY
        {84, 0},           // MULTI_GPU_BOARD
        {88, 0},           // PAGEABLE_MEMORY_ACCESS
        {89, 1},           // CONCURRENT_MANAGED_ACCESS
        {90, 1},           // COMPUTE_PREEMPTION_SUPPORTED
        {91, 1},           // CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM
        {95, 1},           // COOPERATIVE_LAUNCH
        {99, 1},           // HOST_REGISTER_SUPPORTED
        {106, 32},         // MAX_BLOCKS_PER_MULTIPROCESSOR
        {111, 1024},       // RESERVED_SHARED_MEMORY_PER_BLOCK
        {115, 0},          // MEMORY_POOLS_SUPPORTED: not by the stand-in
    };
    return all;
}

void check_device(CUdevice device) { require(device >= 0 && device < device_count(), CUDA_ERROR_INVALID_DEVICE); }

}  // namespace

const Model& model() {
    const char* name = getenv("CM_DRIVER_GPU");
    if (!name || !*name) return MODELS[0];
    for (const Model& each : MODELS)
        if (!strcmp(each.name, name)) return each;
    fprintf(stderr, "driver: no model %s\n", name);
    abort();
}

int device_count() { return static_cast<int>(number_of("CM_DRIVER_GPUS", 1)); }
int driver_version() { return static_cast<int>(number_of("CM_DRIVER_VERSION", 13000)); }
size_t room() { return static_cast<size_t>(number_of("CM_DRIVER_ROOM", static_cast<long>(model().bytes))); }

}  // namespace standin

using namespace standin;

CUresult cuDeviceGetCount(int* count) {
    return answer(__func__, [&] { *count = device_count(); });
}

CUresult cuDeviceGet(CUdevice* device, int ordinal) {
    return answer(__func__, [&] {
        check_device(ordinal);
        *device = ordinal;
    });
}

CUresult cuDeviceGetName(char* name, int size, CUdevice device) {
    return answer(__func__, [&] {
        check_device(device);
        snprintf(name, static_cast<size_t>(size), "Stand-in of %s", model().name);
    });
}

CUresult cuDeviceGetUuid_v2(CUuuid* uuid, CUdevice device) {
    return answer(__func__, [&] {
        check_device(device);
        for (char& each : uuid->bytes) each = static_cast<char>(device + 1);
    });
}

CUresult cuDeviceGetPCIBusId(char* id, int size, CUdevice device) {
    return answer(__func__, [&] {
        check_device(device);
        snprintf(id, static_cast<size_t>(size), "0000:%02X:00.0", device + 1);
    });
}

CUresult cuDeviceGetByPCIBusId(CUdevice* device, const char* id) {
    return answer(__func__, [&] {
        unsigned bus = 0;
        require(sscanf(id, "%*x:%x:", &bus) == 1 || sscanf(id, "%x:", &bus) == 1);
        check_device(static_cast<int>(bus) - 1);
        *device = static_cast<int>(bus) - 1;
    });
}

CUresult cuDeviceComputeCapability(int* major, int* minor, CUdevice device) {
    return answer(__func__, [&] {
        check_device(device);
        *major = model().major;
        *minor = model().minor;
    });
}

CUresult cuDeviceTotalMem_v2(size_t* bytes, CUdevice device) {
    return answer(__func__, [&] {
        check_device(device);
        *bytes = room();
    });
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
    return answer(__func__, [&] {
        check_device(device);
        const std::map<int, int> own = {
            {16, model().processors},        // MULTIPROCESSOR_COUNT
            {33, device + 1},                // PCI_BUS_ID
            {75, model().major},             // COMPUTE_CAPABILITY_MAJOR
            {76, model().minor},             // COMPUTE_CAPABILITY_MINOR
            {81, model().shared_a_processor},// MAX_SHARED_MEMORY_PER_MULTIPROCESSOR
            {97, model().shared_a_block},    // MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
            {120, model().major >= 9},       // CLUSTER_LAUNCH
        };
        for (const auto* each : {&own, &common_attributes()})
            if (const auto entry = each->find(attribute); entry != each->end()) {
                *value = entry->second;
                return;
            }
        report_unsupported(text("attribute %d of a device", attribute));
        throw CUDA_ERROR_NOT_SUPPORTED;
    });
}

CUresult cuDeviceCanAccessPeer(int* can, CUdevice device, CUdevice peer) {
    return answer(__func__, [&] {
        check_device(device);
        check_device(peer);
        *can = 0;
    });
}
