"""The service: HTTP as clients of OpenAI's API speak it, over one engine.

Its packages are those of the extra `serve`.
"""

from __future__ import annotations

from ..optional import optional

# The modules of this wing import them at their tops; whoever imports one of these comes through here first.
for _package in ("pydantic", "starlette", "uvicorn", "prometheus_client"):
    optional(_package, "the service", "serve")
