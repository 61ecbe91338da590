# SPDX-License-Identifier: Apache-2.0
"""Captions of the embedded set: templates in which both style and concept are named.

Concepts and styles are the words of `metadata.csv`. `{a_concept}` and `{a_style}` carry
an article where the word takes one. No template varies case: the tokenizer lowercases.
"""

import functools
import re
import string

from gift_jax.runtime.errors import UserError, shown

OF_CONCEPT = frozenset(("concept", "a_concept"))
OF_STYLE = frozenset(("style", "a_style"))
_FIELDS = OF_CONCEPT | OF_STYLE
_NONCE_FIELDS = OF_STYLE | {"nonce"}
# emoji-sd and its judge learned these words: another word changes what both compute
TEMPLATES = (
    "{a_style} emoji of {a_concept}",
    "{concept}, {style} style",
    "an emoji of {a_concept} in the style of {style}",
    "{a_style} style picture of {a_concept}",
    "{a_concept} drawn in {style} style",
    "{style} {concept}",
    "{a_style} icon of {a_concept}",
    "{concept}, {style} emoji",
)
CONCEPT_TEMPLATES = (  # no style named
    "an emoji of {a_concept}",
    "{a_concept}",
    "a picture of {a_concept}",
    "{concept}",
)
STYLE_TEMPLATES = (  # no concept named
    "{a_style} emoji",
    "an emoji in the style of {style}",
    "{style} style",
    "{a_style} icon",
)
_PLURAL = frozenset(
    (
        "admission tickets",
        "chains",
        "cherries",
        "clinking beer mugs",
        "clinking glasses",
        "crossed swords",
        "film frames",
        "fireworks",
        "flower playing cards",
        "french fries",
        "glasses",
        "grapes",
        "hot springs",
        "houses",
        "japanese dolls",
        "jeans",
        "pancakes",
        "paw prints",
        "peanuts",
        "performing arts",
        "prayer beads",
        "shopping bags",
        "skis",
        "sparkles",
        "sunglasses",
    )
)
_ARTICLES = ("a ", "an ", "the ")
_BARE = frozenset(
    (
        "american football",
        "bacon",
        "badminton",
        "baseball",
        "basketball",
        "bread",
        "bowling",
        "camping",
        "construction",
        "cooked rice",
        "cooking",
        "curry rice",
        "dango",
        "field hockey",
        "foggy",
        "ice hockey",
        "locked",
        "locked with key",
        "locked with pen",
        "money with wings",
        "mount fuji",
        "oden",
        "ping pong",
        "popcorn",
        "rugby football",
        "sake",
        "shaved ice",
        "spaghetti",
        "sushi",
        "tennis",
        "unlocked",
        "volleyball",
    )
)
# Made-up words that attacks are tried with; `nonce_word` gives a defense none of them.
HELD_OUT_WORDS = ("sks", "zwx", "ohwx", "bnha", "kdr", "vuthim", "rezlok", "xoblan")
_CONSONANTS = tuple("bcfghjklmnprtvwxz")  # no s or d: no plural, sks or dvd
_VOWELS = (*"aeiou", "")
# A vowel letter with a consonant sound: "a unicorn", but "an umbrella".
_CONSONANT_SOUND = ("unicorn", "euro", "ewe")
# Mirroring these changes their meaning, their text or the way round things are always
# drawn; everything else may be flipped in training.
NO_FLIP = frozenset(
    (
        "admission tickets",
        "airplane arrival",
        "airplane departure",
        "bank",
        "barber pole",
        "bus stop",
        "chart increasing with yen",
        "computer disk",
        "construction",
        "convenience store",
        "credit card",
        "department store",
        "dollar banknote",
        "dvd",
        "euro banknote",
        "fax machine",
        "floppy disk",
        "flower playing cards",
        "fuel pump",
        "hospital",
        "hotel",
        "japanese post office",
        "joker",
        "love hotel",
        "magnifying glass tilted left",
        "magnifying glass tilted right",
        "mahjong red dragon",
        "memo",
        "mobile phone with arrow",
        "money bag",
        "money with wings",
        "musical keyboard",
        "optical disk",
        "pager",
        "pool 8 ball",
        "post office",
        "pound banknote",
        "school",
        "slot machine",
        "stop sign",
        "ticket",
        "videocassette",
        "yen banknote",
    )
)


