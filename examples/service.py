"""Answers for many clients from one event loop: streamed, with a deadline, and cancelled when a client leaves.

python examples/service.py examples/cockpit.png "What is the speed?" "Which gear is it in?"
"""

import asyncio
import sys
from pathlib import Path

from avl_edge import AvlEdgeError, Options, Runtime


async def answer(runtime: Runtime, picture: Path, question: str) -> str:
    """One client: it gets its answer as it is made, or one line that says why not."""
    try:
        # Reading a picture is work of this thread, so a pool of threads does it.
        request = await asyncio.to_thread(runtime.prepare, [picture], question, Options(max_new_tokens=40))
        handle = runtime.submit(request, priority=1, deadline=60.0).handle
        text = ""
        async for event in handle:  # cancelling this task would cancel the request
            text += event.text
        return f"{text}  ({(await handle).kv.bytes_peak} bytes at most)"
    except AvlEdgeError as error:
        return str(error)


async def impatient(runtime: Runtime, picture: Path) -> str:
    """A client that leaves before its answer is complete."""
    request = runtime.prepare([picture], "Describe the picture in detail.", Options(max_new_tokens=200))
    handle = runtime.submit(request).handle
    async for _ in handle:
        break
    handle.cancel()
    return (await handle).finish_reason


async def main() -> None:
    picture, questions = Path(sys.argv[1]), sys.argv[2:]
    with Runtime.load("demo") as runtime:  # closed at the end: whoever is still on its way is cancelled
        clients = [answer(runtime, picture, question) for question in questions]
        *answers, left = await asyncio.gather(*clients, impatient(runtime, picture))
    for question, said in zip(questions, answers, strict=True):
        print(f"{question} {said}")
    print(f"the client that left: {left}")


if len(sys.argv) < 3:
    sys.exit(__doc__)
asyncio.run(main())
