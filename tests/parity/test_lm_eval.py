"""Law: what lm-evaluation-harness measures through the server is what `qmax score` and the sampler say.

Nothing is fetched: model, tokenizer and tasks are local, and the hub is turned off.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import qmax
from model.load import load_model
from serve.engine import Engine
from serve.sampling_params import SamplingParams
from tests.serving import ROOT, served_by_verb
from train.tasks.texts import WikiText

pytestmark = [
    pytest.mark.skipif(os.environ.get("QMAX_PARITY") != "1", reason="./run.sh test --parity"),
    pytest.mark.filterwarnings("default"),  # what the harness warns of is its own to mend
]

MODEL = ROOT / "tests" / "data" / "stories260K.bin"
NAME = "stories"
START = 1
"""<s>, with which the model's stories begin."""
ROWS = [
    {"text": text, "choices": choices, "gold": gold}
    for text, choices, gold in (
        ("Once upon a time, there was a little girl named", [" Lily", " Max", " Tim", " dog"], 0),
        ("Tim was sad because he lost his", [" the", " toy", " happy"], 1),
        ('She said, "Thank', [" you,", " play.", " ball."], 0),
        ("They went to the park to", [" play.", " said.", " a."], 2),
    )
]
WORDS = 12
"""Tokens of a reply."""


@pytest.fixture(scope="module", autouse=True)
def _offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The hub is off before the harness is imported, and its caches are of this test alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hub")))
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE", "TRANSFORMERS_OFFLINE"):
            patch.setenv(name, "1")
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # where another test imported it before
        pytest.importorskip("lm_eval", reason="lm-eval is not installed; it is in the extra `parity`")
        patch.setenv("OPENAI_API_KEY", "secret")
        patch.setenv("QMAX_API_KEYS", "secret")
        yield


@pytest.fixture(scope="module")
def address(_offline: None) -> Iterator[str]:
    with served_by_verb(MODEL, "--name", NAME) as (_, found):
        while httpx.get(f"{found}/health", timeout=60).status_code != 200:  # the harness does not wait for long
            time.sleep(0.1)
        yield found


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted") / NAME
    assert qmax.main(["convert", str(MODEL), str(folder)]) == 0
    return folder


def scored(rows: list[list[int]], folder: Path) -> list[list[float]]:
    """Log-probabilities of tokens, by `qmax score`; that of the first, which has none, is nothing."""
    given, found = folder / "rows.jsonl", folder / "scores.jsonl"
    given.write_text("".join(json.dumps({"tokens": row}) + "\n" for row in rows))
    assert qmax.main(["score", str(MODEL), "--input", str(given), "--output", str(found)]) == 0
    return [[one or 0.0 for one in json.loads(line)["logprobs"]] for line in found.read_text().splitlines()]


