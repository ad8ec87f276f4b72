"""The exit codes of commands that fail. After SIGTERM, the code is 143."""

USAGE = 2
INTERNAL = 3
INTERRUPTED = 130
