"""``avl-edge chat``"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, TypeAlias

import torch
import typer

from ..config import Options
from ..errors import AvlEdgeError
from ..model.images import ImageSource, open_image
from ..model.prompt import Message
from ..serving.generation import Generation
from ..serving.image_session import ImageSession
from ..serving.runtime import Runtime
from .conversation import System, said_before
from .memory import MaxMemory
from .options import Model, Seed, Temperature, Threads
from .sources import picture
from .terminal import Debug, readers_may_leave

Images: TypeAlias = Annotated[
    list[str] | None,
    typer.Option("--image", metavar="FILE", help="A picture to begin with; may be given several times."),
]
MaxNewTokens: TypeAlias = Annotated[int, typer.Option(help="The longest answer, in tokens.")]
HELP = "/image FILE shows a picture, /forget begins anew, /help says this, /quit or Ctrl-D ends"


class Chat:
    """A conversation with the model of ``runtime``: what was said, and the rows of its pictures, which are run once."""

    def __init__(self, runtime: Runtime, before: list[Message], options: Options) -> None:
        self._runtime, self._before, self._options = runtime, before, options
        self._messages = list(before)
        self._shown: list[ImageSource] = []
        self._session: ImageSession | None = None
        self._asked = 0

    def show(self, image: ImageSource) -> None:
        """A picture that stands before the next question. Raises BadImage."""
        open_image(image, self._runtime.max_pixels)
        self._shown.append(image)

    def forget(self) -> None:
        """Begin anew."""
        self._messages, self._shown, self._session = list(self._before), [], None

    def ask(self, question: str) -> Iterator[str]:
        """The pieces of the answer, which becomes part of the conversation once it is complete, with its question."""
        shown, asked = self._shown, Message("user", [*self._shown, question])
        answer = ""
        with self._generation(shown, question) as generation:
            for event in generation:
                answer += event.text
                yield event.text
        self._messages += [asked, Message("assistant", answer)]
        self._shown = []

    def _generation(self, shown: list[ImageSource], question: str) -> Generation:
        if shown:
            head = [*self._messages, Message("user", shown)]
            session = self._runtime.open_chat(head, self._options)
            generation = session.ask(question, self._options)
            self._session, self._asked = session, len(self._messages)
            return generation
        if self._session is None:
            return self._runtime.submit(
                self._runtime.prepare_chat([*self._messages, Message("user", question)], self._options)
            )
        first, *others = self._messages[self._asked :]
        texts = [part for part in first.parts if isinstance(part, str)]
        return self._session.ask([Message("user", texts), *others, Message("user", question)], self._options)


def chat(
    image: Images = None,
    system: System = None,
    model: Model = "demo",
    max_new_tokens: MaxNewTokens = Options.max_new_tokens,
    temperature: Temperature = Options.temperature,
    seed: Seed = Options.seed,
    threads: Threads = None,
    max_memory: MaxMemory = None,
    debug: Debug = False,  # noqa: ARG001
) -> None:
    """Talk with the model, line by line, about pictures or without. /help says which commands there are."""
    options = Options(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    if threads is not None:
        torch.set_num_threads(threads)
    with Runtime.load(model, max_memory=max_memory) as runtime:
        talk = Chat(runtime, said_before(system, None), options)
        for name in image or ():
            talk.show(picture(name))
        with readers_may_leave():
            for line in _lines():
                _answer(talk, line)


def _lines() -> Iterator[str]:
    """What is typed or piped, without empty lines, up to /quit."""
    is_typed = sys.stdin.isatty()
    if is_typed:
        print(HELP, file=sys.stderr)
    while True:
        if is_typed:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line or line.strip() == "/quit":
            return
        if line.strip():
            yield line.strip()


def _answer(talk: Chat, line: str) -> None:
    """One line; what is wrong with it is said, and the conversation goes on."""
    command, _, rest = line.partition(" ")
    try:
        if command == "/image":
            talk.show(Path(picture(rest.strip())))
        elif command == "/forget":
            talk.forget()
        elif command == "/help":
            print(HELP, file=sys.stderr)
        elif command.startswith("/"):
            print(f"avl-edge: there is no command {command}: {HELP}", file=sys.stderr)
        else:
            for piece in talk.ask(line):
                print(piece, end="", flush=True)
            print(flush=True)
    except AvlEdgeError as error:
        print(f"avl-edge: {error}", file=sys.stderr)
