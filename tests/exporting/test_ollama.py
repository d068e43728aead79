"""A model for Ollama: its prompts are those of the model's own chat template, to the letter."""

import json
import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from lorafit.commands.export import export
from lorafit.config import LoRA, QALoRA
from lorafit.data.chat import render_prompt
from lorafit.errors import ConfigError, MergeError, ModelError, OutputExistsError
from lorafit.exporting.chat_format import ChatFormat, find_format
from lorafit.exporting.modelfile import go_template, modelfile, stops
from tests.merging.runs import write_run
from tests.oracles.go_template import render
from tests.oracles.llamacpp import LlamaCppOracle
from tests.oracles.tiny_directory import write_tiny_directory
from tests.oracles.tiny_gguf import write_tiny_llama

BOS, ENDINGS = "<s>", ["<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "</s>"]

# Written for these tests, each in the manner of a family's.
CHATML = """{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
TEMPLATES = {
    "chatml": CHATML,
    "chatml with a default": """{% if messages[0].role != 'system' %}<|im_start|>system
You are of "some" help.<|im_end|>
{% endif %}"""
    + CHATML,
    "llama 3": """{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}<|start_header_id|>{{ m.role }}"""
    """<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}"""
    """<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}""",
    "llama 3.1": """{{ bos_token }}{% if messages[0].role == 'system' %}{% set said = messages[0].content %}"""
    """{% set messages = messages[1:] %}{% endif %}<|start_header_id|>system<|end_header_id|>\n\nKnowledge: 2023\n\n"""
    """{{ said }}<|eot_id|>{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"""
    """{{ m.content }}<|eot_id|>{% endfor %}<|start_header_id|>assistant<|end_header_id|>\n\n""",
    "gemma 2": """{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"""
    """{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else 'user' }}\n"""
    """{{ m.content | trim }}<end_of_turn>\n{% endfor %}<start_of_turn>model\n""",
    "gemma 3": """{{ bos_token }}{% if messages[0].role == 'system' %}{% set said = messages[0].content + '\n\n' %}"""
    """{% set messages = messages[1:] %}{% endif %}{% for m in messages %}<start_of_turn>"""
    """{{ 'model' if m.role == 'assistant' else 'user' }}\n{% if loop.first %}{{ said }}{% endif %}"""
    """{{ m.content }}<end_of_turn>\n{% endfor %}<start_of_turn>model\n""",
    "phi 3": """{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"""
    """<|assistant|>\n""",
    "phi 3, system left out": """{% for m in messages %}{% if m.role == 'user' %}<|user|>\n{{ m.content }}<|end|>\n"""
    """<|assistant|>\n{% elif m.role == 'assistant' %}{{ m.content }}<|end|>\n{% endif %}{% endfor %}""",
    "llama 2": """{% if messages[0].role == 'system' %}{% set said = '<<SYS>>\n' + messages[0].content %}"""
    """{% set said = said + '\n<</SYS>>\n\n' %}{% set messages = messages[1:] %}{% endif %}"""
    """{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}"""
    """[INST] {% if loop.first %}{{ said }}{% endif %}{{ m.content }} [/INST]{% else %} {{ m.content }} </s>"""
    """{% endif %}{% endfor %}""",
    "mistral": """{{ bos_token }}{% if messages[0].role == 'system' %}{% set said = messages[0].content + '\n\n' %}"""
    """{% set messages = messages[1:] %}{% endif %}{% for m in messages %}{% if m.role == 'user' %}[INST] """
    """{% if loop.last %}{{ said }}{% endif %}{{ m.content }}[/INST]{% else %} {{ m.content }}</s>{% endif %}"""
    """{% endfor %}""",
    "a preamble, and braces": """{{ bos_token }}Answer in {{ '{{' }}one}} line.\n\n{% for m in messages %}"""
    """### {{ m.role }}:\n{{ m.content }}\n\n{% endfor %}### assistant:\n""",
}
TEXTS = [
    "What did the miller leave?",
    'A mill,\n\na "donkey"  and {{ a }} cat.',
    "猫? 100% <b>",
    "It spoke.",
    "Did it?",
]
CONVERSATIONS = [
    [{"role": "system", "content": "Be brief.\nAlways."}] * has_system
    + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(TEXTS[:turns])]
    for has_system in (False, True)
    for turns in (1, 3, 5)
]


def tokenizer(template: str) -> PreTrainedTokenizerFast:
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), bos_token=BOS, eos_token="</s>")
    made.chat_template = template
    return made


