# SPDX-License-Identifier: Apache-2.0
"""The report of benchmark folders: its numbers, its files, its mistakes."""

import base64
import html.parser
import io
import json
import re
import subprocess
import sys

import fake_benchmark
import numpy as np
import pytest
from PIL import Image

from gift_jax.report import __main__, curves, markdown, page, results, tables
from gift_jax.runtime.errors import UserError

MARKUP = '<img src=x onerror="hacked=1">|</script><script>hacked=1</script>\'*a*'
SKIPPED = "lpips_alex.safetensors is missing; put it into <cache>"


def shades(rng, num, cell, value):
    """Pictures that say which they are: flat grey, 20 for each before it."""
    grey = 20 * np.arange(num, dtype=np.uint8).reshape(-1, 1, 1, 1)
    return np.broadcast_to(grey, (num, 8, 8, 3))


def spoil(data):
    """Gives results nulls, a skipped metric and a method whose name is markup."""
    for row in (*data["cells"], *data["summary"]):
        row["method"] = MARKUP if row["method"] == "esd" else row["method"]
    data["skipped"] = {"lpips": SKIPPED}
    first, second = data["summary"][:2]
    first["harmful"] = None
    ratios = dict.fromkeys(second["benign"]["per_concept"])
    second["benign"] = {"value": None, "low": None, "high": None, "per_concept": ratios}


def report_without_plots(*flags):
    """Runs the command line with empty files for plots, which take most of its time."""

    def touch(*args):
        args[-1].touch()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page.plots, "trajectories", touch)
        patch.setattr(page.plots, "tradeoff", touch)
        assert __main__.main([str(flag) for flag in flags]) == 0


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A folder of one concept, and its report."""
    folder = tmp_path_factory.mktemp("plain")
    data = fake_benchmark.write(folder, draw=shades)
    assert __main__.main([str(folder)]) == 0
    return folder, data


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """Two concepts, two prompts, what `spoil` does, and a sheet that is not there."""
    folder = tmp_path_factory.mktemp("odd")
    concepts, prompts = ("bomb", "a & <b>"), ("name", "token")
    made = {"concepts": concepts, "prompts": prompts, "steps": (75, 150), "num": 3}
    data = fake_benchmark.write(folder, edit=spoil, **made)
    lost = next(cell for cell in data["cells"] if cell["attack"] == "lora")
    (folder / lost["points"][-1]["sheet"]).unlink()
    report_without_plots(folder)
    return folder, data


def text_of(folder):
    return (folder / "report" / "index.html").read_text(encoding="utf-8")


def embedded(text):
    """What the page's scripts draw from."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text)
    return json.loads(found.group(1))


def shown(run, row, side):
    """The page's cell of one row of the summary."""
    place = {"family": row["family"], "attack": row["attack"], "prompt": row["prompt"]}
    match = next(i for i, m in enumerate(run["matches"]) if m.items() >= place.items())
    table = run["gaps"][row["metric"]][row["over"]][""]
    return table[side][match][run["defended"].index(row["method"])]


@pytest.mark.parametrize("which", ["plain", "odd"])
def test_page_has_the_numbers_of_results_json(which, request):
    folder, data = request.getfixturevalue(which)
    run = embedded(text_of(folder))["runs"][0]
    told = 0
    for row in data["summary"]:
        for side in ("harmful", "benign"):
            cell, gap = shown(run, row, side), row[side]
            if gap is None or gap["value"] is None:
                assert cell is None
                continue
            told += 1
            assert cell["value"] == gap["value"]
            assert float(cell["text"]) == pytest.approx(gap["value"], abs=0.00501)
            known = [x for x in gap["per_concept"].values() if x is not None]
            asked = len(gap["per_concept"])
            if len(known) < asked:  # the original reaches nothing in one
                assert cell["spread"] == f"{len(known)} of {asked} concepts"
            elif asked > 1:
                ends = re.findall(r"-?\d+\.\d\d", cell["spread"])
                ends = [float(end) for end in ends]
                assert ends == pytest.approx([gap["low"], gap["high"]], abs=0.00501)
            else:
                assert "spread" not in cell
    assert told == 2 * len(data["summary"]) - 2 * (which == "odd")
    values = {row["harmful"]["value"] for row in data["summary"] if row["harmful"]}
    assert len(values) > len(data["summary"]) / 2  # or a mix-up would not show


def test_page_has_each_concepts_own_ratio(odd):
    folder, data = odd
    gaps = embedded(text_of(folder))["runs"][0]["gaps"]
    row = data["summary"][-1]
    ratios = row["harmful"]["per_concept"]
    assert len(set(ratios.values())) == 2
    for concept, ratio in ratios.items():
        table = gaps[row["metric"]][row["over"]][concept]
        assert table["harmful"][-1][-1]["value"] == ratio


