"""Rows come back as written, and every fault is one line that says what, where and what to do."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorafit.data.readers import Example, read_examples
from lorafit.errors import DataError, MissingFileError

GOOD = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'
ANSWER = '{"role": "assistant", "content": "b"}'


def chat(*turns: str) -> str:
    return f'{{"messages": [{", ".join(turns)}]}}'


def write(path: Path, *lines: str | bytes) -> Path:
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines))
    return path


def test_both_layouts_blank_lines_and_a_byte_order_mark(tmp_path: Path) -> None:
    three = '{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}, ' + ANSWER + "]}"
    data = write(
        tmp_path / "rows.jsonl",
        b"\xef\xbb\xbf" + GOOD.encode(),
        "",
        '  {"prompt": " p\\n", "completion": "c", "id": 7, "tools": null}\r',
        "   ",
        three,
    )
    assert read_examples(data) == [
        Example(({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}), f"{data}:1"),
        Example(({"role": "user", "content": " p\n"}, {"role": "assistant", "content": "c"}), f"{data}:3"),
        Example(
            (
                {"role": "system", "content": "s"},
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b"},
            ),
            f"{data}:5",
        ),
    ]


text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.tuples(text, text), min_size=1, max_size=4), escaped=st.booleans(), end=st.sampled_from(["", "\n"])
)
def test_any_text_comes_back_as_written(tmp_path: Path, rows: list[tuple[str, str]], escaped: bool, end: str) -> None:
    """Among them U+2028 and U+0085, which end lines elsewhere but not in JSON Lines."""
    lines = [json.dumps({"prompt": prompt, "completion": answer}, ensure_ascii=escaped) for prompt, answer in rows]
    data = tmp_path / "rows.jsonl"
    data.write_bytes(("\n".join(lines) + end).encode())
    found = [tuple(message["content"] for message in example.messages) for example in read_examples(data)]
    assert found == rows


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ('{"messages": [', ["broken JSON", "column"]),
        ("{", ["broken JSON", "over many lines"]),
        ("[", ["over many lines"]),
        ("9" * 5000, ["cannot be read"]),
        ("[" * 100_000, ["cannot be read"]),
        ('["a"]', ["the line is a list", "must be an object"]),
        ('"a"', ["the line is a string"]),
        ("{}", ['lacks "messages", or "prompt" and "completion"']),
        ('{"mesages": []}', ['"mesages" should be "messages"']),
        ('{"conversations": []}', ['"conversations" should be "messages"']),
        ('{"instruction": "a", "output": "b"}', ['"instruction" should be "prompt"']),
        ('{"prompt": "a", "response": "b"}', ['lacks "completion"', '"response" should be "completion"']),
        ('{"completion": "a"}', ['lacks "prompt"']),
        (GOOD[:-1] + ', "prompt": "x"}', ["both", '"prompt"']),
        (GOOD[:-1] + ', "tools": []}', ['"tools"', "remove it"]),
        ('{"prompt": "a", "completion": "b", "system": "s"}', ['"system"', "make it the first of the messages"]),
        ('{"messages": {"role": "user"}}', ['"messages" is an object', "list"]),
        (chat('"a"', ANSWER), ["message 1 is a string"]),
        (chat('{"content": "a"}', ANSWER), ['message 1 lacks "role"']),
        (chat('{"role": "user", "text": "a"}', ANSWER), ['lacks "content"', '"text" should be "content"']),
        (chat('{"from": "human", "value": "a"}', ANSWER), ['lacks "role"', '"from" should be "role"']),
        (chat('{"role": "user", "content": "a", "weight": 0}', ANSWER), ["message 1", '"weight"']),
        (chat('{"role": "usr", "content": "a"}', ANSWER), ["unknown role 'usr'", '"usr" should be "user"']),
        (chat('{"role": "gpt", "content": "a"}', ANSWER), ['"gpt" should be "assistant"']),
        (chat('{"role": ["user"], "content": "a"}', ANSWER), ["unknown role ['user']", "system, user, assistant"]),
        (chat('{"role": "user", "content": 3}', ANSWER), ["content of message 1 is a number", "must be a string"]),
        (chat('{"role": "user", "content": null}', ANSWER), ["is null"]),
        ('{"prompt": true, "completion": "a"}', ['"prompt" is a boolean']),
        ('{"prompt": "a", "completion": " \\n"}', ['"completion" is empty', "remove the row"]),
        (chat('{"role": "user", "content": ""}', ANSWER), ["content of message 1 is empty"]),
        ('{"prompt": "\\ud83d", "completion": "a"}', ["half a surrogate pair", "\\ud83d"]),
        (chat('{"role": "user", "content": "a"}'), ["no assistant turn"]),
        (chat(), ["no assistant turn"]),
        (chat(ANSWER), ["message 1 is the assistant's", "user turn"]),
        (chat('{"role": "system", "content": "a"}', ANSWER), ["message 2 is the assistant's"]),
        (chat('{"role": "user", "content": "a"}', ANSWER, ANSWER), ["messages 2 and 3", "join"]),
        (
            chat('{"role": "user", "content": "a"}', '{"role": "system", "content": "a"}', ANSWER),
            ["message 2 is a system message", "first"],
        ),
        (b'{"prompt": "caf\xe9", "completion": "a"}', ["byte 16", "not UTF-8"]),
    ],
)
def test_a_fault_is_one_line_with_its_place(tmp_path: Path, row: str | bytes, said: list[str]) -> None:
    data = write(tmp_path / "rows.jsonl", GOOD, "", row, GOOD)
    with pytest.raises(DataError) as caught:
        read_examples(data)
    message = str(caught.value)
    assert message.startswith(f"{data}:3: ")
    assert "\n" not in message
    for words in said:
        assert words in message


def test_utf16_is_named(tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_bytes(GOOD.encode("utf-16"))
    with pytest.raises(DataError, match=r"rows.jsonl:1: .*looks like UTF-16; save the file as UTF-8"):
        read_examples(data)


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file(tmp_path: Path, content: str) -> None:
    with pytest.raises(DataError, match=r"rows.jsonl has no rows; write one"):
        read_examples(write(tmp_path / "rows.jsonl", content))


def test_no_such_file_and_a_directory(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", GOOD)
    with pytest.raises(MissingFileError, match=r"no data file .*trian.jsonl; did you mean .*train.jsonl\?"):
        read_examples(tmp_path / "trian.jsonl")
    with pytest.raises(MissingFileError, match=r"is a directory; name a file in it: train.jsonl"):
        read_examples(tmp_path)


def test_a_model_given_as_data_is_called_a_model(tmp_path: Path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF\x03\x00\x00\x00\xff\xfe\x00")
    with pytest.raises(DataError, match=r"model\.gguf holds no rows: it is a model or an archive; give a \.jsonl file"):
        read_examples(path)
