"""The cases run in a process of their own."""

collect_ignore = ["cases"]
