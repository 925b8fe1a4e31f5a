"""The page at /, in a real browser: answers as the API gives them, the engine's numbers, who can use it."""

import json
import re
from collections.abc import Callable, Iterator
from math import exp
from pathlib import Path
from typing import Any

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, BrowserContext, Locator, Page, expect

from tests.serve.browser import chromium
from tests.serve.conftest import Server, eventually, serving
from tests.serve.test_openai_tools import LINE, NOW, THOUGHT

QUESTION = "The capital of France is Paris. The capital of Italy is Rome. The capital of Spain is"
KEY = "a-key-of-ours"

expect.set_options(timeout=30_000)  # milliseconds; a busy machine makes two tokens a second of the real model

Open = Callable[..., Page]  # (url, options of a browser's context)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def visit(browser: Browser) -> Iterator[Open]:
    """Opens pages on which nothing may go wrong, and which may ask nobody else for anything."""
    contexts: list[BrowserContext] = []
    problems: list[str] = []

    def visit(url: str, *, ignoring: str = "$^", **options: Any) -> Page:
        contexts.append(browser.new_context(**{"viewport": {"width": 1200, "height": 800}} | options))
        page = contexts[-1].new_page()
        page.on("console", lambda message: re.search(ignoring, message.text) or problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: request.url.startswith(url) or problems.append(request.url))
        page.goto(f"{url}/")
        return page

    yield visit
    for context in contexts:
        context.close()
    assert problems == []


@pytest.fixture(scope="module")
def locked(engine: Path) -> Iterator[Server]:
    with serving(engine, "--api_key", KEY) as server:
        yield server


def ask(page: Page, text: str, max_tokens: int = 8) -> Locator:
    """The answer's place, as soon as it is there."""
    number = page.locator(".answer").count()
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Max tokens").fill(str(max_tokens))
    page.get_by_label("Message", exact=True).fill(text)
    page.get_by_role("button", name="Send").click()
    return page.locator(".answer").nth(number)


def shown_stat(page: Page, name: str) -> str:
    return page.locator("dl > div", has_text=name).locator("dd").inner_text()


def percent(part: float) -> str:
    return "< 0.1 %" if part < 0.0005 else f"{100 * part:.1f} %"


# --- files ---


