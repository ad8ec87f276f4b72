"""Triton kernels. Importing one of these modules imports Triton.

All kernels see x `[N, C, *S]` as lines of B1 values. A tile `[B0, B1]` is B0 lines. There are three layouts:

|               | a line                           | a program's channels | sums run over           |
|---------------|----------------------------------|----------------------|-------------------------|
| contiguous    | VEC positions of a channel       | one                  | both axes               |
| `ROWS`        | channels, of a position          | `B1`                 | axis 0                  |
| also `GROUP`  | positions of `GROUP` channels    | `GROUP`              | axis 0, then positions  |

`GROUP` is for contiguous tensors with an odd number of positions, such as 7×7: the size of several channels together is
a multiple of a wide access. A program's channels form a *block*. The lines of a block are divided into *splits* of
`per` lines. Vectors are scalars or `[1, B1]`, and broadcast against tiles. With `index`, every sample is a separate
split, so that a program uses one row of the statistics only. Programs that hold a whole block in one tile
(`*_once_kernel`) see contiguous tensors as lines of all positions of a channel.

Loops run over whole tiles without masks; what is left at the end of a block follows with masks. Several loads are
in flight together. A kernel that reads x for the second time visits programs and tiles in reverse, and marks x as the
first to leave the cache: what was read last is still there. Offsets have 64 bits in large tensors (`WIDE`), else 32.
Sums are merged in a fixed order, so that every run gives the same bits.
"""
