"""The error that both tracers raise."""


class Untraceable(RuntimeError):
    """No graph computes the same as a model or module; the message is the reason."""
