"""What one text looks like: broken off, wrongly decoded, escaped, in which script.

Each function says in words what it has found, or None. All of it is guesswork over real text, so
each rather keeps silent than calls a sound text wrong (`tests/test_wording.py` has both sorts).
"""

from __future__ import annotations

import re
from collections import Counter

# UTF-8 that was read as Latin-1 or Windows-1252: an accented letter, a curly quote, a BOM.
MOJIBAKE = re.compile("Ã[\x80-\xbf]|â€[™œ˜”“¦\x9d\x93\x94]|Â[\xa0°»«]|ï»¿")
CURES = (  # what does not belong into text, and the cure that fits its cause
    (re.compile("\ufffd"), "bytes were lost in decoding; read the source in its own encoding"),
    (re.compile("[\ud800-\udfff]"), "half of a character; cut the source between characters"),
    (MOJIBAKE, "UTF-8 that was read as another encoding; read the source as UTF-8"),
    (re.compile("\ufeff"), "a byte order mark; strip it"),
    (re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufffe\uffff]"), "a control character; strip it"),
)
ENTITY = re.compile(
    r"&(?:amp|lt|gt|quot|apos|nbsp|hellip|mdash|ndash|[lr][sd]quo|#\d+|#x[\da-f]+);"
)
CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`", re.DOTALL)
TAG = re.compile(r"</?[a-z][a-z0-9]*[^<>]*>", re.IGNORECASE)

SCRIPTS = {
    "Latin": "a-zA-Z\u00c0-\u024f", "Greek": "\u0370-\u03ff", "Cyrillic": "\u0400-\u052f",
    "Hebrew": "\u0590-\u05ff", "Arabic": "\u0600-\u06ff", "Devanagari": "\u0900-\u097f",
    "Thai": "\u0e00-\u0e7f", "Korean": "\uac00-\ud7af\u1100-\u11ff",
    "Japanese kana": "\u3040-\u30ff", "Chinese": "\u3400-\u4dbf\u4e00-\u9fff",
}  # fmt: skip
LETTERS = {name: re.compile(f"[{letters}]") for name, letters in SCRIPTS.items()}

# Words that no finished sentence ends with.
OPEN = {
    "the", "an", "of", "and", "or", "but", "because", "than", "into", "whose", "my", "your", "our",
    "their", "if", "which",
}  # fmt: skip
OPEN_CJK = re.compile("(?:[的和与或及但而把被让在对从]|因为|所以|以及|并且|如果|例如|比如)$")
SENTENCE = re.compile(
    r"\b(?:[a-z]{3,}|\d{4})[.!?][\"')\]”’]*\s+(?=[A-Z“\"'(])|[。！？]+[”」』）]?(?=.)"
)
LISTED = re.compile(r"\s*(?:[-*•+>|#]|\(?\w{1,3}[.)、]\s|https?:|\[\d)")
FAREWELL = re.compile(
    r"(?:i )?(?:hope|thank|good luck|best|cheers|enjoy|let me|happy|have (?:a|fun)|regards|love|"
    r"please|source|see|stay|take care|all the best)|希望|祝|谢谢|感谢|加油|来源|参考",
    re.IGNORECASE,
)


def encoding_problem(text: str) -> str | None:
    """Characters that wrong decoding leaves, the first of them, with its cure."""
    found = [(m.start(), m.group(), cure) for what, cure in CURES if (m := what.search(text))]
    if not found:
        return None
    at, characters, cure = min(found)
    return f"{characters!a} at character {at}: {cure}"


def entity(text: str) -> str | None:
    """The first HTML entity of a text that is not about HTML: no tags, and not within code."""
    match = "&" in text and ENTITY.search(CODE.sub(" ", text))
    return match.group() if match and not TAG.search(text) else None


def script(text: str) -> str | None:
    """The script of at least two thirds of 20 letters or more; Japanese is kana among Chinese."""
    counts = Counter({name: len(p.findall(text[:2000])) for name, p in LETTERS.items()})
    if counts["Japanese kana"] * 5 > counts["Chinese"]:
        counts["Japanese kana"] += counts.pop("Chinese", 0)
    (name, most), total = counts.most_common(1)[0], counts.total()
    return name if total >= 20 and 3 * most >= 2 * total else None


def breaks_off(text: str) -> str | None:
    """How an answer stops short: in code, at a comma, after an open word, within a sentence.

    The last holds only for prose whose other sentences are ended: a title, a list, a line of code,
    a name or a number may well stand without a full stop.
    """
    text = text.rstrip()
    lines = text.splitlines() or [""]
    if sum(line.lstrip().startswith("```") for line in lines) % 2:
        return "in a code block that is not closed"
    last = lines[-1].strip()
    ends = f"with {text[-20:]!r}"
    code = any(line.startswith(("    ", "\t", "```")) for line in lines[-3:]) or last[-1:] in "{};"
    if last.endswith("```") or not last:
        return None
    if last[-1] in ",，、：" or (last[-1] == ":" and not code):
        signed_off = len(lines) > 1 and len(last.split()) <= 3 and last[0].isupper()
        return None if signed_off and last[-1] == "," else ends
    words = re.findall(r"[^\W\d_]+", text)
    if len(words) >= 4 and words[-1] in OPEN and last.endswith(words[-1]) and not code:
        return ends
    if len(text) > 8 and OPEN_CJK.search(last):
        return ends
    if re.search(r"[a-z]-$", last) and len(words) >= 4:
        return ends
    return ends if not code and _within_a_sentence(lines, last) else None


def _within_a_sentence(lines: list[str], last: str) -> bool:
    sentences = list(SENTENCE.finditer(last))
    if not sentences or LISTED.match(last) or not re.search(r"[^\W\d_]$", last):
        return False
    tail = last[sentences[-1].end() :]
    if FAREWELL.match(tail) or re.search(r"://|www\.|@|#", tail):
        return False
    prose = [line.strip() for line in lines[:-1] if SENTENCE.search(line)]
    ended = sum(line[-1] in ".!?。！？:：”\"'）)…" for line in prose)
    return len(sentences) + ended >= 2 and ended == len(prose)
