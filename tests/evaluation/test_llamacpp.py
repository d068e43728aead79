"""llama.cpp as lorafit runs it, against llama.cpp called directly, and that against transformers."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from lorafit.errors import MissingFileError, ModelError
from lorafit.evaluation.llamacpp import LlamaCpp
from tests.oracles.llamacpp import LlamaCppOracle, render_chat
from tests.oracles.tiny_gguf import TinyLlama, write_tiny_llama

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyLlama:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


@pytest.fixture(scope="module")
def tiny_oracle(tiny: TinyLlama) -> LlamaCppOracle:
    return LlamaCppOracle(tiny.path)


@pytest.fixture(scope="module")
def tiny_llamacpp(tiny: TinyLlama) -> Iterator[LlamaCpp]:
    with LlamaCpp(tiny.path, n_ctx=256, threads=1) as model:
        yield model


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def answer_losses(oracle: LlamaCppOracle, prompt: list[int], answer: list[int]) -> list[float]:
    """Negative log-probability of each token of an answer, from logits of the whole sequence in one pass."""
    log_probabilities = log_softmax(oracle.logits(prompt + answer, as_served=True)[len(prompt) - 1 :])
    return [-log_probabilities[i, token] for i, token in enumerate(answer)]


# The oracles themselves.


@pytest.mark.parametrize("shape", [{}, {"tied": False, "layers": 3, "heads": 2, "kv_heads": 1, "vocab": 400}])
def test_oracles_agree_on_a_float_model(tmp_path: Path, shape: dict[str, int]) -> None:
    tiny = write_tiny_llama(tmp_path / "tiny.gguf", format="F32", embedding_format="F32", **shape)
    tokens = list(range(40, 80))
    with torch.no_grad():
        expected = tiny.dense()(torch.tensor([tokens])).logits[0].numpy()
    # Both compute in float32: logits of size 2 differ by sums in another order, measured 6e-6.
    np.testing.assert_allclose(LlamaCppOracle(tiny.path).logits(tokens), expected, atol=1e-4)


def test_oracle_tokenizes_and_renders(tiny: TinyLlama, tiny_oracle: LlamaCppOracle) -> None:
    prompt = render_chat(tiny.path, QUESTION, add_generation_prompt=True)
    assert prompt == "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    answered = [*QUESTION, {"role": "assistant", "content": " Paris. "}]
    assert render_chat(tiny.path, answered, False).endswith("assistant\n Paris. <|im_end|>\n")
    tokens = tiny_oracle.tokenize(prompt, add_special=False, parse_special=True)
    assert tokens[0] == tiny_oracle.bos == 1
    assert tokens.count(tiny_oracle.eos) == 1
    assert tiny_oracle.detokenize(tokens).decode() == prompt
    assert {0, 2} <= tiny_oracle.eog_ids()


# The runner.


def test_answer_loss_is_the_log_softmax_of_the_raw_logits(tiny_llamacpp: LlamaCpp, tiny_oracle: LlamaCppOracle) -> None:
    prompt = tiny_oracle.tokenize("<|im_start|>user\nThe cat?<|im_end|>\n<|im_start|>assistant\n", False, True)
    answer = tiny_oracle.tokenize("The cat wörld 🙂 took the boots.<|im_end|>", False, True)
    expected = answer_losses(tiny_oracle, prompt, answer)
    # The probability passes through float32, and a single step may sum in another order than the whole sequence does:
    # measured 1e-6 here, 2e-4 on other tiny models, against 1e-1 between neighbouring tokens.
    assert tiny_llamacpp.answer_loss(prompt, answer) == pytest.approx(np.mean(expected), abs=1e-3)
    for i, token in enumerate(answer):
        assert tiny_llamacpp.answer_loss(prompt + answer[:i], [token]) == pytest.approx(expected[i], abs=1e-3)


def test_the_least_likely_pieces_of_characters_are_scored(tiny_llamacpp: LlamaCpp, tiny_oracle: LlamaCppOracle) -> None:
    prompt = tiny_oracle.tokenize("The miller had three sons", False, False)
    log_probabilities = log_softmax(tiny_oracle.logits(prompt, as_served=True)[-1])
    rank = np.argsort(np.argsort(-log_probabilities))
    # The first byte of a character of two bytes: llama.cpp does not report it when it is sampled.
    beginnings = [i for i in range(tiny_oracle.n_vocab) if tiny_oracle.piece(i)[0] in range(0xC2, 0xE0)]
    listed, unlisted = min(beginnings, key=rank.__getitem__), max(beginnings, key=rank.__getitem__)
    assert rank[listed] < 256 <= rank[unlisted]
    for token in (listed, unlisted):
        assert tiny_llamacpp.answer_loss(prompt, [token]) == pytest.approx(-log_probabilities[token], abs=1e-3)


def test_impossible_token_has_a_finite_loss(tmp_path: Path) -> None:
    tiny = write_tiny_llama(tmp_path / "sharp.gguf", format="F32", embedding_format="F32")
    reader = gguf.GGUFReader(tiny.path, "r+")
    norm = next(tensor.data for tensor in reader.tensors if tensor.name == "output_norm.weight")
    norm *= 100  # logits a hundred times as far apart
    reader.data.flush()
    log_probabilities = log_softmax(LlamaCppOracle(tiny.path).logits([1, 2, 3])[-1])
    assert log_probabilities.min() < -1000
    with LlamaCpp(tiny.path, n_ctx=64, threads=1) as model:
        # The logarithm of the smallest float32, 2 to the -149.
        assert model.answer_loss([1, 2, 3], [int(log_probabilities.argmin())]) == pytest.approx(103.28, abs=0.01)
        assert model.answer_loss([1, 2, 3], [int(log_probabilities.argmax())]) == pytest.approx(0.0, abs=1e-3)


def test_real_model(smollm2_path: Path) -> None:
    oracle = LlamaCppOracle(smollm2_path)
    prompt = oracle.tokenize(render_chat(smollm2_path, QUESTION, True), False, True)
    answer = oracle.tokenize("The zebra, Paris.<|im_end|>", False, True)
    with LlamaCpp(smollm2_path, n_ctx=128, threads=1) as model:
        loss = model.answer_loss(prompt, answer)
        text = model.generate(QUESTION, max_tokens=12)
    # Thirty layers amplify the float32 rounding of another order of summing: measured 2e-4.
    assert loss == pytest.approx(np.mean(answer_losses(oracle, prompt, answer)), abs=2e-3)
    # Greedy: each token is the likeliest after those before it.
    generated = oracle.tokenize(text, False, False)
    assert 8 <= len(generated) <= 12
    assert generated == list(oracle.logits(prompt + generated, as_served=True)[len(prompt) - 1 : -1].argmax(axis=-1))


def test_generation_stops_at_the_longest_answer_asked_for(tiny_llamacpp: LlamaCpp) -> None:
    short = tiny_llamacpp.generate(QUESTION, max_tokens=1)
    longer = tiny_llamacpp.generate(QUESTION, max_tokens=4)
    assert short
    assert longer.startswith(short)
    assert len(longer) > len(short)


def test_refusals_name_the_file_and_the_reason(tiny_llamacpp: LlamaCpp, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"tiny\.gguf: llama\.cpp refuses: .*300 tokens.*context"):
        tiny_llamacpp.answer_loss([5] * 300, [6])
    with pytest.raises(ModelError, match=r"tiny\.gguf: llama\.cpp refuses: .*context"):
        tiny_llamacpp.generate([{"role": "user", "content": "cat " * 400}])
    with pytest.raises(ModelError, match="token 320 is not in its vocabulary"):
        tiny_llamacpp.answer_loss([5], [320])
    with pytest.raises(MissingFileError, match=r"absent\.gguf: no such file"):
        LlamaCpp(tmp_path / "absent.gguf")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF nothing more")
    with pytest.raises(ModelError, match=r"broken\.gguf: llama\.cpp cannot load"):
        LlamaCpp(tmp_path / "broken.gguf")


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_process_is_silent_and_ends(tiny: TinyLlama) -> None:
    """Opened and closed at once, left open, and interrupted by an exception; the time-out of the run is the test."""
    code = """if True:
        import sys
        from lorafit.evaluation.llamacpp import LlamaCpp
        for _ in range(3):
            with LlamaCpp(sys.argv[1], n_ctx=64):
                pass
        left_open = LlamaCpp(sys.argv[1], n_ctx=64)
        with LlamaCpp(sys.argv[1], n_ctx=64) as model:
            model.generate([{"role": "user", "content": "cat"}], max_tokens=2)
            raise SystemExit(3)
    """
    ended = run_python(code, str(tiny.path))
    assert (ended.returncode, ended.stdout, ended.stderr) == (3, "", "")


def test_without_the_package_the_error_says_how_to_get_it(tiny: TinyLlama) -> None:
    code = """if True:
        import sys
        sys.modules["xllamacpp"] = None  # what Python itself takes for a package that cannot be imported
        from lorafit.errors import DependencyError
        from lorafit.evaluation.llamacpp import LlamaCpp, available
        assert not available()
        try:
            LlamaCpp(sys.argv[1])
        except DependencyError as error:
            print(error)
    """
    assert "pip install 'lorafit[llamacpp]'" in run_python(code, str(tiny.path)).stdout
