"""The report in a real browser: a Chromium that is on this machine already, without network.

Skipped where there is none; `TNT_JAX_CHROMIUM=/path/to/chromium` names one that is not found.
"""

import json
import os
import shutil
import time

import pytest
from helpers import outputs

from tnt_jax import report
from tnt_jax.data import records

playwright = pytest.importorskip("playwright.sync_api")

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = os.environ.get("TNT_JAX_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None,
    reason="no Chromium: install one (apt-get install chromium), or set TNT_JAX_CHROMIUM",
)

NUMBER = 400
EXPECTED_MESSAGE = "setting log level"  # BokehJS's own greeting


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def made(folder, number, **settings):
    """A report on `number` records, and on a sweep."""
    outputs.write_pair(folder, number)
    (folder / "results.json").write_text(json.dumps(outputs.results()))
    report.report(
        output=str(folder / "report.html"),
        original_records=str(folder / "original.jsonl"),
        current_records=str(folder / "patched.jsonl"),
        tokens=str(folder / "tokens.jsonl"),
        results=str(folder / "results.json"),
        **settings,
    )
    return (folder / "report.html").as_uri()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    return made(tmp_path_factory.mktemp("report"), NUMBER)


@pytest.fixture
def open_page(browser):
    """Opens an address in a window of its own; at the end nothing may have gone wrong in it."""
    opened = []

    def open_page(address, *, has_charts=True, **settings):
        context = browser.new_context(**{"offline": True, "color_scheme": "light"} | settings)
        page, messages = context.new_page(), []
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.on("request", lambda request: messages.append(request.url))
        opened.append((context, address, messages))
        page.goto(address)
        if has_charts:
            page.locator("#trade-off-chart canvas").first.wait_for(timeout=60_000)
        return page

    yield open_page
    for context, address, messages in opened:
        context.close()
        expected = [text for text in messages if EXPECTED_MESSAGE in text or text == address]
        assert messages == expected


def wait_until(page, expression):
    """Playwright's own `wait_for_function` evaluates within the page, which its policy forbids."""
    deadline = time.monotonic() + 60
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, f"waited a minute for {expression}"
        page.wait_for_timeout(50)


def ids_shown(page):
    headings = page.locator("#outputs-list h3").all_inner_texts()
    return [heading.split(" · ")[0] for heading in headings]


def test_hostile_texts_are_shown_and_do_nothing(open_page, address):
    page = open_page(address)
    page.fill("#search", "alert(")
    wait_until(page, "outputPages.items.length === 1")
    assert ids_shown(page) == [outputs.HOSTILE.id]
    card = page.locator("#outputs-list > li")
    assert outputs.HOSTILE.inputs in card.inner_text()
    assert card.locator("p", has_text="onerror").count() == 2
    assert page.title() == "Before and after the update"
    assert page.locator("img, #outputs-list script, #outputs-list b").count() == 0
    assert card.locator("mark").all_inner_texts() == ["</script>", "dirty ", "dirty"]


def test_texts_run_as_their_script_does(open_page, tmp_path):
    """In Hebrew the full stop at the end of a text stands at its left."""
    texts = {"hebrew": "החדר קטן.", "english": "a small room."}
    rows = [
        records.Record(id=name, inputs=text, targets=text, negative_spans=())
        for name, text in texts.items()
    ]
    files = [str(tmp_path / name) for name in ("original.jsonl", "patched.jsonl")]
    for file in files:
        records.write_records(file, rows)
    page_file = tmp_path / "report.html"
    report.report(output=str(page_file), original_records=files[0], current_records=files[1])
    page = open_page(page_file.as_uri())
    # On which side of each text its last character is: of input, original, patched.
    places = page.evaluate("""() => {
        const sideOfLast = (text) => {
            const [all, last] = [document.createRange(), document.createRange()];
            all.selectNodeContents(text);
            last.setStart(text, text.length - 1);
            last.setEnd(text, text.length);
            const [one, other] = [all, last].map((range) => range.getBoundingClientRect());
            return other.left - one.left < 1 ? "left" : "right";
        };
        const cards = [...document.querySelectorAll("#outputs-list > li")];
        return cards.map((card) =>
            [...card.querySelectorAll("p")].map((shown) => sideOfLast(shown.firstChild)));
    }""")
    assert places == [["left"] * 3, ["right"] * 3]


def test_filters_and_orders(open_page, address):
    page = open_page(address)
    count = page.locator("#outputs-count")
    assert count.inner_text() == f"{NUMBER} of {NUMBER} outputs"
    assert len(ids_shown(page)) == 25
    page.select_option("#kind", "newly unwanted")
    # Multiples of 97 that are not multiples of 10 or 60, and the hostile one.
    assert set(ids_shown(page)) == {f"room-{97 * i}" for i in (1, 2, 3, 4)} | {outputs.HOSTILE.id}
    assert count.inner_text() == f"5 of {NUMBER} outputs"
    page.select_option("#kind", "")
    page.fill("#search", "room-97")
    wait_until(page, "outputPages.items.length === 1")
    assert page.locator("#outputs-list del").all_inner_texts() == ["bright."]
    assert page.locator("#outputs-list ins").all_inner_texts() == ["noisy", "."]
    assert page.locator("#outputs-list ins mark").all_inner_texts() == ["noisy"]
    page.fill("#search", "")
    page.select_option("#order", "share")
    shares = page.evaluate("outputPages.items.map((output) => output.share)")
    assert len(shares) == NUMBER
    assert shares == sorted(shares, reverse=True)


