"""Measure the moments of the layers of a Keras model, in one pass over the data or layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from batchnorm.keras.models.batches import Batches, Forward
from batchnorm.keras.models.observe import Input, LayerCall, Observer, Statistics, statistics_of
from batchnorm.reference.statistics import Moments, merge

Calls = dict[LayerCall, Moments]


class _Reached(BaseException):
    """Ends a forward pass at a layer whose statistics are not known yet. Keras changes exceptions of other kinds."""


def single(
    observer: Observer, batches: Batches, forward: Forward, own_statistics: Callable[[int, Moments], Statistics]
) -> Calls:
    """Measure all layers in one pass; each batch is normalized by its own statistics, as in training.

    Args:
        observer: Observes the layers.
        batches: The data.
        forward: Calls the model.
        own_statistics: Returns the statistics that a batch is normalized by, from the layer's number and the moments.
    """
    calls: Calls = {}

    def statistics_for(call: LayerCall, given: Input) -> Statistics:
        found = given.moments()
        calls[call] = merge([calls[call], found]) if call in calls else found
        if not found.count > 0:
            return statistics_of(observer.layers[call.layer].module)
        return own_statistics(call.layer, found)

    with observer.installed():
        for batch in batches:
            observer.start(statistics_for)
            forward(observer.model, batch)
    return calls


def sequential(
    observer: Observer, batches: Batches, forward: Forward, new_statistics: Callable[[int, Moments], Statistics]
) -> Calls:
    """Measure one layer after another; each gets the output of the recalibrated layers before it.

    Args:
        observer: Observes the layers.
        batches: The data, which are kept.
        forward: Calls the model.
        new_statistics: Returns the new statistics of a layer, from its number and the moments of its calls so far.
    """
    data = list(batches)
    calls: Calls = {}
    known: dict[LayerCall, Statistics] = {}
    with observer.installed():
        while True:
            reached: Calls = {}

            def statistics_for(call: LayerCall, given: Input, reached: Calls = reached) -> Statistics:
                if call in known:
                    return known[call]
                found = given.moments()
                reached[call] = merge([reached[call], found]) if call in reached else found
                raise _Reached

            for batch in data:
                observer.start(statistics_for)
                with suppress(_Reached):
                    forward(observer.model, batch)
            # Batches may take different paths through the model and reach different calls; measure one at a time.
            call = next(iter(reached), None)
            if call is None:
                return calls
            calls[call] = reached[call]
            total = merge([moments for earlier, moments in calls.items() if earlier.layer == call.layer])
            known[call] = (
                new_statistics(call.layer, total) if total.count > 0
                else statistics_of(observer.layers[call.layer].module)
            )  # fmt: skip
