"""Noun phrases of a caption, by a small lexicon and a few context rules.

ODISE's caption variant is supervised by the noun phrases of image captions (paper section 3.4). The published code runs
a statistical tagger that is downloaded at run time. Here closed word classes, lists of the verbs and adjectives that
captions use, suffixes and the tokens beside a word decide what it is, which suits plain captions ("A man riding a wave
on a surfboard."). Unknown words are nouns, which errs on the side of supervision. Words that are verb and noun ("stop",
"park", "skis") are told apart by rules of thumb that some captions break; a test finds each built-in word of COCO and
ADE20K in a few sentences. How often the two ways agree on whole captions has not been measured.

Two differences are meant. Phrases that end in a noun which places or counts things are left out: of "a group of people"
the published code learns "group", "people" and "group of people", this one "people". And a phrase that ends a caption
without a full stop counts; the published training code loses it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

WORDS_PER_CAPTION = 8


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_DETERMINERS = _words(
    "a an the this that these those some any each every no another other both all several many few more most its his "
    "her their my your our one two three four five six seven eight nine ten dozen various multiple numerous"
)
_PREPOSITIONS = _words(
    "in on at of by with from to into onto over under above below behind beside besides between among near next "
    "against along across around through inside outside beneath underneath off up down during for before after "
    "toward towards without within about upon past beyond alongside atop amid via per"
)
_OTHER_CLOSED = _words(
    "and or but nor so yet while as because if than then there here where when which who whom whose what how why is "
    "are was were be been being am do does did done have has had having can could may might must shall should will "
    "would it he she they them him we us i you me itself himself herself themselves something someone anything "
    "everything not very too also just only quite rather really almost together away out back apart ahead it's 's "
    "there's that's"
)
_LAYOUT = _words(
    "top bottom front middle side center centre background foreground left right edge photo photograph picture image "
    "view closeup close-up shot scene couple bunch lot group pair variety kind"
)
"""Nouns that place or count things and name no region of the picture; phrases that end in one are left out."""
_ADJECTIVES = _words(
    "red green blue yellow purple pink brown black white gray grey golden silver dark bright colorful "
    "colourful pale big small large little tiny huge giant tall short long wide narrow thick thin old young new modern "
    "antique ancient fresh ripe raw wooden metallic empty full open "
    "closed high low heavy round flat steep hot cold warm cool wet dry dirty clean clear cloudy sunny snowy "
    "grassy sandy rocky muddy rainy busy quiet calm rough smooth soft hard beautiful pretty cute lovely nice fancy "
    "happy sad sleepy hungry angry adult female male different similar same whole half double single own many public "
    "electric electronic digital asian american fluffy furry shaggy striped plaid floral bare blond blonde lush ornate "
    "shiny rusty sharp delicious tasty healthy frozen wild domestic lone lonely distant nearby upper lower inner outer "
    "smiling"
)
_PURE_VERBS = _words(
    "sit hold lie lay wear eat lean sleep hang travel wait pose stare graze feed carry hit kick cut prepare cook "
    "surround contain feature include sell buy make take get go come put speak read write appear seem pull push grow "
    "shine glow glide perch hover cast touch follow chase gather enjoy approach attach rise loom scatter visit "
    "decorate bathe cuddle peek hide linger drift"
)
_NOUN_VERBS = _words(
    "stand walk run ride look watch drink play fly float swim jump rest park drive move smile throw catch swing serve "
    "fill cover show display set talk use work try cross pass reach turn face point surf ski skate lead line fall drop "
    "stack pile stretch dot stop"
)
"""Verbs whose base form, and that with -s, are nouns of captions too: "bus stop", "a pair of skis"."""
_VERBS = _PURE_VERBS | _NOUN_VERBS
_IRREGULAR_VERBS = _words(
    "sat stood ran rode held lay lain wore worn ate eaten drank drunk flew flown swam slept hung drove driven threw "
    "thrown caught hit swung cut sold bought made taken took got gotten went gone came put set spoke spoken wrote "
    "written grew grown shone rose risen fell fallen led hid hidden lies lying dies"
)
_ING_NOUNS = _words(
    "building ceiling painting wedding evening morning clothing railing parking wing ring string king spring thing "
    "swing sling pudding icing dressing crossing seating lighting earring siding flooring awning lightning duckling "
    "bowling boxing surfing skiing snowboarding skateboarding fishing herring ping viking "
    "plaything"
)
_ED_NOUNS = _words("bed shed seed weed reed sled bread thread head steed")
_ACTORS = _words(
    "people men women children sheep cattle geese deer police man woman boy girl lady guy person child kid baby player "
    "batter catcher pitcher skier surfer skater skateboarder snowboarder rider"
)
"""Nouns that act: a base form behind them is a verb, as behind every plural."""
_ANIMALS = _words("dog cat cow horse elephant giraffe zebra bear bird")
"""Nouns that act where two are joined: "a cat and dog rest", but "a dog park"."""


_TOKEN = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*|\d+|[.,;:!?()\"]")


def _verb_forms() -> frozenset[str]:
    forms: set[str] = set(_IRREGULAR_VERBS)
    for verb in _VERBS:
        stem = verb[:-1] if verb.endswith("e") else verb
        doubled = verb + verb[-1] if re.search(r"[^aeiou][aeiou][bdgmnpt]$", verb) else stem
        third = verb + "es" if verb.endswith(("s", "sh", "ch", "x")) else verb + "s"
        third = verb[:-1] + "ies" if re.search(r"[^aeiou]y$", verb) else third
        past = verb[:-1] + "ied" if re.search(r"[^aeiou]y$", verb) else doubled + "ed"
        forms.update((verb, third, stem + "ing", doubled + "ing", stem + "ed", past))
    return frozenset(forms)


_VERB_FORMS = _verb_forms()
_NOUN_FORMS = _NOUN_VERBS | {verb + ("es" if verb.endswith(("s", "sh", "ch", "x")) else "s") for verb in _NOUN_VERBS}


def _class_alone(word: str) -> str:
    """Class of a lower-case token where it does not depend on others: D, P, J, N, C (other closed class) or ".".

    What may be a verb is "V", and what ends as participles do "VJ".
    """
    if not word[0].isalpha():
        return "D" if word.isdigit() else "."
    if word in _DETERMINERS:
        return "D"
    if word in _PREPOSITIONS:
        return "P"
    if word in _OTHER_CLOSED:
        return "C"
    if word in _ADJECTIVES:
        return "J"
    if word not in _VERBS and (word in _ING_NOUNS or word in _ED_NOUNS):
        return "N"
    if word not in _VERBS and word.endswith(("ing", "ed")) and len(word) > 4:
        return "VJ"
    if word in _VERB_FORMS:
        return "V"
    if word.endswith("ly") and len(word) > 4 and word not in ("family", "butterfly", "jelly", "belly", "lily"):
        return "C"
    return "N"


def _tag(words: Sequence[str], tags: Sequence[str], index: int) -> str:
    """Class of token ``index`` behind tokens of classes ``tags``: D, P, J, N, V, C (other closed class) or "."."""
    word, alone = words[index], _class_alone(words[index])
    before, previous = (words[index - 1], tags[-1]) if index else ("", ".")
    following = words[index + 1] if index + 1 < len(words) else "."
    ahead = _class_alone(following)
    if word == "can":  # "a trash can on", against "a dog can swim"
        named = (previous in ("D", "J") and before != "that") or (
            previous == "N" and (ahead in ("P", ".", "VJ") or following in ("and", "or"))
        )
        return "N" if named else "C"
    if alone not in ("V", "VJ"):
        return alone
    if previous in ("D", "J"):  # "a watch" against "people watch", "a parked car" against "a car parked"
        return "N" if alone == "V" else "J"
    if ahead == "D":  # an object follows: "and holds a bat", "a player swing a racket"
        return "V"
    joined = before in ("and", "or")
    if (joined or previous == ".") and _goes_on(words, tags, index):
        return "V"
    to_verb = before == "to" and words[index - 2 : index - 1] not in (["next"], ["close"])
    opens = joined or previous == "." or (previous == "P" and not to_verb)
    if alone == "VJ":  # "with parked cars", "and dining table"
        return "J" if opens and ahead not in ("D", "P", "C", ".") else "V"
    if word in _NOUN_FORMS and (opens or previous == "V" or before in ("has", "have")):  # "on skis", "wearing skis"
        return "N"
    if word in _NOUN_VERBS and previous == "N" and not _acts(words, tags, index - 1):  # "bus stop"
        return "N"
    return "V"


def _goes_on(words: Sequence[str], tags: Sequence[str], index: int) -> bool:
    """Whether a verb form continues an earlier one, as in "sits on a bed and looks" or "drinking wine and eating"."""
    endings = ("ing", "ed", "s", "")
    ending = next(end for end in endings if words[index].endswith(end))
    return any(
        tag == "V" and next(end for end in endings if word.endswith(end)) == ending
        for word, tag in zip(words[:index], tags, strict=True)
    )


def _acts(words: Sequence[str], tags: Sequence[str], index: int) -> bool:
    """Whether a base form behind noun ``index`` is its verb: a plural, a person, or the second of two animals."""
    word = words[index]
    if word in _ACTORS or (word.endswith("s") and not word.endswith(("ss", "us", "is"))):
        return True
    start = index
    while start and tags[start - 1] in ("D", "J", "N"):
        start -= 1
    return word in _ANIMALS and start > 1 and words[start - 1] == "and" and tags[start - 2] == "N"


def _tagged(caption: str) -> list[tuple[str, str]]:
    words = _TOKEN.findall(caption.lower().replace("’", "'"))
    tags: list[str] = []
    for index in range(len(words)):
        tags.append(_tag(words, tags, index))
    return list(zip(words, tags, strict=True))


def noun_phrases(caption: str) -> list[str]:
    """Lower-case noun phrases of a caption, each once, in order of appearance.

    A phrase is a run of adjectives and nouns that ends in a noun; two phrases joined by a bare preposition ("glass of
    water") also count as one more.
    """
    chunks: list[tuple[int, int, str]] = []  # start, end, text
    tags = _tagged(caption)
    start = 0
    while start < len(tags):
        end = start
        while end < len(tags) and tags[end][1] in "JN":
            end += 1
        last = end
        while last > start and tags[last - 1][1] != "N":
            last -= 1
        if last > start:
            chunks.append((start, last, " ".join(word for word, _ in tags[start:last])))
        start = end + 1
    phrases: dict[str, None] = {}
    for index, (_, end, text) in enumerate(chunks):
        words = text.split()
        if words[-1] in _LAYOUT:
            continue
        phrases[text] = None
        if index + 1 < len(chunks) and chunks[index + 1][0] == end + 1 and tags[end][1] == "P":
            following = chunks[index + 1][2]
            if following.split()[-1] not in _LAYOUT:
                phrases[f"{text} {tags[end][0]} {following}"] = None
    return list(phrases)


def caption_words(
    captions: Sequence[str], random_numbers: random.Random, count: int = WORDS_PER_CAPTION
) -> tuple[list[str], bool]:
    """Words that supervise one image: phrases of one random caption, drawn with replacement.

    Args:
        captions: the image's captions; may be empty.
        random_numbers: source of the choice.
        count: how many phrases to draw.

    Returns:
        ``count`` phrases and True, or ``count`` empty strings and False where the caption has none.
    """
    phrases = noun_phrases(random_numbers.choice(list(captions))) if captions else []
    if not phrases:
        return [""] * count, False
    return random_numbers.choices(phrases, k=count), True
