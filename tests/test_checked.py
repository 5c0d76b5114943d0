"""Large files that were hashed before: not read again while they are what they were."""

import os
from pathlib import Path

import pytest

from trimtab.store import checked
from trimtab.store.checked import checked_sha256
from trimtab.store.files import read_json, sha256_file, write_json


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRIMTAB_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(checked, "KEPT_BYTES", 10)
    monkeypatch.setattr(checked, "SETTLED_SEC", -1.0)
    path = tmp_path / "file"
    path.write_bytes(b"large enough")
    return path


def kept(file: Path) -> list[Path]:
    return sorted((file.parent / "home" / "checked").glob("*"))


def test_what_was_found_is_kept_and_believed(file: Path) -> None:
    assert checked_sha256(file) == sha256_file(file)
    (place,) = kept(file)
    assert read_json(place, "kept file") == {"sha256": sha256_file(file)}
    write_json(place, {"sha256": "believed"})
    assert checked_sha256(file) == "believed"


def test_a_change_is_seen_though_size_and_time_are_as_before(file: Path) -> None:
    checked_sha256(file)
    stat = file.stat()
    file.write_bytes(b"large ENOUGH")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert file.stat().st_mtime_ns == stat.st_mtime_ns and file.stat().st_size == stat.st_size
    assert checked_sha256(file) == sha256_file(file)
    assert len(kept(file)) == 2


def test_another_file_in_its_place_is_read(file: Path) -> None:
    checked_sha256(file)
    other = file.with_name("other")
    other.write_bytes(b"large ENOUGH")
    os.replace(other, file)
    assert checked_sha256(file) == sha256_file(file)


@pytest.mark.parametrize("content", [b"", b"[]", b'{"sha256": 3}'])
def test_a_damaged_note_is_written_anew(content: bytes, file: Path) -> None:
    checked_sha256(file)
    (place,) = kept(file)
    place.write_bytes(content)
    assert checked_sha256(file) == sha256_file(file)
    assert read_json(place, "kept file") == {"sha256": sha256_file(file)}


def test_small_and_fresh_files_are_read_each_time(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checked, "SETTLED_SEC", 3600.0)
    assert checked_sha256(file) == sha256_file(file) and kept(file) == []
    monkeypatch.setattr(checked, "SETTLED_SEC", -1.0)
    file.write_bytes(b"small")
    assert checked_sha256(file) == sha256_file(file) and kept(file) == []


def test_a_home_that_cannot_be_written_costs_time_alone(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (file.parent / "taken").write_bytes(b"")
    monkeypatch.setenv("TRIMTAB_HOME", str(file.parent / "taken"))
    assert checked_sha256(file) == sha256_file(file)
