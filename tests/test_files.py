"""Files are whole or absent, one run writes a folder, and what went wrong is said."""

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy
import pytest
import safetensors.numpy

from trimtab.errors import AdapterError, InputError, NumericalError, StorageError
from trimtab.store.files import (
    lock,
    names_in,
    package_versions,
    put_back,
    read_json,
    replace_directory,
    sha256_bytes,
    sha256_file,
    write_atomic,
    write_json,
    writing_atomically,
)

HALF_WRITTEN = (
    "import pathlib, sys, time; from trimtab.store.files import writing_atomically\n"
    "with writing_atomically(pathlib.Path(sys.argv[1])) as temp:\n"
    "    temp.write_bytes(b'half'); print('ready', flush=True); time.sleep(60)"
)


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def run_and_kill(code: str, *arguments: str) -> int:
    """Run code that prints a line when it is in the middle; kill -9 it there."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGKILL)
        process.wait()
    return process.pid


def test_write_makes_folders_and_leaves_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.bin"
    write_atomic(path, b"one")
    write_atomic(path, b"two")
    assert path.read_bytes() == b"two"
    assert names(path.parent) == ["b.bin"]


def test_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    write_atomic(path, b"old")
    with pytest.raises(KeyboardInterrupt), writing_atomically(path) as temp:
        temp.write_bytes(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a.bin"]


def test_write_follows_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("real")
    write_atomic(tmp_path / "link", b"new")
    assert (tmp_path / "real").read_bytes() == b"new"
    assert (tmp_path / "link").is_symlink()


def test_next_write_clears_what_a_killed_run_left(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    write_atomic(path, b"old")
    run_and_kill(HALF_WRITTEN, str(path))
    assert path.read_bytes() == b"old"
    assert len(names(tmp_path)) == 2
    write_atomic(tmp_path / "other.bin", b"")
    assert len(names(tmp_path)) == 3
    write_atomic(path, b"new")
    assert names(tmp_path) == ["a.bin", "other.bin"]


def test_the_next_writer_of_a_folder_clears_what_a_killed_one_left_beside_a_whole_file(
    tmp_path: Path,
) -> None:
    code = """
import pathlib, shutil, sys, time
from trimtab.store.files import lock, write_atomic

def ready(folder, **options):
    print("ready", flush=True)
    time.sleep(60)

with lock(pathlib.Path(sys.argv[1])):
    shutil.rmtree = ready
    write_atomic(pathlib.Path(sys.argv[1], "a.bin"), b"whole")
"""
    run_and_kill(code, str(tmp_path))
    assert len(names(tmp_path)) == 3
    with writing_atomically(tmp_path / "b.bin") as mine, lock(tmp_path):
        mine.write_bytes(b"mine")
    assert names(tmp_path) == ["a.bin", "b.bin"]
    assert (tmp_path / "a.bin").read_bytes() == b"whole"


def test_write_spares_a_live_runs_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    with writing_atomically(path) as first:
        first.write_bytes(b"first")
        write_atomic(path, b"second")
        assert first.exists()
    assert path.read_bytes() == b"first"


IN_ANOTHER_CONTAINER = """
import os, pathlib, sys
from trimtab.store import files
# As where processes are counted otherwise: here there is none of this number.
os.getpid = lambda: 2**22 + 1

def ready():
    print("ready", flush=True)
    sys.stdin.read()

path = pathlib.Path(sys.argv[1])
"""


@contextmanager
def other_container(code: str, path: Path) -> Iterator[None]:
    """Run code that calls ready() in the middle, where it stays until the context ends."""
    child = subprocess.Popen(
        [sys.executable, "-c", IN_ANOTHER_CONTAINER + code, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with child:
        assert child.stdout and child.stdout.readline() == "ready\n"
        yield
    assert child.returncode == 0


def test_writers_in_other_containers_are_spared(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    code = "with files.writing_atomically(path) as temp: temp.write_bytes(b'theirs'); ready()"
    with other_container(code, path):
        write_atomic(path, b"ours")
        assert len(names(tmp_path)) == 2
    assert path.read_bytes() == b"theirs"
    assert names(tmp_path) == ["a.bin"]


def test_where_a_file_system_has_no_locks_nothing_is_cleared_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = tmp_path / f".a.tmp-1-{'0' * 16}"
    left.mkdir()

    def without(descriptor: int, kind: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", without)
    write_atomic(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new" and left.is_dir()


def test_a_folder_that_another_container_replaces_is_not_put_back(tmp_path: Path) -> None:
    path = tmp_path / "adapter"
    with replace_directory(path) as temp:
        write_json(temp / "manifest.json", {"content": "old"})
    code = """
