"""Law: a vote between two replies becomes the row that was meant, by consent alone; before it nothing names a model."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import httpx
import pytest
from playwright.sync_api import Browser, Route, expect

from serve.api.app import Settings
from serve.api.service import Defaults
from serve.feedback import Feedback
from tests.serving import Served, serving

KEY = "secret-of-the-tests"
MODELS = {"alpha": Defaults(temperature=0.9, top_k=40), "beta": Defaults(temperature=1.1)}
ORDERS = {"0.999": ["alpha", "beta"], "0": ["beta", "alpha"]}
"""What the page's random number is, and who is A and B then."""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("feedback") / "rows.jsonl"


@pytest.fixture(scope="module")
def served(path: Path) -> Iterator[Served]:
    with serving(Served(Settings(keys=(KEY,)), feedback=Feedback(path)), models=MODELS) as one:
        yield one


@pytest.fixture
def rows(path: Path, served: Served) -> Path:
    """The file of feedback, empty, known to the server."""
    path.write_text("")
    return path


class Opened:
    """The page with what it asked of the server."""

    def __init__(self, browser: Browser, served: Served, chance: str = "0", **options: Any):
        self.page = browser.new_page(**options)
        self.sent: dict[str, list[Any]] = {}
        self.wrong: list[str] = []
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("request", lambda one: self.sent.setdefault(one.url[len(served.address) :], []).append(one))
        self.page.add_init_script(
            f"Math.random = () => {chance}; sessionStorage.setItem('qmax.key', '{KEY}');"
            'localStorage["qmax.settings"] ??= JSON.stringify({max_tokens: "12", seed: "11"});'
        )
        self.page.goto(served.address)
        expect(self.page.locator("#compare")).to_be_visible()
        expect(self.page.locator("#rank")).to_be_visible()

    def bodies(self, path: str) -> list[Any]:
        return [one.post_data_json for one in self.sent.get(path, [])]

    def compare(self, text: str) -> list[str]:
        """Asks two models; what A and B said."""
        self.page.check("#compare")
        self.page.fill("#prompt", text)
        self.page.keyboard.press("Enter")
        expect(self.page.get_by_role("group", name="Which reply is better?")).to_be_visible(timeout=60_000)
        chats = self.page.evaluate("JSON.parse(localStorage.getItem('qmax.chats'))")
        return [side["content"] for side in chats[0]["messages"][-1]["duel"]["sides"]]

    def close(self) -> None:
        self.page.close()
        assert self.wrong == []


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


@pytest.mark.parametrize("chance", ORDERS)
@pytest.mark.parametrize(("label", "winner"), [("A is better", "a"), ("B is better", "b")])
def test_a_vote_by_keyboard(
    browser: Browser, served: Served, rows: Path, chance: str, label: str, winner: Literal["a", "b"]
) -> None:
    opened = Opened(browser, served, chance)
    page = opened.page
    page.check("#consent")
    texts = opened.compare("Judge this")
    assert texts[0] != texts[1] and all(texts)
    page.focus("#prompt")
    for _ in range(10):
        page.keyboard.press("Shift+Tab")
        if page.evaluate("document.activeElement.textContent") == label:
            break
    assert "alpha" not in page.content() and "beta" not in page.content()
    page.keyboard.press("Enter")
    a, b = ORDERS[chance]
    expect(page.locator(".outcome")).to_contain_text(f"A was {a}, B was {b}.")
    assert page.evaluate("document.activeElement.id") == "prompt", "the conversation goes on"
    assert [body["model"] for body in opened.bodies("/v1/chat/completions")] == [a, b]
    (row,) = map(json.loads, rows.read_bytes().splitlines())
    assert row["models"] == {"a": a, "b": b} and row["winner"] == winner
    better, worse = texts if winner == "a" else texts[::-1]
    assert row["chosen"] == said(better) and row["rejected"] == said(worse)
    assert row["prompt"] == [{"role": "user", "content": "Judge this"}]
    page.keyboard.type("And now?")
    page.keyboard.press("Enter")
    expect(page.locator(".votes")).to_be_visible(timeout=60_000)
    history = opened.bodies("/v1/chat/completions")[-1]["messages"]
    assert [message["content"] for message in history] == ["Judge this", better, "And now?"]
    opened.close()


