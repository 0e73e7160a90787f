"""Stands in for the compile process where a test is about what surrounds it: no torch, done at once.

FAKE_CHILD in the environment is JSON: `copy`, an artifact to hand in; `log`, a file that gets a line per start;
`wait_for`, a file to wait for before the result; `outcome`, a result to give instead; `die`, a signal.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path

from emb_model_provider.artifacts.compile_job import Job, Phase, Result
from emb_model_provider.artifacts.manifest import FILES, read_artifact, write_manifest
from emb_model_provider.compiler.__main__ import _end_with


def tell(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> None:
    told = json.loads(os.environ["FAKE_CHILD"])
    job = Job.from_json(sys.stdin.readline())
    _end_with(job.parent)
    with Path(told["log"]).open("a") as log:
        log.write(f"{os.getpid()}\n")
    tell(Phase("pretend").to_json())
    source = Path(told["copy"])
    for name in FILES:
        shutil.copyfile(source / name, job.directory / name)
    while "wait_for" in told and not Path(told["wait_for"]).exists():
        time.sleep(0.02)
    if "die" in told:
        os.kill(os.getpid(), told["die"])
    if "outcome" in told:
        tell(Result(told["outcome"], "as the test wants it").to_json())
        return
    made = read_artifact(source)
    assert made is not None
    write_manifest(job.directory, job.recipe, made.description, made_by="a fake")
    tell(Result("done").to_json())


if __name__ == "__main__":
    main()
