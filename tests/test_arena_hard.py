"""Law: Arena-Hard's verdicts, files and win rates are the official ones, and no question is paid for twice."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

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
