"""The steps of large layers and the limits of the machine."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.measuring.records import Row
from benchmarks.reports.markdown import markdown, milliseconds
from benchmarks.sections.limits import BACKWARD, BY_CHANNEL, FLOOR, FORWARD, KEY, NON_TEMPORAL, PASSES
from benchmarks.subjects.peers import OURS, TORCH, TORCH_INPLACE


@dataclass(frozen=True)
class Limit:
    """One case, with milliseconds by pass: medians, and for streams of the faster kind of stores."""

    shape: str
    layout: str
    dtype: str
    torch: float  # both passes, with the faster ReLU
    ours: dict[str, float]
    floor: dict[str, float]
    by_channel: dict[str, float] | None

    @property
    def speedup(self) -> float:
        return self.torch / sum(self.ours.values())

    @property
    def attainable(self) -> float:
        """The speedup of a step that takes as long as the floor."""
        return self.torch / sum(self.floor.values())

    @property
    def reached(self) -> float:
        """The floor's share in our step."""
        return sum(self.floor.values()) / sum(self.ours.values())


def limits(rows: list[Row]) -> list[Limit]:
    """Return every case that was measured."""
    found = []
    for key in dict.fromkeys(tuple(r[k] for k in KEY) for r in rows):
        own = {(r["contender"], r["pass"]): float(r["p50_ms"]) for r in rows if tuple(r[k] for k in KEY) == key}

        def fastest(stream: str, own: dict[tuple[str, str], float] = own) -> dict[str, float] | None:
            if (stream, FORWARD) not in own:
                return None
            return {p: min(own[stream + ending, p] for ending in NON_TEMPORAL) for p in PASSES}

        floor = fastest(FLOOR)
        assert floor is not None
        torchs = min(sum(own[name, p] for p in PASSES) for name in (TORCH, TORCH_INPLACE))
        found.append(Limit(*key, torchs, {p: own[OURS, p] for p in PASSES}, floor, fastest(BY_CHANNEL)))
    return found


def limits_markdown(rows: list[Row]) -> str:
    head = ("shape", "layout", "dtype", "torch, ms", "ours, ms", "speedup", "floor, ms", "speedup at the floor")
    head += ("share of floor", "forward", "backward", "channel by channel, ms", "forward", "backward")
    body = []
    for limit in limits(rows):
        shares = [f"{limit.floor[p] / limit.ours[p]:.0%}" for p in PASSES]
        by_channel = ["", "", ""]
        if limit.by_channel:
            by_channel = [milliseconds(sum(limit.by_channel.values()))]
            by_channel += [f"{limit.by_channel[p] / limit.ours[p]:.0%}" for p in (FORWARD, BACKWARD)]
        times = [milliseconds(ms) for ms in (limit.torch, sum(limit.ours.values()))]
        body.append(
            [
                *(limit.shape, limit.layout, limit.dtype, *times, f"{limit.speedup:.2f}×"),
                *(milliseconds(sum(limit.floor.values())), f"{limit.attainable:.2f}×", f"{limit.reached:.0%}"),
                *shares,
                *by_channel,
            ]
        )
    return markdown(head, body, 3)
