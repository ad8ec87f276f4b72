"""Choose channels by their γ, and report them by layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from batchnorm.models.description import describe
from batchnorm.models.report import Change
from batchnorm.surgery.fold.network import Call
from batchnorm.surgery.prune.channels import Channels
from batchnorm.surgery.prune.removal import Removal, removal
from batchnorm.walk import Found, is_hooked


class ChannelsByGamma:
    """The channels of a network by the size of their γ.

    Attributes:
        norms: The call of each batch normalization that could be read, by the layer's path.
    """

    def __init__(self, channels: Channels, norms: Mapping[str, Call], chosen: Iterable[Found]) -> None:
        self.norms = norms
        self._channels, self._chosen = channels, {path for found in chosen for path in found.paths}
        self._gammas = {call: _gammas(channels, call) for call in norms.values()}
        self._largest: dict[int, float] = {}
        for call, gammas in self._gammas.items():
            for number, gamma in zip(channels.held[call].tolist(), gammas.tolist(), strict=True):
                self._largest[number] = max(gamma, self._largest.get(number, 0.0))

    def up_to(self, threshold: float, *, exactly: bool) -> Removal:
        """Return the removal of every channel whose |γ| is at most the threshold."""
        small = {call: self._gammas[call] <= threshold for call in self._calls()}
        return removal(self._channels, small, self._largest, exactly)

    def share(self, share: float) -> Removal:
        """Return the removal of this share of all channels that can be removed, those with the smallest |γ|."""
        calls = self._calls()
        every = torch.cat([torch.empty(0, device="cpu").double(), *(self._gammas[call] for call in calls)])
        ranks = every.argsort(stable=True).argsort().split([len(self._gammas[call]) for call in calls])

        def smallest(count: int) -> Removal:
            small = {call: rank < count for call, rank in zip(calls, ranks, strict=True)}
            return removal(self._channels, small, self._largest, exactly=False)

        most = round(share * len(smallest(len(every)).numbers))
        low, high, found = 0, len(every), smallest(0)
        while low < high:  # a larger count removes no fewer channels
            middle = (low + high + 1) // 2
            tried = smallest(middle)
            if len(tried.numbers) <= most:
                low, found = middle, tried
            else:
                high = middle - 1
        return found

    def _calls(self) -> list[Call]:
        return [call for path, call in self.norms.items() if path in self._chosen]

    def rows(self, found: Removal, layers: Iterable[Found]) -> tuple[list[Change], list[Change]]:
        """Return a row for each layer that loses channels, and one for each other layer that was chosen."""
        changed, left = [], []
        for layer in layers:
            call = next((self.norms[path] for path in layer.paths if path in self.norms), None)
            was, why = describe(layer.module), self._why_left(layer, call, found)
            removed = 0 if call is None else int(found.has(self._channels.held[call]).sum())
            if call is not None and removed:
                now = was.replace(f"({len(self._gammas[call])})", f"({len(self._gammas[call]) - removed})")
                changed.append(Change(layer.path, was, now, why))
            elif self._chosen.intersection(layer.paths):
                left.append(Change.unchanged(layer.path, was, why or "none of its γ is small enough"))
        return changed, left

    def _why_left(self, layer: Found, call: Call | None, found: Removal) -> str:
        """Return why channels with a small γ stay."""
        if call is None:
            network = self._channels.network
            paths = {network.trace.paths.get(other.node): why for other, why in network.unfoldable.items()}
            hooks = "it has hooks" if is_hooked(layer.module) else "no call of it could be read"
            return next((paths[path] for path in layer.paths if path in paths), hooks)
        if call not in found.small:
            return ""
        numbers = self._channels.held[call]
        stay = numbers[found.small[call] & ~found.has(numbers)].tolist()
        reasons = dict.fromkeys(found.refused.get(n) or self._channels.kept.get(n, "") for n in stay)
        return f"{len(stay)} with small γ stay: {'; '.join(reasons)}" if stay else ""


def _gammas(channels: Channels, call: Call) -> Tensor:
    gamma = call.node.args[3]
    ones = torch.ones(len(channels.held[call]), dtype=torch.float64, device="cpu")
    return ones if gamma is None else channels.network.attribute(gamma).detach().cpu().double().abs()
