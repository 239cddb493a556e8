"""TRACE's metrics that loraf-train does not have, each for one answer and from 0 to 1.

    rouge_l           MeetingBank   F1 of the longest common subsequence of words (Lin, 2004)
    edit_similarity   Py150         twice the longest common subsequence of characters over both lengths
    first_letter      ScienceQA     the answer begins with the right letter; what follows is the reasoning
    sari              20Minuten     what is kept, added and deleted (Xu and others, 2016)

TRACE computes them with libraries (rouge, fuzzywuzzy, SARI of datasets). Here they are written from their definitions;
words are cut more simply, so a score may differ from the library's in the first digit after the point.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

_WORD = re.compile(r"\w+|[^\w\s]")
_LITERAL = re.compile(r"<(?:STR|NUM|CHAR)_LIT:(.*?)>", re.DOTALL)
_PLAIN_LITERALS = {"<NUM_LIT>": "0", "<STR_LIT>": "", "<CHAR_LIT>": ""}  # of Py150: a literal without its value


def rouge_l(answer: str, record: Mapping[str, Any]) -> float:
    return _overlap(answer.split(), str(record["answer"]).split())


def edit_similarity(answer: str, record: Mapping[str, Any]) -> float:
    return _overlap(_with_literals(answer.strip()), _with_literals(str(record["answer"]).strip()))


def first_letter(answer: str, record: Mapping[str, Any]) -> bool:
    letter = answer.strip()[:1]
    return bool(letter) and letter == str(record["answer"]).strip()[:1]


def sari(answer: str, record: Mapping[str, Any]) -> float:
    return sari_of(str(record["prompt"]), answer, [str(record["answer"])])


def _overlap(one: Sequence[str], other: Sequence[str]) -> float:
    """Twice the longest common subsequence over the sum of both lengths: its F1 as precision and recall."""
    if not one or not other:
        return 0.0
    row = [0] * (len(other) + 1)
    for item in one:
        before = 0  # the entry of the row above, one to the left
        for j, its in enumerate(other, 1):
            before, row[j] = row[j], before + 1 if item == its else max(row[j], row[j - 1])
    return 2 * row[-1] / (len(one) + len(other))


def _with_literals(code: str) -> str:
    for written, literal in _PLAIN_LITERALS.items():
        code = code.replace(written, literal)
    return _LITERAL.sub(r"\1", code)


# --- SARI -------------------------------------------------------------------------------------------------------------


def sari_of(source: str, answer: str, references: Sequence[str]) -> float:
    """Returns SARI: the mean over n = 1 … 4 of F1 of kept, F1 of added and precision of deleted n-grams, averaged.

    Where there is nothing to divide by, a ratio is 1: nothing had to be done, and nothing was.
    """
    texts = [_WORD.findall(text.lower()) for text in (source, answer, *references)]
    parts = [_keep_add_delete([_n_grams(words, n) for words in texts]) for n in range(1, 5)]
    return sum(sum(part) for part in parts) / (3 * len(parts))


def _n_grams(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def _keep_add_delete(grams: Sequence[Counter[tuple[str, ...]]]) -> tuple[float, float, float]:
    """Returns F1 of keeping, F1 of adding and precision of deleting n-grams of one length.

    Args:
        grams: of the source, the answer and the references. Source and answer count once for each reference.
    """
    source, answer, *references = grams
    wanted = sum(references, Counter[tuple[str, ...]]())
    given = Counter({gram: count * len(references) for gram, count in source.items()})
    written = Counter({gram: count * len(references) for gram, count in answer.items()})

    kept, to_keep = given & written, given & wanted
    right = kept & wanted
    precision = _ratio(sum(count / kept[gram] for gram, count in right.items()), len(kept))
    recall = _ratio(sum(right.values()), sum(to_keep.values()))
    keep = _f1(precision, recall)

    added, to_add = written.keys() - given.keys(), wanted.keys() - given.keys()
    add = _f1(_ratio(len(added & to_add), len(added)), _ratio(len(added & to_add), len(to_add)))

    deleted = given - written
    right = deleted - wanted
    delete = _ratio(sum(count / deleted[gram] for gram, count in right.items()), len(deleted))
    return keep, add, delete


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 1.0


def _f1(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0
