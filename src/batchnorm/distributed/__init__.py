"""Exchange data between the processes of a group: moments in forward, sums of gradients in backward.

`owners` finds the wrappers that shard parameters, or reduce their gradients.

Each exchange is one collective. The messages of a collective must have equal sizes: otherwise, gloo calls `abort()`,
and NCCL waits forever. Therefore, before a kind of layer communicates for the first time, the processes check through
the group's store, which needs no collective, that all are in a layer of that kind. After that, each message identifies
its layer: in forward by the number of channels and the layer's name, in backward by the number of the forward exchange.
"""

from batchnorm.distributed.exchange import PairMoments, merge_moments, sum_over
from batchnorm.distributed.groups import Peers, group_name, peers, resolve

__all__ = ["PairMoments", "Peers", "group_name", "merge_moments", "peers", "resolve", "sum_over"]
