"""The reader of GGUF files: against gguf-py on good files, and with one error of a known type on everything else."""

import contextlib
import gc
import random
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafit.containers.gguf import GGUFFile
from lorafit.errors import ContainerError, FormatError, MissingFileError
from tests.oracles import raw_gguf as raw
from tests.oracles.raw_gguf import RawTensor, gguf_bytes
from tests.oracles.tiny_gguf import write_tiny_llama

_F32, _Q4_1, _Q8_0, _IQ2_S = 0, 3, 8, 22

# One of everything, small enough to be cut at each byte.
ENTRIES: list[raw.Entry] = [
    ("general.architecture", raw.STRING, "llama"),
    ("u8", raw.U8, 200),
    ("i8", raw.I8, -100),
    ("u16", raw.U16, 60000),
    ("i16", raw.I16, -30000),
    ("u32", raw.U32, 2**32 - 1),
    ("i32", raw.I32, -(2**31)),
    ("u64", raw.U64, 2**64 - 1),
    ("i64", raw.I64, -(2**63)),
    ("f32", raw.F32, 0.1),
    ("f64", raw.F64, 0.1),
    ("yes", raw.BOOL, True),
    ("no", raw.BOOL, False),
    ("text", raw.STRING, "Fähre 渡し船 ⛴"),
    ("nothing", raw.STRING, ""),
    ("texts", raw.ARRAY, (raw.STRING, ["a", "", "ß"])),
    ("no texts", raw.ARRAY, (raw.STRING, [])),
    ("floats", raw.ARRAY, (raw.F32, [0.5, -1.5])),
    ("integers", raw.ARRAY, (raw.I32, [1, -2, 3])),
    ("flags", raw.ARRAY, (raw.BOOL, [True, False])),
    ("no integers", raw.ARRAY, (raw.U64, [])),
]
TENSORS = [
    RawTensor("vector", (5,), _F32, bytes(range(20))),
    RawTensor("matrix", (32, 3), _Q4_1, bytes(range(60))),
    RawTensor("cube", (32, 2, 2), _Q8_0, bytes(range(136))),
]
GOOD = gguf_bytes(ENTRIES, TENSORS)


def opened(folder: Path, content: bytes) -> GGUFFile:
    path = folder / "model.gguf"
    path.write_bytes(content)
    return GGUFFile.open(path)


def matrix(name: str | bytes = "matrix", **changes: Any) -> RawTensor:
    return RawTensor(**{"name": name, "dimensions": (32, 3), "kind": _Q4_1, "data": bytes(60), **changes})


@pytest.mark.parametrize("version", [2, 3])
def test_metadata_of_all_types(tmp_path: Path, version: int) -> None:
    metadata = opened(tmp_path, gguf_bytes(ENTRIES, TENSORS, version=version)).metadata
    assert list(metadata) == [key for key, _, _ in ENTRIES]
    for key, kind, content in ENTRIES:
        found = metadata[key]
        if kind == raw.ARRAY and content[0] != raw.STRING:
            assert isinstance(found, np.ndarray)
            assert found.tolist() == content[1]
        else:
            expected = content[1] if kind == raw.ARRAY else np.float32(content).item() if kind == raw.F32 else content
            assert (type(found), found) == (type(expected), expected)


@pytest.mark.parametrize("alignment", [1, 32, 256])
def test_agrees_with_gguf_py(tmp_path: Path, alignment: int) -> None:
    entries = [*ENTRIES, ("general.alignment", raw.U32, alignment)]
    file = opened(tmp_path, gguf_bytes(entries, TENSORS, alignment=alignment))
    reader = gguf.GGUFReader(file.path)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    plain = {key: found.tolist() if isinstance(found, np.ndarray) else found for key, found in file.metadata.items()}
    assert plain == fields
    assert list(file.tensors) == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        info = file.tensors[tensor.name]
        assert info.name == tensor.name
        assert info.format == tensor.tensor_type.name
        assert list(info.shape) == tensor.shape.tolist()[::-1]
        assert (info.offset, info.nbytes) == (tensor.data_offset, tensor.n_bytes)
        assert info.offset % alignment == 0
        blocks = file.blocks(tensor.name)
        assert blocks.shape[0] == tensor.n_elements // tensor.shape[0], "one row of bytes for each row of weights"
        assert blocks.numpy().tobytes() == tensor.data.tobytes()


def test_agrees_with_gguf_py_on_a_model(tmp_path: Path) -> None:
    tiny = write_tiny_llama(tmp_path / "tiny.gguf", format="Q4_1", tied=False)
    file, reader = GGUFFile.open(tiny.path), gguf.GGUFReader(tiny.path)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    plain = {key: found.tolist() if isinstance(found, np.ndarray) else found for key, found in file.metadata.items()}
    assert plain == fields
    for tensor in reader.tensors:
        assert file.blocks(tensor.name).numpy().tobytes() == tensor.data.tobytes()


