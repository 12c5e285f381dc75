"""Machine code for the processor: numba's compiler (`jit`, `kernel`) and threads to run it (`threads`)."""
