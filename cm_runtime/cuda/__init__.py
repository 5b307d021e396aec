"""CUDA, which nothing else touches: the driver, a device at work, graphs, and the step ops' twin on a GPU."""
