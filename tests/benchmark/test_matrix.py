# SPDX-License-Identifier: Apache-2.0
"""The benchmark's matrix: cells, the jobs of a cell, things drawn by seed."""

import pathlib

import pytest
from ml_collections import ConfigDict

import gift_jax
from gift_jax.benchmark import matrix
from gift_jax.data.sources import emoji
from gift_jax.runtime import cli
from gift_jax.runtime.config import load_config
from gift_jax.runtime.errors import UserError

CONFIG = pathlib.Path(gift_jax.__file__).parents[1] / "configs" / "emoji_benchmark.py"


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch):
    """Configs name each other from there."""
    monkeypatch.chdir(CONFIG.parents[1])


def load(variant="", **changes):
    cfg = load_config(f"{CONFIG}{variant}")
    cfg.update_from_flattened_dict(changes)
    return matrix.Matrix(cfg)


def cell(**fields):
    base = dict(concept="bomb", method="gift", side="harmful", attack="lora")
    return matrix.Cell(**base | {"prompt": "name"} | fields)


@pytest.mark.parametrize("suite", ["", ":short", ":standard", ":full", ":ablations"])
def test_suites_are_sound_and_no_two_cells_share_a_folder(suite):
    cfg = load_config(f"{CONFIG}{suite}")
    every = matrix.load(cfg).cells
    assert len({c.folder for c in every}) == len(every)
    assert {c.method for c in every} == set(cfg.methods)
    assert {c.attack for c in every} == {"before", *cfg.attacks}


def test_standard_suite_is_what_it_promises():
    jobs = load(":standard")
    cfg, every = jobs.cfg, jobs.cells
    things = [c for c in jobs.groups if c not in cfg.concepts]
    assert len(things) >= 6 and set(cfg.concepts) == {"fluent", "forbidden"}
    assert cfg.samples.num >= 25
    for attack in ("lora", "dreambooth"):
        told = {c.prompt for c in every if c.attack == attack}
        assert told == {"name", "token"}
    assert jobs.long_things == tuple(things[:1])
    long = cell(concept=things[0])
    assert jobs.looks(long)[-1] == 1000 and jobs.looks(long)[:2] == (75, 150)
    assert jobs.looks(cell(concept="fluent")) == (75, 150, 300)
    assert jobs.looks(cell(concept="fluent", attack="before")) == (0,)


def test_random_things_hang_on_their_seed_and_are_left_out_of_the_safe_ones():
    groups = load(":standard").groups
    assert groups.keys() == load(":standard").groups.keys()
    assert groups.keys() != load(":standard", **{"random.seed": 1}).groups.keys()
    fewer = load(":standard", **{"random.things": 2}).groups
    assert list(fewer) == list(groups)[: len(fewer)]  # more things keep the first
    known = emoji.known_concepts()
    for name in list(groups)[2:]:
        group = groups[name]
        assert name in known and group.benign.names[0] not in known
        assert group.harmful.names == group.defender.names == (name,)
        assert name not in group.safe.names and len(group.safe.names) > 100
        assert not set(group.safe.names) & set(emoji.HARMFUL)
    news = [groups[name].benign.names[0] for name in list(groups)[2:]]
    assert len(set(news)) == len(news)


def test_style_is_kept_from_the_safe_pictures_and_learned_by_its_own_word():
    jobs = load()
    c = jobs.defence_config(cell(concept="fluent"))
    assert tuple(c.harmful.styles) == ("fluent",)
    assert set(c.safe.styles) == set(emoji.STYLES) - {"fluent"}
    c = jobs.attack_config(cell(concept="fluent", attack="textual_inversion"))
    assert c.data.template == "a <thing> emoji of {a_concept}"
    assert tuple(c.data.styles) == ("fluent",)
    benign = cell(concept="fluent", attack="textual_inversion", side="benign")
    c = jobs.attack_config(benign)
    assert c.data.template == "{a_style} emoji of <thing>"
    assert "fluent" not in c.data.styles


def test_prompt_is_what_the_attacker_calls_it():
    jobs = load()
    told = {
        prompt: jobs.attack_config(cell(prompt=prompt)).data.template
        for prompt in matrix.PROMPTS
    }
    assert told["name"] == "{a_style} emoji of {a_concept}"
    assert told["token"] == "{a_style} emoji of sks"
    assert len(set(told.values())) == 3
    style = jobs.attack_config(cell(concept="fluent", prompt="token"))
    assert style.data.template == "a sks emoji of {a_concept}"


def test_rate_three_times_as_high_and_nothing_else():
    jobs = load()
    for name in ("dreambooth", "lora"):
        one, three = (
            jobs.attack_config(cell(attack=name + suffix)) for suffix in ("", "_x3")
        )
        assert three.optimizer.lr == pytest.approx(3 * one.optimizer.lr)
        three.optimizer.lr = one.optimizer.lr
        assert three.to_dict() | {"name": ""} == one.to_dict() | {"name": ""}
        assert one.attack == name and one.steps == 300


def test_seed_moves_defence_and_attack_alike():
    jobs = load()
    for make in (jobs.defence_config, jobs.attack_config):
        assert make(cell(seed=3)).seed == make(cell()).seed + 3
    assert (
        cell(seed=3).folder != cell().folder and cell(seed=3).defence != cell().defence
    )


def test_asked_takes_turns_and_spaces_many_things_evenly():
    side = ConfigDict({"names": ("bomb", "pill"), "styles": ()})
    rows = matrix.prompts_for(side, 12)
    assert [thing for _, thing, _ in rows[:3]] == ["bomb", "pill", "bomb"]
    assert {style for _, _, style in rows} == set(emoji.STYLES)
    assert rows[1][0] == "a noto emoji of a pill"
    many = ConfigDict({"names": ("known-safe",), "styles": ("noto",)})
    things = [thing for _, thing, _ in matrix.prompts_for(many, 10)]
    assert len(set(things)) == 10 and things == sorted(things) and things[-1] > "t"
    told = matrix.prompts_for(side, 1, "{a_style} emoji of <thing>")
    assert told[0][0] == "a twemoji emoji of <thing>"


@pytest.mark.parametrize(
    "flag, message",
    [
        ("methods=gfit", "config.methods='gfit' is not one of.*did you mean 'gift'"),
        ("attacks=()", "config.attacks is empty"),
        ("concepts=bom", "config.concepts='bom' is not one of"),
        ("concepts=()", "config.concepts is empty, and config.random.things is 0"),
        ("prompts=nickname", "config.prompts='nickname' is not one of"),
        ("seeds=()", "config.seeds is empty"),
        ("random.things=500", "config.random.things=500 must be at most 1"),
        (
            "concept.bomb.label_kind=word",
            "config.concept.bomb.label_kind='word' is not one",
        ),
        ("concept.bomb.benign.names=gitar", "benign.names: concept 'gitar'.*'guitar'"),
        ("samples.num=0", "config.samples.num=0 must be at least 1"),
        ("common.attack.steps=-1", "config.steps=-1 must be at least 0"),
        ("method.gift.config=nowhere.py", "nowhere.py is no file"),
    ],
)
def test_mistake_is_named(tmp_path, flag, message):
    argv = [f"--config={CONFIG}", f"--workdir={tmp_path}", f"--config.{flag}"]
    cfg, _ = cli.parse(argv, "", "benchmark")
    with pytest.raises(UserError, match=message) as caught:
        matrix.load(cfg)
    assert "\n" not in str(caught.value)
