"""Reading checkpoints, against the safetensors library; and what is said of files that are not
sound."""

import hashlib
import json
import math
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from ane_moe.checkpoints import checkpoint as checkpoint_module
from ane_moe.checkpoints.checkpoint import Checkpoint, TensorSource, open_checkpoint
from ane_moe.checkpoints.folder import weight_files, weight_names
from ane_moe.checkpoints.safetensors_header import read_header
from ane_moe.errors import UserError

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def folder_with(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def opened(folder: Path, tensors: dict[str, torch.Tensor]) -> Checkpoint:
    return open_checkpoint(folder_with(folder, tensors))


def source_of(tensor: torch.Tensor, **part: Any) -> TensorSource:
    return TensorSource("ours.weight", "w", tuple(tensor.shape), **part)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every tensor of the tests span several chunks."""
    monkeypatch.setattr(checkpoint_module, "CHUNK_ELEMENTS", 100)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(deadline=None, max_examples=30)
@given(st.data())
def test_every_part_of_a_tensor_reads_as_torch_slices_it(
    tmp_path_factory: pytest.TempPathFactory, dtype: torch.dtype, data: st.DataObject
) -> None:
    shape = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple))
    seed = data.draw(st.integers(0, 99))
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    index = (
        data.draw(st.integers(0, shape[0] - 1))
        if len(shape) > 1 and data.draw(st.booleans())
        else None
    )
    expected = tensor if index is None else tensor[index]
    rows = None
    if data.draw(st.booleans()):
        first = data.draw(st.integers(0, len(expected) - 1))
        rows = (first, data.draw(st.integers(first + 1, len(expected))))
        expected = expected[slice(*rows)]
    transpose = expected.dim() == 2 and data.draw(st.booleans())
    scale = data.draw(st.sampled_from([1.0, 0.22, 12.0]))
    expected = (expected.T if transpose else expected).float() * scale
    checkpoint = opened(tmp_path_factory.mktemp("c"), {"w": tensor, "other": torch.ones(3)})
    source = source_of(tensor, index=index, rows=rows, transpose=transpose, scale=scale)
    got = checkpoint.read(source)
    assert got.dtype == np.float16
    assert got.flags.c_contiguous
    assert source.shape == got.shape
    assert np.array_equal(got, expected.half().numpy())
    out = np.empty(source.shape, np.float16)
    assert checkpoint.read(source, out=out) is not None
    assert np.array_equal(got, out)
    if not transpose:
        middle = len(got) // 2
        parts = [
            checkpoint.read(source.part(0, middle)),
            checkpoint.read(source.part(middle, len(got))),
        ]
        assert np.array_equal(np.concatenate(parts), got)


def test_an_output_array_of_another_form_is_a_programming_error(tmp_path: Path) -> None:
    checkpoint = opened(tmp_path, {"w": torch.ones(4, 6)})
    for out in (
        np.empty((6, 4), np.float16),
        np.empty((4, 6), np.float32),
        np.empty((4, 12), np.float16)[:, ::2],
    ):
        with pytest.raises(ValueError, match="contiguous fp16"):
            checkpoint.read(source_of(torch.ones(4, 6)), out=out)
    with pytest.raises(ValueError, match="another order"):
        source_of(torch.ones(4, 6), transpose=True).part(0, 1)


def test_one_expert_of_a_huge_fused_tensor_is_read_alone(tmp_path: Path) -> None:
    """A sparse file of a terabyte: reading more than the expert asked for would never end."""
    shape = (1 << 20, 1024, 512)
    header = json.dumps(
        {"w": {"dtype": "BF16", "shape": shape, "data_offsets": [0, math.prod(shape) * 2]}}
    ).encode()
    expert = torch.randn(1024, 512).bfloat16()
    (tmp_path / "config.json").write_text("{}")
    try:
        with (tmp_path / "model.safetensors").open("wb") as stream:
            stream.write(struct.pack("<Q", len(header)) + header)
            stream.seek(8 + len(header) + 777_777 * expert.nbytes)
            stream.write(expert.view(torch.int16).numpy().tobytes())
            stream.truncate(8 + len(header) + math.prod(shape) * 2)
    except OSError:
        pytest.skip("this file system has no sparse files of this size")
    checkpoint = open_checkpoint(tmp_path)
    got = checkpoint.read(TensorSource("ours", "w", shape, index=777_777, rows=(512, 1024)))
    assert np.array_equal(got, expert[512:].half().numpy())


# --- values


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_counted_and_named(
    dtype: torch.dtype, value: float, tmp_path: Path
) -> None:
    tensor = torch.zeros(30, 10)
    tensor[[3, 12, 29], [4, 4, 9]] = value
    checkpoint = opened(tmp_path, {"w": tensor.to(dtype)})
    with pytest.raises(UserError, match=r"w \(ours\.weight\) holds 3 NaN or infinite values"):
        checkpoint.read(source_of(tensor))
    checkpoint.read(source_of(tensor, rows=(13, 29)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_values_beyond_fp16_are_counted_with_the_largest(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    tensor = torch.zeros(300)
    tensor[[7, 250]] = torch.tensor([70144.0, -81920.0])
    with pytest.raises(
        UserError, match=r"w \(ours\.weight\) overflows fp16 \(max \|w\| = 81920\).*2 values"
    ):
        opened(tmp_path, {"w": tensor.to(dtype)}).read(source_of(tensor))


def test_overflow_is_judged_after_the_folded_multiplier(tmp_path: Path) -> None:
    tensor = torch.full((5,), 6000.0)
    checkpoint = opened(tmp_path, {"w": tensor})
    with pytest.raises(UserError, match=r"overflows fp16 \(max \|w\| = 72000\)"):
        checkpoint.read(source_of(tensor, scale=12.0))
    assert checkpoint.read(source_of(tensor * 20, scale=0.1))[0] == 600.0


@settings(deadline=None)
@given(st.integers(0, 0xFFFF), st.sampled_from([torch.bfloat16, torch.float16]))
def test_exactly_the_values_that_fp16_cannot_hold_are_refused(
    tmp_path_factory: pytest.TempPathFactory, bits: int, dtype: torch.dtype
) -> None:
    tensor = torch.from_numpy(np.array([bits], np.uint16)).view(dtype)
    checkpoint = opened(tmp_path_factory.mktemp("c"), {"w": tensor})
    if tensor.half().isfinite().all():
        assert np.array_equal(checkpoint.read(source_of(tensor)), tensor.half().numpy())
    else:
        with pytest.raises(UserError, match=r"NaN or infinite|overflows"):
            checkpoint.read(source_of(tensor))


# --- content


def test_a_digest_is_the_same_whether_taken_while_reading_or_alone(tmp_path: Path) -> None:
    tensors = {"w": torch.randn(40, 7), "v": torch.randn(300).bfloat16()}
    checkpoint = opened(tmp_path, tensors)
    sources = [
        TensorSource("a", "w", (40, 7), rows=(3, 31)),
        TensorSource("b", "v", (300,), scale=0.5),
    ]
    hasher = hashlib.sha256()
    for source in sources:
        checkpoint.read(source, hasher=hasher)
    assert checkpoint.digest(sources) == hasher.hexdigest()


def test_a_digest_changes_with_every_byte_read_and_every_transform_and_with_nothing_else(
    tmp_path: Path,
) -> None:
    tensor = torch.randn(12, 5)
    source = source_of(tensor, rows=(2, 9))

    def digest(source: TensorSource, tensor: torch.Tensor, folder: str) -> str:
        (tmp_path / folder).mkdir(exist_ok=True)
        return opened(tmp_path / folder, {"w": tensor, "other": torch.ones(len(folder))}).digest(
            [source]
        )

    plain = digest(source, tensor, "a")
    assert digest(source, tensor, "somewhere-else") == plain
    beside, inside = tensor.clone(), tensor.clone()
    beside[9, 0] += 1
    inside[8, 4] += 1
    assert digest(source, beside, "a") == plain
    changed = [
        digest(source, inside, "a"),
        digest(source, tensor.view(torch.int32).view(torch.float32) * 2, "a"),
    ]
    for change in ({"scale": 2.0}, {"transpose": True}, {"rows": (1, 8)}, {"name": "other"}):
        changed.append(digest(replace(source, **change), tensor, "a"))
    assert len({plain, *changed}) == len(changed) + 1


# --- files


def test_the_header_reader_agrees_with_the_library(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 4),
        "b": torch.ones((), dtype=torch.int64),
        "c": torch.zeros(0, 5).half(),
        "d": torch.ones(7, dtype=torch.bool),
        "e": torch.ones(5).to(torch.float8_e4m3fn),
        "f": torch.ones(3).double(),
    }
    save_file(tensors, tmp_path / "x.safetensors", {"format": "pt"})
    header = read_header(tmp_path / "x.safetensors")
    data = (tmp_path / "x.safetensors").read_bytes()
    assert set(header) == set(tensors)
    for key, stored in header.items():
        assert stored.shape == tuple(tensors[key].shape)
        expected = tensors[key].flatten().view(torch.uint8).numpy().tobytes()
        assert data[stored.offset : stored.offset + stored.size] == expected


def test_a_file_cut_anywhere_is_refused_by_name(tmp_path: Path) -> None:
    data = save({"w": torch.randn(9), "v": torch.randn(5)})
    path = tmp_path / "model.safetensors"
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(UserError, match=r"model\.safetensors is"):
            read_header(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(UserError, match="longer than its header says"):
        read_header(path)


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_a_changed_header_is_refused_or_still_describes_the_file(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    tensors = {"w": torch.randn(3, 4), "v": torch.randn(5)}
    content = bytearray(save(tensors))
    end = 8 + int.from_bytes(content[:8], "little")
    byte = st.integers(0, 255) | st.sampled_from(list(b'0123456789-[]{},:"'))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, end - 1))] = data.draw(byte)
    path = tmp_path_factory.mktemp("c") / "x.safetensors"
    path.write_bytes(content)
    try:
        header = read_header(path)
    except UserError:
        return
    assert all(
        stored.offset >= 0 and (stored.offset + stored.size) <= len(content)
        for stored in header.values()
    )


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]},
        {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]},
        {"dtype": "F32", "shape": [10**30], "data_offsets": [0, 4 * 10**30]},
        {"dtype": "Q4_K", "shape": [1], "data_offsets": [0, 4]},
        {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": None, "data_offsets": [0, 4]},
        {"shape": [1], "data_offsets": [0, 4]},
        [],
        None,
    ],
)
def test_impossible_tensors_are_refused(entry: Any, tmp_path: Path) -> None:
    text = json.dumps({"w": entry}).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    with pytest.raises(UserError, match=r"x\.safetensors is"):
        read_header(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "offsets", [((0, 8), (4, 12)), ((0, 8), (12, 20)), ((4, 12), (12, 20)), ((0, 8), (0, 8))]
)
def test_overlaps_and_gaps_are_refused(
    offsets: tuple[tuple[int, int], ...], tmp_path: Path
) -> None:
    tensors = {
        f"t{n}": {"dtype": "F32", "shape": [2], "data_offsets": pair}
        for n, pair in enumerate(offsets)
    }
    text = json.dumps(tensors).encode()
    (tmp_path / "x.safetensors").write_bytes(
        struct.pack("<Q", len(text)) + text + bytes(max(map(max, offsets)))
    )
    with pytest.raises(UserError, match=r"starts at byte|truncated|longer"):
        read_header(tmp_path / "x.safetensors")


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    tensor = torch.randn(1000)
    checkpoint = opened(tmp_path, {"w": tensor})
    with (tmp_path / "model.safetensors").open("r+b") as stream:
        stream.truncate(2000)
    with pytest.raises(UserError, match="truncated"):
        checkpoint.read(source_of(tensor))


def test_unsupported_dtypes_are_refused_with_what_is_supported(tmp_path: Path) -> None:
    unsupported = {
        "F8_E4M3": torch.float8_e4m3fn,
        "U8": torch.uint8,
        "I8": torch.int8,
        "F64": torch.float64,
    }
    for name, dtype in unsupported.items():
        tensor = torch.ones(4, 6).to(dtype)
        with pytest.raises(UserError, match=f"w is stored as {name}.*BF16, F16, F32.*dequantise"):
            opened(tmp_path, {"w": tensor}).require({"ours.weight": source_of(tensor)})


# --- folders


def test_several_files_with_an_index_are_one_checkpoint(tmp_path: Path) -> None:
    """As the Hub's cache has it: the files are links into a store elsewhere."""
    (tmp_path / "store").mkdir()
    folder = tmp_path / "snapshot"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    tensors = {"w": torch.randn(3), "v": torch.randn(4)}
    for number, (key, tensor) in enumerate(tensors.items()):
        save_file({key: tensor}, tmp_path / "store" / f"blob{number}")
        (folder / f"part-{number}.safetensors").symlink_to(tmp_path / "store" / f"blob{number}")
    index = {"weight_map": {"w": "part-0.safetensors", "v": "part-1.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    checkpoint = open_checkpoint(folder)
    assert set(checkpoint.tensors) == {"w", "v"}
    assert np.array_equal(
        checkpoint.read(TensorSource("ours", "v", (4,))), tensors["v"].half().numpy()
    )


@pytest.mark.parametrize(
    ("there", "told", "read"),
    [
        (("model", "a", "consolidated"), ("a",), ("model",)),
        (("b", "a", "c"), ("b", "a"), ("a", "b")),
        (("b", "a", "adapter_model", "consolidated-1"), (), ("a", "b")),
    ],
)
def test_here_and_elsewhere_the_same_files_are_read(
    there: tuple[str, ...], told: tuple[str, ...], read: tuple[str, ...], tmp_path: Path
) -> None:
    for name in there:
        (tmp_path / f"{name}.safetensors").write_bytes(b"")
    if told:
        index = {"weight_map": {name: f"{name}.safetensors" for name in told}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    names = [path.name for path in tmp_path.iterdir()]
    expected = [f"{name}.safetensors" for name in read]
    assert [path.name for path in weight_files(tmp_path)] == expected
    assert weight_names(tmp_path, names) == expected


@pytest.mark.parametrize(
    ("weight_map", "said"),
    [
        ({"w": "../x.safetensors"}, "outside the folder"),
        ({"w": "/etc/passwd"}, "outside the folder"),
        ({"w": "a/../../x.safetensors"}, "outside the folder"),
        ({"w": "C:\\x.safetensors"}, "outside the folder"),
        ({"w": ""}, "outside the folder"),
        ({"w": "absent.safetensors"}, r"incomplete.*absent\.safetensors"),
        ({"w": "x.safetensors", "gone": "x.safetensors"}, "lacks 1 tensor .*index names: gone"),
        ({"w": "x.safetensors", "y": "twin.safetensors"}, "stores 1 tensor twice.*w"),
        (["x.safetensors"], "no weight_map"),
        ({"w": 3}, "no weight_map"),
    ],
)
def test_an_index_that_cannot_be_followed_is_refused(
    weight_map: Any, said: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file({"w": torch.ones(2)}, tmp_path / "x.safetensors")
    save_file({"w": torch.ones(2)}, tmp_path / "twin.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match=said):
        open_checkpoint(tmp_path)


def test_what_is_no_checkpoint_is_said_in_one_line(tmp_path: Path) -> None:
    def said(path: object) -> str:
        with pytest.raises(UserError) as caught:
            open_checkpoint(str(path))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "nothing there" in said(tmp_path / "absent")
    assert "OWNER/NAME on the Hub" in said(tmp_path / "absent")
    (tmp_path / "file").write_text("x")
    assert "a file" in said(tmp_path / "file")
    assert "no config.json" in said(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert "holds no safetensors" in said(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    assert "pickled weights, which are not read" in said(tmp_path)
    for text, reason in (
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ("[" * 100_000, "not JSON"),
        ("", "not JSON"),
    ):
        (tmp_path / "config.json").write_text(text)
        assert reason in said(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe{}")
    assert "not JSON" in said(tmp_path)
