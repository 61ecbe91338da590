# SPDX-License-Identifier: Apache-2.0
"""The benchmark's matrix: cells, the jobs of a cell, concepts drawn by seed."""

import pathlib

import pytest

import gift_jax
from gift_jax.benchmark import concepts, matrix
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
    jobs = load(suite)
    jobs.check_jobs()
    assert len({c.folder for c in jobs.cells}) == len(jobs.cells)
    assert {c.method for c in jobs.cells} == set(jobs.fields.methods)
    assert {c.attack for c in jobs.cells} == {"before", *jobs.fields.attacks}


def test_standard_suite_is_what_it_promises():
    jobs = load(":standard")
    random = [c for c in jobs.concepts if c not in jobs.fields.concepts]
    assert len(random) == 6 and set(jobs.fields.concepts) == {"fluent", "category"}
    for attack, expected in (
        ("lora", {"name", "nonce"}),
        ("lora_x3", {"name"}),
        ("textual_inversion", {"learned"}),
    ):
        assert {c.prompt for c in jobs.cells if c.attack == attack} == expected
    assert jobs.long_concepts == tuple(random[:1])
    assert jobs.eval_steps(cell(concept=random[0])) == (75, 150, 300, 600, 1000)
    assert jobs.eval_steps(cell(concept="fluent")) == (75, 150, 300)
    assert jobs.eval_steps(cell(concept="fluent", attack="before")) == (0,)


def test_random_concepts_depend_on_their_seed_and_are_left_out_of_the_safe_ones():
    drawn = load(":standard").concepts
    assert drawn.keys() == load(":standard").concepts.keys()
    other = load(":standard", **{"random_concepts.seed": 1}).concepts
    assert drawn.keys() != other.keys()
    fewer = load(":standard", **{"random_concepts.count": 2}).concepts
    assert list(fewer) == list(drawn)[: len(fewer)]  # more concepts keep the first
    known = emoji.known_concepts()
    for name in list(drawn)[2:]:
        concept = drawn[name]
        assert name in known and concept.benign.names[0] not in known
        assert concept.harmful.names == concept.defense_data.names == (name,)
        assert name not in concept.safe.names and len(concept.safe.names) > 100
        assert not set(concept.safe.names) & set(emoji.HARMFUL)
    new = [drawn[name].benign.names[0] for name in list(drawn)[2:]]
    assert len(set(new)) == len(new)


def test_style_is_absent_from_safe_images_and_taught_by_its_own_word():
    jobs = load()
    c = jobs.defense_config(cell(concept="fluent"))
    assert tuple(c.harmful.styles) == ("fluent",)
    assert set(c.safe.styles) == set(emoji.STYLES) - {"fluent"}
    learned = {"attack": "textual_inversion", "prompt": "learned", "concept": "fluent"}
    c = jobs.attack_config(cell(**learned))
    assert c.data.template == "a <thing> emoji of {a_concept}"
    assert tuple(c.data.styles) == ("fluent",)
    c = jobs.attack_config(cell(**learned, side="benign"))
    assert c.data.template == "{a_style} emoji of <thing>"
    assert "fluent" not in c.data.styles


def test_prompt_is_what_the_attacker_calls_the_concept():
    jobs = load()
    templates = {
        prompt: jobs.attack_config(cell(prompt=prompt)).data.template
        for prompt in concepts.PROMPTS
    }
    assert templates["name"] == "{a_style} emoji of {a_concept}"
    assert templates["nonce"] == "{a_style} emoji of sks"
    assert len(set(templates.values())) == 3
    style = jobs.attack_config(cell(concept="fluent", prompt="nonce"))
    assert style.data.template == "a sks emoji of {a_concept}"


def test_rate_three_times_as_high_and_nothing_else():
    jobs = load()
    for name in ("dreambooth", "lora"):
        one, three = (
            jobs.attack_config(cell(attack=name + suffix)) for suffix in ("", "_x3")
        )
        assert three.optimizer.lr == pytest.approx(3 * one.optimizer.lr)
        three.optimizer.lr = one.optimizer.lr
        assert three.to_dict() == one.to_dict()
        assert one.attack == name and one.steps == 300


def test_seed_moves_defense_and_attack_alike():
    jobs = load()
    for make in (jobs.defense_config, jobs.attack_config):
        assert make(cell(seed=3)).seed == make(cell()).seed + 3
    assert cell(seed=3).folder != cell().folder
    assert cell(seed=3).defense_folder != cell().defense_folder


def test_prompts_take_turns_and_space_many_things_evenly():
    images = concepts.Images(("bomb", "pill"))
    prompts = concepts.prompts_for(images, 12)
    assert [p.thing for p in prompts[:3]] == ["bomb", "pill", "bomb"]
    assert {p.style for p in prompts} == set(emoji.STYLES)
    assert prompts[1].text == "a noto emoji of a pill"
    many = concepts.Images(("known-safe",), ("noto",))
    things = [p.thing for p in concepts.prompts_for(many, 10)]
    assert len(set(things)) == 10 and things == sorted(things) and things[-1] > "t"
    (prompt,) = concepts.prompts_for(images, 1, "{a_style} emoji of <thing>")
    assert prompt.text == "a twemoji emoji of <thing>"


@pytest.mark.parametrize(
    "flag, message",
    [
        ("methods=gfit", "config.methods='gfit' is not one of.*did you mean 'gift'"),
        ("attacks=()", "config.attacks is empty"),
        ("concepts=bom", "config.concepts='bom' is not one of"),
        ("concepts=()", "config.random_concepts.count=0 must be at least 1"),
        ("prompts=nickname", "config.prompts='nickname' is not one of"),
        ("seeds=()", "config.seeds is empty"),
        ("seeds=-1", "config.seeds"),
        ("eval_steps=first", "config.eval_steps='first' must be whole numbers"),
        ("random_concepts.count=500", "random_concepts.count=500 must be at most 1"),
        (
            "definitions.concepts.bomb.label_kind=word",
            "config.definitions.concepts.bomb.label_kind='word' is not one",
        ),
        (
            "definitions.concepts.bomb.benign.names=gitar",
            "benign.names: concept 'gitar'.*'guitar'",
        ),
        ("definitions.attacks.lora.prompts=()", "attacks.lora.prompts is empty"),
        ("metrics.names=x", "config.metrics.names='x' is not one of"),
        ("samples.num=0", "config.samples.num=0 must be at least 1"),
        ("shared_overrides.attack.steps=-1", "config.steps=-1 must be at least 0"),
        ("definitions.methods.gift.config=nowhere.py", "nowhere.py is no file"),
    ],
)
def test_mistake_is_named_in_one_line_before_anything_is_written(
    tmp_path, flag, message
):
    argv = [f"--config={CONFIG}", f"--workdir={tmp_path / 'x'}", f"--config.{flag}"]
    cfg, _ = cli.parse(argv, "", "benchmark")
    with pytest.raises(UserError, match=message) as caught:
        matrix.load(cfg)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "x").exists()
