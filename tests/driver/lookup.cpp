// Look-up by name and version, names of errors, and the refusal of what there is not.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <array>
#include <utility>

#include "state.h"

using namespace standin;

namespace {

const std::map<std::string, void*>& entries() {
    static const auto& all = *new std::map<std::string, void*>{
#define ENTRY(NAME, ...) {#NAME, reinterpret_cast<void*>(&NAME)},
#include "entries.def"
#undef ENTRY
    };
    return all;
}

CUresult refuse(const char* name) {
    return answer(
        name,
        [&] {
            report_unsupported(name);
            throw CUDA_ERROR_NOT_SUPPORTED;
        },
        Needs::nothing);
}

// Functions for names that are asked for and not there: each refuses under the name that it is lent.
constexpr size_t MOST = 1000;
std::array<std::string, MOST>& lent = *new std::array<std::string, MOST>;
template <size_t I>
CUresult refuse_number() {
    return refuse(lent[I].c_str());
}
template <size_t... I>
constexpr std::array<CUresult (*)(), MOST> refusals(std::index_sequence<I...>) {
    return {refuse_number<I>...};
}

void* refusal(const std::string& name) {
    static constexpr auto all = refusals(std::make_index_sequence<MOST>());
    for (size_t i = 0; i < MOST; i++) {
        if (lent[i].empty()) lent[i] = name;
        if (lent[i] == name) return reinterpret_cast<void*>(all[i]);
    }
    return nullptr;
}

struct Word {
    int number;
    const char *name, *text;
};
constexpr Word WORDS[] = {
#define ERROR(NAME, NUMBER, TEXT) {NUMBER, "CUDA_" #NAME, TEXT},
#include "errors.def"
#undef ERROR
};

CUresult word(CUresult error, const char** text, const char* Word::*which) {
    *text = nullptr;
    for (const Word& each : WORDS)
        if (each.number == error) *text = each.*which;
    return *text ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

}  // namespace

// What pycuda links and this project does not use.
#define REFUSED(NAME) \
    extern "C" __attribute__((visibility("default"))) CUresult NAME() { return refuse(#NAME); }
#include "refused.def"
#undef REFUSED

CUresult cuInit(unsigned flags) {
    return answer(
        __func__,
        [&] {
            require(flags == 0);
            require(device_count() > 0, CUDA_ERROR_NO_DEVICE);
            initialise();
        },
        Needs::nothing);
}

CUresult cuDriverGetVersion(int* version) {
    return answer(
        __func__, [&] { *version = driver_version(); }, Needs::nothing);
}

CUresult cuGetErrorName(CUresult error, const char** text) { return word(error, text, &Word::name); }
CUresult cuGetErrorString(CUresult error, const char** text) { return word(error, text, &Word::text); }
CUresult cuProfilerStart() { return answer(__func__, [] {}); }
CUresult cuProfilerStop() { return answer(__func__, [] {}); }

// The tables that CUDA's runtime asks for are undocumented: it cannot be stood in for.
CUresult cuGetExportTable(const void** table, const CUuuid*) {
    *table = nullptr;
    return refuse("cuGetExportTable");
}

// A name without its version: the newest variant there is, as callers of this driver's version get it.
CUresult cuGetProcAddress_v2(const char* symbol, void** function, int version, cuuint64_t flags,
                             CUdriverProcAddressQueryResult* status) {
    *function = nullptr;
    if (status) *status = CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
    if (version > driver_version()) return CUDA_ERROR_INVALID_VALUE;
    if (flags & 2) {  // CU_GET_PROC_ADDRESS_PER_THREAD_DEFAULT_STREAM
        report_unsupported("variants of a per-thread default stream");
        return CUDA_SUCCESS;
    }
    static std::mutex& lock = *new std::mutex;
    std::lock_guard<std::mutex> guard(lock);
    for (const char* suffix : {"_v4", "_v3", "_v2", ""}) {
        const auto entry = entries().find(symbol + std::string(suffix));
        if (entry != entries().end() && !*function) *function = entry->second;
    }
    if (!*function) *function = refusal(symbol);
    if (status && *function) *status = CU_GET_PROC_ADDRESS_SUCCESS;
    return CUDA_SUCCESS;
}

extern "C" __attribute__((visibility("default"))) CUresult cuGetProcAddress(const char* symbol, void** function,
                                                                            int version, cuuint64_t flags) {
    return cuGetProcAddress_v2(symbol, function, version, flags, nullptr);
}
