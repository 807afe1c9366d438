"""Settings: where each value comes from, what is refused and what is proposed, and how "auto" becomes a number."""

from pathlib import Path

import pytest

from zinfer.config import profiles
from zinfer.config.limits import MemoryLimits
from zinfer.config.load import cache_folder, load_settings
from zinfer.config.machine import Machine
from zinfer.config.profiles import SIM_DEFAULT, fingerprint, load_machine, save_machine, saved_machine
from zinfer.config.resolve import resolve
from zinfer.config.schema import EXAMPLES, Settings, parse_settings, setting_paths
from zinfer.errors import MachineError, UsageError

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
GIB = 2**30
LIMITS = MemoryLimits(total=32 * GIB, available=20 * GIB, binding="machine")


def load(file=None, *, sets=(), flags=None, **environ):
    return load_settings(file, sets=sets, flags=flags, environ=environ)


def write(tmp_path, text, name="settings.toml"):
    path = tmp_path / name
    path.write_text(text)
    return path


def test_every_source_beats_the_ones_below_it(tmp_path):
    file = write(
        tmp_path, 'device = "cpu"\nexact = false\n[memory]\nhost = "1GiB"\n[runtime]\ncontext = 64\n'
    )
    loaded = load(
        file,
        sets=["memory.host=3GiB", "runtime.lookahead=2"],
        flags={"memory.host": "4GiB", "device": None},
        ZINFER_MEMORY_HOST="2GiB",
        ZINFER_EXACT="true",
        ZINFER_RUNTIME_LOOKAHEAD="1",
        ZINFER_CACHE="/nowhere",
        PATH="/bin",
    )
    settings = loaded.settings
    assert (settings.device, settings.exact, settings.memory.host) == ("cpu", True, 4 * GIB)
    assert (settings.runtime.lookahead, settings.runtime.context) == (2, 64)
    assert loaded.origins == {
        "device": f"file {file}",
        "exact": "environment",
        "memory.host": "flag",
        "runtime.context": f"file {file}",
        "runtime.lookahead": "--set",
    }


def test_without_any_source_everything_is_at_its_default():
    assert load().settings == Settings()
    assert load().origins == {}


def test_a_file_can_be_named_by_the_environment_and_a_flag_names_another(tmp_path):
    one = write(tmp_path, 'device = "cpu"', "one.toml")
    two = write(tmp_path, 'device = "sim"', "two.toml")
    assert load(ZINFER_CONFIG=str(one)).settings.device == "cpu"
    assert load(two, ZINFER_CONFIG=str(one)).settings.device == "sim"


def test_paths_in_a_file_count_from_its_folder_and_names_of_machines_do_not(tmp_path):
    file = write(tmp_path, 'model = "weights"\nmachine = "m.toml"\n[memory]\ndisk = "/nvme"\n')
    settings = load(file).settings
    assert settings.model == str(tmp_path / "weights")
    assert settings.machine == str(tmp_path / "m.toml")
    assert settings.memory.disk == "/nvme"
    assert load(write(tmp_path, f'machine = "{SIM_DEFAULT}"')).settings.machine == SIM_DEFAULT


@pytest.mark.parametrize(
    ("sources", "names"),
    [
        ({"sets": ["memory.hots=1GiB"]}, ["memory.hots", "memory.host", "--set"]),
        ({"sets": ["memory_host=1GiB"]}, ["memory_host", "memory.host"]),
        ({"ZINFER_MEMORY_HOTS": "1GiB"}, ["ZINFER_MEMORY_HOTS", "ZINFER_MEMORY_HOST"]),
        ({"flags": {"runtime.lookahed": 1}}, ["runtime.lookahed", "runtime.lookahead", "flag"]),
        ({"flags": {"runtim.lookahead": 1}}, ["runtim", "runtime.lookahead"]),
        ({"sets": ["qqqqqqqq=1"]}, ["qqqqqqqq", "runtime.max_rows"]),
    ],
)
def test_unknown_keys_are_refused_with_the_closest_known_one(sources, names):
    with pytest.raises(UsageError) as refused:
        load(**sources)
    assert refused.value.code == "ZI-1002"
    for name in names:
        assert name in str(refused.value)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("device", "gpu"),
        ("device", "cuda:"),
        ("exact", "maybe"),
        ("memory.host", "12 parsecs"),
        ("memory.host", "120%"),
        ("memory.host", "0%"),
        ("memory.host", "-1GiB"),
        ("memory.host", 1.5),
        ("memory.device", True),
        ("runtime.lookahead", 99),
        ("runtime.lookahead", -1),
        ("runtime.max_rows", 0),
        ("runtime.threads", "many"),
        ("runtime.read_mode", "mmap"),
        ("runtime.verify", "never"),
        ("memory", 3),
    ],
)
def test_impossible_values_are_refused_with_an_assignment_that_works(path, value):
    with pytest.raises(UsageError) as refused:
        load(flags={path: value})
    assert refused.value.code == "ZI-1003"
    assert path in str(refused.value)
    assert repr(value) in str(refused.value)
    load(sets=[refused.value.remedy.removeprefix("--set ")])


