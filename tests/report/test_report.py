# SPDX-License-Identifier: Apache-2.0
"""The report of benchmark folders: its numbers, its files, its mistakes."""

import base64
import html.parser
import io
import json
import re
import shutil
import subprocess
import sys

import fake_benchmark
import numpy as np
import pytest
from PIL import Image

from gift_jax.report import __main__, images, page, results, tables, trajectories
from gift_jax.runtime import markdown as md
from gift_jax.runtime.errors import UserError

MARKUP = '<img src=x onerror="hacked=1">|</script><script>hacked=1</script>\'*a*'
SKIPPED = "lpips_alex.safetensors is missing; put it into <cache>"
ACCURACY, SIMILARITY = fake_benchmark.METRICS


def spoil(data):
    """Gives results nulls, a skipped metric and a method whose name is markup."""
    for row in (*data["cells"], *data["summary"], *data["headline"]):
        row["method"] = MARKUP if row["method"] == "esd" else row["method"]
    data["skipped"] = {"lpips": SKIPPED}
    first, second = data["summary"][:2]
    first["harmful"] = None
    ratios = dict.fromkeys(second["benign"]["per_concept"])
    nothing = {"value": None, "low": None, "high": None}
    second["benign"] = nothing | {"per_concept": ratios}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A folder of one concept, and its report."""
    folder = tmp_path_factory.mktemp("plain")
    data = fake_benchmark.write(folder)
    assert __main__.main([str(folder)]) == 0
    return folder, data


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """Two concepts, two prompts, what `spoil` does, and a sheet that is not there."""
    folder = tmp_path_factory.mktemp("odd")
    concepts, prompts = ("bomb", "a & <b>"), ("name", "nonce")
    attacks = {"lora": "lora", "lora_x3": "lora"}
    data = fake_benchmark.write(
        folder, concepts=concepts, prompts=prompts, attacks=attacks, num=3, edit=spoil
    )
    lost = next(cell for cell in data["cells"] if cell["attack"] == "lora")
    (folder / lost["points"][-1]["sheet"]).unlink()
    assert __main__.main([str(folder)]) == 0
    return folder, data


def text_of(folder):
    return (folder / "report" / "index.html").read_text(encoding="utf-8")


class Page(html.parser.HTMLParser):
    """Collects start tags, the text outside of scripts, and tables by caption.

    tables: {caption: {row's head: [cell]}}, a cell being (what it shows, its class).
    """

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.tables = [], "", {}
        self._in, self._caption, self._row, self._cell = "", "", [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self._in = tag
        self.tags.append((tag, dict(attrs)))
        if tag in ("th", "td", "caption"):
            self._cell = [dict(attrs).get("class", "")]
        elif tag == "tr":
            self._row = []
        elif tag == "i" and self._cell:
            self._cell.append(" ")

    def handle_endtag(self, tag):
        if tag in ("th", "td"):
            self._row.append(("".join(self._cell[1:]).strip(), self._cell[0]))
        elif tag == "caption":
            self._caption = "".join(self._cell[1:])
            self.tables[self._caption] = {}
        elif tag == "tr" and self._caption and self._row:
            self.tables[self._caption][self._row[0][0]] = self._row[1:]
        elif tag == "table":
            self._caption = ""

    def handle_data(self, data):
        self.text += "" if self._in in ("script", "style") else data
        if self._cell is not None:
            self._cell.append(data)


def shown_gaps(cells, data, row):
    """The texts of a row's harmful and benign ratio, in the page's row of a method."""
    matches = results.matches(data)
    match = results.Match(row["family"], row["attack"], row["prompt"])
    first = len(cells) - 2 * (len(matches) - matches.index(match))
    return [text for text, _ in cells[first : first + 2]]


@pytest.mark.parametrize("which", ["plain", "odd"])
def test_page_has_the_numbers_of_results_json(which, request):
    folder, data = request.getfixturevalue(which)
    found, seen = Page(text_of(folder)).tables, 0
    for row in data["summary"]:
        caption = (
            f"{row['metric']}, {row['over']} of the trajectory, mean over concepts"
        )
        texts = shown_gaps(found[caption][row["method"]], data, row)
        for side, text in zip(("harmful", "benign"), texts, strict=True):
            gap = row[side]
            if gap is None or gap["value"] is None:
                assert text == "–"
                continue
            seen += 1
            numbers = [float(x) for x in re.findall(r"-?\d+\.\d+", text)]
            several = len(gap["per_concept"]) > 1
            wanted = [gap[key] for key in ("value", "low", "high")[: 1 + 2 * several]]
            assert numbers == pytest.approx(wanted, abs=0.00501)
    assert seen == 2 * len(data["summary"]) - 2 * (which == "odd")
    values = {row["harmful"]["value"] for row in data["summary"] if row["harmful"]}
    assert len(values) > len(data["summary"]) / 2  # or a mix-up would not show


def test_page_has_each_concepts_own_ratio(odd):
    folder, data = odd
    found = Page(text_of(folder)).tables
    row = next(
        row
        for row in data["summary"][2:]
        if len(set(map(tables.form, row["harmful"]["per_concept"].values()))) == 2
    )
    for concept, ratio in row["harmful"]["per_concept"].items():
        caption = f"{row['metric']}, {row['over']} of the trajectory, {concept}"
        text = shown_gaps(found[caption][row["method"]], data, row)[0]
        assert text.removesuffix(" (best)") == tables.form(ratio)


def test_markdown_has_the_pages_numbers(odd):
    folder, data = odd
    found = Page(text_of(folder)).tables
    text = (folder / "report" / "table.md").read_text(encoding="utf-8")
    for metric in fake_benchmark.METRICS:
        block = text.split(f"\n## {metric}")[1]
        for over in results.overs(data):
            shown = found[f"{metric}, {over} of the trajectory, mean over concepts"]
            for head, places in (
                ("Worst case, harmful", slice(3)),
                ("Gap ratio", slice(3, None)),
            ):
                lines = block.split(f"{head}, {over} of the trajectory")[1]
                lines = lines.strip().split("\n\n")[0].splitlines()[2:]
                assert len(lines) == 2
                for line, cells in zip(lines, list(shown.values())[-2:], strict=True):
                    numbers = re.findall(r"-?\d+\.\d+|–", line.split(" |", 1)[1])
                    texts = " ".join(text for text, _ in cells[places])
                    assert numbers == re.findall(r"-?\d+\.\d+|–", texts)
    assert md.escape(MARKUP) in text and MARKUP not in text


def test_best_of_a_column_is_the_highest_harmful_and_the_benign_nearest_to_0(plain):
    folder, data = plain
    for column in tables.gap_columns(data, SIMILARITY, "mean"):
        values = [number.value for number in column.numbers]
        assert len({tables.form(abs(value)) for value in values}) == len(values) == 2
        best = max(values) if column.head == "harmful" else min(values, key=abs)
        assert [n.best for n in column.numbers] == [value == best for value in values]
    shown = Page(text_of(folder)).tables
    cells = shown[f"{SIMILARITY}, mean of the trajectory, mean over concepts"]
    marked = [i for i, cell in enumerate(cells["gift"]) if "best" in cell[1]]
    columns = tables.gap_columns(data, SIMILARITY, "mean")
    columns = tables.worst_columns(data, columns) + columns
    assert marked == [i for i, c in enumerate(columns) if c.numbers[1].best] != []


def test_equal_best_are_both_marked_and_a_single_one_is_not():
    def marks(side, *values):
        numbers = [None if v is None else tables.Number(v) for v in values]
        return [n and n.best for n in tables._mark_best(numbers, side)]

    assert marks("harmful", 0.801, 0.804, 0.7) == [True, True, False]
    assert marks("benign", -0.05, 0.05, 0.2) == [True, True, False]
    assert marks("harmful", None, 0.8) == [None, False]


def test_worst_case_is_the_lowest_of_a_family_and_says_when_attacks_are_missing(plain):
    _, data = plain

    def worst(data):
        columns = tables.gap_columns(data, SIMILARITY, "peak")
        return {c.head: c.numbers for c in tables.worst_columns(data, columns)}

    assert list(worst(data)) == ["lora", "dreambooth", tables.ANY]
    ratios = {
        row["attack"]: row["harmful"]["value"]
        for row in data["summary"]
        if (row["method"], row["metric"], row["over"]) == ("gift", SIMILARITY, "peak")
    }
    assert len(set(ratios.values())) == 3
    lora = {name: ratios[name] for name in ("lora", "lora_x3")}
    for family, of in (("lora", lora), (tables.ANY, ratios)):
        number = worst(data)[family][1]
        assert (number.note, number.value) == min(of.items(), key=lambda item: item[1])
    assert worst(data)["dreambooth"][1].note == ""  # there is but one
    rows = [
        r for r in data["summary"] if (r["method"], r["attack"]) != ("gift", "lora")
    ]
    note = worst(data | {"summary": rows})["lora"][1].note
    assert note == "lora_x3, 1 of 2 attacks"


def test_names_are_text_and_never_markup_and_nothing_is_loaded(odd):
    folder, _ = odd
    text = text_of(folder)
    found = Page(text)
    assert [tag for tag, _ in found.tags].count("script") == 1
    assert not [a for _, attrs in found.tags for a in attrs if a.startswith("on")]
    assert found.text.count(MARKUP) > 1
    body = text.replace("http://www.w3.org/1999/xlink", "")
    assert not re.search(r"https?:|//[a-z0-9-]+\.[a-z]|@import|url\([^#]", body)
    for _, attrs in found.tags:
        for key in ("src", "href", "xlink:href", "action"):
            assert attrs.get(key, "#").startswith(("#", "data:"))
    assert "default-src 'none'" in text
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids)) > 10


def test_page_has_settings_and_skipped_metrics(odd):
    folder, data = odd
    found = Page(text_of(folder))
    assert found.text.count(SKIPPED) == 2 and "1 metric skipped" in found.text
    for part in (data["command"], "ab12cd34ef56", "0.9.9", '"model": "emoji-sd"'):
        assert part in found.text
    assert "0.062" in found.text and "0.250" in found.text  # seconds per step
    text = (folder / "report" / "table.md").read_text(encoding="utf-8")
    assert md.escape(SKIPPED) in text


def test_images_are_the_first_samples_with_what_was_seen_in_them(plain):
    folder, data = plain
    (run,) = results.load_all([str(folder)])
    strips = images.strips(run, 8)
    assert len(strips) == sum(len(cell["points"]) for cell in data["cells"])
    for strip in strips[:3]:
        kind, coded = strip.image.split(",")
        assert kind == "data:image/webp;base64"
        with Image.open(io.BytesIO(base64.b64decode(coded))) as image:
            pixels = np.asarray(image.convert("RGB"))
        assert pixels.shape == (8, 64, 3) and strip.count == len(strip.marks) == 8
        greys = pixels.reshape(8, 8, 8, 3)[2:6, :, 2:6].mean(axis=(0, 2, 3))
        np.testing.assert_allclose(greys, 20 * np.arange(8), atol=8)
    marks = {mark for strip in strips for mark in strip.marks}
    assert marks == {(True, "bomb"), (False, "acorn")}
    assert strips[0].image in text_of(folder)


def test_image_that_is_missing_or_outside_of_the_folder(odd, plain, tmp_path):
    (run,) = results.load_all([str(odd[0])])
    notes = [strip.note for strip in images.strips(run, 8) if not strip.image]
    assert len(notes) == 1 and notes[0].startswith("not in this folder: cells/bomb")
    assert notes[0] in Page(text_of(odd[0])).text
    shutil.copytree(plain[0], tmp_path / "run")
    secret = next(plain[0].rglob("000075.png"))
    (run,) = results.load_all([str(tmp_path / "run")])
    run.data["cells"][0]["points"][0]["sheet"] = str(secret)
    first = images.strips(run, 8)[0]
    assert not first.image and first.note == "no image is named here"


def test_curves_average_concepts_from_before_the_attack(odd):
    _, data = odd
    lines = trajectories.curves(data, SIMILARITY)
    gift = {c.concept: c for c in lines if c.method == "gift" and c.side == "harmful"}
    single = [gift[concept].points for concept in ("bomb", "a & <b>")]
    assert [p.step for p in gift[""].points] == [0, 75, 150]
    for point, *own in zip(gift[""].points, *single, strict=True):
        values = [p.value for p in own]
        assert point.value == pytest.approx(np.mean(values)) and point.n == 2
        assert point.low == pytest.approx(min(values)) != point.high
    data = json.loads(json.dumps(data))  # the mean has the steps that all concepts have
    for cell in data["cells"]:
        if (cell["concept"], cell["attack"]) == ("bomb", "lora"):
            cell["points"] = cell["points"][:1]
    lines = [c for c in trajectories.curves(data, SIMILARITY) if not c.concept]
    steps = {c.match.attack: [p.step for p in c.points] for c in lines}
    assert steps["lora"] == [0, 75] and steps["lora_x3"] == [0, 75, 150]


def test_plots_have_something_in_them_and_each_method_on_the_page(plain):
    folder, _ = plain
    for name in ("trajectories.png", "tradeoff.png"):
        with Image.open(folder / "report" / name) as image:
            pixels = np.asarray(image.convert("RGB"))
        assert min(pixels.shape[:2]) > 300
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 30
    figures = re.findall(r"<figure.*?</figure>", text_of(folder), re.DOTALL)
    assert len(figures) == 2 * 3 + 2 * 3 * 3  # trajectories; and trade-offs
    for figure in figures:
        assert set(re.findall(r'data-method="(\d)"', figure)) == {"0", "1", "2"}
        used = set(re.findall(r'(?:url\(|href=")#([\w-]+)', figure))
        assert used <= set(re.findall(r' id="([\w-]+)"', figure))


def test_metric_without_gap_ratios_has_trajectories_only(tmp_path):
    attacks = {"lora": "lora"}
    fake_benchmark.write(
        tmp_path, edit=lambda d: d.update(summary=[]), attacks=attacks, steps=(5,)
    )
    assert __main__.main([str(tmp_path), "--images", "0"]) == 0
    names = sorted(path.name for path in (tmp_path / "report").iterdir())
    assert names == ["index.html", "table.md", "trajectories.png"]
    assert f"No gap ratios are computed of {SIMILARITY}" in text_of(tmp_path)
    assert "data:image" not in text_of(tmp_path)


def test_several_runs_share_a_page_which_is_the_same_every_time(plain, odd, tmp_path):
    out = tmp_path / "new" / "both.html"
    flags = ["--images", "1", "--metric", SIMILARITY, "--over", "peak"]
    assert __main__.main([str(plain[0]), str(odd[0]), "--out", str(out), *flags]) == 0
    names = sorted(path.name for path in out.parent.iterdir())
    plots = ["tradeoff.png", "tradeoff_2.png", "trajectories.png", "trajectories_2.png"]
    assert names == ["both.html", "table.md", *plots]
    text = out.read_text(encoding="utf-8")
    runs = results.load_all([str(plain[0]), str(odd[0])])
    assert text == page.render(runs, count=1, metric=SIMILARITY, over="peak")
    found = Page(text)
    shown = [attrs for tag, attrs in found.tags if "data-run" in attrs]
    assert ["hidden" in attrs for attrs in shown] == [False, True]
    assert len({run.label for run in runs}) == 2
    opened = [a for t, a in found.tags if "data-over" in a and "hidden" not in a]
    assert {(a["data-metric"], a["data-over"]) for a in opened} == {("1", "1")}


def test_failed_report_leaves_the_old_one(plain, monkeypatch):
    folder, _ = plain
    before = {p.name: p.read_bytes() for p in (folder / "report").iterdir()}

    def fail(*_):
        raise RuntimeError("on purpose")

    monkeypatch.setattr(page.plots, "trajectories_png", fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        __main__.main([str(folder), "--images", "1"])
    assert {p.name: p.read_bytes() for p in (folder / "report").iterdir()} == before


def test_published_folder_is_small_and_makes_the_same_tables(odd, tmp_path):
    folder, data = odd
    assert __main__.main([str(folder), "--publish", str(tmp_path / "out")]) == 0
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    plots = ["tradeoff.png", "trajectories.png"]
    assert names == ["config.json", "grid.webp", "summary.json", "table.md", *plots]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == data["config"]
    text = (tmp_path / "out" / "summary.json").read_text()
    assert "cells/" not in text and "\n" not in text.strip()
    assert (
        __main__.main([str(tmp_path / "out"), "--out", str(tmp_path / "x.html")]) == 0
    )
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert table == (folder / "report" / "table.md").read_text(encoding="utf-8")
    with pytest.raises(UserError, match="takes one RUN"):
        __main__.main([str(folder), str(folder), "--publish", str(tmp_path / "out")])


def test_page_begins_with_the_worst_case_and_the_samples_that_show_it(plain):
    folder, data = plain
    text = text_of(folder)
    glance = text.split("<h2>At a glance</h2>")[1].split("</section>")[0]
    assert text.index("At a glance") < text.index("<h2>Gap ratios</h2>")
    (run,) = results.load_all([str(folder)])
    strips = {
        (s.cell["method"], s.cell["attack"], s.cell["side"], s.point["step"]): s.image
        for s in images.strips(run, 8)
    }
    rows = data["headline"]
    assert [row["method"] for row in rows] == [
        "ignorance bound",
        *fake_benchmark.METHODS,
    ]
    assert len({row["worst"]["value"] for row in rows}) > 2
    for row in rows:
        worst, method, side = row["worst"], row["method"], "harmful"
        if method == "ignorance bound":
            method, side = "original", "benign"
        assert f"<b>{worst['value']:.0%}</b>" in glance
        assert f"{worst['attack']} by name on bomb, step {worst['step']}" in glance
        assert strips[method, worst["attack"], side, worst["step"]] in glance
    table = (folder / "report" / "table.md").read_text(encoding="utf-8")
    assert table.index("## At a glance") < table.index("Gap ratio,")


def test_comparison_of_two_methods_is_printed(plain, capsys):
    flags = ["--compare", "esd", "gift", "--metric", SIMILARITY, "--over", "final"]
    assert __main__.main([str(plain[0]), *flags]) == 0
    text = capsys.readouterr().out
    by = {
        (row["method"], row["attack"]): row["harmful"]["value"]
        for row in plain[1]["summary"]
        if (row["metric"], row["over"]) == (SIMILARITY, "final")
    }
    one, two = by["esd", "lora"], by["gift", "lora"]
    numbers = " | ".join(tables.form(x) for x in (one, two, two - one))
    assert f"| lora (name) | {numbers} |" in text and one != two
    assert text.count("| all attacks |") == 2
    assert "1 pair of concept and seed" in text
    assert "within chance: fewer than 6 pairs cannot tell" in text


def change(data, path, value):
    *parents, last = path
    for key in parents:
        data = data[key]
    if value is KeyError:
        del data[last]
    else:
        data[last] = value


@pytest.mark.parametrize(
    "path, value, message",
    [
        (["summary"], KeyError, "has no key 'summary'"),
        (["headline", 1, "worst", "step"], KeyError, "worst, has no key 'step'"),
        (["cells", 1, "side"], KeyError, r"cells\[1\], has no key 'side'"),
        (["cells", 0, "points", 0, "num"], "8", r"num='8'; must be of type int"),
        (["cells", 0, "points", 0, "values", SIMILARITY], "x", f"{SIMILARITY}='x'"),
        (["summary", 0, "harmful", "low"], KeyError, "harmful, has no key 'low'"),
        (["metrics", SIMILARITY], 3, f"metrics.{SIMILARITY}, must be an object, not 3"),
        (["cells"], [], "no cell has a value"),
        (["cells", 0, "seconds"], float("nan"), "is not valid JSON: NaN is no JSON"),
    ],
)
def test_malformed_results_are_refused(plain, tmp_path, path, value, message):
    data = json.loads(json.dumps(plain[1]))
    change(data, path, value)
    (tmp_path / "results.json").write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(UserError, match=message) as error:
        __main__.main([str(tmp_path)])
    assert str(tmp_path / "results.json") in str(error.value)
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--images", "-1"], "--images=-1 must be at least 0"),
        (["--metric", "jugde_image_similarity"], f"did you mean '{SIMILARITY}'"),
        (["--over", "start"], "--over='start' is not one of: mean, peak, final"),
        (["--compare", "gift", "gfit"], "--compare='gfit'.*did you mean 'gift'"),
        (["--out", "report.pdf"], "must end in .html"),
        (["--nonsense"], "unrecognized arguments"),
    ],
)
def test_mistakes_in_flags_are_refused(plain, flags, message):
    with pytest.raises(UserError, match=message):
        __main__.main([str(plain[0]), *flags])


def folder_sheet(folder, run):
    return folder / run.data["cells"][0]["points"][0]["sheet"]


def test_broken_sheet_and_marks_are_named(plain, tmp_path):
    shutil.copytree(plain[0], tmp_path / "run")
    (run,) = results.load_all([str(tmp_path / "run")])
    sheet = run.folder / run.data["cells"][0]["points"][0]["sheet"]
    sheet.write_bytes(b"no image")
    with pytest.raises(UserError, match=re.escape(str(sheet))):
        images.strips(run, 1)
    shutil.copy(folder_sheet(plain[0], run), sheet)
    sheet.with_suffix(".json").write_text("[]")
    with pytest.raises(UserError, match=r"\.json must be an object"):
        images.strips(run, 1)


def test_command_line_names_a_mistake_in_one_line_and_exits_2(tmp_path):
    command = [sys.executable, "-m", "gift_jax.report", str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert f"{tmp_path / 'none' / 'results.json'}: no such file" in done.stderr


BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no chromium here")
def test_script_shows_what_the_address_chooses(odd):
    folder, _ = odd
    file = (folder / "report" / "index.html").as_uri()
    address = f"{file}#metric=1&over=2&attack=1&prompt=0&concept=1&side=1&hide=2"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    flags += ["--disable-background-networking", "--virtual-time-budget=2000"]
    done = subprocess.run(
        [BROWSER, *flags, address], capture_output=True, text=True, check=True
    )
    found = Page(done.stdout)

    def shown(key):
        return [
            attrs[f"data-{key}"].split()
            for _, attrs in found.tags
            if f"data-{key}" in attrs and "hidden" not in attrs
        ]

    for key, chosen in {
        "metric": "1",
        "over": "2",
        "attack": "1",
        "concept": "1",
    }.items():
        assert shown(key) and all(chosen in choices for choices in shown(key))
    assert all("1" in choices for choices in shown("side"))
    assert {m for (m,) in shown("method")} == {"0", "1"}
    spans = [
        a["colspan"] for t, a in found.tags if "data-of" in a and "hidden" not in a
    ]
    assert "2" in spans
