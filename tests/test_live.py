"""The live views of the built pages: their numbers against PyTorch's in float64, each view as a reader uses it.

Pages are opened from the disk, without a network.
"""

import base64
import gc
import json
import shutil
import sys
from functools import cache
from pathlib import Path
from urllib.parse import parse_qs

import numpy
import pytest
import torch
from browser import chromium

from cpvt.config import ModelConfig
from cpvt.lab import shifting
from cpvt.lab.pictures import photograph
from cpvt.model.vit import VisionTransformer

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "book" / "_ext"))
live_models = pytest.importorskip("live_models", reason="book/_ext is not there")

CLOSE = 1e-10
MODELS = [f"{task}-{name}" for name in live_models.FILES.values() for task in ("photographs", "where")]
DRAWN = {  # with weights that are drawn: encodings and readers that no kept model has
    "sine": dict(encoding="sine"),
    "sine rescaled": dict(encoding="sine(resize='rescale')"),
    "rotary": dict(encoding="rotary"),
    "rotary rescaled": dict(encoding="rotary(resize='rescale')"),
    "wide kernel": dict(encoding="peg(kernel=5, padding='circular')"),
    "two of both": dict(encoding="learned + peg(positions=(-1, 1))"),
    "pooled": dict(encoding="learned", global_pool="avg"),
    "pooled PEG": dict(encoding="peg(positions=(0, 1, 2))", global_pool="avg"),
}

# What a page computes: arrays go to Python and back as base64 of their bytes.
HELPERS = """
const bytes = (x) => { const b = new Uint8Array(x.buffer, x.byteOffset, x.byteLength); let s = "";
  for (let i = 0; i < b.length; i += 4096) s += String.fromCharCode(...b.subarray(i, i + 4096)); return btoa(s); };
const numbers = (text) => new Float64Array(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer);
"""
FORWARD = """async ([name, image, height, width]) => {
  const found = await live.run(name, { image: numbers(image), height, width }, { all: true });
  const { added, features, logits, maps, attention } = found;
  return [added, features, logits, ...maps, ...attention].map(bytes);
}"""
FAULTY = """async ([name, image, height, width, from, to]) => {
  const source = visionTransformer.toString();
  if (!source.includes(from)) throw Error(`no such code: ${from}`);
  const { config, weights } = await live.load(name);
  const { VisionTransformer } = eval(`(${source.replaceAll(from, to)})()`);
  const found = new VisionTransformer(config, weights).forward(numbers(image), height, width, { all: true });
  return [found.added, found.features, found.logits, ...found.maps, ...found.attention].map(bytes);
}"""


def to_page(x: torch.Tensor) -> str:
    return base64.b64encode(x.double().contiguous().numpy().tobytes()).decode()


def from_page(text: str) -> torch.Tensor:
    return torch.from_numpy(numpy.frombuffer(base64.b64decode(text), numpy.float64).copy())


@pytest.fixture(scope="module")
def page(built_book):
    """The chapter of the moving picture, with all that its live view loads; and it throws no error."""
    with chromium() as page:
        errors = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto((built_book / "book" / "when_the_picture_moves.html").as_uri())
        page.add_script_tag(content=HELPERS)
        yield page
        assert not errors


@cache
def kept(name: str) -> VisionTransformer:
    return live_models.rounded(live_models.live_models()[name])


def drawn(name: str) -> VisionTransformer:
    sizes = dict(image_size=(32, 32), patch_size=4, num_classes=5, width=32, depth=3, heads=2, init_std=0.1)
    model = VisionTransformer(ModelConfig(**sizes | DRAWN[name]))
    model.draw(0)
    with torch.no_grad():  # biases that are not zero, a table that is not small
        for i, (key, value) in enumerate(model.named_parameters()):
            if value.dim() == 1 or key in ("pos_embed", "cls_token"):
                value += 0.3 * torch.randn(value.shape, generator=torch.Generator().manual_seed(i))
    return model


