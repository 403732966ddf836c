"""The page at `/` in headless Chromium, used as a person does: by clicking, typing and reading."""

import json
import random
import re
import time
from collections.abc import Iterator

import pytest

pytest.importorskip("selenium", reason="selenium is not installed")

from page_driver import CHROMIUM, DRIVER, Page, Scripted, chromium
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from serve.errors import ApiError
from serve.keys import ANONYMOUS

DESKTOP, PHONE = (1280, 900), (360, 740)


@pytest.fixture(scope="module")
def driver():
    if not (CHROMIUM and DRIVER):
        pytest.skip("Debian's chromium and chromium-driver are not here: the page is not tried")
    made = chromium()
    yield made
    made.quit()


@pytest.fixture
def page(driver, server) -> Iterator[Page]:
    made = Page(driver, server.url)
    made.screen(DESKTOP)
    made.open()
    yield made
    driver.delete_network_conditions()
    made.check_logs()
    driver.execute_script("sessionStorage.clear()")


@pytest.fixture
def two_versions(server, trained) -> list[str]:
    """The names of two versions that the server knows."""
    service = server.service
    if len(service.versions.known) < 2:
        service.book.add(trained / "checkpoints" / "latest")
    deadline = time.monotonic() + 20
    while len(service.versions.known) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    return [f"{service.name}@{version}" for version in sorted(service.versions.known)[:2]]


@pytest.fixture
def agent(server, monkeypatch) -> Scripted:
    scripted = Scripted(server.service.codec)
    monkeypatch.setattr(server.service.versions, "stream", scripted.stream)
    return scripted


# -- the files ---------------------------------------------------------------------------------------------------------


