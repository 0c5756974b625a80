"""The Space: what it explains is what the reference attends to, and the page works for hands, phones and bad input."""

import copy
import importlib
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from xml.etree import ElementTree

import polars as pl
import pytest
import torch
import yaml
from example_cases import REPOSITORY

from blossomrec_hf import BlossomRecConfig, BlossomRecForSequentialRecommendation, BlossomRecTokenizer
from blossomrec_hf.data import generate_log
from blossomrec_hf.sharing import push


SPACE = REPOSITORY / "examples" / "space"
sys.path.append(str(SPACE))
explain = importlib.import_module("explain")


def make_model(attention_types="blossom", num_items=50, attn_implementation=None, **settings):
    """A random model whose gates and selection differ from place to place, in double precision."""
    settings = {"hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2, **settings}
    config = BlossomRecConfig(
        vocab_size=num_items + 2,
        attention_types=attention_types,
        intermediate_size=16,
        initializer_range=0.3,
        **settings,
    )
    model = BlossomRecForSequentialRecommendation._from_config(config, attn_implementation=attn_implementation)
    for name, weight in model.named_parameters():
        if ".gate." in name:
            torch.nn.init.normal_(weight)
    model.item_counts.copy_(torch.randperm(num_items + 2))
    return model.double().eval()


def positions(spans):
    return {place for first, last in spans for place in range(first, last + 1)}


@pytest.mark.parametrize("length", [1, 3, 17, 64, 150])
def test_readings_are_what_the_reference_attends_to(length):
    types = ["blossom", "long_term", "short_term", "full"]
    random.shuffle(types)
    settings = {
        "num_hidden_layers": 4,
        "compress_block_size": 6,
        "compress_stride": 4,
        "selection_block_size": random.choice([4, 8]),
        "num_selected_blocks": random.choice([1, 3]),
        "importance_threshold": random.choice([0.0, 0.15]),
        "short_term_block_size": random.choice([3, 8]),
        "short_term_window": random.choice([1, 2]),
        "power_law_base": random.choice([2, 3]),
    }
    reference = make_model(types, attn_implementation="eager", **settings)
    config = copy.deepcopy(reference.config)
    model = BlossomRecForSequentialRecommendation._from_config(config, attn_implementation="blossom_torch")
    model.double().eval().load_state_dict(reference.state_dict())
    history = torch.randint(2, 52, (length,)).tolist()
    with torch.no_grad():
        expected = reference(torch.tensor([history]), output_attentions=True, output_selection=True)
    readings = explain.explain(model, history)
    assert [reading.attention_type for reading in readings] == types
    for reading, probs, layer in zip(readings, expected.attentions, expected.selections):
        for head in range(4):
            spans = list(reading.short)
            if reading.own:
                spans.append(reading.own)
            if reading.selected:
                spans += [span for span, _ in reading.selected[head // 2]]
            assert positions(spans) == set(probs[0, head, -1].nonzero().flatten().tolist())
        if layer.gates is None:
            assert reading.gates == []
        else:
            assert torch.allclose(torch.tensor(reading.gates).double(), layer.gates[0, -1])
        for group, blocks in enumerate(reading.selected):
            importance = torch.tensor([weight for _, weight in blocks])
            assert torch.allclose(importance.double(), layer.importance[0, -1, group, : len(blocks)])
            assert (layer.importance[0, -1, group, len(blocks) :] == 0).all()


def test_drawing_is_well_formed_and_to_scale():
    model = make_model(["blossom", "long_term", "full"], num_hidden_layers=3)
    history = torch.randint(2, 52, (90,)).tolist()
    names = [f'<b> & "{place}" 花' for place in range(90)]
    readings = explain.explain(model, history)
    page = ElementTree.fromstring(f"<div>{explain.render_explanation(readings, names)}</div>")
    lanes = page.findall(".//svg")
    assert len(lanes) == 3 + 2 + 1  # two head groups and the short-term stream, two head groups, full attention
    for group, lane in enumerate(lanes[:2]):
        drawn = {
            (int(r.get("x")), int(r.get("x")) + int(r.get("width")) - 1)
            for r in lane
            if r.get("class") == "selected" and lane.get("viewBox") == "0 0 90 1"
        }
        assert drawn == {span for span, _ in readings[0].selected[group]} != set()
    lists = page.findall(".//details")
    assert [item.text for item in lists[-1].iter("li")] == names
    assert len(page.findall(".//tbody/tr")) == 4
    rows = [("<i>", "id &", "1.00", 1.0)]
    best = ElementTree.fromstring(explain.render_recommendations("A & B", rows, "<note>"))
    assert best.find(".//li/span").text == "<i>" and best.find("p").text == "<note>"


@pytest.fixture(scope="module")
def app():
    pytest.importorskip("gradio")
    return importlib.import_module("app")


def save_checkpoint(folder, items, **settings):
    model = make_model(num_items=len(items), **settings).float()
    model.item_counts.copy_(torch.tensor([0, 0, *range(len(items), 0, -1)]))
    model.save_pretrained(folder)
    BlossomRecTokenizer.from_items(items).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model of the items 100 … 139; all but the last five have titles, and so has an item that it does not know."""
    titles = [f"Film number {number} <{'odd' if number % 2 else 'even'}>" for number in range(35)]
    folder = save_checkpoint(tmp_path_factory.mktemp("checkpoint"), list(range(100, 140)))
    titles = pl.DataFrame({"item": [*range(100, 135), 999, 139], "title": [*titles, "Film number 999", None]})
    titles.write_parquet(folder / "items.parquet")
    return folder


@pytest.fixture(scope="module")
def served(app, checkpoint):
    return app.load(str(checkpoint))


def items_of(html):
    """(name, id, score) of the recommended items."""
    page = ElementTree.fromstring(f"<div>{html}</div>")
    return [tuple(span.text for span in row.findall("span")[:3]) for row in page.iter("li")]


def notices_of(html):
    page = ElementTree.fromstring(f"<div>{html}</div>")
    return [p.text for p in page.iter("p") if p.get("role") == "alert"]


def test_answers_a_history(app, served):
    history = random.sample(range(100, 140), 30)
    best, why = app.answer(served, ", ".join(map(str, history)))
    ids = torch.tensor([served.tokenizer.encode_items(history)])
    expected = served.model.recommend(ids, top_k=10)
    assert [name for name, _, _ in items_of(best)] == [served.label(item) for item in expected.item_ids[0].tolist()]
    assert [float(score) for *_, score in items_of(best)] == pytest.approx(expected.scores[0].tolist(), abs=0.006)
    assert notices_of(best) == []
    listed = ElementTree.fromstring(f"<div>{why}</div>").findall(".//details")[-1]
    assert [item.text for item in listed.iter("li")] == [served.label(item) for item in ids[0].tolist()]
    assert served.label(2) == "Film number 0 <even>" and served.label(41) == "item 139"
    seen = {served.label(item) for item in ids[0].tolist()}
    assert not seen & {name for name, _, _ in items_of(best)}
    again, _ = app.answer(served, ", ".join(map(str, history)), exclude_seen=False)
    expected = served.model.recommend(ids, top_k=10, exclude_seen=False)
    assert [name for name, _, _ in items_of(again)] == [served.label(item) for item in expected.item_ids[0].tolist()]


def test_a_model_of_times_and_types_reads_those_of_the_samples(app, tmp_path):
    folder = save_checkpoint(
        tmp_path / "model", list(range(9)), time_features=["previous_gap", "next_gap"], event_types=["view"]
    )
    times = [1_700_000_000 + 10**place for place in range(9)]
    log = pl.DataFrame({"user": [1] * 9, "item": range(9), "timestamp": times})
    log.write_csv(tmp_path / "log.csv")
    served = app.load(str(folder), str(tmp_path / "log.csv"))
    for vectors in (
        *served.model.model.event_vectors.parameters(),
        *served.model.model.prediction_vectors.parameters(),
    ):
        torch.nn.init.normal_(vectors)  # they start at zero
    (sample,) = served.samples
    assert sample.times == times[:-1]
    unknown = "The model reads the types of events, which are unknown here."
    typed = "The model reads the times of events. Those of typed items are not known: they have the time of the item before."
    for text, history, seconds, notices in (
        (served.text(sample.history), sample.history, sample.times, [unknown]),
        (
            served.text(sample.history) + " 3 4",
            [*sample.history, 5, 6],
            [*sample.times, *sample.times[-1:] * 2],
            [typed, unknown],
        ),
        ("3 4", [5, 6], [0, 0], [typed, unknown]),
    ):
        best, why = app.answer(served, text)
        expected = served.model.recommend(
            [history], timestamps=[seconds], event_type_ids=[[-1] * len(history)], top_k=9
        )
        assert [float(score) for *_, score in items_of(best)] == pytest.approx(
            expected.scores[0][expected.item_ids[0] >= 0].tolist(), abs=0.006
        )
        assert notices_of(best) == notices and f"The whole history: {len(history)} items" in why
    assert notices_of(app.answer(served, "")[0]) == ["The history has no items of this model."]


def test_bad_input_is_told_in_words(app, served):
    best, why = app.answer(served, "[101, 7, foo, 103; -3, 99999999999999999999, [PAD]]")
    malformed, unknown = notices_of(best)
    assert "foo, 99999999999999999999, PAD." in malformed and "such as 100 101" in malformed
    assert "7, -3." in unknown
    assert len(items_of(best)) == 10 and "The whole history: 2 items" in why

    for nothing in ("", None, "  \n", "foo"):
        best, why = app.answer(served, nothing)
        assert [name for name, _, _ in items_of(best)] == [served.label(item) for item in range(2, 12)]
        assert "most popular" in best and "nothing to explain" in why and notices_of(best)

    short = app.Served("m", served.model, served.tokenizer, served.titles, [], max_length=5)
    best, why = app.answer(short, " ".join(map(str, range(100, 112))))
    assert notices_of(best) == ["Only the latest 5 of these 12 items are used."]
    assert "The whole history: 5 items" in why and "Film number 11 " in why and "Film number 6 " not in why


def test_string_ids_and_samples_from_a_log(app, tmp_path):
    items = ["a b", "100%", "c,d", "[PAD]", "é"]
    save_checkpoint(tmp_path / "model", items)
    users = [user for user in range(20) for _ in items]
    pl.DataFrame({"user": users, "item": items * 20}).write_csv(tmp_path / "log.csv")
    served = app.load(str(tmp_path / "model"), str(tmp_path / "log.csv"))
    assert 1 < len(served.samples) <= app.NUM_SAMPLES
    sample = served.samples[0]
    assert served.tokenizer.decode_items([*sample.history, sample.next_item]) == items
    typed = served.text(sample.history)
    assert app.read_history(served, f"{typed} nope") == (
        sample.history,
        ["Ignored, because the model has no such items: nope."],
    )
    best, _ = app.answer(served, typed)
    assert "What this user took next: item é, number 1 here." in best
    assert served.search("item") == []
    with pytest.raises(ValueError, match="Cannot read histories from 'nothing.csv'"):
        app.load(str(tmp_path / "model"), "nothing.csv")


def test_built_in_histories_where_the_model_was_trained_on_them(app, tmp_path):
    items = sorted(set(generate_log()["item"].to_list()))
    save_checkpoint(tmp_path, items)
    assert len(app.load(str(tmp_path)).samples[0].history) == app.TOP_K  # the most popular
    (tmp_path / "run.yaml").write_text("data: null\nseed: 1\n")
    served = app.load(str(tmp_path))
    assert len(served.samples) == app.NUM_SAMPLES and len(served.samples[0].history) > 60
    (tmp_path / "run.yaml").write_text("data: mine.csv\n")
    assert len(app.load(str(tmp_path)).samples) == 1


def test_a_checkpoint_on_the_hub(app, checkpoint, served, local_hub):
    push(checkpoint, "ada/films", token="hf_writer")
    pulled = app.load("ada/films")
    assert pulled.titles == served.titles
    assert app.answer(pulled, "101 102") == app.answer(served, "101 102")
    with pytest.raises(ValueError, match="^Cannot load 'ada/nothing'"):
        app.load("ada/nothing")


def test_search_takes_words_in_any_order(served):
    assert [served.label(item) for item in served.search("odd FILM 3")] == [
        f"Film number {number} <odd>" for number in (3, 13, 23, 31, 33)
    ]
    assert served.label(served.search("number 2")[0]) == "Film number 2 <even>"
    assert served.search(" ") == served.search("no such title") == served.search("999") == []


def test_what_cannot_be_loaded_is_told_in_one_sentence(app, checkpoint, tmp_path):
    other, broken, grown = (shutil.copytree(checkpoint, tmp_path / name) for name in ("other", "broken", "grown"))
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (other / "config.json").write_text('{"model_type": "bert"}')
    (broken / "model.safetensors").write_bytes(b"no weights")
    BlossomRecTokenizer.from_items(range(50)).save_pretrained(grown)
    for folder, words in (
        (other, "'bert', not to a BlossomRec model"),
        (broken, "model.safetensors"),
        (grown, "tokenizer has 52 ids, its model 42"),
        (unfinished, "Has its training finished?"),
        (tmp_path / "nowhere", ""),
    ):
        with pytest.raises(ValueError) as caught:
            app.load(str(folder))
        message = str(caught.value)
        assert message.startswith(f"Cannot load {str(folder)!r}") and words in message and "\n" not in message


def test_the_files_of_the_space_agree_with_the_package():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert (SPACE / "requirements.txt").read_text().split() == project["dependencies"]
    front = yaml.safe_load((SPACE / "README.md").read_text().split("---")[1])
    assert front["sdk"] == "gradio" and (SPACE / front["app_file"]).is_file()
    assert len(front["short_description"]) <= 60
    (needed,) = project["optional-dependencies"]["space"]
    least, below = re.fullmatch(r"gradio>=([\d.]+),<(\d+)", needed).groups()
    assert least == front["sdk_version"].removesuffix(".0") and int(least.split(".")[0]) < int(below)


# -- in a browser ----------------------------------------------------------------------------------

LOW_CONTRAST = """
const channels = color => (color.match(/[\\d.]+/g) || []).map(Number);
const luminance = rgb => rgb.slice(0, 3).map(c => c / 255).map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
  .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
const background = e => { for (; e; e = e.parentElement) {
  const c = channels(getComputedStyle(e).backgroundColor); if (c.length === 3 || c[3] > 0.5) return c; } return [255, 255, 255]; };
return [...document.querySelectorAll('main *')].filter(e => e.offsetParent && !e.closest('svg') &&
  [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())).map(e => {
    const [a, b] = [luminance(channels(getComputedStyle(e).color)), luminance(background(e))];
    return [e.innerText.slice(0, 40), (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)]; }).filter(e => e[1] < 4.5);
"""


@pytest.fixture(scope="module")
def address(checkpoint, tmp_path_factory):
    """Where a Space runs: its files and the package in one folder, the model told by the environment."""
    pytest.importorskip("gradio")
    folder = shutil.copytree(SPACE, tmp_path_factory.mktemp("space") / "space")
    shutil.copytree(REPOSITORY / "src" / "blossomrec_hf", folder / "blossomrec_hf")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "BLOSSOMREC_MODEL": str(checkpoint),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
    }
    with (folder / "log").open("w") as log:
        command = [sys.executable, "app.py", "--port", str(port)]
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(720):
            assert process.poll() is None, (folder / "log").read_text()
            try:
                urllib.request.urlopen(address, timeout=5).close()
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.25)
        else:
            raise TimeoutError((folder / "log").read_text())
        yield address
    finally:
        process.terminate()
        process.wait(10)


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield browser
    browser.quit()


class Person:
    """Someone at the page, with a keyboard only."""

    def __init__(self, browser, address, width, scheme):
        from selenium.webdriver import ActionChains, Keys

        self.browser, self.actions, self.keys = browser, ActionChains, Keys
        screen = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        scheme = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", scheme)
        browser.get(address)

    def press(self, *keys, held=None):
        actions = self.actions(self.browser)
        if held:
            actions.key_down(held).send_keys(*keys).key_up(held).perform()
        else:
            actions.send_keys(*keys).perform()

    def tab_to(self, label):
        for _ in range(40):
            if label in (self.browser.switch_to.active_element.accessible_name or ""):
                return
            self.press(self.keys.TAB)
        raise AssertionError(f"no way by Tab to {label!r}")

    def sees(self, *texts, seconds=60):
        """Waits until all of `texts` are on the page."""
        deadline = time.monotonic() + seconds
        while not all(text in self.page() for text in texts):
            assert time.monotonic() < deadline, f"{texts} not in: {self.page()}"
            time.sleep(0.1)

    def page(self):
        return self.browser.execute_script("return document.body.innerText")

    def history(self):
        return self.browser.execute_script("return document.querySelector('#history textarea').value")


@pytest.mark.browser
@pytest.mark.parametrize("width, scheme", [(375, "light"), (1280, "dark")])
def test_in_a_browser(browser, address, tmp_path, width, scheme):
    person = Person(browser, address, width, scheme)
    person.sees("Recommended next", "Why these", "Layer 2", "The most popular items")

    person.tab_to("The history")
    typed = " ".join(str(random.randrange(100, 125)) for _ in range(70))  # leaves more than ten unseen
    person.press("a", held=person.keys.CONTROL)
    person.press(f"{typed} foo 7", person.keys.ENTER)
    person.sees("item ids: foo.", "such items: 7.", "The whole history: 70 items", "selected them with importance")
    assert browser.execute_script("return document.querySelectorAll('#best li').length") == 10

    person.press(person.keys.TAB, held=person.keys.SHIFT)
    person.tab_to("Add an item by its title")
    person.press("number 17", person.keys.ENTER)
    person.sees("The whole history: 71 items")
    assert person.history() == f"{typed} foo 7 117"
    person.press("even number 2")
    person.sees("Film number 12 <even>")
    person.tab_to("Film number 12 <even>")
    person.press(person.keys.ENTER)
    person.sees("The whole history: 72 items")
    assert person.history().endswith(" 117 112")

    person.tab_to("The whole history")
    person.press(person.keys.ENTER)
    person.sees("Film number 17 <odd>")

    browser.save_screenshot(str(tmp_path / f"{width}.png"))
    assert (tmp_path / f"{width}.png").stat().st_size > 10_000
    scroll, inner = browser.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
    assert scroll <= inner == width
    assert ("dark" in browser.execute_script("return document.body.className")) == (scheme == "dark")
    assert browser.execute_script(LOW_CONTRAST) == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert asked and all(url.startswith((address, "data:", "blob:")) for url in asked)
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
