"""Arena-Hard v2: how often a judge prefers a model's answers to those of a baseline (arXiv 2406.11939).

    questions = read_questions("question.jsonl")
    answers = read_answers("model_answer/mine.jsonl")
    baseline = read_baseline(questions, ["model_answer/o3-mini-2025-01-31.jsonl"])
    endpoint = Endpoint("http://host/v1", "judge", "gpt-4.1", seconds=JUDGE_SECONDS)  # or a client with a key
    judgments = judge_arena(questions, answers, baseline, endpoint, Path("model_judgment/gpt-4.1/mine.jsonl"))
    table = arena_table(judgments, answers, baseline)

The judge reads each pair of answers twice, with the baseline first and with the model first, so that a liking for the
first place cancels. Its instructions (arena_prompts.json) are the official ones, word for word: scores depend on them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from errors import UserError
from train.asking import Endpoint
from train.data.system import say
from train.evaluation.arena_files import (
    Answer,
    ArenaQuestion,
    Game,
    Judgment,
    Style,
    append_row,
    judgment_row,
    prompts,
    read_answers,
    read_baseline,
    read_judgments,
    read_questions,
    write_answer,
)
from train.evaluation.arena_statistics import SCORES, arena_table, battles
from train.tasks.task import spoken

__all__ = [
    "JUDGE_SECONDS",
    "Answer",
    "ArenaQuestion",
    "Game",
    "Judgment",
    "Style",
    "arena_table",
    "battles",
    "judge_arena",
    "judge_pair",
    "read_answers",
    "read_baseline",
    "read_judgments",
    "read_questions",
    "verdict_of",
    "write_answer",
]

JUDGE_SECONDS = 600.0
"""That a judge may take: it writes an answer of its own before it compares."""
JUDGE_TOKENS = 16000
"""That it may write; the official setting."""
AGAIN = 0.5
"""Temperature after words without a verdict: at 0 most judges would say the same again."""
FORMS = (r"\[\[([AB<>=]+)\]\]", r"\[([AB<>=]+)\]")
"""Of a verdict; the second counts where the first is nowhere."""


def verdict_of(text: str) -> str | None:
    """The last verdict in what a judge said, such as `A>>B`; None where it holds none that is known."""
    for form in FORMS:
        found = re.findall(form, text.upper())
        if found:
            return found[-1] if found[-1] in SCORES else None
    return None


def judge_pair(
    question: ArenaQuestion,
    answer: Answer,
    baseline: Answer,
    endpoint: Endpoint,
    *,
    judge: str,
    tries: int = 4,
    max_tokens: int = JUDGE_TOKENS,
) -> Judgment:
    """Both games of a question, the baseline being A in the first and the model in the second.

    Args:
        endpoint: the judge, in its `with` block. judge: its name, for the row.
        tries: how often a game is asked for while the judge is down or says no verdict. After that a game has no
            score where it said something, and is None where it never answered.
    """
    orders = ((baseline.text, answer.text), (answer.text, baseline.text))
    games: list[Game | None] = []
    for first, second in orders:
        games.append(_play(endpoint, _talk(question, first, second), tries, max_tokens))
        if games[-1] is None:  # it would not answer the other one either
            return Judgment(question.uid, question.category, judge, answer.model, baseline.model, (games[0], None))
    return Judgment(question.uid, question.category, judge, answer.model, baseline.model, (games[0], games[1]))


def _talk(question: ArenaQuestion, first: str, second: str) -> list[dict[str, Any]]:
    texts = prompts()
    system = texts["instructions"][texts["categories"][question.category]["instructions"]]
    user = texts["question"].format(QUESTION=question.prompt, ANSWER_A=first, ANSWER_B=second)
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]


def _play(endpoint: Endpoint, talk: list[dict[str, Any]], tries: int, max_tokens: int) -> Game | None:
    said: list[str] = []

    def once() -> str:
        body = {"messages": talk, "temperature": AGAIN if said else 0.0, "max_tokens": max_tokens}
        content = endpoint.post("chat/completions", body)["choices"][0]["message"]["content"]
        said.append(spoken(content) if isinstance(content, str) else "")  # null where thoughts took all tokens
        verdict = verdict_of(said[-1])
        if verdict is None:
            raise ValueError(f"no verdict in {said[-1][-80:]!r}")
        return verdict

    verdict = endpoint.until(once, tries)
    return Game(verdict, {"answer": said[-1]}, talk) if said else None


def judge_arena(
    questions: Sequence[ArenaQuestion],
    answers: Mapping[str, Answer],
    baseline: Mapping[str, Answer],
    endpoint: Endpoint,
    judgments_path: str | Path,
    *,
    workers: int = 8,
    tries: int = 4,
    max_tokens: int = JUDGE_TOKENS,
    progress: Callable[[int, int], None] | None = None,
) -> list[Judgment]:
    """Judges every question that the file does not hold yet, several at once, and adds each to the file.

    Args:
        workers: questions that are judged at once. tries: as in `judge_pair`. max_tokens: that the judge may write.
        progress: is told how many questions are judged, of how many, at the start and after each.

    Returns: the judgments of `questions`, in their order. One without a verdict is among them and is not asked again;
        one that the judge did not answer is left out and not written, so that the next call asks again. Both are
        counted on stderr.

    Raises:
        UserError: an answer is missing, the judge answers nothing at all, the file holds judgments of other answers
            or by another judge.
    """
    if min(workers, tries) < 1:
        raise UserError(f"workers={workers} and tries={tries}: a judge needs at least 1 of each")
    pairs = {question.uid: (question, *_both(question, answers, baseline)) for question in questions}
    path = Path(judgments_path).expanduser()
    done = {one.uid: one for one in _written(path, pairs)}
    waiting = [pair for uid, pair in pairs.items() if uid not in done]
    if progress:
        progress(len(done), len(pairs))
    with endpoint:
        judge = _name(endpoint, tries, done.values()) if waiting else ""
        with ThreadPoolExecutor(workers) as pool:
            asked = [
                pool.submit(judge_pair, *pair, endpoint, judge=judge, tries=tries, max_tokens=max_tokens)
                for pair in waiting
            ]
            try:
                for future in as_completed(asked):
                    one = future.result()
                    if None not in one.games:
                        append_row(path, judgment_row(one))
                        done[one.uid] = one
                        if progress:
                            progress(len(done), len(pairs))
            except BaseException:
                pool.shutdown(cancel_futures=True)  # else all that waits would be asked before this ends
                raise
    found = [done[uid] for uid in pairs if uid in done]
    _tell(found, len(pairs), endpoint, path)
    return found


def _both(
    question: ArenaQuestion, answers: Mapping[str, Answer], baseline: Mapping[str, Answer]
) -> tuple[Answer, Answer]:
    """The two answers to a question. Raises UserError where one is missing."""
    for whose, given in (("the model", answers), ("the baseline", baseline)):
        if question.uid not in given:
            one = next(iter(given.values()), None)
            file = f" in {one.where.rsplit(':', 1)[0]}" if one and one.where else ""
            raise UserError(
                f"{question.where}: {whose} has no answer to question {question.uid}{file}; "
                "add it there, or leave the question out"
            )
    return answers[question.uid], baseline[question.uid]


def _name(endpoint: Endpoint, tries: int, done: Iterable[Judgment]) -> str:
    """The judge's name. Raises UserError where there is none to be had, or another one judged before."""
    judge = endpoint.until(endpoint.name, tries)
    if judge is None:
        raise UserError(f"the judge at {endpoint.url} does not say which model it is; name one, or start it")
    for one in done:
        if one.judge != judge:
            raise UserError(f"{one.where}: the judge was {one.judge}, and now it is {judge}; give another file")
    return judge


