"""A callback for Lightning."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from batchnorm.doctor.watching import Watch, watch

if TYPE_CHECKING:
    from typing import Any as Callback
elif "pytorch_lightning" in sys.modules and "lightning.pytorch" not in sys.modules:
    from pytorch_lightning import Callback
elif find_spec("lightning") is not None:
    from lightning.pytorch import Callback
elif find_spec("pytorch_lightning") is not None:
    from pytorch_lightning import Callback
else:
    raise ImportError(
        "batchnorm.integrations.lightning expects Lightning to be installed, and it is not. Run pip install lightning, "
        "or use batchnorm.watch in your own loop."
    )

__all__ = ["BatchNormWatch"]


class BatchNormWatch(Callback):
    """A callback that watches every batch normalization layer during `fit`, logs through the module, and warns.

    Args:
        per_layer: Whether to log each quantity of every layer, instead of its largest value over all layers.
        **options: Options of `batchnorm.watch`: `every`, `overhead`, `warn`.

    Attributes:
        watch: The watch of the last `fit`; None before the first.

    Raises:
        ValueError: in `fit`, the module has no batch normalization.
    """

    def __init__(self, *, per_layer: bool = False, **options: Any) -> None:
        super().__init__()
        self.per_layer = per_layer
        self.options = options
        self.watch: Watch | None = None
        self._logged = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Start watching, after the sanity checks, when the module is on its device."""
        self._close()
        self.watch, self._logged = watch(pl_module, **self.options), 0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *others: Any) -> None:
        """Log a new record, if there is one."""
        assert self.watch is not None
        if self.watch.looks > self._logged:
            self._logged = self.watch.looks
            pl_module.log_dict(self.watch.metrics(per_layer=self.per_layer), on_step=True, on_epoch=False)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Stop watching."""
        self._close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Stop watching."""
        self._close()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Stop watching."""
        self._close()

    def _close(self) -> None:
        if self.watch is not None:
            self.watch.close()
