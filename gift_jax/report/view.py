# SPDX-License-Identifier: Apache-2.0
"""What the page's template asks of one run: each part, and when it is shown."""

from collections.abc import Iterator, Sequence

from markupsafe import Markup, escape

from gift_jax.benchmark import summary
from gift_jax.benchmark.table import (
    HEADLINE,
    HEADLINE_NOTE,
    headline_rows,
    seconds,
)
from gift_jax.report import images, plots, results, tables
from gift_jax.report.results import Run

ALL, MEAN, LAST, EVERY = "all", "mean", "last", "every"  # besides numbers


def gap_metrics(data) -> list[str]:
    """Returns the metrics that have gap ratios, in order."""
    return list(dict.fromkeys(row["metric"] for row in data["summary"]))


class View:
    """What the template asks of one run.

    Attributes: start: {control: its first choice}. Choices are numbers in the order of
      `choices`, or `ALL`, `MEAN`, `LAST`, `EVERY`.
    """

    def __init__(self, run: Run, count: int, metric: str, over: str):
        self.data, self.label = run.data, run.label
        self.methods = results.methods(run.data)
        self.defended = tables.defended(run.data)
        self.concepts = results.concepts(run.data)
        self.metrics = results.metrics(run.data)
        self.overs = results.overs(run.data)
        self.sides = results.sides(run.data)
        self.prompts = results.prompts(run.data)
        self.matches = results.matches(run.data)
        self.attacks = list(dict.fromkeys(match.attack for match in self.matches))
        self.cases = [results.match_label(run.data, match) for match in self.matches]
        self.seeds = sorted({cell["seed"] for cell in run.data["cells"]})
        self.swatches = [Markup(svg) for svg in plots.swatches(run.data)]
        self.seconds = seconds(run.data)
        self.headline_note = HEADLINE_NOTE
        self._strips = images.strips(run, count)
        self.start = {
            "metric": _number_of(self.metrics, metric),
            "over": _number_of(self.overs, over),
            "attack": ALL,
            "prompt": ALL,
            "concept": MEAN,
            "subject": "0",
            "side": "0",
            "case": "0",
            "step": LAST,
            "seed": "0",
        }

    @property
    def facts(self) -> list[tuple[str, str]]:
        """Returns (what, how many) of the run."""
        names = {"concept": self.concepts, "method": self.methods}
        names |= {"attack": self.attacks, "seed": self.seeds}
        facts = [
            (what + ("" if len(some) == 1 else "s"), str(len(some)))
            for what, some in names.items()
        ]
        cells = self.data["cells"]
        nums = sorted({point["num"] for cell in cells for point in cell["points"]})
        span = "-".join(str(n) for n in dict.fromkeys((nums[0], nums[-1])))
        facts.append(("images a point", span))
        hours = sum(cell.get("seconds") or 0.0 for cell in cells) / 3600
        if hours:
            time = f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.0f} min"
            facts.append(("of computing", time))
        return facts

    @property
    def headline(self) -> Iterator[dict]:
        """Yields the rows of the first table: texts, bars, samples of the worst case.

        worst, mean: in [0, 1], or None. bound: of the ignorance bound, for both.
        """
        rows = self.data["headline"]
        texts = [
            dict(zip(HEADLINE, row, strict=True)) for row in headline_rows(self.data)
        ]
        for row, text in zip(rows, texts, strict=True):
            worst = row["worst"]
            yield {
                "texts": text,
                "worst": worst and min(1.0, worst["value"]),
                "mean": row["mean"],
                "strip": worst and self._strip_of(row["method"], worst),
            }

    def _strip_of(self, method: str, worst: dict) -> images.Strip | None:
        side = summary.HARMFUL
        if method == summary.IGNORANCE:
            method, side = summary.ORIGINAL, summary.BENIGN
        names = ("attack", "prompt", "concept", "seed")
        for strip in self._strips:
            cell, step = strip.cell, strip.point["step"]
            if (
                (cell["method"], cell["side"], step) == (method, side, worst["step"])
            ) and all(cell[name] == worst[name] for name in names):
                return strip
        return None

    @property
    def controls(self) -> list[tuple[str, str, list[tuple[str, str]]]]:
        """Returns (control, its label, [(choice, its label)]) of what the bar has."""
        return [
            ("metric", "Metric", _numbered(self.metrics)),
            ("over", "Gap over trajectory", _numbered(self.overs)),
            ("attack", "Attack", _with(ALL, "all attacks", self.attacks)),
            ("prompt", "Prompt", _with(ALL, "all prompts", self.prompts)),
            ("concept", "Concept (tables)", _with(MEAN, "mean of all", self.concepts)),
        ]

    @property
    def image_controls(self) -> list[tuple[str, str, list[tuple[str, str]]]]:
        """Returns the same of what chooses images."""
        steps = {p["step"] for cell in self.data["cells"] for p in cell["points"]}
        words = [(LAST, "the last one"), (EVERY, "every step")]
        words += [(str(step), str(step)) for step in sorted(steps)]
        return [
            ("subject", "Concept", _numbered(self.concepts)),
            ("side", "Side", _numbered(self.sides)),
            ("case", "Attack", _numbered(self.cases)),
            ("step", "Step", words),
            ("seed", "Seed", _numbered(map(str, self.seeds))),
        ]

    def shown(self, **choices: str) -> Markup:
        """Returns an element's attributes: the choices under which it is shown.

        Args: choices: of a control, divided by spaces; "" for any.
        """
        attributes = {key: value for key, value in choices.items() if value}
        text = "".join(
            f' data-{key}="{escape(value)}"' for key, value in attributes.items()
        )
        known = all(
            self.start[k] in v.split() for k, v in attributes.items() if k in self.start
        )
        return Markup(text if known else text + " hidden")

    def of_column(self, column: tables.Column) -> Markup:
        """Returns the attributes of a table's column."""
        names = dict.fromkeys(column.attacks)
        attacks = " ".join(str(self.attacks.index(name)) for name in names)
        choices = {"attack": f"{attacks} {ALL}".strip()} if column.prompts else {}
        if column.prompts == ("",):
            choices["prompt"] = ALL
        elif column.prompts and column.group == tables.WORST:
            choices["prompt"] = str(self.prompts.index(column.prompts[0]))
        elif column.prompts:
            choices["prompt"] = f"{self.prompts.index(column.prompts[0])} {ALL}"
        return self.shown(**choices)

    def of_match(self, match: results.Match) -> dict[str, str]:
        """Returns the choices of an attack's figures."""
        attack, prompt = (
            self.attacks.index(match.attack),
            self.prompts.index(match.prompt),
        )
        return {"attack": f"{attack} {ALL}", "prompt": f"{prompt} {ALL}"}

    @property
    def gap_tables(self) -> Iterator[tuple[Markup, str, list[tables.Column]]]:
        """Yields (attributes, caption, columns) of the tables of gap ratios."""
        for metric in gap_metrics(self.data):
            for over in self.overs:
                for key, concept, words in self._concepts():
                    gaps = tables.gap_columns(self.data, metric, over, concept)
                    columns = tables.worst_columns(self.data, gaps) + gaps
                    keys = {"metric": str(self.metrics.index(metric))}
                    keys |= {"over": str(self.overs.index(over)), "concept": key}
                    caption = f"{metric}, {over} of the trajectory, {words}"
                    yield self.shown(**keys), caption, columns

    @property
    def before_tables(self) -> Iterator[tuple[Markup, str, list[tables.Column]]]:
        """Yields the same of what is measured without an attack."""
        for i, metric in enumerate(self.metrics):
            for key, concept, words in self._concepts():
                columns = tables.before_columns(self.data, metric, concept)
                if columns:
                    attributes = self.shown(metric=str(i), concept=key)
                    yield attributes, f"{metric} before any attack, {words}", columns

    def _concepts(self) -> Iterator[tuple[str, str, str]]:
        """Yields (choice, concept, how to say it) of the tables."""
        yield MEAN, "", "mean over concepts"
        if len(self.concepts) > 1:
            for i, concept in enumerate(self.concepts):
                yield str(i), concept, concept

    @property
    def without_gaps(self) -> list[tuple[Markup, str]]:
        """Returns (attributes, metric) of the metrics that have no gap ratios."""
        names = [m for m in self.metrics if m not in gap_metrics(self.data)]
        return [(self.shown(metric=str(self.metrics.index(m))), m) for m in names]

    @property
    def trajectories(self) -> Iterator[tuple[Markup, str, Markup]]:
        """Yields (attributes, label, plot) of each metric and attack."""
        for i, metric in enumerate(self.metrics):
            for match, svg in plots.trajectory_svgs(self.data, metric).items():
                attributes = self.shown(metric=str(i), **self.of_match(match))
                yield attributes, self._label(match), Markup(svg)

    @property
    def tradeoffs(self) -> Iterator[tuple[Markup, str, Markup]]:
        """Yields the same of each metric with gap ratios, part and attack."""
        for metric in gap_metrics(self.data):
            for j, over in enumerate(self.overs):
                i = self.metrics.index(metric)
                for match, svg in plots.tradeoff_svgs(self.data, metric, over).items():
                    keys = {"metric": str(i), "over": str(j)}
                    attributes = self.shown(**keys, **self.of_match(match))
                    yield attributes, self._label(match), Markup(svg)

    def _label(self, match: results.Match) -> str:
        return results.match_label(self.data, match)

    @property
    def strips(self) -> Iterator[tuple[Markup, images.Strip]]:
        """Yields (attributes, strip), one method after the other."""
        order = self.methods.index
        for strip in sorted(
            self._strips, key=lambda s: (order(s.cell["method"]), s.point["step"])
        ):
            cell, step = strip.cell, str(strip.point["step"])
            keys = {
                "subject": str(self.concepts.index(cell["concept"])),
                "side": str(self.sides.index(cell["side"])),
                "seed": str(self.seeds.index(cell["seed"])),
                "step": f"{step} {EVERY}" + (f" {LAST}" if strip.is_last else ""),
            }
            if cell["family"]:
                place = (cell["family"], cell["attack"], cell["prompt"])
                keys["case"] = str(self.matches.index(place))
            yield self.shown(**keys, method=str(order(cell["method"]))), strip


def _numbered(names) -> list[tuple[str, str]]:
    return [(str(i), name) for i, name in enumerate(names)]


def _with(choice: str, label: str, names: Sequence[str]) -> list[tuple[str, str]]:
    numbered = _numbered(names)
    return [(choice, label), *(numbered if len(numbered) > 1 else ())]


def _number_of(names: Sequence[str], name: str) -> str:
    return str(names.index(name)) if name in names else "0"
