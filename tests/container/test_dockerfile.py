"""What the Dockerfile promises, read from the file itself."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from emb_model_provider.settings.loading import load_settings
from tests.container.dockerfile import ROOT, command, final_stage, instructions, the


def test_it_runs_as_a_user_without_rights() -> None:
    """A number, so that an orchestrator can see that it is not root."""
    user, _, group = the("USER").text.partition(":")
    assert user.isdecimal()
    assert group.isdecimal()
    assert int(user) >= 1000


def test_everything_that_is_written_goes_to_the_one_volume() -> None:
    """Every path among the variables lies on it, except where programs are found."""
    volume = the("VOLUME").text
    assert volume.startswith("/")
    for step in final_stage():
        if step.name == "ENV":
            for name, value in step.pairs.items():
                if value.startswith("/") and name != "PATH":
                    assert value == volume or value.startswith(f"{volume}/"), name


@pytest.mark.parametrize("name", ["MODELSCOPE_CACHE", "HF_HUB_CACHE", "MODEL_CACHE_DIR"])
@pytest.mark.parametrize("given", ["-e", ".env"])
def test_a_guides_variable_chooses_the_cache_in_a_container_too(
    name: str, given: str, tmp_path: Path
) -> None:
    """Whether it is given to `docker run` or stands in the mounted `.env`: the image's own variables leave it its say."""
    image = {key: value for step in final_stage() if step.name == "ENV" for key, value in step.pairs.items()}
    if given == "-e":
        image[name] = "/models"
    else:
        (tmp_path / ".env").write_text(f"{name}=/models\n", encoding="utf-8")
    settings, _ = load_settings(tmp_path / ".env", image)
    chosen = {settings.modelscope_cache_dir, settings.hf_cache_dir} - {None}
    assert chosen == {Path("/models")}


def test_it_listens_for_others_on_port_9000() -> None:
    """And says so to whoever reads the image."""
    values = {name: value for s in final_stage() if s.name == "ENV" for name, value in s.pairs.items()}
    assert (values["EMB_PROVIDER_HOST"], values["EMB_PROVIDER_PORT"]) == ("0.0.0.0", "9000")
    assert the("EXPOSE").text == "9000"


def test_the_service_is_the_first_process_and_gets_sigterm() -> None:
    """The exec form: no shell stands between the engine's signal and the service."""
    assert the("STOPSIGNAL").text == "SIGTERM"
    assert command(the("CMD")) == ["python", "-m", "emb_model_provider.main"]
    assert command(the("HEALTHCHECK"))[0] == "python"


def test_cpu_is_the_default_and_cuda_an_argument() -> None:
    """No index is named: uv knows where PyTorch's CPU build is, and mirrors are an argument."""
    arguments = [step.text for step in instructions() if step.name == "ARG"]
    assert arguments == ["TORCH=cpu", "UV_DEFAULT_INDEX"]
    assert "://" not in (ROOT / "Dockerfile").read_text(encoding="utf-8")


def test_what_is_copied_is_not_ignored() -> None:
    """`.dockerignore` lets through what the Dockerfile copies, and nothing else."""
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    copied = {
        word for s in instructions() if s.name == "COPY" and "--from" not in s.text for word in s.words[:-1]
    }
    assert "*" in lines
    assert {line[1:] for line in lines if re.match(r"!", line)} == copied
