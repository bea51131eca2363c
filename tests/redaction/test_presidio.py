"""The recogniser in Presidio's own engine. Skipped where presidio-analyzer is not installed."""

import pytest

presidio = pytest.importorskip("presidio_analyzer")
spacy = pytest.importorskip("spacy")

from presidio_analyzer.nlp_engine import SpacyNlpEngine  # noqa: E402

from ane_moe.redaction.presidio import PrivacyFilterRecognizer  # noqa: E402
from ane_moe.redaction.redactor import Redactor  # noqa: E402
from tests.redaction.scorers import Digits, byte_tokenizer  # noqa: E402

TEXT = "pay 555 to é 🙂 66"


class Blank(SpacyNlpEngine):
    """spaCy without a trained pipeline: the recogniser needs none."""

    def __init__(self):
        super().__init__()
        self.nlp = {"en": spacy.blank("en")}


@pytest.fixture(scope="module")
def recogniser():
    tokenizer = byte_tokenizer()
    return PrivacyFilterRecognizer(Redactor(Digits(tokenizer), tokenizer))


@pytest.fixture(scope="module")
def engine(recogniser):
    registry = presidio.RecognizerRegistry(recognizers=[recogniser])
    return presidio.AnalyzerEngine(registry=registry, nlp_engine=Blank())


def test_entities_go_by_presidios_names(recogniser):
    assert {"PERSON", "EMAIL_ADDRESS", "SECRET"} < set(recogniser.get_supported_entities())
    assert recogniser.supported_language == "en"


def test_the_engine_gives_the_spans(engine, recogniser):
    found = engine.analyze(TEXT, language="en")
    assert {TEXT[one.start : one.end] for one in found} == {"555", "66"}
    assert {one.entity_type for one in found} == {"ACCOUNT_NUMBER"}
    assert all(0.9 < one.score <= 1 for one in found)
    assert found[0].recognition_metadata["recognizer_name"] == recogniser.name


def test_only_entities_that_are_asked_for_are_given(engine):
    assert engine.analyze(TEXT, language="en", entities=["PERSON"]) == []
    assert len(engine.analyze(TEXT, language="en", entities=["ACCOUNT_NUMBER", "PERSON"])) == 2
