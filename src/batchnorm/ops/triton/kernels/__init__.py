"""Triton kernels. Importing one of these modules imports Triton.

All kernels see x `[N, C, *S]` as tiles `[B0, B1]` of one of two layouts (`ROWS`):

|            | axis 0                | axis 1          | a program's channels | sums run over |
|------------|-----------------------|-----------------|----------------------|---------------|
| contiguous | samples               | positions       | one                  | both axes     |
| `ROWS`     | samples and positions | channels        | `B1`                 | axis 0        |

A program's channels form a *block*. The values of a block are divided into *splits* of `per` tiles (or, with `ROWS`,
of `per` rows). Vectors are scalars or `[1, B1]`, and broadcast against tiles. With `index`, every sample is a separate
split, so that a program uses one row of the statistics only. Offsets have 64 bits in large tensors (`WIDE`), else 32.
Sums are merged in a fixed order, so that every run gives the same bits.
"""
