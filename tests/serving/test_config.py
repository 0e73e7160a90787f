from __future__ import annotations

from emb_model_provider.serving.config import batch_policy
from emb_model_provider.settings import BatchSettings
from tests.serving.fakes import describe


def test_batch_budget_depends_on_the_device_unless_it_is_set() -> None:
    """A GPU gets larger batches than a CPU. The setting takes precedence."""
    gpu, cpu = (batch_policy(BatchSettings(), describe(device=device)).max_batch_tokens for device in ("cuda:0", "cpu"))
    assert gpu > cpu
    assert batch_policy(BatchSettings(max_batch_tokens=77), describe(device="cuda:0")).max_batch_tokens == 77
