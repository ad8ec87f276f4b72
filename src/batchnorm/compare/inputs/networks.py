"""The networks that can be compared by name, for any normalization and any number of input channels.

Each builder takes `norm`, which makes the normalization layers; `in_shape`, the shape of one sample without the batch
axis; and `num_classes`, the number of outputs. It normalizes each hidden layer next to its activation, and omits the
biases that the normalization cancels. Dropout (`norm.dropout`) precedes each linear layer that reads hidden units:
Srivastava et al. (2014) apply it there, and Inception, from which Ioffe and Szegedy (2015) remove it, has it there. The
builders for images raise `ComparisonError` for other samples.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F

from batchnorm.compare.errors import ComparisonError
from batchnorm.compare.inputs.norms import Norm

WIDTHS = (16, 32, 64)  # channels of the three stages of `resnet20` and `vgg`


def mlp(norm: Norm, in_shape: tuple[int, ...], num_classes: int) -> nn.Sequential:
    """Return a multilayer perceptron with hidden layers of 64 and 128 units and ReLU."""
    return _perceptron(norm, math.prod(in_shape), (64, 128), num_classes, nn.ReLU)


def sigmoid_mlp(norm: Norm, in_shape: tuple[int, ...], num_classes: int) -> nn.Sequential:
    """Return the perceptron of Ioffe and Szegedy (2015, section 4.1): three hidden layers of 100 sigmoid units.

    The paper's "small random Gaussian values" have a standard deviation of 0.1 here; biases are 0.
    """
    network = _perceptron(norm, math.prod(in_shape), (100, 100, 100), num_classes, nn.Sigmoid)
    return _initialized(network, nn.Linear, lambda weight: nn.init.normal_(weight, std=0.1))


def _perceptron(
    norm: Norm, inputs: int, widths: Sequence[int], num_classes: int, activation: type[nn.Module]
) -> nn.Sequential:
    parts: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    for number, (before, after) in enumerate(pairwise((inputs, *widths)), 1):
        parts[f"linear{number}"] = nn.Linear(before, after, bias=not norm.replaces_bias)
        parts[f"hidden{number}"] = norm.activated(after, activation)
        parts[f"dropout{number}"] = norm.dropout()
    parts[f"linear{len(widths) + 1}"] = nn.Linear(widths[-1], num_classes)
    return nn.Sequential(parts)


def cnn(norm: Norm, in_shape: tuple[int, ...], num_classes: int) -> nn.Sequential:
    """Return a small network of three 3×3 convolutions with 8, 16 and 32 channels, ReLU, and one linear layer.

    The second and third convolution halve the image; pooling averages the result to 3×3 positions.
    """
    before, *_ = _check_images("cnn", in_shape)
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    for number, (after, stride) in enumerate(((8, 1), (16, 2), (32, 2)), 1):
        parts[f"conv{number}"] = nn.Conv2d(before, after, 3, stride, padding=1, bias=not norm.replaces_bias)
        parts[f"hidden{number}"] = norm.activated(after, dims=2)
        before = after
    parts |= {"pool": nn.AdaptiveAvgPool2d(3), **_classifier(norm, before * 9, num_classes)}
    return nn.Sequential(parts)


def vgg(norm: Norm, in_shape: tuple[int, ...], num_classes: int) -> nn.Sequential:
    """Return a small network in the style of VGG, as studies of the loss landscape use it; images at least 8×8.

    Three stages of two 3×3 convolutions, with 16, 32 and 64 channels, each stage followed by max pooling over 2×2
    positions; then a hidden layer of 128 units and the output. Convolutions are initialized as in He et al. (2015).
    """
    channels, height, width = _check_images("vgg", in_shape, least=8)
    bias = not norm.replaces_bias
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    for stage, after in enumerate(WIDTHS, 1):
        for number, before in enumerate((channels, after), 1):
            parts[f"conv{stage}_{number}"] = nn.Conv2d(before, after, 3, padding=1, bias=bias)
            parts[f"hidden{stage}_{number}"] = norm.activated(after, dims=2)
        parts[f"pool{stage}"] = nn.MaxPool2d(2)
        channels = after
    parts["flatten"] = nn.Flatten()
    parts["dropout1"] = norm.dropout()
    parts["linear1"] = nn.Linear(channels * (height // 8) * (width // 8), 128, bias=bias)
    parts["hidden4"] = norm.activated(128)
    parts["dropout2"] = norm.dropout()
    parts["linear2"] = nn.Linear(128, num_classes)
    return _initialized(nn.Sequential(parts), nn.Conv2d, _he)


class Block(nn.Module):
    """A block of `resnet20`: two 3×3 convolutions, and the input added to their output.

    If the block halves the image, the shortcut takes every second position of the input, with zeros for the new
    channels (option A of He et al. 2016). The second normalization precedes the addition in either placement.
    """

    def __init__(self, norm: Norm, before: int, after: int, stride: int) -> None:
        super().__init__()
        bias = not norm.replaces_bias
        self.stride, self.new_channels = stride, after - before
        self.conv1 = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=bias)
        self.hidden = norm.activated(after, dims=2)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=bias)
        self.norm2 = norm(after, dims=2)
        self.activation = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Return `[N, after, H / stride, W / stride]`."""
        shortcut = x[:, :, :: self.stride, :: self.stride]
        if self.new_channels:
            shortcut = F.pad(shortcut, (0, 0, 0, 0, 0, self.new_channels))
        return self.activation(self.norm2(self.conv2(self.hidden(self.conv1(x)))) + shortcut)


