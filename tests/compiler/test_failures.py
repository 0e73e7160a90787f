"""Every error of the compiler process becomes a result with a reason."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from emb_model_provider.artifacts.compiler_process import CompileJob, CompileResult, run_compiler
from emb_model_provider.artifacts.recipe import recipe_for
from emb_model_provider.compiler.failures import describe_export_error, is_temporary, result_of
from emb_model_provider.errors import LoadError
from emb_model_provider.progress import CancelToken, Progress
from tests.artifacts.helpers import FAMILY
from tests.models import snapshot_of, spec_of

if TYPE_CHECKING:
    from pathlib import Path

    from tests.artifacts.helpers import CompiledModels


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "outcome", "reason"),
    [
        (ValueError("no padding token"), "unsupported", "ValueError: no padding token"),
        (LoadError("OpenVINO cannot run it"), "unsupported", "OpenVINO cannot run it"),
        (KeyError("spec"), "unsupported", "KeyError: 'spec'"),
        (RuntimeError("Sizes do not match\nat line 3"), "unsupported", "RuntimeError: Sizes do not match"),
        (RuntimeError("std::bad_alloc"), "no memory", "RuntimeError: std::bad_alloc"),
        (MemoryError(), "no memory", "MemoryError"),
        (OSError("No space left on device"), "unable", "OSError: No space left on device"),
        (ImportError("no module"), "unable", "ImportError: no module"),
        (SystemExit(3), "unable", "SystemExit: 3"),
        (KeyboardInterrupt(), "unable", "KeyboardInterrupt"),
    ],
)
def test_an_error_is_named_with_its_step(error: BaseException, outcome: str, reason: str) -> None:
    """Only errors that depend on the model are recorded as a refusal; all others are tried again."""
    result = result_of(error, "verify")
    assert (result.outcome, result.reason) == (outcome, f"compiling failed at the step 'verify': {reason}")


def test_temporary_errors() -> None:
    """They depend on the machine, not on the model."""
    assert is_temporary(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"))
    assert not is_temporary(RuntimeError("data-dependent control flow"))
    assert not is_temporary(ValueError("out of memory"))
    assert is_temporary(caused(LoadError("OpenVINO cannot run the graph"), MemoryError()))
    assert not is_temporary(caused(LoadError("it has no tokenizer"), OSError("no such file")))


def test_a_job_that_cannot_be_read_has_a_reason() -> None:
    """As after an update of the package beneath a running service."""
    done = subprocess.run(
        [sys.executable, "-m", "emb_model_provider.compiler"], input='{"spec": 1}\n',
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = CompileResult(**json.loads(done.stdout.splitlines()[-1]))
    assert result.outcome == "unable"
    assert result.reason == "the compiler cannot read its job: KeyError: 'recipe'. Restart the service"


def test_an_unexpected_error_reaches_the_parent(compiled: CompiledModels, tmp_path: Path) -> None:
    """The process is not killed by a signal when it ends, although its stdin is still open."""
    spec, snapshot = spec_of(), snapshot_of(compiled.directory(FAMILY))
    recipe = recipe_for(spec, snapshot, trust_remote_code=False, native_bf16=False)
    job = CompileJob(spec=spec, snapshot=snapshot, recipe=recipe, directory=tmp_path, threads=0)
    progress: list[Progress] = []
    result = run_compiler(job, progress.append, CancelToken())
    assert result.outcome == "unsupported"
    assert result.reason.startswith("compiling failed at the step 'import': RuntimeError: ")
    assert {each.step for each in progress} == {"import"}


def test_operations_that_openvino_does_not_support_are_named() -> None:
    """They are not in the first line of its message."""
    error = RuntimeError(
        "Check 'false' failed at src/frontends/x.cpp:151:\nModel wasn't fully converted.\nSummary:\n"
        "-- No conversion rule found for operations: aten::histc, x::y\n"
    )
    assert describe_export_error(error) == "OpenVINO does not support its operations aten::histc, x::y"
    assert describe_export_error(ValueError("other\nlines")) == "ValueError: other"


def test_the_advice_for_artifacts_is_not_given_for_a_graph_that_is_being_made() -> None:
    """Its directory is temporary."""
    error = caused(LoadError("OpenVINO cannot run /cache/.x.tmp. Remove its directory"), RuntimeError("a\nbad shape"))
    assert describe_export_error(error) == "OpenVINO cannot run its graph: bad shape"