@torch.no_grad()
def by_pytorch(model: VisionTransformer, image: torch.Tensor) -> list[torch.Tensor]:
    """added, features, logits, maps before block 0 and after each, attention of each: in the page's order."""
    weights = []
    hooks = [
        block.attn.attn_drop.register_forward_hook(lambda m, x, out: weights.append(out[0]))
        for block in model.blocks
    ]
    for block in model.blocks:
        block.attn.fused_attn = False
    x = shifting.normalise(image.double())[None]
    tokens = model.forward_features(x)
    for hook in hooks:
        hook.remove()
    maps = [m.flatten(1).T for m in shifting.token_maps(model, image)]
    added = shifting.added_map(model, image).flatten(1).T
    features = model.forward_head(tokens, pre_logits=True)[0]
    return [t.flatten() for t in (added, features, model(x)[0], *maps, *weights[: len(model.blocks)])]


def scene(model: VisionTransformer, height: int, width: int) -> torch.Tensor:
    """The cat; for models of one-pixel patches so many pixels of it."""
    p = model.config.patch_size
    return photograph("chelsea", max(height, width) * p)[:, : height * p, : width * p].double()


def difference(page, name: str, model: VisionTransformer, image: torch.Tensor, fault=None) -> float:
    """The largest difference between a page and PyTorch, relative to the largest number of each array."""
    arguments = [name, to_page(image), *image.shape[1:], *(fault or ())]
    found = [from_page(text) for text in page.evaluate(FAULTY if fault else FORWARD, arguments)]
    wanted = by_pytorch(model, image)
    assert len(found) == len(wanted) and all(f.shape == w.shape for f, w in zip(found, wanted, strict=True))
    assert all(w.isfinite().all() for w in found)
    gaps = [
        float((f - w).abs().max() / w.abs().max().clamp(min=1)) for f, w in zip(found, wanted, strict=True)
    ]
    return max(gaps)


@pytest.mark.parametrize("name", MODELS)
def test_the_weights_of_the_page_are_those_of_the_export(page, name):
    state = kept(name).state_dict()
    keys = page.evaluate("async (name) => Object.keys((await live.load(name)).weights)", name)
    assert keys == list(state)
    texts = page.evaluate("async (name) => Object.values((await live.load(name)).weights).map(bytes)", name)
    for text, (key, value) in zip(texts, state.items(), strict=True):
        assert torch.equal(from_page(text), value.flatten()), key


@pytest.mark.parametrize("name", MODELS)
def test_kept_models_compute_what_pytorch_does(page, name, record_property):
    model, n = kept(name), kept(name).config.grid[0]
    largest = 0.0
    for height, width in ((n, n), (n + 4, n + 4), (6, 10), (16, 16) if n == 8 else (14, 14)):
        image = scene(model, height, width)
        for pixels, down in ((0, 0), (4, 0), (3, -5)):
            largest = max(largest, difference(page, name, model, shifting.slide_on_ring(image, pixels, down)))
            if height > n:
                break
    record_property("difference", largest)
    assert largest < CLOSE


@pytest.mark.parametrize("name", DRAWN)
def test_other_encodings_and_readers_compute_what_pytorch_does(page, name):
    script, weights = live_models.model_script(name, drawn(name))
    page.add_script_tag(content=script)
    page.evaluate("(name) => live.given(name)", name)
    model = VisionTransformer(drawn(name).config).double().eval()
    model.load_state_dict(weights)
    for height, width in ((8, 8), (12, 6)):
        assert difference(page, name, model, scene(model, height, width)) < CLOSE