def test_a_page_that_holds_the_worst_says_so(open_page, tmp_path):
    page = open_page(made(tmp_path, NUMBER, num_records=30))
    assert page.locator("#outputs-count").inner_text() == (
        f"30 of 30 outputs (in this page: the 24 worst changes of {NUMBER}, and 6 drawn from the "
        "others; all are in report.html.outputs.jsonl)"
    )
    assert ids_shown(page)[0] == "room-97"
    page.get_by_role("button", name="Next").nth(0).click()
    assert len(ids_shown(page)) == 5
    assert page.get_by_role("button", name="Next").nth(0).is_disabled()


def test_pages_by_keyboard_alone(open_page, address):
    page = open_page(address)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the results"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    first = ids_shown(page)
    reached = []
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.textContent.trim()"))
        if reached[-1] == "Next":
            break
    assert reached[-1] == "Next", reached
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    page.keyboard.press("Enter")
    assert page.locator("#outputs-pager span").inner_text() == f"26 to 50 of {NUMBER}"
    assert not set(first) & set(ids_shown(page))
    focused = page.evaluate("document.activeElement.textContent")
    assert focused.startswith(ids_shown(page)[0])


def test_tokens_by_keyboard_and_pointer(open_page, address):
    page = open_page(address)
    box = page.locator("#tokens-list > li").nth(8)  # room-379, and the next one is marked
    assert page.locator("#tokens-list [tabindex='0']").count() == 10
    first = box.locator("[role=option]").first
    first.focus()
    page.keyboard.press("ArrowRight")
    told = box.locator(".value").inner_text()
    second = box.locator("[role=option]").nth(1)
    assert told == second.get_attribute("aria-label")
    assert told.startswith(f"{second.inner_text().strip()}: KL ")
    assert second.get_attribute("aria-selected") == "true"
    page.keyboard.press("End")
    assert box.locator(".value").inner_text().startswith("end of text: KL ")
    assert page.locator("#tokens-list [tabindex='0']").count() == 10  # Tab still leaves the text
    marked = page.locator("#tokens-list > li").nth(9).locator(".negative")
    assert marked.count() == 1
    marked.hover()
    told = page.locator("#tokens-list > li").nth(9).locator(".value").inner_text()
    assert "marked: KL " in told
    assert "residual 0.031" in told
    assert "smallest cost 1.7" in told


def test_the_trade_off_chart(open_page, address):
    page = open_page(address)
    page.select_option("#task", "rooms")
    assert page.locator("#outputs").is_hidden()
    assert page.locator("#numbers tbody tr:visible").count() == 13  # and the original
    wait_until(page, "views.length === 2 && views[0].model.renderers.length === 3")
    assert page.locator("#points tbody tr").count() == 24
    # The pointer on a point: what it is, whatever its name holds.
    page.locator("#trade-off-chart").scroll_into_view_if_needed()
    place = page.evaluate(
        """() => {
          const { canvas_view, frame, model } = views[0];
          const ofName = ({ data_source }) => data_source.data.told[0][0][1] === "<b>NL</b>";
          const { x, y } = model.renderers.find(ofName).data_source.data;
          const box = canvas_view.el.getBoundingClientRect();
          return [box.x + frame.x_scale.compute(x[0]), box.y + frame.y_scale.compute(y[0])];
        }"""
    )
    page.mouse.move(*place)
    tooltip = page.locator(".bk-Tooltip table")
    tooltip.wait_for()
    told = dict(line.split("\t") for line in tooltip.inner_text().splitlines())
    assert told["objective"] == "<b>NL</b>"
    assert (told["alpha"], told["seed"], told["cut"]) == ("0.5", "0", "72.8%")
    assert "residual" not in told
    for axis, label in (("x", "unwanted outputs that are left"), ("y", "ROUGE-L to the original")):
        page.select_option(f"#{axis}", label=label)
        wait_until(page, f"views[0]?.model.{axis}axes[0].axis_label === '{label}'")


@pytest.mark.parametrize(("num_graded", "bars"), [(0, ["original", "patched"]), (9, ["patched"])])
def test_the_original_has_a_bar_where_all_of_it_is_residual(open_page, tmp_path, num_graded, bars):
    """With graded marks its part of the smallest cost that is residual is not known."""
    evaluation = outputs.evaluation(NUMBER)
    evaluation["certificate"] |= {"negative_collateral": 0.125, "num_graded": num_graded}
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    page = open_page(made(tmp_path, NUMBER, evaluation=str(tmp_path / "evaluation.json")))
    page.select_option("#task", "records")
    wait_until(page, "views.length === 3 && views[1].model.renderers.length === 2")
    drawn = page.evaluate("views[1].model.renderers.map((one) => one.data_source.data)")
    assert [source["name"] for source in drawn] == [bars, bars]
    assert drawn[0]["right"] == [1.5, 0.25][-len(bars) :]


