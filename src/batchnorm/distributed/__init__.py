"""Exchange between the processes of a group: moments in forward, sums of gradients in backward.

Each is one collective. Messages of different sizes must never meet: gloo answers them with `abort()`, NCCL waits
forever. So before a kind of layer communicates for the first time, the processes compare through the group's store,
which is no collective, whether all are in a layer of that kind. After that each message says what it belongs to: in
forward the number of channels and the layer's name, in backward the number of the forward exchange.
"""

from batchnorm.distributed.exchange import PairMoments, merge_moments, sum_over
from batchnorm.distributed.groups import Peers, group_name, peers, resolve

__all__ = ["PairMoments", "Peers", "group_name", "merge_moments", "peers", "resolve", "sum_over"]