FAULTS = {
    "zeros beyond the border, wrapped": ("one-peg", 'padding === "circular"', "true"),
    "circular, not wrapped": ("circular-peg", 'padding === "circular"', "false"),
    "a kernel that is turned": ("one-peg", "(i * k + u) * k + v", "(i * k + v) * k + u"),
    "epsilon of the norms": ("none", "EPSILON = 1e-6", "EPSILON = 1e-5"),
    "another GELU": ("none", "0.5 * (1 + erf(x[i] * Math.SQRT1_2))", "1 / (1 + Math.exp(-1.702 * x[i]))"),
    "GELU by tanh": (
        "none",
        "erf(x[i] * Math.SQRT1_2)",
        "Math.tanh(0.7978845608 * (x[i] + 0.044715 * x[i] ** 3))",
    ),
    "order of the heads": ("none", "t * D + head * d)", "t * D + (h - 1 - head) * d)"),
    "scale of the logits": ("none", "Math.sqrt(d)", "Math.sqrt(D)"),
    "another bicubic": ("learned-table", "(1.25 * t - 2.25)", "(1.5 * t - 2.5)"),
    "corners aligned": ("learned-table", "((i + 0.5) * old) / size - 0.5", "(i * (old - 1)) / (size - 1)"),
    "mean of the images": ("none", "- mean[c]", ""),
    "frequencies": ("sine", "base ** (-i / n)", "base ** (-i / (n - 1))"),
    "sine before cosine": ("sine", "Math.sin(angles[half + i])", "Math.cos(angles[half + i])"),
    "frequencies of rotary": ("rotary", "part.theta", "2 * part.theta"),
    "pairs of rotary": ("rotary", "vectors[b] * cos]", "-vectors[b] * cos]"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_noticed(page, fault):
    named, *change = FAULTS[fault]
    if named in DRAWN:
        script, weights = live_models.model_script(named, drawn(named))
        page.add_script_tag(content=script)
        page.evaluate("(name) => live.given(name)", named)
        model = VisionTransformer(drawn(named).config).double().eval()
        model.load_state_dict(weights)
        name = named
    else:
        name = f"photographs-{named}"
        model = kept(name)
    image = scene(model, 12, 12)
    assert difference(page, name, model, image) < CLOSE < difference(page, name, model, image, change)


def test_pictures_and_changes_are_those_of_the_package(page):
    """The functions of live.js that are named as those of cpvt/lab/shifting.py."""
    picture = """([image, side]) => ({ image: numbers(image), height: side, width: side })"""
    image, large, small = (
        photograph(name, side).double() for name, side in (("coffee", 32), ("rocket", 48), ("chelsea", 8))
    )
    for right, down in ((0, 0), (5, -3), (-8, 4), (31, 7)):
        text = page.evaluate(
            f"(a) => bytes(live.slideOnRing(({picture})(a), {right}, {down}).image)", [to_page(image), 32]
        )
        assert torch.equal(from_page(text).view(3, 32, 32), shifting.slide_on_ring(image, right, down))
    for right, down in ((0, 0), (8, -8), (-3, 2)):
        text = page.evaluate(
            f"(a) => bytes(live.slideWindow(({picture})(a), {right}, {down}, 32).image)", [to_page(large), 48]
        )
        assert torch.equal(from_page(text).view(3, 32, 32), shifting.slide_window(large, right, 32, down))
    sky = torch.tensor([0.62, 0.76, 0.9], dtype=torch.float64)[:, None, None].expand(3, 32, 32)
    text = page.evaluate(
        f"(a) => bytes(live.placeOn([0.62, 0.76, 0.9], 32, ({picture})(a), 3, 11).image)", [to_page(small), 8]
    )
    assert torch.equal(from_page(text).view(3, 32, 32), shifting.place_on(sky, small, 3, 11))
    for side in (32, 20, 48):  # from 96 pixels; where whole pixels fit, PyTorch's mean of each area
        text = page.evaluate(
            f"(a) => bytes(live.areaResize(({picture})(a), {side}).image)",
            [to_page(photograph("coffee", 96)), 96],
        )
        found = from_page(text).view(3, side, side)
        wanted = photograph("coffee", 96).double()
        assert found.mean() == pytest.approx(float(wanted.mean()), abs=1e-12)
        if 96 % side == 0:
            assert torch.allclose(found, torch.nn.functional.adaptive_avg_pool2d(wanted, side), atol=1e-14)
    before = torch.randn(6, 8, 8, dtype=torch.float64)
    after = before.roll((1, -2), (-2, -1))
    after[:, 3:5] += 0.1
    for right, down, wrap in ((-8, 4, True), (-7, 3, True), (-8, 4, False), (2, 0, True), (0, 0, False)):
        maps = [to_page(m.flatten(1).T) for m in (before, after)]
        script = "([a, b, ...rest]) => bytes(live.shiftChange(numbers(a), numbers(b), ...rest))"
        found = from_page(page.evaluate(script, [*maps, right, down, 4, [8, 8], wrap])).view(8, 8)
        wanted = shifting.shift_change(before, after, right, 4, wrap, down)
        assert torch.allclose(found, wanted, atol=1e-12, equal_nan=True) and torch.equal(
            found == 0, wanted == 0
        )


# --------------------------------------------------------------------------- each view, as a reader uses it


def opened(page, built_book, file: str, address: str = "") -> None:
    page.goto("about:blank")
    page.goto((built_book / file).as_uri() + address)
    page.locator(".live").scroll_into_view_if_needed()
    settled(page)


def control(page, name: str):
    return page.get_by_label(name, exact=True)


def settled(page) -> None:
    """The view shows what was last asked for, and has said so."""
    page.wait_for_function("""() => {
      const box = document.querySelector(".live"), said = box.querySelector(".live-status");
      return box.ariaBusy === "false" && said?.textContent && !("waiting" in said.dataset);
    }""")


def test_move_counts_exact_tokens_and_is_worked_by_keyboard_and_pointer(page, built_book):
    opened(page, built_book, "book/when_the_picture_moves.html")
    counts = page.locator(".live-change + p")
    assert [int(text.split()[0]) for text in counts.all_text_contents()] == [64, 0, 40, 64]
    page.locator(".live-stage").focus()
    page.keyboard.press("Shift+ArrowRight")
    settled(page)
    exact = [int(text.split()[0]) for text in counts.all_text_contents()]
    assert exact == [64, 0, 32, 64]
    assert "8 pixels right, 2 tokens, 0 pixels down" in page.locator(".live-status").text_content()
    page.keyboard.press("ArrowDown")
    settled(page)
    assert [int(text.split()[0]) for text in counts.all_text_contents()] == [0, 0, 0, 0]
    box = page.locator(".live-stage").bounding_box()
    page.mouse.move(box["x"] + 20, box["y"] + 20)
    page.mouse.down()
    step = box["width"] / 32
    page.mouse.move(box["x"] + 20 + 4 * step, box["y"] + 20 + 7 * step, steps=5)
    page.mouse.up()
    settled(page)
    assert [control(page, name).input_value() for name in ("pixels right", "pixels down")] == ["12", "8"]
    exact = [int(text.split()[0]) for text in counts.all_text_contents()]
    # the models as the page has them, in PyTorch
    image = torch.from_numpy(
        numpy.frombuffer(
            base64.b64decode(live_models.shared_data()["photographs"]["chelsea"]), numpy.uint8
        ).copy()
    )
    image = torch.nn.functional.adaptive_avg_pool2d(image.view(3, 96, 96).double() / 255, 32)
    moved, wanted = shifting.slide_on_ring(image, 12, 8), []
    for name in ("none", "learned-table", "one-peg", "circular-peg"):
        view = shifting.shifted_view(kept(f"photographs-{name}"), image, moved, 12, 0, down=8)
        wanted.append(int((view.change == 0).sum()))
    assert exact == wanted and wanted[2] == 16


def test_a_view_comes_back_by_its_address(page, built_book):
    opened(page, built_book, "book/when_the_picture_moves.html")
    control(page, "how it moves").select_option(label="the camera pans")
    control(page, "which map").select_option(label="after block 3")
    control(page, "model of column 2").select_option(label="three PEGs")
    control(page, "pixels right").fill("-6")
    settled(page)
    said = page.locator(".live-status").text_content()
    address = page.get_by_role("link", name="link to this view").get_attribute("href")
    assert parse_qs(address.removeprefix("#live?"))["x"] == ["-6"]
    page.wait_for_function("(address) => location.hash === address", arg=address)
    opened(page, built_book, "book/when_the_picture_moves.html", address)
    assert page.locator(".live-status").text_content() == said and "three PEGs" in said
    # what nobody can show is not shown
    opened(
        page,
        built_book,
        "book/when_the_picture_moves.html",
        "#live?x=1e9&way=up&block=99&picture=dog&models=a~b",
    )
    assert page.locator(".live-change + p").count() == 4
    assert control(page, "pixels right").input_value() == "0"  # once round the ring, often


def test_move_takes_an_image_of_the_readers(page, built_book, tmp_path):
    from PIL import Image

    Image.fromarray((255 * photograph("astronaut", 200).permute(1, 2, 0)).byte().numpy()).save(
        tmp_path / "mine.png"
    )
    (tmp_path / "not.png").write_text("no image")
    opened(page, built_book, "index.html")
    before = page.locator(".live-answer").first.text_content()
    page.locator(".live input[type=file]").set_input_files(tmp_path / "mine.png")
    page.wait_for_function("() => document.querySelector('.live-stage').ariaLabel.includes('your image')")
    settled(page)
    after = page.locator(".live-answer").first.text_content()
    assert after != before
    page.locator(".live input[type=file]").set_input_files(tmp_path / "not.png")
    page.wait_for_function("() => document.querySelector('.live-wrong').textContent.includes('no image')")
    assert page.locator(".live-answer").first.text_content() == after


def test_the_light_goes_out_where_the_theorem_says(page, built_book):
    opened(page, built_book, "book/how_far_it_sees.html")
    for model, reach in (
        ("one PEG", 1),
        ("two PEGs", 3),
        ("no encoding", -1),
        ("one circular PEG", -1),
        ("a learned table", 9),
    ):
        control(page, "encoding").select_option(label=model)
        for size in (10, 14):
            control(page, "grid").select_option(value=str(size))
            for d in range(min(6, size // 2)):
                control(page, "row").fill(str(size // 2))
                control(page, "column").fill(str(d))
                settled(page)
                light = page.locator(".live-lamp").get_attribute("data-light")
                change = float(page.locator(".live").get_attribute("data-change"))
                assert light == ("on" if d <= reach else "off"), (model, size, d, change)
                assert change > 1e-12 if d <= reach else change < 1e-12


def test_any_grid_from_6_to_24_runs(page, built_book):
    opened(page, built_book, "book/other_sizes.html")
    assert control(page, "tokens a side").input_value() == "8"
    for size, marked in ((6, 20), (24, 92), (12, 44)):  # of the PEG: the outermost ring
        control(page, "tokens a side").fill(str(size))
        settled(page)
        said = page.locator(".live-status").text_content()
        assert (
            said.startswith(f"{size} by {size} tokens")
            and f"one PEG: {marked} of {size**2} tokens marked" in said
        )
    row = page.locator(".live-now").first.text_content()
    mean, half = live_models.shared_data()["accuracy"]["learned-table"][12]
    assert row.split()[:1] == ["12"] and f"{mean:.1f} ± {half:.1f}" in row


@pytest.mark.parametrize("file", ["index.html", "book/peg_from_scratch.html"])
def test_the_other_pages_have_the_same_view(page, built_book, file):
    opened(page, built_book, file)
    assert page.locator(".live-table canvas").count() == 16
    assert page.locator(".live-answer li").count() == 12
    if "peg" in file:  # what is added: 32 tokens follow two tokens further right, as the chapter says
        assert control(page, "pixels right").input_value() == "8"
        exact = [int(text.split()[0]) for text in page.locator(".live-change + p").all_text_contents()]
        assert exact == [64, 0, 32, 64]


def test_a_model_that_is_missing_is_said(page, built_book):
    page.route("**/models/photographs-three-pegs.js", lambda route: route.abort())
    opened(page, built_book, "book/other_sizes.html")
    control(page, "model of column 1").select_option(label="three PEGs")
    page.get_by_text("The live view stopped: the model photographs-three-pegs did not load.").wait_for()
    page.unroute_all()


def test_without_scripts_a_sentence_stands_there(built_book):
    for file in ("index.html", "book/how_far_it_sees.html", "book/other_sizes.html"):
        text = (built_book / file).read_text(encoding="utf-8")
        assert "a live model stands here" in text.split('class="live"')[1][:400]


def test_all_models_together_are_small(built_book):
    folder = built_book / "_static" / "live" / "models"
    sizes = {path.stem: path.stat().st_size for path in folder.glob("*.js")}
    assert set(sizes) == {*MODELS, "data"}
    assert sum(sizes[name] for name in MODELS) <= 1_500_000, json.dumps(sizes)


FIREFOX = """const done = arguments[arguments.length - 1];
const view = document.querySelector(".live");
view.scrollIntoView();
const waiting = setInterval(() => {
  const said = view.querySelector(".live-status")?.textContent;
  if (view.ariaBusy !== "false" || !said) return;
  clearInterval(waiting);
  done(said);
}, 100);"""


# Its client's scripts do not see the page's constants; an element's do.
IN_PAGE = """delete document.body.dataset.found;
const script = document.createElement("script");
script.textContent = arguments[0];
document.body.append(script);"""
FOUND = """const done = arguments[0];
const waiting = setInterval(() => {
  if (!document.body.dataset.found) return;
  clearInterval(waiting);
  done(document.body.dataset.found);
}, 100);"""


def test_firefox_shows_and_computes_the_same(built_book, monkeypatch, tmp_path):
    """Debian's, driven by Mozilla's own client; .ci/run brings both."""
    driver = pytest.importorskip("marionette_driver.marionette", reason="marionette_driver is not installed")
    if not (firefox := shutil.which("firefox-esr") or shutil.which("firefox")):
        pytest.skip("no firefox: `apt-get install firefox-esr` (Debian) lets this test look at the pages")
    monkeypatch.setenv("HOME", str(tmp_path))  # it refuses a home of somebody else's
    monkeypatch.chdir(tmp_path)  # it writes a log where it is started
    browser = driver.Marionette(bin=firefox, headless=True, startup_timeout=120)
    browser.start_session()
    try:
        browser.timeout.script = 120
        said = {}
        for page in ("index", "book/how_far_it_sees", "book/other_sizes", "book/when_the_picture_moves"):
            browser.navigate((built_book / f"{page}.html").as_uri())
            said[page] = browser.execute_async_script(FIREFOX)
        assert said["index"].count("64 of 64 exact") == 2 and "cannot tell" in said["book/how_far_it_sees"]
        for name in ("photographs-learned-table", "where-three-pegs"):
            model = kept(name)
            image = scene(model, 12, 12)
            arguments = json.dumps([name, to_page(image), *image.shape[1:]])
            told = "(found) => document.body.dataset.found = found"
            script = f"{{ {HELPERS}; ({FORWARD})({arguments}).then({told}); }}"
            browser.execute_script(IN_PAGE, [script])
            texts = browser.execute_async_script(FOUND).split(",")
            found, wanted = [from_page(text) for text in texts], by_pytorch(model, image)
            assert max(float((f - w).abs().max()) for f, w in zip(found, wanted, strict=True)) < CLOSE
    finally:
        browser.quit()
        del browser
        gc.collect()  # it takes its profile away when it is collected, which fails when Python itself ends
