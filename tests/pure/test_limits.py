"""Memory limits from a made-up /proc and /sys: no cgroup, version 2, version 1, nested, inside a container."""

from pathlib import Path

import pytest

from zinfer.config.limits import memory_limits

GIB = 2**30
MEMINFO = """\
MemTotal:       33554432 kB
MemFree:         1048576 kB
MemAvailable:   25165824 kB
SwapTotal:       2097152 kB
"""
V2_MOUNT = "35 24 0:30 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
V1_MOUNT = "36 32 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n"
V1_CPU = "37 32 0:33 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu\n"


class Machine:
    """A folder that stands for "/"."""

    def __init__(self, root: Path, cgroup: str = "", mounts: str = "") -> None:
        self.root = root
        self.write("proc/meminfo", MEMINFO)
        self.write("proc/self/cgroup", cgroup)
        self.write("proc/self/mountinfo", "22 1 8:1 / / rw - ext4 /dev/vda rw\n" + mounts)

    def write(self, path: str, text: str) -> None:
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)

    def v2(self, folder: str, limit: int | str, used: int, inactive_file: int = 0) -> None:
        self.write(f"{folder}/memory.max", f"{limit}\n")
        self.write(f"{folder}/memory.current", f"{used}\n")
        self.write(f"{folder}/memory.stat", f"anon 5\nfile 7\ninactive_file {inactive_file}\n")

    def v1(self, folder: str, limit: int, used: int, inactive_file: int = 0) -> None:
        self.write(f"{folder}/memory.limit_in_bytes", f"{limit}\n")
        self.write(f"{folder}/memory.usage_in_bytes", f"{used}\n")
        self.write(f"{folder}/memory.stat", f"inactive_file 1\ntotal_inactive_file {inactive_file}\n")


def test_without_a_cgroup_the_machine_is_the_limit(tmp_path):
    limits = memory_limits(Machine(tmp_path).root)
    assert (limits.total, limits.available, limits.swap) == (32 * GIB, 24 * GIB, 2 * GIB)
    assert not limits.is_cgroup


def test_version_2_limits_and_counts_what_the_kernel_would_give_back(tmp_path):
    machine = Machine(tmp_path, "0::/user.slice/job\n", V2_MOUNT)
    machine.v2("sys/fs/cgroup/user.slice/job", 8 * GIB, used=5 * GIB, inactive_file=GIB)
    machine.v2("sys/fs/cgroup/user.slice", "max", used=20 * GIB)
    limits = memory_limits(machine.root)
    assert (limits.total, limits.available) == (8 * GIB, 4 * GIB)
    assert limits.binding.endswith("user.slice/job")


def test_an_ancestor_may_be_the_tighter_one(tmp_path):
    machine = Machine(tmp_path, "0::/a/b\n", V2_MOUNT)
    machine.v2("sys/fs/cgroup/a/b", 16 * GIB, used=GIB)
    machine.v2("sys/fs/cgroup/a", 12 * GIB, used=10 * GIB)
    limits = memory_limits(machine.root)
    assert (limits.total, limits.available) == (12 * GIB, 2 * GIB)


def test_version_1_has_its_own_files_and_a_number_for_no_limit(tmp_path):
    machine = Machine(tmp_path, "5:cpu:/other\n4:memory:/jobs/one\n0::/\n", V1_CPU + V1_MOUNT)
    machine.v1("sys/fs/cgroup/memory/jobs/one", 6 * GIB, used=2 * GIB, inactive_file=GIB)
    machine.v1("sys/fs/cgroup/memory/jobs", 9223372036854771712, used=3 * GIB)
    machine.v1("sys/fs/cgroup/memory", 9223372036854771712, used=9 * GIB)
    machine.v1("sys/fs/cgroup/cpu/other", GIB, used=0)  # not a memory hierarchy
    limits = memory_limits(machine.root)
    assert (limits.total, limits.available) == (6 * GIB, 5 * GIB)


@pytest.mark.parametrize("mount_root", ["/", "/docker/abc"])
def test_in_a_container_the_mount_shows_our_own_group_as_its_root(tmp_path, mount_root):
    mount = f"35 24 0:30 {mount_root} /sys/fs/cgroup ro - cgroup2 cgroup ro\n"
    machine = Machine(tmp_path, "0::/docker/abc\n", mount)
    machine.v2("sys/fs/cgroup", 3 * GIB, used=GIB)
    assert memory_limits(machine.root).total == 3 * GIB


def test_nothing_is_available_where_more_is_used_than_allowed(tmp_path):
    machine = Machine(tmp_path, "0::/\n", V2_MOUNT)
    machine.v2("sys/fs/cgroup", 2 * GIB, used=3 * GIB)
    assert memory_limits(machine.root).available == 0


def test_this_machine_has_memory():
    limits = memory_limits()
    assert 0 < limits.available <= limits.total
