"""Tokens per minute of each API key, and what is counted for it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import openai
import pytest

from emb_model_provider.api.quotas import Quotas
from emb_model_provider.errors import QuotaExceededError, SettingsError
from emb_model_provider.settings import Settings
from tests.service import Service, assert_error

if TYPE_CHECKING:
    from collections.abc import Iterator

KEYS = {"search": "first-secret", "batch": "second-secret", "free": "third-secret"}
QUOTA = 6_000
"""Tokens per minute, so that 100 of them are added each second."""


class Clock:
    now = 1_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_quota_is_that_of_a_minute_and_is_refilled_all_the_time(clock: Clock) -> None:
    """A minute's tokens can be used at once. Then they are added evenly, up to those of a minute."""
    quotas = Quotas({"a": 60}, clock)
    quotas.check("a")
    quotas.charge("a", 60)
    with pytest.raises(QuotaExceededError) as raised:
        quotas.check("a")
    assert raised.value.retry_after_s == pytest.approx(1)
    clock.now += 1
    quotas.check("a")
    clock.now += 10_000
    quotas.charge("a", 59)
    quotas.check("a")
    quotas.charge("a", 1)
    with pytest.raises(QuotaExceededError):
        quotas.check("a")


def test_request_larger_than_the_quota_delays_the_next_ones(clock: Clock) -> None:
    """It is answered, and the tokens that it took too many are missing later."""
    quotas = Quotas({"a": 60}, clock)
    quotas.check("a")
    quotas.charge("a", 180)
    with pytest.raises(QuotaExceededError, match="'a' of 60 tokens per minute") as raised:
        quotas.check("a")
    assert raised.value.retry_after_s == pytest.approx(121)
    clock.now += 121
    quotas.check("a")


def test_each_key_has_its_own_tokens(clock: Clock) -> None:
    """Also keys whose quota is the one of all others. Requests without a key have none."""
    quotas = Quotas({"a": 10, "*": 5}, clock)
    for name, tokens in (("a", 10), ("b", 5), ("c", 4)):
        quotas.charge(name, tokens)
    for name in ("a", "b"):
        with pytest.raises(QuotaExceededError):
            quotas.check(name)
    quotas.check("c")
    quotas.charge("", 1_000)
    quotas.check("")
    Quotas({}, clock).check("a")


@pytest.mark.parametrize(
    ("values", "phrase"),
    [
        ({"api_keys": "x,y", "api_key_names": "only"}, "one for each of the 2 keys"),
        ({"api_keys": "x,y", "api_key_names": "same,same"}, "different names"),
        ({"api_keys": "x,y", "quotas": {"other": 5}}, "other is not the name of a key. The names are key-1, key-2"),
        ({"quotas": {"*": 5}}, "set EMB_PROVIDER_API_KEYS"),
    ],
)
def test_wrong_names_and_quotas_are_errors(values: dict[str, object], phrase: str) -> None:
    """The message has no key."""
    with pytest.raises(SettingsError, match=phrase) as raised:
        Settings.from_values(**values)
    assert "x" not in str(raised.value).replace("EMB_PROVIDER", "").split()


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory, service_cache: str, backend: str) -> Iterator[Service]:
    """Return a service whose first two keys have a quota, the second a tiny one."""
    settings = {
        "CACHE_DIR": service_cache,
        "BACKEND": backend,
        "API_KEYS": ",".join(KEYS.values()),
        "API_KEY_NAMES": ",".join(KEYS),
        "QUOTAS": json.dumps({"search": QUOTA, "batch": 1}),
    }
    with Service(tmp_path_factory.mktemp("limited"), **settings) as started:
        yield started.wait()


def bearer(name: str) -> dict[str, str]:
    return {"authorization": f"Bearer {KEYS[name]}"}


def test_used_up_quota_is_429_in_the_form_of_each_api(limited: Service) -> None:
    """With Retry-After. Other keys, and routes that compute nothing, are not affected."""
    body = {"input": "some text"}
    assert limited.http.post("/v1/embeddings", json=body, headers=bearer("batch")).status_code == 200
    response = limited.http.post("/v1/embeddings", json=body, headers=bearer("batch"))
    assert_error(response, 429, "rate_limit_exceeded", type="rate_limit_error", phrase="'batch' of 1 tokens per minute")
    assert int(response.headers["retry-after"]) == 120
    ollama = limited.http.post("/api/embed", json=body, headers={"api-key": KEYS["batch"]})
    assert ollama.status_code == 429
    assert "tokens per minute" in ollama.json()["error"]
    assert limited.http.get("/v1/models", headers=bearer("batch")).status_code == 200
    assert limited.http.post("/v1/embeddings", json=body, headers=bearer("free")).status_code == 200


def test_sdk_of_openai_waits_for_the_quota(limited: Service) -> None:
    """Its first try gets 429, and a later one is answered, without an error for the program."""
    before = limited.figure("emb_provider_key_requests_total", key="search", status="429")
    with openai.OpenAI(base_url=f"{limited.url}/v1", api_key=KEYS["search"], max_retries=3) as client:
        texts = ["word " * 250] * (QUOTA // 252 + 2)
        client.embeddings.create(model="all-MiniLM-L6-v2", input=texts)
        answer = client.embeddings.create(model="all-MiniLM-L6-v2", input="one more")
    assert len(answer.data[0].embedding) == 384
    assert limited.figure("emb_provider_key_requests_total", key="search", status="429") > before


def test_requests_and_tokens_are_counted_by_the_name_of_the_key(limited: Service) -> None:
    """The key itself is nowhere, and requests without a valid key have no name."""
    names = ("emb_provider_key_requests_total", "emb_provider_key_tokens_total")
    before = [limited.figure(name, key="free") for name in names]
    answer = limited.http.post("/v1/embeddings", json={"input": ["a", "b"]}, headers=bearer("free")).json()
    added = [limited.figure(name, key="free") - value for name, value in zip(names, before, strict=True)]
    assert added == [1, answer["usage"]["total_tokens"]]
    limited.http.post("/v1/embeddings", json={"input": "a"}, headers={"authorization": "Bearer wrong"})
    assert limited.figure("emb_provider_errors_total", model="", code="invalid_api_key") >= 1
    text = limited.http.get("/metrics").text
    assert set(KEYS) | {""} >= {
        line.split('"')[1] for line in text.splitlines() if line.startswith("emb_provider_key_")
    }
    assert not any(key in text for key in KEYS.values())
