from __future__ import annotations

from emb_model_provider.serving.config import batch_policy
from emb_model_provider.settings import BatchSettings
from tests.serving.fakes import describe


def test_batch_budget_depends_on_the_device_unless_it_is_set() -> None:
    """A GPU gets larger batches than a CPU. The setting takes precedence."""
    gpu, cpu = (batch_policy(BatchSettings(), describe(device=device)).max_batch_tokens for device in ("cuda:0", "cpu"))
    assert gpu > cpu
    assert batch_policy(BatchSettings(max_batch_tokens=77), describe(device="cuda:0")).max_batch_tokens == 77


def test_packed_batches_are_larger_unless_their_size_is_set() -> None:
    """More short texts are needed to occupy a GPU."""
    packed, padded = describe(device="cuda:0", packs=True), describe(device="cuda:0")
    assert batch_policy(BatchSettings(), packed).max_batch_size == 1024
    assert batch_policy(BatchSettings(), padded).max_batch_size == 64
    assert batch_policy(BatchSettings(), packed).max_batch_tokens == 65_536
    assert batch_policy(BatchSettings(max_batch_size=8), packed).max_batch_size == 8
    assert (batch_policy(BatchSettings(), packed).packs, batch_policy(BatchSettings(), padded).packs) == (True, False)


def test_batches_fit_into_the_memory_that_was_free() -> None:
    """Unless the setting says something else."""
    small = describe(device="cuda:0", packs=True, max_batch_tokens=5_000)
    assert batch_policy(BatchSettings(), small).max_batch_tokens == 5_000
    assert batch_policy(BatchSettings(max_batch_tokens=9_000), small).max_batch_tokens == 9_000