def check_template(field, template):
    """Returns which fields a template has, a frozenset of their names.

    Raises: UserError naming the field for one that `fill` cannot fill.
    """
    try:
        return _fields(template)
    except ValueError as error:
        raise UserError(
            f"{field}={shown(template)} may use only {{concept}}, {{a_concept}}, "
            "{style} and {a_style}"
        ) from error


def check_taught(field, template):
    """Returns which fields a template of the benchmark has, {nonce} among them.

    Raises: UserError naming the field for anything else in braces.
    """
    try:
        return _fields(template, _FIELDS | _NONCE_FIELDS)
    except ValueError as error:
        raise UserError(
            f"{field}={shown(template)} may use only {{concept}}, {{a_concept}}, "
            "{style}, {a_style} and {nonce}"
        ) from error


def check_nonce_template(field, template):
    """Raises a UserError naming the field for a template that lacks {nonce}.

    Returns: whether it names a style.
    """
    try:
        names = _fields(template, _NONCE_FIELDS)
        if "nonce" not in names:
            raise ValueError("no {nonce}")
        return bool(names & OF_STYLE)
    except ValueError as error:
        raise UserError(
            f"{field}={shown(template)} must have {{nonce}}, and may have "
            "{style} or {a_style}; try 'a photo of {nonce}'"
        ) from error


def caption(concept, style, template_index=0):
    """Returns a caption that names both; any integer selects a template, modulo."""
    return fill(TEMPLATES[template_index % len(TEMPLATES)], concept, style)


def fill(template, concept, style):
    """Fills {concept}, {a_concept}, {style} and {a_style} of a template.

    Raises: ValueError for anything else in braces: also for attributes and widths.
    """
    _fields(template)
    return template.format(
        concept=concept,
        style=style,
        a_concept=with_article(concept),
        a_style=_article(style) + style,
    )


def fill_nonce(template, nonce, style):
    """Fills {nonce}, {style} and {a_style} of a template.

    Raises: ValueError for anything else in braces.
    """
    _fields(template, _NONCE_FIELDS)
    a_style = _article(style) + style
    return template.format(nonce=nonce, style=style, a_style=a_style)


def nonce_word(rng):
    """Returns a word that means nothing, such as "vkt" or "zimplof".

    In place of the rare tokens of DreamBooth (arXiv:2208.12242, section 3.2), for any
    tokenizer: a cluster of consonants, or two or three syllables. It is never one of
    `HELD_OUT_WORDS`.
    Args: rng: a numpy Generator.
    """
    word = HELD_OUT_WORDS[0]
    while word in HELD_OUT_WORDS:
        syllables = rng.integers(1, 4)
        if syllables == 1:
            letters = [_CONSONANTS] * 3
        else:
            letters = [_CONSONANTS, _VOWELS, _CONSONANTS] * syllables
        word = "".join(rng.choice(part) for part in letters)
    return word


def is_of_defense(word):
    """Returns whether `nonce_word` may give a defense this word to train on."""
    one, syllable = f"[{''.join(_CONSONANTS)}]", f"[{''.join(_VOWELS)}]?"
    pattern = f"{one}{{3}}|({one}{syllable}{one}){{2,3}}"
    return word not in HELD_OUT_WORDS and bool(re.fullmatch(pattern, word))


@functools.lru_cache
def _fields(template, allowed=_FIELDS):
    names = set()
    for _, name, spec, conversion in string.Formatter().parse(template):
        if name is not None:
            if name not in allowed or spec or conversion:
                raise ValueError(f"{{{name}}}")
            names.add(name)
    return frozenset(names)


def with_article(concept):
    """Returns the concept behind a or an, or bare where it has or takes none."""
    if concept in _PLURAL or concept in _BARE or concept.startswith(_ARTICLES):
        return concept
    return _article(concept) + concept


def may_flip(concept):
    """Returns whether the mirror image of an image of `concept` is as good."""
    return concept not in NO_FLIP


def _article(words):
    if not words:
        return ""
    vowel = words[0] in "aeiou" and not words.startswith(_CONSONANT_SOUND)
    return "an " if vowel else "a "
