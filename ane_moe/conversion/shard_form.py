"""What a shard is on disk: a package of Core ML's, an asset of Core AI's, or a store of experts.

A form is one class: which tools decide its bytes, and how it is written and found finished.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ane_moe.conversion.plan import ShardPlan
from ane_moe.conversion.store_writer import read_store_key, sound_digest, write_store
from ane_moe.conversion.workers import this_process
from ane_moe.emit.coreai.asset import read_asset_key, stamp_asset
from ane_moe.emit.coreml.package import (
    MANIFEST,
    MODEL,
    WEIGHTS,
    ContentKey,
    Weight,
    Written,
    file_hashes,
    read_content_key,
    stamp,
)
from ane_moe.emit.coreml.template import Template
from ane_moe.expert_record import Store
from ane_moe.formats.recipe import find_format
from ane_moe.package_form import ASSET, DIGEST, METADATA, PROGRAM
from ane_moe.runtime.coreai.installed import DISTRIBUTIONS

Templates = Mapping[str, Template]
Values = Iterable[tuple[str, Weight]]


@dataclass(frozen=True)
class ShardForm(ABC):
    """A shard as files. Digests are by path inside it; of a single file by ""."""

    shard: ShardPlan
    tools: ClassVar[tuple[str, ...]] = ("ane-moe", "coremltools", "torch")
    parts: ClassVar[tuple[str, ...]] = ("",)  # files that it has, what tells its key the last

    @property
    @abstractmethod
    def made_of(self) -> Any:
        """What a content key holds beside weights, formats and tools."""

    @abstractmethod
    def key_at(self, path: Path) -> str | None:
        """The content key of the finished shard at `path`; None where there is none."""

    @abstractmethod
    def digests_at(self, path: Path) -> dict[str, str] | None:
        """Of the finished shard at `path`; None where it is damaged."""

    @abstractmethod
    def write(self, templates: Templates, values: Values, key: ContentKey, path: Path) -> Written:
        """Write the shard to `path`, its key last. Raises UserError when the disk is full."""


class PackageForm(ShardForm):
    parts = (MANIFEST, WEIGHTS, MODEL)

    @property
    def made_of(self) -> Any:
        return self.shard.graphs

    def key_at(self, path: Path) -> str | None:
        return read_content_key(path)

    def digests_at(self, path: Path) -> dict[str, str] | None:
        found = file_hashes(path)
        return found if found.keys() >= {*self.parts} else None

    def write(self, templates: Templates, values: Values, key: ContentKey, path: Path) -> Written:
        formats = [find_format(choice.format) for choice in self.shard.choices.values()]
        more = sum(form.stored_arrays - 1 for form in formats)
        return stamp(templates, values, key, path, more, self.shard.shared, this_process())


class AssetForm(PackageForm):
    tools = (*ShardForm.tools, *DISTRIBUTIONS)
    parts = (PROGRAM, DIGEST, METADATA)

    def key_at(self, path: Path) -> str | None:
        return read_asset_key(path)

    def write(self, templates: Templates, values: Values, key: ContentKey, path: Path) -> Written:
        return stamp_asset(templates, values, key, path, self.shard.shared, this_process())


class StoreForm(ShardForm):
    @property
    def store(self) -> Store:
        assert self.shard.store is not None
        return self.shard.store

    @property
    def made_of(self) -> Any:
        return self.store.record

    def key_at(self, path: Path) -> str | None:
        return read_store_key(path, self.store)

    def digests_at(self, path: Path) -> dict[str, str] | None:
        digest = sound_digest(path, self.store)
        return None if digest is None else {"": digest}

    def write(self, templates: Templates, values: Values, key: ContentKey, path: Path) -> Written:
        experts = dict.fromkeys(name.partition("/")[0] for name in self.shard.sources)
        return write_store(values, [*experts], key, path, self.store, this_process())


def form_of(shard: ShardPlan) -> ShardForm:
    """The form that the plan gives a shard."""
    if shard.store is not None:
        return StoreForm(shard)
    return AssetForm(shard) if shard.path.endswith(ASSET) else PackageForm(shard)
