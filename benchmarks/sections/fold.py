"""Measure `batchnorm.fold` on published networks: the layers left, the error, trained weights and speed."""

from __future__ import annotations

import contextlib
import copy
import gc
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.models import gate
from batchnorm.surgery.fold import FoldReport, count_batch_norms, fold
from benchmarks.measuring.options import Options
from benchmarks.measuring.records import Row, Table
from benchmarks.measuring.timing import alternate
from benchmarks.subjects import zoo
from benchmarks.subjects.peers import installed

KEY = ("network",)
PHOTOGRAPHS_KEY = ("network",)
SPEED_KEY = ("network", "contender")
OURS, TORCH, FX = "fold", "torch", "torch.fx fuse"
BATCH, SIZE = 4, 224


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _tensor(result: Any) -> Tensor:
    """Return the result itself, or the first of several."""
    while not isinstance(result, Tensor):
        result = next(iter(result.values())) if isinstance(result, dict) else result[0]
    return result


def _why_fused(report: FoldReport) -> str:
    """Return how many batch normalizations stay for each reason."""
    rows = [*report.left, *(row for row in report.changed if row.now.startswith("fused"))]
    return "; ".join(f"{times}: {reason}" for reason, times in Counter(row.reason for row in rows).most_common())


def _fx_fused(model: nn.Module) -> nn.Module:
    with _quiet():  # the first import prints warnings
        from torch.fx.experimental import optimization

        return optimization.fuse(model)


def _by_fx(model: nn.Module, x: Tensor, exact: Tensor) -> Row:
    """Return the number that torch.fx's own fuse leaves, and its error."""
    try:
        fused = _fx_fused(model)
        with torch.no_grad():
            error = gate.relative(_tensor(fused(x)), exact)
        return {"fx_remaining": count_batch_norms(fused, x).batch_norm, "fx_error": error, "fx_failure": ""}
    except Exception as failure:
        return {"fx_remaining": "", "fx_error": "", "fx_failure": type(failure).__name__}


def _folded(name: str, network: zoo.Network) -> Row:
    """Fold one network. The errors are of a batch that folding has not seen, against the original in float64."""
    torch.manual_seed(0)
    model, example, x = zoo.randomized(network.build()), torch.randn(network.shape), torch.randn(network.shape)
    start = time.perf_counter()
    folded, report = fold(model, example)
    seconds = time.perf_counter() - start
    with torch.no_grad():
        exact = _tensor(copy.deepcopy(model).double()(x.double()))
        before, after = (gate.relative(_tensor(m(x)), exact) for m in (model, folded))
    return {
        "network": name,
        "input": "×".join(map(str, network.shape)),
        "how": report.how,
        "batch_norms": report.before,
        "remaining": report.remaining,
        "fused": report.fused,
        "error": after,
        "error_unfolded": before,
        "within_target": after <= max(1e-5, 2 * before),
        "seconds": seconds,
        "why": _why_fused(report),
        "notes": "; ".join(report.notes),
        **_by_fx(model, x, exact),
    }


def measure_fold(options: Options, table: Table) -> None:
    """Write one row for each network."""
    done = table.measured()
    for name, network in zoo.found(quick=options.quick, only=options.only).items():
        if (name,) in done:
            continue
        with _quiet():
            row = _folded(name, network)
        table.append([row])
        print(
            f"{name}: {row['batch_norms']} batch normalizations, {row['remaining']} left, {row['fused']} fused; error "
            f"{row['error']:.1e}, unfolded {row['error_unfolded']:.1e}; {row['how']}, {row['seconds']:.1f} s; "
            f"torch.fx leaves {row['fx_remaining']}{row['fx_failure']}",
            flush=True,
        )
        gc.collect()


# Trained weights ---------------------------------------------------------------------------------------------------


def measure_photographs(options: Options, table: Table) -> None:
    """Write, for each trained network, whether photographs have the same five likeliest classes before and after."""
    if options.quick:
        return
    if not installed("skimage"):
        print("photographs are skipped: install scikit-image and trained networks, see benchmarks/subjects/zoo.py")
        return
    x = torch.cat(list(zoo.photographs().values()))
    for name, build in zoo.trained().items():
        with _quiet():
            model = build()
            folded, report = fold(model, x[:1])
        with torch.no_grad():
            before, after = model(x), folded(x)
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        row = {
            "network": name,
            "batch_norms": report.before,
            "remaining": report.remaining,
            "fused": report.fused,
            "error": report.error,
            "error_unfolded": report.error_before,
            "smallest_running_var": min(float(m.running_var.min()) for m in norms if m.running_var is not None),
            "photographs": len(x),
            "same_top5": int((before.topk(5).indices == after.topk(5).indices).all(1).sum()),
            "same_top1": int((before.argmax(1) == after.argmax(1)).sum()),
        }
        table.append([row])
        print(f"{name}: {row['same_top5']} of {len(x)} photographs have the same five likeliest classes", flush=True)


