"""`import batchnorm.recalibrate` returns the function. Earlier versions had a module of this name."""

import sys

from batchnorm.recalibration import recalibrate

sys.modules[__name__] = recalibrate  # type: ignore[assignment]  # what the import returns and binds
