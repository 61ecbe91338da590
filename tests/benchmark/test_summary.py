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
    found = summary.compare(rows, "gift", "esd", "classifier_accuracy", "final")
    assert found["benign"] is None
    harmful = found["harmful"]
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
