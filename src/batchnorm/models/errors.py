"""The error of both tracers."""


class Untraceable(RuntimeError):
    """A model or a module has no graph that computes the same; the message is the reason."""
