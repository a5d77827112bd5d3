"""The page on devices: its code runs, its files are workflows that GitHub takes."""

import re
from pathlib import Path

import pytest

_DOCS = Path(__file__).parents[1] / "docs"
_BLOCKS = re.findall(
    r"^```python\n(.*?)^```$",
    (_DOCS / "devices.md").read_text(encoding="utf-8"),
    re.MULTILINE | re.DOTALL,
)
_WORKFLOWS = ("cpu.yml", "accelerator.yml")


@pytest.mark.devices
def test_the_assertion_over_simulated_devices_passes():
    (block,) = [block for block in _BLOCKS if "shard_map" in block]
    exec(compile(block, "devices.md", "exec"), {})


def test_the_lines_for_conftest_mark_and_skip(pytester_code):
    names, marked = pytester_code
    items = [_Item(True), _Item(False)]
    names["pytest_collection_modifyitems"](items)
    assert [bool(item.added) for item in items] == marked


class _Item:
    """As much of a test as a hook sees of it."""

    def __init__(self, needs_devices):
        self._needs_devices = needs_devices
        self.added = []

    def get_closest_marker(self, name):
        return name == "devices" and self._needs_devices

    def add_marker(self, marker):
        self.added.append(marker)


@pytest.fixture(params=[1, 8])
def pytester_code(request, monkeypatch):
    """The page's conftest.py, and which of two tests it must skip."""
    (block,) = [block for block in _BLOCKS if "conftest.py" in block]
    names = {}
    exec(compile(block, "conftest.py", "exec"), names)
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(names["jax"], "device_count", lambda: request.param)
    return names, [request.param == 1, False]


@pytest.mark.parametrize("name", _WORKFLOWS)
def test_a_workflow_is_yaml_with_steps_and_pinned_actions(name):
    yaml = pytest.importorskip("yaml")
    workflow = yaml.safe_load((_DOCS / "ci" / name).read_text(encoding="utf-8"))
    assert {"name", "jobs", "permissions"} <= set(workflow)
    assert True in workflow  # YAML's reading of the key `on`
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] > 0
        for step in job["steps"]:
            assert ("run" in step) != ("uses" in step)
            if "uses" in step:
                assert re.fullmatch(r"actions/[a-z-]+@v\d+", step["uses"])


@pytest.mark.parametrize("name", _WORKFLOWS)
def test_the_page_links_to_each_workflow(name):
    text = (_DOCS / "devices.md").read_text(encoding="utf-8")
    assert f"(ci/{name})" in text
    assert (_DOCS / "ci" / name).is_file()


def test_the_workflow_for_the_cpu_has_all_three_runs():
    text = (_DOCS / "ci" / "cpu.yml").read_text(encoding="utf-8")
    assert '-m "not devices"' in text
    assert "--xla_force_host_platform_device_count=8" in text
    assert "gradtest.launch --processes 2 --devices-per-process 4 --" in text
