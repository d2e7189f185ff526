"""The workflows, as far as they can be read without running them."""

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from glm_mlx.doctor import build_parser

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def jobs() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    return found


def follows_schema(path: Path) -> bool:
    """GitHub's schema of a workflow, as `check-jsonschema` carries it."""
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows", str(path)]
    return subprocess.run(check, capture_output=True, timeout=60).returncode == 0


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_follow_githubs_schema(path: Path, tmp_path: Path) -> None:
    assert follows_schema(path)
    for word in ("runs-on", "steps", "timeout-minutes: 60"):
        text = path.read_text()
        assert word in text
        (tmp_path / path.name).write_text(text.replace(word, "x" + word))
        assert not follows_schema(tmp_path / path.name)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_actions_are_pinned_by_major_version(path: Path) -> None:
    used = re.findall(r"uses: *(\S+)", path.read_text())
    assert used
    assert [name for name in used if not re.fullmatch(r"actions/[a-z-]+@v\d+", name)] == []


def test_both_systems_run_the_two_lines_of_the_readme() -> None:
    """By way of `.ci/run`, which takes them from there, in words that the bash of macOS (3.2) knows."""
    assert {job["runs-on"].split("-")[0] for job in jobs().values()} == {"ubuntu", "macos"}
    for job in jobs().values():
        assert [step["run"] for step in job["steps"] if step.get("run") == ".ci/run"] == [".ci/run"]
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    assert not re.search(r"mapfile|readarray|declare -A|\$\{\w+(\^|,|@)|&>>|\|&|coproc", script.read_text())


def test_on_a_mac_doctor_comes_first_and_its_report_is_kept_whatever_happens() -> None:
    steps = [step for step in jobs()["mac"]["steps"] if step.get("uses", "").split("@")[0] != "actions/checkout"]
    doctor, keep, lines = steps[1:]
    command = next(line for line in doctor["run"].splitlines() if "glm_mlx.doctor" in line)
    words = shlex.split(command)
    args = build_parser().parse_args(words[words.index("glm_mlx.doctor") + 1 :])
    assert args.compile_only
    report = doctor["env"][str(args.json).removeprefix("$")]
    assert keep["uses"].startswith("actions/upload-artifact@")
    assert keep["with"] == {"name": "doctor", "path": report, "if-no-files-found": "error"}
    assert [step["if"] for step in (keep, lines)] == ["${{ !cancelled() }}"] * 2
