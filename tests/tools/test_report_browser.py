"""The page of tools/report.py in a real browser: filters, pictures, keys, small and dark screens.

The browser is a headless Chromium, driven with selenium. Without one of them these tests are
skipped and say so.
"""
import shutil
import time

import numpy as np
import pytest
from conftest import largest_difference
from test_report import make_page, pixels

pytest.importorskip("selenium", reason="selenium is not installed (requirements-dev.txt)")
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys

FLAGS = ("headless=new", "no-sandbox", "disable-dev-shm-usage", "window-size=1200,1000",
         "force-device-scale-factor=1")


@pytest.fixture(scope="module")
def chromium():
    names = "chromium", "chromium-browser", "google-chrome"
    program = next(filter(None, map(shutil.which, names)), None)
    driver = shutil.which("chromedriver")
    if not program or not driver:
        pytest.skip("no Chromium with chromedriver here: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in FLAGS:
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield browser
    browser.quit()


@pytest.fixture(scope="module")
def made(chromium, world, tmp_path_factory):
    return make_page(world, tmp_path_factory.mktemp("report"))


@pytest.fixture
def browser(chromium, made):
    """The page, opened from disk in a wide window; at the end of a test its console must be empty.
    """
    chromium.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    chromium.get("about:blank")
    chromium.get("file://" + made.path)
    yield chromium
    assert chromium.get_log("browser") == []
    title = chromium.title
    assert title.startswith("POPE: ") and "owned" not in title.split("onerror")[0]


def until(condition, seconds=5):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    assert condition()


def choose_option(browser, field, value):
    browser.execute_script("""
        const e = document.getElementById(arguments[0]);
        e.value = arguments[1];
        e.dispatchEvent(new Event('input', {bubbles: true}))""", field, value)


def cards(browser):
    """(question, image) of all cards, every screenful of them."""
    return browser.execute_script("""
        const more = document.getElementById("more");
        while (!more.hidden) more.click();
        return [...document.querySelectorAll("#cards .picture")]
            .map(p => [p.question.image, p.question.question])""")


def overlay(browser, selector):
    """Pixels (side, side, 4) of the attention drawn over a picture."""
    side, values = browser.execute_script("""
        const c = document.querySelector(arguments[0] + " canvas");
        const image = c.getContext("2d").getImageData(0, 0, c.width, c.height);
        return [c.width, [...image.data]]""", selector)
    return np.array(values).reshape(side, side, 4)


def press(browser, *keys):
    ActionChains(browser).send_keys(*keys).perform()


# ---- The gallery ---------------------------------------------------------------------------------


def right(q, n):
    return q["answers"][n]["yes"] == q["yes"]


def false_yes(q, n):
    return q["answers"][n]["yes"] and not q["yes"]


def test_filters(browser, made):
    """Each filter alone and two together show exactly the questions that a loop over the answers
    finds.
    """
    everything = made.gallery["questions"]
    word = everything[0]["word"]
    cases = [
        ({"split": "popular"}, lambda q: "popular" in q["splits"]),
        ({"moved": "moved"}, lambda q: right(q, 0) != right(q, 1)),
        ({"moved": "01"}, lambda q: not right(q, 0) and right(q, 1)),
        ({"moved": "10", "checkpoint": "2"}, lambda q: right(q, 0) and not right(q, 2)),
        ({"falseyes": "any"}, lambda q: any(false_yes(q, n) for n in range(4))),
        ({"falseyes": "2"}, lambda q: false_yes(q, 2)),
        ({"word": word}, lambda q: q["word"] == word),
        ({"word": word.upper()}, lambda q: q["word"] == word),
        ({"word": "zebra"}, lambda q: False),
        ({"split": "adversarial", "falseyes": "0"},
         lambda q: "adversarial" in q["splits"] and false_yes(q, 0))]
    assert len(browser.find_elements("css selector", "#cards .card")) == 24
    total = len(everything)
    assert len(cards(browser)) == total

    def count():
        return browser.find_element("id", "count").text

    for fields, passes in cases:
        for name, value in fields.items():
            choose_option(browser, name, value)
        expected = [[q["image"], q["question"]] for q in everything if passes(q)]
        assert cards(browser) == expected and len(expected) < total
        assert count() == (f"{len(expected)} of the {total} questions shown here" if expected else
                           f"no question fits; Clear shows all {total} again")
        browser.find_element("css selector", "button[type=reset]").click()
        until(lambda: count() == f"all {total} questions shown here")


def test_answers_are_shown_as_text(browser, made):
    first, q = browser.find_element("css selector", ".card"), made.gallery["questions"][0]
    texts = first.find_elements("css selector", ".answers li > div:last-child")
    assert [e.text for e in texts] == [a["text"] for a in q["answers"]]
    images, pictures = (browser.find_elements("css selector", name) for name in ("img", ".picture"))
    assert len(images) == len(pictures)
    verdicts = [e.text for e in first.find_elements("css selector", ".verdict")]
    wrong = {True: "false yes", False: "missed"}
    assert verdicts == ["right" if a["yes"] == q["yes"] else wrong[a["yes"]] for a in q["answers"]]


def test_overlay_on_hover(browser, made):
    picture = browser.find_element("css selector", "#cards .picture")
    q, canvas = made.gallery["questions"][0], picture.find_element("css selector", "canvas")
    assert canvas.value_of_css_property("opacity") == "0"
    ActionChains(browser).move_to_element(picture).perform()
    until(lambda: canvas.value_of_css_property("opacity") == "1")
    # It covers the picture exactly.
    assert canvas.size == picture.find_element("css selector", "img").size

    def darkness():
        return overlay(browser, "#cards .picture")[:, :, 3]

    drawn, strip = darkness(), pixels(q["attention"]["1"]["map"]).astype(float)
    assert drawn.shape == (3, 3)
    lightest = np.argsort(drawn.flatten(), kind="stable")[0]
    assert lightest == np.argmax(strip[:, :3]) and drawn.max() > drawn.min() + 20
    assert largest_difference("darkness", drawn, 195 - 140 * strip[:, :3] / 255) <= 1
    assert "mean of 4 heads" in picture.text and made.gallery["models"][1] in picture.text
    press(browser, "hh")
    until(lambda: "head 2 of 4" in picture.text)
    until(lambda: abs(darkness() - (195 - 140 * strip[:, 6:9] / 255)).max() <= 1)
    ActionChains(browser).move_to_element(browser.find_element("id", "count")).perform()
    until(lambda: canvas.value_of_css_property("opacity") == "0")


def test_keyboard(browser):
    """Tab reaches the pictures, arrows go among them, Enter opens, arrows leaf, h goes through
    heads, Escape closes.
    """
    def active():
        return browser.execute_script("""
            return [...document.querySelectorAll('#cards .picture')]
                .indexOf(document.activeElement)""")

    browser.find_element("css selector", "button[type=reset]").send_keys(Keys.TAB)
    assert active() == 0
    press(browser, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_DOWN, Keys.ARROW_LEFT,
          Keys.ARROW_UP)
    assert active() == 1
    until(lambda: browser.find_elements("css selector", "#cards .picture.lit"))     # when decoded
    press(browser, Keys.ENTER)
    detail = browser.find_element("id", "detail")
    until(detail.is_displayed)
    questions = browser.execute_script("return found.slice(0, 3).map(q => q.image)")
    assert questions[1] in detail.text
    press(browser, Keys.ARROW_RIGHT)
    until(lambda: questions[2] in detail.text)
    press(browser, Keys.ARROW_LEFT, Keys.ARROW_LEFT)
    until(lambda: questions[0] in detail.text)

    def pressed():
        buttons = detail.find_elements("css selector", ".heads [aria-pressed=true]")
        return [button.text.split(" ")[0] for button in buttons]

    assert pressed() == ["mean"]
    press(browser, "h")
    assert pressed() == ["1"]
    press(browser, "HH")
    assert pressed() == ["4"]
    # The other block's last head.
    detail.find_elements("css selector", ".heads button")[-1].click()
    assert pressed() == ["4"]
    assert "after, head 4 of 4" in detail.find_element("css selector", ".note").text
    last = browser.execute_script("return found.length - 1")
    press(browser, Keys.ARROW_LEFT)                 # before the first comes the last, far down
    press(browser, Keys.ESCAPE)
    until(lambda: not detail.is_displayed())
    until(lambda: active() == last)


# ---- Screens -------------------------------------------------------------------------------------


def test_narrow_and_dark(browser):
    phone = {"width": 375, "height": 700, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 375
    numbers = browser.execute_script("""
        return [...document.querySelectorAll(".bar i")].map(bar => {
            const text = bar.firstElementChild.getBoundingClientRect().width;
            return [text > 0, text <= bar.getBoundingClientRect().width]})""")
    assert all(whole for _, whole in numbers) and (True, True) in map(tuple, numbers)  # none is cut
    # All numbers stand below the bar; a bar is as wide as the screen, its share of yes above it.
    below = browser.find_elements("css selector", ".counts")
    assert below and all("yes: " in e.text and e.is_displayed() for e in below)
    bar, share = (browser.find_element("css selector", name).rect
                  for name in (".bar", ".bars > span:nth-of-type(2)"))
    assert bar["width"] > 300 and share["y"] < bar["y"] < below[0].rect["y"]
    # Nothing is between a picture and its question.
    card = browser.find_element("css selector", ".card")
    frame, question = (card.find_element("css selector", name).rect for name in (".frame", "h3"))
    assert question["y"] - frame["y"] - frame["height"] < 8
    # A table that goes on has a shade at its edge.
    assert browser.execute_script("""
        const wide = [...document.querySelectorAll('.wide')];
        const cut = wide.filter(e => e.scrollWidth > e.clientWidth);
        const shades = e => getComputedStyle(e).backgroundImage.split('linear').length - 1;
        return cut.length && cut.every(e => shades(e) === 4)""")
    columns = browser.execute_script("""
        const style = getComputedStyle(document.getElementById('cards'));
        return style.gridTemplateColumns.split(' ').length""")
    assert columns == 1
    colours = []
    for scheme in ("light", "dark"):
        feature = {"name": "prefers-color-scheme", "value": scheme}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        colours.append(browser.execute_script(r"""
            const style = getComputedStyle(document.body);
            return [style.backgroundColor, style.color].map(c => c.match(/\d+/g).slice(0, 3)
                .reduce((a, b) => a + Number(b), 0))"""))
    (paper, ink), (dark_paper, dark_ink) = colours
    assert paper - ink > 400 and dark_ink - dark_paper > 400
