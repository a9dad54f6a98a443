"""Law: `qmax eval` measures what a grader and the model's own log-probabilities say, and loses no row of it."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import jax
import numpy as np
import pytest

import qmax
from model.load import load_model
from terminal import progress_bar
from train.evaluation.answerer import Ask, Reply, Settings, Tell
from train.evaluation.arena_task import ArenaHard, Judge, measure_arena
from train.evaluation.local import Local, fingerprint
from train.evaluation.measuring import measure_likelihoods, measure_replies
from train.evaluation.pieces import make_pieces
from train.evaluation.remote import Remote, text_of
from train.evaluation.results import compare, read_results, write_results
from train.evaluation.verb import eval_main, file_name
from train.report import write_report
from train.scoring import Scorer
from train.tasks.catalogue import open_any
from train.tasks.likelihood import Continuation, Likelihood, Part, estimate

MODEL = Path(__file__).parent / "data" / "stories260K.bin"


@pytest.fixture(scope="module")
def local() -> Local:
    return Local(MODEL, slots=4, batch_tokens=1024)


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


class Told:
    """Answers as it is told, and counts what it is asked."""

    name, fingerprint = "told", "told"

    def __init__(self, says: dict[str, str], stops_after: int = 10**9):
        self.says, self.asked, self.stops_after = says, 0, stops_after

    def replies(self, asked: Sequence[Ask], settings: Settings) -> Iterator[tuple[int, Reply]]:
        for index in reversed(range(len(asked))):
            if self.asked == self.stops_after:
                raise KeyboardInterrupt
            self.asked += 1
            yield index, Reply(self.says.get(asked[index].problem.prompt[-1]["content"], ""), tokens=3)

    def likelihoods(self, asked: Sequence[Continuation], tell: Tell) -> list[Likelihood]:
        self.asked += len(asked)
        return [Likelihood(-float(len(text)), text == " B") for _, text in asked]


def replies_of(task: str, who: Any, rows: Path, limit: int | None = None, **drawn: Any) -> Any:
    with progress_bar("test", None) as bar:
        return measure_replies(task, open_any(task), who, Settings(**drawn), limit, rows, bar)


def likelihoods_of(task: str, who: Any, rows: Path, limit: int | None = None) -> Any:
    with progress_bar("test", None) as bar:
        return measure_likelihoods(task, open_any(task), who, limit, rows, bar)


# ---- estimates -------------------------------------------------------------------------
def test_standard_errors_by_hand() -> None:
    found = estimate([Part(1.0), Part(0.0), Part(1.0), Part(1.0)])
    assert found.value == 0.75
    assert found.stderr == pytest.approx(math.sqrt(0.75 * 0.25 / 3))  # s / sqrt(n), s^2 = n p (1 - p) / (n - 1)
    ratio = estimate([Part(2.0, 1.0), Part(6.0, 3.0)])  # both are two a unit: no doubt at all
    assert ratio == (2.0, 0.0)
    bits = estimate([Part(math.log(2) * 3, 1.0), Part(math.log(2), 1.0)], "bits")
    assert bits.value == pytest.approx(2.0)
    perplexity = estimate([Part(math.log(8.0), 1.0), Part(math.log(2.0), 1.0)], "exp")
    assert perplexity.value == pytest.approx(4.0)
    assert perplexity.stderr == pytest.approx(4.0 * math.log(8.0 / 2.0) / 2)
    assert math.isnan(estimate([Part(1.0)]).stderr) and math.isnan(estimate([]).value)


# ---- replies -----------------------------------------------------------------------------
def test_replies_are_graded_by_the_task(tmp_path: Path) -> None:
    rows = [{"prompt": f"What is {n}?", "answer": str(n)} for n in range(4)]
    task = f"jsonl:{write(tmp_path / 'rows.jsonl', rows)}?grader=number"
    who = Told({"What is 0?": "It is 0.", "What is 1?": "2", "What is 2?": "<think>3</think>2", "What is 3?": "no"})
    found = replies_of(task, who, tmp_path / "out.jsonl")
    assert (found.score.value, found.n, found.tokens) == (0.5, 4, 12)
    kept = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["score"] for row in kept] == [1, 0, 1, 0], "rows stand in the task's order"
    assert kept[2]["reply"] == "<think>3</think>2"


def test_what_was_asked_is_not_asked_again(tmp_path: Path) -> None:
    rows = [{"prompt": f"What is {n}?", "answer": str(n)} for n in range(6)]
    task, out = f"jsonl:{write(tmp_path / 'rows.jsonl', rows)}?grader=number", tmp_path / "out.jsonl"
    says = {f"What is {n}?": str(n % 2) for n in range(6)}
    with pytest.raises(KeyboardInterrupt):
        replies_of(task, Told(says, stops_after=4), out)
    assert len(out.read_text().splitlines()) == 4
    with out.open("a") as file:
        file.write('{"key": "torn')  # as a kill leaves it
    rest = Told(says)
    found = replies_of(task, rest, out)
    assert (rest.asked, found.score.value) == (2, pytest.approx(2 / 6))
    fewer = Told(says)
    assert replies_of(task, fewer, out, limit=3).n == 3 and fewer.asked == 0
    assert len(out.read_text().splitlines()) == 6, "rows that a smaller limit leaves out stay"
    colder = Told(says)
    replies_of(task, colder, out, temperature=0.5)
    assert colder.asked == 6, "other settings are another question"
    other = Told(says)
    other.fingerprint = "another model"
    replies_of(task, other, out)
    assert other.asked == 6 and len(out.read_text().splitlines()) == 6


def test_several_samples_give_pass_at_k(tmp_path: Path) -> None:
    class Lucky(Told):
        def replies(self, asked: Sequence[Ask], settings: Settings) -> Iterator[tuple[int, Reply]]:
            for index, (problem, seed) in enumerate(asked):
                yield index, Reply("1" if seed == int(problem.answer == "1") else "9")

    rows = [{"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": "2"}]
    task = f"jsonl:{write(tmp_path / 'rows.jsonl', rows)}?grader=number"
    found = replies_of(task, Lucky({}), tmp_path / "out.jsonl", samples=4, temperature=1.0)
    values = {name: one.value for name, one in found.metrics.items()}
    # One of four samples is right in the first problem, none in the second: pass@2 = (1 - C(3,2)/C(4,2)) / 2.
    assert values == pytest.approx({"score": 0.125, "pass@1": 0.125, "pass@2": 0.25, "pass@4": 0.5})


def test_the_engine_answers(local: Local, tmp_path: Path) -> None:
    found = replies_of("arithmetic?digits=1&operations=+", local, tmp_path / "out.jsonl", limit=6, max_tokens=5)
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert found.n == len(rows) == 6 and all(0 < row["tokens"] <= 5 for row in rows)
    long = write(tmp_path / "long.jsonl", [{"prompt": "a b " * 2000, "answer": "1"}])
    assert replies_of(f"jsonl:{long}", local, tmp_path / "long.out").unfit == 1


# ---- log-probabilities --------------------------------------------------------------------
def test_choices_are_weighed_by_what_the_model_says(local: Local, tmp_path: Path) -> None:
    rows = [
        {"question": "Once upon a time there was a", "choices": ["little girl.", "quarterly report."], "answer": 0},
        {"question": "She said", "choices": ["thank you.", "xyz", "no"], "answer": "B"},
    ]
    task = f"arc:{write(tmp_path / 'arc.jsonl', rows)}"
    found = likelihoods_of(task, local, tmp_path / "out.jsonl")
    kept = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    model, tokenizer = load_model(MODEL)
    for row, said in zip(rows, kept, strict=True):
        context = f"Question: {row['question']}\nAnswer:"
        start = len(tokenizer.encode(context))
        wholes = [tokenizer.encode(f"{context} {choice}") for choice in row["choices"]]
        wanted = [sum(one or 0 for one in logprobs[start:]) for logprobs, _ in Scorer(model).score(wholes)]
        assert said["logprobs"] == pytest.approx(wanted, abs=1e-4)
    assert found.metrics["acc"].value == 0.5


def test_letters_of_a_question_cost_one_pass(local: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    contexts = ["Question one\nAnswer:", "And another question\nAnswer:"]
    asked = [Continuation(context, f" {letter}") for context in contexts for letter in "ABCD"]
    read: list[int] = []
    whole = Scorer.score_next
    monkeypatch.setattr(
        Scorer, "score_next", lambda self, rows, *rest: read.append(len(rows)) or whole(self, rows, *rest)
    )
    found = local.likelihoods(asked, lambda _: None)
    assert read == [2]
    model, tokenizer = load_model(MODEL)
    wholes = [tokenizer.encode(context + text) for context, text in asked]
    for (context, _), one, (logprobs, best) in zip(asked, found, Scorer(model).score(wholes), strict=True):
        start = len(tokenizer.encode(context))  # of some letters a space and the letter are two tokens
        assert one.logprob == pytest.approx(sum(v or 0 for v in logprobs[start:]), abs=1e-4)
        assert one.greedy == all(best[start:])


def test_greedy_is_what_the_model_would_have_written(local: Local) -> None:
    (_, reply), *_ = local.replies([Ask(open_any("arithmetic").problems("test")[0], 0)], Settings(max_tokens=4))
    assert reply.text
    model, tokenizer = load_model(MODEL)
    story = tokenizer.encode("Once upon a time")
    for _ in range(3):
        every = [[*story, token] for token in range(3, 512)]
        best = max(Scorer(model, 8192).score(every), key=lambda one: one.logprobs[-1] or -math.inf)
        assert best.best[-1]
        story.append(every[[one.best[-1] for one in Scorer(model, 8192).score(every)].index(True)][-1])


@pytest.mark.parametrize("length", [1, 7, 8, 9, 15, 16, 17, 40])
def test_each_token_of_a_long_text_is_foretold_once(length: int) -> None:
    class Letters:
        def encode(self, text: str) -> list[int]:
            return [ord(char) for char in text]

    text = "".join(chr(1000 + i) for i in range(length))
    pieces = make_pieces(Letters(), Continuation("", text), prefix=1, most=8)
    told = [token for row, start in pieces.rows for token in row[start:]]
    assert told == Letters().encode(text)
    assert all(len(row) <= 9 for row, _ in pieces.rows), "the model reads all but the last"
    assert all(len(row) == 9 for row, _ in pieces.rows) or length < 8
    cut = make_pieces(Letters(), Continuation(text, "yz"), prefix=1, most=8)
    assert cut.cut == (length + 2 > 9) and cut.rows[0][0][-2:] == [121, 122]
    assert cut.rows[0][0][cut.rows[0][1] :] == [121, 122]


def test_texts_give_bits_per_byte(local: Local, tmp_path: Path) -> None:
    texts = ["Once upon a time there was a dog. " * 40, "He ran."]
    task = f"text:{write(tmp_path / 'rows.jsonl', [{'text': text} for text in texts])}"
    found = likelihoods_of(task, local, tmp_path / "out.jsonl")
    bits = found.metrics["bits_per_byte"].value
    assert 0.1 < bits < 4
    size = sum(len(text) for text in texts)
    words = sum(len(text.split(" ")) for text in texts)
    assert found.metrics["byte_perplexity"].value == pytest.approx(2**bits)
    assert found.metrics["word_perplexity"].value == pytest.approx(2 ** (bits * size / words))


# ---- forms of rows ---------------------------------------------------------------------------
def test_forms_of_choices(tmp_path: Path) -> None:
    mmlu = write(
        tmp_path / "mmlu.jsonl",
        [{"question": "Q? ", "choices": ["a", "b"], "answer": 1, "subject": "abstract_algebra"}],
    )
    (item,) = open_any(f"mmlu:{mmlu}").items("test")
    heading = "The following are multiple choice questions (with answers) about abstract algebra.\n\n"
    assert item.asked == ((f"{heading}Q?\nA. a\nB. b\nAnswer:", " A"), (f"{heading}Q?\nA. a\nB. b\nAnswer:", " B"))
    assert item.answer == 1
    (shown,) = open_any(f"mmlu:{mmlu}?shots=1&shots_path={mmlu}").items("test")
    solved = "Q?\nA. a\nB. b\nAnswer: B\n\n"
    assert shown.asked[0][0] == f"{heading}{solved}Q?\nA. a\nB. b\nAnswer:"
    ceval = write(
        tmp_path / "ceval.jsonl", [{"question": "问", "A": "甲", "B": "乙", "C": "丙", "D": "丁", "answer": "C"}]
    )
    (item,) = open_any(f"ceval:{ceval}").items("test")
    assert item.asked[2] == ("问\nA. 甲\nB. 乙\nC. 丙\nD. 丁\n答案：", " C") and item.answer == 2
    arc = write(
        tmp_path / "arc.jsonl",
        [{"question": "Q", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2", "id": "m1"}],
    )
    (item,) = open_any(f"arc:{arc}").items("test")
    assert (item.id, item.answer, item.asked[1]) == ("m1", 1, ("Question: Q\nAnswer:", " y"))
    swag = {"ctx_a": "A man [x] sits.", "ctx_b": "he", "endings": ["stands. [title] Up", "flies."], "label": "0"}
    path = write(tmp_path / "swag.jsonl", [{**swag, "activity_label": "Sitting"}])
    (item,) = open_any(f"hellaswag:{path}").items("test")
    assert item.asked[0] == ("Sitting: A man sits. He", " stands.. Up")
    wiki = write(tmp_path / "w.jsonl", [{"text": ' = A = \n He said , " well @-@ known " to Jr . , too . \n'}])
    (item,) = open_any(f"wikitext:{wiki}").items("test")
    assert item.asked[0].text == ' = A =\nHe said, "well-known" to Jr., too.\n'


@pytest.mark.parametrize(
    ("task", "row", "words"),
    [
        ("mmlu", {"question": "Q", "choices": ["a"], "answer": 0}, "2 to 10 choices"),
        ("mmlu", {"question": "Q", "choices": ["a", "b"], "answer": 2}, "none of the 2 choices"),
        ("arc", {"question": "Q", "choices": ["a", "b"], "answer": "Z"}, "none of the 2 choices"),
        ("lambada", {"text": "word"}, "one word only"),
        ("text", {"text": "  "}, "empty"),
        ("arc", {"qestion": "Q", "choices": ["a", "b"], "answer": 0}, "did you mean"),
    ],
)
def test_bad_rows_are_named(
    task: str, row: dict[str, Any], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "rows.jsonl", [row])
    assert qmax.main(["eval", str(MODEL), "--tasks", f"{task}:{path}"]) == 2
    said = capsys.readouterr().err
    assert words in said and ((task == "arc" and "mean" in words) or "rows.jsonl" in said)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--tasks", "arithmetic"], "a MODEL or an --endpoint"),
        ([str(MODEL)], "needs --tasks"),
        ([str(MODEL), "--tasks", "mlu:x"], "did you mean 'mmlu'"),
        ([str(MODEL), "--tasks", "arithmetic,arithmetic"], "named twice"),
        ([str(MODEL), "--tasks", "arithmetic", "--limit", "0"], "1 or more"),
        ([str(MODEL), "--tasks", "arithmetic", "--samples", "3"], "--temperature"),
        ([str(MODEL), "--tasks", "mmlu:nowhere.jsonl"], "there is no file"),
        (["--compare", "nowhere"], "holds no results"),
    ],
)
def test_bad_words_are_refused(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert qmax.main(["eval", *argv]) == 2
    assert words in capsys.readouterr().err


# ---- the verb ------------------------------------------------------------------------------------
def test_the_verb_writes_results_that_can_be_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = write(tmp_path / "rows.jsonl", [{"text": "Once upon a time there was a little girl"}] * 3)
    lambada, sums = f"lambada:{rows}", "arithmetic?digits=1"
    words = [str(MODEL), "--limit", "2", "--max-tokens", "3", "--slots", "2"]
    assert eval_main([*words, "--tasks", sums, "--out", "b"]) == 0
    shutil.copytree("b", "a")
    assert eval_main([*words, "--tasks", lambada, "--out", "a", "--json", "a.json"]) == 0
    first = json.loads(Path("a.json").read_text())
    assert set(first["tasks"][lambada]) >= {"score", "stderr", "n", "metrics"} and first["tasks"][lambada]["n"] == 2
    results = read_results(Path("a"))
    assert set(results["tasks"]) == {lambada, sums}, "results of the same model stand together"
    assert (Path("a") / f"{file_name(lambada)}.jsonl").exists()
    capsys.readouterr()
    assert eval_main(["--compare", "a", "b", "--page", "page.html"]) == 0
    header, table = compare([results, read_results(Path("b"))])
    assert len(set(header)) == 3 and table[0][1] == table[0][2] and table[1][2] == "-"
    page = Path("page.html").read_text()
    assert page.count("<figure>") == 2 and "http" not in page.replace("http-equiv", "")


def test_fingerprints_tell_models_apart(local: Local) -> None:
    model, tokenizer = load_model(MODEL)
    assert fingerprint(model, tokenizer) == local.fingerprint
    weights, structure = jax.tree.flatten(model)
    first = np.array(weights[0])
    first.flat[3] = np.nextafter(first.flat[3], np.float32(9))
    assert fingerprint(jax.tree.unflatten(structure, [first, *weights[1:]]), tokenizer) != local.fingerprint


# ---- endpoints ------------------------------------------------------------------------------------
def endpoint(answers: Any) -> Remote:
    return Remote("http://host/v1", "m", workers=2, client=httpx.Client(transport=httpx.MockTransport(answers)))


def test_an_endpoint_is_examined_alike(tmp_path: Path) -> None:
    asked: list[dict[str, Any]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        asked.append(body)
        message = {"content": body["messages"][-1]["content"].removeprefix("say "), "reasoning_content": "hm"}
        return httpx.Response(200, json={"choices": [{"message": message, "finish_reason": "stop"}]})

    rows = [{"prompt": f"say {n}", "answer": str(min(n, 2))} for n in range(5)]
    task = f"jsonl:{write(tmp_path / 'rows.jsonl', rows)}"
    found = replies_of(task, endpoint(answer), tmp_path / "out.jsonl", system="Be brief.", thinking=False)
    assert found.score.value == pytest.approx(3 / 5)
    assert asked[0]["messages"][0] == {"role": "system", "content": "Be brief."}
    assert asked[0]["chat_template_kwargs"] == {"enable_thinking": False}


def test_an_endpoint_weighs_choices_by_its_echo() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        assert json.loads(request.content)["prompt"] == "ab cd"
        said = {
            "text_offset": [0, 2, 4, 5],
            "token_logprobs": [None, -1.0, -0.5, -9.0],
            "top_logprobs": [None, {" c": -1.0}, {"d": -0.5, "e": -0.7}, {"x": -0.1}],
        }
        return httpx.Response(200, json={"choices": [{"logprobs": said}]})

    (found,) = endpoint(answer).likelihoods([Continuation("ab", " cd")], lambda _: None)
    assert found == Likelihood(-1.5, True)


def test_a_refusal_is_told_in_its_own_words(tmp_path: Path) -> None:
    task = f"jsonl:{write(tmp_path / 'rows.jsonl', [{'prompt': 'a', 'answer': 'b'}])}"
    with pytest.raises(Exception, match="refuses a request to /chat/completions with 401: who are you"):
        replies_of(task, endpoint(lambda _: httpx.Response(401, text="who are you")), tmp_path / "out.jsonl")


def test_calls_and_thoughts_are_written_back() -> None:
    call = {"function": {"name": "f", "arguments": '{"x": 1}'}}
    assert text_of({"content": None, "reasoning": "so", "tool_calls": [call]}) == (
        '<think>\nso\n</think>\n\n\n<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
    )


# ---- judged answers ---------------------------------------------------------------------------------
def test_arena_hard_is_answered_and_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    questions = [{"uid": f"q{n}", "category": "hard_prompt", "subcategory": "", "prompt": f"{n}?"} for n in range(4)]
    path = write(tmp_path / "question.jsonl", questions)
    said = [{"role": "user", "content": "?"}, {"role": "assistant", "content": {"answer": "base"}}]
    base = [{"uid": one["uid"], "model": "o3-mini-2025-01-31", "messages": said} for one in questions]
    task = ArenaHard(str(path), str(write(tmp_path / "base.jsonl", base)))
    verdicts: list[str] = []

    def judge(request: httpx.Request) -> httpx.Response:
        asked = json.loads(request.content)["messages"][-1]["content"]
        verdicts.append("[[B>A]]" if asked.index("base") < asked.index("good") else "[[A>B]]")
        message = {"content": f"My final verdict is {verdicts[-1]}"}
        return httpx.Response(200, json={"choices": [{"message": message}]})

    client = httpx.Client(transport=httpx.MockTransport(judge))
    monkeypatch.setattr(httpx, "Client", lambda **_: client)
    who = Told({f"{n}?": "good" for n in range(4)})

    def measured() -> Any:
        with progress_bar("test", None) as bar:
            return measure_arena("arena", task, who, Settings(), Judge("http://j/v1", "j", 2), 3, tmp_path / "out", bar)

    found = measured()
    assert (found.n, found.score.value, who.asked, len(verdicts)) == (3, 1.0, 3, 6)
    assert measured().score == found.score and (who.asked, len(verdicts)) == (3, 6), "nothing is asked twice"
    assert len(list((tmp_path / "out").glob("model_*/**/*.jsonl"))) == 2


def test_a_report_shows_what_the_run_scored(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"run": {"objective": "sft", "model": {}}}))
    (run / "metrics.jsonl").write_text("")
    rows = write(tmp_path / "rows.jsonl", [{"prompt": "a", "answer": "a"}, {"prompt": "b", "answer": "c"}])
    found = replies_of(f"jsonl:{rows}", Told({"a": "a", "b": "b"}), run / "eval" / "rows.jsonl")
    write_results(run / "eval", "told", "told", [replace(found, task="exact <b>")])
    page = write_report(run).read_text()
    assert "exact &lt;b&gt;, score" in page and "0.5 ± 0.5, n = 2" in page
    assert "<b>, score" not in page
