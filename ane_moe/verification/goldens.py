"""The goldens that a conversion is held against: those inside, or ones captured now."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ane_moe.checkpoints.adapter import adapter_name
from ane_moe.checkpoints.left_out import BY_OPTION
from ane_moe.errors import UserError
from ane_moe.kept import Kept
from ane_moe.loop.experts import expert_layers
from ane_moe.manifest import Manifest
from ane_moe.model.spec import InnerScale
from ane_moe.opened import open_model, with_scales
from ane_moe.original.golden import Golden, read_golden
from ane_moe.original.prompts import builtin_prompts, check_prompts, read_prompts
from ane_moe.original.stored_model import Goldens, capture_goldens
from ane_moe.progress import Progress
from ane_moe.verification.sample import golden_of, sampled_prompts


@dataclass(frozen=True)
class GoldenSource:
    """Where goldens come from: the conversion itself or, where there is a `checkpoint` (a folder),
    that, with what `adapters` add, on the `prompts` of a file or the built-in ones."""

    checkpoint: Path | None = None
    prompts: Path | None = None
    adapters: tuple[Path, ...] = ()

    @property
    def folders(self) -> tuple[Path, ...]:
        """What is read beside the conversion."""
        return () if self.checkpoint is None else (self.checkpoint, *self.adapters)

    def require(self, out: Path, manifest: Manifest) -> None:
        """Raise UserError where there is nothing to compare with, or prompts nobody runs."""
        if self.checkpoint is None and self.prompts is not None:
            raise UserError(
                "--prompts needs a checkpoint to run them on",
                "no --checkpoint",
                "give --checkpoint PATH",
            )
        if self.checkpoint is None and manifest.golden is None:
            raise UserError(
                f"{out} holds no golden to compare with",
                "no golden.safetensors",
                "give --checkpoint PATH, or convert with --golden",
            )

    def goldens(
        self, out: Path, manifest: Manifest, kept: Kept, quick: bool, progress: Progress
    ) -> tuple[Goldens, int]:
        """Those that there are, or that are captured now, of a few prompts if `quick`; and how many
        prompts there are. Raises UserError as `read_goldens` and `capture`."""
        if self.checkpoint is None:
            return read_goldens(out, manifest, quick)
        how = (self.prompts, kept, quick, progress, self.adapters)
        return capture(out, manifest, self.checkpoint, *how)


def with_switched(
    manifest: Manifest, adapters: Sequence[str | Path], merged: bool = False
) -> Manifest:
    """The conversion with the adapter that is named switched on; where it has none to switch,
    `adapters` may be `merged` with a checkpoint's weights. Raises UserError for one that it lacks,
    and for several."""
    if not adapters or (merged and not manifest.adapters):
        return manifest
    if len(adapters) > 1:
        raise UserError("one adapter is switched on at a time", f"{len(adapters)}", "name one")
    return manifest.with_adapter(adapter_name(adapters[0]))


def read_goldens(out: Path, manifest: Manifest, quick: bool) -> tuple[Goldens, int]:
    """The goldens in `out`, of a few of their prompts if `quick`, and how many prompts there are.
    Raises UserError where they are of something else."""
    assert manifest.golden is not None
    original = read_golden(out / manifest.golden)
    as_stored = read_golden(out / manifest.golden_as_stored) if manifest.golden_as_stored else None
    both = Goldens(original, as_stored, manifest.compression)
    return prepared(both, manifest, quick, out), len(original.prompts)


def prepared(goldens: Goldens, manifest: Manifest, quick: bool, out: Path) -> Goldens:
    """Goldens that lie in the conversion in `out`, of a few of their prompts if `quick`, with
    hidden states as large as its own. Raises UserError where they are of something else."""
    original, as_stored = goldens.original, goldens.as_stored
    for golden in filter(None, (original, as_stored)):
        _require_layers(golden, manifest, out)
        width = golden.layers[manifest.layers[0]].x.shape[1]
        _require_same_model((golden.n_layers, golden.logits.shape[1], width), manifest, out)
        check_prompts([list(ids) for ids in golden.prompts], manifest.vocab, manifest.context)
    if quick:
        places = sampled_prompts(original.prompts)
        original = golden_of(original, places, manifest.layers)
        as_stored = as_stored and golden_of(as_stored, places, manifest.layers)
    return _divided(replace(goldens, original=original, as_stored=as_stored), manifest)


def capture(
    out: Path,
    manifest: Manifest,
    checkpoint: Path,
    prompts: Path | None,
    kept: Kept,
    quick: bool,
    progress: Progress,
    adapters: Sequence[Path] = (),
) -> tuple[Goldens, int]:
    """Goldens of the checkpoint, with what `adapters` add, and of what the conversion made of it;
    if `quick`, of a few prompts, which go through the layers of the manifest only. And how many
    prompts there are. Raises UserError for a checkpoint of another model, or prompts that it does
    not take."""
    opened = open_model(checkpoint, manifest.left_out.get(BY_OPTION, ()), adapters)
    model = with_scales(opened, manifest.stream_scale, inner_scales(manifest))
    spec, folder = model.spec, model.checkpoint.folder
    _require_same_model((len(spec.layers), spec.scores, spec.d_model), manifest, out)
    limit = min(manifest.context, spec.context)
    ids = (
        read_prompts(prompts, checkpoint)
        if prompts
        else builtin_prompts(folder, spec.vocab, limit, manifest.lengths)
    )
    check_prompts(ids, spec.vocab, limit)
    few = [ids[place] for place in sampled_prompts(ids)] if quick else ids
    through = manifest.layers if quick else None
    goldens = capture_goldens(model, out, manifest, few, kept, progress, through=through)
    return _divided(goldens, manifest), len(ids)


def inner_scales(manifest: Manifest) -> dict[int, InnerScale]:
    return {int(layer): InnerScale(**scale) for layer, scale in manifest.inner.items()}


def _divided(goldens: Goldens, manifest: Manifest) -> Goldens:
    """With hidden states as large as the conversion's."""
    scale, as_stored = manifest.stream_scale, goldens.as_stored
    return replace(
        goldens,
        original=goldens.original.with_stream(scale),
        as_stored=as_stored and as_stored.with_stream(scale),
    )


def _require_same_model(found: tuple[int, int, int], manifest: Manifest, out: Path) -> None:
    """A golden of another model is a mistake to name, not a failed gate."""
    names = ("layers of the model", "scores", "hidden size")
    needed = (manifest.n_layers, manifest.scores, manifest.d_model)
    wrong = [
        f"{name} {one} for {other}"
        for name, one, other in zip(names, found, needed, strict=True)
        if one != other
    ]
    if wrong:
        raise _of_another_model(out, ", ".join(wrong))


def _of_another_model(out: Path, found: str) -> UserError:
    return UserError(
        f"the golden is not of the model in {out}",
        found,
        "give the checkpoint the shards were converted from",
    )


def _require_layers(golden: Golden, manifest: Manifest, out: Path) -> None:
    if missing := [layer for layer in manifest.layers if layer not in golden.layers]:
        raise _of_another_model(out, f"layers {missing} missing")
    alone = [
        layer for layer in expert_layers(manifest) if golden.layers[layer].expert_outputs is None
    ]
    if alone:
        raise UserError(
            "the golden does not say what single experts compute",
            f"layers {alone}",
            "convert again with --golden, or give --checkpoint PATH",
        )
