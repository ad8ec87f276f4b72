"""Two processes, replicas or devices compute the same as one with the joined batch."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from batchnorm.keras import BatchNormalization
from tests.keras.cases.derivatives import BACKEND, as_arrays, forward_and_gradients
from tests.keras.cases.numerics import assert_close, data, expected, layer_for

AXIS = -1


def joined() -> tuple[dict[str, np.ndarray], list[dict[str, np.ndarray]]]:
    """Return the joined batch, and the batch of each of two devices, whose means are 1e4 apart."""
    values = data((8, 6, 5), AXIS)
    values["x"][5:] += 1e4
    values["x"] = values["x"].astype(np.float32).astype(np.float64)
    parts = (slice(0, 5), slice(5, 8))
    return values, [{**values, "x": values["x"][part], "dy": values["dy"][part]} for part in parts]


def assert_equals_joined(results: list[tuple[list[np.ndarray], list[np.ndarray]]]) -> None:
    values, _ = joined()
    forward, wanted = expected(values, AXIS)
    (first, moved), (second, also_moved) = results
    y, dx = (np.concatenate(pair) for pair in zip(first[:2], second[:2], strict=True))
    # The deviations are up to 5e3, and the standard deviation likewise.
    assert_close([y, dx, first[2] + second[2], first[3] + second[3]], wanted)
    for statistics in (moved, also_moved):
        np.testing.assert_allclose(statistics[0], 0.5 * forward.mean, rtol=1e-6)
        np.testing.assert_allclose(statistics[1], 0.5 + 0.5 * forward.var, rtol=1e-6)


def step(values: dict[str, np.ndarray]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    layer = layer_for(values, AXIS, synchronized=True)
    found = forward_and_gradients(layer, values["x"], values["dy"], None, "eager")
    return found, as_arrays(layer.moving_mean, layer.moving_variance)


def _process(rank: int, store: str, values: dict[str, np.ndarray], results: Any) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    results.put((rank, step(values)))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.skipif(BACKEND != "torch", reason="processes of torch")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # newer Pythons warn of forks
def test_processes_of_torch_share_statistics(tmp_path: Path):
    import torch

    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    arguments = [(rank, str(tmp_path / "store"), part, results) for rank, part in enumerate(joined()[1])]
    processes = [context.Process(target=_process, args=each) for each in arguments]
    for process in processes:
        process.start()
    try:
        found = dict(results.get(timeout=120) for _ in processes)
    finally:
        for process in processes:
            process.join(timeout=60)
            process.kill()
    assert_equals_joined([found[0], found[1]])


@pytest.mark.skipif(BACKEND != "tensorflow", reason="replicas of TensorFlow")
def test_replicas_of_tensorflow_share_statistics():
    import tensorflow as tf

    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    values, parts = joined()
    with strategy.scope():
        layer = layer_for(values, AXIS, synchronized=True)

    def replica(x: Any, dy: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True)
        return y, *tape.gradient(y, [x, *layer.trainable_variables], dy)

    def per_replica(name: str) -> Any:
        return strategy.experimental_distribute_values_from_function(
            lambda context: tf.constant(parts[context.replica_id_in_sync_group][name], tf.float32)
        )

    found = tf.function(lambda x, dy: strategy.run(replica, (x, dy)))(per_replica("x"), per_replica("dy"))
    local = [[t.numpy() for t in each] for each in zip(*map(strategy.experimental_local_results, found), strict=True)]
    moved = as_arrays(layer.moving_mean, layer.moving_variance)
    assert_equals_joined([(found, moved) for found in local])


@pytest.mark.skipif(BACKEND != "jax", reason="devices of JAX's mesh")
def test_devices_of_a_mesh_share_statistics():
    values, _ = joined()
    x, target = values["x"].astype(np.float32), values["dy"].astype(np.float32)
    results = []
    for devices in keras.distribution.list_devices()[:2], keras.distribution.list_devices()[:1]:
        with keras.distribution.DataParallel(devices=devices).scope():
            layer = BatchNormalization(momentum=0.5, synchronized=True, activation="relu")
            model = keras.Sequential([keras.Input(x.shape[1:]), layer])
            model.compile(keras.optimizers.SGD(0.1), "mse")
            loss = model.train_on_batch(x, target)
            results.append([np.asarray(loss), *model.get_weights()])
    assert len(keras.distribution.list_devices()) >= 2
    for several, one in zip(*results, strict=True):
        np.testing.assert_allclose(several, one, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(results[0][3], 0.5 * expected(values, AXIS)[0].mean, rtol=1e-6)
