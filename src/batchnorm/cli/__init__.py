"""The command line.

commands: The commands, one file each.
inputs: Load networks, weights, data and exported programs.
outputs: Print and write results, on streams that may break.
syntax: The syntax of commands and options, beyond that of click.
errors, exit_codes: Usage errors, printed in one line, and the exit codes of the process.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence

from batchnorm._frameworks import MissingFrameworkError, required_by
from batchnorm.cli.exit_codes import INTERNAL, INTERRUPTED, USAGE

EXTRA = ("click",)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command `batchnorm` and exit.

    The exit code is 0 on success, 1 if `doctor` has findings, 2 after a usage error, 3 after an error of this program,
    130 after Ctrl-C and 143 after SIGTERM. Output that cannot be written does not change it.

    Args:
        arguments: The arguments after `batchnorm`; by default those of the process.
    """
    from batchnorm.cli.outputs.streams import exits_at_signals, lossy_streams

    with lossy_streams(), exits_at_signals():
        try:
            with required_by("this command"):
                code = _run(None if arguments is None else list(arguments))
        except MissingFrameworkError as error:
            print(f"batchnorm: {error}", file=sys.stderr)
            code = USAGE
        except Exception:  # Python's own exit code would be 1, which stands for findings
            traceback.print_exc()
            code = INTERNAL
        sys.exit(code)


def _run(arguments: list[str] | None) -> int | None:
    """Run the command, and return its exit code; None is 0."""
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
        return USAGE
    import click

    try:
        code: int | None = app.main(args=arguments, prog_name="batchnorm", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.Abort as abort:
        if isinstance(abort.__cause__, EOFError):  # click takes it for Ctrl-D
            raise abort.__cause__ from None
        print("batchnorm: interrupted", file=sys.stderr)
        return INTERRUPTED
    return code
