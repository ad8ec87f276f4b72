"""The program of each of the two processes of test_on_a_gpu.py, each with its own device."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.testing import assert_close

import batchnorm

PROCESSES = 2


def run(rank: int, store: str) -> None:
    """Train SyncBatchNorm under DDP on a half of the batch, and compare with BatchNorm on the whole."""
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", init_method=store, rank=rank, world_size=PROCESSES)
    try:
        torch.manual_seed(0)
        x = torch.randn(8, 16, 9, 9, device="cuda").to(memory_format=torch.channels_last)
        whole, half = x.clone().requires_grad_(), x.chunk(PROCESSES)[rank].clone().requires_grad_()
        plain, sync = batchnorm.BatchNorm2d(16).cuda(), batchnorm.SyncBatchNorm(16).cuda()
        y = torch.nn.parallel.DistributedDataParallel(sync, device_ids=[rank])(half)
        expected = plain(whole)
        y.square().sum().backward()
        expected.square().sum().backward()
        assert_close(y, expected.chunk(PROCESSES)[rank])
        assert whole.grad is not None
        assert_close(half.grad, whole.grad.chunk(PROCESSES)[rank], rtol=1e-4, atol=1e-4)
        assert_close(sync.running_var, plain.running_var)
    finally:
        dist.destroy_process_group()
