"""Law: the chat page does what it shows, in a real browser; nothing that a model writes runs in it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
from playwright.sync_api import Browser, Page, expect

from serve.api.app import Settings
from serve.feedback import Feedback
from tests.serving import Served, serving


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("feedback") / "rows.jsonl"


@pytest.fixture(scope="module")
def served(rows: Path) -> Iterator[Served]:
    with serving(Served(Settings(), feedback=Feedback(rows))) as one:
        yield one


@pytest.fixture
def page(browser: Browser, served: Served) -> Iterator[Page]:
    """The page, its model known; whatever the browser complains of fails the test."""
    one = browser.new_page()
    wrong: list[str] = []
    one.on("pageerror", lambda error: wrong.append(str(error)))
    one.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    one.goto(served.address)
    expect(one.locator("#model")).to_have_text("tiny")
    one.fill("#max_tokens", "30")
    yield one
    assert wrong == []
    one.close()


def ask(page: Page, text: str) -> None:
    before = page.locator("article.assistant").count()
    page.fill("#prompt", text)
    page.keyboard.press("Enter")
    expect(page.locator("article.assistant").nth(before).locator(".tools")).to_be_visible(timeout=60_000)


def test_a_conversation_that_is_kept(page: Page) -> None:
    ask(page, "Hello")
    ask(page, "And more")
    assert page.locator("article").count() == 4
    assert "tokens/s" in page.locator("#rate").inner_text()
    said = page.locator("article.assistant .body").first.inner_text()
    page.reload()
    page.get_by_role("button", name="Hello", exact=True).click()
    assert page.locator("article").count() == 4
    assert page.locator("article.assistant .body").first.inner_text() == said


def test_stop_again_and_edit(page: Page, served: Served) -> None:
    page.fill("#max_tokens", "2000")
    page.fill("#prompt", "Hello")
    page.keyboard.press("Enter")
    expect(page.locator("#send")).to_have_text("Stop")
    page.keyboard.press("Escape")
    expect(page.locator("#send")).to_have_text("Send")
    page.wait_for_timeout(500)
    assert served.services["tiny"].runner.unfinished == 0, "the server has stopped too"
    page.fill("#max_tokens", "5")
    ask(page, "Short")
    page.get_by_role("button", name="Replace this reply by another").last.click()
    expect(page.locator("#send")).to_have_text("Send")
    page.fill("#prompt", "")
    page.focus("#prompt")
    page.keyboard.press("ArrowUp")
    page.locator("article.user textarea").fill("Shorter")
    page.keyboard.press("Control+Enter")
    expect(page.locator("article.user .body").last).to_have_text("Shorter")


def test_feedback_needs_consent_and_becomes_rows(page: Page, rows: Path) -> None:
    ask(page, "Judge this")
    good = page.get_by_role("button", name="This is a good reply").last
    good.click()
    expect(page.locator("#note")).to_contain_text("agree first")
    assert rows.read_text() == ""
    page.check("#consent")
    good.click()
    expect(page.get_by_role("button", name="This is a good reply").last).to_have_attribute("aria-pressed", "true")
    page.get_by_role("button", name="Write what the reply should have been").last.click()
    page.locator("article.assistant textarea").fill("Better words")
    page.get_by_role("button", name="Keep this correction").click()
    expect(page.locator("article.assistant .body").last).to_have_text("Better words")
    vote, correction = map(json.loads, rows.read_bytes().splitlines())
    assert vote["label"] is True and vote["prompt"] == [{"role": "user", "content": "Judge this"}]
    assert correction["chosen"] == [{"role": "assistant", "content": "Better words"}]
    assert correction["rejected"] == vote["completion"]


def test_one_model_replies_twice(page: Page) -> None:
    """The same words twice leave nothing to prefer; drawn at a temperature the two differ, also with one seed."""
    group = page.get_by_role("group", name="Which reply is better?")
    page.check("#compare")
    page.fill("#prompt", "Hello")
    page.keyboard.press("Enter")
    expect(group).to_be_visible(timeout=60_000)
    enabled = group.locator("button:enabled")
    assert enabled.all_inner_texts() == ["Equally good", "Both bad", "No vote"]
    enabled.last.click()
    expect(page.locator(".outcome")).to_contain_text("Both were tiny.")
    page.fill("#temperature", "1")
    page.fill("#seed", "3")
    page.get_by_role("button", name="Ask for two other replies").click()
    expect(group).to_be_visible(timeout=60_000)
    assert enabled.count() == 5
    one, other = page.locator(".sides .body").all_inner_texts()
    assert one != other


EVIL = """<img src=x onerror="window.ran=1"> [go](javascript:window.ran=1) **<script>window.ran=1</script>**

```html
<b>shown</b>
```
| a | b |
|---|---|
| 1 | `2` |

1. one
2. two
   - inner
"""


def test_what_a_model_writes_is_shown_and_does_not_run(page: Page) -> None:
    found = page.evaluate(
        """async (text) => {
            const { render } = await import("/ui/markdown.js");
            const target = document.createElement("div");
            document.body.append(target);
            render(target, text);
            await new Promise((done) => setTimeout(done, 100));
            const names = [...target.querySelectorAll("*")].map((one) => one.localName);
            return { ran: window.ran, names, text: target.textContent };
        }""",
        EVIL,
    )
    assert found.get("ran") is None
    assert not {"img", "script", "b", "a"} & set(found["names"])
    assert {"table", "pre", "ol", "ul", "strong"} <= set(found["names"])
    assert "<b>shown</b>" in found["text"] and "<img src=x" in found["text"]


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (390, "light"), (1200, "dark")])
def test_it_fits_and_has_names(browser: Browser, served: Served, width: int, scheme: Literal["dark", "light"]) -> None:
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page.goto(served.address)
    expect(page.locator("#model")).to_have_text("tiny")
    assert page.evaluate("document.documentElement.dataset.theme") == scheme
    ask(page, "A rather long message that has to be broken into lines on a telephone, as anybody would expect it")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    page.click("#theme")
    assert page.evaluate("document.documentElement.dataset.theme") != scheme
    nameless = page.evaluate(
        """[...document.querySelectorAll("button, input, textarea, select")].filter((one) =>
            !(one.getAttribute("aria-label") || one.textContent.trim() || one.title || one.labels?.length))
            .map((one) => one.outerHTML)"""
    )
    assert nameless == []
    page.close()
