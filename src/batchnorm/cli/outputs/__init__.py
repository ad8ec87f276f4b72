"""Print and write the results of commands.

reporting: Commands that print a report: as text, or with `--json` as one JSON object.
terminal: Tables and progress bars.
writing: Write the output file completely or not at all.
streams: Standard output and standard error that may be closed or take only ASCII; signals.
"""
