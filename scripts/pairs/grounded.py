"""Check a reply to a question about a given text: is it right, and is all that it says in the text?

A program can check such a reply as it cannot check one from memory. A question lists spellings of
the right answer (`accept`), what a wrong one would say (`wrong`), and whether the text answers it
at all (`answerable`). See `data/README.md` for the file that holds them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from scripts.pairs.text import mentions

# A sentence ends at a full stop, question or exclamation mark before a space and a new beginning,
# or at the end of a line; not after these.
ABBREVIATIONS = "".join(rf"(?<!\b{a}\.)" for a in ("Mr", "Mrs", "Ms", "Dr", "St", "No"))
SENTENCE_END = re.compile(
    rf"{ABBREVIATIONS}(?<=[.!?])[\"')\]]*\s+(?=[\"'(\[]?[A-Z0-9£$€])|\s*\n\s*"
)

# How a reply says that the text does not tell.
DECLINES = re.compile(
    r"\b(?:(?:does|do|did|is|are|was|were|has|have)(?:n't| not)|not|never|without)\s+(?:\w+\s+)?"
    r"(?:say|said|tell|told|mention|mentioned|state|stated|specify|specified|give|given|provide|"
    r"provided|include|included|contain|indicate|indicated|explain|explained|answer|listed|clear|"
    r"known|available|possible to (?:tell|say|know|determine))\b"
    r"|\bno (?:information|mention|indication|answer)\b|\bunclear\b|\bunknown\b"
    r"|\b(?:can|could)(?:no|n')t (?:be )?(?:tell|say|told|answer|answered|determine|determined)\b"
    r"|\b(?:do not|don't) know\b",
    re.IGNORECASE,
)

# Words that carry no claim of their own: function words, and how people speak of texts and answers.
EMPTY_WORDS = frozenset(
    re.findall(
        r"\S+",
        """about above according actual actually additional after also although among another answer
    answers around because been before being below between both could does down during each either
    else ever every following from given have having here however indicated into itself just known
    like made make means mention mentioned mentions more most much must need needs only other over
    passage person provided question read reader same said says shall should since some specific
    specified stated states such take takes text than that their them then there therefore these
    they this those through under until upon used very want well were what when where whether which
    while will with within without would your you're it's there's""",
    )
)

WORD = re.compile(r"[^\W\d_]+(?:'\w+)?")
ONES = re.findall(
    r"\w+",
    """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen
fifteen sixteen seventeen eighteen nineteen""",
)
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
NUMBER_WORDS = {word: i for i, word in enumerate(ONES)}
NUMBER_WORDS |= {word: 10 * i for i, word in enumerate(TENS, 2)}
NUMBER = re.compile(
    rf"\b(?:({'|'.join(TENS)})(?:[- ]({'|'.join(ONES[1:10])}))?|({'|'.join(ONES)}))\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Verdict:
    """What the checker says of one reply."""

    answerable: bool
    mentioned: bool  # an accepted answer stands in it
    first: bool  # in its first sentence
    declined: bool  # it says that the text does not tell
    wrong: bool  # it says something that a wrong answer would say
    unsupported: int  # sentences that the text does not bear out
    sentences: int

    @property
    def right(self) -> bool:
        """The right answer and no wrong one; without an answer in the text, it says just that."""
        return (self.mentioned if self.answerable else self.declined) and not self.wrong

    @property
    def exact(self) -> bool:
        """Right, and nothing beside it that is not in the text."""
        return self.right and not self.unsupported


def check(reply: str, passage: str, question: dict) -> Verdict:
    """Hold `reply` against the `passage` it was to answer from.

    `question` has `question`, `answerable`, `accept` and `wrong` (lists of spellings). A spelling
    is found from a word's beginning on, in any case, a number in words or digits; one of `wrong`
    that the question itself says does not count. To a question that the text answers, "the text
    does not say" counts as declined only if the right answer is missing.
    """
    sentences = split_sentences(reply)
    source = f"{passage}\n{question['question']}"
    asked, said = as_digits(question["question"]), as_digits(reply)
    accept, wrong = ([as_digits(s) for s in question[kind]] for kind in ("accept", "wrong"))
    wrong = [w for w in wrong if not mentions(asked, w)]
    found = [any(mentions(as_digits(s), a) for a in accept) for s in sentences]
    return Verdict(
        answerable=question["answerable"],
        mentioned=any(found),
        first=bool(found) and found[0],
        declined=any(map(DECLINES.search, sentences)) and not any(found),
        wrong=any(mentions(said, w) for w in wrong),
        unsupported=sum(not is_supported(s, source) for s in sentences),
        sentences=len(sentences),
    )


def split_sentences(text: str) -> list[str]:
    """The sentences and lines of `text`, without empty ones and without list marks."""
    text = re.sub(r"(?m)^\s*(?:[-*•]|\d+[.)])\s+", "", text)
    return [part.strip() for part in SENTENCE_END.split(text) if re.search(r"\w", part)]


def is_supported(sentence: str, source: str) -> bool:
    """Whether `source` has the numbers, the names and most of the other words of `sentence`.

    A number or a capitalised word within the sentence that is not there is an invention; so is a
    sentence of whose content words, two or more, fewer than half are there. It finds what was
    made up, not what was put together wrongly out of the text's own words.
    """
    if DECLINES.search(sentence):
        return True
    if numbers(sentence) - numbers(source):
        return False
    known = {stem(word) for word in WORD.findall(source)}
    names = [w for w in WORD.findall(sentence)[1:] if w[0].isupper() and len(w) > 1]
    if any(stem(name) not in known for name in names if name.lower() not in EMPTY_WORDS):
        return False
    return len(content_words(sentence)) < 2 or share_known(sentence, source) >= 0.5


def share_known(text: str, *sources: str) -> float:
    """Share of the content words of `text` that stand in `sources`, 0 to 1; of none it is 0."""
    known = {stem(word) for source in sources for word in WORD.findall(source)}
    content = content_words(text)
    return sum(word in known for word in content) / max(len(content), 1)


def content_words(text: str) -> list[str]:
    """The stems of the words of `text` that make a claim."""
    words = WORD.findall(text)
    return [stem(w) for w in words if len(w) > 3 and w.lower() not in EMPTY_WORDS]


def stem(word: str) -> str:
    """The first five letters, in lower case: enough to know a word again in another form."""
    return word.lower()[:5]


def as_digits(text: str) -> str:
    """`text` with its number words below a hundred as digits: "forty-two days" is "42 days"."""
    return NUMBER.sub(
        lambda words: str(sum(NUMBER_WORDS[w.lower()] for w in words.groups() if w)), text
    )


def numbers(text: str) -> set[str]:
    """The numbers in `text`, as digits: of "ninety crowns at 8:40" 90, 8 and 40.

    Not "one", which mostly stands for a thing: "the red one".
    """
    text = as_digits(re.sub(r"\bone\b", "", text, flags=re.IGNORECASE)).replace(",", "")
    return {digits.lstrip("0") or "0" for digits in re.findall(r"\d+", text)}