# Speed -------------------------------------------------------------------------------------------------------------

Call = Callable[[], Any]


def _inference(model: Callable[[Tensor], Any], x: Tensor) -> Call:
    def call() -> Any:
        with torch.inference_mode():
            return model(x)

    return call


def _freezing(model: nn.Module, x: Tensor) -> Call:
    import torch._inductor.config

    compiled = torch.compile(model)
    with torch._inductor.config.patch(freezing=True), torch.no_grad():
        compiled(x)

    def call() -> Any:
        with torch.no_grad():  # as when it was compiled
            return compiled(x)

    return call


def _jit(model: nn.Module, x: Tensor) -> Call:
    with _quiet():  # torch.jit is deprecated
        return _inference(torch.jit.optimize_for_inference(torch.jit.trace(model, x)), x)


def _exported(model: nn.Module, x: Tensor, *, optimize: bool) -> Any:
    """Return the network as an ONNX model, with onnxscript's optimizer or without."""
    program = torch.onnx.export(model, (x,), dynamo=True, verbose=False, optimize=optimize)
    assert program is not None
    return program.model_proto


def _onnxruntime(model: Any, x: Tensor) -> Call:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    settings.add_session_config_entry("session.force_spinning_stop", "1")
    file = model.SerializeToString()
    session = onnxruntime.InferenceSession(file, settings, providers=["CPUExecutionProvider"])
    arrays = {session.get_inputs()[0].name: x.numpy()}
    return lambda: torch.from_numpy(session.run(None, arrays)[0])


def _contenders(model: nn.Module, x: Tensor, *, slow: bool) -> dict[str, Call]:
    """Return a forward pass of each contender: what folds alone, compilers alone, and both."""
    folded = fold(model, x).model
    calls = {TORCH: _inference(model, x), OURS: _inference(folded, x), FX: _inference(_fx_fused(model), x)}
    for name, compiled in {"jit optimize_for_inference": _jit, "inductor freezing": _freezing}.items():
        if slow or compiled is _jit:
            calls[name] = compiled(copy.deepcopy(model), x)
            calls[f"fold + {name}"] = compiled(copy.deepcopy(folded), x)
    if slow and installed("onnx", "onnxscript", "onnxruntime"):
        from batchnorm.surgery.fold.onnx import fold_onnx

        plain = _exported(copy.deepcopy(model), x, optimize=False)
        calls["onnxruntime"] = _onnxruntime(plain, x)
        calls["onnxscript + onnxruntime"] = _onnxruntime(_exported(copy.deepcopy(model), x, optimize=True), x)
        calls["fold_onnx + onnxruntime"] = _onnxruntime(fold_onnx(plain).model, x)
        calls["fold + onnxruntime"] = _onnxruntime(_exported(copy.deepcopy(folded), x, optimize=True), x)
    return calls


def measure_speed(options: Options, table: Table) -> None:
    """Write one row for each network and contender: the time of one forward pass."""
    done = {name for name, _ in table.measured()}
    batch, size = (1, 64) if options.quick else (BATCH, SIZE)
    timed = zoo.timed("resnet18", "resnet50", "mobilenet_v2")
    for name, build in list(timed.items())[: 1 if options.quick else None]:
        if name in done or options.only not in name:
            continue
        torch.manual_seed(0)
        model, x = zoo.randomized(build()), torch.randn(batch, 3, size, size)
        with _quiet():
            calls = _contenders(model, x, slow=not options.quick)
        with torch.no_grad():
            exact = copy.deepcopy(model).double()(x.double())
        errors = {contender: gate.relative(call(), exact) for contender, call in calls.items()}
        for contender in [c for c, error in errors.items() if not error < 1e-3]:
            print(f"not reported: {contender} has an error of {errors[contender]:.1e} in {name}")
            del calls[contender]
        times = alternate(calls, len(calls) * options.seconds)
        rows = [
            {"network": name, "contender": contender, "batch": batch, "size": size, "threads": options.threads}
            | {f"p{p}_ms": times[contender].percentile(p) * 1e3 for p in (20, 50, 80)}
            | {"error": errors[contender]}
            for contender in calls
        ]
        table.append(rows)
        print(f"{name}: " + ", ".join(f"{c} {times[c].median * 1e3:.4g} ms" for c in calls), flush=True)
