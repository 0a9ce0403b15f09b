"""Ask one question about one picture, and print the answer as it is made.

python examples/ask.py examples/cockpit.png "What is the speed?"
"""

import sys
from pathlib import Path

from avl_edge import AvlEdgeError, Options, Runtime

if len(sys.argv) != 3:
    sys.exit(__doc__)
picture, question = sys.argv[1:]
runtime = Runtime.load("demo")
try:
    for event in runtime.generate([Path(picture)], question, Options(max_new_tokens=120)):
        print(event.text, end="", flush=True)
except AvlEdgeError as error:
    sys.exit(str(error))
print()
