"""Files whose docstrings pytest does not collect."""

import importlib.util

# Keras chooses its backend when it is imported. tests/keras runs these docstrings, once for each backend.
collect_ignore_glob = ["src/batchnorm/keras/*"]
if importlib.util.find_spec("triton") is None:
    collect_ignore_glob += ["src/batchnorm/ops/triton/launch.py", "src/batchnorm/ops/triton/kernels/*"]
    collect_ignore_glob += ["tests/ops/triton/emulated.py", "tests/ops/triton/emulator/driver.py"]
