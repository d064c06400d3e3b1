"""The playground: a real server and a browser; and what it refuses."""

import http.client
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page

from sdvae.app import server
from sdvae.app.work import Choice, Playground, _short
from sdvae.errors import ConfigError
from sdvae.vae import VAE
from tests.browser import open_chromium, open_page, overflows, violations

ROOT = Path(__file__).parents[1]
SMALL = str(ROOT / "sdvae" / "assets" / "small.safetensors")
NAME = "<img src=x onerror=alert(1)>.png"  # a file may be called so
DONE_MS = 120_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_chromium() as found:
        yield found


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """The address of `sdvae app` with two VAEs, in a process of its own."""
    command = [sys.executable, "-m", "sdvae", "app", "--vae", SMALL, "--vae", SMALL]
    command += ["--device", "cpu", "--port", "0", "--json"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    ) as app:
        try:
            assert app.stdout is not None
            yield json.loads(app.stdout.readline())["url"]
        finally:
            app.send_signal(signal.SIGINT)
            assert app.wait(60) == 130


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("photos")
    paths = []
    for place, size in enumerate(((72, 100), (90, 66))):
        ramp = np.linspace(0, 255, size[1]) * np.ones((size[0], 1))
        image = np.stack([ramp, ramp[:, ::-1], ramp * place], -1).astype(np.uint8)
        paths.append(folder / (NAME if place == 0 else "second.png"))
        Image.fromarray(image).save(paths[-1])
    return paths


def upload(page: Page, photos: list[Path]) -> None:
    page.locator("#files").set_input_files(photos)
    page.locator("#status:empty").wait_for(state="attached", timeout=DONE_MS)


def ask(url: str, method: str = "GET", path: str = "/", body: bytes = b"", **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    return response.status, text


def test_a_photo_is_uploaded_encoded_and_compared(browser: Browser, url: str, photos: list[Path]) -> None:
    with open_page(browser, url) as page:
        upload(page, photos[:1])
        assert page.locator(".photo h3").inner_text() == NAME
        captions = [page.locator(f".photo .layer.{side} figcaption").inner_text() for side in ("left", "right")]
        first, second = page.locator(".check").all_inner_texts()
        assert first != second and captions == ["Original", first]
        page.locator("#left").select_option(label=second)
        page.get_by_role("button", name="Error map").click()
        captions = [page.locator(f".photo .layer.{side} figcaption").inner_text() for side in ("left", "right")]
        assert captions == [second, f"Error of {first}"]
        assert page.locator(".of.on .latents img").count() == 5  # four channels and the std
        psnr = float(page.locator(".photo td").first.inner_text())
        assert 20 < psnr < 60
        slider = page.locator(".photo .frame input")
        slider.focus()
        page.keyboard.press("End")
        assert slider.input_value() == "100"


def test_drift_over_round_trips(browser: Browser, url: str, photos: list[Path]) -> None:
    with open_page(browser, url) as page:
        page.locator("[name=trips]").select_option("2")
        upload(page, photos[:1])
        reel = page.locator(".reel").first
        assert reel.locator("figure").count() == 3  # the original, after one, after two
        reel.locator("input").focus()
        page.keyboard.press("End")
        assert reel.locator("figure.on figcaption").inner_text().startswith("After 2 round trips")
        assert page.locator("svg[role=img]").count() == 1


def test_two_photos_are_interpolated(browser: Browser, url: str, photos: list[Path]) -> None:
    with open_page(browser, url) as page:
        upload(page, photos)
        assert page.locator(".reel").count() == 2  # one a VAE
        reel = page.locator(".reel").first
        reel.locator("input").fill("4")
        assert reel.locator("figure.on figcaption").inner_text() == "50% of the way"


def test_the_prior_is_sampled(browser: Browser, url: str) -> None:
    with open_page(browser, url) as page:
        page.locator("[name=vae][value='0']").uncheck()
        page.get_by_role("button", name="Sample the prior").click()
        page.locator(".quad img").first.wait_for(timeout=DONE_MS)
        assert page.locator(".quad img").count() == 4


def test_what_is_no_photo_is_told_in_one_sentence(browser: Browser, url: str, tmp_path: Path) -> None:
    path = tmp_path / "text.png"
    path.write_text("no photo")
    with browser.new_context() as context:  # a refusal stands in the console, too
        page = context.new_page()
        page.goto(url)
        page.locator("#files").set_input_files(path)
        page.locator("#status.failed").wait_for(timeout=DONE_MS)
        assert "not an image" in page.locator("#status").inner_text()


@pytest.mark.parametrize(("width", "scheme"), [(375, "light"), (1600, "dark")])
def test_axe_finds_nothing(browser: Browser, url: str, photos: list[Path], width: int, scheme: str) -> None:
    with open_page(browser, url, width, color_scheme=scheme) as page:
        upload(page, photos[:1])
        assert not overflows(page)
        assert violations(page) == []


def test_other_names_and_other_sites_are_refused(url: str) -> None:
    assert ask(url)[0] == 200
    assert ask(url, Host="rebound.example")[0] == 400
    assert ask(url, "POST", "/sample?vae=0", Origin="https://elsewhere.example")[0] == 403
    assert ask(url, "GET", "/sample?vae=0")[0] == 405


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/sample", "choose at least one"),
        ("/sample?vae=2", "choose at least one"),
        ("/sample?vae=0&dtype=int8", "does not offer"),
        ("/sample?vae=0&seed=x", "not a whole number"),
        ("/between?vae=0", "where the second photo begins"),
        ("/photo?vae=0", "empty"),
    ],
)
def test_bad_requests_are_told_what_is_wrong(url: str, path: str, message: str) -> None:
    status, text = ask(url, "POST", path, b"")
    assert status == 400 and message in text and "\n" not in text


def test_uploads_are_bounded(url: str) -> None:
    status, text = ask(url, "POST", "/photo?vae=0", bytes(server.MAX_UPLOAD_BYTES + 1))
    assert status == 400 and "larger than 64 MiB" in text


def test_a_port_in_use_is_told() -> None:
    with server.bind(0) as taken, pytest.raises(ConfigError, match="give --port another"):
        taken.listen()
        server.bind(taken.getsockname()[1])


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["/a/b/c.safetensors", "org/model"], ["c.safetensors", "model"]),
        (["a/vae", "b/vae"], ["a/vae", "b/vae"]),
        (["a/vae", "a/vae"], ["a/vae (1)", "a/vae (2)"]),
    ],
)
def test_names_are_as_short_as_they_can_be(names: list[str], short: list[str]) -> None:
    assert _short(names) == short


def test_dtypes_share_the_weights(small_vae: VAE) -> None:
    playground = Playground([small_vae])
    other = playground._candidate(0, Choice(dtype="bf16")).vae
    assert other.model is small_vae.model and other.dtype != small_vae.dtype
    assert playground._candidate(0, Choice(dtype="bf16")).vae is other
