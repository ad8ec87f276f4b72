"""The state of every layer of the family: saved, loaded, and exchanged with plain batch normalization."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch.testing import assert_close

from batchnorm import nn
from batchnorm.nn.frozen import FrozenBatchNorm2d
from tests.nn.test_family_contract import FAMILY, MEMBERS, data, layer_of, step


@MEMBERS
def test_its_state_is_saved_and_training_continues(name: str) -> None:
    layer = layer_of(name)
    step(name, layer, layer, data(seed=1))
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    loaded = FAMILY[name].make(4, dtype=torch.float64)
    loaded.load_state_dict(torch.load(file))
    copies = [loaded, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    for x in (data(seed=2), data(seed=3)):
        expected = step(name, layer, layer, x)
        for other in copies:
            for a, b in zip(step(name, other, other, x), expected, strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("name", [name for name, member in FAMILY.items() if member.as_batch_norm])
def test_its_state_is_that_of_batch_normalization_in_both_directions(name: str) -> None:
    theirs, ours = torch.nn.BatchNorm2d(4, dtype=torch.float64), layer_of(name)
    assert list(theirs.state_dict()) == list(ours.state_dict())
    theirs(data(seed=1))
    ours.load_state_dict(theirs.state_dict())
    assert_close(ours.eval()(data()), theirs.eval()(data()), rtol=1e-12, atol=1e-12)
    ours.train()(data(seed=2))
    theirs.load_state_dict(ours.state_dict())
    assert_close(ours.eval()(data()), theirs.eval()(data()), rtol=1e-12, atol=1e-12)


@MEMBERS
@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.filterwarnings("ignore:for .* copying from a non-meta parameter:UserWarning")
def test_a_checkpoint_without_a_counter_loads(name: str, assign: bool, device: str) -> None:
    source = layer_of(name)
    state = {key: value for key, value in source.state_dict().items() if key != "num_batches_tracked"}
    layer = FAMILY[name].make(4, dtype=torch.float64, device=device)
    result = layer.load_state_dict(dict(state), strict=True, assign=assign)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert layer.num_batches_tracked.shape == source.num_batches_tracked.shape
    assert layer.num_batches_tracked.is_meta == (device == "meta" and not assign)
    if assign or device == "cpu":
        assert not layer.num_batches_tracked.any()
        assert_close(dict(layer.state_dict()), dict(source.state_dict()))
        x = data()
        assert layer(x, *FAMILY[name].extra(len(x))).shape == x.shape


@MEMBERS
@pytest.mark.parametrize("plain", [True, False])
def test_a_checkpoint_of_this_version_without_a_counter_is_incomplete(name: str, plain: bool) -> None:
    source = nn.BatchNorm2d(4) if plain and FAMILY[name].as_batch_norm else FAMILY[name].make(4)
    state = source.state_dict()  # with the version of its format
    del state["num_batches_tracked"]
    layer = FAMILY[name].make(4, device="meta")
    if isinstance(layer, FrozenBatchNorm2d):  # it never counts batches
        assert not layer.load_state_dict(state, assign=True).missing_keys
        return
    with pytest.raises(RuntimeError, match='Missing key.s. in state_dict: "num_batches_tracked"'):
        layer.load_state_dict(state, assign=True)
