"""Tokens are llama.cpp's, for the embedded model and for each kind of tokenizer on vocabularies made for the purpose.

Equality is exact: one token that differs is a model that was trained on something else than it is served.
"""

import itertools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import pytest
from gguf import TokenType
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from lorafit.containers.gguf import GGUFFile
from lorafit.errors import ModelError
from lorafit.models.pretokenizers import FAMILIES, FAMILY_BY_NAME
from lorafit.models.tokenizer import end_of_turn_ids, tokenizer_from_gguf
from tests.oracles.llamacpp import LlamaCppOracle

NASTY = [
    "",
    " ",
    "Hello, world! It's 12345 o'clock; I'll've 3.14159 THEY'RE.",
    "  two  spaces\tand\ttabs \n\n\n lines\r\nof\r\n\r\ntext   \n",
    "trailing   ",
    "no\u00a0break\u2003em\u3000wide\u2028line\u0085next\u200bzero",
    "combining e\u0301 a\u0308\u0323 \u0301alone नमस्ते ไทย",
    "👩‍👩‍👧‍👦 family, 👍🏽 tone, 🏳️‍🌈 flag",
    "日本語のテキスト、中文，한국어 — mixed",
    "שלום עולם العربية ١٢٣ \u202eabc\u202c",
    "x=1;y+=2\nif(a<b){return~a^b|c;}\n\t// ```code``` $PATH",
    "ſtraße İstanbul ﬁ ² ½ Ⅷ 𝔘𝟙",
    "\x00\x07\x1c\x7f\ufeff\ufffd",
]
BYTES: dict[int, str] = bytes_to_unicode()  # GPT-2's printable stand-ins
CHATS = [
    "<|im_start|>user\n  hi<|im_end|>\n<|im_start|>assistant\n",
    "<|im_end|><|im_end|> <|endoftext|>\n\n<|im_start|>",
    "not special: <|im_sta rt|> <im_end> <| im_end |>",
]


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path) -> tuple[PreTrainedTokenizerFast, LlamaCppOracle]:
    tokenizer = tokenizer_from_gguf(GGUFFile.open(smollm2_path))
    return tokenizer, LlamaCppOracle(smollm2_path, vocab_only=True)


class TestSmolLM2:
    @pytest.mark.parametrize("text", [*NASTY, *CHATS])
    def test_tokens_and_their_text(self, smollm2: Any, text: str) -> None:
        tokenizer, oracle = smollm2
        tokens = tokenizer(text).input_ids
        assert tokens == oracle.tokenize(text, add_special=True, parse_special=True)
        assert tokenizer.decode(tokens) == text

    @settings(max_examples=200, deadline=None)
    @given(text=st.text(st.characters(exclude_categories=["Cs", "Cn"])))
    @example(text='"\x16>')
    @example(text="a\u2028 \u0085b")
    def test_any_text(self, smollm2: Any, text: str) -> None:
        """Characters newer than Python's Unicode tables are left out: the newest letters are not yet letters to all.

        Six control characters have no token in this vocabulary: they are dropped, but what they part does not merge.
        """
        tokenizer, oracle = smollm2
        tokens = tokenizer(text).input_ids
        assert tokens == oracle.tokenize(text, add_special=True, parse_special=True)
        assert tokenizer.decode(tokens) == oracle.detokenize(tokens).decode()

    def test_special_tokens(self, smollm2: Any) -> None:
        tokenizer, oracle = smollm2
        assert len(tokenizer) == oracle.n_vocab == 49152
        assert tokenizer.bos_token_id == oracle.bos == 1
        assert tokenizer.eos_token_id == oracle.eos == 2
        assert (tokenizer.pad_token, tokenizer.unk_token) == ("<|im_end|>", "<|endoftext|>")
        assert tokenizer.chat_template.startswith("{% for message in messages %}")

    def test_ends_of_turn_are_llama_cpps_but_for_fill_in_the_middle(self, smollm2: Any) -> None:
        tokenizer, oracle = smollm2
        assert end_of_turn_ids(tokenizer) == {0, 2}
        rest = oracle.eog_ids() - end_of_turn_ids(tokenizer)
        assert tokenizer.convert_ids_to_tokens(sorted(rest)) == ["<reponame>"]


# --- vocabularies made for the purpose --------------------------------------------------------------------------------


