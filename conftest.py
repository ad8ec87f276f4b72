"""What is not collected where an optional package is missing: its docstrings could not be imported."""

import importlib.util

collect_ignore_glob = []
if importlib.util.find_spec("triton") is None:
    collect_ignore_glob += ["src/batchnorm/ops/triton/launch.py", "src/batchnorm/ops/triton/kernels/*"]
