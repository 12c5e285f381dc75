"""The chat page in a real browser: what a person sees and does."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from strobe.server.config import ServerConfig

from .conftest import LiveServer

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")

expect = playwright.expect
expect.set_options(timeout=15_000)

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if BROWSER is None:
    pytest.skip("needs Chromium", allow_module_level=True)

SWITCHES = """
    --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync
""".split()


@pytest.fixture(scope="module")
def browser() -> Iterator[playwright.Browser]:
    with playwright.sync_playwright() as engine:
        browser = engine.chromium.launch(executable_path=BROWSER, args=SWITCHES)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: playwright.Browser, request: pytest.FixtureRequest):
    """`open_page(server)`: a page of a browser of its own. With SHOTS=FOLDER it leaves pictures."""
    contexts = []
    faults: list[str] = []

    def open_(server: LiveServer, **options) -> playwright.Page:
        context = browser.new_context(**{"viewport": {"width": 1200, "height": 800}, **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(15_000)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on(
            "request", lambda r: faults.append(r.url) if not r.url.startswith((server.url, "data:")) else None
        )
        page.goto(server.url)
        page.wait_for_selector(".dot.up")
        return page

    yield open_
    for context in contexts:
        context.close()
    assert faults == []


def shoot(page: playwright.Page, name: str) -> None:
    if folder := os.environ.get("SHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png")


def say(page: playwright.Page, text: str) -> None:
    page.fill("#prompt", text)
    page.keyboard.press("Enter")


def never_ending(page: playwright.Page) -> None:
    """Let answers run to their most tokens, of which there are many."""

    def change(route: playwright.Route) -> None:
        route.continue_(post_data={**route.request.post_data_json, "ignore_eos": True, "max_tokens": 900})

    page.route("**/v1/chat/completions", change)


def done(page: playwright.Page) -> None:
    page.wait_for_selector("#send:not([hidden])")


def test_send_stream_and_reload(idle: LiveServer, open_page) -> None:
    page = open_page(idle)
    assert page.is_disabled("#send")
    shoot(page, "empty")
    say(page, "But soft, what light?")
    done(page)
    answer = page.inner_text("article.assistant .text")
    assert answer.strip()
    note = page.inner_text("article.assistant .foot span")
    assert re.search(r"\d+ tokens · first after \d+ ms", note)
    assert page.inner_text("article.assistant .who") == "strobe-tiny"
    shoot(page, "answered")
    page.fill("#prompt", "a draft")
    page.reload()
    assert page.inner_text("article.user .text") == "But soft, what light?"
    assert page.inner_text("article.assistant .text") == answer
    assert page.input_value("#prompt") == "a draft"


def test_text_is_shown_while_it_is_written_and_can_be_stopped(serve, open_page) -> None:
    import time

    server = serve()
    step = server.engine.step

    def slowly():
        time.sleep(0.03)
        return step()

    server.engine.step = slowly
    page = open_page(server)
    never_ending(page)
    say(page, "Tell me all.")
    lengths = set()
    while len(lengths) < 4:
        lengths.add(len(page.inner_text("article.assistant .text")))
    shoot(page, "writing")
    page.keyboard.press("Escape")
    done(page)
    assert "stopped" in page.inner_text("article.assistant .foot")
    server.settle()


def test_regenerate_and_take_back(idle: LiveServer, open_page) -> None:
    page = open_page(idle)
    page.fill("#seed", "1")
    say(page, "Who art thou?")
    done(page)
    first = page.inner_text("article.assistant .text")
    page.fill("#seed", "2")
    page.click("button.again")
    done(page)
    assert page.locator("article").count() == 2
    assert page.inner_text("article.assistant .text") != first
    page.fill("#seed", "1")
    page.keyboard.press("Alt+r")
    done(page)
    assert page.inner_text("article.assistant .text") == first
    page.focus("#prompt")
    page.keyboard.press("ArrowUp")
    assert page.input_value("#prompt") == "Who art thou?"
    assert page.locator("article").count() == 0
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("Speak!")
    page.keyboard.press("Enter")
    done(page)
    assert page.inner_text("article.user .text") == "Who art thou?\nSpeak!"
    page.keyboard.press("Alt+n")
    assert page.locator("article").count() == 0


def test_sampling_controls_reach_the_engine(idle: LiveServer, open_page) -> None:
    page = open_page(idle)
    sent = []
    page.on("request", lambda r: sent.append(r.post_data_json) if r.method == "POST" else None)
    page.fill("#max_tokens", "7")
    page.fill("#top_k", "5")
    page.focus("#temperature")
    page.keyboard.press("Home")
    page.fill("#system", "Be brief.")
    say(page, "O")
    done(page)
    (body,) = sent
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (body["max_tokens"], body["top_k"], body["temperature"]) == (7, 5, 0)
    page.click("#reset")
    assert page.input_value("#max_tokens") == "256"


def test_what_is_said_is_never_markup(idle: LiveServer, open_page) -> None:
    page = open_page(idle)
    hostile = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script>"
    say(page, hostile)
    done(page)
    assert page.inner_text("article.user .text") == hostile
    page.reload()
    page.wait_for_selector("article.user")
    assert page.locator(".talk img, .talk script").count() == 0
    expect(page).to_have_title("strobe-tiny · strobe")


def test_errors_are_shown_and_can_be_tried_again(serve, open_page) -> None:
    server = serve(ServerConfig(), max_num_seqs=8)
    page = open_page(server)
    say(page, "word " * 1500)
    page.wait_for_selector(".error")
    assert "context is 1024" in page.inner_text(".error")
    shoot(page, "refused")
    page.keyboard.press("Alt+n")
    page.route("**/v1/chat/completions", lambda route: route.abort())
    say(page, "Art thou there?")
    page.wait_for_selector(".error")
    assert "does not answer" in page.inner_text(".error")
    page.unroute("**/v1/chat/completions")
    page.click(".retry")
    page.wait_for_selector("article.assistant .foot")
    done(page)
    assert page.locator(".error").count() == 0


def test_a_server_that_goes_away_is_told_of(serve, open_page) -> None:
    import time

    server = serve()
    step = server.engine.step
    server.engine.step = lambda: (time.sleep(0.05), step())[1]
    page = open_page(server)
    never_ending(page)
    say(page, "Stay a while.")
    expect(page.locator("article.assistant .text")).not_to_be_empty()
    server.uvicorn.should_exit = server.uvicorn.force_exit = True
    page.wait_for_selector(".error")
    page.wait_for_selector(".dot.down")
    assert "cut off" in page.inner_text(".error") or "does not answer" in page.inner_text(".error")
    shoot(page, "gone")
    assert page.inner_text("article.assistant .text").strip()


def test_live_numbers_are_the_metrics(serve, open_page) -> None:
    server = serve(ServerConfig(served_names=('tiny "}',)))  # which is in every metric's labels
    page = open_page(server)
    expect(page.locator("#m-rate")).not_to_have_text("–")
    pages = server.engine.stats().pages
    assert page.inner_text("#m-pages").endswith(f"of {pages}")
    assert page.inner_text("#m-running") == "0"
    say(page, "Speak")
    expect(page.locator("#m-ttft")).to_have_text(re.compile("ms$"))
    done(page)


@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_dark_and_light(idle: LiveServer, open_page, scheme) -> None:
    page = open_page(idle, color_scheme=scheme)

    def ground() -> int:
        colour = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
        return sum(map(int, re.findall(r"\d+", colour)[:3]))

    assert (ground() < 200) == (scheme == "dark")
    say(page, "Good night, good night!")
    done(page)
    shoot(page, scheme)
    page.click("#theme")
    assert (ground() < 200) == (scheme == "light")
    page.reload()
    assert (ground() < 200) == (scheme == "light")


def test_a_phone(idle: LiveServer, open_page) -> None:
    page = open_page(idle, viewport={"width": 360, "height": 720}, has_touch=True, is_mobile=True)
    assert page.is_hidden("#side")
    say(page, "Parting is such sweet sorrow, " * 4 + "a" * 90)
    done(page)
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 360
    shoot(page, "phone")
    page.tap("#toggle")
    assert page.is_visible("#temperature")
    page.wait_for_timeout(1200)
    shoot(page, "phone-panel")
    page.keyboard.press("Escape")
    assert page.is_hidden("#side")


def test_every_control_is_reached_by_tab_and_has_a_name(idle: LiveServer, open_page) -> None:
    page = open_page(idle)
    page.fill("#prompt", "x")
    reached = set()
    for _ in range(30):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("() => document.activeElement.id"))
    assert {"prompt", "send", "fresh", "theme", "toggle", "temperature", "seed", "system", "reset"} <= reached
    nameless = page.evaluate(
        "() => [...document.querySelectorAll('button, input, textarea')].filter(e => "
        "!(e.labels?.length || e.getAttribute('aria-label') || e.textContent.trim())).map(e => e.id)"
    )
    assert nameless == []


def test_a_key_is_asked_for_as_a_password(serve, browser) -> None:
    server = serve(ServerConfig(api_keys=("open-sesame",)))
    context = browser.new_context(http_credentials={"username": "any", "password": "open-sesame"})
    page = context.new_page()
    page.goto(server.url)
    page.wait_for_selector(".dot.up")
    say(page, "O")
    done(page)
    assert page.inner_text("article.assistant .text").strip()
    context.close()
