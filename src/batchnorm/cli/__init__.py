"""The command line: one verb in each file."""

from __future__ import annotations

import sys
from collections.abc import Sequence

EXTRA = ("click",)
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command `batchnorm`, and exits: 0 well, 2 for a user's mistake, 130 after Ctrl-C.

    Args:
        arguments: The words after `batchnorm`; those of the process where none are given.
    """
    try:
        from batchnorm.cli.app import app
    except ModuleNotFoundError as error:
        if error.name not in EXTRA:
            raise
        print(
            f"batchnorm: the command line needs the package {error.name}, which cannot be imported. Install it with: "
            "pip install 'batchnorm[compare]'",
            file=sys.stderr,
        )
        sys.exit(2)
    import click

    try:
        words = None if arguments is None else list(arguments)
        sys.exit(app.main(args=words, prog_name="batchnorm", standalone_mode=False))
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.Abort:
        print("batchnorm: interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
