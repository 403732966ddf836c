"""A person at the page, in headless Chromium, and an agent that says what a test has it say."""

import asyncio
import contextlib
import json
import os
import shutil
from collections.abc import Callable
from typing import Any

from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

from rl.chat import ChatCodec
from rl.policy import Completion
from rl.vllm_io import Chunk

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = ("--headless=new", "--no-sandbox", "--disable-background-networking", "--disable-dev-shm-usage")


def chromium() -> webdriver.Chrome:
    """Debian's own, which tells what it asked of whom."""
    os.environ["SE_OFFLINE"] = "true"  # selenium would look for a driver elsewhere
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))


class Page:
    """What a person does with the page, and sees."""

    def __init__(self, driver: webdriver.Chrome, url: str):
        self.driver, self.url = driver, url
        self.failures_expected = False
        """Whether some of the page's requests are to fail."""

    def open(self) -> None:
        self.driver.get("about:blank")
        self.driver.get(self.url)
        self.until(lambda: self.one("#start").is_enabled())

    def all(self, selector: str) -> list:
        return [e for e in self.driver.find_elements(By.CSS_SELECTOR, selector) if e.is_displayed()]

    def one(self, selector: str):
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def texts(self, selector: str) -> list[str]:
        return [e.text for e in self.all(selector)]

    def click(self, selector: str, at: int = 0) -> None:
        self.until(lambda: self.all(selector))
        element = self.all(selector)[at]
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
        element.click()

    def until(self, true: Callable[[], object], seconds: float = 60) -> None:
        stale = [StaleElementReferenceException]  # between two looks an element was replaced
        WebDriverWait(self.driver, seconds, 0.03, ignored_exceptions=stale).until(lambda _: true())

    def press(self, *keys: str) -> None:
        """To whatever has the focus."""
        webdriver.ActionChains(self.driver).send_keys(*keys).perform()

    def choose(self, selector: str, value: str) -> None:
        Select(self.one(selector)).select_by_value(value)

    def say(self, text: str) -> None:
        self.one("#message").send_keys(text, Keys.ENTER)

    def start(self) -> None:
        self.click("#start")
        self.until(lambda: self.all(".pane"))

    def finished(self, turns: int) -> None:
        self.until(lambda: len(self.all(".turn.finished")) == turns and not self.all(".pane[aria-busy=true]"))

    def focused(self) -> str:
        return self.js("document.activeElement.id || document.activeElement.textContent.trim()")

    def tab_to(self, wanted: str) -> None:
        """Every stop on the way has a name, and shows that it has the focus."""
        for _ in range(40):
            self.press(Keys.TAB)
            element = self.driver.switch_to.active_element
            if element.tag_name == "body":
                continue  # between the page's end and its beginning
            radio = element.get_attribute("type") == "radio"
            shows = f"document.activeElement{'.nextElementSibling' if radio else ''}"
            assert self.js(f"getComputedStyle({shows}).outlineStyle") != "none", self.focused()
            assert element.accessible_name, self.focused()
            if self.focused() == wanted:
                return
        raise AssertionError(f"Tab does not reach {wanted}")

    def fits(self, state: str, width: int = 360) -> None:
        """Nothing is wider than the screen, and what is touched is large enough."""
        wide = f"[...document.querySelectorAll('html, main, dialog')].filter((e) => e.scrollWidth > {width})"
        assert self.js(f"{wide}.map((e) => e.tagName)") == [], state
        controls = "button, select, textarea, summary, input:not([type=checkbox], [type=radio])"
        targets = self.all(f"{controls}, :is(.choice, .segments) label, label.toggle")
        assert [(e.text, e.size) for e in targets if min(e.size.values()) < 40] == [], state

    def js(self, code: str):
        return self.driver.execute_script(f"return {code}")

    def session_ids(self) -> list[str]:
        return self.js("location.hash").removeprefix("#").split(",")

    def offline(self, off: bool) -> None:
        if off:
            self.driver.set_network_conditions(offline=True, latency=0, download_throughput=0, upload_throughput=0)
        else:
            self.driver.delete_network_conditions()

    def screen(self, size: tuple[int, int]) -> None:
        width, height = size
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def check_logs(self) -> None:
        """No other host was asked for anything, and nothing went wrong that was not meant to."""
        sent = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        urls = [m["params"]["request"]["url"] for m in sent if m["method"] == "Network.requestWillBeSent"]
        assert urls and [url for url in urls if not url.startswith((self.url, "data:"))] == []
        said = [entry["message"] for entry in self.driver.get_log("browser")]
        assert [line for line in said if not (self.failures_expected and "Failed to load resource" in line)] == []


class Scripted:
    """In the engine's place: an agent that says what the test has it say, three tokens a step."""

    def __init__(self, codec: ChatCodec):
        self.codec = codec
        self.will_say()

    def will_say(self, *replies: str, held: bool = False) -> None:
        """held: it stops after the first step, until it `goes_on`."""
        self.replies, self.held = iter(replies), held

    def goes_on(self) -> None:
        self.held = False

    def stream(self, token_ids: Any, sampling: Any, version: int) -> "ScriptedStream":
        ids = self.codec.reply({"role": "assistant", "content": next(self.replies)})
        return ScriptedStream(self, Completion(ids, [-0.5] * len(ids), [version] * len(ids), "stop"))


class ScriptedStream(contextlib.AsyncExitStack):
    """What Versions.stream gives (serve/versions.py)."""

    def __init__(self, agent: Scripted, whole: Completion):
        super().__init__()
        self.agent, self.whole = agent, whole

    async def __aiter__(self):
        for at in range(0, len(self.whole.token_ids), 3):
            while at and self.agent.held:
                await asyncio.sleep(0.01)
            yield Chunk(self.whole.token_ids[at : at + 3], self.whole.logprobs[at : at + 3], self.whole.versions[0])

    async def completion(self) -> Completion:
        return self.whole
