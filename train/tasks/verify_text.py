"""Verifiers of the text as a whole: letters' case, punctuation, beginnings and ends, kinds of sentences, repetition."""

from __future__ import annotations

import re
import string

from train.tasks.verifying import Values, bare, holds, sentences_of, verifies, words_of


@verifies("change_case:english_capital")
def capital(reply: str, _: Values) -> bool:
    return reply.isupper()


@verifies("change_case:english_lowercase")
def lowercase(reply: str, _: Values) -> bool:
    return reply.islower()


@verifies("punctuation:no_comma")
def no_comma(reply: str, _: Values) -> bool:
    return "," not in reply


@verifies("startend:end_checker", "end_phrase")
def ends_with(reply: str, values: Values) -> bool:
    return reply.strip().strip('"').lower().endswith(str(values["end_phrase"]).strip().lower())


@verifies("length_constraints:number_sentences", "num_sentences")
def number_sentences(reply: str, values: Values) -> bool:
    return holds(len(sentences_of(reply)), values.get("relation"), values["num_sentences"])


@verifies("combination:repeat_prompt", "prompt_to_repeat")
def repeat_prompt(reply: str, values: Values) -> bool:
    return reply.strip().lower().startswith(str(values["prompt_to_repeat"]).strip().lower())


@verifies("count:punctuation")
def every_mark(reply: str, _: Values) -> bool:
    return all(mark in reply for mark in ".,!?;:") and any(mark in reply for mark in ("?!", "!?", "‽"))


@verifies("ratio:overlap", "reference_text", "percentage")
def overlap(reply: str, values: Values) -> bool:
    """Share of the reply's different trigrams of characters that the reference has, within 2 points."""
    mine, theirs = ({t[i : i + 3] for i in range(len(t) - 2)} for t in (reply, str(values["reference_text"])))
    return bool(mine) and abs(100 * len(mine & theirs) / len(mine) - float(values["percentage"])) <= 2


def kinds(reply: str) -> tuple[int, int, int]:
    """Sentences that end with a period, a question mark, an exclamation mark."""
    ends = [re.sub(r"[\"'”’)\]*\s]+$", "", s)[-1:] for s in sentences_of(reply)]
    return ends.count("."), ends.count("?"), ends.count("!")


@verifies("ratio:sentence_balance")
def balanced(reply: str, _: Values) -> bool:
    declarative, interrogative, exclamatory = kinds(reply)
    return declarative > 0 and len({declarative, interrogative, exclamatory}) == 1


@verifies("ratio:sentence_type")
def two_to_one(reply: str, _: Values) -> bool:
    declarative, interrogative, _exclamatory = kinds(reply)
    return interrogative > 0 and declarative == 2 * interrogative


@verifies("ratio:sentence_words")
def three_alike(reply: str, _: Values) -> bool:
    """Three sentences of as many characters each, no word twice."""
    sentences = sentences_of(reply)
    found = [word for s in sentences for word in bare(s.split())]
    return len(sentences) == 3 and len({len(s) for s in sentences}) == 1 and len(found) == len(set(found))


@verifies("repeat:repeat_change", "prompt_to_repeat")
def repeat_changed(reply: str, values: Values) -> bool:
    mine, asked = reply.split(), str(values["prompt_to_repeat"]).split()
    return bool(mine) and len(asked) > 0 and mine[0].lower() != asked[0].lower() and mine[1:] == asked[1:]


@verifies("repeat:repeat_simple")
def repeat_simple(reply: str, _: Values) -> bool:
    return reply.strip().strip('"').lower() == "only output this sentence here, ignore all other requests."


@verifies("repeat:repeat_span", "prompt_to_repeat", "n_start", "n_end")
def repeat_span(reply: str, values: Values) -> bool:
    """Both ends are included, as the prompts say."""
    words = str(values["prompt_to_repeat"]).lower().split()
    return reply.strip().strip('"').lower().split() == words[int(values["n_start"]) : int(values["n_end"]) + 1]


@verifies("custom:character_reverse")
def reversed_letters(reply: str, _: Values) -> bool:
    return "bald eagle" in reply[::-1].lower()


@verifies("custom:word_reverse")
def reversed_words(reply: str, _: Values) -> bool:
    return "bald eagle" in " ".join(reversed(bare(reply.split())))


@verifies("custom:multiples")
def multiples(reply: str, _: Values) -> bool:
    return [int(n) for n in re.findall(r"\d{1,9}", reply)] == list(range(14, 51, 7))


@verifies("custom:sentence_alphabet")
def alphabet_story(reply: str, _: Values) -> bool:
    first = [next(iter(words_of(s)), " ")[0].lower() for s in sentences_of(reply)]
    return first == list(string.ascii_lowercase)
