"""Recalibrate one model with many processes, each reading every n-th batch.

Run it with `torchrun --nproc-per-node 2 examples/recalibrate_under_torchrun.py`.
"""

from __future__ import annotations

from itertools import islice

import torch
import torch.distributed as dist
from torch import nn

import batchnorm as bn


def main() -> None:
    """Pool the statistics of all ranks, and show that they are the same everywhere."""
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", rank % torch.cuda.device_count()) if torch.cuda.is_available() else None
    if device is not None:
        torch.cuda.set_device(device)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    data = torch.randn(90, 3, 16, 16).split(10)  # nine batches: ranks get different numbers of them
    model, report = bn.recalibrate(model.to(device), islice(data, rank, None, ranks))
    print(f"rank {rank}: {report.summary()}, running_mean[0] = {model[1].running_mean[0].item():.9f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
