"""Noun phrases of a caption, by a small lexicon and a few context rules.

ODISE's caption variant is supervised by the noun phrases of image captions (paper section 3.4). The published code runs
a statistical tagger that is downloaded at run time; captions are plain enough ("A man riding a wave on a surfboard.")
that closed word classes, a list of the verbs and adjectives that captions use, and suffixes find nearly the same nouns.
Unknown words are nouns, which errs on the side of supervision.

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
_VERBS = _words(
    "sit stand walk run ride hold lie lay look watch wear eat drink play fly float swim jump lean rest sleep hang park "
    "drive travel move wait pose smile stare graze feed carry throw catch hit swing kick serve cut prepare cook fill "
    "cover surround contain show feature display include sell buy make take get go come put set talk speak read write "
    "use work try appear seem cross pass pull push reach turn face point face grow shine glow glide perch hover drift "
    "surf ski skate cast touch follow lead chase gather enjoy approach attach line rise fall drop loom stack "
    "pile scatter stretch dot visit decorate bathe cuddle peek hide linger stop"
)
_IRREGULAR_VERBS = _words(
    "sat stood ran rode held lay lain wore worn ate eaten drank drunk flew flown swam slept hung drove driven threw "
    "thrown caught hit swung cut sold bought made taken took got gotten went gone came put set spoke spoken wrote "
    "written grew grown shone rose risen fell fallen led hid hidden lies lying dies"
)
_ING_NOUNS = _words(
    "building ceiling painting wedding evening morning clothing railing parking wing ring string king spring thing "
    "swing sling pudding icing dressing crossing seating lighting earring siding flooring awning lightning duckling "
    "bowling boxing surfing skiing snowboarding skateboarding fishing herring ping viking"
)
_ED_NOUNS = _words("bed shed seed weed reed sled bread thread head steed")

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


def _tag(word: str, previous: str) -> str:
    """Class of a lower-case token after one of class ``previous``: D, P, J, N, V, C (other closed class) or "."."""
    inside_noun_phrase = previous in ("D", "J")
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
    if word in _VERBS:
        return "N" if inside_noun_phrase else "V"  # "a watch" against "people watch"
    if word in _ING_NOUNS or word in _ED_NOUNS:
        return "N"
    if word.endswith(("ing", "ed")) and len(word) > 4:
        return "J" if inside_noun_phrase else "V"  # "a parked car" against "a car parked"
    if word in _VERB_FORMS:
        return "N" if inside_noun_phrase else "V"
    if word.endswith("ly") and len(word) > 4 and word not in ("family", "butterfly", "jelly", "belly", "lily"):
        return "C"
    return "N"


def _tagged(caption: str) -> list[tuple[str, str]]:
    tags: list[tuple[str, str]] = []
    previous = "."
    for word in _TOKEN.findall(caption.lower().replace("’", "'")):
        previous = _tag(word, previous)
        tags.append((word, previous))
    return tags


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
