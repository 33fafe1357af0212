"""A set in conversion: its shards, as they are finished, and its completion."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from partialfc.data.convert.blocks import shuffle_blocks
from partialfc.data.convert.images import ImageSettings
from partialfc.data.convert.listing import Listing
from partialfc.data.convert.plan import SetPlan
from partialfc.data.convert.shards import Bad, ShardJob, ShardResult, read_result
from partialfc.data.convert.source import Source
from partialfc.data.writer import complete_dataset
from partialfc.errors import ConfigError, InvalidData

_MAX_SHARDS = 150_000  # in an index of 32 MiB


@dataclass(frozen=True)
class SetInProgress:
    """A set whose shards are written in any order.

    Attributes:
        results: of the finished shards, by number.
    """

    plan: SetPlan
    job: ShardJob
    results: dict[int, ShardResult] = field(default_factory=dict)

    @classmethod
    def begin(
        cls,
        source: Source,
        listing: Listing,
        plan: SetPlan,
        folder: Path,
        results: Path,
        samples_per_shard: int,
        images: ImageSettings,
    ) -> SetInProgress:
        """Return the set that goes into ``folder``, with what ``results`` holds of an earlier process.

        Raises:
            ConfigError: there would be more shards than an index can list.
        """
        if plan.num_records > _MAX_SHARDS * samples_per_shard:
            raise ConfigError(
                f"samples_per_shard: {plan.num_records:,} images in shards of {samples_per_shard:,} would be more than "
                f"{_MAX_SHARDS:,} shards; raise it"
            )
        if source.in_blocks:
            shuffle_blocks(plan.records, listing)
        folder.mkdir(exist_ok=True)
        results.mkdir(exist_ok=True)
        job = ShardJob(
            source=source,
            listing=listing.folder,
            records=plan.records,
            labels=plan.labels,
            num_records=plan.num_records,
            folder=folder,
            results=results,
            samples_per_shard=samples_per_shard,
            images=images,
        )
        found = ((number, read_result(job, number)) for number in range(job.num_shards))
        return cls(plan, job, {number: result for number, result in found if result})

    def missing(self) -> list[int]:
        """Return the numbers of the shards that are not finished."""
        return [number for number in range(self.job.num_shards) if number not in self.results]

    def records_of(self, number: int) -> int:
        """Return the number of records of a shard."""
        return min(self.job.samples_per_shard, self.plan.num_records - number * self.job.samples_per_shard)

    def records_done(self) -> int:
        """Return the number of records of the finished shards."""
        return sum(map(self.records_of, self.results))

    def bad(self) -> list[Bad]:
        """Return the records whose images cannot be used, in the order of the shards."""
        return [bad for _, result in sorted(self.results.items()) for bad in result.bad]

    def num_samples(self) -> int:
        """Return the number of samples written."""
        return self.records_done() - len(self.bad())

    def complete(self, extra: Mapping[str, Any]) -> None:
        """Write the class table and the index; every shard must be finished."""
        samples, labels = self.plan.samples.copy(), np.fromfile(self.job.labels, np.int32)
        for bad in self.bad():
            samples[labels[bad.identity]] -= 1
        entries = [result.entry for _, result in sorted(self.results.items()) if result.entry]
        if not entries:
            raise InvalidData(f"{self.job.folder}: none of the images could be used")
        classes = ({"id": i, "name": name, "samples": int(samples[i])} for i, name in enumerate(self.plan.names))
        complete_dataset(self.job.folder, entries, classes, {**extra, "num_bad": len(self.bad())})
