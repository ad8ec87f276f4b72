"""The version, which the build reads from here, so that a checkout that is not installed has one too."""

__version__ = "0.1.0.dev0"
