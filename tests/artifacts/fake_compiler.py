"""A fake compiler process: it imports no torch, and ends at once.

FAKE_COMPILER in the environment is a JSON object: `copy`, an artifact whose files become the result; `log`, a file that
gets one line per start; `wait_for`, a file to wait for before the result; `outcome`, an outcome to report instead of
`done`; `die`, the number of a signal to end by, after the line `last_words` on stderr; `step`, the name of its step.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path

from emb_model_provider.artifacts.compiler_process import CompileJob, CompileResult, CompileStep, to_line
from emb_model_provider.artifacts.manifest import FILES, read_artifact, write_manifest
from emb_model_provider.compiler.__main__ import exit_with_parent


def send(event: CompileStep | CompileResult) -> None:
    sys.stdout.write(to_line(event))
    sys.stdout.flush()


def main() -> None:
    options = json.loads(os.environ["FAKE_COMPILER"])
    job = CompileJob.from_json(sys.stdin.readline())
    exit_with_parent(job.parent)
    with Path(options["log"]).open("a") as log:
        log.write(f"{os.getpid()}\n")
    send(CompileStep(options.get("step", "pretend")))
    source = Path(options["copy"])
    for name in FILES:
        shutil.copyfile(source / name, job.directory / name)
    while "wait_for" in options and not Path(options["wait_for"]).exists():
        time.sleep(0.02)
    if "die" in options:
        sys.stderr.write(f"{options.get('last_words', '')}\n")
        os.kill(os.getpid(), options["die"])
    if "outcome" in options:
        send(CompileResult(options["outcome"], "as the test requests"))
        return
    artifact = read_artifact(source)
    assert artifact is not None
    write_manifest(job.directory, job.recipe, artifact.description, made_by="the fake compiler", probe=artifact.probe)
    send(CompileResult("done"))


if __name__ == "__main__":
    main()
