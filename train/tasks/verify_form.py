"""Verifiers of a reply's form: lists, sections, tables, quotes, indents."""

from __future__ import annotations

import csv
import datetime
import io
import itertools
import json
import re
import unicodedata

from train.tasks.verifying import (
    Values,
    bare,
    holds,
    lines_of,
    paragraphs_of,
    sentences_of,
    verifies,
    words_of,
)

MINOR = frozenset(
    re.findall(r"\w+", "a an the and but or nor for so yet as at by in of off on per to up via with from into over")
)
CONSTRAINED = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
BULLET = re.compile(r"^\s*[*\-](?!\*)\s+\S", re.MULTILINE)


@verifies("detectable_content:number_placeholders", "num_placeholders")
def placeholders(reply: str, values: Values) -> bool:
    return len(re.findall(r"\[[^\[\]]*\]", reply)) >= int(values["num_placeholders"])


@verifies("detectable_content:postscript", "postscript_marker")
def postscript(reply: str, values: Values) -> bool:
    marker = re.sub(r"\s", "", str(values["postscript_marker"]).lower()).rstrip(".")
    pattern = r"\s*".join(re.escape(letter) for letter in marker)
    return bool(re.search(rf"(?m)^\s*{pattern}.*\S", reply.lower()))


@verifies("detectable_format:constrained_response")
def constrained(reply: str, _: Values) -> bool:
    return any(option in reply for option in CONSTRAINED)


@verifies("detectable_format:json_format")
def is_json(reply: str, _: Values) -> bool:
    body = re.sub(r"\A\s*```(?:json|JSON|Json)?|```\s*\Z", "", reply).strip()
    try:
        json.loads(body)
    except (ValueError, RecursionError):
        return False
    return True


@verifies("detectable_format:multiple_sections", "section_spliter", "num_sections")
def sections(reply: str, values: Values) -> bool:
    found = re.findall(rf"\s?{re.escape(str(values['section_spliter']))}\s?\d+", reply)
    return len(found) >= int(values["num_sections"])


@verifies("detectable_format:number_bullet_lists", "num_bullets")
def bullets(reply: str, values: Values) -> bool:
    return len(BULLET.findall(reply)) == int(values["num_bullets"])


@verifies("detectable_format:number_highlighted_sections", "num_highlights")
def highlights(reply: str, values: Values) -> bool:
    double = re.findall(r"\*\*[^\n*]+\*\*", reply)
    single = re.findall(r"(?<!\*)\*[^\n*]+\*(?!\*)", reply)
    return sum(bool(h.strip("* ")) for h in double + single) >= int(values["num_highlights"])


@verifies("detectable_format:title")
def title(reply: str, _: Values) -> bool:
    return any(t.strip() for t in re.findall(r"<<([^\n<>]+)>>", reply))


@verifies("startend:quotation")
def quotation(reply: str, _: Values) -> bool:
    text = reply.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


@verifies("length_constraints:number_paragraphs", "num_paragraphs")
def paragraphs(reply: str, values: Values) -> bool:
    parts = re.split(r"\s?\*\*\*\s?", reply)
    inner = parts[1:-1] if len(parts) > 2 else []
    return all(p.strip() for p in inner) and sum(bool(p.strip()) for p in parts) == int(values["num_paragraphs"])


@verifies("length_constraints:nth_paragraph_first_word", "num_paragraphs", "nth_paragraph", "first_word")
def nth_paragraph(reply: str, values: Values) -> bool:
    parts, nth = [p for p in re.split(r"\n\n", reply) if p.strip()], int(values["nth_paragraph"])
    if len(parts) != int(values["num_paragraphs"]) or not 1 <= nth <= len(parts):
        return False
    return bare(parts[nth - 1].split())[:1] == [str(values["first_word"]).lower()]


@verifies("format:emoji")
def emoji_ends(reply: str, _: Values) -> bool:
    """Before the mark that ends a sentence, or right after it."""

    def has(text: str) -> bool:
        return bool(text) and (unicodedata.category(text[-1]) == "So" or text[-1] in "\ufe0f\u200d")

    pieces = [p.strip() for p in re.findall(r"[^.!?\n]+[.!?]*[^\w\n]*", reply) if re.search(r"\w", p)]
    return bool(pieces) and all(has(p) or has(p.rstrip(".!?\"'”’*) ")) for p in pieces)