def test_blocks_are_the_mapping_and_the_file_stays_untouched(tmp_path: Path) -> None:
    file = opened(tmp_path, GOOD)
    first, again = file.blocks("matrix"), file.blocks("matrix")
    assert first.data_ptr() == again.data_ptr(), "a copy was made"
    distance = file.blocks("cube").data_ptr() - first.data_ptr()
    assert distance == file.tensors["cube"].offset - file.tensors["matrix"].offset
    first.fill_(255)
    assert again.min() == 255
    assert file.path.read_bytes() == GOOD


def test_blocks_outlive_the_file_object(tmp_path: Path) -> None:
    file = opened(tmp_path, GOOD)
    blocks = file.blocks("cube")
    del file
    gc.collect()
    assert blocks.numpy().tobytes() == TENSORS[2].data


def test_a_file_without_tensors_opens(tmp_path: Path) -> None:
    assert opened(tmp_path, gguf_bytes(ENTRIES)).tensors == {}


# What each file has wrong, and what the error must say.
BROKEN = {
    "empty": (b"", "not a GGUF file"),
    "other kind": (b"PK\x03\x04" + bytes(100), "not a GGUF file"),
    "only magic": (b"GGUF", "ends at byte 4"),
    "version 1": (gguf_bytes(version=1), "version is 1"),
    "version 4": (gguf_bytes(version=4), "version is 4"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "too many entries": (gguf_bytes(entry_count=2**63), f"claims {2**63} metadata entries"),
    "too many tensors": (gguf_bytes(tensor_count=2**64 - 1), f"claims {2**64 - 1} tensors"),
    "fewer entries than claimed": (gguf_bytes(ENTRIES, entry_count=len(ENTRIES) + 2), "usable"),
    "fewer tensors than claimed": (gguf_bytes(ENTRIES, TENSORS, tensor_count=4), "usable"),
    "key past the end": (
        gguf_bytes(entry_count=1)[:24] + struct.pack("<Q", 2**62) + bytes(32),
        "inside its own header",
    ),
    "text past the end": (gguf_bytes([("k", raw.STRING, "x" * 40)])[:-30], "inside its own header"),
    "array of 2^61 numbers": (
        gguf_bytes([("k", raw.STRING, "")]).replace(
            struct.pack("<IQ", raw.STRING, 0), struct.pack("<IIQ", raw.ARRAY, raw.F64, 2**61)
        ),
        f"claims {2**61} values in 'k'",
    ),
    "array of 2^61 texts": (
        gguf_bytes([("k", raw.STRING, "")]).replace(
            struct.pack("<IQ", raw.STRING, 0), struct.pack("<IIQ", raw.ARRAY, raw.STRING, 2**61)
        ),
        f"claims {2**61} strings in 'k'",
    ),
    "array of arrays": (
        gguf_bytes([("k", raw.ARRAY, (raw.ARRAY, [(raw.U8, [1])]))]),
        "'k' is an array of the unsupported type 9",
    ),
    "unknown value type": (
        gguf_bytes([("k", raw.U32, 7)]).replace(struct.pack("<II", raw.U32, 7), struct.pack("<II", 13, 7)),
        "'k' has the unknown type 13",
    ),
    "key twice": (gguf_bytes([("k", raw.U8, 1), ("k", raw.U8, 2)]), "'k' stands twice"),
    "key that is not UTF-8": (gguf_bytes([(b"\xff\xfe", raw.U8, 1)]), "not UTF-8"),
    "text that is not UTF-8": (gguf_bytes([("k", raw.STRING, b"caf\xe9")]), "not UTF-8"),
    "tensor name that is not UTF-8": (gguf_bytes([], [matrix(b"\xc3\x28")]), "not UTF-8"),
    "tensor name that is too long": (gguf_bytes([], [matrix("x" * 64)]), "longer than 63 bytes"),
    "tensor twice": (gguf_bytes([], [matrix(), matrix()]), "two tensors are called 'matrix'"),
    "no dimensions": (gguf_bytes([], [matrix(dimensions=())]), "'matrix' has 0 dimensions"),
    "five dimensions": (gguf_bytes([], [matrix(dimensions=(32, 1, 1, 1, 1))]), "'matrix' has 5 dimensions"),
    "2^32-1 dimensions": (
        gguf_bytes([], [matrix()]).replace(struct.pack("<IQ", 2, 32), struct.pack("<IQ", 2**32 - 1, 32)),
        "has 4294967295 dimensions",
    ),
    "dimension of zero": (gguf_bytes([], [matrix(dimensions=(32, 0))]), r"'matrix' has the shape \[0, 32\]"),
    "ragged row": (gguf_bytes([], [matrix(dimensions=(48, 2))]), "'matrix': a row of 48 weights"),
    "dimensions whose product wraps to 0": (
        gguf_bytes([], [matrix(dimensions=(2**32, 2**32))]),
        f"'matrix' needs {2**64 // 32 * 20} bytes",
    ),
    "dimensions whose product wraps to 96": (
        gguf_bytes([], [matrix(dimensions=(32, 2**59 * 3, 32))]),
        "the file ends at",
    ),
    "data past the end": (gguf_bytes([], [matrix(dimensions=(32, 4))]), "'matrix' needs 80 bytes"),
    "data cut by a byte": (GOOD[:-1], "'cube' needs 136 bytes"),
    "no data": (gguf_bytes([], [matrix(data=b"")]), "'matrix' needs 60 bytes"),
    "offset past the end": (gguf_bytes([], [matrix(offset=2**63)]), "'matrix' is said to start at"),
    "offset that is not aligned": (gguf_bytes([], [matrix(offset=4)]), "'matrix' is said to start at"),
    "offset into another tensor": (gguf_bytes([], [matrix("a"), matrix("b", offset=32)]), "'b' is said to start at"),
    "gap between tensors": (
        gguf_bytes([], [matrix("a", data=bytes(96)), matrix("b", offset=96)]),
        "'b' is said to start at",
    ),
    "alignment of 0": (gguf_bytes([("general.alignment", raw.U32, 0)], [matrix()]), "alignment is '0'"),
    "alignment of 24": (gguf_bytes([("general.alignment", raw.U32, 24)], [matrix()]), "alignment is '24'"),
    "alignment that is a text": (gguf_bytes([("general.alignment", raw.STRING, "32")]), "alignment is '32'"),
    "alignment of 2^31": (gguf_bytes([("general.alignment", raw.U32, 2**31)], [matrix()]), "the file ends at"),
}


@pytest.mark.parametrize(("content", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_broken_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(ContainerError, match=message) as caught:
        opened(tmp_path, content)
    assert str(tmp_path / "model.gguf") in str(caught.value)


def test_a_file_of_gguf_py_for_big_endian_machines_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "big.gguf", "llama", endianess=gguf.GGUFEndian.BIG)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ContainerError, match="big-endian"):
        GGUFFile.open(tmp_path / "big.gguf")


@pytest.mark.parametrize(("kind", "said"), [(_IQ2_S, r"IQ2_S \(type 22\)"), (999, "type 999, which is not a known")])
def test_formats_that_are_not_read_are_named_with_their_tensor(tmp_path: Path, kind: int, said: str) -> None:
    with pytest.raises(FormatError, match=f"model.gguf: tensor 'matrix' has {said}.*lorafit reads .*Q4_1"):
        opened(tmp_path, gguf_bytes([], [matrix(kind=kind)]))


def test_names_from_a_damaged_file_stay_in_one_short_line(tmp_path: Path) -> None:
    for content in (
        gguf_bytes([], [matrix("bad\nname\x1b[31m", dimensions=(32, 9))]),
        gguf_bytes([("k\n" * 10_000, raw.ARRAY, (raw.ARRAY, []))]),
    ):
        with pytest.raises(ContainerError) as caught:
            opened(tmp_path, content)
        said = str(caught.value).removeprefix(str(tmp_path))
        assert said.isprintable()
        assert len(said) < 300


def test_what_is_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"none.gguf: no such file"):
        GGUFFile.open(tmp_path / "none.gguf")
    with pytest.raises(ContainerError, match="is a directory"):
        GGUFFile.open(tmp_path)


