"""`emb-provider tune MODEL`: finds the fastest options of OpenVINO for a model on this machine."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from emb_model_provider.backends.base import Tuning
from emb_model_provider.cli import options
from emb_model_provider.cli.interrupt import RESUME_HINT, run_until_interrupted
from emb_model_provider.cli.output import out, print_json, say, show_progress
from emb_model_provider.progress import CancelToken

if TYPE_CHECKING:
    from emb_model_provider.backends.openvino_cpu.tuning import Trial
    from emb_model_provider.model_spec import Precision, Source

_STOP_S = 30.0
"""Longest wait for the compiler to end after an interrupt."""


@click.command()
@click.argument("model", type=options.ModelId(), metavar="MODEL")
@options.source
@options.precision
@click.option("--seconds", type=click.IntRange(1, 3600), default=60, show_default=True,
              help="Approximate limit of the time for measurements.")  # fmt: skip
@options.json
def tune(model: str, source: Source | None, precision: Precision | None, seconds: int, *, as_json: bool) -> None:
    """Find the fastest options of OpenVINO for a model.

    The options are measured on this machine, which should be idle, and the fastest ones are kept with the compiled model.
    A service uses them when it loads the model the next time. They change vectors by rounding only: with options that
    could bring a model below its accuracy floor, nothing is changed. MODEL is an alias of the settings, a repository id
    or a directory. It is downloaded and compiled if necessary.

    JSON: {"model", "tuning": {fused_attention, fused_attention_alone, streams, int8_gain}, "trials": [{"tuning", "ratios":
    {"INPUTSxTOKENS": speed relative to before}, "gain", "is_kept"}]}.
    """
    from emb_model_provider.model_resolver import resolve_model

    settings, manager = options.open_manager()
    spec = resolve_model(settings, model, source=source, precision=precision)
    cancel = CancelToken()
    trials: list[Trial] = []
    found: list[Tuning] = []

    def stop() -> float:
        cancel.cancel()
        return _STOP_S

    def work() -> None:
        with show_progress("auto") as report:
            snapshot, lock = manager.acquire(spec, on_progress=report, cancel=cancel)
            with lock:
                found.append(
                    manager.preparer.tune(
                        spec, snapshot, within_s=seconds, on_progress=report, on_trial=trials.append, cancel=cancel
                    )
                )

    run_until_interrupted(work, RESUME_HINT, stop=stop)
    (tuning,) = found
    if as_json:
        print_json({"model": model, "tuning": asdict(tuning), "trials": [_as_json(trial) for trial in trials]})
        return
    out(_format_table(trials))
    say(f"{model}: {_format(tuning)}")


def _as_json(trial: Trial) -> dict[str, object]:
    ratios = {f"{rows}x{length}": ratio for (rows, length), ratio in trial.ratios.items()}
    return {"tuning": asdict(trial.tuning), "ratios": ratios, "gain": trial.gain, "is_kept": trial.is_kept}


def _format(tuning: Tuning) -> str:
    """Return the options that are not the defaults."""
    defaults = asdict(Tuning())
    changed = {name: value for name, value in asdict(tuning).items() if value != defaults[name]}
    return ", ".join(f"{name}={str(value).lower()}" for name, value in changed.items()) or "defaults"


def _format_table(trials: list[Trial]) -> str:
    """Return a table of the trials: the options, and the speed relative to the best options before."""
    rows = [("options", "inputs × tokens: relative speed", "all", "kept")]
    for trial in trials:
        ratios = "  ".join(f"{rows} × {length}: {ratio:.2f}" for (rows, length), ratio in trial.ratios.items())
        rows.append((_format(trial.tuning), ratios, f"{trial.gain:.2f}", "yes" if trial.is_kept else "no"))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