rename = os.rename
def stop(a, b):
    rename(a, b)
    if pathlib.Path(a) == path: ready()
os.rename = stop
with files.replace_directory(path) as temp:
    files.write_json(temp / "manifest.json", {"content": "new"})
"""
    with other_container(code, path):
        put_back(path)
        assert not path.exists()
    assert read_json(path / "manifest.json", "manifest") == {"content": "new"}
    assert names(tmp_path) == ["adapter"]


@pytest.mark.parametrize("run", ["0123456789abcdef", "01234567-89abcdef"])
def test_what_nobody_holds_is_cleared_whose_process_id_lives_again(
    run: str, tmp_path: Path
) -> None:
    left = tmp_path / f".a.bin.tmp-{os.getppid()}-{run}"
    left.mkdir()
    (left / "a.bin").write_bytes(b"half")
    write_atomic(tmp_path / "a.bin", b"new")
    assert names(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_storage_problems_become_one_error(tmp_path: Path, number: int) -> None:
    path = tmp_path / "a.bin"
    with pytest.raises(StorageError, match=r"a\.bin") as caught, writing_atomically(path):
        raise OSError(number, os.strerror(number))
    assert os.strerror(number) in caught.value.message
    assert caught.value.hint
    assert names(tmp_path) == []


# A limit on file size stands for a full disk: the write itself fails, for root too.
LIMITED = """
import pathlib, resource, sys
from trimtab.store.files import write_atomic, writing_atomically
path = pathlib.Path(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
"""


@pytest.mark.parametrize(
    "code",
    [
        "write_atomic(path, bytes(2000))",
        "import numpy, safetensors.numpy\n"
        "with writing_atomically(path) as temp:\n"
        "    safetensors.numpy.save_file({'x': numpy.zeros(2000)}, temp)",
        "import pyarrow, pyarrow.parquet\n"
        "table = pyarrow.table({'x': [str(i) for i in range(2000)]})\n"
        "with writing_atomically(path) as temp:\n"
        "    pyarrow.parquet.write_table(table, temp)",
    ],
    ids=["bytes", "safetensors", "parquet"],
)
def test_a_disk_limit_is_said_through_real_writers(tmp_path: Path, code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED + code, str(tmp_path / "a")], capture_output=True, text=True
    )
    assert "StorageError: cannot write" in done.stderr
    assert names(tmp_path) == []


def test_files_of_libraries_get_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "usual").write_bytes(b"")
    usual = (tmp_path / "usual").stat().st_mode
    with writing_atomically(tmp_path / "a") as temp:
        safetensors.numpy.save_file({"x": numpy.zeros(2)}, temp)
    with replace_directory(tmp_path / "b") as folder:
        safetensors.numpy.save_file({"x": numpy.zeros(2)}, folder / "x")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b" / "x").stat().st_mode == usual


def test_parent_that_is_a_file_is_said(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"")
    with pytest.raises(StorageError):
        write_atomic(tmp_path / "a" / "b", b"")


def test_other_errors_pass_unchanged(tmp_path: Path) -> None:
    with pytest.raises(KeyError), writing_atomically(tmp_path / "a"):
        raise KeyError("x")
    with pytest.raises(FileNotFoundError), writing_atomically(tmp_path / "a"):
        pass


def test_directory_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "out" / "adapter"
    for content in ("one", "two"):
        with replace_directory(path) as temp:
            write_json(temp / "manifest.json", {"content": content})
            (temp / content).write_text(content)
        assert names(path) == sorted(["manifest.json", content])
    assert names(path.parent) == ["adapter"]
    with pytest.raises(RuntimeError), replace_directory(path) as temp:
        (temp / "three").write_text("three")
        raise RuntimeError
    assert names(path) == ["manifest.json", "two"]
    assert names(path.parent) == ["adapter"]


def test_a_users_own_folder_is_never_replaced(tmp_path: Path) -> None:
    path = tmp_path / "thesis"
    path.mkdir()
    (path / "chapter1.txt").write_text("years of work")
    with pytest.raises(InputError, match="thesis"), replace_directory(path):
        raise AssertionError("must not be entered")
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is a file"), replace_directory(tmp_path / "file"):
        raise AssertionError("must not be entered")
    assert (path / "chapter1.txt").read_text() == "years of work"


def test_a_part_that_a_killed_writer_left_is_nobodys_own(tmp_path: Path) -> None:
    path = tmp_path / "adapter"
    run_and_kill(HALF_WRITTEN, str(path / "head.unfinished"))
    assert len(names(path)) == 1
    assert names_in(path) == []
    with replace_directory(path, unfinished=("head.unfinished",)) as temp:
        write_json(temp / "manifest.json", {})
    assert names(path) == ["manifest.json"]
    assert names_in(tmp_path / "nowhere") == []


def test_ctrl_c_while_clearing_away_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove, interruptions = shutil.rmtree, [KeyboardInterrupt()]

    def interrupted(path: Path, ignore_errors: bool) -> None:
        if interruptions:
            raise interruptions.pop()
        remove(path, ignore_errors=ignore_errors)

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "a.bin", b"new")
    assert names(tmp_path) == ["a.bin"]


def test_directory_is_restored_after_a_kill_between_the_renames(tmp_path: Path) -> None:
    path = tmp_path / "adapter"
    with replace_directory(path) as temp:
        write_json(temp / "manifest.json", {"content": "old"})
    code = (
        "import os, pathlib, sys, time; from trimtab.store import files\n"
        "rename, done = os.rename, []\n"
        "def stop(a, b):\n"
        "    if done: print('ready', flush=True); time.sleep(60)\n"
        "    done.append(a); rename(a, b)\n"
        "os.rename = stop\n"
        "with files.replace_directory(pathlib.Path(sys.argv[1])) as temp:\n"
        "    files.write_json(temp / 'manifest.json', {'content': 'new'})"
    )
    run_and_kill(code, str(path))
    assert not path.exists()
    with pytest.raises(RuntimeError), lock(path), replace_directory(path):
        raise RuntimeError
    assert read_json(path / "manifest.json", "manifest") == {"content": "old"}
    assert names(tmp_path) == ["adapter"]


def test_lock_keeps_a_second_run_out_and_dies_with_its_owner(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with lock(folder):
        pass
    assert not folder.exists(), "made for the lock, and left empty"
    folder.mkdir()
    with lock(folder):
        with pytest.raises(InputError, match="out"), lock(folder):
            raise AssertionError("must not be entered")
    with pytest.raises(RuntimeError), lock(folder):
        raise RuntimeError
    assert names(folder) == []
    code = (
        "import pathlib, sys, time; from trimtab.store.files import lock\n"
        "with lock(pathlib.Path(sys.argv[1])):\n"
        "    print('ready', flush=True); time.sleep(60)"
    )
    run_and_kill(code, str(folder))
    assert names(folder) == [".lock"]
    with lock(folder):
        pass
    assert names(folder) == []


def test_lock_of_another_process_is_seen(tmp_path: Path) -> None:
    code = (
        "import pathlib, sys; from trimtab.store.files import lock\n"
        "with lock(pathlib.Path(sys.argv[1])): pass"
    )
    with lock(tmp_path):
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True
        )
    assert "InputError: another run is writing" in done.stderr


def test_lock_outlives_the_replaced_folder(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with lock(folder):
        for _ in range(2):
            with replace_directory(folder) as temp:
                write_json(temp / "manifest.json", {})
            with pytest.raises(InputError), lock(folder):
                raise AssertionError("must not be entered")
    assert names(folder) == ["manifest.json"]


def test_json_has_one_form(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"b": [1, 2.5], "a": "größer"})
    expected = '{\n "a": "größer",\n "b": [\n  1,\n  2.5\n ]\n}\n'
    assert path.read_bytes() == expected.encode()
    assert read_json(path, "report") == {"a": "größer", "b": [1, 2.5]}


def test_json_refuses_numbers_that_are_not_finite(tmp_path: Path) -> None:
    with pytest.raises(NumericalError, match=r"a\.json"):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b'{"a": 1', "valid JSON"),
        (b'{"a": 1, "a": 2}', "stand twice: a"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": "\xff"}', "valid JSON"),
        (b"[1]", "expected an object"),
        (b"[" * 100_000, "valid JSON"),
    ],
)
def test_read_json_says_what_is_wrong(tmp_path: Path, data: bytes, word: str) -> None:
    path = tmp_path / "manifest.json"
    path.write_bytes(data)
    with pytest.raises(AdapterError, match=word) as caught:
        read_json(path, "adapter manifest", error=AdapterError)
    assert "adapter manifest" in caught.value.message


def test_read_json_names_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"manifest .*x\.json"):
        read_json(tmp_path / "x.json", "manifest")


def test_fingerprints_agree_with_the_standard_library(tmp_path: Path) -> None:
    data = os.urandom(300_000)
    (tmp_path / "a").write_bytes(data)
    assert sha256_file(tmp_path / "a") == sha256_bytes(data) == hashlib.sha256(data).hexdigest()


def test_package_versions_import_nothing() -> None:
    code = (
        "import json, sys; from trimtab.store import files; v = files.package_versions()\n"
        "assert not {'torch', 'numpy', 'transformers'} & set(sys.modules), 'imported'\n"
        "print(json.dumps(v))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == package_versions()
    assert package_versions()["numpy"][0].isdigit()