def test_even_votes_and_going_on_from_the_other(browser: Browser, served: Served, rows: Path) -> None:
    opened = Opened(browser, served)
    page = opened.page
    page.check("#consent")
    texts = opened.compare("Hello")
    page.get_by_role("button", name="Equally good").click()
    expect(page.locator(".outcome")).to_contain_text("You found both good.")
    page.get_by_role("button", name="Go on from reply B").click()
    opened.compare("More")
    assert opened.bodies("/v1/chat/completions")[-1]["messages"][1]["content"] == texts[1]
    page.get_by_role("button", name="Both bad").click()
    expect(page.locator(".outcome")).to_have_count(2)
    even = [json.loads(line) for line in rows.read_bytes().splitlines()]
    assert [row["winner"] for row in even] == ["tie", "both_bad"]
    page.reload()
    page.get_by_role("button", name="Hello", exact=True).click()
    expect(page.locator(".outcome")).to_have_count(2)
    opened.close()


def test_nothing_is_sent_without_consent(browser: Browser, served: Served, rows: Path) -> None:
    opened = Opened(browser, served)
    page = opened.page
    opened.compare("Hello")
    page.get_by_role("button", name="A is better").click()
    expect(page.locator("#note")).to_contain_text("agree first")
    assert page.locator(".outcome").count() == 0 and "alpha" not in page.content()
    page.fill("#prompt", "And now?")
    page.keyboard.press("Enter")
    expect(page.locator("#note")).to_contain_text("vote on the two replies")
    page.get_by_role("button", name="Show the models without a vote").click()
    expect(page.locator(".outcome")).to_contain_text("No vote. A was beta, B was alpha.")
    assert "/v1/feedback" not in opened.sent and rows.read_text() == ""
    opened.close()


def test_what_was_stopped_cannot_be_judged(browser: Browser, served: Served) -> None:
    opened = Opened(browser, served)
    page = opened.page
    asked: list[Route] = []

    def first_alone(route: Route) -> None:
        asked.append(route)  # the second is never answered
        if len(asked) == 1:
            route.continue_()

    page.route("**/v1/chat/completions", first_alone)
    page.check("#compare")
    page.fill("#prompt", "Hello")
    page.keyboard.press("Enter")
    # Either side's request may be the first.
    done = page.get_by_role("region", name=re.compile("Reply [AB]")).locator(".body:not(.caret)")
    expect(done.first).not_to_have_text("")
    page.keyboard.press("Escape")
    expect(page.locator(".outcome")).to_contain_text("No vote.")
    assert page.locator(".votes").count() == 0
    opened.close()


def test_the_model_is_chosen_and_remembered(browser: Browser, served: Served) -> None:
    opened = Opened(browser, served)
    page = opened.page
    choice = page.get_by_label("Model", exact=True)
    expect(choice).to_have_value("alpha")
    assert page.locator("#temperature").input_value() == "0.9"
    choice.select_option("beta")
    assert page.locator("#temperature").input_value() == "1.1"
    expect(page).to_have_title("beta · qmax")
    page.reload()
    expect(choice).to_have_value("beta")
    page.fill("#prompt", "Hello")
    page.keyboard.press("Enter")
    expect(page.locator("article.assistant .tools")).to_contain_text("beta", timeout=60_000)
    (body,) = opened.bodies("/v1/chat/completions")
    assert (body["model"], body["temperature"], body["top_k"], body["max_completion_tokens"]) == ("beta", 1.1, 0, 12)
    opened.compare("Again")
    a, b = opened.bodies("/v1/chat/completions")[-2:]
    assert (a["model"], a["temperature"], b["model"], b["temperature"], b["top_k"]) == ("beta", 1.1, "alpha", 0.9, 40)
    opened.close()


