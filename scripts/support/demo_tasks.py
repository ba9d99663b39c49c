"""The three demo tasks: where their texts come from, and which of them are held out of training.

Movie and tweet ratings come from the source archive of the ``vaderSentiment`` package (Hutto & Gilbert, ICWSM 2014).
The texts' own rights are not stated, so they are downloaded and never committed. WordNet glosses may be
redistributed: the held-out ones are committed beside this file, under WordNet's own licence.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path

from scripts.support.packaged_files import vader_ratings, wordnet

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "scripts" / "demo_data"

# WordNet's lexicographer files (lexnames(5WN)), the twelve noun classes the task tells apart.
SUPERSENSES = {
    "04": "act",
    "05": "animal",
    "06": "artifact",
    "08": "body",
    "09": "cognition",
    "10": "communication",
    "13": "food",
    "15": "location",
    "18": "person",
    "20": "plant",
    "26": "state",
    "27": "substance",
}


@dataclass(frozen=True)
class Example:
    """A text and its target: a class index, or the mean human rating of a regression task."""

    text: str
    target: float


@dataclass(frozen=True)
class Task:
    """One demo task; ``labels`` is empty for a regression."""

    name: str
    labels: tuple[str, ...]
    train_size: int
    test_size: int

    @property
    def adapter(self) -> Path:
        return DATA / "adapters" / self.name


MOVIES = Task("movies", ("negative", "positive"), 4500, 2000)
SUPERSENSE = Task("supersense", tuple(SUPERSENSES.values()), 4500, 2000)
TWEETS = Task("tweets", (), 3200, 900)
TASKS = (MOVIES, SUPERSENSE, TWEETS)


def held_out(task: Task, limit: int) -> list[Example]:
    """The first ``limit`` held-out examples of ``task``; no example of them was seen in training."""
    if task is SUPERSENSE:
        lines = (DATA / "supersense_held_out.jsonl").read_text(encoding="utf-8").splitlines()
        return [Example(**json.loads(line)) for line in lines[:limit]]
    return split(task)[1][:limit]


def split(task: Task) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples, split by the order of a hash of the text.

    Another order in the source gives the same split.
    """
    if task is SUPERSENSE:
        examples = _balanced(_supersense_examples(), task.train_size + task.test_size, len(task.labels))
    elif task is MOVIES:
        examples = [
            Example(text, float(rating > 0)) for rating, text in _ratings("movieReviewSnippets") if abs(rating) >= 0.5
        ]
    else:
        examples = [Example(text, rating) for rating, text in _ratings("tweets")]
    ordered = _by_hash(examples)
    return ordered[task.test_size :][: task.train_size], ordered[: task.test_size]


def _by_hash(examples: list[Example], salt: str = "") -> list[Example]:
    unique = {example.text: example for example in examples}
    return sorted(unique.values(), key=lambda example: hashlib.sha256((salt + example.text).encode()).digest())


def _balanced(examples: list[Example], total: int, classes: int) -> list[Example]:
    # Another order than the split's: the lowest hashes of a large class would all fall into the held-out set.
    ordered = _by_hash(examples, salt="balance:")
    per_class = -(-total // classes)
    return [example for index in range(classes) for example in [e for e in ordered if e.target == index][:per_class]]


def _ratings(source: str) -> list[tuple[float, str]]:
    """(mean rating in −4..4, text) of every line of one of the archive's ground-truth files."""
    with tarfile.open(vader_ratings()) as archive:
        member = archive.extractfile(f"hutto_ICWSM_2014/{source}_GroundTruth.txt")
        assert member is not None
        lines = member.read().decode("utf-8").splitlines()
    rows = [line.split("\t", 2) for line in lines if line.strip()]
    return [(float(rating), text.strip()) for _, rating, text in rows]


def _supersense_examples() -> list[Example]:
    """The definition of every noun synset of a chosen class; example sentences after the definition are dropped."""
    classes = list(SUPERSENSES)
    with tarfile.open(wordnet()) as archive:
        member = archive.extractfile("package/dict/data.noun")
        assert member is not None
        lines = member.read().decode("utf-8").splitlines()
    synsets = [line for line in lines if not line.startswith("  ") and line.split(" ", 2)[1] in SUPERSENSES]
    return [
        Example(line.split("| ", 1)[1].split("; ")[0].strip(), float(classes.index(line.split(" ", 2)[1])))
        for line in synsets
    ]
