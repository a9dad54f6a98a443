"""Law: Arena-Hard's verdicts, files and win rates are the official ones, and no question is paid for twice."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import expit

from errors import UserError
from train.asking import Endpoint
from train.evaluation.arena import (
    Answer,
    ArenaQuestion,
    Game,
    Judgment,
    Style,
    arena_table,
    battles,
    judge_arena,
    judge_pair,
    read_answers,
    read_baseline,
    read_judgments,
    read_questions,
    verdict_of,
    write_answer,
)
from train.evaluation.arena_files import markdown_counts, prompts
from train.evaluation.arena_statistics import RIDGE, SCORES, fit_logistic, style_features

MODEL, BASE = "mine", "o3-mini-2025-01-31"
Judge = Callable[[str, str], str | int]
"""From the answers A and B what the judge says, or a status."""


def question(uid: str, category: str = "hard_prompt") -> ArenaQuestion:
    return ArenaQuestion(uid, category, "", f"What is {uid}? {{x}}", f"question.jsonl:{uid}")


def answer(uid: str, text: str, model: str = MODEL, tokens: int | None = None) -> Answer:
    return Answer(uid, model, text, Style(tokens, 0, 0, 0), f"{model}.jsonl:1")


QUESTIONS = [question(f"q{i}") for i in range(6)]
ANSWERS = {q.uid: answer(q.uid, f"short {q.uid}") for q in QUESTIONS}
BASELINE = {q.uid: answer(q.uid, f"a much longer text about {q.uid}", BASE) for q in QUESTIONS}


class Stub:
    """A judge; `calls` are the pairs of answers that it was shown."""

    def __init__(self, judge: Judge):
        self.judge, self.calls, self.bodies, self._lock = judge, list[tuple[str, str]](), list[Any](), threading.Lock()

    def respond(self, request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith("/models"):
            return httpx.Response(200, json={"data": [{"id": "judge"}]})
        body = json.loads(request.content)
        shown = body["messages"][1]["content"]
        a = shown.split("Assistant A's Answer|>\n")[1].split("\n<|The End")[0]
        b = shown.split("Assistant B's Answer|>\n")[1].split("\n<|The End")[0]
        with self._lock:
            self.calls.append((a, b))
            self.bodies.append(body)
            said = self.judge(a, b)
        if isinstance(said, int):
            return httpx.Response(said)
        return httpx.Response(200, json={"choices": [{"message": {"content": said}}]})

    def endpoint(self) -> Endpoint:
        return Endpoint("http://judge/v1", "judge", client=httpx.Client(transport=httpx.MockTransport(self.respond)))


def first_place(a: str, b: str) -> str:
    return "Compared at length. [[A>>B]]"


def longer(a: str, b: str) -> str:
    return "My final verdict is [[A>B]]" if len(a) > len(b) else "My final verdict is [[B>A]]"


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)


def judged(stub: Stub, path: Path, questions: list[ArenaQuestion] = QUESTIONS, **options: Any) -> list[Judgment]:
    return judge_arena(questions, ANSWERS, BASELINE, stub.endpoint(), path, **options)


def game(score: str | None) -> Game:
    return Game(score, {"answer": ""}, [])


def judgment(uid: str, first: str | None, second: str | None, category: str = "hard_prompt") -> Judgment:
    return Judgment(uid, category, "judge", MODEL, BASE, (game(first), game(second)))


@pytest.mark.parametrize(
    ("said", "verdict"),
    [
        ("[[A>>B]]", "A>>B"),
        ("First [[A>B]], but no: [[B>>A]].", "B>>A"),
        ("a tie [[a=b]]", "A=B"),
        ("My verdict: [B>A]", "B>A"),
        ("[[A<<B]]", "A<<B"),
        ("Assistant A is better", None),
        ("[[AB]]", None),
        ("[[A>B", None),
        ("", None),
    ],
)
def test_the_last_verdict_counts(said: str, verdict: str | None) -> None:
    assert verdict_of(said) == verdict


def test_a_strong_verdict_is_three_wins_and_the_model_is_b_in_the_first_game() -> None:
    assert battles(judgment("q", "B>>A", "A=B")) == [0.5, 1, 1, 1]  # first game: B, the model, far better
    assert battles(judgment("q", "A>B", "A>>B")) == [1, 1, 1, 0]
    assert battles(judgment("q", "B>A", "B>>A")) == [0, 0, 0, 1]
    assert battles(judgment("q", None, "A>B")) is None
    assert battles(Judgment("q", "hard_prompt", "j", MODEL, BASE, (None, None))) is None


def test_every_verdict_and_its_mirror_are_worth_as_much() -> None:
    for verdict, won in SCORES.items():
        mirror = verdict.translate(str.maketrans("AB", "BA"))
        assert SCORES[mirror] == [1 - x for x in won]


def test_a_judge_that_likes_the_first_place_gives_half(tmp_path: Path) -> None:
    stub = Stub(first_place)
    table = arena_table(judged(stub, tmp_path / "j.jsonl"), ANSWERS, BASELINE, rounds=100)
    assert table == {"hard_prompt": {"score": 0.5, "low": 0.5, "high": 0.5, "n": 6, "unread": 0}}
    assert {call[::-1] for call in stub.calls} == set(stub.calls), "both orders are shown"


def test_a_judge_that_likes_length_gives_all_to_the_longer(tmp_path: Path) -> None:
    found = judged(Stub(longer), tmp_path / "j.jsonl")
    assert [one.games[0] and one.games[0].score for one in found] == ["A>B"] * 6, "the baseline is A in the first game"
    assert arena_table(found, ANSWERS, BASELINE)["hard_prompt"]["score"] == 0
    controlled = arena_table(found, ANSWERS, BASELINE, style_control=True, rounds=50)["hard_prompt"]
    assert all(value is not None and math.isfinite(value) for value in controlled.values())


def test_thoughts_of_a_judge_are_no_verdict(tmp_path: Path) -> None:
    thinking = Stub(lambda a, b: "<think>[[B>>A]]?</think>No: [[A=B]]" if "short" in a else "<think>Perhaps [[A>>B]]")
    found = judged(thinking, tmp_path / "j.jsonl", QUESTIONS[:1], tries=1)
    assert [one and (one.score, one.judgment) for one in found[0].games] == [
        (None, {"answer": ""}),
        ("A=B", {"answer": "No: [[A=B]]"}),
    ]


def test_words_without_a_verdict_are_asked_for_again_counted_and_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stub = Stub(lambda a, b: "I cannot say.")
    path = tmp_path / "j.jsonl"
    found = judged(stub, path, tries=3)
    assert len(stub.calls) == 6 * 2 * 3
    assert sorted({body["temperature"] for body in stub.bodies}) == [0, 0.5], "the same again would say the same"
    assert "12 of 12 verdicts cannot be read" in capsys.readouterr().err
    empty = {"score": None, "low": None, "high": None, "n": 0, "unread": 6}
    assert arena_table(found, ANSWERS, BASELINE) == {"hard_prompt": empty}
    gone = Stub(lambda a, b: 503)
    assert judged(gone, path) == found and not gone.calls, "they were answered, if badly"


def test_a_judge_that_is_down_twice_is_asked_until_it_answers(tmp_path: Path) -> None:
    down = [503, 500]
    stub = Stub(lambda a, b: down.pop() if down else longer(a, b))
    assert len(judged(stub, tmp_path / "j.jsonl", workers=1)) == 6
    assert len(stub.calls) == 12 + 2


def test_questions_that_the_judge_never_answers_are_asked_by_the_next_call(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, down = tmp_path / "j.jsonl", True
    stub = Stub(lambda a, b: 503 if down and "q1" in a else longer(a, b))
    assert [one.uid for one in judged(stub, path, tries=2)] == ["q0", "q2", "q3", "q4", "q5"]
    assert "did not answer 1 of 6" in capsys.readouterr().err
    down = False
    before = len(stub.calls)
    assert [one.uid for one in judged(stub, path)] == [q.uid for q in QUESTIONS]
    assert len(stub.calls) == before + 2
    with pytest.raises(UserError, match="answered nothing"):
        judged(Stub(lambda a, b: 503), tmp_path / "other.jsonl", tries=1)


@pytest.mark.parametrize("kept", [0, 1, 3, 6])
@pytest.mark.parametrize("torn", [0, 1, 40])
def test_a_killed_run_asks_only_for_what_it_has_not(tmp_path: Path, kept: int, torn: int) -> None:
    path = tmp_path / "deep" / "j.jsonl"
    whole = judged(Stub(longer), path, workers=3)
    lines = path.read_bytes().split(b"\n")[:-1]
    path.write_bytes(b"".join(line + b"\n" for line in lines[:kept]) + lines[-1][:torn])
    stub, seen = Stub(longer), list[tuple[int, int]]()
    assert judged(stub, path, progress=lambda *at: seen.append(at)) == whole
    assert len(stub.calls) == 2 * (6 - kept)
    assert seen == [(done, 6) for done in range(kept, 7)]
    assert sorted(one.uid for one in read_judgments(path)) == sorted(one.uid for one in whole)
    assert len(path.read_bytes().split(b"\n")) == 7


def test_a_whole_last_line_that_lacks_its_end_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    judged(Stub(longer), path, QUESTIONS[:2])
    path.write_bytes(path.read_bytes()[:-1])
    stub = Stub(longer)
    judged(stub, path)
    assert len(stub.calls) == 8 and len(read_judgments(path)) == 6


def test_judgments_of_something_else_are_not_taken_for_these(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    judged(Stub(longer), path)
    others = ANSWERS | {"q3": answer("q3", "another text")}
    with pytest.raises(UserError, match=r"j.jsonl:\d: the judge read other answers"):
        judge_arena(QUESTIONS, others, BASELINE, Stub(longer).endpoint(), path)
    renamed = {uid: answer(uid, one.text, "yours") for uid, one in ANSWERS.items()}
    with pytest.raises(UserError, match="the model was mine, and now it is yours"):
        judge_arena(QUESTIONS, renamed, BASELINE, Stub(longer).endpoint(), path)
    path.write_bytes(b"".join(path.read_bytes().splitlines(True)[:3]))
    named = Endpoint(
        "http://judge/v1", "judge", "gpt-4.1", httpx.Client(transport=httpx.MockTransport(Stub(longer).respond))
    )
    with pytest.raises(UserError, match=r"the judge was judge, and now it is gpt-4\.1"):
        judge_arena(QUESTIONS, ANSWERS, BASELINE, named, path)


def test_several_questions_are_judged_at_once(tmp_path: Path) -> None:
    meeting = threading.Barrier(3, timeout=10)

    def respond(request: httpx.Request) -> httpx.Response:
        if request.method == "POST":
            meeting.wait()  # passes only when three are there
        return Stub(longer).respond(request)

    endpoint = Endpoint("http://judge/v1", "judge", client=httpx.Client(transport=httpx.MockTransport(respond)))
    assert len(judge_arena(QUESTIONS, ANSWERS, BASELINE, endpoint, tmp_path / "j.jsonl", workers=3, tries=1)) == 6


def test_the_judge_of_creative_writing_writes_no_answer_of_its_own() -> None:
    stub = Stub(longer)
    with stub.endpoint() as endpoint:
        for category in ("hard_prompt", "creative_writing"):
            judge_pair(question("q0", category), ANSWERS["q0"], BASELINE["q0"], endpoint, judge="judge")
    system = [body["messages"][0]["content"] for body in stub.bodies]
    assert ["generating your own answer" in text for text in system] == [True, True, False, False]
    assert "What is q0? {x}" in stub.bodies[0]["messages"][1]["content"]
    assert "Apache-2.0" in prompts()["licence"]


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


OFFICIAL_ANSWER = {
    "uid": "u1",
    "ans_id": "x",
    "model": BASE,
    "messages": [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": {"answer": "# Yes", "thought": "-"}},
    ],
    "tstamp": 1744155079.1,
    "metadata": {
        "token_len": 17,
        "header_count": {"h1": 1, "h2": 2, "h3": 0, "h4": 0, "h5": 0, "h6": 0},
        "list_count": {"ordered": 3, "unordered": 4},
        "bold_count": {"**": 5, "__": 6},
    },
}


def test_official_rows_are_read_and_written(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", OFFICIAL_ANSWER)
    assert read_answers(path) == {"u1": Answer("u1", BASE, "# Yes", Style(17, 3, 7, 11), f"{path}:1")}
    row = {"uid": "u1", "category": "creative_writing", "subcategory": "creative_writing", "prompt": "Hi"}
    asked = read_questions(write(tmp_path / "q.jsonl", row))
    assert asked == [ArenaQuestion("u1", "creative_writing", "creative_writing", "Hi", f"{tmp_path / 'q.jsonl'}:1")]
    own = tmp_path / "mine.jsonl"
    write_answer(own, asked[0], MODEL, "<think>- [[A>B]]</think>\n\n**Well**\n- one\n", tokens=9)
    with own.open("ab") as file:
        file.write(b'{"uid": "u2", "mod')  # a killed writer
    assert list(read_answers(own)) == ["u1"]
    write_answer(own, question("u3"), MODEL, "plain")
    answers = read_answers(own)
    assert [(one.text, one.style) for one in answers.values()] == [
        ("**Well**\n- one", Style(9, 0, 1, 1)),
        ("plain", Style(None, 0, 0, 0)),
    ]
    written = [json.loads(line) for line in own.read_text(encoding="utf-8").splitlines()]
    assert (
        written[0].keys() == OFFICIAL_ANSWER.keys()
        and written[0]["metadata"].keys() == OFFICIAL_ANSWER["metadata"].keys()
    )
    assert "token_len" not in written[1]["metadata"]


def test_judgments_have_the_official_keys(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    found = judged(Stub(longer), path, workers=1)
    row = json.loads(path.read_text(encoding="utf-8").splitlines()[0])
    assert list(row) == ["uid", "category", "judge", "model", "baseline", "games"]
    assert [list(one) for one in row["games"]] == [["score", "judgment", "prompt"]] * 2
    assert row["games"][1]["judgment"] == {"answer": "My final verdict is [[B>A]]"}
    assert [turn["role"] for turn in row["games"][0]["prompt"]] == ["system", "user"]
    assert read_judgments(path) == found
    official = {**row, "uid": "z", "games": [None, row["games"][1]]}
    assert battles(read_judgments(write(tmp_path / "z.jsonl", official))[0]) is None


def test_marks_of_markdown_are_counted_outside_of_code() -> None:
    text = "# A\n## B\n```py\n# c\n- d\n```\n1. x\n 2. y\n- z\n* **bold** and __too__\n+ **not\nbold**\n####### no\n"
    counts = markdown_counts(text)
    assert counts["header_count"] == {"h1": 1, "h2": 1, "h3": 0, "h4": 0, "h5": 0, "h6": 0}
    assert counts["list_count"] == {"ordered": 2, "unordered": 3}
    assert counts["bold_count"] == {"**": 1, "__": 1}


GOOD = {"uid": "u1", "category": "hard_prompt", "subcategory": "math", "prompt": "Hi"}


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{**GOOD, "category": "hard_promt"}], r"q.jsonl:1: no category is called 'hard_promt'; did you mean 'hard_pr"),
        ([GOOD, {**GOOD, "category": "poems"}], r"q.jsonl:2: no category is called 'poems'; there is hard_prompt"),
        ([GOOD, {"category": "math", "prompt": "x"}], r"q.jsonl:2: the row has no 'uid'"),
        ([GOOD, GOOD], r"q.jsonl:2: question u1 is at .*q.jsonl:1 already"),
        ([GOOD, [1]], r"q.jsonl:2: a JSON list"),
        ([], r"q.jsonl has no question"),
    ],
)
def test_bad_questions_are_named_by_file_and_line(tmp_path: Path, rows: list[Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        read_questions(write(tmp_path / "q.jsonl", *rows))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"uid": None}, r"a.jsonl:2: 'uid' is NoneType"),
        ({"messages": []}, r"a.jsonl:2: the last of 'messages' has no text"),
        ({"messages": [{"role": "assistant", "content": {"text": "x"}}]}, r"a.jsonl:2: the last of 'messages'"),
        ({"metadata": {"token_len": "many"}}, r"a.jsonl:2: 'metadata' has other counts"),
    ],
)
def test_bad_answers_are_named_by_file_and_line(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        read_answers(write(tmp_path / "a.jsonl", OFFICIAL_ANSWER, {**OFFICIAL_ANSWER, **change}))


def test_a_torn_line_is_dropped_at_the_end_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", OFFICIAL_ANSWER)
    path.write_text('{"uid": "u0"\n' + path.read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(UserError, match=r"a.jsonl:1: not JSON"):
        read_answers(path)
    path.write_text('{"uid": "u0"\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"a.jsonl:1: not JSON"):
        read_answers(path)
    with pytest.raises(UserError, match=r"did you mean 'a\.jsonl'"):
        read_answers(tmp_path / "aa.jsonl")


def test_missing_answers_are_said_before_anything_is_asked(tmp_path: Path) -> None:
    stub, some = Stub(longer), {uid: one for uid, one in ANSWERS.items() if uid != "q2"}
    with pytest.raises(UserError, match=r"question.jsonl:q2: the model has no answer to question q2 in mine.jsonl"):
        judge_arena(QUESTIONS, some, BASELINE, stub.endpoint(), tmp_path / "j.jsonl")
    with pytest.raises(UserError, match=r"question.jsonl:q0: the baseline has no answer"):
        judge_arena(QUESTIONS, ANSWERS, {}, stub.endpoint(), tmp_path / "j.jsonl")
    assert not stub.calls


def test_each_category_has_its_baseline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = write(tmp_path / "o3.jsonl", OFFICIAL_ANSWER, {**OFFICIAL_ANSWER, "uid": "u2"})
    two = write(
        tmp_path / "gemini.jsonl",
        *({**OFFICIAL_ANSWER, "uid": u, "model": "gemini-2.0-flash-001"} for u in ("u1", "u2")),
    )
    asked = [question("u1"), question("u2", "creative_writing")]
    assert [a.model for a in read_baseline(asked, [two, one]).values()] == [BASE, "gemini-2.0-flash-001"]
    assert not capsys.readouterr().err
    assert [a.model for a in read_baseline(asked, [one]).values()] == [BASE, BASE]
    assert "creative_writing is compared with o3-mini" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"question.jsonl:u9: no baseline answers question u9.*gemini"):
        read_baseline([question("u9", "creative_writing")], [one])


def test_win_rates_are_means_over_comparisons_per_category() -> None:
    rows = [
        judgment("q0", "B>>A", "A>>B"),  # 3 + 3 wins of 6
        judgment("q1", "A>B", "B>A"),  # 0 of 2
        judgment("q2", "A=B", "A>B"),  # 0.5 + 1 of 2
        judgment("q3", "A>>B", None),  # does not count
        judgment("c0", "A>>B", "A=B", "creative_writing"),  # 0.5 of 4
    ]
    table = arena_table(rows, {}, {}, rounds=1000)
    assert table["hard_prompt"]["score"] == 7.5 / 10
    assert table["hard_prompt"]["n"] == 3 and table["hard_prompt"]["unread"] == 1
    assert table["creative_writing"] == {"score": 0.125, "low": 0.125, "high": 0.125, "n": 1, "unread": 0}
    # Of 27 draws of three questions one is q1 alone, 0, and one q0 alone, 1: both lie beyond 2.5 %.
    assert (table["hard_prompt"]["low"], table["hard_prompt"]["high"]) == (0.0, 1.0)


def test_the_interval_is_that_of_the_normal_distribution_where_questions_are_many() -> None:
    rows = [judgment(f"q{i}", *(("B>A", "A>B") if i % 5 < 2 else ("A>B", "B>A"))) for i in range(500)]
    got = arena_table(rows, {}, {}, rounds=1000, seed=3)["hard_prompt"]
    half = 1.96 * math.sqrt(0.4 * 0.6 / 500)  # a question's two verdicts are one observation
    assert got["score"] == 0.4
    assert got["low"] == pytest.approx(0.4 - half, abs=0.006) and got["high"] == pytest.approx(0.4 + half, abs=0.006)
    assert got == arena_table(rows, {}, {}, rounds=1000, seed=3)["hard_prompt"]
    assert got != arena_table(rows, {}, {}, rounds=1000, seed=4)["hard_prompt"]


def test_features_of_style_are_those_of_a_sum_by_hand() -> None:
    ours = {"q": Answer("q", MODEL, "x", Style(300, 3, 0, 6))}
    other = {"q": Answer("q", BASE, "y", Style(100, 1, 2, 0))}
    a, b = np.array([3, 0, 6]) / 301, np.array([1, 2, 0]) / 101
    want = [200 / 400, *((a - b) / (a + b + 1))]
    assert style_features([judgment("q", "A>B", "A>B")], ours, other)[0] == pytest.approx(want)
    unknown = {"q": Answer("q", MODEL, "x" * 12, Style(None, 0, 0, 0))}
    lengths = {"q": Answer("q", BASE, "é" * 2, Style(900, 0, 0, 0))}  # measured alike: 12 bytes and 4
    assert style_features([judgment("q", "A>B", "A>B")], unknown, lengths)[0] == pytest.approx([0.5, 0, 0, 0])
    nothing = {"q": Answer("q", MODEL, "", Style(None, 0, 0, 0))}
    assert style_features([judgment("q", "A>B", "A>B")], nothing, nothing)[0] == pytest.approx([0, 0, 0, 0])
    with pytest.raises(UserError, match="the baseline has no answer to question q"):
        style_features([judgment("q", "A>B", "A>B")], ours, {})


def styled(seed: int, count: int) -> tuple[list[Judgment], dict[str, Answer], dict[str, Answer]]:
    """Judgments by a judge that likes length and bold words."""
    random = np.random.default_rng(seed)
    rows, ours, others = [], {}, {}
    for i in range(count):
        uid, verdicts = f"q{i}", ["B>>A", "B>A", "A=B", "A>B", "A>>B"]
        a, b = (Style(int(random.integers(50, 900)), *(int(v) for v in random.integers(0, 9, 3))) for _ in range(2))
        ours[uid], others[uid] = Answer(uid, MODEL, "", a), Answer(uid, BASE, "", b)
        like = 2 * math.log((a.tokens or 1) / (b.tokens or 1)) + 0.1 * (a.bold - b.bold) + random.normal(0, 1.5) - 0.5
        place = int(np.clip(round(like), -2, 2))
        rows.append(judgment(uid, verdicts[2 - place], verdicts[2 + place]))
    return rows, ours, others


def test_style_control_is_the_official_regression() -> None:
    """Against another minimiser, over comparisons one by one with a strength for each side, as the official code."""
    rows, ours, others = styled(1, 120)
    x, y = [], []
    for row in rows:
        a, b = ours[row.uid].style, others[row.uid].style
        da = np.array([a.headers, a.lists, a.bold]) / ((a.tokens or 0) + 1)
        db = np.array([b.headers, b.lists, b.bold]) / ((b.tokens or 0) + 1)
        one = [((a.tokens or 0) - (b.tokens or 0)) / ((a.tokens or 0) + (b.tokens or 0)), *((da - db) / (da + db + 1))]
        won = battles(row) or []
        x += [one] * len(won)
        y += won
    raw, y = np.array(x), np.array(y)
    z = (raw - raw.mean(0)) / raw.std(0, ddof=1)
    features = np.column_stack((np.ones(len(y)), -np.ones(len(y)), z))  # the model's strength, the baseline's, style

    def loss(theta: np.ndarray) -> float:
        logits = features @ theta
        return float(np.sum(np.logaddexp(0, logits) - y * logits))

    def slope(theta: np.ndarray) -> np.ndarray:
        return features.T @ (1 / (1 + np.exp(-features @ theta)) - y)

    best = minimize(loss, np.full(6, 0.5), jac=slope, method="BFGS", options={"gtol": 1e-8}).x
    rate = math.exp(best[0]) / (math.exp(best[0]) + math.exp(best[1]))
    got = arena_table(rows, ours, others, style_control=True, rounds=200)["hard_prompt"]
    assert got["score"] == pytest.approx(rate, abs=1e-6)
    alike = best[0] - best[1] - best[2:] @ (raw.mean(0) / raw.std(0, ddof=1))
    assert got["equal_style"] == pytest.approx(1 / (1 + math.exp(-alike)), abs=1e-6)
    assert got["low"] is not None and got["high"] is not None and got["low"] < rate < got["high"]


def test_what_length_alone_wins_goes_away_where_styles_are_alike() -> None:
    """By length is judged, and the model is mostly longer: half of the wins are left at equal style."""
    random = np.random.default_rng(0)
    rows, ours, others = [], {}, {}
    for i in range(400):
        uid, longer_by = f"q{i}", random.normal(0.2, 0.3)
        ours[uid] = answer(uid, "", MODEL, int(1000 * (1 + longer_by)))
        others[uid] = answer(uid, "", BASE, 1000)
        wins = random.random() < 1 / (1 + math.exp(-25 * longer_by / (2 + longer_by)))
        rows.append(judgment(uid, *(("B>A", "A>B") if wins else ("A>B", "B>A"))))
    got = arena_table(rows, ours, others, style_control=True, rounds=100)["hard_prompt"]
    plain = arena_table(rows, ours, others, rounds=100)["hard_prompt"]["score"]
    assert plain is not None and plain > 0.65
    low, high = got["equal_style_low"], got["equal_style_high"]
    assert low is not None and high is not None and low < 0.5 < high


def test_without_differences_in_style_control_changes_nothing() -> None:
    rows = [judgment("q0", "B>>A", "A>>B"), judgment("q1", "A>B", "B>A"), judgment("q2", "A=B", "A>B")]
    same = {f"q{i}": answer(f"q{i}", "", tokens=100) for i in range(3)}
    got = arena_table(rows, same, same, style_control=True, rounds=100)["hard_prompt"]
    plain = arena_table(rows, same, same, rounds=100)["hard_prompt"]
    assert got["score"] == pytest.approx(plain["score"], abs=1e-6) and got["equal_style"] == got["score"]
    assert got["low"] == pytest.approx(plain["low"], abs=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 12))
def test_coefficients_are_a_maximum_however_few_and_one_sided_the_verdicts(seed: int, count: int) -> None:
    """The slope is 0 there, also where all is won, or a feature parts wins from losses."""
    random = np.random.default_rng(seed)
    x = np.column_stack((np.ones(count), random.normal(size=(count, 2))))
    total = random.integers(2, 7, count).astype(float)
    won = total * random.integers(0, 2, count)
    theta = fit_logistic(x, total, won, np.ones((1, count)))[0]
    slope = x.T @ (won - total * expit(x @ theta)) - RIDGE * theta
    assert np.abs(slope).max() < 1e-6


def test_judgments_of_two_models_make_no_table() -> None:
    other = Judgment("q1", "hard_prompt", "judge", "yours", BASE, (game("A>B"), game("A>B")))
    with pytest.raises(UserError, match="mine, yours"):
        arena_table([judgment("q0", "A>B", "A>B"), other], {}, {})
    with pytest.raises(UserError, match="no model"):
        arena_table([], {}, {})
