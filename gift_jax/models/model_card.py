# SPDX-License-Identifier: Apache-2.0
"""The README.md of an exported model: what was done, to what, how, and its limits."""

import dataclasses
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from gift_jax.models import weights
from gift_jax.models.folder import ModelFolder
from gift_jax.runtime.versions import versions
from gift_jax.runtime.workdir import phase_folders


@dataclasses.dataclass(frozen=True)
class RunSummary:
    """What a command says of its run.

    Attributes: method: the defense's title. attack: the attack's name, of an attacked
      model; one of both is given. trained: in words, what trained; "{denoiser}" stands
      for what the model's is called. steps: how many.
      worst_case: in words, what the best attack on this method reached. added: in
      words, each file that was added to the model before.
    """

    trained: str
    steps: str
    method: str = ""
    attack: str = ""
    worst_case: str = ""
    added: tuple[str, ...] = ()


_CARD = """---
{% if license %}
license: {{ license }}
{% endif %}
base_model: {{ base }}
library_name: diffusers
pipeline_tag: text-to-image
tags: [gift_jax, {{ "attacked" if attack else "immunized" }}]
---

# {{ title }}

{% if attack %}
A Stable Diffusion model after a fine-tuning attack ({{ attack }}), made to measure a
defense. **Not for release**: it may draw what its makers forbid.
{% else %}
A Stable Diffusion model that was changed so that fine-tuning it on what its makers
forbid is harder. Method: {{ method }}.
{% endif %}

- Changed from `{{ base }}`{{ ", revision `" ~ revision ~ "`" if revision }}; sha256 of
  its files{{ " and of those added" if added }}: `{{ sha256 }}`.
{% for file in added %}
- Added to it before: {{ file }}.
{% endfor %}
{% if attack %}
- Learned from: {{ harmful }}.
{% else %}
- What it should not learn: {{ harmful }}.
{% if safe %}
- What it should keep, and stay able to learn: {{ safe }}.
{% endif %}
{% endif %}
- Trained: {{ trained }}. Every other tensor is the base model's, byte for byte
{{- ", or as the added files have it" if added }}.
- Steps: {{ steps }}.

## Measured
{% if metrics %}

After {{ after }}, of the training itself:

| | |
| --- | --- |
{% for name, value in metrics.items() %}
| {{ name }} | {{ value }} |
{% endfor %}
{% endif %}

{% if worst_case %}
Of this method, on the small model that comes with gift_jax, the worst case over attacks
of 150 steps: {{ worst_case }}. Of this model it is not measured.
{% endif %}

Nothing here is evidence of protection: `python -m gift_jax.benchmark` attacks the model
and measures what is left, `python -m gift_jax.evaluate` measures what it draws.

## Limits

{% if attack %}
What an attack of this kind and length reaches says nothing of a longer or another one.
{% else %}
Immunization raises the cost of malicious fine-tuning; it does not make it impossible.
Longer attacks, higher learning rates, other methods and other words than those it was
measured with may succeed, and whoever has the base model is not hindered at all. It is
no content filter: what the base model draws when asked, this one may draw too.
{% endif %}

## License

{% if license %}
That of the base model: `{{ license }}`. Its restrictions hold for this model too
{{- ", and so do those of the added files" if added }}.
{% else %}
That of the base model, which its folder or its page names. Its restrictions hold for
this model too{{ ", and so do those of the added files" if added }}.
{% endif %}

## Config

Made with {{ versions }}.

```json
{{ config }}
```
"""


_MERGED = """---
{% if license %}
license: {{ license }}
{% endif %}
base_model: {{ base }}
library_name: diffusers
pipeline_tag: text-to-image
tags: [gift_jax]
---

# {{ title }}, with added files

The model `{{ base }}` (sha256 of its files: `{{ sha256 }}`) with these merged into its
weights:

{% for file in added %}
- {{ file }}
{% endfor %}

Nothing was trained; every other tensor is the base model's. Made with {{ versions }}.

## License

That of the base model{{ ": `" ~ license ~ "`" if license else ", which its folder or
its page names" }}. Its restrictions hold for this model too, and so do those of the
added files.
"""


