"""A package of TensorRT engines, built and run on this machine, against the same model on the CPU."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

from avl_edge import Formats, Options, Result, Runtime
from avl_edge.backends.tensorrt import decoder_plugin
from avl_edge.model.demo import DEMO
from avl_edge.package.engine import Job, Recipe, build, decoder_formats
from tools.gpu.dut import require
from tools.gpu.report import Skipped

PICTURE = Path("examples/cockpit.png")
QUESTIONS = ("What is the speed?", "Read all instruments.", "What is on the road ahead?")
METHODS = ("full", "avl", "distinct", "h2o")
OF_SESSIONS: tuple[tuple[str, dict[str, float]], ...] = (
    ("full", {}),
    ("avl", {"prefill_keep": 100, "secondary": 100}),
    ("distinct", {}),
)
RECIPE = Recipe(prune_after=2, images=1, prompt_tokens=1024, sequences=4, pool_rows=65536, workspace="1GiB")


def check_engines(precision: str = "stored") -> dict[str, float]:
    """The demo model as a package, several requests together, plain ones and questions about one image session, over
    exact rows and over those that engines of its precision read besides: every answer begins as on the CPU, and three
    of four are the same to their ends; half precision rounds otherwise here and there. :class:`Skipped` without
    TensorRT."""
    plugin = decoder_plugin()
    if plugin is None:
        raise Skipped("there is no tensorrt that takes plugins: on a Jetson it comes with JetPack")
    with TemporaryDirectory() as folder:
        out = Path(folder) / "package"
        recipe = Recipe(**{**vars(RECIPE), "precision": precision})
        job = Job.of(DEMO, recipe)
        build(job, out, version("avl-edge"), None, plugin)
        ours, oracle = Runtime.load(out), Runtime.load("demo")
        packed = decoder_formats(job.spec, job.settings.precision)[1:]
        rows = [Formats(name, name, name) for name in packed]
        asked = [_options(name) for name in METHODS] + [_options("full", formats=each) for each in rows]
        of_sessions = [_options(*each) for each in OF_SESSIONS] + [_options("full", formats=each) for each in rows]
        pairs = [pair for each in asked for pair in zip(_ask(ours, each), _ask(oracle, each), strict=True)]
        pairs += [
            pair
            for each in of_sessions
            for pair in zip(_ask_together(ours, each), _ask_together(oracle, each), strict=True)
        ]
    first = sum(each.token_ids[0] != other.token_ids[0] for each, other in pairs)
    require(first == 0, f"{first} of {len(pairs)} answers begin otherwise than on the CPU")
    same = sum(each.token_ids == other.token_ids for each, other in pairs)
    require(same >= 0.75 * len(pairs), f"{len(pairs) - same} of {len(pairs)} answers are not the CPU's")
    decode = [each.timings.decode_ms_per_token for each, _ in pairs]
    return {"answers": len(pairs), "same": same, "decode_ms_per_token": min(decode)}


def _options(method: str, parameters: dict[str, float] | None = None, formats: Formats | None = None) -> Options:
    return Options(method, parameters or {}, formats or Formats(), max_new_tokens=24)


def _ask(runtime: Runtime, options: Options) -> list[Result]:
    """All questions, decoded together."""
    running = [runtime.generate([PICTURE], question, options) for question in QUESTIONS]
    return [generation.result() for generation in running]


def _ask_together(runtime: Runtime, options: Options) -> list[Result]:
    """The same about one image session."""
    with runtime.open_images([PICTURE], options) as session:
        running = [session.ask(question) for question in QUESTIONS]
        return [generation.result() for generation in running]
