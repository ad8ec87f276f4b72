"""Layers of the batch normalization family."""

from batchnorm._frameworks import required_by

with required_by("batchnorm.nn"):
    from batchnorm.nn.accumulation import (
        microbatch_momentum,
        momentum_per_microbatch,
    )
    from batchnorm.nn.act import (
        BatchNormAct1d,
        BatchNormAct2d,
        BatchNormAct3d,
    )
    from batchnorm.nn.batch import (
        BatchNorm,
        BatchNorm1d,
        BatchNorm2d,
        BatchNorm3d,
        LazyBatchNorm1d,
        LazyBatchNorm2d,
        LazyBatchNorm3d,
    )
    from batchnorm.nn.conditional import (
        ConditionalBatchNorm,
        ConditionalBatchNorm1d,
        ConditionalBatchNorm2d,
        ConditionalBatchNorm3d,
    )
    from batchnorm.nn.decorrelated import (
        DecorrelatedBatchNorm,
        DecorrelatedBatchNorm1d,
        DecorrelatedBatchNorm2d,
        DecorrelatedBatchNorm3d,
    )
    from batchnorm.nn.domain import (
        DomainBatchNorm,
        DomainBatchNorm1d,
        DomainBatchNorm2d,
        DomainBatchNorm3d,
        keep_domain,
        use_domain,
    )
    from batchnorm.nn.frozen import (
        FrozenBatchNorm,
        FrozenBatchNorm1d,
        FrozenBatchNorm2d,
        FrozenBatchNorm3d,
        FrozenBatchNormAct1d,
        FrozenBatchNormAct2d,
        FrozenBatchNormAct3d,
    )
    from batchnorm.nn.ghost import (
        GhostBatchNorm,
        GhostBatchNorm1d,
        GhostBatchNorm2d,
        GhostBatchNorm3d,
    )
    from batchnorm.nn.renorm import (
        BatchRenorm,
        BatchRenorm1d,
        BatchRenorm2d,
        BatchRenorm3d,
        PaperSchedule,
    )
    from batchnorm.nn.statistics import (
        update_running_stats,
    )
    from batchnorm.nn.sync import (
        SyncBatchNorm,
        join,
    )

__all__ = [
    "BatchNorm",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormAct1d",
    "BatchNormAct2d",
    "BatchNormAct3d",
    "BatchRenorm",
    "BatchRenorm1d",
    "BatchRenorm2d",
    "BatchRenorm3d",
    "ConditionalBatchNorm",
    "ConditionalBatchNorm1d",
    "ConditionalBatchNorm2d",
    "ConditionalBatchNorm3d",
    "DecorrelatedBatchNorm",
    "DecorrelatedBatchNorm1d",
    "DecorrelatedBatchNorm2d",
    "DecorrelatedBatchNorm3d",
    "DomainBatchNorm",
    "DomainBatchNorm1d",
    "DomainBatchNorm2d",
    "DomainBatchNorm3d",
    "FrozenBatchNorm",
    "FrozenBatchNorm1d",
    "FrozenBatchNorm2d",
    "FrozenBatchNorm3d",
    "FrozenBatchNormAct1d",
    "FrozenBatchNormAct2d",
    "FrozenBatchNormAct3d",
    "GhostBatchNorm",
    "GhostBatchNorm1d",
    "GhostBatchNorm2d",
    "GhostBatchNorm3d",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "PaperSchedule",
    "SyncBatchNorm",
    "join",
    "keep_domain",
    "microbatch_momentum",
    "momentum_per_microbatch",
    "update_running_stats",
    "use_domain",
]
