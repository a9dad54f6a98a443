"""Law: an extended vocabulary keeps its ids, gives back every text, and says the new language in fewer tokens."""

from __future__ import annotations

import gzip
import json
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from text_fixtures import byte_tokenizer

from errors import UserError
from model.tokenizer import Tokenizer
from model.tokenizer_extension import extend_tokenizer, spelled_before
from model.tokenizer_training import train_tokenizer
from train.data.sources import read_documents
from train.tokenizer_verb import tokenizer_main

DATA = Path(__file__).parent / "data"
TEXTS = Path(__file__).resolve().parent.parent / "configs" / "demo_data"
ADDED = 120
KINDS = ("trained", "llama", "qwen", "bytes")
PROPERTY = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
any_text = st.one_of(
    st.text(), st.lists(st.sampled_from(["les ", "红楼梦", "<|im_end|>", "\u2581", "été", " ", "\n", "7"])).map("".join)
)


def texts(name: str, characters: int = 40_000) -> list[str]:
    """The beginning of a file of the embedded corpus."""
    found: list[str] = []
    for text in read_documents([str(TEXTS / f"pretrain_{name}.jsonl.gz")], 0):
        found.append(text)
        if sum(map(len, found)) >= characters:
            break
    return found


FRENCH, CHINESE, ENGLISH = (texts(name) for name in ("fr_candide", "zh_red_chamber", "en_sherlock"))