def test_the_page_needs_no_key_and_what_it_asks_for_does(locked: Server) -> None:
    page = httpx.get(f"{locked.url}/")
    assert page.status_code == 200 and page.headers["content-type"] == "text/html; charset=utf-8"
    for path in ("/", *re.findall(r'"(web/[\w.]+)"', page.text)):
        file = httpx.get(f"{locked.url}/{path.lstrip('/')}")
        assert (file.status_code, file.headers["cache-control"]) == (200, "no-cache")
        assert "default-src 'none'" in file.headers["content-security-policy"]
        assert file.headers["x-content-type-options"] == "nosniff"
        assert httpx.head(file.url).headers["etag"] == file.headers["etag"]
        again = httpx.get(file.url, headers={"If-None-Match": file.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
    for path, method in (("/v1/models", "GET"), ("/metrics", "GET"), ("/", "POST"), ("/web/none.js", "GET")):
        assert httpx.request(method, f"{locked.url}{path}").status_code == 401, path
    missing = httpx.get(f"{locked.url}/web/none.js", headers={"x-api-key": KEY})
    assert missing.status_code == 404 and "none.js" in missing.text


# --- chat ---


@pytest.mark.real_model
def test_the_answer_and_its_probabilities_are_those_of_the_api(parrot: Server, visit: Open) -> None:
    page = visit(parrot.url)
    expect(page.locator("#model")).to_have_text("SmolLM2-135M-Instruct")
    answer = ask(page, QUESTION)
    expect(answer.locator(".footer")).to_contain_text("8 tokens")
    asked = {"messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": 8}
    (choice,) = parrot.post("/v1/chat/completions", {**asked, "logprobs": True, "top_logprobs": 5}).json()["choices"]
    assert "Madrid" in choice["message"]["content"]
    assert answer.locator(".text").text_content() == choice["message"]["content"]

    tokens = answer.locator(".token")
    assert tokens.count() == 8
    for index, entry in enumerate(choice["logprobs"]["content"]):
        tokens.nth(index).focus() if index else tokens.first.hover()
        rows = page.get_by_role("tooltip").locator("tr")
        expect(rows).to_have_count(5)
        chosen = page.get_by_role("tooltip").locator(".chosen")
        expect(chosen.locator("td").first).to_have_text(entry["token"].replace(" ", "␣").replace("\n", "⏎"))
        shown = page.locator("#tooltip td:nth-child(3)").all_inner_texts()
        assert shown == [percent(exp(each["logprob"])) for each in entry["top_logprobs"]]
    page.mouse.move(0, 0)
    expect(page.get_by_role("tooltip")).to_be_hidden()
    heard = page.get_by_role("log")
    assert heard.inner_text().split() == choice["message"]["content"].split()

    page.get_by_label("Token probabilities").uncheck()
    page.get_by_label("System prompt").fill("Be brief.")
    with page.expect_request("**/v1/chat/completions") as sent:
        second = ask(page, "And of Norway is", max_tokens=4)
    body = sent.value.post_data_json
    assert [each["role"] for each in body["messages"]] == ["system", "user", "assistant", "user"]
    assert body["messages"][2]["content"] == choice["message"]["content"] and "logprobs" not in body
    expect(second.locator(".footer")).to_contain_text("4 tokens")
    assert second.locator(".token").count() == 0
    page.get_by_role("button", name="New chat").click()
    expect(page.locator(".answer")).to_have_count(0)


@pytest.mark.real_model
def test_numbers_move_and_a_stopped_answer_leaves_the_engine(parrot: Server, visit: Open) -> None:
    page = visit(parrot.url)
    expect(page.locator("#state")).to_have_text("ready")
    assert shown_stat(page, "Running") == "0"
    answer = ask(page, "one two three four five six seven eight nine ten " * 4, max_tokens=4000)
    expect(answer.locator(".token").nth(2)).to_be_attached()
    expect(page.locator("#running")).to_have_text("1")
    expect(page.locator("#blocks")).to_have_text(re.compile(r"^[1-9]\d* of \d+$"))
    expect(page.locator("#rate")).to_have_text(re.compile(r"^[1-9]"))
    for histogram in ("#ttft", "#itl"):
        expect(page.locator(histogram)).to_contain_text("median")
        assert page.locator(f"{histogram}_chart > div").count() >= 5
    page.get_by_role("button", name="Stop").click()
    expect(answer.locator(".footer")).to_have_text("stopped")
    eventually(lambda: parrot.stats()["num_running"] == 0)
    text = answer.locator(".text").text_content()
    assert text
    expect(page.locator("#running")).to_have_text("0")
    expect(page.locator("#rate")).to_have_text("0.0")
    assert answer.locator(".text").text_content() == text
    expect(page.get_by_label("Message", exact=True)).to_be_focused()


@pytest.mark.real_model
def test_all_of_it_by_keyboard(parrot: Server, visit: Open) -> None:
    page = visit(parrot.url)
    expect(page.get_by_label("Message", exact=True)).to_be_focused()
    page.keyboard.type("one two three four five six seven eight nine ten one two three four")
    page.keyboard.press("Control+Enter")
    expect(page.locator(".token").nth(2)).to_be_attached()
    page.keyboard.press("Escape")
    expect(page.locator(".footer")).to_have_text("stopped")
    eventually(lambda: parrot.stats()["num_running"] == 0)

    page.keyboard.press("Shift+Tab")  # from the message back to the answer, whose tokens are one stop
    expect(page.locator(".token").first).to_be_focused()
    first = page.get_by_role("tooltip").inner_text()
    page.keyboard.press("ArrowRight")
    expect(page.locator(".token").nth(1)).to_be_focused()
    assert page.get_by_role("tooltip").inner_text() != first
    assert page.locator(".token").nth(1).get_attribute("aria-describedby") == "tooltip"
    page.keyboard.press("End")
    expect(page.locator(".token").last).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.get_by_role("tooltip")).to_be_hidden()

    page.locator(".skip").focus()
    stops = {"Skip to the message"}
    for _ in range(20):
        page.keyboard.press("Tab")
        stops.add(focused_name(page))
    wanted = (
        "Engine|Sampling|Temperature|Top p|Top k|Min p|Max tokens|Seed|Token probabilities|System prompt|Tools|Message"
    )
    assert {*wanted.split("|"), "Conversation", "New chat", "Send"} <= stops


def test_a_tooltip_stays_at_its_token_while_that_is_in_view(server: Server, visit: Open) -> None:
    page = visit(server.url, viewport={"width": 1000, "height": 400})
    answer = ask(page, "Hello", max_tokens=400)
    expect(answer.locator(".footer")).to_contain_text("token")
    tooltip, first = page.get_by_role("tooltip"), answer.locator(".token").first
    answer.locator(".token").last.focus()
    page.keyboard.press("Home")  # which scrolls a long way
    settle(page)
    expect(tooltip).to_be_visible()
    before, line = tooltip.bounding_box(), first.bounding_box()
    assert before is not None and line is not None and before["y"] > line["y"]
    page.locator("#conversation").evaluate("(place) => place.scrollTop -= 3")
    settle(page)
    after, moved = tooltip.bounding_box(), first.bounding_box()
    assert after is not None and moved is not None and moved["y"] > line["y"]
    assert after["y"] - before["y"] == pytest.approx(moved["y"] - line["y"], abs=1)
    page.locator("#conversation").evaluate("(place) => place.scrollTop = place.scrollHeight")
    settle(page)
    expect(tooltip).to_be_hidden()


def settle(page: Page) -> None:
    """Until the page has been drawn, and has heard of what was scrolled for it."""
    page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def focused_name(page: Page) -> str:
    name: str = page.evaluate(
        "(({labels, ariaLabel, textContent}) => labels?.[0]?.textContent ?? ariaLabel ?? textContent)"
        "(document.activeElement).trim()"
    )
    return name


@pytest.mark.real_model
def test_reasoning_and_tool_calls_have_their_places(parrot: Server, visit: Open) -> None:
    page = visit(parrot.url, viewport={"width": 1000, "height": 480})
    answer = ask(page, "<think>" + THOUGHT * 8, max_tokens=12)
    expect(answer.locator(".footer")).to_contain_text("tokens")
    assert answer.locator(".reasoning .text").text_content() == "A colour is asked for."
    assert (answer.locator(":scope > .text").text_content() or "").startswith("Red.")
    assert (answer.locator(".reasoning .token").first.text_content() or "").strip() == "A"

    page.get_by_role("button", name="New chat").click()
    page.get_by_label("Tools").fill(json.dumps(NOW))
    answer = ask(page, LINE * 4, max_tokens=24)
    expect(answer.locator(".footer")).to_contain_text("tokens")
    assert answer.locator(":scope > .text").inner_text().startswith("So I ask.")
    expect(answer.locator(".footer")).to_be_in_viewport()  # below a question that fills the page
    assert answer.locator(".call").first.inner_text() == 'now({"zone": "UTC"})'
    num_calls = answer.locator(".call").count()
    with page.expect_request("**/v1/chat/completions") as sent:  # once each call has its result
        for _ in range(num_calls):
            page.get_by_label("Result of now").fill("It is noon.")
            page.keyboard.press("Control+Enter")
    said = sent.value.post_data_json["messages"]
    assert [each["role"] for each in said] == ["user", "assistant", *["tool"] * num_calls]
    assert [each["id"] for each in said[1]["tool_calls"]] == [each["tool_call_id"] for each in said[2:]]
    page.keyboard.press("Escape")

    page.get_by_role("button", name="New chat").click()
    page.get_by_label("Tools").fill("no JSON")
    ask(page, "Hello")
    expect(page.get_by_role("alert")).to_contain_text("Tools are not JSON")
    expect(page.get_by_label("Message", exact=True)).to_have_value("Hello")


@pytest.mark.real_model
def test_what_a_model_says_is_text_and_nothing_else(parrot: Server, visit: Open) -> None:
    page = visit(parrot.url)
    mark = '<img src=x onerror="alert(1)">\n'
    answer = ask(page, mark * 8, max_tokens=24)
    expect(answer.locator(".footer")).to_contain_text("tokens")
    assert mark.strip() in (answer.locator(".text").text_content() or "")
    assert page.locator("main img").count() == 0


def test_the_policy_forbids_markup_out_of_text(server: Server, visit: Open) -> None:
    page = visit(server.url, ignoring="TrustedHTML|Content Security Policy")
    with pytest.raises(Exception, match="TrustedHTML"):
        page.evaluate("document.body.innerHTML = '<b>x</b>'")
    page.evaluate(
        "document.head.append(Object.assign(document.createElement('style'), {textContent: '* {color: red}'}))"
    )
    assert page.evaluate("getComputedStyle(document.body).color") != "rgb(255, 0, 0)"


def test_a_refused_question_comes_back_with_the_reason(server: Server, visit: Open) -> None:
    page = visit(server.url, ignoring="400")
    page.get_by_label("Top k").fill("-7")
    ask(page, "Hello")
    expect(page.get_by_role("alert")).to_contain_text("top_k is -7")
    expect(page.get_by_label("Message", exact=True)).to_have_value("Hello")
    expect(page.locator("article")).to_have_count(0)
    page.get_by_label("Top k").fill("")
    answer = ask(page, "Hello")
    expect(answer.locator(".footer")).to_contain_text("token")
    expect(page.get_by_role("alert")).to_have_count(0)
    text = answer.locator(".text").text_content() or ""
    assert text.endswith("\N{REPLACEMENT CHARACTER}")  # nonsense, whose last token begins a character
    assert "".join(answer.locator(".token").all_text_contents()) == text


@pytest.mark.parametrize(
    ("end", "sentence"),
    [
        ("", "The connection ended before the answer did."),
        ('data: {"error": {"message": "The engine process ended."}}\n\ndata: [DONE]\n\n', "The engine process ended."),
    ],
)
def test_an_answer_that_breaks_off_is_kept_and_says_so(server: Server, visit: Open, end: str, sentence: str) -> None:
    page = visit(server.url)
    asked = {"messages": [{"role": "user", "content": "Hello"}], "temperature": 0, "max_tokens": 8, "stream": True}
    stream = server.post("/v1/chat/completions", asked).text
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=stream.partition("data: [DONE]")[0] + end))
    answer = ask(page, "Hello")
    expect(answer.locator(".footer")).to_have_text("broken off")
    expect(page.get_by_role("alert")).to_have_text(sentence)
    assert answer.locator(".text").text_content()


