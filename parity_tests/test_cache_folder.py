"""The cache folder is the user's own and nobody else's, or there is none: nothing that another could plant is read."""

import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bench import script
from glm_mlx.errors import InputError
from kernels import shapes
from kernels.cache_folder import cache_folder, private_folder, read_own, write_whole
from parity_tests.msl import compiler


@pytest.fixture(autouse=True)
def _apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def _open_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def mode(folder: Path) -> int:
    return stat.S_IMODE(folder.stat().st_mode)


def give_away(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To another user; who may not do that becomes another user."""
    if os.geteuid() == 0:
        os.chown(path, 4242, -1)
    else:
        another = os.geteuid() + 1
        monkeypatch.setattr(os, "geteuid", lambda: another)


@pytest.mark.usefixtures("_open_umask")
def test_folders_are_made_for_the_user_alone(tmp_path: Path) -> None:
    folder = private_folder("cuda", "modules")
    assert folder == tmp_path / "cache" / "glm-mlx" / "cuda" / "modules"
    made = [folder, *folder.parents][:4]
    assert made[-1] == tmp_path / "cache"
    assert [mode(f) for f in made] == [0o700] * 4
    write_whole(cache_folder() / "other" / "file", b"x")
    assert mode(cache_folder() / "other") == 0o700
    elsewhere = tmp_path / "side" / "glm-mlx" / "file"
    write_whole(elsewhere, b"x")
    assert mode(elsewhere.parent) == 0o700


def test_a_folder_that_others_could_read_is_closed_to_them() -> None:
    (cache_folder() / "cuda").mkdir(parents=True)
    for folder in (cache_folder(), cache_folder() / "cuda"):
        folder.chmod(0o755)
    private_folder("cuda")
    assert [mode(folder) for folder in (cache_folder(), cache_folder() / "cuda")] == [0o700, 0o700]


@pytest.mark.parametrize("variable", ["XDG_CACHE_HOME", "HOME"])
def test_the_users_link_to_another_disk_works(variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    disk, link = tmp_path / "disk", tmp_path / "link"
    disk.mkdir()
    link.symlink_to(disk)
    monkeypatch.setenv(variable, str(link))
    write_whole(cache_folder() / "file", b"x")
    assert read_own(cache_folder() / "file") == b"x"
    assert [path.read_bytes() for path in disk.rglob("glm-mlx/file")] == [b"x"]


def _of_another_user(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    give_away(folder, monkeypatch)


def _open_to_all(folder: Path, _: pytest.MonkeyPatch) -> None:
    folder.chmod(0o777)


def _open_to_the_group(folder: Path, _: pytest.MonkeyPatch) -> None:
    folder.chmod(0o770)


def _a_link(folder: Path, _: pytest.MonkeyPatch) -> None:
    folder.symlink_to(folder.rename(folder.with_name("elsewhere")))


def _a_holder_open_to_all(folder: Path, _: pytest.MonkeyPatch) -> None:
    folder.parent.chmod(0o777)


def _a_holder_of_another_user(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    give_away(folder.parent, monkeypatch)


SPOILED = [
    _of_another_user, _open_to_all, _open_to_the_group, _a_link, _a_holder_open_to_all, _a_holder_of_another_user,
]  # fmt: skip


@pytest.mark.parametrize("spoil", SPOILED)
@pytest.mark.parametrize("below", [False, True])
def test_what_another_user_could_fill_is_no_cache(
    spoil: Callable[[Path, pytest.MonkeyPatch], None], below: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = cache_folder() / "below" / "file"
    write_whole(file, b"planted")
    if below and spoil in (_a_holder_open_to_all, _a_holder_of_another_user):
        spoil = _open_to_all  # the holder of this folder is the cache folder, as in the other case
    spoil(file.parent if below else cache_folder(), monkeypatch)
    for attempt in (lambda: private_folder("below"), lambda: read_own(file), lambda: write_whole(file, b"new")):
        with pytest.raises(OSError, match=r"another user's|may write to|a link"):
            attempt()
    assert file.read_bytes() == b"planted"
    assert [path.name for path in file.parent.iterdir()] == ["file"]


def test_a_folder_that_all_may_write_to_holds_no_cache_at_any_depth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There everybody could put another folder in the place of ours, with the cache in it."""
    ours = tmp_path / "all" / "ours" / "cache"
    ours.mkdir(parents=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(ours))
    assert private_folder().is_dir()
    (tmp_path / "all").chmod(0o777)
    with pytest.raises(PermissionError, match="every user may write to this folder"):
        private_folder()


def test_a_sticky_folder_of_all_can_hold_a_cache() -> None:
    """Like /tmp: who does not own a folder there cannot exchange it."""
    cache_folder().parent.mkdir()
    cache_folder().parent.chmod(0o1777)
    assert private_folder() == cache_folder()


def test_in_the_home_of_another_user_nothing_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sudo may keep HOME: a folder of root's would shut its owner out."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(home))
    give_away(home, monkeypatch)
    with pytest.raises(PermissionError, match="another user's"):
        private_folder()
    assert list(home.iterdir()) == []


@pytest.mark.parametrize("home", [None, "home"])
def test_without_a_home_there_is_no_cache(home: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No folder below that for temporary files either, whose name everybody could guess, nor in the current one."""

    def none() -> Path:
        if home is None:
            raise RuntimeError("Could not determine home directory.")
        return Path(home)

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", none)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for attempt in (private_folder, lambda: read_own(shapes.user_file()), lambda: write_whole(shapes.user_file(), b"")):
        with pytest.raises(FileNotFoundError, match="no home folder"):
            attempt()
    assert list(tmp_path.iterdir()) == []


def test_a_relative_cache_home_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else whoever made the current folder would choose what is read."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    assert cache_folder().is_relative_to(tmp_path / "home")


def test_only_the_users_own_files_are_read(tmp_path: Path) -> None:
    folder = private_folder()
    (tmp_path / "elsewhere").write_bytes(b"x")
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe")
    for name in ("link", "folder", "pipe", "missing"):
        with pytest.raises(OSError, match=name):
            read_own(folder / name)


def test_a_file_of_another_user_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    file = private_folder() / "file"
    file.write_bytes(b"x")
    give_away(file, monkeypatch)
    with pytest.raises(PermissionError):
        read_own(file)


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    victim, file = tmp_path / "victim", private_folder() / "file"
    victim.write_bytes(b"kept")
    file.symlink_to(victim)
    write_whole(file, b"new")
    assert (victim.read_bytes(), read_own(file), file.is_symlink()) == (b"kept", b"new", False)


def test_results_go_to_a_private_folder_or_a_named_file(tmp_path: Path) -> None:
    assert script.results_file("decode", None).parent == cache_folder() / "bench"
    (cache_folder() / "bench").chmod(0o777)
    with pytest.raises(InputError, match=r"may write to this folder.*; name a file with --json"):
        script.results_file("decode", None)
    assert script.results_file("decode", tmp_path / "x.json") == tmp_path / "x.json"


def test_the_executor_loads_from_a_private_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = compiler.cache_folder.__wrapped__
    assert find() == cache_folder() / "msl"
    cache_folder().chmod(0o777)
    (tmp_path / "temporary" / "glm-mlx" / "msl").mkdir(parents=True)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    with monkeypatch.context() as patch:
        patch.setattr(compiler.atexit, "register", lambda *_, **__: None)
        folder = find()
    assert folder.parent == tmp_path / "temporary"
    assert folder.name != "glm-mlx"
    assert mode(folder) == 0o700
