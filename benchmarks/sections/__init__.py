"""The sections of `python -m benchmarks`: each measures one question and writes one CSV file."""
