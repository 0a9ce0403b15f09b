"""Packages: what is built from a checkpoint once and opened many times. Only whole ones, and only where they belong."""

from __future__ import annotations

from .decoder import PROMPT, STEP, Plugin, decoder_formats, decoder_profiles
from .errors import BadPackage, BadRecipe, BuildFailed, BuildRunning, Mismatch
from .fingerprint import MODEL_FILES, Fingerprint, Platform, checkpoint_digest, file_digest, require_match
from .job import DECODER_ENGINE, TIMINGS, VISION_ENGINE, Job, build
from .manifest import File, Manifest
from .recipe import Recipe, find_recipe, read_recipe, shipped_recipes
from .store import Package, open_package, publish
from .tensorrt import Sizes, build_engine, find_tensorrt, make_logger, reason

__all__ = [
    "DECODER_ENGINE",
    "MODEL_FILES",
    "PROMPT",
    "STEP",
    "TIMINGS",
    "VISION_ENGINE",
    "BadPackage",
    "BadRecipe",
    "BuildFailed",
    "BuildRunning",
    "File",
    "Fingerprint",
    "Job",
    "Manifest",
    "Mismatch",
    "Package",
    "Platform",
    "Plugin",
    "Recipe",
    "Sizes",
    "build",
    "build_engine",
    "checkpoint_digest",
    "decoder_formats",
    "decoder_profiles",
    "file_digest",
    "find_recipe",
    "find_tensorrt",
    "make_logger",
    "open_package",
    "publish",
    "read_recipe",
    "reason",
    "require_match",
    "shipped_recipes",
]
