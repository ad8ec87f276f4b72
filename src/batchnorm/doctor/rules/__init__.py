"""The rules, one in each file."""

from batchnorm.doctor.rules.amplified import Amplified
from batchnorm.doctor.rules.batch_in_evaluation import BatchInEvaluation
from batchnorm.doctor.rules.broken_statistics import BrokenStatistics
from batchnorm.doctor.rules.cancellation import Cancellation
from batchnorm.doctor.rules.constant_channels import ConstantChannels
from batchnorm.doctor.rules.dead_channels import DeadChannels
from batchnorm.doctor.rules.domain_shift import DomainShift
from batchnorm.doctor.rules.dropout_before import DropoutBefore
from batchnorm.doctor.rules.epsilon import OddEpsilon
from batchnorm.doctor.rules.foldable import Foldable
from batchnorm.doctor.rules.half_frozen import HalfFrozen
from batchnorm.doctor.rules.half_overflow import HalfOverflow
from batchnorm.doctor.rules.half_precision import HalfPrecision
from batchnorm.doctor.rules.leakage import Leakage
from batchnorm.doctor.rules.momentum import MomentumConvention
from batchnorm.doctor.rules.moved_twice import MovedTwice
from batchnorm.doctor.rules.moves_in_evaluation import MovesInEvaluation
from batchnorm.doctor.rules.never_updated import NeverUpdated
from batchnorm.doctor.rules.non_iid_batches import NonIidBatches
from batchnorm.doctor.rules.not_synchronized import NotSynchronized
from batchnorm.doctor.rules.own_forward import OwnForward
from batchnorm.doctor.rules.padding import Padding
from batchnorm.doctor.rules.ranks_differ import RanksDiffer
from batchnorm.doctor.rules.redundant_bias import RedundantBias
from batchnorm.doctor.rules.reused_layer import ReusedLayer
from batchnorm.doctor.rules.rule import Rule
from batchnorm.doctor.rules.small_batch import SmallBatch
from batchnorm.doctor.rules.stale_statistics import StaleStatistics
from batchnorm.doctor.rules.train_eval_gap import TrainEvaluationGap
from batchnorm.doctor.rules.weight_decay import WeightDecay

RULES: tuple[type[Rule], ...] = (
    TrainEvaluationGap,
    StaleStatistics,
    DomainShift,
    SmallBatch,
    NonIidBatches,
    MovedTwice,
    HalfFrozen,
    Cancellation,
    ReusedLayer,
    RedundantBias,
    DropoutBefore,
    Leakage,
    Padding,
    HalfOverflow,
    NeverUpdated,
    BrokenStatistics,
    WeightDecay,
    MomentumConvention,
    OddEpsilon,
    DeadChannels,
    HalfPrecision,
    BatchInEvaluation,
    MovesInEvaluation,
    ConstantChannels,
    Amplified,
    OwnForward,
    Foldable,
    NotSynchronized,
    RanksDiffer,
)

__all__ = ["RULES", "Rule"]
