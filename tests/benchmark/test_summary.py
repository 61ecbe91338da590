# SPDX-License-Identifier: Apache-2.0
"""Gap ratios from the cells of a benchmark."""

import pytest

from gift_jax.benchmark import summary


def cell(method, concept, values, side="harmful", **others):
    points = [
        {"step": step, "values": {"classifier_accuracy": value}}
        for step, value in values.items()
    ]
    base = {"method": method, "concept": concept, "side": side, "attack": "lora"}
    base |= {"family": "lora", "prompt": "name", "seed": 0, "points": points}
    return base | others


CELLS = [
    cell("original", "bomb", {}, attack="before", family=""),
    cell("original", "bomb", {100: 0.5, 300: 1.0}),
    cell("gift", "bomb", {100: 0.1, 300: 0.2}),
    cell("original", "owl", {100: 1.0, 300: 1.0, 1000: 1.0}),
    cell("gift", "owl", {100: 0.5, 300: 1.0, 1000: 0.0}),
    cell("original", "bomb", {100: 0.0, 300: 0.0}, "benign"),
    cell("gift", "bomb", {100: 0.1, 300: 0.3}, "benign"),
]


def rows_of(cells, **fields):
    rows = summary.summarize(cells, ["classifier_accuracy"])
    return [row for row in rows if all(row[k] == v for k, v in fields.items())]


def test_ratios_are_of_the_steps_that_all_concepts_have():
    (mean,) = rows_of(CELLS, over="mean")
    assert (mean["method"], mean["attack"], mean["metric"]) == (
        "gift",
        "lora",
        "classifier_accuracy",
    )
    assert mean["harmful"]["per_concept"] == pytest.approx({"bomb": 0.8, "owl": 0.25})
    assert mean["harmful"]["value"] == pytest.approx(0.525)
    assert 0.25 <= mean["harmful"]["low"] < 0.525 < mean["harmful"]["high"] <= 0.8
    (final,) = rows_of(CELLS, over="final")
    assert final["harmful"]["per_concept"] == pytest.approx({"bomb": 0.8, "owl": 0.0})
    (peak,) = rows_of(CELLS, over="peak")
    assert peak["harmful"]["per_concept"] == pytest.approx({"bomb": 0.8, "owl": 0.0})


def test_side_where_the_original_reaches_nothing_has_no_ratio():
    assert [row["benign"] for row in rows_of(CELLS)] == [None, None, None]


def test_seeds_are_averaged_and_negative_similarities_count_as_none():
    cells = [
        cell("original", "bomb", {300: 0.6}),
        cell("original", "bomb", {300: 1.0}, seed=1),
        cell("gift", "bomb", {300: -0.4}),
        cell("gift", "bomb", {300: 0.4}, seed=1),
    ]
    (final,) = rows_of(cells, over="final")
    assert final["harmful"]["per_concept"]["bomb"] == pytest.approx(0.75)


def test_order_is_that_of_the_cells_and_the_original_has_no_row():
    cells = [
        cell(method, "bomb", {300: 0.5}, attack=attack)
        for method in ("original", "gift", "esd")
        for attack in ("lora_x3", "lora")
    ]
    rows = rows_of(cells, over="final")
    assert [(row["method"], row["attack"]) for row in rows] == [
        ("gift", "lora_x3"),
        ("gift", "lora"),
        ("esd", "lora_x3"),
        ("esd", "lora"),
    ]


def test_method_without_its_original_has_no_ratio():
    assert [row["harmful"] for row in rows_of([cell("gift", "bomb", {300: 0.5})])] == [
        None
    ] * 3


def test_comparison_pairs_concepts_and_keeps_what_both_methods_have():
    cells = [
        *CELLS[1:5],
        cell("esd", "bomb", {100: 0.5, 300: 0.5}),
        cell("esd", "owl", {100: 1.0, 300: 0.9, 1000: 0.0}),
        cell("esd", "cat", {100: 1.0, 300: 0.9}),
        cell("original", "cat", {100: 1.0, 300: 1.0}),
        cell("esd", "bomb", {100: 1.0, 300: 1.0}, attack="dreambooth"),
        cell("original", "bomb", {100: 1.0, 300: 1.0}, attack="dreambooth"),
    ]
    rows = summary.summarize(cells, ["classifier_accuracy"])
    result = summary.compare(rows, "gift", "esd", "classifier_accuracy", "final")
    assert result["benign"] is None
    harmful = result["harmful"]
    assert harmful["pairs"] == 2 and harmful["is_chance"]
    assert harmful["concepts"] == ["bomb", "owl"]
    assert list(harmful["by_attack"]) == [("lora", "name")]
    # after 300 steps: gift 0.8 on bomb and 0 on owl, esd 0.5 and 0.1
    assert harmful["means"] == pytest.approx((0.4, 0.3))
    assert harmful["difference"] == pytest.approx(-0.1)
    assert harmful["low"] == pytest.approx(-0.3) and harmful["high"] == pytest.approx(
        0.1
    )
    other = summary.compare(rows, "esd", "gift", "classifier_accuracy", "final")
    assert other["harmful"]["difference"] == pytest.approx(0.1)