def of_run(
    workdir: pathlib.Path,
    base: ModelFolder,
    summary: RunSummary,
    step: int | None = None,
) -> str:
    """Returns the card of a run's model, after its last step or another one."""
    summary = dataclasses.replace(summary, added=base.added_files())
    recorded = json.loads((workdir / "config.json").read_text())
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    every = {line["step"]: line for line in map(json.loads, lines)}
    metrics = every.get(max(every, default=0) if step is None else step, {})
    phases = phase_folders(workdir) if step is None else []
    for folder in phases:
        metrics |= json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    after = "the last step of each phase" if phases else ""
    return card(recorded, base.path, summary, metrics=metrics, after=after)


def card(
    recorded: Mapping[str, Any],
    base_folder: pathlib.Path,
    summary: RunSummary,
    *,
    metrics: Mapping[str, float] | None = None,
    after: str = "",
) -> str:
    """Returns the Markdown of a run's exported model.

    Args: recorded: the run's config.json. base_folder: of the model that it changed;
      its README.md says the license. summary: in words. metrics: a line of the run's
      metrics.jsonl. after: when they were taken, in words; default: its step.
    """
    import jinja2  # takes a tenth of what --help would wait for

    attack = summary.attack
    denoiser = weights.DENOISERS[weights.denoiser_of(base_folder)]
    recorded = _public(recorded)
    name = pathlib.PurePath(recorded["model"]).name
    metrics = metrics or {}
    template = jinja2.Template(_CARD, trim_blocks=True, keep_trailing_newline=True)
    return template.render(
        title=f"{name}, {'attacked' if attack else 'immunized'}",
        attack=attack,
        method=summary.method,
        base=recorded["model"],
        revision=recorded.get("revision", ""),
        sha256=recorded.get("base_sha256", "unknown"),
        harmful=_pairs(recorded["data" if attack else "harmful"]),
        safe=_pairs(recorded["safe"]) if "safe" in recorded else "",
        added=summary.added,
        trained=summary.trained.replace("{denoiser}", denoiser),
        steps=summary.steps,
        worst_case=summary.worst_case,
        after=after or f"step {metrics.get('step', 0)}",
        metrics={
            name: f"{value:.4g}"
            for name, value in metrics.items()
            if name != "step" and not name.startswith("time/")
        },
        license=license_of(base_folder),
        versions=", ".join(f"{name} {v}" for name, v in versions().items()),
        config=json.dumps(recorded, indent=1, sort_keys=True),
    )


def of_merged(name: str, folder: ModelFolder) -> str:
    """Returns the card of a model with added files merged, in which nothing trained.

    Args: name: of the model, a folder or a hub id. folder: with the added files.
    """
    import jinja2

    name = _public(name)
    template = jinja2.Template(_MERGED, trim_blocks=True, keep_trailing_newline=True)
    return template.render(
        base=name,
        title=pathlib.PurePath(name).name,
        sha256=weights.content_hash(folder.path),
        added=folder.added_files(),
        license=license_of(folder.path),
        versions=", ".join(f"{name} {v}" for name, v in versions().items()),
    )


def _public(value: Any) -> Any:
    """Returns a config without the folders of the machine that it ran on."""
    if isinstance(value, dict):
        return {name: _public(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_public(one) for one in value]
    if isinstance(value, str) and value.startswith(("/", "~", ".")):
        return pathlib.PurePath(value).name
    return value


def _pairs(group: Mapping[str, Any]) -> str:
    """Returns in words where a group's pairs came from."""
    if group["names"]:
        names, styles = list(group["names"]), ", ".join(group["styles"]) or "all"
        more = f" and {len(names) - 5} more" if len(names) > 6 else ""
        text = ", ".join(names[:5] if more else names) + more
        return f"{text} (styles: {styles}) of the embedded emoji"
    if group["num_generated"]:
        count, prompt = group["num_generated"], group["prompt"]
        return f"{count} pictures that it drew itself: {prompt!r}"
    source = "folder" if group["folder"] else "tfds"
    prompt = f", all under {group['prompt']!r}" if group["prompt"] else ""
    where = pathlib.PurePath(group[source]).name
    return f"{where} ({source}){prompt}" if where else "nothing"


def license_of(folder: pathlib.Path) -> str:
    """Returns the license that a model folder's README.md names in its head, or ""."""
    file = pathlib.Path(folder) / "README.md"
    if not file.is_file():
        return ""
    text = file.read_text(encoding="utf-8", errors="replace")
    head = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    match = (
        re.search(r"^license: *([\w.+-]+) *$", head[1], re.MULTILINE) if head else None
    )
    return match[1] if match else ""
