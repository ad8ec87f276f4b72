"""The steps of large layers and the limits of the machine."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.measuring.records import Row
from benchmarks.reports.markdown import markdown, milliseconds
from benchmarks.sections.limits import BACKWARD, BY_CHANNEL, FLOOR, FORWARD, KEY, NON_TEMPORAL, PASSES
from benchmarks.subjects.in_cache import QUARTER, WHOLE
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
    in_cache: dict[str, float]  # our operators, if each core's share of the data were in its cache

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

    @property
    def bound(self) -> dict[str, float]:
        """The slower of memory, in the order of our kernels, and of instructions."""
        memory = self.by_channel or self.floor
        return {p: max(memory[p], self.in_cache[p]) for p in PASSES}

    @property
    def of_bound(self) -> float:
        """The bound's share in our step."""
        return sum(self.bound.values()) / sum(self.ours.values())


def limits(rows: list[Row]) -> list[Limit]:
    """Return every case that was measured."""
    found = []
    for key in dict.fromkeys(tuple(r[k] for k in KEY) for r in rows):
        chosen = [r for r in rows if tuple(r[k] for k in KEY) == key]
        own = {(r["contender"], r["pass"]): float(r["p50_ms"]) for r in chosen}
        size = {r["contender"]: int(r["bytes"]) for r in chosen}

        def fastest(stream: str, own: dict[tuple[str, str], float] = own) -> dict[str, float] | None:
            if (stream, FORWARD) not in own:
                return None
            return {p: min(own[stream + ending, p] for ending in NON_TEMPORAL) for p in PASSES}

        floor = fastest(FLOOR)
        assert floor is not None
        of_each_core = size[OURS] / int(chosen[0]["threads"])
        more = (of_each_core - size[QUARTER]) / (size[WHOLE] - size[QUARTER])
        in_cache = {p: own[QUARTER, p] + more * (own[WHOLE, p] - own[QUARTER, p]) for p in PASSES}
        torchs = min(sum(own[name, p] for p in PASSES) for name in (TORCH, TORCH_INPLACE))
        ours = {p: own[OURS, p] for p in PASSES}
        found.append(Limit(*key, torchs, ours, floor, fastest(BY_CHANNEL), in_cache))
    return found


def limits_markdown(rows: list[Row]) -> str:
    head = ("shape", "layout", "dtype", "torch, ms", "ours, ms", "speedup", "floor, ms", "speedup at the floor")
    head += ("share of floor", "channel by channel, ms", "in the cache, ms", "share of bound", FORWARD, BACKWARD)
    body = []
    for limit in limits(rows):
        shares = [limit.of_bound, *(limit.bound[p] / limit.ours[p] for p in PASSES)]
        body.append(
            [
                *(limit.shape, limit.layout, limit.dtype),
                *(milliseconds(limit.torch), milliseconds(sum(limit.ours.values())), f"{limit.speedup:.2f}×"),
                *(milliseconds(sum(limit.floor.values())), f"{limit.attainable:.2f}×", f"{limit.reached:.0%}"),
                milliseconds(sum(limit.by_channel.values())) if limit.by_channel else "",
                milliseconds(sum(limit.in_cache.values())),
                *(f"{share:.0%}" for share in shares),
            ]
        )
    return markdown(head, body, 3)
