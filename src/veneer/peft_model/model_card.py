"""Writes the model card beside saved adapters: ``README.md``, by which the hub and Trainer recognise them.

Its head (library, base, tags) is brought up to date; its text stays as it is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer._version import __version__
from veneer.configs.base import PeftConfig
from veneer.files.atomic_write import atomic_write
from veneer.files.resolve import looks_like_hub_id
from veneer.printing import one_line, warn

if TYPE_CHECKING:
    from huggingface_hub import ModelCard


CARD = "README.md"

_CARD = """---
library_name: peft
---

# Adapters

To be loaded onto {onto}, with Veneer or PEFT:

{adapters}

## Use

The base stays as it is, and the adapters change what it computes. With Veneer:

```python
import veneer

model = veneer.load("PATH_OR_ID_OF_THIS_FOLDER", base="{base}")
```

With PEFT, on a base that is loaded already:

```python
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "PATH_OR_ID_OF_THIS_FOLDER")
```

To run without adapters at all, write a merged model to disk: `veneer merge PATH_OR_ID_OF_THIS_FOLDER --out MERGED`.

## Training

Say here what the adapters were trained on, for what, and how well they do: the data and its licence, the steps, the
learning rate and the hardware, and the figures of an evaluation beside those of the base.

## Limits

Say here what the adapters are not for. Whatever holds for the base, its licence included, holds for the adapters too.

## Versions

{versions}
"""


def write_card(model: Any, folder: Path, tags: Iterable[str] = ()) -> None:
    """Write the card of a model's adapters into ``folder``, or bring the one that is there up to date.

    Args:
        model: the model.
        folder: the folder in which its adapters are saved.
        tags: more tags for the hub.
    """
    card = _present(folder / CARD) if (folder / CARD).is_file() else _new(model)
    if card is None:
        return
    base = _base_of(model)
    card.data["library_name"] = "peft"
    card.data["tags"] = sorted({*_listed(card.data.get("tags")), *_tags_of(model, base), *tags})
    if base is not None:
        card.data["base_model"] = base
    if str(model.task) == "CAUSAL_LM" and not card.data.get("pipeline_tag"):
        card.data["pipeline_tag"] = "text-generation"
    with atomic_write(folder / CARD) as temporary:
        temporary.write_text(str(card), encoding="utf-8")


def fetch_card(api: Any, repo_id: str, revision: str | None, folder: str) -> None:
    """Put the card that a hub repository has into ``folder``, if it has one."""
    # A repository without one, and a hub that does not answer, which the upload will tell.
    with contextlib.suppress(OSError):
        shutil.copyfile(api.hf_hub_download(repo_id, CARD, revision=revision), Path(folder) / CARD)


def _present(path: Path) -> ModelCard | None:
    """Read the card that is there; return ``None``, with a warning, when its head cannot be read."""
    from huggingface_hub import ModelCard

    try:
        return ModelCard(path.read_text(encoding="utf-8"))
    except Exception as error:  # whatever YAML and the hub's checks make of it
        warn(f"{path} is left as it is, for its head cannot be read: {error}")
        return None


def _new(model: Any) -> ModelCard:
    from huggingface_hub import ModelCard

    base = _base_of(model)
    onto = f"[{base}](https://huggingface.co/{base})" if base else "the base model that `adapter_config.json` names"
    adapters = "\n".join(_described(name, config) for name, config in model.peft_config.items())
    return ModelCard(_CARD.format(onto=onto, adapters=adapters, base=base or "BASE", versions=_versions()))


def _described(name: str, config: PeftConfig) -> str:
    """Return a line of the card about an adapter: its method, its targets, its rank and other numbers chosen."""
    options = {field.name: (getattr(config, field.name), field.default) for field in dataclasses.fields(config)}
    numbers = [
        f"{option} {value}"
        for option, (value, default) in sorted(options.items())
        if type(value) in (int, float) and (option == "r" or value != default)
    ]
    targets = getattr(config, "target_modules", None) or ()
    names = [one_line(target) for target in ([targets] if isinstance(targets, str) else sorted(targets))]
    on = f" on {', '.join(f'`{name}`' for name in names)}" if names else ""
    return "; ".join([f"- `{name}`: {config.peft_type}{on}", *numbers])


def _versions() -> str:
    """Return the versions of the libraries that the adapters were made with."""
    import torch
    import transformers

    versions = {"Veneer": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return "\n".join(f"- {library} {version}" for library, version in versions.items())


def _base_of(model: Any) -> str | None:
    """Return the base's hub id; ``None`` for a path on this machine, and for a base without a config."""
    if getattr(model.get_base_model(), "config", None) is None:
        return None
    names = [config.base_model_name_or_path for config in model.peft_config.values()]
    known = [name for name in names if name and looks_like_hub_id(name) and not Path(name).exists()]
    return known[0] if known else None


def _tags_of(model: Any, base: str | None) -> list[str]:
    from transformers import PreTrainedModel

    plain = model.get_base_model()
    tags = list(getattr(plain, "model_tags", None) or ())
    tags += ["transformers"] if isinstance(plain, PreTrainedModel) else []
    tags += ["lora"] if any(str(config.peft_type) == "LORA" for config in model.peft_config.values()) else []
    return [*tags, *([] if base is None else [f"base_model:adapter:{base}"])]


def _listed(tags: str | list[str] | None) -> list[str]:
    return [tags] if isinstance(tags, str) else list(tags or ())