def test_every_prefix_is_refused(tmp_path: Path) -> None:
    for length in range(len(GOOD)):
        with pytest.raises(ContainerError):
            opened(tmp_path, GOOD[:length])
    assert opened(tmp_path, GOOD).tensors.keys() == {tensor.name for tensor in TENSORS}


def check_is_read_or_refused(folder: Path, content: bytes) -> None:
    """Either an error that lorafit raises on purpose, or a file whose tensors all lie within it; and no big memory."""
    tracemalloc.start()
    try:
        with contextlib.suppress(ContainerError, FormatError):
            file = opened(folder, content)
            for name, info in file.tensors.items():
                assert info.offset + info.nbytes <= len(content)
                assert file.blocks(name).numel() == info.nbytes
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 50 * len(content) + 100_000


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_corrupted_bytes_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.getbasetemp() / "corrupted"
    folder.mkdir(exist_ok=True)
    content = bytearray(GOOD)
    # Nearly all of the file is header, and what can go wrong is there.
    places = st.integers(4, len(GOOD) - 1)
    for at, byte in data.draw(st.lists(st.tuples(places, st.integers(0, 255)), min_size=1, max_size=4)):
        content[at] = byte
    check_is_read_or_refused(folder, bytes(content))


def test_numbers_replaced_by_extremes_are_read_or_refused(tmp_path: Path) -> None:
    extremes = [struct.pack("<Q", number) for number in (0, 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)]
    extremes += [struct.pack("<I", number) for number in (0, 9, 2**31, 2**32 - 1)]
    chosen = random.Random(0).sample(range(4, len(GOOD) - 8), 60)
    for at in chosen:
        for extreme in extremes:
            check_is_read_or_refused(tmp_path, GOOD[:at] + extreme + GOOD[at + len(extreme) :])
