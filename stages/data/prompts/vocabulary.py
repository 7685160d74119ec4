"""Finds prompts with words that a teacher's tokenizer does not know, and prompts that it cuts off.

Needs no torch, because planning uses it, too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import tee
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

EXAMPLES = 5
MOST = 100_000
CLIP_SPLIT = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
"""The words and signs that CLIP's tokenizer splits texts into (Radford et al. 2021, 2103.00020)."""


def prompt_warnings(teacher: Path, prompts: Iterable[Sequence[str]]) -> Iterator[str]:
    """Yield a warning if prompts have words that the tokenizer does not know, and one if prompts are too long.

    The warnings give counts and examples. teacher: a diffusers folder, or one that holds several of them. prompts:
    batches of prompts; only about the first MOST are checked, since a million would take minutes. There are no warnings
    without a readable tokenizer. A tokenizer that falls back to bytes, such as CLIP's, knows every word. An encoder
    ignores the end of a prompt with more tokens than its limit, 77 for CLIP.
    """
    own = teacher / "tokenizer"
    folders = [own] if own.is_dir() else sorted(teacher.rglob("tokenizer"))
    for folder, some in zip(folders, tee(prompts, len(folders)), strict=True):
        yield from _warnings(folder, some)


def _warnings(folder: Path, prompts: Iterable[Sequence[str]]) -> Iterator[str]:
    """As `prompt_warnings`, for one tokenizer."""
    tokenizer = _tokenizer(folder)
    if tokenizer is None:
        return
    unknown, limit = _unknown(tokenizer), _limit(folder)
    total = missed = looked_at = cut = longest = 0
    words: dict[str, None] = {}
    for batch in prompts:
        if looked_at >= MOST:
            break
        looked_at += len(batch)
        for prompt, found in zip(batch, tokenizer.encode_batch(batch, add_special_tokens=False), strict=True):
            places = [place for place, token in zip(found.offsets, found.ids, strict=True) if token == unknown]
            total, missed = total + len(found.ids), missed + len(places)
            if len(words) < EXAMPLES:
                words |= dict.fromkeys(prompt[start:end] for start, end in places)
            length = len(found.ids) + tokenizer.num_special_tokens_to_add(False)
            cut, longest = cut + (length > limit), max(longest, length)
    if missed:
        examples = ", ".join(map(repr, list(words)[:EXAMPLES]))
        yield (
            f"the teacher's tokenizer does not know {missed:,} of the {total:,} tokens of {looked_at:,} prompts "
            f"({100 * missed / total:.2g} %), such as {examples}; it replaces each of them by the same unknown token. "
            f"The words that it knows are listed in {folder / 'tokenizer.json'}"
        )
    if cut:
        yield (
            f"{cut:,} of {looked_at:,} prompts are longer than the {limit:g} tokens that the teacher's text encoder "
            f"takes, and it ignores their ends; the longest has {longest:,} tokens"
        )


def _tokenizer(folder: Path) -> Tokenizer | None:
    """Load `tokenizer.json`, or CLIP's `vocab.json` and `merges.txt`. None if neither can be read."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

    try:
        if (folder / "tokenizer.json").exists():
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        else:
            bpe = models.BPE.from_file(
                str(folder / "vocab.json"), str(folder / "merges.txt"), end_of_word_suffix="</w>"
            )
            tokenizer = Tokenizer(bpe)
            tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
            split = pre_tokenizers.Split(Regex(CLIP_SPLIT), "removed", invert=True)
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
            tokenizer.post_processor = processors.RobertaProcessing(("<|endoftext|>", 1), ("<|startoftext|>", 0))
    except Exception:  # the library raises nothing narrower; loading the teacher reports a broken file
        return None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _unknown(tokenizer: Tokenizer) -> int | None:
    """Return the number of the unknown token. None if the tokenizer has none, or falls back to bytes."""
    token = getattr(tokenizer.model, "unk_token", None)
    found: int | None = tokenizer.token_to_id(token) if token else None
    return found


def _limit(folder: Path) -> float:
    """Return the largest number of tokens that the encoder takes."""
    try:
        return float(json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))["model_max_length"])
    except (OSError, ValueError, KeyError, TypeError):  # loading the teacher reports a broken file
        return float("inf")