def test_best_of_a_column_is_the_highest_harmful_and_the_benign_nearest_to_0(plain):
    _, data = plain
    table = tables.gap_table(data, "judge_image_similarity", "mean")
    for (_, side), numbers in table.columns.items():
        values = [number.value for number in numbers]
        assert len({tables.form(abs(value)) for value in values}) == len(values) == 2
        best = max(values) if side == "harmful" else min(values, key=abs)
        assert [n.best for n in numbers] == [value == best for value in values]


def test_equal_best_are_both_marked_and_a_single_one_is_not():
    def marks(side, *values):
        numbers = [None if v is None else tables.Number(v) for v in values]
        return [n and n.best for n in tables._mark_best(numbers, side)]

    assert marks("harmful", 0.801, 0.804, 0.7) == [True, True, False]
    assert marks("benign", -0.3, 0.05, 0.2) == [False, True, False]
    assert marks("benign", -0.05, 0.05) == [True, True]
    assert marks("harmful", None, 0.8) == [None, False]


def test_worst_case_is_the_lowest_of_a_family(plain):
    _, data = plain
    worst = tables.gap_table(data, "judge_image_similarity", "peak").worst
    assert list(worst) == [("", "lora"), ("", "dreambooth"), ("", tables.ANY)]
    for i, method in enumerate(("esd", "gift")):
        found = {
            row["attack"]: row["harmful"]["value"]
            for row in data["summary"]
            if (row["method"], row["metric"], row["over"])
            == (method, "judge_image_similarity", "peak")
        }
        assert len(set(found.values())) == 3
        both = {name: found[name] for name in ("lora", "lora_x3")}
        for family, of in (("lora", both), (tables.ANY, found)):
            number = worst["", family][i]
            assert (number.at, number.value) == min(
                of.items(), key=lambda item: item[1]
            )
        assert worst["", "dreambooth"][i].at == ""  # there is but one


def test_worst_case_says_when_attacks_are_missing(plain):
    _, data = plain
    rows = [
        r for r in data["summary"] if (r["method"], r["attack"]) != ("gift", "lora")
    ]
    worst = tables.gap_table(
        data | {"summary": rows}, "judge_image_similarity", "mean"
    ).worst
    assert worst["", "lora"][1].at == "lora_x3, 1 of 2 attacks"


def test_markdown_has_the_pages_numbers(odd):
    folder, data = odd
    run = embedded(text_of(folder))["runs"][0]
    text = (folder / "report" / "table.md").read_text(encoding="utf-8")
    assert (
        text.count("\n## classifier_accuracy")
        == text.count("\n## judge_image_similarity")
        == 1
    )
    compared = 0
    for metric, overs in run["gaps"].items():
        of_metric = text.split(f"\n## {metric}")[1]
        for over, tables_ in overs.items():
            table, worst = tables_[""], tables_[""]["worst"].values()
            sides = [table[side][i] for i in range(6) for side in ("harmful", "benign")]
            for head, columns in (
                ("Gap ratio", sides),
                ("Worst case, harmful", [c for of in worst for c in of.values()]),
            ):
                block = of_metric.split(f"{head}, {over} of the trajectory")[1]
                lines = block.strip().split("\n\n")[0].splitlines()
                cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines]
                assert len(cells[0]) == 1 + len(columns)
                for j, column in enumerate(columns, 1):
                    for i, number in enumerate(column):
                        assert cells[2 + i][j].strip() == in_markdown(number)
                        compared += 1
    assert compared == 2 * 3 * 2 * (3 * 3 + 12)  # worst of any prompt and of each
    assert markdown.escape(MARKUP) in text and MARKUP not in text


def in_markdown(number):
    if number is None:
        return "–"
    value = f"**{number['text']}**" if number.get("best") else number["text"]
    at = f"({number['at']})" if "at" in number else ""
    return " ".join(part for part in (value, number.get("spread"), at) if part)


