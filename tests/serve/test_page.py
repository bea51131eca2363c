"""The page, used in a real browser: narrow and wide, by day and by night."""

import re

import matplotlib.image
import numpy as np
import pytest

VIEWS = [(width, scheme) for width in (1200, 390) for scheme in ("light", "dark")]


def look(browser, server, width, scheme, path):
    """The page is quiet, fits, asks nobody else, and is as bright as it should be."""
    assert browser.logged == []
    assert all(url.startswith((server.url, "data:", "about:")) for url in browser.asked)
    assert browser.run("document.documentElement.scrollWidth") <= width
    pixels = matplotlib.image.imread(browser.picture(path))[:, :, :3]
    assert pixels.std() > 0.02 and (np.median(pixels) > 0.5) == (scheme == "light")


@pytest.mark.parametrize("width, scheme", VIEWS)
def test_a_conversation(browser, server, tmp_path, width, scheme):
    browser.show(width, scheme, f"{server.url}/")
    browser.wait('document.getElementById("name").textContent === "tiny"')
    for turn in (1, 2):
        browser.run(
            'document.getElementById("most").value = 6;'
            'document.getElementById("text").value = "01234567";'
            'document.getElementById("ask").requestSubmit()'
        )
        browser.wait(f'document.querySelectorAll("#talk small").length === {turn}')
    told = browser.run('[...document.querySelectorAll("#talk small")].map(e => e.textContent)')
    assert "6 new tokens" in told[0]
    assert int(re.search(r"(\d+) of them in the cache", told[1])[1]) >= len("<01234567>")
    browser.wait('document.querySelectorAll("#figures .card").length >= 8')
    browser.run('document.getElementById("show").click()')
    browser.wait('document.querySelector("iframe")')
    look(browser, server, width, scheme, tmp_path / f"chat-{width}-{scheme}.png")


def test_text_is_shown_as_text(browser, server):
    browser.show(800, "light", f"{server.url}/")
    browser.wait('document.getElementById("name").textContent === "tiny"')
    browser.run(
        'document.getElementById("text").value = "<img src=x onerror=alert(1)>";'
        'document.getElementById("ask").requestSubmit()'
    )
    browser.wait('document.querySelectorAll("#talk small").length === 1')
    assert browser.run('document.querySelectorAll("#talk img").length') == 0


@pytest.mark.parametrize("width, scheme", VIEWS)
def test_a_box_that_marks_what_is_private(browser, marker, tmp_path, width, scheme):
    browser.asked.clear()
    browser.show(width, scheme, f"{marker.url}/")
    browser.wait('!document.getElementById("filter").hidden')
    text = "call 555 or 🙂 <b>666</b>\\n" * 30
    browser.run(
        f'const box = document.getElementById("box"); box.value = "{text}";'
        'box.dispatchEvent(new Event("input"))'
    )
    browser.wait('document.querySelectorAll("#behind mark").length === 60')
    marks = browser.run('[...document.querySelectorAll("#behind mark")].map(e => e.textContent)')
    assert marks[:2] == ["555", "666"]
    boxes = browser.run(
        '["box", "behind"].map(id => { const e = document.getElementById(id);'
        "return [e.clientWidth, e.scrollHeight]; })"
    )
    assert boxes[0][0] == boxes[1][0] and abs(boxes[0][1] - boxes[1][1]) <= 30
    assert "[ACCOUNT_NUMBER]" in browser.run('document.getElementById("clean").textContent')
    look(browser, marker, width, scheme, tmp_path / f"filter-{width}-{scheme}.png")
