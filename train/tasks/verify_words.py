"""Verifiers of words: which, how many, of what letters, where."""

from __future__ import annotations

import itertools
import re
import string
from collections import Counter

from train.tasks.verifying import Values, bare, holds, lines_of, sentences_of, times, verifies, words_of

PRONOUNS = frozenset(
    re.findall(
        r"\w+",
        """i me my mine myself we us our ours ourselves you your yours yourself yourselves he him his himself she her
        hers herself it its itself they them their theirs themselves this that these those who whom whose which what
        anybody anyone anything each either everybody everyone everything neither nobody none nothing one somebody
        someone something both few many several all any most some such another other others""",
    )
)
JAPANESE = re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]")
PRIMES = {2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43}


def letters(word: str) -> str:
    """The letters a to z of a word."""
    return re.sub(r"[^a-z]", "", word.lower())


@verifies("keywords:existence", "keywords")
def existence(reply: str, values: Values) -> bool:
    return all(re.search(re.escape(str(word)), reply, re.IGNORECASE) for word in values["keywords"])


@verifies("keywords:forbidden_words", "forbidden_words")
def forbidden(reply: str, values: Values) -> bool:
    return not any(times(reply, str(word)) for word in values["forbidden_words"])


@verifies("keywords:frequency", "keyword", "frequency")
def frequency(reply: str, values: Values) -> bool:
    count = len(re.findall(re.escape(str(values["keyword"])), reply, re.IGNORECASE))
    return holds(count, values.get("relation"), values["frequency"])


@verifies("keywords:letter_frequency", "letter", "let_frequency")
def letter_frequency(reply: str, values: Values) -> bool:
    return holds(
        reply.lower().count(str(values["letter"]).lower()), values.get("let_relation"), values["let_frequency"]
    )


@verifies("length_constraints:number_words", "num_words")
def number_words(reply: str, values: Values) -> bool:
    return holds(len(re.findall(r"\w+", reply)), values.get("relation"), values["num_words"])


@verifies("change_case:capital_word_frequency", "capital_frequency")
def capital_words(reply: str, values: Values) -> bool:
    count = sum(word.isupper() for word in words_of(reply))
    return holds(count, values.get("capital_relation"), values["capital_frequency"])


@verifies("count:keywords_multiple", "keyword1", "keyword2", "keyword3", "keyword4", "keyword5")
def keyword_counts(reply: str, values: Values) -> bool:
    return all(times(reply, str(values[f"keyword{i}"])) == n for i, n in enumerate((1, 2, 3, 5, 7), 1))


@verifies("count:numbers", "N")
def numbers(reply: str, values: Values) -> bool:
    return len(re.findall(r"(?<![\w.])\d+(?:[.,]\d+)*(?!\w)", reply)) == int(values["N"])


@verifies("count:person_names", "N")
def person_names(reply: str, values: Values) -> bool:
    """Names of the list that the prompt gives."""
    _, _, after = str(values["prompt"]).partition("list of person names:")
    names = {name.strip(" .\n") for name in after.split(",")} - {""}
    return sum(bool(re.search(rf"\b{re.escape(n)}\b", reply)) for n in names) >= int(values["N"])


@verifies("count:pronouns", "N")
def pronouns(reply: str, values: Values) -> bool:
    found = re.findall(r"[a-z]+", re.sub(r"['’]\w+", "", reply.lower()))
    return sum(word in PRONOUNS for word in found) >= int(values["N"])


@verifies("count:unique_word_count", "N")
def unique_words(reply: str, values: Values) -> bool:
    return len(set(bare(reply.split()))) >= int(values["N"])


@verifies("count:word_count_range", "min_words", "max_words")
def word_range(reply: str, values: Values) -> bool:
    return int(values["min_words"]) <= len(bare(reply.split())) <= int(values["max_words"])


@verifies("count:words_japanese", "N")
def japanese(reply: str, values: Values) -> bool:
    nth = reply.split()[int(values["N"]) - 1 :: int(values["N"])]
    return bool(nth) and all(JAPANESE.search(word) for word in nth)


