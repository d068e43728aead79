"""What a chat template writes around messages, found by trying it out.

A chat template is a program, and another engine's templates are programs in another language. Nearly all of them do the
same: they put each message into a frame that its role has, and ask for the answer. So conversations of marked words are
rendered, and what stands between the words is taken apart:

    prefix · before_user word after_user · before_assistant word after_assistant · ... · generation

A system message has a frame of its own, or stands in the first or the last user's frame, or there is no place for it;
there may be a default. What was found is then held against the template on other conversations, and a template that it
does not reproduce to the letter is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Literal

from lorafit.data.readers import Message
from lorafit.errors import DataError, ModelError

Render = Callable[[Sequence[Message]], str]

_SYSTEM, _WORDS = "qzSystem", ("qzOne", "qzTwo", "qzThree")


@dataclass(frozen=True)
class Frame:
    """What stands around a message.

    Attributes:
        before: The text before it.
        after: The text behind it.
    """

    before: str = ""
    after: str = ""


@dataclass(frozen=True)
class ChatFormat:
    """How conversations are written.

    Attributes:
        prefix: What every conversation starts with, but for a bos token that the engine adds.
        user: The frame of a user's message.
        assistant: The frame of an answer.
        generation: What asks for an answer.
        system: The frame of a system message.
        place: Where it stands: by itself, inside the frame of the first or of the last user, or nowhere.
        default: The system message of a conversation without one; "" if its frame is written all the same, None if not.
        refuses_system: The template refuses system messages, so that ``place`` is a choice and not the model's.
        trims: The template takes white space off both ends of messages.
    """

    prefix: str
    user: Frame
    assistant: Frame
    generation: str
    system: Frame = Frame()
    place: Literal["own", "first", "last", "nowhere"] = "nowhere"
    default: str | None = None
    refuses_system: bool = False
    trims: bool = False

    def render(self, messages: Sequence[Message]) -> str:
        """A conversation as text, without the bos token that the engine adds; asks for an answer to its last message.

        An answer that comes last is left open.
        """
        text, held = self.prefix, ""
        if self.default and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.default}, *messages]
        if self.default == "":
            said = "\n\n".join(each["content"] for each in messages if each["role"] == "system")
            text += self.system.before + said + self.system.after
        for i, message in enumerate(messages):
            content, last = message["content"], i == len(messages) - 1
            if message["role"] == "system":
                held = content if self.place in ("first", "last") else ""
                if self.place == "own" and self.default != "":
                    text += self.system.before + content + self.system.after
            elif message["role"] == "user":
                text += self.user.before
                if held and (self.place == "first" or last):
                    text += self.system.before + held + self.system.after
                    held = ""
                text += content + self.user.after
            else:
                text += self.assistant.before + content + ("" if last else self.assistant.after)
        return text if messages[-1]["role"] == "assistant" else text + self.generation


def find_format(render: Render, bos: str, added: str, endings: Sequence[str]) -> ChatFormat:
    """The format of a chat template.

    Args:
        render: Renders a conversation with the template, asking for an answer.
        bos: The bos token, which the template may write; "" if there is none.
        added: What the engine puts before every prompt: the bos token, or "".
        endings: Tokens that end a turn.

    Raises:
        ModelError: The template does something else than to put messages into frames.
    """
    one, two, three = _WORDS

    def gaps(*words: str) -> list[str]:
        return _gaps(render(_conversation(words)), words)

    start, end = gaps(one)
    _, to_answer, to_user, _ = gaps(one, two, three)
    # A token that frames are written with (ChatML's models often say that <|im_start|> is their bos) is no prefix.
    prefix = bos if bos and start.startswith(bos) and (added or bos not in to_user) else ""
    start = start.removeprefix(prefix)
    before = _common_end(start, to_user)
    found = ChatFormat("" if prefix == added else prefix, Frame(before), Frame("", to_user.removesuffix(before)), "")
    opening = start.removesuffix(before)
    try:
        system_text = render(_conversation((_SYSTEM, one)))
    except DataError:
        found = replace(found, place="first", system=Frame("", "\n\n"), refuses_system=True)
    else:
        if _SYSTEM in system_text:
            (system_start, system_end, _), found = _gaps(system_text, (_SYSTEM, one)), replace(found, place="own")
            found, opening = _with_system(
                found, start, opening, system_start.removeprefix(prefix), system_end, to_user, endings, render
            )
    found = replace(found, prefix=found.prefix + opening)
    found = _with_answer(found, end, to_answer)
    found = replace(found, trims=f"\t{one}\t" not in render(_conversation((f"\t{one}\t",))))
    _check(found, render, added if prefix == added else "")
    return found


def _with_system(
    found: ChatFormat,
    start: str,
    opening: str,
    system_start: str,
    system_end: str,
    to_user: str,
    endings: Sequence[str],
    render: Render,
) -> tuple[ChatFormat, str]:
    """The format with the frame of system messages, and what every conversation opens with."""
    enough = len(start) >= len(system_start) + len(system_end)
    if enough and start.startswith(system_start) and start.endswith(system_end):
        default = start[len(system_start) : len(start) - len(system_end)]
        before = _behind_ending(system_end, endings)
        if not to_user.endswith(before):
            raise _unknown("a user's message has another frame behind a system message than behind an answer")
        system = Frame(system_start, system_end.removesuffix(before))
        answered = Frame("", to_user.removesuffix(before))
        return replace(found, user=Frame(before), assistant=answered, system=system, default=default), ""
    before = found.user.before
    system_start = system_start.removeprefix(opening)
    if before and system_end.endswith(before):
        return replace(found, system=Frame(system_start, system_end.removesuffix(before))), opening
    if not system_start.startswith(before):
        raise _unknown("a system message stands neither by itself nor in a user's message")
    words = (_SYSTEM, *_WORDS)
    text = render(_conversation(words))
    place: Literal["first", "last"] = "first" if text.find(_SYSTEM) < text.find(_WORDS[0]) else "last"
    return replace(found, system=Frame(system_start.removeprefix(before), system_end), place=place), opening


def _with_answer(found: ChatFormat, end: str, to_answer: str) -> ChatFormat:
    """The format with what stands between a user's message and an answer, there already or asked for."""
    shared = _common_start(end, to_answer)
    closings = (found.system.after if found.place == "own" else "", found.assistant.after, shared)
    after = next(each for each in closings if each == shared or (each and shared.startswith(each)))
    return replace(
        found,
        user=replace(found.user, after=after),
        assistant=replace(found.assistant, before=to_answer.removeprefix(after)),
        generation=end.removeprefix(after),
    )


