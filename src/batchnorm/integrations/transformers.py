"""A callback for the Trainer of Hugging Face's transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from batchnorm.doctor.watch import Watch, watch

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

    Use it as `with BatchNormWatch(trainer) as callback: trainer.train()`. The block adds the callback to the Trainer
    and removes it at the end, also after an exception, which the Trainer does not report to callbacks. Whenever the
    Trainer logs (every `logging_steps`), it also logs the last record.

    If you add it with `trainer.add_callback(BatchNormWatch(trainer))`, it stays for every `train`. After an exception,
    it continues to watch until `watch.close()` or the next `train`.

    Args:
        trainer: The Trainer, which logs the records.
        per_layer: Whether to log each quantity of every layer, instead of its largest value over all layers.
        **options: Options of `batchnorm.watch`: `every`, `overhead`, `warn`.

    Attributes:
        watch: The watch of the last `train`; None before the first.

    Raises:
        ValueError: in `train`, the model has no batch normalization.
    """

    def __init__(self, trainer: Any, *, per_layer: bool = False, **options: Any) -> None:
        self.trainer = trainer
        self.per_layer = per_layer
        self.options = options
        self.watch: Watch | None = None
        self._logged = 0

    def __enter__(self) -> BatchNormWatch:
        self.trainer.add_callback(self)
        return self

    def __exit__(self, *exception: object) -> None:
        self.trainer.remove_callback(self)
        self._close()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start watching."""
        self._close()
        self.watch, self._logged = watch(kwargs["model"], **self.options), 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log a new record, if there is one, when the Trainer logs."""
        assert self.watch is not None
        if control.should_log and self.watch.looks > self._logged:
            self._logged = self.watch.looks
            self.trainer.log(self.watch.metrics(per_layer=self.per_layer))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop watching."""
        self._close()

    def _close(self) -> None:
        if self.watch is not None:
            self.watch.close()
