// The stand-in's state: contexts, streams as queues of work that waits, captures, graphs and memory. One lock is over all.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "types.h"

#define ENTRY(NAME, ...) extern "C" __attribute__((visibility("default"))) CUresult NAME(__VA_ARGS__);
#include "entries.def"
#undef ENTRY

namespace standin {

// Calls: calls.cpp. An entry's body throws the error that the entry answers.
enum class Needs { nothing, initialised };
CUresult begin(const char* name, Needs needs, bool& is_locked);
void end(const char* name, CUresult result, bool is_locked);

template <class Body>
CUresult answer(const char* name, Body body, Needs needs = Needs::initialised) {
    bool is_locked = false;
    CUresult result = begin(name, needs, is_locked);
    if (result == CUDA_SUCCESS) try {
            body();
        } catch (CUresult error) {
            result = error;
        }
    end(name, result, is_locked);
    return result;
}

inline void require(bool is_met, CUresult error = CUDA_ERROR_INVALID_VALUE) {
    if (!is_met) throw error;
}
std::string text(const char* format, ...) __attribute__((format(printf, 1, 2)));
void trace(const std::string& line);
void report_misuse(const std::string& what);          // of the API by its caller; a run with any has failed
void report_unsupported(const std::string& what);     // what the stand-in cannot do
void outside_the_lock(const std::function<void()>&);  // a host function, which may call nothing of this API
long number_of(const char* variable, long otherwise);
void initialise();
extern std::condition_variable_any changed;  // some work was done; waits with the lock
void wait_for_change();

// Contexts: contexts.cpp
struct Stream;
struct Context {
    CUcontext handle = nullptr;
    int device = 0;
    bool is_primary = false, is_alive = true;
    unsigned flags = 0;
    int uses = 1;
    CUresult failure = CUDA_SUCCESS;  // of work that failed; every later call answers it
    std::shared_ptr<Stream> legacy;
    std::map<std::thread::id, std::shared_ptr<Stream>> per_thread;
    std::vector<std::shared_ptr<Stream>> streams;  // all of them; destroyed ones until their work is done
};
Context& current();              // throws where there is none, where it is destroyed or failed
Context& current_even_failed();  // for what a failed context still answers
Context* context_or_null();
std::vector<std::string> living_contexts();
void fail_current(CUresult error);

// Handles are numbers that are never used again, so that one of a destroyed object is told from all others.
uintptr_t next_handle();
bool was_handle(uintptr_t number);

template <class T, class Handle>
class Table {
   public:
    explicit Table(const char* kind) : kind_(kind) {}
    Handle add(std::shared_ptr<T> object) {
        const uintptr_t number = next_handle();
        objects_[number] = std::move(object);
        return reinterpret_cast<Handle>(number);
    }
    std::shared_ptr<T> at(Handle handle) const {
        const auto number = reinterpret_cast<uintptr_t>(handle);
        const auto place = objects_.find(number);
        if (place != objects_.end()) return place->second;
        const bool was = was_handle(number);
        report_misuse(text(was ? "handle %#zx: the %s is destroyed" : "handle %#zx is no %s", size_t(number), kind_));
        throw CUDA_ERROR_INVALID_HANDLE;
    }
    void remove(Handle handle) { objects_.erase(reinterpret_cast<uintptr_t>(handle)); }
    template <class Predicate>
    void remove_if(Predicate is_removed) {
        for (auto each = objects_.begin(); each != objects_.end();)
            each = is_removed(*each->second) ? objects_.erase(each) : std::next(each);
    }
    size_t size() const { return objects_.size(); }