def test_comparison_pairs_seeds_and_says_when_it_is_chance():
    def cells(method, values):
        return [
            cell(method, concept, {300: value}, seed=seed)
            for (concept, seed), value in values.items()
        ]

    units = [(c, s) for c in ("bomb", "owl", "cat") for s in (0, 1)]
    noise = dict(zip(units, (0.0, 0.3, 0.1, 0.4, 0.2, 0.5), strict=True))
    data = cells("original", dict.fromkeys(units, 1.0))
    data += cells("gift", {u: 0.5 - n / 2 for u, n in noise.items()})
    data += cells("esd", {u: 0.55 - n / 2 for u, n in noise.items()})
    data += cells("uce", {u: 0.25 + n for u, n in noise.items()})
    rows = summary.summarize(data, ["classifier_accuracy"])

    def harmful(second):
        return summary.compare(rows, "gift", second, "classifier_accuracy", "final")[
            "harmful"
        ]

    # a small difference that is the same in every pair is none of chance
    assert harmful("esd")["difference"] == pytest.approx(-0.05)
    assert not harmful("esd")["is_chance"] and harmful("esd")["pairs"] == 6
    few = [row for row in data if row["concept"] != "cat"]
    few = summary.summarize(few, ["classifier_accuracy"])
    few = summary.compare(few, "gift", "esd", "classifier_accuracy", "final")["harmful"]
    assert few["is_chance"] and few["pairs"] == 4 and few["high"] < 0
    # a larger one that varies is
    assert abs(harmful("uce")["difference"]) > 0.05 and harmful("uce")["is_chance"]
    gift = next(r for r in rows if r["method"] == "gift" and r["over"] == "final")
    assert gift["harmful"]["per_seed"]["bomb"] == {"0": 0.5, "1": 0.65}


HEADLINE = [
    cell("original", "bomb", {100: 0.5, 300: 1.0}),
    cell("original", "bomb", {300: 0.9}, prompt="nonce"),
    cell("original", "bomb", {100: 0.8, 300: 0.6}, "benign"),
    cell("original", "bomb", {0: 0.97}, "retained", attack="before", family=""),
    cell("gift", "bomb", {100: 0.3, 300: 0.1}),
    cell("gift", "bomb", {300: 0.9}, prompt="nonce"),
    cell("gift", "bomb", {300: 1.0}, attack="interpolation", is_bound=True),
    cell("gift", "bomb", {100: 0.6, 300: 0.6}, "benign"),
    cell("gift", "bomb", {0: 0.95}, "retained", attack="before", family=""),
]


def test_headline_is_the_worst_case_beside_the_mean():
    HEADLINE[-1]["points"][0]["values"] |= {"twin_rms": 0.1, "judge_lpips_twin": 0.4}
    bound, original, gift = summary.headline(HEADLINE, "classifier_accuracy")
    assert bound["method"] == summary.IGNORANCE and bound["worst"]["value"] == 0.8
    assert original["worst"]["value"] == 1.0 and original["worst_gap"] is None
    # the prompt and the step that suit the attacker; a bound is no worst case
    worst = {"value": 0.9, "step": 300, "attack": "lora", "prompt": "nonce"}
    assert gift["worst"] == worst | {"concept": "bomb", "seed": 0}
    assert gift["mean"] == pytest.approx(0.6)
    assert gift["worst_gap"] == {"value": 0.0, "attack": "lora", "prompt": "nonce"}
    assert gift["harmful_gap"]["value"] == pytest.approx((0.7 + 0.0) / 2)
    assert gift["benign_gap"]["value"] == pytest.approx(0.25)
    assert gift["retained"] == 0.95 and original["retained"] == 0.97
    assert summary.fidelity(gift) == ("judge_lpips_twin", 0.4)
    assert summary.fidelity(original) is None


def test_spreads_of_an_attack_are_between_defenses_and_between_seeds():
    cells = [
        cell("original", "bomb", {300: 1.0}),
        cell("gift", "bomb", {300: 0.2}),
        cell("gift", "bomb", {300: 0.8}, seed=1),
        cell("gift", "owl", {300: 0.5}),
        cell("gift", "owl", {300: 0.4}, seed=1),
        cell("esd", "bomb", {300: 0.9}),
        cell("esd", "bomb", {100: 0.1, 300: 0.7}, attack="dreambooth"),
    ]
    lora, dreambooth = summary.attack_spreads(cells, "classifier_accuracy")
    assert (lora["attack"], dreambooth["attack"]) == ("lora", "dreambooth")
    assert lora["defenses"] == pytest.approx((0.9 - 0.475) / 2, abs=1e-4)
    assert lora["seeds"] == pytest.approx((0.6 + 0.1) / 2)
    assert dreambooth["defenses"] is None and dreambooth["seeds"] is None
