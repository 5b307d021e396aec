// Memory of the host that stands for a device's, and pinned memory: full of 0xff, between guard pages, never reused.
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "state.h"

namespace standin {

namespace {

constexpr size_t PAGE = 4096, ALIGNMENT = 256, ARENA = 1ull << 40;
constexpr unsigned char POISON = 0xff, MARGIN = 0xfd;  // a NaN in every type; what is beside a block in its pages
std::map<uintptr_t, Block>& blocks = *new std::map<uintptr_t, Block>;
std::map<int, size_t>& taken = *new std::map<int, size_t>;
uintptr_t arena = 0, next_page = 0;

size_t round_up(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }

// The block's end, rounded up to its alignment, is where the guard page begins.
uintptr_t take(Context& context, size_t size, bool is_host, unsigned flags) {
    if (!arena) {
        void* pages = mmap(nullptr, ARENA, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        require(pages != MAP_FAILED, CUDA_ERROR_OUT_OF_MEMORY);
        arena = next_page = reinterpret_cast<uintptr_t>(pages);
    }
    const size_t rounded = round_up(size, ALIGNMENT), inside = round_up(rounded, PAGE);
    const uintptr_t mapping = next_page, inner = mapping + PAGE, base = inner + inside - rounded;
    require(inner + inside + PAGE <= arena + ARENA, CUDA_ERROR_OUT_OF_MEMORY);
    require(!mprotect(reinterpret_cast<void*>(inner), inside, PROT_READ | PROT_WRITE), CUDA_ERROR_OUT_OF_MEMORY);
    next_page = inner + inside + PAGE;
    memset(reinterpret_cast<void*>(inner), MARGIN, inside);
    memset(reinterpret_cast<void*>(base), POISON, size);
    blocks[base] = {base, size, &context, is_host, false, false, flags, mapping, inside + 2 * PAGE};
    return base;
}

void give_back(Block& block) {
    const uintptr_t begin = block.mapping + PAGE, end = block.mapping + block.mapped - PAGE;
    size_t wrong = 0;
    for (uintptr_t each = begin; each < end; each++)
        if (each < block.base || each >= block.base + block.size)
            wrong += *reinterpret_cast<unsigned char*>(each) != MARGIN;
    if (wrong) report_misuse(text("%zu bytes beside a block of %zu were written", wrong, block.size));
    // New pages that nobody may touch, which the kernel can join to those beside them: their number is limited.
    constexpr int flags = MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    mmap(reinterpret_cast<void*>(begin), end - begin, PROT_NONE, flags, -1, 0);
    block.is_free = true;
    if (!block.is_host) taken[block.context->device] -= block.size;
}

Block& living(uintptr_t base, bool is_host) {
    const auto entry = blocks.find(base);
    const bool is_known = entry != blocks.end() && entry->second.is_host == is_host && !entry->second.is_registered;
    if (is_known && !entry->second.is_free) return entry->second;
    report_misuse(text(is_known ? "%#zx is freed twice" : "%#zx is no such memory", size_t(base)));
    throw CUDA_ERROR_INVALID_VALUE;
}

thread_local sigjmp_buf* landing = nullptr;
struct sigaction segv_before, bus_before;
void on_fault(int signal, siginfo_t*, void*) {
    if (landing) siglongjmp(*landing, 1);
    sigaction(signal, signal == SIGSEGV ? &segv_before : &bus_before, nullptr);  // it is raised again, and not by us
}

}  // namespace

bool guarded(const std::function<void()>& body) {
    struct sigaction ours = {};
    ours.sa_sigaction = on_fault;
    ours.sa_flags = SA_SIGINFO | SA_NODEFER;
    sigaction(SIGSEGV, &ours, &segv_before);
    sigaction(SIGBUS, &ours, &bus_before);
    sigjmp_buf place;
    const bool is_whole = sigsetjmp(place, 1) == 0;
    if (is_whole) {
        landing = &place;
        body();
    }
    landing = nullptr;
    sigaction(SIGSEGV, &segv_before, nullptr);
    sigaction(SIGBUS, &bus_before, nullptr);
    return is_whole;
}

Block* block_at(uintptr_t address) {
    auto entry = blocks.upper_bound(address);
    if (entry == blocks.begin()) return nullptr;
    Block& block = std::prev(entry)->second;
    return address < block.base + block.size ? &block : nullptr;
}

bool is_ours(uintptr_t address) { return arena && address >= arena && address < arena + ARENA; }

void check_range(uintptr_t address, size_t size, const char* role) {
    const Block* block = block_at(address);
    if (block && !block->is_free && address + size <= block->base + block->size) return;
    if (!block)
        report_misuse(text("%s: %#zx is in no block of memory", role, size_t(address)));
    else if (block->is_free)
        report_misuse(text("%s: use after free of a block of %zu bytes", role, block->size));
    else
        report_misuse(text("%s: %zu bytes from byte %zu of a block of %zu", role, size, size_t(address - block->base),
                           block->size));
    throw CUDA_ERROR_INVALID_VALUE;
}

bool is_pinned(uintptr_t address, size_t size) {
    if (!block_at(address) && !is_ours(address)) return false;
    check_range(address, size, "memory of the host");
    return true;
}

void free_memory(Context& context) {
    for (auto each = blocks.begin(); each != blocks.end();) {
        Block& block = each->second;
        if (block.context == &context && !block.is_free && !block.is_registered) give_back(block);
        each = block.context == &context && block.is_registered ? blocks.erase(each) : std::next(each);
    }
}

size_t living_blocks(bool is_host) {
    size_t count = 0;
    for (const auto& [base, block] : blocks) count += !block.is_free && block.is_host == is_host;
    return count;
}

size_t bytes_on(int device) { return taken[device]; }

}  // namespace standin

using namespace standin;

CUresult cuMemAlloc_v2(CUdeviceptr* address, size_t size) {
    return answer(__func__, [&] {
        Context& context = current();
        refuse_unsafe();
        require(size > 0);
        require(size <= room() - bytes_on(context.device), CUDA_ERROR_OUT_OF_MEMORY);
        *address = take(context, size, false, 0);
        taken[context.device] += size;
    });
}

// "this API may perform implicit synchronization": the stand-in's does not, so that nothing relies on it.
CUresult cuMemFree_v2(CUdeviceptr address) {
    return answer(__func__, [&] {
        const CUresult failure = current_even_failed().failure;
        refuse_unsafe();
        if (address) give_back(living(address, false));
        require(failure == CUDA_SUCCESS, failure);
    });
}

CUresult cuMemGetInfo_v2(size_t* free, size_t* total) {
    return answer(__func__, [&] {
        Context& context = current();
        *total = room();
        *free = *total - bytes_on(context.device);
    });
}

CUresult cuMemGetAddressRange_v2(CUdeviceptr* base, size_t* size, CUdeviceptr address) {
    return answer(__func__, [&] {
        current();
        const Block* block = block_at(address);
        require(block && !block->is_free && !block->is_host, CUDA_ERROR_NOT_FOUND);
        if (base) *base = block->base;
        if (size) *size = block->size;
    });
}

CUresult cuMemHostAlloc(void** address, size_t size, unsigned flags) {
    return answer(__func__, [&] {
        Context& context = current();
        refuse_unsafe();
        require(size > 0);
        *address = reinterpret_cast<void*>(take(context, size, true, flags));
    });
}

CUresult cuMemAllocHost_v2(void** address, size_t size) { return cuMemHostAlloc(address, size, 0); }

CUresult cuMemFreeHost(void* address) {
    return answer(__func__, [&] {
        const CUresult failure = current_even_failed().failure;
        refuse_unsafe();
        give_back(living(reinterpret_cast<uintptr_t>(address), true));
        require(failure == CUDA_SUCCESS, failure);
    });
}

CUresult cuMemHostRegister_v2(void* address, size_t size, unsigned flags) {
    return answer(__func__, [&] {
        Context& context = current();
        refuse_unsafe();
        const auto base = reinterpret_cast<uintptr_t>(address);
        require(base && size);
        const auto next = blocks.lower_bound(base);
        const bool is_free = !block_at(base) && (next == blocks.end() || next->first >= base + size);
        require(is_free, CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED);
        blocks[base] = {base, size, &context, true, true, false, flags, 0, 0};
    });
}

CUresult cuMemHostUnregister(void* address) {
    return answer(__func__, [&] {
        current_even_failed();
        refuse_unsafe();
        const auto entry = blocks.find(reinterpret_cast<uintptr_t>(address));
        require(entry != blocks.end() && entry->second.is_registered, CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED);
        blocks.erase(entry);
    });
}

CUresult cuMemHostGetDevicePointer_v2(CUdeviceptr* device, void* address, unsigned flags) {
    return answer(__func__, [&] {
        current();
        require(flags == 0);
        const Block* block = block_at(reinterpret_cast<uintptr_t>(address));
        require(block && block->is_host && !block->is_free);
        *device = reinterpret_cast<uintptr_t>(address);
    });
}

CUresult cuMemHostGetFlags(unsigned* flags, void* address) {
    return answer(__func__, [&] {
        current();
        const Block* block = block_at(reinterpret_cast<uintptr_t>(address));
        require(block && block->is_host && !block->is_free);
        *flags = block->flags;
    });
}

// Unified addressing, "Pointer Attributes": pageable memory is unknown to the driver, and an invalid value.
CUresult cuPointerGetAttribute(void* value, CUpointer_attribute attribute, CUdeviceptr address) {
    return answer(__func__, [&] {
        const Block* block = block_at(address);
        require(block && !block->is_free);
        switch (attribute) {
            case CU_POINTER_ATTRIBUTE_CONTEXT: *static_cast<CUcontext*>(value) = block->context->handle; return;
            case CU_POINTER_ATTRIBUTE_MEMORY_TYPE:
                *static_cast<unsigned*>(value) = block->is_host ? CU_MEMORYTYPE_HOST : CU_MEMORYTYPE_DEVICE;
                return;
            case CU_POINTER_ATTRIBUTE_HOST_POINTER:
                require(block->is_host);
                [[fallthrough]];
            case CU_POINTER_ATTRIBUTE_DEVICE_POINTER: *static_cast<CUdeviceptr*>(value) = address; return;
            case CU_POINTER_ATTRIBUTE_IS_MANAGED: *static_cast<bool*>(value) = false; return;
            case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL: *static_cast<int*>(value) = block->context->device; return;
            case CU_POINTER_ATTRIBUTE_RANGE_START_ADDR: *static_cast<CUdeviceptr*>(value) = block->base; return;
            case CU_POINTER_ATTRIBUTE_RANGE_SIZE: *static_cast<size_t*>(value) = block->size; return;
        }
        report_unsupported(text("attribute %d of a pointer", attribute));
        throw CUDA_ERROR_NOT_SUPPORTED;
    });
}

// "Unlike cuPointerGetAttribute, this function will not return an error when the ptr encountered is not a valid one."
CUresult cuPointerGetAttributes(unsigned count, CUpointer_attribute* attributes, void** values, CUdeviceptr address) {
    for (unsigned i = 0; i < count; i++) {
        const CUresult error = cuPointerGetAttribute(values[i], attributes[i], address);
        if (error == CUDA_SUCCESS) continue;
        if (error != CUDA_ERROR_INVALID_VALUE) return error;
        memset(values[i], 0, attributes[i] == CU_POINTER_ATTRIBUTE_IS_MANAGED ? 1 : 4);
    }
    return CUDA_SUCCESS;
}
