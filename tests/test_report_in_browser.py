"""The page as its readers have it, in a headless Chromium: it moves, it fits, it can be read, it fetches nothing."""

import json
import shutil
import time
from collections.abc import Callable, Iterator

import pytest

from esolm import report
from pages import whole_report

webdriver = pytest.importorskip("selenium.webdriver", reason="BROWSER TESTS SKIPPED: selenium is not installed")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        CHROMIUM is None or DRIVER is None,
        reason="BROWSER TESTS SKIPPED: no Chromium with its driver (Debian: apt-get install chromium chromium-driver)",
    ),
]
FLAGS = (
    "headless=new no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
    "disable-component-update disable-sync disable-dev-shm-usage"
)
GIVEN, DONE = "KING.", "KING.To be, or not <b>now"


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator["webdriver.Chrome"]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in FLAGS.split():
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("page") / "report.html"
    report.write(whole_report(), path)
    return path.as_uri()


@pytest.fixture
def opened(browser, address) -> Callable[..., "webdriver.Chrome"]:
    def open_page(width: int = 1100, theme: str = "light") -> "webdriver.Chrome":
        screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        features = [{"name": "prefers-color-scheme", "value": theme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        for kind in ("browser", "performance"):
            browser.get_log(kind)  # of the page before
        browser.get(address)
        return browser

    return open_page


def text(browser, number: int = 0) -> str:
    """What can be read of a replay: neither blanks nor what is cut off."""
    return browser.execute_script(
        """return [...document.querySelectorAll('#replays .text')[arguments[0]].querySelectorAll('span span')]
             .filter(s => s.checkVisibility({visibilityProperty: true}) && s.className !== 'blank')
             .map(s => (s.previousSibling ? s.previousSibling.textContent : '') + s.textContent).join('')""",
        number,
    )


def slide(browser, step: int) -> None:
    browser.execute_script(
        """const slider = document.querySelector('input[type=range]');
           slider.value = arguments[0]; slider.dispatchEvent(new Event('input', {bubbles: true}))""",
        step,
    )


def element(browser, selector: str):
    return browser.find_element("css selector", selector)


def rgb(browser, selector: str, name: str = "color") -> tuple[int, ...]:
    value = browser.execute_script(
        "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]", selector, name
    )
    return tuple(map(int, value.removeprefix("rgb(").removesuffix(")").split(",")))


def luminance(colour: tuple[int, ...]) -> float:
    """Relative luminance, 0 to 1 (WCAG 2)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (part / 255 for part in colour)]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_the_page_opens_with_the_finished_text(opened):
    browser = opened()
    assert text(browser) == text(browser, 1) == DONE
    assert "Step 9 of 9" in element(browser, "output").text


def test_the_slider_moves_through_the_steps_and_the_text_changes(opened):
    browser = opened()
    seen = []
    for step in range(10):
        slide(browser, step)
        seen.append(text(browser))
        assert f"Step {step} of 9" in element(browser, "output").text
    assert seen[0] == GIVEN and seen[1] == "KING. be or" and seen[9] == DONE
    assert len(set(seen)) >= 9  # one step writes a line break
    assert text(browser, 1) == DONE, "the other text stands still"


def test_the_slider_obeys_the_keyboard(opened):
    browser = opened()
    slider = element(browser, "input[type=range]")
    slider.send_keys("\ue012")  # arrow left
    assert slider.get_attribute("value") == "8"
    slider.send_keys("\ue011")  # home
    assert text(browser) == GIVEN


def test_every_step_marks_what_it_wrote_in_the_colour_of_its_phase(opened):
    browser = opened()
    slide(browser, 1)
    new = [(e.text, e.get_attribute("class")) for e in browser.find_elements("css selector", ".new")]
    assert new == [("be", "diffusion new"), ("or", "diffusion new")]
    slide(browser, 3)
    new = [(e.text, e.get_attribute("class")) for e in browser.find_elements("css selector", ".new")]
    assert new == [("To", "sequential new")]


def test_lines_are_broken_where_the_text_breaks_them_at_every_step(opened):
    browser = opened()
    heights = []
    for step in (0, 4, 8):
        slide(browser, step)
        heights.append(browser.execute_script("return document.querySelector('#replays .text').offsetHeight"))
    assert len(set(heights)) == 1 and heights[0] > 3 * 20


def test_play_runs_to_the_end_and_can_be_paused(opened):
    browser = opened()
    slide(browser, 0)
    play = element(browser, ".controls button")
    play.click()
    assert play.text == "Pause"
    deadline = time.monotonic() + 20
    while text(browser) == GIVEN and time.monotonic() < deadline:
        time.sleep(0.02)
    play.click()
    paused = text(browser)
    assert play.text == "Play" and paused != GIVEN
    time.sleep(0.8)
    assert text(browser) == paused
    play.click()
    while play.text != "Play" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert text(browser) == DONE


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_nothing_is_fetched_and_nothing_complains(opened, address, theme):
    browser = opened(theme=theme)
    slide(browser, 3)
    element(browser, ".controls button").click()
    element(browser, "#theme").click()
    browser.execute_script("document.querySelector('#curves svg').dispatchEvent(new PointerEvent('pointermove'))")
    time.sleep(0.2)
    assert browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = {e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"}
    assert {url for url in asked if not url.startswith("data:")} == {address}
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("width", [320, 390, 700, 1100, 1920])
def test_nothing_is_wider_than_the_screen(opened, width):
    browser = opened(width)
    wide = browser.execute_script(
        """return [document.documentElement.scrollWidth, ...[...document.querySelectorAll('main *')]
             .filter(e => !e.hidden).map(e => e.getBoundingClientRect().right)]"""
    )
    assert max(wide) <= width


@pytest.mark.parametrize("width", [390, 1100])
def test_letters_in_the_pictures_keep_their_size(opened, width):
    browser = opened(width)
    heights = browser.execute_script(
        "return [...document.querySelectorAll('svg text')].map(e => e.getBoundingClientRect().height)"
    )
    assert len(heights) > 50 and min(heights) >= 10


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_page_is_light_or_dark_as_the_system_is_and_can_be_read(opened, theme):
    browser = opened(theme=theme)
    slide(browser, 5)
    card = luminance(rgb(browser, ".card", "backgroundColor"))
    assert (card > 0.5) == (theme == "light")
    for part in (".given", ".diffusion", ".sequential", "output", "h2", "section > p", "td"):
        low, high = sorted((card, luminance(rgb(browser, part))))
        assert (high + 0.05) / (low + 0.05) >= 4.5, f"{part} has too little contrast"


def test_the_reader_may_choose_light_or_dark(opened):
    browser = opened(theme="light")
    before = rgb(browser, "body", "backgroundColor")
    element(browser, "#theme").click()
    assert luminance(rgb(browser, "body", "backgroundColor")) < 0.1 < luminance(before)


def test_curves_have_named_axes_and_the_error_of_each_validation(opened):
    browser = opened()
    letters = [e.text for e in browser.find_elements("css selector", "#curves svg text")]
    assert "step" in letters and "nats a token" in letters and "0" in letters
    assert len(browser.find_elements("css selector", "#curves circle")) == 3
    bars = browser.execute_script(
        "return [...document.querySelectorAll('#curves .error')]"
        ".filter(e => e.getBoundingClientRect().height > 5).length"
    )
    assert bars == 3
    assert "validation" in element(browser, "#curves .legend").text and "±" in element(browser, "#curves .legend").text


def test_masks_and_tokens_are_told_apart_in_the_pictures(opened):
    browser = opened()
    report_ = whole_report()
    assert len(browser.find_elements("css selector", "#pictures figure")) == len(report_.pictures)
    colours = browser.execute_script(
        "return [...document.querySelectorAll('#pictures figure')].map(f => new Set([...f.querySelectorAll('.letter')]"
        ".map(e => getComputedStyle(e).fill)).size)"
    )
    assert colours == [2] * len(report_.pictures)


def test_text_is_shown_as_text(opened):
    browser = opened()
    assert element(browser, "h1").text == "A <i>title</i>"
    assert browser.find_elements("css selector", "#samples .text")[1].text == "<script>alert(1)</script>"