@verifies("format:line_indent")
def stairs(reply: str, _: Values) -> bool:
    depths = [len(line) - len(line.lstrip()) for line in lines_of(reply)]
    return len(depths) > 1 and all(a < b for a, b in itertools.pairwise(depths))


@verifies("format:list", "sep")
def list_with(reply: str, values: Values) -> bool:
    return sum(line.lstrip().startswith(str(values["sep"])) for line in lines_of(reply)) >= 2


@verifies("format:newline")
def word_a_line(reply: str, _: Values) -> bool:
    return all(len(line.split()) == 1 for line in lines_of(reply))


@verifies("format:no_bullets_bullets")
def sentences_then_bullets(reply: str, _: Values) -> bool:
    first = re.search(r"^\s*\*(?!\*)", reply, re.MULTILINE)
    if not first:
        return False
    before, after = reply[: first.start()], reply[first.start() :]
    starts = len(re.findall(r"^\s*\*(?!\*)", after, re.MULTILINE))
    return sum(s.endswith(".") for s in sentences_of(before)) >= 2 and starts >= 2


@verifies("format:no_whitespace")
def no_whitespace(reply: str, _: Values) -> bool:
    return not re.search(r"\s", reply.strip())


@verifies("format:options", "options")
def options(reply: str, values: Values) -> bool:
    choices = [c.strip() for c in re.split(r"/|,|\bor\b", str(values["options"])) if c.strip()]
    plain = reply.strip().strip(".\"'").lower()
    return plain in {variant for c in choices for variant in (c.lower(), c.lower().strip("()"))}


@verifies("format:output_template")
def template(reply: str, _: Values) -> bool:
    return bool(re.search(r"My Answer:.*\S.*My Conclusion:.*\S.*Future Outlook:.*\S", reply, re.DOTALL))


@verifies("format:parentheses")
def nested(reply: str, _: Values) -> bool:
    """Five levels of any brackets, each closed by its own kind."""
    stack: list[str] = []
    deepest = 0
    for letter in reply:
        if letter in "([{":
            stack.append(letter)
        elif letter in ")]}":
            if stack and "([{".index(stack[-1]) == ")]}".index(letter):
                deepest = max(deepest, len(stack))
                stack.pop()
            else:
                stack = []
    return deepest >= 5


@verifies("format:quote_unquote")
def quotes_explained(reply: str, _: Values) -> bool:
    text = reply.replace("“", '"').replace("”", '"')
    parts = text.split('"')
    return len(parts) > 2 and len(parts) % 2 == 1 and all(words_of(after) for after in parts[2::2])


@verifies("format:quotes")
def quotes_in_quotes(reply: str, _: Values) -> bool:
    """Three levels, alternating between double and single quotes; an apostrophe within a word is none."""
    text = re.sub(r"(?<=\w)['’](?=\w)", "", reply)
    text = re.sub("[“”]", '"', re.sub("[‘’]", "'", text))
    stack: list[str] = []
    deepest = 0
    for letter in (c for c in text if c in "\"'"):
        if stack and stack[-1] == letter:
            deepest = max(deepest, len(stack))
            stack.pop()
        else:
            stack.append(letter)
    return not stack and deepest >= 3


@verifies("format:sub-bullets")
def sub_bullets(reply: str, _: Values) -> bool:
    groups = re.split(r"^\s*\*(?!\*)", reply, flags=re.MULTILINE)[1:]
    return bool(groups) and all(re.search(r"^\s*-\s*\S", group, re.MULTILINE) for group in groups)


@verifies("format:thesis")
def thesis(reply: str, _: Values) -> bool:
    """Sections are what headings (#, or a bold line) begin; without headings, paragraphs."""
    heading = re.compile(r"^(?:#{1,6}\s.*|\*\*[^\n]*\*\*|<h\d>.*</h\d>)\s*$", re.MULTILINE)
    parts = heading.split(reply)[1:] if heading.search(reply) else paragraphs_of(reply)
    return bool(parts) and all(re.match(r"\s*(?:<p>\s*)?<(i|em)>[^<]*\w[^<]*</\1>", part) for part in parts)


