"""The two ways to trace a module, without a change that other threads see.

symbolic: By `torch.fx`, with symbolic values.
exported: By `torch.export`, with the example's values.
containers: The containers of tensors that a graph can return.
"""


class Untraceable(RuntimeError):
    """No graph computes the same as a model or module; the message is the reason."""
