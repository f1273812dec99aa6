"""Download from and upload to the hub, in subprocesses: ``huggingface_hub`` reads the hub's address on import."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_hub import TOKEN, FakeHub, Repository, fake_hub

from gm_mlic import Predictor

PREDICT = """
import sys
from gm_mlic import Predictor
from gm_mlic.errors import WeightsError
for name in sys.argv[2:]:
    try:
        found = next(Predictor.load(name)([sys.argv[1]]))
        print(found.top(1)[0].label, *(f"{p:.4f}" for p in found.probabilities))
    except WeightsError as error:
        print(error)
assert not {"hydra", "lightning", "wandb", "matplotlib"} & set(sys.modules), "prediction needs none of them"
"""
EXPORTS = """
import json
import os
import sys
from gm_mlic.cli.main import run
for token, *settings in json.loads(sys.argv[1]):
    os.environ["HF_TOKEN"] = token
    print("code", run(["export", *settings]))
"""
Command = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def checkpoint(folder: Path) -> Path:
    return folder / "gm/checkpoints/best.ckpt"


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with fake_hub() as hub:
        yield hub


@pytest.fixture
def python(hub: FakeHub, tmp_path: Path) -> Command:
    """Run python with arguments against the fake hub, without a token."""

    def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-W", "ignore", *map(str, arguments)],
            capture_output=True, text=True, check=False, cwd=tmp_path,
            env={
                "HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "hf"), "HOME": str(tmp_path),
                "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "PATH": "/usr/bin:/bin", **environment,
            },
        )  # fmt: skip

    return run


@pytest.fixture
def settings(checkpoint: Path, tmp_path: Path) -> list[str]:
    """Settings of ``gm-mlic export``."""
    return [f"checkpoint={checkpoint}", f"out={tmp_path}/out"]


@pytest.mark.slow
def test_download_fetches_model_files_only_and_caches_them(
    hub: FakeHub, python: Command, checkpoint: Path, photos: list[Path], tmp_path: Path
):
    saved = Predictor.load(checkpoint).save_pretrained(tmp_path / "saved")
    files = {file.name: file.read_bytes() for file in saved.iterdir()}
    hub.repositories["me/model"] = Repository(files | {"evil.py": b"raise SystemExit('run')"})

    done = python("-c", PREDICT, photos[0], checkpoint, "me/model", "me/other")
    assert done.returncode == 0, done.stderr
    local, found, refusal = done.stdout.splitlines()
    assert local.split()[0] == found.split()[0]
    assert found.split()[0] == next(Predictor.load(saved)(photos[:1])).top(1)[0].label
    assert refusal.startswith("me/other: no such folder, and download from the hub failed")
    assert not any("evil.py" in request for request in hub.requests)
    # cached: works without the hub
    assert python("-c", PREDICT, photos[0], "me/model", HF_HUB_OFFLINE="1").stdout.splitlines() == [found]


@pytest.mark.slow
def test_upload_and_download(hub: FakeHub, python: Command, settings: list[str], photos: list[Path], tmp_path: Path):
    done = python("-m", "gm_mlic", "export", *settings, "push=me/pushed", HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    assert f"uploaded to {hub.address}/me/pushed" in done.stdout
    pushed = hub.repositories["me/pushed"]
    assert pushed.private
    assert pushed.files == {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}

    local, remote = python("-c", PREDICT, photos[0], tmp_path / "out", "me/pushed", HF_TOKEN=TOKEN).stdout.splitlines()
    assert remote == local
    stranger = python("-c", PREDICT, photos[0], "me/pushed", HF_HOME=str(tmp_path / "stranger"))
    assert "no such folder, and download from the hub failed" in stranger.stdout  # private

    (tmp_path / "out" / "notes.txt").write_text("mine")  # other files are not uploaded
    pushes = [
        [TOKEN, *settings, "push=me/pushed", "license=mit"],
        [TOKEN, *settings, "push=me/public", "private=false"],
    ]
    again = python("-c", EXPORTS, json.dumps(pushes))
    assert again.stdout.count("code 0") == 2, again.stderr
    assert pushed.commits == 2
    assert b"license: mit" in pushed.files["README.md"].replace(b'"', b"")
    assert "notes.txt" not in pushed.files
    assert not hub.repositories["me/public"].private


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pushes", "environment"),
    [
        ([("", "me/pushed"), ("hf_wrong", "me/pushed"), (TOKEN, "you/pushed")], {}),
        ([(TOKEN, "me/pushed")], {"HF_ENDPOINT": "http://127.0.0.1:1"}),
    ],
    ids=["no token, wrong token, another user", "no hub"],
)
def test_failed_uploads_are_reported(
    hub: FakeHub,
    python: Command,
    tmp_path: Path,
    settings: list[str],
    pushes: list[tuple[str, str]],
    environment: dict[str, str],
):
    exports = [[token, *settings, f"push={name}"] for token, name in pushes]
    done = python("-c", EXPORTS, json.dumps(exports), **environment)
    assert done.stdout.count("code 2") == len(pushes)
    errors = [line for line in done.stderr.splitlines() if line.startswith("gm-mlic: error: ")]
    for (_, name), error in zip(pushes, errors, strict=True):
        assert f"push={name}: upload to the hub failed" in error
        assert "HF_TOKEN" in error
    assert "Traceback" not in done.stderr
    assert not hub.repositories
    # the exported folder is kept
    assert json.loads((tmp_path / "out" / "config.json").read_text())["labels"]