def resnet20(norm: Norm, in_shape: tuple[int, ...], num_classes: int) -> nn.Sequential:
    """Return the residual network with 20 layers of He et al. (2016, section 4.2), for images of any size.

    One convolution, three stages of three blocks with 16, 32 and 64 channels, the average over all positions, and one
    linear layer. Convolutions are initialized as in He et al. (2015). Without a normalization, each block then doubles
    the variance, and training diverges at large learning rates.
    """
    channels, *_ = _check_images("resnet20", in_shape)
    before = WIDTHS[0]
    parts: OrderedDict[str, nn.Module] = OrderedDict(
        conv=nn.Conv2d(channels, before, 3, padding=1, bias=not norm.replaces_bias),
        hidden=norm.activated(before, dims=2),
    )
    for stage, after in enumerate(WIDTHS, 1):
        for number in (1, 2, 3):
            parts[f"block{stage}_{number}"] = Block(norm, before, after, stride=2 if before < after else 1)
            before = after
    parts |= {"pool": nn.AdaptiveAvgPool2d(1), **_classifier(norm, before, num_classes)}
    return _initialized(nn.Sequential(parts), nn.Conv2d, _he)


def _classifier(norm: Norm, features: int, num_classes: int) -> dict[str, nn.Module]:
    return {"flatten": nn.Flatten(), "dropout": norm.dropout(), "linear": nn.Linear(features, num_classes)}


MODELS = {"mlp": mlp, "sigmoid-mlp": sigmoid_mlp, "cnn": cnn, "resnet20": resnet20, "vgg": vgg}


def _check_images(name: str, in_shape: tuple[int, ...], least: int = 1) -> tuple[int, int, int]:
    if len(in_shape) != 3 or min(in_shape[1:]) < least:
        size = f" of at least {least}×{least} pixels" if least > 1 else ""
        raise ComparisonError(
            f"the model {name} needs images [N, C, H, W]{size}, got samples of shape {list(in_shape)}. Choose mlp or "
            "sigmoid-mlp, which take samples of any shape."
        )
    channels, height, width = in_shape
    return channels, height, width


def _he(weight: Tensor) -> Tensor:
    return nn.init.kaiming_normal_(weight, nonlinearity="relu")


def _initialized(
    network: nn.Sequential, kind: type[nn.Linear] | type[nn.Conv2d], initialize: Callable[[Tensor], Tensor]
) -> nn.Sequential:
    """Return the network with the weights of these layers initialized, and their biases set to 0."""
    for module in network.modules():
        if isinstance(module, kind):
            initialize(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return network
