"""Models of other kinds that are not accurate enough are computed at fp32, and the service says so."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from emb_model_provider.backends.hardware import native_bf16
from tests.kind_models import ONE_OF_EACH
from tests.service import Service

if TYPE_CHECKING:
    from pathlib import Path

OUTPUTS = {"reranker": "its scores", "sparse": "its sparse vectors", "multi-vector": "its token vectors"}


@pytest.mark.slow
@pytest.mark.skipif(not native_bf16(), reason="bf16 is fp32 on a processor without native bf16")
def test_a_model_below_its_floor_is_computed_in_fp32(backend: str, tmp_path: Path) -> None:
    """A note in the log and in `/v1/models/{id}` contains the agreement and the floor."""
    mapping = {
        kind: {"name": f"test/{kind}", "path": str(ONE_OF_EACH[kind](tmp_path / kind)), "precision": "bf16"}
        for kind in OUTPUTS
    }
    settings = {"MODEL_MAPPING": json.dumps(mapping), "AGREEMENT_FLOORS": '{"bf16": 1}', "BACKEND": backend}
    with Service(tmp_path / "service", CACHE_DIR=str(tmp_path / "cache"), **settings) as service:
        service.wait()
        for kind, what in OUTPUTS.items():
            model = service.http.get(f"/v1/models/{kind}").json()
            assert (model["kind"], model["precision"], model["backend"]) == (kind, "fp32", "openvino")
            (agreement,) = model["fidelity"]["agreement"].values()
            assert agreement > 0.999
            (note,) = [each for each in model["notes"] if each.startswith("computed in fp32: ")]
            assert f"the agreement of {what} with fp32 at bf16 is 0." in note
            assert note.endswith(", below 1")
            assert service.logged(message=f"model {kind}: {note}")
