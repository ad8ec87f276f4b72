"""Train a small network in Keras on MNIST with and without batch normalization, and show the difference.

The network, known from tutorials, is Flatten, BN, Dense(300), BN, ReLU, Dense(100), BN, ReLU, Dense(10). A Dense layer
before a BN has no bias. Without BN, the network has the same initial weights, and sees the same batches.

    KERAS_BACKEND=tensorflow python examples/keras_mnist.py --data-dir folder/of/mnist

Without --data-dir, it trains on the 10,000 images of MNIST that are part of this library.
"""

from __future__ import annotations

import argparse
import gzip
from importlib import resources
from pathlib import Path

import keras
import numpy as np

from batchnorm.keras import BatchNormalization

UNITS = (300, 100)
CHOICES = {"without BN": False, "with BN": True}
PACKAGED = "compare/inputs/datasets/mnist-mini.npz"
FILES = {
    "x_train": "train-images-idx3-ubyte.gz",
    "y_train": "train-labels-idx1-ubyte.gz",
    "x_test": "t10k-images-idx3-ubyte.gz",
    "y_test": "t10k-labels-idx1-ubyte.gz",
}


def read_idx(path: Path) -> np.ndarray:
    """Read a file of MNIST: two zeros, the type, the number of axes, the sizes as big-endian int32, then the bytes."""
    content = gzip.decompress(path.read_bytes())
    axes = content[3]
    shape = np.frombuffer(content, ">i4", axes, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape)


def read(folder: Path | None) -> dict[str, np.ndarray]:
    """Read the images, scaled to [0, 1], and the labels from a folder, or from this library. This needs no PyTorch."""
    if folder is None:
        with resources.files("batchnorm").joinpath(PACKAGED).open("rb") as file:
            data = dict(np.load(file))
    else:
        data = {name: read_idx(folder / file) for name, file in FILES.items()}
    return {name: values.astype("float32") / 255 if name[0] == "x" else values for name, values in data.items()}


def network(normalized: bool) -> keras.Sequential:
    """The network, with or without batch normalization."""
    layers: list[keras.layers.Layer] = [keras.Input((28, 28)), keras.layers.Flatten()]
    if normalized:
        layers.append(BatchNormalization())
    for seed, units in enumerate(UNITS):
        initializer = keras.initializers.HeNormal(seed=seed)
        layers.append(keras.layers.Dense(units, use_bias=not normalized, kernel_initializer=initializer))
        if normalized:
            layers.append(BatchNormalization())
        layers.append(keras.layers.ReLU(name=f"relu_{units}"))
    last = keras.initializers.GlorotNormal(seed=len(UNITS))
    return keras.Sequential([*layers, keras.layers.Dense(10, kernel_initializer=last)])


def train(model: keras.Sequential, data: dict[str, np.ndarray], lr: float, options: argparse.Namespace) -> list[float]:
    """Train the model, and return its accuracy on the test images after each epoch."""
    keras.utils.set_random_seed(options.seed)  # the order of the batches
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(lr), loss, metrics=["accuracy"])
    history = model.fit(
        data["x_train"],
        data["y_train"],
        options.batch_size,
        options.epochs,
        verbose=0,
        validation_data=(data["x_test"], data["y_test"]),
    )
    return history.history["val_accuracy"]


def print_before_relu(model: keras.Sequential, x: np.ndarray) -> None:
    """Print statistics of the values that enter each ReLU."""
    inputs = [model.get_layer(f"relu_{units}").input for units in UNITS]
    for units, values in zip(UNITS, keras.Model(model.inputs, inputs).predict(x, verbose=0), strict=True):
        dead = np.mean(np.max(values, axis=0) <= 0)
        print(f"  {units} units: mean {np.mean(values):.2f}, deviation {np.std(values):.2f}, {dead:.0%} always 0")


def main(arguments: list[str] | None = None) -> None:
    """Train and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data-dir", type=Path, help="folder with the four gzipped files of MNIST")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, nargs="+", default=[0.05, 1.0], help="learning rates of SGD")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    data = read(options.data_dir)
    print(f"{len(data['x_train'])} images, {options.epochs} epochs, Keras on {keras.backend.backend()}")
    for lr in options.lr:
        for title, normalized in CHOICES.items():
            model = network(normalized)
            accuracy = train(model, data, lr, options)
            print(f"\nlearning rate {lr:g}, {title}\n  test accuracy: {'  '.join(f'{a:.2%}' for a in accuracy)}")
            print_before_relu(model, data["x_test"])


if __name__ == "__main__":
    main()
