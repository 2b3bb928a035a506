"""Files appear whole or not at all, and only the right people can read them."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from mara_integrations.errors import OutputError
from mara_integrations.files import write_atomically


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture(params=[0o022, 0o027, 0o077], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.skipif(os.name != "posix", reason="other systems have no umask")
class TestWhoCanRead:
    def test_the_umask_decides(self, umask, tmp_path):
        write_atomically(tmp_path / "a", "text")
        assert mode_of(tmp_path / "a") == 0o666 & ~umask

    def test_a_private_file_is_the_users_alone(self, umask, tmp_path):
        write_atomically(tmp_path / "a", "text", private=True)
        assert mode_of(tmp_path / "a") == 0o600


def test_a_file_is_replaced_whole(tmp_path):
    write_atomically(tmp_path / "folder" / "a", "first")
    write_atomically(tmp_path / "folder" / "a", b"second")
    assert (tmp_path / "folder" / "a").read_text() == "second"
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["a"]


def test_a_content_can_be_written_bit_by_bit(tmp_path):
    write_atomically(tmp_path / "a", lambda file: file.writelines([b"one ", b"two"]))
    assert (tmp_path / "a").read_text() == "one two"


def test_what_fails_half_way_leaves_the_old_file_and_nothing_else(tmp_path):
    write_atomically(tmp_path / "a", "old")

    def fail(file):
        file.write(b"ne")
        raise OSError(28, "No space left on device")

    with pytest.raises(OutputError, match="No space left on device"):
        write_atomically(tmp_path / "a", fail)
    assert (tmp_path / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
