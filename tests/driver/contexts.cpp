// Contexts: a stack of its own for each thread, and a primary context for each device, counted by who retains it.
#include "state.h"

namespace standin {

namespace {

std::map<CUcontext, Context*>& contexts = *new std::map<CUcontext, Context*>;  // destroyed ones too
std::map<int, Context*>& primaries = *new std::map<int, Context*>;
std::map<int, unsigned>& primary_flags = *new std::map<int, unsigned>;
thread_local std::vector<CUcontext> stack;

Context& context_at(CUcontext handle) {
    const auto entry = contexts.find(handle);
    if (entry != contexts.end()) return *entry->second;
    throw CUDA_ERROR_INVALID_CONTEXT;
}

Context& new_context(int device, bool is_primary, unsigned flags) {
    auto* context = new Context;
    context->handle = reinterpret_cast<CUcontext>(next_handle());
    context->device = device;
    context->is_primary = is_primary;
    context->flags = flags;
    context->legacy = new_stream(*context, 0);
    context->legacy->is_legacy = true;
    contexts[context->handle] = context;
    return *context;
}

void check_device(CUdevice device) { require(device >= 0 && device < device_count(), CUDA_ERROR_INVALID_DEVICE); }

// cuCtxDestroy: "Destroys and cleans up all resources associated with the context", handles and memory alike.
void destroy(Context& context) {
    abandon(context);
    const auto is_its_own = [&](const auto& object) { return object.context == &context; };
    streams.remove_if(is_its_own);
    events.remove_if(is_its_own);
    functions.remove_if(is_its_own);
    modules.remove_if(is_its_own);
    graphs.remove_if(is_its_own);
    executables.remove_if([&](const Executable& each) { return each.graph.context == &context; });
    free_memory(context);
    context.is_alive = false;
}

Context* primary(int device) {
    const auto entry = primaries.find(device);
    return entry == primaries.end() ? nullptr : entry->second;
}

}  // namespace

static uintptr_t handles = 0x5eed00000000;
uintptr_t next_handle() { return handles += 16; }
bool was_handle(uintptr_t number) { return number > 0x5eed00000000 && number <= handles && number % 16 == 0; }

Context* context_or_null() {
    const auto entry = contexts.find(stack.empty() ? nullptr : stack.back());
    return entry == contexts.end() ? nullptr : entry->second;
}

Context& current_even_failed() {
    Context* context = context_or_null();
    require(context, CUDA_ERROR_INVALID_CONTEXT);
    require(context->is_alive, CUDA_ERROR_CONTEXT_IS_DESTROYED);
    return *context;
}

Context& current() {
    Context& context = current_even_failed();
    require(context.failure == CUDA_SUCCESS, context.failure);
    return context;
}

void fail_current(CUresult error) {
    if (Context* context = context_or_null()) context->failure = error;
}

std::vector<std::string> living_contexts() {
    std::vector<std::string> lines;
    for (const auto& [handle, context] : contexts)
        if (context->is_alive && context->is_primary)
            lines.push_back(text("%d uses of the primary context of device %d", context->uses, context->device));
        else if (context->is_alive)
            lines.push_back(text("%d contexts on device %d", 1, context->device));
    return lines;
}

}  // namespace standin

using namespace standin;

CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
    return answer(__func__, [&] {
        check_device(device);
        Context* place = primary(device);
        if (place) {
            place->uses++;
        } else {
            refuse_unsafe();  // as it takes memory
            place = &new_context(device, true, primary_flags[device]);
            primaries[device] = place;
        }
        *context = place->handle;
    });
}

// "The context is automatically reset once the last reference to it is released." It stays on threads' stacks.
CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device) {
    return answer(__func__, [&] {
        check_device(device);
        Context* place = primary(device);
        require(place, CUDA_ERROR_INVALID_CONTEXT);
        if (place->uses == 1) {
            refuse_unsafe();
            destroy(*place);
            primaries.erase(device);
        }
        place->uses--;
    });
}

CUresult cuDevicePrimaryCtxReset_v2(CUdevice device) {
    return answer(__func__, [&] {
        check_device(device);
        Context* place = primary(device);
        if (!place) return;
        refuse_unsafe();
        const int uses = place->uses;
        destroy(*place);
        primaries[device] = &new_context(device, true, primary_flags[device]);
        primaries[device]->uses = uses;
    });
}

CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned* flags, int* active) {
    return answer(__func__, [&] {
        check_device(device);
        *flags = primary_flags[device];
        *active = primary(device) != nullptr;
    });
}

CUresult cuDevicePrimaryCtxSetFlags_v2(CUdevice device, unsigned flags) {
    return answer(__func__, [&] {
        check_device(device);
        require(!(flags & ~CU_CTX_FLAGS_MASK));
        primary_flags[device] = flags;
    });
}

CUresult cuCtxCreate_v4(CUcontext* context, CUctxCreateParams* parameters, unsigned flags, CUdevice device) {
    return answer(__func__, [&] {
        check_device(device);
        require(!(flags & ~CU_CTX_FLAGS_MASK));
        refuse_unsafe();
        if (parameters) report_unsupported("parameters of cuCtxCreate");
        *context = new_context(device, false, flags).handle;
        stack.push_back(*context);
    });
}

CUresult cuCtxDestroy_v2(CUcontext handle) {
    return answer(__func__, [&] {
        Context& context = context_at(handle);
        require(context.is_alive && !context.is_primary, CUDA_ERROR_INVALID_CONTEXT);
        refuse_unsafe();
        destroy(context);
        if (!stack.empty() && stack.back() == handle) stack.pop_back();
    });
}

CUresult cuCtxAttach(CUcontext* handle, unsigned flags) {
    return answer(__func__, [&] {
        require(flags == 0);
        Context& context = current_even_failed();
        context.uses++;
        *handle = context.handle;
    });
}

// "must be a handle that was passed back by cuCtxCreate() or cuCtxAttach(), and must be current": no primary one.
CUresult cuCtxDetach(CUcontext handle) {
    return answer(__func__, [&] {
        Context& context = context_at(handle);
        require(context.is_alive && !context.is_primary && &context == context_or_null(), CUDA_ERROR_INVALID_CONTEXT);
        if (--context.uses == 0) {
            destroy(context);
            stack.pop_back();
        }
    });
}

CUresult cuCtxPushCurrent_v2(CUcontext handle) {
    return answer(__func__, [&] {
        context_at(handle);
        stack.push_back(handle);
    });
}

CUresult cuCtxPopCurrent_v2(CUcontext* handle) {
    return answer(__func__, [&] {
        require(!stack.empty(), CUDA_ERROR_INVALID_CONTEXT);
        if (handle) *handle = stack.back();
        stack.pop_back();
    });
}

// "If there exists a CUDA context stack on the calling CPU thread, this will replace the top of that stack"
CUresult cuCtxSetCurrent(CUcontext handle) {
    return answer(__func__, [&] {
        if (handle) context_at(handle);
        if (!stack.empty()) stack.pop_back();
        if (handle) stack.push_back(handle);
    });
}

CUresult cuCtxGetCurrent(CUcontext* handle) {
    return answer(__func__, [&] { *handle = stack.empty() ? nullptr : stack.back(); });
}

CUresult cuCtxGetDevice(CUdevice* device) {
    return answer(__func__, [&] { *device = current_even_failed().device; });
}

CUresult cuCtxGetFlags(unsigned* flags) {
    return answer(__func__, [&] { *flags = current_even_failed().flags; });
}

CUresult cuCtxGetId(CUcontext handle, unsigned long long* id) {
    return answer(__func__, [&] {
        Context& context = handle ? context_at(handle) : current_even_failed();
        *id = reinterpret_cast<uintptr_t>(context.handle);
    });
}

CUresult cuCtxGetApiVersion(CUcontext handle, unsigned* version) {
    return answer(__func__, [&] {
        if (handle) context_at(handle);
        *version = 3020;
    });
}

CUresult cuCtxGetStreamPriorityRange(int* least, int* greatest) {
    return answer(__func__, [&] {
        current_even_failed();
        if (least) *least = 0;
        if (greatest) *greatest = -5;
    });
}

CUresult cuCtxSynchronize() {
    return answer(__func__, [] {
        Context& context = current();
        refuse_capturing(context);
        refuse_unsafe();
        finish(context);
        require(context.failure == CUDA_SUCCESS, context.failure);
    });
}