def found(template: str, added: str = "") -> ChatFormat:
    writer = tokenizer(template)
    return find_format(lambda turns: render_prompt(turns, writer), BOS, added, ENDINGS)


def as_ollama_renders(chat_format: ChatFormat, messages: list[dict[str, str]]) -> str:
    """Ollama puts the Modelfile's SYSTEM before a conversation that does not begin with one."""
    if chat_format.default and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": chat_format.default}, *messages]
    return render(go_template(chat_format), messages)


@pytest.mark.parametrize("added", ["", BOS])
@pytest.mark.parametrize("name", TEMPLATES)
def test_prompts_are_those_of_the_chat_template(name: str, added: str) -> None:
    chat_format = found(TEMPLATES[name], added)
    compared = 0
    for messages in CONVERSATIONS:
        if chat_format.refuses_system and messages[0]["role"] == "system":
            continue
        expected = render_prompt(messages, tokenizer(TEMPLATES[name]))
        if BOS in TEMPLATES[name] or "bos_token" in TEMPLATES[name]:
            expected = expected.removeprefix(added)
        assert as_ollama_renders(chat_format, messages) == chat_format.render(messages) == expected
        compared += 1
    assert compared == (3 if chat_format.refuses_system else 6)


@pytest.mark.parametrize("name", ["chatml", "llama 3", "gemma 3"])
def test_an_answer_that_comes_last_is_left_open(name: str) -> None:
    messages = CONVERSATIONS[-1] + [{"role": "assistant", "content": "Yes, it"}]
    expected = tokenizer(TEMPLATES[name]).apply_chat_template(messages, tokenize=False, continue_final_message=True)
    assert as_ollama_renders(found(TEMPLATES[name]), messages) == expected


def test_what_is_found() -> None:
    default, always = found(TEMPLATES["chatml with a default"]), found(TEMPLATES["llama 3.1"], BOS)
    assert (default.default, default.place, default.prefix) == ('You are of "some" help.', "own", "")
    assert (always.default, always.system.after) == ("", "<|eot_id|>")
    assert always.system.before == "<|start_header_id|>system<|end_header_id|>\n\nKnowledge: 2023\n\n"
    refusing, silent = found(TEMPLATES["gemma 2"]), found(TEMPLATES["phi 3, system left out"])
    assert (refusing.refuses_system, refusing.place, refusing.trims) == (True, "first", True)
    assert (silent.refuses_system, silent.place, silent.trims) == (False, "nowhere", False)
    assert (found(TEMPLATES["mistral"]).place, found(TEMPLATES["llama 2"]).place) == ("last", "first")
    assert stops(default, ["<|im_start|>", "<|im_end|>", "<|other|>"]) == ["<|im_end|>", "<|im_start|>"]


def test_a_refused_system_message_goes_to_the_first_user() -> None:
    messages = CONVERSATIONS[-1]
    joined = [{"role": "user", "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}, *messages[2:]]
    chat_format = found(TEMPLATES["gemma 2"])
    assert as_ollama_renders(chat_format, messages) == as_ollama_renders(chat_format, joined)


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{% for m in messages %}{{ loop.index }}: {{ m.content }}\n{% endfor %}", "messages without a system message"),
        ("{{ messages[-1].content }}", "does not write every message once"),
        ("{% for m in messages | reverse %}<{{ m.role }}>{{ m.content }}{% endfor %}", "in their order"),
        ("{% for m in messages %}<{{ m.role }}>{{ m.content | upper }}{% endfor %}", "does not write every message"),
        (CHATML + "{% if messages | length > 4 %} {% endif %}", "of 5 messages without a system message"),
        (
            CHATML.replace("{{ message.content }}", "{{ message.content | replace('%', 'percent') }}"),
            "5 messages without|3 messages without|1 messages without",
        ),
    ],
)
def test_a_template_that_does_something_else_is_refused(template: str, why: str) -> None:
    with pytest.raises(ModelError, match=f"not of a kind that can be written for Ollama: .*({why})"):
        found(template)


@pytest.mark.parametrize("text", ['a """ b', "a \x07 b", "a \N{NO-BREAK SPACE} b"])
def test_what_no_modelfile_holds_is_refused(text: str) -> None:
    with pytest.raises(ModelError, match="characters that no Modelfile holds"):
        modelfile("model.gguf", found(CHATML), [], text)


