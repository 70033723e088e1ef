import resource
import shutil

import pytest

from wandazeta.utilities.files import check_writable, open_atomically, replace_directory, write_atomically


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="to be a folder that can be written to"):
        check_writable(tmp_path / "file" / "folder")
    with pytest.raises(ValueError, match="GiB of room"):
        check_writable(tmp_path, needed_bytes=2**60)


@pytest.mark.parametrize(("num_bytes", "size"), [(700, r"0\.7 KiB"), (5 * 2**20, r"5\.0 MiB"), (2**31, r"2\.0 GiB")])
def test_small_disks_are_measured_in_small_units(tmp_path, monkeypatch, num_bytes, size):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=num_bytes - 1))
    with pytest.raises(ValueError, match=f"to have {size} of room"):
        check_writable(tmp_path, needed_bytes=num_bytes)


def test_what_cannot_be_written_is_named_and_leaves_nothing(tmp_path):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))
    try:
        write_atomically(tmp_path / "small", b"whole")
        with pytest.raises(OSError, match="File too large") as error:
            write_atomically(tmp_path / "large", bytes(101))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert error.value.filename == str(tmp_path / "large")
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_a_directory_is_replaced_only_once_it_is_complete(tmp_path):
    target = tmp_path / "parent" / "model"
    with replace_directory(target) as fresh:
        (fresh / "first").write_text("1")
        assert not target.exists()
    with pytest.raises(ZeroDivisionError), replace_directory(target) as fresh:
        (fresh / "second").write_text(str(2 / 0))
    assert [path.name for path in target.iterdir()] == ["first"]
    # what a killed process left
    (target.parent / ".model.new").mkdir()
    (target.parent / ".model.new" / "half").write_text("")
    (target.parent / ".model.old").mkdir()
    with replace_directory(target) as fresh:
        (fresh / "second").write_text("2")
    assert [path.name for path in target.iterdir()] == ["second"]
    assert [path.name for path in target.parent.iterdir()] == ["model"]


def test_a_file_is_replaced_only_once_it_is_complete(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, b"first")
    with pytest.raises(TypeError), open_atomically(path) as file:
        file.writelines([b"half", "text"])
    assert path.read_bytes() == b"first"
    with open_atomically(path) as file:
        file.write(b"second")
    assert path.read_bytes() == b"second"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
