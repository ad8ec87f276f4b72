"""Standardize data that are distributed over processes; their shares may differ in length.

Run it with `torchrun --nproc-per-node 2 examples/standardize_under_torchrun.py`.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from batchnorm import Standardizer


def main() -> None:
    """Fit this rank's share, pool the statistics, and show that all ranks have the same."""
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank = dist.get_rank()
    if torch.cuda.is_available():
        torch.cuda.set_device(rank % torch.cuda.device_count())
    images = torch.arange(100.0).view(100, 1, 1, 1).expand(100, 3, 8, 8)
    share = images[:70] if rank == 0 else images[70:]
    standardizer = Standardizer().fit(share).all_reduce()
    layer = standardizer.to_layer()
    print(f"rank {rank}: mean {standardizer.mean_}, {standardizer.n_samples_seen_} values, {layer}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
