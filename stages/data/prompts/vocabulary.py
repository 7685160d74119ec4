"""Finds words in prompts that a teacher's tokenizer does not know. Needs no torch, because planning uses it, too."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

EXAMPLES = 5
MOST = 100_000


def unknown_words(teacher: Path, prompts: Iterable[Sequence[str]]) -> str | None:
    """Return a warning with the share of unknown tokens in the prompts, and examples. None if there are none.

    teacher: a diffusers folder. prompts: batches of prompts; only about the first MOST are checked, since a million
    would take minutes. Also returns None without a readable `tokenizer.json`. A tokenizer that falls back to bytes,
    such as CLIP's, knows every word.
    """
    from tokenizers import Tokenizer

    file = teacher / "tokenizer" / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception:  # the library raises nothing narrower; loading the teacher reports a broken file
        return None
    unknown = tokenizer.token_to_id(getattr(tokenizer.model, "unk_token", None) or "")
    if unknown is None:
        return None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    total = missed = looked_at = 0
    examples: dict[str, None] = {}
    for batch in prompts:
        if looked_at >= MOST:
            break
        looked_at += len(batch)
        for prompt, found in zip(batch, tokenizer.encode_batch(batch, add_special_tokens=False), strict=True):
            places = [place for place, token in zip(found.offsets, found.ids, strict=True) if token == unknown]
            total, missed = total + len(found.ids), missed + len(places)
            if len(examples) < EXAMPLES:
                examples |= dict.fromkeys(prompt[start:end] for start, end in places)
    if not missed:
        return None
    words = ", ".join(map(repr, list(examples)[:EXAMPLES]))
    return (
        f"the teacher's tokenizer does not know {missed:,} of the {total:,} tokens of {looked_at:,} prompts "
        f"({100 * missed / total:.2g} %), such as {words}; it replaces each of them by the same unknown token. "
        f"The words that it knows are listed in {file}"
    )
