"""Tensors whose memory was freed, as FSDP frees that of parameters: an error, never "absent" and never a crash.

Each implementation runs in a process of its own, because a missing check would end the process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from batchnorm import nn
from batchnorm.ops import compiled
from batchnorm.ops.schemas import SCHEMAS, SIGNATURES
from tests.nn.test_family_contract import FAMILY

N, C, S, GROUPS = 4, 3, 5, 2
ROWS = {"mean", "mean_low", "var", "weight", "bias", "mean_dxhat", "mean_dxhat_xhat"}
OTHERS = {"groups": GROUPS, "eps": 1e-5, "activation": "silu", "negative_slope": 0.0, "need_dz": True, "m": N * S,
          "momentum": 0.1, "skip_nonfinite": False}  # fmt: skip
Attempt = tuple[str, Callable[[], object]]


def argument(operator: str, name: str) -> Any:
    """A valid argument of an operator."""
    if name in OTHERS:
        return OTHERS[name]
    if name == "index":
        return torch.arange(N) % GROUPS
    if name == "weights":
        return torch.rand(N, S)
    if name == "num_batches_tracked":
        return torch.tensor(1)
    if name == "count":
        return torch.tensor(20.0, dtype=torch.float64)
    if name in ROWS and "index" in SIGNATURES[operator].arguments:
        return torch.rand(GROUPS, C)
    return torch.rand(N, C, S) if name in ("x", "dy", "y", "residual") else torch.rand(C)


def free(t: Tensor) -> None:
    t.untyped_storage().resize_(0)


def kinds_of(t: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Tensors of this shape that must be refused: freed, freed with other strides or an offset, or partly freed."""
    yield "freed", t.clone()
    if t.dim() > 0:
        yield "strided", torch.stack([t, t], -1)[..., 0]
        yield "offset", torch.cat([t, t])[len(t) :]
    if t.dtype == torch.float32:
        yield "other dtype", t.double()


def operator_attempts() -> Iterator[Attempt]:
    for operator, schema in SCHEMAS.items():
        names = SIGNATURES[operator].arguments
        declared = schema.split(" -> ")[0].strip("()").split(", ")
        tensors = [name for name, declaration in zip(names, declared, strict=True) if declaration.startswith("Tensor")]
        for freed in tensors:
            for kind, t in kinds_of(argument(operator, freed)):
                arguments = {name: argument(operator, name) for name in names}
                if freed != "y" and "y" in arguments:
                    arguments["y"] = None  # with y, the residual is not read
                if freed == "x" and kind == "other dtype":
                    continue
                arguments[freed] = t
                free(t)
                function, values = getattr(torch.ops.batchnorm, operator), tuple(arguments.values())
                yield f"{operator}, {freed} {kind}", lambda function=function, values=values: function(*values)


def layer_attempts() -> Iterator[Attempt]:
    for member, training in ((name, mode) for name in FAMILY for mode in (True, False)):
        for dtype in (torch.float32, torch.float64, torch.float16):
            stored = torch.float64 if dtype == torch.float64 else torch.float32
            for freed in ("x", "mask", "choice", *FAMILY[member].make(4).state_dict()):
                layer = FAMILY[member].make(4, dtype=stored).train(training)
                if dtype == torch.float16:
                    layer.on_single = "running"
                x = torch.randn(6, 4, 2, 3).to(dtype)
                extra = [t.clone() for t in FAMILY[member].extra(6)]
                masked = freed == "mask" and training and FAMILY[member].mask and FAMILY[member].moves
                masks = {"mask": torch.rand(6, 2, 3) > 0.2} if masked else {}
                t = {"x": x, "choice": extra[0] if extra else None, **masks, **layer.state_dict()}.get(freed)
                read = (training and FAMILY[member].moves) or freed != "num_batches_tracked"
                if t is not None and read:
                    free(t)
                    yield (
                        f"{member}, {training=}, {dtype}, {freed}",
                        lambda layer=layer, x=x, extra=extra, masks=masks: layer(x, *extra, **masks),
                    )


def try_everything() -> None:
    """Print each attempt before it runs, so that the last line names a crash, and print the attempts not refused."""
    refused, accepted = 0, []
    for attempts in (operator_attempts(), layer_attempts()):
        for what, call in attempts:
            print(what, file=sys.stderr, flush=True)
            try:
                call()
                accepted.append(what)
            except RuntimeError as error:
                # The second message is torch's own, if a layer selects a row.
                if any(text in str(error) for text in ("with its memory allocated, got", "for storage of size 0")):
                    refused += 1
                else:
                    accepted.append(f"{what}: {error}")
    print(refused, *accepted, sep="\n")


@pytest.mark.parametrize("capability", [*compiled.cpu_capabilities()[:1], "eager"])
def test_every_operator_and_layer_refuses_a_freed_tensor(capability: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"from {__name__} import try_everything; try_everything()"],
        env={**os.environ, compiled.CAPABILITY: capability},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"crashed in {done.stderr.splitlines()[-1]}"
    refused, *accepted = done.stdout.splitlines()
    assert not accepted
    assert int(refused) > 400


def test_state_is_kept_if_a_running_statistic_was_freed() -> None:
    layer = torch.nn.Sequential(FAMILY["BatchNorm2d"].make(4))
    running_var = layer[0].running_var
    free(running_var)
    with pytest.raises(RuntimeError, match="running_var with its memory allocated"):
        layer(torch.randn(5, 4, 2, 2) + 3.0)
    assert layer[0].num_batches_tracked == 0
    assert not layer[0].running_mean.any()


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
@pytest.mark.parametrize("kind", ["DomainBatchNorm", "ConditionalBatchNorm"])
def test_rows_of_a_freed_tensor_are_an_error_that_names_it(kind: str, name: str, training: bool) -> None:
    options = {"num_domains": 2, "affine_per_domain": True} if kind == "DomainBatchNorm" else {"num_classes": 2}
    for choice in (1, torch.tensor([0, 1, 1, 0])):
        layer = getattr(nn, kind)(C, **options).train(training)
        free(getattr(layer, name))
        with pytest.raises(RuntimeError, match=f"^{kind} expects {name} with its memory allocated, got"):
            layer(torch.randn(N, C, S), choice)


def test_a_freed_counter_of_rows_is_an_error_that_names_it() -> None:
    for choice in (1, torch.tensor([0, 1, 1, 0])):
        layer = nn.DomainBatchNorm(C, num_domains=2)
        free(layer.num_batches_tracked)
        with pytest.raises(RuntimeError, match="^DomainBatchNorm expects num_batches_tracked with its memory"):
            layer(torch.randn(N, C, S), choice)
        assert not layer.running_mean.any()
