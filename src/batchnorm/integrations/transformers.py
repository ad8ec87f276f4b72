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
            "Run pip install transformers, or use batchnorm.watch in a loop of your own."
        ) from error

__all__ = ["BatchNormWatch"]


class BatchNormWatch(TrainerCallback):
    """Watches every layer of batch normalization during `train`, logs through `Trainer.log`, and warns.

    Within `with BatchNormWatch(trainer) as seen: trainer.train()` it is one of the Trainer's callbacks, and leaves
    nothing behind, also after an exception, of which the Trainer tells its callbacks nothing. The last look is logged
    where the Trainer logs, every `logging_steps`.

    Added by hand, `trainer.add_callback(BatchNormWatch(trainer))`, it stays for every `train`, and after an exception
    goes on watching until `watch.close()` or the next `train`.

    Args:
        trainer: The one whose `log` is used.
        per_layer: Whether figures of every layer are logged, or of each quantity the largest over the layers.
        **options: Those of `batchnorm.watch`: `every`, `overhead`, `warn`.

    Attributes:
        watch: What was seen in the last `train`; None before.

    Raises:
        ValueError: in `train`, the model has no batch normalization.
    """

    def __init__(self, trainer: Any, *, per_layer: bool = False, **options: Any) -> None:
        self.trainer = trainer
        self.per_layer = per_layer
        self.options = options
        self.watch: Watch | None = None
        self._looks = 0

    def __enter__(self) -> BatchNormWatch:
        self.trainer.add_callback(self)
        return self

    def __exit__(self, *exception: object) -> None:
        self.trainer.remove_callback(self)
        self._close()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start watching."""
        self._close()
        self.watch, self._looks = watch(kwargs["model"], **self.options), 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log a new look, in the steps in which the Trainer logs."""
        assert self.watch is not None
        if control.should_log and self.watch.looks > self._looks:
            self._looks = self.watch.looks
            self.trainer.log(self.watch.metrics(per_layer=self.per_layer))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop watching."""
        self._close()

    def _close(self) -> None:
        if self.watch is not None:
            self.watch.close()
