"""Triton kernels. Importing one of these modules imports Triton.

All kernels see x `[N, C, *S]` as tiles `[B0, B1]` of one of two layouts (`ROWS`):

|            | axis 0                | axis 1          | a program's channels | sums run over |
|------------|-----------------------|-----------------|----------------------|---------------|
| contiguous | samples               | positions       | one                  | both axes     |
| `ROWS`     | samples and positions | channels        | `B1`                 | axis 0        |

A program's channels form a *block*; the values of a block are cut into *splits* of `per` tiles (of `per` rows with
`ROWS`). Vectors are a scalar or `[1, B1]` and broadcast against tiles. With `index` every sample is a split of its own,
so that the whole program uses one row of the statistics. Offsets have 64 bits in large tensors (`WIDE`), else 32.
Sums are merged in a fixed order: the bits are the same in every run.
"""
