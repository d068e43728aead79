"""Tiny random llama models as GGUF files, written by gguf-py, for tests that need a whole model in milliseconds.

The file is complete: quantised blocks, and a byte-level BPE tokenizer with ChatML's special tokens and template, so
that llama.cpp and lorafit both load it as they would load any other. Beside it stands the dense model: the same weights
(those that the written blocks represent, not the Gaussians before rounding) in a transformers ``LlamaForCausalLM``.

Row order: Hugging Face rotates a head's row i with row i + head_dim/2, llama-family GGUF files rotate neighbours 2i and
2i + 1. So rows of q and k are interleaved where they are written, and ``weights`` stays in Hugging Face's order.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import gguf
import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

from tests.oracles import ggml

Format = Literal["F32", "F16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# What the tokenizer's merges are learnt from.
_CORPUS = """The miller had three sons, and when he died he left them his mill, his donkey and his cat. The eldest took
the mill, the second the donkey, and for the youngest nothing was left over but the cat. Then he was sad and said to
himself: I have come off badly after all. My eldest brother can grind, my second brother can ride his donkey, but what
shall I do with the cat? If I have a pair of fur gloves made of its skin, there is nothing more to be had from it. The
cat, which had understood all that he said, began to speak. You need not kill me to get a pair of bad gloves from my
skin; have some boots made for me, so that I can go out and be seen among people, and you shall soon be helped. The
son wondered that the cat spoke so, but because the shoemaker was just going by, he called him in and had him measure
the boots. When they were ready, the cat put them on, took a sack, filled the bottom of it with corn and tied a string
round the top, by which it could be drawn shut; then it threw the sack over its back and walked out of the door on two
legs, like a man."""


@dataclass(frozen=True)
class TinyLlama:
    """A written model.

    Attributes:
        path: The GGUF file.
        weights: Name in transformers -> float32 array [out, in], exactly what the file's blocks represent.
        config: Configuration of the same model in transformers.
    """

    path: Path
    weights: dict[str, np.ndarray]
    config: LlamaConfig

    def dense(self) -> LlamaForCausalLM:
        """The same model in transformers: float32, plain attention."""
        model = LlamaForCausalLM(self.config)
        missing, unexpected = model.load_state_dict(
            {k: torch.from_numpy(v) for k, v in self.weights.items()}, strict=False
        )
        assert not unexpected, unexpected
        assert missing == (["lm_head.weight"] if self.config.tie_word_embeddings else []), missing
        model.tie_weights()
        return model.eval()


def write_tiny_llama(
    path: Path,
    *,
    layers: int = 2,
    hidden: int = 64,
    intermediate: int = 128,
    heads: int = 4,
    kv_heads: int = 2,
    vocab: int = 320,
    context: int = 512,
    format: Format = "Q4_1",
    embedding_format: Format = "Q8_0",
    formats: Mapping[str, Format] | None = None,
    tied: bool = True,
    seed: int = 0,
) -> TinyLlama:
    """Write a random llama model.

    Args:
        path: The file to write.
        layers: Transformer blocks.
        hidden: Width; a multiple of the block (32, of K-quants 256) and of ``heads``.
        intermediate: Width of the MLP; a multiple of the block.
        heads: Attention heads.
        kv_heads: Heads of keys and values; divides ``heads``.
        vocab: Tokens: 3 special ones, 256 bytes, the rest merges (at most 547 altogether).
        context: Longest sequence that the file claims.
        format: Block format of the linear layers.
        embedding_format: Block format of the embedding, and of the head where it is not tied.
        formats: Linear layer in the file, such as ``blk.0.ffn_down``, or the end of its name -> another block format.
        tied: The head is the embedding.
        seed: Seed of the weights.
    """
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=context, rms_norm_eps=1e-5,
        tie_word_embeddings=tied, attn_implementation="eager", bos_token_id=1, eos_token_id=2, pad_token_id=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(layers)
    writer.add_context_length(context)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(intermediate)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_vocab_size(vocab)
    _add_tokenizer(writer, vocab)

    weights = {}
    random = np.random.default_rng(seed)

    def add(
        name: str, hf_name: str, shape: tuple[int, ...], std: float, block_format: Format, rotated_heads: int = 0
    ) -> None:
        values = (random.standard_normal(shape) * std).astype(np.float32)
        if len(shape) == 1:
            values += 1.0  # a norm's weight
        qtype = gguf.GGMLQuantizationType[block_format]
        blocks = quantize(_interleaved(values, rotated_heads), block_format)
        writer.add_tensor(f"{name}.weight", blocks, raw_dtype=qtype)
        # Rounding is by blocks along a row, so it does not see in which order rows are written.
        weights[f"{hf_name}.weight"] = gguf.quants.dequantize(quantize(values, block_format), qtype)

    head_dim = hidden // heads
    # Twice the usual size, so that some tokens are likely and others are not.
    add("token_embd", "model.embed_tokens", (vocab, hidden), 2 * hidden**-0.5, embedding_format)
    for i in range(layers):
        gguf_layer, hf_layer = f"blk.{i}", f"model.layers.{i}"
        for name, hf_name, out_dim, in_dim, rotated_heads in (
            ("attn_q", "self_attn.q_proj", hidden, hidden, heads),
            ("attn_k", "self_attn.k_proj", kv_heads * head_dim, hidden, kv_heads),
            ("attn_v", "self_attn.v_proj", kv_heads * head_dim, hidden, 0),
            ("attn_output", "self_attn.o_proj", hidden, hidden, 0),
            ("ffn_gate", "mlp.gate_proj", intermediate, hidden, 0),
            ("ffn_up", "mlp.up_proj", intermediate, hidden, 0),
            ("ffn_down", "mlp.down_proj", hidden, intermediate, 0),
        ):
            shape, std = (out_dim, in_dim), in_dim**-0.5
            full_name = f"{gguf_layer}.{name}"
            own = next((each for end, each in (formats or {}).items() if f".{full_name}".endswith(f".{end}")), format)
            add(full_name, f"{hf_layer}.{hf_name}", shape, std, own, rotated_heads)
        add(f"{gguf_layer}.attn_norm", f"{hf_layer}.input_layernorm", (hidden,), 0.1, "F32")
        add(f"{gguf_layer}.ffn_norm", f"{hf_layer}.post_attention_layernorm", (hidden,), 0.1, "F32")
    add("output_norm", "model.norm", (hidden,), 0.1, "F32")
    if not tied:
        add("output", "lm_head", (vocab, hidden), 2 * hidden**-0.5, embedding_format)

    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return TinyLlama(path, weights, config)


def quantize(weights: np.ndarray, block_format: Format) -> np.ndarray:
    """Blocks as llama.cpp's tools write them: by gguf-py, or where it cannot, by ggml."""
    if block_format.endswith("_K"):
        return ggml.quantize(weights, block_format)
    return gguf.quants.quantize(weights, gguf.GGMLQuantizationType[block_format])


def _interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a rotated projection in llama.cpp's order; 0 heads leave them alone."""
    if not heads:
        return weight
    out_dim, in_dim = weight.shape
    halves = weight.reshape(heads, 2, out_dim // heads // 2, in_dim)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(out_dim, in_dim))


def _add_tokenizer(writer: gguf.GGUFWriter, vocab: int) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=list(SPECIAL_TOKENS), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([_CORPUS], trainer)
    learnt = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(learnt["vocab"], key=learnt["vocab"].__getitem__)
    assert len(tokens) == vocab, f"{vocab} tokens asked, but the corpus and the bytes make {len(tokens)}"
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([control if token in SPECIAL_TOKENS else normal for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in learnt["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(CHAT_TEMPLATE)
