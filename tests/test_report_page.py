"""The page of an evaluation in a browser: sliders, sorting, light and dark, phone and desktop, what axe says."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Locator, Page

from sdvae.report.comparison import write_report
from tests.browser import open_chromium, open_page, overflows, violations
from tests.made_results import make_results


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_chromium() as found:
        yield found


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("report")
    make_results(folder, num_images=6, num_vaes=3, size_px=(384, 256))
    return write_report(folder).as_uri()


@pytest.fixture(scope="module")
def small_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("small")
    make_results(folder, num_images=2, num_vaes=1)
    return write_report(folder).as_uri()


def slider(page: Page) -> Locator:
    found = page.locator(".photo .frame input").first
    found.scroll_into_view_if_needed()
    return found


def place(page: Page) -> float:
    """Where the first slider cuts its left picture, in percent."""
    left = page.locator(".photo .frame .layer.left").first
    right, width = left.evaluate(
        "layer => { const cut = getComputedStyle(layer).clipPath.match(/inset\\(0px (.+?)\\s0px/)[1];"
        " const test = document.createElement('i'); test.style.width = cut; test.style.position = 'absolute';"
        " layer.parentElement.append(test); const px = test.getBoundingClientRect().width; test.remove();"
        " return [px, layer.getBoundingClientRect().width]; }"
    )
    return 100 - 100 * right / width


def shown(page: Page) -> list[str]:
    """What is left and right in the first slider."""
    frame = page.locator(".photo .frame").first
    return [frame.locator(f".layer.{side} figcaption").inner_text() for side in ("left", "right")]


def names(page: Page) -> list[str]:
    return page.locator(".photo h3").all_inner_texts()


def test_six_photos_and_three_vaes_open_without_a_word_or_a_request(browser: Browser, url: str) -> None:
    with open_page(browser, url) as page:
        assert page.locator(".photo").count() == 6
        assert page.locator("table.summary").first.locator("tbody tr").count() == 4
        assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
        assert "<script>alert(1)</script>.png" in names(page)


def test_the_mouse_drags_the_slider(browser: Browser, url: str) -> None:
    with open_page(browser, url) as page:
        box = slider(page).bounding_box()
        assert box is not None and place(page) == pytest.approx(50, abs=0.5)
        middle = box["y"] + box["height"] / 2
        page.mouse.move(box["x"] + box["width"] * 0.5, middle)
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] * 0.8, middle, steps=4)
        page.mouse.up()
        assert place(page) == pytest.approx(80, abs=1)


def test_a_finger_drags_the_slider(browser: Browser, url: str) -> None:
    with open_page(browser, url, 375, 812, has_touch=True, is_mobile=True) as page:
        box = slider(page).bounding_box()
        assert box is not None
        middle = box["y"] + box["height"] / 2
        page.touchscreen.tap(box["x"] + box["width"] * 0.3, middle)
        assert place(page) == pytest.approx(30, abs=1)
        fingers = page.context.new_cdp_session(page)
        for kind, share in (("Start", 0.3), ("Move", 0.5), ("Move", 0.7)):
            point = {"x": box["x"] + box["width"] * share, "y": middle}
            fingers.send("Input.dispatchTouchEvent", {"type": f"touch{kind}", "touchPoints": [point]})
        fingers.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
        assert place(page) == pytest.approx(70, abs=1)


def test_arrow_keys_move_the_slider_whose_focus_is_seen(browser: Browser, url: str) -> None:
    with open_page(browser, url) as page:
        slider(page).focus()
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowRight")
        right = place(page)
        page.keyboard.press("ArrowLeft")
        assert 50 < place(page) < right
        page.keyboard.press("Home")
        assert place(page) == pytest.approx(0, abs=0.1)
        frame = page.locator(".photo .frame").first
        assert frame.evaluate("frame => getComputedStyle(frame).outlineStyle") == "solid"


def test_any_two_of_original_and_vaes_are_compared_and_errors_are_shown(browser: Browser, url: str) -> None:
    with open_page(browser, url) as page:
        assert shown(page) == ["Original", "vae-a"]
        page.locator("#left").select_option(label="vae-b")
        page.locator("#right").select_option(label="vae-c")
        assert shown(page) == ["vae-b", "vae-c"]
        page.get_by_role("button", name="Error map").click()
        assert shown(page) == ["vae-b", "Error of vae-c"]
        page.get_by_role("button", name="vae-a", exact=True).click()
        assert shown(page) == ["vae-b", "Error of vae-a"]
        assert page.locator("svg .vae.on").count() == page.locator("svg .vae[data-vae='0']").count() > 0


def test_photos_are_sorted_by_a_metric_worst_or_best_first(browser: Browser, url: str) -> None:
    with open_page(browser, url) as page:
        psnr = page.locator(".photo").evaluate_all(
            "photos => photos.map(photo => JSON.parse(photo.dataset.values)[0][0])"
        )
        assert psnr == sorted(psnr) and len(set(psnr)) == 6
        page.locator("#sort").select_option(label="LPIPS (alex)")
        worst_first = page.locator(".photo").evaluate_all(
            "all => all.map(photo => JSON.parse(photo.dataset.values)[0][2])"
        )
        assert worst_first == sorted(worst_first, reverse=True)
        before = names(page)
        page.locator("#order").select_option(label="Best first")
        assert names(page) == before[::-1]


def test_dark_follows_the_system_and_the_button(browser: Browser, url: str) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    with open_page(browser, url, color_scheme="light") as page:
        light = page.evaluate(ground)
        page.get_by_role("button", name="Dark").click()
        dark = page.evaluate(ground)
        assert dark != light
    with open_page(browser, url, color_scheme="dark") as page:
        assert page.evaluate(ground) == dark
        page.get_by_role("button", name="Light").click()
        assert page.evaluate(ground) == light


@pytest.mark.parametrize("width", [375, 1600])
def test_no_width_scrolls_sideways(browser: Browser, url: str, width: int) -> None:
    with open_page(browser, url, width) as page:
        page.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
        assert not overflows(page)
        page.evaluate("document.querySelector('h1').style.minWidth = '3000px'")
        assert overflows(page)


@pytest.mark.parametrize(("width", "scheme"), [(375, "dark"), (1600, "light")])
def test_axe_finds_nothing(browser: Browser, small_url: str, width: int, scheme: str) -> None:
    with open_page(browser, small_url, width, color_scheme=scheme) as page:
        page.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
        assert violations(page) == []


def test_axe_would_find_an_image_without_alt_text_and_faint_text(browser: Browser, small_url: str) -> None:
    with open_page(browser, small_url) as page:
        page.evaluate("document.images[0].removeAttribute('alt'); document.querySelector('h2').style.color = '#ccc'")
        assert {found.partition(":")[0] for found in violations(page)} == {"color-contrast", "image-alt"}


def test_paper_and_a_browser_without_scripts_show_every_picture(browser: Browser, url: str) -> None:
    with open_page(browser, url) as page:
        page.emulate_media(media="print")
        hidden = "[...document.querySelectorAll('.frame img')].filter(image => !image.getClientRects().length).length"
        assert page.evaluate(hidden) == 0
    with open_page(browser, url, java_script_enabled=False) as page:
        pictures = page.locator(".frame img")
        assert pictures.count() > 6 * 4
        assert all(pictures.nth(place).is_visible() for place in range(0, pictures.count(), 5))


def test_a_script_that_slipped_in_would_not_run(browser: Browser, url: str, tmp_path: Path) -> None:
    html = Path(url.removeprefix("file://")).read_text(encoding="utf-8")
    planted = tmp_path / "planted.html"
    planted.write_text(html.replace("</main>", "<script>document.title = 'ran'</script></main>"), encoding="utf-8")
    with browser.new_context() as context:
        page = context.new_page()
        page.goto(planted.as_uri())
        assert page.title() != "ran"
