"""Run the command line on one of several processes, and write the output of each call to a file."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from pathlib import Path

import torch.distributed as dist
from torch import Tensor, nn

from batchnorm.cli import main


class FailsOnRankOne(nn.Linear):
    """Fails in its second step of training there, and nowhere else."""

    steps = 0

    def forward(self, x: Tensor) -> Tensor:
        """Return class scores."""
        if self.training:
            self.steps += 1
            if self.steps == 2 and dist.get_rank() == 1:
                raise RuntimeError("shapes do not fit")
        return super().forward(x)


def build(norm: object, in_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Return a network that fails on one process."""
    return FailsOnRankOne(in_shape[0], num_classes)


if __name__ == "__main__":
    calls = json.loads(sys.argv[1])
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    said = []
    for number, words in enumerate(calls):
        if number == 1:  # The first comparison makes the group; another would need a store that is not used yet.
            dist.init_process_group("gloo", init_method=f"file://{Path('store').resolve()}", rank=rank, world_size=size)
        out, err = io.StringIO(), io.StringIO()
        code: object = None
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main(["compare", *words])
            except SystemExit as ended:
                code = ended.code
        said.append({"code": code, "out": out.getvalue(), "err": err.getvalue()})
    Path(f"said-{rank}.json").write_text(json.dumps(said))
    dist.destroy_process_group()  # otherwise, a thread of the group that still runs at exit aborts the process
