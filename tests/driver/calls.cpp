// Every call passes here: the lock, the order to fail, the trace, and the report at exit.
//
//   CM_DRIVER_FAIL    cuMemAlloc_v2:3:2 answers error 2 at the third call; :3+:2 from the third on; several by commas
//   CM_DRIVER_TRACE   a file, to which each call is written
//   CM_DRIVER_REPORT  a file: misuse, what is not supported, and what is left at exit
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "state.h"

namespace standin {

std::condition_variable_any changed;

namespace {

// Nothing here is destroyed at exit: other libraries' destructors may still call.
std::mutex& lock = *new std::mutex;
std::map<std::string, long>& counts = *new std::map<std::string, long>;
std::vector<std::string>& misuses = *new std::vector<std::string>;
std::set<std::string>& unsupported = *new std::set<std::string>;
pid_t owner = 0;  // the process that called cuInit
thread_local const char* call = "";
thread_local bool is_in_host_function = false;

bool is_sticky(CUresult error) {
    return error == CUDA_ERROR_ILLEGAL_ADDRESS || error == CUDA_ERROR_LAUNCH_TIMEOUT ||
           (error >= CUDA_ERROR_ASSERT && error <= CUDA_ERROR_LAUNCH_FAILED &&
            error != CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED && error != CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED);
}

struct Order {
    std::string name;
    long first;
    bool is_lasting;
    int error;
};

std::vector<Order> read_orders(std::string rest) {
    std::vector<Order> orders;
    while (!rest.empty()) {
        const std::string each = rest.substr(0, rest.find(','));
        rest.erase(0, each.size() + 1);
        char name[128], sign = 0;
        long first;
        int error;
        const bool is_lasting = sscanf(each.c_str(), "%127[^:]:%ld%c:%d", name, &first, &sign, &error) == 4 && sign == '+';
        if (!is_lasting && sscanf(each.c_str(), "%127[^:]:%ld:%d", name, &first, &error) != 3) {
            fprintf(stderr, "driver: CM_DRIVER_FAIL is a list of name:number:error, not %s\n", each.c_str());
            abort();
        }
        orders.push_back({name, first, is_lasting, error});
    }
    return orders;
}

CUresult ordered_failure(const char* name) {
    static std::string& text = *new std::string;
    static std::vector<Order>& orders = *new std::vector<Order>;
    const char* variable = getenv("CM_DRIVER_FAIL");
    if (text != (variable ? variable : "")) {  // calls are counted from when the order is there
        text = variable ? variable : "";
        orders = read_orders(text);
        counts.clear();
    }
    const long count = ++counts[name];
    for (const Order& order : orders)
        if (order.name == name && (count == order.first || (order.is_lasting && count > order.first))) {
            const auto error = static_cast<CUresult>(order.error);
            if (is_sticky(error)) fail_current(error);
            return error;
        }
    return CUDA_SUCCESS;
}

}  // namespace

CUresult begin(const char* name, Needs needs, bool& is_locked) {
    // cuLaunchHostFunc: "The host function must not make any CUDA API calls."
    if (is_in_host_function) return CUDA_ERROR_NOT_PERMITTED;
    // Programming guide, "Initialization": a forked child cannot use what its parent has initialised.
    if (needs == Needs::initialised && owner != getpid()) return CUDA_ERROR_NOT_INITIALIZED;
    lock.lock();
    is_locked = true;
    call = name;
    return ordered_failure(name);
}

void end(const char* name, CUresult result, bool is_locked) {
    trace(text("%s: %d (thread %d)", name, result, gettid()));
    if (is_locked) lock.unlock();
}

void trace(const std::string& line) {
    static FILE* const file = getenv("CM_DRIVER_TRACE") ? fopen(getenv("CM_DRIVER_TRACE"), "a") : nullptr;
    if (!file) return;
    fprintf(file, "%s\n", line.c_str());
    fflush(file);
}

void initialise() { owner = getpid(); }

std::string text(const char* format, ...) {
    char buffer[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(buffer, sizeof buffer, format, arguments);
    va_end(arguments);
    return buffer;
}

void report_misuse(const std::string& what) { misuses.push_back(std::string(call) + ": " + what); }

void report_unsupported(const std::string& what) { unsupported.insert(what); }

void outside_the_lock(const std::function<void()>& body) {
    const char* const name = call;
    is_in_host_function = true;
    lock.unlock();
    body();
    lock.lock();
    is_in_host_function = false;
    call = name;
}

void wait_for_change() {
    const char* const name = call;
    changed.wait(lock);
    call = name;
}

long number_of(const char* variable, long otherwise) {
    const char* text = getenv(variable);
    return text && *text ? strtol(text, nullptr, 0) : otherwise;
}

// What happened and what is left, a line each: "misuse ...", "unsupported ...", "left N kind".
std::string report() {
    std::string lines;
    for (const std::string& each : misuses) lines += "misuse " + each + "\n";
    for (const std::string& each : unsupported) lines += "unsupported " + each + "\n";
    for (const std::string& each : living_contexts()) lines += "left " + each + "\n";
    const std::pair<const char*, size_t> kinds[] = {
        {"blocks of memory", living_blocks(false)}, {"blocks of pinned memory", living_blocks(true)},
        {"streams", streams.size()},                {"events", events.size()},
        {"modules", modules.size()},                {"graphs", graphs.size()},
        {"executable graphs", executables.size()},
    };
    for (const auto& [kind, count] : kinds)
        if (count) lines += text("left %zu %s\n", count, kind);
    return lines;
}

}  // namespace standin

// The report so far, for tests of the stand-in itself; what it says of misuse is forgotten.
extern "C" __attribute__((visibility("default"))) const char* cm_driver_report() {
    static std::string& lines = *new std::string;
    std::lock_guard<std::mutex> guard(standin::lock);
    lines = standin::report();
    standin::misuses.clear();
    standin::unsupported.clear();
    return lines.c_str();
}

// How often an entry was called, by its exported name.
extern "C" __attribute__((visibility("default"))) long cm_driver_calls(const char* name) {
    std::lock_guard<std::mutex> guard(standin::lock);
    return standin::counts[name];
}

__attribute__((destructor)) static void write_report() {
    const char* path = getenv("CM_DRIVER_REPORT");
    if (!path || (standin::owner && standin::owner != getpid())) return;
    if (FILE* file = fopen(path, "a")) {
        fprintf(file, "%send\n", standin::report().c_str());
        fclose(file);
    }
}
