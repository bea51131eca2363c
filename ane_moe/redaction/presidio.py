"""A recogniser for Presidio (`pip install 'ane-moe[presidio]'`): what the shards find, among what
an `AnalyzerEngine` finds otherwise."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from presidio_analyzer import AnalysisExplanation, EntityRecognizer, RecognizerResult

from ane_moe.redaction.redactor import Redactor, open_redactor
from ane_moe.redaction.spans import short_label

# Presidio's names for what it finds itself (presidio-analyzer, supported entities).
ENTITIES = {
    "private_person": "PERSON",
    "private_address": "LOCATION",
    "private_date": "DATE_TIME",
    "private_email": "EMAIL_ADDRESS",
    "private_phone": "PHONE_NUMBER",
    "private_url": "URL",
}


class PrivacyFilterRecognizer(EntityRecognizer):
    """Recognises what a privacy filter's shards do.

    `shards` is the folder of a conversion, or a Redactor; `entities` gives Presidio's name by
    label, and a label that it lacks goes by its own in capitals (`ACCOUNT_NUMBER`).
    """

    def __init__(
        self,
        shards: str | Path | Redactor,
        supported_language: str = "en",
        entities: Mapping[str, str] = ENTITIES,
        **options: Any,
    ) -> None:
        """`options` are EntityRecognizer's own. Raises UserError where the shards cannot be
        loaded."""
        found = shards if isinstance(shards, Redactor) else open_redactor(Path(shards))
        self._redactor = found
        self._entities = {
            label: entities.get(label, short_label(label).upper()) for label in found.labels
        }
        names = sorted(set(self._entities.values()))
        super().__init__(names, supported_language=supported_language, **options)

    def load(self) -> None:
        """Nothing: the shards are loaded by then."""

    def analyze(
        self, text: str, entities: list[str], nlp_artifacts: Any = None
    ) -> list[RecognizerResult]:
        """The spans of `text` that are of `entities`, with their scores; all spans for none."""
        results = []
        for span in self._redactor.find(text).spans:
            entity = self._entities[span.label]
            if not entities or entity in entities:
                why = AnalysisExplanation(self.name, span.score, textual_explanation=span.label)
                results.append(RecognizerResult(entity, span.start, span.end, span.score, why))
        return results