def test_a_value_and_a_table_of_one_name_are_refused():
    with pytest.raises(UsageError, match="memory"):
        load(flags={"memory": 3, "memory.host": 4})


def test_every_setting_has_an_example_that_is_right():
    assert {example.partition("=")[0] for example in EXAMPLES} == set(setting_paths())
    for example in EXAMPLES:
        load(sets=[example])


@pytest.mark.parametrize(("text", "code"), [("device = ", "ZI-1005"), (None, "ZI-1004")])
def test_a_file_that_cannot_be_read_is_named(tmp_path, text, code):
    path = tmp_path / "settings.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UsageError) as refused:
        load(path)
    assert refused.value.code == code
    assert str(path) in str(refused.value)


def test_an_assignment_without_a_value_is_refused():
    with pytest.raises(UsageError, match="ZI-1006"):
        load(sets=["device"])


def test_the_cache_folder_follows_the_environment():
    assert cache_folder({"ZINFER_CACHE": "/a"}) == Path("/a")
    assert cache_folder({"XDG_CACHE_HOME": "/b"}) == Path("/b/zinfer")
    assert cache_folder({}) == Path.home() / ".cache" / "zinfer"


def test_settings_are_frozen_and_survive_a_round_trip():
    settings = load(sets=["memory.host=80%", "memory.device=20GiB"]).settings
    with pytest.raises(ValueError, match="frozen"):
        settings.device = "cpu"
    assert parse_settings(settings.model_dump()) == settings


CONFIG_FILES = sorted(CONFIGS.glob("*.toml"))
MACHINE_FILES = sorted((CONFIGS / "machines").glob("*.toml"))


@pytest.mark.parametrize("path", CONFIG_FILES, ids=lambda path: path.name)
def test_every_shipped_settings_file_can_be_used(path):
    settings = load(path).settings
    machine = load_machine("sim-default")
    assert resolve(settings, machine, limits=None).host_bytes > 0


@pytest.mark.parametrize("path", MACHINE_FILES, ids=lambda path: path.name)
def test_every_shipped_machine_can_be_used(path):
    machine = load_machine(str(path))
    assert machine.name == path.stem
    assert not machine.measured
    for compute in filter(None, (machine.host, machine.device)):
        for points in compute.products.values():
            rows = [point.rows for point in points]
            assert rows == sorted(set(rows))
            seconds = [compute.seconds_per_byte("BF16", count) for count in (1, 2, 16, 64, 300, 2048, 8192)]
            assert seconds == sorted(seconds)


def test_all_of_configs_is_looked_at():
    assert len(CONFIG_FILES) == 5
    assert len(MACHINE_FILES) == 7
    assert set(CONFIGS.rglob("*.toml")) == {*CONFIG_FILES, *MACHINE_FILES}


def test_the_shipped_device_profile_is_inside_the_package():
    machine = load_machine(SIM_DEFAULT)
    assert machine.device is not None
    assert machine.h2d is not None


def test_an_unknown_machine_is_refused_with_a_name_that_works():
    with pytest.raises(UsageError, match="ZI-1007") as refused:
        load_machine("sim-defaul")
    load_machine(refused.value.remedy.removeprefix("--machine "))


@pytest.mark.parametrize("text", ['{"name": 1}', "[]", "{", '{"name": "x", "host_byte": 3}'])
def test_a_file_that_is_no_machine_is_refused(tmp_path, text):
    path = write(tmp_path, text, "m.json")
    with pytest.raises(UsageError, match="ZI-1008"):
        load_machine(str(path))


def test_a_saved_profile_is_trusted_only_where_it_was_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(profiles, "cache_folder", lambda: tmp_path / "cache")
    assert saved_machine() is None
    here = load_machine(SIM_DEFAULT).model_copy(update={"measured": True, "fingerprint": fingerprint()})
    assert save_machine(here) == profiles.profile_path()
    assert saved_machine() == here
    save_machine(here.model_copy(update={"fingerprint": "another machine"}))
    assert saved_machine() is None
    profiles.profile_path().write_text("{")
    assert saved_machine() is None


def test_a_profile_of_other_kernels_is_not_trusted(tmp_path, monkeypatch):
    """Measured before an upgrade that made products faster it would choose for the slower ones."""
    monkeypatch.setattr(profiles, "cache_folder", lambda: tmp_path / "cache")
    save_machine(
        load_machine(SIM_DEFAULT).model_copy(update={"measured": True, "fingerprint": fingerprint()})
    )
    assert saved_machine() is not None
    others = tmp_path / "kernels"
    others.mkdir()
    (others / "products.c").write_text("/* faster */")
    monkeypatch.setattr(profiles, "_KERNELS", others)
    profiles._kernels_version.cache_clear()
    try:
        assert saved_machine() is None
    finally:
        profiles._kernels_version.cache_clear()


