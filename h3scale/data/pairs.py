"""Preference pairs: a conversation and two answers to its last turn, in the forms that public sets have."""

from h3scale.data.adapters import SPEAKER, Said, transcript
from h3scale.data.records import BadRow, Row, Turn, conversation, text_of, turns_of

Pair = tuple[tuple[Turn, ...], str, str, str]  # history, prompt, chosen, rejected


def pair_of(row: Row) -> Pair:
    """What a row's `chosen` and `rejected` answer, and both answers.

    Each is the answer's text; or messages, the whole conversation (UltraFeedback's binarized form) or what follows `prompt`, which
    is a text or messages; or, where there is no `prompt`, hh-rlhf's text of a whole conversation. Raises BadRow, also where the
    two differ before their last turn.
    """
    history, prompt, chosen = _ended(row, "chosen")
    other_history, other_prompt, rejected = _ended(row, "rejected")
    turns, others = (*history, ("user", prompt)), (*other_history, ("user", other_prompt))
    same = "works: the same conversation but for its last answer"
    if len(turns) != len(others):
        raise BadRow(f"rejected: has {len(others) + 1} turns, chosen {len(turns) + 1} ({same})")
    for number, (one, other) in enumerate(zip(turns, others, strict=True), start=1):
        if one != other:
            raise BadRow(f"rejected: turn {number} is not that of chosen ({same})")
    if chosen == rejected:
        raise BadRow("chosen and rejected are the same")
    return history, prompt, chosen, rejected


def _ended(row: Row, key: str) -> Said:
    value, prompt = row.get(key), row.get("prompt")
    if type(value) is list:
        return _of_messages(turns_of(value, key), prompt, row, key)
    if "prompt" not in row and type(value) is str and SPEAKER.search(value):
        return transcript(value, key)
    if type(prompt) is list:
        return conversation([*turns_of(prompt, "prompt"), ("assistant", text_of(row, key))], "prompt")
    return (), text_of(row, "prompt"), text_of(row, key)


def _of_messages(turns: list[Turn], prompt: object, row: Row, key: str) -> Said:
    if prompt is None:
        return conversation(turns, key)
    if type(prompt) is list:
        before = turns_of(prompt, "prompt")
        return conversation(turns, key) if turns[: len(before)] == before else conversation([*before, *turns], f"prompt + {key}")
    text = text_of(row, "prompt")
    if turns and turns[0][0] == "assistant":
        return conversation([("user", text), *turns], f"prompt + {key}")
    said = conversation(turns, key)
    # the last turn, the first one or all of them, as each set has it; a row of which none is there has been mixed up
    if not any(content.strip() in text for role, content in turns if role == "user"):
        raise BadRow(f"prompt: has none of the user's turns in {key}")
    return said
