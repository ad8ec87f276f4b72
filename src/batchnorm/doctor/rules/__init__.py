"""The rules, one in each file."""

from batchnorm.doctor.rules.bn101_train_eval_gap import TrainEvaluationGap
from batchnorm.doctor.rules.bn102_stale_statistics import StaleStatistics
from batchnorm.doctor.rules.bn103_domain_shift import DomainShift
from batchnorm.doctor.rules.bn104_small_batch import SmallBatch
from batchnorm.doctor.rules.bn105_non_iid_batches import NonIidBatches
from batchnorm.doctor.rules.bn106_moved_twice import MovedTwice
from batchnorm.doctor.rules.bn107_half_frozen import HalfFrozen
from batchnorm.doctor.rules.bn108_cancellation import Cancellation
from batchnorm.doctor.rules.bn109_reused_layer import ReusedLayer
from batchnorm.doctor.rules.bn110_redundant_bias import RedundantBias
from batchnorm.doctor.rules.bn111_dropout_before import DropoutBefore
from batchnorm.doctor.rules.bn112_leakage import Leakage
from batchnorm.doctor.rules.bn113_padding import Padding
from batchnorm.doctor.rules.bn114_half_overflow import HalfOverflow
from batchnorm.doctor.rules.bn201_never_updated import NeverUpdated
from batchnorm.doctor.rules.bn202_broken_statistics import BrokenStatistics
from batchnorm.doctor.rules.bn203_weight_decay import WeightDecay
from batchnorm.doctor.rules.bn204_momentum import MomentumConvention
from batchnorm.doctor.rules.bn205_epsilon import OddEpsilon
from batchnorm.doctor.rules.bn206_dead_channels import DeadChannels
from batchnorm.doctor.rules.bn207_half_precision import HalfPrecision
from batchnorm.doctor.rules.bn208_batch_in_evaluation import BatchInEvaluation
from batchnorm.doctor.rules.bn209_moves_in_evaluation import MovesInEvaluation
from batchnorm.doctor.rules.bn210_constant_channels import ConstantChannels
from batchnorm.doctor.rules.bn211_amplified import Amplified
from batchnorm.doctor.rules.bn212_own_forward import OwnForward
from batchnorm.doctor.rules.bn213_foldable import Foldable
from batchnorm.doctor.rules.bn214_not_synchronized import NotSynchronized
from batchnorm.doctor.rules.bn215_ranks_differ import RanksDiffer
from batchnorm.doctor.rules.rule import Rule

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
