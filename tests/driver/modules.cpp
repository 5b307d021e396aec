// Modules: the project's own kernels, told by their hash, with what the compiler said of them in kernels.txt.
//
// kernels.txt lies beside this library. Its first line is the hash of kernels.fatbin; the others are a kernel each: name,
// bytes of static shared memory, registers on sm_80, sm_90 and sm_120, and the sizes of its parameters.
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

#include <fstream>
#include <sstream>

#include "sha256.h"
#include "state.h"

namespace standin {

Table<Module, CUmodule>& modules = *new Table<Module, CUmodule>("module");
Table<Function, CUfunction>& functions = *new Table<Function, CUfunction>("function");

namespace {

constexpr uint32_t FATBIN = 0xBA55ED50;
constexpr int STATIC_SHARED = 48 << 10;  // bytes that a kernel has without asking

std::string folder() {
    Dl_info info;
    dladdr(reinterpret_cast<void*>(&folder), &info);
    const std::string path = info.dli_fname;
    return path.substr(0, path.rfind('/') + 1);
}

struct Build {
    std::string hash;
    std::map<std::string, Kernel> kernels;
};

const Build& build() {
    static const Build& all = []() -> const Build& {
        auto& read = *new Build;
        std::ifstream file(folder() + "kernels.txt");
        std::getline(file, read.hash);
        for (std::string line; std::getline(file, line);) {
            std::istringstream words(line);
            Kernel kernel;
            words >> kernel.name >> kernel.shared;
            for (int capability : {80, 90, 120}) words >> kernel.registers[capability];
            for (size_t size; words >> size;) kernel.sizes.push_back(size);
            read.kernels[kernel.name] = kernel;
        }
        return read;
    }();
    return all;
}

void load(CUmodule* module, const void* image) {
    Context& context = current();
    refuse_unsafe();
    struct {
        uint32_t magic;
        uint16_t version, header;
        uint64_t size;
    } head;
    memcpy(&head, image, sizeof head);
    const bool is_fatbin = head.magic == FATBIN && head.size < 1 << 28;
    if (!is_fatbin || sha256(static_cast<const unsigned char*>(image), head.header + head.size) != build().hash) {
        report_unsupported("a module that is not kernels.fatbin");
        throw CUDA_ERROR_INVALID_IMAGE;
    }
    require(driver_version() >= 13000, CUDA_ERROR_INVALID_IMAGE);  // it was built by a newer compiler
    require(model().major >= 8, CUDA_ERROR_NO_BINARY_FOR_GPU);
    require(host_launch() != nullptr, CUDA_ERROR_NO_BINARY_FOR_GPU);
    *module = modules.add(std::make_shared<Module>(Module{&context, {}}));
}

}  // namespace

HostLaunch host_launch() {
    static const auto found = []() -> HostLaunch {
        void* library = dlopen((folder() + "host.so").c_str(), RTLD_NOW | RTLD_LOCAL);
        if (!library) fprintf(stderr, "driver: %s\n", dlerror());
        return library ? reinterpret_cast<HostLaunch>(dlsym(library, "cm_launch_cluster")) : nullptr;
    }();
    return found;
}

// The binary for sm_80 runs on 8.x, sm_90 on 9.0, sm_120 on 12.x; others compile the PTX, which we take for as large.
int registers_of(const Kernel& kernel) {
    return kernel.registers.at(model().major == 8 ? 80 : model().major == 12 ? 120 : 90);
}

// Programming guide, "Occupancy": registers are given to warps, 256 at a time, from 4 files of 16384 of a processor.
int most_threads(const Kernel& kernel) {
    const int a_warp = (registers_of(kernel) * 32 + 255) / 256 * 256, warps = 16384 / a_warp * 4;
    return warps > 32 ? 1024 : warps * 32;
}

}  // namespace standin

using namespace standin;

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
    return answer(__func__, [&] { load(module, image); });
}

CUresult cuModuleLoadDataEx(CUmodule* module, const void* image, unsigned, CUjit_option*, void**) {
    return answer(__func__, [&] { load(module, image); });
}

CUresult cuModuleLoad(CUmodule* module, const char* path) {
    return answer(__func__, [&] {
        std::ifstream file(path, std::ios::binary);
        require(file.good(), CUDA_ERROR_FILE_NOT_FOUND);
        const std::string image((std::istreambuf_iterator<char>(file)), {});
        require(image.size() > 16, CUDA_ERROR_INVALID_IMAGE);
        load(module, image.data());
    });
}

CUresult cuModuleUnload(CUmodule handle) {
    return answer(__func__, [&] {
        const CUresult failure = current_even_failed().failure;
        const auto module = modules.at(handle);
        refuse_unsafe();
        for (const auto& [name, function] : module->functions) functions.remove(function);
        modules.remove(handle);
        require(failure == CUDA_SUCCESS, failure);
    });
}

CUresult cuModuleGetFunction(CUfunction* function, CUmodule handle, const char* name) {
    return answer(__func__, [&] {
        Context& context = current();
        const auto module = modules.at(handle);
        const auto kernel = build().kernels.find(name);
        require(kernel != build().kernels.end(), CUDA_ERROR_NOT_FOUND);
        CUfunction& place = module->functions[name];
        if (!place) {
            const int most = STATIC_SHARED - kernel->second.shared;
            place = functions.add(std::make_shared<Function>(Function{handle, &context, &kernel->second, most}));
        }
        *function = place;
    });
}

CUresult cuFuncGetModule(CUmodule* module, CUfunction handle) {
    return answer(__func__, [&] { *module = functions.at(handle)->module; });
}

CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction handle) {
    return answer(__func__, [&] {
        current();
        const auto function = functions.at(handle);
        const int capability = model().major * 10;
        switch (attribute) {
            case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = most_threads(*function->kernel); return;
            case CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES: *value = function->kernel->shared; return;
            case CU_FUNC_ATTRIBUTE_NUM_REGS: *value = registers_of(*function->kernel); return;
            case CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES: *value = function->most_dynamic_shared; return;
            case CU_FUNC_ATTRIBUTE_PTX_VERSION:
            case CU_FUNC_ATTRIBUTE_BINARY_VERSION: *value = capability; return;
            case CU_FUNC_ATTRIBUTE_CONST_SIZE_BYTES:
            case CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES: *value = 0; return;  // no kernel spills
            default: break;
        }
        report_unsupported(text("attribute %d of a function", attribute));
        throw CUDA_ERROR_NOT_SUPPORTED;
    });
}

// "The sum of this value and the function attribute CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES cannot exceed the device
// attribute CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN."
CUresult cuFuncSetAttribute(CUfunction handle, CUfunction_attribute attribute, int value) {
    return answer(__func__, [&] {
        current();
        const auto function = functions.at(handle);
        if (attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) {
            require(value >= 0 && value + function->kernel->shared <= model().shared_a_block);
            function->most_dynamic_shared = value;
        } else if (attribute != CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT) {
            report_unsupported(text("attribute %d of a function", attribute));
            throw CUDA_ERROR_NOT_SUPPORTED;
        }
    });
}

CUresult cuFuncSetCacheConfig(CUfunction handle, CUfunc_cache) {
    return answer(__func__, [&] { functions.at(handle); });
}

CUresult cuFuncSetBlockShape(CUfunction handle, int x, int y, int z) {
    return answer(__func__, [&] {
        functions.at(handle);
        require(x > 0 && y > 0 && z > 0);
    });
}
