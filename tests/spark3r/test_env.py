"""The environment record: complete, fit for a profile, and silent about machine and user."""

from __future__ import annotations

import getpass
import json
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from spark3r import __version__, env
from spark3r.kernels import trials
from spark3r.profile.evidence import EnvironmentRecord


def test_record_is_what_profiles_hold() -> None:
    record = env.environment()
    stored = EnvironmentRecord.model_validate_json(json.dumps(record))
    assert json.loads(stored.model_dump_json()) == record
    assert set(EnvironmentRecord.model_fields) == set(record)
    assert record["spark3r"] == __version__
    assert record["packages"]["torch"]
    assert record["cores"] >= 1


def test_record_names_no_machine_and_no_user() -> None:
    text = json.dumps(env.environment())
    for secret in (platform.node(), getpass.getuser(), str(Path.home()), str(Path.cwd())):
        if len(secret) > 4:  # "root" and "/" stand in other words
            assert secret not in text


def test_device_names() -> None:
    assert env.device_name("cpu") == env.cpu_name()
    assert env.device_name("meta") == "meta"


def test_cpu_name_without_cpuinfo(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", fail)
    assert env.cpu_name()


def test_driver_without_nvidia_smi(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise subprocess.TimeoutExpired("nvidia-smi", 5)

    monkeypatch.setattr(subprocess, "run", fail)
    assert env._driver() is None


def test_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name="NVIDIA H100", total_memory=80 * 2**30, major=9, minor=0)
    answer = SimpleNamespace(stdout="550.54\n550.54\n")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: properties.name)
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: answer)
    record = env.environment()
    assert record["gpus"] == ["NVIDIA H100, 80 GiB, compute 9.0"] * 2
    assert record["driver"] == "550.54"
    assert env.device_name("cuda:1") == "NVIDIA H100"


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert env.main([]) == 0
    text = capsys.readouterr().out
    assert f"spark3r: {__version__}\n" in text
    assert "gpus: " in text
    assert text.endswith("kernels: no GPU\n") == (torch.cuda.device_count() == 0)
    assert env.main(["--yaml"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "usage: python -m spark3r.env [--json]\n"


def test_command_says_which_kernels_run_and_why_others_do_not(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = (("cudnn", "it raised RuntimeError: no engine"),)
    chosen = trials.Choice("matching", "cuda:0", "float32", 64, "triton", refused)
    monkeypatch.setitem(trials._choices, ("matching",), chosen)
    assert env.main([]) == 0
    assert capsys.readouterr().out.endswith(
        "kernels:\n"
        "  matching, float32 on cuda:0: triton (refused cudnn: it raised RuntimeError: no engine)\n"
    )
    assert env.main(["--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kernels"] == [
        {
            "operation": "matching",
            "device": "cuda:0",
            "dtype": "float32",
            "implementation": "triton",
            "refused": dict(refused),
        }
    ]


def test_command_as_a_module() -> None:
    answer = subprocess.run(
        [sys.executable, "-m", "spark3r.env", "--json"], capture_output=True, text=True, check=True
    )
    assert json.loads(answer.stdout)["spark3r"] == __version__
    assert answer.stderr == ""
