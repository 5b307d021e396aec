// Streams: their making and end, waiting for them, and host functions in their order.
#include "state.h"

namespace standin {

Table<Stream, CUstream>& streams = *new Table<Stream, CUstream>("stream");

std::shared_ptr<Stream> new_stream(Context& context, unsigned flags) {
    auto stream = std::make_shared<Stream>();
    stream->context = &context;
    stream->flags = flags;
    return stream;
}

std::shared_ptr<Stream> stream_at(CUstream handle) {
    Context& context = current();
    if (!handle || handle == CU_STREAM_LEGACY) return context.legacy;
    if (handle == CU_STREAM_PER_THREAD) {
        auto& own = context.per_thread[std::this_thread::get_id()];
        if (!own) context.streams.push_back(own = new_stream(context, 0));
        return own;
    }
    auto stream = streams.at(handle);
    require(stream->context->is_alive, CUDA_ERROR_CONTEXT_IS_DESTROYED);
    return stream;
}

namespace {

void create(CUstream* handle, unsigned flags, int priority) {
    Context& context = current();
    require(!(flags & ~CU_STREAM_NON_BLOCKING));
    auto stream = new_stream(context, flags);
    stream->priority = priority < -5 ? -5 : priority > 0 ? 0 : priority;  // "clamped to the nearest"
    context.streams.push_back(stream);
    *handle = streams.add(stream);
}

void add_host_function(CUstream handle, const char* kind, std::function<void()> body) {
    const auto stream = stream_at(handle);
    enqueue(*stream, kind, [body = std::move(body)] {
        outside_the_lock(body);
        return CUDA_SUCCESS;
    });
}

}  // namespace
}  // namespace standin

using namespace standin;

CUresult cuStreamCreate(CUstream* stream, unsigned flags) {
    return answer(__func__, [&] { create(stream, flags, 0); });
}

CUresult cuStreamCreateWithPriority(CUstream* stream, unsigned flags, int priority) {
    return answer(__func__, [&] { create(stream, flags, priority); });
}

// "the function will return immediately and the resources [...] will be released automatically once the device has
// completed all work"
CUresult cuStreamDestroy_v2(CUstream handle) {
    return answer(__func__, [&] {
        const CUresult failure = current_even_failed().failure;
        require(handle && handle != CU_STREAM_LEGACY && handle != CU_STREAM_PER_THREAD, CUDA_ERROR_INVALID_HANDLE);
        const auto stream = streams.at(handle);
        if (stream->capture) {
            report_misuse("the stream is being captured");
            leave_capture(*stream);
        }
        stream->is_destroyed = true;
        auto& all = stream->context->streams;
        for (size_t i = all.size(); i-- > 0 && stream->pending.empty();)
            if (all[i] == stream) all.erase(all.begin() + static_cast<long>(i));
        streams.remove(handle);
        require(failure == CUDA_SUCCESS, failure);
    });
}

CUresult cuStreamSynchronize(CUstream handle) {
    return answer(__func__, [&] {
        const auto stream = stream_at(handle);
        refuse_capturing(*stream);
        refuse_unsafe();
        if (stream->is_legacy) enqueue(*stream, "wait", [] { return CUDA_SUCCESS; });  // after all blocking streams
        finish(*stream);
        require(stream->context->failure == CUDA_SUCCESS, stream->context->failure);
    });
}

// Each query lets one more operation run, so that a loop of queries ends.
CUresult cuStreamQuery(CUstream handle) {
    return answer(__func__, [&] {
        const auto stream = stream_at(handle);
        refuse_capturing(*stream);
        refuse_unsafe();
        if (stream->end().is_done()) return;
        step(stream);
        require(stream->context->failure == CUDA_SUCCESS, stream->context->failure);
        throw CUDA_ERROR_NOT_READY;
    });
}

CUresult cuStreamWaitEvent(CUstream handle, CUevent event_handle, unsigned flags) {
    return answer(__func__, [&] {
        const auto stream = stream_at(handle);
        const auto event = events.at(event_handle);
        const bool is_external = flags & CU_EVENT_WAIT_EXTERNAL;
        require(!is_external || stream->capture);
        if (event->capture && !is_external) {
            join_capture(*stream, *event);
        } else if (stream->capture && !is_external && event->record) {
            // "a dependency would have been created which crosses the capture sequence boundary"
            invalidate(*stream->capture, "it waits for an event that was recorded outside of it");
            throw CUDA_ERROR_STREAM_CAPTURE_ISOLATION;
        } else if (stream->capture && is_external) {
            enqueue(*stream, "wait", [event] {
                if (event->record) complete(event->record->mark);
                return CUDA_SUCCESS;
            });
        } else if (event->record) {
            enqueue(*stream, "wait", [] { return CUDA_SUCCESS; }, {event->record->mark});
        }
    });
}

CUresult cuStreamGetFlags(CUstream handle, unsigned* flags) {
    return answer(__func__, [&] { *flags = stream_at(handle)->flags; });
}
CUresult cuStreamGetPriority(CUstream handle, int* priority) {
    return answer(__func__, [&] { *priority = stream_at(handle)->priority; });
}
CUresult cuStreamGetCtx(CUstream handle, CUcontext* context) {
    return answer(__func__, [&] { *context = stream_at(handle)->context->handle; });
}
CUresult cuStreamGetDevice(CUstream handle, CUdevice* device) {
    return answer(__func__, [&] { *device = stream_at(handle)->context->device; });
}

CUresult cuLaunchHostFunc(CUstream handle, CUhostFn function, void* data) {
    return answer(__func__, [&] {
        require(function);
        add_host_function(handle, "host function", [=] { function(data); });
    });
}

CUresult cuStreamAddCallback(CUstream handle, CUstreamCallback callback, void* data, unsigned flags) {
    return answer(__func__, [&] {
        require(callback && flags == 0);
        const auto stream = stream_at(handle);
        if (stream->capture) {  // "not supported in captures", unlike cuLaunchHostFunc
            invalidate(*stream->capture, "a callback");
            throw CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
        }
        add_host_function(handle, "callback", [=] { callback(handle, CUDA_SUCCESS, data); });
    });
}
