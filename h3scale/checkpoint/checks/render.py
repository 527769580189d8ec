"""Renders a chat template as transformers does, as a process that may do little: python -m h3scale.checkpoint.checks.render.

On stdin: JSON with `template` and `names` of special tokens. On stdout: a verdict, and on the next line what it is about.
"""

import json
import resource
import sys
from pathlib import Path
from typing import Any

GOOD, SYNTAX, FAILED, EMPTY = "good", "syntax", "failed", "empty"
FORBIDDEN, TOO_LONG, TOO_LARGE = "forbidden", "too long", "too large"

CPU_S = 2  # a template of the hub needs milliseconds
MEMORY_MIB = 512  # above what the process has when it begins
MAX_CHARS = 100_000  # of a conversation of two words; the longest preambles on the hub have some ten thousand
CONVERSATIONS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "hello"}],
    [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "world"}],
]


def main() -> None:
    from jinja2.exceptions import SecurityError, TemplateSyntaxError
    from transformers.utils import chat_template_utils  # before the limits: it is large itself

    asked = json.load(sys.stdin)
    _limit()
    try:
        answer = _rendered(chat_template_utils.render_jinja_template, asked["template"], asked["names"])
    except (SecurityError, OverflowError) as raised:  # the second one is the sandbox's for long ranges
        answer = FORBIDDEN, str(raised)
    except TemplateSyntaxError as raised:
        answer = SYNTAX, f"line {raised.lineno}: {raised.message}"
    except MemoryError:
        answer = TOO_LARGE, str(MEMORY_MIB)
    except Exception as raised:  # whatever a template can raise
        answer = FAILED, f"{type(raised).__name__}: {raised}"
    print("\n".join(answer))


def _rendered(render: Any, template: str, names: dict[str, str]) -> tuple[str, str]:
    """The verdict on a template that renders. An assistant's turn it may refuse, a user's it may not."""
    from jinja2.exceptions import SecurityError, TemplateError

    (text,), _ = render([CONVERSATIONS[0]], chat_template=template, add_generation_prompt=True, **names)
    try:
        render([CONVERSATIONS[1]], chat_template=template, **names)
    except SecurityError:
        raise
    except TemplateError:  # raise_exception of the template itself
        pass
    if len(text) > MAX_CHARS:
        return TOO_LONG, str(len(text))
    return (GOOD if text.strip() else EMPTY), ""


def _limit() -> None:
    """From here on so much processor time and memory; more, and the kernel ends the process or refuses."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    cpu_s = int(used.ru_utime + used.ru_stime) + 1 + CPU_S
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s))
    held = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY_MIB * 2**20,) * 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


if __name__ == "__main__":
    main()
