"""What an .npz file of somebody else's can hold."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest

from ane_moe.early_adapters import Adapter, read_adapters
from ane_moe.errors import UserError
from ane_moe.npz_file import read_npz
from ane_moe.routing.routing_trace import read_trace


def npy(shape: tuple[int, ...], numbers: bytes) -> bytes:
    """An array whose header says what it likes."""
    stream = io.BytesIO()
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, header)
    return stream.getvalue() + numbers


def test_arrays_come_as_numpy_wrote_them(tmp_path: Path) -> None:
    written = {"a": np.arange(6.0).reshape(2, 3).T, "b": np.array("text"), "c": np.zeros((0, 3))}
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "a.npz", **written)
        found = read_npz(tmp_path / "a.npz", 1 << 20)
        assert found.keys() == written.keys()
        for name, array in written.items():
            np.testing.assert_array_equal(found[name], array)
    with pytest.raises(ValueError, match="too large"):
        read_npz(tmp_path / "a.npz", 100)


@pytest.mark.parametrize(
    ("member", "said"),
    [
        (npy((1 << 40, 12), bytes(16)), r"holds 16 bytes, its header says float32 \(1099"),
        (npy((2,), bytes(16)), "holds 16 bytes"),
        (npy((-4,), bytes(16)), "holds 16 bytes"),
        (b"no array", "magic string"),
    ],
)
def test_what_numpy_would_believe_is_refused(tmp_path: Path, member: bytes, said: str) -> None:
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("exit.0.down.npy", member)
    with pytest.raises(ValueError, match=said):
        read_npz(path, 1 << 20)
    with pytest.raises(UserError, match="cannot be read as adapters"):
        read_adapters(path, 6)
    with pytest.raises(UserError, match="cannot be read as a routing trace"):
        read_trace(path)


@pytest.mark.filterwarnings("error")
def test_adapters_that_overflow_warn_of_nothing() -> None:
    large = np.full((6, 2), 3e30, np.float32)
    assert not np.isfinite(Adapter(large, large.T).before(np.eye(6, dtype=np.float32))).all()
