"""The resource that limits how fast a rank gets clips, and the gain of each remedy: pure arithmetic.

Four resources work at the same time: the CPU cores of the loader's workers, the disk that the videos lie on,
the copies of batches to the device, and the device that trains. Each has a rate in clips per second, and a
rank gets clips at the lowest of these rates. Two pairs of resources can take turns instead. A worker waits
while it reads and decodes afterwards, so one worker keeps neither the disk nor its core busy all the time.
A rank without a core to spare for its workers decodes and trains in turn.

Tensor-parallel ranks of a group train on the same clips; the workers of the group share them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple

Resource = Literal["decoding", "disk", "copies", "compute"]
Basis = Literal["measured", "predicted"]

REPEATS = 4  # value of `data.repeats` that is suggested
# CPU time in ms of decoding 16 frames at stride 4, by the form of the same five videos: as given (key frames
# up to 250 apart), re-encoded (key frames 8 apart, short side 256), and as JPEG frames (short side 256).
_DECODE_MS = {"given": 386.0, "reencode": 66.0, "pack": 6.8}
# CPU time in ms of reading, checking and writing into a batch in shared memory a megabyte of kept tokens.
_CACHED_MS_PER_MB = 0.7


@dataclass(frozen=True)
class LoadingCost:
    """The work of loading clips. Times are CPU time of one core.

    Attributes:
        decode_ms: time to open a sample and decode the frames of a clip.
        crop_ms: time to cut and resize one clip.
        collate_ms: time to write one clip into its batch.
        pack_ms: time to select the kept tokens of one clip, which only `data.pack_tokens` does.
        read_bytes: bytes of a sample that are read from the disk.
        wait_ms: time in which a worker waits for a sample from an idle disk; None if it was not measured.
    """

    decode_ms: float
    crop_ms: float = 0.0
    collate_ms: float = 0.0
    pack_ms: float = 0.0
    read_bytes: float = 0.0
    wait_ms: float | None = None

    def clip_ms(self, repeats: int, packs: bool) -> float:
        """Return the time per clip if `repeats` clips are cut from each decoded sample."""
        return self.decode_ms / repeats + self.crop_ms + self.collate_ms + (self.pack_ms if packs else 0.0)


@dataclass(frozen=True)
class MeasuredLoading:
    """A measurement of loading on one machine, for the clips of one data set.

    Attributes:
        cost: work per clip.
        disk_bytes_per_s: rate at which the disk of the videos delivers them; None if only the page cache
            could be measured.
        copy_bytes_per_s: rate at which one thread copies a batch, to the device or, without one, in memory.
        place: human-readable machine and date of the measurement.
    """

    cost: LoadingCost
    disk_bytes_per_s: float | None
    copy_bytes_per_s: float
    place: str

    def as_json(self) -> dict[str, Any]:
        """Return the measurement as a JSON tree, which `from_json` reads back."""
        return asdict(self)

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> MeasuredLoading:
        """Return the measurement that `as_json` wrote.

        Raises:
            KeyError, TypeError: the tree is not a measurement.
        """
        return cls(**{**tree, "cost": LoadingCost(**tree["cost"])})


@dataclass(frozen=True)
class Supply:
    """The settings and the machine that supply one rank with clips.

    Attributes:
        workers: worker processes of the rank.
        cores: CPU cores of the rank on which workers run while it trains.
        repeats: clips that are cut from each decoded sample.
        packs: True if workers send kept tokens only.
        clip_bytes, packed_bytes: size of a clip as workers send it, whole and packed.
        ranks_per_node: ranks that share a node's disk.
        tensor: tensor-parallel degree; the ranks of a group read their clips once, in turn.
        disk_bytes_per_s: rate of a node's disk; None if unknown, which counts as no limit.
        copy_bytes_per_s: rate of a rank's copies; None if there are none.
        model_clips_per_s: clips per second that a rank trains on if it never waits; None if unknown.
        basis: whether the loader's figures were measured.
    """

    workers: int
    cores: float
    clip_bytes: float
    packed_bytes: float
    repeats: int = 1
    packs: bool = False
    ranks_per_node: int = 1
    tensor: int = 1
    disk_bytes_per_s: float | None = None
    copy_bytes_per_s: float | None = None
    model_clips_per_s: float | None = None
    basis: Basis = "predicted"

    @property
    def alternates(self) -> bool:
        """True if decoding and training take turns, because the workers have no cores of their own."""
        return self.workers == 0 or self.cores <= 0

    @property
    def decoding_cores(self) -> float:
        """The cores of this rank that decode at the same time."""
        return 1.0 if self.alternates else min(float(self.workers), self.cores)

    def rates(self, cost: LoadingCost) -> dict[Resource, float]:
        """Return the clips per second that each resource with a known rate delivers to a rank."""
        clips_per_s = 1e3 * self.decoding_cores / cost.clip_ms(self.repeats, self.packs)
        found: dict[Resource, float] = {"decoding": self._reading_ranks * clips_per_s}
        if self.disk_bytes_per_s and cost.read_bytes:
            groups = max(1.0, self.ranks_per_node / self.tensor)
            found["disk"] = self.disk_bytes_per_s / groups / (cost.read_bytes / self.repeats)
        if self.copy_bytes_per_s:
            found["copies"] = self.copy_bytes_per_s / (self.packed_bytes if self.packs else self.clip_bytes)
        if self.model_clips_per_s:
            found["compute"] = self.model_clips_per_s
        return found

    def workers_clips_per_s(self, cost: LoadingCost) -> float:
        """Return the clips per second of workers that wait for an idle disk and decode in turn."""
        wait_ms = 0.0
        if self.disk_bytes_per_s:
            whole = 1e3 * cost.read_bytes / self.disk_bytes_per_s
            wait_ms = (whole if cost.wait_ms is None else cost.wait_ms) / self.repeats
        workers = self._reading_ranks * max(1, self.workers)
        return 1e3 * workers / (wait_ms + cost.clip_ms(self.repeats, self.packs))

    @property
    def _reading_ranks(self) -> int:
        """The ranks that read the clips of this rank."""
        return self.tensor if self.workers else 1


@dataclass(frozen=True)
class Bottleneck:
    """The rates of all resources, and the one that limits a rank.

    Attributes:
        rates: clips per second and rank, by resource.
        workers_clips_per_s: clips per second of workers that wait for the disk and decode in turn.
        alternates: True if decoding and training take turns.
        basis: whether the loader's rates were measured; that of compute is always predicted.
    """

    rates: Mapping[Resource, float]
    workers_clips_per_s: float
    alternates: bool
    basis: Basis

    @property
    def binding(self) -> Resource:
        """The resource with the lowest rate; compute only if the loader as a whole delivers more."""
        model = self.rates.get("compute")
        if model is not None and model <= self.loader_clips_per_s:
            return "compute"
        return min((name for name in self.rates if name != "compute"), key=lambda name: self.rates[name])

    @property
    def loader_clips_per_s(self) -> float:
        """The rate of all resources but compute."""
        alone = (rate for name, rate in self.rates.items() if name != "compute")
        return min(self.workers_clips_per_s, *alone)

    @property
    def clips_per_s(self) -> float:
        """The clips per second that a rank trains on."""
        loader, model = self.loader_clips_per_s, self.rates.get("compute")
        if model is None:
            return loader
        return 1 / (1 / loader + 1 / model) if self.alternates else min(loader, model)

    @property
    def factor(self) -> float | None:
        """How many times as fast the other side is: compute, or the loader if compute binds."""
        model = self.rates.get("compute")
        if model is None:
            return None
        return max(model / self.loader_clips_per_s, self.loader_clips_per_s / model)

    def sentence(self) -> str:
        """Name the binding resource, its rate and the factor in a plain sentence."""
        model = self.rates.get("compute")
        loads = f"{_rounded(self.loader_clips_per_s)} clips/s per rank ({self.basis})"
        if model is None:
            return f"{self.binding} binds: {loads}; the model's own rate is unknown"
        trains = f"{_rounded(model)} clips/s per rank (predicted)"
        turns = "; decoding and training take turns, for want of spare cores" if self.alternates else ""
        more = f"{self.factor:.2g} x as many"
        if self.binding == "compute":
            return f"compute binds: {trains}, and the loader could deliver {more}: {loads}{turns}"
        return f"{self.binding} binds: {loads}, and the model could take {more}: {trains}{turns}"


class Change(NamedTuple):
    """A changed setting or data set, with the work and the supply that follow from it.

    Attributes:
        name: name of the remedy.
        apply: what the user types to apply it.
        cost, supply: work and supply after the change.
        note: where the figures of the changed data come from; empty if they follow by arithmetic.
    """

    name: str
    apply: str
    cost: LoadingCost
    supply: Supply
    note: str = ""


class Remedy(NamedTuple):
    """The predicted result of a change.

    Attributes:
        name, apply, note: as in `Change`.
        clips_per_s: clips per second that a rank then trains on.
        loader_clips_per_s: clips per second that the loader then delivers.
        gain: `clips_per_s` over the present rate.
        binding: the resource that binds then.
    """

    name: str
    apply: str
    clips_per_s: float
    loader_clips_per_s: float
    gain: float
    binding: Resource
    note: str

    def phrase(self) -> str:
        """Describe the remedy, such as `data.num_workers=14, 407 (predicted)`."""
        return f"{self.apply}, {_rounded(self.clips_per_s)} (predicted)"


def find_bottleneck(cost: LoadingCost, supply: Supply) -> Bottleneck:
    """Return which resource limits a rank."""
    rates, turns = supply.rates(cost), supply.workers_clips_per_s(cost)
    return Bottleneck(rates, turns, supply.alternates, supply.basis)


def changed_settings(cost: LoadingCost, supply: Supply, can_pack: bool) -> Iterator[Change]:
    """Yield the changes of settings that a run can make without other data.

    Args:
        cost: work of loading a clip.
        supply: settings and machine at present.
        can_pack: True if the run's token score allows `data.pack_tokens`.
    """
    cores = int(supply.cores)
    if cores > supply.workers:
        yield Change("workers", f"data.num_workers={cores}", cost, replace(supply, workers=cores))
    if supply.repeats < REPEATS:
        more = replace(supply, repeats=REPEATS)
        yield Change("repeats", f"data.repeats={REPEATS}", cost, more)
    if can_pack and not supply.packs:
        yield Change("pack_tokens", "data.pack_tokens=true", cost, replace(supply, packs=True))


def changed_data(
    cost: LoadingCost, supply: Supply, pack_share: float | None, can_cache: bool
) -> Iterator[Change]:
    """Yield the changes of the form of the data, at their usual cost.

    Args:
        cost: work of loading a clip.
        supply: settings and machine at present.
        pack_share: time to decode a clip from a frame store over that at present; None if it is one already.
        can_cache: True if the run's token score allows `data.token_cache`.
    """
    if pack_share is not None:
        packed = replace(cost, decode_ms=pack_share * cost.decode_ms, wait_ms=None)
        yield Change("pack", "`everest-ds data pack`", packed, supply, "the usual time (docs/loader.md)")
    if can_cache:
        usual = LoadingCost(0.0, collate_ms=_CACHED_MS_PER_MB * supply.packed_bytes / 1e6)
        yield cached_tokens(usual, supply, "the usual time (docs/loader.md)")


def cached_tokens(cost: LoadingCost, supply: Supply, note: str) -> Change:
    """Return the change to a token cache.

    Args:
        cost: CPU time of loading a clip from the cache.
        supply: settings and machine at present.
        note: where this time comes from.
    """
    # Each clip is read in full, also if several are cut from a sample.
    read = replace(cost, read_bytes=supply.packed_bytes)
    from_cache = replace(supply, packs=True, repeats=1)
    return Change("cache", "`everest-ds data cache`", read, from_cache, note)


def find_remedies(cost: LoadingCost, supply: Supply, changes: Iterable[Change]) -> list[Remedy]:
    """Return the predicted result of each change, the largest gain first."""
    now = find_bottleneck(cost, supply).clips_per_s
    found = []
    for change in changes:
        then = find_bottleneck(change.cost, change.supply)
        rate = then.clips_per_s
        found.append(
            Remedy(
                change.name,
                change.apply,
                rate,
                then.loader_clips_per_s,
                rate / now,
                then.binding,
                change.note,
            )
        )
    return sorted(found, key=lambda remedy: (-remedy.gain, -remedy.loader_clips_per_s))


def usual_share(form: str) -> float:
    """Return the time to decode a clip in this form (`reencode`, `pack`) over that of files as given."""
    return _DECODE_MS[form] / _DECODE_MS["given"]


def store_speedup(frame_stride: int) -> float:
    """Return how many times as fast a clip is decoded from a frame store as from re-encoded videos.

    A video must be decoded between the frames of a clip, too; the figures are those of stride 4.
    """
    return usual_share("reencode") / usual_share("pack") * frame_stride / 4


def _rounded(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"
