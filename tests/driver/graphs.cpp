// Graphs: nodes with what each comes after, and executable copies that are launched as one operation of a stream.
#include "state.h"

namespace standin {

Table<Graph, CUgraph>& graphs = *new Table<Graph, CUgraph>("graph");
Table<Executable, CUgraphExec>& executables = *new Table<Executable, CUgraphExec>("executable graph");

// Of the nodes that may run in any order the last captured runs first: an order that only seems to be there shows.
CUresult run_graph(const Graph& graph) {
    std::set<size_t> open;
    for (size_t i = 0; i < graph.nodes.size(); i++) open.insert(i);
    while (!open.empty()) {
        for (auto each = open.rbegin(); each != open.rend(); ++each) {
            bool is_ready = true;
            for (size_t before : graph.nodes[*each].after) is_ready &= !open.count(before);
            if (!is_ready) continue;
            if (const CUresult error = graph.nodes[*each].work()) return error;
            open.erase(*each);
            break;
        }
    }
    return CUDA_SUCCESS;
}

}  // namespace standin

using namespace standin;

CUresult cuGraphGetNodes(CUgraph handle, CUgraphNode* nodes, size_t* count) {
    return answer(__func__, [&] {
        require(!nodes, CUDA_ERROR_NOT_SUPPORTED);  // nodes have no handles here: they can only be counted
        *count = graphs.at(handle)->nodes.size();
    });
}

CUresult cuGraphClone(CUgraph* clone, CUgraph handle) {
    return answer(__func__, [&] { *clone = graphs.add(std::make_shared<Graph>(*graphs.at(handle))); });
}

CUresult cuGraphDestroy(CUgraph handle) {
    return answer(__func__, [&] {
        graphs.at(handle);
        graphs.remove(handle);
    });
}

CUresult cuGraphInstantiateWithFlags(CUgraphExec* executable, CUgraph handle, unsigned long long flags) {
    return answer(__func__, [&] {
        current();
        require(flags == 0, CUDA_ERROR_NOT_SUPPORTED);
        *executable = executables.add(std::make_shared<Executable>(Executable{*graphs.at(handle), {}}));
    });
}

// "Updates the node parameters [...] with the node parameters in a topologically identical graph"
CUresult cuGraphExecUpdate_v2(CUgraphExec handle, CUgraph graph_handle, CUgraphExecUpdateResultInfo* result) {
    return answer(__func__, [&] {
        current();
        const auto executable = executables.at(handle);
        const auto graph = graphs.at(graph_handle);
        const auto fail = [&](CUgraphExecUpdateResult why) {
            *result = {why, nullptr, nullptr};
            throw CUDA_ERROR_GRAPH_EXEC_UPDATE_FAILURE;
        };
        const auto &old = executable->graph.nodes, &fresh = graph->nodes;
        if (old.size() != fresh.size()) fail(CU_GRAPH_EXEC_UPDATE_ERROR_TOPOLOGY_CHANGED);
        for (size_t i = 0; i < old.size(); i++) {
            if (old[i].after != fresh[i].after) fail(CU_GRAPH_EXEC_UPDATE_ERROR_TOPOLOGY_CHANGED);
            if (old[i].kind != fresh[i].kind) fail(CU_GRAPH_EXEC_UPDATE_ERROR_NODE_TYPE_CHANGED);
        }
        executable->graph.nodes = fresh;
        *result = {CU_GRAPH_EXEC_UPDATE_SUCCESS, nullptr, nullptr};
    });
}

CUresult cuGraphUpload(CUgraphExec handle, CUstream stream_handle) {
    return answer(__func__, [&] {
        executables.at(handle);
        enqueue(*stream_at(stream_handle), "upload", [] { return CUDA_SUCCESS; });
    });
}

// "Each launch is ordered behind both any previous work in hStream and any previous launches of hGraphExec."
CUresult cuGraphLaunch(CUgraphExec handle, CUstream stream_handle) {
    return answer(__func__, [&] {
        const auto stream = stream_at(stream_handle);
        const auto executable = executables.at(handle);
        const auto graph = std::make_shared<Graph>(executable->graph);  // as it is now, whatever becomes of the handle
        const Mark mark = enqueue(*stream, "graph", [=] { return run_graph(*graph); }, {executable->last});
        if (mark.stream) executable->last = mark;
    });
}

CUresult cuGraphExecDestroy(CUgraphExec handle) {
    return answer(__func__, [&] {
        executables.at(handle);
        executables.remove(handle);
    });
}
