"""How fast, how exact and how frugal batch normalization is here, against its peers and against the memory's speed.

`python -m benchmarks` measures everything; `python -m benchmarks --help` tells what else there is.
"""
