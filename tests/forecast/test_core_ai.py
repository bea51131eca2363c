"""Published figures of Core AI: rows with a source, apart from what is predicted."""

import fnmatch
import re

import pytest

from ane_moe.forecast.chips import chip_names
from ane_moe.forecast.core_ai import faults_of, of_conversion, published
from ane_moe.formats.encoders import FORMATS


def test_every_row_has_a_source_and_conditions() -> None:
    rows = published()
    assert len(rows.speeds) >= 10 and rows.beside and rows.faults
    assert all(row.source and row.conditions and row.decode_tok_s > 0 for row in rows.speeds)
    assert {row.engine for row in rows.speeds} == {"gpu", "ane"}
    assert {row.chip for row in rows.speeds} <= {*chip_names(), "a Mac"}
    assert all(0 < least <= most < 1 for least, most in (row.share for row in rows.beside))


@pytest.mark.parametrize(
    "form, found",
    [
        ("fp16", 0),
        ("int8", 0),
        ("lut4-tensor", 0),
        ("lut4", 1),  # a palette for each 16 channels
        ("lut6-g8", 1),
        ("lut4+scale", 1),
        ("apple2", 1),
        ("int4-block32", 1),
        ("as-stored-int4-zeros-1x32", 1),
        ("as-stored-lut4-1x32", 0),
        ("int4-channel", 1),
    ],
)
def test_a_fault_is_told_of_the_formats_that_it_is_of(form: str, found: int) -> None:
    told = faults_of([form])
    assert len(told) == found
    assert all(re.search(rf"{re.escape(form)}.*instead.*\(", line) for line in told)


def test_what_is_told_instead_has_no_fault_itself() -> None:
    for fault in published().faults:
        named = [form for form in (*FORMATS, "lut4-tensor") if form in fault.instead.split(", ")]
        assert not faults_of(named)
        assert any(fnmatch.fnmatchcase(form, p) for form in FORMATS for p in fault.formats)


def test_a_report_says_that_nothing_is_forecast() -> None:
    first, shares, fault = of_conversion(["fp16", "lut4"])
    assert "nothing is forecast" in first
    assert "0.979 to 0.998" in shares and "lut4" in fault
