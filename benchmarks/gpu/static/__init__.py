"""Properties of the compiled kernels that need no GPU: registers, spills and instructions a value."""
