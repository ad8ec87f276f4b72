"""Benchmarks of speed, accuracy and memory, against peers and against the speed of memory.

`python -m benchmarks` measures everything; `python -m benchmarks --help` lists the options.
"""
