// Copies and fills. Manual, "API synchronization behavior": which of them wait, by the kinds of memory they touch.
#include <string.h>

#include "state.h"

using namespace standin;

namespace {

// Its addresses are checked where it is enqueued, and again where it runs: either may have been freed by then.
Work copy(uintptr_t to, uintptr_t from, size_t size) {
    return [=] {
        for (const auto& [address, role] : {std::pair{to, "target"}, std::pair{from, "source"}})
            if (block_at(address) || is_ours(address)) try {
                    check_range(address, size, role);
                } catch (CUresult) {
                    return CUDA_ERROR_ILLEGAL_ADDRESS;
                }
        const bool is_whole = guarded([=] { memmove(reinterpret_cast<void*>(to), reinterpret_cast<void*>(from), size); });
        if (!is_whole) report_misuse("a copy touches memory of the host that is not there");
        return is_whole ? CUDA_SUCCESS : CUDA_ERROR_ILLEGAL_ADDRESS;
    };
}

enum class Kind { device, pinned, pageable };
Kind kind_of(uintptr_t address, size_t size) {
    if (!is_pinned(address, size)) return Kind::pageable;
    return block_at(address)->is_host ? Kind::pinned : Kind::device;
}

void wait_for(Stream& stream) {
    finish(stream);
    require(stream.context->failure == CUDA_SUCCESS, stream.context->failure);
}

void copy_in(Stream& stream, uintptr_t to, uintptr_t from, size_t size, bool is_asynchronous) {
    if (!size) return;
    const Kind target = kind_of(to, size), source = kind_of(from, size);
    if (source == Kind::pageable && target != Kind::pageable && !stream.capture) {
        // "a stream sync is performed before the copy is initiated. The function will return once the pageable buffer has
        // been copied to the staging memory", and of asynchronous ones: "the driver may synchronize with the stream and
        // stage the copy".
        if (!is_asynchronous) wait_for(stream);
        auto staged = std::make_shared<std::vector<char>>(size);
        const auto place = reinterpret_cast<uintptr_t>(staged->data());
        require(copy(place, from, size)() == CUDA_SUCCESS, CUDA_ERROR_INVALID_VALUE);
        enqueue(stream, "copy", [=, work = copy(to, place, size)] { return (void)staged, work(); });
        return;
    }
    enqueue(stream, "copy", copy(to, from, size));
    if (stream.capture) return;
    // "no host-side synchronization is performed" between devices' memory; to pageable memory "the function will return
    // only once the copy has completed".
    const bool is_on_device = target == Kind::device && source == Kind::device;
    if (target == Kind::pageable || (!is_asynchronous && !is_on_device)) wait_for(stream);
}

CUresult copy_by(const char* name, uintptr_t to, uintptr_t from, size_t size, const CUstream* handle, bool is_to_device,
                 bool is_from_device) {
    return answer(name, [&] {
        Context& context = current();
        if (!handle) refuse_unsafe();
        const auto stream = handle ? stream_at(*handle) : context.legacy;
        if (is_to_device && size) check_range(to, size, "target");
        if (is_from_device && size) check_range(from, size, "source");
        copy_in(*stream, to, from, size, handle != nullptr);
    });
}

// Manual, "Memset": "The synchronous memset functions are asynchronous with respect to the host except when the target is
// pinned host memory".
template <class T>
CUresult fill(const char* name, CUdeviceptr to, T value, size_t count, const CUstream* handle) {
    return answer(name, [&] {
        Context& context = current();
        const auto stream = handle ? stream_at(*handle) : context.legacy;
        require(to % sizeof(T) == 0);
        if (!count) return;
        check_range(to, count * sizeof(T), "target");
        enqueue(*stream, "fill", [=]() -> CUresult {
            try {
                check_range(to, count * sizeof(T), "target");
            } catch (CUresult) {
                return CUDA_ERROR_ILLEGAL_ADDRESS;
            }
            for (size_t i = 0; i < count; i++) reinterpret_cast<T*>(to)[i] = value;
            return CUDA_SUCCESS;
        });
        if (!handle && block_at(to)->is_host) wait_for(*stream);
    });
}

uintptr_t of(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); }

}  // namespace

CUresult cuMemcpy(CUdeviceptr to, CUdeviceptr from, size_t size) {
    return copy_by(__func__, to, from, size, nullptr, false, false);
}
CUresult cuMemcpyAsync(CUdeviceptr to, CUdeviceptr from, size_t size, CUstream stream) {
    return copy_by(__func__, to, from, size, &stream, false, false);
}
CUresult cuMemcpyHtoD_v2(CUdeviceptr to, const void* from, size_t size) {
    return copy_by(__func__, to, of(from), size, nullptr, true, false);
}
CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void* from, size_t size, CUstream stream) {
    return copy_by(__func__, to, of(from), size, &stream, true, false);
}
CUresult cuMemcpyDtoH_v2(void* to, CUdeviceptr from, size_t size) {
    return copy_by(__func__, of(to), from, size, nullptr, false, true);
}
CUresult cuMemcpyDtoHAsync_v2(void* to, CUdeviceptr from, size_t size, CUstream stream) {
    return copy_by(__func__, of(to), from, size, &stream, false, true);
}
CUresult cuMemcpyDtoD_v2(CUdeviceptr to, CUdeviceptr from, size_t size) {
    return copy_by(__func__, to, from, size, nullptr, true, true);
}
CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t size, CUstream stream) {
    return copy_by(__func__, to, from, size, &stream, true, true);
}
CUresult cuMemcpyPeer(CUdeviceptr to, CUcontext, CUdeviceptr from, CUcontext, size_t size) {
    return copy_by(__func__, to, from, size, nullptr, true, true);
}
CUresult cuMemcpyPeerAsync(CUdeviceptr to, CUcontext, CUdeviceptr from, CUcontext, size_t size, CUstream stream) {
    return copy_by(__func__, to, from, size, &stream, true, true);
}

CUresult cuMemsetD8_v2(CUdeviceptr to, unsigned char value, size_t count) {
    return fill(__func__, to, value, count, nullptr);
}
CUresult cuMemsetD16_v2(CUdeviceptr to, unsigned short value, size_t count) {
    return fill(__func__, to, value, count, nullptr);
}
CUresult cuMemsetD32_v2(CUdeviceptr to, unsigned value, size_t count) {
    return fill(__func__, to, value, count, nullptr);
}
CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t count, CUstream stream) {
    return fill(__func__, to, value, count, &stream);
}
CUresult cuMemsetD16Async(CUdeviceptr to, unsigned short value, size_t count, CUstream stream) {
    return fill(__func__, to, value, count, &stream);
}
CUresult cuMemsetD32Async(CUdeviceptr to, unsigned value, size_t count, CUstream stream) {
    return fill(__func__, to, value, count, &stream);
}
