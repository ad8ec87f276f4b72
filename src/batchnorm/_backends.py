"""Report the implementation that each framework and device uses."""

from __future__ import annotations

from batchnorm._frameworks import is_installed
from batchnorm.compiled import jax_description


class Backends(dict[str, str]):
    """The implementation that each type of device uses, with `hints` for more speed; prints as a table."""

    def __init__(self, backends: dict[str, str], hints: tuple[str, ...]) -> None:
        super().__init__(backends)
        self.hints = hints

    def __str__(self) -> str:
        width = max(map(len, self), default=0)
        lines = [f"{device:{width}}  {what}" for device, what in self.items()]
        if not lines:
            return "none: neither PyTorch nor JAX is installed"
        return "\n".join([*lines, *(f"hint: {hint}" for hint in self.hints)])


def backends() -> Backends:
    """Return the implementation for each type of device, and the reason if a faster one cannot be used.

    "cpu", "cuda" and "other" are the devices of PyTorch, and "jax" is the CPU for `batchnorm.jax`, which compiles
    `jax.numpy` on other devices. A framework that is not installed has no entry. JAX is not imported. Keras uses the
    implementation of its backend; on TensorFlow, these are TensorFlow's own operations, which have no entry.

    "cpu autograd" is the node that records a layer's call for PyTorch's autograd on the CPU: "native" if it is written
    in C++, which makes small layers faster, or "python" and the reason. The native node is built for one minor version
    of PyTorch. The environment variable `BATCHNORM_AUTOGRAD=python` turns it off.

    Examples:
        >>> backends()["other"]
        'eager: plain torch operations'
    """
    found: dict[str, str] = {}
    if is_installed("torch"):
        from batchnorm.ops import compiled

        found = compiled.descriptions()
    if is_installed("jax"):
        found["jax"] = jax_description()
    from batchnorm import memory

    hint = memory.hint() if found else None
    return Backends(found, (hint,) if hint else ())
