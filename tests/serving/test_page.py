"""Prediction page in a browser and over HTTP."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gm_mlic import Predictor, Scenes
from gm_mlic.cli.compose import compose
from gm_mlic.cli.main import run
from gm_mlic.training import run as training

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a trained model, two scenes, and a file that is not an image."""
    root = tmp_path_factory.mktemp("serve")
    settings = [
        "experiment=scenes_smoke", "dataset.sizes={train: 64, val: 8, test: 8}", "dataset.image_size=160",
        "trainer.max_epochs=2", "model.widths=[8,8]", "trainer.accelerator=cpu", f"instances.root={root}/stores",
    ]  # fmt: skip
    training.train(compose("train", [*settings, f"run_dir={root}/run"]))
    for i in range(2):
        Scenes("test", size=2).image(i).save(root / f"{i}.png")
    Scenes("test", size=1).image(0).save(root / "0.tiff")
    (root / "torn.jpg").write_bytes(b"\xff\xd8nothing")
    return root


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[tuple[str, int]]:
    command = [sys.executable, "-W", "ignore", "-m", "gm_mlic", "serve", "port=0"]
    command += [f"checkpoint={folder}/run/checkpoints/best.ckpt", "device=cpu"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=folder)
    assert server.stdout is not None
    line = server.stdout.readline()
    assert line.startswith("http://127.0.0.1:"), line
    yield "127.0.0.1", int(line.split(":")[2].split()[0])
    server.send_signal(signal.SIGINT)
    assert server.wait(timeout=30) == 0


def ask(
    address: tuple[str, int], method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None
) -> tuple[int, Any, dict[str, str]]:
    connection = http.client.HTTPConnection(*address, timeout=60)
    connection.request(method, path, body, headers or {})
    response = connection.getresponse()
    text = response.read()
    headers = {name.lower(): value for name, value in response.getheaders()}
    return response.status, json.loads(text) if "json" in headers.get("content-type", "") else text, headers


def test_response_equals_the_predictor(folder: Path, address: tuple[str, int]):
    status, answer, _ = ask(address, "POST", "/predict", (folder / "0.png").read_bytes())
    (expected,) = Predictor.load(folder / "run/checkpoints/best.ckpt")([folder / "0.png"])
    assert status == 200
    assert answer["labels"][:5] == [found.label for found in expected.top(5)]
    for c, found in enumerate(expected.top(5)):
        assert answer["probabilities"][c] == pytest.approx(found.probability, abs=1e-3)
        assert answer["boxes"][answer["argmax_instance"][c]] == pytest.approx(found.box, abs=0.1)
        column = [row[c] for row in answer["match_probabilities"]]
        assert max(column) == pytest.approx(found.probability, abs=1e-3)
    assert (answer["width"], answer["height"]) == expected.size
    status, answer, _ = ask(
        address, "POST", "/predict?label=cat&label=zebra%20crossing", (folder / "0.png").read_bytes()
    )
    assert status == 200
    assert sorted(answer["labels"]) == ["cat", "zebra crossing"]


def test_errors_are_returned_as_json(folder: Path, address: tuple[str, int]):
    photo = (folder / "0.png").read_bytes()
    for body, query, status, message in (
        (b"", "", 400, "The photo is empty"),
        (b"\xff\xd8nothing", "", 400, "The photo is not an image"),
        (photo, "?label=cat&label=cat", 400, "labels must be unique"),
        (photo, "?" + "&".join(f"label=l{i}" for i in range(501)), 400, "at most 500"),
        (bytes(25_000_001), "", 413, "larger than 25 MB"),
    ):
        found, answer, _ = ask(address, "POST", f"/predict{query}", body)
        assert (found, message in answer["error"]) == (status, True), answer
    assert ask(address, "GET", "/predict")[0] == 405
    assert ask(address, "GET", "/../../etc/passwd")[0] == 404