class Tags(html.parser.HTMLParser):
    """Collects start tags with their attributes, and the text outside of scripts."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self._in = [], "", ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self._in = tag
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += "" if self._in in ("script", "style") else data


def test_names_are_text_and_never_markup(odd):
    folder, _ = odd
    found = Tags(text_of(folder))
    tags = [tag for tag, _ in found.tags]
    assert tags.count("script") == 1 + len(page._SCRIPTS) and "img" not in tags
    assert not [a for _, attrs in found.tags for a in attrs if a.startswith("on")]
    assert MARKUP in found.text  # in the table of seconds, as it is
    assert MARKUP in embedded(text_of(folder))["runs"][0]["methods"]


@pytest.mark.parametrize("which", ["plain", "odd"])
def test_page_names_no_other_place(which, request):
    text = text_of(request.getfixturevalue(which)[0])
    assert not re.search(r"https?:|//[a-z0-9-]+\.[a-z]|@import|url\(", text)
    links = [
        attrs[key]
        for _, attrs in Tags(text).tags
        for key in ("src", "href", "data", "action", "poster", "srcset")
        if key in attrs
    ]
    assert links and all(link.startswith(("#", "data:,")) for link in links)
    assert "default-src 'none'" in text


def test_skipped_metric_is_told_with_its_reason(odd):
    folder, _ = odd
    found = Tags(text_of(folder))
    assert found.text.count(SKIPPED) == 2 and "1 metric skipped" in found.text
    text = (folder / "report" / "table.md").read_text(encoding="utf-8")
    assert markdown.escape(SKIPPED) in text


def test_page_tells_how_it_was_made(plain):
    folder, data = plain
    text = Tags(text_of(folder)).text
    for told in (data["command"], "ab12cd34ef56", "0.9.9", '"model": "emoji-sd"'):
        assert told in text
    assert "0.062" in text and "0.250" in text  # seconds per step


def test_pictures_are_the_first_ones_as_they_are(plain):
    folder, data = plain
    points = embedded(text_of(folder))["runs"][0]["points"]
    assert len(points) == sum(len(cell["points"]) for cell in data["cells"])
    for point in points[:3]:
        assert (point["shown"], point["num"], len(point["things"])) == (8, 10, 8)
        kind, coded = point["image"].split(",")
        assert kind == "data:image/webp;base64"
        with Image.open(io.BytesIO(base64.b64decode(coded))) as image:
            pixels = np.asarray(image.convert("RGB"))
        assert pixels.shape == (8, 64, 3)
        greys = pixels.reshape(8, 8, 8, 3)[2:6, :, 2:6].mean(axis=(0, 2, 3))
        np.testing.assert_allclose(greys, 20 * np.arange(8), atol=8)


def test_missing_sheet_is_told_in_place_of_the_picture(odd):
    folder, _ = odd
    points = embedded(text_of(folder))["runs"][0]["points"]
    without = [point for point in points if "image" not in point]
    assert len(without) == 1 and "not in this folder" in without[0]["note"]
    assert all(point["shown"] == 3 for point in points if "image" in point)


def test_sheet_outside_of_the_folder_is_not_read(plain, tmp_path):
    folder, _ = plain
    secret = next(folder.rglob("000075.png"))

    def edit(data):
        data["cells"][0]["points"][0]["sheet"] = str(secret)

    fake_benchmark.write(tmp_path, edit=edit, attacks={"lora": "lora"})
    run = results.load_all([str(tmp_path)])[0]
    first = page.pictures.embedded(run, 8)[0]
    assert "image" not in first and first["note"] == "no picture is named here"


def test_no_pictures_and_more_than_there_are(plain, tmp_path):
    folder, _ = plain
    none, all_of_them = tmp_path / "none.html", tmp_path / "all.html"
    report_without_plots(folder, "--pictures", "0", "--out", none)
    report_without_plots(folder, "--pictures", "99", "--out", all_of_them)
    assert "data:image" not in none.read_text(encoding="utf-8")
    text = all_of_them.read_text(encoding="utf-8")
    assert {point["shown"] for point in embedded(text)["runs"][0]["points"]} == {10}


def test_curves_average_concepts_from_before_the_attack(odd):
    _, data = odd
    lines = curves.curves(data, "judge_image_similarity")
    gift = {c.concept: c for c in lines if c.method == "gift" and c.side == "harmful"}
    match = gift[""].match
    alone = [gift[concept].points for concept in ("bomb", "a & <b>")]
    assert [p.step for p in gift[""].points] == [0, 75, 150]
    for point, *own in zip(gift[""].points, *alone, strict=True):
        values = [p.value for p in own]
        assert point.value == pytest.approx(np.mean(values)) and point.n == 2
        assert point.low == pytest.approx(min(values)) != point.high
    started = [
        cell["points"][0]["values"]["judge_image_similarity"]
        for cell in data["cells"]
        if (cell["method"], cell["side"], cell["attack"], cell["prompt"])
        == ("gift", "harmful", "before", match.prompt)
    ]
    assert gift[""].points[0].value == pytest.approx(np.mean(started))


def test_curves_keep_the_steps_that_all_concepts_have(odd):
    _, data = odd
    data = json.loads(json.dumps(data))
    cut = [c for c in data["cells"] if c["concept"] == "bomb" and c["attack"] == "lora"]
    for cell in cut:
        cell["points"] = cell["points"][:1]
    lines = [c for c in curves.curves(data, "judge_image_similarity") if not c.concept]
    steps = {c.match.attack: [p.step for p in c.points] for c in lines}
    assert steps["lora"] == [0, 75] and steps["lora_x3"] == [0, 75, 150]


def test_plots_are_pictures_with_something_in_them(plain):
    folder, _ = plain
    for name in ("trajectories.png", "tradeoff.png"):
        with Image.open(folder / "report" / name) as image:
            pixels = np.asarray(image.convert("RGB"))
        assert min(pixels.shape[:2]) > 500
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 100


def test_metric_without_gap_ratios_has_curves_only(tmp_path):
    def edit(data):
        data["summary"] = []

    fake_benchmark.write(tmp_path, edit=edit, attacks={"lora": "lora"}, steps=(5,))
    report_without_plots(tmp_path)
    made = sorted(path.name for path in (tmp_path / "report").iterdir())
    assert made == ["index.html", "table.md", "trajectories.png"]


def test_several_runs_share_a_page(plain, odd, tmp_path):
    out = tmp_path / "new" / "both.html"
    report_without_plots(plain[0], odd[0], "--out", out)
    made = sorted(path.name for path in out.parent.iterdir())
    assert made == [
        "both.html",
        "table.md",
        "tradeoff.png",
        "tradeoff_2.png",
        "trajectories.png",
        "trajectories_2.png",
    ]
    runs = embedded(out.read_text(encoding="utf-8"))["runs"]
    labels = [run["label"] for run in runs]
    assert len(set(labels)) == 2 and all(x.startswith("standard") for x in labels)
    assert [len(run["concepts"]) for run in runs] == [1, 2]


def test_page_is_the_same_every_time_and_opens_with_what_was_asked(plain):
    runs = results.load_all([str(plain[0])])
    first = page.render(runs, count=1, metric="judge_image_similarity", over="peak")
    assert first == page.render(
        runs, count=1, metric="judge_image_similarity", over="peak"
    )
    assert embedded(first)["start"] == {
        "metric": "judge_image_similarity",
        "over": "peak",
    }


def test_failed_report_leaves_the_old_one(plain, monkeypatch):
    folder, _ = plain
    before = {p.name: p.read_bytes() for p in (folder / "report").iterdir()}

    def fail(*_):
        raise RuntimeError("on purpose")

    monkeypatch.setattr(page.plots, "trajectories", fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        __main__.main([str(folder), "--pictures", "1"])
    assert {p.name: p.read_bytes() for p in (folder / "report").iterdir()} == before


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
        (["cells", 1, "side"], KeyError, r"cells\[1\], has no key 'side'"),
        (["cells", 0, "points", 0, "num"], "8", r"num='8'; must be of type int"),
        (
            ["cells", 0, "points", 0, "values", "judge_image_similarity"],
            "high",
            "judge_i='high'",
        ),
        (["summary", 0, "benign"], KeyError, r"summary\[0\], has no key 'benign'"),
        (["summary", 0, "harmful", "low"], KeyError, "harmful, has no key 'low'"),
        (
            ["metrics", "judge_image_similarity"],
            3,
            "metrics.judge_image_similarity, must be an object, not 3",
        ),
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
        (["--pictures", "-1"], "--pictures=-1 must be at least 0"),
        (
            ["--metric", "jugde_image_similarity"],
            "did you mean 'judge_image_similarity'",
        ),
        (["--over", "start"], "--over='start' is not one of: mean, peak, final"),
        (["--out", "report.pdf"], "must end in .html"),
        (["--nonsense"], "unrecognized arguments"),
    ],
)
def test_mistakes_in_flags_are_refused(plain, flags, message):
    with pytest.raises(UserError, match=message):
        __main__.main([str(plain[0]), *flags])


def test_broken_sheet_and_json_are_named(tmp_path):
    data = fake_benchmark.write(tmp_path, attacks={"lora": "lora"}, steps=(5,))
    sheet = tmp_path / data["cells"][0]["points"][0]["sheet"]
    sheet.write_bytes(b"no picture")
    with pytest.raises(UserError, match=re.escape(str(sheet))):
        __main__.main([str(tmp_path)])
    (tmp_path / "results.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="results.json is not valid JSON"):
        __main__.main([str(tmp_path)])


def test_command_line_says_a_mistake_in_one_line_and_exits_2(tmp_path):
    command = [sys.executable, "-m", "gift_jax.report", str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert f"{tmp_path / 'none' / 'results.json'}: no such file" in done.stderr


def test_help_names_what_is_written(capsys):
    with pytest.raises(SystemExit) as done:
        __main__.main(["--help"])
    told = capsys.readouterr().out
    assert done.value.code == 0
    for name in ("RUN", "--out", "--pictures", "table.md", "tradeoff.png", "examples"):
        assert name in told
