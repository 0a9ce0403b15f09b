"""Several questions at once, each within its own KV budget, over one pool.

python examples/together.py examples/cockpit.png "What is the speed?" "Which gear is it in?"
"""

import sys
from pathlib import Path

from avl_edge import AvlEdgeError, Options, Runtime

if len(sys.argv) < 3:
    sys.exit(__doc__)
picture, *questions = sys.argv[1:]
runtime = Runtime.load("demo")
options = Options(kv_budget=3_000_000, max_new_tokens=60)
try:
    generations = [runtime.generate([Path(picture)], question, options) for question in questions]
except AvlEdgeError as error:
    sys.exit(str(error))
for question, generation in zip(questions, generations, strict=True):
    result = generation.result()
    kv = result.kv
    print(f"{question} {result.text}  ({result.method}: at most {kv.bytes_peak} of {kv.bytes_full} bytes)")
