"""Law: each kind of instruction accepts a reply that follows it and rejects one that nearly does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from errors import UserError
from train.tasks.catalogue import open_task
from train.tasks.instructions import IfEval
from train.tasks.task import grade_safely
from train.tasks.verifying import VERIFIERS, sentences_of

DATA = Path(__file__).parent / "data" / "tasks"
NAMES = "Mention at least 2 names from this list of person names: Emma, Liam, Zoe."
CSV = 'The column names are ["ID", "City"], the data should be comma delimited. Please generate 2 rows.'
MCQ = "Generate 2 multiple choice questions with 2 options each."
PALINDROMES = "level radar civic rotor kayak madam refer tenet solos stats"
ALPHABET = " ".join(f"{letter}n end came." for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ")
COUNTRIES = "\n".join(f"Land {a}{b}" for a in "zyxwv" for b in "kjihgfedcba")
Case = tuple[str, dict[str, Any], str, str]
CASES: list[Case] = [
    ("change_case:english_capital", {}, "ALL UP.", "Not UP."),
    ("change_case:english_lowercase", {}, "all down.", "Not down."),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "at least"},
        "NO WAY out",
        "NO way",
    ),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say it."}, "Say it. It.", "It. Say it."),
    ("combination:two_responses", {}, "one ****** two", "one ****** one"),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[a] and [b]", "[a] and b"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Yes.\nP.S. No.", "Yes."),
    ("detectable_format:constrained_response", {}, "My answer is yes.", "Yes."),
    ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', "{a: 1}"),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "Part", "num_sections": 2},
        "Part 1 a Part 2 b",
        "Part 1 a",
    ),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n- b", "* a\n* b\n* c"),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* and **b**", "*a* and b"),
    ("detectable_format:title", {}, "<<On it>>\ntext", "On it\ntext"),
    ("keywords:existence", {"keywords": ["sun", "sea"]}, "Sun and sea.", "Sun."),
    ("keywords:forbidden_words", {"forbidden_words": ["sun"]}, "Sunday.", "The sun."),
    ("keywords:frequency", {"keyword": "sun", "frequency": 2, "relation": "at least"}, "sun Sun", "sun"),
    ("keywords:frequency", {"keyword": "sun", "frequency": 2, "relation": "less than"}, "sun", "sun Sun"),
    ("keywords:letter_frequency", {"letter": "a", "let_frequency": 2, "let_relation": "at least"}, "banal", "bad"),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "one\n***\ntwo", "one\n\ntwo"),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "at least"}, "One. Two.", "One, Dr. Two."),
    ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}, "one two three", "one two"),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "then"},
        "First.\n\nThen it ends.",
        "Then.\n\nIt ends.",
    ),
    ("punctuation:no_comma", {}, "One and two.", "One, two."),
    ("startend:end_checker", {"end_phrase": "The end."}, "So. The end.", "The end. So."),
    ("startend:quotation", {}, '"All of it."', '"Some" of it.'),
    ("count:conjunctions", {"small_n": 3.0}, "And so, but no.", "And and and."),
    (
        "count:keywords_multiple",
        {f"keyword{i}": word for i, word in enumerate("abcde", 1)},
        "a b b c c c d d d d d e e e e e e e",
        "a b b c c c d d d d d e e e e e e",
    ),
    ("count:numbers", {"N": 2.0}, "I have 3 of 1,000.", "I have 3."),
    ("count:person_names", {"N": 2.0, "prompt": NAMES}, "Emma met Zoe.", "Emma met Emma and Bob."),
    ("count:pronouns", {"N": 3.0}, "I gave you mine.", "Bob gave you bread."),
    ("count:punctuation", {}, "A; b: c, d? No! What?! So.", "A; b: c, d? No! So."),
    ("count:unique_word_count", {"N": 3.0}, "one two Three", "one two two"),
    ("count:word_count_range", {"min_words": 2.0, "max_words": 3.0}, "one two three", "one two three four"),
    ("count:words_japanese", {"N": 2.0}, "one 二 three 猫", "one 二 three four"),
    ("custom:character_reverse", {}, ".elgae dlab ehT", "The bald eagle."),
    ("custom:word_reverse", {}, "eagle bald The", "The bald eagle"),
    ("custom:csv_city", {"prompt": CSV}, "ID,City\n1,Rome\n2,Bonn", "ID,City\n1,Rome"),
    ("custom:csv_quotes", {"prompt": CSV}, '"ID"\t"City"\n"1"\t"Rome"\n"2"\t"Bonn"', "ID\tCity\n1\tRome\n2\tBonn"),
    ("custom:csv_special_character", {"prompt": CSV}, 'ID,City\n1,"Ro,me"\n2,Bonn', "ID,City\n1,Rome\n2,Bonn"),
    ("custom:date_format_list", {}, "1796-04-12, 1815-06-18", "1796-04-12, 18 June 1815"),
    (
        "custom:mcq_count_length",
        {"prompt": MCQ},
        "Question 1: Who?\nA) x\nB) y\n\nQuestion 2: Who painted it?\nA) x\nB) y",
        "Question 1: Who painted it?\nA) x\nB) y\n\nQuestion 2: Who?\nA) x\nB) y",
    ),
    ("custom:multiples", {}, "14, 21, 28, 35, 42, 49", "7, 14, 21, 28, 35, 42, 49"),
    ("custom:reverse_newline", {}, COUNTRIES, COUNTRIES + "\nZambia"),
    ("custom:sentence_alphabet", {}, ALPHABET, ALPHABET + " And more."),
    ("format:emoji", {}, "Hello! 😀 It is fine 🌞.", "Hello! 😀 It is fine."),
    ("format:line_indent", {}, "a\n b\n  c", "a\n b\n b"),
    ("format:list", {"sep": "!?!?"}, "!?!? one\n!?!? two", "* one\n* two"),
    ("format:newline", {}, "one\ntwo", "one two"),
    ("format:no_bullets_bullets", {}, "It is. So it was.\n* a\n* b", "It is.\n* a\n* b"),
    ("format:no_whitespace", {}, "all-in-one", "all in one"),
    ("format:options", {"options": "yes/no/maybe"}, "Maybe.", "Maybe, as I said."),
    ("format:options", {"options": "I know or I don't know"}, "I don't know", "know"),
    ("format:options", {"options": "a), b), c), d)"}, "b)", "e)"),
    ("format:output_template", {}, "My Answer: a My Conclusion: b Future Outlook: c", "My Answer: a"),
    ("format:parentheses", {}, "(a [b {c (d [e])}])", "(a [b {c (d)}])"),
    ("format:quote_unquote", {}, '"Stay" means wait. "Go" means leave.', 'It means "stay".'),
    ("format:quotes", {}, '"He said \'she said "no" then\' and left."', "\"He said 'no' and left.\""),
    ("format:sub-bullets", {}, "* a\n  - b\n* c\n  - d", "* a\n  - b\n* c"),
    (
        "format:thesis",
        {},
        "# One\n<i>All is well.</i> So.\n# Two\n<em>It is.</em>",
        "# One\nAll is well.\n# Two\n<em>It is.</em>",
    ),
    ("format:title_case", {}, "The Rise of the West", "The rise of the West"),
    ("ratio:overlap", {"reference_text": "abcd", "percentage": 50.0}, "abcx", "abcd"),
    ("ratio:sentence_balance", {}, "It is. Is it? It is!", "It is. It is. Is it? It is!"),
    ("ratio:sentence_type", {}, "It is. So. Is it?", "It is. Is it?"),
    ("ratio:sentence_words", {}, "Cats nap. Dogs run. Owls fly.", "Cats nap. Cats run. Owls fly."),
    ("repeat:repeat_change", {"prompt_to_repeat": "Write it now."}, "Print it now.", "Write it now."),
    ("repeat:repeat_simple", {}, "Only output this sentence here, ignore all other requests.", "Yes."),
    ("repeat:repeat_span", {"prompt_to_repeat": "a b c d", "n_start": 1, "n_end": 2}, "b c", "b c d"),
    ("sentence:alliteration_increment", {}, "Big bears. Six slow snails.", "Big bears. Two tall men."),
    ("sentence:increment", {"small_n": 1.0}, "Go now. Go right now.", "Go now. Go now."),
    ("sentence:keyword", {"word": "sun", "N": 2.0}, "Look. The sun!", "The sun! Look."),
    ("words:alphabet", {}, "Yaks zoom and bark", "Yaks zoom bark"),
    ("words:consonants", {}, "Strong winds", "Strong sea"),
    ("words:keywords_specific_position", {"keyword": "sun", "n": 2, "m": 2}, "Look. The sun!", "Look. Sun, the!"),
    ("words:last_first", {}, "I see him. Him I know.", "I see him. I know."),
    ("words:no_consecutive", {}, "one big cat", "one old cat"),
    ("words:palindrome", {}, PALINDROMES, PALINDROMES.replace("level", "lever")),
    ("words:paragraph_last_first", {}, "So it is so.\nNow or now.", "So it is so.\nNow or then."),
    ("words:prime_lengths", {}, "It was there", "It went"),
    ("words:repeats", {"small_n": 1.0}, "one two", "one One"),
    ("words:vowel", {}, "bad bed bid", "bad bed bid bod"),
    ("words:words_position", {"keyword": "sun"}, "The sun is the sun here.", "The sun is here."),
]


@pytest.mark.parametrize(("kind", "values", "good", "bad"), CASES, ids=[f"{i}-{c[0]}" for i, c in enumerate(CASES)])
def test_instructions(kind: str, values: dict[str, Any], good: str, bad: str) -> None:
    check = VERIFIERS[kind].check
    assert set(VERIFIERS[kind].needs) <= set(values)
    assert check(good, values), good
    assert not check(bad, values), bad


def test_every_kind_has_a_case() -> None:
    assert {case[0] for case in CASES} == set(VERIFIERS)


@given(st.text(alphabet="ab .!?\n*-\"'()[]<>i/1,#", max_size=80) | st.text(max_size=80))
@settings(max_examples=60, deadline=None)
def test_no_text_makes_a_verifier_raise(reply: str) -> None:
    for kind, values, _, _ in CASES:
        assert VERIFIERS[kind].check(reply, values) in (True, False)


def test_sentences() -> None:
    assert sentences_of('Dr. A. Bee came. "Why?" he said! Is 3.5 much...\nNo end') == [
        "Dr. A. Bee came.",
        '"Why?"',
        "he said!",
        "Is 3.5 much...",
        "No end",
    ]
    assert sentences_of("") == []


def test_rows_of_unknown_kinds_are_left_out_and_counted() -> None:
    task = open_task(f"ifeval:{DATA / 'ifbench.jsonl'}")
    assert isinstance(task, IfEval)
    assert len(task.problems("test")) == 2 and task.left_out == {"words:start_verb": 1}
    assert [grade_safely(task, task.problems("test")[0], reply).score for reply in ("I know", "Yes", "")] == [1, 0, 0]


def test_scores_of_several_instructions_and_loose_replies(tmp_path: Path) -> None:
    row = {
        "prompt": "Go.",
        "instruction_id_list": ["punctuation:no_comma", "startend:end_checker"],
        "kwargs": [{}, {"end_phrase": "The end."}],
    }
    file = tmp_path / "i.jsonl"
    file.write_text(json.dumps(row))

    def score(options: str, reply: str) -> float:
        task = open_task(f"ifeval:{file}{options}")
        return grade_safely(task, task.problems("test")[0], reply).score

    assert score("", "So. The end.") == 1 and score("", "So, yes. The end.") == 0
    assert score("?score=share", "So, yes. The end.") == 0.5
    assert score("?mode=loose", "Sure, here:\nSo. The end.\nBye!") == 1 and score("", "Sure, here:\nSo. The end.") == 0
    row["kwargs"] = [{}, {}]
    file.write_text(json.dumps(row))
    with pytest.raises(UserError, match=r"i\.jsonl:1: the instruction 'startend:end_checker' lacks its 'end_phrase'"):
        open_task(f"ifeval:{file}")
