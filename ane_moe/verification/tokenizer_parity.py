"""A conversion's tokenizer against its checkpoint's: the same ids for a fixed set of texts."""

from pathlib import Path

from ane_moe.errors import UserError
from ane_moe.loop.tokenizer import load_tokenizer
from ane_moe.manifest import Manifest
from ane_moe.original.checkpoint_tokenizer import read_tokenizer
from ane_moe.original.tokenizer_record import TokenizerRecord, differences, read_record, record_of
from ane_moe.verification.result import TokenizerResult


def compare_tokenizer(
    out: Path, manifest: Manifest, checkpoint: Path | None
) -> TokenizerResult | str:
    """Compare with the ids that `checkpoint` gives now, else with those recorded at conversion.

    Where there is nothing to compare, the answer says why. Raises UserError for a checkpoint's
    tokenizer or a record that cannot be read; a conversion's that cannot be read has failed.
    """
    if not manifest.tokenizer:
        return "the conversion has none"
    original = read_tokenizer(checkpoint) if checkpoint else None
    if original is not None:
        return _result(out, manifest, record_of(original), "checkpoint")
    if manifest.tokenizer_record is None:
        return "the conversion did not record the checkpoint's ids"
    return _result(out, manifest, read_record(out / manifest.tokenizer_record), "record")


def _result(
    out: Path, manifest: Manifest, record: TokenizerRecord, against: str
) -> TokenizerResult:
    texts = len(record.texts) + (record.chat is not None)
    try:
        tokenizer = load_tokenizer(out, manifest)
        wrong = differences(record, tokenizer) if tokenizer else ()
    except UserError as error:
        return TokenizerResult(texts, against, False, reason=str(error))
    if not wrong:
        return TokenizerResult(texts, against, True)
    reason = (
        f"other ids than the checkpoint's for {len(wrong)} of {texts} texts, "
        f"the first is {wrong[0].text!r}"
    )
    return TokenizerResult(texts, against, False, wrong, reason)
