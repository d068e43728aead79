"""Turns a product with its attributes into a description, by drafting until a draft reads well.

A draft picks sentence shapes from ``_sentences.toml`` at random and lets them take up the attributes one after the
other; each attribute is then said in one of the forms of its kind, with one of its own benefits. An editor then looks
at the draft and most often throws it away: too long, a word said twice, two sentences that begin alike, one "that"
too many. So the shapes can stay simple, and no shape has to know what the others say.
"""

import re
from collections import Counter
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from random import Random
from typing import Any, TypeVar

from catalogue import Entry, Product
from grammar import agree, article, capitalise, gerund, is_plural, words

T = TypeVar("T")

SLOTS = ("tail_short", "tail", "verb_short", "verb", "clause", "solo", "close")
SHORTEST, LONGEST = 45, 80  # words in a description
HOOKED, CLOSED = 0.3, 0.6  # the shares of drafts with a hook before and with a closing sentence after
ATTEMPTS = 1000

# The most that a description may have of a word or a sign.
_LIMITS = {
    "that": 2,
    "which": 1,
    "who": 2,
    "with": 2,
    "for": 3,
    "and": 4,
    "so": 1,
    "because": 1,
    ":": 1,
    ";": 1,
    "?": 1,
}


class Unfit(Exception):
    """A draft that cannot be finished; another is tried."""


def pick(rng: Random, items: Sequence[T]) -> T:
    """One of the items, by ``rng.random()`` alone: the one method whose numbers Python promises never to change."""
    return items[int(rng.random() * len(items))]


def shuffled(rng: Random, items: Sequence[T]) -> list[T]:
    """The items in random order, by ``rng.random()`` alone."""
    rest = list(items)
    return [rest.pop(int(rng.random() * len(rest))) for _ in items]


@cache
def slots(template: str) -> list[str]:
    """The names of the attribute slots of a sentence shape, in order."""
    return [name for name in re.findall(r"{(\w+)}", template) if name in SLOTS]


@dataclass
class Draft:
    """One attempt at a description.

    Attributes:
        rng: Where the choices come from.
        product: What is described.
        name: The invented name of this product.
        kinds: The templates of the attributes, by kind and form.
        waiting: The attributes not yet taken up, in the order in which they will be.
        promises: The promises not yet used.
        named: Whether a pronoun would now be understood as the product.
        promise: The promise of the sentence at hand.
        begun: Whether any attribute has been taken up.
    """

    rng: Random
    product: Product
    name: str
    kinds: dict[str, Any]
    waiting: list[Entry]
    promises: list[str]
    named: bool = False
    promise: str = field(default="", init=False)
    begun: bool = field(default=False, init=False)

    @property
    def plural(self) -> bool:
        """Whether the product takes "they" and "are"."""
        return self.product.number == "plural"

    def sentence(self, template: str) -> str:
        """Fills in one sentence shape.

        Args:
            template: A line of ``_sentences.toml``.

        Returns:
            The sentence, capitals and agreement included.

        Raises:
            Unfit: If an attribute has no such form, or a word would be misunderstood here.
        """
        if re.search(r"{(p|ps|p3|imp|ping)}", template):
            if not self.promises:
                raise Unfit("every promise is made")
            self.promise = self.promises.pop()
        if " also " in template and not self.begun:
            raise Unfit("also to what?")
        return capitalise(self._fill(template))

    def _fill(self, template: str, **given: str) -> str:
        template = re.sub(r"\[(\w+)\]", lambda match: agree(match[1], self.plural), template)
        return re.sub(r"{(\w+)}", lambda match: given.get(match[1]) or self._word(match[1]), template)

    def _word(self, name: str) -> str:
        if name in SLOTS:
            return self._attribute(name)
        if name in ("p", "ps", "p3", "imp", "ping"):
            return self._promise(name)
        if name == "a_type":
            return article(self.product.type)
        if name == "the":
            self.named = True
            return f"{pick(self.rng, ['the'] * 5 + ['our'])} {self.name} {self.product.type}"
        if name == "subj":
            if self.named and self.rng.random() < 0.6:
                return "they" if self.plural else "it"
            return self._again()
        if name == "short" or (name in ("it", "them") and not self.named):
            return self._again(by_name=True)
        if not self.named:
            raise Unfit(f"{name} would point at something else")
        return {"it": ("it", "they"), "them": ("it", "them"), "its": ("its", "their")}[name][self.plural]

    def _again(self, by_name: bool = False) -> str:
        """The product once more, not by a pronoun: "the Fennick", "the Fennick gloves", "this bread bin"."""
        self.named = True
        if not by_name and self.rng.random() < 0.4:
            return f"{'these' if self.plural else 'this'} {self.product.type}"
        if self.product.number == "mass":
            return self.name
        return f"the {self.name} {self.product.type.split()[-1]}" if self.plural else f"the {self.name}"

    def _promise(self, form: str) -> str:
        promise = self.promise.lstrip("*")
        if form in ("imp", "ping") and (self.promise.startswith("*") or " with " in promise):
            raise Unfit("only the product can do that")
        if form == "ping":
            return gerund(promise)
        if form == "p3":
            return agree(promise, plural=False)
        return agree(promise, self.plural) if form == "ps" else promise

    def _attribute(self, form: str) -> str:
        entry = self.waiting.pop(0)
        self.begun = True
        rules = self.kinds[entry.kind]
        if form not in rules:
            raise Unfit(f"{entry.kind} has no {form}")
        template = pick(self.rng, rules[form])
        if re.search(r"{(b|base)}", template) and not entry.phrases:
            raise Unfit(f"nothing to say of {entry.value}")
        phrase = pick(self.rng, entry.phrases) if entry.phrases else ""
        if "{base}" in template and " its " in phrase:
            raise Unfit("few things keep its colour")
        plural = {"one": False, "several": True, "value": is_plural(entry.value)}.get(rules["agree"])
        text = self._fill(
            template,
            v=entry.value,
            a=entry.value if rules["agree"] == "value" and plural else article(entry.value),
            b=phrase if plural is None else agree(phrase, plural),
            base=agree(phrase, plural=True),
            made=pick(self.rng, entry.made) if entry.made else "",
        )
        if form in ("clause", "solo"):
            self.named = bool(re.search(r"{(it|them)}", template))
        return text


