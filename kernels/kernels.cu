// All kernels in one translation unit: the fatbin that ships, and build/host.so for the tests.
#include "group_norm.cu"
#include "skip_scale.cu"
#include "steps.cu"
