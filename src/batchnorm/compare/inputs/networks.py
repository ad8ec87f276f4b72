"""The networks that can be compared by name; each is built with any normalization, for any number of channels."""

from __future__ import annotations

import math
from collections import OrderedDict

from torch import Tensor, nn
from torch.nn import functional as F

from batchnorm.compare.errors import ComparisonError
from batchnorm.compare.inputs.norms import Norm

WIDTHS = (16, 32, 64)  # channels of the three stages of `resnet20` and `vgg`


def mlp(norm: Norm, in_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Return a multilayer perceptron with hidden layers of 64 and 128 units and ReLU.

    Each hidden layer is normalized beside its activation; where the normalization takes the bias of the linear layer
    away again, that is left out.

    Args:
        norm: Makes the normalization layers.
        in_shape: Shape of one sample, without the batch axis.
        num_classes: Number of outputs.
    """
    bias = not norm.replaces_bias
    return nn.Sequential(
        OrderedDict(
            flatten=nn.Flatten(),
            linear1=nn.Linear(math.prod(in_shape), 64, bias=bias),
            hidden1=norm.activated(64),
            linear2=nn.Linear(64, 128, bias=bias),
            hidden2=norm.activated(128),
            linear3=nn.Linear(128, num_classes),
        )
    )


def sigmoid_mlp(norm: Norm, in_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Return the perceptron of Ioffe and Szegedy (2015, section 4.1): three hidden layers of 100 sigmoid units.

    Their weights are "small random Gaussian values", which here have deviation 0.1; biases are 0.

    Args:
        norm: Makes the normalization layers.
        in_shape: Shape of one sample, without the batch axis.
        num_classes: Number of outputs.
    """
    bias = not norm.replaces_bias
    network = nn.Sequential(
        OrderedDict(
            flatten=nn.Flatten(),
            linear1=nn.Linear(math.prod(in_shape), 100, bias=bias),
            hidden1=norm.activated(100, nn.Sigmoid),
            linear2=nn.Linear(100, 100, bias=bias),
            hidden2=norm.activated(100, nn.Sigmoid),
            linear3=nn.Linear(100, 100, bias=bias),
            hidden3=norm.activated(100, nn.Sigmoid),
            linear4=nn.Linear(100, num_classes),
        )
    )
    for module in network:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.1)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return network


def cnn(norm: Norm, in_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Return a small network of three 3×3 convolutions with 8, 16 and 32 channels, ReLU, and one linear layer.

    The second and third convolution halve the image; what is left is averaged to 3×3 positions.

    Args:
        norm: Makes the normalization layers.
        in_shape: Shape of one image, `(C, H, W)`.
        num_classes: Number of outputs.

    Raises:
        ComparisonError: If the samples are not images.
    """
    _check_images("cnn", in_shape)
    bias = not norm.replaces_bias
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(in_shape[0], 8, 3, padding=1, bias=bias),
            hidden1=norm.activated(8, dims=2),
            conv2=nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=bias),
            hidden2=norm.activated(16, dims=2),
            conv3=nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=bias),
            hidden3=norm.activated(32, dims=2),
            pool=nn.AdaptiveAvgPool2d(3),
            flatten=nn.Flatten(),
            linear=nn.Linear(32 * 9, num_classes),
        )
    )


def vgg(norm: Norm, in_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Return a small network in the manner of VGG, as studies of the loss landscape use it.

    Three times two 3×3 convolutions, with 16, 32 and 64 channels, and a maximum over 2×2 positions; then a hidden layer
    of 128 units and the output. Convolutions are initialized as in He et al. (2015).

    Args:
        norm: Makes the normalization layers.
        in_shape: Shape of one image, `(C, H, W)`, at least 8×8.
        num_classes: Number of outputs.

    Raises:
        ComparisonError: If the samples are not images, or smaller.
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
    parts["linear1"] = nn.Linear(channels * (height // 8) * (width // 8), 128, bias=bias)
    parts["hidden4"] = norm.activated(128)
    parts["linear2"] = nn.Linear(128, num_classes)
    return _as_he(nn.Sequential(parts))


class Block(nn.Module):
    """Two 3×3 convolutions and, added to them, the input: a block of `resnet20`.

    Where the block halves the image, the input is taken at every second position, with zeros for the new channels
    (option A of He et al. 2016). The second normalization stands before the addition in either placement.
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


def resnet20(norm: Norm, in_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Return the residual network with 20 layers of He et al. (2016, section 4.2), for images of any size.

    One convolution, three stages of three blocks with 16, 32 and 64 channels, the average over all positions, and one
    linear layer. Convolutions are initialized as in He et al. (2015); without a normalization, values then double their
    variance in each block, and large learning rates make training diverge.

    Args:
        norm: Makes the normalization layers.
        in_shape: Shape of one image, `(C, H, W)`.
        num_classes: Number of outputs.

    Raises:
        ComparisonError: If the samples are not images.
    """
    channels, *_ = _check_images("resnet20", in_shape)
    parts: OrderedDict[str, nn.Module] = OrderedDict(
        conv=nn.Conv2d(channels, WIDTHS[0], 3, padding=1, bias=not norm.replaces_bias),
        hidden=norm.activated(WIDTHS[0], dims=2),
    )
    before = WIDTHS[0]
    for stage, after in enumerate(WIDTHS, 1):
        for number in (1, 2, 3):
            parts[f"block{stage}_{number}"] = Block(norm, before, after, stride=2 if before < after else 1)
            before = after
    parts["pool"] = nn.AdaptiveAvgPool2d(1)
    parts["flatten"] = nn.Flatten()
    parts["linear"] = nn.Linear(before, num_classes)
    return _as_he(nn.Sequential(parts))


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


def _as_he(network: nn.Module) -> nn.Module:
    """Give convolutions Gaussian weights with variance 2 / (inputs of a unit), and biases of 0."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return network
