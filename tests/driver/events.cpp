// Events: places in a stream's order, and times.
#include <time.h>

#include "state.h"

namespace standin {

Table<Event, CUevent>& events = *new Table<Event, CUevent>("event");

namespace {

double now() {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

void record(CUevent handle, CUstream stream_handle, bool is_external) {
    const auto stream = stream_at(stream_handle);
    const auto event = events.at(handle);
    require(event->context == stream->context, CUDA_ERROR_INVALID_HANDLE);
    require(!is_external || stream->capture);
    if (stream->capture && !is_external) {
        require(stream->capture->is_valid, CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
        event->capture = stream->capture;
        event->frontier = stream->frontier;
        event->record.reset();
        return;
    }
    const auto note = [](const std::shared_ptr<Record>& record) {
        record->is_done = true;
        record->seconds = now();
        return CUDA_SUCCESS;
    };
    if (is_external) {  // a node of the graph: the event is recorded whenever that runs
        enqueue(*stream, "record", [event, note] {
            event->record = std::make_shared<Record>();
            return note(event->record);
        });
        return;
    }
    const auto record = std::make_shared<Record>();
    record->mark = enqueue(*stream, "record", [=] { return note(record); });
    event->capture.reset();
    event->record = record;
}

// Of an event that was last recorded in a capture neither the state can be asked for nor can it be waited for.
Event& uncaptured(Event& event) {
    if (!event.capture) return event;
    invalidate(*event.capture, "an event of it is waited for, or its state is asked for");
    throw CUDA_ERROR_CAPTURED_EVENT;
}

}  // namespace
}  // namespace standin

using namespace standin;

CUresult cuEventCreate(CUevent* handle, unsigned flags) {
    return answer(__func__, [&] {
        Context& context = current();
        require(!(flags & ~7u) && (!(flags & CU_EVENT_INTERPROCESS) || (flags & CU_EVENT_DISABLE_TIMING)));
        *handle = events.add(std::make_shared<Event>(Event{&context, flags, nullptr, nullptr, {}}));
    });
}

CUresult cuEventDestroy_v2(CUevent handle) {
    return answer(__func__, [&] {
        const CUresult failure = current_even_failed().failure;
        events.at(handle);
        events.remove(handle);
        require(failure == CUDA_SUCCESS, failure);
    });
}

CUresult cuEventRecord(CUevent handle, CUstream stream) {
    return answer(__func__, [&] { record(handle, stream, false); });
}

CUresult cuEventRecordWithFlags(CUevent handle, CUstream stream, unsigned flags) {
    return answer(__func__, [&] {
        require(!(flags & ~CU_EVENT_RECORD_EXTERNAL));
        record(handle, stream, flags & CU_EVENT_RECORD_EXTERNAL);
    });
}

CUresult cuEventQuery(CUevent handle) {
    return answer(__func__, [&] {
        Context& context = current();
        Event& event = uncaptured(*events.at(handle));
        refuse_unsafe();
        if (!event.record || event.record->is_done) return;
        step(event.record->mark.stream);
        require(context.failure == CUDA_SUCCESS, context.failure);
        throw CUDA_ERROR_NOT_READY;
    });
}

CUresult cuEventSynchronize(CUevent handle) {
    return answer(__func__, [&] {
        Context& context = current();
        const auto event = events.at(handle);
        uncaptured(*event);
        refuse_unsafe();
        if (event->record) complete(Mark(event->record->mark));
        require(context.failure == CUDA_SUCCESS, context.failure);
    });
}

CUresult cuEventElapsedTime_v2(float* milliseconds, CUevent start, CUevent end) {
    return answer(__func__, [&] {
        current();
        const auto first = events.at(start), last = events.at(end);
        uncaptured(*first);
        uncaptured(*last);
        for (const auto& event : {first, last})
            require(event->record && !(event->flags & CU_EVENT_DISABLE_TIMING), CUDA_ERROR_INVALID_HANDLE);
        require(first->record->is_done && last->record->is_done, CUDA_ERROR_NOT_READY);
        *milliseconds = static_cast<float>(1e3 * (last->record->seconds - first->record->seconds));
    });
}