@verifies("words:alphabet")
def alphabet(reply: str, _: Values) -> bool:
    first = [w[0] for w in map(letters, reply.split()) if w]
    if not first:
        return False
    start = string.ascii_lowercase.index(first[0])
    return all(letter == string.ascii_lowercase[(start + i) % 26] for i, letter in enumerate(first))


@verifies("words:consonants")
def clusters(reply: str, _: Values) -> bool:
    found = [w for w in map(letters, reply.split()) if w]
    return bool(found) and all(re.search(r"[b-df-hj-np-tv-z]{2}", word) for word in found)


@verifies("words:keywords_specific_position", "keyword", "n", "m")
def keyword_at(reply: str, values: Values) -> bool:
    sentences, n, m = sentences_of(reply), int(values["n"]), int(values["m"])
    found = words_of(sentences[n - 1]) if 1 <= n <= len(sentences) else []
    return 1 <= m <= len(found) and found[m - 1].lower() == str(values["keyword"]).lower()


@verifies("words:last_first")
def chained(reply: str, _: Values) -> bool:
    found = [words for words in (bare(s.split()) for s in sentences_of(reply)) if words]
    return len(found) > 1 and all(a[-1] == b[0] for a, b in itertools.pairwise(found))


@verifies("words:paragraph_last_first")
def circular(reply: str, _: Values) -> bool:
    found = [words for words in (bare(line.split()) for line in lines_of(reply)) if words]
    return bool(found) and all(words[0] == words[-1] for words in found)


@verifies("words:no_consecutive")
def no_consecutive(reply: str, _: Values) -> bool:
    first = [w[0] for w in bare(reply.split())]
    return bool(first) and all(a != b for a, b in itertools.pairwise(first))


@verifies("words:palindrome")
def palindromes(reply: str, _: Values) -> bool:
    found = {w for w in map(str.lower, re.findall(r"[^\W\d_]+", reply)) if len(w) >= 5 and w == w[::-1]}
    return len(found) >= 10


@verifies("words:prime_lengths")
def prime_lengths(reply: str, _: Values) -> bool:
    found = bare(reply.split())
    return bool(found) and all(len(re.sub(r"\W", "", word)) in PRIMES for word in found)


@verifies("words:repeats", "small_n")
def repeats(reply: str, values: Values) -> bool:
    counts = Counter(bare(reply.split()))
    return bool(counts) and max(counts.values()) <= int(values["small_n"])


@verifies("words:vowel")
def three_vowels(reply: str, _: Values) -> bool:
    return 0 < len(set("aeiou") & set(reply.lower())) <= 3


@verifies("words:words_position", "keyword")
def second_words(reply: str, values: Values) -> bool:
    found, word = bare(reply.split()), str(values["keyword"]).lower()
    return len(found) > 2 and found[1] == found[-2] == word


@verifies("sentence:keyword", "word", "N")
def keyword_in_sentence(reply: str, values: Values) -> bool:
    sentences, n = sentences_of(reply), int(values["N"])
    return 1 <= n <= len(sentences) and times(sentences[n - 1], str(values["word"])) > 0


@verifies("sentence:increment", "small_n")
def longer_sentences(reply: str, values: Values) -> bool:
    lengths = [len(bare(s.split())) for s in sentences_of(reply)]
    return len(lengths) > 1 and all(b - a == int(values["small_n"]) for a, b in itertools.pairwise(lengths))


@verifies("sentence:alliteration_increment")
def alliteration(reply: str, _: Values) -> bool:
    """The longest run of words with one first letter grows from sentence to sentence; the first has one of two."""
    runs = []
    for sentence in sentences_of(reply):
        first = [w[0] for w in bare(sentence.split())]
        runs.append(max((len(list(group)) for _, group in itertools.groupby(first)), default=0))
    return len(runs) > 1 and runs[0] >= 2 and all(a < b for a, b in itertools.pairwise(runs))
