"""Callbacks for training frameworks. Each module imports its framework when it is first used; this package, none."""

from typing import TYPE_CHECKING

from batchnorm._frameworks import parts_on_demand

if TYPE_CHECKING:
    from batchnorm.integrations import lightning as lightning
    from batchnorm.integrations import transformers as transformers

__getattr__ = parts_on_demand(__name__, "lightning", "transformers")
