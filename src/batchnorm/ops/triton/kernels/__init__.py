"""Triton kernels. Importing one of these modules imports Triton.

All see x `[N, C, *S]` as tiles `[B0, B1]` of one of two layouts (`ROWS`):

|            | axis 0                | axis 1          | a program's channels | sums run over |
|------------|-----------------------|-----------------|----------------------|---------------|
| contiguous | samples               | positions       | one                  | both axes     |
| `ROWS`     | samples and positions | channels        | `B1`                 | axis 0        |

A program's channels make a *block*; the values of a block are cut into *splits* of `per` tiles (of `per` rows with
`ROWS`). Vectors are a scalar or `[1, B1]` and broadcast against tiles. With `index` every sample is a split of its own,
so that one row of the statistics serves the whole program. Offsets have 64 bits in large tensors (`WIDE`), else 32.
Sums are joined in a fixed order: the bits are the same every run.
"""