# Relative luminance and contrast, as WCAG 2 defines them.
CONTRASTS = """() => {
  // What a browser computes: rgb(r, g, b), rgba(r, g, b, a), and color(srgb r g b) of a mixture.
  const channels = (color) => {
    const [r, g, b, a = 1] = color.match(/[\\d.]+/g).map(Number);
    const scale = color.startsWith("color(") ? 255 : 1;
    return [scale * r, scale * g, scale * b, a];
  };
  const luminance = (rgb) => rgb.slice(0, 3).map((v) => v / 255)
    .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (node) => {
    for (let at = node; at; at = at.parentElement) {
      const color = channels(getComputedStyle(at).backgroundColor);
      if (color[3] > 0) return color;
    }
    return [255, 255, 255, 1];
  };
  const found = [];
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const node = texts.currentNode.parentElement;
    if (!texts.currentNode.data.trim() || !node.offsetParent) continue;
    if (node.closest(".chart, option, :disabled")) continue;
    const one = luminance(channels(getComputedStyle(node).color));
    const other = luminance(ground(node));
    const ratio = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
    found.push([ratio, node.tagName + "." + node.className + ": " + node.textContent.slice(0, 30)]);
  }
  return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_and_width(open_page, address, scheme):
    """AA: 4.5 to 1 for every text, and for the charts' labels; nothing wider than a phone."""
    page = open_page(address, color_scheme=scheme, viewport={"width": 390, "height": 800})
    contrasts = page.evaluate(CONTRASTS)
    assert len(contrasts) > 300
    worst = min(contrasts)
    assert worst[0] >= 4.5, worst
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    ground = page.evaluate("views[0].model.background_fill_color")
    assert ground == {"light": "#ffffff", "dark": "#14171b"}[scheme]


def test_all_numbers_of_a_sweep_are_in_sight_on_a_desktop(open_page, tmp_path):
    """The last column is one of the three that the tutorial tells to read."""
    known = ("exact_match", "unknown_token_rate", "distinct_ratio", "smallest_cost")
    rows = [
        {**one, **dict.fromkeys(known, 0.998), "residual": 1.5, "collateral": 1.5}
        | {"collateral_elsewhere": 0.05}
        for one in outputs.results()["rows"]
    ]
    (tmp_path / "results.json").write_text(json.dumps({"rows": rows}))
    page_file = tmp_path / "report.html"
    report.report(output=str(page_file), results=str(tmp_path / "results.json"))
    page = open_page(page_file.as_uri(), viewport={"width": 1300, "height": 800})
    table = page.locator("#numbers .scroll")
    main, further = table.first, table.last
    assert main.locator("thead th").last.inner_text() == "KL elsewhere"
    assert main.locator(".tag:visible").count()
    assert further.is_hidden()
    page.locator("#numbers summary").click()
    assert "distinct" in further.locator("thead th").all_inner_texts()
    for box in (main, further):
        assert box.evaluate("box => box.scrollWidth - box.clientWidth") == 0


def test_a_change_of_scheme_redraws_the_charts(open_page, address):
    page = open_page(address)
    page.emulate_media(color_scheme="dark")
    wait_until(page, "views[0]?.model.background_fill_color === '#14171b'")
    assert page.locator("#trade-off-chart .bk-Figure").count() == 1


def test_without_javascript_the_numbers_are_there(open_page, address):
    page = open_page(address, has_charts=False, java_script_enabled=False)
    assert "39 of 400 outputs were unwanted, 11 are now" in page.inner_text("main")
    assert "no reduction: not seen." in page.inner_text("#signs")
    assert "need JavaScript" in page.inner_text("noscript")


def processor_seconds(page):
    """What the page has taken so far: on a busy machine the clock would measure the others."""
    session = page.context.new_cdp_session(page)
    session.send("Performance.enable")
    metrics = session.send("Performance.getMetrics")["metrics"]
    (seconds,) = (metric["value"] for metric in metrics if metric["name"] == "ProcessTime")
    return seconds


def test_5000_records_open_as_a_few_do(open_page, tmp_path):
    """A page of few records has the same charts, and takes what this machine needs for these."""
    seconds = {}
    for number in (25, 5000):
        page = open_page(made(tmp_path / str(number), number))
        seconds[number] = processor_seconds(page)
        assert page.locator("#outputs-count").inner_text() == f"{number} of {number} outputs"
        assert page.locator("#outputs-list > li").count() == 25
        assert page.locator("body *").count() < 3000
    print("seconds of processor time by number of records:", seconds)
    assert 0 < seconds[5000] < 2 * seconds[25]