def test_other_hosts_are_refused(address: tuple[str, int]):
    """Requests with other host names are refused; no external resources are loaded."""
    assert ask(address, "GET", "/model", headers={"Host": "evil.example"})[0] == 400
    status, page, headers = ask(address, "GET", "/")
    assert status == 200
    assert b"http" not in page.replace(b"http-equiv", b"")
    assert "default-src 'self'" in headers["content-security-policy"]
    assert "access-control-allow-origin" not in headers


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_in_a_browser(folder: Path, address: tuple[str, int], tmp_path: Path):
    from playwright.sync_api import expect, sync_playwright

    screenshots = Path(os.environ.get("GM_MLIC_SCREENSHOTS", tmp_path))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1180, "height": 860})
        problems: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.goto("http://{}:{}".format(*address))
        expect(page.locator("#about")).to_contain_text("22 labels")
        page.set_input_files("#file", folder / "0.png")
        page.wait_for_selector("#found li")
        (expected,) = Predictor.load(folder / "run/checkpoints/best.ckpt")([folder / "0.png"])
        top = expected.top(3)
        assert page.locator("#found li span:first-child").all_text_contents()[:3] == [found.label for found in top]
        M = len(expected.boxes)
        assert page.locator("#boxes rect").count() == M
        # select the second label: its box is highlighted, and instances are sorted by match
        page.locator("#found li button").nth(1).click()
        highlighted = page.locator("#boxes rect.highlighted")
        assert highlighted.count() == 1
        assert int(highlighted.get_attribute("data-instance") or -1) == top[1].instance
        assert f"“{top[1].label}”" in page.locator("#matchhead").inner_text()
        c = expected.labels.index(top[1].label)
        order = [f"instance {i}" for i in (-expected.match_logits[:, c]).argsort(kind="stable")]
        shown = [text.split(",")[0] for text in page.locator("#matches li span:first-child").all_text_contents()]
        assert sorted(shown) == sorted(order)
        assert shown[0] == order[0]
        # the box is drawn at the correct position
        picture, box = page.locator("#photo").bounding_box(), highlighted.bounding_box()
        assert picture is not None
        assert box is not None
        scale = picture["width"] / expected.size[0]
        assert abs(box["x"] - picture["x"] - top[1].box[0] * scale) < 6
        assert abs(box["width"] - (top[1].box[2] - top[1].box[0]) * scale) < 12
        page.screenshot(path=screenshots / "label.png")
        # select a box: its labels are sorted by match
        page.locator(f'#boxes rect[data-instance="{M - 1}"]').focus()
        page.keyboard.press("Enter")
        assert f"instance {M - 1}" in page.locator("#matchhead").inner_text()
        best = expected.labels[int(expected.match_logits[M - 1].argmax())]
        assert page.locator("#matches li span:first-child").first.inner_text() == best
        # other labels
        page.locator("#edit summary").click()
        page.fill("#labels", "cat\nzebra crossing, <b>tree</b>")
        page.locator("#apply").click()
        expect(page.locator("#found li")).to_have_count(3, timeout=20_000)
        assert sorted(page.locator("#found li span:first-child").all_text_contents()) == [
            "<b>tree</b>", "cat", "zebra crossing",
        ]  # fmt: skip
        page.screenshot(path=screenshots / "labels.png")
        page.locator("#reset").click()
        expect(page.locator("#found li")).to_have_count(20, timeout=20_000)
        # not an image: error message, and previous results are removed
        page.fill("#labels", "")
        page.locator("#apply").click()
        expect(page.locator("#count")).to_have_text("(22)")
        page.set_input_files("#file", folder / "torn.jpg")
        expect(page.locator("#message")).to_contain_text("not an image")
        assert page.locator("#found li").count() == 0
        assert page.locator("#matchhead").inner_text() == "Matches"
        expect(page.locator("#stage")).to_be_hidden()
        # image format that the browser cannot show: boxes are drawn
        page.set_input_files("#file", folder / "0.tiff")
        expect(page.locator("#message")).to_contain_text("cannot show this kind of file")
        sheet = page.locator("#photo").bounding_box()
        assert sheet is not None
        assert sheet["width"] / sheet["height"] == pytest.approx(expected.size[0] / expected.size[1], rel=0.02)
        assert page.locator("#boxes rect").count() == M
        # drag and drop
        data = page.evaluate_handle(
            """async () => {
                const canvas = document.createElement('canvas'); canvas.width = 120; canvas.height = 90;
                const blob = await new Promise((done) => canvas.toBlob(done, 'image/png'));
                const transfer = new DataTransfer();
                transfer.items.add(new File([blob], 'gray.png', { type: 'image/png' }));
                return transfer;
            }"""
        )
        page.dispatch_event("h1", "drop", {"dataTransfer": data})  # outside the frame
        expect(page.locator("#message")).to_have_text("")
        page.wait_for_selector("#found li")
        narrow = browser.new_page(viewport={"width": 390, "height": 800})
        narrow.goto("http://{}:{}".format(*address))
        narrow.set_input_files("#file", folder / "1.png")
        narrow.wait_for_selector("#found li")
        expect(narrow.locator("#count")).to_have_text("(22)")
        assert narrow.evaluate("document.documentElement.scrollWidth") <= 390
        narrow.screenshot(path=screenshots / "narrow.png")
        browser.close()
    assert [problem for problem in problems if "400" not in problem] == []  # the browser logs the refused file
    with Image.open(screenshots / "label.png") as picture_file:
        assert picture_file.size == (1180, 860)


def test_invalid_addresses(folder: Path, address: tuple[str, int], capsys: pytest.CaptureFixture[str]):
    checkpoint = f"checkpoint={folder}/run/checkpoints/best.ckpt"
    assert run(["serve", checkpoint, f"port={address[1]}"]) == 2
    assert f"port={address[1]}: Address already in use" in capsys.readouterr().err
    assert run(["serve", checkpoint, "host=example.org"]) == 2
    assert "host=example.org: expected an IP address" in capsys.readouterr().err
    assert run(["serve", checkpoint, "port=99999"]) == 2
    assert "port=99999: expected an integer from 0 to 65535" in capsys.readouterr().err
