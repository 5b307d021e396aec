// Stream capture: what is put in the streams of one becomes a graph, and what may not be done meanwhile.
#include <algorithm>

#include "state.h"

namespace standin {

namespace {

std::set<Capture*>& captures = *new std::set<Capture*>;  // those that go on
thread_local CUstreamCaptureMode thread_mode = CU_STREAM_CAPTURE_MODE_GLOBAL;

// cuThreadExchangeStreamCaptureMode: which threads "are prohibited from potentially unsafe API calls".
bool prohibits(const Capture& capture) {
    if (thread_mode == CU_STREAM_CAPTURE_MODE_RELAXED) return false;
    if (capture.thread == std::this_thread::get_id()) return capture.mode != CU_STREAM_CAPTURE_MODE_RELAXED;
    return thread_mode == CU_STREAM_CAPTURE_MODE_GLOBAL && capture.mode == CU_STREAM_CAPTURE_MODE_GLOBAL;
}

// All nodes that one of ``ends`` comes after, and these.
std::set<size_t> ancestors(const Graph& graph, const std::set<size_t>& ends) {
    std::set<size_t> all, open = ends;
    while (!open.empty()) {
        const size_t each = *open.begin();
        open.erase(each);
        if (all.insert(each).second) open.insert(graph.nodes[each].after.begin(), graph.nodes[each].after.end());
    }
    return all;
}

void end_capture(Capture& capture) {
    for (const auto& stream : capture.members) {
        stream->capture.reset();
        stream->frontier.clear();
    }
    capture.members.clear();
    capture.is_ended = true;
    captures.erase(&capture);
}

}  // namespace

void invalidate(Capture& capture, const char* why) {
    if (capture.is_valid) trace(std::string("  a capture is invalidated: ") + why);
    capture.is_valid = false;
}

void refuse_unsafe() {
    bool is_refused = false;
    for (Capture* capture : captures)
        if (prohibits(*capture)) {
            invalidate(*capture, "a call that is potentially unsafe");
            is_refused = true;
        }
    require(!is_refused, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
}

// Programming guide, "Prohibited and Unhandled Operations": "It is invalid to synchronize or query the execution status of
// a stream which is being captured", nor "a broader handle which encompasses an active stream capture, such as a device or
// context handle".
void refuse_capturing(Stream& stream) {
    if (stream.is_legacy) refuse_legacy_use(*stream.context);
    if (!stream.capture) return;
    invalidate(*stream.capture, "its stream is waited for");
    throw CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
}

void refuse_capturing(Context& context) {
    bool is_refused = false;
    for (const auto& stream : context.streams)
        if (stream->capture) {
            invalidate(*stream->capture, "its context is waited for");
            is_refused = true;
        }
    require(!is_refused, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
}

// The same section: "When any stream in the same context is being captured, and it was not created with
// cudaStreamNonBlocking, any attempted use of the legacy stream is invalid."
void refuse_legacy_use(Context& context) {
    bool is_refused = false;
    for (const auto& stream : context.streams)
        if (stream->capture && stream->is_blocking()) {
            invalidate(*stream->capture, "the legacy stream is used");
            is_refused = true;
        }
    require(!is_refused, CUDA_ERROR_STREAM_CAPTURE_IMPLICIT);
}

void add_node(Stream& stream, const char* kind, Work work) {
    Capture& capture = *stream.capture;
    require(capture.is_valid, CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
    capture.graph->nodes.push_back({kind, std::move(work), stream.frontier});
    stream.frontier = {capture.graph->nodes.size() - 1};
}

// A stream that waits for an event of a capture becomes part of it.
void join_capture(Stream& stream, Event& event) {
    Capture& capture = *event.capture;
    require(!capture.is_ended, CUDA_ERROR_CAPTURED_EVENT);
    require(capture.is_valid, CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
    if (stream.capture && stream.capture != event.capture) {
        invalidate(capture, "another capture waits for it");
        invalidate(*stream.capture, "it waits for another capture");
        throw CUDA_ERROR_STREAM_CAPTURE_MERGE;
    }
    if (stream.is_legacy) {
        invalidate(capture, "the legacy stream waits for it");
        throw CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;
    }
    if (!stream.capture) {
        stream.capture = event.capture;
        capture.members.push_back(stream.shared_from_this());
    }
    stream.frontier.insert(event.frontier.begin(), event.frontier.end());
}

void leave_capture(Stream& stream) {
    if (!stream.capture) return;
    const auto capture = stream.capture;
    invalidate(*capture, "a stream of it is destroyed");
    if (capture->origin == &stream) {
        end_capture(*capture);
        return;
    }
    auto& members = capture->members;
    members.erase(std::remove(members.begin(), members.end(), stream.shared_from_this()), members.end());
    stream.capture.reset();
}

}  // namespace standin

using namespace standin;

CUresult cuStreamBeginCapture_v2(CUstream handle, CUstreamCaptureMode mode) {
    return answer(__func__, [&] {
        const auto stream = stream_at(handle);
        require(mode >= CU_STREAM_CAPTURE_MODE_GLOBAL && mode <= CU_STREAM_CAPTURE_MODE_RELAXED);
        require(!stream->is_legacy, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
        require(!stream->capture, CUDA_ERROR_ILLEGAL_STATE);
        auto capture = std::make_shared<Capture>();
        capture->mode = mode;
        capture->thread = std::this_thread::get_id();
        capture->origin = stream.get();
        capture->members = {stream};
        capture->graph = std::make_shared<Graph>();
        capture->graph->context = stream->context;
        captures.insert(capture.get());
        stream->capture = capture;
    });
}

CUresult cuStreamEndCapture(CUstream handle, CUgraph* graph) {
    return answer(__func__, [&] {
        if (graph) *graph = nullptr;
        const auto stream = stream_at(handle);
        const auto capture = stream->capture;
        require(capture != nullptr, CUDA_ERROR_ILLEGAL_STATE);
        const bool is_owner = capture->thread == std::this_thread::get_id();
        const bool is_any = capture->mode == CU_STREAM_CAPTURE_MODE_RELAXED;
        require(is_any || is_owner, CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD);
        if (capture->origin != stream.get()) {
            invalidate(*capture, "it is ended in another stream");
            throw CUDA_ERROR_STREAM_CAPTURE_UNMATCHED;
        }
        const bool is_joined = ancestors(*capture->graph, stream->frontier).size() == capture->graph->nodes.size();
        end_capture(*capture);
        require(capture->is_valid, CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
        require(is_joined, CUDA_ERROR_STREAM_CAPTURE_UNJOINED);
        if (graph) *graph = graphs.add(capture->graph);
    });
}

CUresult cuStreamIsCapturing(CUstream handle, CUstreamCaptureStatus* status) {
    return answer(__func__, [&] {
        const auto stream = stream_at(handle);
        if (stream->is_legacy) {  // which is asked without harm to the capture
            for (const auto& other : stream->context->streams)
                require(!other->capture || !other->is_blocking(), CUDA_ERROR_STREAM_CAPTURE_IMPLICIT);
        }
        *status = !stream->capture            ? CU_STREAM_CAPTURE_STATUS_NONE
                  : stream->capture->is_valid ? CU_STREAM_CAPTURE_STATUS_ACTIVE
                                              : CU_STREAM_CAPTURE_STATUS_INVALIDATED;
    });
}

CUresult cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode* mode) {
    return answer(__func__, [&] {
        require(*mode >= CU_STREAM_CAPTURE_MODE_GLOBAL && *mode <= CU_STREAM_CAPTURE_MODE_RELAXED);
        std::swap(*mode, thread_mode);
    });
}
