"""The option `--version`, and the command `completion`."""

from __future__ import annotations

import platform

import click
from click.shell_completion import get_completion_class

from batchnorm._version import __version__
from batchnorm.cli.syntax import OneLineCommand

_PACKAGES = ("torch", "jax", "keras", "onnxruntime")
_SHELLS = ("bash", "zsh", "fish")


def version_option(command: click.Group) -> click.Group:
    """Add the option `--version` to a command."""
    option = click.Option(
        ["--version"],
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=_print_versions,
        help="Print the versions of batchnorm and its frameworks, and the kernels in use.",
    )
    command.params.append(option)
    return command


def _print_versions(ctx: click.Context, option: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        print("\n".join(f"{name} {what}" for name, what in _versions().items()))
        ctx.exit()


def _versions() -> dict[str, str]:
    """Return what `--version` prints, without importing a framework."""
    from importlib.metadata import PackageNotFoundError, version

    from batchnorm.compiled import kernels

    found = {"batchnorm": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    compiled = kernels()
    missing = compiled.library is None
    found["kernels"] = f"none: {compiled.reason}" if missing else compiled.text("batchnorm_capability")
    return found


@click.command(cls=OneLineCommand)
@click.argument("shell", type=click.Choice(_SHELLS))
@click.pass_context
def completion(ctx: click.Context, /, shell: str) -> None:
    r"""Print the script that completes commands, options and file names in your shell.

    \b
    Examples:
      eval "$(batchnorm completion bash)"      in ~/.bashrc
      eval "$(batchnorm completion zsh)"       in ~/.zshrc
      batchnorm completion fish > ~/.config/fish/completions/batchnorm.fish
    """
    root = ctx.find_root()
    kind = get_completion_class(shell)
    assert kind is not None
    print(kind(root.command, {}, "batchnorm", "_BATCHNORM_COMPLETE").source())
