"""Predictions: each has choices or a number, its answer says the right one, a browser keeps what was said."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from browser import chromium
from test_book import CHAPTERS, cells

ROOT = Path(__file__).parent.parent
IN_WORDS = {"three": "3", "nine": "9", "sixteen": "16"}


class Foldings(HTMLParser):
    """Collects the details elements of a cell, each with its attributes and the text behind its summary."""

    def __init__(self, source: str):
        super().__init__()
        self.found, self.depth = [], []
        self.feed(source)

    def handle_starttag(self, tag, attributes):
        self.depth.append(tag)
        if tag == "details":
            self.found.append((dict(attributes), []))

    def handle_endtag(self, tag):
        while self.depth and self.depth.pop() != tag:
            pass

    def handle_data(self, data):
        if self.depth == ["details"]:
            self.found[-1][1].append(data)


def foldings(path: Path) -> list[tuple[dict, str]]:
    texts = [cell["source"] for cell in cells(path) if cell["cell_type"] == "markdown"]
    found = [each for text in texts if "<details" in text for each in Foldings(text).found]
    return [(attributes, " ".join("".join(said).split())) for attributes, said in found]


def questions(path: Path) -> list[tuple[dict, str]]:
    return [each for each in foldings(path) if {"data-choices", "data-number"} & each[0].keys()]


QUESTIONS = [
    pytest.param(attributes, said, id=f"{path.stem}-{attributes.get('id')}")
    for path in CHAPTERS
    for attributes, said in questions(path)
]


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_three_predictions_a_chapter_count(path):
    asked = [attributes for attributes, _ in questions(path)]
    assert [one["class"] for one in asked].count("answer") == 3
    names = [one["id"] for one in asked]
    assert len(set(names)) == len(names), "what a browser keeps, it keeps by these"
    for one in asked:
        begins = {"answer": "predict-", "solution": "question-"}[one["class"]]
        assert re.fullmatch(rf"{begins}[a-z]+(-[a-z]+)*", one["id"])


def test_most_chapters_ask_something_in_their_exercises():
    asking = [path for path in CHAPTERS if "question-" in str(questions(path))]
    assert len(asking) > len(CHAPTERS) / 2


@pytest.mark.parametrize("attributes, said", QUESTIONS)
def test_the_right_one_is_what_the_answer_says(attributes, said):
    """In the answer's words, which the notebooks' assertions hold to the rows; or data-says quotes these."""
    known = {"class", "id", "data-ask", "data-says", "data-choices", "data-right"}
    quotes = attributes["data-says"].split(" | ") if "data-says" in attributes else []
    assert not [quote for quote in quotes if quote not in said], said
    if "data-choices" in attributes:
        choices = attributes["data-choices"].split(" | ")
        assert 2 <= len(choices) <= 5 and len({choice.casefold() for choice in choices}) == len(choices)
        assert all(
            choice == choice.strip() and 2 <= len(choice) <= 90 and "|" not in choice for choice in choices
        )
        right = attributes["data-right"]
        assert right in choices
        assert quotes or re.search(rf"(?<!\w){re.escape(right)}(?!\w)", said, flags=re.I), f"{right}: {said}"
    else:
        known = known - {"data-choices", "data-right"} | {"data-number", "data-within", "data-unit"}
        number, within = attributes["data-number"], float(attributes["data-within"])
        assert attributes["data-ask"], "the label of the field"
        assert 0 <= within <= float(number) / 2, "or nothing would be a right answer as well"
        for word, digits in IN_WORDS.items():
            said = re.sub(rf"\b{word}\b", digits, said, flags=re.I)
        assert re.search(rf"(?<![\d.,]){re.escape(number)}(?![\d]|[.,]\d)", said), f"{number}: {said}"
    assert attributes.keys() <= known


def test_no_place_in_the_list_is_always_right():
    asked = [one.values[0] for one in QUESTIONS if "data-right" in one.values[0]]
    places = [one["data-choices"].split(" | ").index(one["data-right"]) for one in asked]
    assert all(places.count(place) < len(places) / 2 for place in places)


# In a browser: the front page and one chapter.

CHAPTER = "other_sizes"  # has a number, choices, and a question in an exercise
RIGHT = {"predict-marked-tokens": "24", "predict-the-middle": 2, "predict-rescaled-rotary": 3}
BLOCKED = 'Object.defineProperty(window, "localStorage", {get() { throw new Error("storage is blocked"); }})'
BROKEN = f"localStorage.setItem('cpvt-predictions:book/{CHAPTER}', '[7,')"
# It does not expect that storage may be blocked.
OF_THE_THEME = r"storage is blocked(?!.*predictions\.js)|Got invalid theme mode: undefined"


@pytest.fixture(scope="module")
def browser():
    with chromium() as page:
        yield page.context.browser


@pytest.fixture
def reader(browser, built_book):
    """-> a function that opens a page of the book in one and the same profile; no script may complain."""
    context, heard = browser.new_context(offline=True, viewport={"width": 375, "height": 800}), []
    context.set_default_timeout(60_000)

    def opened(name: str, script: str = ""):
        page = context.new_page()
        page.add_init_script(script)
        page.on("pageerror", lambda error: heard.append(f"{error}\n{error.stack}"))
        page.on("console", lambda said: heard.append(said.text) if said.type == "error" else None)
        page.goto((built_book / name).as_uri())
        return page

    yield opened
    context.close()
    assert not [text for text in heard if not re.search(OF_THE_THEME, text, flags=re.S)]


def commit(page, name: str, answer) -> None:
    """By keyboard alone: to the field, choose or type, Enter."""
    field = page.locator(f"#mine-{name} input")
    field.first.focus()
    if isinstance(answer, str):
        page.keyboard.type(answer)
        page.keyboard.press("Enter")
        return
    page.keyboard.press("Space")
    for _ in range(answer - 1):
        page.keyboard.press("ArrowDown")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.tagName") == "BUTTON"
    page.keyboard.press("Enter")


def verdict(page, name: str) -> str:
    return page.locator(f"#mine-{name} [role=status]").inner_text()


def is_open(page, name: str) -> bool:
    return page.locator(f"#{name}").evaluate("node => node.open")


def blurred(page, name: str) -> str:
    """The filter of the result below an answer."""
    return page.locator(f"#{name} + .cell .cell_output").evaluate("node => getComputedStyle(node).filter")


def tally(page) -> list[str]:
    return page.locator(".prediction-tally > div > p").all_inner_texts()


def test_a_reader_commits_and_the_page_remembers(reader):
    page = reader(f"book/{CHAPTER}.html")
    assert tally(page) == ["3 predictions: 3 still open.", "1 exercise question: 1 still open."]
    assert blurred(page, "predict-rescaled-rotary") != "none"
    page.locator("#mine-predict-the-middle button").click()  # nothing is chosen, so nothing happens
    assert not is_open(page, "predict-the-middle") and verdict(page, "predict-the-middle") == ""

    asked = "#" + page.locator("#mine-predict-the-middle fieldset").get_attribute("aria-describedby")
    assert page.locator(asked).inner_text().startswith("Predict.")
    for name, answer in RIGHT.items():
        commit(page, name, answer if name != "predict-the-middle" else 3)
        assert is_open(page, name)
        assert page.evaluate("document.activeElement.getAttribute('role')") == "status"
    assert "Right. You said: 24 %. Found: 23 %. (Within 2 points counts as right.)" in verdict(
        page, "predict-marked-tokens"
    )
    assert "Right. You said: ahead of the table." in verdict(page, "predict-rescaled-rotary")
    said = "Not right. You said: raw: in the middle, rescaled: between tokens 5 and 6. "
    said += "Found: raw: between tokens 5 and 6, rescaled: in the middle."
    assert said in verdict(page, "predict-the-middle")
    assert blurred(page, "predict-rescaled-rotary") == "none"
    assert not page.locator("#mine-predict-the-middle form").is_visible(), "no second thoughts"

    page.reload()
    assert said in verdict(page, "predict-the-middle") and is_open(page, "predict-the-middle")
    assert not page.locator("#mine-predict-the-middle form").is_visible()
    assert tally(page)[0] == "3 predictions: 2 right, 1 wrong."
    for link in page.locator(".prediction-tally a").all():
        assert page.locator(link.get_attribute("href")).count() == 1

    front = reader("index.html")
    assert "Your predictions so far: 2 right, 1 wrong." in front.locator(".prediction-sum").inner_text()

    page.locator(".prediction-tally button").click()
    assert (
        tally(page)[0] == "3 predictions: 3 still open."
        and "Forgotten" in page.locator(".prediction-done").inner_text()
    )
    assert "cpvt" not in page.evaluate("Object.keys(localStorage).join()")
    assert page.locator("#mine-predict-the-middle form").is_visible() and not is_open(
        page, "predict-the-middle"
    )
    page.reload()
    assert tally(page)[0] == "3 predictions: 3 still open."
    front.reload()
    assert front.locator(".prediction-sum").count() == 0


def test_whoever_looks_first_has_looked(reader):
    page = reader(f"book/{CHAPTER}.html")
    page.locator("#predict-the-middle > summary").press("Enter")
    assert is_open(page, "predict-the-middle") and "You opened the answer first." in verdict(
        page, "predict-the-middle"
    )
    assert tally(page)[0] == "3 predictions: 1 looked up, 2 still open."
    page.reload()
    assert not page.locator("#mine-predict-the-middle form").is_visible()


def test_a_question_of_an_exercise_leaves_the_solution_closed(reader):
    page = reader(f"book/{CHAPTER}.html")
    commit(page, "question-matching-size", 3)
    assert "Right. You said: above size." in verdict(page, "question-matching-size")
    assert not is_open(page, "question-matching-size")
    assert tally(page) == ["3 predictions: 3 still open.", "1 exercise question: 1 right."]


@pytest.mark.parametrize("script", [BLOCKED, BROKEN], ids=["blocked", "broken"])
def test_without_storage_or_with_a_broken_one_a_visit_still_counts(reader, script):
    page = reader(f"book/{CHAPTER}.html", script)
    commit(page, "predict-marked-tokens", "50")
    assert "Not right. You said: 50 %. Found: 23 %." in verdict(page, "predict-marked-tokens")
    assert tally(page)[0] == "3 predictions: 1 wrong, 2 still open."
    page.locator(".prediction-tally button").click()
    assert tally(page)[0] == "3 predictions: 3 still open."


def test_fields_are_large_enough_to_touch_and_paper_has_none_of_them(reader):
    page = reader(f"book/{CHAPTER}.html")
    small = """(all) => [...document.querySelectorAll(all)].map((node) => node.getBoundingClientRect())
      .filter((box) => box.height < 24 || box.width < 24).length"""
    all_of_them = ".prediction label, .prediction form button, .prediction-tally a, .prediction-tally li"
    assert page.locator(".prediction label").count() > 6 and page.evaluate(small, all_of_them) == 0
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.emulate_media(media="print")
    for block in page.locator(".prediction, .prediction-tally").all():
        assert not block.is_visible()
    assert page.locator("#predict-the-middle").is_visible()
