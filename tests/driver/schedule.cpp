// When work runs: as late as the API allows, so that what a caller forgot to wait for has not happened.
#include <algorithm>

#include "state.h"

namespace standin {

namespace {

uint64_t issued = 0;

// Programming guide, "Legacy Default Stream": it "waits on all blocking streams, the action is queued in the legacy
// stream, and then all blocking streams wait on the legacy stream".
void add_implicit_order(Stream& stream, std::vector<Mark>& after) {
    Context& context = *stream.context;
    if (stream.is_legacy) {
        for (const auto& other : context.streams)
            if (other->is_blocking()) after.push_back(other->end());
    } else if (stream.is_blocking()) {
        after.push_back(context.legacy->end());
    }
}

}  // namespace

bool Mark::is_done() const { return !stream || stream->completed >= number; }

Mark enqueue(Stream& stream, const char* kind, Work work, std::vector<Mark> after) {
    if (stream.is_legacy) refuse_legacy_use(*stream.context);
    if (stream.capture) {
        add_node(stream, kind, std::move(work));
        return {};
    }
    add_implicit_order(stream, after);
    const auto is_done = [](const Mark& mark) { return mark.is_done(); };
    after.erase(std::remove_if(after.begin(), after.end(), is_done), after.end());
    stream.pending.push_back({++stream.issued, ++issued, std::move(after), std::move(work)});
    return stream.end();
}

void step(const std::shared_ptr<Stream>& stream) {
    if (stream->is_running) {  // by another thread, which is in a host function
        wait_for_change();
        return;
    }
    if (stream->pending.empty()) return;
    stream->is_running = true;
    Operation& operation = stream->pending.front();  // stays where it is while others are added
    for (const Mark& mark : operation.after) complete(mark);
    Context& context = *stream->context;
    if (context.failure == CUDA_SUCCESS) {
        const CUresult result = operation.work();
        if (result != CUDA_SUCCESS) context.failure = result;
    }
    stream->completed = operation.number;
    stream->pending.pop_front();
    stream->is_running = false;
    if (stream->is_destroyed && stream->pending.empty()) {
        auto& all = context.streams;
        all.erase(std::remove(all.begin(), all.end(), stream), all.end());
    }
    changed.notify_all();
}

void complete(const Mark& mark) {
    while (!mark.is_done()) step(mark.stream);
}

void finish(Stream& stream) { complete(stream.end()); }

// Of what may run in any order the newest runs first: an order that only seems to be there shows.
void finish(Context& context) {
    std::vector<Mark> ends{context.legacy->end()};
    for (const auto& stream : context.streams) ends.push_back(stream->end());
    for (;;) {
        const Mark* newest = nullptr;
        for (const Mark& end : ends) {
            if (end.is_done()) continue;
            const auto head = [](const Mark& mark) { return mark.stream->pending.front().serial; };
            if (!newest || head(end) > head(*newest)) newest = &end;
        }
        if (!newest) return;
        step(newest->stream);
    }
}

void abandon(Context& context) {
    for (const auto& stream : context.streams) {
        leave_capture(*stream);
        stream->pending.clear();
        stream->completed = stream->issued;
    }
    context.legacy->pending.clear();
    context.legacy->completed = context.legacy->issued;
    context.streams.clear();
    context.per_thread.clear();
}

}  // namespace standin