def machine_of(host=64 * GIB, device=24 * GIB, **changes) -> Machine:
    return load_machine(SIM_DEFAULT).model_copy(
        update={"host_bytes": host, "device_bytes": device, **changes}
    )


def no_device() -> Machine:
    return machine_of(device=0, h2d=None).model_copy(update={"device": None})


@pytest.mark.parametrize(
    ("asked", "granted", "reason"),
    [
        (5 * GIB, 5 * GIB, None),
        ("5GiB", 5 * GIB, None),
        ("50%", 16 * GIB, "50% of 32.00 GiB"),  # of the clamped machine, not of what is free now
        ("auto", 16 * GIB, "auto: 80%"),
        ("90%", 20 * GIB, "cut from 28.80 GiB"),
        ("64GiB", 20 * GIB, "cut from 64.00 GiB to the 20.00 GiB available"),
    ],
)
def test_host_budgets_become_bytes_within_what_is_available(asked, granted, reason):
    settings = load(flags={"device": "cpu", "memory.host": asked}).settings
    resolved = resolve(settings, no_device(), limits=LIMITS)
    assert resolved.host_bytes == pytest.approx(granted, abs=1)
    assert (reason is None) == ("memory.host" not in resolved.reasons)
    assert reason is None or reason in resolved.reasons["memory.host"]
    assert resolved.settings is settings
    assert resolved.device_bytes == 0


def test_a_cgroup_is_named_as_the_reason():
    limits = MemoryLimits(total=GIB, available=GIB, binding="/sys/fs/cgroup/job")
    resolved = resolve(
        load(flags={"memory.host": "2GiB", "device": "cpu"}).settings, no_device(), limits=limits
    )
    assert resolved.host_bytes == GIB
    assert "/sys/fs/cgroup/job" in resolved.reasons["memory.host"]


def test_planning_for_another_machine_counts_its_declared_memory():
    settings = load(flags={"memory.host": "50%", "memory.device": "50%"}).settings
    resolved = resolve(settings, machine_of(), limits=None)
    assert (resolved.device, resolved.host_bytes, resolved.device_bytes) == ("cuda:0", 32 * GIB, 12 * GIB)


@pytest.mark.parametrize(
    ("asked", "machine", "named", "num_gpus", "device"),
    [
        ("auto", "device", None, 1, "cuda:0"),
        ("auto", "device", SIM_DEFAULT, 0, "sim"),
        ("auto", "device", None, 0, "cpu"),
        ("auto", "host", None, 0, "cpu"),
        ("cuda", "device", None, 1, "cuda:0"),
        ("cuda:1", "device", None, 2, "cuda:1"),
        ("cpu", "device", None, 2, "cpu"),
        ("sim", "device", None, 0, "sim"),
    ],
)
def test_the_device_is_settled(asked, machine, named, num_gpus, device):
    settings = load(flags={"device": asked, "machine": named}).settings
    profile = machine_of() if machine == "device" else no_device()
    assert resolve(settings, profile, limits=LIMITS, num_gpus=num_gpus).device == device


def test_a_gpu_that_is_not_there_and_a_simulation_of_nothing_are_refused():
    with pytest.raises(MachineError, match="ZI-5001"):
        resolve(load(flags={"device": "cuda:1"}).settings, machine_of(), limits=LIMITS, num_gpus=1)
    with pytest.raises(UsageError, match="ZI-1009") as refused:
        resolve(load(flags={"device": "sim"}).settings, no_device(), limits=LIMITS)
    assert "--machine sim-default" in refused.value.remedy


def test_what_can_be_pinned_and_what_is_free_on_the_device_bound_the_budgets():
    resolved = resolve(
        load(flags={"device": "cuda:0", "memory.host": "16GiB", "memory.device": "20GiB"}).settings,
        machine_of(pinnable_bytes=4 * GIB),
        limits=LIMITS,
        num_gpus=1,
        free_device_bytes=10 * GIB,
    )
    assert (resolved.host_bytes, resolved.device_bytes) == (4 * GIB, 10 * GIB)
    assert (resolved.host_limit_bytes, resolved.device_limit_bytes) == (4 * GIB, 10 * GIB)
    assert "pinned" in resolved.reasons["memory.host"]


def test_a_device_budget_on_cpu_is_said_to_be_unused():
    resolved = resolve(
        load(flags={"device": "cpu", "memory.device": "1GiB"}).settings, machine_of(), limits=LIMITS
    )
    assert "not used" in resolved.reasons["memory.device"]