   private:
    const char* kind_;
    std::map<uintptr_t, std::shared_ptr<T>> objects_;
};

// Streams: schedule.cpp, streams.cpp
using Work = std::function<CUresult()>;
struct Mark {  // a place in a stream's order
    std::shared_ptr<Stream> stream;
    uint64_t number = 0;
    bool is_done() const;
};
struct Operation {
    uint64_t number, serial;
    std::vector<Mark> after;
    Work work;
};
struct Capture;
struct Stream : std::enable_shared_from_this<Stream> {
    Context* context = nullptr;
    unsigned flags = 0;
    int priority = 0;
    bool is_legacy = false, is_running = false, is_destroyed = false;
    std::deque<Operation> pending;
    uint64_t issued = 0, completed = 0;
    std::shared_ptr<Capture> capture;
    std::set<size_t> frontier;  // nodes of the capture that the next one comes after
    bool is_blocking() const { return !is_legacy && !(flags & CU_STREAM_NON_BLOCKING); }
    Mark end() { return {shared_from_this(), issued}; }
};
std::shared_ptr<Stream> stream_at(CUstream handle);
std::shared_ptr<Stream> new_stream(Context& context, unsigned flags);
Mark enqueue(Stream& stream, const char* kind, Work work, std::vector<Mark> after = {});
void step(const std::shared_ptr<Stream>& stream);  // one more of its operations is done
void complete(const Mark& mark);
void finish(Stream& stream);
void finish(Context& context);
void abandon(Context& context);  // all that its streams still hold
extern Table<Stream, CUstream>& streams;

// Events: events.cpp
struct Record {  // one recording of an event
    Mark mark;
    bool is_done = false;
    double seconds = 0;
};
struct Event {
    Context* context;
    unsigned flags;
    std::shared_ptr<Record> record;
    std::shared_ptr<Capture> capture;  // where it was last recorded in one
    std::set<size_t> frontier;
};
extern Table<Event, CUevent>& events;

// Captures and graphs: captures.cpp, graphs.cpp
struct Node {
    std::string kind;
    Work work;
    std::set<size_t> after;
};
struct Graph {
    Context* context = nullptr;
    std::vector<Node> nodes;
};
struct Executable {
    Graph graph;
    Mark last;
};
struct Capture {
    CUstreamCaptureMode mode;
    std::thread::id thread;
    Stream* origin;
    std::vector<std::shared_ptr<Stream>> members;
    std::shared_ptr<Graph> graph;
    bool is_valid = true, is_ended = false;
};
void refuse_unsafe();                      // a call that a capture, here or elsewhere, may not see
void refuse_capturing(Stream& stream);     // to wait for it, or ask for its state
void refuse_capturing(Context& context);   // the same of all its streams
void refuse_legacy_use(Context& context);  // while a blocking stream is captured
void invalidate(Capture& capture, const char* why);
void add_node(Stream& stream, const char* kind, Work work);
void join_capture(Stream& stream, Event& event);
CUresult run_graph(const Graph& graph);
void leave_capture(Stream& stream);
extern Table<Graph, CUgraph>& graphs;
extern Table<Executable, CUgraphExec>& executables;

// Memory: memory.cpp
struct Block {
    uintptr_t base;
    size_t size;
    Context* context;
    bool is_host, is_registered, is_free;
    unsigned flags;
    uintptr_t mapping;  // the pages that hold it, guard pages included
    size_t mapped;
};
Block* block_at(uintptr_t address);  // freed ones too: their addresses are not used again
void check_range(uintptr_t address, size_t size, const char* role);  // throws where it is not in living memory
bool is_ours(uintptr_t address);                                     // in the range that memory is taken from
bool is_pinned(uintptr_t address, size_t size);  // throws where it is pinned in part, or was
bool guarded(const std::function<void()>&);      // false where it touched an address that may not be touched
void free_memory(Context& context);
size_t living_blocks(bool is_host);
size_t bytes_on(int device);

// Devices: devices.cpp
struct Model {
    const char* name;
    int major, minor, processors, shared_a_block, shared_a_processor;
    size_t bytes;
};
const Model& model();
int device_count();
int driver_version();
size_t room();  // bytes that a device has

// Modules: modules.cpp, launches.cpp
struct Kernel {
    std::string name;
    std::map<int, int> registers;  // by the compute capability that it is compiled for
    int shared;                    // bytes that it has without asking
    std::vector<size_t> sizes;     // of its parameters
};
struct Module {
    Context* context;
    std::map<std::string, CUfunction> functions;
};
struct Function {
    CUmodule module;
    Context* context;
    const Kernel* kernel;
    int most_dynamic_shared;
};
using HostLaunch = int (*)(const char*, const unsigned*, const unsigned*, unsigned, unsigned, void**);
HostLaunch host_launch();
int registers_of(const Kernel& kernel);
int most_threads(const Kernel& kernel);  // of a block, by its registers
extern Table<Module, CUmodule>& modules;
extern Table<Function, CUfunction>& functions;

}  // namespace standin
