"""The little English grammar that the descriptions need: articles, agreement, gerunds, capitals.

The vocabulary stores every benefit and promise once, starting with a verb in its base form ("keep a loaf fresh"). From
that one entry come "keeps a loaf fresh", "keep a loaf fresh", "keeping a loaf fresh" and "Keep a loaf fresh", which is
how a few thousand phrases make many more sentences. A later verb that must agree as well is marked with a plus sign:
"bend but never +break" becomes "bends but never breaks".
"""

import re

_IRREGULAR = {"be": "is", "have": "has", "do": "does", "go": "goes"}


def article(noun: str) -> str:
    """The noun with its indefinite article, chosen by sound: "a unit", "an hour", "an 8 litre pan".

    Args:
        noun: A noun phrase in the singular.

    Returns:
        The phrase with "a" or "an" before it.
    """
    word = noun.lower()
    if word.startswith(("hour", "heir", "honest", "8", "11", "18")) and not re.match(r"11\d|18\d", word):
        return f"an {noun}"
    if word.startswith(("one", "uni", "use", "usb", "eu")) and not word.startswith("unin"):
        return f"a {noun}"
    return f"an {noun}" if word[0] in "aeiou" else f"a {noun}"


def is_plural(noun: str) -> bool:
    """Whether a noun phrase is in the plural, judged by its last word ("rubber feet", "deep pockets")."""
    last = noun.split()[-1]
    return last == "feet" or (last.endswith("s") and not last.endswith(("ss", "us", "is")))


def third_person(verb: str) -> str:
    """The third person singular of a verb in its base form: "carry" gives "carries"."""
    if verb in _IRREGULAR:
        return _IRREGULAR[verb]
    if verb.endswith(("s", "x", "z", "ch", "sh", "o")):
        return f"{verb}es"
    if verb.endswith("y") and verb[-2] not in "aeiou":
        return f"{verb[:-1]}ies"
    return f"{verb}s"


def agree(phrase: str, plural: bool) -> str:
    """Makes a phrase that starts with a base-form verb agree with its subject.

    Args:
        phrase: Such as "bend but never +break"; every verb with a plus sign agrees too.
        plural: Whether the subject is in the plural.

    Returns:
        The phrase in the present tense, without plus signs.
    """
    if plural:
        return "are" if phrase == "be" else phrase.replace("+", "")
    first, _, rest = phrase.partition(" ")
    if first in ("never", "always"):
        return f"{first} {agree(rest, plural)}"
    rest = re.sub(r"\+(\w+)", lambda match: third_person(match[1]), rest)
    return f"{third_person(first)} {rest}".strip()


def gerund(phrase: str) -> str:
    """The phrase with its first verb as a gerund: "take the chill off" gives "taking the chill off"."""
    verb, _, rest = phrase.partition(" ")
    if verb == "outwit" or re.fullmatch(r"[^aeiou]*[aeiou][^aeiouwxy]", verb):  # one short syllable, like "set"
        stem = verb + verb[-1]
    elif verb.endswith("e") and verb != "age":
        stem = verb[:-1]
    else:
        stem = verb
    return f"{stem}ing {rest}".strip()


def capitalise(text: str) -> str:
    """The text with a capital at the start of each sentence, the rest unchanged."""
    return re.sub(r"(^|[.?!] )([a-z])", lambda match: match[1] + match[2].upper(), text)


def words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation other than inner apostrophes and hyphens."""
    return re.findall(r"[a-z0-9]+(?:['’.,-][a-z0-9]+)*", text.lower())