def make(kind: str, place: Path) -> Tokenizer:
    """A tokenizer of each kind that can be extended."""
    if kind == "trained":
        return train_tokenizer(ENGLISH, 480, place, progress=False)
    if kind == "bytes":
        byte_tokenizer().save(place)
        return Tokenizer.load(place)
    place.mkdir()
    if kind == "llama":
        (place / "tokenizer.model").write_bytes((DATA / "tok512.model").read_bytes())
    else:
        (place / "tokenizer.json").write_bytes(gzip.decompress((DATA / "qwen3_tokenizer.json.gz").read_bytes()))
        config = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
        (place / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.load(place)


Pair = tuple[Tokenizer, Tokenizer]


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A vocabulary, and the same with pieces of French and Chinese."""
    place = tmp_path_factory.mktemp(request.param)
    old = make(request.param, place / "old")
    return old, extend_tokenizer(old, FRENCH + CHINESE, ADDED, place / "new", progress=False)


def test_old_ids_stay_and_new_ones_follow(pair: Pair) -> None:
    old, new = pair
    assert new.vocab_size == old.vocab_size + ADDED
    assert all(new.token_bytes(i) == old.token_bytes(i) for i in range(old.vocab_size))
    assert new.stop_ids == old.stop_ids
    assert new.document_end_id == old.document_end_id
    pieces = [new.token_bytes(i) for i in range(old.vocab_size, new.vocab_size)]
    known = {old.token_bytes(i) for i in range(old.vocab_size)}
    assert len(set(pieces)) == ADDED
    assert all(piece and piece not in known for piece in pieces)
    chat = [{"role": "user", "content": "l'été <|im_end|>"}, {"role": "assistant", "content": "红楼梦"}]
    rendered = new.encode_chat(chat)
    assert [i for i in rendered if i in old.stop_ids] == [i for i in old.encode_chat(chat) if i in old.stop_ids]


@PROPERTY
@given(text=any_text)
def test_every_text_decodes_as_before(pair: Pair, text: str) -> None:
    old, new = pair
    assert new.decode(new.encode(text)) == old.decode(old.encode(text))
    if "/llama" not in old.source:  # sentencepiece is told to drop spaces there
        assert new.decode(new.encode(text)) in (text, unicodedata.normalize("NFC", text))


def test_new_pieces_save_tokens_on_the_new_languages_and_cost_none_on_the_old(pair: Pair) -> None:
    old, new = pair

    def tokens(documents: list[str], tokenizer: Tokenizer) -> int:
        return sum(len(tokenizer.encode(text)) for text in documents)

    assert tokens(FRENCH, new) < 0.97 * tokens(FRENCH, old)
    assert tokens(CHINESE, new) < 0.97 * tokens(CHINESE, old)
    assert tokens(ENGLISH, new) <= tokens(ENGLISH, old)
    used = {i for text in FRENCH + CHINESE for i in new.encode(text)}
    added = range(old.vocab_size, new.vocab_size)
    # A piece that a longer one swallowed everywhere is rare.
    assert sum(i in used for i in added) >= 0.9 * ADDED


def test_a_new_token_is_spelled_by_old_ones(pair: Pair) -> None:
    old, new = pair
    spelled = spelled_before(old, new)
    assert list(spelled) == list(range(old.vocab_size, new.vocab_size))
    for token, parts in spelled.items():
        assert len(parts) > 1
        assert b"".join(old.token_bytes(i) for i in parts) == new.token_bytes(token)
    # In a text the old tokens of a new one stand where it stands.
    for text in (FRENCH[0], CHINESE[0], ENGLISH[0]):
        expanded = [i for token in new.encode(text) for i in spelled.get(token, (token,))]
        assert expanded == old.encode(text)


def test_the_library_reads_the_larger_file_alike(pair: Pair) -> None:
    old, new = pair
    samples = [*FRENCH[:3], *CHINESE[:3], *ENGLISH[:2]]
    if "tokenizer.json" in new.files:
        import tokenizers

        library = tokenizers.Tokenizer.from_str(new.files["tokenizer.json"].decode())
        assert library.get_vocab_size() == new.vocab_size
        for text in samples:
            assert library.encode(text, add_special_tokens=False).ids == new.encode(text)
        for control in ("<|endoftext|>", "<|im_start|>", "<|im_end|>"):
            assert library.encode(control, add_special_tokens=False).ids == [old.token_id(control)]
    else:
        import sentencepiece

        assert new.files["tokenizer.model"].startswith(old.files["tokenizer.model"])
        library = sentencepiece.SentencePieceProcessor(model_proto=new.files["tokenizer.model"])
        assert library.get_piece_size() == new.vocab_size
        for text in samples:
            assert library.encode(text) == new.encode(text)


def test_the_same_texts_give_the_same_file_and_can_be_extended_again(tmp_path: Path) -> None:
    old = make("trained", tmp_path / "old")
    once = extend_tokenizer(old, FRENCH, 40, tmp_path / "a", progress=False)
    assert extend_tokenizer(old, FRENCH, 40, tmp_path / "b", progress=False).fingerprint == once.fingerprint
    twice = extend_tokenizer(once, CHINESE, 40, tmp_path / "c", progress=False)
    assert twice.vocab_size == old.vocab_size + 80
    assert all(twice.token_bytes(i) == once.token_bytes(i) for i in range(once.vocab_size))


REFUSED: list[tuple[str, Callable[[Path], list[str]], str]] = [
    ("more than there is", lambda place: ["--extend", str(place), "--add", "90000"], "90000 new tokens are more than"),
    ("nothing to add", lambda place: ["--extend", str(place), "--add", "0"], "at least 1"),
    ("no number", lambda place: ["--extend", str(place)], "--extend goes with --add"),
    ("both", lambda place: ["--extend", str(place), "--add", "9", "--vocab-size", "9"], "without --vocab-size"),
    ("nothing to extend", lambda place: ["--add", "9", "--vocab-size", "400"], "--add is for --extend"),
    ("no size", lambda place: [], "required: --vocab-size"),
    ("no model", lambda place: ["--extend", str(place / "nothing"), "--add", "9"], "nothing does not exist"),
]


@pytest.mark.parametrize(("words", "sentence"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_what_cannot_be_is_refused(words: Callable[[Path], list[str]], sentence: str, tmp_path: Path) -> None:
    byte_tokenizer().save(tmp_path / "old")
    (tmp_path / "text.txt").write_text("\n\n".join(FRENCH[:2]))
    given = [str(tmp_path / "text.txt"), "--out", str(tmp_path / "new"), *words(tmp_path / "old")]
    with pytest.raises(UserError, match=sentence):
        tokenizer_main(given)
    assert not (tmp_path / "new").exists()


def test_a_unigram_model_is_refused(tmp_path: Path) -> None:
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(ENGLISH), model_writer=model, model_type="unigram", vocab_size=300, minloglevel=2
    )
    old = Tokenizer({"tokenizer.model": model.getvalue()}, "unigram")
    with pytest.raises(UserError, match="no byte-pair vocabulary"):
        extend_tokenizer(old, FRENCH, 40, tmp_path / "new", progress=False)


def test_the_verb_tells_what_was_won(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    byte_tokenizer().save(tmp_path / "old")
    (tmp_path / "text.txt").write_text("\n\n".join(FRENCH))
    out, numbers = tmp_path / "new", tmp_path / "numbers.json"
    words = ["--extend", str(tmp_path / "old"), "--add", "200", "--out", str(out), "--json", str(numbers)]
    assert tokenizer_main([str(tmp_path / "text.txt"), *words]) == 0
    told = json.loads(numbers.read_text())
    assert told["tokens_per_character"] < 0.75 * told["tokens_per_character_before"]
    assert told["vocab_size"] == byte_tokenizer().vocab_size + 200 == Tokenizer.load(out).vocab_size
    assert "tokens per character" in capsys.readouterr().out
