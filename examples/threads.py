"""Threads that ask one runtime: each waits for its own answers, and all are computed together. Ctrl-C ends it in order.

python examples/threads.py examples/cockpit.png "What is the speed?" "Which gear is it in?"
"""

import sys
import threading
from pathlib import Path

from avl_edge import AvlEdgeError, Options, Runtime


def ask(runtime: Runtime, picture: Path, question: str) -> None:
    try:
        result = runtime.generate([picture], question, Options(max_new_tokens=40)).result(timeout=60)
    except (AvlEdgeError, TimeoutError) as error:  # of this request alone: the others go on
        print(f"{question} {error}")
    else:
        print(f"{question} {result.text}  ({result.kv.bytes_peak} bytes at most)")


def main() -> None:
    picture, questions = Path(sys.argv[1]), sys.argv[2:]
    runtime = Runtime.load("demo")
    threads = [threading.Thread(target=ask, args=(runtime, picture, question)) for question in questions]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except KeyboardInterrupt:
        print("cancelled", file=sys.stderr)
    finally:
        runtime.close()  # cancels who is left: their threads have their results, and end


if len(sys.argv) < 3:
    sys.exit(__doc__)
main()
