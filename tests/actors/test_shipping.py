"""A model's folder on another host: whole, fetched once, never another's, never pickled weights or code."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from actors import shipping
from actors.shipping import ShippedFolder, ShippingError, cache_folder, local_folder, ship


class Store:
    """Stands in for the object store, and counts what is fetched."""

    def __init__(self) -> None:
        self.objects: list[bytes] = []
        self.fetched = 0

    def put(self, data: Any) -> int:
        self.objects.append(bytes(data))
        return len(self.objects) - 1

    def fetch(self, reference: int, _: float) -> memoryview:
        self.fetched += 1
        return memoryview(self.objects[reference])


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def send(tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Ships files from a host that is not this one, in chunks of 4 bytes."""
    monkeypatch.setattr(shipping, "_CHUNK", 4)

    def made(files: dict[str, bytes]) -> ShippedFolder:
        folder = tmp_path / "driver"
        folder.mkdir(exist_ok=True)
        for name, data in files.items():
            (folder / name).write_bytes(data)
        return replace(ship(folder, store.put), host="elsewhere", path="/nowhere/model")

    return made


MODEL = {"config.json": b"{}", "model.safetensors": b"0123456789", "empty.txt": b""}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_folder_arrives_whole_and_once(tmp_path: Path, store: Store, send: Any) -> None:
    shipped = send(MODEL)
    assert [len(file.chunks) for file in shipped.files] == [1, 0, 3]  # 2, 0 and 10 bytes by 4
    cache = tmp_path / "cache"
    first = local_folder(shipped, 1, cache=cache, fetch=store.fetch)
    assert contents(first) == MODEL
    assert store.fetched == 4
    assert local_folder(shipped, 1, cache=cache, fetch=store.fetch) == first
    assert store.fetched == 4  # once for the host
    assert first.stat().st_mode & 0o777 == 0o700


def test_where_the_folder_lies_it_is_used_as_it_is(tmp_path: Path, store: Store, send: Any) -> None:
    shipped = send(MODEL)
    here = tmp_path / "driver"
    same_host = replace(shipped, host=shipping.host_id(), path="/nowhere/model")
    assert local_folder(same_host, 1, cache=tmp_path / "cache") == Path("/nowhere/model")
    shared = replace(shipped, path=str(here))  # a file system that both hosts see
    assert local_folder(shared, 1, cache=tmp_path / "cache") == here
    assert store.fetched == 0


def test_another_model_at_the_same_path_is_not_taken_for_it(tmp_path: Path, store: Store, send: Any) -> None:
    shipped = send(MODEL)
    other = tmp_path / "other"
    other.mkdir()
    for name, data in (MODEL | {"model.safetensors": b"9876543210"}).items():
        (other / name).write_bytes(data)
    found = local_folder(replace(shipped, path=str(other)), 1, cache=tmp_path / "cache", fetch=store.fetch)
    assert found != other
    assert contents(found) == MODEL


def test_a_copy_that_was_damaged_is_fetched_again(tmp_path: Path, store: Store, send: Any) -> None:
    shipped = send(MODEL)
    copy = local_folder(shipped, 1, cache=tmp_path / "cache", fetch=store.fetch)
    (copy / "model.safetensors").write_bytes(b"012345678X")
    assert contents(local_folder(shipped, 1, cache=tmp_path / "cache", fetch=store.fetch)) == MODEL


def test_what_arrives_changed_is_refused_and_leaves_no_copy(tmp_path: Path, store: Store, send: Any) -> None:
    shipped = send(MODEL)
    store.objects[-1] = b"XX"
    with pytest.raises(ShippingError, match=r"model\.safetensors arrived with SHA-256"):
        local_folder(shipped, 1, cache=tmp_path / "cache", fetch=store.fetch)
    assert not (tmp_path / "cache" / shipped.digest[:32]).exists()


def test_pickled_weights_and_code_stay_behind(send: Any) -> None:
    shipped = send(MODEL | {"pytorch_model.bin": b"x", "modeling.py": b"x", "optimizer.pt": b"x"})
    assert [file.name for file in shipped.files] == sorted(MODEL)


def test_old_copies_make_room(tmp_path: Path, store: Store, send: Any) -> None:
    cache = tmp_path / "cache"
    copies = []
    for number in range(shipping._KEPT_FOLDERS + 2):
        copies.append(
            local_folder(send(MODEL | {"n.txt": b"%d" % number}), 1, cache=cache, fetch=store.fetch)
        )
        os.utime(copies[-1], (number, number))
    assert [copy.exists() for copy in copies] == [False] * 2 + [True] * shipping._KEPT_FOLDERS


def test_the_cache_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/c")
    assert cache_folder() == Path("/c/headrace/models")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/h")
    assert cache_folder() == Path("/h/.cache/headrace/models")


def test_a_folder_with_folders_arrives_as_it_was(tmp_path: Path, store: Store, send: Any) -> None:
    send(MODEL)
    inner = tmp_path / "driver" / "member_1"
    inner.mkdir()
    (inner / "config.json").write_bytes(b"inner")
    (inner / "weights.bin").write_bytes(b"pickle")  # never sent
    flat = ship(tmp_path / "driver", store.put)
    assert {file.name for file in flat.files} == set(MODEL)
    whole = replace(ship(tmp_path / "driver", store.put, nested=True), host="elsewhere", path="/nowhere")
    here = local_folder(whole, 1.0, cache=tmp_path / "cache", fetch=store.fetch)
    found = {
        path.relative_to(here).as_posix(): path.read_bytes() for path in here.rglob("*") if path.is_file()
    }
    assert found == MODEL | {"member_1/config.json": b"inner"}
    assert (here / "member_1").stat().st_mode & 0o077 == 0