def test_thinking_is_asked_of_models_that_think(browser: Browser, served: Served) -> None:
    opened = Opened(browser, served)
    page = opened.page
    about = httpx.get(f"{served.address}/ui/page.json").json()
    about["models"][1]["thinks"] = False
    page.route("**/ui/page.json", lambda route: route.fulfill(json=about))
    page.reload()
    thinking = page.get_by_label("Let it think first")
    expect(thinking).to_be_visible()
    page.get_by_label("Model", exact=True).select_option("beta")
    expect(thinking).to_be_hidden()
    opened.compare("Hello")
    expect(thinking).to_be_visible()
    beta, alpha = opened.bodies("/v1/chat/completions")
    assert "enable_thinking" not in beta and alpha["enable_thinking"] is True
    opened.close()


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (390, "light"), (1200, "dark"), (1200, "light")])
def test_the_ranking_is_drawn(browser: Browser, served: Served, rows: Path, width: int, scheme: Any) -> None:
    feedback = served.feedback
    assert feedback is not None
    for winner in ("a", "a", "b", "a", "tie"):
        feedback.arena(("alpha", "beta"), [{"role": "user", "content": "Hello"}], ("left", "right"), winner)
    opened = Opened(browser, served, viewport={"width": width, "height": 800}, color_scheme=scheme)
    page = opened.page
    opened.compare("A rather long message that has to be broken into lines on a telephone, as anybody would expect")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    a, b = (page.get_by_role("region", name=f"Reply {name}").bounding_box() for name in "AB")
    assert a is not None and b is not None
    assert (a["y"] == b["y"]) == (width > 760) and (a["x"] == b["x"]) == (width < 760)
    page.click("#rank")
    lines = page.locator("#standings tbody tr")
    expect(lines).to_have_count(2)
    assert [lines.nth(n).locator("th").inner_text() for n in range(2)] == ["alpha", "beta"]
    with httpx.Client(base_url=served.address, headers={"Authorization": f"Bearer {KEY}"}) as client:
        found = client.get("/v1/arena").json()
    assert found["votes"] == 5 and [one["wins"] for one in found["models"]] == [3, 1]
    for line, one in zip(lines.all(), found["models"], strict=True):
        assert (
            f"{one['rating']:.0f}" in line.inner_text()
            and f"{one['low']:.0f} to {one['high']:.0f}" in line.inner_text()
        )
        bar, dot, cell = (
            line.locator(name).bounding_box() for name in ("line:not(.mean)", "circle", "td:nth-child(3)")
        )
        assert bar is not None and dot is not None and cell is not None
        assert (
            cell["x"] <= bar["x"] <= dot["x"] + dot["width"] / 2 <= bar["x"] + bar["width"] <= cell["x"] + cell["width"]
        )
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.id") == "rank"
    opened.close()


ROW: dict[str, Any] = {
    "consent": True,
    "kind": "arena",
    "prompt": [{"role": "user", "content": "Hello"}],
    "a": {"model": "alpha", "reply": "left"},
    "b": {"model": "beta", "reply": "right"},
    "winner": "a",
}


@pytest.mark.parametrize(
    ("change", "status", "param", "said"),
    [
        ({"consent": False}, 400, "consent", "True"),
        ({"consent": None}, 400, "consent", "True"),
        ({"kind": "duel"}, 400, "kind", "one of vote, correction, arena"),
        ({"kind": None}, 400, "kind", "one of vote, correction, arena"),
        ({"winner": "c"}, 400, "winner", "'both_bad'"),
        ({"winer": "a"}, 400, "winer", "did you mean 'winner'?"),
        ({"reply": "left"}, 400, "reply", "not a parameter"),
        ({"b": {"model": "beta"}}, 400, "b.reply", "b.reply is missing"),
        ({"b": {"model": "beta", "reply": 1}}, 400, "b.reply", "valid string"),
        ({"b": {"model": "beta", "reply": "left"}}, 400, "winner", "neither of two equal replies"),
        ({"a": {"model": "alpha", "reply": ""}}, 400, "winner", "an empty reply"),
        ({"b": {"model": "bete", "reply": "right"}}, 404, "model", "did you mean 'beta'?"),
        ({"prompt": []}, 400, "prompt", "at least 1"),
        ({"prompt": [{"role": "usr", "content": "x"}]}, 400, "prompt", "'user'"),
        ({"kind": "vote"}, 400, "model", "model is missing"),
    ],
)
def test_what_is_no_vote_is_refused(
    served: Served, rows: Path, change: dict[str, Any], status: int, param: str, said: str
) -> None:
    with httpx.Client(base_url=served.address, headers={"Authorization": f"Bearer {KEY}"}) as client:
        answer = client.post("/v1/feedback", json={**ROW, **change})
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (status, param), error
        assert said in error["message"] and rows.read_text() == ""
        assert client.post("/v1/feedback", json=[]).status_code == 400
        assert client.post("/v1/feedback", json={**ROW, "winner": "tie"}).json() == {"object": "feedback", "kept": True}
    assert json.loads(rows.read_text())["winner"] == "tie"
    assert httpx.get(f"{served.address}/v1/arena").status_code == 401
