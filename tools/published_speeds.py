"""What others measured on a Jetson AGX Orin 64, and what `avl-edge plan` says of the same model there, as JSON.

python -m tools.record docs/measurements/orin_plans.json -- python -m tools.published_speeds
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import Any

EDGE_LLM = "TensorRT Edge-LLM 0.10, JetPack 7.2, INT4 AWQ"
TINY_CHAT = "TinyChat, VILA-7B INT4"


@dataclass(frozen=True)
class Case:
    """A published measurement: ``tokens_per_s`` with so many ``rows`` held; times of encoder and prompt in ms, memory
    in GB, where they were told. ``edge``: of the picture, in pixels."""

    model: str
    source: str | None
    edge: int
    rows: int
    tokens_per_s: float | None
    encode_ms: float | None = None
    prefill_ms: float | None = None
    memory_gb: float | None = None


CASES = (
    Case("qwen3-vl-2b", EDGE_LLM, 512, 327, 98.9, 36, 46, 4.6),
    Case("qwen3-vl-2b", EDGE_LLM, 512, 2048, 88.7),
    Case("qwen3-vl-4b", EDGE_LLM, 512, 327, 54.7, 36, 106, 6.1),
    Case("qwen3-vl-4b", EDGE_LLM, 512, 2048, 50.8),
    Case("qwen3-vl-8b", EDGE_LLM, 512, 327, 32.1, 53, 178, 9.0),
    Case("qwen3-vl-8b", EDGE_LLM, 512, 2048, 30.6),
    Case("llava-1.6-vicuna-7b", TINY_CHAT, 336, 1247, 35.6),
    Case("llava-1.6-vicuna-7b", None, 672, 2999, None),
)


def planned(case: Case) -> dict[str, Any]:
    """The plan of a request whose prompt takes ``rows`` tokens, with the picture in it."""
    image_tokens = _plan(case, 71)["prompt"]["images"]
    return _plan(case, case.rows - image_tokens)


def _plan(case: Case, text: int) -> dict[str, Any]:
    options = {
        "--model": case.model,
        "--device": "agx-orin-64",
        "--power": "MAXN",
        "--weights": "int4",
        "--image-size": f"{case.edge}x{case.edge}",
        "--prompt-tokens": str(text),
        "--max-new-tokens": "2",
    }
    command = [sys.executable, "-m", "avl_edge", "plan", "--json", *(each for pair in options.items() for each in pair)]
    document: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return document


def main() -> None:
    """Print all cases with their plans."""
    cases = []
    for case in CASES:
        plan = planned(case)
        time, memory = plan["time"], plan["memory"]
        cases.append(
            {
                **asdict(case),
                "image_tokens": plan["prompt"]["images"],
                "basis": time["basis"],
                "planned": {
                    "tokens_per_s": round(time["tokens_per_s"], 1),
                    "encode_ms": round(time["encode_ms"]),
                    "prefill_ms": round(time["prefill_ms"]),
                    "memory_gb": round(memory["peak_bytes"] / 1e9, 1),
                },
            }
        )
    print(json.dumps({"device": "agx-orin-64", "power_mode": "MAXN", "weights": "int4", "cases": cases}))


if __name__ == "__main__":
    main()