def _check(found: ChatFormat, render: Render, left_out: str) -> None:
    """Hold the format against the template on conversations that it was not taken from."""
    texts = (
        "What did the miller leave?",
        'A mill,\na donkey -- and a "cat".\n\nThat\'s all {{ of }} it: 100%.',
        "Zwölf 猫 <b>?",
    )
    for system in ((), ("Answer in\n\none line. {% 1 %}",)):
        for turns in range(1, 6, 2):
            words = [*system, *(texts[i % 3] for i in range(turns))]
            messages = _conversation(words, system=bool(system))
            try:
                expected = render(messages)
            except DataError:
                if system and found.refuses_system:
                    continue
                raise _unknown("it refuses an ordinary conversation") from None
            if left_out + found.render(messages) != expected:
                with_it = "with" if system else "without"
                raise _unknown(f"a conversation of {turns} messages {with_it} a system message has other frames")


def _conversation(words: Sequence[str], system: bool | None = None) -> list[Message]:
    """Messages in turn, after a system message if the first word is that one's."""
    has_system = words[0] == _SYSTEM if system is None else system
    roles = ["system"] * has_system + ["user", "assistant"] * len(words)
    return [Message(role=role, content=word) for role, word in zip(roles, words, strict=False)]


def _gaps(text: str, words: Sequence[str]) -> list[str]:
    """What stands before, between and behind words."""
    if any(text.count(word) != 1 for word in words):
        raise _unknown("it does not write every message once")
    pieces = []
    for word in words:
        before, found, text = text.partition(word)
        if not found:
            raise _unknown("it does not write messages in their order")
        pieces.append(before)
    return [*pieces, text]


def _behind_ending(text: str, endings: Sequence[str]) -> str:
    """What follows the token that ends a turn and the white space behind it; all, if the text begins otherwise."""
    ending = next((each for each in endings if text.startswith(each)), "")
    return text.removeprefix(ending).lstrip() if ending else text


def _common_start(one: str, other: str) -> str:
    return "".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _common_end(one: str, other: str) -> str:
    return _common_start(one[::-1], other[::-1])[::-1]


def _unknown(why: str) -> ModelError:
    return ModelError(f"the model's chat template is not of a kind that can be written for Ollama: {why}")
