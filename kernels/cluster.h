// Clusters of blocks, and copies from memory to shared memory, for nvcc and g++ (host.h has the host's).
//
// From sm_90 on the blocks of a cluster run at once and read each other's shared memory. Before, and where a launch asks
// for no cluster, a block is a cluster by itself. 8 blocks are what every GPU with clusters takes.
#pragma once

#include "portable.h"

#ifdef __CUDACC__
#include <cooperative_groups.h>
#include <cuda_pipeline_primitives.h>

// A barrier of all threads of the cluster. What they wrote to shared memory before is seen behind it by all its blocks.
CM_INLINE void cluster_sync() {
#if __CUDA_ARCH__ >= 900
    cooperative_groups::this_cluster().sync();
#else
    __syncthreads();
#endif
}

// The same place in the shared memory of the cluster's block `rank`, which may not end before it is read.
template <class T>
CM_INLINE const T* shared_of(const T* own, uint32_t rank) {
#if __CUDA_ARCH__ >= 900
    return cooperative_groups::this_cluster().map_shared_rank(own, rank);
#else
    return own;
#endif
}
#endif

// A run from memory to shared memory without registers between; its own thread may read it after wait_for_copies().
template <int W, class T>
CM_INLINE void copy_run(const T* from, T* to) {
#ifdef __CUDACC__
    if constexpr (W * sizeof(T) == 16 || W * sizeof(T) == 4) {
        __pipeline_memcpy_async(to, from, W * sizeof(T));
        return;
    }
#endif
    T run[W];
    load(from, run);
    store(run, to);
}

CM_INLINE void wait_for_copies() {
#ifdef __CUDACC__
    __pipeline_commit();
    __pipeline_wait_prior(0);
#endif
}