def test_a_key_is_asked_for_and_kept_in_the_tab(locked: Server, visit: Open) -> None:
    page = visit(locked.url, ignoring="401")
    dialog = page.get_by_role("dialog", name="This server needs an API key")
    dialog.get_by_label("API key").fill("wrong")
    page.keyboard.press("Enter")
    expect(dialog.get_by_label("API key")).to_have_value("")
    dialog.get_by_label("API key").fill(KEY)
    dialog.get_by_role("button", name="Continue").click()
    expect(page.locator("#model")).not_to_be_empty()
    expect(dialog).to_be_hidden()
    expect(page.locator("#state")).to_have_text("ready")
    expect(ask(page, "Hello").locator(".footer")).to_contain_text("token")
    page.reload()
    expect(page.locator("#model")).not_to_be_empty()
    assert page.evaluate("[localStorage.length, Object.values(sessionStorage), document.cookie]") == [0, [KEY], ""]

    other = page.context.new_page()  # another tab knows nothing of it, and may do without
    other.goto(locked.url)
    other.get_by_role("button", name="Cancel").click()
    expect(other.get_by_role("alert")).to_have_text("This server needs an API key.")


# --- the engine's numbers ---


def test_the_numbers_are_those_of_metrics(server: Server, visit: Open) -> None:
    """Of numbers that are known here; drafts are what an engine with speculation would add, under vLLM's names."""
    page = visit(server.url)
    expect(page.locator("#state")).to_have_text("ready")
    expect(page.locator("#acceptance_row")).to_be_hidden()
    values = {
        "num_requests_running": 3, "num_requests_waiting": 2, "kv_cache_usage_perc": 0.25, "kv_cache_blocks": 400,
        "spec_decode_num_drafts_total": 100, "spec_decode_num_accepted_tokens_total": 150,
    }  # fmt: skip
    tokens = 1000

    def answer(route: Any) -> None:
        nonlocal tokens
        tokens += 50
        text = httpx.get(f"{server.url}/metrics").text
        sums = values | {"generation_tokens_total": tokens}
        lines = [
            f'slipstream:{name}{{model_name="talker",engine="{engine}"}} {value * share}'
            for name, value in sums.items()
            for engine, share in enumerate((1, 1) if name == "kv_cache_usage_perc" else (0.5, 0.5))
        ]
        for bound, count in (("0.01", 0), ("0.02", 50), ("0.03", 99), ("0.04", 100), ("+Inf", 100)):
            lines.append(f'slipstream:inter_token_latency_seconds_bucket{{le="{bound}",model_name="talker"}} {count}')
        known = ("inter_token_latency_seconds_bucket", *sums)
        kept = [line for line in text.splitlines() if not any(f"{name}{{" in line for name in known)]
        route.fulfill(body="\n".join([*kept, *lines]))

    page.route("**/metrics", answer)
    expect(page.locator("#running")).to_have_text("3")
    expect(page.locator("#waiting")).to_have_text("2")
    expect(page.locator("#blocks")).to_have_text("100 of 400")
    expect(page.locator("#acceptance")).to_have_text("2.50")
    expect(page.locator("#itl")).to_have_text("median 20 ms, 99 % 30 ms")
    expect(page.locator("#rate")).to_have_text(re.compile(r"^(4[0-9]|50)\.\d$"))
    values["kv_cache_blocks"] = 0
    expect(page.locator("#state")).to_have_text("the engine is being started")


# --- for everybody ---


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 360])
def test_everybody_can_read_it(server: Server, visit: Open, scheme: str, width: int) -> None:
    options = {"color_scheme": scheme, "viewport": {"width": width, "height": 740}}
    page = visit(server.url, bypass_csp=True, **options)  # axe comes into the page as a script
    if width < 960:
        for name in ("Engine", "Sampling"):
            page.locator("summary", has_text=name).click()
    answer = ask(page, "Hello, who are you?")
    expect(answer.locator(".footer")).to_contain_text("token")
    answer.locator(".token").first.focus()
    settle(page)
    expect(page.get_by_role("tooltip")).to_be_visible()
    results = Axe().run(page, options={"resultTypes": ["violations"]})
    assert results.violations_count == 0, results.generate_report()
    assert page.evaluate("document.documentElement.scrollWidth") == width
    box = page.get_by_role("tooltip").bounding_box()
    assert box is not None and box["x"] >= 0 and box["x"] + box["width"] <= width
    ground = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    red, green, blue = map(int, re.findall(r"\d+", ground))
    assert (red + green + blue > 3 * 200) == (scheme == "light")