@verifies("format:title_case")
def title_case(reply: str, _: Values) -> bool:
    found = [w for w in words_of(reply) if w[0].isalpha()]
    return bool(found) and all(not w[0].islower() or w.lower() in MINOR for w in found)


def table(reply: str, values: Values, delimiter: str) -> list[list[str]] | None:
    """The rows below a header with the prompt's columns, as many as it asks for; None if it is not so."""
    asked = str(values["prompt"])
    names, count = re.search(r"\[(.*?)\]", asked), re.search(r"generate (\d+) rows", asked)
    if not names or not count:
        return None
    body = re.sub(r"\A\s*```\w*\n|\n```\s*\Z", "", reply).strip()
    # A lone carriage return ends a line as anywhere else; csv would raise.
    rows = list(
        csv.reader(io.StringIO(body.replace("\r\n", "\n").replace("\r", "\n")), delimiter=delimiter, strict=False)
    )
    header = [name.strip().strip("\"'") for name in names.group(1).split(",")]
    ok = rows and [h.strip() for h in rows[0]] == header and len(rows) == int(count.group(1)) + 1
    return rows[1:] if ok and all(len(row) == len(header) for row in rows) else None


@verifies("custom:csv_city")
def csv_plain(reply: str, values: Values) -> bool:
    return table(reply, values, ",") is not None


@verifies("custom:csv_quotes")
def csv_quotes(reply: str, values: Values) -> bool:
    body = [line for line in lines_of(reply) if not line.startswith("```")]
    quoted = all(re.fullmatch(r'\s*"[^"]*"\s*', field) for line in body for field in line.split("\t"))
    return quoted and table(reply, values, "\t") is not None


@verifies("custom:csv_special_character")
def csv_special(reply: str, values: Values) -> bool:
    return bool(re.search(r'(?m)(?:^|,)"[^"\n]*[^\w\s"][^"\n]*"', reply)) and table(reply, values, ",") is not None


@verifies("custom:date_format_list")
def dates(reply: str, _: Values) -> bool:
    try:
        found = [datetime.date.fromisoformat(d.strip()) for d in reply.strip().rstrip(".").split(",")]
    except ValueError:
        return False
    return bool(found) and all(re.fullmatch(r"\s*\d{4}-\d\d-\d\d\s*", d) for d in reply.strip().rstrip(".").split(","))


@verifies("custom:mcq_count_length")
def longer_questions(reply: str, values: Values) -> bool:
    asked = re.search(r"(\d+) multiple choice questions with (\d+) options", str(values["prompt"]))
    parts = re.split(r"^\W*Question\b", reply, flags=re.MULTILINE)
    if not asked or parts[0].strip() or len(parts) - 1 != int(asked.group(1)):
        return False
    lengths = []
    for part in parts[1:]:
        choices = [m.start() for m in re.finditer(r"^\W*[A-Za-z1-9][).:]", part, re.MULTILINE)]
        choices = [c for c in choices if part[:c].strip()]
        if len(choices) != int(asked.group(2)):
            return False
        lengths.append(
            len(part[: choices[0]].split("\n", 1)[0].strip() + part[: choices[0]].partition("\n")[2].strip())
        )
    return all(a < b for a, b in itertools.pairwise(lengths))


@verifies("custom:reverse_newline")
def reversed_list(reply: str, _: Values) -> bool:
    """Africa has 54 states, and some count more or fewer: at least 50 lines."""
    lines = [
        re.sub(r"^[\W\d]+", "", unicodedata.normalize("NFKD", line)).casefold().strip() for line in lines_of(reply)
    ]
    return len(lines) >= 50 and lines == sorted(lines, reverse=True)


@verifies("combination:two_responses")
def two_responses(reply: str, _: Values) -> bool:
    parts = reply.split("******")
    inner = [p for i, p in enumerate(parts) if p.strip() or 0 < i < len(parts) - 1]
    return len(inner) == 2 and inner[0].strip() != inner[1].strip() and all(p.strip() for p in inner)


@verifies("count:conjunctions", "small_n")
def conjunctions(reply: str, values: Values) -> bool:
    return holds(len({"and", "but", "for", "nor", "or", "so", "yet"} & set(bare(reply.split()))), "", values["small_n"])
