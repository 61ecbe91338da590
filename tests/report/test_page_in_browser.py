# SPDX-License-Identifier: Apache-2.0
"""The report's page in a real browser: it draws, its toggles work, it fits a phone."""

import urllib.parse

import browser
import fake_benchmark
import pytest
from test_page import MARKUP, embedded, report_without_plots, spoil

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        browser.find() is None, reason=f"no browser found, looked for {browser.NAMES}"
    ),
]
CELL = """[...document.querySelectorAll('#summary tbody tr')]
.map(row => [...row.querySelectorAll('.value')].map(v => v.firstChild.data))"""


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    one = browser.Browser(tmp_path_factory.mktemp("profile"))
    yield one
    one.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A page with two concepts and prompts, markup, nulls and a lost sheet."""
    folder = tmp_path_factory.mktemp("run")
    made = {"concepts": ("bomb", "a & <b>"), "prompts": ("name", "token")}
    data = fake_benchmark.write(folder, edit=spoil, steps=(75, 150), num=3, **made)
    lost = next(cell for cell in data["cells"] if cell["attack"] == "lora")
    (folder / lost["points"][-1]["sheet"]).unlink()
    report_without_plots(folder, "--pictures", "2")
    return folder / "report" / "index.html"


@pytest.fixture
def show(chromium, file):
    """Opens the page in a state; afterwards nothing may have been complained of."""

    def opened(width=1280, dark=False, **state):
        address = file.as_uri()
        if state:
            address += "#" + urllib.parse.urlencode(state, doseq=True)
        chromium.open(address, width, dark=dark)
        chromium.wait("document.querySelectorAll('#summary td').length > 0")
        return chromium

    yield opened
    assert chromium.problems == []
    others = [r for r in chromium.requests if not r.startswith(("data:", "file:"))]
    assert others == [] and len(chromium.requests) > 1


@pytest.fixture(scope="module")
def run(file):
    return embedded(file.read_text(encoding="utf-8"))["runs"][0]


def column(run, metric, over, label, side, concept=""):
    """The texts of one column as they are embedded, without what is not known."""
    match = [m["label"] for m in run["matches"]].index(label)
    numbers = run["gaps"][metric][over][concept][side][match]
    return [number["text"] for number in numbers if number]


def test_browser_complains_of_what_it_should(chromium, file, tmp_path):
    text = file.read_text(encoding="utf-8")
    bad = "<script>console.error('bad'); new Image().src = 'http://a.invalid/'</script>"
    (tmp_path / "bad.html").write_text(text.replace("</body>", bad), encoding="utf-8")
    chromium.open((tmp_path / "bad.html").as_uri())
    chromium.run("new Promise(done => setTimeout(done, 100))")
    told = " ".join(chromium.problems)
    assert "bad" in told and "Content Security Policy" in told


def test_page_draws_every_section(show, run):
    page = show()
    count = len(run["matches"])
    assert page.run("document.querySelectorAll('#trajectories figure').length") == count
    assert page.run("document.querySelectorAll('#tradeoff figure').length") == count
    assert page.run("document.querySelectorAll('#pictures img').length") > 0
    heads = page.run("document.querySelector('#summary thead').textContent")
    assert "Worst case, harmful" in heads and "any attack" in heads
    for words in ("NaN", "undefined", "[object"):
        assert words not in page.run("document.querySelector('main').textContent")


def test_state_in_the_address_is_what_is_shown(show, run):
    chosen = {"metric": "judge_image_similarity", "over": "peak", "attack": "lora_x3"}
    chosen |= {"prompt": "token", "concept": "a & <b>"}
    first = column(run, "classifier_accuracy", "mean", "lora (name)", "harmful")
    wanted = [
        column(
            run, "judge_image_similarity", "peak", "lora_x3 (token)", side, "a & <b>"
        )
        for side in ("harmful", "benign")
    ]
    assert wanted[0] != first and wanted[0] != wanted[1]
    page = show(**chosen)
    rows = page.run(CELL)
    assert [[row[-2] for row in rows], [row[-1] for row in rows]] == wanted
    assert page.run("document.querySelectorAll('#trajectories figure').length") == 1
    assert page.run("metric.value + over.querySelector(':checked').value") == (
        "judge_image_similaritypeak"
    )


def test_best_numbers_are_marked_on_the_page(show, run):
    page = show(metric="judge_image_similarity", over="final")
    numbers = run["gaps"]["judge_image_similarity"]["final"][""]
    lists = [*numbers["worst"][""].values(), *numbers["harmful"], *numbers["benign"]]
    best = [n["text"] for numbers in lists for n in numbers if n and n.get("best")]
    marked = page.run(
        "[...document.querySelectorAll('#summary .best .value')]"
        ".map(v => v.firstChild.data)"
    )
    assert best and sorted(marked) == sorted(best)


def test_click_changes_numbers_and_address(show, run):
    page = show(metric="judge_image_similarity", attack="dreambooth", prompt="name")
    before = page.run(CELL)
    wanted = column(
        run, "judge_image_similarity", "final", "dreambooth (name)", "benign"
    )
    assert wanted != [row[-1] for row in before]
    page.click("#over label:last-child")
    page.wait("location.hash.includes('over=final')")
    assert [row[-1] for row in page.run(CELL)] == wanted


def test_keys_move_the_toggles(show):
    page = show()
    page.run("document.querySelector('#over input').focus()")
    page.press("ArrowRight", 39)
    page.wait("location.hash.includes('over=peak')")
    assert page.run("document.activeElement.value") == "peak"
    page.run("document.querySelector('#attack').focus()")
    page.press("ArrowDown", 40)
    page.wait("location.hash.includes('attack=lora')")


def test_button_hides_a_method_in_plots_and_pictures(show):
    page = show()
    drawn = "document.querySelectorAll('#%s [data-method=gift]').length"
    for place in ("trajectories", "tradeoff", "pictures"):
        assert page.run(drawn % place) > 0
    page.click("[data-chips] [value=gift]")
    page.wait("location.hash.includes('hide=gift')")
    for place in ("trajectories", "tradeoff", "pictures"):
        assert page.run(drawn % place) == 0
    assert page.run("document.querySelector('[value=gift]').ariaPressed") == "false"


def test_pictures_follow_their_toggles(show):
    page = show(subject="a & <b>", side="benign", step="every", case="lora (token)")
    seen = page.run("[...document.querySelectorAll('#pictures img')].map(i => i.alt)")
    assert len(seen) == 3 * 3  # methods, and steps with the one before the attack
    assert all("First 2 of 3 pictures: a & <b>, benign" in text for text in seen)
    page.wait("[...document.images].every(i => i.complete && i.naturalWidth === 16)")
    page = show(side="kept")
    page.wait("document.querySelectorAll('#pictures img').length === 6")
    steps = page.run(
        "[...document.querySelectorAll('.strip')].map(s => s.dataset.step)"
    )
    assert set(steps) == {"0"}


def test_missing_sheet_is_told_on_the_page(show):
    page = show(subject="bomb", side="harmful", case="lora (name)")
    note = page.run("document.querySelector('.absent').textContent")
    assert note.startswith("No picture: not in this folder: cells/bomb/original")


def test_name_with_markup_is_shown_as_text(show):
    page = show()
    names = page.run(
        "[...document.querySelectorAll('#summary tbody th')].map(h => h.textContent)"
    )
    assert MARKUP in names
    assert page.run("typeof hacked") == "undefined"


@pytest.mark.parametrize("dark", [False, True])
def test_colours_follow_the_system_and_the_toggle(show, dark):
    page = show(dark=dark)
    paper = "getComputedStyle(document.body).backgroundColor"
    system = page.run(paper)
    assert page.run("document.documentElement.hasAttribute('data-dark')") is dark
    page.click(f"#theme label:nth-of-type({2 if dark else 3})")
    page.wait(f"location.hash.includes('theme={'light' if dark else 'dark'}')")
    assert page.run(paper) != system


@pytest.mark.parametrize("width", [375, 1280])
@pytest.mark.parametrize("state", [{}, {"attack": "lora", "step": "every"}])
def test_page_is_no_wider_than_the_screen(show, width, state):
    page = show(width=width, **state)
    assert page.run("innerWidth") == width
    assert page.run("document.documentElement.scrollWidth") <= width
    box = "document.querySelector('#summary .scroll')"
    assert page.run(f"{box}.getBoundingClientRect().right") <= width
    if width == 375 and not state:  # so something had to scroll
        assert page.run(f"{box}.scrollWidth > {box}.clientWidth")