def write_vocabulary(path: Path, vocabulary: dict[str, TokenType], name: str = "tiny", **entries: Any) -> Path:
    """A GGUF file with a tokenizer and no weights; ``entries`` are its ``tokenizer.ggml.*``, None leaves one out."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(name)
    for name, value in {
        "context_length": 64,
        "embedding_length": 32,
        "block_count": 1,
        "feed_forward_length": 32,
    }.items():
        writer.add_uint32(f"llama.{name}", value)
    writer.add_uint32("llama.attention.head_count", 1)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    values = {"tokens": list(vocabulary), "token_type": [int(kind) for kind in vocabulary.values()], **entries}
    for name, value in values.items():
        add = {bool: writer.add_bool, str: writer.add_string, int: writer.add_uint32, list: writer.add_array}
        if value is not None:
            add[type(value)](f"tokenizer.ggml.{name}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def build(path: Path) -> PreTrainedTokenizerFast:
    return tokenizer_from_gguf(GGUFFile.open(path))


def assert_tokens_equal(path: Path, texts: Sequence[str]) -> None:
    tokenizer, oracle = build(path), LlamaCppOracle(path, vocab_only=True)
    for text in texts:
        tokens = tokenizer(text).input_ids
        assert tokens == oracle.tokenize(text, add_special=True, parse_special=True), ascii(text)
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


# Every pair of bytes merges, in random order. So a word border in another place nearly always gives other tokens.
ALPHABET = [*"aBzZ'stredvmlSTREDVML09 \t\n\r.,!~$+<=>^|`_/-\"#(", *"éÉßſDžªʼ日本ع٣½Ⅷ²€…—！～👩🏽𝔘𐐀"]
ALPHABET += ["\x00", "\u00a0", "\u0085", "\u2028", "\u3000", "\u200b", "\u200d", "\u0301", "\u0e31", "\ue000"]
SPECIAL = {
    "<|bos|>": TokenType.CONTROL,
    "<|stop|>": TokenType.CONTROL,
    "<user thing>": TokenType.USER_DEFINED,
    "<|eot_id|>": TokenType.NORMAL,  # llama.cpp makes it a control token whatever the file says
    "<|unused|>": TokenType.UNUSED,
}
WHOLE_WORDS = ["zzzz", "Ġlllll"]  # tokens that no merges lead to


def write_byte_level(path: Path, pre: str | None, **entries: Any) -> Path:
    used = {byte for character in ALPHABET for byte in character.encode()}
    pairs = [(BYTES[a], BYTES[b]) for a, b in itertools.product(sorted(used), repeat=2)]
    random.Random(0).shuffle(pairs)
    normal = [*BYTES.values(), *(a + b for a, b in pairs), *WHOLE_WORDS]
    tokens = {**dict.fromkeys(normal, TokenType.NORMAL), **SPECIAL}
    return write_vocabulary(
        path,
        tokens,
        **{
            "model": "gpt2",
            "pre": pre,
            "merges": [f"{a} {b}" for a, b in pairs],
            "bos_token_id": list(tokens).index("<|bos|>"),
            "eos_token_id": list(tokens).index("<|stop|>"),
            **entries,
        },
    )


def random_texts(count: int) -> list[str]:
    source = random.Random(1)
    contractions = ["'s", "'S", "'t", "'T", "'re", "'Re", "'rE", "'ve", "'VE", "'m", "'M", "'ll", "'LL", "'d", "'D"]
    parts = [*ALPHABET, *SPECIAL, *contractions, "    ", "123456", "zzzz", " lllll", "\r\n", "aBzZ"]
    return ["".join(source.choices(parts, k=source.randint(1, 12))) for _ in range(count)]


class TestByteLevel:
    @pytest.mark.parametrize("pre", sorted(FAMILY_BY_NAME))
    def test_each_pre_tokeniser(self, tmp_path: Path, pre: str) -> None:
        assert_tokens_equal(write_byte_level(tmp_path / "vocab.gguf", pre), [*NASTY, *CHATS, *random_texts(300)])

    def test_these_texts_tell_every_two_families_apart(self, tmp_path: Path) -> None:
        """Else the test above would pass with a name in the wrong family."""
        texts = random_texts(300)
        tokens = []
        for family in FAMILIES:
            tokenizer = build(write_byte_level(tmp_path / "vocab.gguf", family.names.split()[0], add_bos_token=False))
            tokens.append(tokenizer(texts).input_ids)
        for a, b in itertools.combinations(range(len(FAMILIES)), 2):
            assert tokens[a] != tokens[b], f"{FAMILIES[a].names} | {FAMILIES[b].names}"

    @pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe"])
    @pytest.mark.parametrize("add_bos", [True, False])
    @pytest.mark.parametrize("add_eos", [True, None])
    def test_bos_and_eos_as_the_file_says(self, tmp_path: Path, pre: str, add_bos: bool, add_eos: bool | None) -> None:
        path = write_byte_level(tmp_path / "vocab.gguf", pre, add_bos_token=add_bos, add_eos_token=add_eos)
        tokens = build(path)("a").input_ids
        assert len(tokens) == 1 + add_bos + bool(add_eos)
        assert tokens == LlamaCppOracle(path, vocab_only=True).tokenize("a", add_special=True, parse_special=True)

    def test_ends_of_turn_by_name_and_by_metadata(self, tmp_path: Path) -> None:
        tokens = list(SPECIAL)
        first = len(BYTES) + len({b for c in ALPHABET for b in c.encode()}) ** 2 + len(WHOLE_WORDS)
        eot = first + tokens.index("<user thing>")
        path = write_byte_level(tmp_path / "vocab.gguf", "gpt-2", eot_token_id=eot)
        tokenizer = build(path)
        ends = end_of_turn_ids(tokenizer)
        assert set(tokenizer.convert_ids_to_tokens(sorted(ends))) == {"<|stop|>", "<user thing>", "<|eot_id|>"}
        assert ends == LlamaCppOracle(path, vocab_only=True).eog_ids()


# Pieces with several ways to put them together, and runs, in which such ways compete.
PIECES = [
    "▁t",
    "he",
    "▁the",
    "in",
    "ing",
    "▁▁",
    "▁▁▁▁",
    "▁▁▁",
    "==",
    "====",
    "===",
    "er",
    "▁a",
    "nd",
    "▁and",
    "th",
    "▁th",
]
PIECES += ["aa", "aaa", "aaaaa", "aaaa", "ab", "ba", "aba", "bab", "abab", "日本", "本語", "'s", "▁'"]


def write_sentence_piece(path: Path, best_first: Sequence[str] = PIECES, **entries: Any) -> Path:
    tokens = {"<unk>": TokenType.UNKNOWN, "<s>": TokenType.CONTROL, "</s>": TokenType.CONTROL}
    tokens |= {f"<0x{byte:02X}>": TokenType.BYTE for byte in range(256)}
    characters = sorted({character for piece in PIECES for character in piece} | set("xyz.,!"))
    rank = {piece: i for i, piece in enumerate([*best_first, *characters])}
    tokens |= dict.fromkeys(sorted(rank), TokenType.NORMAL)
    tokens |= {"th": TokenType.UNUSED, "<|im_end|>": TokenType.USER_DEFINED}  # an unused token merges all the same
    scores = [-float(rank.get(token, 0)) for token in tokens]
    ids = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
    return write_vocabulary(path, tokens, **{"model": "llama", "scores": scores, **ids, **entries})


class TestSentencePiece:
    TEXTS = (
        *NASTY,
        *CHATS,
        "<s>the thing</s> and<|im_end|> the\n<s><s>",
        " the  then   an      d        ",
        "a " * 9 + "a" * 17 + "b" * 3 + "ab" * 9 + "=" * 13,
        "▁already ▁blocks <0x0A> <unk>日本語",
    )

    @pytest.mark.parametrize("prefix", [None, True, False])
    @pytest.mark.parametrize("add_bos", [None, False])
    def test_tokens(self, tmp_path: Path, prefix: bool | None, add_bos: bool | None) -> None:
        path = write_sentence_piece(tmp_path / "vocab.gguf", add_space_prefix=prefix, add_bos_token=add_bos)
        tokenizer, oracle = build(path), LlamaCppOracle(path, vocab_only=True)
        for text in self.TEXTS:
            assert tokenizer(text).input_ids == oracle.tokenize(text, add_special=True, parse_special=True), ascii(text)
        assert tokenizer("").input_ids == ([] if add_bos is False else [1])
        # Behind a special token a space is added, and a block becomes one: texts with either do not come back.
        for text in (*NASTY, "  the thing  "):
            assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text

    @settings(max_examples=150, deadline=None)
    @given(order=st.permutations(PIECES), text=st.text("ab =thein▁日\n", max_size=30))
    def test_any_order_of_scores(self, tmp_path_factory: pytest.TempPathFactory, order: list[str], text: str) -> None:
        path = write_sentence_piece(tmp_path_factory.mktemp("order") / "vocab.gguf", order)
        oracle = LlamaCppOracle(path, vocab_only=True)
        assert build(path)(text).input_ids == oracle.tokenize(text, add_special=True, parse_special=True)

    def test_ends_of_turn(self, tmp_path: Path) -> None:
        path = write_sentence_piece(tmp_path / "vocab.gguf")
        assert end_of_turn_ids(build(path)) == LlamaCppOracle(path, vocab_only=True).eog_ids()

    def test_a_piece_of_characters_that_are_no_tokens_is_refused(self, tmp_path: Path) -> None:
        """llama.cpp would merge them; what lorafit cannot do alike, it does not do."""
        with pytest.raises(ModelError, match="'qq' is made of 'q', which is not in the vocabulary"):
            build(write_sentence_piece(tmp_path / "vocab.gguf", [*PIECES, "qq"]))


# Gemma's way with white space: runs of spaces and line breaks are tokens of the user's, and no space is put in front.
RUNS = ["  ", "   ", "    ", "\n\n", "\n\n\n", "\t\t", "<table>", "</table>", "<start_of_turn>"]


def write_gemma(path: Path, **entries: Any) -> Path:
    tokens = {"<pad>": TokenType.CONTROL, "<eos>": TokenType.CONTROL, "<bos>": TokenType.CONTROL}
    tokens |= {"<unk>": TokenType.UNKNOWN, **dict.fromkeys(RUNS, TokenType.USER_DEFINED)}
    tokens |= {"<end_of_turn>": TokenType.CONTROL, "<unused0>": TokenType.UNUSED}
    tokens |= {f"<0x{byte:02X}>": TokenType.BYTE for byte in range(256)}
    characters = sorted({character for piece in PIECES for character in piece} | set("xyz.,!\n\t"))
    rank = {piece: i for i, piece in enumerate([*PIECES, *characters])}
    tokens |= dict.fromkeys(sorted(rank), TokenType.NORMAL)
    scores = [-float(rank.get(token, 1000)) for token in tokens]
    ids = {"bos_token_id": 2, "eos_token_id": 1, "unknown_token_id": 3, "padding_token_id": 0}
    more = {"add_space_prefix": False, "add_bos_token": True, "add_eos_token": False}
    return write_vocabulary(path, tokens, **{"model": "llama", "scores": scores, **ids, **more, **entries})


class TestGemma:
    TEXTS = (
        *NASTY,
        "<start_of_turn>user\nthe thing<end_of_turn>\n<start_of_turn>model\n",
        "<bos><start_of_turn>the\n\n\n\n\nand       then\t\t\t<table> in</table>  ",
        "▁already ▁blocks <0x0A> <unk>日本語 <unused0>",
    )

    @pytest.mark.parametrize("prefix", [False, True])
    def test_tokens_and_their_text(self, tmp_path: Path, prefix: bool) -> None:
        path = write_gemma(tmp_path / "vocab.gguf", add_space_prefix=prefix)
        tokenizer, oracle = build(path), LlamaCppOracle(path, vocab_only=True)
        for text in self.TEXTS:
            tokens = tokenizer(text).input_ids
            assert tokens == oracle.tokenize(text, add_special=True, parse_special=True), ascii(text)
            if not prefix and "▁" not in text and "<0x" not in text:
                assert tokenizer.decode(tokens[1:]) == text == oracle.detokenize(tokens[1:]).decode()

    @settings(max_examples=150, deadline=None)
    @given(text=st.text("ab =thein\n\t<>", max_size=40))
    def test_any_white_space(self, tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
        path = write_gemma(tmp_path_factory.mktemp("gemma") / "vocab.gguf")
        oracle = LlamaCppOracle(path, vocab_only=True)
        assert build(path)(text).input_ids == oracle.tokenize(text, add_special=True, parse_special=True)

    def test_ends_of_turn(self, tmp_path: Path) -> None:
        path = write_gemma(tmp_path / "vocab.gguf")
        assert end_of_turn_ids(build(path)) == LlamaCppOracle(path, vocab_only=True).eog_ids()


PHI3_TOKENS = ["<|endoftext|>", "<|assistant|>", "<|end|>", "<|user|>", "<|system|>"]


def write_phi3(path: Path, name: str = "Phi-3 Mini 4k Instruct") -> Path:
    tokens = {"<unk>": TokenType.UNKNOWN, "<s>": TokenType.CONTROL, "</s>": TokenType.USER_DEFINED}
    tokens |= {f"<0x{byte:02X}>": TokenType.BYTE for byte in range(256)}
    characters = sorted({character for piece in PIECES for character in piece} | set("xyz.,!"))
    rank = {piece: i for i, piece in enumerate([*PIECES, *characters])}
    tokens |= dict.fromkeys(sorted(rank), TokenType.NORMAL) | dict.fromkeys(PHI3_TOKENS, TokenType.CONTROL)
    scores = [-float(rank.get(token, 1000)) for token in tokens]
    ids = {"bos_token_id": 1, "eos_token_id": list(tokens).index("<|endoftext|>"), "unknown_token_id": 0}
    return write_vocabulary(path, tokens, name, model="llama", scores=scores, **ids)


class TestPhi3:
    TEXTS = (
        "<|user|>\nthe thing <|end|>\n<|assistant|>\n",
        "<|user|>\n\t  and\n<|end|>the <|endoftext|>\n<|assistant|> \n <|assistant|> in",
        "<s> the</s> \n the<unk> in <|sys|> the <|system|>",
    )

    @pytest.mark.parametrize("name", ["Phi-3 Mini 4k Instruct", "my-PHI3-tune", "Phi 4", "tiny"])
    def test_white_space_behind_special_tokens(self, tmp_path: Path, name: str) -> None:
        path = write_phi3(tmp_path / "vocab.gguf", name)
        tokenizer, oracle = build(path), LlamaCppOracle(path, vocab_only=True)
        for text in (*self.TEXTS, *NASTY):
            assert tokenizer(text).input_ids == oracle.tokenize(text, add_special=True, parse_special=True), ascii(text)
        swallowed = tokenizer("<|user|>\nthe").input_ids == tokenizer("<|user|>the").input_ids
        assert swallowed == ("phi" in name.lower() and "3" in name)


class TestRefusals:
    def test_an_unknown_pre_tokeniser_is_named_with_those_supported(self, tmp_path: Path) -> None:
        with pytest.raises(
            ModelError, match=r"vocab.gguf: unknown pre-tokeniser 'gpt-3'; supported are .*qwen2.*tekken"
        ):
            build(write_byte_level(tmp_path / "vocab.gguf", "gpt-3"))

    def test_a_missing_pre_tokeniser_is_not_guessed(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match=r"no tokenizer.ggml.pre in its metadata"):
            build(write_byte_level(tmp_path / "vocab.gguf", None))

    @pytest.mark.parametrize(
        ("entries", "said"),
        [
            ({"model": "bert"}, "of the kind 'bert'; lorafit reads gpt2 and llama"),
            ({"model": None}, "no tokenizer.ggml.model"),
            ({"merges": None}, "no tokenizer.ggml.merges"),
            ({"merges": ["q nowhere"]}, "the vocabulary and the merges do not fit together"),
            ({"merges": ["lonely"]}, "the vocabulary and the merges do not fit together"),
            ({"eos_token_id": 10**6}, r"tokenizer.ggml.eos_token_id is 1000000, but there are \d+ tokens"),
            ({"bos_token_id": None, "add_bos_token": True}, "add_bos_token is true, but the file names no bos_token"),
            ({"token_type": [1, 2]}, r"2 token types for \d+ tokens"),
            ({"tokens": ["a", "b", "a"], "token_type": None}, "the token 'a' stands twice"),
            ({"pre": 7}, "tokenizer.ggml.pre is a int, not a str"),
        ],
    )
    def test_broken_metadata(self, tmp_path: Path, entries: dict[str, Any], said: str) -> None:
        with pytest.raises(ModelError, match=said):
            build(write_byte_level(tmp_path / "vocab.gguf", **{"pre": "gpt-2", **entries}))

    def test_scores_that_are_missing_or_too_few(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match=r"no tokenizer.ggml.scores"):
            build(write_sentence_piece(tmp_path / "vocab.gguf", scores=None))
        with pytest.raises(ModelError, match="1 tokenizer scores for"):
            build(write_sentence_piece(tmp_path / "vocab.gguf", scores=[1.0]))