def test_the_files_are_served_as_what_they_are_and_asked_for_again(server):
    with server.client() as client:
        index = client.get("/")
        names = [*re.findall(r'"web/([^"]+)"', index.text), "api.js", "sse.js"]
        types = {"html": "text/html", "js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}
        for path in ("/", *(f"/web/{name}" for name in names)):
            answer = client.get(path)
            assert answer.headers["content-type"].startswith(types[path.rpartition(".")[2] if "." in path else "html"])
            assert answer.headers["cache-control"] == "no-cache"
            assert "default-src 'self'" in answer.headers["content-security-policy"]
            again = client.get(path, headers={"If-None-Match": f'"other", W/{answer.headers["etag"]}'})
            assert (again.status_code, again.content) == (304, b"")
            assert client.head(path).headers["etag"] == answer.headers["etag"]
            assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b", answer.text)
        assert client.get("/web/nothing.js").status_code == 404
        assert client.get("/web/..%2fpage.py").status_code == 404
    assert not re.search(r"<style|<script>|\sstyle=|\son\w+=|https?://", index.text)  # what the policy would not run


def test_events_are_the_same_however_the_stream_is_cut(page):
    stream = ': hello\r\nid: 4\r\nevent: tokens\r\ndata: {"text":\r\ndata: "ä"}\r\n\r\n'
    stream += "data:x\n\ndata\n\nevent: lost\n\nid:5\rdata:  y\r\r\n"
    found = page.driver.execute_async_script(
        """const [stream, done] = arguments;
        const { Parser } = await import("./web/sse.js");
        const whole = (...parts) => { const p = new Parser(); return parts.flatMap((part) => [...p.push(part)]); };
        const cuts = [...Array(stream.length).keys()].map((i) => whole(stream.slice(0, i), stream.slice(i)));
        done([whole(stream), whole(...stream), ...cuts]);""",
        stream,
    )
    expected = [("tokens", '{"text":\n"ä"}', "4"), ("message", "x", "4"), ("message", "", "4"), ("message", " y", "5")]
    for events in found:
        assert [(e["type"], e["data"], e["id"]) for e in events] == expected


# -- walks -------------------------------------------------------------------------------------------------------------


def test_a_conversation_streams_and_is_stopped_retried_rated_reloaded_and_deleted(page, agent, server):
    # Keeps what the page asks for, on its way through the page's own fetch.
    keeping = "(path, more) => (asked.push([path, more.headers['x-session-id'] ?? null]), real(path, more))"
    page.js(f"(window.asked = [], window.real = fetch, window.fetch = {keeping}, 0)")
    agent.will_say("First answer, slowly.", held=True)
    page.click("label[for=collect]")
    page.start()
    page.say("Hello")
    page.until(lambda: page.all(".turn.busy .chunk"))
    assert "First answer, slowly.".startswith(page.one(".turn .raw").text)
    assert page.texts(".state") == ["Answering"]
    agent.goes_on()
    page.finished(1)
    assert page.texts(".turn .said") == ["First answer, slowly."]
    assert page.texts(".turn .chip") == ["v1"]
    assert page.one("#message").get_attribute("value") == ""

    agent.will_say("A second answer that nobody waits for.", held=True)
    page.say("And?")
    page.until(lambda: page.all(".turn.busy .chunk"))
    page.click("#stop")
    page.until(lambda: page.texts(".turn.dropped .badge") == ["stopped"])
    agent.will_say("It goes on.", "It was retried.")
    assert page.texts("#send") == ["Go on"]
    page.click("#send")
    page.finished(2)
    page.click(".turn.finished .retry", -1)
    page.until(lambda: page.texts(".transcript > .turn.finished .said")[-1:] == ["It was retried."])
    assert page.texts(".earlier summary") == ["An earlier attempt"]

    page.click(".transcript > .turn .rate", -1)
    page.until(lambda: page.all(".transcript > .turn .rate")[-1].get_attribute("aria-pressed") == "true")
    page.click(".transcript > .turn [aria-expanded]", -1)
    box = page.one(".correction textarea")
    assert box.get_attribute("value") == "It was retried."
    box.send_keys(Keys.END, " Better")
    page.click(".correction .primary")
    page.until(lambda: "Corrected" in page.texts(".act"))
    with server.client() as client:
        path = f"/v1/sessions/{page.session_ids()[0]}"
        events = client.get(f"{path}/events", params={"stream": False}).json()["events"]
        rated = [(e["turn"], e["rating"], e["correction"]) for e in events if e["type"] == "feedback"]
        assert rated == [(1, "down", None), (1, "down", "It was retried. Better")]

    asked = page.js("asked")
    (identity,) = page.session_ids()
    ofs = [(path, session) for path, session in asked if identity in path]
    assert {session for _, session in ofs} == {identity}  # comes to the replica that holds it
    assert {"turns", "stop", "feedback"} <= {path.rpartition("/")[2] for path, _ in ofs}

    before = page.one(".transcript").text
    page.driver.refresh()
    page.until(lambda: page.all(".transcript") and page.one(".transcript").text == before)
    assert [e.get_attribute("aria-pressed") for e in page.all(".transcript > .turn .rate")][-2:] == ["false", "true"]
    agent.will_say("Still here.")
    page.say("So?")
    page.until(lambda: page.texts(".transcript > .turn.finished .said")[-1:] == ["Still here."])

    page.click("#delete")
    page.click("#sure button[value=no]")
    assert page.all(".pane")
    page.click("#delete")
    page.click("#sure-yes")
    page.until(lambda: page.texts("#notice") == ["The session is deleted."])
    with server.client() as client:
        assert client.get(path).status_code == 404


def test_what_people_and_agents_write_stays_text(page, agent):
    hostile = "<b>b</b><script>harm=1</script><img src=x onerror=harm=1>"
    call = '<tool_call>{"name": "<i>", "arguments": {"a": "<img src=x onerror=harm=1>"}}</tool_call>'
    agent.will_say(hostile, call, "ok")
    page.choose("#tools", "calculator")
    page.start()
    page.say(hostile)
    page.finished(1)
    assert page.texts(".message.user .said") == page.texts(".turn .said") == [hostile]
    page.say("<u>&amp;")
    page.finished(3)
    assert page.texts(".card.call .tool") == ["<i>"]
    assert page.texts(".card.call pre") == ['{"a": "<img src=x onerror=harm=1>"}']
    assert page.js("window.harm") is None
    assert page.all(".transcript :is(b, i, u, img, script)") == []


def test_a_lost_connection_is_taken_up_and_nothing_written_is_lost(page, agent, server, monkeypatch):
    config = server.service.config
    patient = config.model_copy(update={"sessions": config.sessions.model_copy(update={"disconnect_grace_s": 60})})
    monkeypatch.setattr(server.service, "config", patient)
    page.failures_expected = True
    words = "one two three four five six seven eight nine ten"
    agent.will_say(words, "Heard you.", held=True)
    page.start()
    page.say("Count")
    page.until(lambda: page.all(".turn.busy .chunk"))
    page.offline(True)
    page.until(lambda: "The connection is lost. Trying again in" in "".join(page.texts(".link")))
    agent.goes_on()
    page.offline(False)
    page.finished(1)
    assert page.texts(".turn .said") == [words]
    assert page.all(".link") == []

    page.offline(True)
    page.say("Not yet")
    page.until(lambda: "still in the box" in "".join(page.texts("#composer-error")))
    assert page.one("#message").get_attribute("value") == "Not yet"
    page.offline(False)
    page.until(lambda: not page.all(".link"))
    page.click("#send")
    page.finished(2)
    assert page.texts(".message.user .said") == ["Count", "Not yet"]
    assert page.all("#composer-error") == []


def test_a_task_is_played_with_its_calls_results_and_reward(page, agent, server):
    source = server.service.world("calculator").source
    task = source.task("held_out", 5)
    replies = [agent.codec.reply_text(message) for message in source.demonstrate(task, random.Random(0), False)]
    agent.will_say(*replies)
    page.click("label[for=kind-task]")
    page.one("#index").clear()
    page.one("#index").send_keys("5")
    question = str(task.prompt["expression"])
    page.until(lambda: page.texts("#preview .said") == [question])
    page.start()
    page.until(lambda: page.all(".end"))
    assert page.texts(".message.task .said") == [question]
    calls = [json.loads(text) for text in page.texts(".card.call pre")]
    assert len(calls) == len(replies) - 1 and all(set(call) == {"a", "op", "b"} for call in calls)
    assert len(page.texts(".card.seen pre")) == len(calls)
    assert page.texts(".end") == ["The task is over\ndone\nreward +1\nsolved"]
    assert page.all("#composer") == []

    page.click("label[for=show-tokens]")
    assert "<tool_call>" in page.texts(".raw")[0]
    assert len(page.all(".token-ids li")) == sum(len(agent.codec.reply({"content": r})) for r in replies)
    page.click("label[for=show-tokens]")

    agent.will_say("7")
    page.click(".retry", -1)
    page.until(lambda: "not solved" in page.texts(".transcript > .end .badge"))
    assert page.texts(".transcript > .turn .said")[-1] == "7"


def test_two_versions_side_by_side_each_in_a_session_of_its_own(two_versions, page, server):
    """The real engine, which takes turns with its two versions."""
    page.choose("#model", two_versions[0])
    page.click("label[for=compare]")
    page.choose("#other", two_versions[1])
    page.click("summary")
    page.one("#max_tokens").send_keys("12")
    page.start()
    page.say("12+34")
    page.finished(2)
    page.say("and 5")
    page.finished(4)
    for pane, name in zip(page.all(".pane"), two_versions, strict=True):
        assert [e.text for e in pane.find_elements(By.CSS_SELECTOR, ".message.user .said")] == ["12+34", "and 5"]
        assert {e.text for e in pane.find_elements(By.CSS_SELECTOR, ".chip")} == {name.replace("agent@", "v")}
    assert len(set(page.session_ids())) == 2
    before = page.texts(".transcript")
    page.driver.refresh()
    page.until(lambda: page.texts(".transcript") == before)

    page.failures_expected = True
    with server.client() as client:
        client.delete(f"/v1/sessions/{page.session_ids()[1]}")
    page.say("6")
    page.finished(5)
    assert page.texts(".pane > .error")[0].startswith("It was not sent. there is no session")
    assert page.texts(".pane:last-child > .error button") == ["Send again"]


def test_the_real_agent_plays_a_task_to_its_end(page):
    page.click("label[for=kind-task]")
    page.start()
    page.until(lambda: page.all(".end"))
    assert page.texts(".end code")[0] in ("done", "max_turns", "max_tokens")
    assert re.fullmatch(r"reward [+-]?[\d.]+", page.texts(".end .badge")[0])


def test_everything_can_be_done_with_the_keyboard(page, agent):
    agent.will_say("One.")
    page.tab_to("kind-free")
    page.press(Keys.ARROW_RIGHT)
    assert page.all("#task") and page.focused() == "kind-task"
    page.press(Keys.ARROW_LEFT)
    page.tab_to("collect")
    page.press(Keys.SPACE)
    page.tab_to("start")
    page.press(Keys.ENTER)
    page.until(lambda: page.focused() == "message")
    ActionChains(page.driver).send_keys("a").key_down(Keys.SHIFT).send_keys(Keys.ENTER).key_up(Keys.SHIFT).perform()
    page.press("b", Keys.ENTER)
    page.finished(1)
    assert page.js("document.querySelector('.message.user .said').textContent") == "a\nb"
    page.until(lambda: page.js("document.querySelector('#live').textContent").endswith("One."))
    agent.will_say("Two, with more to say.", held=True)
    page.press("more", Keys.ENTER)
    page.until(lambda: page.all(".turn.busy .chunk"))
    page.press(Keys.ESCAPE)
    page.until(lambda: page.all(".turn.dropped") and not page.all(".pane[aria-busy=true]"))
    page.press("k", "k")
    assert page.focused().startswith("Turn 1")
    page.press("u")
    page.until(lambda: page.texts(".rate[aria-pressed=true]") == ["↑ Good"])
    page.press("d")
    page.until(lambda: page.texts(".rate[aria-pressed=true]") == ["↓ Bad"])
    page.press("c")
    page.until(lambda: page.all(".correction"))
    page.press("!")
    page.tab_to("Save correction")
    page.press(Keys.ENTER)
    page.until(lambda: page.texts(".turn [aria-expanded]")[0] == "Corrected")
    page.press(Keys.ARROW_DOWN)
    assert page.focused().startswith("Turn 2")
    page.press("?")
    page.until(lambda: page.all("#help"))
    page.press(Keys.ESCAPE)
    page.until(lambda: not page.all("#help"))
    page.press("/")
    assert page.focused() == "message"
    agent.will_say("Again.")
    page.press(Keys.ESCAPE, "k", "k")
    page.press("r")
    page.until(lambda: page.texts(".transcript > .turn.finished .said") == ["Again."])


def test_on_a_phone_nothing_is_wider_than_the_screen_or_too_small_to_touch(two_versions, page, agent):
    page.screen(PHONE)
    page.until(lambda: page.js("innerWidth") == 360)
    page.fits("choosing")
    page.click("label[for=kind-task]")
    page.until(lambda: page.all("#preview .said"))
    page.click("label[for=compare]")
    page.click("summary")
    page.fits("choosing a task")
    page.click("label[for=kind-free]")
    page.choose("#tools", "calculator")
    page.click("label[for=collect]")
    call = '<tool_call>{"name": "calculator", "arguments": {"a": 123456789123456789, "op": "+", "b": 1}}</tool_call>'
    agent.will_say("w" * 60, "w" * 60, call, call, "ok", "ok")
    page.start()
    page.say("m" * 60)
    page.finished(2)
    page.say("2+2")
    page.until(lambda: len(page.all(".turn")) == 6)
    page.finished(6)
    first, second = page.all(".pane")
    assert second.rect["y"] >= first.rect["y"] + first.rect["height"] - 1  # stacked
    page.fits("two conversations")
    page.click("label[for=show-tokens]")
    page.fits("tokens")
    page.click("label[for=show-tokens]")
    page.click(".turn [aria-expanded]")
    page.fits("a correction")
    for button in ("#help-open", "#delete"):
        page.click(button)
        page.until(lambda: page.all("dialog"))
        page.fits(button)
        page.press(Keys.ESCAPE)
        page.until(lambda: not page.all("dialog"))


def test_what_the_server_refuses_is_said_where_it_matters(page, server):
    page.failures_expected = True
    page.click("summary")
    page.one("#temperature").send_keys("9")
    page.click("#start")
    page.until(lambda: "temperature" in "".join(page.texts("#setup-error")))
    assert page.one("#temperature").get_attribute("aria-invalid") == "true"
    page.one("#temperature").clear()
    page.start()
    page.say("x" * 2000)
    page.until(lambda: "more than the model's context" in "".join(page.texts("#composer-error")))
    assert page.one("#message").get_attribute("value") == "x" * 2000
    page.driver.get(f"{page.url}#no-such-session")
    page.until(lambda: "there is no session" in "".join(page.texts("#notice")))
    assert page.all("#setup")


def test_a_server_that_asks_for_a_key_gets_one_and_the_address_does_not(page, agent, server, monkeypatch):
    def check(header: str | None):
        if header != "Bearer right-key":
            raise ApiError(401, "invalid_key", "The API key is not valid")
        return ANONYMOUS

    monkeypatch.setattr(server.service.keys, "check", check)
    page.failures_expected = True
    page.driver.get("about:blank")
    page.driver.get(page.url)
    for key in ("wrong-key", "right-key"):
        page.until(lambda: page.all("#key-value") and not page.one("#key-value").get_attribute("value"))
        page.one("#key-value").send_keys(key, Keys.ENTER)
        page.until(lambda: page.texts("#key-error") == ["The API key is not valid"] or not page.all("#key"))
    page.until(lambda: page.one("#start").is_enabled())
    agent.will_say("Let in.")
    page.start()
    page.say("Hello")
    page.finished(1)
    page.driver.refresh()
    page.finished(1)
    assert "right-key" not in page.driver.current_url
    assert page.js("[localStorage.length, document.cookie]") == [0, ""]
