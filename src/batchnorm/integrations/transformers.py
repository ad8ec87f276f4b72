"""A callback for the Trainer of Hugging Face's transformers."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from batchnorm.doctor.watching import Watch, watch

if TYPE_CHECKING:
    from typing import Any as TrainerCallback
else:
    try:
        from transformers import TrainerCallback
    except ImportError as error:
        raise ImportError(
            "batchnorm.integrations.transformers expects transformers to be installed, and it is not. "
            "Run pip install transformers, or use batchnorm.watch in your own loop."
        ) from error

__all__ = ["BatchNormWatch"]


class BatchNormWatch(TrainerCallback):
    """A callback that watches every batch normalization layer during `train`, logs through `Trainer.log`, and warns.

    Use it as `Trainer(..., callbacks=[BatchNormWatch()])`. Whenever the Trainer logs (every `logging_steps`), the
    callback logs the last record, which reaches the Trainer's history and all of its reports.

    The Trainer does not report exceptions to its callbacks. After an exception, the callback continues to watch until
    `watch.close()` or the next `train`. `with BatchNormWatch(trainer) as callback: trainer.train()` adds the callback
    to the Trainer, and removes it at the end in any case.

    Args:
        trainer: The Trainer, for use in a `with` block; otherwise not needed.
        per_layer: Whether to log each quantity of every layer, instead of its largest value over all layers.
        **options: Options of `batchnorm.watch`: `every`, `overhead`, `warn`.

    Attributes:
        watch: The watch of the last `train`; None before the first.

    Raises:
        ValueError: in `train`, the model has no batch normalization; at the start of a `with` block, there is no
            Trainer.
    """

    def __init__(self, trainer: Any = None, *, per_layer: bool = False, **options: Any) -> None:
        self.trainer = trainer
        self.per_layer = per_layer
        self.options = options
        self.watch: Watch | None = None
        self._logged = 0

    def __enter__(self) -> BatchNormWatch:
        if self.trainer is None:
            raise ValueError(
                "BatchNormWatch expects a Trainer in a with block, got none. Pass it: BatchNormWatch(trainer), or "
                "pass callbacks=[BatchNormWatch()] to the Trainer."
            )
        self.trainer.add_callback(self)
        return self

    def __exit__(self, *exception: object) -> None:
        self.trainer.remove_callback(self)
        self._close()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start watching."""
        self._close()
        self.watch, self._logged = watch(kwargs["model"], **self.options), 0

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log a new record, if there is one, after what the Trainer logs."""
        if self.watch is not None and not self.watch.closed and self.watch.looks > self._logged:
            self._logged = self.watch.looks
            trainer = self.trainer or _calling_trainer()
            if trainer is not None:
                trainer.log(self.watch.metrics(per_layer=self.per_layer))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop watching."""
        self._close()

    def _close(self) -> None:
        if self.watch is not None:
            self.watch.close()


def _calling_trainer() -> Any:
    """Return the Trainer that calls the callback, because an event passes its model but not the Trainer itself.

    Changing the event's `logs` is not enough: the reports, such as TensorBoard's, come before callbacks of the user.
    """
    from transformers import Trainer

    frame = sys._getframe(1)
    while frame is not None:
        found = frame.f_locals.get("self")
        if isinstance(found, Trainer):
            return found
        frame = frame.f_back  # type: ignore[assignment]
    return None
