"""A model as a graph of calls: what computes what, for everything that looks at a network or rewrites it."""

from batchnorm.graph.inputs import Inputs
from batchnorm.graph.lowering import lower
from batchnorm.graph.neighbours import BatchNormCall, batch_norm_calls
from batchnorm.graph.tracing import Trace, TraceError, trace

__all__ = ["BatchNormCall", "Inputs", "Trace", "TraceError", "batch_norm_calls", "lower", "trace"]
