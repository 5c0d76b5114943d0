"""Schemathesis over the server's own document of its interface."""

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "unsupported_method",
    "ignored_auth",
)
"""Not among them: that whatever keeps to the document is answered. Which tokens and lengths a host
has, and which models are served, no document says."""


async def fuzz(base_url: str, key: str, folder: Path, limit_sec: int) -> dict[str, Any]:
    """Run schemathesis, bounded in examples and time.

    Args:
        base_url: Of the server.
        key: One that may administer, so that no route is left out.
        folder: For its report.
        limit_sec: Seconds.

    Returns:
        How many cases there were, and what failed.
    """
    report = folder / "schemathesis.json"
    words = ["run", f"{base_url}/openapi.json", "--header", f"Authorization: Bearer {key}"]
    words += ["--checks", ",".join(CHECKS), "--phases", "examples,coverage,fuzzing", "--seed", "1"]
    words += ["--max-time", str(limit_sec), "--max-examples", "60", "--continue-on-failure"]
    words += ["--report", "json", "--report-json-path", str(report), "--no-shrink"]
    words += ["--request-timeout", "60", "--warnings", "off", "--no-color"]
    # It writes a cache where it runs; the hooks are found from here.
    path = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "SCHEMATHESIS_HOOKS": "bench.load.hooks"}
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "schemathesis.cli",
        *words,
        env=environment,
        cwd=folder,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    said, _ = await process.communicate()
    text = said.decode("utf-8", "replace")
    (folder / "schemathesis.txt").write_text(text, encoding="utf-8")
    if not report.is_file():
        return {"cases": 0, "failures": [{"title": f"no report: {text[-500:]}"}], "errors": []}
    found = json.loads(report.read_text(encoding="utf-8"))
    return {
        "version": found["schemathesis_version"],
        "cases": found["test_cases"]["generated"],
        "operations": found["operations"]["tested"],
        "sec": found["running_time"],
        "failures": found["failures"],
        "errors": found["errors"],
    }
