"""Several running averages of one training, against those that the layers keep themselves."""

import running_averages
import torch
from torch import nn

from batchnorm import BatchNorm2d


def network(momentum):
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3), BatchNorm2d(4, momentum=momentum), nn.ReLU(), BatchNorm2d(4, momentum=momentum)]
    return nn.Sequential(*layers)


def test_each_average_is_that_of_a_layer_with_its_momentum():
    momenta = (0.01, 0.1, 0.9)
    watched, own = network(0.3), {momentum: network(momentum) for momentum in momenta}
    averages = running_averages.Averages(watched, momenta)
    for x in torch.randn(6, 5, 1, 6, 6, generator=torch.Generator().manual_seed(1)):
        for each in (watched, *own.values()):
            each(x)
        averages.update()
    for momentum in momenta:
        averages.copy_to_network(momentum)
        for name, value in own[momentum].named_buffers():
            if not name.endswith("num_batches_tracked"):
                torch.testing.assert_close(watched.get_buffer(name), value, rtol=1e-5, atol=1e-7)