def _written(path: Path, pairs: Mapping[str, tuple[ArenaQuestion, Answer, Answer]]) -> list[Judgment]:
    """What an earlier call has judged of these questions. Raises UserError where it is of other answers."""
    if not path.exists():
        return []
    found = [one for one in read_judgments(path) if one.uid in pairs and None not in one.games]
    for one in found:
        _, answer, base = pairs[one.uid]
        for what, here, now in (("model", one.model, answer.model), ("baseline", one.baseline, base.model)):
            if here != now:
                raise UserError(f"{one.where}: the {what} was {here}, and now it is {now}; give another file")
        shown = "".join(str(turn.get("content")) for game in one.games if game for turn in game.prompt)
        if shown and not (answer.text in shown and base.text in shown):
            raise UserError(f"{one.where}: the judge read other answers than those given now; give another file")
    return found


def _tell(found: Sequence[Judgment], wanted: int, endpoint: Endpoint, path: Path) -> None:
    """Says what is missing. Raises UserError where all is."""
    if wanted and not found:
        raise UserError(f"the judge at {endpoint.url} answered nothing ({endpoint.failures} times); start it and retry")
    if len(found) < wanted:
        say(f"the judge did not answer {wanted - len(found)} of {wanted} questions; run again to ask for those alone")
    unread = sum(game is not None and game.score not in SCORES for one in found for game in one.games)
    if unread:
        say(f"{unread} of {2 * len(found)} verdicts cannot be read; their questions do not count ({path})")
