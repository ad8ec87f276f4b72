"""Settings for tests with other libraries."""

import pytest

# torch's compiler and its forward-mode rules script functions of their own at first use, and warn themselves of it.
TORCH_WARNS_ITSELF = "ignore:.torch.jit.script.* is deprecated:DeprecationWarning:torch"


def pytest_itemcollected(item: pytest.Item) -> None:
    item.add_marker(pytest.mark.filterwarnings(TORCH_WARNS_ITSELF))
