"""The command line: one file per command."""

from __future__ import annotations

import sys
from collections.abc import Sequence

EXTRA = ("click",)
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command `batchnorm` and exit: with 0 on success, 2 on a usage error, 130 after Ctrl-C.

    Args:
        arguments: The arguments after `batchnorm`; by default those of the process.
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
        given = None if arguments is None else list(arguments)
        sys.exit(app.main(args=given, prog_name="batchnorm", standalone_mode=False))
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.Abort:
        print("batchnorm: interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
