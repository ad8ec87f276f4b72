"""Weights that a hook computes before each call (the old `weight_norm` and `spectral_norm`, pruning) are no obstacle.

Such a weight is no leaf once the model was called, and `copy.deepcopy` alone refuses it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import batchnorm as bn
from tests.surgery.accelerate.test_failures import Snapshot

X = torch.linspace(-3.0, 4.0, 2 * 3 * 20).sin().reshape(2, 3, 20)
HOOKS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight norm": nn.utils.weight_norm,
    "spectral norm": nn.utils.spectral_norm,
    "pruning": lambda m: prune.l1_unstructured(m, "weight", 0.5),
    "pruning twice": lambda m: prune.random_unstructured(prune.l1_unstructured(m, "weight", 0.5), "weight", 0.3),
}
VERBS: dict[str, Callable[..., Any]] = {
    "fold": lambda model, **how: bn.fold(model, X, **how),
    "accelerate": lambda model, **how: bn.accelerate(model, X, **how),
    "recalibrate": lambda model, **how: bn.recalibrate(model, [X], prior=1e9, **how),
    "convert": lambda model, **how: bn.convert(model, to="BatchRenorm", **how),
    "freeze": lambda model, **how: bn.freeze(model, **how),
    "drop_redundant_bias": lambda model, **how: bn.drop_redundant_bias(model, example_inputs=X, **how),
    "insert_batchnorm": lambda model, **how: bn.insert_batchnorm(model, nn.ReLU, [X, 2 * X], **how),
}


def network(hook: str) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the old functions say that there are new ones
        convolutions = [HOOKS[hook](nn.Conv1d(*sizes)) for sizes in ((3, 6, 5), (6, 4, 3))]
    model = nn.Sequential(convolutions[0], nn.BatchNorm1d(6), nn.ReLU(), convolutions[1], nn.BatchNorm1d(4))
    model.train()(X)
    model(X)
    return model


def evaluated(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(X)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("verb", VERBS)
def test_every_function_accepts_them(verb: str, hook: str, inplace: bool) -> None:
    model = network(hook)
    expected = evaluated(model)
    model.train()[1].eval()
    before = Snapshot(model)
    result = VERBS[verb](model, inplace=inplace)
    assert (result.model is model) is inplace
    torch.testing.assert_close(evaluated(result.model), expected, rtol=1e-5, atol=1e-5)
    if not inplace:
        before.assert_same(model)
        torch.testing.assert_close(evaluated(model), expected, rtol=0, atol=0)


@pytest.mark.parametrize("hook", HOOKS)
def test_folding_goes_into_what_was_computed(hook: str) -> None:
    folded, report = bn.fold(network(hook), X)
    assert (report.remaining, report.fused, report.notes) == (0, 0, ())
    assert sorted(folded.state_dict()) == ["0.bias", "0.weight", "3.bias", "3.weight"]


def test_a_failure_in_place_leaves_the_weights_and_their_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    from batchnorm.models import gate
    from batchnorm.surgery.fold import FoldError
    from batchnorm.surgery.fold.pytorch import folding

    monkeypatch.setattr(folding._Original, "compared", lambda *_: gate.Error(1e-7, 0.5))
    for hook in HOOKS:
        model = network(hook)
        before = Snapshot(model)
        with pytest.raises(FoldError):
            bn.fold(model, X, inplace=True)
        before.assert_same(model)
