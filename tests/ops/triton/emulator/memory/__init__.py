"""Global and shared memory, and the order of accesses to them."""