def measured(kind: str, options: dict[str, Any], folder: Path, rows: list[dict[str, Any]], **task: Any) -> Any:
    """What the harness finds for a task of these rows."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    data = folder / "task.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "task": "local",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "doc_to_text": "{{text}}",
        **task,
    }
    options = {"model": NAME, "max_length": 512, "max_retries": 1, **options}
    found = simple_evaluate(
        kind,
        options,
        tasks=[config],
        task_manager=TaskManager(include_defaults=False),  # reading its thousands of tasks takes long
        bootstrap_iters=0,
        apply_chat_template="chat" in kind,
        log_samples=True,
    )
    assert found is not None
    return found["results"]["local"], found["samples"]["local"]


@pytest.mark.parametrize("tokenized", [True, False])
def test_choices_by_their_log_likelihood(address: str, tokenizer_folder: Path, tmp_path: Path, tokenized: bool) -> None:
    options = {"base_url": f"{address}/v1/completions", "tokenizer": str(tokenizer_folder)}
    options |= {"tokenized_requests": tokenized, "batch_size": 2, "num_concurrent": 1 + 3 * tokenized}
    results, samples = measured(
        "local-completions", options, tmp_path, ROWS,
        output_type="multiple_choice", doc_to_choice="choices", doc_to_target="gold", target_delimiter="",
    )  # fmt: skip
    _, tokenizer = load_model(MODEL)
    right = 0
    for row, sample in zip(ROWS, sorted(samples, key=lambda one: one["doc_id"]), strict=True):
        start = len(tokenizer.encode(row["text"]))
        wholes = [tokenizer.encode(row["text"] + choice) for choice in row["choices"]]
        wanted = [sum(line[start:]) for line in scored(wholes, tmp_path)]
        assert [one[0] for one in sample["filtered_resps"]] == pytest.approx(wanted, abs=1e-3)
        right += wanted.index(max(wanted)) == row["gold"]
    assert results["acc,none"] == right / len(ROWS)
    assert 0 < right < len(ROWS), "a test that cannot tell right from wrong"


def test_the_perplexity_of_texts(address: str, tokenizer_folder: Path, tmp_path: Path) -> None:
    options = {"base_url": f"{address}/v1/completions", "tokenizer": str(tokenizer_folder)}
    options |= {"custom_prefix_token_id": START}
    metrics = [{"metric": "bits_per_byte"}]
    results, _ = measured(
        "local-completions", options, tmp_path, ROWS,
        output_type="loglikelihood_rolling", doc_to_target="{{text}}", metric_list=metrics,
    )  # fmt: skip
    _, tokenizer = load_model(MODEL)
    lines = scored([[START, *tokenizer.encode(row["text"])] for row in ROWS], tmp_path)
    size = sum(len(row["text"].encode()) for row in ROWS)
    assert results["bits_per_byte,none"] == pytest.approx(-sum(map(sum, lines)) / size / math.log(2), abs=1e-3)


@pytest.mark.parametrize("kind", ["completions", "chat-completions"])
def test_replies_are_the_samplers(address: str, tokenizer_folder: Path, tmp_path: Path, kind: str) -> None:
    model, tokenizer = load_model(MODEL)
    prompts = [
        tokenizer.encode_chat([{"role": "user", "content": row["text"]}], add_generation_prompt=True)
        if kind.startswith("chat")
        else tokenizer.encode(row["text"])
        for row in ROWS
    ]
    params = SamplingParams(temperature=0, max_tokens=WORDS, stop_ids=tokenizer.stop_ids)
    said = []
    for prompt, reply in zip(prompts, Engine(model, tokenizer).generate(prompts, params), strict=True):
        before = [] if kind.startswith("chat") else prompt
        text = tokenizer.decode([*before, *reply.content]).removeprefix(tokenizer.decode(before))
        said.append(text.partition(".")[0])
    rows = [{"text": row["text"], "said": said[n] if n % 2 else "no"} for n, row in enumerate(ROWS)]
    options = {"base_url": f"{address}/v1/{'chat/' * kind.startswith('chat')}completions"}
    options |= {} if kind.startswith("chat") else {"tokenizer": str(tokenizer_folder)}
    results, samples = measured(
        f"local-{kind}", options, tmp_path, rows,
        output_type="generate_until", doc_to_target="{{said}}", metric_list=[{"metric": "exact_match"}],
        generation_kwargs={"until": ["."], "max_gen_toks": WORDS, "temperature": 0, "do_sample": False},
    )  # fmt: skip
    assert [one["resps"][0][0] for one in sorted(samples, key=lambda one: one["doc_id"])] == said
    assert results["exact_match,none"] == 0.5


# ---- in this process ---------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "rows", "task"),
    [
        (
            "arc",
            [{"question": r["text"], "choices": [c.strip() for c in r["choices"]], "answer": r["gold"]} for r in ROWS],
            {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "answer",
             "doc_to_text": "Question: {{question}}\nAnswer:",
             "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]},
        ),
        (
            "lambada",
            [{"text": f"{row['text']}{choice}"} for row in ROWS for choice in row["choices"]],
            {"output_type": "loglikelihood", "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
             "doc_to_target": "{{' '+text.split(' ')[-1]}}", "target_delimiter": "",
             "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}]},
        ),
        (
            "text",
            [{"text": " ".join(row["text"] for row in ROWS) * times} for times in (1, 30)],
            {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
             "metric_list": [{"metric": f"{one}"} for one in ("bits_per_byte", "byte_perplexity", "word_perplexity")]},
        ),
    ],
)  # fmt: skip
def test_the_harness_and_the_verb_agree(name: str, rows: list[Any], task: dict[str, Any], tmp_path: Path) -> None:
    import train.evaluation.harness  # noqa: F401  # makes the harness know us

    results, _ = measured("qmax", {"model": str(MODEL), "max_length": None}, tmp_path, rows, **task)
    path, out = tmp_path / "rows.jsonl", tmp_path / "out.json"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["eval", str(MODEL), "--tasks", f"{name}:{path}", "--out", str(tmp_path / "eval"), "--json", str(out)]
    assert qmax.main(words) == 0
    (ours,) = json.loads(out.read_text())["tasks"].values()
    for metric, one in ours["metrics"].items():
        assert results[f"{metric},none"] == pytest.approx(one["value"], rel=1e-5), metric


def test_the_harness_gets_the_engines_replies(tmp_path: Path) -> None:
    import train.evaluation.harness  # noqa: F401

    model, tokenizer = load_model(MODEL)
    prompts = [tokenizer.encode(row["text"]) for row in ROWS]
    params = SamplingParams(temperature=0, max_tokens=WORDS)
    said = []
    for prompt, reply in zip(prompts, Engine(model, tokenizer).generate(prompts, params), strict=True):
        text = tokenizer.decode([*prompt, *reply.content]).removeprefix(tokenizer.decode(prompt))
        said.append(text.partition(".")[0])
    rows = [{"text": row["text"], "said": text} for row, text in zip(ROWS, said, strict=True)]
    results, _ = measured(
        "qmax", {"model": str(MODEL)}, tmp_path, rows,
        output_type="generate_until", doc_to_target="{{said}}", metric_list=[{"metric": "exact_match"}],
        generation_kwargs={"until": ["."], "max_gen_toks": WORDS, "temperature": 0, "do_sample": False},
    )  # fmt: skip
    assert results["exact_match,none"] == 1.0


@pytest.mark.parametrize(
    "page",
    [
        " = Robert = \n Robert <unk> is an English film , television and theatre actor . \n",
        " Ricardo <unk> Jr . , who threw 1 @,@ 000 well @-@ known balls ( 3 @.@ 5 each ) ; it was his 's ! ? \n",
        " = = Early = = \n = = = Late = = = \n ' so ' [ he ] { was } said : \" none \" at 5 \N{DEGREE SIGN} N 7 \n",
    ],
)
def test_wikitext_is_read_as_the_harness_reads_it(page: str) -> None:
    from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer

    assert WikiText.said(WikiText.__new__(WikiText), page) == wikitext_detokenizer({"page": page})
