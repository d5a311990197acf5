"""What a machine has to spare, on made-up machines."""

from __future__ import annotations

from pathlib import Path

import pytest

from vattention.memory.budget import control_groups, memory_info

GIB = 2**30
KIB_PER_GIB = 2**20


class Machine:
    """64 GiB of memory, 48 available, 20 of them page cache; its files are under `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.write(
            "proc/meminfo",
            f"MemTotal: {64 * KIB_PER_GIB} kB\nMemFree: {28 * KIB_PER_GIB} kB\n"
            f"MemAvailable: {48 * KIB_PER_GIB} kB\nActive(file): {12 * KIB_PER_GIB} kB\n"
            f"Inactive(file): {8 * KIB_PER_GIB} kB\nHugePages_Total: 0\n",
        )
        self.mapped_files(0)

    def write(self, path: str, text: object) -> None:
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(f"{text}\n")

    def mapped_files(self, gib: int) -> None:
        self.write("proc/self/status", f"Name: python\nVmSize: 5 kB\nRssFile: {gib * KIB_PER_GIB} kB")

    def v2(self, mount_root: str, path: str, mount: str = "/sys/fs/cgroup") -> None:
        self.write("proc/self/cgroup", f"0::{path}")
        self.write(
            "proc/self/mountinfo",
            "22 1 0:20 / /proc rw - proc proc rw\n"
            f"30 23 0:26 {mount_root} {mount} rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate",
        )

    def group(self, path: str, maximum: object, used: float, inactive: float = 0) -> None:
        directory = f"sys/fs/cgroup/{path}"
        self.write(f"{directory}/memory.max", maximum)
        self.write(f"{directory}/memory.current", int(used * GIB))
        self.write(f"{directory}/memory.stat", f"anon 5\ninactive_file {int(inactive * GIB)}\nactive_file 7")

    def available_gib(self) -> float:
        return memory_info(self.root).available_nbytes / GIB


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_without_control_groups_the_machine_counts(machine: Machine) -> None:
    info = memory_info(machine.root)
    assert info.total_nbytes == 64 * GIB
    assert info.available_nbytes == 47 * GIB  # 1 GiB in reserve


def test_the_reserve_of_a_small_machine_is_a_tenth(machine: Machine) -> None:
    machine.write("proc/meminfo", f"MemTotal: {4 * KIB_PER_GIB} kB\nMemAvailable: {3 * KIB_PER_GIB} kB")
    assert machine.available_gib() == pytest.approx(2.6)


def test_mapped_files_are_not_free_though_the_kernel_counts_them_so(machine: Machine) -> None:
    machine.mapped_files(15)
    assert machine.available_gib() == 48 - 15 - 1
    machine.mapped_files(30)  # more than there is page cache: shared pages are counted once for each mapping
    assert machine.available_gib() == 48 - 20 - 1


def test_the_tightest_group_above_the_process_counts(machine: Machine) -> None:
    machine.v2("/", "/user.slice/job/worker")
    machine.group("user.slice/job/worker", "max", used=2)
    machine.group("user.slice/job", 10 * GIB, used=6, inactive=1.5)
    machine.group("user.slice", 40 * GIB, used=6)
    info = memory_info(machine.root)
    assert info.total_nbytes == 10 * GIB
    assert info.available_nbytes == (10 - 6 + 1.5 - 1) * GIB


def test_throttling_begins_at_memory_high(machine: Machine) -> None:
    machine.v2("/", "/job")
    machine.group("job", 10 * GIB, used=2)
    machine.write("sys/fs/cgroup/job/memory.high", 6 * GIB)
    assert machine.available_gib() == pytest.approx(6 - 2 - 0.6)


def test_in_a_group_mapped_files_matter_only_where_they_count_as_free(machine: Machine) -> None:
    machine.v2("/", "/job")
    machine.group("job", 20 * GIB, used=12, inactive=3)
    machine.mapped_files(9)  # of which at most 3 are on the inactive list; the rest is in `used`
    assert machine.available_gib() == 20 - 12 + 3 - 3 - 1


def test_version_1_counts_what_groups_below_hold_too(machine: Machine) -> None:
    machine.write("proc/self/cgroup", "5:cpu,cpuacct:/elsewhere\n4:memory:/docker/abc\n0::/")
    machine.write(
        "proc/self/mountinfo",
        "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n"
        "34 31 0:30 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct\n"
        "35 31 0:32 /docker/abc /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory",
    )
    machine.write("sys/fs/cgroup/memory/memory.limit_in_bytes", 8 * GIB)
    machine.write("sys/fs/cgroup/memory/memory.usage_in_bytes", 5 * GIB)
    machine.write("sys/fs/cgroup/memory/memory.stat", f"inactive_file 0\ntotal_inactive_file {2 * GIB}")
    assert machine.available_gib() == pytest.approx(8 - 5 + 2 - 0.8)


def test_a_path_outside_of_the_mounted_tree_means_its_top(machine: Machine) -> None:
    machine.v2("/kubepods/pod1", "/../other")
    machine.group(".", 8 * GIB, used=1)
    assert list(control_groups(machine.root)) == [machine.root / "sys/fs/cgroup"]
    assert machine.available_gib() == pytest.approx(8 - 1 - 0.8)


def test_an_unlimited_group_and_a_root_without_files_change_nothing(machine: Machine) -> None:
    machine.v2("/", "/job")
    machine.group("job", "max", used=30)
    assert machine.available_gib() == 47


def test_an_exhausted_group_has_nothing_rather_than_less(machine: Machine) -> None:
    machine.v2("/", "/job")
    machine.group("job", 2 * GIB, used=2.5)
    assert memory_info(machine.root).available_nbytes == 0


def test_this_machine() -> None:
    info = memory_info()
    total = next(
        int(line.split()[1]) * 1024 for line in Path("/proc/meminfo").read_text().splitlines() if "MemTotal" in line
    )
    assert 0 < info.available_nbytes < info.total_nbytes <= total
