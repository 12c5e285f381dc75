"""CUDA C++ at run time: source → cubin → launch. `strobe.cuda.jit` is the whole interface."""
