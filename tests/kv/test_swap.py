"""Images: what goes out comes back, and a failure leaves the accounts as they were."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from vattention.config import EngineConfig
from vattention.errors import ConfigError, DriverError, OutOfMemoryError
from vattention.kv import swap
from vattention.kv.build import create_swap_space
from vattention.kv.swap import Image, SwapSpace, file_space, memory_space

CAPACITY = 1 << 21


class PinnedMemory:
    """torch's page-locked memory on a processor: rounded up to powers of two.

    Attributes:
        nbytes: all that was taken.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.nbytes = 0
        self._empty = torch.empty
        monkeypatch.setattr(torch, "empty", self._take)

    def _take(self, *shape: int, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        if pin_memory:
            self.nbytes += 1 << max(shape[0] - 1, 0).bit_length()
        return self._empty(*shape, **options)


@pytest.fixture(params=["cpu", "file", "cuda"])
def space(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SwapSpace]:
    kind = request.param
    if kind == "cuda" and not torch.cuda.is_available():
        PinnedMemory(monkeypatch)
        monkeypatch.setattr(swap, "_CHUNK_NBYTES", 128)
    with closing(file_space(tmp_path, CAPACITY) if kind == "file" else memory_space(CAPACITY, kind)) as made:
        yield made
    assert (made.used_nbytes, made.num_images) == (0, 0)


@pytest.fixture
def files(tmp_path: Path) -> Iterator[SwapSpace]:
    with closing(file_space(tmp_path, CAPACITY)) as made:
        yield made


def random_runs(*sizes: int) -> list[torch.Tensor]:
    return [torch.randint(0, 256, (size,), dtype=torch.uint8) for size in sizes]


def test_page_locked_memory_is_hardly_more_than_its_image(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = PinnedMemory(monkeypatch)
    monkeypatch.setattr(swap, "_CHUNK_NBYTES", 4096)
    runs = random_runs(33_000, 500, 33_000)
    with closing(memory_space(CAPACITY, "cuda")) as space:
        image = space.save(runs, 1)
        assert image.nbytes <= memory.nbytes <= image.nbytes + 4096
        again = empty_like(runs)
        load(image, again)
        assert equal(runs, again)


def empty_like(runs: list[torch.Tensor]) -> list[torch.Tensor]:
    return [torch.zeros_like(run) for run in runs]


class Memory:
    """As much of a manager as an image needs."""

    def __init__(self, runs: list[torch.Tensor]) -> None:
        self._runs = runs

    def runs(self, slot: int, num_tokens: int) -> list[torch.Tensor]:
        return self._runs


def load(image: Image, runs: list[torch.Tensor]) -> None:
    manager: Any = Memory(runs)
    image.load(manager, 0)


def equal(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("sizes", [(1,), (4096, 1, 0, 70_000), tuple(range(1, 1300))])
def test_what_goes_out_comes_back(space: SwapSpace, sizes: tuple[int, ...]) -> None:
    runs = random_runs(*sizes)
    other = random_runs(*sizes)
    image, another = space.save(runs, 3), space.save(other, 4)
    back = empty_like(runs)
    load(another, back)
    assert equal(back, other)
    for _ in range(2):
        load(image, back)
        assert equal(back, runs)
    assert (image.num_tokens, image.nbytes) == (3, sum(sizes))
    assert (space.used_nbytes, space.num_images) == (2 * sum(sizes), 2)
    image.free()
    another.free()
    assert (space.used_nbytes, space.num_images) == (0, 0)


def test_runs_of_any_shape(space: SwapSpace) -> None:
    run = torch.randint(0, 256, (5, 2, 12), dtype=torch.uint8)
    image = space.save([run], 5)
    back = torch.zeros_like(run)
    load(image, [back])
    assert torch.equal(back, run)


def test_the_budget_bounds_what_is_kept(space: SwapSpace) -> None:
    image = space.save(random_runs(CAPACITY - 10), 1)
    with pytest.raises(OutOfMemoryError, match=r"raise swap_space: needed 11 bytes, 10 bytes") as caught:
        space.save(random_runs(5, 6), 1)
    assert (caught.value.needed_nbytes, caught.value.available_nbytes) == (11, 10)
    space.save(random_runs(10), 1)
    assert space.num_images == 2
    image.free()
    space.save(random_runs(11), 1)


def test_an_image_fits_only_as_much_memory(space: SwapSpace) -> None:
    image = space.save(random_runs(100), 1)
    with pytest.raises(ValueError, match="100 bytes"):
        load(image, random_runs(99))


def test_freed_files_and_memory_go_back_at_once(space: SwapSpace) -> None:
    """At once: somebody may still know the image."""
    descriptors = len(os.listdir("/proc/self/fd"))
    run = random_runs(CAPACITY)

    def resident_nbytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

    def freed() -> Image:
        image = space.save(run, 1)
        image.free()
        return image

    images = [freed()]
    before = resident_nbytes()
    images += [freed() for _ in range(20)]
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert resident_nbytes() < before + 10 * CAPACITY


def test_files_have_no_names(tmp_path: Path) -> None:
    with closing(file_space(tmp_path, None)) as space:
        space.save(random_runs(5000), 1)
        assert list(tmp_path.iterdir()) == []
        assert space.capacity_nbytes > 5000


def test_a_folder_that_cannot_be_written_is_said_beforehand(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"swap_space.*gone"):
        file_space(tmp_path / "gone", None)


def failing(call: Callable[..., int], nth: int, number: int) -> Callable[..., int]:
    """`call`, moving at most 700 bytes at a time, whose nth use fails with an errno."""
    uses = iter(range(1, 1_000_000))

    def wrapped(descriptor: int, buffers: list[memoryview]) -> int:
        if next(uses) == nth:
            raise OSError(number, os.strerror(number))
        return call(descriptor, [buffers[0][:700]])

    return wrapped


@pytest.mark.parametrize(
    ("number", "kind"),
    [(errno.ENOSPC, OutOfMemoryError), (errno.EDQUOT, OutOfMemoryError), (errno.EIO, DriverError)],
)
@pytest.mark.parametrize("nth", [1, 2, 7])
def test_a_failed_write_keeps_nothing(
    number: int, kind: type[Exception], nth: int, files: SwapSpace, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.save(random_runs(10), 1)
    descriptors = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch:
        patch.setattr("vattention.kv.swap.os.writev", failing(os.writev, nth, number))
        with pytest.raises(kind, match=os.strerror(number)):
            files.save(random_runs(3000, 3000), 1)
    assert (files.used_nbytes, files.num_images) == (10, 1)
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_short_reads_and_writes_are_no_failure(files: SwapSpace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vattention.kv.swap.os.writev", failing(os.writev, 0, 0))
    monkeypatch.setattr("vattention.kv.swap.os.readv", failing(os.readv, 0, 0))
    runs = random_runs(3000, 1, 0, 800)
    image = files.save(runs, 1)
    back = empty_like(runs)
    load(image, back)
    assert equal(back, runs)


@pytest.mark.parametrize("fault", ["error", "cut"])
def test_a_failed_read_is_an_error_of_the_package(
    fault: str, files: SwapSpace, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = files.save(random_runs(3000), 1)
    if fault == "error":
        monkeypatch.setattr("vattention.kv.swap.os.readv", failing(os.readv, 3, errno.EIO))
    else:
        storage: Any = image.storage
        storage._file.truncate(2999)
    with pytest.raises(DriverError, match="ends early" if fault == "cut" else os.strerror(errno.EIO)):
        load(image, random_runs(3000))
    image.free()
    assert files.num_images == 0


def test_no_memory_for_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    space = memory_space(CAPACITY, "cpu")
    monkeypatch.setattr("vattention.kv.swap.mmap.mmap", refuse)
    with pytest.raises(OutOfMemoryError, match=os.strerror(errno.ENOMEM)):
        space.save(random_runs(10), 1)
    assert (space.used_nbytes, space.num_images) == (0, 0)


def test_the_option_says_where(tmp_path: Path) -> None:
    def made(device: str = "cpu", **options: Any) -> SwapSpace | None:
        return create_swap_space(EngineConfig(model="m", **options), device)

    assert made() is None
    in_memory, in_files = made(swap_space="1MiB", kv_memory="1MiB"), made(swap_space=f"{tmp_path}:2MiB")
    assert in_memory is not None
    assert in_files is not None
    assert (in_memory.capacity_nbytes, in_files.capacity_nbytes) == (1 << 20, 2 << 20)
    with pytest.raises(ConfigError, match="limit it with kv_memory, or give swap_space a folder"):
        made(swap_space="1MiB")
    assert made("cuda", swap_space="1MiB") is not None