def _shape(rng: Random, shapes: dict[str, list[str]], product: Product, count: int) -> list[str]:
    """Sentence shapes that together take up ``count`` attributes."""

    def some(place: str, most: int) -> str:
        fitting = [shape for shape in shapes[place] if len(slots(shape)) <= most]
        shape = pick(rng, fitting)
        while shape.startswith("1|") and product.number != "one":
            shape = pick(rng, fitting)
        return shape.removeprefix("1|")

    chosen = [some("opening", count)]
    left = count - len(slots(chosen[0]))
    closing = [some("closing", left)] if rng.random() < CLOSED else []
    left -= sum(len(slots(shape)) for shape in closing)
    while left:
        chosen.append(some("body", left))
        left -= len(slots(chosen[-1]))
    return chosen + closing


def _stem(word: str) -> str:
    return re.sub(r"(iest|ier|ies|ing|ed|es|s|e|y)$", "", word.removesuffix("'s")) if len(word) > 3 else word


def reads_well(text: str, product: Product, name: str, common: AbstractSet[str]) -> bool:
    """The editor: whether a draft has the right length, and says no word too often.

    Args:
        text: The draft.
        product: What it describes; the words of its type may be repeated.
        name: The product's name, which may come up three times at most.
        common: Words that may come twice without anybody noticing.

    Returns:
        Whether to keep the draft.
    """
    sentences = re.split(r"(?<=[.?!]) ", text)
    tokens = words(text)
    if not (SHORTEST <= len(tokens) <= LONGEST and 2 <= len(sentences) <= 4):
        return False
    free = common | set(words(f"{name} {product.type}"))
    if any(count > 1 for count in Counter(_stem(word) for word in tokens if word not in free).values()):
        return False
    counts = Counter(tokens)
    if any((text.count(word) if not word.isalpha() else counts[word]) > most for word, most in _LIMITS.items()):
        return False
    if any(words(sentence).count("with") > 1 for sentence in sentences):
        return False
    if any(first == second for first, second in pairwise(tokens)):  # "let the coat stand stand tall"
        return False
    starts = [sentence.split()[0] for sentence in sentences]
    twice = text.lower().count(product.type) <= 2 and text.count(name) <= 3
    return twice and len(set(starts)) == len(starts) and max(len(words(sentence)) for sentence in sentences) <= 32


def describe(
    rng: Random, product: Product, name: str, attributes: Sequence[Entry], templates: dict[str, Any]
) -> tuple[str, list[Entry]]:
    """Writes one description.

    Args:
        rng: Where the choices come from.
        product: The type of product.
        name: Its invented name.
        attributes: What else the description has to mention.
        templates: All templates, as ``catalogue.wording()`` reads them.

    Returns:
        The description, and the attributes in the order in which it takes them up.

    Raises:
        Unfit: If no draft reads well.
    """
    common = frozenset(templates["sentences"]["common"].split())
    for _ in range(ATTEMPTS):
        order = shuffled(rng, attributes)
        draft = Draft(rng, product, name, templates["kinds"], list(order), shuffled(rng, product.promises))
        hook = [pick(rng, product.hooks)] if rng.random() < HOOKED else []
        try:
            shape = _shape(rng, templates["sentences"], product, len(order))
            text = " ".join([*hook, *(draft.sentence(template) for template in shape)])
        except Unfit:
            continue
        text = text.replace("?.", "?").replace(" also is ", " is also ").replace(" also are ", " are also ")
        if not draft.waiting and reads_well(text, product, name, common):
            return text, order
    raise Unfit(f"no good description of a {product.type} with {[entry.value for entry in attributes]}")