def commands(path: Path) -> list[tuple[str, str]]:
    """What Ollama's parser reads from a Modelfile: name and value of each line, values in one or three quotes."""
    pattern = re.compile(
        r'^(FROM|TEMPLATE|SYSTEM|PARAMETER \w+|LICENSE) (?:"""(.*?)"""|"([^"\n]*)"|([^"\n]*))$', re.M | re.S
    )
    text = path.read_text(encoding="utf-8")
    assert not pattern.sub("", text).strip()
    return [
        (match[1], next(each for each in match.groups()[1:] if each is not None)) for match in pattern.finditer(text)
    ]


def test_a_qalora_run_is_merged_exactly(tmp_path: Path) -> None:
    base = write_tiny_llama(tmp_path / "base.gguf").path
    run = write_run(tmp_path / "run", base, QALoRA(rank=2, alpha=4.0))
    certificate = export(str(run), str(tmp_path / "out"), format="ollama")
    assert {path.name for path in tmp_path.iterdir()} == {"base.gguf", "run", "out", "out.certificate.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.gguf", "Modelfile"}
    assert certificate.as_dict() == json.loads((tmp_path / "out.certificate.json").read_text())
    assert certificate.weights["weights"]["bit_identical"] is True
    assert certificate.weights["merged"]["sha256"] == certificate.model.sha256
    (start, weights), (kind, template), *rest = commands(tmp_path / "out" / "Modelfile")
    assert (start, weights, kind) == ("FROM", "./model.gguf", "TEMPLATE")
    assert rest == [("PARAMETER stop", "<|im_end|>"), ("PARAMETER stop", "<|im_start|>")]
    oracle = LlamaCppOracle(tmp_path / "out" / "model.gguf", vocab_only=True)
    messages = [{"role": "user", "content": "Who left?"}]
    text = "<|im_start|>user\nWho left?<|im_end|>\n<|im_start|>assistant\n"
    assert render(template, messages) == text
    assert oracle.tokenize(text, True, True)[0] == 1  # <|im_start|>, and no bos before it


def test_a_lora_run_needs_requantize(tmp_path: Path) -> None:
    base = write_tiny_llama(tmp_path / "base.gguf").path
    run = write_run(tmp_path / "run", base, LoRA(rank=2, alpha=4.0), size=0.05)
    with pytest.raises(MergeError, match="--requantize"):
        export(str(run), str(tmp_path / "out"), format="ollama")
    assert {path.name for path in tmp_path.iterdir()} == {"base.gguf", "run"}
    certificate = export(str(run), str(tmp_path / "out"), format="ollama", requantize="q8_0")
    assert certificate.weights["requantized"]["exact"] is False
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.gguf", "Modelfile"}


def test_a_directory_is_written_in_a_type(tmp_path: Path) -> None:
    write_tiny_directory(tmp_path / "base")
    certificate = export(str(tmp_path / "base"), str(tmp_path / "out"), format="ollama", dtype="q8_0")
    assert certificate.weights["type"] == "q8_0"
    assert {path.name for path in tmp_path.iterdir()} == {"base", "out", "out.certificate.json"}
    names = [name for name, _ in commands(tmp_path / "out" / "Modelfile")]
    assert names[:2] == ["FROM", "TEMPLATE"]
    assert LlamaCppOracle(tmp_path / "out" / "model.gguf").logits([5, 9]).shape == (2, 320)


def test_a_base_is_copied(smollm2_path: Path, tmp_path: Path) -> None:
    """The embedded model, whose template has a system message of its own."""
    certificate = export("smollm2-135m", str(tmp_path / "out"), format="ollama")
    assert (tmp_path / "out" / "model.gguf").read_bytes() == smollm2_path.read_bytes()
    read = dict(commands(tmp_path / "out" / "Modelfile"))
    assert read["TEMPLATE"].startswith("{{ range $i, $_ := .Messages }}")
    assert read["SYSTEM"] == "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    assert certificate.prompts.system == read["SYSTEM"]
    assert (certificate.weights, certificate.prompts.differs_by) == (None, [])
    from lorafit.models.load import load

    messages = [{"role": "system", "content": read["SYSTEM"]}, {"role": "user", "content": "Hello!"}]
    assert render(read["TEMPLATE"], messages) == render_prompt(messages[1:], load(smollm2_path)[1])


def test_what_is_refused(tmp_path: Path) -> None:
    base = write_tiny_llama(tmp_path / "base.gguf").path
    for options in ({"requantize": "q8_0"}, {"eval_data": "rows.jsonl"}, {"certificate_tolerance": 0.1}):
        with pytest.raises(ConfigError, match="has no effect on"):
            export(str(base), str(tmp_path / "out"), format="ollama", **options)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputExistsError, match="is not what an export wrote"):
        export(str(base), str(tmp_path / "mine"), format="ollama", overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"base.gguf", "mine"}
