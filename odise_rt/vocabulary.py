"""The words of one segmentation: classes, each with synonyms and a thing or stuff flag.

A vocabulary is a value: it is passed to every call and never stored in a model. In text, ``;`` or a new line ends a
class and ``,`` separates synonyms; the first synonym is the name that results carry::

    black pickup truck, pickup truck; stuff: blue sky, sky

``thing:`` or ``stuff:`` before a class sets its kind. Without it, a class is stuff when one of its words names a region
rather than an object ("sky", "green grass", "brick wall"; see :data:`REGION_NOUNS`), and a thing otherwise. Things are
told apart one by one; the segments of a stuff class are joined.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import re
import reprlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from odise_rt.errors import VocabularyError
from odise_rt.files import decode_json, given_path
from odise_rt.options import is_whole
from odise_rt.tokenizer import clean_text

logger = logging.getLogger(__name__)

Kind = Literal["thing", "stuff"]

BUILTIN: dict[str, str] = {
    "coco": "COCO panoptic, 133 classes",
    "ade20k": "ADE20K, 150 classes",
    "lvis": "LVIS v1, 1203 classes",
    "auto": "the three lists as one lexicon, 1308 classes: what to ask for when no words are given",
}
"""The lists of :meth:`Vocabulary.builtin`, and what they hold: plain names, without prompt engineering."""

REGION_NOUNS = frozenset(
    (
        *("sky", "clouds", "fog", "background"),
        *("grass", "lawn", "meadow", "field", "pasture", "tree", "trees", "forest", "jungle"),
        *("foliage", "leaves", "bushes", "vegetation", "mountain", "mountains", "hill", "hills"),
        *("ground", "dirt", "earth", "soil", "mud", "gravel", "sand", "beach", "desert", "snow", "ice"),
        *("water", "sea", "ocean", "river", "lake"),
        *("road", "street", "highway", "railroad", "pavement", "sidewalk", "path"),
        *("wall", "walls", "floor", "ceiling", "carpet"),
    )
)
"""Head nouns that make a class stuff when the user does not say: what has no countable instances."""

UNKNOWN = "unknown"
"""Name of the class of masks that no word fits; see :attr:`Vocabulary.with_unknown`."""

GIVE_LISTS = "give lists by themselves (each its own --vocab; Vocabulary.load; vocabulary_name)"
"""An advice in messages, which a page puts in its own words."""
MAX_WORDS = 200_000
MAX_WORD_CHARACTERS = 1_000
MAX_FILE_BYTES = 64 << 20
_IGNORED_OPENSEG_NAME = "invalid_class_id"
_KIND_PREFIX = re.compile(r"\s*(thing|stuff)\s*:", re.IGNORECASE)
_OPENSEG_LINE = re.compile(r"\s*\d+\s*:\s*\S")
_PREPOSITION = re.compile(r"\s(?:of|in|on|at|with|for|from|under|by)\s")
_LABELS = Path(__file__).parent / "labels"


@dataclass(frozen=True)
class VocabularyClass:
    """One class.

    Raises:
        VocabularyError: a word is no text, or the id is no whole number.
    """

    words: tuple[str, ...]
    """Synonyms, at least one; the first is the name."""
    isthing: bool = True
    id: int | None = None
    """Identifier in a data set, e.g. COCO's category id."""

    def __post_init__(self) -> None:
        if not isinstance(self.words, tuple | list) or not all(isinstance(word, str) for word in self.words):
            raise VocabularyError(
                f"the words of a class came as {self.words!r:.60}: expected strings, ('name', 'synonym')"
            )
        for word in self.words:
            _check_text(word)
        object.__setattr__(self, "words", tuple(self.words))  # lists are equal to no tuple, and have no hash
        if self.id is not None and not is_whole(self.id):
            raise VocabularyError(
                f"the class {', '.join(self.words)[:60]!r} has id {self.id!r:.60}: expected a whole number"
            )
        if not isinstance(self.isthing, bool | np.bool_):
            raise VocabularyError(
                f"the class {', '.join(self.words)[:60]!r} has isthing {self.isthing!r:.60}: expected True for a "
                "thing, False for stuff"
            )
        object.__setattr__(self, "id", None if self.id is None else int(self.id))
        object.__setattr__(self, "isthing", bool(self.isthing))

    @property
    def name(self) -> str:
        """The first synonym."""
        return self.words[0]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, as :meth:`Vocabulary.from_json` reads them."""
        data: dict[str, Any] = {"name": self.name}
        if self.id is not None:
            data["id"] = self.id
        if len(self.words) > 1:
            data["synonyms"] = list(self.words[1:])
        return data | {"kind": "thing" if self.isthing else "stuff"}


@dataclass(frozen=True)
class Vocabulary:
    """An ordered list of classes; the position of a class is its index in results.

    Raises:
        VocabularyError: there is no class, a class has no word, or there are more words than ``MAX_WORDS``.
    """

    classes: tuple[VocabularyClass, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.classes, tuple | list):
            raise VocabularyError(f"the classes came as {_shape_of(self.classes)}: see Vocabulary.parse and from_lists")
        object.__setattr__(self, "classes", tuple(self.classes))
        if not self.classes:
            raise VocabularyError(
                "the vocabulary is empty: expected at least one word, e.g. 'black pickup truck, pickup truck; sky'"
            )
        count = 0
        for number, entry in enumerate(self.classes):
            if not isinstance(entry, VocabularyClass):
                raise VocabularyError(
                    f"class {number} came as {type(entry).__name__}: expected VocabularyClass (Vocabulary.parse)"
                )
            count += len(entry.words)
            for word in entry.words:
                if not clean_text(word):
                    raise VocabularyError(f"class {number} has an empty word among {list(entry.words)!r}: remove it")
                if len(word) > MAX_WORD_CHARACTERS:
                    raise VocabularyError(
                        f"class {number} has a word of {len(word)} characters ({word[:40]!r}…), at most "
                        f"{MAX_WORD_CHARACTERS} are accepted: separate classes by ';' and synonyms by ','"
                    )
            if not entry.words:
                raise VocabularyError(f"class {number} has no word: give it a name")
        if count > MAX_WORDS:
            raise VocabularyError(f"the vocabulary has {count:,} words, at most {MAX_WORDS:,} are accepted: split it")

    # ---- reading -----------------------------------------------------------------------------------------------

    @classmethod
    def parse(cls, text: str) -> Vocabulary:
        """Read words as text: ``;`` or a new line ends a class, ``,`` separates synonyms.

        ``thing:`` or ``stuff:`` before a class sets its kind. A line that starts with ``#`` is a comment. Repeated
        synonyms count once, and classes of the same name are merged.

        Raises:
            VocabularyError: there is no word in the text, or a class in it is written like a list that :meth:`load`
                takes; ``thing: coco`` is a word for certain.
        """
        if not isinstance(text, str):
            raise VocabularyError(f"expected words as text, got {type(text).__name__}: see Vocabulary.from_lists")
        drafts = _text_drafts(text)
        for draft in drafts:
            if draft.kind is None and all(map(_is_source, draft.words)):
                raise VocabularyError(
                    f"among words {', '.join(draft.words)!r} would be a word, and it is the name of a built-in list or "
                    f"a file: {GIVE_LISTS}, or write 'thing: {draft.words[0]}' for the word"
                )
        return cls(_merge_names(drafts))

    @classmethod
    def from_lists(
        cls,
        classes: Iterable[str | Sequence[str]] = (),
        *,
        things: Iterable[str | Sequence[str]] = (),
        stuff: Iterable[str | Sequence[str]] = (),
    ) -> Vocabulary:
        """Classes as words or lists of synonyms.

        Args:
            classes: things or stuff, decided by their words as :meth:`parse` does.
            things: classes that are things.
            stuff: classes that are stuff.

        Raises:
            VocabularyError: there is no class, or one is no word and no list of words.
        """
        entries = []
        groups: list[tuple[Iterable[str | Sequence[str]], Kind | None]]
        groups = [(classes, None), (things, "thing"), (stuff, "stuff")]
        for group, kind in groups:
            if isinstance(group, str) or not isinstance(group, Iterable):
                raise VocabularyError(f"expected a list of words, got {_shape_of(group)}: see Vocabulary.parse")
            entries += [Draft(_words(item), kind) for item in group]
        return cls(_merge_names(entries))

    @classmethod
    def from_dict(cls, data: Any) -> Vocabulary:
        """Read decoded JSON.

        Accepted are a list of classes, ``{"classes": [...]}`` or COCO's ``{"categories": [...]}``,
        ``{"things": [...], "stuff": [...]}``, and ``{name: [synonyms]}``. A class is a word, a list of synonyms, or
        ``{"name", "synonyms", "kind": "thing" | "stuff", "isthing", "id"}``.

        Raises:
            VocabularyError: the data has none of these forms.
        """
        return cls(_merge_names(_json_drafts(data)))

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> Vocabulary:
        """Read a JSON file in a form of :meth:`from_dict`.

        Raises:
            VocabularyError: the file cannot be read, or is no vocabulary.
        """
        return cls.from_dict(_read_json(path))

    @classmethod
    def from_openseg(
        cls, path: str | os.PathLike[str], *, things: Collection[str] | Callable[[int, str], bool] | None = None
    ) -> Vocabulary:
        """Read a label file of OpenSeg: ``id:synonym,synonym,…`` on each line.

        Lines named ``invalid_class_id`` are skipped; the order of the others is the class index, so classes of the
        same name stay apart.

        Args:
            path: the file.
            things: names of the classes that are things, or a function of id and name. ``None``: decided by their
                words as :meth:`parse` does; the files do not say.

        Raises:
            VocabularyError: the file cannot be read, or a line has another form.
        """
        return cls(tuple(draft.finish() for draft in _openseg_drafts(path, _read_text(path), things)))

    @classmethod
    def builtin(cls, name: str) -> Vocabulary:
        """One of the lists that come with the package; see :data:`BUILTIN`.

        Raises:
            VocabularyError: there is no such list.
        """
        if name == "auto":
            from odise_rt.lexicon import builtin_lexicon

            return builtin_lexicon()
        if not isinstance(name, str) or name not in BUILTIN:
            raise VocabularyError(f"no built-in vocabulary {name!r}: expected one of {', '.join(BUILTIN)}")
        return _builtin(name)

    @classmethod
    def load(cls, source: str | os.PathLike[str]) -> Vocabulary:
        """Read what a command line takes: a built-in name, a .json or .txt file, or words.

        A text file holds OpenSeg lines (``id:synonym,synonym``) or the syntax of :meth:`parse`.

        Raises:
            VocabularyError: the file cannot be read, or what was given is no vocabulary.
        """
        if isinstance(source, str):
            if source.strip().lower() in BUILTIN:
                return cls.builtin(source.strip().lower())
            if not _is_source(source):
                if (os.sep in source or Path(source).suffix) and os.path.lexists(source):
                    raise VocabularyError(
                        f"{source} is a path: expected words, or a vocabulary file ending in .json or .txt"
                    )
                return cls.parse(source)
        drafts, told_apart = read_drafts(source)
        return cls(tuple(draft.finish() for draft in drafts) if told_apart else _merge_names(drafts))

    def __add__(self, other: Vocabulary) -> Vocabulary:
        """The classes of both vocabularies; a class of the same name is merged into the earlier one."""
        if not isinstance(other, Vocabulary):
            return NotImplemented
        drafts = [Draft(c.words, "thing" if c.isthing else "stuff", c.id) for c in (*self.classes, *other.classes)]
        return Vocabulary(_merge_names(drafts, keep_first_kind=True))

    # ---- using -------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.classes)

    def __iter__(self) -> Iterator[VocabularyClass]:
        return iter(self.classes)

    def __getitem__(self, index: int) -> VocabularyClass:
        return self.classes[index]

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """The name of each class."""
        return tuple(c.name for c in self.classes)

    @functools.cached_property
    def words(self) -> tuple[str, ...]:
        """Every synonym of every class in order: L words."""
        return tuple(w for c in self.classes for w in c.words)

    @functools.cached_property
    def first_word(self) -> np.ndarray:
        """Position in :attr:`words` of each class's first word, int64 (K,): offsets for ``np.maximum.reduceat``."""
        sizes = [len(c.words) for c in self.classes]
        return _read_only(np.concatenate([[0], np.cumsum(sizes[:-1], dtype=np.int64)]).astype(np.int64))

    @functools.cached_property
    def isthing(self) -> np.ndarray:
        """bool (K,): whether a class is a thing."""
        return _read_only(np.array([c.isthing for c in self.classes], dtype=bool))

    @functools.cached_property
    def with_unknown(self) -> Vocabulary:
        """This vocabulary and, last, a class for what no word fits; results with the option ``unknown`` have it.

        The class is a thing, as nobody knows that two unknown regions are of one kind, and so they stay apart. Its id
        follows the largest one where every class has its own.

        Raises:
            VocabularyError: a class has that name already.
        """
        if UNKNOWN in map(_key, self.names):
            raise VocabularyError(
                f"the vocabulary has a class {UNKNOWN!r}, and that is what the option {UNKNOWN!r} calls what no word "
                "fits: give the class another name, or leave the option out"
            )
        ids = [c.id for c in self.classes if c.id is not None]
        identifier = max(ids) + 1 if len(ids) == len(self.classes) else None
        return Vocabulary((*self.classes, VocabularyClass((UNKNOWN,), isthing=True, id=identifier)))

    def result_classes(self, unknown: float | None) -> Vocabulary:
        """The classes that results have: those of :attr:`with_unknown` if the option ``unknown`` has a value.

        Raises:
            VocabularyError: the option has a value, and a class has the name "unknown".
        """
        return self if unknown is None else self.with_unknown

    @functools.cached_property
    def words_hash(self) -> str:
        """SHA-256 over the words alone: what text embeddings depend on."""
        return hashlib.sha256(json.dumps(self.words).encode()).hexdigest()

    @functools.cached_property
    def content_hash(self) -> str:
        """SHA-256 over words, kinds and ids, in order."""
        content = [(c.words, c.isthing, c.id) for c in self.classes]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def seen(self, training_vocabulary: Collection[str]) -> np.ndarray:
        """Which classes were seen in training.

        Args:
            training_vocabulary: every name and synonym of the training classes.

        Returns:
            bool (K,): true where any synonym is among them (compared as CLIP reads them, without upper case).
        """
        known = _keys(frozenset(training_vocabulary))
        word_seen = np.fromiter((key in known for key in self._word_keys), bool, count=len(self.words))
        return np.logical_or.reduceat(word_seen, self.first_word)

    @functools.cached_property
    def _word_keys(self) -> tuple[str, ...]:
        return tuple(map(_key, self.words))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, as :meth:`from_dict` reads them."""
        return {"classes": [c.to_dict() for c in self.classes]}


def _read_only(array: np.ndarray) -> np.ndarray:
    """An array that belongs to a vocabulary, which others may share."""
    array.setflags(write=False)
    return array


def _is_source(text: str) -> bool:
    """Whether :meth:`Vocabulary.load` takes a text for a built-in list or a file."""
    name = text.strip().lower()
    return name in BUILTIN or name.endswith((".json", ".txt"))


def _cleaned(word: str) -> str:
    _check_text(word)
    return clean_text(word)


def _check_text(word: str) -> None:
    # What Python makes of bytes that are no text, and halves of characters in JSON: cleaning drops them, and another
    # word would be left.
    try:
        word.encode()
    except UnicodeEncodeError as exc:
        raise VocabularyError(
            f"the word {word[:60]!r} holds {word[exc.start]!r}, which is no character: write it in UTF-8"
        ) from exc


def _key(word: str) -> str:
    """What two spellings of one word share: the text that the tokenizer sees."""
    return clean_text(word).lower()


@functools.lru_cache(maxsize=16)
def _keys(words: frozenset[str]) -> frozenset[str]:
    return frozenset(map(_key, words))


@dataclass
class Draft:
    """A class as it was written: perhaps with repeated words, perhaps without a kind."""

    words: Sequence[str]
    kind: Kind | None = None
    id: int | None = None

    def finish(self) -> VocabularyClass:
        """The class: each word once, and a kind by its words if none was written."""
        first_spelling = {_key(w): w for w in reversed(self.words)}
        keys = dict.fromkeys(map(_key, self.words))
        isthing = self.kind == "thing" if self.kind else not any(_head_noun(k) in REGION_NOUNS for k in keys)
        return VocabularyClass(tuple(first_spelling[k] for k in keys), isthing, self.id)


def read_drafts(path: str | os.PathLike[str]) -> tuple[list[Draft], bool]:
    """The classes of a .json or text file as they were written, before classes of one name are merged.

    Returns:
        The classes, and whether those of one name are told apart, as in OpenSeg's files.
    """
    if given_path(path, "the vocabulary", VocabularyError).suffix.lower() == ".json":
        return _json_drafts(_read_json(path)), False
    text = _read_text(path)
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    others = [line for line in lines if not _OPENSEG_LINE.match(line)]
    if lines and not others:
        return _openseg_drafts(path, "\n".join(lines), None), True
    if len(others) < len(lines):
        raise VocabularyError(
            f"{path} has lines of the form id:name,synonym and others, such as {others[0].strip()[:60]!r}: expected "
            "one form in all lines"
        )
    return _text_drafts(text), False


def _text_drafts(text: str) -> list[Draft]:
    lines = (line for line in text.splitlines() if not line.lstrip().startswith("#"))
    drafts = []
    for part in ";".join(lines).split(";"):
        match = _KIND_PREFIX.match(part)
        kind: Kind | None = None
        if match:
            kind = "thing" if match.group(1).lower() == "thing" else "stuff"
            part = part[match.end() :]
        words = [w for w in map(_cleaned, part.split(",")) if w]
        if words:
            drafts.append(Draft(words, kind))
        elif match:
            raise VocabularyError(f"{match.group(0).strip()!r} is followed by no word: name the class after it")
    return drafts


def _json_drafts(data: Any) -> list[Draft]:
    if isinstance(data, list):
        return [_class_from_json(item) for item in data]
    if isinstance(data, Mapping):
        for key in ("classes", "categories"):
            if isinstance(data.get(key), list):
                return _json_drafts(data[key])
        if all(isinstance(v, list) for v in data.values()) and set(data) <= {"things", "stuff"}:
            drafts = [_class_from_json(item, "thing") for item in data.get("things", [])]
            return drafts + [_class_from_json(item, "stuff") for item in data.get("stuff", [])]
        if all(isinstance(v, list) and all(isinstance(w, str) for w in v) for v in data.values()):
            return [Draft(_words([str(k), *v])) for k, v in data.items()]
    raise VocabularyError(
        f"a vocabulary came as {_shape_of(data)}: expected a list of classes, {{'classes': [...]}}, "
        "{'things': [...], 'stuff': [...]} or {name: [synonyms]}"
    )


def _openseg_drafts(
    path: str | os.PathLike[str], text: str, things: Collection[str] | Callable[[int, str], bool] | None
) -> list[Draft]:
    drafts = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        identifier, _, names = line.partition(":")
        words = [w for w in map(_cleaned, names.split(",")) if w]
        if not identifier.strip().isdecimal() or not words:
            raise VocabularyError(f"{path}, line {number}: {line[:60]!r} is not 'id:synonym,synonym': correct it")
        if _IGNORED_OPENSEG_NAME in words:
            continue
        index = int(identifier)
        kind: Kind | None = None
        if things is not None:
            isthing = things(index, words[0]) if callable(things) else words[0] in things
            kind = "thing" if isthing else "stuff"
        drafts.append(Draft(words, kind, index))
    if not drafts:
        raise VocabularyError(f"{path} has no class: expected lines 'id:synonym,synonym'")
    return drafts


def _head_noun(key: str) -> str:
    """The word that says what is meant: "floor" of "wooden floor", "bottle" of "bottle of water"."""
    return _PREPOSITION.split(key, maxsplit=1)[0].rpartition(" ")[2]


def _words(item: Any) -> list[str]:
    words = [item] if isinstance(item, str) else item
    if not isinstance(words, Sequence) or not words or not all(isinstance(w, str) for w in words):
        raise VocabularyError(f"a class came as {_shape_of(item)}: expected a word or a list of synonyms")
    return [_cleaned(w) for w in words]


def _class_from_json(item: Any, kind: Kind | None = None) -> Draft:
    if not isinstance(item, Mapping):
        return Draft(_words(item), kind)
    name, synonyms, identifier = item.get("name"), item.get("synonyms", []), item.get("id")
    if not isinstance(name, str) or not isinstance(synonyms, list):
        raise VocabularyError(f"the class {_shape_of(item)} needs a 'name', and 'synonyms' as a list if any")
    given = item.get("kind")
    if given is None and "isthing" in item:
        if item["isthing"] not in (0, 1):  # which False and True are
            raise VocabularyError(f"the class {name!r} has isthing {item['isthing']!r:.60}: expected true or false")
        given = "thing" if item["isthing"] else "stuff"
    if given not in (None, "thing", "stuff"):
        raise VocabularyError(f"the class {name!r} has kind {given!r}: expected 'thing' or 'stuff'")
    return Draft(_words([name, *synonyms]), given or kind, identifier)


def _merge_names(drafts: Iterable[Draft], keep_first_kind: bool = False) -> tuple[VocabularyClass, ...]:
    """Join classes of one name, which nobody could tell apart in a result."""
    merged: dict[str, Draft] = {}
    words: dict[str, list[str]] = {}  # of merged classes, each a list that grows: copies would make this quadratic
    for draft in drafts:
        key = _key(draft.words[0])
        words.setdefault(key, []).extend(draft.words)
        earlier = merged.setdefault(key, draft)
        if earlier is draft:
            continue
        if earlier.kind and draft.kind and earlier.kind != draft.kind and not keep_first_kind:
            raise VocabularyError(f"the class {draft.words[0]!r} occurs as a thing and as stuff: keep one")
        identifier = earlier.id if earlier.id is not None else draft.id
        merged[key] = Draft(words[key], earlier.kind or draft.kind, identifier)
        logger.info("the class %r occurs more than once: merged", draft.words[0])
    return tuple(draft.finish() for draft in merged.values())


def _read_json(path: str | os.PathLike[str]) -> Any:
    return decode_json(_read_text(path), str(path), VocabularyError)


def _read_text(path: str | os.PathLike[str]) -> str:
    path = given_path(path, "the vocabulary", VocabularyError)
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise VocabularyError(f"{path} is larger than {MAX_FILE_BYTES >> 20} MiB: not a vocabulary")
        return path.read_text(encoding="utf-8-sig")
    except OSError as exc:
        raise VocabularyError(f"cannot read the vocabulary {path} ({exc.strerror}): check the path") from exc
    except UnicodeDecodeError as exc:
        raise VocabularyError(f"{path} is not UTF-8 text ({exc.reason}): save it as UTF-8") from exc


def _shape_of(data: Any) -> str:
    text = reprlib.repr(data)  # of what is nested deeply, too
    return f"{type(data).__name__} {text if len(text) < 60 else text[:57] + '…'}"


@functools.cache
def _builtin(name: str) -> Vocabulary:
    data = json.loads((_LABELS / f"{name}.json").read_text(encoding="utf-8"))
    return Vocabulary(tuple(_class_from_json(item).finish() for item in data["classes"]))
