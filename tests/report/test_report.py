"""The report page: complete, harmless, and looked at in a real browser."""

import html as escaping
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import pytest
from typer.testing import CliRunner

from ane_moe.cli import app
from ane_moe.demo import demo_checkpoint
from ane_moe.errors import UserError
from ane_moe.placement.predicted import predict
from ane_moe.placement.targets import find_target
from ane_moe.report.html import render_html
from ane_moe.report.markdown import render_markdown
from ane_moe.report.report_data import gather
from ane_moe.verification.verify import verify
from tests.verification.tiny import tiny_conversion

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
    "--enable-logging=stderr",
]
BENCH = {
    "device_figures": False,
    "conditions": {
        "label": "reference runtime",
        "chip": "a CPU",
        "os": "Linux",
        "started": "2026-01-01",
    },
    "decode": [
        {
            "fill": 0,
            "tok_s": 37.5,
            "latency": {"median_ms": 25.5},
            "kinds_ms": {"attn": 12.5, "moe": 12.0},
            "host_ms": 0.5,
        }
    ],
}
PROBE = """<iframe id=f style="border:0" width=%d height=900 srcdoc="%s"></iframe><pre id=o></pre><script>
f.onload = () => { const d = f.contentDocument; o.textContent = JSON.stringify({
  width: d.documentElement.scrollWidth, headings: d.querySelectorAll("h2").length,
  plots: [...d.querySelectorAll("svg")].map(s => Math.round(s.getBoundingClientRect().width)),
  height: d.documentElement.scrollHeight}); };</script>"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    out = tiny_conversion(demo_checkpoint(), folder / "out", context=128, prefill=32, golden=True)
    (folder / "bench.json").write_text(json.dumps(BENCH))
    packages = [
        (path, path.relative_to(out).as_posix()) for path in sorted(out.rglob("*.mlpackage"))
    ]
    placement = predict(packages, find_target("m4-max", 26))
    return gather(
        out,
        verify=verify(out, runtime="reference"),
        placement=placement,
        bench=folder / "bench.json",
    )


def test_the_page_stands_alone_and_says_everything(data):
    page = render_html(data)
    for heading in (
        "Model and shards",
        "Parity with the model",
        "Placement",
        "Routing",
        "Where the time goes",
        "What the engine would take",
        "Conditions",
    ):
        assert f"<h2>{heading}" in page
    assert "<script" not in page and "@import" not in page
    assert all(
        target.startswith(("#", "data:image/png;base64,"))
        for target in re.findall(r'(?:src|href)="([^"]*)', page)
    )
    assert (
        "passed" in page
        and "NOT A DEVICE" in page
        and ">predicted<" in page
        and ">measured<" in page
    )
    assert page.count("<svg") == 4 and "Not a device figure" in page


def test_what_is_predicted_never_stands_without_its_range(data):
    speed = data.predicted["decode"]["tok_s"]
    for page in (render_html(data), render_markdown(data)):
        assert f"{speed['low']:.3g} to {speed['high']:.3g} tok/s" in page and "predicted" in page


def test_nothing_from_a_manifest_becomes_markup(data):
    evil = "<script>alert(1)</script>"
    manifest = replace(
        data.manifest,
        family=evil,
        weights=evil,
        versions={evil: evil},
        shards=tuple(replace(shard, kind=evil) for shard in data.manifest.shards),
    )
    bad = replace(data, manifest=manifest, folder=evil, routing_of=evil)
    assert evil not in render_html(bad) and "&lt;script&gt;" in render_html(bad)
    assert "<script>" not in render_markdown(bad)


def test_parts_that_are_not_there_are_left_out(data):
    bare = replace(data, verify=None, placement=None, bench=None, predicted=None, routing=())
    page = render_html(bare)
    assert "not verified" in page and "<h2>Routing" not in page and "<h2>Placement" not in page
    assert render_markdown(bare).startswith("**ane-moe: not verified**")


def test_a_failed_gate_is_the_headline(data):
    rows = tuple(
        replace(row, passed=False, reason="cosine <low>") for row in data.verify.shards[:1]
    )
    failed = replace(
        data, verify=replace(data.verify, passed=False, shards=rows + data.verify.shards[1:])
    )
    assert ">FAILED<" in render_html(failed) and "cosine &lt;low&gt;" in render_html(failed)
    assert render_markdown(failed).startswith("**ane-moe: FAILED**, 1 gates failed")


@pytest.mark.parametrize(
    "document",
    [
        "",
        "{}",
        "[]",
        '{"decode": [{}]}',
        json.dumps(BENCH | {"conditions": {"label": 3}}),
        json.dumps(BENCH | {"device_figures": "yes"}),
    ],
)
def test_a_file_that_is_no_bench_is_refused(data, tmp_path, document):
    (tmp_path / "bench.json").write_text(document)
    with pytest.raises(UserError, match="not a saved bench"):
        gather(Path(data.folder), bench=tmp_path / "bench.json")


def test_the_command_writes_both_forms(data, tmp_path):
    paths = ["--html", str(tmp_path / "r.html"), "--markdown", str(tmp_path / "r.md")]
    result = CliRunner().invoke(
        app, ["report", data.folder, "--no-verify", "--runtime", "reference", *paths]
    )
    assert result.exit_code == 0, result.output
    assert (
        "<h2>Conditions" in (tmp_path / "r.html").read_text()
        and "Made with" in (tmp_path / "r.md").read_text()
    )


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine to look at the page with")
@pytest.mark.parametrize("width", [1200, 390])
def test_a_browser_shows_it_without_errors_or_sideways_scrolling(data, tmp_path, width):
    probe, picture = tmp_path / "probe.html", tmp_path / "page.png"
    probe.write_text(PROBE % (width, escaping.escape(render_html(data))), encoding="utf-8")
    base = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1300,1000"]
    seen = subprocess.run(
        [*base, "--dump-dom", probe.as_uri()], capture_output=True, text=True, timeout=120
    )
    assert "CONSOLE" not in seen.stderr, seen.stderr
    found = json.loads(escaping.unescape(re.search(r'<pre id="o">(.*?)</pre>', seen.stdout)[1]))
    assert found["width"] <= width and found["headings"] >= 7 and found["height"] > 1500
    assert len(found["plots"]) == 4 and all(200 < plot <= width for plot in found["plots"])
    subprocess.run(
        [*base, f"--screenshot={picture}", probe.as_uri()],
        capture_output=True,
        timeout=120,
        check=True,
    )
    assert matplotlib.image.imread(picture)[:, :, :3].std() > 0.02


def test_bench_writes_its_figures_as_a_page(data, tmp_path):
    short = ["--runs", "1", "--warmup", "0", "--tokens", "2", "--fills", "0", "--lengths", "32"]
    page = tmp_path / "bench.html"
    result = CliRunner().invoke(
        app, ["bench", data.folder, "--runtime", "reference", *short, "--html", str(page)]
    )
    assert result.exit_code == 0, result.output
    assert "Where the time goes" in page.read_text() and "NOT A DEVICE" in page.read_text()
