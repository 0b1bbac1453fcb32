"""A model's chat template (jinja2, as Hugging Face writes them) rendered to text, in a sandbox.

Follows transformers' `apply_chat_template`: trimmed blocks, `raise_exception`, `strftime_now`, `tojson`. Knows no
model and no tokenizer: an agent that holds only the draft renders the target's template with it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NoReturn

from pilotfish.protocol.errors import ModelError, UsageError

if TYPE_CHECKING:
    from jinja2 import Template


def render_chat(template: str, messages: Sequence[Mapping[str, str]], bos: str = "", eos: str = "") -> str:
    """Messages of {role, content} as the model's prompt, ending where its answer starts.

    Raises ModelError if the template is broken, UsageError if it refuses these messages.
    """
    from jinja2 import TemplateError

    compiled = _compiled(template)
    try:
        return compiled.render(
            messages=[dict(m) for m in messages], bos_token=bos, eos_token=eos, add_generation_prompt=True
        )
    except (TemplateError, TypeError, ValueError) as error:
        raise UsageError(f"The model's chat template refuses these messages: {error}") from error


@lru_cache(maxsize=8)
def _compiled(template: str) -> Template:
    from jinja2 import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    env.filters["tojson"] = _to_json
    env.globals.update(raise_exception=_refuse, strftime_now=lambda form: datetime.now().strftime(form))
    try:
        return env.from_string(template)
    except TemplateError as error:
        raise ModelError(f"The model's chat template is not valid jinja2 ({error}); send raw text instead.") from error


def _to_json(value: Any, indent: int | None = None) -> str:
    """jinja2's own filter escapes HTML, which no model was trained on."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(sentence: str) -> NoReturn:
    from jinja2 import TemplateError

    raise TemplateError(sentence)
